"""What the requests of a stage add up to: percentiles of all of them, none estimated."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from typing import NamedTuple

from alphapulse_encryption.rehearsal.measures import Latency, Moment, Traffic, added

# A plot of more points than this shows no more.
MOST_MOMENTS = 240
_LENGTHS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)


class Sample(NamedTuple):
    """One request; kind and way as in :class:`measures.Latency`."""

    # In seconds since the epoch; and from then to its answer.
    due: float
    milliseconds: float
    kind: str
    way: str
    # Class and SQLSTATE of what it failed with.
    error: str | None
    # Its answer was not what had been written.
    wrong: bool


def percentile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of all values does not exceed (nearest rank); 0 where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def latency(kind: str, way: str, samples: Iterable[Sample]) -> Latency:
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
    ordered = sorted(samples, key=lambda sample: (sample.kind, sample.way))
    grouped = groupby(ordered, key=lambda sample: (sample.kind, sample.way))
    return tuple(latency(kind, way, group) for (kind, way), group in grouped)


def moments(samples: Iterable[Sample], began: float, ended: float) -> tuple[Moment, ...]:
    """The latencies over time, in parts of a second or more, also those without a request.

    The samples come in any order; begin and end are in seconds since the epoch.
    """
    span = max(ended - began, 0.001)
    length = next((one for one in _LENGTHS if span / one <= MOST_MOMENTS), span / MOST_MOMENTS)
    parts: list[list[Sample]] = [[] for _ in range(math.ceil(span / length))]
    for sample in samples:
        parts[min(len(parts) - 1, max(0, int((sample.due - began) / length)))].append(sample)
    return tuple(
        Moment(
            at=datetime.fromtimestamp(began + number * length, UTC),
            seconds=min(length, span - number * length),
            requests=one.requests,
            errors=one.errors,
            p50=one.p50 if part else None,
            p99=one.p99 if part else None,
            longest=one.longest if part else None,
        )
        for number, part in enumerate(parts)
        for one in [latency("all", "all", part)]
    )


def put_together(parts: Sequence[Traffic]) -> Traffic | None:
    """The traffic of a stage, of that of all its deployments.

    Requests, errors and lock waits add up. Percentiles of samples that are gone cannot be put together: the worst
    deployment's stands for the stage's.
    """
    if len(parts) < 2:
        return parts[0] if parts else None
    kinds: dict[tuple[str, str], list[Latency]] = {}
    for one in (one for part in parts for one in part.by_kind):
        kinds.setdefault((one.kind, one.way), []).append(one)
    return Traffic(
        phases=tuple(dict.fromkeys(phase for part in parts for phase in part.phases)),
        overall=_worst([part.overall for part in parts]),
        by_kind=tuple(_worst(latencies) for latencies in kinds.values()),
        moments=tuple(moment for part in parts for moment in part.moments),
        lock_waits=added(part.lock_waits for part in parts),
        longest_lock_wait=max(part.longest_lock_wait for part in parts),
        error_kinds=added(part.error_kinds for part in parts),
        retried=sum(part.retried for part in parts),
        left_out=tuple(dict.fromkeys(note for part in parts for note in part.left_out)),
    )


def _worst(parts: Sequence[Latency]) -> Latency:
    counted, timed = ("requests", "errors", "wrong_answers"), ("p50", "p95", "p99", "longest")
    figures = {name: sum(getattr(part, name) for part in parts) for name in counted}
    figures |= {name: max(getattr(part, name) for part in parts) for name in timed}
    return parts[0].model_copy(update=figures)
