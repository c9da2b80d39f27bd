"""The terminal that reports, tables and progress bars are printed at."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from alphapulse_encryption.visible import visible


class Terminal(Console):
    """A console on which text from outside is shown as what it is; the control sequences are those of rich."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))
