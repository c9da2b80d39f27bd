"""The backfill of one batch range: what is pending is encrypted, while the application goes on writing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_tokens_many_utf8
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.quarantine import Step
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import TextArray, without_values
from alphapulse_encryption.migration.rows.engine import (
    LARGEST_BATCH,
    SMALLEST_BATCH,
    Pace,
    Progress,
    RangeIsTaken,
    RangeResult,
    RowsQuarantined,
    Stopped,
    work_on_range,
)
from alphapulse_encryption.migration.rows.reader import Batch, Item
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table

__all__ = [
    "LARGEST_BATCH",
    "SMALLEST_BATCH",
    "Pace",
    "Progress",
    "RangeIsTaken",
    "RangeResult",
    "RowsQuarantined",
    "Stopped",
    "backfill_range",
]

from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]


def backfill_range(
    target: Target,
    table: Table,
    number: int,
    *,
    pace: Pace | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    sessions: Sessions | None = None,
    following: int | None = None,
) -> RangeResult:
    """Encrypt what is pending in one batch range.

    Args:
        table: the catalogue's entry.
        number: the batch range.
        pace: size of batches.
        on_progress: called after each batch, and again and again while it holds back, from the calling thread; may
            raise :class:`Stopped`.
        sessions: the worker's own, which works on several ranges one after another; by default opened and closed here.
        following: the range of this table that the same sessions are for next: while the last rows of this one are
            written, its first ones are read.

    Raises:
        RefusedError: wrong key; columns not added; another process works on this range.
        KeyExhausted: a key may not encrypt that many more values; what is written stays.
        RowsQuarantined: some rows could not be encrypted; they are named by key, and all others are encrypted.
        ConfigurationError: the table, its key or a column is missing, or a setting in the database means nothing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    return work_on_range(
        _Backfill(table, target.cipher, target.keys),
        target,
        table,
        number,
        pace=pace,
        on_progress=on_progress,
        sessions=sessions,
        following=following,
    )


@dataclass(frozen=True)
class _Backfill:
    """See :class:`engine.Work`."""

    table: Table
    cipher: EnvelopeFormat
    keys: KeyRing
    step: Step = "backfill"

    def admit(self, connection: Connection) -> bool:
        return tracking.require_guarded_state(connection, self.table).state.has_both_sides

    def read_table(self, connection: Connection) -> TableDefinition:
        return read_table(connection, self.table)

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        return definition.plaintext_columns

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        return sql.select_pending(definition, condition)

    def wanted(self, definition: TableDefinition) -> Composed:
        return sql.row_pending(definition)

    def encrypt(
        self, definition: TableDefinition, columns: list[list[bytes | None]], cipher: MeteredCipher
    ) -> list[Item]:
        width = len(definition.key)
        arrays = [TextArray(column) for column in columns[: width + 1]]
        ciphertexts: list[int] = []
        for column, values in zip(definition.plaintext_columns, columns[width + 1 :], strict=True):
            ciphertexts.append(len(arrays))
            arrays.append(TextArray(cipher.encrypt_many_utf8(values, column.context)))
            if column.searchable:
                arrays.append(TextArray(search_tokens_many_utf8(self.keys, values, column.context)))
        return [Batch(arrays, width, ciphertexts)]

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        return f"the database refused it ({without_values(error)})"

    def read_range(self, connection: Connection, table: Table, number: int) -> tracking.BatchRange:
        return tracking.read_range(connection, table, number)

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        tracking.prepare_progress(connection)
        tracking.begin_range(connection, table, number)

    def advance(
        self,
        connection: Connection,
        table: Table,
        number: int,
        *,
        position: tuple[str, ...],
        rows: int,
        values: Mapping[str, int],
    ) -> bytes:
        return tracking.advance_range(connection, table, number, position=position, rows=rows, values=values)

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        tracking.range_waits(connection, table, number, reason)

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        tracking.complete_range(connection, table, number)

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        tracking.fail_range(connection, table, number, message)
