"""How far an operation on a table's rows is, range by range: one place for every operation of the row engine.

The backfill's is that of the plan itself (``alphapulse_encryption.ranges``), with what operators watch in
``encryption_migrations``; every other operation's is a row of ``alphapulse_encryption.operations`` for each range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, LiteralString

import psycopg
from psycopg.sql import SQL, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping.columns import Status
from alphapulse_encryption.migration.bookkeeping.quarantine import Step
from alphapulse_encryption.migration.bookkeeping.ranges import (
    BatchRange,
    Key,
    advance_range,
    begin_range,
    complete_range,
    fail_range,
    prepare_progress,
    range_waits,
    read_range,
)

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class Ledger:
    """An operation's progress through one batch range.

    Args:
        operation: which.
        number: the range.
        goal: what it leads to, as a number, where the same operation may be done to a table again and again: of a
            rotation the key version.
    """

    operation: Step
    table: Table
    number: int
    goal: int = 0

    def read(self, connection: Connection) -> BatchRange:
        """The range, with this operation's progress.

        Raises:
            RefusedError: it was never planned.
        """
        planned = read_range(connection, self.table, self.number)
        row = connection.execute(
            "SELECT status, position, rows_processed, values_processed FROM alphapulse_encryption.operations "
            "WHERE table_name = %s AND operation = %s AND goal = %s AND batch_range = %s",
            self._key,
        ).fetchone()
        status: Status = "pending"
        position, rows, values = None, 0, 0
        if row is not None:
            status, position, rows, values = row
        return replace(
            planned,
            status=status,
            position=tuple(position) if position is not None else None,
            rows_processed=rows,
            values_processed=values,
        )

    def begin(self, connection: Connection) -> None:
        """It begins, or goes on."""
        self._insert(connection)
        changes = (
            "status = 'in_progress', started_at = coalesce(started_at, clock_timestamp()), completed_at = NULL, "
            "waiting_for = NULL, error_message = NULL"
        )
        self._update(connection, changes)

    def advance(
        self, connection: Connection, *, position: Key, rows: int, values: Mapping[str, int]
    ) -> bytes:
        """The statement that keeps the progress of one batch, for the transaction that holds its data."""
        return (
            SQL(
                "UPDATE alphapulse_encryption.operations SET position = {}, rows_processed = rows_processed + {}, "
                "values_processed = values_processed + {}, updated_at = clock_timestamp() "
                "WHERE table_name = {} AND operation = {} AND goal = {} AND batch_range = {}"
            )
            .format(*map(Literal, [list(position), rows, sum(values.values()), *self._key]))
            .as_bytes(connection)
        )

    def waits(self, connection: Connection, reason: str | None) -> None:
        """It holds back, or goes on where there is no reason."""
        self._update(connection, "waiting_for = %s", reason)

    def complete(self, connection: Connection) -> None:
        """It is done."""
        # One without rows was never begun.
        self._insert(connection)
        changes = (
            "status = 'completed', position = NULL, error_message = NULL, completed_at = clock_timestamp()"
        )
        self._update(connection, changes)

    def fail(self, connection: Connection, message: str) -> None:
        """It ended with an error, whose message is free of values."""
        changes = "status = 'failed', waiting_for = NULL, error_message = %s"
        self._update(connection, changes, message)

    @property
    def _key(self) -> list[str | int]:
        return [self.table.key, self.operation, self.goal, self.number]

    def _insert(self, connection: Connection) -> None:
        connection.execute(
            "INSERT INTO alphapulse_encryption.operations (table_name, operation, goal, batch_range) "
            "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            self._key,
        )

    def _update(self, connection: Connection, changes: LiteralString, *values: str | None) -> None:
        connection.execute(
            SQL(
                "UPDATE alphapulse_encryption.operations SET {}, updated_at = clock_timestamp() "
                "WHERE table_name = %s AND operation = %s AND goal = %s AND batch_range = %s"
            ).format(SQL(changes)),
            [*values, *self._key],
        )


@dataclass(frozen=True)
class BackfillLedger(Ledger):
    """The backfill's progress: that of the plan's own ranges."""

    def read(self, connection: Connection) -> BatchRange:
        return read_range(connection, self.table, self.number)

    def begin(self, connection: Connection) -> None:
        prepare_progress(connection)
        begin_range(connection, self.table, self.number)

    def advance(
        self, connection: Connection, *, position: Key, rows: int, values: Mapping[str, int]
    ) -> bytes:
        return advance_range(connection, self.table, self.number, position=position, rows=rows, values=values)

    def waits(self, connection: Connection, reason: str | None) -> None:
        range_waits(connection, self.table, self.number, reason)

    def complete(self, connection: Connection) -> None:
        complete_range(connection, self.table, self.number)

    def fail(self, connection: Connection, message: str) -> None:
        fail_range(connection, self.table, self.number, message)


def forget(connection: Connection, table: Table, operation: Step) -> None:
    """What an operation has done to a table is past: it begins from the beginning."""
    connection.execute(
        "DELETE FROM alphapulse_encryption.operations WHERE table_name = %s AND operation = %s",
        [table.key, operation],
    )
