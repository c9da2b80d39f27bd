"""Faults during the backfill of a rehearsal, beside the traffic: each is provoked for real, and nothing is lost."""

from __future__ import annotations

import base64
import os
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, RangeResult
from alphapulse_encryption.rehearsal.faults.faults import (
    FaultConfig,
    Faults,
    Part,
    without_keys,
)
from alphapulse_encryption.rehearsal.measures import Fault, Stage
from alphapulse_encryption.rehearsal.traffic.traffic import TrafficConfig, traffic
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import last, rehearse

MASTER_KEY = bytes(range(32))
ENVIRONMENT = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": base64.b64encode(MASTER_KEY).decode()}
TRADES = Catalogue(tables=(walk.CATALOGUE.table("trades"),))
RANGES = 8
PARTS: list[Part] = [("trades", number) for number in range(RANGES)]
SMALL = Pace(batch_size=25)


def faults_on(url: str, config: FaultConfig, **options: object) -> Faults:
    support.add_columns(url, TRADES.tables[0], keys=walk.KEYS, ranges=RANGES)
    return Faults(
        config,
        Database(url),
        TRADES,
        ENVIRONMENT,
        walk.ACTOR,
        pace=SMALL,
        **options,  # type: ignore[arg-type]
    )


def encrypted_beside_traffic(url: str, config: FaultConfig, **options: object) -> tuple[Fault, ...]:
    """The faults of a backfill, having seen that no value and no request was lost."""
    results: list[tuple[Part, RangeResult]] = []
    load = TrafficConfig(rate=40, clients=4)
    faults = faults_on(url, config, **options)
    with traffic(url, TRADES, ("off", "plaintext"), load, ENVIRONMENT) as running:
        faults.encrypt(PARTS, lambda part, done: results.append((part, done)))
    measured = running.measured
    assert sorted(part for part, _ in results) == PARTS
    assert measured is not None
    assert (measured.overall.errors, measured.overall.wrong_answers, measured.error_kinds) == (0, 0, {})
    # What the application wrote in plaintext behind the backfill.
    for number in range(RANGES):
        backfill_range(walk.target(url), TRADES.tables[0], number)
    key = independent.derive(MASTER_KEY, "trade_order", 1)
    rows = support.run(url, "SELECT order_id, order_id_encrypted FROM trades")
    assert len(rows) > 900
    for plain, envelope in rows:
        assert independent.open_envelope(key, envelope) == plain
    assert (
        walk.value(url, "SELECT count(*) FROM alphapulse_encryption.ranges WHERE status <> 'completed'") == 0
    )
    assert all(fault.survived and 0 <= fault.seconds_away <= fault.seconds_lost for fault in faults.found)
    return tuple(faults.found)


def test_a_killed_worker_and_dropped_connections_lose_nothing(sample_url: str) -> None:
    before = support.value(
        sample_url, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    )
    assert before == 1
    with psycopg.connect(sample_url, application_name="somebody else") as other:
        found = encrypted_beside_traffic(sample_url, FaultConfig(worker_killed=2, connections_dropped=2))
        assert other.execute("SELECT 1").fetchone() == (1,)
    kinds = [fault.kind for fault in found]
    assert sorted(kinds) == ["connections dropped"] * 2 + ["worker killed"] * 2
    killed = next(fault for fault in found if fault.kind == "worker killed")
    # To start a process takes longer than to open a connection.
    assert killed.seconds_lost > max(0.1, killed.seconds_away)
    dropped = next(fault for fault in found if fault.kind == "connections dropped")
    assert not dropped.what.startswith("0 ")
    audited = support.value(
        sample_url,
        "SELECT count(*) FROM alphapulse_encryption.audit_log WHERE action = 'backfill' AND table_name = 'trades'",
    )
    assert audited >= RANGES


def test_keys_that_cannot_be_read_for_a_while(sample_url: str) -> None:
    config = FaultConfig(key_source_unavailable=1, key_source_seconds=0.4)
    (fault,) = encrypted_beside_traffic(sample_url, config)
    assert fault.kind == "key source unavailable"
    assert 0.39 < fault.seconds_away < fault.seconds_lost


def test_a_restarted_server(server_dir: Path) -> None:
    with EmbeddedPostgres(server_dir, settings=UNSAFE_SETTINGS) as server:
        server.ensure_database("clone")
        load_sample(server.url("clone"), rows=3_000)
        first = server.postmaster()

        def restart() -> None:
            server.stop()
            server.ensure_running()

        (fault,) = encrypted_beside_traffic(
            server.url("clone"), FaultConfig(server_restarted=1), restart=restart
        )
        assert server.postmaster() not in {None, first}
    assert fault.kind == "server restarted"
    assert fault.seconds_lost > fault.seconds_away > 0


