"""Running Dagster jobs from a command: on the very instance and under the very names of the UI.

In this process, or on other machines where the instance has a run launcher for them: then runs are submitted to the
instance's queue, a stage over batch ranges as several of them, and the command waits for what becomes of them.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import dagster as dg

from alphapulse_encryption.cli.outcomes import Outcome
from alphapulse_encryption.cli.unfinished import end_abandoned_runs
from alphapulse_encryption.cli.waiting import Waiting
from alphapulse_encryption.defs.dagster_private import CodeLocation
from alphapulse_encryption.defs.resources.instance import open_instance, packaged_file
from alphapulse_encryption.defs.resources.partitions import TablePart
from alphapulse_encryption.defs.resources.processes import OWN_RUNS, PROCESS_TAG, this_process
from alphapulse_encryption.defs.resources.running import NOT_ENDED, RUN_AGAIN, executing, safe_to_repeat
from alphapulse_encryption.defs.resources.tags import FIRST_PARTITION, LAST_PARTITION
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.guide import Stage

# Over how many runs a stage's batch ranges of one table are spread, where nobody says.
RUNS_PER_TABLE = 4

OnEvent = Callable[[dg.DagsterEvent], None]

# The steps' log goes to the instance; the terminal shows what the guide shows.
_QUIET: Mapping[str, Any] = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
# The daemon that takes runs from the queue, as Dagster's UI and its own commands call it.
_QUEUE_DAEMON = "QUEUED_RUN_COORDINATOR"


@dataclass
class Launcher:
    """Launches jobs on an instance; tells of runs that others execute, ``runs`` for the ranges of one table."""

    instance: dg.DagsterInstance
    ranges: int
    runs: int = RUNS_PER_TABLE
    tell: Callable[[str], None] = print
    location: CodeLocation = field(
        default_factory=lambda: CodeLocation(
            "alphapulse_encryption.definitions", "defs", packaged_file("workspace.yaml")
        )
    )

    def stage(
        self, stage: Stage, tables: Sequence[str] = (), config: Mapping[str, Any] | None = None
    ) -> Outcome:
        """Run a stage of the guide, for whole tables where its asset has partitions."""
        if stage.over not in ("table", "range"):
            return self._run(stage.job, stage.works, config, [{}], here=stage.here)
        if self.elsewhere and tables:
            earlier = dg.RunsFilter(job_name=stage.job, tags={"table": [*tables]}, statuses=NOT_ENDED)
            Waiting(self.instance, self.tell).for_earlier(self.instance.get_runs(earlier))
        shares = [share for table in tables for share in self._shares(stage, table)]
        return self._run(stage.job, stage.works, config, shares)

    def job(
        self, name: str, op: str, config: Mapping[str, Any] | None = None, on_event: OnEvent | None = None
    ) -> Outcome:
        """Run a job that is of no table; the configuration is that of its op, or of the first of them."""
        return self._run(name, op, config, [{}], on_event)

    @property
    def elsewhere(self) -> bool:
        """Whether others execute the instance's runs, on other machines maybe."""
        return not isinstance(self.instance.run_launcher, dg.DefaultRunLauncher)

    def _shares(self, stage: Stage, table: str) -> list[dict[str, str]]:
        """The tags of the runs that do a stage of a table. The first one is for the list of runs."""
        cuts = [(table, table)]
        if stage.over == "range":
            count = min(self.runs, self.ranges) if self.elsewhere else 1
            bounds = pairwise(self.ranges * number // count for number in range(count + 1))
            cuts = [
                (TablePart(table, start).partition, TablePart(table, end - 1).partition)
                for start, end in bounds
            ]
        return [{"table": table, FIRST_PARTITION: first, LAST_PARTITION: last} for first, last in cuts]

    def _run(
        self,
        name: str,
        op: str,
        config: Mapping[str, Any] | None,
        shares: Sequence[Mapping[str, str]],
        on_event: OnEvent | None = None,
        here: bool = False,
    ) -> Outcome:
        """Run a job once for each set of tags."""
        run_config = {**_QUIET, "ops": {op: {"config": dict(config)}}} if config else _QUIET
        if self.elsewhere and not here:
            return self._submit(name, run_config, shares, on_event)
        outcomes = []
        for tags in shares:
            outcomes.append(self._execute(name, run_config, tags, on_event))
            if outcomes[-1].interrupted:
                break
        return Outcome.together(outcomes)

    def _execute(
        self, name: str, run_config: Mapping[str, Any], tags: Mapping[str, str], on_event: OnEvent | None
    ) -> Outcome:
        run_id = str(uuid.uuid4())
        # Held before the run is known: a run without a lease would be taken for abandoned.
        with executing(self.instance, run_id):
            tags = {**tags, PROCESS_TAG: this_process()}
            OWN_RUNS.add(run_id)
            run = self.location.create_run(self.instance, name, run_config, tags, run_id)

            def listen(entry: dg.EventLogEntry) -> None:
                if on_event is not None and entry.dagster_event is not None:
                    on_event(entry.dagster_event)

            self.instance.add_event_listener(run_id, listen)
            result = self.location.execute(self.instance, run)
        return Outcome.of(run_id, result.success, result.all_events, tags.get("table"))

    def _submit(
        self,
        name: str,
        run_config: Mapping[str, Any],
        shares: Sequence[Mapping[str, str]],
        on_event: OnEvent | None,
    ) -> Outcome:
        """Have others execute the runs, and wait for all of them."""

        def created() -> Iterator[dg.DagsterRun]:
            for tags in shares:
                run = self.location.create_run(self.instance, name, run_config, tags)
                if safe_to_repeat(run):
                    self.instance.add_run_tags(run.run_id, RUN_AGAIN)
                yield run

        # A courtesy only: whatever is wrong with asking, the runs are submitted.
        with suppress(Exception):
            if not self.instance.get_daemon_statuses([_QUEUE_DAEMON])[_QUEUE_DAEMON].healthy:
                self.tell(
                    "! No daemon of Dagster's is seen on this instance: runs wait in the queue until one is."
                )
        return Waiting(self.instance, self.tell, on_event).submit(created())


@contextmanager
def launcher(ranges: int, runs: int | None = None) -> Iterator[Launcher]:
    """A launcher on the instance that ``make ui`` shows.

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
        end_abandoned_runs(instance)
        yield found
