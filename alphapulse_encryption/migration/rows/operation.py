"""What is done to a table's rows: which of them, what is read of each, what becomes of it. How belongs in ``engine``.

Operations are :mod:`.backfill` (encrypt), :mod:`.rotate` (encrypt again), :mod:`.decrypt` and :mod:`.discard`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import psycopg
from psycopg.pq.abc import PGresult
from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration.bookkeeping.progress import Ledger
from alphapulse_encryption.migration.bookkeeping.ranges import Key, Step
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import Connection, answer, without_values
from alphapulse_encryption.migration.postgres.wire import TextArray
from alphapulse_encryption.migration.rows.batches import Columns, key_at
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import refuse_unguarded
from alphapulse_encryption.migration.target import Target


@dataclass(frozen=True)
class Batch:
    """Rows ready to be written, in ascending order of their primary keys.

    Args:
        arrays: the key's columns, xmin, then what :meth:`Operation.update` takes.
        key_width: number of the key's columns.
        counted: which of the arrays hold a column's values, in the order of :meth:`Operation.columns`.
    """

    arrays: list[TextArray]
    key_width: int
    counted: list[int]

    def __len__(self) -> int:
        return len(self.arrays[0].items)

    def key(self, row: int) -> Key:
        return key_at([array.items for array in self.arrays], self.key_width, row)

    @property
    def bounds(self) -> list[str]:
        return [*self.key(0), *self.key(-1)]

    def values(self, rows: Sequence[int] | None = None) -> list[int]:
        """Per column worked on, how many values there are, in all rows or in some of them."""
        columns = [self.arrays[at].items for at in self.counted]
        if rows is None:
            return [len(items) - items.count(None) for items in columns]
        return [sum(items[row] is not None for row in rows) for items in columns]

    def only(self, rows: Iterable[int]) -> Batch:
        chosen = sorted(rows)
        arrays = [TextArray([array.items[row] for row in chosen]) for array in self.arrays]
        return Batch(arrays, self.key_width, self.counted)


@dataclass(frozen=True)
class Unreadable:
    """A row with values that cannot be read, by the server, the driver or the cipher; the reason quotes none."""

    key: Key
    reason: str


Item = Batch | Unreadable


@dataclass(frozen=True)
class Written:
    """A batch whose UPDATE was executed; which of its rows were written, and what it told.

    Args:
        quietly: the statements after which ciphertexts are written beside the application.
    """

    definition: TableDefinition
    batch: Batch
    rows: Sequence[int]
    result: PGresult
    cipher: MeteredCipher
    quietly: Sequence[bytes]


class Unwritable(Exception):
    """Rows of a batch, by number, whose values are not what was to be written, and why; quotes no value."""

    def __init__(self, rows: Mapping[int, str]) -> None:
        super().__init__()
        self.rows = rows


@dataclass(frozen=True)
class Operation(ABC):
    """One way through a table's rows."""

    # Its name, as messages, the audit log, the quarantine and the bookkeeping have it.
    step: ClassVar[Step]
    # What it does to a row, for a message of one to which it could not.
    done: ClassVar[str] = "encrypted"
    # Whether the table has to stay in a state to be worked on until a batch is committed.
    holds_state: ClassVar[bool] = False
    # Whether the plaintext columns have to be there.
    of_plaintext: ClassVar[bool] = True
    # Whether it writes what the application does not know of: ciphertexts and tokens alone.
    beside_application: ClassVar[bool] = True

    target: Target
    table: Table

    def ledger(self, number: int) -> Ledger:
        """Where its progress through a range is kept."""
        return Ledger(self.step, self.table, number)

    @abstractmethod
    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        """Whether the table is in a state to be worked on; no, where there is nothing to do for good.

        Args:
            lock: keep the state as it is until the end of the transaction.

        Raises:
            RefusedError: not now; the message says what to do.
        """

    def read_table(self, connection: Connection) -> TableDefinition:
        """The table as it is now, guarded as it was made to be."""
        definition = read_table(connection, self.table, plaintext=self.of_plaintext)
        refuse_unguarded(connection, definition, reverted=self.step == "discard")
        return definition

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        """The columns whose values are counted."""
        return definition.plaintext_columns

    @abstractmethod
    def cells(self, definition: TableDefinition) -> sql.Cells:
        """What is wanted of a row, and read; of :meth:`select` and :meth:`wanted`, where they say nothing else."""

    def wanted(self, definition: TableDefinition) -> Composed:
        """The condition for a row ``t`` to be worked on."""
        return sql.wanted(self.cells(definition))

    def is_wanted(
        self,
        connection: Connection,
        definition: TableDefinition,
        lower: Key | None = None,
        upper: Key | None = None,
    ) -> bool:
        """Whether a row of the table, or behind one key and up to another, is still to be worked on."""
        condition, parameters = sql.within(definition, lower, upper)
        statement = sql.any_of(definition, condition, self.wanted(definition))
        return bool(answer(connection, statement, *parameters))

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        """A batch in key order: key, ``xmin``, and what it is made of. Ends in ``LIMIT %s``."""
        return sql.select_wanted(definition, condition, self.cells(definition))

    @abstractmethod
    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        """What a batch that was read becomes, encrypted by this cipher alone; called in a thread of its own."""

    @abstractmethod
    def changes(self, definition: TableDefinition) -> sql.Changes:
        """What a batch makes of its rows."""

    def after(self, connection: Connection, done: Written) -> int:
        """What else belongs into a batch's transaction; returns how many values were encrypted for it.

        Raises:
            Unwritable: rows that are not as they were to be; all is undone, and the others are written.
        """
        return 0

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        """Why the database refused a batch of one row, without values."""
        return f"the database refused it ({without_values(error)})"


