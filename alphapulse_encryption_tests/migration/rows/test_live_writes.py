"""No write of the application is lost; and these tests notice where one is: they fail without either protection."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.errors import FlakyFailure
from hypothesis.stateful import run_state_machine_as_test

from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.stress import application, interleaved
from alphapulse_encryption_tests.stress.application import SHAPES, Event, Mode, Oracle, Shape, faults_named
from alphapulse_encryption_tests.stress.interleaved import Migration, WritesAreLost
from alphapulse_encryption_tests.stress.writers import migrate_under_writers

ROWS = range(1, 31)
BATCH = 10
# With it a lost write is found soon.
SEED = 7


@pytest.mark.parametrize("kind", list(SHAPES))
def test_writers_at_full_speed(database_url: str, kind: str) -> None:
    story = migrate_under_writers(
        database_url, kind, rows=800, writers=3, batch_size=30, seed=4711, between=15
    )
    assert story.faults == [], faults_named(story.faults)
    assert story.switched
    assert story.quiet_steps == []
    assert all(len(log.events) > 50 for log in story.logs)
    assert any(log.rolled_back for log in story.logs)


# One migration, with the application's writes at exact moments

Write = Callable[[], None]


class Scripted:
    """The application's writes, one transaction each, and the oracle of them."""

    def __init__(self, url: str, shape: Shape) -> None:
        self.url = url
        self.shape = shape
        self.oracle = Oracle(application.create(url, shape, ROWS))
        self._versions = iter(range(1, 1_000))

    def _value(self, number: int) -> dict[str, str | None]:
        version = next(self._versions)
        return {c.name: self.shape.value(c.name, number, f"version {version}") for c in self.shape.columns}

    def updates(self, number: int, mode: Mode = "plaintext") -> Write:
        def write() -> None:
            key, values = self.shape.key_of(number), self._value(number)
            with support.application(self.url) as connection:
                assert application.update(connection, self.shape, key, values, mode) == 1
            self.oracle.record([Event(1, key, values)])

        return write

    def replaces(self, number: int) -> Write:
        """Deletes a row and inserts another one in its place, in one transaction."""

        def write() -> None:
            key, values = self.shape.key_of(number), self._value(number)
            with support.application(self.url, autocommit=False) as connection:
                assert application.delete(connection, self.shape, key) == 1
                assert application.insert(connection, self.shape, key, values, "plaintext") == 1
            self.oracle.record([Event(1, key, None), Event(2, key, values, whole=True)])

        return write

    def deletes(self, number: int) -> Write:
        def write() -> None:
            key = self.shape.key_of(number)
            with support.application(self.url) as connection:
                assert application.delete(connection, self.shape, key) == 1
            self.oracle.record([Event(1, key, None)])

        return write

    def migration(self) -> list[str]:
        """Columns, backfill, catch-up; what is lost in the end."""
        moments = [
            # While rows 1 to 10 are being encrypted, then 11 to 20, then 21 to 30: two columns each.
            self.updates(1),
            self.updates(2, "both"),
            self.replaces(11),
            self.deletes(12),
            self.updates(21),
            self.updates(22, "both"),
        ]
        interleaved.backfill(self.url, self.shape, 0, BATCH, moments)
        assert self.shape.key_of(12) not in self.oracle.rows
        # And of rows that are done.
        self.updates(5)()
        self.updates(15, "both")()
        self.replaces(25)()
        support.backfill_all(self.url, self.shape.entry)
        return application.lost(self.url, self.shape, self.oracle)


def of_rows(faults: list[str], shape: Shape) -> set[int]:
    """The numbers of the rows that faults speak of."""
    return {n for n in ROWS if any(fault.startswith(f"{shape.key_of(n)} ") for fault in faults)}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_writes_between_reading_and_writing(database_url: str, kind: str) -> None:
    scripted = Scripted(database_url, SHAPES[kind])
    support.add_columns(database_url, scripted.shape.entry)
    faults = scripted.migration()
    assert faults == [], faults_named(faults)


@pytest.mark.parametrize("kind", list(SHAPES))
def test_without_the_guard_writes_are_lost(
    database_url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same story as above: what is written to a row that is done keeps the ciphertext of the old value."""
    scripted = Scripted(database_url, SHAPES[kind])
    support.add_columns(database_url, scripted.shape.entry)
    interleaved.without_guard(database_url, scripted.shape)
    interleaved.unnoticed(monkeypatch)
    assert of_rows(scripted.migration(), scripted.shape) == {5}


@pytest.mark.parametrize("kind", list(SHAPES))
def test_without_the_optimistic_check_writes_are_lost(
    database_url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same story as above: what is written between reading and writing gets the ciphertext of the old value."""
    interleaved.without_check(monkeypatch)
    scripted = Scripted(database_url, SHAPES[kind])
    support.add_columns(database_url, scripted.shape.entry)
    assert of_rows(scripted.migration(), scripted.shape) == {1, 2, 11, 21, 22}


# Any sequence of them


def explore(machine: type[Migration], url: str, kind: str, *, examples: int) -> None:
    """Let Hypothesis look for a sequence of steps and transactions that loses a write, another one each time."""
    run_state_machine_as_test(
        type("Here", (machine,), {"url": url, "kind": kind}), settings=settings(LOOK, max_examples=examples)
    )


LOOK = settings(
    stateful_step_count=12,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] if kind != "bigint key" else []) for kind in SHAPES]
)
def test_any_sequence_of_steps_and_transactions(database_url: str, kind: str) -> None:
    explore(Migration, database_url, kind, examples=10)


# Without one of the two protections


class WithoutGuard(Migration):
    """The same with the triggers disabled."""

    def protect(self) -> None:
        interleaved.without_guard(self.url, self.shape)


def finds(machine: type[Migration], url: str) -> None:
    """A sequence that loses a write is found; it need not be the shortest one."""
    looking = settings(LOOK, max_examples=100, phases=(Phase.generate,))
    here = seed(SEED)(type("Here", (machine,), {"url": url, "kind": "bigint key"}))
    with pytest.raises((WritesAreLost, FlakyFailure)):
        run_state_machine_as_test(here, settings=looking)


def test_a_sequence_is_found_that_needs_the_guard(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interleaved.unnoticed(monkeypatch)
    finds(WithoutGuard, database_url)


def test_a_sequence_is_found_that_needs_the_optimistic_check(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    interleaved.without_check(monkeypatch)
    finds(Migration, database_url)
