"""How far an operation on a table's rows is, range by range: one place for every operation of the row engine.

The backfill's is that of the plan itself (``encryption_ranges``), with what operators watch in
``encryption_migrations``; every other operation's is a row of ``encryption_operations`` for each range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, LiteralString, Protocol

import psycopg
from psycopg.sql import SQL, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.quarantine import Step
from alphapulse_encryption.migration.bookkeeping.tracking import BatchRange, Key, Status

Connection = psycopg.Connection[Any]


class Ledger(Protocol):
    """Keeps the progress of an operation."""

    def read(self, connection: Connection, table: Table, number: int) -> BatchRange:
        """The range, with this operation's progress.

        Raises:
            RefusedError: it was never planned.
        """

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        """It begins, or goes on."""

    def advance(
        self,
        connection: Connection,
        table: Table,
        number: int,
        *,
        position: Key,
        rows: int,
        values: Mapping[str, int],
    ) -> bytes:
        """The statement that keeps the progress of one batch, for the transaction that holds its data."""

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        """It holds back, or goes on where there is no reason."""

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        """It is done."""

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        """It ended with an error, whose message is free of values."""


class BackfillLedger:
    """The backfill's: of the plan's own ranges."""

    def read(self, connection: Connection, table: Table, number: int) -> BatchRange:
        """See :class:`Ledger`."""
        return tracking.read_range(connection, table, number)

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        """See :class:`Ledger`."""
        tracking.prepare_progress(connection)
        tracking.begin_range(connection, table, number)

    def advance(
        self,
        connection: Connection,
        table: Table,
        number: int,
        *,
        position: Key,
        rows: int,
        values: Mapping[str, int],
    ) -> bytes:
        """See :class:`Ledger`."""
        return tracking.advance_range(connection, table, number, position=position, rows=rows, values=values)

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        """See :class:`Ledger`."""
        tracking.range_waits(connection, table, number, reason)

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        """See :class:`Ledger`."""
        tracking.complete_range(connection, table, number)

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        """See :class:`Ledger`."""
        tracking.fail_range(connection, table, number, message)


@dataclass(frozen=True)
class OperationLedger:
    """Any other operation's.

    Args:
        operation: which.
        goal: what it leads to, as a number, where the same operation may be done to a table again and again: of a
            rotation the key version.
    """

    operation: Step
    goal: int = 0

    def read(self, connection: Connection, table: Table, number: int) -> BatchRange:
        """See :class:`Ledger`."""
        planned = tracking.read_range(connection, table, number)
        row = connection.execute(
            "SELECT status, position, rows_processed, values_processed FROM public.encryption_operations "
            "WHERE table_name = %s AND operation = %s AND goal = %s AND batch_range = %s",
            [table.key, self.operation, self.goal, number],
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

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        """See :class:`Ledger`."""
        self._insert(connection, table, number)
        changes = (
            "status = 'in_progress', started_at = coalesce(started_at, clock_timestamp()), completed_at = NULL, "
            "waiting_for = NULL, error_message = NULL"
        )
        self._update(connection, table, number, changes)

    def advance(
        self,
        connection: Connection,
        table: Table,
        number: int,
        *,
        position: Key,
        rows: int,
        values: Mapping[str, int],
    ) -> bytes:
        """See :class:`Ledger`."""
        return (
            SQL(
                "UPDATE public.encryption_operations SET position = {}, rows_processed = rows_processed + {}, "
                "values_processed = values_processed + {}, updated_at = clock_timestamp() "
                "WHERE table_name = {} AND operation = {} AND goal = {} AND batch_range = {}"
            )
            .format(
                *map(Literal, (list(position), rows, sum(values.values()))),
                *map(Literal, (table.key, self.operation, self.goal, number)),
            )
            .as_bytes(connection)
        )

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        """See :class:`Ledger`."""
        self._update(connection, table, number, "waiting_for = %s", reason)

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        """See :class:`Ledger`."""
        # One without rows was never begun.
        self._insert(connection, table, number)
        changes = (
            "status = 'completed', position = NULL, error_message = NULL, completed_at = clock_timestamp()"
        )
        self._update(connection, table, number, changes)

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        """See :class:`Ledger`."""
        changes = "status = 'failed', waiting_for = NULL, error_message = %s"
        self._update(connection, table, number, changes, message)

    def forget(self, connection: Connection, table: Table) -> None:
        """What it has done to a table is past: it begins from the beginning, whatever the goal."""
        connection.execute(
            "DELETE FROM public.encryption_operations WHERE table_name = %s AND operation = %s",
            [table.key, self.operation],
        )

    def _insert(self, connection: Connection, table: Table, number: int) -> None:
        connection.execute(
            "INSERT INTO public.encryption_operations (table_name, operation, goal, batch_range) "
            "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [table.key, self.operation, self.goal, number],
        )

    def _update(
        self, connection: Connection, table: Table, number: int, changes: LiteralString, *values: str | None
    ) -> None:
        connection.execute(
            SQL(
                "UPDATE public.encryption_operations SET {}, updated_at = clock_timestamp() "
                "WHERE table_name = %s AND operation = %s AND goal = %s AND batch_range = %s"
            ).format(SQL(changes)),
            [*values, table.key, self.operation, self.goal, number],
        )
