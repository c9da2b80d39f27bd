"""The sensor on pending rows: asks for exactly the partitions that need it, and a run of these finishes them."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place

USERS = walk.CATALOGUE.table("users")
RANGES = walk.RANGES


@pytest.fixture
def migrated(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    key = base64.b64encode(bytes(range(32))).decode()
    with place(postgres, sample_url, server_dir.parent, key) as found:
        found.ranges = RANGES
        walk.encrypt(sample_url, USERS)
        yield found


def look(found: Place, instance: dg.DagsterInstance) -> dg.SensorResult | dg.SkipReason:
    definitions = build_defs()
    sensor = definitions.resolve_sensor_def("pending_rows")
    assert sensor.default_status is dg.DefaultSensorStatus.STOPPED
    with dg.build_sensor_context(
        instance=instance, definitions=definitions, resources={"target": TargetResource()}
    ) as context:
        answer = sensor(context)
    assert isinstance(answer, dg.SensorResult | dg.SkipReason)
    return answer


def test_only_what_is_pending_is_asked_for(migrated: Place) -> None:
    with migrated.instance() as instance:
        answer = look(migrated, instance)
        assert isinstance(answer, dg.SkipReason)
        assert answer.skip_message == "Nothing is pending."

        lower = walk.value(
            migrated.url,
            "SELECT lower_key[1]::bigint FROM alphapulse_encryption.ranges WHERE (table_name, "
            "batch_range) = ('users', 1)",
        )
        walk.query(
            migrated.url, f"UPDATE users SET first_name = 'Changed' WHERE id = {lower + 1} RETURNING id"
        )
        answer = look(migrated, instance)
        assert isinstance(answer, dg.SensorResult)
        assert answer.run_requests is not None
        assert [request.partition_key for request in answer.run_requests] == ["01|users"]

        assert migrated.materialize(instance, "encrypted_data", "01|users").success
        pending = "SELECT count(*) FROM users WHERE first_name IS NOT NULL AND first_name_encrypted IS NULL"
        assert walk.value(migrated.url, pending) == 0
        assert isinstance(look(migrated, instance), dg.SkipReason)


def test_while_a_backfill_is_under_way_it_does_nothing(migrated: Place) -> None:
    with migrated.instance() as instance:
        walk.query(migrated.url, "UPDATE users SET first_name = 'Changed' RETURNING id")
        job = build_defs().resolve_job_def("migrate_data")
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        answer = look(migrated, instance)
        assert isinstance(answer, dg.SkipReason)
        assert answer.skip_message == "A backfill is under way."
        instance.report_run_failed(run)
        answer = look(migrated, instance)
        assert isinstance(answer, dg.SensorResult)
        assert answer.run_requests is not None
        assert len(answer.run_requests) == RANGES


def test_a_table_without_the_small_index_is_left_out(migrated: Place) -> None:
    """To look at it would read all of it."""
    with migrated.instance() as instance:
        walk.query(migrated.url, "UPDATE users SET first_name = 'Changed' RETURNING id")
        walk.query(migrated.url, "DROP INDEX users_encryption_pending")
        assert isinstance(look(migrated, instance), dg.SkipReason)
        build_search_indexes(Database(migrated.url), USERS, walk.ACTOR)
        assert isinstance(look(migrated, instance), dg.SensorResult)
