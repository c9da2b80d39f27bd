"""How long production will take, what room it needs, and how good such predictions were so far.

What a stage takes is put together from parts that behave differently when a table is ten times as large:

- **fixed**: a table's first range derives keys and opens sessions, every batch range is begun and ended in
  transactions of its own, whatever has no rows takes its time as well. These do not grow. They are told apart from the
  rest by tables of different sizes: seconds are fitted, by least squares without negative parts, as a sum of something
  fixed, something per row and something per value (per byte where a stage counts no values);
- **per row**: what is left of a table's own seconds, by its rows. Tables differ: each keeps its own;
- **n log n** where an index is built;
- **growth per row**: a row takes longer in a larger table, once its indexes outgrow caches and every checkpoint makes
  the server log their pages anew. How much depends on the order of their keys. Measured from 200,000 to 1,000,000 rows:
  3.9 % on tables whose indexes grow in the order of time, 40 % where their keys are random, so from
  :data:`LEAST_GROWTH` to :data:`MOST_GROWTH` for each e-fold, with :data:`LIKELY_GROWTH` in the middle;
- **workers**: batch ranges take the seconds that they took side by side, divided by as many.

The range is what these parts leave open, widened by the scatter of the measurements and by how far earlier predictions
were off (:func:`accuracy`). It is meant to hold nine times out of ten.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from alphapulse_encryption.rehearsal.measures import (
    DAY,
    WAY_BACK,
    Rehearsal,
    Sizes,
    Stage,
    StageMeasure,
    TableSize,
    TableWork,
)
from alphapulse_encryption.rehearsal.report.comparison import LONGEST, alike, own_seconds

# The application waits for a lock: for a moment in the drop, for as long as it takes in the erasure.
LOCKING = frozenset({Stage.DROP, Stage.ERASURE})
# These look into the catalogues and change them; no row is touched.
_CONSTANT = frozenset({Stage.PREFLIGHT, Stage.COLUMNS, Stage.VIEWS})
_WRITING = frozenset({Stage.BACKFILL, Stage.RESTORE})

# For each e-fold of a table's size; see above.
LEAST_GROWTH, LIKELY_GROWTH, MOST_GROWTH = 0.0, 0.08, 0.25
# How much of a stage's seconds is fixed, where nothing tells: one table, or the whole database.
_UNKNOWN_FIXED = 0.1
# The share of the shortest that is taken to be fixed at most: something is always done per row.
_MOST_FIXED = 0.95
# How far off the fixed part may be.
_FIXED_DOUBT = 0.4
# Standard deviation of the logarithm of real by predicted, until predictions were held against what came; and as how
# many predictions this counts.
_PRIOR_ERROR, _PRIOR_WEIGHT = 0.15, 4
# Of a normal distribution, for nine out of ten.
_NINE_OF_TEN = 1.645
# Bytes of a database with nothing in it, which takes nobody any time.
_EMPTY_DATABASE = 7 * 2**20
# Nothing that was measured takes less; what does would overflow the fit of relative errors.
_LEAST_SECONDS = 1e-9
# Beyond this, in seconds or bytes, a figure is no help to anybody, and floating point gets into trouble.
_LARGEST = 1e18


@dataclass(frozen=True)
class Span:
    """A figure with its range; seconds or bytes."""

    low: float = 0.0
    likely: float = 0.0
    high: float = 0.0

    def __add__(self, other: Span) -> Span:
        return Span(self.low + other.low, self.likely + other.likely, self.high + other.high)

    def times(self, factor: float) -> Span:
        return Span(self.low * factor, self.likely * factor, self.high * factor)

    def widened(self, spread: float) -> Span:
        """With a range wider by a standard deviation of its logarithm, independent of what made the range before."""
        if not self.likely or not spread:
            return self
        down, up = (
            math.hypot(math.log(max(one, 1e-300) / max(other, 1e-300)), _NINE_OF_TEN * spread)
            for one, other in ((self.likely, self.low), (self.high, self.likely))
        )
        return _span(self.likely * math.exp(-min(down, 50)), self.likely, self.likely * math.exp(min(up, 50)))


@dataclass(frozen=True)
class StagePrediction:
    """One stage.

    Args:
        stage: which.
        seconds: in all.
        tables: seconds by the table's key; empty where the stage goes through the whole database at once.
        wal: bytes of write-ahead log.
        locked: of the seconds, those during which nobody else can use the table, by its key; empty where it stays open.
    """

    stage: Stage
    seconds: Span
    tables: Mapping[str, Span]
    wal: Span
    locked: Mapping[str, Span] = field(default_factory=dict)

    @property
    def locks(self) -> bool:
        return bool(self.locked)


@dataclass(frozen=True)
class Prediction:
    """The day, predicted.

    Args:
        sizes: what it was predicted for.
        stages: in their order, those of the way back included.
        seconds: of the day, the way back not included.
        online: of that, beside the running application.
        locked: of that, while a table is locked.
        locked_tables: of the tables that are locked one after another, the seconds of each.
        way_back: seconds to have the plaintext back after the drop.
        largest: bytes of the database at its largest.
        wal: bytes of write-ahead log in all, the way back not included.
        guessed: tables without rows in the rehearsal, whose pace is that of the others.
        unknown: stages that cannot be predicted, because they did not come to their end.
        unrehearsed: tables that production has and the rehearsal had not.
    """

    sizes: Sizes
    stages: tuple[StagePrediction, ...]
    seconds: Span
    online: Span
    locked: Span
    locked_tables: Mapping[str, Span]
    way_back: Span
    largest: Span
    wal: Span
    guessed: tuple[str, ...]
    unknown: tuple[Stage, ...]
    unrehearsed: tuple[str, ...]

    @property
    def growth(self) -> Span:
        """Bytes that the database needs at its largest beside those it has."""
        now, largest = self.sizes.database, self.largest
        return Span(*(max(0.0, size - now) for size in (largest.low, largest.likely, largest.high)))

    def stage(self, stage: Stage) -> StagePrediction | None:
        """The prediction of a stage; None where there is none."""
        return next((found for found in self.stages if found.stage is stage), None)


@dataclass(frozen=True)
class Trial:
    """A prediction that was held against what came.

    Args:
        run_id: of the rehearsal that it was made for.
        predicted: seconds of the stages that both have.
        real: what they took.
        times: rows of the one by rows of the other.
        stages: of each stage, real by predicted.
    """

    run_id: str
    predicted: Span
    real: float
    times: float
    stages: Mapping[Stage, float]

    @property
    def error(self) -> float:
        """By how much of the prediction it took longer; negative where it took less."""
        return self.real / self.predicted.likely - 1

    @property
    def held(self) -> bool:
        """Whether it was within the range."""
        return self.predicted.low <= self.real <= self.predicted.high


@dataclass(frozen=True)
class Accuracy:
    """How good earlier predictions were.

    Args:
        trials: in the order of time.
    """

    trials: tuple[Trial, ...] = ()

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of real by predicted, with what is assumed before there are trials."""
        squares = [math.log(max(trial.real / trial.predicted.likely, 1e-300)) ** 2 for trial in self.trials]
        return math.sqrt(
            (_PRIOR_WEIGHT * _PRIOR_ERROR**2 + sum(squares)) / (_PRIOR_WEIGHT + len(self.trials))
        )

    @property
    def sentence(self) -> str:
        """For a person."""
        if not self.trials:
            return (
                "No earlier rehearsal under the same circumstances could be held against its prediction yet."
            )
        count = len(self.trials)
        held = sum(trial.held for trial in self.trials)
        typical = statistics.median(abs(trial.error) for trial in self.trials)
        made = "1 earlier prediction was" if count == 1 else f"{count} earlier predictions were"
        return f"{made} off by {typical:.0%} (median); {held} of {count} held within its range."


