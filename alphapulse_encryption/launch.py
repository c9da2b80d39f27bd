"""Running Dagster jobs from a command: in this process, on the very instance and under the very names of the UI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import dagster as dg
from dagster._core.definitions.reconstruct import ReconstructableRepository
from dagster._core.execution.api import execute_run
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_END_TAG, ASSET_PARTITION_RANGE_START_TAG
from dagster._core.workspace.load import location_origins_from_yaml_paths

from alphapulse_encryption.jobs.stages import PER_RANGE, WHOLE_DATABASE, Stage
from alphapulse_encryption.resources.instance import open_instance, packaged_file
from alphapulse_encryption.resources.partitions import range_name

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
    """

    run_id: str
    succeeded: bool
    problems: tuple[str, ...]
    partitions: Mapping[str, Mapping[str, Any]]

    def collected(self, name: str) -> list[tuple[str, Any]]:
        """Partition and value of one metadata entry, for every partition that has it."""
        return [(key, entries[name]) for key, entries in self.partitions.items() if name in entries]


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
        default_factory=lambda: ReconstructableRepository.for_module(_MODULE, "defs")
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
        outcomes = [
            self._run(stage.job, run_config, self._tags(stage, first, last))
            for first, last in tables_in_runs(tables)
        ]
        return _together(outcomes)

    def job(self, name: str, op: str, config: Mapping[str, Any]) -> Outcome:
        """Run an op job with the configuration of its op."""
        return self._run(name, {"ops": {op: {"config": dict(config)}}}, {})

    def _tags(self, stage: Stage, first: str, last: str) -> dict[str, str]:
        if stage in PER_RANGE:
            first, last = f"{range_name(0)}|{first}", f"{range_name(self.ranges - 1)}|{last}"
        return {ASSET_PARTITION_RANGE_START_TAG: first, ASSET_PARTITION_RANGE_END_TAG: last}

    def _run(self, name: str, run_config: Mapping[str, Any], tags: Mapping[str, str]) -> Outcome:
        reconstructable = self._repository.get_reconstructable_job(name)
        job = reconstructable.get_definition()
        run = self.instance.create_run_for_job(
            job_def=job,
            run_config={**run_config, **_QUIET},
            tags={**job.run_tags, **tags},
            remote_job_origin=self._origin.get_job_origin(name),
            job_code_origin=reconstructable.get_python_origin(),
            repository_load_data=reconstructable.repository.get_definition().repository_load_data,
        )
        result = execute_run(reconstructable, run, self.instance, raise_on_error=False)
        return _outcome(result)


# The steps' log goes to the instance; the terminal shows what the guide shows.
_QUIET: Mapping[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def tables_in_runs(tables: Sequence[str]) -> Iterator[tuple[str, str]]:
    """First and last table of each run: one run per table."""
    for table in tables:
        yield table, table


def _outcome(result: dg.JobExecutionResult) -> Outcome:
    partitions: dict[str, Mapping[str, Any]] = {}
    problems: list[str] = []
    for event in result.all_events:
        if event.is_step_materialization:
            materialization = event.step_materialization_data.materialization
            entries = {name: value.value for name, value in materialization.metadata.items()}
            partitions.setdefault(materialization.partition or "", entries)
        elif event.is_step_failure:
            problems.append(_problem(event.step_failure_data))
    return Outcome(result.run_id, result.success, tuple(problems), partitions)


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
    )


@contextmanager
def launcher(ranges: int) -> Iterator[Launcher]:
    """A launcher on the instance that ``make ui`` shows.

    Raises:
        ConfigurationError: the instance cannot be opened.
    """
    with open_instance() as instance:
        yield Launcher(instance, ranges)
