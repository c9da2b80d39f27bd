"""What rehearsals leave behind that were killed: what is removed, when, and what never."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg
import psycopg
import pytest
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.defs.resources.processes import this_process
from alphapulse_encryption.errors import DatabaseFailure
from alphapulse_encryption.rehearsal.clone import clone as clones_
from alphapulse_encryption.rehearsal.clone.leftovers import remove_leftovers
from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption_tests.migration.walk import query
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import JOB, clones, contents, drop

QUIET = ("--rehearse", "--rate", "0", "--table", "sessions")


@contextlib.contextmanager
def databases(here: Place, comments: dict[str, str | None]) -> Iterator[None]:
    """Empty databases with these comments."""
    with psycopg.connect(here.postgres.url("postgres"), autocommit=True) as connection:
        for name, comment in comments.items():
            connection.execute(SQL("CREATE DATABASE {} TEMPLATE template0").format(Identifier(name)))
            connection.execute(SQL("COMMENT ON DATABASE {} IS {}").format(Identifier(name), Literal(comment)))
    try:
        yield
    finally:
        for name in comments:
            drop(here, name)


def mark(run: str, *, hours: float = 0.0, **changes: object) -> str:
    """A clone's comment, of so long ago."""
    found = clones_.Mark(
        run=run,
        process="elsewhere/1/1.00",
        at=datetime.now(UTC) - timedelta(hours=hours),
        keep_failed_hours=2,
    )
    return clones_._MARK + found.model_copy(update=changes).model_dump_json()


def a_run(here: Place, instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    """A rehearsal that Dagster knows of."""
    return instance.create_run_for_job(
        job_def=here.definitions().resolve_job_def(JOB), run_config={}, status=status
    )


def removed(here: Place, instance: dg.DagsterInstance, *, at_once: bool = False) -> dict[str, str]:
    with here.in_environment():
        found = remove_leftovers(instance, clones_.server(), at_once=at_once)
    return {name: told.partition(": ")[2] for name, told in found.items()}


def test_what_is_not_marked_is_never_removed(small: Place) -> None:
    theirs: dict[str, str | None] = {
        "alphapulse_rehearsal_00000001": None,
        "alphapulse_rehearsal_00000002": "somebody's own",
        "alphapulse_rehearsal_00000003": clones_._MARK + "not what we write",
        "mine_alphapulse_rehearsal_": mark("gone", hours=99),
        "alphapulse_rehearsal_kept": mark("gone", hours=99, keep=True),
    }
    ours: dict[str, str | None] = {"alphapulse_rehearsal_00000004": mark("gone", hours=99)}
    with databases(small, {**theirs, **ours}), small.instance() as instance:
        assert removed(small, instance, at_once=True) == dict.fromkeys(ours, "nobody knows its run any more")
        there = {name for (name,) in query(small.url, "SELECT datname FROM pg_database")}
        assert there >= set(theirs) and not there & set(ours)


def test_which_are_left_over(small: Place) -> None:
    status = dg.DagsterRunStatus
    with small.instance() as instance:
        runs = {
            "cancelled": a_run(small, instance, status.STARTED),
            "failed": a_run(small, instance, status.STARTED),
            "failed_long_ago": a_run(small, instance, status.STARTED),
            "ended": a_run(small, instance, status.STARTED),
            "running": a_run(small, instance, status.STARTED),
            "crashed": a_run(small, instance, status.STARTED),
            "crashed_here": a_run(small, instance, status.STARTED),
            "to_begin": a_run(small, instance, status.NOT_STARTED),
            "at_work": a_run(small, instance, status.STARTED),
        }
        instance.report_run_canceled(runs["cancelled"])
        instance.report_run_failed(runs["failed"])
        instance.report_run_failed(runs["failed_long_ago"])
        instance.report_dagster_event(
            dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name=JOB), runs["ended"].run_id
        )
        marks = {name: mark(run.run_id) for name, run in runs.items()}
        marks["failed_long_ago"] = mark(runs["failed_long_ago"].run_id, keep_failed_hours=0)
        marks["crashed"] = mark(runs["crashed"].run_id, hours=1)
        marks["crashed_here"] = mark(
            runs["crashed_here"].run_id, process=this_process().replace("/", "/9", 1)
        )
        marks["to_begin"] = mark(runs["to_begin"].run_id, hours=99)
        marks["at_work"] = mark(runs["at_work"].run_id, hours=99)
        marks["unknown"] = mark("of another instance")
        names = {name: f"alphapulse_rehearsal_{name}" for name in marks}
        with databases(small, {names[name]: comment for name, comment in marks.items()}):
            with psycopg.connect(small.postgres.url("postgres")) as holder:
                holder.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [names["at_work"]])
                assert removed(small, instance) == {
                    names["cancelled"]: "it was cancelled",
                    names["failed_long_ago"]: "it failed",
                    names["ended"]: "it ended",
                    names["crashed"]: "its process is gone",
                    names["crashed_here"]: "its process is gone",
                }
                # The next rehearsal does not wait until a failed one is old.
                assert removed(small, instance, at_once=True) == {names["failed"]: "it failed"}
                assert set(clones(small)) == {names[n] for n in ("at_work", "to_begin", "running", "unknown")}
            assert removed(small, instance) == {names["at_work"]: "its process is gone"}


