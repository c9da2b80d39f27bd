"""Batch ranges: their boundaries, how far each is, and what that makes of the columns' status."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg import sql

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.columns import Status, lock_columns, reset_status, set_status
from alphapulse_encryption.migration.postgres import locks, wire

Connection = psycopg.Connection[Any]
# The primary key of a row, each part in its text form.
Key = tuple[str, ...]


# Whether the role of a session may write here, which an application's may not. The server keeps the first form, in a
# trigger's condition, by the table's number. The second is for the body of a function, which is text: it runs as an
# application that may not even look into the schema.
MAY_WRITE = sql.SQL("has_table_privilege('alphapulse_encryption.ranges'::regclass, 'UPDATE')")
MAY_WRITE_BY_NAME = sql.SQL(
    "coalesce((SELECT has_table_privilege(c.oid, 'UPDATE') FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n "
    "ON n.oid = c.relnamespace WHERE n.nspname = 'alphapulse_encryption' AND c.relname = 'ranges'), false)"
)


@dataclass(frozen=True)
class BatchRange:
    """One batch range of a table: the rows with ``lower < key <= upper``; None leaves that side open."""

    number: int
    lower: tuple[str, ...] | None
    upper: tuple[str, ...] | None
    status: Status
    position: tuple[str, ...] | None
    rows_processed: int
    values_processed: int

    @property
    def is_empty(self) -> bool:
        """Whether no key can fall into it: a table with fewer rows than ranges leaves some empty."""
        return self.lower is not None and self.lower == self.upper


_RANGE = """
SELECT batch_range, lower_key, upper_key, status, position, rows_processed, values_processed
  FROM alphapulse_encryption.ranges WHERE table_name = %s
"""


def read_ranges(connection: Connection, table: Table) -> tuple[BatchRange, ...]:
    """The table's batch ranges in order; empty where they were not planned yet."""
    rows = connection.execute(_RANGE + " ORDER BY batch_range", [table.key]).fetchall()
    return tuple(_batch_range(row) for row in rows)


def read_range(connection: Connection, table: Table, number: int) -> BatchRange:
    """One batch range.

    Raises:
        RefusedError: it was never planned.
    """
    row = connection.execute(_RANGE + " AND batch_range = %s", [table.key, number]).fetchone()
    if row is None:
        raise RefusedError(
            f"Batch range {number:02d} of {table.key} is not planned. Ranges are planned by encrypted_columns "
            f"(--add-columns --table {table.key}); ALPHAPULSE_BATCH_RANGES has to be what it was then."
        )
    return _batch_range(row)


def _batch_range(row: tuple[Any, ...]) -> BatchRange:
    number, lower, upper, status, position, rows, values = row
    return BatchRange(
        number,
        tuple(lower) if lower is not None else None,
        tuple(upper) if upper is not None else None,
        status,
        tuple(position) if position is not None else None,
        rows,
        values,
    )


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


def begin_range(connection: Connection, table: Table, number: int) -> None:
    """A range begins: it and the table's columns are ``in_progress``."""
    connection.execute(
        "UPDATE alphapulse_encryption.ranges SET status = 'in_progress', error_message = NULL, waiting_for = NULL, "
        "started_at = coalesce(started_at, clock_timestamp()), updated_at = clock_timestamp(), "
        "completed_at = NULL WHERE table_name = %s AND batch_range = %s",
        [table.key, number],
    )
    set_status(connection, table, "in_progress")


def prepare_progress(connection: Connection) -> None:
    """Prepare what :func:`advance_range` executes, for as long as the connection lasts."""
    known = connection.execute("SELECT 1 FROM pg_prepared_statements WHERE name = %s", [_ADVANCE_NAME])
    if known.fetchone() is None:
        wire.script(connection, _ADVANCE)


def advance_range(
    connection: Connection,
    table: Table,
    number: int,
    *,
    position: tuple[str, ...],
    rows: int,
    values: Mapping[str, int],
) -> bytes:
    """The statement that keeps the progress of one batch, for the transaction that holds its data.

    It needs no parameters, so that it can be sent along with others; :func:`prepare_progress` comes before it.
    """
    arguments = [
        list(position),
        rows,
        sum(values.values()),
        table.key,
        number,
        list(values),
        list(values.values()),
    ]
    return (
        sql.SQL("EXECUTE {} ({})")
        .format(sql.Identifier(_ADVANCE_NAME), sql.SQL(", ").join(map(sql.Literal, arguments)))
        .as_bytes(connection)
    )


_ADVANCE_NAME = "encryption_advance_range"

# One statement, because it comes with every batch. The columns are locked in order of their names: two ranges of
# one table never wait for each other crosswise.
_ADVANCE = b"""
PREPARE encryption_advance_range (text[], bigint, bigint, text, int, text[], bigint[]) AS
WITH advanced AS (
    UPDATE alphapulse_encryption.ranges SET position = $1, rows_processed = rows_processed + $2,
           values_processed = values_processed + $3, updated_at = clock_timestamp()
     WHERE table_name = $4 AND batch_range = $5),
locked AS MATERIALIZED (
    SELECT column_name FROM alphapulse_encryption.columns
     WHERE table_name = $4 AND column_name = ANY ($6) ORDER BY column_name FOR UPDATE)
UPDATE alphapulse_encryption.columns m SET records_processed = records_processed + d.n
  FROM (SELECT unnest($6) AS column_name, unnest($7) AS n) AS d JOIN locked USING (column_name)
 WHERE m.table_name = $4 AND m.column_name = d.column_name AND d.n <> 0
"""


