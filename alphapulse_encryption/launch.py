"""Running Dagster jobs from a command: in this process, on the very instance and under the very names of the UI."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.definitions.repository_definition import RepositoryDefinition
from dagster._core.execution.api import execute_run
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from dagster._core.workspace.load import location_origins_from_yaml_paths

from alphapulse_encryption.jobs.stages import PER_RANGE, WHOLE_DATABASE, Stage
from alphapulse_encryption.logfiles import note
from alphapulse_encryption.resources.instance import open_instance, packaged_file
from alphapulse_encryption.resources.partitions import range_name
from alphapulse_encryption.resources.processes import is_running, this_process

_MODULE = "alphapulse_encryption.definitions"
_REPOSITORY = "__repository__"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Args:
        run_id: as the UI shows it.
        succeeded: whether every step did.
        problems: what the failed steps said.
        partitions: metadata of what was materialized, by partition ("" for an unpartitioned asset).
        interrupted: whether a signal, or somebody in the UI, stopped it.
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


@dataclass
class Launcher:
    """Launches jobs on an instance.

    Args:
        instance: the instance.
        ranges: how many batch ranges every table has.
    """

    instance: dg.DagsterInstance
    ranges: int
    _repository: ReconstructableRepository = field(
        default_factory=lambda: _Repository.for_module(_MODULE, "defs")
    )

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

    def _tags(self, stage: Stage, table: str) -> dict[str, str]:
        first = last = table
        if stage in PER_RANGE:
            first, last = f"{range_name(0)}|{table}", f"{range_name(self.ranges - 1)}|{table}"
        # The first one is for the list of runs.
        return {"table": table, ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}

    def _run(
        self,
        name: str,
        run_config: Mapping[str, Any],
        tags: Mapping[str, str],
        on_event: Callable[[dg.DagsterEvent], None] | None = None,
    ) -> Outcome:
        reconstructable = self._repository.get_reconstructable_job(name)
        job = reconstructable.get_definition()
        run = self.instance.create_run_for_job(
            job_def=job,
            run_config={**run_config, **_QUIET},
            tags={**job.run_tags, **tags, _PROCESS_TAG: this_process()},
            remote_job_origin=self._origin.get_job_origin(name),
            job_code_origin=reconstructable.get_python_origin(),
            repository_load_data=reconstructable.repository.get_definition().repository_load_data,
        )
        if on_event is not None:
            self.instance.add_event_listener(run.run_id, _listener(on_event))
        with _stopped_from_the_ui(self.instance, run.run_id):
            result = execute_run(reconstructable, run, self.instance, raise_on_error=False)
        return _outcome(result)


def _listener(on_event: Callable[[dg.DagsterEvent], None]) -> Callable[[dg.EventLogEntry], None]:
    def listen(entry: dg.EventLogEntry) -> None:
        if entry.dagster_event is not None:
            on_event(entry.dagster_event)

    return listen


# The steps' log goes to the instance; the terminal shows what the guide shows.
_QUIET: Mapping[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def _outcome(result: dg.JobExecutionResult) -> Outcome:
    partitions: dict[str, Mapping[str, Any]] = {}
    output: dict[str, Any] = {}
    problems: list[str] = []
    interrupted = False
    for event in result.all_events:
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
    return Outcome(result.run_id, result.success, tuple(problems), partitions, interrupted, output)


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
    )


@contextmanager
def launcher(ranges: int) -> Iterator[Launcher]:
    """A launcher on the instance that ``make ui`` shows.

    Args:
        ranges: how many batch ranges every table has.

    Raises:
        ConfigurationError: the instance cannot be opened.
    """
    with open_instance() as instance:
        _end_abandoned_runs(instance)
        yield Launcher(instance, ranges)


_SECONDS_BETWEEN_LOOKS = 3.0


@contextmanager
def _stopped_from_the_ui(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Have the UI's "Terminate" reach this process, which no launcher of Dagster's has started."""
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_LOOKS):
            run = instance.get_run_by_id(run_id)
            if run is not None and run.status is dg.DagsterRunStatus.CANCELING:
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=watch, name="stopped from the UI", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        # It may be asking a server that does not answer any more; the run does not depend on it.
        thread.join(_SECONDS_BETWEEN_LOOKS)


# Tags of this prefix are not shown in lists of runs.
_PROCESS_TAG = ".dagster/alphapulse_encryption_process"


_UNDER_WAY = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def _end_abandoned_runs(instance: dg.DagsterInstance) -> None:
    """Runs of a command that was killed would otherwise look under way for ever."""
    unfinished = instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))
    for run in unfinished:
        if is_running(run.tags.get(_PROCESS_TAG, "")) is False:
            # Nobody else gives back its place in the pool: without a daemon, later commands would wait for ever.
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            why = "The command that ran it was killed. Run the same step again."
            instance.report_run_failed(run, why)
            note("run_failed", level="error", message=why, run_id=run.run_id, job=run.job_name)
