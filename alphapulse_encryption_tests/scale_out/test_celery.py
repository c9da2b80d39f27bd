"""Two workers, a broker in PostgreSQL, and migrations spread over them: one is killed, commands are killed and left.

What is asserted on is read from the target database and from Dagster's storage; which worker a process belongs to says
the operating system: each worker leads a session of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from itertools import combinations
from pathlib import Path

import dagster as dg
import pytest

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another, forked
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.scale_out.services import Service, configure, daemon, worker

CATALOGUE = load_catalogue()
RANGES = 8
BATCH = 20


@pytest.fixture
def here(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, sample_url, server_dir.parent, another.MASTER_KEY_TEXT) as found:
        found.ranges = RANGES
        configure(found)
        yield found


@dataclass
class Watch:
    """What can be seen from outside of who works on what.

    Args:
        place: where.
        instance: its instance.
        sessions: of the operating system: the leader of each run's process, as long as it was there to be asked.
    """

    place: Place
    instance: dg.DagsterInstance
    sessions: dict[str, int] = field(default_factory=dict)

    def runs(self, table: str, job: str = "migrate_data") -> list[dg.DagsterRun]:
        return list(self.instance.get_runs(dg.RunsFilter(job_name=job, tags={"table": table})))

    def look(self) -> None:
        """Note whose process each run is; not so often that it keeps those from their work."""
        time.sleep(0.1)
        for run in self.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
            for entry in self.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
                begun = re.match(r"Started process for run \(pid: (\d+)\)", entry.message)
                if begun:
                    with suppress(ProcessLookupError):
                        self.sessions[run.run_id] = os.getsid(int(begun[1]))

    def until_ended(self, command: forked.Program) -> subprocess.CompletedProcess[str]:
        """Watch until a command ends, however long a busy machine takes for it."""
        while command.running:
            self.look()
        return command.ended()

    def share(self, run: dg.DagsterRun) -> list[int]:
        """The batch ranges of a run."""
        ends = (run.tags[f"dagster/asset_partition_range_{end}"] for end in ("start", "end"))
        first, last = (int(end.partition("|")[0]) for end in ends)
        return list(range(first, last + 1))

    def ranges(self, table: str) -> dict[int, tuple[str, int, datetime, datetime]]:
        """Status, rows, beginning and end of each range, as the target has them."""
        rows = support.run(
            self.place.url,
            "SELECT batch_range, status, rows_processed::int, started_at, completed_at FROM "
            "alphapulse_encryption.ranges "
            "WHERE table_name = %s",
            table,
        )
        return {number: (status, rows_, begun, ended) for number, status, rows_, begun, ended in rows}

    def in_the_middle(self, table: str, of: Service) -> dg.DagsterRun | None:
        """A run of this worker's that has done one range and begun the next, with most of it before it."""
        self.look()
        for run in self.runs(table):
            if self.sessions.get(run.run_id) == of.process.pid:
                states = [self.ranges(table)[number][:2] for number in self.share(run)]
                if (
                    states[0][0] == "completed"
                    and states[1][0] == "in_progress"
                    and 0 < states[1][1] <= 2 * BATCH
                ):
                    return run
        return None

    def overlaps(self, table: str) -> int:
        """How many pairs of runs worked on the table at the same time."""
        spans = []
        for run in self.runs(table):
            if run.status is not dg.DagsterRunStatus.SUCCESS:
                continue
            mine = [self.ranges(table)[number] for number in self.share(run)]
            spans.append((min(begun for *_, begun, _ in mine), max(ended for *_, ended in mine)))
        return sum(a[0] < b[1] and b[0] < a[1] for a, b in combinations(spans, 2))


def rest(url: str, ratio: int) -> None:
    """Rest between batches, so that there is a middle to be in."""
    support.run(
        url,
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('rest_ratio', %s) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        str(ratio),
    )


