"""The guide's steps are declared once: whatever lists them finds a new one by itself."""

from __future__ import annotations

import argparse
import re

import psycopg
import pytest
from dagster import AssetKey

from alphapulse_encryption import guide
from alphapulse_encryption.cli.commands.parser import build_parser, check_usage
from alphapulse_encryption.cli.reports.plan import _PLANNED
from alphapulse_encryption.definitions import build_defs
from alphapulse_encryption.guide import Needs, Stage, Step
from alphapulse_encryption.lifecycle import TRANSITIONS
from alphapulse_encryption.migration.gates.roles import RIGHTS, roles_sql
from alphapulse_encryption.migration.insight.plan import Plan, make_plan
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.measures import DAY
from alphapulse_encryption_tests.migration import support

NEW = Step(
    "look_twice",
    "step 4½: look at every table once more",
    Needs("verifier", "read", ("audit",)),
    (
        Stage(
            "look_twice",
            "verified_table",
            "table",
            ("workers",),
            plan=("second look", "Second look"),
        ),
    ),
    before="create_views",
)


@pytest.fixture
def with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = list(guide.STEPS)
    steps.insert(steps.index(guide.step("create_views")), NEW)
    monkeypatch.setattr(guide, "STEPS", tuple(steps))


def test_a_new_step_is_in_the_help_and_its_options_are_checked(
    with_another: None, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = build_parser()
    assert re.search(r"--look-twice +step 4½: look at every table once more\n", parser.format_help())
    options: argparse.Namespace = parser.parse_args(["--look-twice", "--workers", "2"])
    check_usage(parser, options)
    assert options.look_twice
    with pytest.raises(SystemExit):
        check_usage(parser, parser.parse_args(["--look-twice", "--hold"]))
    with pytest.raises(SystemExit):
        check_usage(parser, parser.parse_args(["--add-columns", "--workers", "2"]))
    assert "--workers goes with --migrate-data or --verify or --look-twice or" in capsys.readouterr().err
    names = [step.name for step in guide.in_running_order()]
    assert names[names.index("look_twice") + 1] == "create_views"


def test_a_new_step_is_a_job(with_another: None) -> None:
    job = build_defs().get_repository_def().get_job("look_twice")
    assert job.asset_layer.executable_asset_keys == {AssetKey("verified_table")}
    assert job.description == "Step 4½: look at every table once more (--look-twice)."


def test_a_new_step_is_in_the_plan_and_in_the_roles_script(with_another: None, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE notes (id bigint PRIMARY KEY, body text)")
        script = roles_sql(connection, support.CATALOGUE)
    assert re.search(r"^-- alphapulse_verifier runs .*--look-twice", script, re.MULTILINE)
    assert re.search(
        r"GRANT INSERT .* ON \"alphapulse_encryption\".\"audit_log\" TO \"alphapulse_verifier\"", script
    )
    plan = make_plan(Database(database_url), support.CATALOGUE.tables, None, batch_ranges=2)
    names = [step.name for step in plan.tables[0].steps]
    assert names[names.index("second look") + 1] == "views"
    assert {step.command for step in plan.tables[0].steps if step.name == "second look"} == {"--look-twice"}
    schema = Plan.model_json_schema(mode="serialization")
    assert "second look" in schema["$defs"]["Step"]["properties"]["name"]["enum"]


def test_what_is_declared_elsewhere_is_of_the_guide() -> None:
    flags = {step.flag for step in guide.STEPS}
    assert {transition.step for transition in TRANSITIONS} <= flags
    assert {_PLANNED.get(stage.value, stage.value) for stage in DAY} >= set(guide.planned())
    assert {right for step in guide.STEPS for right in step.needs.rights} == set(RIGHTS)


def test_steps_run_in_the_guides_order() -> None:
    assert [step.name for step in guide.in_running_order()] == [
        *("rotate_keys", "replan", "preflight", "backup", "add_columns", "repair_mismatched", "migrate_data"),
        *("verify", "live_check", "benchmark_queries", "create_views", "switch_to_encrypted"),
        *("revoke_approval", "approve_drop", "drop_unencrypted", "erase_dropped", "revert_to_plaintext"),
        *("restore_plaintext", "rebuild_indexes", "analyze"),
    ]
