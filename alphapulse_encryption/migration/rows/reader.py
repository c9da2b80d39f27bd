"""Reads the rows of a batch range that are to be worked on, and makes of them what is written, ahead of the writer.

The two threads and the connection are the reader's own: while the server works on a batch's UPDATE, the next one is
encrypted, and the one behind it is read.
"""

from __future__ import annotations

import queue
import sys
import threading
from contextlib import suppress
from enum import Enum, auto

from alphapulse_encryption.migration.bookkeeping.ranges import Key
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.rows.batches import (
    BATCH_BYTES,
    Columns,
    NotReadable,
    as_many_as_can_be_read,
    key_at,
    read_columns,
    rows_within_bytes,
    size,
)
from alphapulse_encryption.migration.rows.operation import Item, Operation, Unreadable
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition

FIRST_READ = 250


class _Written(Enum):
    """Comes behind a large batch: who asks for more has written it."""

    MARK = auto()


_WRITTEN = _Written.MARK


class Reader:
    """Iterates over the batches of a range; a context manager that ends its threads.

    Args:
        sessions: whose reading connection nobody else uses meanwhile.
        start: read behind this key; None from the beginning.
        upper: read up to this key; None to the end.
        at_leisure: nobody waits for the first batch.

    Attributes:
        reads: equal for readers that read the same, and make the same of it.
        following: another one, of the same sessions, that begins as soon as this one has read its last row.
    """

    def __init__(
        self,
        sessions: Sessions,
        operation: Operation,
        definition: TableDefinition,
        start: Key | None,
        upper: Key | None,
        *,
        at_leisure: bool = False,
    ) -> None:
        self.reads = (definition.shape(), operation, start, upper)
        self.following: Reader | None = None
        self._sessions = sessions
        self._connection = sessions.reader
        self._definition = definition
        self._operation = operation
        self._position = start
        self._upper = upper
        # Nothing can be written until the first batch is encrypted: it is a small one, the next ones grow.
        self._ramp = sys.maxsize if at_leisure else FIRST_READ
        self._queries: dict[bool, bytes] = {}
        # One batch waits before each stage, so that none of them ever waits for the other two.
        self._read: queue.Queue[tuple[Columns | Unreadable | BaseException | None, bool]] = queue.Queue(
            maxsize=1
        )
        self._ready: queue.Queue[Item | _Written | BaseException | None] = queue.Queue(maxsize=1)
        self._written = threading.Event()
        self._written.set()
        self._stop = threading.Event()
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
            with suppress(queue.Empty):
                self._ready.get(timeout=0.05)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        if not self._started:
            self._started = True
            for thread in self._threads:
                thread.start()

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Item:
        while (item := self._ready.get()) is _WRITTEN:
            self._written.set()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _read_on(self) -> None:
        try:
            while not self._stop.is_set():
                columns = self._next()
                if columns is None and self.following is not None:
                    self.following._start()
                alone = isinstance(columns, list) and self._definition.toasted and size(columns) > BATCH_BYTES
                if alone:
                    self._written.clear()
                self._read.put((columns, alone))
                if columns is None:
                    return
                del columns
                # Of values as large as that, one is in memory at a time.
                while not (self._written.wait(0.05) or self._stop.is_set()):
                    pass
            self._read.put((None, False))
        except BaseException as error:
            # Whatever it is: the writer would wait for ever.
            self._read.put((error, False))

    def _encrypt_on(self) -> None:
        try:
            while True:
                read, alone = self._read.get()
                if isinstance(read, list):
                    items = self._operation.make(self._definition, read, self._sessions.cipher)
                    del read
                    while items:
                        self._ready.put(items.pop(0))
                    if alone:
                        self._ready.put(_WRITTEN)
                    continue
                self._ready.put(read)
                if not isinstance(read, Unreadable):
                    return
        except BaseException as error:
            self._stop.set()
            self._ready.put(error)
            while self._threads[0].is_alive():
                with suppress(queue.Empty):
                    self._read.get(timeout=0.05)

    def _next(self) -> Columns | Unreadable | None:
        limit = min(self._sessions.batch_size, self._ramp)
        self._ramp *= 3
        try:
            columns = as_many_as_can_be_read(self._columns, limit)
        except NotReadable as error:
            return self._skip(error.args[0])
        if not columns[0]:
            return None
        self._position = key_at(columns, len(self._definition.key), -1)
        return columns

    def _columns(self, limit: int) -> Columns:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        wanted = self._operation.wanted(self._definition)
        limit = rows_within_bytes(self._connection, self._definition, condition, parameters, limit, wanted)
        # The text of the statement is the same from the second batch on; putting it together takes as long as
        # encrypting a hundred rows.
        behind_a_key = self._position is not None
        if behind_a_key not in self._queries:
            statement = self._operation.select(self._definition, condition)
            self._queries[behind_a_key] = wire.numbered(self._connection, statement)
        return read_columns(self._connection, self._queries[behind_a_key], parameters, limit)

    def _skip(self, reason: str) -> Unreadable:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        query = sql.select_first_key(self._definition, condition, self._operation.wanted(self._definition))
        key: Key = tuple(self._connection.execute(query, parameters).fetchall()[0])
        self._position = key
        return Unreadable(key, f"its values cannot be read ({reason})")