def open_each(
    cipher: EnvelopeFormat, column: Column, envelopes: Sequence[str | None]
) -> tuple[list[str | None], dict[int, DecryptionError]]:
    """The values of envelopes, and by their numbers those that do not open."""
    try:
        return cipher.decrypt_many(envelopes, column.context), {}
    except DecryptionError:
        pass
    # One of them does not open: find out which, one by one.
    values: list[str | None] = []
    unreadable: dict[int, DecryptionError] = {}
    for row, envelope in enumerate(envelopes):
        try:
            values.append(None if envelope is None else cipher.decrypt(envelope, column.context))
        except DecryptionError as error:
            values.append(None)
            unreadable[row] = error
    return values, unreadable


class Faults:
    """Why single values of a batch could not be read, gathered by row."""

    def __init__(self) -> None:
        self._reasons: dict[int, list[str]] = {}

    def add(self, row: int, column: Column, error: DecryptionError) -> None:
        """A ciphertext that does not open."""
        reason = f"{column.encrypted} cannot be read ({error.args[0]})"
        self._reasons.setdefault(row, []).append(reason)

    def open(
        self, cipher: EnvelopeFormat, column: Column, envelopes: Sequence[str | None]
    ) -> list[str | None]:
        """The values of a column's ciphertexts; None for those that do not open."""
        values, unreadable = open_each(cipher, column, envelopes)
        for row, error in unreadable.items():
            self.add(row, column, error)
        return values

    def items(
        self, columns: Columns, arrays: Sequence[Sequence[str | bytes | None]], width: int, counted: list[int]
    ) -> list[Item]:
        """The rows that have a fault, and a batch of those that something is to be written of."""
        items: list[Item] = [
            Unreadable(key_at(columns, width, row), "; ".join(reasons))
            for row, reasons in sorted(self._reasons.items())
        ]
        rows = [row for row in range(len(columns[0])) if any(arrays[at][row] is not None for at in counted)]
        if rows:
            whole = len(rows) == len(columns[0])
            chosen = arrays if whole else [[array[row] for row in rows] for array in arrays]
            items.append(Batch([TextArray(array) for array in chosen], width, counted))
        return items
