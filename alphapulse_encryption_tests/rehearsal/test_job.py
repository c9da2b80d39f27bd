"""The whole circle on a clone, seen from outside: what it does, what it leaves, and what it never touches."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

import dagster as dg
import psycopg
import pytest
from dagster._core.definitions.reconstruct import ReconstructableRepository

from alphapulse_encryption.rehearsal import stages
from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration.walk import query, value
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import FIRST, JOB, STAGING, clones, contents, last, rehearse

ROWS = {"users": 300, "trading_accounts": 300, "positions": 600, "trades": 1650, "api_keys": 150}


def test_the_whole_circle(sample: Place) -> None:
    before, dump = contents(sample.url), sample.dump()
    with sample.instance() as instance:
        outcome = rehearse(sample, instance)
        assert (outcome.problems, outcome.succeeded) == ((), True)
        (found,) = history.read(instance)
        told = {key.to_user_string() for key in instance.event_log_storage.all_asset_keys()}
    # Nothing is told of the assets of the target.
    assert told == {"staging_rehearsal"}
    # There is a page of it, and one of all of them.
    page = sample.state / "rehearsals" / outcome.run_id / "index.html"
    assert "unchanged: its tables had the same checksums" in page.read_text()
    assert f'href="{outcome.run_id}/index.html"' in (page.parent.parent / "history.html").read_text()
    # The source is as it was, and nothing is left beside it.
    assert (contents(sample.url), sample.dump()) == (before, dump)
    databases = query(sample.url, "SELECT datname FROM pg_database")
    assert [name for (name,) in databases if "rehearsal" in name or "drill" in name] == []
    assert list(sample.state.rglob("*.dump.age*")) == []

    assert [measure.stage for measure in found.stages] == list(Stage)
    assert (found.run_id, found.failed_stage, found.source_unchanged) == (outcome.run_id, None, True)
    assert found.circumstances.cloned_by == "dump and restore"
    assert {table: size.rows for table, size in found.before.tables.items()} == ROWS
    for stage in (Stage.BACKFILL, Stage.VERIFY, Stage.RESTORE, Stage.VERIFY_AGAIN):
        measure = found.stage(stage)
        assert measure is not None
        assert {table: work.rows for table, work in measure.tables.items()} == ROWS
        assert measure.seconds > 0
    backfill, verify = found.stage(Stage.BACKFILL), found.stage(Stage.VERIFY)
    assert backfill is not None and verify is not None
    for measure in (backfill, verify):
        for work in measure.tables.values():
            assert 0 < work.seconds <= measure.seconds
    assert backfill.wal > 1_000_000
    assert all(
        backfill.sizes is not None and size.heap > found.before.tables[table].heap
        for table, size in (backfill.sizes.tables if backfill.sizes else {}).items()
    )
    for measure in found.stages:
        assert measure.attempts == 1
        assert measure.started <= measure.ended
        assert (measure.sizes is None) == (measure.stage is Stage.REMOVAL)
    findings = [finding for measure in found.stages for finding in measure.findings]
    assert {finding.level for finding in findings} == {"warning", "note"}
    assert any("public.users_last_name_idx" in finding.what for finding in findings)
    assert not [finding for finding in findings if "remain" in finding.what]


@pytest.mark.long
def test_dumped_and_restored_where_others_are_connected(
    small: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a connection that stays."""
    before = contents(small.url)
    name = value(small.url, "SELECT current_database()")
    query(small.url, f"ALTER DATABASE {name} SET work_mem = '5MB'")
    query(small.url, f"ALTER DATABASE {name} SET search_path = '$user', crm, public")
    seen: list[tuple[str, str, bool]] = []

    def look(at: stages.Rehearsing) -> None:
        with psycopg.connect(at.target.database.conninfo) as connection:
            row = connection.execute(
                "SELECT current_setting('work_mem'), current_setting('search_path'), "
                "has_database_privilege('pg_monitor', current_database(), 'CONNECT')"
            ).fetchone()
            assert row is not None
            seen.append(row)

    watched = stages.Plan("", ("off", look))
    monkeypatch.setattr(stages, "PLANS", {**stages.PLANS, Stage.BASELINE: watched})
    with psycopg.connect(small.url) as connection, small.instance() as instance:
        connection.execute("SELECT 1")
        outcome = rehearse(small, instance, tables=["sessions"])
        assert outcome.problems == ()
        found = last(instance)
    assert seen == [("5MB", '"$user", crm, public', False)]
    assert found.source_unchanged is True
    assert contents(small.url) == before
    assert clones(small) == []


@pytest.mark.long
def test_a_catalogue_of_awkward_names(small: Place) -> None:
    before = contents(small.url)
    with small.instance() as instance:
        outcome = rehearse(small, instance)
        assert outcome.problems == ()
        found = last(instance)
    assert {table: size.rows for table, size in found.before.tables.items()} == {
        "sessions": 60,
        "crm.order_lines": 90,
        "crm.Kunde": 50,
    }
    assert found.source_unchanged is True
    assert contents(small.url) == before


def failing(stage: Stage, error: Callable[[], None]) -> dict[Stage, stages.Plan]:
    """The stages, with one that does its work and then fails."""
    plan = stages.PLANS[stage]
    (phases, work), *others = plan.parts

    def fail(at: stages.Rehearsing) -> None:
        work(at)
        error()

    return {**stages.PLANS, stage: stages.Plan(plan.description, (phases, fail), *others)}


