"""The plots of the pages: inline SVG whose colours are the page's, light or dark, and whose text is text.

Each has a title for those who hear the page, and is empty where nothing is to be drawn. Matplotlib knows fixed colours
only, so it draws with colours that stand for the page's variables, which then replace them. Names from the database are
drawn as they are: without mathematics, and without what XML has no place for.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from alphapulse_encryption.migration.insight.estimates import Span
from alphapulse_encryption.rehearsal.measures import Rehearsal, Stage, TableWork
from alphapulse_encryption.rehearsal.report import wording
from alphapulse_encryption.rehearsal.report.prediction import Prediction
from alphapulse_encryption.rehearsal.report.verdict import MOST_TIMES_SIZE
from alphapulse_encryption.secrecy import find_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# The guide's "encrypted data is ~30% larger".
GUIDE_GROWTH = 0.3
# Stages that get through rows, whose pace means something.
PACED = (Stage.BACKFILL, Stage.VERIFY, Stage.RESTORE, Stage.VERIFY_AGAIN)
OBSERVED = (Stage.BASELINE, Stage.BACKFILL, Stage.AFTERWARDS)
_OTHERS, _WHOLE = "all others", "no table by itself"
# Beyond, a plot's time is in minutes.
_SECONDS_SHOWN = 180

_WIDTH = 9.0
# Any colours will do that matplotlib does not use by itself.
_INK, _FAINT, _GRID, _BAD = "#010203", "#010204", "#010205", "#010206"
_SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216", "#010217", "#010218")
_VARIABLES = {_INK: "ink", _FAINT: "faint", _GRID: "grid", _BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(_SERIES, start=1)
}
# More tables are not told apart by their colours; the rest share one.
_MOST_TABLES = len(_SERIES) - 2
_COLOUR = re.compile("|".join(_VARIABLES))
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
}
_LONGEST_NAME = 28
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
# So far apart are labels along an axis, as a share of it.
_LABEL_ROOM = 0.022
# Figures are drawn up to here.
_LARGEST = 1e15

# Label and values of each; None where one is not known.
Lines = Sequence[tuple[str, Sequence[float | None]]]


def predicted(prediction: Prediction) -> str:
    """The range of each stage."""
    spans = {str(one.stage): one.seconds for one in prediction.stages}
    title = "Predicted duration of each stage"
    return ranges(spans, "seconds (logarithmic)", title) if spans else ""


def ranges(spans: Mapping[str, Span], xlabel: str, title: str) -> str:
    """A horizontal range for each, with a point where it is likely; logarithmic, for they differ by orders."""
    with _figure(title, 0.9 + 0.28 * len(spans)) as figure:
        axes = _labelled(figure, spans, xlabel)
        for place, span in enumerate(spans.values()):
            low, likely, high = (max(_drawn(value), 1e-3) for value in (span.low, span.likely, span.high))
            axes.plot([low, high], [place, place], color=_SERIES[0], linewidth=6, alpha=0.45)
            axes.plot([likely], [place], marker="o", markersize=6, color=_SERIES[0])
        axes.set_xscale("log")
        _plain_numbers(axes.xaxis)
        return _svg(figure, title)


def seconds(rehearsal: Rehearsal) -> tuple[str, Sequence[str]]:
    """Seconds of each stage by table, in horizontal bars, and the names for the legend."""
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
    if not bars:
        return "", used
    title = "Seconds of each stage, by table"
    with _figure(title, 0.9 + 0.28 * len(bars)) as figure:
        axes = _labelled(figure, bars, "seconds")
        left = [0.0] * len(bars)
        for part, colour in zip(used, _SERIES, strict=False):
            lengths = [_drawn(bar[part]) for bar in bars.values()]
            axes.barh(range(len(bars)), lengths, left=left, color=colour, height=0.66)
            left = [begin + length for begin, length in zip(left, lengths, strict=True)]
        return _svg(figure, title), used


def paces(rehearsal: Rehearsal) -> tuple[str, Sequence[str]]:
    """Rows per second by table, in groups of horizontal bars, and the names for the legend."""
    bars: dict[str, dict[str, float]] = {}
    for key in _largest_tables(rehearsal):
        for stage in PACED:
            measure = rehearsal.stage(stage)
            work = measure.tables.get(key, TableWork()) if measure is not None else TableWork()
            if work.rows and work.seconds:
                bars.setdefault(key, {})[str(stage)] = work.rows / work.seconds
    used = [str(stage) for stage in PACED if any(str(stage) in bar for bar in bars.values())]
    if not bars:
        return "", used
    title = "Rows per second, by table"
    with _figure(title, 0.9 + 0.2 * len(bars) * len(used)) as figure:
        axes = _labelled(figure, bars, "rows per second")
        height = 0.8 / len(used)
        for number, (part, colour) in enumerate(zip(used, _SERIES, strict=False)):
            places = [place - 0.4 + (number + 0.5) * height for place in range(len(bars))]
            axes.barh(places, [_drawn(bar.get(part)) for bar in bars.values()], height * 0.9, color=colour)
        return _svg(figure, title), used


def _largest_tables(rehearsal: Rehearsal) -> list[str]:
    sizes = rehearsal.before.tables
    chosen = sorted(sizes, key=lambda key: sizes[key].bytes, reverse=True)[:_MOST_TABLES]
    return [key for key in sizes if key in chosen]


def space(rehearsal: Rehearsal) -> str:
    """Sizes after each stage, with the guide's limits; below, what was written to the write-ahead log."""
    measured = [(str(one.stage), one.wal, one.sizes) for one in rehearsal.stages if one.sizes is not None]
    if not measured:
        return ""
    before = rehearsal.before.database
    sizes = [rehearsal.before, *(found for _, _, found in measured)]
    biggest = max(one.database for one in sizes)
    units = ((2**30, "GB"), (2**20, "MB"), (2**10, "kB"), (1, "bytes"))
    unit, words = next((one for one in units if biggest >= one[0]), units[-1])
    lines = [
        ("database", [one.database / unit for one in sizes]),
        ("heap", [sum(table.heap for table in one.tables.values()) / unit for one in sizes]),
        ("indexes", [sum(table.indexes for table in one.tables.values()) / unit for one in sizes]),
    ]
    limits = {f"the guide's +{GUIDE_GROWTH:.0%}": 1 + GUIDE_GROWTH, "twice": MOST_TIMES_SIZE}
    title = "Sizes after each stage, and the write-ahead log that it wrote"
    with _figure(title, 4.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        _draw_lines(above, lines)
        for label, times in limits.items():
            limit = _drawn(before * times / unit)
            above.axhline(limit, color=_BAD, linewidth=0.9, linestyle=(0, (5, 3)))
            above.annotate(label, (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        above.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(lines))
        written = [0.0, *(_drawn(wal / unit) for _, wal, _ in measured)]
        below.bar(range(len(written)), written, color=_SERIES[0], width=0.7)
        labels = ["before", *(stage for stage, _, _ in measured)]
        below.set_xticks(range(len(labels)), labels, rotation=40, ha="right")
        _dress(above, "y", words)
        _dress(below, "y", f"WAL, {words}")
        return _svg(figure, title)


def latency(rehearsal: Rehearsal) -> str:
    """Milliseconds over time, with the stages as bands; failed requests as crosses at the bottom."""
    seen = [(one, one.traffic) for one in rehearsal.stages if one.traffic is not None]
    if not any(found.moments for _, found in seen):
        return ""
    begin = min(wording.in_utc(one.started) for one, _ in seen)
    whole = (max(wording.in_utc(one.ended) for one, _ in seen) - begin).total_seconds()
    unit, words = (60.0, "minutes") if whole > _SECONDS_SHOWN else (1.0, "seconds")

    def since(at: datetime) -> float:
        return (wording.in_utc(at) - begin).total_seconds() / unit

    lines: dict[str, list[tuple[float, float]]] = {"p50": [], "p99": [], "longest": []}
    errors = []
    for measure, traffic in seen:
        for moment in traffic.moments:
            x = since(moment.at) + moment.seconds / 2 / unit
            for label, points in lines.items():
                y = getattr(moment, label)
                points.append((x, math.nan if y is None else max(_drawn(y), 0.01)))
            errors += [x] if moment.errors else []
        for points in lines.values():
            # Between two stages nobody measured.
            points.append((since(measure.ended), math.nan))
    title = "Latency over time, with the stages marked"
    with _figure(title, 3.6) as figure:
        axes = figure.add_subplot()
        end = max(max(since(one.started), since(one.ended)) for one, _ in seen)
        last_label = -1.0
        for number, (measure, _) in enumerate(seen):
            first, last = since(measure.started), max(since(measure.ended), since(measure.started))
            shade = _BAD if measure.faults else _GRID
            axes.axvspan(first, last, color=shade, alpha=0.28 if number % 2 == 0 else 0.1, linewidth=0)
            middle = (first + last) / 2
            place = middle / end if end > 0 else 0.0
            if place - last_label >= _LABEL_ROOM:
                axes.annotate(
                    str(measure.stage), (middle, 1.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                    ha="center", va="bottom",
                )  # fmt: skip
                last_label = place
        # The first is in front, the last is dashed.
        for (label, points), colour in reversed([*zip(lines.items(), _SERIES, strict=False)]):
            style = (0, (4, 2)) if label == "longest" else "solid"
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label, linestyle=style)
        if errors:
            lowest = min(
                (y for points in lines.values() for _, y in points if not math.isnan(y)), default=0.1
            )
            axes.scatter(errors, [lowest] * len(errors), marker="x", color=_BAD, label="failed requests")
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis)
        if end > 0:
            axes.set_xlim(0, end)
        axes.set_xlabel(words)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
        _dress(axes, "y", "milliseconds (logarithmic)")
        return _svg(figure, title)


def trends(shown: Sequence[Rehearsal]) -> list[tuple[str, str]]:
    """Title and drawing of what is followed over rehearsals."""
    if len(shown) < 2:
        return []
    labels = [wording.in_utc(one.started).strftime("%m-%d %H:%M") for one in shown]
    per_row = {stage: [one.seconds_per_row(stage) for one in shown] for stage in PACED}
    followed: dict[tuple[str, str], Lines] = {
        ("Time per row", "microseconds"): [
            (str(stage), [None if pace is None else pace * 1e6 for pace in paces])
            for stage, paces in per_row.items()
        ],
        ("Latency of the application", "milliseconds"): [
            (f"p99, {stage}", [one.p99(stage) for one in shown]) for stage in OBSERVED
        ],
        ("Growth", "times the size before"): [("database at its largest", [one.growth for one in shown])],
    }
    drawn = []
    for (title, unit), lines in followed.items():
        if all(value is None for _, values in lines for value in values):
            continue
        with _figure(title, 3.0) as figure:
            axes = figure.add_subplot()
            _draw_lines(axes, lines)
            axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
            _dress(axes, "y", unit)
            drawn.append((title, _svg(figure, title)))
    return drawn


def _draw_lines(axes: Axes, lines: Lines) -> None:
    for (label, values), colour, marker in zip(lines, _SERIES, "os^Dv<>p", strict=False):
        drawn = [math.nan if value is None else _drawn(value) for value in values]
        axes.plot(range(len(drawn)), drawn, marker=marker, markersize=4, color=colour, label=label)
    axes.set_ylim(bottom=0)


def _labelled(figure: Figure, labels: Iterable[str], xlabel: str) -> Axes:
    """Axes for horizontal bars, the first on top; names from the database are in one line, cut where too long."""
    names = [_INVISIBLE.sub("·", label) for label in labels]
    names = [one if len(one) <= _LONGEST_NAME else one[: _LONGEST_NAME - 1] + "…" for one in names]
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel(xlabel)
    _dress(axes, "x")
    return axes


def _dress(axes: Axes, grid: Literal["x", "y"], ylabel: str = "") -> None:
    axes.set_ylabel(ylabel)
    axes.grid(axis=grid)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Axis) -> None:
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    axis.set_minor_formatter(lambda _value, _position: "")


def _drawn(value: float | None) -> float:
    return 0.0 if value is None or math.isnan(value) else min(max(value, -_LARGEST), _LARGEST)


@contextlib.contextmanager
def _figure(title: str, height: float) -> Iterator[Figure]:
    """A figure to be drawn and written in the block."""
    find_fonts()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Its stubs know every key by name.
    style: Any = _STYLE | {"svg.hashsalt": title}
    with mpl.rc_context(style):
        # Without pyplot, which keeps figures and chooses a window system.
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def _svg(figure: Figure, title: str) -> str:
    """A figure as an element of a page."""
    from markupsafe import escape

    text = io.StringIO()
    figure.savefig(text, format="svg")
    svg = text.getvalue()
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' (?:width|height)="[\d.]+pt"', "", body.split(">", 1)[0]) + ">" + body.split(">", 1)[1]
    body = _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", body)
    # Every plot names its groups alike, and nothing asks for them; what is asked for is named by the salt.
    asked_for = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in asked_for else "", body)
    label = escape(_INVISIBLE.sub("·", title))
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" class="plot" ', 1)
