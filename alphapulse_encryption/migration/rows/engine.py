"""Works through a table's rows, range by range: read, encrypt, write, while the application goes on writing.

Every write to a user's row comes from here. What is done to the rows is an :class:`.operation.Operation`. Every batch
is one short transaction that holds its data and its progress, so a process killed at any instruction leaves nothing to
clean up; the range goes on behind the last committed position. A row that another transaction changed since it was
read is left alone and read again. A row that cannot be written is set aside, one that is locked is left for later, and
the others go on. Between batches the work holds back while the server shows distress (``throttle``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

import psycopg
from psycopg.pq.abc import PGresult

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.usage import KeyUsage
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key, ensure_key
from alphapulse_encryption.migration.bookkeeping.limits import Limits
from alphapulse_encryption.migration.bookkeeping.progress import Ledger
from alphapulse_encryption.migration.bookkeeping.quarantine import (
    NAMED,
    Quarantined,
    named,
    quarantine,
    read_quarantine,
    release,
)
from alphapulse_encryption.migration.bookkeeping.ranges import Key, hold_plan, range_lock, read_ranges
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres import locks, retry, wire
from alphapulse_encryption.migration.postgres.database import MARK_AS_ENGINE, DatabaseUnreachable, failure
from alphapulse_encryption.migration.rows.batches import read_columns
from alphapulse_encryption.migration.rows.operation import (
    Batch,
    Item,
    Operation,
    Unreadable,
    Unwritable,
    Written,
    key_at,
)
from alphapulse_encryption.migration.rows.reader import Reader
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
        values: values written.
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
    """What was done to a range, or to all ranges of a table.

    Args:
        by_column: values written.
        renewed: of those, values whose ciphertext was made again for it.
        changed_meanwhile: rows left alone because another transaction changed or held them between reading and
            writing; they were read again.
        left: the rows that are to be worked on still, because they kept changing or were locked.
        locked: those of them that another session held.
        quarantined: the rows that could not be done.
        resumed: whether an earlier, interrupted call was continued.
        seconds_held_back: how much of the duration it waited because the server showed distress.
        seconds_rested: how much of it was rest between batches, as the settings ask for.
        key_usage: messages under each key that this range used, of all processes so far.
    """

    rows: int = 0
    by_column: Counter[str] = field(default_factory=Counter)
    renewed: int = 0
    seconds: float = 0.0
    batches: int = 0
    changed_meanwhile: int = 0
    left: tuple[Key, ...] = ()
    locked: tuple[Key, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    resumed: bool = False
    seconds_held_back: float = 0.0
    seconds_rested: float = 0.0
    key_usage: tuple[KeyUsage, ...] = ()

    @property
    def changed(self) -> bool:
        return self.rows > 0

    @property
    def values(self) -> int:
        """Values written, over all columns."""
        return self.by_column.total()

    @property
    def left_pending(self) -> int:
        """How many rows are left."""
        return len(self.left)

    def __add__(self, other: RangeResult) -> RangeResult:
        """Both together; of what is not a sum, this one's."""
        names = ("rows", "by_column", "renewed", "seconds", "batches", "changed_meanwhile", "left", "locked")
        more = ("quarantined", "seconds_held_back", "seconds_rested")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in (*names, *more)})


class RowsQuarantined(MigrationError):
    """Some rows of a range could not be encrypted; all others are."""


class RowsLeft(RefusedError):
    """Some rows of a table could not be done, or were locked; all others are."""


class NotFinished(Exception):
    """Under a lock, not everything could be done."""


class Stopped(MigrationError):
    """The caller wants no more batches; raised by it from ``on_progress``. The range stays as it is."""


class RangeIsTaken(RefusedError):
    """Another process works on the range."""


@dataclass
class _Counters:
    rows: int = 0
    by_column: Counter[str] = field(default_factory=Counter)
    renewed: int = 0
    batches: int = 0
    changed_meanwhile: int = 0
    # Of this pass: rows that were not written, and whether another session held them.
    missed: dict[Key, bool] = field(default_factory=dict)

    @property
    def values(self) -> int:
        return self.by_column.total()