def predict(rehearsal: Rehearsal, sizes: Sizes, accuracy: Accuracy | None = None) -> Prediction:
    """Predict the migration of a database like the rehearsed one, on such a machine.

    Args:
        rehearsal: what was measured; stages that it has not are left out and named.
        sizes: of the database to predict for.
        accuracy: how earlier predictions did; widens the range.
    """
    spread = (accuracy or Accuracy()).spread
    stages = []
    for stage in (*DAY, *WAY_BACK):
        measure = rehearsal.stage(stage)
        if measure is not None:
            stages.append(_stage(rehearsal, measure, sizes, spread))
    day = [found for found in stages if found.stage in DAY]
    locked: dict[str, Span] = {}
    for found in day:
        for key, span in found.locked.items():
            locked[key] = locked.get(key, Span()) + span
    total, under_locks = _total(found.seconds for found in day), _total(locked.values())
    return Prediction(
        sizes=sizes,
        stages=tuple(stages),
        seconds=total,
        online=_span(
            total.low - under_locks.low, total.likely - under_locks.likely, total.high - under_locks.high
        ),
        locked=under_locks,
        locked_tables=locked,
        way_back=_total(found.seconds for found in stages if found.stage in WAY_BACK),
        largest=_largest(rehearsal, sizes),
        wal=_total(found.wal for found in day),
        guessed=tuple(
            key
            for key, size in rehearsal.before.tables.items()
            if not size.rows and key in sizes.tables and sizes.tables[key].rows
        ),
        unknown=tuple(stage for stage in (*DAY, *WAY_BACK) if rehearsal.stage(stage) is None),
        unrehearsed=tuple(key for key in sizes.tables if key not in rehearsal.before.tables),
    )


