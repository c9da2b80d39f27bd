"""The backfill of one batch range: read, encrypt, write, while the application goes on writing.

A reader thread with a connection of its own reads pending rows in key order and encrypts them while the server
is busy with the previous batch's UPDATE. Every batch is one short transaction that holds its data and its
progress, so a process killed at any instruction leaves nothing to clean up; the range goes on behind the last
committed position. A row that another transaction changed since it was read is left alone and read again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_tokens_many
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration import sql, tracking
from alphapulse_encryption.migration.batches import Key, Row, key_of, plan_by_key, read_batch
from alphapulse_encryption.migration.database import Actor, Database, TextArray, failure, mark_as_engine
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]

# What a batch aims at: long enough that round trips do not matter, short enough that nobody waits long for a
# row it holds.
TARGET_SECONDS = 0.25
FIRST_BATCH = 1_000
SMALLEST_BATCH = 100
LARGEST_BATCH = 10_000
# Rows that change again and again while we look are left to the next run after this many passes.
PASSES = 5
TRIES = 6

# SQLSTATEs (PostgreSQL manual, appendix A) after which the same batch may simply be tried again.
RETRYABLE = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
    }
)
# … and after which a new connection is needed first.
CONNECTION_LOST = frozenset(
    {
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "08000",  # connection_exception
        "08003",  # connection_does_not_exist
        "08006",  # connection_failure
    }
)


@dataclass(frozen=True)
class Pace:
    """How large a batch is.

    Args:
        batch_size: rows per batch, kept as it is; None adapts it to ``target_seconds``.
        target_seconds: duration of one batch's transaction to aim at, in seconds.
    """

    batch_size: int | None = None
    target_seconds: float = TARGET_SECONDS


@dataclass(frozen=True)
class Progress:
    """What a running range reports after each batch: totals of this call."""

    table: str
    batch_range: int
    rows: int
    values: int
    seconds: float
    batch_size: int


@dataclass(frozen=True)
class RangeResult:
    """What :func:`backfill_range` did.

    Args:
        rows: rows written.
        values: values encrypted, over all columns.
        seconds: duration.
        batches: transactions.
        changed_meanwhile: rows left alone because another transaction changed them between reading and
            writing; they were read again.
        left_pending: rows that are pending still because they kept changing.
        resumed: whether an earlier, interrupted call was continued.
    """

    rows: int = 0
    values: int = 0
    seconds: float = 0.0
    batches: int = 0
    changed_meanwhile: int = 0
    left_pending: int = 0
    resumed: bool = False

    @property
    def changed(self) -> bool:
        return self.rows > 0


@dataclass
class _Counters:
    rows: int = 0
    values: int = 0
    batches: int = 0
    changed_meanwhile: int = 0


@dataclass(frozen=True)
class _Batch:
    """Encrypted rows, ready to be written: arrays in the order :func:`sql.update_batch` expects."""

    keys: list[Key]
    arrays: list[TextArray]
    present: list[list[bool]]

    @property
    def first(self) -> Key:
        return self.keys[0]

    @property
    def last(self) -> Key:
        return self.keys[-1]


def backfill_range(
    database: Database,
    table: Table,
    number: int,
    cipher: EnvelopeFormat,
    keys: KeyRing,
    actor: Actor,
    *,
    pace: Pace | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> RangeResult:
    """Encrypt what is pending in one batch range.

    Args:
        database: the target.
        table: the catalogue's entry.
        number: the batch range.
        cipher: the catalogue's envelope format.
        keys: for search tokens, and to be held against the key this database was begun with.
        actor: who does it.
        pace: size of batches.
        on_progress: called after each batch, from the calling thread.

    Raises:
        RefusedError: wrong key; columns not added; another process works on this range.
        ConfigurationError: the table, its key or a column is missing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    run = _Run(database, table, number, cipher, keys, actor, pace or Pace(), on_progress)
    retrying = Retrying(
        retry=retry_if_exception(_connection_was_lost),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=0.5, max=15),
        reraise=True,
    )
    try:
        return retrying(run.attempt)
    except psycopg.Error as error:
        safe = failure(f"backfill range {number:02d} of {table.key}", error)
        run.record_failure(safe)
        raise safe from None
    except MigrationError as error:
        run.record_failure(error)
        raise


