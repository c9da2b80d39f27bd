"""How long production will take, what room it needs, and how good such predictions were so far.

Of each table a stage takes a fixed part and a part per row; an index build takes a part per row times the logarithm of
the rows. The fixed part is the same for all tables of a stage. It is fitted by least squares of relative errors, no
part negative, over the tables of the rehearsals under the same circumstances. What it leaves of a table's seconds in
the newest rehearsal is that table's own part per row. Stages that look into the catalogues only do not grow, and
neither does what a stage does beside its tables. A backup, and what an erasure does beside rewriting tables, grow with
the bytes that they go through. The range is what the fit leaves open: from the fixed part less twice its standard error
to that part and as much more. It is wider, the farther from the earlier predictions what came was (:func:`accuracy`),
and the farther from the rehearsed rows one predicts. It is meant to hold nine times out of ten.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from alphapulse_encryption.migration.insight.estimates import NOTHING, Span
from alphapulse_encryption.rehearsal.measures import (
    DAY,
    LONGEST,
    WAY_BACK,
    Rehearsal,
    Sizes,
    Stage,
    StageMeasure,
)
from alphapulse_encryption.rehearsal.report.comparison import alike

# The application waits for a lock: for a moment in the drop, for as long as it takes in the erasure.
LOCKING = frozenset({Stage.DROP, Stage.ERASURE})
# These look into the catalogues and change them; no row is touched.
_CONSTANT = frozenset({Stage.PREFLIGHT, Stage.COLUMNS, Stage.VIEWS})
# How much of the seconds is fixed where one size only was rehearsed; at most twice as much.
_UNKNOWN_FIXED = 0.1
# The share of a table's seconds that is taken to be fixed at most: something is always done per row.
_MOST_FIXED = 0.95
# Standard deviation of the logarithm of real by predicted, until predictions were held against what came; and as how
# many predictions this counts.
_PRIOR_ERROR, _PRIOR_WEIGHT = 0.15, 4
# What an e-fold of rows adds to it: rows take longer once indexes outgrow caches. Measured from 200,000 to 1,000,000
# rows: by 3.9 % where keys grow in the order of time, by 40 % where they are random.
_ERROR_PER_FOLD = 0.05
# Bytes of a database with nothing in it, which takes nobody any time.
_EMPTY_DATABASE = 7 * 2**20
# Nothing that was measured takes less; what does would overflow the fit of relative errors.
_LEAST_SECONDS = 1e-9


def _total(spans: Iterable[Span]) -> Span:
    return sum(spans, start=NOTHING)


def _less(span: Span, part: Span) -> Span:
    return Span.of(span.likely - part.likely, span.low - part.low, span.high - part.high)


@dataclass(frozen=True)
class StagePrediction:
    """One stage: its seconds, those of each table where it goes through tables, and bytes of write-ahead log."""

    stage: Stage
    seconds: Span
    tables: Mapping[str, Span]
    wal: Span
    # Seconds during which nobody else can use the table, by its key; empty where all stay open.
    locked: Mapping[str, Span] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """The day, predicted for a database of these sizes; seconds, and bytes."""

    sizes: Sizes
    # In their order, those of the way back included.
    stages: tuple[StagePrediction, ...]
    # The database at its largest.
    largest: Span
    # Tables without rows in the rehearsal, whose pace is that of the others.
    guessed: tuple[str, ...]
    # Stages that did not come to their end.
    unknown: tuple[Stage, ...]
    # Tables that production has and the rehearsal had not.
    unrehearsed: tuple[str, ...]

    @property
    def day(self) -> tuple[StagePrediction, ...]:
        """The stages of the day, the way back not included."""
        return tuple(found for found in self.stages if found.stage in DAY)

    @property
    def seconds(self) -> Span:
        return _total(found.seconds for found in self.day)

    @property
    def locked_tables(self) -> Mapping[str, Span]:
        """Of the tables that are locked one after another, the seconds of each."""
        keys = dict.fromkeys(key for found in self.day for key in found.locked)
        return {key: _total(found.locked.get(key, NOTHING) for found in self.day) for key in keys}

    @property
    def locked(self) -> Span:
        """Of the day's seconds, those while a table is locked."""
        return _total(self.locked_tables.values())

    @property
    def online(self) -> Span:
        """Of the day's seconds, those beside the running application."""
        return _less(self.seconds, self.locked)

    @property
    def way_back(self) -> Span:
        """Seconds to have the plaintext back after the drop."""
        return _total(found.seconds for found in self.stages if found.stage in WAY_BACK)

    @property
    def wal(self) -> Span:
        return _total(found.wal for found in self.day)

    @property
    def growth(self) -> Span:
        """Bytes that the database needs at its largest beside those it has."""
        return _less(self.largest, Span.of(self.sizes.database))

    def stage(self, stage: Stage) -> StagePrediction | None:
        return next((found for found in self.stages if found.stage is stage), None)

    def seconds_of(self, stages: Sequence[Stage]) -> Span | None:
        """Seconds of these together; None where there are none, or one of them is not known."""
        found = [one.seconds for one in map(self.stage, stages) if one is not None]
        return _total(found) if stages and len(found) == len(stages) else None


