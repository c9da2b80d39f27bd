"""Reads the rows of a batch range that are to be worked on and encrypts them, a batch or two ahead of the writer.

The two threads and the connection are the reader's own: while the server works on a batch's UPDATE, the next one is
encrypted, and the one behind it is read.
"""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.migration.bookkeeping.quarantine import concerns_a_row
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import TextArray, without_values
from alphapulse_encryption.migration.rows.batches import read_columns
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition

Connection = psycopg.Connection[Any]


FIRST_READ = 250


@dataclass(frozen=True)
class Batch:
    """Encrypted rows, ready to be written, in ascending order of their primary keys.

    Args:
        arrays: in the order that :func:`sql.update_batch` expects: the key's columns come first.
        key_width: number of the key's columns.
        ciphertexts: which of the arrays hold them, in the order of the columns worked on.
    """

    arrays: list[TextArray]
    key_width: int
    ciphertexts: list[int]

    def __len__(self) -> int:
        return len(self.arrays[0].items)

    def key(self, row: int) -> Key:
        """A row's primary key."""
        parts = [array.items[row] for array in self.arrays[: self.key_width]]
        return tuple(part.decode() if isinstance(part, bytes) else part or "" for part in parts)

    @property
    def bounds(self) -> list[str]:
        """First and last key."""
        return [*self.key(0), *self.key(-1)]

    def values(self, rows: Sequence[int] | None = None) -> list[int]:
        """Per column worked on, how many values there are, in all rows or in some of them."""
        columns = [self.arrays[at].items for at in self.ciphertexts]
        if rows is None:
            return [len(items) - items.count(None) for items in columns]
        return [sum(items[row] is not None for row in rows) for items in columns]

    def halves(self) -> tuple[Batch, Batch]:
        """The batch in two; it has to have two rows at least."""
        middle = len(self) // 2
        return self._part(slice(None, middle)), self._part(slice(middle, None))

    def _part(self, part: slice) -> Batch:
        return Batch(
            [TextArray(array.items[part]) for array in self.arrays], self.key_width, self.ciphertexts
        )


@dataclass(frozen=True)
class Unreadable:
    """A row whose values the server or the driver cannot hand over.

    Args:
        key: its primary key.
        reason: why, without values.
    """

    key: Key
    reason: str


Item = Batch | Unreadable
Columns = list[list[bytes | None]]


class Source(Protocol):
    """What to read, and what to make of it; a part of :class:`engine.Work`."""

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        """A batch in key order."""

    def wanted(self, definition: TableDefinition) -> Composed:
        """The condition for a row to be read."""

    def encrypt(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        """What a batch that was read becomes, encrypted by this cipher and no other."""


class Reader:
    """Iterates over the batches of a range; a context manager that ends its threads.

    Args:
        connection: in autocommit mode, used by nobody else meanwhile.
        definition: the table.
        source: what to read, and what to make of it.
        cipher: encrypts, and counts it beforehand.
        start: read behind this key; None from the beginning.
        upper: read up to this key; None to the end.
        batch_size: asked for each batch: how many rows.
        at_leisure: nobody waits for the first batch.
    """

    def __init__(
        self,
        connection: Connection,
        definition: TableDefinition,
        source: Source,
        cipher: MeteredCipher,
        start: Key | None,
        upper: Key | None,
        batch_size: Callable[[], int],
        *,
        at_leisure: bool = False,
    ) -> None:
        self._connection = connection
        self._definition = definition
        self._source = source
        self._cipher = cipher
        self._position = self._from = start
        self._upper = upper
        self._batch_size = batch_size
        # Nothing can be written until the first batch is encrypted: it is a small one, the next ones grow.
        self._ramp = sys.maxsize if at_leisure else FIRST_READ
        self._queries: dict[bool, bytes] = {}
        # One batch waits before each stage, so that none of them ever waits for the other two.
        self._read: queue.Queue[Columns | Unreadable | BaseException | None] = queue.Queue(maxsize=1)
        self._ready: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._following: Reader | None = None
        self._started = False
        self._threads = [
            threading.Thread(target=self._read_on, name="reader", daemon=True),
            threading.Thread(target=self._encrypt_on, name="encryption", daemon=True),
        ]

    def __enter__(self) -> Reader:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, if they have begun; the connection is free then."""
        self._stop.set()
        if not self._started:
            return
        while any(thread.is_alive() for thread in self._threads):
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue
        for thread in self._threads:
            thread.join()

    def then(self, following: Reader) -> None:
        """Have another one, of the same connection, begin as soon as this one has read its last row."""
        self._following = following

    def reads(
        self,
        definition: TableDefinition,
        source: Source,
        start: Key | None,
        upper: Key | None,
    ) -> bool:
        """Whether it was made to read just this, and to make the same of it."""
        ours = (self._definition.shape(), self._source, self._from, self._upper)
        return ours == (definition.shape(), source, start, upper)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Item:
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_on(self) -> None:
        try:
            while not self._stop.is_set():
                columns = self._next()
                if columns is None and self._following is not None:
                    self._following._start()
                self._read.put(columns)
                if columns is None:
                    return
            self._read.put(None)
        except BaseException as error:
            # Whatever it is: the writer would wait for ever.
            self._read.put(error)

    def _encrypt_on(self) -> None:
        try:
            while True:
                read = self._read.get()
                made = (
                    self._source.encrypt(self._definition, read, self._cipher)
                    if isinstance(read, list)
                    else [read]
                )
                for item in made:
                    self._ready.put(item)
                if read is None or isinstance(read, BaseException):
                    return
        except BaseException as error:
            self._stop.set()
            self._ready.put(error)
            while self._threads[0].is_alive():
                try:
                    self._read.get(timeout=0.05)
                except queue.Empty:
                    continue

    def _next(self) -> Columns | Unreadable | None:
        limit = min(self._batch_size(), self._ramp)
        self._ramp *= 3
        while True:
            try:
                columns = self._columns(limit)
                break
            except psycopg.Error as error:
                if not (isinstance(error, psycopg.DataError) or concerns_a_row(error)):
                    raise
                if limit == 1:
                    return self._skip(without_values(error))
            # One value of them cannot be read: which, is found by halving.
            limit = max(1, limit // 2)
        if not columns[0]:
            return None
        last = [column[-1] for column in columns[: len(self._definition.key)]]
        self._position = tuple((part or b"").decode() for part in last)
        return columns

    def _columns(self, limit: int) -> Columns:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        # The text of the statement is the same from the second batch on; putting it together takes as long as
        # encrypting a hundred rows.
        behind_a_key = self._position is not None
        if behind_a_key not in self._queries:
            statement = self._source.select(self._definition, condition)
            self._queries[behind_a_key] = wire.numbered(self._connection, statement)
        return read_columns(self._connection, self._queries[behind_a_key], parameters, limit)

    def _skip(self, reason: str) -> Unreadable:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        query = sql.select_first_key(self._definition, condition, self._source.wanted(self._definition))
        key: Key = tuple(self._connection.execute(query, parameters).fetchall()[0])
        self._position = key
        return Unreadable(key, f"its values cannot be read ({reason})")