def _connection_was_lost(error: BaseException) -> bool:
    return isinstance(error, psycopg.Error) and (
        error.sqlstate in CONNECTION_LOST
        or (error.sqlstate is None and isinstance(error, psycopg.OperationalError))
    )


@dataclass
class _Run:
    database: Database
    table: Table
    number: int
    cipher: EnvelopeFormat
    keys: KeyRing
    actor: Actor
    pace: Pace
    on_progress: Callable[[Progress], None] | None
    counters: _Counters = field(default_factory=_Counters)
    started: float = field(default_factory=time.monotonic)
    begun: bool = False
    batch_size: int = FIRST_BATCH

    def attempt(self) -> RangeResult:
        if self.pace.batch_size is not None:
            self.batch_size = self.pace.batch_size
        with self.database.connect() as writer, self.database.connect() as reader:
            for connection in (writer, reader):
                plan_by_key(connection)
            state = tracking.require_state(writer, self.table)
            if state.stage != "columns":
                return self._result()
            tracking.ensure_key(writer, self.keys)
            self._lock(writer)
            return self._work(writer, reader)

    def _work(self, writer: Connection, reader: Connection) -> RangeResult:
        batch_range = tracking.read_range(writer, self.table, self.number)
        definition = read_table(writer, self.table)
        resumed = batch_range.position is not None
        everything, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        pending = sql.any_pending(definition, everything)

        def anything_pending() -> bool:
            row = writer.execute(pending, parameters).fetchone()
            return bool(row and row[0])

        if batch_range.is_empty or (batch_range.status == "completed" and not anything_pending()):
            if batch_range.status != "completed":
                with writer.transaction():
                    tracking.complete_range(writer, self.table, self.number)
            return self._result()

        with writer.transaction():
            tracking.begin_range(writer, self.table, self.number)
        self.begun = True
        start = batch_range.position or batch_range.lower
        left = 0
        for _ in range(PASSES):
            changed_before = self.counters.changed_meanwhile
            self._pass(writer, reader, definition, start, batch_range.upper)
            # Before the point where we began, and behind the reader, rows may have become pending again.
            if start == batch_range.lower and self.counters.changed_meanwhile == changed_before:
                break
            start = batch_range.lower
            if not anything_pending():
                break
        else:
            row = writer.execute(sql.count_pending(definition, everything), parameters).fetchone()
            left = int(row[0]) if row is not None else 0
        with writer.transaction():
            tracking.complete_range(writer, self.table, self.number)
            if self.counters.rows:
                tracking.audit(
                    writer,
                    self.actor,
                    "backfill",
                    self.table,
                    batch_range=self.number,
                    rows=self.counters.rows,
                    values=self.counters.values,
                )
        return self._result(left_pending=left, resumed=resumed)

    def _pass(
        self,
        writer: Connection,
        reader: Connection,
        definition: TableDefinition,
        start: Key | None,
        upper: Key | None,
    ) -> None:
        with _Reader(self, reader, definition, start, upper) as batches:
            for batch in batches:
                began = time.monotonic()
                self._write(writer, definition, batch)
                self._adapt(len(batch.keys), time.monotonic() - began)
                if self.on_progress is not None:
                    self.on_progress(
                        Progress(
                            self.table.key,
                            self.number,
                            self.counters.rows,
                            self.counters.values,
                            time.monotonic() - self.started,
                            self.batch_size,
                        )
                    )

    def _write(self, writer: Connection, definition: TableDefinition, batch: _Batch) -> None:
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, psycopg.Error) and e.sqlstate in RETRYABLE),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            reraise=True,
        )
        rows, values = retrying(self._write_once, writer, definition, batch)
        self.counters.batches += 1
        self.counters.rows += rows
        self.counters.values += values
        self.counters.changed_meanwhile += len(batch.keys) - rows

    def _write_once(self, writer: Connection, definition: TableDefinition, batch: _Batch) -> tuple[int, int]:
        bounds = [*batch.first, *batch.last]
        with writer.transaction():
            mark_as_engine(writer)
            rows = writer.execute(sql.update_batch(definition), [*batch.arrays, *bounds]).rowcount
            written = range(len(batch.keys))
            if rows != len(batch.keys):
                ours = {tuple(row) for row in writer.execute(sql.keys_written_now(definition), bounds)}
                written = [i for i, key in enumerate(batch.keys) if key in ours]  # type: ignore[assignment]
            counts = {
                column.name: sum(present[i] for i in written)
                for column, present in zip(definition.plaintext_columns, batch.present, strict=True)
            }
            tracking.advance_range(
                writer, self.table, self.number, position=batch.last, rows=rows, values=counts
            )
        return rows, sum(counts.values())

    def _adapt(self, rows: int, seconds: float) -> None:
        if self.pace.batch_size is not None or rows < self.batch_size:
            return
        # The cost of a batch is proportional to its rows; half of the way at a time, so that one slow batch
        # (a checkpoint, a lock) does not throw the size about.
        ideal = rows * self.pace.target_seconds / max(seconds, 1e-6)
        self.batch_size = int(min(LARGEST_BATCH, max(SMALLEST_BATCH, (self.batch_size + ideal) / 2)))

    def _lock(self, writer: Connection) -> None:
        # Two processes on one range would do no harm, but each would do the other's work.
        def locked() -> bool:
            row = writer.execute(
                "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))",
                [f"alphapulse_encryption range {self.table.key} {self.number}"],
            ).fetchone()
            return bool(row and row[0])

        # A killed process's session may outlive it by the length of its last statement.
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, _RangeIsTaken)),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.2, max=4),
            reraise=True,
        )

        def take() -> None:
            if not locked():
                raise _RangeIsTaken(
                    f"Batch range {self.number:02d} of {self.table.key} is being worked on by another process. "
                    "Wait for it, or end it, and run the partition again."
                )

        retrying(take)

    def _result(self, *, left_pending: int = 0, resumed: bool = False) -> RangeResult:
        return RangeResult(
            rows=self.counters.rows,
            values=self.counters.values,
            seconds=time.monotonic() - self.started,
            batches=self.counters.batches,
            changed_meanwhile=self.counters.changed_meanwhile,
            left_pending=left_pending,
            resumed=resumed,
        )

    def record_failure(self, error: MigrationError) -> None:
        """Mark the range as failed where it had begun; the error itself is what the caller shows."""
        if not self.begun:
            return
        try:
            with self.database.connect() as connection, connection.transaction():
                tracking.fail_range(connection, self.table, self.number, error.args[0])
        except (psycopg.Error, MigrationError):
            # The database is away: the range stays in_progress, and is resumed like one that was killed.
            return


