"""Reads pending rows of a batch range and encrypts them, one batch ahead of the writer.

The thread and the connection are the reader's own: while the server works on a batch's UPDATE, the next one is
read and encrypted.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg

from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_tokens_many
from alphapulse_encryption.migration import sql
from alphapulse_encryption.migration.batches import Key, Row, key_of, read_batch
from alphapulse_encryption.migration.database import TextArray, without_values
from alphapulse_encryption.migration.definition import TableDefinition
from alphapulse_encryption.migration.quarantine import concerns_a_row

Connection = psycopg.Connection[Any]


FIRST_READ = 250


@dataclass(frozen=True)
class Batch:
    """Encrypted rows, ready to be written.

    Args:
        keys: their primary keys, ascending.
        arrays: in the order that :func:`sql.update_batch` expects.
        present: per plaintext column, which rows have a value for it.
    """

    keys: list[Key]
    arrays: list[TextArray]
    present: list[list[bool]]

    @property
    def bounds(self) -> list[str]:
        """First and last key."""
        return [*self.keys[0], *self.keys[-1]]

    def halves(self) -> tuple[Batch, Batch]:
        """The batch in two; it has to have two rows at least."""
        middle = len(self.keys) // 2
        return self._part(slice(None, middle)), self._part(slice(middle, None))

    def _part(self, part: slice) -> Batch:
        return Batch(
            self.keys[part],
            [TextArray(array.items[part]) for array in self.arrays],
            [column[part] for column in self.present],
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


class Reader:
    """Iterates over the batches of a range; a context manager that ends its thread.

    Args:
        connection: in autocommit mode, used by nobody else meanwhile.
        definition: the table.
        cipher: the catalogue's envelope format.
        keys: for search tokens.
        start: read behind this key; None from the beginning.
        upper: read up to this key; None to the end.
        batch_size: asked for each batch: how many rows.
    """

    def __init__(
        self,
        connection: Connection,
        definition: TableDefinition,
        cipher: EnvelopeFormat,
        keys: KeyRing,
        start: Key | None,
        upper: Key | None,
        batch_size: Callable[[], int],
    ) -> None:
        self._connection = connection
        self._definition = definition
        self._cipher = cipher
        self._keys = keys
        self._position = start
        self._upper = upper
        self._batch_size = batch_size
        self._ramp = FIRST_READ
        self._queue: queue.Queue[Item | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="backfill reader", daemon=True)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
        self._thread.join()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Item:
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                item = self._next()
                self._queue.put(item)
                if item is None:
                    return
        except BaseException as error:
            # Whatever it is: the writer would wait for ever.
            self._queue.put(error)

    def _next(self) -> Item | None:
        # Nothing can be written until the first batch is encrypted: it is a small one, the next ones grow.
        limit = min(self._batch_size(), self._ramp)
        self._ramp *= 2
        while True:
            try:
                rows = self._read(limit)
                break
            except psycopg.Error as error:
                if not (isinstance(error, psycopg.DataError) or concerns_a_row(error)):
                    raise
                if limit == 1:
                    return self._skip(without_values(error))
            except UnicodeDecodeError as error:
                if limit == 1:
                    return self._skip(type(error).__name__)
            # One value of them cannot be read: which, is found by halving.
            limit = max(1, limit // 2)
        if not rows:
            return None
        self._position = key_of(self._definition, rows[-1])
        return self._encrypt(rows)

    def _read(self, limit: int) -> list[Row]:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        return read_batch(
            self._connection, sql.select_pending(self._definition, condition), parameters, limit
        )

    def _skip(self, reason: str) -> Unreadable:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        query = sql.select_pending_key(self._definition, condition)
        key: Key = tuple(self._connection.execute(query, parameters).fetchall()[0])
        self._position = key
        return Unreadable(key, f"its values cannot be read ({reason})")

    def _encrypt(self, rows: list[Row]) -> Batch:
        width = len(self._definition.key)
        columns = list(zip(*rows, strict=True))
        arrays = [TextArray(column) for column in columns[: width + 1]]
        present: list[list[bool]] = []
        for column, values in zip(self._definition.plaintext_columns, columns[width + 1 :], strict=True):
            arrays.append(TextArray(self._cipher.encrypt_many_utf8(values, column.context)))
            if column.searchable:
                arrays.append(TextArray(search_tokens_many(self._keys, values, column.context)))
            present.append([value is not None for value in values])
        return Batch(list(zip(*columns[:width], strict=True)), arrays, present)
