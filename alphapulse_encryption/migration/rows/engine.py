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
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import TypedDict, Unpack

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
    Quarantined,
    named,
    quarantine,
    read_quarantine,
    release,
)
from alphapulse_encryption.migration.bookkeeping.ranges import Key, hold_plan, range_lock, read_ranges
from alphapulse_encryption.migration.postgres import locks, retry, wire
from alphapulse_encryption.migration.postgres.database import (
    AS_APPLICATION,
    AS_OURSELVES,
    FIRE_NO_TRIGGERS,
    MARK_AS_ENGINE,
    Connection,
    DatabaseUnreachable,
    connection_was_lost,
    may_pass_over_triggers,
    safe_errors,
)
from alphapulse_encryption.migration.postgres.replication import COMMIT_LOCALLY
from alphapulse_encryption.migration.rows.batches import key_at, read_columns, rows_within_bytes
from alphapulse_encryption.migration.rows.operation import Batch, Operation, Unreadable, Unwritable, Written
from alphapulse_encryption.migration.rows.reader import Reader
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.rows.throttle import Throttle
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.reachable_code import refuse_foreign_code
from alphapulse_encryption.migration.schema.triggers import SetOff, Version, fire_anyway, set_off, version
from alphapulse_encryption.migration.target import Target

SMALLEST_BATCH = 100
LARGEST_BATCH = 2_500
# Rows that change again and again while we look are left to the next run after this many passes.
PASSES = 5
TRIES = 6
# Of the triggers that may keep a row from being written, this many are named with it.
_NAMED = 3


@dataclass(frozen=True)
class Pace:
    """How large a batch is; what is not given here follows the settings in the database.

    Args:
        batch_size: rows per batch, kept as it is.
        target_seconds: duration of one batch's transaction to aim at, in seconds.
        rest_ratio: seconds of rest for each second that a batch took.
    """

    batch_size: int | None = None
    target_seconds: float | None = None
    rest_ratio: float | None = None


@dataclass(frozen=True)
class Progress:
    """What a running range reports after each batch, and when it holds back: totals of this call.

    Args:
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


@dataclass
class RangeResult:
    """What was done to a range, or to all ranges of a table; counted while it is done.

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
        return self.by_column.total()

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


class _TriggersChanged(Exception):
    """The table has other triggers or rules than those that the range began with; nothing was written."""


class Stopped(MigrationError):
    """The caller wants no more batches; raised by it from ``on_progress``. The range stays as it is."""


class RangeIsTaken(RefusedError):
    """Another process works on the range."""


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


def work_on_range(operation: Operation, number: int, **how: Unpack[How]) -> RangeResult:
    """Do an operation to all rows of one batch range that it wants.

    Raises:
        RefusedError: wrong key or key version; not admitted; another process works on this range.
        RowsQuarantined: some rows could not be done; they are named by key, and all others are.
        ConfigurationError: the table, its key or a column is missing, or a setting in the database means nothing.
        DatabaseFailure: the server refused; the range is marked as failed, what is written stays.
    """
    pace, given = how.get("pace") or Pace(), how.get("sessions")
    with nullcontext(given) if given else Sessions(operation.target) as sessions:
        run = _Run(operation, number, sessions, pace, how.get("on_progress"), how.get("following"))
        result = run.through()
    if result.quarantined:
        raise RowsQuarantined(run.set_aside(result.quarantined))
    return result


