"""The table of contents: the asset graph and the jobs, as a whole, so that no change of them goes unnoticed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.definitions.dependency import NodeHandle

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.defs.resources.instance import packaged_file
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.rehearsal.measures import Stage

TABLES = ["trading_accounts", "positions", "trades", "users", "api_keys"]
RANGES = [f"{number:02d}" for number in range(16)]
BY_TABLE = {"table": TABLES}
BY_RANGE = {"batch_range": RANGES, "table": TABLES}

# Asset: group, what it depends on, dimensions of its partitions, kinds.
GRAPH: dict[str, tuple[str, set[str], dict[str, list[str]], set[str]]] = {
    "staging_rehearsal": ("rehearsal", set(), {}, set()),
    "preflight": ("step_1_prepare", set(), {}, {"postgres"}),
    "backup": ("step_1_prepare", {"preflight"}, {}, {"postgres", "age"}),
    "encrypted_columns": ("step_2_columns", {"preflight", "backup"}, BY_TABLE, {"postgres"}),
    "encrypted_data": ("step_3_migrate", {"encrypted_columns"}, BY_RANGE, {"postgres"}),
    "search_indexes": ("step_3_migrate", {"encrypted_data"}, BY_TABLE, {"postgres"}),
    "verified_data": ("step_4_verify", {"encrypted_data", "search_indexes"}, BY_RANGE, {"postgres"}),
    "verified_table": ("step_4_verify", {"verified_data"}, BY_TABLE, {"postgres"}),
    "compatibility_views": ("step_6_views", {"verified_table"}, BY_TABLE, {"postgres"}),
    "slow_encrypted_queries": ("step_7_monitor", {"compatibility_views"}, {}, {"postgres"}),
    "plaintext_dropped": ("step_8_drop", {"verified_table", "compatibility_views"}, BY_TABLE, set()),
    "rotated_data": ("upkeep", {"verified_table"}, BY_RANGE, {"postgres"}),
}
ASSET_JOBS = {
    "run_preflight": "preflight",
    "take_backup": "backup",
    "add_columns": "encrypted_columns",
    "migrate_data": "encrypted_data",
    "build_indexes": "search_indexes",
    "verify_data": "verified_data",
    "verify_tables": "verified_table",
    "create_views": "compatibility_views",
    "look_for_slow_queries": "slow_encrypted_queries",
}
# Reported by jobs; nobody can make them.
EXTERNAL = {"plaintext_dropped", "staging_rehearsal"}
# Jobs that a person starts on purpose, with their ops.
OP_JOBS = {
    "switch_to_ciphertext": "switch",
    "revert_to_plaintext": "revert",
    "approve_drop": "approve",
    "revoke_approval": "revoke",
    "list_approvals": "list",
    "drop_unencrypted": "drop",
    "erase_dropped": "erase",
    "restore_plaintext": "restore",
    "change_settings": "change",
    "replan_ranges": "replan",
    "repair_mismatched": "repair",
    "rotate_keys": "begin reencrypt verify retire",
    "live_check": "check",
    "benchmark_queries": "benchmark",
    "analyze_tables": "analyze",
    "reindex_tables": "rebuild",
    "staging_rehearsal": " ".join(Stage),
}


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    for name in os.environ:
        if name.startswith(("ALPHAPULSE_", "DAGSTER_")):
            monkeypatch.delenv(name)
    return build_defs()


def dimensions(partitions: dg.PartitionsDefinition[str] | None) -> dict[str, list[str]]:
    if partitions is None:
        return {}
    if isinstance(partitions, dg.MultiPartitionsDefinition):
        return {
            dimension.name: list(dimension.partitions_def.get_partition_keys())
            for dimension in partitions.partitions_defs
        }
    return {"table": list(partitions.get_partition_keys())}


def test_the_graph(definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    found = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        parents = {parent.to_user_string() for parent in node.parent_keys}
        kinds = {str(kind) for kind in node.kinds}
        found[key.to_user_string()] = (node.group_name, parents, dimensions(node.partitions_def), kinds)
        assert node.description
    assert found == GRAPH
    groups = [group for group, *_ in GRAPH.values()]
    assert groups == sorted(groups)
    for name in GRAPH:
        node = graph.get(dg.AssetKey(name))
        made_here = name not in EXTERNAL
        assert (node.is_executable, node.is_materializable, node.is_external) == (
            made_here,
            made_here,
            not made_here,
        )
        assert node.pools == ({"target_database"} if made_here else None)
    checks = {key.name for key in graph.get(dg.AssetKey("verified_table")).check_keys}
    assert checks == {
        *("every_range_verified", "nothing_pending", "every_value_matches", "every_token_matches"),
        *("row_counts_match", "fresh"),
    }


@pytest.mark.parametrize(
    ("downstream", "partition", "upstream", "needs"),
    [
        ("encrypted_data", "03|users", "encrypted_columns", {"users"}),
        ("search_indexes", "users", "encrypted_data", {f"{number}|users" for number in RANGES}),
        ("verified_data", "03|users", "encrypted_data", {"03|users"}),
        ("verified_data", "03|users", "search_indexes", {"users"}),
        ("verified_table", "users", "verified_data", {f"{number}|users" for number in RANGES}),
        ("compatibility_views", "users", "verified_table", {"users"}),
        ("plaintext_dropped", "users", "verified_table", {"users"}),
        ("rotated_data", "03|users", "verified_table", {"users"}),
    ],
)
def test_which_partitions_depend_on_which(
    definitions: dg.Definitions, downstream: str, partition: str, upstream: str, needs: set[str]
) -> None:
    graph = definitions.resolve_asset_graph()
    below, above = graph.get(dg.AssetKey(downstream)), graph.get(dg.AssetKey(upstream))
    assert below.partitions_def is not None and above.partitions_def is not None
    mapping = graph.get_partition_mapping(below.key, above.key)
    wanted = mapping.get_upstream_mapped_partitions_result_for_partitions(
        below.partitions_def.subset_with_partition_keys([partition]),
        below.partitions_def,
        above.partitions_def,
    )
    assert set(wanted.partitions_subset.get_partition_keys()) == needs


def test_the_jobs(definitions: dg.Definitions) -> None:
    jobs = {job.name: job for job in definitions.get_repository_def().get_all_jobs()}
    assert set(jobs) == {"__ASSET_JOB", *ASSET_JOBS, *OP_JOBS}
    assert {job.executor_def.name for job in jobs.values()} == {"in_process"}
    assert all(job.description for name, job in jobs.items() if name != "__ASSET_JOB")

    for name, asset in ASSET_JOBS.items():
        assert {node.name for node in jobs[name].nodes} == {asset}
        assert jobs[name].asset_layer.executable_asset_keys == {dg.AssetKey(asset)}
    everything = set(GRAPH) - EXTERNAL
    assert {node.name for node in jobs["__ASSET_JOB"].nodes} == everything

    for name, ops in OP_JOBS.items():
        job = jobs[name]
        assert {node.name for node in job.nodes} == set(ops.split())
        assert not job.asset_layer.executable_asset_keys
        # Nothing starts them again by itself.
        assert job.run_tags == {"dagster/max_retries": "0"}
        assert job.op_retry_policy is None
        assert {job.get_retry_policy_for_handle(NodeHandle(op, None)) for op in ops.split()} == {None}
    instance = yaml.safe_load(packaged_file("dagster.yaml").read_text())
    assert instance["run_retries"]["retry_on_asset_or_op_failure"] is False
    assert instance["run_retries"]["max_retries"] == 0


def test_only_a_person_reaches_the_drop(definitions: dg.Definitions) -> None:
    repository = definitions.get_repository_def()
    dropping = {job.name for job in repository.get_all_jobs() if "drop" in {node.name for node in job.nodes}}
    # A rehearsal drops on a clone that it made itself.
    assert dropping == {"drop_unencrypted", "staging_rehearsal"}
    # Materialize all, of the graph or of a part of it, is a run of this job, or a backfill of its assets.
    everything = repository.get_implicit_global_asset_job_def()
    assert dg.AssetKey("plaintext_dropped") not in everything.asset_layer.executable_asset_keys
    # Without partitions there is nothing to backfill.
    assert repository.get_job("drop_unencrypted").partitions_def is None
    assert repository.get_job("approve_drop").partitions_def is None
    by_themselves = {target.job_name for sensor in repository.sensor_defs for target in sensor.targets}
    by_themselves |= {schedule.job_name for schedule in repository.schedule_defs}
    assert by_themselves == {"migrate_data", "rotate_keys", "staging_rehearsal", "look_for_slow_queries"}
    graph = repository.asset_graph
    assert [
        key for key in graph.get_all_asset_keys() if graph.get(key).automation_condition is not None
    ] == []
    # What the drop is started with by mistake is refused: no table is named in the launchpad.
    assert repository.get_job("drop_unencrypted").run_config == {
        "ops": {"drop": {"config": {"tables": [], "operator": ""}}}
    }


def test_the_sensors(definitions: dg.Definitions) -> None:
    sensors = {sensor.name: sensor for sensor in definitions.get_repository_def().sensor_defs}
    # What they launch: alerts tell a person, and launch nothing.
    assert {name: [target.job_name for target in sensor.targets] for name, sensor in sensors.items()} == {
        "pending_rows": ["migrate_data"],
        "rehearsal_leftovers": [],
        "alert_failed_runs": [],
        "alert_drift": [],
        "alert_old_pending_rows": [],
        "alert_keys": [],
        "alert_approvals": [],
    }
    running = {name for name, s in sensors.items() if s.default_status is dg.DefaultSensorStatus.RUNNING}
    assert running == {"rehearsal_leftovers"}
    assert all(sensor.description for sensor in sensors.values())


@pytest.mark.parametrize(
    ("name", "job", "cron", "variable"),
    [
        ("slow_queries", "look_for_slow_queries", "0 * * * *", "ALPHAPULSE_SLOW_QUERIES_SCHEDULE"),
        ("key_rotation", "rotate_keys", "0 3 * * 0", "ALPHAPULSE_ROTATION_SCHEDULE"),
        ("staging_rehearsal_schedule", "staging_rehearsal", "0 2 * * 6", "ALPHAPULSE_REHEARSAL_SCHEDULE"),
    ],
)
def test_the_schedules(
    definitions: dg.Definitions,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    job: str,
    cron: str,
    variable: str,
) -> None:
    schedule = definitions.get_repository_def().get_schedule_def(name)
    assert (schedule.job_name, schedule.cron_schedule) == (job, cron)
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert len(definitions.get_repository_def().schedule_defs) == 3
    monkeypatch.setenv(variable, "30 2 1 * *")
    assert build_defs().get_repository_def().get_schedule_def(name).cron_schedule == "30 2 1 * *"
    monkeypatch.setenv(variable, "sometimes")
    with pytest.raises(ConfigurationError, match=f"^{variable} is not a cron schedule"):
        build_defs()


def test_partitions_follow_catalogue_and_ranges(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "catalogue.yaml"
    path.write_text(
        "tables:\n  - {name: b, columns: [{name: x, context: c}]}\n"
        "  - {name: a B, schema: other, columns: [{name: x, context: c}]}\n"
    )
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_CATALOGUE", str(path))
    monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", "2")
    node = build_defs().resolve_asset_graph().get(dg.AssetKey("encrypted_data"))
    assert dimensions(node.partitions_def) == {"batch_range": ["00", "01"], "table": ["b", "other.a B"]}
    assert load_catalogue(path).keys == ("b", "other.a B")


def test_resources_can_be_exchanged(definitions: dg.Definitions) -> None:
    class Other(dg.ConfigurableResource[object]):
        pass

    other = Other()
    exchanged = build_defs(resource_overrides={"target": other})
    assert exchanged.resources is not None and exchanged.resources["target"] is other
    assert definitions.resources is not None and definitions.resources["target"] is not other


def test_loading_needs_no_key_no_database_and_starts_nothing(server_dir: Path) -> None:
    state = server_dir.parent / "state"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))
    }
    environment |= {
        "ALPHAPULSE_STATE_DIR": str(state),
        "ALPHAPULSE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nothing",
    }
    done = subprocess.run(
        [
            *(sys.executable, "-W", "error::DeprecationWarning:alphapulse_encryption", "-c"),
            "from alphapulse_encryption.definitions import defs\n"
            "print(len(defs().get_repository_def().get_all_jobs()))",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "27\n", "")
    assert not state.exists()
