"""Batch ranges: their boundaries, and how far operations on them are. What moves them belongs in ``progress``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, LiteralString

from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.columns import Status, reset_status
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.answers import answer
from alphapulse_encryption.migration.postgres.database import Connection

# The primary key of a row, each part in its text form.
Key = tuple[str, ...]
# An operation on rows, as the bookkeeping has it.
Step = Literal["backfill", "rotate", "decrypt", "discard", "repair"]

# Whether the role of a session may write here, which an application's may not. The server keeps the first form, in a
# trigger's condition, by the table's number. The second is for the body of a function, which is text: it runs as an
# application that may not even look into the schema.
MAY_WRITE = SQL("has_table_privilege('alphapulse_encryption.ranges'::regclass, 'UPDATE')")
MAY_WRITE_BY_NAME = SQL(
    "coalesce((SELECT has_table_privilege(c.oid, 'UPDATE') FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
    "ON n.oid = c.relnamespace WHERE n.nspname = 'alphapulse_encryption' AND c.relname = 'ranges'), false)"
)


@dataclass(frozen=True)
class BatchRange:
    """One batch range of a table, and how far an operation on it is.

    Args:
        lower: the range has the rows with ``lower < key <= upper``; None leaves that side open.
        position: the last key that is done.
        goal: what the operation leads to: of a rotation the key version.
    """

    number: int
    lower: Key | None
    upper: Key | None
    status: Status
    position: Key | None
    rows_processed: int
    started_at: datetime | None
    updated_at: datetime | None
    completed_at: datetime | None
    waiting_for: str | None
    error_message: str | None
    operation: Step
    goal: int

    @property
    def is_empty(self) -> bool:
        """Whether no key can fall into it: a table with fewer rows than ranges leaves some empty."""
        return self.lower is not None and self.lower == self.upper


# The backfill's progress is that of the plan itself; every other operation's is a row of its own.
_PROGRESS = SQL("""(
    SELECT table_name, batch_range, 'backfill' AS operation, 0 AS goal, status, position, rows_processed,
           started_at, updated_at, completed_at, waiting_for, error_message FROM alphapulse_encryption.ranges
     UNION ALL
    SELECT table_name, batch_range, operation, goal, status, position, rows_processed,
           started_at, updated_at, completed_at, waiting_for, error_message FROM alphapulse_encryption.operations
) AS progress""")
_RANGES = """
SELECT r.batch_range, r.lower_key, r.upper_key, coalesce(status, 'pending'), position, coalesce(rows_processed, 0),
       started_at, updated_at, completed_at, waiting_for, error_message, operation, goal
  FROM (SELECT table_name, batch_range, lower_key, upper_key, %s AS operation, %s AS goal
          FROM alphapulse_encryption.ranges) r
  LEFT JOIN {progress} USING (table_name, batch_range, operation, goal)
 WHERE table_name = %s AND (%s::int IS NULL OR batch_range = %s) ORDER BY batch_range
"""


def _ranges(connection: Connection, query: LiteralString, *parameters: object) -> tuple[BatchRange, ...]:
    rows = connection.execute(SQL(query).format(progress=_PROGRESS), parameters)
    return tuple(
        BatchRange(number, _key(lower), _key(upper), status, _key(position), *rest)
        for number, lower, upper, status, position, *rest in rows
    )


def _key(parts: Sequence[str] | None) -> Key | None:
    return None if parts is None else tuple(parts)


def read_ranges(connection: Connection, table: Table) -> tuple[BatchRange, ...]:
    """The table's batch ranges in order, with the backfill's progress; empty where they were not planned yet."""
    return _ranges(connection, _RANGES, "backfill", 0, table.key, None, None)


def read_range(
    connection: Connection, table: Table, number: int, operation: Step = "backfill", goal: int = 0
) -> BatchRange:
    """One batch range, with an operation's progress.

    Raises:
        RefusedError: it was never planned.
    """
    found = _ranges(connection, _RANGES, operation, goal, table.key, number, number)
    if not found:
        raise RefusedError(
            f"Batch range {number:02d} of {table.key} is not planned. Ranges are planned by encrypted_columns "
            f"(--add-columns --table {table.key}); ALPHAPULSE_BATCH_RANGES has to be what it was then."
        )
    return found[0]


def range_lock(table: Table, number: int) -> str:
    """Name of the advisory lock that is held while a range is worked on."""
    return f"alphapulse_encryption range {table.key} {number}"


def plan_lock(table: Table) -> str:
    """Name of the advisory lock on a table's boundaries: shared by who relies on them, exclusive to who moves them."""
    return f"alphapulse_encryption plan {table.key}"


