"""What index builds and ANALYZE are doing, and for whom they wait: told by session, never by what that one runs,
because queries hold values.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from alphapulse_encryption.background import in_background
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres.database import Connection, Database

SECONDS_BETWEEN_LOOKS = 0.5
# Each of them is a row in Dagster's storage.
SECONDS_BETWEEN_REPORTS = 10.0

# PostgreSQL manual, 27.4.4 "CREATE INDEX Progress Reporting". The start of other roles' transactions is not everybody's
# to see.
_LOCKERS = """
SELECT coalesce(i.relname, 'an index') || ' waits for session ' || p.current_locker_pid,
       concat_ws(', ', nullif(a.application_name, ''), 'role ' || a.usename,
                 'in a transaction for ' || round(extract(epoch FROM clock_timestamp() - a.xact_start)) || ' s')
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
    row = connection.execute(_LOCKERS, _names(tables)).fetchone()
    if row is None:
        return None
    waits, of_whom = row
    return f"{waits} ({of_whom})" if of_whom else str(waits)


def _names(tables: Sequence[Table]) -> list[list[str]]:
    return [[table.schema_name for table in tables], [table.name for table in tables]]


# PostgreSQL manual, 27.4.1 "ANALYZE Progress Reporting" and 27.4.4. What is being done counts blocks in some phases,
# rows in others.
_UNDER_WAY = """
WITH relation AS (
    SELECT c.oid, c.reltoastrelid FROM unnest(%s::text[], %s::text[]) AS t (schema, name)
      JOIN pg_namespace n ON n.nspname = t.schema JOIN pg_class w ON w.relnamespace = n.oid AND w.relname = t.name
      JOIN pg_class c ON c.oid = w.oid OR c.oid IN (SELECT relid FROM pg_partition_tree(w.oid)))
SELECT coalesce(i.relname, 'an index') || ': ' || p.phase, p.blocks_done, p.blocks_total, p.tuples_done, p.tuples_total
  FROM pg_stat_progress_create_index p LEFT JOIN pg_class i ON i.oid = p.index_relid
 WHERE p.datname = current_database()
   AND p.relid IN (SELECT oid FROM relation UNION SELECT reltoastrelid FROM relation)
 UNION ALL
SELECT c.relname || ': ' || p.phase, p.sample_blks_scanned, p.sample_blks_total, 0, 0
  FROM pg_stat_progress_analyze p JOIN pg_class c ON c.oid = p.relid
 WHERE p.datname = current_database() AND p.relid IN (SELECT oid FROM relation)
 ORDER BY 1
"""


def under_way(connection: Connection, tables: Sequence[Table]) -> tuple[str, str] | None:
    """The index build or ANALYZE that is under way on one of the tables; None where there is none.

    Returns:
        The index or table with the phase in PostgreSQL's words, and how far that is, where the phase counts anything.
    """
    row = connection.execute(_UNDER_WAY, _names(tables)).fetchone()
    if row is None:
        return None
    phase, blocks_done, blocks, rows_done, rows = row
    return phase, how_far(blocks_done, blocks, "blocks") or how_far(rows_done, rows, "rows")


def how_far(done: int, total: int, unit: str) -> str:
    """How much of a total is done, in words to be put behind others; empty where there is none."""
    return f", {done / total:.0%} ({done:,} of {total:,} {unit})" if total else ""


@contextmanager
def telling(
    database: Database, table: Table, tell: Callable[[str], None] | None, *, progress: bool = False
) -> Iterator[None]:
    """Say whom an index build waits for, once for each session, while the block runs.

    Args:
        database: asked over a connection of its own.
        tell: called from another thread; None asks nothing.
        progress: also say what is being done and how far it is, at each new phase and every ten seconds.
    """
    if tell is None:
        yield
        return

    def watch(ended: threading.Event) -> None:
        told: str | None = None
        phase, reported = "", 0.0
        # It is a courtesy: that the build cannot be watched must not end the build.
        with (
            suppress(MigrationError),
            database.session(f"watch the index builds of {table.key}") as connection,
        ):
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                reason = build_waits_for(connection, [table])
                who = None if reason is None else reason.partition(" (")[0]
                if reason is not None and who != told:
                    tell(reason)
                told = who
                doing = under_way(connection, [table]) if progress and reason is None else None
                if doing is not None and (
                    doing[0] != phase or time.monotonic() - reported > SECONDS_BETWEEN_REPORTS
                ):
                    tell("".join(doing))
                    phase, reported = doing[0], time.monotonic()

    with in_background(watch, name="index builds"):
        yield
