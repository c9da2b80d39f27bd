"""Running Dagster jobs from a command: on the very instance and under the very names of the UI.

In this process, or on other machines where the instance has a run launcher for them: then runs are submitted to the
instance's queue, a stage over batch ranges as several of them, and the command waits for what becomes of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableJob, ReconstructableRepository
from dagster._core.definitions.repository_definition import RepositoryDefinition
from dagster._core.execution.api import execute_run
from dagster._core.launcher import DefaultRunLauncher
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    PARENT_RUN_ID_TAG,
    WILL_RETRY_TAG,
)
from dagster._core.utils import make_new_run_id
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load import location_origins_from_yaml_paths
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon
from sqlalchemy.exc import SQLAlchemyError

from alphapulse_encryption.defs.jobs.stages import PER_RANGE, WHOLE_DATABASE, Stage
from alphapulse_encryption.defs.resources.instance import open_instance, packaged_file
from alphapulse_encryption.defs.resources.leases import SECONDS_TO_COME_BACK, held_leases
from alphapulse_encryption.defs.resources.partitions import range_name
from alphapulse_encryption.defs.resources.processes import PROCESS_TAG, is_running, this_process
from alphapulse_encryption.defs.resources.running import RUN_AGAIN, WORKER_TAG, executing, safe_to_repeat
from alphapulse_encryption.errors import ConfigurationError, LeftRunning, RefusedError
from alphapulse_encryption.logfiles import note

_MODULE = "alphapulse_encryption.definitions"
_REPOSITORY = "__repository__"

# Over how many runs a stage's batch ranges of one table are spread, where nobody says.
RUNS_PER_TABLE = 4
_SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        run_id: as the UI shows it.
        succeeded: whether every step did.
        problems: what the failed steps said.
        partitions: metadata of what was materialized, by partition ("" for an unpartitioned asset).
        interrupted: whether a signal, or somebody in the UI, stopped it here.
        output: metadata of the op's output, for jobs that are no assets.
    """

    run_id: str
    succeeded: bool
    problems: tuple[str, ...]
    partitions: Mapping[str, Mapping[str, Any]]
    interrupted: bool = False
    output: Mapping[str, Any] = field(default_factory=dict)

    def collected(self, name: str) -> list[tuple[str, Any]]:
        """Partition and value of one metadata entry, for every partition that has it."""
        return [(key, entries[name]) for key, entries in self.partitions.items() if name in entries]


class _Repository(ReconstructableRepository):
    """The definitions, built once for all runs of a launcher: Dagster would build them anew for every run."""

    _built: RepositoryDefinition

    def get_definition(self) -> RepositoryDefinition:
        if not hasattr(self, "_built"):
            self._built = super().get_definition()
        return self._built


def _repository_here() -> ReconstructableRepository:
    # In a container of Dagster's Helm chart these say how runs that are launched from here get one of their own.
    context = os.environ.get("DAGSTER_CLI_API_GRPC_CONTAINER_CONTEXT") or os.environ.get(
        "DAGSTER_CONTAINER_CONTEXT"
    )
    return _Repository.for_module(
        _MODULE,
        "defs",
        container_image=os.environ.get("DAGSTER_CURRENT_IMAGE"),
        container_context=json.loads(context) if context else None,
    )


