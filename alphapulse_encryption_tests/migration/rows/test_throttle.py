"""Holding back: each sign of distress, the settings an operator changes, and that a running backfill listens."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.limits import Limits, change_limits, read_limits
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import backfill, engine, throttle
from alphapulse_encryption.migration.rows.engine import Pace, Progress
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.rows.throttle import NotAvailable, Stop, Throttle
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.standbys import standby_of
from alphapulse_encryption_tests.migration.support import ACTOR, run, target

ENTRY = support.table("notes", "body")


def make(url: str, rows: int = 300) -> None:
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    run(url, f"INSERT INTO notes SELECT i, 'text ' || i FROM generate_series(1, {rows}) AS i")
    support.add_columns(url, ENTRY)


def look(url: str, indicator: throttle.Indicator, limits: Limits) -> throttle.Signal:
    with Database(url).connect() as connection:
        return indicator(connection, limits)


def test_settings_are_validated_and_audited(database_url: str) -> None:
    database = Database(database_url)
    assert change_limits(database, {}, ACTOR) == Limits()
    changed = change_limits(database, {"paused": "true", "batch_size": "250"}, ACTOR)
    assert (changed.paused, changed.batch_size) == (True, 250)
    stored = run(database_url, "SELECT name, value FROM alphapulse_encryption.settings ORDER BY name")
    assert stored == [("batch_size", 250), ("paused", True)]
    for changes, message in (
        ({"pause": "true"}, "no setting pause; there are paused"),
        ({"batch_size": "-1"}, "setting batch_size"),
        ({"batch_size": "many"}, "setting batch_size"),
        ({"target_seconds": "0"}, "setting target_seconds"),
        ({"max_replication_lag_seconds": "nan"}, "setting max_replication_lag_seconds"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            change_limits(database, {**changes, "min_free_disk_mib": "5"}, ACTOR)
    assert run(database_url, "SELECT name, value FROM alphapulse_encryption.settings ORDER BY name") == stored
    audited = run(
        database_url,
        "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'change_settings' ORDER BY id",
    )
    assert audited[-1] == ({"settings": {"paused": True, "batch_size": 250}},)


def test_what_an_operator_writes_with_psql_counts(database_url: str) -> None:
    make(database_url)
    run(
        database_url,
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('target_seconds', '1.5')",
    )
    with Database(database_url).connect() as connection:
        assert read_limits(connection).target_seconds == 1.5


def test_a_running_backfill_pauses_and_goes_on(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(database_url)
    # However fast the machine is: it looks before the rows are done.
    monkeypatch.setattr(throttle, "SECONDS_BETWEEN_LOOKS", 0.02)
    database = Database(database_url)
    seen: list[tuple[str | None, str | None, int]] = []

    looks = (
        "SELECT (SELECT max(waiting_for) FROM alphapulse_encryption.ranges), "
        "(SELECT count(*) FROM notes WHERE body_encrypted IS NOT NULL)"
    )

    def on_progress(progress: Progress) -> None:
        ((told, done),) = support.ask(watching, looks)
        seen.append((progress.waiting_for, told, done))
        if len(seen) == 1:
            change_limits(database, {"paused": "true"}, ACTOR)
        if len([waiting for waiting, _, _ in seen if waiting]) == 3:
            change_limits(database, {"paused": "false"}, ACTOR)

    with support.application(database_url) as watching:
        result = backfill.backfill_range(
            target(database), ENTRY, 0, pace=Pace(batch_size=1), on_progress=on_progress
        )
    waits = [(waiting, told, done) for waiting, told, done in seen if waiting]
    assert len(waits) >= 3
    assert {waiting for waiting, _, _ in waits} == {"paused by an operator (setting paused)"}
    assert all(told == waiting for waiting, told, _ in waits)
    assert len({done for _, _, done in waits}) == 1, "rows were written during the pause"
    assert result.rows == 300
    assert result.seconds_held_back > 0
    assert support.value(database_url, "SELECT max(waiting_for) FROM alphapulse_encryption.ranges") is None
    support.assert_encrypted(database_url, ENTRY)


def test_the_batch_size_is_changed_while_it_runs(database_url: str) -> None:
    make(database_url, 3_000)
    database = Database(database_url)
    change_limits(database, {"batch_size": "10"}, ACTOR)
    sizes: list[int] = []

    def on_progress(progress: Progress) -> None:
        sizes.append(progress.batch_size)
        if len(sizes) == 1:
            change_limits(database, {"batch_size": "20"}, ACTOR)

    backfill.backfill_range(target(database), ENTRY, 0, on_progress=on_progress)
    assert sizes[0] == 10
    assert set(sizes) <= {10, 20}


def test_a_caller_that_stops_leaves_the_range_to_be_resumed(database_url: str) -> None:
    make(database_url)

    def stop(progress: Progress) -> None:
        raise engine.Stopped("enough")

    with pytest.raises(engine.Stopped):
        backfill.backfill_range(target(database_url), ENTRY, 0, pace=Pace(batch_size=50), on_progress=stop)
    assert run(database_url, "SELECT status, rows_processed FROM alphapulse_encryption.ranges") == [
        ("in_progress", 50)
    ]
    assert support.backfill(database_url, ENTRY).rows == 250
    support.assert_encrypted(database_url, ENTRY)


def test_a_setting_that_means_nothing_holds_everybody_back(database_url: str) -> None:
    make(database_url)
    run(
        database_url,
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('paused', '\"perhaps\"')",
    )

    def on_progress(progress: Progress) -> None:
        if progress.waiting_for is not None:
            assert "setting paused" in progress.waiting_for
            run(database_url, "DELETE FROM alphapulse_encryption.settings")

    result = backfill.backfill_range(target(database_url), ENTRY, 0, on_progress=on_progress)
    assert result.rows == 300
    assert result.seconds_held_back > 0


def test_sessions_that_wait_for_a_lock_of_ours(database_url: str) -> None:
    make(database_url)
    with support.application(database_url, autocommit=False) as ours:
        indicator = partial(throttle.blocked_sessions, [ours.info.backend_pid])
        ours.execute("UPDATE notes SET body = body WHERE id = 1")
        assert look(database_url, indicator, Limits()) is None
        with support.Background(
            lambda: run(database_url, "UPDATE notes SET body = 'theirs' WHERE id = 1")
        ) as waits:
            support.until(lambda: look(database_url, indicator, Limits()) is not None, "it is seen")
            assert look(database_url, indicator, Limits()) == Stop(
                "1 sessions wait for a lock of ours (limit 0)"
            )
            assert look(database_url, indicator, Limits(max_blocked_sessions=1)) is None
            ours.rollback()
            waits.result()
        assert look(database_url, indicator, Limits()) is None


@dataclass
class Replica:
    """A standby of the tests' server that replays when it is told to."""

    server: EmbeddedPostgres

    def pause(self) -> None:
        self._ask("SELECT pg_wal_replay_pause()")
        # It goes on to the end of what it is just replaying.
        support.until(
            lambda: self._ask("SELECT pg_get_wal_replay_pause_state()") == [("paused",)], "it pauses"
        )

    def resume(self) -> None:
        self._ask("SELECT pg_wal_replay_resume()")

    def _ask(self, statement: str) -> list[support.Row]:
        return run(self.server.url("postgres"), statement)


