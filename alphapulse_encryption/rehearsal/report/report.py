"""The report of a rehearsal and the history of rehearsals: each one page that needs nothing but itself.

The pages' words are in the templates; ``drawings`` makes the plots, and ``metadata`` tells Dagster the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from alphapulse_encryption.rehearsal.measures import Latency, Rehearsal, added
from alphapulse_encryption.rehearsal.report import drawings, pages, prediction, wording
from alphapulse_encryption.rehearsal.report.comparison import compare
from alphapulse_encryption.rehearsal.report.found import Found
from alphapulse_encryption.rehearsal.report.verdict import judge

REPORT, HISTORY = "index.html", "history.html"
_SHOWN_IN_HISTORY = 30


def write(rehearsal: Rehearsal, history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the report of a rehearsal, also of one that failed.

    Args:
        directory: where to; made if it is not there.
    """
    return pages.keep(directory / REPORT, page(rehearsal, history))


def write_history(history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the page that shows rehearsals side by side.

    Args:
        history: all of them, in any order.
        directory: where to; it links the reports that are in it, each in a directory named by the run.
    """
    return pages.keep(directory / HISTORY, history_page(history, directory))


def page(rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> str:
    """The report as HTML."""
    found = Found.of(rehearsal, history)
    traffic = [measure.traffic for measure in rehearsal.stages if measure.traffic is not None]
    timings, pace = drawings.seconds(rehearsal), drawings.paces(rehearsal)
    return pages.render(
        "report.html",
        found=found,
        rehearsal=rehearsal,
        predicted=found.prediction,
        verdict=found.verdict,
        predicted_plot=drawings.predicted(found.prediction),
        timings_plot=timings[0],
        timings_parts=timings[1],
        pace_plot=pace[0],
        pace_parts=pace[1],
        space_plot=drawings.space(rehearsal),
        table_growth=_table_growth(rehearsal),
        traffic=traffic,
        latency_plot=drawings.latency(rehearsal),
        kinds=_kinds(rehearsal),
        error_kinds=added(one.error_kinds for one in traffic),
        lock_waits=added(one.lock_waits for one in traffic),
        left_out=list(dict.fromkeys(what for one in traffic for what in one.left_out)),
        quarantined=[
            (key, measure.stage, work.quarantined)
            for measure in rehearsal.stages
            for key, work in measure.tables.items()
            if work.quarantined
        ],
    )


def history_page(history: Sequence[Rehearsal], directory: Path | None = None) -> str:
    """The history as HTML; reports below the directory are linked."""
    unique = {one.run_id: one for one in history}
    in_order = sorted(unique.values(), key=lambda one: wording.in_utc(one.started))
    shown = in_order[-_SHOWN_IN_HISTORY:]
    accuracy = prediction.accuracy(in_order)
    compared = [(one, compare(one, in_order)) for one in shown]
    return pages.render(
        "history.html",
        rows=[(one, judge(one, comparison.worse), comparison) for one, comparison in compared],
        links={one.run_id: _link(one, directory) for one in shown},
        trials={trial.run_id: trial for trial in accuracy.trials},
        left_out=len(in_order) - len(shown),
        accuracy=accuracy,
        plots=drawings.trends(shown),
    )


def _table_growth(rehearsal: Rehearsal) -> dict[str, int]:
    """Bytes of each table at its largest."""
    sizes = [rehearsal.before, *(one.sizes for one in rehearsal.stages if one.sizes is not None)]
    return {
        key: max(one.tables[key].bytes for one in sizes if key in one.tables)
        for key in rehearsal.before.tables
    }


def _kinds(rehearsal: Rehearsal) -> dict[tuple[str, str], dict[str, Latency]]:
    """Each kind of request and its way, before, during the backfill, and afterwards."""
    found: dict[tuple[str, str], dict[str, Latency]] = {}
    for stage in drawings.OBSERVED:
        measure = rehearsal.stage(stage)
        if measure is None or measure.traffic is None:
            continue
        for latency in (measure.traffic.overall, *measure.traffic.by_kind):
            # One kind goes another way in each phase of the application.
            way = latency.way.split(",", 1)[0]
            found.setdefault((latency.kind, way), {}).setdefault(stage.value, latency)
    return found


def _link(rehearsal: Rehearsal, directory: Path | None) -> str:
    # A run's id is a UUID; anything else is no name of a directory of ours.
    if directory is None or not re.fullmatch(r"[A-Za-z0-9-]+", rehearsal.run_id):
        return ""
    link = f"{rehearsal.run_id}/{REPORT}"
    return link if (directory / link).is_file() else ""
