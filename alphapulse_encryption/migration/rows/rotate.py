"""The rotation of one batch range: ciphertexts of other key versions are encrypted again under the current one.

The same plaintext under a new IV, and its search token, in one UPDATE per row; plaintext columns are never read nor
written, so it works before the switch, after it and after the drop. What is pending is the backfill's, and what is of
the current version already is not written. Its progress is kept apart from the backfill's, by the version it leads to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Unpack

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.text import encode_many
from alphapulse_encryption.crypto.tokens import search_tokens_many_utf8
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration.bookkeeping.progress import Ledger
from alphapulse_encryption.migration.bookkeeping.ranges import Key
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.rows.engine import How, RangeResult, work_on_range
from alphapulse_encryption.migration.rows.operation import (
    Batch,
    Columns,
    Faults,
    Item,
    Operation,
    open_each,
)
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]


def rotate_range(target: Target, table: Table, number: int, **how: Unpack[How]) -> RangeResult:
    """Encrypt again what is of another key version than the current one in one batch range.

    Raises:
        KeyExhausted: a key may not encrypt that many more values; what is written stays.
        RowsQuarantined: a value does not open, or its new token is another row's in a unique index.
        MigrationError: as :func:`.engine.work_on_range`.
    """
    return work_on_range(Rotation(table, target.cipher, target.keys), target, number, **how)


@dataclass(frozen=True)
class Rotation(Operation):
    """Encrypts again what is of another key version."""

    step = "rotate"

    def ledger(self, number: int) -> Ledger:
        return Ledger(self.step, self.table, number, self.keys.current_version)

    @property
    def _endings(self) -> Mapping[str, str]:
        """By context, how ciphertexts of the current version end."""
        version = self.keys.current_version
        return {c.context: self.cipher.ending(c.context, version) for c in self.table.columns}

    def admit(self, connection: Connection) -> bool:
        require_state(connection, self.table)
        return True

    def read_table(self, connection: Connection) -> TableDefinition:
        return read_table(connection, self.table, plaintext=False)

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        return definition.encrypted_columns

    def cells(self, definition: TableDefinition) -> sql.Cells:
        return sql.outdated_cells(definition, self._endings)

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        arrays: list[Sequence[bytes | None]] = list(columns[: width + 1])
        ciphertexts: list[int] = []
        faults = Faults()
        for column, envelopes in zip(definition.encrypted_columns, columns[width + 1 :], strict=True):
            values = encode_many(self._open(column, envelopes, faults))
            ciphertexts.append(len(arrays))
            arrays.append(cipher.encrypt_many_utf8(values, column.context))
            if column.searchable:
                arrays.append(search_tokens_many_utf8(self.keys, values, column.context))
        # Of rows that nothing is to be written of, all were unreadable, or spelt in another way but current.
        return faults.items(columns, arrays, width, ciphertexts)

    def update(self, definition: TableDefinition, *, skip_locked: bool) -> Composed:
        return sql.update_batch(definition, definition.encrypted_columns, skip_locked=skip_locked)

    def _open(self, column: Column, envelopes: Sequence[bytes | None], faults: Faults) -> list[str | None]:
        """The values of what is to be encrypted again; of what does not open, why is noted by its row."""
        texts = [None if e is None else e.decode(errors="replace") for e in envelopes]
        current = self.keys.current_version
        older = tuple(
            self.cipher.ending(column.context, version)
            for version in self.keys.versions
            if version != current
        )
        for row, text in enumerate(texts):
            # Another program's spelling: it may be current.
            if text is None or text.endswith(older):
                continue
            try:
                if self.cipher.key_version(text, column.context) == current:
                    texts[row] = None
            except DecryptionError as error:
                faults.add(row, column, error)
                texts[row] = None
        values, unreadable = open_each(self.cipher, column, texts)
        for row, reason in unreadable.items():
            faults.add(row, column, reason)
        return values

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        reason = super().refused(connection, definition, batch, error)
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
        for column, number in zip(definition.encrypted_columns, batch.counted, strict=True):
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
