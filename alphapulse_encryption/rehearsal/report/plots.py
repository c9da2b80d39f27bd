"""The plots of the pages: inline SVG whose colours are the page's, light or dark, and whose text is text.

Each has a title for those who hear the page. Matplotlib knows fixed colours only, so it draws with colours that stand
for the page's variables, which then replace them. Names from the database are drawn as they are: without mathematics,
and without what XML has no place for.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from alphapulse_encryption.migration.insight.spans import Span
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


Bars = Mapping[str, Mapping[str, float]]
# Label and values of each; None where one is not known.
Lines = Sequence[tuple[str, Sequence[float | None]]]


def stacked(bars: Bars, parts: Sequence[str], xlabel: str, title: str) -> str:
    """Horizontal bars, the first on top, each made of parts that have the same colour in all of them.

    Args:
        bars: by label, from part to length; parts that are missing have none.
        parts: at most as many as there are colours.
        xlabel: what the length means.
    """
    with _figure(title, 0.9 + 0.28 * max(1, len(bars))) as figure:
        axes = _labelled(figure, bars, xlabel)
        left = [0.0] * len(bars)
        for part, colour in zip(parts, SERIES, strict=False):
            lengths = [_drawn(bar.get(part)) for bar in bars.values()]
            axes.barh(range(len(bars)), lengths, left=left, color=colour, height=0.66)
            left = [begin + length for begin, length in zip(left, lengths, strict=True)]
        return _svg(figure, title)


def grouped(bars: Bars, parts: Sequence[str], xlabel: str, title: str) -> str:
    """Horizontal bars in groups, the first on top; arguments as in :func:`stacked`."""
    with _figure(title, 0.9 + 0.2 * max(1, len(bars)) * max(1, len(parts))) as figure:
        axes = _labelled(figure, bars, xlabel)
        height = 0.8 / max(1, len(parts))
        for number, (part, colour) in enumerate(zip(parts, SERIES, strict=False)):
            places = [place - 0.4 + (number + 0.5) * height for place in range(len(bars))]
            axes.barh(places, [_drawn(bar.get(part)) for bar in bars.values()], height * 0.9, color=colour)
        return _svg(figure, title)


def ranges(spans: Mapping[str, Span], xlabel: str, title: str) -> str:
    """A horizontal range for each, with a point where it is likely; logarithmic, for they differ by orders."""
    with _figure(title, 0.9 + 0.28 * max(1, len(spans))) as figure:
        axes = _labelled(figure, spans, xlabel)
        for place, span in enumerate(spans.values()):
            low, likely, high = (max(_drawn(value), 1e-3) for value in (span.low, span.likely, span.high))
            axes.plot([low, high], [place, place], color=SERIES[0], linewidth=6, alpha=0.45)
            axes.plot([likely], [place], marker="o", markersize=6, color=SERIES[0])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.xaxis.set_minor_formatter(lambda _value, _position: "")
        return _svg(figure, title)


def steps(
    labels: Sequence[str],
    lines: Lines,
    limits: Mapping[str, float],
    bars: Sequence[float],
    ylabels: tuple[str, str],
    title: str,
) -> str:
    """Figures after each of some steps, with limits; and bars below, one for each step.

    Args:
        limits: by their label.
        ylabels: of the lines and of the bars.
    """
    with _figure(title, 4.2) as figure:
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])
        _draw_lines(above, lines)
        for label, value in limits.items():
            above.axhline(_drawn(value), color=BAD, linewidth=0.9, linestyle=(0, (5, 3)))
            place = (1, _drawn(value))
            above.annotate(label, place, xycoords=("axes fraction", "data"), ha="right", va="bottom")
        above.legend(frameon=False, fontsize=8, loc="upper left", ncols=len(lines))
        below.bar(range(len(labels)), [_drawn(value) for value in bars], color=SERIES[0], width=0.7)
        below.set_xticks(range(len(labels)), [name(label) for label in labels], rotation=40, ha="right")
        for axes, ylabel in zip((above, below), ylabels, strict=True):
            _dress(axes, "y", ylabel)
        return _svg(figure, title)


def trends(labels: Sequence[str], lines: Lines, ylabel: str, title: str) -> str:
    """One line per figure over rehearsals; arguments as in :func:`steps`."""
    with _figure(title, 3.0) as figure:
        axes = figure.add_subplot()
        _draw_lines(axes, lines)
        axes.set_xticks(range(len(labels)), [name(label) for label in labels], rotation=30, ha="right")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        _dress(axes, "y", ylabel)
        return _svg(figure, title)


def over_time(
    lines: Mapping[str, Sequence[tuple[float, float | None]]],
    bands: Sequence[tuple[str, float, float, bool]],
    errors: Sequence[float],
    xlabel: str,
    title: str,
) -> str:
    """Milliseconds over time, in bands; errors as crosses at the bottom.

    Args:
        lines: points by label, interrupted where y is None; the first is in front, the last is dashed.
        bands: label, begin, end and whether it is marked of each, in their order.
        errors: when.
    """
    with _figure(title, 3.6) as figure:
        axes = figure.add_subplot()
        begin = min((band[1] for band in bands), default=0.0)
        end = max((band[2] for band in bands), default=1.0)
        last_label = -1.0
        for number, (label, since, until, marked) in enumerate(bands):
            shade = BAD if marked else GRID
            axes.axvspan(since, until, color=shade, alpha=0.28 if number % 2 == 0 else 0.1, linewidth=0)
            middle = (since + until) / 2
            place = (middle - begin) / (end - begin) if end > begin else 0.0
            if place - last_label >= _LABEL_ROOM:
                axes.annotate(
                    name(label), (middle, 1.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
                    ha="center", va="bottom",
                )  # fmt: skip
                last_label = place
        drawn = {
            label: [(x, math.nan if y is None else max(_drawn(y), 0.01)) for x, y in points]
            for label, points in lines.items()
        }
        dashed = [*drawn][-1:]
        for (label, points), colour in reversed([*zip(drawn.items(), SERIES, strict=False)]):
            style = (0, (4, 2)) if label in dashed else "solid"
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=label, linestyle=style)
        lowest = min((y for points in drawn.values() for _, y in points if not math.isnan(y)), default=0.1)
        if errors:
            axes.scatter(errors, [lowest] * len(errors), marker="x", color=BAD, label="failed requests")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        axes.yaxis.set_minor_formatter(lambda _value, _position: "")
        if end > begin:
            axes.set_xlim(begin, end)
        axes.set_xlabel(xlabel)
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), reverse=True)
        _dress(axes, "y", "milliseconds (logarithmic)")
        return _svg(figure, title)


def _draw_lines(axes: Axes, lines: Lines) -> None:
    for (label, values), colour, marker in zip(lines, SERIES, "os^Dv<>p", strict=False):
        drawn = [math.nan if value is None else _drawn(value) for value in values]
        axes.plot(range(len(drawn)), drawn, marker=marker, markersize=4, color=colour, label=label)
    axes.set_ylim(bottom=0)


def _labelled(figure: Figure, labels: Iterable[str], xlabel: str) -> Axes:
    """Axes for horizontal bars, the first on top."""
    names = [name(label) for label in labels]
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
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
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
