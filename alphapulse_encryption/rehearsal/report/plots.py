"""The plots of the pages: inline SVG whose colours are the page's, light or dark, and whose text is text.

Matplotlib knows fixed colours only. So it draws with colours that stand for the page's variables, which then replace
them. Names from the database are drawn as they are: without mathematics, and without what XML has no place for.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from alphapulse_encryption.rehearsal.report.prediction import Span
from alphapulse_encryption.secrecy import find_fonts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0
# Any colours will do that matplotlib does not use by itself.
INK, FAINT, GRID, BAD = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216", "#010217", "#010218")
_VARIABLES = {INK: "ink", FAINT: "faint", GRID: "grid", BAD: "bad"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)
}
_COLOUR = re.compile("|".join(_VARIABLES))
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "hatch.linewidth": 0.5,
}
_LONGEST_NAME = 28
_INVISIBLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
# So far apart are labels along an axis, as a share of it.
_LABEL_ROOM = 0.022
# Figures are drawn up to here.
_LARGEST = 1e15


def name(text: str) -> str:
    """A name from the database as a label: one line, cut where it is too long."""
    visible = _INVISIBLE.sub("·", text)
    return visible if len(visible) <= _LONGEST_NAME else visible[: _LONGEST_NAME - 1] + "…"


@dataclass(frozen=True)
class Line:
    """A line of a plot.

    Args:
        label: its name in the legend.
        points: x and y; where y is None the line is interrupted.
        colour: one of this module's.
        dashed: to tell it from others without colours.
    """

    label: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A part of the x axis.

    Args:
        label: written over it.
        begin, end: where.
        marked: whether something is to be seen there: provoked faults.
    """

    label: str
    begin: float
    end: float
    marked: bool = False


def stacked(bars: Mapping[str, Mapping[str, float]], parts: Sequence[str], xlabel: str, title: str) -> str:
    """Horizontal bars, the first on top, each made of parts that have the same colour in all of them.

    Args:
        bars: by label, from part to length; parts that are missing have none.
        parts: at most as many as there are colours.
        xlabel: what the length means.
        title: for those who hear the page.
    """
    with _figure(title, 0.9 + 0.28 * max(1, len(bars))) as (figure, written):
        axes = figure.add_subplot()
        positions = range(len(bars))
        left = [0.0] * len(bars)
        for part, colour in zip(parts, SERIES, strict=False):
            lengths = [_drawn(bar.get(part, 0.0)) for bar in bars.values()]
            axes.barh(positions, lengths, left=left, color=colour, height=0.66)
            left = [begin + length for begin, length in zip(left, lengths, strict=True)]
        _label_bars(axes, list(bars))
        axes.set_xlabel(xlabel)
    return written.svg


def grouped(groups: Mapping[str, Mapping[str, float]], parts: Sequence[str], xlabel: str, title: str) -> str:
    """Horizontal bars in groups, the first on top; arguments as in :func:`stacked`."""
    with _figure(title, 0.9 + 0.2 * max(1, len(groups)) * max(1, len(parts))) as (figure, written):
        axes = figure.add_subplot()
        height = 0.8 / max(1, len(parts))
        for number, (part, colour) in enumerate(zip(parts, SERIES, strict=False)):
            positions = [position - 0.4 + (number + 0.5) * height for position in range(len(groups))]
            axes.barh(
                positions,
                [_drawn(group.get(part, 0.0)) for group in groups.values()],
                height * 0.9,
                color=colour,
            )
        _label_bars(axes, list(groups))
        axes.set_xlabel(xlabel)
    return written.svg


def ranges(spans: Mapping[str, Span], xlabel: str, title: str) -> str:
    """A horizontal range for each, with a point where it is likely; logarithmic, for they differ by orders."""
    with _figure(title, 0.9 + 0.28 * max(1, len(spans))) as (figure, written):
        axes = figure.add_subplot()
        for position, span in enumerate(spans.values()):
            low, likely, high = (max(_drawn(value), 1e-3) for value in (span.low, span.likely, span.high))
            axes.plot([low, high], [position, position], color=SERIES[0], linewidth=6, alpha=0.45)
            axes.plot([likely], [position], marker="o", markersize=6, color=SERIES[0])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.xaxis.set_minor_formatter(lambda _value, _position: "")
        _label_bars(axes, list(spans))
        axes.set_xlabel(xlabel)
    return written.svg


