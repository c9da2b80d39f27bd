"""What of a rehearsal, or of several, is drawn; how it is drawn is in ``plots``. Empty where nothing is to be drawn."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from alphapulse_encryption.rehearsal.measures import Rehearsal, Stage, TableWork
from alphapulse_encryption.rehearsal.report import plots, wording
from alphapulse_encryption.rehearsal.report.prediction import Prediction
from alphapulse_encryption.rehearsal.report.verdict import MOST_TIMES_SIZE

# The guide's "encrypted data is ~30% larger".
GUIDE_GROWTH = 0.3
# Stages that get through rows, whose pace means something.
PACED = (Stage.BACKFILL, Stage.VERIFY, Stage.RESTORE, Stage.VERIFY_AGAIN)
OBSERVED = (Stage.BASELINE, Stage.BACKFILL, Stage.AFTERWARDS)
# More than these are not told apart by their colours; the rest share one.
_MOST_TABLES = len(plots.SERIES) - 2
_OTHERS, _WHOLE = "all others", "no table by itself"
# Beyond, a plot's time is in minutes.
_SECONDS_SHOWN = 180


def predicted(prediction: Prediction) -> str:
    """The range of each stage."""
    spans = {str(one.stage): one.seconds for one in prediction.stages}
    title = "Predicted duration of each stage"
    return plots.ranges(spans, "seconds (logarithmic)", title) if spans else ""


def seconds(rehearsal: Rehearsal) -> tuple[str, Sequence[str]]:
    """Seconds of each stage by table, and the names for the legend."""
    keys = _largest_tables(rehearsal)
    bars: dict[str, dict[str, float]] = {}
    for measure in rehearsal.stages:
        # Tables that are worked on side by side take longer, added up, than the stage.
        total = sum(work.seconds for work in measure.tables.values())
        share = min(1.0, measure.seconds / total) if total else 0.0
        bar = bars[str(measure.stage)] = dict.fromkeys((*keys, _OTHERS), 0.0)
        for key, work in measure.tables.items():
            bar[key if key in keys else _OTHERS] += work.seconds * share
        bar[_WHOLE] = max(0.0, measure.seconds - total * share)
    used = [part for part in (*keys, _OTHERS, _WHOLE) if any(bar[part] for bar in bars.values())]
    title = "Seconds of each stage, by table"
    return (plots.stacked(bars, used, "seconds", title) if bars else ""), used


def paces(rehearsal: Rehearsal) -> tuple[str, Sequence[str]]:
    """Rows per second by table, and the names for the legend."""
    found: dict[str, dict[str, float]] = {}
    for key in _largest_tables(rehearsal):
        for stage in PACED:
            measure = rehearsal.stage(stage)
            work = measure.tables.get(key, TableWork()) if measure is not None else TableWork()
            if work.rows and work.seconds:
                found.setdefault(key, {})[str(stage)] = work.rows / work.seconds
    used = [str(stage) for stage in PACED if any(str(stage) in of_table for of_table in found.values())]
    title = "Rows per second, by table"
    return (plots.grouped(found, used, "rows per second", title) if found else ""), used


def _largest_tables(rehearsal: Rehearsal) -> list[str]:
    sizes = rehearsal.before.tables
    chosen = sorted(sizes, key=lambda key: sizes[key].bytes, reverse=True)[:_MOST_TABLES]
    return [key for key in sizes if key in chosen]


def space(rehearsal: Rehearsal) -> str:
    """Sizes after each stage, and what was written to the write-ahead log."""
    measured = [(str(one.stage), one.wal, one.sizes) for one in rehearsal.stages if one.sizes is not None]
    if not measured:
        return ""
    before = rehearsal.before.database
    sizes = [rehearsal.before, *(found for _, _, found in measured)]
    biggest = max(one.database for one in sizes)
    units = ((2**30, "GB"), (2**20, "MB"), (2**10, "kB"), (1, "bytes"))
    unit, words = next((one for one in units if biggest >= one[0]), units[-1])
    return plots.steps(
        ["before", *(stage for stage, _, _ in measured)],
        [
            ("database", [one.database / unit for one in sizes]),
            ("heap", [sum(table.heap for table in one.tables.values()) / unit for one in sizes]),
            ("indexes", [sum(table.indexes for table in one.tables.values()) / unit for one in sizes]),
        ],
        {
            f"the guide's +{GUIDE_GROWTH:.0%}": before * (1 + GUIDE_GROWTH) / unit,
            "twice": before * MOST_TIMES_SIZE / unit,
        },
        [0.0, *(wal / unit for _, wal, _ in measured)],
        (words, f"WAL, {words}"),
        "Sizes after each stage, and the write-ahead log that it wrote",
    )


def latency(rehearsal: Rehearsal) -> str:
    """Latency over time, with the stages marked."""
    seen = [(one, one.traffic) for one in rehearsal.stages if one.traffic is not None]
    if not any(found.moments for _, found in seen):
        return ""
    begin = min(wording.in_utc(one.started) for one, _ in seen)
    whole = (max(wording.in_utc(one.ended) for one, _ in seen) - begin).total_seconds()
    unit, words = (60.0, "minutes") if whole > _SECONDS_SHOWN else (1.0, "seconds")

    def since(at: datetime) -> float:
        return (wording.in_utc(at) - begin).total_seconds() / unit

    lines: dict[str, list[tuple[float, float | None]]] = {"p50": [], "p99": [], "longest": []}
    errors = []
    for measure, traffic in seen:
        for moment in traffic.moments:
            x = since(moment.at) + moment.seconds / 2 / unit
            for label, points in lines.items():
                points.append((x, getattr(moment, label)))
            errors += [x] if moment.errors else []
        for points in lines.values():
            # Between two stages nobody measured.
            points.append((since(measure.ended), None))
    bands = [
        (str(one.stage), since(one.started), max(since(one.ended), since(one.started)), bool(one.faults))
        for one, _ in seen
    ]
    return plots.over_time(lines, bands, errors, words, "Latency over time, with the stages marked")


def trends(shown: Sequence[Rehearsal]) -> list[tuple[str, str]]:
    """Title and drawing of what is followed over rehearsals."""
    if len(shown) < 2:
        return []
    labels = [wording.in_utc(one.started).strftime("%m-%d %H:%M") for one in shown]
    per_row = {stage: [one.seconds_per_row(stage) for one in shown] for stage in PACED}
    followed: dict[tuple[str, str], plots.Lines] = {
        ("Time per row", "microseconds"): [
            (str(stage), [None if pace is None else pace * 1e6 for pace in paces])
            for stage, paces in per_row.items()
        ],
        ("Latency of the application", "milliseconds"): [
            (f"p99, {stage}", [one.p99(stage) for one in shown]) for stage in OBSERVED
        ],
        ("Growth", "times the size before"): [("database at its largest", [one.growth for one in shown])],
    }
    return [
        (title, plots.trends(labels, lines, unit, title))
        for (title, unit), lines in followed.items()
        if any(value is not None for _, values in lines for value in values)
    ]