def work_on_table(
    target: Target,
    table: Table,
    operation: Operation | Mapping[int, Operation],
    *,
    again: str,
    on_progress: Callable[[Progress], None] | None = None,
    changing_may_stay: bool = False,
) -> RangeResult:
    """Do an operation to all rows of a table that it wants, one range after another.

    Args:
        operation: what to do, or by their numbers what to do to some of the ranges.
        again: what to type to go on with it.
        changing_may_stay: whether rows that keep changing, but are not locked, are the caller's to look for.

    Raises:
        RowsLeft: rows could not be done, or were locked; they are named by key, and all others are done.
        MigrationError: as :func:`work_on_range`.
    """
    total, done = RangeResult(), ""
    with target.database.session(f"go through {table.key}") as connection, Sessions(target) as sessions:
        hold_plan(connection, table)
        numbers = [r.number for r in read_ranges(connection, table) if not r.is_empty]
        by_range = operation if isinstance(operation, Mapping) else dict.fromkeys(numbers, operation)
        for number, doing in by_range.items():
            total += _Run(doing, number, sessions, on_progress=on_progress, before=total).through()
            done = doing.done
    left = total.locked if changing_may_stay else total.left
    reasons = []
    if aside := total.quarantined:
        reasons.append(
            f"Rows of {table.key} that could not be {done}: {len(aside)}: {named(aside)}. Correct them."
        )
    if left:
        keys = named([f"key ({', '.join(key)})" for key in left])
        reasons.append(
            f"Rows of {table.key} that are locked by other sessions, or change all the while: "
            f"{len(left)}: {keys}. Let those transactions end."
        )
    if reasons:
        raise RowsLeft(f"{' '.join(reasons)} All other rows are done. Run it again then ({again}).")
    return total


def finish_under_lock(
    operation: Operation, connection: Connection, definition: TableDefinition, *, most: int
) -> RangeResult:
    """Do an operation to the last few rows, in the transaction of a caller who keeps everybody from the table.

    Args:
        connection: in a transaction that holds the table exclusively, and is undone on an error.
        most: how many rows there may be.

    Raises:
        NotFinished: there are more, or one of them cannot be done.
    """
    with Sessions(operation.target) as sessions:
        run = _Run(operation, 0, sessions, under_lock=True)
        run.writer = connection
        run.takes(definition, may_pass_over_triggers(connection))
        position: Key | None = None
        try:
            while True:
                condition, parameters = sql.within(definition, position, None)
                statement = wire.numbered(connection, operation.select(definition, condition))
                wanted = operation.wanted(definition)
                limit = rows_within_bytes(connection, definition, condition, parameters, most + 1, wanted)
                columns = read_columns(connection, statement, parameters, limit)
                if not columns[0]:
                    break
                most -= len(columns[0])
                if most < 0:
                    raise NotFinished
                position = key_at(columns, len(definition.key), -1)
                for item in operation.make(definition, columns, sessions.cipher):
                    if isinstance(item, Batch):
                        run.write_once(item)
        except Unwritable:
            raise NotFinished from None
        except psycopg.Error as error:
            if retry.about_a_row(error):
                raise NotFinished from None
            raise
        # Those that could not be read are wanted still.
        if operation.is_wanted(connection, definition):
            raise NotFinished
        return run.result()