@dataclass
class Launcher:
    """Launches jobs on an instance.

    Args:
        instance: the instance.
        ranges: how many batch ranges every table has.
        runs: over how many runs the ranges of one table are spread, where others execute them.
        tell: shows a line about runs that others execute.
    """

    instance: dg.DagsterInstance
    ranges: int
    runs: int = RUNS_PER_TABLE
    tell: Callable[[str], None] = print
    _repository: ReconstructableRepository = field(default_factory=_repository_here)

    @cached_property
    def _origin(self) -> RemoteRepositoryOrigin:
        # The code location that `make ui` loads: the UI then shows the run with its job.
        location, *_ = location_origins_from_yaml_paths([str(packaged_file("workspace.yaml"))])
        return RemoteRepositoryOrigin(location, _REPOSITORY)

    def stage(
        self, stage: Stage, tables: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ) -> Outcome:
        """Run a stage of the guide for whole tables.

        Args:
            stage: the stage.
            tables: keys of tables; ignored by stages that look at the whole database.
            config: the asset's configuration.
        """
        run_config = {"ops": {stage.asset: {"config": dict(config)}}} if config else {}
        if stage in WHOLE_DATABASE:
            return self._run(stage.job, run_config, {})
        if self.elsewhere:
            self._wait_for_earlier(stage.job, tables)
            shares = [share for table in tables for share in self._shares(stage, table)]
            return _together(self._submitted(stage.job, run_config, shares))
        outcomes = []
        for table in tables:
            outcomes.append(self._run(stage.job, run_config, self._tags(stage, table)))
            if outcomes[-1].interrupted:
                break
        return _together(outcomes)

    def job(
        self,
        name: str,
        op: str,
        config: Mapping[str, Any],
        on_event: Callable[[dg.DagsterEvent], None] | None = None,
    ) -> Outcome:
        """Run an op job.

        Args:
            name: of the job.
            op: its op, or the first of them.
            config: of that op.
            on_event: told what Dagster tells of the run, as it happens.
        """
        return self._run(name, {"ops": {op: {"config": dict(config)}}}, {}, on_event)

    @property
    def elsewhere(self) -> bool:
        """Whether others execute the instance's runs, on other machines maybe."""
        return not isinstance(self.instance.run_launcher, DefaultRunLauncher)

    def _tags(self, stage: Stage, table: str, start: int = 0, end: int | None = None) -> dict[str, str]:
        first = last = table
        if stage in PER_RANGE:
            end = self.ranges if end is None else end
            first, last = f"{range_name(start)}|{table}", f"{range_name(end - 1)}|{table}"
        # The first one is for the list of runs.
        return {"table": table, ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}

    def _shares(self, stage: Stage, table: str) -> list[dict[str, str]]:
        if stage not in PER_RANGE:
            return [self._tags(stage, table)]
        count = min(self.runs, self.ranges)
        cuts = [self.ranges * number // count for number in range(count + 1)]
        return [self._tags(stage, table, start, end) for start, end in pairwise(cuts)]

    def _run(
        self,
        name: str,
        run_config: Mapping[str, Any],
        tags: Mapping[str, str],
        on_event: Callable[[dg.DagsterEvent], None] | None = None,
    ) -> Outcome:
        if self.elsewhere:
            return _together(self._submitted(name, run_config, [tags], on_event))
        run_id = make_new_run_id()
        # Held before the run is known: whoever finds it without would take it for abandoned.
        with executing(self.instance, run_id):
            reconstructable, run = self._created(
                name, run_config, {**tags, PROCESS_TAG: this_process()}, run_id
            )
            if on_event is not None:
                self.instance.add_event_listener(run.run_id, _listener(on_event))
            result = execute_run(reconstructable, run, self.instance, raise_on_error=False)
        return _outcome(result.run_id, result.success, result.all_events)

    def _created(
        self, name: str, run_config: Mapping[str, Any], tags: Mapping[str, str], run_id: str
    ) -> tuple[ReconstructableJob, dg.DagsterRun]:
        reconstructable = self._repository.get_reconstructable_job(name)
        job = reconstructable.get_definition()
        run = self.instance.create_run_for_job(
            job_def=job,
            run_id=run_id,
            run_config={**run_config, **_QUIET},
            tags={**job.run_tags, **tags},
            remote_job_origin=self._origin.get_job_origin(name),
            job_code_origin=reconstructable.get_python_origin(),
            repository_load_data=reconstructable.repository.get_definition().repository_load_data,
        )
        return reconstructable, run

    def _submitted(
        self,
        name: str,
        run_config: Mapping[str, Any],
        shares: Sequence[Mapping[str, str]],
        on_event: Callable[[dg.DagsterEvent], None] | None = None,
    ) -> list[Outcome]:
        """Have others execute runs of a job, one for each set of tags, and wait for all of them."""
        self._look_for_daemon()
        waits: list[_Awaited] = []
        with _leaving(waits):
            with WorkspaceProcessContext(self.instance, EmptyWorkspaceTarget()) as process:
                workspace = process.create_request_context()
                for tags in shares:
                    _, run = self._created(name, run_config, tags, make_new_run_id())
                    if safe_to_repeat(run):
                        self.instance.add_run_tags(run.run_id, RUN_AGAIN)
                    waits.append(_Awaited(run.run_id, _what(name, tags)))
                    self.instance.submit_run(run.run_id, workspace)
                    self.tell(f"  Submitted {waits[-1]}")
            return self._awaited(waits, on_event)

    def _awaited(
        self, waits: Sequence[_Awaited], on_event: Callable[[dg.DagsterEvent], None] | None = None
    ) -> list[Outcome]:
        answers = True
        while under_way := [awaited for awaited in waits if not awaited.ended]:
            try:
                found = self.instance.get_runs(dg.RunsFilter(run_ids=[a.run_id for a in under_way]))
                runs = {run.run_id: run for run in found}
                for awaited in under_way:
                    self._look_at(awaited, runs.get(awaited.run_id), on_event)
                answers = True
            except SQLAlchemyError:
                # Its text would name the server.
                if answers:
                    self.tell("! Dagster's storage does not answer. The runs go on; it is asked again.")
                answers = False
            if not all(awaited.ended for awaited in waits):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        return [self._ended(awaited) for awaited in waits]

    def _look_at(
        self,
        awaited: _Awaited,
        run: dg.DagsterRun | None,
        on_event: Callable[[dg.DagsterEvent], None] | None,
    ) -> None:
        if on_event is not None:
            self._tell_events(awaited, on_event)
        if run is None:
            # Somebody has deleted it.
            awaited.ended = True
            return
        worker = run.tags.get(WORKER_TAG)
        if worker is not None and worker != awaited.worker:
            awaited.worker = worker
            self.tell(f"  Begun on {worker}: {awaited}")
        if not run.is_finished:
            return
        if run.status is dg.DagsterRunStatus.FAILURE and run.tags.get(WILL_RETRY_TAG) == "true":
            again = self.instance.get_runs(dg.RunsFilter(tags={PARENT_RUN_ID_TAG: run.run_id}), limit=1)
            if again:
                self.tell(f"  Its worker is gone, run again as {again[0].run_id[:8]}: {awaited}")
                awaited.run_id, awaited.cursor, awaited.worker = again[0].run_id, None, None
            return
        awaited.ended = True
        awaited.status = run.status
        word = {dg.DagsterRunStatus.SUCCESS: "Done", dg.DagsterRunStatus.CANCELED: "Stopped"}
        self.tell(f"  {word.get(run.status, 'Failed')}: {awaited}")

    def _tell_events(self, awaited: _Awaited, on_event: Callable[[dg.DagsterEvent], None]) -> None:
        found = self.instance.get_records_for_run(awaited.run_id, awaited.cursor)
        awaited.cursor = found.cursor
        for record in found.records:
            _listener(on_event)(record.event_log_entry)

    def _ended(self, awaited: _Awaited) -> Outcome:
        entries = self.instance.all_logs(awaited.run_id)
        events = [entry.dagster_event for entry in entries if entry.dagster_event is not None]
        outcome = _outcome(awaited.run_id, awaited.status is dg.DagsterRunStatus.SUCCESS, events)
        if outcome.succeeded or outcome.problems:
            return replace(outcome, interrupted=False)
        why = next(
            (e.message for e in reversed(events) if e.is_failure or e.event_type_value in _STOPPED), None
        )
        return replace(outcome, interrupted=False, problems=(f"{awaited}: {why or 'it was deleted'}",))

    def _wait_for_earlier(self, job: str, tables: Sequence[str]) -> None:
        """A command that was killed, or left, has runs that go on: two at once on one range would refuse each other."""
        waits = [
            _Awaited(run.run_id, _what(job, run.tags))
            for table in tables
            for run in self.instance.get_runs(
                dg.RunsFilter(job_name=job, tags={"table": table}, statuses=_NOT_ENDED)
            )
        ]
        if waits:
            self.tell("  Runs of an earlier command are under way; first they are waited for:")
            for awaited in waits:
                self.tell(f"  {awaited}")
            with _leaving(waits):
                self._awaited(waits)

    def _look_for_daemon(self) -> None:
        try:
            statuses = self.instance.get_daemon_statuses([QueuedRunCoordinatorDaemon.daemon_type()])
        except Exception:  # a courtesy only
            return
        if not all(status.healthy for status in statuses.values()):
            self.tell(
                "! No daemon of Dagster's is seen on this instance: runs wait in the queue until one is."
            )


@dataclass
class _Awaited:
    """A run that others execute, and the run that takes its place if its worker dies."""

    run_id: str
    what: str
    worker: str | None = None
    cursor: str | None = None
    ended: bool = False
    status: dg.DagsterRunStatus | None = None

    def __str__(self) -> str:
        return f"{self.what} (run {self.run_id[:8]})"


@contextmanager
def _leaving(waits: Sequence[_Awaited]) -> Iterator[None]:
    """Say of a command that is interrupted what goes on without it.

    Raises:
        LeftRunning: in place of an interruption.
    """
    try:
        yield
    except KeyboardInterrupt:
        left = [str(awaited) for awaited in waits if not awaited.ended]
        raise LeftRunning(
            "no longer waiting. These runs go on without this command, or wait for a worker:\n"
            + "\n".join(f"  {line}" for line in left)
            + "\n--stop-runs stops them, and so does Terminate in the UI; --pause has every backfill wait. The same "
            "command again waits for them, and then does what is left."
        ) from None


def _what(job: str, tags: Mapping[str, str]) -> str:
    if "table" not in tags:
        return job
    first = tags.get(ASSET_PARTITION_RANGE_START_TAG, "").partition("|")
    last = tags.get(ASSET_PARTITION_RANGE_END_TAG, "").partition("|")
    return f"{job} {tags['table']}" + (f", ranges {first[0]} to {last[0]}" if first[1] else "")


def _listener(on_event: Callable[[dg.DagsterEvent], None]) -> Callable[[dg.EventLogEntry], None]:
    def listen(entry: dg.EventLogEntry) -> None:
        if entry.dagster_event is not None:
            on_event(entry.dagster_event)

    return listen


# The steps' log goes to the instance; the terminal shows what the guide shows.
_QUIET: Mapping[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _outcome(run_id: str, succeeded: bool, events: Iterable[dg.DagsterEvent]) -> Outcome:
    partitions: dict[str, Mapping[str, Any]] = {}
    output: dict[str, Any] = {}
    problems: list[str] = []
    interrupted = False
    for event in events:
        if event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            entries = {name: value.value for name, value in materialization.metadata.items()}
            partitions.setdefault(materialization.partition or "", entries)
        elif event.is_successful_output:
            output |= {name: value.value for name, value in event.step_output_data.metadata.items()}
        elif event.is_step_failure:
            problems.append(_problem(event.step_failure_data))
            error = event.step_failure_data.error
            interrupted |= error is not None and "Interrupt" in (error.cls_name or "")
    return Outcome(run_id, succeeded, tuple(problems), partitions, interrupted, output)


def _problem(failure: Any) -> str:
    if failure.user_failure_data is not None and failure.user_failure_data.description:
        return str(failure.user_failure_data.description)
    return "The step failed; its run in the UI says where."


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    return Outcome(
        run_id=", ".join(outcome.run_id for outcome in outcomes),
        succeeded=all(outcome.succeeded for outcome in outcomes),
        problems=tuple(problem for outcome in outcomes for problem in outcome.problems),
        partitions={key: entries for outcome in outcomes for key, entries in outcome.partitions.items()},
        interrupted=any(outcome.interrupted for outcome in outcomes),
        output={name: value for outcome in outcomes for name, value in outcome.output.items()},
    )


@contextmanager
def launcher(ranges: int, runs: int | None = None) -> Iterator[Launcher]:
    """A launcher on the instance that ``make ui`` shows.

    Args:
        ranges: how many batch ranges every table has.
        runs: over how many runs the ranges of one table are spread; None for as many as usual.

    Raises:
        ConfigurationError: the instance cannot be opened; or the number of runs was given, and this process executes
            them itself.
    """
    with open_instance() as instance:
        found = Launcher(instance, ranges, runs or RUNS_PER_TABLE)
        if runs is not None and not found.elsewhere:
            raise ConfigurationError(
                "--runs spreads a table over workers on several machines, and this instance executes runs in the "
                "command itself. Set ALPHAPULSE_RUN_LAUNCHER=celery (see docs/scale-out.md), or use --workers."
            )
        _end_abandoned_runs(instance)
        yield found


_STOPPED = frozenset({"PIPELINE_CANCELED", "PIPELINE_CANCELING"})
_UNDER_WAY = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_NOT_ENDED = [dg.DagsterRunStatus.QUEUED, *_UNDER_WAY]


def _end_abandoned_runs(instance: dg.DagsterInstance) -> None:
    """Runs of a command that was killed would otherwise look under way for ever.

    Those that Dagster's launchers have started are its daemon's to look after.
    """
    unfinished = {
        run.run_id: run
        for run in instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))
        if PROCESS_TAG in run.tags
    }
    silent = _without_lease(instance, unfinished)
    gone = [run_id for run_id in silent if is_running(unfinished[run_id].tags[PROCESS_TAG]) is False]
    # On another machine a process cannot be looked for, but its lease can: twice, in case the server was restarted.
    unknown = [run_id for run_id in silent if is_running(unfinished[run_id].tags[PROCESS_TAG]) is None]
    if unknown and held_leases(instance, unknown) is not None:
        time.sleep(SECONDS_TO_COME_BACK)
        gone += _without_lease(instance, unknown)
    for run_id in gone:
        # Nobody else gives back its place in the pool: without a daemon, later commands would wait for ever.
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        why = "The command that ran it was killed. Run the same step again."
        instance.report_run_failed(unfinished[run_id], why)
        note("run_failed", level="error", message=why, run_id=run_id, job=unfinished[run_id].job_name)


