"""Whether a rehearsal got worse than those before it, in what, and beyond what is noise.

Only like is compared with like: rehearsals of the same source by the same number of cores and workers, cut into as many
batch ranges, under the same rate of requests. What else differs is said beside it: another version of this package or
of PostgreSQL is often the very reason why one compares.

What takes time differs from one rehearsal to the next. A figure has got worse where it lies above all earlier ones and
above their median by more than the noise: three times their spread (by the median absolute deviation, which one outlier
does not change), at least :data:`LEAST_NOISE`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from alphapulse_encryption.rehearsal.measures import Circumstances, Finding, Rehearsal, Stage

LEAST_NOISE = 0.3
# What is shorter is made of commits and of waiting for the disk, and says nothing about speed.
LEAST_SECONDS = 1.0
# Milliseconds, below which a slower request is nobody's concern.
LEAST_LATENCY = 5.0
# Sizes are not noisy.
LEAST_GROWTH = 0.1
# How often the median absolute deviation goes into the standard deviation of a normal distribution.
_TO_STANDARD_DEVIATION = 1.4826
_SPREADS = 3

# Alike, or not to be compared; and what each is called.
DECISIVE = {
    "source": "source",
    "cores": "cores",
    "workers": "workers",
    "batch_ranges": "batch ranges",
    "rest_ratio": "rest of the backfill",
    "rate": "requests per second",
}
OTHERS = {"version": "version of this package", "server_version": "PostgreSQL", "cloned_by": "way of cloning"}

# The stages whose pace is compared; the others are done in a moment, or are the rehearsal's own.
PACED = (
    *(Stage.BACKFILL, Stage.INDEXES, Stage.VERIFY, Stage.BACKUP, Stage.DROP, Stage.ERASURE),
    *(Stage.RESTORE, Stage.VERIFY_AGAIN),
)


@dataclass(frozen=True)
class Comparison:
    # Those it was compared with, in the order of time.
    earlier: tuple[Rehearsal, ...]
    # A sentence for each thing that got worse.
    worse: tuple[str, ...]
    # From the last rehearsal before it; and how many were left out.
    differences: tuple[str, ...]


def alike(one: Circumstances, other: Circumstances) -> bool:
    """Whether figures of the two may be compared."""
    return all(getattr(one, name) == getattr(other, name) for name in DECISIVE)


def compare(rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> Comparison:
    """Hold a rehearsal against those before it; the history comes in any order, with later ones and itself or not."""
    found = {other.run_id: other for other in history if other.started < rehearsal.started}
    found.pop(rehearsal.run_id, None)
    past = tuple(sorted(found.values(), key=lambda other: other.started))
    earlier = tuple(other for other in past if alike(other.circumstances, rehearsal.circumstances))
    worse = [*_worse(rehearsal, earlier), *_new_findings(rehearsal, earlier)]
    return Comparison(earlier, tuple(worse), _differences(rehearsal, past, earlier))


def _worse(rehearsal: Rehearsal, earlier: Sequence[Rehearsal]) -> Iterator[str]:
    if rehearsal.failed_stage is not None and earlier and earlier[-1].failed_stage is None:
        yield f"the stage {rehearsal.failed_stage} failed, where the rehearsal before came to its end"
    for stage in PACED:
        measure = rehearsal.stage(stage)
        past = [pace for other in earlier if (pace := _pace_of(other, stage))]
        times = _times_worse(_pace_of(rehearsal, stage), past, LEAST_NOISE)
        if times is not None and measure is not None and measure.own_seconds >= LEAST_SECONDS:
            yield f"{stage} was slower per row: {times:.1f} times {_as_before(past)}"
    for stage in (Stage.BASELINE, Stage.BACKFILL, Stage.AFTERWARDS):
        now = rehearsal.p99(stage)
        past = [p99 for other in earlier if (p99 := other.p99(stage))]
        times = _times_worse(now, past, LEAST_NOISE)
        if now is not None and times is not None and now - statistics.median(past) >= LEAST_LATENCY:
            yield (
                f"the latency's 99th percentile during {stage} was {now:,.0f} ms: {times:.1f} times {_as_before(past)}"
            )
    now = rehearsal.growth
    past = [growth for other in earlier if (growth := other.growth)]
    if now is not None and _times_worse(now, past, LEAST_GROWTH) is not None:
        yield f"the database grew to {now:.2f} times its size, before to {statistics.median(past):.2f} times"


def _pace_of(rehearsal: Rehearsal, stage: Stage) -> float | None:
    measure = rehearsal.stage(stage)
    # Stages that count no rows go through the whole database.
    rows = measure is not None and (measure.rows or rehearsal.before.rows)
    return measure.own_seconds / rows if measure is not None and rows else None


def _new_findings(rehearsal: Rehearsal, earlier: Sequence[Rehearsal]) -> list[str]:
    if not earlier:
        return []
    known = {_signature(finding) for _, finding in earlier[-1].all_findings}
    fresh = {
        _signature(finding): finding
        for _, finding in rehearsal.all_findings
        if finding.level != "note" and _signature(finding) not in known
    }
    return [f"a new finding, {finding.subject}: {finding.what}" for finding in fresh.values()]


def _signature(finding: Finding) -> tuple[str, str, str]:
    # The numbers in a finding change every time.
    return finding.level, finding.subject, "".join(c for c in finding.what if not c.isdigit())


def _times_worse(now: float | None, past: Sequence[float], least: float) -> float | None:
    """How many times the median of the past, where that is worse; None where it is not, or nothing is known."""
    if now is None or not past or not all(math.isfinite(value) for value in (now, *past)):
        return None
    middle = statistics.median(past)
    if middle <= 0:
        return None
    deviation = statistics.median(abs(value - middle) for value in past) * _TO_STANDARD_DEVIATION
    noise = max(least, _SPREADS * deviation / middle)
    return now / middle if now > max(past) and now > middle * (1 + noise) else None


def _as_before(past: Sequence[float]) -> str:
    return (
        "that of the rehearsal before" if len(past) == 1 else f"the median of {len(past)} rehearsals before"
    )


def _differences(
    rehearsal: Rehearsal, past: Sequence[Rehearsal], earlier: Sequence[Rehearsal]
) -> tuple[str, ...]:
    if not past:
        return ()
    found = []
    ours, theirs = rehearsal.circumstances, past[-1].circumstances
    for name, words in (DECISIVE | OTHERS).items():
        if getattr(ours, name) != getattr(theirs, name):
            found.append(f"{words}: {getattr(ours, name)}, before {getattr(theirs, name)}")
    left_out = len(past) - len(earlier)
    if left_out:
        found.append(
            f"{left_out} of {len(past)} earlier rehearsals ran under other circumstances and were not compared"
        )
    if earlier:
        rows, rows_before = rehearsal.before.rows, earlier[-1].before.rows
        if rows_before and abs(rows / rows_before - 1) > LEAST_GROWTH:
            found.append(f"rows: {rows:,}, before {rows_before:,}; paces are compared per row")
    return tuple(found)
