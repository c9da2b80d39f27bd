"""Leases of runs: who holds one is seen by others, nobody else gets it, and it ends with the holder's session."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.cli.launch import launcher
from alphapulse_encryption.defs.resources import running
from alphapulse_encryption.defs.resources.processes import PROCESS_TAG
from alphapulse_encryption.defs.resources.running import executing, held_leases, run_lease
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place

RUN = "0d9c7f6e-1111-4222-8333-444455556666"
ELSEWHERE = "another-machine.example/4711/1.00"


@pytest.fixture
def here(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        yield found


@pytest.fixture
def instance(here: Place) -> Iterator[dg.DagsterInstance]:
    with here.instance() as found:
        yield found


def sessions(here: Place) -> list[int]:
    rows = support.run(
        here.dagster_url,
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'alphapulse_encryption run lease' "
        "AND datname = current_database()",
    )
    return [pid for (pid,) in rows]


def test_one_holder_at_a_time(here: Place, instance: dg.DagsterInstance) -> None:
    other = RUN.replace("0d9c", "0d9d")
    assert held_leases(instance, [RUN, other]) == frozenset()
    with run_lease(instance, RUN) as first:
        assert first
        assert held_leases(instance, [RUN, other]) == frozenset({RUN})
        with run_lease(instance, RUN) as second, run_lease(instance, other) as third:
            assert (second, third) == (False, True)
            assert held_leases(instance, [RUN, other]) == frozenset({RUN, other})
        # The server lets go of a lock when it has seen that its session ended.
        support.until(lambda: held_leases(instance, [RUN, other]) == frozenset({RUN}), "the other is let go")
    support.until(lambda: held_leases(instance, [RUN, other]) == frozenset(), "both are let go")
    support.until(lambda: sessions(here) == [], "the sessions have ended")


def test_it_ends_with_its_process(here: Place, instance: dg.DagsterInstance) -> None:
    code = (
        "import sys\n"
        "from alphapulse_encryption.defs.resources.instance import open_instance\n"
        "from alphapulse_encryption.defs.resources.running import run_lease\n"
        "with open_instance() as instance, run_lease(instance, sys.argv[1]):\n"
        "    print(flush=True)\n"
        "    input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, RUN],
        env=here.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None and process.stdout.readline()
        assert held_leases(instance, [RUN]) == frozenset({RUN})
        process.kill()
    support.until(lambda: held_leases(instance, [RUN]) == frozenset(), "the server has given it up")


def test_it_is_taken_again_after_the_session_ended(
    here: Place, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SECONDS_BETWEEN_LOOKS", 0.05)
    with run_lease(instance, RUN):
        (before,) = sessions(here)
        with psycopg.connect(here.dagster_url, autocommit=True) as connection:
            connection.execute("SELECT pg_terminate_backend(%s, 10000)", [before])
        support.until(lambda: bool(sessions(here)) and sessions(here) != [before], "another session")
        support.until(lambda: held_leases(instance, [RUN]) == frozenset({RUN}), "it is held again")


def test_a_storage_that_is_away_stops_nobody(
    here: Place, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_storage", lambda _: Database("postgresql://nobody@127.0.0.1:9/nothing"))
    assert held_leases(instance, [RUN]) is None
    with run_lease(instance, RUN) as ours:
        assert ours
    monkeypatch.setattr(running, "_storage", lambda _: None)
    assert held_leases(instance, [RUN]) is None
    with run_lease(instance, RUN) as ours:
        assert ours


def started(here: Place, instance: dg.DagsterInstance, **tags: str) -> dg.DagsterRun:
    job = here.definitions().resolve_job_def("live_check")
    return instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags=tags)


@pytest.mark.parametrize("lives", [True, False], ids=["alive", "gone"])
def test_runs_of_commands_on_other_machines(
    here: Place, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    monkeypatch.setattr("alphapulse_encryption.cli.unfinished.SECONDS_TO_COME_BACK", 0.05)
    run = started(here, instance, **{PROCESS_TAG: ELSEWHERE})
    # A worker's run is Dagster's to look after, whoever executes it.
    workers = started(here, instance)
    with here.in_environment():
        if lives:
            with run_lease(instance, run.run_id), launcher(here.ranges):
                pass
        else:
            with launcher(here.ranges):
                pass
    found = [instance.get_run_by_id(r.run_id) for r in (run, workers)]
    expected = dg.DagsterRunStatus.STARTED if lives else dg.DagsterRunStatus.FAILURE
    assert [r.status for r in found if r is not None] == [expected, dg.DagsterRunStatus.STARTED]


def test_a_machine_of_the_same_name_is_not_this_one(here: Place, instance: dg.DagsterInstance) -> None:
    # Its number is that of no process here, or of another one: only the lease tells.
    import platform

    run = started(here, instance, **{PROCESS_TAG: f"{platform.node()}/{os.getpid()}/1.00"})
    with here.in_environment(), run_lease(instance, run.run_id), launcher(here.ranges):
        pass
    found = instance.get_run_by_id(run.run_id)
    assert found is not None and found.status is dg.DagsterRunStatus.STARTED


def test_who_is_taken_for_dead_stops(
    here: Place, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alphapulse_encryption.defs.resources.running.SECONDS_BETWEEN_LOOKS", 0.05)
    run = started(here, instance)
    with pytest.raises(KeyboardInterrupt), executing(instance, run.run_id) as ours:
        assert ours
        instance.report_run_failed(run, "It is taken for dead.")
        support.until(lambda: False, "the signal")