def times_as_large(sizes: Sizes, times: float) -> Sizes:
    """Sizes of a database with so many times the rows."""
    return Sizes(
        database=round(sizes.database * times),
        tables={
            key: TableSize(
                rows=round(size.rows * times),
                heap=round(size.heap * times),
                indexes=round(size.indexes * times),
            )
            for key, size in sizes.tables.items()
        },
    )


def accuracy(history: Sequence[Rehearsal]) -> Accuracy:
    """Have each rehearsal predict the next one of the same circumstances, from nothing but its sizes.

    Args:
        history: in any order.
    """
    trials: list[Trial] = []
    in_order = sorted(history, key=lambda found: found.started)
    for number, actual in enumerate(in_order):
        earlier = next(
            (one for one in reversed(in_order[:number]) if alike(one.circumstances, actual.circumstances)),
            None,
        )
        trial = held_against(earlier, actual, Accuracy(tuple(trials))) if earlier is not None else None
        if trial is not None:
            trials.append(trial)
    return Accuracy(tuple(trials))


def held_against(earlier: Rehearsal, actual: Rehearsal, so_far: Accuracy | None = None) -> Trial | None:
    """What a rehearsal predicted of another one, beside what that one took; None where they have nothing in common.

    Args:
        earlier: the one that predicts.
        actual: the one that is predicted; of it, the sizes are all that is used.
        so_far: how predictions had done until then.
    """
    prediction = predict(earlier, actual.before, so_far)
    span, real, stages = Span(), 0.0, {}
    for found in prediction.stages:
        measure = actual.stage(found.stage)
        if measure is not None and found.seconds.likely > 0:
            span += found.seconds
            real += own_seconds(measure)
            stages[found.stage] = own_seconds(measure) / found.seconds.likely
    if not span.likely or not real:
        return None
    rows, rows_before = (sum(table.rows for table in one.before.tables.values()) for one in (actual, earlier))
    return Trial(
        run_id=actual.run_id,
        predicted=span,
        real=real,
        times=rows / rows_before if rows_before else 1.0,
        stages=stages,
    )


# One stage.


@dataclass(frozen=True)
class _Parts:
    """What a table's seconds are made of.

    Args:
        rows: of the rehearsal.
        fixed: seconds, however many rows.
        growing: seconds of the rehearsed rows; with ``doubt``, seconds that may be of the one or of the other.
    """

    rows: int
    fixed: float
    growing: float
    doubt: float

    def seconds(self, rows: int, growth: Callable[[float], Span]) -> Span:
        """Of so many rows."""
        if not self.rows:
            return Span(self.fixed, self.fixed, self.fixed)
        times = rows / self.rows
        grown = growth(times)
        # Seconds in doubt that are fixed do not grow: little for larger tables, much for smaller ones.
        ends = [
            (self.fixed + sign * self.doubt) + max(0.0, self.growing - sign * self.doubt) * times * factor
            for sign, factor in ((1, grown.low), (-1, grown.high), (1, grown.high), (-1, grown.low))
        ]
        likely = self.fixed + self.growing * times * grown.likely
        return _span(min(*ends, likely), likely, max(*ends, likely))


