"""The backfill of one batch range: what is pending is encrypted, while the application goes on writing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Unpack

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.tokens import search_tokens_many_utf8
from alphapulse_encryption.migration.bookkeeping.progress import BackfillLedger, Ledger
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.postgres.wire import TextArray
from alphapulse_encryption.migration.rows.batches import Columns, key_at, size
from alphapulse_encryption.migration.rows.engine import How, RangeResult, work_on_range
from alphapulse_encryption.migration.rows.operation import Batch, Item, Operation, Unreadable
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.target import Target

# A message between server and client has less than 1 GB: the ciphertexts of a row, a third longer than its values, are
# sent in one, and a verification reads them back beside the values.
LARGEST_ROW = 2**30 * 3 // 7


def backfill_range(target: Target, table: Table, number: int, **how: Unpack[How]) -> RangeResult:
    """Encrypt what is pending in one batch range.

    Raises:
        KeyExhausted: a key may not encrypt that many more values; what is written stays.
        MigrationError: as :func:`.engine.work_on_range`.
    """
    return work_on_range(Backfill(target, table), number, **how)


@dataclass(frozen=True)
class Backfill(Operation):
    """Encrypts what is pending."""

    step = "backfill"

    def ledger(self, number: int) -> Ledger:
        return BackfillLedger(self.step, self.table, number)

    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        return require_guarded_state(connection, self.table).state.has_both_sides

    def cells(self, definition: TableDefinition) -> sql.Cells:
        return sql.pending_cells(definition)

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        # A row as large as that comes alone.
        if len(columns[0]) == 1 and (taken := size(columns)) > LARGEST_ROW:
            sizes = [size([values]) for values in columns[width + 1 :]]
            largest = definition.plaintext_columns[sizes.index(max(sizes))].name
            reason = (
                f"its values are too large: {taken:,} bytes, most of them in {largest}; {LARGEST_ROW:,} can be "
                "encrypted in one row"
            )
            return [Unreadable(key_at(columns, width, 0), reason)]
        arrays = [TextArray(column) for column in columns[: width + 1]]
        ciphertexts: list[int] = []
        for column, values in zip(definition.plaintext_columns, columns[width + 1 :], strict=True):
            ciphertexts.append(len(arrays))
            arrays.append(TextArray(cipher.encrypt_many_utf8(values, column.context)))
            if column.searchable:
                arrays.append(TextArray(search_tokens_many_utf8(self.target.keys, values, column.context)))
        return [Batch(arrays, width, ciphertexts)]

    def changes(self, definition: TableDefinition) -> sql.Changes:
        return sql.new_sides(definition, definition.plaintext_columns, keep_adopted=True)