class How(TypedDict, total=False):
    """How a range is worked on.

    Args:
        on_progress: called after each batch, and again and again while it holds back, from the calling thread; may
            raise :class:`Stopped`.
        sessions: the worker's own, which works on several ranges one after another; by default opened and closed here.
        following: the range of this table that the same sessions are for next: while the last rows of this one are
            written, its first ones are read.
    """

    pace: Pace | None
    on_progress: Callable[[Progress], None] | None
    sessions: Sessions | None
    following: int | None


def work_on_range(operation: Operation, target: Target, number: int, **how: Unpack[How]) -> RangeResult:
    """Do an operation to all rows of one batch range that it wants.

    Raises:
        RefusedError: wrong key or key version; not admitted; another process works on this range.
        RowsQuarantined: some rows could not be done; they are named by key, and all others are.
        ConfigurationError: the table, its key or a column is missing, or a setting in the database means nothing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    pace, sessions = how.get("pace") or Pace(), how.get("sessions")
    with ExitStack() as stack:
        stack.enter_context(quick_switches())
        if sessions is None:
            sessions = stack.enter_context(Sessions(target.database, pace.session))
        run = _Run(operation, target, number, sessions, pace, how.get("on_progress"), how.get("following"))
        result = _work_on(run)
    if result.quarantined:
        raise RowsQuarantined(run.set_aside(result.quarantined))
    return result


def work_on_table(
    table: Table,
    operation: Operation | Mapping[int, Operation],
    target: Target,
    *,
    again: str,
    on_progress: Callable[[Progress], None] | None = None,
    changing_may_stay: bool = False,
) -> RangeResult:
    """Do an operation to all rows of a table that it wants, one range after another.

    Args:
        operation: what to do, or by their numbers what to do to some of the ranges.
        again: what to type to go on with it.
        on_progress: see :class:`How`.
        changing_may_stay: whether rows that keep changing, but are not locked, are the caller's to look for.

    Raises:
        RowsLeft: rows could not be done, or were locked; they are named by key, and all others are done.
        MigrationError: as :func:`work_on_range`.
    """
    total, done = RangeResult(), ""
    with (
        target.database.session(f"go through {table.key}") as connection,
        quick_switches(),
        Sessions(target.database) as sessions,
    ):
        hold_plan(connection, table)
        numbers = [r.number for r in read_ranges(connection, table) if not r.is_empty]
        by_range = operation if isinstance(operation, Mapping) else dict.fromkeys(numbers, operation)
        for number, doing in by_range.items():
            report = _adding(total, on_progress)
            total += _work_on(_Run(doing, target, number, sessions, on_progress=report))
            done = doing.done
    left = total.locked if changing_may_stay else total.left
    reasons = []
    if aside := total.quarantined:
        reasons.append(
            f"Rows of {table.key} that could not be {done}: {len(aside)}: {named(aside)}. Correct them."
        )
    if left:
        reasons.append(
            f"Rows of {table.key} that are locked by other sessions, kept by a trigger, or change all the while: "
            f"{len(left)}: {_keys(left)}. Let those transactions end."
        )
    if reasons:
        raise RowsLeft(f"{' '.join(reasons)} All other rows are done. Run it again then ({again}).")
    return total


def _adding(
    before: RangeResult, on_progress: Callable[[Progress], None] | None
) -> Callable[[Progress], None] | None:
    """Reports a range's progress on top of that of the ranges before it."""
    if on_progress is None:
        return None

    def report(progress: Progress) -> None:
        rows, values = progress.rows + before.rows, progress.values + before.values
        seconds = progress.seconds + before.seconds
        on_progress(replace(progress, rows=rows, values=values, seconds=seconds))

    return report


def _keys(keys: Sequence[Key]) -> str:
    text = "; ".join(f"key ({', '.join(key)})" for key in keys[:NAMED])
    return f"{text}; and {len(keys) - NAMED} more" if len(keys) > NAMED else text


