"""Lock waits of the traffic's own sessions, as another session sees them."""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import suppress
from typing import Any

import psycopg

SECONDS_BETWEEN_LOOKS = 0.2

# PostgreSQL manual, 53.13 "pg_locks": waitstart is NULL for a very short time after a wait began. Whose lock it is, is
# said by application name: a number would say nothing to anybody afterwards.
_WAITING = """
SELECT a.pid, coalesce(l.waitstart, a.query_start)::text, l.locktype, coalesce(c.relname, ''),
       extract(epoch FROM clock_timestamp() - coalesce(l.waitstart, a.query_start))::float8,
       coalesce((SELECT string_agg(DISTINCT nullif(b.application_name, ''), ', ')
                   FROM pg_stat_activity b WHERE b.pid = ANY (pg_blocking_pids(a.pid))), '')
  FROM pg_stat_activity a JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
  LEFT JOIN pg_class c ON l.database <> 0 AND c.oid = l.relation
 WHERE a.application_name = %s AND a.datname = current_database() AND a.wait_event_type = 'Lock'
"""


class LockWaits:
    """Looks a few times a second; waits that are shorter than that may go unseen.

    Args:
        application_name: of the sessions to look at.
    """

    def __init__(self, url: str, application_name: str) -> None:
        self.seen: Counter[str] = Counter()
        self.longest = 0.0
        self._url = url
        self._name = application_name
        self._known: set[tuple[Any, ...]] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look_on, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def end(self) -> None:
        """Stop looking."""
        self._ended.set()
        self._thread.join()

    def _look_on(self) -> None:
        while not self._ended.is_set():
            # A server that is being restarted has nobody waiting.
            with (
                suppress(psycopg.Error),
                psycopg.connect(
                    self._url, autocommit=True, application_name=f"{self._name}, watched", connect_timeout=10
                ) as connection,
            ):
                while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
                    for pid, since, kind, relation, seconds, holder in connection.execute(
                        _WAITING, [self._name]
                    ):
                        self.longest = max(self.longest, seconds)
                        if (pid, since) not in self._known:
                            self._known.add((pid, since))
                            what = f"{kind} {relation}".strip()
                            self.seen[f"{what} held by {holder}" if holder else what] += 1
            self._ended.wait(SECONDS_BETWEEN_LOOKS)
