"""For whom a concurrent index build waits: told by session, never by what it runs, because queries hold values."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psycopg

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.database import Database

Connection = psycopg.Connection[Any]

SECONDS_BETWEEN_LOOKS = 0.5

# PostgreSQL manual, 27.4.4 "CREATE INDEX Progress Reporting". The start of other roles' transactions is not everybody's
# to see.
_LOCKERS = """
SELECT i.relname, p.current_locker_pid, coalesce(a.application_name, ''), coalesce(a.usename, ''),
       extract(epoch FROM clock_timestamp() - a.xact_start)::float8
  FROM pg_stat_progress_create_index p
  JOIN unnest(%s::text[], %s::text[]) AS t (schema, name) ON p.datname = current_database()
  JOIN pg_namespace n ON n.nspname = t.schema
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = t.name
  LEFT JOIN pg_class i ON i.oid = p.index_relid
  LEFT JOIN pg_stat_activity a ON a.pid = p.current_locker_pid
 WHERE p.current_locker_pid <> 0 AND (p.relid = c.oid OR p.relid IN (SELECT relid FROM pg_partition_tree(c.oid)))
 ORDER BY p.pid
"""


def build_waits_for(connection: Connection, tables: Sequence[Table]) -> str | None:
    """The session that an index build on one of the tables waits for; None where none does."""
    row = connection.execute(_LOCKERS, [[t.schema_name for t in tables], [t.name for t in tables]]).fetchone()
    if row is None:
        return None
    index, pid, application, role, seconds = row
    of_whom = ", ".join(
        part
        for part in (
            application,
            f"role {role}" if role else "",
            f"in a transaction for {seconds:.0f} s" if seconds is not None else "",
        )
        if part
    )
    return f"{index or 'an index'} waits for session {pid}" + (f" ({of_whom})" if of_whom else "")


@contextmanager
def telling(database: Database, table: Table, tell: Callable[[str], None] | None) -> Iterator[None]:
    """Say whom an index build waits for, once for each session, while the block runs.

    Args:
        database: asked over a connection of its own.
        table: whose indexes are built.
        tell: called from another thread; None asks nothing.
    """
    if tell is None:
        yield
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(database, table, tell, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _watch(database: Database, table: Table, tell: Callable[[str], None], ended: threading.Event) -> None:
    told: str | None = None
    # It is a courtesy: that the build cannot be watched must not end the build.
    try:
        with database.session(f"watch the index builds of {table.key}") as connection:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                reason = build_waits_for(connection, [table])
                who = None if reason is None else reason.partition(" (")[0]
                if reason is not None and who != told:
                    tell(reason)
                told = who
    except MigrationError:
        return
