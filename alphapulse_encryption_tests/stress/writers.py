"""Writers at full speed, in threads or processes, all through a migration, and the migration beneath them.

Every writer owns keys of its own and shares a few with all others. On those it takes an advisory lock and draws a
ticket from a sequence, so that the order of what was committed is known from outside the database.
"""

from __future__ import annotations

import itertools
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, target
from alphapulse_encryption_tests.stress import application
from alphapulse_encryption_tests.stress.application import SHAPES, Event, Mode, Oracle, Shape

T = TypeVar("T")

# What the application is able to do at a time; it only ever goes forward.
NO_COLUMNS, OLD_AND_NEW, NEW_ONLY, SWITCHED, STOP = range(5)
MODES: dict[int, dict[Mode, int]] = {
    NO_COLUMNS: {"plaintext": 1},
    # Ciphertext alone is refused as long as the plaintext is right.
    OLD_AND_NEW: {"plaintext": 60, "both": 36, "ciphertext": 4},
    NEW_ONLY: {"both": 94, "ciphertext": 6},
    # An instance of the old application is still about.
    SWITCHED: {"ciphertext": 50, "plaintext": 30, "both": 20},
}
SHARED = range(1, 13)
RANGES = 2


class Rollback(Exception):
    """The application changes its mind."""


@dataclass
class Board:
    """What the writers and who directs them tell each other; shared memory between processes.

    Args:
        phase: of the application, one number.
        seen: per writer, the phase of its last transaction.
        committed: per writer, the number of its transactions.
    """

    phase: Any
    seen: Any
    committed: Any


_board: Board


def _pin_up(board: Board) -> None:
    global _board  # noqa: PLW0603
    _board = board


@dataclass(frozen=True)
class Task:
    """What one writer is to do.

    Args:
        url: the database.
        kind: of the table, a key of :data:`SHAPES`.
        number: of the writer.
        writers: how many there are.
        rows: row numbers go a little beyond this.
        seed: of its random choices.
    """

    url: str
    kind: str
    number: int
    writers: int
    rows: int
    seed: int


@dataclass(frozen=True)
class Log:
    """What one writer did.

    Args:
        events: what it committed.
        rolled_back: transactions that it gave up on purpose.
        refused: transactions that the guard refused.
        victims: transactions that the server ended because of a deadlock.
        let_through: those with ciphertext alone that should have been refused.
    """

    events: list[Event]
    rolled_back: int
    refused: int
    victims: int
    let_through: int


def write(task: Task) -> Log:
    """Write until told to stop."""
    return _Writer(task).run()


