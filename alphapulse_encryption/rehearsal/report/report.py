"""The report of a rehearsal and the history of rehearsals: each one page that needs nothing but itself.

Everything that comes from a database or from a message is escaped where it is put into a page; the measurements hold no
values, keys or addresses to begin with.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphapulse_encryption.rehearsal.measures import (
    DAY,
    Finding,
    Latency,
    Rehearsal,
    Stage,
    StageMeasure,
    TableWork,
)
from alphapulse_encryption.rehearsal.report import plots, prediction, runbook, wording
from alphapulse_encryption.rehearsal.report.comparison import (
    Comparison,
    compare,
    growth,
    own_seconds,
    seconds_per_row,
)
from alphapulse_encryption.rehearsal.report.prediction import Accuracy, Prediction, Span, Trial
from alphapulse_encryption.rehearsal.report.verdict import (
    MOST_TIMES_P99,
    MOST_TIMES_SIZE,
    Level,
    Verdict,
    all_findings,
    judge,
    p99_ratio,
    peak,
)

if TYPE_CHECKING:
    import jinja2

    from alphapulse_encryption.defs.resources.border import MetadataEntry

REPORT, HISTORY = "index.html", "history.html"
# The guide's "encrypted data is ~30% larger".
GUIDE_GROWTH = 0.3
# Where production's size is not known.
EXAMPLE_TIMES = 10
_WEIGHTS = ("blocker", "warning", "note")
# More than these are not told apart by their colours; the rest share one.
_MOST_PARTS = len(plots.SERIES)
_OTHERS = "all others"
# Stages that get through rows, whose pace means something.
_PACED = (Stage.BACKFILL, Stage.VERIFY, Stage.RESTORE, Stage.VERIFY_AGAIN)
_SHOWN_IN_HISTORY = 30
# Beyond, a plot's time is in minutes.
_SECONDS_SHOWN = 180


def write(rehearsal: Rehearsal, history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the report of a rehearsal, also of one that failed.

    Args:
        rehearsal: what was measured.
        history: other rehearsals, in any order; itself may be among them.
        directory: where to; made if it is not there.

    Returns:
        The page.
    """
    return _keep(directory / REPORT, page(rehearsal, history))


