"""The end of a rehearsal, a good one or not: told in the run's log, in the history, and in a report."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from dagster._core.definitions.metadata import RawMetadataValue

from alphapulse_encryption.rehearsal import history
from alphapulse_encryption.rehearsal.clone import directory
from alphapulse_encryption.rehearsal.measures import Rehearsal


def conclude(context: dg.OpExecutionContext, rehearsal: Rehearsal) -> None:
    """Report a rehearsal.

    Args:
        context: of the op that ended it.
        rehearsal: what was measured.
    """
    context.log.info(in_a_line(rehearsal))
    history.keep(context, rehearsal, _metadata(rehearsal))


def report_page(run_id: str) -> Path:
    """Where a rehearsal's report is."""
    return directory(run_id) / "index.html"


def in_a_line(rehearsal: Rehearsal) -> str:
    """How it ended."""
    seconds = (rehearsal.ended - rehearsal.started).total_seconds()
    if rehearsal.failed_stage is not None:
        return f"The rehearsal failed in {rehearsal.failed_stage}, because: {rehearsal.failure}"
    return f"The rehearsal went all the way there and back in {seconds:.0f} s."


def _metadata(rehearsal: Rehearsal) -> dict[str, RawMetadataValue]:
    return {
        "verdict": in_a_line(rehearsal),
        "seconds": (rehearsal.ended - rehearsal.started).total_seconds(),
        **{f"seconds_{measure.stage}": measure.seconds for measure in rehearsal.stages},
    }