def anything_wanted(operation: Operation, connection: Connection, definition: TableDefinition) -> bool:
    """Whether any row of the table is still to be worked on."""
    statement = sql.any_of(definition, sql.EVERYTHING, operation.wanted(definition))
    return connection.execute(statement).fetchone() == (True,)


def finish_under_lock(
    operation: Operation, target: Target, connection: Connection, definition: TableDefinition, *, most: int
) -> RangeResult:
    """Do an operation to the last few rows, in the transaction of a caller who keeps everybody from the table.

    Args:
        operation: what to do.
        connection: in a transaction that holds the table exclusively, and is undone on an error.
        most: how many rows there may be.

    Raises:
        NotFinished: there are more, or one of them cannot be done.
    """
    with closing(MeteredCipher(target)) as cipher:
        run = _Run(operation, target, 0, Sessions(target.database), cipher=cipher)
        position: Key | None = None
        left = most
        while True:
            condition, parameters = sql.within(definition, position, None)
            statement = wire.numbered(connection, operation.select(definition, condition))
            columns = read_columns(connection, statement, parameters, left + 1)
            if not columns[0]:
                break
            left -= len(columns[0])
            if left < 0:
                raise NotFinished
            position = key_at(columns, len(definition.key), -1)
            for item in operation.make(definition, columns, cipher):
                run.write_under_lock(connection, definition, item)
        if anything_wanted(operation, connection, definition):
            raise NotFinished
        return run.result()


def _work_on(run: _Run) -> RangeResult:
    try:
        return retry.again(run.attempt, run.may_go_on_after, attempts=TRIES, pauses=(0.25, 15), first=0.5)
    except psycopg.Error as error:
        safe = failure(f"{run.operation.step} range {run.number:02d} of {run.table.key}", error)
        run.record_failure(safe)
        raise safe from None
    except MigrationError as error:
        run.record_failure(error)
        raise


