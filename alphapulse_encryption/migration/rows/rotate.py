"""The rotation of one batch range: ciphertexts of other key versions are encrypted again under the current one.

The same plaintext under a new IV, and its search token, in one UPDATE per row; plaintext columns are never read nor
written, so it works before the switch, after it and after the drop. What is pending is the backfill's, and what is of
the current version already is not written. Its progress is kept apart from the backfill's, by the version it leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, LiteralString

import psycopg
from psycopg.sql import SQL, Composed, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.text import encode_many
from alphapulse_encryption.crypto.tokens import search_tokens_many_utf8
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.quarantine import Step
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import TextArray, without_values
from alphapulse_encryption.migration.rows.engine import Pace, Progress, RangeResult, work_on_range
from alphapulse_encryption.migration.rows.reader import Batch, Columns, Item, Unreadable
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]


def rotate_range(
    target: Target,
    table: Table,
    number: int,
    *,
    pace: Pace | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    sessions: Sessions | None = None,
    following: int | None = None,
) -> RangeResult:
    """Encrypt again what is of another key version than the current one in one batch range.

    Args:
        table: the catalogue's entry.
        number: the batch range.
        pace: size of batches.
        on_progress: called after each batch, and again and again while it holds back, from the calling thread; may
            raise :class:`engine.Stopped`.
        sessions: the worker's own, which works on several ranges one after another; by default opened and closed here.
        following: the range of this table that the same sessions are for next: while the last rows of this one are
            written, its first ones are read.

    Raises:
        RefusedError: wrong key; the rotation was not begun; columns not added; another process works on this range.
        KeyExhausted: a key may not encrypt that many more values; what is written stays.
        RowsQuarantined: some rows could not be encrypted again: a value does not open, or its new token is another
            row's in a unique index. They are named by key, and all others are done.
        ConfigurationError: the table, its key or a column is missing, or a setting in the database means nothing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    return work_on_range(
        _Rotation(table, target.cipher, target.keys),
        target,
        table,
        number,
        pace=pace,
        on_progress=on_progress,
        sessions=sessions,
        following=following,
    )


