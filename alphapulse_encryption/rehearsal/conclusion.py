"""The end of a rehearsal, a good one or not: told in the run's log, in the history, and in a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from alphapulse_encryption.rehearsal.clone.clone import directory
from alphapulse_encryption.rehearsal.measures import Rehearsal
from alphapulse_encryption.rehearsal.report import history, report
from alphapulse_encryption.rehearsal.report.metadata import metadata
from alphapulse_encryption.rehearsal.report.verdict import judge


def conclude(context: dg.OpExecutionContext, rehearsal: Rehearsal) -> None:
    """Report a rehearsal."""
    context.log.info(in_a_line(rehearsal))
    past = history.read(context.instance)
    seconds = (rehearsal.ended - rehearsal.started).total_seconds()
    told = metadata(rehearsal, past, _write(context, rehearsal, past))
    history.keep(context, rehearsal, {"seconds": seconds, **told})


def report_page(run_id: str) -> Path:
    """Where a rehearsal's report is."""
    return directory(run_id) / report.REPORT


def history_page() -> Path:
    """Where rehearsals are shown side by side."""
    return directory(report.HISTORY)


def _write(context: dg.OpExecutionContext, rehearsal: Rehearsal, past: Sequence[Rehearsal]) -> Path | None:
    """The pages; what was measured is kept without them, too."""
    try:
        page = report.write(rehearsal, past, report_page(rehearsal.run_id).parent)
        report.write_history([*past, rehearsal], history_page().parent)
    except OSError as error:
        context.log.warning(f"The report could not be written: {error.strerror}")
        return None
    context.log.info(f"Report: {page}")
    return page


def in_a_line(rehearsal: Rehearsal) -> str:
    """How it ended."""
    seconds = (rehearsal.ended - rehearsal.started).total_seconds()
    if rehearsal.failed_stage is not None:
        return f"The rehearsal failed in {rehearsal.failed_stage}, because: {rehearsal.failure}"
    return f"The rehearsal went all the way there and back in {seconds:.0f} s. {judge(rehearsal).sentence}"
