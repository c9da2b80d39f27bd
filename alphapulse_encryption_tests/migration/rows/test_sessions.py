"""A worker's connections serve one range after another, and are opened again when they are lost."""

from __future__ import annotations

import sys

import pytest

from alphapulse_encryption.migration.bookkeeping.ranges import range_lock
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Progress, RangeResult, Stopped
from alphapulse_encryption.migration.rows.sessions import Sessions, quick_switches
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run, target

ENTRY = support.table("notes", "body")
RANGES = 4
OURS = (
    "FROM pg_stat_activity WHERE application_name = 'alphapulse_encryption' AND datname = current_database()"
)


def make(url: str, rows: int = 40) -> None:
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    run(url, f"INSERT INTO notes SELECT i, 'text ' || i FROM generate_series(1, {rows}) AS i")
    support.add_columns(url, ENTRY, ranges=RANGES)


def work(url: str, number: int, sessions: Sessions, **options: object) -> int:
    return result_of(url, number, sessions, **options).rows


def result_of(url: str, number: int, sessions: Sessions, **options: object) -> RangeResult:
    return backfill_range(target(url), ENTRY, number, sessions=sessions, **options)  # type: ignore[arg-type]


def has_read_ahead(url: str) -> bool:
    """Whether the second range's ten values were read: they are counted before they are encrypted, as the first's."""
    query = "SELECT sum(messages) >= 20 FROM alphapulse_encryption.key_usage WHERE source = 'engine'"
    return bool(support.value(url, query))


def lock_is_free(url: str, number: int) -> bool:
    name = range_lock(ENTRY, number)
    query = "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"
    with support.application(url) as connection:
        row = connection.execute(query, [name]).fetchone()
    return row == (True,)


def test_ranges_one_after_another(database_url: str) -> None:
    make(database_url)
    with Sessions(target(database_url)) as sessions:
        pids = []
        for number in range(RANGES):
            assert work(database_url, number, sessions) == 10
            assert lock_is_free(database_url, number)
            pids.append(run(database_url, f"SELECT array_agg(pid ORDER BY pid) {OURS}"))
    # The one that writes, the one that reads, the one that counts messages, and the one that looks out.
    assert len(pids[0][0][0]) == 4
    assert pids == [pids[0]] * RANGES
    support.assert_encrypted(database_url, ENTRY)
    support.until(lambda: support.value(database_url, f"SELECT count(*) {OURS}") == 0, "they are closed")


def test_lost_between_two_ranges(database_url: str) -> None:
    make(database_url)
    with Sessions(target(database_url)) as sessions:
        for number in range(RANGES):
            assert work(database_url, number, sessions) == 10
            run(database_url, f"SELECT pg_terminate_backend(pid) {OURS}")
    support.assert_encrypted(database_url, ENTRY)


def test_what_is_read_ahead_is_written_by_the_next_range(database_url: str) -> None:
    make(database_url)
    with Sessions(target(database_url)) as sessions:
        for number in range(RANGES):
            found = result_of(database_url, number, sessions, following=number + 1 if number < 3 else None)
            assert (found.rows, found.changed_meanwhile) == (10, 0)
    support.assert_encrypted(database_url, ENTRY)


def test_rows_read_ahead_and_changed_since_are_read_again(database_url: str) -> None:
    make(database_url)
    with Sessions(target(database_url)) as sessions:
        assert work(database_url, 0, sessions, following=1) == 10
        support.until(lambda: has_read_ahead(database_url), "the next range has been read")
        run(database_url, "UPDATE notes SET body = 'changed' WHERE id = 15")
        found = result_of(database_url, 1, sessions, following=2)
        # It could be changed meanwhile only because it had been read before.
        assert (found.rows, found.changed_meanwhile, found.left) == (10, 1, ())
        assert [work(database_url, number, sessions) for number in (2, 3)] == [10, 10]
    support.assert_encrypted(database_url, ENTRY)


@pytest.mark.parametrize("event", ["another range", "another type", "done by another", "lost", "stopped"])
def test_what_was_read_ahead_in_vain_is_forgotten(database_url: str, event: str) -> None:
    make(database_url)

    def stop(_: Progress) -> None:
        raise Stopped("enough")

    with Sessions(target(database_url)) as sessions:
        if event == "stopped":
            with pytest.raises(Stopped):
                work(database_url, 0, sessions, following=1, on_progress=stop)
            rest = [0, 1, 2, 3]
        else:
            assert work(database_url, 0, sessions, following=1) == 10
            rest = [1, 2, 3]
        if event == "another range":
            rest = [3, 1, 2]
        elif event == "another type":
            run(database_url, "ALTER TABLE notes ALTER COLUMN id TYPE bigint")
        elif event == "done by another":
            support.backfill(database_url, ENTRY, 1)
        elif event == "lost":
            run(database_url, f"SELECT pg_terminate_backend(pid) {OURS}")
        for number in rest:
            work(database_url, number, sessions)
    assert support.assert_encrypted(database_url, ENTRY) == 40
    written = "SELECT sum(rows_processed) FROM alphapulse_encryption.ranges WHERE table_name = 'notes'"
    assert support.value(database_url, written) == 40


def test_a_range_that_ends_early_gives_its_lock_back(database_url: str) -> None:
    make(database_url)

    def stop(_: Progress) -> None:
        assert not lock_is_free(database_url, 1)
        raise Stopped("enough")

    with Sessions(target(database_url)) as sessions:
        assert work(database_url, 0, sessions) == 10
        with pytest.raises(Stopped):
            work(database_url, 1, sessions, on_progress=stop)
        support.until(lambda: lock_is_free(database_url, 1), "the lock is given back")
        assert [work(database_url, number, sessions) for number in (1, 2, 3)] == [0, 10, 10]
    support.assert_encrypted(database_url, ENTRY)


def test_quick_switches_end_with_the_last_worker() -> None:
    usual = sys.getswitchinterval()
    with quick_switches():
        quick = sys.getswitchinterval()
        assert quick < usual
        with quick_switches():
            assert sys.getswitchinterval() == quick
        assert sys.getswitchinterval() == quick
    assert sys.getswitchinterval() == pytest.approx(usual)