@dataclass(frozen=True)
class Trial:
    """A prediction of a rehearsal that was held against what came: seconds of the stages that both have."""

    run_id: str
    predicted: Span
    real: float

    @property
    def error(self) -> float:
        """By how much of the prediction it took longer; negative where it took less."""
        return self.real / self.predicted.likely - 1

    @property
    def held(self) -> bool:
        return self.predicted.low <= self.real <= self.predicted.high


@dataclass(frozen=True)
class Accuracy:
    trials: tuple[Trial, ...] = ()

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of real by predicted, with what is assumed before there are trials."""
        squares = [math.log(trial.real / trial.predicted.likely) ** 2 for trial in self.trials]
        return math.sqrt(
            (_PRIOR_WEIGHT * _PRIOR_ERROR**2 + sum(squares)) / (_PRIOR_WEIGHT + len(self.trials))
        )

    @property
    def sentence(self) -> str:
        if not self.trials:
            return (
                "No earlier rehearsal under the same circumstances could be held against its prediction yet."
            )
        count = len(self.trials)
        held = sum(trial.held for trial in self.trials)
        typical = statistics.median(abs(trial.error) for trial in self.trials)
        made = "1 earlier prediction was" if count == 1 else f"{count} earlier predictions were"
        return f"{made} off by {typical:.0%} (median); {held} of {count} held within its range."


def predict(rehearsals: Sequence[Rehearsal], sizes: Sizes, accuracy: Accuracy | None = None) -> Prediction:
    """Predict the migration of a database like the rehearsed one, on such a machine.

    The last rehearsal is what is predicted from; earlier ones under the same circumstances help to tell what is fixed.
    The accuracy of earlier predictions widens the range.
    """
    newest = rehearsals[-1]
    like = [one for one in rehearsals if alike(one.circumstances, newest.circumstances)]
    error = (accuracy or Accuracy()).spread
    before = newest.before.tables
    return Prediction(
        sizes=sizes,
        stages=tuple(_stage(like, m, sizes, error) for s in (*DAY, *WAY_BACK) if (m := newest.stage(s))),
        largest=_largest(newest, sizes),
        guessed=tuple(key for key, size in before.items() if not size.rows and _rows(sizes, key)),
        unknown=tuple(stage for stage in (*DAY, *WAY_BACK) if newest.stage(stage) is None),
        unrehearsed=tuple(key for key in sizes.tables if key not in before),
    )


def times_as_large(sizes: Sizes, times: float) -> Sizes:
    tables = {key: size.times(times) for key, size in sizes.tables.items()}
    return Sizes(database=round(sizes.database * times), tables=tables)


def accuracy(history: Sequence[Rehearsal]) -> Accuracy:
    """Have each rehearsal be predicted by those before it under the same circumstances, from nothing but its sizes."""
    trials: list[Trial] = []
    in_order = sorted(history, key=lambda found: found.started)
    for number, actual in enumerate(in_order):
        earlier = [one for one in in_order[:number] if alike(one.circumstances, actual.circumstances)]
        trial = held_against(earlier, actual, Accuracy(tuple(trials))) if earlier else None
        if trial is not None:
            trials.append(trial)
    return Accuracy(tuple(trials))


def held_against(
    earlier: Sequence[Rehearsal], actual: Rehearsal, so_far: Accuracy | None = None
) -> Trial | None:
    """What earlier rehearsals predict of one, beside what it took; None where they have nothing in common."""
    both = [
        (found.seconds, measure.own_seconds)
        for found in predict(earlier, actual.before, so_far).stages
        if found.seconds.likely > 0 and (measure := actual.stage(found.stage)) is not None
    ]
    predicted, real = _total(span for span, _ in both), sum(seconds for _, seconds in both)
    if predicted.likely < _LEAST_SECONDS or real < _LEAST_SECONDS:
        return None
    return Trial(run_id=actual.run_id, predicted=predicted, real=real)


# Seconds.


@dataclass(frozen=True)
class _Fixed:
    """The seconds of each table in a stage that do not depend on its size, and how many they may be more or less."""

    seconds: float
    doubt: float

    @classmethod
    def of(cls, points: Iterable[tuple[float, float]]) -> _Fixed:
        """The constant of the line through points of an amount and the seconds it took, by relative errors."""
        used = [(amount, seconds) for amount, seconds in points if seconds > _LEAST_SECONDS]
        most = _MOST_FIXED * min((seconds for _, seconds in used), default=0.0)
        unit = max((amount for amount, _ in used), default=0.0) or 1.0
        # Each point divided by its seconds: one is to be a / seconds + b * amount / seconds.
        rows = [(1 / seconds, amount / unit / seconds) for amount, seconds in used]
        aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
        a, b = (sum(row[i] for row in rows) for i in (0, 1))
        determinant = aa * bb - ab * ab
        if determinant <= 1e-12 * aa * bb:
            return cls(_UNKNOWN_FIXED * most, _UNKNOWN_FIXED * most)
        constant, slope = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
        squares = sum((constant * x + slope * y - 1) ** 2 for x, y in rows)
        error = math.sqrt(squares / max(len(rows) - 2, 1) * bb / determinant)
        return cls(min(max(constant, 0.0), most) if slope > 0 else most, 2 * error)

    def grown(self, seconds: float, times: float) -> Span:
        """Seconds that were measured, where that which grows is so many times as large."""
        ends = [self.seconds, self.seconds - self.doubt, self.seconds + self.doubt]
        fixed = [min(max(end, 0.0), _MOST_FIXED * seconds) for end in ends]
        return Span.of(*(one + (seconds - one) * times for one in fixed))


def _stage(
    rehearsals: Sequence[Rehearsal], measure: StageMeasure, sizes: Sizes, error: float
) -> StagePrediction:
    newest, stage = rehearsals[-1], measure.stage
    taken = _by_table(newest, stage)
    rest = max(0.0, measure.own_seconds - sum(seconds for _, seconds in taken.values()))
    if stage in _CONSTANT:
        tables = {key: Span.of(seconds) for key, (_, seconds) in taken.items() if key in sizes.tables}
    else:
        tables = _tables(rehearsals, stage, sizes)
    if (taken and stage is not Stage.ERASURE) or stage in _CONSTANT:
        beside = Span.of(rest)
    else:
        looked = min(rest, sum(work.looking for work in measure.tables.values()))
        # By bytes.
        there = newest.before.database - _EMPTY_DATABASE
        times = max(0, sizes.database - _EMPTY_DATABASE) / there if there > 0 else 1.0
        # Bytes of whole databases, and the seconds to go through them.
        fixed = _Fixed.of(
            (max(0.0, one.before.database - _EMPTY_DATABASE), other.own_seconds)
            for one in rehearsals
            if not taken and (other := one.stage(stage)) is not None
        )
        beside = fixed.grown(rest - looked, times) + Span.of(looked * _times_looked(measure, times))
    rows = sum(size.rows for key, size in newest.before.tables.items() if key in sizes.tables)
    times = sum(_rows(sizes, key) for key in newest.before.tables) / rows if rows else 1.0
    if times and stage not in _CONSTANT:
        error += _ERROR_PER_FOLD * abs(math.log(times))
    tables = {key: span.widened(error) for key, span in tables.items()}
    return StagePrediction(
        stage=stage,
        seconds=_total((*tables.values(), beside.widened(error))),
        tables=tables,
        wal=Span.of(measure.wal * times).widened(error),
        locked=tables if stage in LOCKING else {},
    )


def _by_table(rehearsal: Rehearsal, stage: Stage) -> dict[str, tuple[float, float]]:
    """What each table's seconds grow with, and the seconds: without those of faults; of an erasure, under its lock."""
    measure = rehearsal.stage(stage)
    if measure is None:
        return {}
    locked = {key: work.locked_seconds for key, work in measure.tables.items()}
    # Not known of every erasure.
    if stage is not Stage.ERASURE or not any(locked.values()):
        locked = {key: work.seconds for key, work in measure.tables.items()}
    # Tables that are worked on side by side take longer, added up, than the stage.
    share = measure.own_seconds / max(measure.seconds, sum(locked.values()), _LEAST_SECONDS)
    return {
        key: (_amount(stage, size.rows), min(locked[key] * share, LONGEST))
        for key, size in rehearsal.before.tables.items()
        if key in locked
    }


