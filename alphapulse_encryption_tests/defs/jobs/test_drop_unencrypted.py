"""The jobs of a drop, launched as the UI does: once means once, whatever is re-executed."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import dagster as dg
import psycopg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository

from alphapulse_encryption.migration.bookkeeping.limits import change_limits
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.place import Place, place

USERS = walk.CATALOGUE.table("users")
MASTER_KEY = base64.b64encode(bytes(range(32))).decode()
CHECKSUM = (
    "SELECT md5(string_agg(u.id || u.email || coalesce(u.phone_number, '-'), ',' ORDER BY id)) FROM users u"
)


@pytest.fixture
def sample(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, sample_url, server_dir.parent, MASTER_KEY) as found:
        found.ranges = walk.RANGES
        yield found


def run(
    instance: dg.DagsterInstance, name: str, op: str, config: Mapping[str, object], parent: str | None = None
) -> dg.JobExecutionResult:
    """Run a job, or re-execute a run of it with the very same configuration."""
    job = ReconstructableRepository.for_module(
        "alphapulse_encryption.definitions", "defs"
    ).get_reconstructable_job(name)
    again = dg.ReexecutionOptions(parent_run_id=parent) if parent else None
    run_config = {"ops": {op: {"config": dict(config)}}}
    with dg.execute_job(job, instance, run_config=run_config, reexecution_options=again) as result:
        return result


def problem(result: dg.JobExecutionResult) -> str:
    """What the failed step says of itself."""
    assert not result.success
    (failure,) = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    assert failure.user_failure_data is not None
    return str(failure.user_failure_data.description)


def logged(instance: dg.DagsterInstance, result: dg.JobExecutionResult) -> str:
    """What the run has written to its log."""
    return "\n".join(
        entry.user_message for entry in instance.all_logs(result.run_id) if not entry.is_dagster_event
    )


def columns(url: str) -> set[str]:
    return {
        name
        for (name,) in walk.query(
            url, "SELECT column_name FROM information_schema.columns WHERE table_name = 'users'"
        )
    }


def test_nobody_approves_over_the_role_of_the_runs(sample: Place) -> None:
    """As the UI does: by two typed names, with whatever tags; only a command's own run is its person's."""
    url = sample.url
    walk.switch(url, USERS)
    walk.backup(url, (USERS,), sample.state / "backups", sample.postgres.bin_dir())
    approval = {"table": "users", "approver": "Ada", "reason": "done", "confirmation": "users"}
    with sample.instance() as instance:
        told = problem(run(instance, "approve_drop", "approve", approval))
        assert "postgres" in told and "--approve-drop --table users" in told
    assert walk.value(url, "SELECT count(*) FROM alphapulse_encryption.approvals") == 0
    with psycopg.connect(sample.postgres.url("postgres"), autocommit=True) as connection:
        connection.execute("CREATE ROLE ada_alone LOGIN SUPERUSER")
    try:
        answers = ("--approver", "Ada", "--reason", "done", "--confirmation", "users")
        ada = url.replace("//postgres@", "//ada_alone@", 1)
        # The command gives it itself, also where workers execute runs, over a role of theirs: here there are none.
        own = {"ALPHAPULSE_DATABASE_URL": ada, "ALPHAPULSE_RUN_LAUNCHER": "celery"}
        sample.succeeds("--approve-drop", "--table", "users", *answers, **own)
        drop = ("--drop-unencrypted", "--confirm", "--table", "users", "--operator", "Grace")
        same = sample.fails(1, *drop, ALPHAPULSE_DATABASE_URL=ada)
        assert "role ada_alone" in same.stdout
        assert "email" in columns(url)
        sample.succeeds(*drop)
        assert "email" not in columns(url)
    finally:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP OWNED BY ada_alone; DROP ROLE ada_alone")


def test_an_approval_is_used_once(sample: Place) -> None:
    url = sample.url
    before = walk.value(url, CHECKSUM)
    walk.switch(url, USERS)
    walk.backup(url, (USERS,), sample.state / "backups", sample.postgres.bin_dir())
    change_limits(Database(url), {"two_person_rule": "names"}, support.ACTOR)
    tables = {"tables": ["users"]}
    drop = {**tables, "operator": "Grace"}
    approval = {"table": "users", "approver": "Ada", "reason": "done"}
    with sample.instance() as instance:
        assert "no approval" in problem(run(instance, "drop_unencrypted", "drop", drop))
        mistyped = run(instance, "approve_drop", "approve", {**approval, "confirmation": "user"})
        assert "Type users exactly" in problem(mistyped)
        assert walk.value(url, "SELECT count(*) FROM alphapulse_encryption.approvals") == 0

        # What would go is said before anything is approved.
        assert "Dropping the plaintext of users removes" in logged(instance, mistyped)

        given = {**approval, "confirmation": "users", "valid_hours": 1.5}
        assert run(instance, "approve_drop", "approve", given).success
        assert walk.query(
            url, "SELECT expires_at - approved_at = interval '90 min' FROM alphapulse_encryption.approvals"
        ) == [(True,)]
        alone = {**tables, "operator": "ada"}
        assert "Ada approved the drop of users" in problem(run(instance, "drop_unencrypted", "drop", alone))
        assert "say who drops" in problem(run(instance, "drop_unencrypted", "drop", tables))
        taken_back = {"approval": 1, "operator": "Grace", "reason": "not yet"}
        assert run(instance, "revoke_approval", "revoke", taken_back).success
        assert "could be revoked" in problem(run(instance, "revoke_approval", "revoke", taken_back))
        assert "the last one was revoked" in problem(run(instance, "drop_unencrypted", "drop", drop))
        listed = run(instance, "list_approvals", "list", {})
        assert "approval 1 of users: revoked by Grace" in logged(instance, listed)

        assert run(instance, "approve_drop", "approve", given).success
        dropped = run(instance, "drop_unencrypted", "drop", drop)
        assert dropped.success
        assert "email" not in columns(url)
        (event,) = instance.fetch_materializations(dg.AssetKey("plaintext_dropped"), limit=10).records
        assert event.partition_key == "users"
        assert event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        assert (metadata["approved_by"].value, metadata["dropped_by"].value) == ("Ada", "Grace")
        assert set(cast("list[str]", metadata["columns_dropped"].value)) == {
            column.name for column in USERS.columns
        }

        # Done already: run again with the same configuration, it changes nothing.
        again = run(instance, "drop_unencrypted", "drop", drop, parent=dropped.run_id)
        assert again.success
        assert instance.get_run_by_id(again.run_id).parent_run_id == dropped.run_id  # type: ignore[union-attr]
        assert walk.query(
            url,
            "SELECT action, count(*)::int FROM alphapulse_encryption.audit_log WHERE action LIKE "
            "'%drop%' GROUP BY 1 ORDER BY 1",
        ) == [("approve_drop", 2), ("drop_plaintext", 1)]
        assert len(instance.fetch_materializations(dg.AssetKey("plaintext_dropped"), limit=10).records) == 1

        restored = run(instance, "restore_plaintext", "restore", tables)
        assert restored.success
        assert walk.value(url, CHECKSUM) == before

        # The run that dropped, re-executed: its approval is used up. So is that of a switch made anew.
        assert "was used already" in problem(
            run(instance, "drop_unencrypted", "drop", drop, parent=dropped.run_id)
        )
        switched = run(instance, "switch_to_ciphertext", "switch", tables)
        assert switched.success
        assert "was used already" in problem(
            run(instance, "drop_unencrypted", "drop", drop, parent=dropped.run_id)
        )
        assert walk.value(url, CHECKSUM) == before
        assert run(instance, "revert_to_plaintext", "revert", tables).success
        assert (
            walk.value(url, "SELECT authority FROM alphapulse_encryption.tables WHERE table_name = 'users'")
            == "plaintext"
        )
        assert walk.value(url, CHECKSUM) == before
        retries = [
            each for each in instance.get_runs() if each.tags.get("dagster/will_retry", "false") != "false"
        ]
        assert retries == []


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("switch_to_ciphertext", "switch"),
        ("revert_to_plaintext", "revert"),
        ("drop_unencrypted", "drop"),
        ("restore_plaintext", "restore"),
    ],
)
def test_tables_have_to_be_named(sample: Place, name: str, op: str) -> None:
    before = sample.dump()
    with sample.instance() as instance:
        with pytest.raises(dg.DagsterInvalidConfigError):
            run(instance, name, op, {})
        assert "Name at least one table: trading_accounts," in problem(
            run(instance, name, op, {"tables": []})
        )
        assert "unknown table 'nobody'" in problem(run(instance, name, op, {"tables": ["nobody"]}))
        assert "no encrypted columns yet" in problem(run(instance, name, op, {"tables": ["users"]}))
    assert sample.dump() == before