def hold_plan(connection: Connection, table: Table) -> None:
    """Keep the table's ranges as they are planned for as long as this session lasts.

    To be called before the ranges are read, by whatever keeps a result under a range's number.
    """
    locks.hold(connection, plan_lock(table), shared=True)


def plan_ranges(
    connection: Connection, table: Table, planned: Sequence[tuple[list[str] | None, list[str] | None]]
) -> None:
    """Keep the boundaries of ranges, lower and upper key of each; those that are kept already stay."""
    for number, (lower, upper) in enumerate(planned):
        connection.execute(
            "INSERT INTO alphapulse_encryption.ranges (table_name, batch_range, lower_key, upper_key) "
            "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [table.key, number, lower, upper],
        )


_FORGET = (
    "DELETE FROM alphapulse_encryption.verifications WHERE table_name = %s",
    "DELETE FROM alphapulse_encryption.quarantine WHERE table_name = %s",
    "DELETE FROM alphapulse_encryption.operations WHERE table_name = %s",
    "DELETE FROM alphapulse_encryption.ranges WHERE table_name = %s",
)


def forget_ranges(connection: Connection, table: Table) -> None:
    """Forget a table's ranges, and all that speaks of their rows; what is encrypted stays counted."""
    for statement in _FORGET:
        connection.execute(statement, [table.key])
    reset_status(connection, table)


def restart_ranges(connection: Connection, table: Table) -> None:
    """Every range and column of a table is to be done from its beginning."""
    connection.execute(
        "UPDATE alphapulse_encryption.ranges SET status = 'pending', position = NULL, rows_processed = 0, "
        "values_processed = 0, started_at = NULL, completed_at = NULL, waiting_for = NULL, error_message = NULL "
        "WHERE table_name = %s",
        [table.key],
    )
    reset_status(connection, table, uncounted=True)


@dataclass(frozen=True)
class Standing:
    """How a table's ranges stand, for who watches them.

    Args:
        moved: when one of them was last heard of.
        overdue: whether that is longer ago than was asked for.
        reason: what one of them waits for.
    """

    done: int
    ranges: int
    begun: int
    moved: datetime | None
    overdue: bool
    reason: str | None


def standing(connection: Connection, table: Table, limit: timedelta) -> Standing:
    """How far a table's ranges are, and whether they have moved within a time."""
    row = connection.execute(
        "SELECT count(*) FILTER (WHERE status = 'completed'), count(*), count(started_at), max(updated_at), "
        "coalesce(max(updated_at) < clock_timestamp() - %s, false), min(waiting_for) "
        "FROM alphapulse_encryption.ranges WHERE table_name = %s",
        [limit, table.key],
    ).fetchall()[0]
    return Standing(*row)


# Of a rotation what leads to the current version; of what leads back, all that is not done.
_UNDER_WAY = """
SELECT batch_range, lower_key, upper_key, p.status, p.position, p.rows_processed, p.started_at, p.updated_at,
       p.completed_at, p.waiting_for, p.error_message, operation, goal
  FROM alphapulse_encryption.operations p JOIN alphapulse_encryption.ranges USING (table_name, batch_range)
 WHERE table_name = %s AND p.status IN ('in_progress', 'failed') AND (operation <> 'rotate'
   OR goal = (SELECT key_version FROM alphapulse_encryption.key_versions WHERE state = 'current'))
 ORDER BY operation, batch_range
"""


def operations_under_way(connection: Connection, table: Table) -> tuple[BatchRange, ...]:
    """What is being done to the table's ranges, or ended with an error, beside the backfill."""
    return _ranges(connection, _UNDER_WAY, table.key)


def rows_done(connection: Connection, tables: Sequence[Table], *, backfilled: bool) -> int:
    """Rows that backfills have done so far, or to which other operations were done."""
    query = SQL(
        "SELECT coalesce(sum(rows_processed), 0)::bigint FROM {} "
        "WHERE table_name = ANY(%s) AND (operation = 'backfill') = %s"
    ).format(_PROGRESS)
    return int(answer(connection, query, [table.key for table in tables], backfilled))


def waiting_for(connection: Connection) -> str | None:
    """What backfills and other operations wait for now; None where none does."""
    reasons: str | None = answer(
        connection, SQL("SELECT string_agg(DISTINCT waiting_for, '; ') FROM {}").format(_PROGRESS)
    )
    return reasons
