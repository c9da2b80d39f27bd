"""Works through one batch range of a table: read, encrypt, write, while the application goes on writing.

What is done to the rows is a :class:`Work`: the backfill encrypts what is pending, a rotation encrypts again what is of
another key version. Every batch is one short transaction that holds its data and its progress, so a process killed at
any instruction leaves nothing to clean up; the range goes on behind the last committed position. A row that another
transaction changed since it was read is left alone and read again. A row that cannot be written is set aside, and the
others go on. Between batches the work holds back while the server shows distress (``throttle``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import psycopg
from psycopg.sql import Composed
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.usage import KeyUsage
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.limits import Limits
from alphapulse_encryption.migration.bookkeeping.quarantine import (
    Step,
    concerns_a_row,
    named,
    quarantine,
    read_quarantine,
    release,
)
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import (
    MARK_AS_ENGINE,
    DatabaseUnreachable,
    connection_was_lost,
    failure,
)
from alphapulse_encryption.migration.rows.reader import Batch, Item, Reader, Unreadable
from alphapulse_encryption.migration.rows.sessions import Sessions, quick_switches
from alphapulse_encryption.migration.rows.throttle import Throttle
from alphapulse_encryption.migration.rows.tuning import Tuned
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]

SMALLEST_BATCH = 100
LARGEST_BATCH = 2_500
# Rows that change again and again while we look are left to the next run after this many passes.
PASSES = 5
TRIES = 6

# SQLSTATEs (PostgreSQL manual, appendix A) after which the same batch may simply be tried again.
RETRYABLE = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
    }
)


@dataclass(frozen=True)
class Pace:
    """How large a batch is; what is not given here follows the settings in the database.

    Args:
        batch_size: rows per batch, kept as it is.
        target_seconds: duration of one batch's transaction to aim at, in seconds.
        rest_ratio: seconds of rest for each second that a batch took.
        session: what is tuned; given to the sessions that do the work.
    """

    batch_size: int | None = None
    target_seconds: float | None = None
    rest_ratio: float | None = None
    session: Tuned = field(default_factory=Tuned)


@dataclass(frozen=True)
class Progress:
    """What a running range reports after each batch, and when it holds back: totals of this call.

    Args:
        table: the table's key.
        batch_range: the range.
        rows: rows written.
        values: values encrypted.
        seconds: since the beginning.
        batch_size: rows per batch, as it is now.
        waiting_for: why it holds back; None while it works.
    """

    table: str
    batch_range: int
    rows: int
    values: int
    seconds: float
    batch_size: int
    waiting_for: str | None = None


@dataclass(frozen=True)
class RangeResult:
    """What was done to a range.

    Args:
        rows: rows written.
        values: values encrypted, over all columns.
        seconds: duration.
        batches: transactions.
        changed_meanwhile: rows left alone because another transaction changed or held them between reading and
            writing; they were read again.
        left_pending: rows that are to be worked on still because they kept changing.
        resumed: whether an earlier, interrupted call was continued.
        seconds_held_back: how much of the duration it waited because the server showed distress.
        seconds_rested: how much of it was rest between batches, as the settings ask for.
        key_usage: messages under each key that this range used, of all processes so far.
    """

    rows: int = 0
    values: int = 0
    seconds: float = 0.0
    batches: int = 0
    changed_meanwhile: int = 0
    left_pending: int = 0
    resumed: bool = False
    seconds_held_back: float = 0.0
    seconds_rested: float = 0.0
    key_usage: tuple[KeyUsage, ...] = ()

    @property
    def changed(self) -> bool:
        return self.rows > 0


class RowsQuarantined(MigrationError):
    """Some rows of a range could not be encrypted; all others are."""


class Stopped(MigrationError):
    """The caller wants no more batches; raised by it from ``on_progress``. The range stays as it is."""


class RangeIsTaken(RefusedError):
    """Another process works on the range."""


@dataclass
class _Counters:
    rows: int = 0
    values: int = 0
    batches: int = 0
    changed_meanwhile: int = 0


class Work(Protocol):
    """What is done to the rows of a range, and where its progress is kept."""

    @property
    def step(self) -> Step:
        """Its name, as messages, the audit log and the quarantine have it."""

    def admit(self, connection: Connection) -> bool:
        """Whether the table is in a state to be worked on; no, where there is nothing to do for good.

        Raises:
            RefusedError: not now; the message says what to do.
        """

    def read_table(self, connection: Connection) -> TableDefinition:
        """The table as it is now."""

    def columns(self, definition: TableDefinition) -> tuple[Column, ...]:
        """The columns whose ciphertexts and tokens are written."""

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        """A batch in key order: key, ``xmin``, and of each of the columns what it is made of, NULL where it is left
        alone. Ends in ``LIMIT %s``.
        """

    def wanted(self, definition: TableDefinition) -> Composed:
        """The condition for a row ``t`` to be worked on."""

    def encrypt(
        self, definition: TableDefinition, columns: list[list[bytes | None]], cipher: MeteredCipher
    ) -> list[Item]:
        """What a batch that was read becomes, encrypted by this cipher alone; called in a thread of its own."""

    def refused(
        self, connection: Connection, definition: TableDefinition, batch: Batch, error: psycopg.Error
    ) -> str:
        """Why the database refused a batch of one row, without values."""

    def read_range(self, connection: Connection, table: Table, number: int) -> tracking.BatchRange:
        """The range, with this work's progress."""

    def begin(self, connection: Connection, table: Table, number: int) -> None:
        """It begins, or goes on."""

    def advance(
        self,
        connection: Connection,
        table: Table,
        number: int,
        *,
        position: tuple[str, ...],
        rows: int,
        values: Mapping[str, int],
    ) -> bytes:
        """The statement that keeps the progress of one batch, for the transaction that holds its data."""

    def waits(self, connection: Connection, table: Table, number: int, reason: str | None) -> None:
        """It holds back, or goes on where there is no reason."""

    def complete(self, connection: Connection, table: Table, number: int) -> None:
        """It is done."""

    def fail(self, connection: Connection, table: Table, number: int, message: str) -> None:
        """It ended with an error, whose message is free of values."""


