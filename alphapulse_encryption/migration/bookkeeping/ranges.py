"""Batch ranges: their boundaries, and how far operations on them are. What moves them belongs in ``progress``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, LiteralString

from psycopg.sql import SQL
from pydantic import ConfigDict

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.columns import Status, reset_status
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Connection, answer

# The primary key of a row, each part in its text form.
Key = tuple[str, ...]
# An operation on rows, as the bookkeeping has it.
Step = Literal["backfill", "rotate", "decrypt", "discard", "repair"]

# Whether the role of a session may write here, which an application's may not. The server keeps the first form, in a
# trigger's condition, by the table's number. The second is for the body of a function, which is text: it runs as an
# application that may not even look into the schema.
MAY_WRITE = SQL(
    """"pg_catalog"."has_any_column_privilege"(('"alphapulse_encryption"."ranges"'::"pg_catalog"."regclass")"""
    """::"pg_catalog"."oid", 'UPDATE'::"pg_catalog"."text")"""
)
MAY_WRITE_BY_NAME = SQL(
    "coalesce((SELECT has_any_column_privilege(c.oid, 'UPDATE') FROM pg_catalog.pg_class c "
    "JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace "
    "WHERE n.nspname = 'alphapulse_encryption' AND c.relname = 'ranges'), false)"
)


@dataclass(frozen=True)
class BatchRange:
    """One batch range of a table, and how far an operation on it is.

    Args:
        lower: the range has the rows with ``lower < key <= upper``; None leaves that side open.
        position: the last key that is done.
    """

    number: int
    lower: Key | None
    upper: Key | None
    status: Status
    position: Key | None
    rows_processed: int

    @property
    def is_empty(self) -> bool:
        """Whether no key can fall into it: a table with fewer rows than ranges leaves some empty."""
        return self.lower is not None and self.lower == self.upper


# The backfill's progress is that of the plan itself; every other operation's is a row of its own.
_PROGRESS = SQL("""(
    SELECT table_name, batch_range, 'backfill' AS operation, 0 AS goal, status, position, rows_processed, updated_at,
           waiting_for, error_message FROM alphapulse_encryption.ranges
     UNION ALL
    SELECT table_name, batch_range, operation, goal, status, position, rows_processed, updated_at,
           waiting_for, error_message FROM alphapulse_encryption.operations
) AS progress""")
_RANGES = SQL("""
SELECT r.batch_range, r.lower_key, r.upper_key, coalesce(status, 'pending'), position, coalesce(rows_processed, 0)
  FROM (SELECT table_name, batch_range, lower_key, upper_key, %s AS operation, %s AS goal
          FROM alphapulse_encryption.ranges) r
  LEFT JOIN {progress} USING (table_name, batch_range, operation, goal)
 WHERE table_name = %s AND (%s::int IS NULL OR batch_range = %s) ORDER BY batch_range
""").format(progress=_PROGRESS)


def _ranges(connection: Connection, *parameters: object) -> tuple[BatchRange, ...]:
    return tuple(
        BatchRange(number, _key(lower), _key(upper), status, _key(position), rows)
        for number, lower, upper, status, position, rows in connection.execute(_RANGES, parameters)
    )


def _key(parts: Sequence[str] | None) -> Key | None:
    return None if parts is None else tuple(parts)


def read_ranges(connection: Connection, table: Table) -> tuple[BatchRange, ...]:
    """The table's batch ranges in order, with the backfill's progress; empty where they were not planned yet."""
    return _ranges(connection, "backfill", 0, table.key, None, None)


def read_range(
    connection: Connection, table: Table, number: int, operation: Step = "backfill", goal: int = 0
) -> BatchRange:
    """One batch range, with an operation's progress.

    Raises:
        RefusedError: it was never planned.
    """
    found = _ranges(connection, operation, goal, table.key, number, number)
    if not found:
        raise RefusedError(
            f"Batch range {number:02d} of {table.key} is not planned. Ranges are planned by encrypted_columns "
            f"(--add-columns --table {table.key}); ALPHAPULSE_BATCH_RANGES has to be what it was then."
        )
    return found[0]


def leave_no_gap(boundaries: Iterable[tuple[Sequence[str] | None, Sequence[str] | None]]) -> bool:
    """Whether every row falls into one of the ranges, told by lower and upper key of each, in order."""
    edges = [(lower, upper) for lower, upper in boundaries if lower is None or lower != upper]
    lowers, uppers = [lower for lower, _ in edges], [upper for _, upper in edges]
    return lowers[1:] == uppers[:-1] and lowers[:1] == uppers[-1:] == [None] and None not in lowers[1:]


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
class Progress:
    """How far a table's backfill is.

    Args:
        completed: ranges that are done.
        waiting: ranges that were not begun.
        rows: encrypted so far.
        rows_left: an estimate, as if all ranges with rows were as large.
        rows_per_second: of the ranges that were worked on lately; None where none is begun and not done.
        moved: when a range was last heard of.
        still: whether none has moved lately.
        reason: what a range waits for.
    """

    ranges: int = 0
    completed: int = 0
    waiting: int = 0
    rows: int = 0
    rows_left: int = 0
    rows_per_second: float | None = None
    moved: datetime | None = None
    still: bool = False
    reason: str | None = None


# Ranges that were worked on at once took the time that they cover together.
_BACKFILL = """
WITH one AS (
    SELECT status, updated_at, waiting_for, rows_processed AS rows, coalesce(lower_key = upper_key, false) AS is_empty,
           tstzrange(started_at, greatest(started_at, coalesce(completed_at, updated_at))) AS span
      FROM alphapulse_encryption.ranges WHERE table_name = %(table)s),
