"""Ciphertext that is not to be trusted is cleared, so that the backfill encrypts its plaintext.

After a revert all of it, because nobody watched over it (:class:`Discard`); after a verification what that found wrong
(:mod:`.repair`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.ranges import Step
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.rows.batches import Columns
from alphapulse_encryption.migration.rows.operation import Faults, Item, Operation
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition


@dataclass(frozen=True)
class Discard(Operation):
    """Clears the ciphertexts and tokens that were there while a reverted table had no guard.

    The application may have changed the plaintext beside any of them since, and nothing in the row would tell. To be
    done when the guard is in place again: then whatever is cleared is pending.
    """

    step: ClassVar[Step] = "discard"
    done = "cleared"
    # So that no other run makes anything of the ciphertext meanwhile.
    holds_state = True

    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        return require_state(connection, self.table, lock=lock).state is State.REVERTED

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        return definition.encrypted_columns

    def cells(self, definition: TableDefinition) -> sql.Cells:
        return sql.filled_cells(definition)

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        return Faults().items(columns, columns, width, list(range(width + 1, len(columns))))

    def changes(self, definition: TableDefinition) -> sql.Changes:
        return sql.cleared_sides(definition.encrypted_columns)