@pytest.fixture
def replica(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Replica]:
    with standby_of(postgres, server_dir, UNSAFE_SETTINGS) as server:
        yield Replica(server)
    support.until(
        lambda: not support.value(database_url, "SELECT count(*) FROM pg_stat_replication"), "it is gone"
    )


def test_a_replica_that_is_stuck(database_url: str, replica: Replica) -> None:
    """How late it is the server cannot tell: of what is not replayed it measures nothing."""
    now = 0.0
    indicator = throttle.ReplicationLag(clock=lambda: now)
    far = Limits(max_replication_lag_mib=4)
    assert look(database_url, indicator, far) is None
    replica.pause()
    now = 100.0
    # On an idle server it is late in nothing.
    support.until(lambda: look(database_url, indicator, far) is None, "it has all there is")
    run(database_url, "SET synchronous_commit TO local; CREATE TABLE few AS SELECT 1 AS v")
    assert look(database_url, indicator, far) is None
    now = 110.0
    assert look(database_url, indicator, far) is None
    now = 110.5
    assert look(database_url, indicator, far) == Stop("replica replica is 10 s behind (limit 10 s)")
    assert look(database_url, indicator, Limits(max_replication_lag_seconds=11)) is None
    assert look(database_url, indicator, Limits(max_replication_lag_seconds=0)) is None
    reported = support.value(database_url, "SELECT extract(epoch FROM replay_lag) FROM pg_stat_replication")
    assert reported is None or reported < 5

    # One that was stuck before anybody looked is told by what it has left to do.
    run(
        database_url,
        "SET synchronous_commit TO local; CREATE TABLE many AS "
        "SELECT repeat(md5(i::text), 20) AS v FROM generate_series(1, 10000) AS i",
    )
    signal = look(database_url, throttle.ReplicationLag(), far)
    assert isinstance(signal, Stop)
    assert re.fullmatch(r"replica replica has \d+ MiB left to replay \(limit 4\)", signal.reason)
    assert look(database_url, throttle.ReplicationLag(), Limits(max_replication_lag_mib=0)) is None
    replica.resume()
    support.until(lambda: look(database_url, indicator, far) is None, "it has caught up")