@dataclass
class _Writer:
    task: Task
    own: dict[int, bool] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("back", "refused", "victim", "let through"), 0)
    )

    def __post_init__(self) -> None:
        task = self.task
        self.shape: Shape = SHAPES[task.kind]
        self.chance = random.Random(f"{task.seed} {task.number}")
        self.tickets = itertools.count(1)
        for number in range(task.rows * 6 // 5):
            if number not in SHARED and number % task.writers == task.number:
                self.own[number] = 0 < number <= task.rows

    def run(self) -> Log:
        number = self.task.number
        with support.application(self.task.url, autocommit=True) as connection:
            # Of two that wait for each other, it is this one that gives in, and soon.
            connection.execute("SET deadlock_timeout TO '20ms'")
            while (phase := _board.phase[0]) != STOP:
                self.transaction(connection, phase)
                _board.seen[number] = phase
                _board.committed[number] += 1
        return Log(self.events, *self.counts.values())

    def transaction(self, connection: support.Connection, phase: int) -> None:
        before = dict(self.own)
        staged: list[Event] = []
        modes = MODES[phase]
        (mode,) = self.chance.choices(list(modes), list(modes.values()))
        shared = sorted(self.chance.sample(SHARED, self.chance.choice((0, 0, 1, 2))))
        try:
            with connection.transaction():
                for number in shared:
                    staged += self._shared(connection, number, mode, phase)
                for _ in range(self.chance.choice((1, 1, 2, 3))):
                    staged += self._maybe_in_savepoint(connection, mode, phase)
                if self.chance.random() < 0.15:
                    raise Rollback
        except Rollback:
            self._undo("back", before)
        except psycopg.errors.CheckViolation:
            # Also where both sides were written and the plaintext was the same again.
            assert mode != "plaintext"
            self._undo("refused", before)
        except psycopg.errors.DeadlockDetected:
            self._undo("victim", before)
        else:
            # After SWITCHED was announced ciphertext alone is accepted, in NEW_ONLY it may be.
            if mode == "ciphertext" and phase == OLD_AND_NEW and any(event.values for event in staged):
                self.counts["let through"] += 1
            self.events += staged

    def _undo(self, reason: str, before: dict[int, bool]) -> None:
        self.counts[reason] += 1
        self.own = before

    def _maybe_in_savepoint(self, connection: support.Connection, mode: Mode, phase: int) -> list[Event]:
        if self.chance.random() < 0.8:
            return self._own(connection, mode, phase)
        before = dict(self.own)
        try:
            with connection.transaction():
                staged = self._own(connection, mode, phase)
                if self.chance.random() < 0.5:
                    raise Rollback
        except Rollback:
            self.own = before
            return []
        return staged

    def _values(self, number: int, mode: Mode, phase: int, *, whole: bool) -> dict[str, str | None]:
        columns = list(self.shape.columns)
        if not whole:
            columns = self.chance.sample(columns, self.chance.randint(1, len(columns)))
        values: dict[str, str | None] = {}
        for column in columns:
            text = f"{self.task.number}-{self.chance.getrandbits(40)}"
            values[column.name] = self.shape.value(column.name, number, text)
            # A NULL on one side says nothing where that side is NULL already, as it is after the switch.
            says_nothing = mode == "ciphertext" or (mode == "plaintext" and phase == SWITCHED)
            if column.name not in self.shape.required and not says_nothing and self.chance.random() < 0.15:
                values[column.name] = None
        return values

    def _own(self, connection: support.Connection, mode: Mode, phase: int) -> list[Event]:
        number = self.chance.choice(list(self.own))
        key = self.shape.key_of(number)
        present = self.own[number]
        kind = self.chance.choices(("update", "delete", "move", "upsert"), (70, 12, 5, 13))[0]
        if kind == "move" and present:
            other = self.chance.choice(list(self.own))
            if self.own[other]:
                return []
            return self._move(connection, number, other)
        if kind == "delete" and present:
            assert application.delete(connection, self.shape, key) == 1
            self.own[number] = False
            return [Event(next(self.tickets), key, None)]
        if present and kind == "update":
            values = self._values(number, mode, phase, whole=False)
            assert application.update(connection, self.shape, key, values, mode) == 1
            return [Event(next(self.tickets), key, values)]
        values = self._values(number, mode, phase, whole=True)
        assert application.insert(connection, self.shape, key, values, mode, upsert=present) == 1
        self.own[number] = True
        return [Event(next(self.tickets), key, values, whole=True)]

    def _move(self, connection: support.Connection, number: int, other: int) -> list[Event]:
        # What the row holds goes with it.
        key, new = self.shape.key_of(number), self.shape.key_of(other)
        assert application.move(connection, self.shape, key, new) == 1
        self.own[number], self.own[other] = False, True
        return [Event(next(self.tickets), new, None, moved_from=key)]

    def _shared(self, connection: support.Connection, number: int, mode: Mode, phase: int) -> list[Event]:
        key = self.shape.key_of(number)
        connection.execute("SELECT pg_advisory_xact_lock(4711, %s)", [number])
        ((ticket,),) = connection.execute("SELECT nextval('tickets')").fetchall()
        if self.chance.random() < 0.1:
            deleted = application.delete(connection, self.shape, key)
            return [Event(ticket, key, None)] if deleted else []
        values = self._values(number, mode, phase, whole=False)
        if application.update(connection, self.shape, key, values, mode):
            return [Event(ticket, key, values)]
        values = self._values(number, mode, phase, whole=True)
        assert application.insert(connection, self.shape, key, values, mode) == 1
        return [Event(ticket, key, values, whole=True)]


# Directing them


@dataclass
class Crew:
    """Writers at work.

    Args:
        board: what they are told by and tell.
        futures: their logs to be.
    """

    board: Board
    futures: Sequence[Future[Log]]

    def enter(self, phase: int) -> None:
        """Announce a phase, and wait until every writer's transactions are of that phase."""
        self.board.phase[0] = phase
        self._until(lambda: all(seen >= phase for seen in self.board.seen), "every writer is in the phase")

    def go_on(self, transactions: int) -> None:
        """Wait until every writer has committed or rolled back so many more."""
        goal = [done + transactions for done in self.board.committed]
        self._until(
            lambda: all(done >= least for done, least in zip(self.board.committed, goal, strict=True)),
            "every writer goes on",
        )

    def stop(self) -> list[Log]:
        """Stop all of them; what they did."""
        self.board.phase[0] = STOP
        return [future.result(timeout=support.PATIENCE) for future in self.futures]

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        def so() -> bool:
            for future in self.futures:
                if future.done():
                    future.result()
            return condition()

        support.until(so, what)


@contextmanager
def crew(url: str, kind: str, *, writers: int, rows: int, seed: int, processes: bool) -> Iterator[Crew]:
    """Writers that write from now on; stopped at the end at the latest."""
    support.run(url, "CREATE SEQUENCE IF NOT EXISTS tickets")
    tasks = [Task(url, kind, number, writers, rows, seed) for number in range(writers)]
    pool: ProcessPoolExecutor | ThreadPoolExecutor
    if processes:
        context = multiprocessing.get_context("spawn")
        arrays = [context.Array("q", n, lock=False) for n in (1, writers, writers)]
        board = Board(*arrays)
        pool = ProcessPoolExecutor(writers, context, initializer=_pin_up, initargs=(board,))
    else:
        board = Board([NO_COLUMNS], [-1] * writers, [0] * writers)
        pool = ThreadPoolExecutor(writers, initializer=_pin_up, initargs=(board,))
    if processes:
        board.seen[:] = [-1] * writers
    with pool:
        try:
            yield Crew(board, [pool.submit(write, task) for task in tasks])
        finally:
            board.phase[0] = STOP


# The migration beneath them


@dataclass(frozen=True)
class Story:
    """What happened.

    Args:
        faults: what is not as it was committed.
        logs: what the writers did.
        changed_meanwhile: rows that a backfill found changed between its reading and its writing.
        switched: whether the ciphertext was right in the end.
        written_during: by step, transactions that began and ended while it was under way.
    """

    faults: list[str]
    logs: list[Log]
    changed_meanwhile: int
    switched: bool
    written_during: dict[str, int]

    @property
    def quiet_steps(self) -> list[str]:
        """Steps in which nobody wrote: nothing was shown of them."""
        return [step for step, count in self.written_during.items() if not count]


def migrate_under_writers(
    url: str,
    kind: str,
    *,
    rows: int,
    writers: int,
    batch_size: int,
    seed: int,
    between: int = 25,
    processes: bool = False,
    after_columns: Callable[[], None] = lambda: None,
) -> Story:
    """Every step up to the switch and beyond, with writers at full speed all the while.

    Args:
        url: an empty database.
        kind: of the table, a key of :data:`SHAPES`.
        rows: to begin with.
        writers: how many.
        batch_size: of the backfill.
        seed: of the writers' choices.
        between: transactions of each writer between two steps, at least.
        processes: whether the writers are processes of their own, rather than threads.
        after_columns: called when the guard is in place.
    """
    shape = SHAPES[kind]
    oracle = Oracle(application.create(url, shape, range(1, rows + 1)))
    with crew(url, kind, writers=writers, rows=rows, seed=seed, processes=processes) as working:
        steps = _Steps(url, shape, working, batch_size, between)
        working.go_on(between)
        steps.take("columns", lambda: support.add_columns(url, shape.entry, ranges=RANGES))
        after_columns()
        working.enter(OLD_AND_NEW)
        steps.take("backfill", steps.backfill)
        working.go_on(between)
        for _ in range(2):
            steps.take("catch-up", steps.backfill)
            working.go_on(between)
        steps.take("index build", steps.build_indexes)
        working.go_on(between)
        steps.take("verification", lambda: support.verify(url, shape.entry))
        working.go_on(between)
        working.enter(NEW_ONLY)
        switched = any(steps.switch() for _ in range(10))
        working.enter(SWITCHED)
        for _ in range(2):
            working.go_on(between)
            steps.take("catch-up after the switch", steps.backfill)
            steps.take("verification after the switch", lambda: support.verify(url, shape.entry))
        logs = working.stop()
    steps.backfill()
    oracle.record(event for log in logs for event in log.events)
    faults = application.lost(url, shape, oracle)
    faults += [f"{log.let_through} times ciphertext alone was let through" for log in logs if log.let_through]
    return Story(faults, logs, steps.changed_meanwhile, switched, steps.written_during)


@dataclass
class _Steps:
    """The engine's steps, and how much was written during each.

    Args:
        url: the database.
        shape: the table.
        working: the writers.
        batch_size: of the backfill.
        between: transactions of each writer while an index is half built, at least.
        changed_meanwhile: rows that changed between a backfill's reading and its writing.
        written_during: by step, transactions that ended while it was under way.
    """

    url: str
    shape: Shape
    working: Crew
    batch_size: int
    between: int
    changed_meanwhile: int = 0
    written_during: dict[str, int] = field(default_factory=dict)

    def take(self, name: str, step: Callable[[], T]) -> T:
        """Take a step, and count what is written meanwhile."""
        before = sum(self.working.board.committed)
        result = step()
        written = sum(self.working.board.committed) - before
        self.written_during[name] = self.written_during.get(name, 0) + written
        return result

    def backfill(self) -> None:
        """All ranges at once, each in a thread of its own."""
        with ThreadPoolExecutor(RANGES) as pool:
            results = pool.map(
                lambda number: support.backfill(
                    self.url, self.shape.entry, number, batch_size=self.batch_size
                ),
                range(RANGES),
            )
            self.changed_meanwhile += sum(result.changed_meanwhile for result in results)

    def build_indexes(self) -> None:
        """With an old snapshot in its way, so that the writers meet an index that is half built."""
        with support.application(self.url, autocommit=False) as reader:
            reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            reader.execute("SELECT count(*) FROM pg_class")
            with support.Background(
                lambda: build_search_indexes(Database(self.url), self.shape.entry, ACTOR)
            ) as building:
                support.until(
                    lambda: support.engine_waits(self.url, "CREATE%INDEX CONCURRENTLY%", behind=reader),
                    "the build waits",
                )
                self.working.go_on(self.between)
                reader.rollback()
                building.result()

    def switch(self) -> bool:
        """Catch up, verify and switch; False where the writers were quicker."""
        self.backfill()
        support.verify(self.url, self.shape.entry)
        try:
            self.take("switch", lambda: switch_to_ciphertext(target(self.url), self.shape.entry))
        except RefusedError:
            return False
        return True
