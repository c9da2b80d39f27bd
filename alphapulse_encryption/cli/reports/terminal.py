"""What all reports at a terminal have in common: width, figures, and where they are printed."""

from __future__ import annotations

from datetime import datetime

from rich import box
from rich.table import Table

from alphapulse_encryption.cli.console import Terminal
from alphapulse_encryption.migration.gates.preflight import readable_size
from alphapulse_encryption.migration.insight.estimates import Span

NARROWEST, WIDEST = 80, 120


def console() -> Terminal:
    """Standard output, between 80 and 120 columns wide: what is wider is hard to read, what is narrower breaks."""
    found = Terminal(highlight=False, markup=False, emoji=False)
    found.width = min(max(found.width if found.is_terminal else 110, NARROWEST), WIDEST)
    return found


def grid(*headings: str) -> Table:
    """A table without frames; a heading that begins with ``>`` is over figures."""
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for heading in headings:
        right = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    return table


def seconds(value: float) -> str:
    """A duration as a person reads it: ``0.3 s``, ``12 min``, ``3.5 h``, ``4.2 days``."""
    for limit, divisor, unit in ((90, 1, "s"), (90 * 60, 60, "min"), (48 * 3600, 3600, "h")):
        if value < limit:
            amount = value / divisor
            return f"{amount:.1f} {unit}" if amount < 10 else f"{amount:.0f} {unit}"
    return f"{value / 86_400:.1f} days"


def span_of_seconds(span: Span | None) -> str:
    """A duration with its range."""
    return "-" if span is None else f"{seconds(span.likely)} ({seconds(span.low)} to {seconds(span.high)})"


def span_of_bytes(span: Span) -> str:
    """A size with its range."""
    low, likely, high = (readable_size(int(size)) for size in (span.low, span.likely, span.high))
    return f"{likely} ({low} to {high})"


def moment(at: datetime | None) -> str:
    """A moment by the minute."""
    return "-" if at is None else f"{at:%Y-%m-%d %H:%M} UTC"
