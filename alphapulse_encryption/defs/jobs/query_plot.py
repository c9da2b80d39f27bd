"""The plot of ``--benchmark-queries``: for each question, which share of the answers came within which time."""

from __future__ import annotations

import io
from collections.abc import Sequence

from alphapulse_encryption.migration.insight.query_benchmark import QueryBenchmark
from alphapulse_encryption.secrecy import find_fonts

_COLOURS = {"plaintext": "#9a9a9a", "encrypted": "#4c72b0"}
_COLUMNS = 3
_INCHES = 3.2


def plot(found: Sequence[QueryBenchmark]) -> bytes:
    """Draw the cumulative distributions.

    Returns:
        A PNG; empty where there is nothing to draw.
    """
    # It takes longer to load than everything else that Dagster loads of this package.
    find_fonts()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [(measured.table, pair) for measured in found for pair in measured.pairs()]
    if not pairs:
        return b""
    columns = min(_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    # Without pyplot, which keeps figures and chooses a window system.
    figure = Figure(figsize=(_INCHES * columns, _INCHES * rows * 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (table, pair) in enumerate(pairs):
        axes = figure.add_subplot(rows, columns, number + 1)
        for side in pair:
            if side is not None:
                milliseconds = [second * 1000 for second in side.seconds]
                axes.ecdf(milliseconds, label=side.side, color=_COLOURS[side.side])
        axes.set_xscale("log")
        axes.set_title(f"{table}: {pair[0].question}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("ms", fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.legend(fontsize=7, frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=100)
    return written.getvalue()
