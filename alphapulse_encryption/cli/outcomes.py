"""What a run came to: read from its events, and shown by the command that launched it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import dagster as dg

from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.reporting import TABLES_FAILED


@dataclass(frozen=True)
class Outcome:
    """How a run ended: with the metadata of what was materialized, by partition, and of the outputs of ops.

    Args:
        interrupted: whether a signal, or somebody in the UI, stopped it here.
        failed: the tables of runs that failed, or that a run says it failed for, each with its first problem.
    """

    run_id: str
    succeeded: bool
    problems: tuple[str, ...]
    partitions: Mapping[str, Mapping[str, Any]]
    interrupted: bool = False
    output: Mapping[str, Any] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, run_id: str, succeeded: bool, events: Iterable[dg.DagsterEvent], table: str | None = None
    ) -> Self:
        """The outcome of a run that told these events, of one table where it is tagged with that."""
        partitions: dict[str, Mapping[str, Any]] = {}
        output: dict[str, Any] = {}
        problems: list[str] = []
        failed: dict[str, str] = {}
        interrupted = False
        for event in events:
            if event.is_step_materialization:
                materialization = event.step_materialization_data.materialization
                partitions.setdefault(materialization.partition or "", _values(materialization.metadata))
            elif event.is_successful_output:
                output |= _values(event.step_output_data.metadata)
            elif event.is_step_failure:
                failure = event.step_failure_data
                user = failure.user_failure_data
                problems.append(
                    (user and user.description) or "The step failed; its run in the UI says where."
                )
                failed |= _values(user.metadata if user else {}).get(TABLES_FAILED, {})
                interrupted |= failure.error is not None and "Interrupt" in (failure.error.cls_name or "")
        if not succeeded and table is not None:
            failed = {table: "; ".join(problems[:1])}
        return cls(run_id, succeeded, tuple(problems), partitions, interrupted, output, failed)

    @classmethod
    def together(cls, outcomes: Sequence[Outcome]) -> Self:
        """Of several runs, the outcome of all."""
        return cls(
            run_id=", ".join(outcome.run_id for outcome in outcomes),
            succeeded=all(outcome.succeeded for outcome in outcomes),
            problems=tuple(problem for outcome in outcomes for problem in outcome.problems),
            partitions={key: entries for outcome in outcomes for key, entries in outcome.partitions.items()},
            interrupted=any(outcome.interrupted for outcome in outcomes),
            output={name: value for outcome in outcomes for name, value in outcome.output.items()},
            failed={table: why for outcome in reversed(outcomes) for table, why in outcome.failed.items()},
        )

    def collected(self, name: str) -> list[tuple[str, Any]]:
        """Partition and value of one metadata entry, for every partition that has it."""
        return [(key, entries[name]) for key, entries in self.partitions.items() if name in entries]


def _values(metadata: Mapping[str, dg.MetadataValue]) -> dict[str, Any]:
    return {name: value.value for name, value in metadata.items()}


def in_words(run: dg.DagsterRun) -> str:
    """A run as a line names it: its job, its table and its ranges."""
    table = run.tags.get("table")
    first, last = (run.tags.get(tag, "") for tag in (tags.FIRST_PARTITION, tags.LAST_PARTITION))
    ranges = (
        f", ranges {first.partition('|')[0]} to {last.partition('|')[0]}" if table and "|" in first else ""
    )
    return f"{run.job_name}{f' {table}' if table else ''}{ranges} (run {run.run_id[:8]})"