def steps(
    labels: Sequence[str],
    lines: Sequence[tuple[str, Sequence[float], str]],
    limits: Sequence[tuple[str, float]],
    bars: Sequence[float],
    ylabels: tuple[str, str],
    title: str,
) -> str:
    """Figures after each of some steps, with limits; and bars below.

    Args:
        labels: of the steps.
        lines: label, values and colour of each.
        limits: label and value of each.
        bars: one value per step.
        ylabels: of the lines and of the bars.
        title: for those who hear the page.
    """
    with _figure(title, 4.2) as (figure, written):
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        places = list(range(len(labels)))
        for label, values, colour in lines:
            drawn = [_drawn(value) for value in values]
            above.plot(places, drawn, marker="o", markersize=3, color=colour, label=label)
        for label, value in limits:
            above.axhline(_drawn(value), color=BAD, linewidth=0.9, linestyle=(0, (5, 3)))
            above.annotate(
                label, (1, _drawn(value)), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
        above.set_ylim(bottom=0)
        above.set_ylabel(ylabels[0])
        above.grid(axis="y")
        if lines:
            above.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(lines))
        below.bar(places, [_drawn(value) for value in bars], color=SERIES[0], width=0.7)
        below.set_ylabel(ylabels[1])
        below.grid(axis="y")
        below.set_xticks(places, [name(label) for label in labels], rotation=40, ha="right")
        for axes in (above, below):
            axes.spines[["top", "right"]].set_visible(False)
    return written.svg


def over_time(
    lines: Sequence[Line],
    bands: Sequence[Band],
    errors: Sequence[tuple[float, int]],
    xlabel: str,
    ylabel: str,
    title: str,
) -> str:
    """Lines over time, in bands; errors as crosses at the bottom.

    Args:
        lines: the first is in front.
        bands: in their order.
        errors: when, and how many.
        xlabel, ylabel: units.
        title: for those who hear the page.
    """
    with _figure(title, 3.6) as (figure, written):
        axes = figure.add_subplot()
        begin = min((band.begin for band in bands), default=0.0)
        end = max((band.end for band in bands), default=1.0)
        last_label = -1.0
        for number, band in enumerate(bands):
            shade = BAD if band.marked else GRID
            axes.axvspan(
                band.begin, band.end, color=shade, alpha=0.28 if number % 2 == 0 else 0.1, linewidth=0
            )
            middle = (band.begin + band.end) / 2
            place = (middle - begin) / (end - begin) if end > begin else 0.0
            if place - last_label >= _LABEL_ROOM:
                axes.annotate(
                    name(band.label), (middle, 1.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                    ha="center", va="bottom",
                )  # fmt: skip
                last_label = place
        lowest = None
        for line in reversed(lines):
            points = [(x, float("nan") if y is None else max(_drawn(y), 0.01)) for x, y in line.points]
            if not points:
                continue
            axes.plot(
                *zip(*points, strict=True),
                color=line.colour, linewidth=1.3, label=line.label,
                linestyle=(0, (4, 2)) if line.dashed else "solid",
            )  # fmt: skip
            known = [y for _, y in points if y == y]  # noqa: PLR0124
            lowest = min(known, default=0.1) if lowest is None else min(lowest, *known, lowest)
        if errors:
            axes.scatter(
                [x for x, _ in errors],
                [lowest or 0.1] * len(errors),
                marker="x",
                color=BAD,
                label="failed requests",
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_minor_formatter(lambda _value, _position: "")
        if end > begin:
            axes.set_xlim(begin, end)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        if lowest is not None or errors:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
    return written.svg


def trends(
    labels: Sequence[str], lines: Sequence[tuple[str, Sequence[float | None]]], ylabel: str, title: str
) -> str:
    """One line per figure over rehearsals.

    Args:
        labels: of the rehearsals.
        lines: label and values of each; None where it is not known.
        ylabel: unit.
        title: for those who hear the page.
    """
    with _figure(title, 3.0) as (figure, written):
        axes = figure.add_subplot()
        places = list(range(len(labels)))
        markers = "os^Dv<>p"
        for (label, values), colour, marker in zip(lines, SERIES, markers, strict=False):
            drawn = [float("nan") if value is None else _drawn(value) for value in values]
            axes.plot(places, drawn, marker=marker, markersize=4, color=colour, label=label)
        axes.set_xticks(places, [name(label) for label in labels], rotation=30, ha="right")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(ylabel)
        axes.grid(axis="y")
        axes.spines[["top", "right"]].set_visible(False)
        if lines:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return written.svg


def _label_bars(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [name(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.spines[["top", "right"]].set_visible(False)


def _drawn(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST) if value == value else 0.0  # noqa: PLR0124


class _Written:
    svg = ""


@contextlib.contextmanager
def _figure(title: str, height: float) -> Iterator[tuple[Figure, _Written]]:
    """A figure, and where its SVG is once it is drawn."""
    find_fonts()
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    written = _Written()
    # Its stubs know every key by name.
    style: Any = _STYLE | {"svg.hashsalt": title}
    with mpl.rc_context(style):
        # Without pyplot, which keeps figures and chooses a window system.
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, written
        text = io.StringIO()
        figure.savefig(text, format="svg")
    written.svg = _inline(text.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """A whole SVG file as an element of a page."""
    from markupsafe import escape

    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' (?:width|height)="[\d.]+pt"', "", body.split(">", 1)[0]) + ">" + body.split(">", 1)[1]
    body = _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", body)
    # Every plot names its groups alike, and nothing asks for them; what is asked for is named by the salt.
    asked_for = set(re.findall(r"#([\w-]+)", body))
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in asked_for else "", body)
    label = escape(_INVISIBLE.sub("·", title))
    return body.replace("<svg ", f'<svg role="img" aria-label="{label}" class="plot" ', 1)