@dataclass
class _Run:
    """An operation on one range, in as many attempts as it takes."""

    operation: Operation
    number: int
    sessions: Sessions
    pace: Pace = field(default_factory=Pace)
    on_progress: Callable[[Progress], None] | None = None
    following: int | None = None
    # What was done to other ranges before; told of as progress together with this one's.
    before: RangeResult = field(default_factory=RangeResult)
    # In the transaction of a caller, which keeps no progress.
    under_lock: bool = False
    done: RangeResult = field(default_factory=RangeResult, init=False)
    # Of this pass: rows that were not written, and whether another session held them.
    missed: dict[Key, bool] = field(default_factory=dict, init=False)
    # Rows whose ciphertext was cleared while it was written: a trigger that normalises the plaintext has the guard do
    # so once, one that keeps the row as it was does so again.
    cleared: set[Key] = field(default_factory=set, init=False)
    statements: dict[bool, bytes] = field(default_factory=dict, init=False)
    started: float = field(default_factory=time.monotonic, init=False)
    connected: bool = field(default=False, init=False)
    begun: bool = field(default=False, init=False)
    # Of the attempt that is under way.
    writer: Connection = field(init=False)
    definition: TableDefinition = field(init=False)
    changes: sql.Changes = field(init=False)
    # Of the application, what the writes set off.
    set_off: tuple[SetOff, ...] = field(init=False)
    triggers: Version = field(init=False)
    quietly: tuple[bytes, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.table: Table = self.operation.table
        self.ledger: Ledger = self.operation.ledger(self.number)

    def through(self) -> RangeResult:
        """Attempt it until it goes through; the range keeps why it does not."""
        try:
            with safe_errors(f"{self.operation.step} range {self.number:02d} of {self.table.key}"):
                return retry.again(self._attempt, self._may_go_on_after, attempts=TRIES, pauses=(0.25, 15))
        except MigrationError as error:
            self._record_failure(error)
            raise

    def _may_go_on_after(self, error: BaseException) -> bool:
        """Whether a new connection may help: a server that was there and is being restarted."""
        if isinstance(error, DatabaseUnreachable):
            return self.connected
        return connection_was_lost(error)

    def _attempt(self) -> RangeResult:
        if self.pace.batch_size:
            self.sessions.batch_size = self.pace.batch_size
        self.statements.clear()
        keys, lock = self.operation.target.keys, range_lock(self.table, self.number)
        try:
            self.writer = writer = self.sessions.open()
            self.connected = True
            admitted = self.operation.admit(writer)
            if not self.sessions.knows_the_bookkeeping:
                # Holding it against its definition costs as much as hundreds of rows: once for a worker's sessions.
                ensure_key(writer, keys)
                self.sessions.knows_the_bookkeeping = True
            if admitted:
                self._take_range(lock)
                # Once more: another process may have held the range, and a rotation may have begun meanwhile.
                check_key(writer, keys)
                self._work()
                locks.release(writer, lock)
            return self.result()
        except BaseException:
            # With them goes the lock on the range.
            self.sessions.close()
            raise

    def _take_range(self, lock: str) -> None:
        # Two processes on one range would do no harm, but each would do the other's work. A killed process's
        # session may outlive it by the length of its last statement.
        def take() -> None:
            if not locks.try_hold(self.writer, lock):
                raise RangeIsTaken(
                    f"Batch range {self.number:02d} of {self.table.key} is being worked on by another process. "
                    "Wait for it, or end it, and run the partition again."
                )

        retry.again(take, lambda e: isinstance(e, RangeIsTaken), attempts=TRIES, pauses=(0.1, 4))

    def _work(self) -> None:
        writer = self.writer
        batch_range = self.ledger.read(writer)
        lower, upper = batch_range.lower, batch_range.upper
        self.takes(self.operation.read_table(writer), self.sessions.may_pass_over_triggers)

        def anything_left() -> bool:
            return self.operation.is_wanted(writer, self.definition, lower, upper)

        if batch_range.is_empty or (batch_range.status == "completed" and not anything_left()):
            if batch_range.status != "completed":
                with writer.transaction():
                    self.ledger.complete(writer)
            return

        self.done.resumed = batch_range.position is not None
        with writer.transaction():
            self.ledger.begin(writer)
            release(writer, self.table, self.number, self.operation.step)
        self.begun = True
        start = batch_range.position or lower
        for _ in range(PASSES):
            self.missed = {}
            self._pass(start, upper)
            # Before the point where we began, and behind the reader, rows may have changed again.
            if start == lower and not self.missed:
                break
            start = lower
            if not anything_left():
                break
        else:
            self.done.left = tuple(self.missed)
            self.done.locked = tuple(key for key, locked in self.missed.items() if locked)
        self._finish()

    def takes(self, definition: TableDefinition, may_pass_over: bool) -> None:
        """Work on this table from now on, without firing triggers where the role may and nothing fires anyway.

        Raises:
            RefusedError: a rule takes the place of every UPDATE.
        """
        self.definition, self.changes = definition, self.operation.changes(definition)
        self.triggers = version(self.writer, definition)
        beside = self.operation.beside_application
        derived = [name for column in self.table.columns for name in column.derived]
        quiet = may_pass_over and not fire_anyway(set_off(self.writer, definition, derived))
        self.quietly = (FIRE_NO_TRIGGERS,) if quiet else ()
        found = () if quiet and beside else set_off(self.writer, definition, self.changes.columns)
        self.set_off = tuple(one for one in found if one.enabled in "OA")
        for one in self.set_off:
            if one.replaces:
                raise RefusedError(
                    f"{one.named.capitalize()} of {self.table.key} takes the place of an UPDATE, so that nothing is "
                    f"written. Disable it meanwhile ({one.disable(self.writer)}) and run the step again."
                )

    def _finish(self) -> None:
        writer, done, step = self.writer, self.done, self.operation.step
        done.quarantined = aside = read_quarantine(writer, self.table, self.number, step=step)
        with writer.transaction():
            if aside:
                self.ledger.fail(writer, self.set_aside(aside))
            else:
                self.ledger.complete(writer)
            if done.rows or aside:
                told = {"rows": done.rows, "values": done.values, "quarantined": len(aside)}
                actor = self.operation.target.actor
                audit(writer, actor, step, self.table, batch_range=self.number, **told)

    def set_aside(self, rows: Sequence[Quarantined]) -> str:
        """What is told of rows of this range that could not be done."""
        return (
            f"Rows of {self.table.key} in batch range {self.number:02d} that could not be {self.operation.done}: "
            f"{len(rows)}; all others are. Correct them and run the partition again: {named(rows)}."
        )

    def _pass(self, start: Key | None, upper: Key | None) -> None:
        throttle = self.sessions.throttle(self._waiting())
        waited_before, rested_before = throttle.waited, throttle.rested
        with self._reader(start, upper) as items:
            self._read_ahead(items)
            for item in items:
                limits = throttle.wait()
                if isinstance(item, Unreadable):
                    self._set_aside(item.key, item.reason)
                    continue
                began = time.monotonic()
                self._write(item)
                took, rows = time.monotonic() - began, len(item)
                # While the next batch comes, this one's values would take as much memory again.
                del item
                self._adapt(rows, took, limits)
                self._report()
                self._rest(throttle, took, limits)
        self.done.seconds_held_back += throttle.waited - waited_before
        self.done.seconds_rested += throttle.rested - rested_before

    def _rest(self, throttle: Throttle, worked: float, limits: Limits) -> None:
        ratio = limits.rest_ratio if self.pace.rest_ratio is None else self.pace.rest_ratio
        if ratio:
            reason = f"rests {ratio:g} s for each second of work (setting rest_ratio)"
            throttle.rest(worked * ratio, lambda: self._report(reason))

    def _reader(self, start: Key | None, upper: Key | None) -> Reader:
        reader = Reader(self.sessions, self.operation, self.definition, start, upper)
        ahead, self.sessions.ahead = self.sessions.ahead, None
        if ahead is None:
            return reader
        if ahead.reads == reader.reads:
            return ahead
        # The table, or what is left to do, is not what it was.
        ahead.close()
        return reader

    def _read_ahead(self, items: Reader) -> None:
        if self.following is None:
            return
        upcoming = self.operation.ledger(self.following).read(self.writer)
        if upcoming.is_empty or upcoming.status == "completed":
            return
        start = upcoming.position or upcoming.lower
        ahead = Reader(self.sessions, self.operation, self.definition, start, upcoming.upper, at_leisure=True)
        self.sessions.ahead = items.following = ahead

    def _waiting(self) -> Callable[[str | None], None]:
        told: str | None = None

        def wait(reason: str | None) -> None:
            nonlocal told
            if reason != told:
                self.ledger.waits(self.writer, reason)
                # What somebody waits for is a batch of ours: the next one is shorter.
                shorter = max(SMALLEST_BATCH, self.sessions.batch_size // 2)
                self.sessions.batch_size = self.pace.batch_size or shorter
            told = reason
            self._report(reason)

        return wait

    def _report(self, waiting_for: str | None = None) -> None:
        if self.on_progress is not None:
            before, done = self.before, self.done
            self.on_progress(
                Progress(
                    self.table.key,
                    self.number,
                    before.rows + done.rows,
                    before.values + done.values,
                    before.seconds + time.monotonic() - self.started,
                    self.sessions.batch_size,
                    waiting_for,
                )
            )

    def _write(self, batch: Batch) -> None:
        """Write a batch; of one that the server refuses, all rows but the culprits."""
        try:
            try:
                self._write_again(batch)
            except psycopg.errors.LockNotAvailable:
                self._write_again(batch, skip_locked=True)
        except _TriggersChanged:
            refuse_foreign_code(self.writer, self.table.key, self.definition.oid)
            self.takes(self.definition, self.sessions.may_pass_over_triggers)
            self._write(batch)
        except Unwritable as error:
            for row, reason in error.rows.items():
                self._set_aside(batch.key(row), reason)
            if others := [row for row in range(len(batch)) if row not in error.rows]:
                self._write(batch.only(others))
        except psycopg.Error as error:
            if not retry.about_a_row(error):
                raise
            if len(batch) == 1:
                reason = self.operation.refused(self.writer, self.definition, batch, error)
                self._set_aside(batch.key(0), reason)
                return
            middle = len(batch) // 2
            for half in (range(middle), range(middle, len(batch))):
                self._write(batch.only(half))

    def _write_again(self, batch: Batch, *, skip_locked: bool = False) -> None:
        retry.again(
            lambda: self.write_once(batch, skip_locked=skip_locked),
            retry.retryable,
            attempts=TRIES,
            pauses=(0.05, 5),
        )

    def write_once(self, batch: Batch, *, skip_locked: bool = False) -> None:
        """Write a batch and its progress in one transaction; rows that another one has changed stay as they are."""
        writer, definition, operation = self.writer, self.definition, self.operation
        missed: dict[Key, bool] = {}
        marks = [MARK_AS_ENGINE, *(self.quietly if operation.beside_application else ())]
        if not operation.holds_state:
            marks.append(AS_APPLICATION)
        with wire.transaction(writer, *marks) as last:
            if operation.holds_state:
                if not operation.admit(writer, lock=True):
                    raise RefusedError(
                        f"Table {self.table.key} was changed by another run meanwhile. Run the step again."
                    )
                wire.script(writer, AS_APPLICATION)
            result = self._update(batch, skip_locked=skip_locked)
            rows = result.command_tuples or 0
            if not rows and not self.triggers.still(writer):
                raise _TriggersChanged
            written: Sequence[int] = range(len(batch))
            # A trigger that is to fire at the end of the transaction fires now, so that its deed is read back.
            now = [b"SET CONSTRAINTS ALL IMMEDIATE"] if self.set_off else []
            if rows < len(batch) or now or operation.holds_state:
                wire.script(writer, *now, AS_OURSELVES)
            if rows < len(batch):
                ours = {tuple(row) for row in writer.execute(sql.keys_written_now(definition), batch.bounds)}
                written = [row for row in written if batch.key(row) in ours]
                missed = self._missed(batch.only(set(range(len(batch))).difference(written)))
            # An UPDATE that waits for locks leaves no row as it was read, but for triggers and rules.
            kept = set() if skip_locked else {key for key, unchanged in missed.items() if unchanged}
            altered = self._altered(batch, written) if self.set_off else {}
            self._refuse(
                batch, kept | {key for key, once in altered.items() if not once or key in self.cleared}
            )
            written = [row for row in written if batch.key(row) not in altered] if altered else written
            missed |= dict.fromkeys(altered, False)
            done = Written(definition, batch, written, result, self.sessions.cipher, self.quietly)
            renewed = operation.after(writer, done)
            rows = len(written)
            counts = batch.values(None if rows == len(batch) else written)
            names = [column.name for column in operation.columns(definition)]
            values = dict(zip(names, counts, strict=True))
            last.append(AS_OURSELVES)
            if not self.under_lock:
                position = batch.key(-1)
                last.append(self.ledger.advance(writer, position=position, rows=rows, values=values))
                # For what is deferred to the end of the transaction.
                last.append(AS_APPLICATION)
        self.done.batches += 1
        self.done.rows += rows
        self.done.by_column.update(values)
        self.done.renewed += renewed
        self.done.changed_meanwhile += len(missed)
        self.missed |= missed
        self.cleared.update(altered)

    def _update(self, batch: Batch, *, skip_locked: bool) -> PGresult:
        if skip_locked not in self.statements:
            statement = sql.update_rows(
                self.definition, self.changes, skip_locked=skip_locked, condition=Version.is_so
            )
            self.statements[skip_locked] = wire.numbered(self.writer, statement)
        bounds = [*batch.bounds, *batch.bounds] if skip_locked else batch.bounds
        return wire.execute(
            self.writer,
            self.statements[skip_locked],
            [*batch.arrays, *bounds, *self.triggers.parameters],
        )

    def _altered(self, batch: Batch, written: Sequence[int]) -> dict[Key, bool]:
        """Of the rows that were written, those that are otherwise, and whether the guard may have cleared them."""
        sent = batch if len(written) == len(batch) else batch.only(written)
        if not sent:
            return {}
        statement = wire.numbered(self.writer, sql.keys_not_stored(self.definition, self.changes))
        columns = wire.columns(wire.execute(self.writer, statement, [*sent.arrays, *sent.bounds]))
        rows = range(len(columns[0]))
        return {key_at(columns, batch.key_width, row): columns[-1][row] == b"t" for row in rows}

    def _refuse(self, batch: Batch, kept: set[Key]) -> None:
        """Undo a batch with rows that the application's triggers and rules keep as they are."""
        if kept:
            told = [f"{one.named}: {one.disable(self.writer)}" for one in self.set_off if one.refuses]
            reason = (
                "a trigger or rule of the application keeps it as it was; disable it meanwhile "
                f"({'; '.join(told[:_NAMED]) or '--preflight names those that fire'})"
            )
            raise Unwritable({row: reason for row in range(len(batch)) if batch.key(row) in kept})

    def _missed(self, batch: Batch) -> dict[Key, bool]:
        """Rows that were not written, and whether they are as they were read."""
        statement = wire.numbered(self.writer, sql.keys_unchanged(self.definition))
        result = wire.execute(self.writer, statement, [*batch.arrays[: batch.key_width + 1], *batch.bounds])
        columns, width = wire.columns(result), batch.key_width
        unchanged = {key_at(columns, width, row) for row in range(len(columns[0]))}
        return {key: key in unchanged for key in map(batch.key, range(len(batch)))}

    def _set_aside(self, key: Key, reason: str) -> None:
        with self.writer.transaction():
            run_id = self.operation.target.actor.run_id
            quarantine(self.writer, self.table, self.number, key, reason, run_id, self.operation.step)
            wire.script(self.writer, self.ledger.advance(self.writer, position=key, rows=0, values={}))

    def _adapt(self, rows: int, seconds: float, limits: Limits) -> None:
        sessions, fixed = self.sessions, self.pace.batch_size or limits.batch_size
        if fixed:
            sessions.batch_size = fixed
            return
        target = self.pace.target_seconds or limits.target_seconds
        # The cost of a batch is proportional to its rows. Half of the way at a time, so that one slow batch
        # (a checkpoint, a lock) does not throw the size about; a short one, the range's last, says nothing.
        if rows >= SMALLEST_BATCH:
            ideal = rows * target / max(seconds, 1e-6)
            sessions.batch_size = int(
                min(LARGEST_BATCH, max(SMALLEST_BATCH, (sessions.batch_size + ideal) / 2))
            )

    def result(self) -> RangeResult:
        """What was done so far."""
        self.done.seconds = time.monotonic() - self.started
        if self.done.rows:
            contexts = {column.context for column in self.table.columns}
            usage = self.sessions.cipher.usage()
            self.done.key_usage = tuple(used for used in usage if used.context in contexts)
        return self.done

    def _record_failure(self, error: MigrationError) -> None:
        """Mark the range as failed where it had begun; the error itself is what the caller shows."""
        if not self.begun or isinstance(error, Stopped):
            return
        # Where the database is away, the range stays in_progress, and is resumed like one that was killed.
        database = self.operation.target.data_path
        with (
            suppress(psycopg.Error, MigrationError),
            database.connect() as connection,
            connection.transaction(),
        ):
            connection.execute(COMMIT_LOCALLY)
            self.ledger.fail(connection, error.args[0])