def test_a_backfill_waits_for_a_replica(database_url: str, replica: Replica) -> None:
    make(database_url)
    database = Database(database_url)
    change_limits(database, {"max_replication_lag_seconds": "2"}, ACTOR)
    seen: list[tuple[str | None, int]] = []

    def on_progress(progress: Progress) -> None:
        assert (
            support.value(database_url, "SELECT waiting_for FROM alphapulse_encryption.ranges")
            == progress.waiting_for
        )
        done = support.value(database_url, "SELECT count(*) FROM notes WHERE body_encrypted IS NOT NULL")
        seen.append((progress.waiting_for, done))
        waits = sum(waiting is not None for waiting, _ in seen)
        if not waits:
            time.sleep(0.02)  # or it would be done before the replica is late
        if waits == 3:
            replica.resume()

    replica.pause()
    result = backfill.backfill_range(
        target(database), ENTRY, 0, pace=Pace(batch_size=1), on_progress=on_progress
    )
    waits = [(waiting, done) for waiting, done in seen if waiting]
    assert len(waits) >= 3
    assert all(re.fullmatch(r"replica replica is \d+ s behind \(limit 2 s\)", reason) for reason, _ in waits)
    assert len({done for _, done in waits[:3]}) == 1, "rows were written while the replica was stuck"
    assert waits[0][1] < 300
    assert (result.rows, result.seconds_held_back > 0) == (300, True)
    assert support.value(database_url, "SELECT max(waiting_for) FROM alphapulse_encryption.ranges") is None
    support.assert_encrypted(database_url, ENTRY)


def test_a_role_that_may_not_see_replicas(database_url: str, replica: Replica) -> None:
    run(database_url, "CREATE ROLE throttle_tester LOGIN")
    try:
        url = database_url.replace("//postgres@", "//throttle_tester@")
        assert look(url, throttle.ReplicationLag(), Limits()) == NotAvailable(
            "this role may not see how far replicas are (GRANT pg_monitor lets it)"
        )
        run(database_url, "GRANT pg_monitor TO throttle_tester")
        assert look(url, throttle.ReplicationLag(), Limits()) is None
    finally:
        run(database_url, "DROP ROLE throttle_tester")


def test_write_ahead_log(database_url: str) -> None:
    times = iter([0.0, 1.0, 2.0, 3.0])
    indicator = throttle.WalRate(clock=lambda: next(times))
    limits = Limits(max_wal_mib_per_second=1)
    assert look(database_url, indicator, limits) is None
    run(
        database_url,
        "CREATE TABLE much AS SELECT repeat(md5(i::text), 20) AS v FROM generate_series(1, 10000) AS i",
    )
    assert isinstance(look(database_url, indicator, limits), Stop)
    assert look(database_url, indicator, limits) is None
    assert look(database_url, indicator, Limits()) is None