def _stage(rehearsal: Rehearsal, measure: StageMeasure, sizes: Sizes, spread: float) -> StagePrediction:
    if measure.stage is Stage.ERASURE and any(work.locked_seconds for work in measure.tables.values()):
        return _erasure(rehearsal, measure, sizes, spread)
    tables: dict[str, Span] = {}
    scatter = 0.0
    # Of each second, what is left without what provoked faults cost.
    share = min(1.0, own_seconds(measure) / measure.seconds) if measure.seconds else 1.0
    works = {key: _bounded(work) for key, work in measure.tables.items() if key in rehearsal.before.tables}
    if measure.stage in _CONSTANT or not works:
        seconds = own_seconds(measure)
        if measure.stage in _CONSTANT:
            overhead = _span(seconds, seconds, seconds)
            for key, work in works.items():
                tables[key] = _span(*[work.seconds * share] * 3)
            overhead = _span(*[max(0.0, seconds - sum(span.likely for span in tables.values()))] * 3)
        else:
            overhead = _whole(rehearsal, seconds, sizes)
    elif _gone_through(rehearsal, works):
        tables, overhead, scatter = _by_range(rehearsal, measure, works, share, sizes)
    else:
        tables, overhead = _by_table(rehearsal, measure, works, share, sizes)
    off = math.hypot(spread, scatter)
    tables = {key: span.widened(off) for key, span in tables.items()}
    overhead = overhead.widened(off)
    return StagePrediction(
        stage=measure.stage,
        seconds=_total((*tables.values(), overhead)),
        tables=tables,
        wal=_in_proportion(rehearsal, float(measure.wal), sizes).widened(spread),
        locked=tables if measure.stage in LOCKING else {},
    )


def _gone_through(rehearsal: Rehearsal, works: Mapping[str, TableWork]) -> bool:
    """Whether a stage went through its tables range by range, and not just through what was left pending of them."""
    tables = rehearsal.before.tables
    rows = sum(tables[key].rows for key in works)
    return rows > 0 and sum(done for work in works.values() for done, _ in work.ranges) >= rows / 2


def _bounded(work: TableWork) -> TableWork:
    return work.model_copy(
        update={
            "seconds": min(work.seconds, LONGEST),
            "ranges": tuple((rows, min(seconds, LONGEST)) for rows, seconds in work.ranges),
        }
    )


def _erasure(rehearsal: Rehearsal, measure: StageMeasure, sizes: Sizes, spread: float) -> StagePrediction:
    """Writing tables anew, under their locks, apart from looking for what remains, without any.

    For each table, that goes through all files of the database, which grow with it, and through what there is of the
    write-ahead log, which grows until the server keeps no more of it.
    """
    written = {
        key: work.model_copy(update={"seconds": work.locked_seconds}) for key, work in measure.tables.items()
    }
    under_lock = sum(work.seconds for work in written.values())
    rewriting = _stage(
        rehearsal,
        measure.model_copy(
            update={
                "seconds": under_lock,
                "tables": {
                    key: work.model_copy(update={"locked_seconds": 0.0}) for key, work in written.items()
                },
            }
        ),
        sizes,
        spread,
    )
    rest = max(0.0, own_seconds(measure) - under_lock)
    looking = min(rest, sum(work.looking for work in measure.tables.values()))
    looked = _looking(looking, list(measure.tables.values()), _times(rehearsal, sizes))
    # Statistics are rewritten, and a checkpoint is made of what the table's rewriting left to be written.
    around = _whole(rehearsal, rest - looking, sizes)
    return replace(
        rewriting, seconds=_total((rewriting.seconds, looked.widened(spread), around.widened(spread)))
    )