def test_failed_and_executed_again_from_failure(small: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with small.instance() as instance:

        def refuse() -> None:
            raise ValueError("a value of somebody's: secret@example.com")

        with monkeypatch.context() as patch:
            patch.setattr(stages, "PLANS", failing(Stage.VIEWS, refuse))
            outcome = rehearse(small, instance, tables=["sessions"])
        assert not outcome.succeeded
        (failed,) = history.read(instance)
        assert (failed.failed_stage, failed.run_id) == (Stage.VIEWS, outcome.run_id)
        assert failed.failure.startswith("Unexpected ValueError")
        assert [measure.stage for measure in failed.stages] == list(Stage)[:7]
        assert "secret" not in failed.model_dump_json()
        (clone,) = clones(small)
        assert clone == f"alphapulse_rehearsal_{outcome.run_id[:8]}"

        again = execute_again(instance, outcome.run_id)
        assert again.success
        assert {event.step_key for event in again.all_events if event.is_step_start} == set(list(Stage)[7:])
        found = last(instance)
    assert (found.failed_stage, found.run_id, found.source_unchanged) == (None, again.run_id, True)
    assert [measure.stage for measure in found.stages] == list(Stage)
    views = found.stage(Stage.VIEWS)
    assert views is not None and views.attempts == 2
    assert clones(small) == []
    assert list(small.state.rglob("*.dump.age*")) == []


def execute_again(instance: dg.DagsterInstance, run_id: str) -> dg.JobExecutionResult:
    """Re-execute from failure, as the UI's button does."""
    repository = ReconstructableRepository.for_module("alphapulse_encryption.definitions", "defs")
    return dg.execute_job(
        repository.get_reconstructable_job(JOB),
        instance=instance,
        reexecution_options=dg.ReexecutionOptions.from_failure(run_id, instance),
    )


def test_a_retry_without_its_clone_says_what_to_do(small: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with small.instance() as instance:

        def refuse() -> None:
            raise ValueError

        with monkeypatch.context() as patch:
            patch.setattr(stages, "PLANS", failing(Stage.BASELINE, refuse))
            outcome = rehearse(small, instance, tables=["sessions"])
        (name,) = clones(small)
        query(small.postgres.url("postgres"), f"DROP DATABASE {name}")
        again = execute_again(instance, outcome.run_id)
        (problem,) = [event.step_failure_data for event in again.all_events if event.is_step_failure]
        assert problem.user_failure_data is not None
        assert "Re-execute the whole rehearsal" in str(problem.user_failure_data.description)
        # It was no rehearsal.
        assert len(history.read(instance)) == 1


def test_cancelled(small: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the UI's Terminate does it: the clone goes at once, and so does the backup."""
    before = contents(small.url)

    def interrupt() -> None:
        assert len(clones(small)) == 1
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait(60)

    monkeypatch.setattr(stages, "PLANS", failing(Stage.BACKUP, interrupt))
    with small.instance() as instance:
        outcome = rehearse(small, instance, tables=["sessions"])
        assert (outcome.succeeded, outcome.interrupted) == (False, True)
        assert history.read(instance) == ()
    assert clones(small) == []
    assert list(small.state.rglob("*.dump.age*")) == []
    assert contents(small.url) == before


def test_what_the_clone_says_of_another_key(small: Place) -> None:
    """Begun with another key, the staging database cannot be rehearsed with this one; the target does not matter."""
    other = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": another.MASTER_KEY_TEXT}
    with_another = {**small.extra, **other}
    url = small.url
    small.extra = {**with_another, "ALPHAPULSE_DATABASE_URL": url, STAGING: None}
    small.succeeds("--add-columns")
    small.extra = {"ALPHAPULSE_DATABASE_URL": None, STAGING: url}
    before = contents(small.url)
    with small.instance() as instance:
        outcome = rehearse(small, instance)
        assert not outcome.succeeded
        found = last(instance)
    assert found.failed_stage is Stage.PREFLIGHT
    assert "is not the one this database was begun" in found.failure
    assert any(finding.level == "blocker" and finding.subject == "key" for finding in found.findings)
    (begun, *_) = found.stages
    assert any("was begun on the staging database" in finding.what for finding in begun.findings)
    assert contents(small.url) == before


def test_what_production_tells(small: Place, postgres: EmbeddedPostgres) -> None:
    """It is looked at and never changed: its size, and what the checklist finds there alone."""
    for url in fresh_database(postgres, value(small.url, "SELECT current_database()")):
        query(url, 'CREATE VIEW addresses AS SELECT "E-Mail" FROM crm."Kunde"')
        query(url, "INSERT INTO crm.order_lines SELECT o, 4, 1, 'x' FROM generate_series(1, 500) o")
        query(url, "ANALYZE")
        small.extra["ALPHAPULSE_DATABASE_URL"] = url
        before, dump = contents(url), small.dump(url)
        with small.instance() as instance:
            outcome = rehearse(
                small, instance, tables=["crm.Kunde", "crm.order_lines"], production_rows={"crm.Kunde": 100}
            )
            assert outcome.problems == ()
            found = last(instance)
        assert (contents(url), small.dump(url)) == (before, dump)
    assert found.production is not None
    assert {table: size.rows for table, size in found.production.tables.items()} == {
        "crm.Kunde": 100,
        "crm.order_lines": 590,
    }
    (clone, _, preflight, *_) = found.stages
    assert any("on the server of ALPHAPULSE_DATABASE_URL" in finding.what for finding in clone.findings)
    there = {
        finding.subject: finding.what for finding in preflight.findings if "on production" in finding.what
    }
    assert set(there) == {"crm.Kunde.E-Mail", "privileges"}
    assert "addresses" in there["crm.Kunde.E-Mail"]
    # On its clone no role is one.
    assert "superuser" in there["privileges"]


def test_names_of_steps(small: Place) -> None:
    definition = small.definitions().resolve_job_def(JOB)
    assert [node.name for node in definition.nodes_in_topological_order] == list(Stage)
    assert FIRST == Stage.CLONE