def test_free_disk(database_url: str) -> None:
    mebibyte = 1024 * 1024
    limits = Limits(min_free_disk_mib=100)
    assert look(database_url, partial(throttle.free_disk, free=lambda _: 100 * mebibyte), limits) is None
    assert look(database_url, partial(throttle.free_disk, free=lambda _: 99 * mebibyte), limits) == Stop(
        "99 MiB of disk are free (limit 100)"
    )
    assert isinstance(
        look(database_url, partial(throttle.free_disk, free=lambda _: None), limits), NotAvailable
    )
    asked: list[Path] = []
    look(database_url, partial(throttle.free_disk, free=asked.append), limits)
    data = support.value(database_url, "SELECT current_setting('data_directory')")
    assert asked == [Path(data)]
    assert throttle.free_bytes(Path(data)) is not None


def test_a_backfill_rests_for_as_long_as_the_setting_says_now(database_url: str) -> None:
    make(database_url)
    database = Database(database_url)
    seen: list[Progress] = []

    def note(progress: Progress) -> None:
        seen.append(progress)
        if progress.rows == 150:
            change_limits(database, {"rest_ratio": "0"}, ACTOR)
            # Heard of at the next look, which is over before the next batch.
            support.until(heard, "the look")

    def heard() -> bool:
        return bool(sessions._throttle and sessions._throttle.limits.rest_ratio == 0)

    change_limits(database, {"rest_ratio": "4"}, ACTOR)
    with Sessions(target(database)) as sessions:
        result = backfill.backfill_range(
            target(database), ENTRY, 0, pace=Pace(50), on_progress=note, sessions=sessions
        )
    # A rest of more than a moment is reported as well.
    assert (result.rows, len([p for p in seen if p.waiting_for is None])) == (300, 6)
    # After three batches at the most, and after two at least.
    assert 0 < result.seconds_rested < result.seconds
    run(database_url, "UPDATE notes SET body = body || '.'")
    again = backfill.backfill_range(target(database), ENTRY, 0, pace=Pace(50, rest_ratio=2))
    assert (again.rows, again.seconds_rested > 0) == (300, True)
    run(database_url, "UPDATE notes SET body = body || '.'")
    unrested = backfill.backfill_range(target(database), ENTRY, 0, pace=Pace(50))
    assert (unrested.rows, unrested.seconds_rested) == (300, 0)


def test_a_long_rest_can_be_ended() -> None:
    now = 0.0
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    told: list[int] = []
    resting = Throttle(Database(""), (), lambda reason: None, sleep, lambda: now)
    resting.rest(1.2, lambda: told.append(1))
    assert sum(slept) == pytest.approx(1.2)
    assert (len(told), resting.rested) == (2, 1.2)
    with pytest.raises(engine.Stopped):
        resting.rest(60, lambda: (_ for _ in ()).throw(engine.Stopped("enough")))
    assert now < 2


def test_a_wait_tells_its_reason_until_it_is_over() -> None:
    """Without waiting: time passes when it sleeps."""
    now = 0.0
    told: list[str | None] = []

    def advance(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now >= 2:
            held.limits, held.reason = Limits(batch_size=7), None

    held = Throttle(Database(""), (), told.append, sleep=advance, clock=lambda: now)
    assert held.wait() == Limits()
    assert told == []
    held.reason = "the moon"
    assert held.wait() == Limits(batch_size=7)
    assert set(told[:-1]) == {"the moon"}
    assert told[-1] is None
    assert held.waited == pytest.approx(2, abs=0.5)


def test_the_lookout_comes_back_after_its_connection_was_lost(database_url: str) -> None:
    make(database_url)
    held = Throttle(Database(database_url), throttle.indicators([]), lambda _: None)
    with held.looking():
        assert held.reason is None
        run(
            database_url, "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('paused', 'true')"
        )
        run(
            database_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND datname = current_database() AND application_name = 'alphapulse_encryption'",
        )
        support.until(lambda: held.reason is not None, "it looks again")
    assert threading.active_count() >= 1