def _looking(seconds: float, works: Sequence[TableWork], times: float) -> Span:
    """Of a database so many times as large, by the bytes that are looked through."""
    bytes_ = sum(work.looked_database + work.looked_wal + work.looked_other for work in works)
    if not bytes_:
        return _span(*sorted((seconds, seconds * math.sqrt(times), seconds * times)))

    def taken(wal_times: Callable[[TableWork], float]) -> float:
        wanted = sum(
            work.looked_database * times + work.looked_wal * wal_times(work) + work.looked_other
            for work in works
        )
        return seconds * wanted / bytes_

    def until_full(work: TableWork) -> float:
        # What is there already stays: segments are recycled.
        most = max(work.most_wal / work.looked_wal, 1.0) if work.looked_wal else 1.0
        return min(times, most)

    return _span(*sorted((taken(lambda _: 1.0), taken(until_full), taken(lambda _: times))))


def _whole(rehearsal: Rehearsal, seconds: float, sizes: Sizes) -> Span:
    """A stage that goes through the whole database at once: nothing tells what of it is fixed."""
    times = _times(rehearsal, sizes)
    fixed = _UNKNOWN_FIXED * seconds
    ends = sorted(
        (seconds * times, fixed + (seconds - fixed) * times, 2 * fixed + (seconds - 2 * fixed) * times)
    )
    return _span(*ends)


def _by_range(
    rehearsal: Rehearsal,
    measure: StageMeasure,
    works: Mapping[str, TableWork],
    share: float,
    sizes: Sizes,
) -> tuple[dict[str, Span], Span, float]:
    """Tables gone through range by range; by table, for none of them, and the relative error of both."""
    workers = max(1, rehearsal.circumstances.workers)
    begin: dict[str, float] = {}
    points: list[_Point] = []
    for key, work in works.items():
        ranges = [(rows, seconds * share) for rows, seconds in work.ranges if rows > 0]
        if not ranges:
            continue
        begin[key], ranges = _without_begin(ranges, workers)
        rows = sum(rows for rows, _ in ranges)
        points.append(
            _Point(
                key=key,
                rows=rows / len(ranges),
                size=rows / len(ranges) * (work.values / work.rows if work.rows else 1.0),
                seconds=sum(seconds for _, seconds in ranges) / len(ranges),
                number=len(ranges),
                error=_relative_error(ranges),
            )
        )
    per_range = _fixed(points)
    parts = {}
    for point in points:
        fixed = min(per_range, _MOST_FIXED * point.seconds)
        growing = point.seconds - fixed
        # Where a range is mostly fixed, what is left of it is mostly error.
        doubt = math.hypot(_FIXED_DOUBT * min(fixed, growing), _NINE_OF_TEN * point.error * fixed)
        parts[point.key] = _Parts(
            rows=rehearsal.before.tables[point.key].rows,
            fixed=begin[point.key] + point.number * fixed,
            growing=point.number * growing,
            doubt=point.number * doubt,
        )
    tables = {
        key: span.times(1 / workers) for key, span in _grown(parts, measure.stage, rehearsal, sizes).items()
    }
    busy = sum(seconds * share for work in works.values() for _, seconds in work.ranges) / workers
    # Opening sessions, counting rows, workers that wait for the last one.
    rest = max(0.0, own_seconds(measure) - busy)
    overhead = _span(rest, rest, rest * max(1.0, min(_times(rehearsal, sizes), 2.0)))
    return tables, overhead, _scatter(points)


def _without_begin(
    ranges: Sequence[tuple[int, float]], workers: int
) -> tuple[float, list[tuple[int, float]]]:
    """What each worker's first range took longer than the others; and the ranges without it."""
    first, rest = list(ranges[:workers]), list(ranges[workers:])
    if len(rest) <= workers:
        return 0.0, list(ranges)
    pace = sum(seconds for _, seconds in rest) / sum(rows for rows, _ in rest)
    begin = sum(max(0.0, seconds - pace * rows) for rows, seconds in first)
    return begin, [(rows, min(seconds, pace * rows)) for rows, seconds in first] + rest