def _without_lease(instance: dg.DagsterInstance, run_ids: Iterable[str]) -> list[str]:
    candidates = list(run_ids)
    if not candidates:
        return []
    held = held_leases(instance, candidates) or frozenset()
    return [run_id for run_id in candidates if run_id not in held]


def stop_runs() -> tuple[str, ...]:
    """Stop every run of the instance that is queued or under way, wherever it is executed.

    A queued one is taken from the queue; one that is under way ends after the batch it is at, and what is done stays.

    Returns:
        What each was, and what becomes of it.

    Raises:
        ConfigurationError: the instance cannot be opened.
        RefusedError: one could not be asked to stop; the others were.
    """
    told, failed = [], []
    with open_instance() as instance:
        for run in instance.get_runs(dg.RunsFilter(statuses=_NOT_ENDED)):
            what = str(_Awaited(run.run_id, _what(run.job_name, run.tags)))
            try:
                queued = run.status is dg.DagsterRunStatus.QUEUED
                if not instance.run_coordinator.cancel_run(run.run_id):
                    # Executed by a command of ours, which looks for this.
                    instance.report_run_canceling(run)
                told.append(f"{'Taken from the queue' if queued else 'Asked to stop'}: {what}")
            except Exception as error:
                failed.append(f"{what}: {type(error).__name__}")
    if failed:
        raise RefusedError("Some runs could not be asked to stop: " + "; ".join(failed))
    return tuple(told)