def work_on_range(
    work: Work,
    target: Target,
    table: Table,
    number: int,
    *,
    pace: Pace | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    sessions: Sessions | None = None,
    following: int | None = None,
) -> RangeResult:
    """Do a work to all rows of one batch range that it wants.

    Args:
        work: what to do.
        table: the catalogue's entry.
        number: the batch range.
        pace: size of batches.
        on_progress: called after each batch, and again and again while it holds back, from the calling thread; may
            raise :class:`Stopped`.
        sessions: the worker's own, which works on several ranges one after another; by default opened and closed here.
        following: the range of this table that the same sessions are for next: while the last rows of this one are
            written, its first ones are read.

    Raises:
        RefusedError: wrong key or key version; not admitted; another process works on this range.
        RowsQuarantined: some rows could not be encrypted; they are named by key, and all others are encrypted.
        ConfigurationError: the table, its key or a column is missing, or a setting in the database means nothing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    pace = pace or Pace()
    with ExitStack() as stack:
        stack.enter_context(quick_switches())
        if sessions is None:
            sessions = stack.enter_context(Sessions(target.database, pace.session))
        return _work_on(
            _Run(
                work,
                target,
                table,
                number,
                pace,
                on_progress,
                sessions,
                following,
            )
        )


def _work_on(run: _Run) -> RangeResult:
    retrying = Retrying(
        retry=retry_if_exception(run.may_go_on_after),
        stop=stop_after_attempt(TRIES),
        wait=wait_random_exponential(multiplier=0.5, min=0.25, max=15),
        reraise=True,
    )
    try:
        return retrying(run.attempt)
    except psycopg.Error as error:
        safe = failure(f"{run.work.step} range {run.number:02d} of {run.table.key}", error)
        run.record_failure(safe)
        raise safe from None
    except MigrationError as error:
        run.record_failure(error)
        raise


@dataclass
class _Run:
    work: Work
    target: Target
    table: Table
    number: int
    pace: Pace
    on_progress: Callable[[Progress], None] | None
    sessions: Sessions
    following: int | None
    counters: _Counters = field(default_factory=_Counters)
    statements: dict[bool, bytes] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    connected: bool = False
    begun: bool = False
    held_back: float = 0.0
    rested: float = 0.0

    @property
    def batch_size(self) -> int:
        """Rows per batch, as the worker's ranges so far have found it to suit."""
        return self.sessions.batch_size

    @batch_size.setter
    def batch_size(self, rows: int) -> None:
        self.sessions.batch_size = rows

    def may_go_on_after(self, error: BaseException) -> bool:
        """Whether a new connection may help: a server that was there and is being restarted."""
        if isinstance(error, DatabaseUnreachable):
            return self.connected
        return connection_was_lost(error)

    def attempt(self) -> RangeResult:
        if self.pace.batch_size:
            self.batch_size = self.pace.batch_size
        self.statements.clear()
        try:
            writer, reader = self.sessions.open()
            self.connected = True
            admitted = self.work.admit(writer)
            tracking.ensure_key(writer, self.target.keys)
            if not admitted:
                return self._result()
            self._lock(writer)
            # Once more: whoever has the range now wrote under a version that was current when it began.
            tracking.check_key(writer, self.target.keys)
            result = self._work(writer, reader)
            self._unlock(writer)
            return result
        except BaseException:
            # With them goes the lock on the range.
            self.sessions.close()
            raise

    def _work(self, writer: Connection, reader: Connection) -> RangeResult:
        batch_range = self.work.read_range(writer, self.table, self.number)
        definition = self.work.read_table(writer)
        resumed = batch_range.position is not None
        everything, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        wanted = self.work.wanted(definition)
        any_wanted = sql.any_of(definition, everything, wanted)

        def anything_left() -> bool:
            row = writer.execute(any_wanted, parameters).fetchone()
            return bool(row and row[0])

        if batch_range.is_empty or (batch_range.status == "completed" and not anything_left()):
            if batch_range.status != "completed":
                with writer.transaction():
                    self.work.complete(writer, self.table, self.number)
            return self._result()

        with writer.transaction():
            self.work.begin(writer, self.table, self.number)
            release(writer, self.table, self.number, self.work.step)
        self.begun = True
        start = batch_range.position or batch_range.lower
        left = 0
        for _ in range(PASSES):
            changed_before = self.counters.changed_meanwhile
            self._pass(writer, reader, definition, start, batch_range.upper)
            # Before the point where we began, and behind the reader, rows may have changed again.
            if start == batch_range.lower and self.counters.changed_meanwhile == changed_before:
                break
            start = batch_range.lower
            if not anything_left():
                break
        else:
            row = writer.execute(sql.count_of(definition, everything, wanted), parameters).fetchone()
            left = int(row[0]) if row is not None else 0
        self._finish(writer)
        return self._result(left_pending=left, resumed=resumed)

    def _finish(self, writer: Connection) -> None:
        aside = read_quarantine(writer, self.table, self.number, step=self.work.step)
        with writer.transaction():
            if not aside:
                self.work.complete(writer, self.table, self.number)
            if self.counters.rows or aside:
                tracking.audit(
                    writer,
                    self.target.actor,
                    self.work.step,
                    self.table,
                    batch_range=self.number,
                    rows=self.counters.rows,
                    values=self.counters.values,
                    quarantined=len(aside),
                )
        if aside:
            raise RowsQuarantined(
                f"Rows of {self.table.key} in batch range {self.number:02d} that could not be encrypted: {len(aside)}; "
                f"all others are. Correct them and run the partition again: {named(aside)}."
            )

    def _pass(
        self,
        writer: Connection,
        reader: Connection,
        definition: TableDefinition,
        start: Key | None,
        upper: Key | None,
    ) -> None:
        with (
            self.sessions.throttle(self._wait_for(writer)) as throttle,
            self._reader(reader, definition, start, upper) as items,
        ):
            self._read_ahead(writer, reader, definition, items)
            waited_before, rested_before = throttle.waited, throttle.rested
            for item in items:
                limits = throttle.wait()
                if isinstance(item, Unreadable):
                    self._set_aside(writer, item.key, item.reason)
                    continue
                began = time.monotonic()
                self._write(writer, definition, item)
                took = time.monotonic() - began
                self._adapt(len(item), took, limits)
                self._report()
                self._rest(throttle, took, limits)
            self.held_back += throttle.waited - waited_before
            self.rested += throttle.rested - rested_before

    def _rest(self, throttle: Throttle, worked: float, limits: Limits) -> None:
        ratio = limits.rest_ratio if self.pace.rest_ratio is None else self.pace.rest_ratio
        if ratio:
            reason = f"rests {ratio:g} s for each second of work (setting rest_ratio)"
            throttle.rest(worked * ratio, lambda: self._report(reason))

    def _reader(
        self, reader: Connection, definition: TableDefinition, start: Key | None, upper: Key | None
    ) -> Reader:
        ahead = self.sessions.take_ahead()
        if ahead is not None:
            if ahead.reads(definition, self.work, start, upper):
                return ahead
            # The table, or what is left to do, is not what it was.
            ahead.close()
        return self._new_reader(reader, definition, start, upper)

    def _new_reader(
        self,
        reader: Connection,
        definition: TableDefinition,
        start: Key | None,
        upper: Key | None,
        *,
        at_leisure: bool = False,
    ) -> Reader:
        sessions = self.sessions
        return Reader(
            reader,
            definition,
            self.work,
            self._metered,
            start,
            upper,
            lambda: sessions.batch_size,
            at_leisure=at_leisure,
        )

    def _read_ahead(
        self, writer: Connection, reader: Connection, definition: TableDefinition, items: Reader
    ) -> None:
        if self.following is None:
            return
        upcoming = self.work.read_range(writer, self.table, self.following)
        if upcoming.is_empty or upcoming.status == "completed":
            return
        start = upcoming.position or upcoming.lower
        ahead = self._new_reader(reader, definition, start, upcoming.upper, at_leisure=True)
        self.sessions.read_ahead(ahead)
        items.then(ahead)

    def _wait_for(self, writer: Connection) -> Callable[[str | None], None]:
        told: str | None = None

        def wait(reason: str | None) -> None:
            nonlocal told
            if reason != told:
                self.work.waits(writer, self.table, self.number, reason)
                # What somebody waits for is a batch of ours: the next one is shorter.
                self.batch_size = self.pace.batch_size or max(SMALLEST_BATCH, self.batch_size // 2)
            told = reason
            self._report(reason)

        return wait

    def _report(self, waiting_for: str | None = None) -> None:
        if self.on_progress is not None:
            self.on_progress(
                Progress(
                    self.table.key,
                    self.number,
                    self.counters.rows,
                    self.counters.values,
                    time.monotonic() - self.started,
                    self.batch_size,
                    waiting_for,
                )
            )

    def _write(self, writer: Connection, definition: TableDefinition, batch: Batch) -> None:
        """Write a batch; of one that the server refuses, all rows but the culprits."""
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, psycopg.Error) and e.sqlstate in RETRYABLE),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.1, min=0.05, max=5),
            reraise=True,
        )
        try:
            try:
                rows, values = retrying(self._write_once, writer, definition, batch)
            except psycopg.errors.LockNotAvailable:
                rows, values = retrying(self._write_once, writer, definition, batch, skip_locked=True)
        except psycopg.Error as error:
            if not concerns_a_row(error):
                raise
            if len(batch) == 1:
                self._set_aside(writer, batch.key(0), self.work.refused(writer, definition, batch, error))
                return
            for half in batch.halves():
                self._write(writer, definition, half)
            return
        self.counters.batches += 1
        self.counters.rows += rows
        self.counters.values += values
        self.counters.changed_meanwhile += len(batch) - rows

    def _write_once(
        self, writer: Connection, definition: TableDefinition, batch: Batch, *, skip_locked: bool = False
    ) -> tuple[int, int]:
        with wire.transaction(writer, MARK_AS_ENGINE) as last:
            if skip_locked not in self.statements:
                self.statements[skip_locked] = wire.numbered(
                    writer,
                    sql.update_batch(definition, self.work.columns(definition), skip_locked=skip_locked),
                )
            bounds = [*batch.bounds, *batch.bounds] if skip_locked else batch.bounds
            result = wire.execute(writer, self.statements[skip_locked], [*batch.arrays, *bounds])
            rows = result.command_tuples or 0
            counts = self._count(writer, definition, batch, rows)
            last.append(
                self.work.advance(
                    writer, self.table, self.number, position=batch.key(-1), rows=rows, values=counts
                )
            )
        return rows, sum(counts.values())

    def _count(
        self, writer: Connection, definition: TableDefinition, batch: Batch, rows: int
    ) -> dict[str, int]:
        """Values per column among the rows that were really written."""
        names = [column.name for column in self.work.columns(definition)]
        if rows == len(batch):
            return dict(zip(names, batch.values(), strict=True))
        ours = {tuple(row) for row in writer.execute(sql.keys_written_now(definition), batch.bounds)}
        written = [row for row in range(len(batch)) if batch.key(row) in ours]
        return dict(zip(names, batch.values(written), strict=True))

    def _set_aside(self, writer: Connection, key: Key, reason: str) -> None:
        with writer.transaction():
            quarantine(writer, self.table, self.number, key, reason, self.target.actor.run_id, self.work.step)
            wire.script(
                writer,
                self.work.advance(writer, self.table, self.number, position=key, rows=0, values={}),
            )

    def _adapt(self, rows: int, seconds: float, limits: Limits) -> None:
        fixed = self.pace.batch_size or limits.batch_size
        if fixed:
            self.batch_size = fixed
            return
        target = self.pace.target_seconds or limits.target_seconds
        # The cost of a batch is proportional to its rows. Half of the way at a time, so that one slow batch
        # (a checkpoint, a lock) does not throw the size about; a short one, the range's last, says nothing.
        if rows >= SMALLEST_BATCH:
            ideal = rows * target / max(seconds, 1e-6)
            self.batch_size = int(min(LARGEST_BATCH, max(SMALLEST_BATCH, (self.batch_size + ideal) / 2)))

    def _lock(self, writer: Connection) -> None:
        # Two processes on one range would do no harm, but each would do the other's work. A killed process's
        # session may outlive it by the length of its last statement.
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, RangeIsTaken)),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.2, min=0.1, max=4),
            reraise=True,
        )

        def take() -> None:
            row = writer.execute(
                "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", [self._lock_name]
            ).fetchone()
            if not (row and row[0]):
                raise RangeIsTaken(
                    f"Batch range {self.number:02d} of {self.table.key} is being worked on by another process. "
                    "Wait for it, or end it, and run the partition again."
                )

        retrying(take)

    def _unlock(self, writer: Connection) -> None:
        writer.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [self._lock_name])

    @property
    def _lock_name(self) -> str:
        return tracking.range_lock(self.table, self.number)

    def _result(self, *, left_pending: int = 0, resumed: bool = False) -> RangeResult:
        return RangeResult(
            rows=self.counters.rows,
            values=self.counters.values,
            seconds=time.monotonic() - self.started,
            batches=self.counters.batches,
            changed_meanwhile=self.counters.changed_meanwhile,
            left_pending=left_pending,
            resumed=resumed,
            seconds_held_back=self.held_back,
            seconds_rested=self.rested,
            key_usage=self._key_usage() if self.counters.rows else (),
        )

    def _key_usage(self) -> tuple[KeyUsage, ...]:
        contexts = {column.context for column in self.table.columns}
        return tuple(usage for usage in self._metered.usage() if usage.context in contexts)

    @property
    def _metered(self) -> MeteredCipher:
        return self.sessions.metered(self.target)

    def record_failure(self, error: MigrationError) -> None:
        """Mark the range as failed where it had begun; the error itself is what the caller shows."""
        if not self.begun or isinstance(error, Stopped):
            return
        try:
            with self.target.database.connect() as connection, connection.transaction():
                self.work.fail(connection, self.table, self.number, error.args[0])
        except (psycopg.Error, MigrationError):
            # The database is away: the range stays in_progress, and is resumed like one that was killed.
            return