def _by_table(
    rehearsal: Rehearsal,
    measure: StageMeasure,
    works: Mapping[str, TableWork],
    share: float,
    sizes: Sizes,
) -> tuple[dict[str, Span], Span]:
    """Tables gone through as a whole."""
    points = []
    for key, work in works.items():
        size = rehearsal.before.tables[key]
        points.append(
            _Point(
                key=key,
                rows=size.rows,
                size=size.heap + size.indexes,
                seconds=work.seconds * share,
            )
        )
    fixed = _fixed(points)
    parts = {}
    for point in points:
        own = min(fixed, point.seconds) if point.rows else point.seconds
        parts[point.key] = _Parts(
            rows=round(point.rows),
            fixed=own,
            growing=point.seconds - own,
            doubt=_FIXED_DOUBT * min(own, point.seconds - own),
        )
    rest = max(0.0, own_seconds(measure) - sum(point.seconds for point in points))
    return _grown(parts, measure.stage, rehearsal, sizes), _span(rest, rest, rest)


@dataclass(frozen=True)
class _Point:
    """One table's share of a stage, per range or in all.

    Args:
        key: of the table.
        rows: how many.
        size: values or bytes of them.
        seconds: that they took.
        number: of ranges, of which the others are means.
        error: relative standard error of the seconds.
    """

    key: str
    rows: float
    size: float
    seconds: float
    number: int = 1
    error: float = 0.0


def _fixed(points: Sequence[_Point]) -> float:
    """Seconds that do not depend on rows, the same for each point."""
    used = [point for point in points if point.seconds > _LEAST_SECONDS]
    if not used:
        return 0.0
    bound = _MOST_FIXED * min(point.seconds for point in used)
    if len({round(point.rows) for point in used}) == 1:
        return _UNKNOWN_FIXED * bound if used[0].rows else bound
    return min(bound, _least_squares(used))


def _least_squares(points: Sequence[_Point]) -> float:
    """The constant of the best fit of seconds by a constant, rows and sizes, none of them negative.

    Relative errors count, so that small tables have their say. With three unknowns, trying which of them are zero
    is the whole of it (Lawson and Hanson, Solving Least Squares Problems, chapter 23).
    """
    import numpy as np

    columns = np.array([[1.0, point.rows, point.size] for point in points], dtype=float)
    scale = columns.max(axis=0)
    scale[scale == 0] = 1.0
    seconds = np.array([point.seconds for point in points], dtype=float)
    matrix = columns / scale / seconds[:, None]
    best, constant = math.inf, 0.0
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(3), n) for n in (1, 2, 3)):
        found, *_ = np.linalg.lstsq(matrix[:, chosen], np.ones(len(points)), rcond=None)
        if (found < 0).any():
            continue
        error = float(((matrix[:, chosen] @ found - 1) ** 2).sum())
        # A part more has to explain something.
        if error < best * 0.999:
            best, constant = error, float(found[chosen.index(0)]) if 0 in chosen else 0.0
    return constant if math.isfinite(constant) else 0.0


def _grown(parts: Mapping[str, _Parts], stage: Stage, rehearsal: Rehearsal, sizes: Sizes) -> dict[str, Span]:
    """Seconds by table for other sizes; tables without rows in the rehearsal take the pace of the others."""
    rows = sum(part.rows for part in parts.values())
    pace = sum(part.growing for part in parts.values()) / rows if rows else 0.0
    typical = statistics.median(part.fixed for part in parts.values()) if parts else 0.0
    found = {}
    for key in rehearsal.before.tables:
        wanted = sizes.tables.get(key)
        if wanted is None:
            continue
        part = parts.get(key)
        if part is None or not part.rows:
            # As if it were one of the others, cut down to one row, so that what is known of those is used.
            part = _Parts(rows=1, fixed=part.fixed if part else typical, growing=pace, doubt=0.0)
            found[key] = part.seconds(wanted.rows, lambda _: Span(0.5, 1.0, 2.0)) if wanted.rows else Span()
            continue
        found[key] = part.seconds(wanted.rows, _growth(stage, part.rows))
    return found


def _growth(stage: Stage, rows: int) -> Callable[[float], Span]:
    """By what a row takes longer in a table that is so many times as large."""

    def growth(times: float) -> Span:
        if times <= 0:
            return Span(1.0, 1.0, 1.0)
        folds = math.log(times)
        factors = [1.0, 1.0, 1.0]
        if stage in _WRITING:
            # A smaller table is no faster than this, however small.
            factors = [max(0.5, 1 + rate * folds) for rate in (LEAST_GROWTH, LIKELY_GROWTH, MOST_GROWTH)]
        if stage is Stage.INDEXES and rows > 1:
            sorting = max(0.1, 1 + folds / math.log(rows))
            factors = [1.0, (1 + sorting) / 2, sorting]
        return Span(min(factors), factors[1], max(factors))

    return growth