@pytest.mark.parametrize("by_the_next", [True, False])
def test_a_backup_goes_before_the_clone_it_is_found_by(small: Place, by_the_next: bool) -> None:
    name, run = "alphapulse_rehearsal_00000005", "gone"
    with databases(small, {name: mark(run, hours=99)}), small.instance() as instance:
        with small.in_environment():
            backups = clones_.backup_directory(run)
        backups.mkdir(parents=True)
        (backups / "of.dump.age").touch()
        # One that subscribes cannot be dropped: as if the process had been killed there.
        clone = small.postgres.url(name)
        query(
            clone,
            "CREATE SUBSCRIPTION s CONNECTION '' PUBLICATION p WITH (connect = false, slot_name = NONE)",
        )
        try:
            with pytest.raises(DatabaseFailure), small.in_environment():
                if by_the_next:
                    remove_leftovers(instance, clones_.server())
                else:
                    clones_.remove(clones_.server(), name)
        finally:
            query(clone, "DROP SUBSCRIPTION s")
        assert clones(small) == [name]
        assert not backups.exists()


def test_the_sensor(small: Place) -> None:
    with small.instance() as instance:
        sensor = small.definitions().get_repository_def().get_sensor_def("rehearsal_leftovers")

        def tick() -> str:
            with small.in_environment(), dg.build_sensor_context(instance=instance) as context:
                return str(sensor.evaluate_tick(context).skip_message)

        assert tick() == "There is nothing left over."
        run = a_run(small, instance, dg.DagsterRunStatus.STARTED)
        instance.report_run_canceled(run)
        with databases(small, {"alphapulse_rehearsal_0": mark(run.run_id)}):
            assert tick() == (
                f"removed the clone alphapulse_rehearsal_0 of the rehearsal {run.run_id}: it was cancelled"
            )
            assert clones(small) == []
        small.extra["ALPHAPULSE_STAGING_DATABASE_URL"] = "postgresql://nobody@127.0.0.1:1/nothing"
        assert "ALPHAPULSE_STAGING_DATABASE_URL" in tick()
        small.extra["ALPHAPULSE_STAGING_DATABASE_URL"] = None
        assert tick() == "Nothing was ever rehearsed here."


BEGUN = """
SELECT count(*) FROM event_logs WHERE dagster_event_type = 'STEP_START' AND step_key = %s
   AND run_id = (SELECT run_id FROM runs ORDER BY id DESC LIMIT 1)
"""


