"""Write-ahead log that nobody reads, and commits that nobody confirms: a step waits, and ends with what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.limits import Limits, change_limits
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import throttle
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress
from alphapulse_encryption.migration.rows.throttle import HeldBack, Stop
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.rows.test_throttle import ENTRY, look, make
from alphapulse_encryption_tests.migration.support import ACTOR, run, target, value

WAITING = "SELECT max(waiting_for) FROM alphapulse_encryption.ranges"


@pytest.fixture
def own(server_dir: Path) -> Iterator[str]:
    """A database of a server of the test's own, which is ready for all that others may ask of it."""
    settings = {
        **UNSAFE_SETTINGS,
        "wal_level": "logical",
        "synchronous_commit": "on",
        "archive_mode": "on",
        "max_wal_size": "64MB",
        "min_wal_size": "32MB",
    }
    with EmbeddedPostgres(server_dir, settings) as server:
        server.ensure_database("target")
        yield server.url("target")


def configure(url: str, name: str, text: str) -> None:
    run(url, f"ALTER SYSTEM SET {name} TO '{text}'")
    run(url, "SELECT pg_reload_conf()")
    support.until(lambda: value(url, f"SHOW {name}") == text, "the setting holds")


def write(url: str, mebibytes: int) -> None:
    """So much write-ahead log, and a little more."""
    run(
        url,
        "SELECT pg_logical_emit_message(false, 'filler', repeat('x', 1024 * 1024)) FROM generate_series(1, %s)",
        mebibytes,
    )


def slow(limits: dict[str, str]) -> dict[str, str]:
    return {"max_kept_wal_mib": "40", "max_wait_minutes": "0.02", **limits}


@pytest.mark.parametrize("kind", ["physical", "logical"])
def test_a_slot_that_nobody_reads(own: str, kind: str) -> None:
    make(own)
    limits = Limits(max_kept_wal_mib=40)
    if kind == "physical":
        run(own, "SELECT pg_create_physical_replication_slot('warehouse', true)")
    else:
        run(own, "SELECT pg_create_logical_replication_slot('warehouse', 'test_decoding')")
    assert look(own, throttle.kept_wal, limits) is None
    write(own, 45)
    signal = look(own, throttle.kept_wal, limits)
    assert isinstance(signal, Stop)
    assert re.search(r"[4-9]\d MiB of WAL for the replication slot warehouse \(limit 40\)", signal.reason)
    assert "pg_drop_replication_slot('warehouse')" in signal.remedy
    assert look(own, throttle.kept_wal, Limits(max_kept_wal_mib=0)) is None

    change_limits(Database(own), slow({}), ACTOR)
    seen: list[str | None] = []

    def on_progress(progress: Progress) -> None:
        seen.append(progress.waiting_for)
        assert value(own, WAITING) == progress.waiting_for

    with pytest.raises(HeldBack, match="pg_drop_replication_slot") as caught:
        backfill_range(target(own), ENTRY, 0, on_progress=on_progress)
    assert "warehouse" in caught.value.args[0]
    assert seen
    assert all(reason and "warehouse" in reason for reason in seen)
    status, message = run(own, "SELECT status, error_message FROM alphapulse_encryption.ranges")[0]
    assert (status, "warehouse" in message) == ("failed", True)
    run(own, "SELECT pg_drop_replication_slot('warehouse')")
    assert support.backfill(own, ENTRY).rows == 300
    support.assert_encrypted(own, ENTRY)


def test_one_that_is_read_again_lets_the_backfill_go_on(own: str) -> None:
    make(own)
    change_limits(Database(own), {"max_kept_wal_mib": "40", "max_wait_minutes": "2"}, ACTOR)
    run(own, "SELECT pg_create_physical_replication_slot('warehouse', true)")
    write(own, 45)
    waits = 0

    def on_progress(progress: Progress) -> None:
        nonlocal waits
        waits += progress.waiting_for is not None
        if waits == 3:
            run(own, "SELECT pg_replication_slot_advance('warehouse', pg_current_wal_lsn())")

    assert backfill_range(target(own), ENTRY, 0, on_progress=on_progress).rows == 300
    assert waits >= 3
    support.assert_encrypted(own, ENTRY)