def range_waits(connection: Connection, table: Table, number: int, reason: str | None) -> None:
    """A range holds back, or goes on where ``reason`` is None."""
    connection.execute(
        "UPDATE alphapulse_encryption.ranges SET waiting_for = %s, updated_at = clock_timestamp() "
        "WHERE table_name = %s AND batch_range = %s",
        [reason, table.key, number],
    )


def complete_range(connection: Connection, table: Table, number: int) -> None:
    """A range is done; with its last one the table's columns are ``completed``."""
    connection.execute(
        "UPDATE alphapulse_encryption.ranges SET status = 'completed', position = NULL, error_message = NULL, "
        "updated_at = clock_timestamp(), completed_at = clock_timestamp() "
        "WHERE table_name = %s AND batch_range = %s",
        [table.key, number],
    )
    # Of two ranges that end at once, the later one waits here and then sees the other completed.
    lock_columns(connection, table)
    row = connection.execute(
        "SELECT count(*) FROM alphapulse_encryption.ranges WHERE table_name = %s AND status <> 'completed'",
        [table.key],
    ).fetchone()
    if row is not None and row[0] == 0:
        set_status(connection, table, "completed")


def fail_range(connection: Connection, table: Table, number: int, message: str) -> None:
    """A range ended with an error; ``message`` has to be free of values."""
    connection.execute(
        "UPDATE alphapulse_encryption.ranges SET status = 'failed', error_message = %s, waiting_for = NULL, "
        "updated_at = clock_timestamp() WHERE table_name = %s AND batch_range = %s",
        [message, table.key, number],
    )
    set_status(connection, table, "failed", message)


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
class RangeTimes:
    """When a range moved, and what it waits for or ended with."""

    started_at: datetime | None
    updated_at: datetime | None
    completed_at: datetime | None
    waiting_for: str | None
    error_message: str | None


def range_times(connection: Connection, table: Table) -> dict[int, RangeTimes]:
    """Of each planned range, by its number."""
    rows = connection.execute(
        "SELECT batch_range, started_at, updated_at, completed_at, waiting_for, error_message "
        "FROM alphapulse_encryption.ranges WHERE table_name = %s",
        [table.key],
    )
    return {number: RangeTimes(*rest) for number, *rest in rows}


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


@dataclass(frozen=True)
class Operating:
    """An operation other than the backfill that was begun on a range and is not done.

    Args:
        operation: which.
        goal: what it leads to: of a rotation the key version.
    """

    number: int
    operation: Literal["rotate", "decrypt", "discard", "repair"]
    goal: int
    status: Status
    rows: int
    updated_at: datetime
    waiting_for: str | None
    error_message: str | None


# Of a rotation what leads to the current version; of what leads back, all that is not done.
_OPERATIONS = """
SELECT batch_range, operation, goal, status, rows_processed, updated_at, waiting_for, error_message
  FROM alphapulse_encryption.operations
 WHERE table_name = %s AND status IN ('in_progress', 'failed') AND (operation <> 'rotate'
   OR goal = (SELECT key_version FROM alphapulse_encryption.key_versions WHERE state = 'current'))
 ORDER BY operation, batch_range
"""


def operations_under_way(connection: Connection, table: Table) -> tuple[Operating, ...]:
    """What is being done to the table's ranges, or ended with an error, beside the backfill."""
    return tuple(Operating(*row) for row in connection.execute(_OPERATIONS, [table.key]))


def rows_backfilled(connection: Connection, tables: Sequence[Table]) -> int:
    """Rows that backfills have done so far."""
    return _rows(connection, "ranges", tables)


def rows_worked_on(connection: Connection, tables: Sequence[Table]) -> int:
    """Rows to which operations other than the backfill were done so far."""
    return _rows(connection, "operations", tables)


def _rows(connection: Connection, of: str, tables: Sequence[Table]) -> int:
    query = sql.SQL(
        "SELECT coalesce(sum(rows_processed), 0)::bigint FROM {} WHERE table_name = ANY(%s)"
    ).format(sql.Identifier("alphapulse_encryption", of))
    return int(connection.execute(query, [[table.key for table in tables]]).fetchall()[0][0])


def waiting_for(connection: Connection) -> str | None:
    """What backfills and other operations wait for now; None where none does."""
    row = connection.execute(
        "SELECT string_agg(DISTINCT waiting_for, '; ') FROM (SELECT waiting_for FROM alphapulse_encryption.ranges "
        "UNION ALL SELECT waiting_for FROM alphapulse_encryption.operations) AS ranges WHERE "
        "waiting_for IS NOT NULL"
    ).fetchone()
    return row[0] if row is not None else None
