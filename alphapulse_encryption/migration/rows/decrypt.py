"""Plaintext from ciphertext: the backfill the other way round, for a revert and for a restore.

A value is *unfilled* when its ciphertext is there and its plaintext is not. A value takes the way it would have taken
had the application written it: a cast to the column's type, then the assignment to the column with its length and
precision. Where the column then shows it in another text form (``1.5`` as ``1.5000``), it is encrypted again in that
form; where it would have lost something, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import (
    AS_APPLICATION,
    AS_OURSELVES,
    FIRE_TRIGGERS,
    Connection,
)
from alphapulse_encryption.migration.rows.batches import Columns, key_at, texts
from alphapulse_encryption.migration.rows.engine import Progress, RangeResult, work_on_table
from alphapulse_encryption.migration.rows.operation import (
    Faults,
    Item,
    Operation,
    Unwritable,
    Written,
)
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.sql import verbatim


@dataclass(frozen=True)
class Decrypt(Operation):
    """Fills the unfilled values of a table."""

    step = "decrypt"
    done = "decrypted"

    # Once the plaintext is the source of truth, a value that is missing is one that somebody took away.
    holds_state = True
    beside_application = False

    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        return require_state(connection, self.table, lock=lock).authority == "ciphertext"

    def cells(self, definition: TableDefinition) -> sql.Cells:
        return sql.unfilled_cells(definition)

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        arrays: list[Sequence[str | bytes | None]] = list(columns[: width + 1])
        faults = Faults()
        read = texts(columns[width + 1 :], errors="replace")
        for column, envelopes in zip(definition.plaintext_columns, read, strict=True):
            arrays.append(faults.open(self.target.cipher, column, envelopes))
        return faults.items(columns, arrays, width, list(range(width + 1, len(arrays))))

    def changes(self, definition: TableDefinition) -> sql.Changes:
        """Tells of each row, per value that is shown in another form, that form and the free one.

        Casts are made value by value, because an array of a type that is an array itself does not exist, and
        without length and precision: an explicit cast to ``varchar(3)`` cuts silently, the assignment refuses.
        """
        columns = definition.plaintext_columns
        assignments: list[tuple[str, Composable]] = []
        returning: list[Composable] = []
        stored: list[Composable] = []
        for number, column in enumerate(columns):
            value = sql.new_value(number)
            free = SQL("{}::{}").format(value, verbatim(definition.columns[column.name].base_type))
            shown = SQL("{}::text").format(Identifier("t", column.name))
            # "C" compares bytes, and settles which of two columns' collations is meant.
            differs = SQL(
                '{} COLLATE pg_catalog."C" IS DISTINCT FROM ({}) COLLATE pg_catalog."C" AND {} IS NOT NULL'
            ).format(value, shown, value)
            kept = SQL("CASE WHEN {} IS NULL THEN {} ELSE {} END").format(
                value, Identifier("t", column.name), free
            )
            assignments.append((column.name, kept))
            returning.append(SQL("CASE WHEN {} THEN {} END").format(differs, shown))
            returning.append(SQL("CASE WHEN {} THEN ({})::text END").format(differs, free))
            stored.append(
                SQL("({} IS NULL OR {} IS DISTINCT FROM NULL)").format(value, Identifier("t", column.name))
            )
        return sql.Changes(len(columns), assignments, SQL(" AND ").join(stored), returning=returning)

    def after(self, connection: Connection, done: Written) -> int:
        """Encrypt again what a column shows in another text form."""
        definition, batch = done.definition, done.batch
        told = wire.columns(done.result)
        width = len(definition.key)
        numbers = {batch.key(row): row for row in range(len(batch))}
        losses: dict[int, str] = {}
        renewed: list[tuple[Column, int, str]] = []
        for at, column in enumerate(definition.plaintext_columns):
            shown, free = told[width + 2 * at : width + 2 * at + 2]
            for i, value in enumerate(shown):
                if value is None:
                    continue
                row = numbers[key_at(told, width, i)]
                if not _same(value, free[i], definition.columns[column.name].base_type):
                    losses[row] = f"the value of {column.encrypted} does not fit {column.name}'s type"
                renewed.append((column, row, value.decode()))
        if losses:
            raise Unwritable(losses)
        if renewed:
            self._renew(connection, done, renewed)
        return len(renewed)

    def _renew(
        self, connection: Connection, done: Written, renewed: Sequence[tuple[Column, int, str]]
    ) -> None:
        definition, lost = done.definition, {}
        wire.script(connection, *done.quietly, AS_APPLICATION)
        for column, row, text in renewed:
            assignments = [SQL("{} = %s").format(Identifier(column.encrypted))]
            parameters: list[object] = [done.cipher.encrypt(text, column.context)]
            if column.searchable:
                assignments.append(SQL("{} = %s").format(Identifier(column.search)))
                parameters.append(search_token(self.target.keys, text, column.context))
            statement = SQL("UPDATE {} t SET {} WHERE {}").format(
                definition.identifier,
                SQL(", ").join(assignments),
                sql.compare_key(definition, "="),
            )
            if connection.execute(statement, [*parameters, *done.batch.key(row)]).rowcount != 1:
                lost[row] = f"{column.encrypted} was kept as it was by a trigger or rule"
        wire.script(connection, *([FIRE_TRIGGERS] if done.quietly else []), AS_OURSELVES)
        if lost:
            raise Unwritable(lost)


def _same(shown: bytes, free: bytes | None, base_type: str) -> bool:
    if shown == free or base_type != "numeric" or free is None:
        return shown == free
    return Decimal(shown.decode()) == Decimal(free.decode())


@dataclass
class Filling:
    """Fills a table's plaintext beside the application, as often as it takes; ``again`` is what to type to go on."""

    operation: Decrypt
    again: str
    on_progress: Callable[[Progress], None] | None = None
    done: RangeResult = field(default_factory=RangeResult)

    def fill(self) -> None:
        """Fill what is unfilled, range by range; rows that keep changing may be left.

        Raises:
            RowsLeft: rows cannot be filled, or are locked; the others are.
        """
        self.done += work_on_table(
            self.operation.target,
            self.operation.table,
            self.operation,
            again=self.again,
            on_progress=self.on_progress,
            changing_may_stay=True,
        )