share AS (SELECT %(rows)s::float8 / nullif(count(*), 0) AS rows FROM one WHERE NOT is_empty),
lately AS (
    SELECT nullif(sum(rows), 0)::float8 AS rows, range_agg(span) AS spans FROM one
     WHERE NOT isempty(span) AND upper(span) >= clock_timestamp() - %(recent)s)
SELECT count(status), count(*) FILTER (WHERE status = 'completed'), count(*) FILTER (WHERE status = 'pending'),
       coalesce(sum(one.rows), 0)::bigint,
       CASE WHEN share.rows IS NULL THEN %(rows)s ELSE coalesce(round(sum(greatest(0, share.rows - one.rows))
          FILTER (WHERE status <> 'completed' AND NOT is_empty)), 0) END::bigint,
       CASE WHEN bool_or(status = 'in_progress') THEN
         (SELECT lately.rows / sum(extract(epoch FROM upper(span) - lower(span)))::float8
            FROM lately, unnest(spans) AS span GROUP BY lately.rows) END,
       max(updated_at), coalesce(max(updated_at) < clock_timestamp() - %(recent)s, false), min(waiting_for)
  FROM share LEFT JOIN one ON true GROUP BY share.rows
"""


def backfill_progress(connection: Connection, table: Table, recent: timedelta, *, rows: int = 0) -> Progress:
    """How far a table's backfill is.

    Args:
        recent: what happened longer ago was not lately.
        rows: of the table, by the planner's estimate.
    """
    parameters = {"table": table.key, "rows": rows, "recent": recent}
    return Progress(*connection.execute(_BACKFILL, parameters).fetchall()[0])


@dataclass(frozen=True)
class RangeStatus:
    """A batch range that is worked on, holds back, failed, or was left in the middle."""

    number: int
    step: Literal["backfill", "rotation", "decrypt", "discard", "repair"]
    status: Literal["running", "holding back", "interrupted", "failed"]
    rows: int
    updated_at: datetime | None
    waiting_for: str | None
    error_message: str | None

    # Documents hold it as it is.
    __pydantic_config__ = ConfigDict(extra="forbid")


# Of a rotation what leads to the current version. Who holds a range is the one of them that wrote last.
_UNDER_WAY: LiteralString = """
WITH begun AS (
    SELECT *, batch_range = ANY (%(working)s::int[]) AND 1 = row_number() OVER (
               PARTITION BY batch_range ORDER BY updated_at DESC NULLS LAST, operation = 'backfill') AS works
      FROM {progress}
     WHERE table_name = %(table)s AND (operation = 'backfill' OR status IN ('in_progress', 'failed'))
       AND (operation <> 'rotate'
         OR goal = (SELECT key_version FROM alphapulse_encryption.key_versions WHERE state = 'current')))
SELECT batch_range, CASE operation WHEN 'rotate' THEN 'rotation' ELSE operation END,
       CASE WHEN works AND waiting_for IS NULL THEN 'running' WHEN works THEN 'holding back'
            WHEN status = 'failed' THEN 'failed' ELSE 'interrupted' END,
       rows_processed, updated_at, CASE WHEN works THEN waiting_for END, error_message
  FROM begun WHERE status IN ('in_progress', 'failed') ORDER BY operation <> 'backfill', operation, batch_range
"""


def ranges_under_way(connection: Connection, table: Table, working: Sequence[int]) -> list[RangeStatus]:
    """What was begun on the table's ranges and is not done: the backfill first, then other operations.

    Args:
        working: numbers of the ranges that a session holds now.
    """
    query = SQL(_UNDER_WAY).format(progress=_PROGRESS)
    return [
        RangeStatus(*row) for row in connection.execute(query, {"table": table.key, "working": list(working)})
    ]


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