def test_two_workers(here: Place) -> None:
    with ExitStack() as stack:
        overseer = stack.enter_context(daemon(here))
        first = stack.enter_context(worker(here, "first"))
        second = stack.enter_context(worker(here, "second"))
        watch = Watch(here, stack.enter_context(here.instance()))
        here.succeeds("--add-columns", "--table", "trades")
        _one_is_killed(here, watch, first, second)
        _nothing_is_told(here, [overseer, first])


@pytest.mark.long
def test_pools(here: Place) -> None:
    with ExitStack() as stack:
        stack.enter_context(daemon(here))
        workers = [stack.enter_context(worker(here, name)) for name in ("first", "second")]
        watch = Watch(here, stack.enter_context(here.instance()))
        here.succeeds("--add-columns", "--table", "positions", "--table", "users")
        support.until(lambda: all("takes runs" in each.text for each in workers), "both are ready")
        _pools_hold(here, watch, {each.process.pid for each in workers})
        verified = here.succeeds("--verify", "--runs", "2", "--table", "users", "--table", "positions")
        assert "  Failed: 0" in verified
        assert {run.status for run in watch.runs("users", "verify_data")} == {dg.DagsterRunStatus.SUCCESS}


def _one_is_killed(here: Place, watch: Watch, first: Service, second: Service) -> None:
    rest(here.url, 60)
    command = here.start("--migrate-data", "--table", "trades", "--runs", "4", "--batch-size", str(BATCH))
    caught: list[dg.DagsterRun | None] = []

    def in_the_middle() -> bool:
        caught.append(watch.in_the_middle("trades", second))
        return caught[-1] is not None

    support.until(in_the_middle, "the second worker is in the middle")
    second.kill()
    rest(here.url, 0)
    killed = caught[-1]
    assert killed is not None
    table = CATALOGUE.table("trades")
    written = support.texts(here.url, table, table.columns[0].encrypted)
    done = watch.until_ended(command)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert "✓ Migrated trades" in done.stdout

    # Both did work: what the audit log has as done, and by which run.
    rows = support.run(
        here.url,
        "SELECT DISTINCT (details->>'batch_range')::int, run_id FROM "
        "alphapulse_encryption.audit_log WHERE table_name = 'trades' "
        "AND action = 'backfill'",
    )
    assert {number for number, _ in rows} == set(range(RANGES))
    assert {watch.sessions[run_id] for _, run_id in rows} == {first.process.pid, second.process.pid}
    assert watch.overlaps("trades") >= 1

    # The killed one's run failed, and another one took its place, on the other worker.
    (again,) = watch.instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": killed.run_id}))
    ended = watch.instance.get_run_by_id(killed.run_id)
    assert ended is not None
    assert (ended.status, again.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
    assert watch.sessions[again.run_id] == first.process.pid
    assert (ended.tags["worker"], again.tags["worker"]) == ("second", "first")
    # It went on: what was encrypted stayed as it was.
    assert {
        key: text
        for key, text in support.texts(here.url, table, table.columns[0].encrypted).items()
        if written[key] is not None
    } == {key: text for key, text in written.items() if text is not None}
    assert any(text is None for text in written.values())
    support.assert_encrypted(here.url, table)


def _pools_hold(here: Place, watch: Watch, workers: set[int]) -> None:
    def taken(table: str) -> set[int]:
        watch.look()
        return {watch.sessions[run.run_id] for run in watch.runs(table) if run.run_id in watch.sessions}

    # Long enough to be noticed.
    rest(here.url, 60)
    pools = watch.instance.event_log_storage
    for pool, table in (("target_database", "positions"), ("table/users", "users")):
        pools.set_concurrency_slots(pool, 1)
        if table == "users":
            # Both runs are with a worker before either can go on, however slow one of them is to look for one.
            here.succeeds("--pause")
        command = here.start("--migrate-data", "--table", table, "--runs", "2", "--batch-size", str(BATCH))
        if table == "users":
            support.until(lambda: taken("users") == workers, "each worker has taken a run")
            here.succeeds("--resume")
        done = watch.until_ended(command)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert watch.overlaps(table) == 0
        # With no place in the database's pool, the queue keeps the second run; at the table's, it waits on its worker.
        assert {watch.sessions[run.run_id] for run in watch.runs(table)} <= workers
        pools.set_concurrency_slots(pool, 4)
        support.assert_encrypted(here.url, CATALOGUE.table(table))
    rest(here.url, 0)


@pytest.mark.long
def test_commands_come_and_go(here: Place) -> None:
    with ExitStack() as stack:
        stack.enter_context(daemon(here))
        stack.enter_context(worker(here, "first"))
        watch = Watch(here, stack.enter_context(here.instance()))
        here.succeeds("--add-columns", "--table", "users")
        _one_is_killed_and_one_is_left(here, watch)


def _one_is_killed_and_one_is_left(here: Place, watch: Watch) -> None:
    here.run("--pause")
    killed = here.start("--migrate-data", "--table", "users", "--runs", "1")
    support.until(lambda: "Begun on" in killed.output, "a worker has taken the run")
    killed.kill()
    killed.ended()
    earlier = watch.runs("users")[0]

    left = here.start("--migrate-data", "--table", "users", "--runs", "1")
    support.until(lambda: earlier.run_id[:8] in left.output, "the next command waits for it")
    left.interrupt()
    done = left.ended()
    assert done.returncode == 130
    assert "go on without this command" in done.stderr and earlier.run_id[:8] in done.stderr
    assert "--stop-runs" in done.stderr
    run = watch.instance.get_run_by_id(earlier.run_id)
    assert run is not None and run.status is dg.DagsterRunStatus.STARTED

    assert here.succeeds("--stop-runs") == [
        f"Asked to stop: migrate_data users, ranges 00 to 07 (run {earlier.run_id[:8]})"
    ]
    support.until(
        lambda: watch.runs("users")[0].status is dg.DagsterRunStatus.CANCELED, "the run has stopped"
    )
    assert here.succeeds("--stop-runs") == ["No run is queued or under way."]
    here.run("--resume")
    here.succeeds("--migrate-data", "--table", "users", "--runs", "1")
    support.assert_encrypted(here.url, CATALOGUE.table("users"))


def _nothing_is_told(here: Place, services: list[Service]) -> None:
    for service in services:
        for secret in (here.url, here.dagster_url, here.master_key):
            assert secret not in service.text
            for pid in service.pids():
                assert secret not in Path(f"/proc/{pid}/cmdline").read_text()
    messages = support.run(here.dagster_url, "SELECT payload FROM kombu_message")
    assert messages
    for (payload,) in messages:
        for secret in (here.url, here.dagster_url, here.master_key):
            assert secret not in payload


def test_a_worker_says_what_it_lacks(here: Place) -> None:
    def fails(**changes: str | None) -> str:
        done = forked.run("alphapulse_encryption.scale_out.worker", [], here.environment(**changes))
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr

    nobody = "postgresql://canary_user:canary_password@127.0.0.1:9/canary"
    for variable, url in (
        ("ALPHAPULSE_CELERY_BROKER_URL", nobody),
        ("ALPHAPULSE_CELERY_BACKEND_URL", "canary://x"),
    ):
        said = fails(**{variable: url})
        assert variable in said and "canary" not in said
    assert "ALPHAPULSE_RUN_LAUNCHER=celery" in fails(ALPHAPULSE_RUN_LAUNCHER=None, DAGSTER_HOME=None)


def test_runs_are_for_workers(here: Place) -> None:
    done = here.fails(2, "--migrate-data", "--runs", "2", ALPHAPULSE_RUN_LAUNCHER=None, DAGSTER_HOME=None)
    assert "ALPHAPULSE_RUN_LAUNCHER" in done.stderr
    assert here.run_count() == 0
