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


def lock_waits(url: str, application_name: str, ended: threading.Event) -> tuple[Counter[str], float]:
    """How often sessions of that name waited for what, and the longest wait in seconds.

    It looks a few times a second until the end; waits that are shorter than that may go unseen.
    """
    seen, longest = Counter[str](), 0.0
    known: set[tuple[Any, ...]] = set()
    while not ended.wait(SECONDS_BETWEEN_LOOKS):
        # A server that is being restarted has nobody waiting.
        with (
            suppress(psycopg.Error),
            psycopg.connect(
                url, autocommit=True, application_name=f"{application_name}, watched", connect_timeout=10
            ) as connection,
        ):
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                for pid, since, kind, relation, seconds, holder in connection.execute(
                    _WAITING, [application_name]
                ):
                    longest = max(longest, seconds)
                    if (pid, since) not in known:
                        known.add((pid, since))
                        what = f"{kind} {relation}".strip()
                        seen[f"{what} held by {holder}" if holder else what] += 1
    return seen, longest
