"""What a rehearsal measures: the stages write it, the prediction and the report read it, Dagster keeps it as JSON.

Free of values, keys and addresses: it ends up in run metadata and in a page that is passed around.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict

# Share of a stage's seconds that faults cannot have cost: added up, those in several ranges at once cost more than all.
LEAST_LEFT = 0.25
# Seconds, of anything; more, and floating point gets into trouble.
LONGEST = 1e12


class _Measure(BaseModel):
    # What an earlier version measured besides is no reason to forget its rehearsals.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Stage(StrEnum):
    """The stages, in their order; values are the names of the job's ops."""

    CLONE = "clone"
    BASELINE = "baseline"
    PREFLIGHT = "preflight"
    COLUMNS = "columns"
    BACKFILL = "backfill"
    INDEXES = "indexes"
    VERIFY = "verify"
    VIEWS = "views"
    BACKUP = "backup"
    SWITCH = "switch"
    APPROVAL = "approval"
    DROP = "drop"
    ERASURE = "erasure"
    RESTORE = "restore"
    VERIFY_AGAIN = "verify_again"
    AFTERWARDS = "afterwards"
    REMOVAL = "removal"


# What is done on the day, in its order, and what only if it has to be undone.
DAY = (
    *(Stage.PREFLIGHT, Stage.COLUMNS, Stage.BACKFILL, Stage.INDEXES, Stage.VERIFY, Stage.VIEWS, Stage.BACKUP),
    *(Stage.SWITCH, Stage.APPROVAL, Stage.DROP, Stage.ERASURE),
)
WAY_BACK = (Stage.RESTORE, Stage.VERIFY_AGAIN)


class TableSize(_Measure):
    """Sizes of one table, in bytes; its rows are counted on a clone, and the planner's estimate in production."""

    rows: int
    # TOAST included.
    heap: int
    indexes: int

    @property
    def bytes(self) -> int:
        return self.heap + self.indexes

    def times(self, times: float) -> TableSize:
        return TableSize(**{name: round(amount * times) for name, amount in self})


class Sizes(_Measure):
    """Sizes of a database, in bytes; of the catalogue's tables one by one, by their keys."""

    database: int
    tables: dict[str, TableSize]

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables.values())


class TableWork(_Measure):
    """What a stage did to one table."""

    rows: int = 0
    # Encrypted, decrypted or brought back.
    values: int = 0
    # From the first worker's begin to the last one's end.
    seconds: float = 0.0
    # How much of it nobody else could use the table, where that is known.
    locked_seconds: float = 0.0
    # How much of it the engine was throttled, over all workers.
    seconds_held_back: float = 0.0
    # Rows that the application changed under the engine's hands.
    changed_meanwhile: int = 0
    quarantined: int = 0
    # Seconds of looking for remnants after an erasure, without any lock; and the bytes that it went through.
    looking: float = 0.0
    looked_database: int = 0
    looked_wal: int = 0
    looked_other: int = 0
    # Bytes of write-ahead log that the server keeps at most.
    most_wal: int = 0

    def __add__(self, other: TableWork) -> TableWork:
        return TableWork(**{name: amount + getattr(other, name) for name, amount in self})


class Latency(_Measure):
    """Requests of one kind and way during one stage; milliseconds, from when the request was due to its answer."""

    kind: str
    # Through the runtime library, with its phase, or plain SQL: "library, dual".
    way: str
    # Failed ones included.
    requests: int
    errors: int
    # Not what had been written.
    wrong_answers: int
    p50: float
    p95: float
    p99: float
    longest: float


class Moment(_Measure):
    """A short time of traffic, for the plot over time; milliseconds, None without a request."""

    at: datetime
    seconds: float
    requests: int
    errors: int
    p50: float | None
    p99: float | None
    longest: float | None


class Traffic(_Measure):
    """The traffic during one stage."""

    phases: tuple[str, ...]
    # Of kind and way "all".
    overall: Latency
    by_kind: tuple[Latency, ...]
    moments: tuple[Moment, ...]
    # Sessions that were seen waiting, by what they waited for; and the longest wait, in seconds.
    lock_waits: dict[str, int]
    longest_lock_wait: float
    # By class and SQLSTATE, without messages.
    error_kinds: dict[str, int]
    # Made once more after a lost connection, as applications do: no errors if they succeeded then.
    retried: int = 0
    # What the traffic could not do on these tables, and why.
    left_out: tuple[str, ...] = ()


def added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """What was counted under each name, the most frequent first."""
    return dict(sum((Counter(one) for one in counts), Counter[str]()).most_common())


class Fault(_Measure):
    """A fault that was provoked, and a sentence on it."""

    kind: str
    at: datetime
    # Of the outage itself; and until the work went on.
    seconds_away: float
    seconds_lost: float
    survived: bool
    what: str