def _relative_error(ranges: Sequence[tuple[int, float]]) -> float:
    """Of the mean of what ranges took, by their scatter."""
    paces = [seconds / rows for rows, seconds in ranges]
    mean = statistics.fmean(paces)
    if len(paces) < 2 or not mean:
        return 0.0
    return min(statistics.stdev(paces) / mean, 10.0) / math.sqrt(len(paces))


def _scatter(points: Sequence[_Point]) -> float:
    """Relative standard error of what all ranges took together."""
    total = sum(point.seconds * point.number for point in points)
    off = math.sqrt(sum((point.error * point.seconds * point.number) ** 2 for point in points))
    return off / total if total else 0.0


# Room.


def _largest(rehearsal: Rehearsal, sizes: Sizes) -> Span:
    """Bytes of the database when it is largest, until plaintext is gone."""
    grown = [Span(sizes.database, sizes.database, sizes.database)]
    for measure in rehearsal.stages:
        if measure.sizes is None or measure.stage not in DAY:
            continue
        growth = 0.0
        for key, after in measure.sizes.tables.items():
            before, wanted = rehearsal.before.tables.get(key), sizes.tables.get(key)
            if before is not None and wanted is not None:
                change = after.heap + after.indexes - before.heap - before.indexes
                growth += change * _times_of_table(before, wanted)
        extra = 0.0
        if measure.stage is Stage.ERASURE:
            # Each table is written anew before the old one goes.
            extra = max(
                (
                    (after.heap + after.indexes)
                    * _times_of_table(rehearsal.before.tables[key], sizes.tables[key])
                    for key, after in measure.sizes.tables.items()
                    if key in rehearsal.before.tables and key in sizes.tables
                ),
                default=0.0,
            )
        total = max(0.0, sizes.database + growth + extra)
        grown.append(_span(max(0.0, total - 0.2 * abs(growth)), total, total + 0.3 * abs(growth)))
    return max(grown, key=lambda span: span.likely)


def _times_of_table(before: TableSize, wanted: TableSize) -> float:
    """How many times the rehearsed table; by rows, or by bytes where there were none."""
    if before.rows:
        return wanted.rows / before.rows
    size = before.heap + before.indexes
    return (wanted.heap + wanted.indexes) / size if size else 0.0


def _times(rehearsal: Rehearsal, sizes: Sizes) -> float:
    """How many times the rehearsed database: by its bytes or, where those are not known, by the rows."""
    ours = [size for key, size in rehearsal.before.tables.items() if key in sizes.tables]
    theirs = [sizes.tables[key] for key in rehearsal.before.tables if key in sizes.tables]
    before = rehearsal.before.database - _EMPTY_DATABASE
    if before > 0 and any(size.heap > 0 for size in theirs):
        return max(0, sizes.database - _EMPTY_DATABASE) / before
    rows = sum(size.rows for size in ours)
    wanted = sum(size.rows for size in theirs)
    return wanted / rows if rows else 0.0


def _in_proportion(rehearsal: Rehearsal, amount: float, sizes: Sizes) -> Span:
    rows = sum(size.rows for key, size in rehearsal.before.tables.items() if key in sizes.tables)
    wanted = sum(size.rows for key, size in sizes.tables.items() if key in rehearsal.before.tables)
    grown = amount * wanted / rows if rows else amount
    return _span(min(amount, grown) if wanted < rows else 0.8 * grown, grown, 1.3 * grown)


def _span(low: float, likely: float, high: float) -> Span:
    low, likely, high = (
        min(max(figure, 0.0), _LARGEST) if not math.isnan(figure) else _LARGEST
        for figure in (low, likely, high)
    )
    return Span(min(low, likely), likely, max(likely, high))


def _total(spans: Iterable[Span]) -> Span:
    total = sum(spans, start=Span())
    return _span(total.low, total.likely, total.high)