@dataclass(frozen=True)
class _Rotation:
    """See :class:`engine.Work`."""

    table: Table
    cipher: EnvelopeFormat
    keys: KeyRing
    step: Step = "rotate"

    @property
    def _endings(self) -> Mapping[str, str]:
        """By context, how ciphertexts of the current version end."""
        version = self.keys.current_version
        return {c.context: self.cipher.ending(c.context, version) for c in self.table.columns}

    def admit(self, connection: Connection) -> bool:
        tracking.require_state(connection, self.table)
        return True

    def read_table(self, connection: Connection) -> TableDefinition:
        return read_table(connection, self.table, plaintext=False)

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        return definition.encrypted_columns

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        return sql.select_outdated(definition, condition, self._endings)

    def wanted(self, definition: TableDefinition) -> Composed:
        return sql.row_outdated(definition, self._endings)

    def encrypt(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        arrays = [list(column) for column in columns[: width + 1]]
        ciphertexts: list[int] = []
        faults: dict[int, list[str]] = {}
        for column, envelopes in zip(definition.encrypted_columns, columns[width + 1 :], strict=True):
            values = encode_many(self._open(column, envelopes, faults))
            ciphertexts.append(len(arrays))
            arrays.append(cipher.encrypt_many_utf8(values, column.context))
            if column.searchable:
                arrays.append(search_tokens_many_utf8(self.keys, values, column.context))
        items: list[Item] = [
            Unreadable(_key(columns, width, row), "; ".join(reasons))
            for row, reasons in sorted(faults.items())
        ]
        # Of rows that nothing is to be written of, all were unreadable, or spelt in another way but current.
        rows = [
            row
            for row in range(len(columns[0]))
            if any(arrays[number][row] is not None for number in ciphertexts)
        ]
        if len(rows) < len(columns[0]):
            arrays = [[array[row] for row in rows] for array in arrays]
        if rows:
            items.append(Batch([TextArray(array) for array in arrays], width, ciphertexts))
        return items

    def _open(
        self, column: Column, envelopes: Sequence[bytes | None], faults: dict[int, list[str]]
    ) -> list[str | None]:
        """The values of what is to be encrypted again; of what does not open, why is noted by its row."""
        texts = [None if e is None else e.decode(errors="replace") for e in envelopes]
        current = self.keys.current_version
        older = tuple(
            self.cipher.ending(column.context, version)
            for version in self.keys.versions
            if version != current
        )
        for row, text in enumerate(texts):
            if text is not None and not text.endswith(older):
                texts[row] = self._unless_current(column, text, row, faults)
        try:
            return self.cipher.decrypt_many(texts, column.context)
        except DecryptionError:
            pass
        values: list[str | None] = []
        for row, text in enumerate(texts):
            try:
                values.append(None if text is None else self.cipher.decrypt(text, column.context))
            except DecryptionError as error:
                faults.setdefault(row, []).append(_unreadable(column, error))
                values.append(None)
        return values

    def _unless_current(
        self, column: Column, envelope: str, row: int, faults: dict[int, list[str]]
    ) -> str | None:
        """An envelope that another program wrote; None where there is nothing to do with it."""
        try:
            version = self.cipher.key_version(envelope, column.context)
        except DecryptionError as error:
            faults.setdefault(row, []).append(_unreadable(column, error))
            return None
        return None if version == self.keys.current_version else envelope

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        reason = f"the database refused it ({without_values(error)})"
        if not isinstance(error, psycopg.errors.UniqueViolation):
            return reason
        others = self._with_same_token(connection, definition, batch)
        if not others:
            return reason
        named = " and ".join(f"{column} with key ({', '.join(key)})" for column, key in others)
        return f"the same value is in another row already, written under the current key version: {named}"

    def _with_same_token(
        self, connection: Connection, definition: TableDefinition, batch: Batch
    ) -> list[tuple[str, Key]]:
        """Rows other than the one of the batch that carry its new tokens, which a unique index says there are."""
        found: list[tuple[str, Key]] = []
        for column, number in zip(definition.encrypted_columns, batch.ciphertexts, strict=True):
            if not column.searchable:
                continue
            token = batch.arrays[number + 1].items[0]
            if token is None:
                continue
            text = token.decode() if isinstance(token, bytes) else token
            statement = sql.select_by_token(definition, column)
            rows = connection.execute(statement, [text]).fetchall()
            found += [(column.name, tuple(row)) for row in rows if tuple(row) != batch.key(0)]
        return found

    def read_range(self, connection: Connection, table: Table, number: int) -> tracking.BatchRange:
        planned = tracking.read_range(connection, table, number)
        row = connection.execute(
            "SELECT status, position, rows_processed, values_processed FROM public.encryption_rotation_ranges "
            "WHERE table_name = %s AND batch_range = %s AND to_version = %s",
            [table.key, number, self.keys.current_version],
        ).fetchone()
        if row is None:
            return replace(planned, status="pending", position=None, rows_processed=0, values_processed=0)
        status, position, rows, values = row
        return replace(
            planned,
            status=status,
            position=tuple(position) if position is not None else None,
            rows_processed=rows,
            values_processed=values,
        )

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        connection.execute(
            "INSERT INTO public.encryption_rotation_ranges (table_name, batch_range, to_version, status, started_at, "
            "updated_at) VALUES (%s, %s, %s, 'in_progress', clock_timestamp(), clock_timestamp()) "
            "ON CONFLICT (table_name, batch_range, to_version) DO UPDATE SET status = 'in_progress', "
            "error_message = NULL, waiting_for = NULL, updated_at = clock_timestamp(), completed_at = NULL",
            [table.key, number, self.keys.current_version],
        )

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
        return (
            SQL(
                "UPDATE public.encryption_rotation_ranges SET position = {}, rows_processed = rows_processed + {}, "
                "values_processed = values_processed + {}, updated_at = clock_timestamp() "
                "WHERE table_name = {} AND batch_range = {} AND to_version = {}"
            )
            .format(
                *map(Literal, (list(position), rows, sum(values.values()))),
                *map(Literal, (table.key, number, self.keys.current_version)),
            )
            .as_bytes(connection)
        )

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        self._update(connection, table, number, "waiting_for = %s", reason)

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        # One without rows was never begun.
        connection.execute(
            "INSERT INTO public.encryption_rotation_ranges (table_name, batch_range, to_version) "
            "VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            [table.key, number, self.keys.current_version],
        )
        self._update(
            connection,
            table,
            number,
            "status = 'completed', position = NULL, error_message = NULL, completed_at = clock_timestamp()",
        )

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        changes = "status = 'failed', waiting_for = NULL, error_message = %s"
        self._update(connection, table, number, changes, message)

    def _update(
        self,
        connection: Connection,
        table: Table,
        number: int,
        changes: LiteralString,
        *parameters: str | None,
    ) -> None:
        connection.execute(
            SQL(
                "UPDATE public.encryption_rotation_ranges SET {}, updated_at = clock_timestamp() "
                "WHERE table_name = %s AND batch_range = %s AND to_version = %s"
            ).format(SQL(changes)),
            [*parameters, table.key, number, self.keys.current_version],
        )


def _key(columns: Columns, width: int, row: int) -> Key:
    return tuple((part[row] or b"").decode() for part in columns[:width])


def _unreadable(column: Column, error: DecryptionError) -> str:
    return f"{column.encrypted} cannot be read ({error.args[0]})"
