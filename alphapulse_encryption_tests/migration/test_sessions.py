"""A worker's connections serve one range after another, and are opened again when they are lost."""

from __future__ import annotations

import sys

import pytest

from alphapulse_encryption.migration.backfill import Progress, Stopped, backfill_range
from alphapulse_encryption.migration.database import Database
from alphapulse_encryption.migration.sessions import Sessions, quick_switches
from alphapulse_encryption.migration.tracking import range_lock
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, CIPHER, KEYS, run

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
    database = Database(url)
    return backfill_range(
        database,
        ENTRY,
        number,
        CIPHER,
        KEYS,
        ACTOR,
        sessions=sessions,
        **options,  # type: ignore[arg-type]
    ).rows


def lock_is_free(url: str, number: int) -> bool:
    name = range_lock(ENTRY, number)
    query = "SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0))"
    with support.application(url) as connection:
        row = connection.execute(query, [name]).fetchone()
    return row == (True,)


def test_ranges_one_after_another(database_url: str) -> None:
    make(database_url)
    with Sessions(Database(database_url)) as sessions:
        pids = []
        for number in range(RANGES):
            assert work(database_url, number, sessions) == 10
            assert lock_is_free(database_url, number)
            pids.append(run(database_url, f"SELECT array_agg(pid ORDER BY pid) {OURS}"))
    assert len(pids[0][0][0]) == 3
    assert pids == [pids[0]] * RANGES
    support.assert_encrypted(database_url, ENTRY)
    support.until(lambda: support.value(database_url, f"SELECT count(*) {OURS}") == 0, "they are closed")


def test_lost_between_two_ranges(database_url: str) -> None:
    make(database_url)
    with Sessions(Database(database_url)) as sessions:
        for number in range(RANGES):
            assert work(database_url, number, sessions) == 10
            run(database_url, f"SELECT pg_terminate_backend(pid) {OURS}")
    support.assert_encrypted(database_url, ENTRY)


def test_a_range_that_ends_early_gives_its_lock_back(database_url: str) -> None:
    make(database_url)

    def stop(_: Progress) -> None:
        assert not lock_is_free(database_url, 1)
        raise Stopped("enough")

    with Sessions(Database(database_url)) as sessions:
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