def test_a_slot_that_the_server_is_about_to_drop(own: str) -> None:
    configure(own, "max_slot_wal_keep_size", "128MB")
    run(own, "SELECT pg_create_physical_replication_slot('warehouse', true)")
    assert look(own, throttle.kept_wal, Limits()) is None
    write(own, 110)
    signal = look(own, throttle.kept_wal, Limits())
    assert isinstance(signal, Stop)
    assert "is lost after" in signal.reason
    write(own, 80)
    run(own, "CHECKPOINT")
    assert value(own, "SELECT wal_status FROM pg_replication_slots") == "lost"
    assert look(own, throttle.kept_wal, Limits()) is None, "nothing is kept for it any more"


def test_an_archive_that_fails(own: str) -> None:
    limits = Limits(max_kept_wal_mib=20)
    configure(own, "archive_command", "true")
    write(own, 1)
    run(own, "SELECT pg_switch_wal()")
    support.until(lambda: value(own, "SELECT archived_count FROM pg_stat_archiver") > 0, "one is archived")
    assert look(own, throttle.kept_wal, limits) is None
    configure(own, "archive_command", "false")
    write(own, 40)
    support.until(lambda: value(own, "SELECT failed_count FROM pg_stat_archiver") > 0, "one failed")
    signal = look(own, throttle.kept_wal, limits)
    assert isinstance(signal, Stop)
    assert re.fullmatch(r"\d+ MiB of WAL wait to be archived \(limit 20\)", signal.reason)
    assert "which fails" in signal.remedy
    configure(own, "archive_command", "true")
    run(own, "SELECT pg_switch_wal()")
    support.until(lambda: look(own, throttle.kept_wal, limits) is None, "all is archived")


def test_an_archive_that_has_never_worked(own: str) -> None:
    configure(own, "archive_command", "false")
    write(own, 40)
    support.until(lambda: value(own, "SELECT failed_count FROM pg_stat_archiver") > 0, "one failed")
    assert isinstance(look(own, throttle.kept_wal, Limits(max_kept_wal_mib=20)), Stop)


def locally(url: str) -> str:
    """The address for a session whose own commits wait for nobody."""
    return f"{url}&options=-c%20synchronous_commit%3Dlocal"


@pytest.mark.parametrize("names", ["elsewhere", "FIRST 2 (a, b)", "ANY 1 (a, b)"])
def test_a_missing_synchronous_standby_is_told_before_anything_is_written(own: str, names: str) -> None:
    run(own, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    configure(own, "synchronous_standby_names", names)
    with pytest.raises(RefusedError, match="synchronous_standby_names"):
        support.add_columns(own, ENTRY)
    assert value(own, "SELECT to_regnamespace('alphapulse_encryption')") is None


@pytest.mark.long
def test_one_that_goes_away_while_a_backfill_runs(own: str) -> None:
    make(own)
    change_limits(Database(own), slow({"max_kept_wal_mib": "0", "max_wait_minutes": "0.05"}), ACTOR)
    batches = 0

    def on_progress(progress: Progress) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            configure(locally(own), "synchronous_standby_names", "elsewhere")

    with pytest.raises(HeldBack, match="synchronous_standby_names"):
        backfill_range(target(own), ENTRY, 0, pace=Pace(batch_size=20), on_progress=on_progress)
    status, message, done = run(
        own, "SELECT status, error_message, rows_processed FROM alphapulse_encryption.ranges"
    )[0]
    assert (status, "synchronous_standby_names" in message, done < 300) == ("failed", True, True)
    assert value(own, "SELECT count(*) FROM notes WHERE body_encrypted IS NOT NULL") == done
    with pytest.raises(RefusedError, match="synchronous_standby_names"):
        support.backfill(own, ENTRY)
    configure(locally(own), "synchronous_standby_names", "")
    assert support.backfill(own, ENTRY).rows == 300 - done
    support.assert_encrypted(own, ENTRY)