class Finding(_Measure):
    """Something that would block or surprise on the day.

    A blocker ends the migration, a warning needs a decision, a note is good to know.
    """

    level: Literal["blocker", "warning", "note"]
    # A table, a column, a setting.
    subject: str
    what: str
    # A command where there is one.
    advice: str = ""


class StageMeasure(_Measure):
    """One stage; tables by their keys, sizes as they were after it."""

    stage: Stage
    started: datetime
    ended: datetime
    # Of the migration's own work, without what the rehearsal does around it.
    seconds: float
    tables: dict[str, TableWork] = {}
    # Bytes, the traffic's included.
    wal: int = 0
    sizes: Sizes | None = None
    traffic: Traffic | None = None
    faults: tuple[Fault, ...] = ()
    findings: tuple[Finding, ...] = ()
    attempts: int = 1

    @property
    def rows(self) -> int:
        return sum(work.rows for work in self.tables.values())

    @property
    def own_seconds(self) -> float:
        """Seconds without those that provoked faults cost."""
        lost = sum(fault.seconds_lost for fault in self.faults)
        return min(max(LEAST_LEFT * self.seconds, self.seconds - lost), LONGEST)

    @property
    def seconds_per_row(self) -> float | None:
        """Of its own seconds; None without rows."""
        return self.own_seconds / self.rows if self.rows else None


class Circumstances(_Measure):
    """What must be the same for two rehearsals to be compared, and what the prediction needs to know."""

    # Name of the staging database, never its address.
    source: str
    # "template" or "dump and restore".
    cloned_by: str
    # Of the PostgreSQL that the clone was on.
    server_version: str
    cores: int
    workers: int
    batch_ranges: int
    # Requests per second; 0 without traffic.
    rate: float
    version: str
    rest_ratio: float = 0.0


class Rehearsal(_Measure):
    """A whole rehearsal, also one that ended early; its stages are those that came to an end."""

    run_id: str
    started: datetime
    ended: datetime
    circumstances: Circumstances
    # Sizes of the clone, before anything was done to it.
    before: Sizes
    stages: tuple[StageMeasure, ...]
    # The stage that did not come to an end, its message, free of values, and what it found.
    failed_stage: Stage | None = None
    failure: str = ""
    findings: tuple[Finding, ...] = ()
    # By checksums; None where they were not compared.
    source_unchanged: bool | None = None
    # Given, or read from its statistics; None where they are not known.
    production: Sizes | None = None

    def stage(self, stage: Stage) -> StageMeasure | None:
        """The measurements of a stage; None where it did not come to an end."""
        return next((measure for measure in self.stages if measure.stage is stage), None)

    @property
    def day(self) -> tuple[StageMeasure, ...]:
        """The stages of the day, the way back not included."""
        return tuple(measure for measure in self.stages if measure.stage in DAY)

    def p99(self, stage: Stage) -> float | None:
        """The 99th percentile of the latency during a stage, in milliseconds; None without requests."""
        measure = self.stage(stage)
        if measure is None or measure.traffic is None or not measure.traffic.overall.requests:
            return None
        return measure.traffic.overall.p99

    @property
    def p99_ratio(self) -> float | None:
        """The 99th percentile during the backfill over that of the baseline; None where one is missing."""
        before, during = self.p99(Stage.BASELINE), self.p99(Stage.BACKFILL)
        return during / before if before and during is not None else None

    def seconds_per_row(self, stage: Stage) -> float | None:
        """Of a stage's own seconds; None where it is missing or had no rows."""
        measure = self.stage(stage)
        return measure.seconds_per_row if measure is not None else None

    @property
    def peak(self) -> Sizes | None:
        """The sizes after the day's stage at whose end the database was largest; None where no sizes were taken.

        What a restore adds, before the next vacuum takes the old row versions away, is not of the day.
        """
        sizes = [measure.sizes for measure in self.day if measure.sizes is not None]
        return max(sizes, key=lambda found: found.database, default=None)

    @property
    def growth(self) -> float | None:
        """The database at its largest over what it was before; None where no sizes were taken."""
        largest = self.peak
        return (
            largest.database / self.before.database if largest is not None and self.before.database else None
        )

    @property
    def all_findings(self) -> tuple[tuple[Stage, Finding], ...]:
        """Each once, with the first stage that found it; blockers first, then warnings."""
        by_stage = [(measure.stage, measure.findings) for measure in self.stages]
        if self.failed_stage is not None:
            by_stage.append((self.failed_stage, self.findings))
        found: dict[Finding, Stage] = {}
        for stage, findings in by_stage:
            for finding in findings:
                found.setdefault(finding, stage)
        ordered = sorted(found, key=lambda one: ("blocker", "warning", "note").index(one.level))
        return tuple((found[finding], finding) for finding in ordered)
