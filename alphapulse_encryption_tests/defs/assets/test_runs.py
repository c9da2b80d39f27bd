"""Runs of single assets and partitions, as the UI's buttons launch them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place

USERS = walk.CATALOGUE.table("users")
RANGES = 4
PARTS = [f"{number:02d}|users" for number in range(RANGES)]
DATA = dg.AssetKey("encrypted_data")
CANARY = "canary-91b7@example.org"
CIPHERTEXTS = "SELECT md5(string_agg(coalesce(email_encrypted, '-'), ',' ORDER BY id)) FROM users"


@pytest.fixture
def sample(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    key = base64.b64encode(bytes(range(32))).decode()
    with place(postgres, sample_url, server_dir.parent, key) as found:
        found.ranges = RANGES
        add_encrypted_columns(walk.target(sample_url), USERS, batch_ranges=RANGES)
        yield found


def metadata(instance: dg.DagsterInstance, asset: str, partition: str) -> dict[str, Any]:
    """Of the partition's latest event: what the UI shows."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition]), limit=1
    ).records
    assert records[0].asset_materialization is not None
    return {name: value.value for name, value in records[0].asset_materialization.metadata.items()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    assert not result.success
    (data,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert data.user_failure_data is not None
    return str(data.user_failure_data.description)


def test_one_partition_alone_and_again(sample: Place) -> None:
    with sample.instance() as instance:
        assert sample.materialize(instance, "encrypted_data", "03|users").success
        assert instance.get_materialized_partitions(DATA) == {"03|users"}

        lower = walk.value(
            sample.url,
            "SELECT lower_key[1]::bigint FROM alphapulse_encryption.ranges WHERE (table_name, "
            "batch_range) = ('users', 3)",
        )
        rows = walk.query(sample.url, "SELECT id, email, email_encrypted FROM users ORDER BY id")
        inside = [row for row in rows if row[0] > lower]
        assert 0 < len(inside) < len(rows)
        key = independent.derive(bytes(range(32)), "user_pii", 1)
        for row, email, envelope in rows:
            assert (envelope is not None) == (row > lower)
            assert envelope is None or independent.open_envelope(key, envelope) == email

        shown = metadata(instance, "encrypted_data", "03|users")
        assert shown["rows_encrypted"] == len(inside)
        assert shown["outcome"] == f"{len(inside)} rows encrypted"
        assert shown["values"] > len(inside)
        assert shown["batches"] >= 1
        assert (shown["left_pending"], shown["changed_meanwhile"], shown["resumed"]) == (0, 0, False)
        assert {"seconds", "rows_per_second"} <= set(shown)

        before = walk.value(sample.url, CIPHERTEXTS)
        audited = walk.value(sample.url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
        assert sample.materialize(instance, "encrypted_data", "03|users").success
        again = metadata(instance, "encrypted_data", "03|users")
        assert (again["outcome"], again["rows_encrypted"]) == ("nothing to do", 0)
        assert walk.value(sample.url, CIPHERTEXTS) == before
        assert walk.value(sample.url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == audited

        runs = instance.get_runs()
        assert [run.tags["dagster/partition"] for run in runs] == ["03|users", "03|users"]


def test_a_range_that_fails_leaves_the_others_done_and_tells_no_value(sample: Place) -> None:
    with psycopg.connect(sample.url, autocommit=True) as connection:
        # The application's own trigger refuses a row of range 02 as a unique violation would: with its value.
        row = connection.execute(
            "SELECT min(id) FROM users WHERE id > (SELECT lower_key[1]::bigint FROM alphapulse_encryption.ranges "
            "WHERE (table_name, batch_range) = ('users', 2))"
        ).fetchone()
        assert row is not None
        connection.execute("UPDATE users SET email = %s WHERE id = %s", [CANARY, row[0]])
        connection.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "RAISE unique_violation USING MESSAGE = 'duplicate ' || OLD.email, CONSTRAINT = 'one_email', "
            "DETAIL = 'Key (email)=(' || OLD.email || ') already exists.', HINT = OLD.email; END $$"
        )
        connection.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON users FOR EACH ROW "
            f"WHEN (OLD.email = '{CANARY}') EXECUTE FUNCTION refuse(); "
            "ALTER TABLE users ENABLE ALWAYS TRIGGER refuse".encode()
        )
    with sample.instance() as instance:
        said = failure(sample.materialize(instance, "encrypted_data", (PARTS[0], PARTS[-1])))
        assert "1 of 4 batch ranges failed" in said
        assert "02|users" in said and "SQLSTATE 23505" in said
        # What a trigger calls a constraint may be a value as well.
        assert "raised by a function" in said and "one_email" not in said

        good = {"00|users", "01|users", "03|users"}
        assert instance.get_materialized_partitions(DATA) == good
        node = sample.definitions().resolve_asset_graph().get(DATA)
        assert node.partitions_def is not None
        status = instance.get_status_by_partition(DATA, PARTS, node.partitions_def)
        assert status is not None
        assert {part: state.value if state else None for part, state in status.items()} == {
            part: "MATERIALIZED" if part in good else "FAILED" for part in PARTS
        }
        for part in good:
            assert metadata(instance, "encrypted_data", part)["rows_encrypted"] > 0
        assert walk.query(
            sample.url,
            "SELECT batch_range, status, error_message IS NULL FROM alphapulse_encryption.ranges "
            "WHERE table_name = 'users' ORDER BY 1",
        ) == [(0, "completed", True), (1, "completed", True), (2, "failed", False), (3, "completed", True)]

        # Nowhere in Dagster's database, nor in the bookkeeping.
        stored = sample.dump(sample.dagster_url, "--inserts")
        assert "SQLSTATE 23505" in stored
        for secret in (CANARY, sample.master_key, bytes(range(32)).hex(), sample.url):
            assert secret not in stored
        kept = sample.dump(None, "--inserts", "--schema", "alphapulse_encryption")
        assert "SQLSTATE 23505" in kept
        assert CANARY not in kept and sample.master_key not in kept

        walk.query(sample.url, "DROP TRIGGER refuse ON users")
        assert sample.materialize(instance, "encrypted_data", "02|users").success
        assert instance.get_materialized_partitions(DATA) == set(PARTS)
        assert walk.value(sample.url, "SELECT count(*) FROM users WHERE email_encrypted IS NULL") == 0


def test_a_table_is_verified_or_its_partition_fails(sample: Place) -> None:
    table = dg.AssetKey("verified_table")
    with sample.instance() as instance:
        # The graph is no gate: a stage run alone looks at the database itself.
        assert "no encrypted columns yet" in failure(
            sample.materialize(instance, "encrypted_data", "00|trades")
        )
        assert "batch ranges were not verified yet" in failure(
            sample.materialize(instance, "verified_table", "users")
        )
        assert instance.get_materialized_partitions(table) == set()

        everything = (PARTS[0], PARTS[-1])
        assert sample.materialize(instance, "verified_data", everything).success
        pending = failure(sample.materialize(instance, "verified_table", "users"))
        total = walk.value(sample.url, "SELECT count(*) FROM users")
        assert f"users.email: {total} values pending" in pending
        assert instance.get_materialized_partitions(table) == set()
        assert _checks(instance)["nothing_pending"] is False

        assert sample.materialize(instance, "encrypted_data", everything).success
        assert sample.materialize(instance, "search_indexes", "users").success
        built = metadata(instance, "search_indexes", "users")
        assert built["indexes_built"] == ["idx_user_email_search", "users_encryption_pending"]
        assert sample.materialize(instance, "verified_data", everything).success
        rows = [metadata(instance, "verified_data", part)["dagster/partition_row_count"] for part in PARTS]
        assert sum(rows) == total
        assert sample.materialize(instance, "verified_table", "users").success
        assert instance.get_materialized_partitions(table) == {"users"}
        assert metadata(instance, "verified_table", "users")["dagster/partition_row_count"] == total
        assert set(_checks(instance).values()) == {True}

        walk.query(
            sample.url,
            "SET session_replication_role = replica; "
            "UPDATE users SET email_search = 'x' WHERE id = (SELECT min(id) FROM users)",
        )
        assert sample.materialize(instance, "verified_data", PARTS[0]).success
        assert metadata(instance, "verified_data", PARTS[0])["token_mismatched"] == 1
        broken = failure(sample.materialize(instance, "verified_table", "users"))
        assert "users.email token_mismatched at key (1)" in broken
        found = _checks(instance)
        assert [name for name, passed in found.items() if not passed] == ["every_token_matches"]

        walk.rewrite(
            sample.url,
            "UPDATE alphapulse_encryption.verifications SET verified_at = now() - interval '8 days'",
        )
        assert "verified more than 7 days" in failure(sample.materialize(instance, "verified_table", "users"))
        assert _checks(instance)["fresh"] is False


def _checks(instance: dg.DagsterInstance) -> dict[str, bool]:
    names = (
        *("every_range_verified", "nothing_pending", "every_value_matches", "every_token_matches"),
        *("row_counts_match", "fresh"),
    )
    result = {}
    for name in names:
        key = dg.AssetCheckKey(dg.AssetKey("verified_table"), name)
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        assert record.event is not None and record.event.dagster_event is not None
        result[name] = record.event.dagster_event.asset_check_evaluation_data.passed
    return result