def killed_in(here: Place, stage: Stage, delay: float) -> str:
    """Rehearse, until it is killed in this stage; the run."""
    program = here.start(*QUIET)
    with psycopg.connect(here.dagster_url, autocommit=True) as connection:
        before = connection.execute("SELECT coalesce(max(id), 0) FROM runs").fetchone()
        while True:
            newest = connection.execute("SELECT coalesce(max(id), 0) FROM runs").fetchone()
            begun = connection.execute(BEGUN, [stage.value]).fetchone()
            if newest != before and begun is not None and begun[0]:
                break
            assert program.running, program.ended()
            time.sleep(0.01)
        threading.Event().wait(delay)
        program.kill()
        program.ended()
        row = connection.execute("SELECT run_id FROM runs ORDER BY id DESC LIMIT 1").fetchone()
        assert row is not None
        return str(row[0])


def chain(here: Place, kills: Sequence[tuple[Stage, float]]) -> None:
    """Each rehearsal is killed one stage later than the one before, whose leftovers it removes; the last succeeds."""
    before, dump = contents(here.url), here.dump()
    for stage, delay in kills:
        run = killed_in(here, stage, delay)
        # One clone at most, and of no other run than the one that was just killed.
        assert set(clones(here)) <= {f"alphapulse_rehearsal_{run[:8]}"}, stage
        assert contents(here.url) == before
    here.succeeds(*QUIET)
    with here.instance() as instance:
        found = history.read(instance)
        assert not [run for run in instance.get_runs() if not run.is_finished]
    assert (found[-1].failed_stage, found[-1].source_unchanged) == (None, True)
    assert clones(here) == []
    databases = query(here.url, "SELECT datname FROM pg_database WHERE datname LIKE 'encryption_drill%'")
    assert databases == []
    assert (
        query(here.url, "SELECT rolname FROM pg_roles WHERE rolname ~ '^(alphapulse_re|encryption_d)'") == []
    )
    assert list(here.state.rglob("*.dump.age*")) == []
    assert here.dump() == dump


SOME = (Stage.CLONE, Stage.BACKFILL, Stage.BACKUP, Stage.DROP, Stage.REMOVAL)


@pytest.mark.long
def test_killed_and_rehearsed_again(small: Place) -> None:
    chain(small, [(stage, 0.02) for stage in SOME])


@pytest.mark.long
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_killed_in_every_stage(small: Place, delay: float) -> None:
    chain(small, [(stage, delay) for stage in Stage])


def test_killed_while_the_clone_is_made(small: Place) -> None:
    """Nobody is there any more who would say what it is."""
    query(small.url, "CREATE TABLE filler AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n")
    program = small.start(*QUIET)
    with psycopg.connect(small.postgres.url("postgres"), autocommit=True) as connection:
        looking = (
            "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND pid <> pg_backend_pid() "
            "AND query LIKE 'CREATE DATABASE%alphapulse_rehearsal%'"
        )
        while connection.execute(looking).fetchone() is None:
            assert program.running, program.ended()
            time.sleep(0.001)
        program.kill()
        program.ended()
        while connection.execute(looking).fetchone() is not None:
            time.sleep(0.05)
    small.succeeds(*QUIET)
    assert clones(small) == []


def test_one_that_was_made_and_nobody_there_any_more(small: Place) -> None:
    """It has no comment yet, but what it was born with; as long as somebody makes it, it is left alone."""
    name = "alphapulse_rehearsal_00000001"
    with databases(small, {name: None}), small.instance() as instance:
        assert removed(small, instance, at_once=True) == {}
        query(small.url, f"ALTER DATABASE {name} CONNECTION LIMIT {clones_.BIRTHMARK}")
        with psycopg.connect(small.postgres.url("postgres")) as maker:
            maker.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [name])
            assert removed(small, instance, at_once=True) == {}
        assert removed(small, instance) == {name: "its making was interrupted"}
