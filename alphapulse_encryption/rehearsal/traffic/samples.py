"""What the requests of a stage add up to: percentiles of all of them, none estimated."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import NamedTuple

from alphapulse_encryption.rehearsal.measures import Latency, Moment

# A plot of more points than this shows no more.
MOST_MOMENTS = 240
_LENGTHS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Sample(NamedTuple):
    """One request.

    Args:
        due: when it was to be made, in seconds since the epoch.
        milliseconds: from then to its answer.
        kind, way: as in :class:`measures.Latency`.
        error: class and SQLSTATE of what it failed with; None where it did not.
        wrong: whether its answer was not what had been written.
    """

    due: float
    milliseconds: float
    kind: str
    way: str
    error: str | None
    wrong: bool


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all values does not exceed (nearest rank); 0 where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def latency(kind: str, way: str, samples: Iterable[Sample]) -> Latency:
    """The latencies of some requests."""
    chosen = list(samples)
    times = sorted(sample.milliseconds for sample in chosen)
    return Latency(
        kind=kind,
        way=way,
        requests=len(chosen),
        errors=sum(sample.error is not None for sample in chosen),
        wrong_answers=sum(sample.wrong for sample in chosen),
        p50=percentile(times, 0.5),
        p95=percentile(times, 0.95),
        p99=percentile(times, 0.99),
        longest=percentile(times, 1.0),
    )


def by_kind(samples: Iterable[Sample]) -> tuple[Latency, ...]:
    """The latencies of each kind and way."""
    ordered = sorted(samples, key=lambda sample: (sample.kind, sample.way))
    grouped = groupby(ordered, key=lambda sample: (sample.kind, sample.way))
    return tuple(latency(kind, way, group) for (kind, way), group in grouped)


def moments(samples: Iterable[Sample], began: float, ended: float) -> tuple[Moment, ...]:
    """The latencies over time, in parts of a second or more, also those without a request.

    Args:
        samples: all of them, in any order.
        began, ended: of the traffic, in seconds since the epoch.
    """
    span = max(ended - began, 0.001)
    length = next((one for one in _LENGTHS if span / one <= MOST_MOMENTS), span / MOST_MOMENTS)
    parts: list[list[Sample]] = [[] for _ in range(math.ceil(span / length))]
    for sample in samples:
        parts[min(len(parts) - 1, max(0, int((sample.due - began) / length)))].append(sample)
    found = []
    for number, part in enumerate(parts):
        times = sorted(sample.milliseconds for sample in part)
        found.append(
            Moment(
                at=datetime.fromtimestamp(began + number * length, UTC),
                seconds=min(length, span - number * length),
                requests=len(part),
                errors=sum(sample.error is not None for sample in part),
                p50=percentile(times, 0.5) if times else None,
                p99=percentile(times, 0.99) if times else None,
                longest=times[-1] if times else None,
            )
        )
    return tuple(found)


def error_kinds(samples: Iterable[Sample]) -> dict[str, int]:
    """How many requests failed with what, the most frequent first."""
    return dict(Counter(sample.error for sample in samples if sample.error is not None).most_common())
