"""Figures that are known within a range: expected seconds and bytes, of the plan and of rehearsals."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import ConfigDict

# Of a normal distribution, for nine out of ten.
_NINE_OF_TEN = 1.645
# Beyond this, in seconds or bytes, a figure is no help to anybody, and floating point gets into trouble.
_LARGEST = 1e18


@dataclass(frozen=True)
class Span:
    """A figure with its range: seconds or bytes."""

    low: float
    likely: float
    high: float

    # Documents hold spans as they are.
    __pydantic_config__ = ConfigDict(extra="forbid")

    @classmethod
    def of(cls, *figures: float) -> Span:
        """From the least to the most of these; the first is likely."""
        kept = [min(max(figure, 0.0), _LARGEST) for figure in figures]
        return cls(min(kept), kept[0], max(kept))

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def times(self, factor: float) -> Span:
        """All of it, so many times."""
        return Span(self.low * factor, self.likely * factor, self.high * factor)

    def widened(self, error: float) -> Span:
        """With a wider range, by a standard deviation of its logarithm."""
        factor = math.exp(min(_NINE_OF_TEN * error, 50.0))
        return Span.of(self.likely, self.low / factor, self.high * factor)


NOTHING = Span(0.0, 0.0, 0.0)