def test_a_command_that_restarts_the_server(sample_url: str, tmp_path: Path) -> None:
    mark = tmp_path / "restarted"
    command = ["/bin/sh", "-c", 'env > "$0"', str(mark)]
    config = FaultConfig(server_restarted=1, restart_command=command)
    (fault,) = encrypted_beside_traffic(sample_url, config)
    assert fault.kind == "server restarted"
    assert "ALPHAPULSE" not in mark.read_text()
    broken = FaultConfig(server_restarted=1, restart_command=[str(tmp_path / "nothing")])
    support.run(sample_url, "UPDATE trades SET order_id = order_id || 'x'")
    with pytest.raises(MigrationError, match="restart_command did not restart the server"):
        faults_on(sample_url, broken).encrypt(PARTS, lambda part, done: None)


def test_a_server_that_is_others_as_well_is_not_restarted(sample_url: str) -> None:
    config = FaultConfig(server_restarted=1)
    with pytest.raises(RefusedError, match="the staging database is on it as well"):
        faults_on(sample_url, config, restart=lambda: None, shared_with="the staging database")
    with pytest.raises(ConfigurationError, match="restart_command is needed"):
        faults_on(sample_url, config)


@pytest.mark.long
def test_a_rehearsal_survives_faults_and_says_what_they_cost(small: Place) -> None:
    faults = {
        "worker_killed": 1,
        "connections_dropped": 1,
        "key_source_unavailable": 1,
        "key_source_seconds": 0.2,
    }
    traffic = {"rate": 20, "clients": 4}
    with small.instance() as instance:
        outcome = rehearse(
            small, instance, faults=faults, traffic=traffic, observe_seconds=0.1, compare_source=False
        )
        assert (outcome.problems, outcome.succeeded) == ((), True)
        found = last(instance)
        backfill = found.stage(Stage.BACKFILL)
        assert backfill is not None
        assert [fault.kind for fault in backfill.faults] == [
            "worker killed",
            "connections dropped",
            "key source unavailable",
        ]
        assert all(fault.survived for fault in backfill.faults)
        for measure in found.stages:
            if measure.traffic is not None:
                told = measure.traffic
                assert (told.overall.errors, told.overall.wrong_answers, told.error_kinds) == (0, 0, {}), (
                    measure
                )
        refused = rehearse(small, instance, faults={"server_restarted": 1}, compare_source=False)
        assert not refused.succeeded
        assert "the staging database and Dagster's own storage is on it as well" in last(instance).failure
    assert small.postgres.is_running()


def test_more_faults_than_ranges_are_refused(sample_url: str) -> None:
    faults = faults_on(sample_url, FaultConfig(worker_killed=8))
    with pytest.raises(ConfigurationError, match="8 faults are too many for 8 batch ranges"):
        faults.encrypt(PARTS, lambda part, done: None)
    assert support.value(sample_url, "SELECT count(*) FROM trades WHERE order_id_encrypted IS NOT NULL") == 0


def test_what_is_no_fault_of_ours_ends_the_backfill(sample_url: str) -> None:
    faults = faults_on(sample_url, FaultConfig(worker_killed=1))
    faults.environment = without_keys(ENVIRONMENT)
    with pytest.raises(MigrationError, match="ALPHAPULSE_ENCRYPTION_MASTER_KEY"):
        faults.encrypt(PARTS, lambda part, done: None)
    # A row or two of each range, by key.
    support.run(
        sample_url,
        "ALTER TABLE trades ADD CONSTRAINT never CHECK (order_id_encrypted IS NULL OR id % 70 > 0) NOT VALID",
    )
    faults = faults_on(sample_url, FaultConfig(worker_killed=1))
    with pytest.raises(MigrationError, match="8 of 8 batch ranges failed:\n- trades, batch range 0"):
        faults.encrypt(PARTS, lambda part, done: None)
    assert [fault.survived for fault in faults.found] == [True]


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (ENVIRONMENT, "ALPHAPULSE_ENCRYPTION_MASTER_KEY"),
        (
            {
                "ALPHAPULSE_ENCRYPTION_KEY_SOURCE": "vault",
                "VAULT_ADDR": "http://127.0.0.1:9",
                "VAULT_TOKEN": "token",
                "HOME": os.devnull,
            },
            "Vault",
        ),
        (
            {
                "ALPHAPULSE_ENCRYPTION_KEY_SOURCE": "aws",
                "AWS_REGION": "eu-central-1",
                "AWS_ACCESS_KEY_ID": "id",
                "AWS_SECRET_ACCESS_KEY": "secret",
            },
            "AWS",
        ),
    ],
)
def test_key_sources_fail_as_they_do_when_they_are_away(environment: dict[str, str], place: str) -> None:
    with pytest.raises(ConfigurationError, match=place):
        load_key_ring(without_keys(environment))
