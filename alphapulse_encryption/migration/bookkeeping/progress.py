"""How far an operation on a table's rows is, range by range: one place for every operation of the row engine.

The backfill's is that of the plan itself (``alphapulse_encryption.ranges``), with what operators watch in
``encryption_migrations``; every other operation's is a row of ``alphapulse_encryption.operations`` for each range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import LiteralString

from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping.columns import lock_columns, set_status
from alphapulse_encryption.migration.bookkeeping.ranges import BatchRange, Key, Step, read_range
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.replication import COMMIT_LOCALLY


@dataclass(frozen=True)
class Ledger:
    """An operation's progress through one batch range.

    Args:
        goal: what it leads to, as a number, where the same operation may be done to a table again and again: of a
            rotation the key version.
    """

    operation: Step
    table: Table
    number: int
    goal: int = 0

    def read(self, connection: Connection) -> BatchRange:
        """The range, with this operation's progress; raises what :func:`.ranges.read_range` raises."""
        return read_range(connection, self.table, self.number, self.operation, self.goal)

    def begin(self, connection: Connection) -> None:
        """It begins, or goes on."""
        self._insert(connection)
        changes: LiteralString = (
            "status = 'in_progress', started_at = coalesce(started_at, clock_timestamp()), completed_at = NULL, "
            "waiting_for = NULL, error_message = NULL"
        )
        connection.execute(self._change(changes))

    def advance(
        self, connection: Connection, *, position: Key, rows: int, values: Mapping[str, int]
    ) -> bytes:
        """The statement that keeps the progress of one batch, for the transaction that holds its data."""
        changes: LiteralString = (
            "position = {}, rows_processed = rows_processed + {}, values_processed = values_processed + {}"
        )
        return self._change(changes, list(position), rows, sum(values.values())).as_bytes(connection)

    def waits(self, connection: Connection, reason: str | None) -> None:
        """It holds back, or goes on where there is no reason."""
        with connection.transaction():
            connection.execute(COMMIT_LOCALLY)
            connection.execute(self._change("waiting_for = {}", reason))

    def complete(self, connection: Connection) -> None:
        """It is done."""
        # One without rows was never begun.
        self._insert(connection)
        changes: LiteralString = (
            "status = 'completed', position = NULL, error_message = NULL, completed_at = clock_timestamp()"
        )
        connection.execute(self._change(changes))

    def fail(self, connection: Connection, message: str) -> None:
        """It ended with an error, whose message is free of values."""
        connection.execute(self._change("status = 'failed', waiting_for = NULL, error_message = {}", message))

    def _insert(self, connection: Connection) -> None:
        connection.execute(
            "INSERT INTO alphapulse_encryption.operations (table_name, batch_range, operation, goal) "
            "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
            [self.table.key, self.number, self.operation, self.goal],
        )

    def _change(self, changes: LiteralString, *values: object) -> Composed:
        return SQL(
            "UPDATE alphapulse_encryption.operations SET {}, updated_at = clock_timestamp() "
            "WHERE table_name = {} AND batch_range = {} AND operation = {} AND goal = {}"
        ).format(
            SQL(changes).format(*map(Literal, values)),
            *map(Literal, (self.table.key, self.number, self.operation, self.goal)),
        )


@dataclass(frozen=True)
class BackfillLedger(Ledger):
    """The backfill's progress: that of the plan's own ranges, and of the table's columns."""

    def begin(self, connection: Connection) -> None:
        known = "SELECT 1 FROM pg_prepared_statements WHERE name = %s"
        if answer(connection, known, _ADVANCE_NAME) is None:
            wire.script(connection, _ADVANCE)
        super().begin(connection)
        set_status(connection, self.table, "in_progress")

    def advance(
        self, connection: Connection, *, position: Key, rows: int, values: Mapping[str, int]
    ) -> bytes:
        # Without parameters, so that it can be sent along with others.
        arguments = [list(position), rows, sum(values.values()), self.table.key, self.number]
        by_column = [list(values), list(values.values())]
        return (
            SQL("EXECUTE {} ({})")
            .format(Identifier(_ADVANCE_NAME), SQL(", ").join(map(Literal, [*arguments, *by_column])))
            .as_bytes(connection)
        )

    def complete(self, connection: Connection) -> None:
        """It is done; with its last range the table's columns are ``completed``."""
        super().complete(connection)
        # Of two ranges that end at once, the later one waits here and then sees the other completed.
        lock_columns(connection, self.table)
        left = "SELECT count(*) FROM alphapulse_encryption.ranges WHERE table_name = %s AND status <> 'completed'"
        if answer(connection, left, self.table.key) == 0:
            set_status(connection, self.table, "completed")

    def fail(self, connection: Connection, message: str) -> None:
        super().fail(connection, message)
        set_status(connection, self.table, "failed", message)

    def _insert(self, connection: Connection) -> None:
        # The plan has made its row.
        return

    def _change(self, changes: LiteralString, *values: object) -> Composed:
        return SQL(
            "UPDATE alphapulse_encryption.ranges SET {}, updated_at = clock_timestamp() "
            "WHERE table_name = {} AND batch_range = {}"
        ).format(SQL(changes).format(*map(Literal, values)), Literal(self.table.key), Literal(self.number))


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


def forget(connection: Connection, table: Table, operation: Step) -> None:
    """What an operation has done to a table is past: it begins from the beginning."""
    connection.execute(
        "DELETE FROM alphapulse_encryption.operations WHERE table_name = %s AND operation = %s",
        [table.key, operation],
    )