class _RangeIsTaken(RefusedError):
    pass


class _Reader:
    """Reads and encrypts one batch ahead of the writer, in a thread and a connection of its own."""

    def __init__(
        self,
        run: _Run,
        connection: Connection,
        definition: TableDefinition,
        start: Key | None,
        upper: Key | None,
    ) -> None:
        self._run = run
        self._connection = connection
        self._definition = definition
        self._position = start
        self._upper = upper
        self._queue: queue.Queue[_Batch | BaseException | None] = queue.Queue(maxsize=1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="backfill reader", daemon=True)

    def __enter__(self) -> _Reader:
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

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> _Batch:
        item = self._queue.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _work(self) -> None:
        try:
            while not self._stop.is_set():
                rows = self._read()
                if not rows:
                    break
                self._queue.put(self._encrypt(rows))
            self._queue.put(None)
        except BaseException as error:
            # Whatever it is: the calling thread would wait for ever.
            self._queue.put(error)

    def _read(self) -> list[Row]:
        condition, parameters = sql.within(self._definition, self._position, self._upper)
        query = sql.select_pending(self._definition, condition)
        rows = read_batch(self._connection, query, parameters, self._run.batch_size)
        if rows:
            self._position = key_of(self._definition, rows[-1])
        return rows

    def _encrypt(self, rows: list[Row]) -> _Batch:
        width = len(self._definition.key)
        columns = list(zip(*rows, strict=True))
        arrays = [TextArray(column) for column in columns[: width + 1]]
        present: list[list[bool]] = []
        for column, values in zip(self._definition.plaintext_columns, columns[width + 1 :], strict=True):
            arrays.append(TextArray(self._run.cipher.encrypt_many(values, column.context)))
            if column.searchable:
                arrays.append(TextArray(search_tokens_many(self._run.keys, values, column.context)))
            present.append([value is not None for value in values])
        return _Batch([key_of(self._definition, row) for row in rows], arrays, present)