def _tables(rehearsals: Sequence[Rehearsal], stage: Stage, sizes: Sizes) -> dict[str, Span]:
    """Seconds by table; tables without rows in the newest rehearsal take the pace of the others."""
    fixed = _Fixed.of(point for one in rehearsals for point in _by_table(one, stage).values())
    newest = _by_table(rehearsals[-1], stage)
    amounts = sum(amount for amount, _ in newest.values())
    growing = sum(max(0.0, seconds - fixed.seconds) for amount, seconds in newest.values() if amount)
    found = {}
    for key in rehearsals[-1].before.tables if newest else ():
        if key not in sizes.tables:
            continue
        amount, seconds = newest.get(key, (0.0, 0.0))
        wanted = _amount(stage, _rows(sizes, key))
        if amount:
            found[key] = fixed.grown(seconds, wanted / amount)
        else:
            own = growing / amounts * wanted if amounts else 0.0
            found[key] = Span.of(seconds + own, seconds + own / 2, seconds + 2 * own)
    return found


def _amount(stage: Stage, rows: int) -> float:
    """What a table's seconds grow with."""
    return rows * math.log(max(rows, 2)) if stage is Stage.INDEXES else float(rows)


def _times_looked(measure: StageMeasure, times: float) -> float:
    """How many times the bytes that an erasure looks through, in a database so many times as large.

    Of the write-ahead log there is more until the server keeps no more of it; what is there already stays.
    """
    now = wanted = 0.0
    for work in measure.tables.values():
        now += work.looked_database + work.looked_wal + work.looked_other
        log = min(max(times, 1.0) * work.looked_wal, max(work.most_wal, work.looked_wal))
        wanted += work.looked_database * times + log + work.looked_other
    return wanted / now if now else 1.0


# Room.


def _largest(rehearsal: Rehearsal, sizes: Sizes) -> Span:
    """Bytes of the database when it is largest, until plaintext is gone."""
    before = rehearsal.before.tables
    spans = [Span.of(sizes.database)]
    for measure in rehearsal.stages:
        if measure.sizes is None or measure.stage not in DAY:
            continue
        after = measure.sizes.tables
        times = {
            key: wanted.rows / before[key].rows
            if before[key].rows
            else wanted.bytes / max(before[key].bytes, 1)
            for key, wanted in sizes.tables.items()
            if key in before and key in after
        }
        growth = sum((after[key].bytes - before[key].bytes) * times[key] for key in times)
        # Each table is written anew before the old one goes.
        erased = times if measure.stage is Stage.ERASURE else ()
        total = sizes.database + growth + max((after[key].bytes * times[key] for key in erased), default=0.0)
        spans.append(Span.of(total, total - 0.2 * abs(growth), total + 0.3 * abs(growth)))
    return max(spans, key=lambda span: span.likely)


def _rows(sizes: Sizes, key: str) -> int:
    return sizes.tables[key].rows if key in sizes.tables else 0
