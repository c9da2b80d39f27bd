"""The rotation of one batch range: ciphertexts of other key versions are encrypted again under the current one.

The same plaintext under a new IV, and its search token, in one UPDATE per row; plaintext columns are never read nor
written, so it works before the switch, after it and after the drop. What is pending is the backfill's, and what is of
the current version already is not written; nor is an adopted token that is not of our keys, because the application
looks up by it. Its progress is kept apart from the backfill's, by the version it leads to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.text import encode_many
from alphapulse_encryption.crypto.tokens import search_tokens_many_utf8
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration.bookkeeping.progress import Ledger
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.rows.batches import Columns, texts
from alphapulse_encryption.migration.rows.engine import How, RangeResult, work_on_range
from alphapulse_encryption.migration.rows.operation import Batch, Faults, Item, Operation
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.target import Target


def rotate_range(target: Target, table: Table, number: int, **how: Unpack[How]) -> RangeResult:
    """Encrypt again what is of another key version than the current one in one batch range.

    Raises:
        KeyExhausted: a key may not encrypt that many more values; what is written stays.
        RowsQuarantined: a value does not open, or its new token is another row's in a unique index.
        MigrationError: as :func:`.engine.work_on_range`.
    """
    return work_on_range(Rotation(target, table), number, **how)


@dataclass(frozen=True)
class Rotation(Operation):
    """Encrypts again what is of another key version."""

    step = "rotate"
    of_plaintext = False

    def ledger(self, number: int) -> Ledger:
        return Ledger(self.step, self.table, number, self.target.keys.current_version)

    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        require_state(connection, self.table)
        return True

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        return definition.encrypted_columns

    def cells(self, definition: TableDefinition) -> sql.Cells:
        ending, current = self.target.cipher.ending, self.target.keys.current_version
        cells = sql.outdated_cells(
            definition, {c.context: ending(c.context, current) for c in self.table.columns}
        )
        tokens = [
            (outdated, SQL("{}::text").format(Identifier("t", column.search)))
            for column, (outdated, _) in zip(definition.encrypted_columns, cells, strict=True)
            if _has_tokens_of_others(column)
        ]
        return [*cells, *tokens]

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        arrays: list[Sequence[bytes | None]] = list(columns[: width + 1])
        ciphertexts: list[int] = []
        faults = Faults()
        of_tokens = width + 1 + len(definition.encrypted_columns)
        read, there = texts(columns[width + 1 : of_tokens], errors="replace"), iter(columns[of_tokens:])
        for column, envelopes in zip(definition.encrypted_columns, read, strict=True):
            self._leave_current(column, envelopes, faults)
            values = encode_many(faults.open(self.target.cipher, column, envelopes))
            ciphertexts.append(len(arrays))
            arrays.append(cipher.encrypt_many_utf8(values, column.context))
            if column.searchable:
                adopted = next(there) if _has_tokens_of_others(column) else None
                arrays.append(self._tokens(column, values, adopted))
        # Of rows that nothing is to be written of, all were unreadable, or spelt in another way but current.
        return faults.items(columns, arrays, width, ciphertexts)

    def changes(self, definition: TableDefinition) -> sql.Changes:
        return sql.new_sides(definition, definition.encrypted_columns)

    def _tokens(
        self, column: Column, values: Sequence[bytes | None], adopted: Sequence[bytes | None] | None
    ) -> list[bytes | None]:
        """The new tokens; none where one is adopted that is not of our keys."""
        keys = self.target.keys
        tokens = search_tokens_many_utf8(keys, values, column.context)
        if adopted is None:
            return tokens
        ours = zip(
            *(search_tokens_many_utf8(keys, values, column.context, v) for v in keys.versions), strict=True
        )
        return [
            token if there is None or there in of_value else None
            for token, there, of_value in zip(tokens, adopted, ours, strict=True)
        ]

    def _leave_current(self, column: Column, envelopes: list[str | None], faults: Faults) -> None:
        """Take out what another program has spelt, where it is current or no envelope."""
        cipher, keys = self.target.cipher, self.target.keys
        others = [version for version in keys.versions if version != keys.current_version]
        older = tuple(cipher.ending(column.context, version) for version in others)
        for row, envelope in enumerate(envelopes):
            if envelope is None or envelope.endswith(older):
                continue
            try:
                if cipher.key_version(envelope, column.context) == keys.current_version:
                    envelopes[row] = None
            except DecryptionError as error:
                faults.add(row, column, error)
                envelopes[row] = None

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        others: list[str] = []
        if isinstance(error, psycopg.errors.UniqueViolation):
            for column, number in zip(definition.encrypted_columns, batch.counted, strict=True):
                token = batch.arrays[number + 1].items[0] if column.searchable else None
                if isinstance(token, bytes):
                    rows = connection.execute(sql.select_by_token(definition, column), [token.decode()])
                    keys = [tuple(row) for row in rows if tuple(row) != batch.key(0)]
                    others += [f"{column.name} with key ({', '.join(key)})" for key in keys]
        if not others:
            return super().refused(connection, definition, batch, error)
        return (
            "the same value is in another row already, written under the current key version: "
            f"{' and '.join(others)}"
        )


def _has_tokens_of_others(column: Column) -> bool:
    return column.adopt and column.searchable
