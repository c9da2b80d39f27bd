"""Runs that others execute: the command that submitted them says where they are, and waits for what becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from alphapulse_encryption.cli.outcomes import Outcome, in_words
from alphapulse_encryption.defs.dagster_private import submit
from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.running import WORKER_TAG
from alphapulse_encryption.errors import LeftRunning

_SECONDS_BETWEEN_LOOKS = 1.0
_STOPPED = frozenset({"PIPELINE_CANCELED", "PIPELINE_CANCELING"})
_WORDS = {dg.DagsterRunStatus.SUCCESS: "Done", dg.DagsterRunStatus.CANCELED: "Stopped"}


@dataclass
class _Awaited:
    """A run, or the one that takes its place if its worker dies."""

    run: dg.DagsterRun
    cursor: str | None = None
    ended: bool = False

    def __str__(self) -> str:
        return in_words(self.run)


@dataclass(frozen=True)
class Waiting:
    """A command that waits."""

    instance: dg.DagsterInstance
    tell: Callable[[str], None]
    on_event: Callable[[dg.DagsterEvent], None] | None = None

    def submit(self, runs: Iterable[dg.DagsterRun]) -> Outcome:
        """Put runs into the instance's queue, and wait for all of them.

        Raises:
            LeftRunning: in place of an interruption; what was submitted goes on without the command.
        """
        waits: list[_Awaited] = []
        self._wait(waits, runs)
        return Outcome.together([self._outcome(awaited) for awaited in waits])

    def for_earlier(self, runs: Sequence[dg.DagsterRun]) -> None:
        """Wait for runs of a command that was killed, or left: two at once on one range would refuse each other.

        Raises:
            LeftRunning: in place of an interruption.
        """
        waits = [_Awaited(run) for run in runs]
        if waits:
            self.tell("  Runs of an earlier command are under way; first they are waited for:")
        for awaited in waits:
            self.tell(f"  {awaited}")
        self._wait(waits)

    def _wait(self, waits: list[_Awaited], runs: Iterable[dg.DagsterRun] = ()) -> None:
        """Submit these runs as well, and wait; where that is interrupted, say what goes on without this command."""
        try:
            for run in runs:
                waits.append(_Awaited(run))
                submit(self.instance, run)
                self.tell(f"  Submitted {waits[-1]}")
            self._until_ended(waits)
        except KeyboardInterrupt:
            left = "\n".join(f"  {awaited}" for awaited in waits if not awaited.ended)
            raise LeftRunning(
                "no longer waiting. These runs go on without this command, or wait for a worker:\n"
                f"{left}\n--stop-runs stops them, and so does Terminate in the UI; --pause has every backfill wait. "
                "The same command again waits for them, and then does what is left."
            ) from None

    def _until_ended(self, waits: Sequence[_Awaited]) -> None:
        answers = True
        while under_way := [awaited for awaited in waits if not awaited.ended]:
            try:
                found = self.instance.get_runs(dg.RunsFilter(run_ids=[a.run.run_id for a in under_way]))
                runs = {run.run_id: run for run in found}
                for awaited in under_way:
                    self._look_at(awaited, runs.get(awaited.run.run_id))
                answers = True
            except SQLAlchemyError:
                # Its text would name the server.
                if answers:
                    self.tell("! Dagster's storage does not answer. The runs go on; it is asked again.")
                answers = False
            if not all(awaited.ended for awaited in waits):
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _look_at(self, awaited: _Awaited, run: dg.DagsterRun | None) -> None:
        if self.on_event is not None:
            found = self.instance.get_records_for_run(awaited.run.run_id, awaited.cursor)
            awaited.cursor = found.cursor
            for record in found.records:
                if record.event_log_entry.dagster_event is not None:
                    self.on_event(record.event_log_entry.dagster_event)
        if run is None:
            # Somebody has deleted it.
            awaited.ended = True
            return
        before, awaited.run = awaited.run, run
        worker = run.tags.get(WORKER_TAG)
        if worker not in {None, before.tags.get(WORKER_TAG)}:
            self.tell(f"  Begun on {worker}: {awaited}")
        if not run.is_finished:
            return
        if run.status is dg.DagsterRunStatus.FAILURE and run.tags.get(tags.WILL_RETRY) == "true":
            again = self.instance.get_runs(dg.RunsFilter(tags={tags.PARENT_RUN: run.run_id}), limit=1)
            if again:
                self.tell(f"  Its worker is gone, run again as {again[0].run_id[:8]}: {awaited}")
                awaited.run, awaited.cursor = again[0], None
            return
        awaited.ended = True
        self.tell(f"  {_WORDS.get(run.status, 'Failed')}: {awaited}")

    def _outcome(self, awaited: _Awaited) -> Outcome:
        entries = self.instance.all_logs(awaited.run.run_id)
        events = [entry.dagster_event for entry in entries if entry.dagster_event is not None]
        table = awaited.run.tags.get("table")
        outcome = Outcome.of(awaited.run.run_id, awaited.run.is_success, events, table)
        problems = outcome.problems
        if not outcome.succeeded and not problems:
            ends = (e.message for e in reversed(events) if e.is_failure or e.event_type_value in _STOPPED)
            problems = (f"{awaited}: {next(ends, None) or 'it was deleted'}",)
            outcome = replace(outcome, failed=dict.fromkeys(outcome.failed, problems[0]))
        # Whatever stopped it, this command was not.
        return replace(outcome, problems=problems, interrupted=False)
