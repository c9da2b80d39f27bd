"""Whatever Dagster runs of ours goes over the border: an error in it that quotes values is kept without them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import dagster as dg
import psycopg
import pydantic
import pytest
from dagster._serdes import serialize_value
from dagster._utils.error import serializable_error_info_from_exc_info

from alphapulse_encryption.definitions import defs
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import PaceConfig
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.test_wrong_key import STEPS, TABLE, WITHOUT_A_JOB

CANARY = "canary-8d41b07e"

OTHERS: dict[str, tuple[str, dict[str, object], str | None]] = {
    "change_settings": ("change", {"settings": {"paused": "false"}}, None),
    "list_approvals": ("list", {}, None),
    "look_for_slow_queries": ("slow_encrypted_queries", {}, None),
    "analyze_tables": ("analyze", {"tables": [TABLE]}, None),
    "reindex_tables": ("rebuild", {"tables": [TABLE], "indexes": "all"}, None),
    "revoke_approval": ("revoke", {"approval": 1}, None),
}
PLAN = {**PaceConfig().model_dump(), "tables": [TABLE], "all": True, "changed": True}


class Model(pydantic.BaseModel):
    number: int


def leak(*_: object, **__: object) -> NoReturn:
    """An error that quotes a value in each of the ways there are."""
    try:
        with psycopg.connect(leak.url, autocommit=True) as connection:  # type: ignore[attr-defined]
            connection.execute("CREATE TEMPORARY TABLE t (x text UNIQUE)")
            connection.execute("INSERT INTO t VALUES (%s), (%s)", [CANARY, CANARY])
    except psycopg.Error as first:
        first.add_note(f"note: {CANARY}")
        try:
            Model.model_validate({"number": CANARY})
        except pydantic.ValidationError as second:
            raise KeyError(CANARY) from second
    raise AssertionError("nothing was leaked")


@pytest.fixture
def theirs(
    postgres: EmbeddedPostgres, database_url: str, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(another.SCHEMA.encode())
    key = another.MASTER_KEY_TEXT
    with place(postgres, database_url, server_dir.parent, key, another.CATALOGUE) as found:
        leak.url = database_url  # type: ignore[attr-defined]
        for name in ("target_database", "load_key_ring", "load_catalogue"):
            monkeypatch.setattr(f"alphapulse_encryption.defs.resources.target.{name}", leak)
        monkeypatch.setattr("alphapulse_encryption.defs.resources.environment.backup_bucket", leak)
        monkeypatch.setattr("alphapulse_encryption.rehearsal.job.RehearsalTarget", leak)
        monkeypatch.setattr("alphapulse_encryption.rehearsal.job.Passed.model_validate", leak)
        monkeypatch.setattr("alphapulse_encryption.rehearsal.job.embedded", leak)
        monkeypatch.setattr("alphapulse_encryption.defs.alerts.sensors.configured_channels", leak)
        yield found


def kept(problem: Callable[[], object]) -> str:
    """What Dagster keeps of an error, with those that led to it."""
    try:
        problem()
    except Exception:
        return serialize_value(serializable_error_info_from_exc_info(sys.exc_info()))
    raise AssertionError("there was no error")


def test_what_is_leaked_would_be_kept(theirs: Place) -> None:
    said = kept(leak)
    assert said.count(CANARY) >= 2
    assert "ValidationError" in said and "KeyError" in said


def test_every_op_of_every_job(theirs: Place) -> None:
    definitions = theirs.definitions()
    jobs = {job.name: job for job in definitions.resolve_all_job_defs() if not job.name.startswith("__")}
    jobs[WITHOUT_A_JOB] = definitions.resolve_implicit_global_asset_job_def()
    assert set(jobs) == {*STEPS, *OTHERS, "staging_rehearsal"}
    ops = 0
    with dg.DagsterInstance.ephemeral() as instance:
        for name, job in jobs.items():
            op, config, partition = {**STEPS, **OTHERS}.get(name, ("", {}, None))
            alone = name == WITHOUT_A_JOB
            for node in (
                [op] if alone or (name in STEPS and len(job.nodes) == 1) else [n.name for n in job.nodes]
            ):
                options: dict[str, Any] = {"config": dict(config)} if node == op and config else {}
                several = len(job.nodes) > 1 and not alone
                inputs = job.graph.node_named(node).definition.input_dict if several else ()
                if inputs:
                    plan = {name: {"value": value} for name, value in PLAN.items()}
                    options["inputs"] = dict.fromkeys(inputs, plan)
                result = job.execute_in_process(
                    instance=instance,
                    run_config={"ops": {node: options}} if options else {},
                    asset_selection=[dg.AssetKey(name)] if alone else None,
                    op_selection=[node] if several else None,
                    partition_key=partition,
                    raise_on_error=False,
                )
                records = instance.get_records_for_run(result.run_id).records
                events = "\n".join(serialize_value(record.event_log_entry) for record in records)
                (failure,) = [e.step_failure_data for e in result.all_events if e.is_step_failure]
                assert failure.user_failure_data is not None, (name, node)
                assert "Unexpected KeyError" in str(failure.user_failure_data.description), (name, node)
                assert CANARY not in events, (name, node)
                ops += 1
    assert ops >= len(jobs) + 15


def test_every_sensor_and_schedule(theirs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    definitions = theirs.definitions()
    repository = definitions.get_repository_def()
    with theirs.instance() as instance:
        for sensor in repository.sensor_defs:
            with dg.build_sensor_context(
                instance=instance,
                definitions=definitions,
                sensor_name=sensor.name,
                resources={"target": TargetResource()},
            ) as context:
                said = kept(lambda: sensor.evaluate_tick(context))  # noqa: B023
            assert "Unexpected KeyError" in said and CANARY not in said, sensor.name
        monkeypatch.setattr(dg.DagsterInstance, "get_runs", leak)
        for schedule in repository.schedule_defs:
            if schedule.name in {"key_rotation", "slow_queries"}:
                continue  # have no function: they launch a job at their time, and nothing else
            with dg.build_schedule_context(instance=instance, repository_def=repository) as ticking:
                said = kept(lambda: schedule.evaluate_tick(ticking))  # noqa: B023
            assert "Unexpected KeyError" in said and CANARY not in said, schedule.name
        assert {schedule.name for schedule in repository.schedule_defs} == {
            *("key_rotation", "slow_queries"),
            "staging_rehearsal_schedule",
        }
    assert len(list(repository.sensor_defs)) >= 7


@pytest.mark.parametrize(
    "text",
    [
        f"tables: [{CANARY}",
        f"{CANARY}",
        f"tables: *{CANARY}",
        f"tables: !{CANARY} x",
        f"tables:\n  - name: users\n    columns: {CANARY}\n",
        f"tables:\n  - name: users\n    columns:\n    - name: mail\n      context: 'a\t{CANARY}'\n",
        f"tables:\n\t{CANARY}",
        f'tables: "\\{CANARY}"',
    ],
)
def test_a_bad_catalogue(theirs: Place, text: str) -> None:
    """Somebody may have named another file: of what it holds, no more than names of keys is told."""
    theirs.extra = {"ALPHAPULSE_ENCRYPTION_CATALOGUE": str(theirs.catalogue_file(text))}
    with theirs.in_environment():
        said = kept(defs)
    assert "catalogue" in said
    assert CANARY not in said


@pytest.mark.parametrize(
    "variable",
    ["ALPHAPULSE_BATCH_RANGES", "ALPHAPULSE_ROTATION_SCHEDULE", "ALPHAPULSE_REHEARSAL_SCHEDULE"],
)
def test_a_bad_variable(theirs: Place, variable: str) -> None:
    theirs.extra = {variable: CANARY}
    with theirs.in_environment():
        said = kept(defs)
    assert variable in said
    assert CANARY not in said


def test_any_other_error_while_loading(theirs: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphapulse_encryption.definitions.build_assets", leak)
    with theirs.in_environment():
        said = kept(defs)
    assert "Unexpected KeyError" in said and "test_every_definition.py" in said
    assert CANARY not in said


def test_no_configuration_asks_for_a_secret(theirs: Place) -> None:
    """Dagster keeps run configuration as it was typed."""
    definitions = theirs.definitions()
    names: set[str] = set()

    def collect(schema: Any) -> None:
        for name, field in getattr(schema, "fields", {}).items():
            names.add(name)
            collect(field.config_type)
        for inner in getattr(schema, "type_params", None) or ():
            collect(inner)

    for job in definitions.resolve_all_job_defs():
        for snapshot in job.run_config_schema.run_config_schema_type.type_iterator():
            collect(snapshot)
    assert {"tables", "approver", "batch_size"} <= names
    wanted = re.compile(r"password|secret|dsn|url|uri|conninfo|key$|token|credential")
    assert {name for name in names if wanted.search(name)} == set()