@dataclass
class _Run:
    operation: Operation
    target: Target
    number: int
    sessions: Sessions
    pace: Pace = field(default_factory=Pace)
    on_progress: Callable[[Progress], None] | None = None
    following: int | None = None
    counters: _Counters = field(default_factory=_Counters)
    statements: dict[bool, bytes] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    connected: bool = False
    begun: bool = False
    held_back: float = 0.0
    rested: float = 0.0
    # None: the sessions' own.
    cipher: MeteredCipher | None = None

    @property
    def table(self) -> Table:
        """The catalogue's entry."""
        return self.operation.table

    @property
    def ledger(self) -> Ledger:
        """Keeps the range's progress."""
        return self.operation.ledger(self.number)

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
        return retry.connection_was_lost(error)

    def attempt(self) -> RangeResult:
        if self.pace.batch_size:
            self.batch_size = self.pace.batch_size
        self.statements.clear()
        try:
            writer, reader = self.sessions.open()
            self.connected = True
            admitted = self.operation.admit(writer)
            if not self.sessions.knows_the_bookkeeping:
                # Holding it against its definition costs as much as hundreds of rows: once for a worker's sessions.
                ensure_key(writer, self.target.keys)
                self.sessions.knows_the_bookkeeping = True
            if not admitted:
                return self.result()
            self._take_range(writer)
            # Once more: another process may have held the range, and a rotation may have begun meanwhile.
            check_key(writer, self.target.keys)
            result = self._work(writer, reader)
            locks.release(writer, self._lock_name)
            return result
        except BaseException:
            # With them goes the lock on the range.
            self.sessions.close()
            raise

    def _work(self, writer: Connection, reader: Connection) -> RangeResult:
        batch_range = self.ledger.read(writer)
        definition = self.operation.read_table(writer)
        resumed = batch_range.position is not None
        everything, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        wanted = self.operation.wanted(definition)
        any_wanted = sql.any_of(definition, everything, wanted)

        def anything_left() -> bool:
            row = writer.execute(any_wanted, parameters).fetchone()
            return bool(row and row[0])

        if batch_range.is_empty or (batch_range.status == "completed" and not anything_left()):
            if batch_range.status != "completed":
                with writer.transaction():
                    self.ledger.complete(writer)
            return self.result()

        with writer.transaction():
            self.ledger.begin(writer)
            release(writer, self.table, self.number, self.operation.step)
        self.begun = True
        start = batch_range.position or batch_range.lower
        left: dict[Key, bool] = {}
        for _ in range(PASSES):
            self.counters.missed = {}
            self._pass(writer, reader, definition, start, batch_range.upper)
            # Before the point where we began, and behind the reader, rows may have changed again.
            if start == batch_range.lower and not self.counters.missed:
                break
            start = batch_range.lower
            if not anything_left():
                break
        else:
            left = self.counters.missed
        aside = self._finish(writer)
        return self.result(left=left, quarantined=aside, resumed=resumed)

    def _finish(self, writer: Connection) -> tuple[Quarantined, ...]:
        aside = read_quarantine(writer, self.table, self.number, step=self.operation.step)
        with writer.transaction():
            if aside:
                self.ledger.fail(writer, self.set_aside(aside))
            else:
                self.ledger.complete(writer)
            if self.counters.rows or aside:
                audit(
                    writer,
                    self.target.actor,
                    self.operation.step,
                    self.table,
                    batch_range=self.number,
                    rows=self.counters.rows,
                    values=self.counters.values,
                    quarantined=len(aside),
                )
        return aside

    def set_aside(self, rows: Sequence[Quarantined]) -> str:
        """What is told of rows of this range that could not be done."""
        return (
            f"Rows of {self.table.key} in batch range {self.number:02d} that could not be {self.operation.done}: "
            f"{len(rows)}; all others are. Correct them and run the partition again: {named(rows)}."
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
            if ahead.reads(definition, self.operation, start, upper):
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
            self.operation,
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
        upcoming = self.operation.ledger(self.following).read(writer)
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
                self.ledger.waits(writer, reason)
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
        try:
            try:
                self._write_again(writer, definition, batch)
            except psycopg.errors.LockNotAvailable:
                self._write_again(writer, definition, batch, skip_locked=True)
        except Unwritable as error:
            for row, reason in error.rows.items():
                self._set_aside(writer, batch.key(row), reason)
            if others := [row for row in range(len(batch)) if row not in error.rows]:
                self._write(writer, definition, batch.only(others))
        except psycopg.Error as error:
            if not retry.about_a_row(error):
                raise
            if len(batch) == 1:
                reason = self.operation.refused(writer, definition, batch, error)
                self._set_aside(writer, batch.key(0), reason)
                return
            for half in batch.halves():
                self._write(writer, definition, half)

    def write_under_lock(self, connection: Connection, definition: TableDefinition, item: Item) -> None:
        """Write a batch in the caller's transaction, all of it or nothing."""
        if isinstance(item, Unreadable):
            raise NotFinished
        try:
            self._write_once(connection, definition, item)
        except Unwritable:
            raise NotFinished from None
        except psycopg.Error as error:
            if retry.about_a_row(error):
                raise NotFinished from None
            raise
        if self.counters.missed:
            raise NotFinished

    def _write_again(
        self, writer: Connection, definition: TableDefinition, batch: Batch, *, skip_locked: bool = False
    ) -> None:
        retry.again(
            lambda: self._write_once(writer, definition, batch, skip_locked=skip_locked),
            retry.retryable,
            attempts=TRIES,
            pauses=(0.05, 5),
            first=0.1,
        )

    def _write_once(
        self, writer: Connection, definition: TableDefinition, batch: Batch, *, skip_locked: bool = False
    ) -> None:
        missed: dict[Key, bool] = {}
        with wire.transaction(writer, MARK_AS_ENGINE) as last:
            self.operation.before(writer)
            result = self._update(writer, definition, batch, skip_locked=skip_locked)
            rows = result.command_tuples or 0
            written: Sequence[int] = range(len(batch))
            if rows < len(batch):
                ours = {tuple(row) for row in writer.execute(sql.keys_written_now(definition), batch.bounds)}
                written = [row for row in written if batch.key(row) in ours]
                missed = self._missed(
                    writer, definition, batch.only(set(range(len(batch))).difference(written))
                )
            done = Written(definition, batch, written, result, self._metered)
            renewed = self.operation.after(writer, done)
            counts = batch.values(None if rows == len(batch) else written)
            names = [column.name for column in self.operation.columns(definition)]
            values = dict(zip(names, counts, strict=True))
            if self.cipher is None:
                position = batch.key(-1)
                last.append(self.ledger.advance(writer, position=position, rows=rows, values=values))
        self.counters.batches += 1
        self.counters.rows += rows
        self.counters.by_column.update(values)
        self.counters.renewed += renewed
        self.counters.changed_meanwhile += len(missed)
        self.counters.missed |= missed

    def _update(
        self, writer: Connection, definition: TableDefinition, batch: Batch, *, skip_locked: bool
    ) -> PGresult:
        if skip_locked not in self.statements:
            statement = self.operation.update(definition, skip_locked=skip_locked)
            self.statements[skip_locked] = wire.numbered(writer, statement)
        bounds = [*batch.bounds, *batch.bounds] if skip_locked else batch.bounds
        return wire.execute(writer, self.statements[skip_locked], [*batch.arrays, *bounds])

    def _missed(self, writer: Connection, definition: TableDefinition, batch: Batch) -> dict[Key, bool]:
        """Rows that were not written, and whether they are as they were read: somebody holds them, or a trigger."""
        statement = wire.numbered(writer, sql.keys_unchanged(definition))
        result = wire.execute(writer, statement, [*batch.arrays[: batch.key_width + 1], *batch.bounds])
        columns, width = wire.columns(result), batch.key_width
        unchanged = {key_at(columns, width, row) for row in range(len(columns[0]))}
        return {key: key in unchanged for key in map(batch.key, range(len(batch)))}

    def _set_aside(self, writer: Connection, key: Key, reason: str) -> None:
        with writer.transaction():
            run_id = self.target.actor.run_id
            quarantine(writer, self.table, self.number, key, reason, run_id, self.operation.step)
            wire.script(
                writer,
                self.ledger.advance(writer, position=key, rows=0, values={}),
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

    def _take_range(self, writer: Connection) -> None:
        # Two processes on one range would do no harm, but each would do the other's work. A killed process's
        # session may outlive it by the length of its last statement.
        def take() -> None:
            if not locks.try_hold(writer, self._lock_name):
                raise RangeIsTaken(
                    f"Batch range {self.number:02d} of {self.table.key} is being worked on by another process. "
                    "Wait for it, or end it, and run the partition again."
                )

        retry.again(take, lambda e: isinstance(e, RangeIsTaken), attempts=TRIES, pauses=(0.1, 4), first=0.2)

    @property
    def _lock_name(self) -> str:
        return range_lock(self.table, self.number)

    def result(
        self,
        *,
        left: Mapping[Key, bool] | None = None,
        quarantined: tuple[Quarantined, ...] = (),
        resumed: bool = False,
    ) -> RangeResult:
        """What was done so far."""
        return RangeResult(
            rows=self.counters.rows,
            by_column=self.counters.by_column,
            renewed=self.counters.renewed,
            seconds=time.monotonic() - self.started,
            batches=self.counters.batches,
            changed_meanwhile=self.counters.changed_meanwhile,
            left=tuple(left or ()),
            locked=tuple(key for key, locked in (left or {}).items() if locked),
            quarantined=quarantined,
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
        return self.cipher or self.sessions.metered(self.target)

    def record_failure(self, error: MigrationError) -> None:
        """Mark the range as failed where it had begun; the error itself is what the caller shows."""
        if not self.begun or isinstance(error, Stopped):
            return
        try:
            with self.target.database.connect() as connection, connection.transaction():
                self.ledger.fail(connection, error.args[0])
        except (psycopg.Error, MigrationError):
            # The database is away: the range stays in_progress, and is resumed like one that was killed.
            return