def write_history(history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the page that shows rehearsals side by side.

    Args:
        history: all of them, in any order.
        directory: where to; it links the reports that are in it, each in a directory named by the run.

    Returns:
        The page.
    """
    return _keep(directory / HISTORY, history_page(history, directory))


def page(rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> str:
    """The report as HTML."""
    found = _Found.of(rehearsal, history)
    return _template("report.html").render(
        found=found,
        rehearsal=rehearsal,
        verdict=found.verdict,
        figures=_figures(found),
        predicted=_predicted(found),
        timings=_timings(rehearsal),
        space=_space(rehearsal),
        traffic=_traffic(rehearsal),
        faults=[(measure, fault) for measure in rehearsal.stages for fault in measure.faults],
        findings=_findings(rehearsal),
        quarantined=_quarantined(rehearsal),
        day=_with_durations(runbook.the_day(rehearsal), found.prediction),
        back=_with_durations(runbook.the_way_back(rehearsal), found.prediction),
        circumstances=_circumstances(rehearsal),
        GUIDE_GROWTH=GUIDE_GROWTH,
        MOST_TIMES_SIZE=MOST_TIMES_SIZE,
        MOST_TIMES_P99=MOST_TIMES_P99,
        EXAMPLE_TIMES=EXAMPLE_TIMES,
    )


def history_page(history: Sequence[Rehearsal], directory: Path | None = None) -> str:
    """The history as HTML; reports below the directory are linked."""
    unique = {one.run_id: one for one in history}
    in_order = sorted(unique.values(), key=lambda one: wording.in_utc(one.started))
    shown = in_order[-_SHOWN_IN_HISTORY:]
    judged = prediction.accuracy(in_order)
    trials = {trial.run_id: trial for trial in judged.trials}
    rows = []
    for one in shown:
        comparison = compare(one, in_order)
        rows.append(
            _Row(
                rehearsal=one,
                verdict=judge(one, comparison.worse),
                comparison=comparison,
                link=_link(one, directory),
                rows=sum(table.rows for table in one.before.tables.values()),
                seconds=sum(own_seconds(measure) for measure in one.stages if measure.stage in DAY),
                paces={stage: _pace(one, stage) for stage in _PACED},
                ratio=p99_ratio(one),
                growth=growth(one),
                trial=trials.get(one.run_id),
            )
        )
    return _template("history.html").render(
        rows=rows,
        left_out=len(in_order) - len(shown),
        latest=rows[-1] if rows else None,
        accuracy=judged,
        paced=_PACED,
        plots=_history_plots(shown),
    )


def metadata(
    rehearsal: Rehearsal, history: Sequence[Rehearsal], path: Path | None = None
) -> dict[str, MetadataEntry]:
    """The report for Dagster: verdict, figures that it plots over time, and tables.

    Args:
        rehearsal: what was measured.
        history: other rehearsals, in any order; itself may be among them.
        path: of the page.
    """
    import dagster as dg

    found = _Found.of(rehearsal, history)
    shown: dict[str, MetadataEntry] = {"verdict": dg.MetadataValue.md(_markdown(found))}
    if path is not None:
        shown["report"] = dg.MetadataValue.path(str(path))
    shown |= {name: figure for name, figure in _numbers(found).items() if figure is not None}
    tables: dict[str, list[dict[str, str | int | float | bool | None]]] = {
        "stages": [_stage_record(measure) for measure in rehearsal.stages],
        "findings": [
            {"weight": found.level, "subject": found.subject, "finding": found.what, "advice": found.advice}
            for _, found in _findings(rehearsal)
        ],
        "predicted": [
            {
                "stage": str(one.stage),
                "likely": wording.duration(one.seconds.likely),
                "range": wording.span_of_time(one.seconds),
                "holds_locks": "yes" if one.locks else "no",
            }
            for one in found.prediction.stages
        ],
    }
    for name, records in tables.items():
        if records:
            shown[name] = dg.MetadataValue.table([dg.TableRecord(record) for record in records])
    return shown


# What everything else is shown from.


@dataclass(frozen=True)
class _Found:
    """A rehearsal, thought through.

    Args:
        rehearsal: what was measured.
        comparison: with those before it.
        verdict: of it.
        accuracy: of the predictions until then.
        prediction: for production; where its size is not known, for an example.
    """

    rehearsal: Rehearsal
    comparison: Comparison
    verdict: Verdict
    accuracy: Accuracy
    prediction: Prediction

    @classmethod
    def of(cls, rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> _Found:
        comparison = compare(rehearsal, history)
        accuracy = prediction.accuracy([*comparison.earlier, rehearsal])
        sizes = rehearsal.production or prediction.times_as_large(rehearsal.before, EXAMPLE_TIMES)
        return cls(
            rehearsal=rehearsal,
            comparison=comparison,
            verdict=judge(rehearsal, comparison.worse),
            accuracy=accuracy,
            prediction=prediction.predict(rehearsal, sizes, accuracy),
        )


def _figures(found: _Found) -> list[tuple[str, str, str]]:
    """The few that are read first: label, figure, what to hold it against."""
    rehearsal, predicted = found.rehearsal, found.prediction
    what = "production" if rehearsal.production is not None else f"{EXAMPLE_TIMES} times the rehearsed rows"
    figures = []
    if predicted.stages:
        figures.append(
            (
                f"Predicted for {what}",
                wording.duration(predicted.seconds.likely),
                wording.span_of_time(predicted.seconds),
            )
        )
        figures.append(
            (
                "Of that, locks are held",
                wording.duration(predicted.locked.likely),
                "drop and erasure; table by table",
            )
        )
    ratio = p99_ratio(rehearsal)
    if ratio is not None:
        figures.append(
            (
                "p99 in the backfill",
                f"{ratio:.1f} times before",
                f"at most {MOST_TIMES_P99:g} times is wanted",
            )
        )
    requests = sum(one.traffic.overall.requests for one in rehearsal.stages if one.traffic is not None)
    if requests:
        failed = sum(one.traffic.overall.errors for one in rehearsal.stages if one.traffic is not None)
        wrong = sum(one.traffic.overall.wrong_answers for one in rehearsal.stages if one.traffic is not None)
        figures.append(
            ("Requests of the application", f"{requests:,}", f"{failed:,} failed, {wrong:,} wrong answers")
        )
    grown = growth(rehearsal)
    if grown is not None:
        figures.append(
            (
                "Database at its largest",
                f"{grown:.2f} times before",
                f"the guide reckons with {1 + GUIDE_GROWTH:g} times",
            )
        )
    unchanged = {True: "unchanged", False: "CHANGED", None: "not compared"}[rehearsal.source_unchanged]
    removed = "removed" if rehearsal.stage(Stage.REMOVAL) is not None else "not known to be removed"
    figures.append(("Source", unchanged, f"clone: {removed}"))
    return figures


def _predicted(found: _Found) -> dict[str, Any]:
    predicted = found.prediction
    spans = {str(one.stage): one.seconds for one in predicted.stages}
    latest = found.accuracy.trials[-1] if found.accuracy.trials else None
    return {
        "stages": predicted.stages,
        "rows": sum(table.rows for table in predicted.sizes.tables.values()),
        "tables": predicted.sizes.tables,
        "plot": plots.ranges(spans, "seconds (logarithmic)", "Predicted duration of each stage")
        if spans
        else "",
        "latest": latest if latest is not None and latest.run_id == found.rehearsal.run_id else None,
        "rule": 2 * predicted.sizes.database,
        "needed": predicted.growth,
    }


def _timings(rehearsal: Rehearsal) -> dict[str, Any]:
    keys = _largest_tables(rehearsal)
    parts = [*keys, *([_OTHERS] if len(rehearsal.before.tables) > len(keys) else [])]
    whole = "no table by itself"
    bars: dict[str, dict[str, float]] = {}
    for measure in rehearsal.stages:
        bar: dict[str, float] = {}
        # Tables that are worked on side by side take longer, added up, than the stage.
        added = sum(work.seconds for work in measure.tables.values())
        share = min(1.0, measure.seconds / added) if added else 0.0
        for key, work in measure.tables.items():
            part = key if key in keys else _OTHERS
            bar[part] = bar.get(part, 0.0) + work.seconds * share
        bar[whole] = max(0.0, measure.seconds - added * share)
        bars[str(measure.stage)] = bar
    paces = {
        str(stage): by_key
        for stage in _PACED
        if (by_key := {key: pace for key in keys if (pace := _rows_per_second(rehearsal, stage, key))})
    }
    by_table = {
        key: {stage: by_key[key] for stage, by_key in paces.items() if key in by_key}
        for key in keys
        if any(key in by_key for by_key in paces.values())
    }
    used = [
        part for part in (*parts[: _MOST_PARTS - 1], whole) if any(bar.get(part) for bar in bars.values())
    ]
    return {
        "plot": plots.stacked(bars, used, "seconds", "Seconds of each stage, by table") if bars else "",
        "parts": used,
        "pace_plot": plots.grouped(by_table, list(paces), "rows per second", "Rows per second, by table")
        if by_table
        else "",
        "pace_parts": list(paces),
        "by_table": any(measure.tables for measure in rehearsal.stages),
        "total": sum(measure.seconds for measure in rehearsal.stages),
        "details": [_stage_details(rehearsal, measure) for measure in rehearsal.stages],
    }


def _stage_details(rehearsal: Rehearsal, measure: StageMeasure) -> dict[str, Any]:
    return {
        "measure": measure,
        "rows": sum(work.rows for work in measure.tables.values()),
        "values": sum(work.values for work in measure.tables.values()),
        "pace": _pace(rehearsal, measure.stage),
        "held_back": sum(work.seconds_held_back for work in measure.tables.values()),
        "changed": sum(work.changed_meanwhile for work in measure.tables.values()),
        "tables": [
            (key, work, work.rows / work.seconds if work.rows and work.seconds else None)
            for key, work in measure.tables.items()
        ],
    }


def _space(rehearsal: Rehearsal) -> dict[str, Any]:
    before, largest = rehearsal.before, peak(rehearsal)
    measured = [measure for measure in rehearsal.stages if measure.sizes is not None]
    labels = ["before", *(str(measure.stage) for measure in measured)]
    sizes = [before, *(measure.sizes for measure in measured if measure.sizes is not None)]
    heap = [sum(table.heap for table in one.tables.values()) for one in sizes]
    indexes = [sum(table.indexes for table in one.tables.values()) for one in sizes]
    biggest = max(1, *(one.database for one in sizes))
    unit, words = next(
        (unit, words)
        for unit, words in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB"), (1, "bytes"))
        if biggest >= unit
    )
    tables = []
    for key, size in before.tables.items():
        of_table = [one.tables[key] for one in sizes if key in one.tables]
        most = max(one.heap + one.indexes for one in of_table)
        first = size.heap + size.indexes
        tables.append((key, size, most, most / first - 1 if first else None))
    return {
        "before": before,
        "largest": largest,
        "growth": largest.database / before.database - 1 if largest and before.database else None,
        "wal": sum(measure.wal for measure in rehearsal.stages),
        "tables": tables,
        "plot": plots.steps(
            labels,
            [
                ("database", [one.database / unit for one in sizes], plots.SERIES[0]),
                ("heap", [one / unit for one in heap], plots.SERIES[1]),
                ("indexes", [one / unit for one in indexes], plots.SERIES[2]),
            ],
            [
                (f"the guide's +{GUIDE_GROWTH:.0%}", before.database * (1 + GUIDE_GROWTH) / unit),
                ("twice", before.database * MOST_TIMES_SIZE / unit),
            ],
            [0.0, *(measure.wal / unit for measure in measured)],
            (words, f"WAL, {words}"),
            "Sizes after each stage, and the write-ahead log that it wrote",
        )
        if measured
        else "",
    }


def _traffic(rehearsal: Rehearsal) -> dict[str, Any] | None:
    seen = [measure for measure in rehearsal.stages if measure.traffic is not None]
    if not seen:
        return None
    begin = min(wording.in_utc(measure.started) for measure in seen)

    whole = (max(wording.in_utc(measure.ended) for measure in seen) - begin).total_seconds()
    unit, words = (60.0, "minutes") if whole > _SECONDS_SHOWN else (1.0, "seconds")

    def since(at: datetime) -> float:
        return (wording.in_utc(at) - begin).total_seconds() / unit

    percentiles: dict[str, list[tuple[float, float | None]]] = {"p50": [], "p99": [], "longest": []}
    errors = []
    for measure in seen:
        assert measure.traffic is not None  # noqa: S101
        for found in measure.traffic.moments:
            x = since(found.at) + found.seconds / 2 / unit
            for label, points in percentiles.items():
                points.append((x, getattr(found, label)))
            if found.errors:
                errors.append((x, found.errors))
        for points in percentiles.values():
            # Between two stages nobody measured.
            points.append((since(measure.ended), None))
    bands = [
        plots.Band(
            str(one.stage), since(one.started), max(since(one.ended), since(one.started)), bool(one.faults)
        )
        for one in seen
    ]
    drawn = any(y is not None for points in percentiles.values() for _, y in points)
    lines = [
        plots.Line("p50", percentiles["p50"], plots.SERIES[0]),
        plots.Line("p99", percentiles["p99"], plots.SERIES[1]),
        plots.Line("longest", percentiles["longest"], plots.SERIES[3], dashed=True),
    ]
    return {
        "stages": seen,
        "plot": plots.over_time(
            lines,
            bands,
            errors,
            words,
            "milliseconds (logarithmic)",
            "Latency over time, with the stages marked",
        )
        if drawn or errors
        else "",
        "ratio": p99_ratio(rehearsal),
        "kinds": _kinds(rehearsal),
        "left_out": list(dict.fromkeys(what for one in seen if one.traffic for what in one.traffic.left_out)),
        "error_kinds": _added(one.traffic.error_kinds for one in seen if one.traffic),
        "lock_waits": _added(one.traffic.lock_waits for one in seen if one.traffic),
    }


def _kinds(rehearsal: Rehearsal) -> list[dict[str, Any]]:
    """Each kind of request before, during the backfill, and afterwards."""
    found: dict[tuple[str, str], dict[str, Latency]] = {}
    for label, stage in (("before", Stage.BASELINE), ("during", Stage.BACKFILL), ("after", Stage.AFTERWARDS)):
        measure = rehearsal.stage(stage)
        if measure is None or measure.traffic is None:
            continue
        for latency in (measure.traffic.overall, *measure.traffic.by_kind):
            # One kind goes another way in each phase of the application.
            way = latency.way.split(",", 1)[0]
            found.setdefault((latency.kind, way), {}).setdefault(label, latency)
    return [{"kind": kind, "way": way, **latencies} for (kind, way), latencies in found.items()]


def _findings(rehearsal: Rehearsal) -> list[tuple[Stage, Finding]]:
    """Each once, by weight."""
    found: dict[tuple[str, str, str], tuple[Stage, Finding]] = {}
    for stage, finding in all_findings(rehearsal):
        found.setdefault((finding.level, finding.subject, finding.what), (stage, finding))
    return sorted(found.values(), key=lambda one: _WEIGHTS.index(one[1].level))


def _quarantined(rehearsal: Rehearsal) -> list[tuple[str, Stage, int]]:
    return [
        (key, measure.stage, work.quarantined)
        for measure in rehearsal.stages
        for key, work in measure.tables.items()
        if work.quarantined
    ]


def _with_durations(
    steps: Iterable[runbook.Step], predicted: Prediction
) -> list[tuple[runbook.Step, Span | None]]:
    """Each step with the seconds that its stages are predicted to take, None where one of them is not known."""
    found = []
    for step in steps:
        spans = [one.seconds for stage in step.stages if (one := predicted.stage(stage)) is not None]
        known = len(spans) == len(step.stages) > 0
        found.append((step, sum(spans, start=Span()) if known else None))
    return found


def _circumstances(rehearsal: Rehearsal) -> list[tuple[str, str]]:
    told = rehearsal.circumstances
    return [
        ("Source", told.source),
        ("Cloned by", told.cloned_by),
        ("PostgreSQL", told.server_version),
        ("Cores", str(told.cores)),
        ("Workers", str(told.workers)),
        ("Batch ranges per table", str(told.batch_ranges)),
        ("Requests per second", wording.number(told.rate)),
        ("Rest of the backfill per second of work", wording.number(told.rest_ratio)),
        ("Version of alphapulse_encryption", told.version),
        ("Run", rehearsal.run_id),
        ("Began", wording.moment(rehearsal.started)),
        ("Ended", wording.moment(rehearsal.ended)),
    ]


def _largest_tables(rehearsal: Rehearsal) -> list[str]:
    sizes = rehearsal.before.tables
    most = _MOST_PARTS - 1 if len(sizes) < _MOST_PARTS else _MOST_PARTS - 2
    chosen = sorted(sizes, key=lambda key: sizes[key].heap + sizes[key].indexes, reverse=True)[:most]
    return [key for key in sizes if key in chosen]


def _pace(rehearsal: Rehearsal, stage: Stage) -> float | None:
    """Rows per second."""
    measure = rehearsal.stage(stage)
    per_row = seconds_per_row(measure) if measure is not None else None
    return 1 / per_row if per_row else None


def _rows_per_second(rehearsal: Rehearsal, stage: Stage, key: str) -> float | None:
    measure = rehearsal.stage(stage)
    work = measure.tables.get(key, TableWork()) if measure is not None else TableWork()
    return work.rows / work.seconds if work.rows and work.seconds else None


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


# The history.


@dataclass(frozen=True)
class _Row:
    """A rehearsal in the history; ``seconds`` are those of the day's stages."""

    rehearsal: Rehearsal
    verdict: Verdict
    comparison: Comparison
    link: str
    rows: int
    seconds: float
    paces: Mapping[Stage, float | None]
    ratio: float | None
    growth: float | None
    trial: Trial | None


def _history_plots(shown: Sequence[Rehearsal]) -> list[tuple[str, str]]:
    if len(shown) < 2:
        return []
    labels = [wording.in_utc(one.started).strftime("%m-%d %H:%M") for one in shown]
    per_row = [
        (
            str(stage),
            [pace * 1e6 if (pace := _seconds_per_row(one, stage)) is not None else None for one in shown],
        )
        for stage in _PACED
    ]
    latency: list[tuple[str, Sequence[float | None]]] = [
        (f"p99, {stage}", [_p99(one, stage) for one in shown])
        for stage in (Stage.BASELINE, Stage.BACKFILL, Stage.AFTERWARDS)
    ]
    grown: list[tuple[str, Sequence[float | None]]] = [
        ("database at its largest", [growth(one) for one in shown])
    ]
    return [
        (title, plots.trends(labels, lines, unit, title))
        for title, lines, unit in (
            ("Time per row", per_row, "microseconds"),
            ("Latency of the application", latency, "milliseconds"),
            ("Growth", grown, "times the size before"),
        )
        if any(value is not None for _, values in lines for value in values)
    ]


def _seconds_per_row(rehearsal: Rehearsal, stage: Stage) -> float | None:
    measure = rehearsal.stage(stage)
    return seconds_per_row(measure) if measure is not None else None


def _p99(rehearsal: Rehearsal, stage: Stage) -> float | None:
    measure = rehearsal.stage(stage)
    if measure is None or measure.traffic is None or not measure.traffic.overall.requests:
        return None
    return measure.traffic.overall.p99


def _link(rehearsal: Rehearsal, directory: Path | None) -> str:
    # A run's id is a UUID; anything else is no name of a directory of ours.
    if directory is None or not re.fullmatch(r"[A-Za-z0-9-]+", rehearsal.run_id):
        return ""
    there = (directory / rehearsal.run_id / REPORT).is_file()
    return f"{rehearsal.run_id}/{REPORT}" if there else ""


# Dagster.


def _markdown(found: _Found) -> str:
    verdict = found.verdict
    lines = [f"**{verdict.level}**"]
    for reason in verdict.reasons:
        advice = f" {_plain(reason.advice)}" if reason.advice else ""
        lines.append(f"- {reason.level}: {_plain(reason.what)}.{advice}")
    if found.prediction.stages:
        what = (
            "production"
            if found.rehearsal.production is not None
            else f"{EXAMPLE_TIMES} times the rehearsed rows"
        )
        lines.append(
            f"\nPredicted for {what}: {wording.duration(found.prediction.seconds.likely)} "
            f"({wording.span_of_time(found.prediction.seconds)}), of which locks are held "
            f"{wording.duration(found.prediction.locked.likely)}. {found.accuracy.sentence}"
        )
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _numbers(found: _Found) -> dict[str, float | int | None]:
    """What Dagster plots over rehearsals."""
    rehearsal = found.rehearsal
    levels = [finding.level for _, finding in _findings(rehearsal)]
    traffic = [measure.traffic.overall for measure in rehearsal.stages if measure.traffic is not None]
    figures: dict[str, float | int | None] = {
        "ready": int(found.verdict.level is not Level.NOT_READY),
        "blockers": len(found.verdict.blockers),
        "warnings": len(found.verdict.warnings),
        "findings": sum(level != "note" for level in levels),
        "rows": sum(table.rows for table in rehearsal.before.tables.values()),
        "growth": growth(rehearsal),
        "wal_bytes": sum(measure.wal for measure in rehearsal.stages),
        "p99_times_baseline": p99_ratio(rehearsal),
        "requests": sum(one.requests for one in traffic),
        "failed_requests": sum(one.errors for one in traffic),
        "wrong_answers": sum(one.wrong_answers for one in traffic),
        "predicted_seconds": found.prediction.seconds.likely if found.prediction.stages else None,
        "predicted_seconds_low": found.prediction.seconds.low if found.prediction.stages else None,
        "predicted_seconds_high": found.prediction.seconds.high if found.prediction.stages else None,
        "predicted_locked_seconds": found.prediction.locked.likely if found.prediction.stages else None,
        "prediction_error": found.accuracy.trials[-1].error if found.accuracy.trials else None,
    }
    for measure in rehearsal.stages:
        figures[f"seconds_{measure.stage}"] = measure.seconds
    for stage in (Stage.BASELINE, Stage.BACKFILL, Stage.AFTERWARDS):
        figures[f"p99_ms_{stage}"] = _p99(rehearsal, stage)
    return {
        name: round(figure, 3) if isinstance(figure, float) else figure
        for name, figure in figures.items()
        if figure is not None and abs(figure) < 2**63
    }


def _stage_record(measure: StageMeasure) -> dict[str, str | int | float | bool | None]:
    traffic = measure.traffic.overall if measure.traffic is not None else None
    return {
        "stage": str(measure.stage),
        "seconds": round(measure.seconds, 3),
        "rows": str(sum(work.rows for work in measure.tables.values())),
        "wal": wording.size(measure.wal),
        "p50_ms": wording.milliseconds(traffic.p50 if traffic else None),
        "p99_ms": wording.milliseconds(traffic.p99 if traffic else None),
        "requests": str(traffic.requests if traffic else 0),
        "failed": str(traffic.errors if traffic else 0),
    }


# Pages.


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alphapulse_encryption.rehearsal.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for filter_ in (
        *(
            wording.duration,
            wording.size,
            wording.number,
            wording.milliseconds,
            wording.moment,
            wording.share,
        ),
        *(wording.span_of_time, wording.span_of_size),
    ):
        environment.filters[filter_.__name__] = filter_
    # The plots are ours, and their labels are escaped where they are drawn.
    environment.filters["drawing"] = Markup
    environment.globals["Level"] = Level
    environment.globals["Stage"] = Stage
    return environment


def _template(name: str) -> jinja2.Template:
    return _environment().get_template(name)


def _keep(path: Path, text: str) -> Path:
    """Write a page so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".html")
    try:
        # Lone surrogates cannot be encoded.
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
