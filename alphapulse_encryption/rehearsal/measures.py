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
    """Sizes of one table, in bytes.

    Args:
        rows: by the planner's statistics where it is a production database, counted where it is a clone.
        heap: the table itself, its TOAST included.
        indexes: all its indexes.
    """

    rows: int
    heap: int
    indexes: int

    @property
    def bytes(self) -> int:
        """Table and indexes."""
        return self.heap + self.indexes

    def times(self, times: float) -> TableSize:
        """One with so many times the rows."""
        return TableSize(
            rows=round(self.rows * times), heap=round(self.heap * times), indexes=round(self.indexes * times)
        )


class Sizes(_Measure):
    """Sizes of a database, in bytes; of the catalogue's tables one by one.

    Args:
        database: of everything in it.
        tables: by the table's key.
    """

    database: int
    tables: dict[str, TableSize]

    @property
    def rows(self) -> int:
        """Of all tables."""
        return sum(table.rows for table in self.tables.values())


class TableWork(_Measure):
    """What a stage did to one table.

    Args:
        rows: rows that it worked on.
        values: values that it encrypted, decrypted or brought back.
        seconds: duration; where several workers share a table, from the first's begin to the last's end.
        locked_seconds: how much of it nobody else could read or write the table, where that is known.
        seconds_held_back: how much of it the engine waited because the server showed distress, over all workers.
        changed_meanwhile: rows that the application changed under the engine's hands.
        quarantined: rows set aside.
        looking: seconds of looking for remnants after an erasure, without any lock.
        looked_database, looked_wal, looked_other: bytes that were looked through for it: of the database's own files,
            of write-ahead log, and of other files of the server.
        most_wal: bytes of write-ahead log that the server means to keep at most.
    """

    rows: int = 0
    values: int = 0
    seconds: float = 0.0
    locked_seconds: float = 0.0
    seconds_held_back: float = 0.0
    changed_meanwhile: int = 0
    quarantined: int = 0
    looking: float = 0.0
    looked_database: int = 0
    looked_wal: int = 0
    looked_other: int = 0
    most_wal: int = 0

    def __add__(self, other: TableWork) -> TableWork:
        """Two parts of a stage's work on one table."""
        return TableWork(
            **{name: getattr(self, name) + getattr(other, name) for name in TableWork.model_fields}
        )


class Latency(_Measure):
    """Requests of one kind during one stage; milliseconds, from when the request was due to its answer.

    Args:
        kind: what it does, for example "look up by search column".
        way: through the runtime library, with its phase, or plain SQL: for example "library, dual".
        requests: all of them, failed ones included.
        wrong_answers: those whose answer was not what had been written.
    """

    kind: str
    way: str
    requests: int
    errors: int
    wrong_answers: int
    p50: float
    p95: float
    p99: float
    longest: float


class Moment(_Measure):
    """A short time of traffic, for the plot of latency over time.

    Args:
        requests, errors: as in :class:`Latency`.
        p50, p99, longest: milliseconds; None without a request.
    """

    at: datetime
    seconds: float
    requests: int
    errors: int
    p50: float | None
    p99: float | None
    longest: float | None


class Traffic(_Measure):
    """The traffic during one stage.

    Args:
        phases: of the application's instances.
        overall: of all requests together; its kind and way are "all".
        by_kind: of each kind and way.
        moments: in the order of time.
        lock_waits: sessions of the traffic that were seen waiting for a lock, by what they waited for.
        longest_lock_wait: seconds.
        error_kinds: number of failed requests by class and SQLSTATE, without messages.
        retried: requests whose connection was lost and that were made once more, as applications do; those that
            succeeded then are no errors, and their latency has all of it.
        left_out: what the traffic could not do on these tables, and why.
    """

    phases: tuple[str, ...]
    overall: Latency
    by_kind: tuple[Latency, ...]
    moments: tuple[Moment, ...]
    lock_waits: dict[str, int]
    longest_lock_wait: float
    error_kinds: dict[str, int]
    retried: int = 0
    left_out: tuple[str, ...] = ()

    @property
    def p99(self) -> float | None:
        """Of all requests; None without any."""
        return self.overall.p99 if self.overall.requests else None


def added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """What was counted under each name, the most frequent first."""
    return dict(sum((Counter(one) for one in counts), Counter[str]()).most_common())


class Fault(_Measure):
    """A fault that was provoked.

    Args:
        kind: "worker killed", "connections dropped", "server restarted" or "key source unavailable".
        seconds_away: how long the outage itself lasted.
        seconds_lost: from the fault until the work went on, the outage included.
        survived: whether the stage came to its end with nothing lost.
        what: a sentence for the report.
    """

    kind: str
    at: datetime
    seconds_away: float
    seconds_lost: float
    survived: bool
    what: str


class Finding(_Measure):
    """Something that would block or surprise on the day.

    Args:
        level: "blocker" ends the migration, "warning" needs a decision, "note" is good to know.
        subject: what it is about: a table, a column, a setting.
        what: what was found.
        advice: what to do about it, a command where there is one; may be empty.
    """

    level: Literal["blocker", "warning", "note"]
    subject: str
    what: str
    advice: str = ""

    @property
    def weight(self) -> int:
        """The weightiest first."""
        return ("blocker", "warning", "note").index(self.level)


class StageMeasure(_Measure):
    """One stage.

    Args:
        started, ended: with their time zone.
        seconds: duration of the migration's own work, without what the rehearsal does around it.
        tables: by the table's key.
        wal: bytes of WAL that the server wrote meanwhile, the traffic's included.
        sizes: after the stage.
        traffic: None where there was none.
        faults: in their order.
        findings: in the order of their weight.
    """

    stage: Stage
    started: datetime
    ended: datetime
    seconds: float
    tables: dict[str, TableWork] = {}
    wal: int = 0
    sizes: Sizes | None = None
    traffic: Traffic | None = None
    faults: tuple[Fault, ...] = ()
    findings: tuple[Finding, ...] = ()
    attempts: int = 1

    @property
    def rows(self) -> int:
        """Of all tables that it worked on."""
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
    """What must be the same for two rehearsals to be compared, and what the prediction needs to know.

    Args:
        source: name of the staging database (never its address).
        cloned_by: "template" or "dump and restore".
        server_version: of PostgreSQL where the clone was.
        workers: batch ranges worked on at once.
        batch_ranges: per table.
        rate: requests per second of the traffic; 0 without.
        rest_ratio: seconds of rest of the backfill for each second of its work.
    """

    source: str
    cloned_by: str
    server_version: str
    cores: int
    workers: int
    batch_ranges: int
    rate: float
    version: str
    rest_ratio: float = 0.0


class Rehearsal(_Measure):
    """A whole rehearsal, also one that ended early.

    Args:
        run_id: Dagster's run.
        started, ended: with their time zone.
        before: sizes of the clone before anything was done to it.
        stages: those that came to an end.
        failed_stage: the one that did not; None where all did.
        failure: its message, free of values.
        source_unchanged: whether the source's tables had the same checksums before and after; None where they were not
            compared.
        production: sizes of production, given or read from its statistics; None where they are not known.
        findings: those of the stage that did not come to an end; those of the others are with them.
    """

    run_id: str
    started: datetime
    ended: datetime
    circumstances: Circumstances
    before: Sizes
    stages: tuple[StageMeasure, ...]
    failed_stage: Stage | None = None
    failure: str = ""
    source_unchanged: bool | None = None
    production: Sizes | None = None
    findings: tuple[Finding, ...] = ()

    def stage(self, stage: Stage) -> StageMeasure | None:
        """The measurements of a stage, None where it did not come to an end."""
        return next((measure for measure in self.stages if measure.stage is stage), None)

    @property
    def day(self) -> tuple[StageMeasure, ...]:
        """The stages of the day, the way back not included."""
        return tuple(measure for measure in self.stages if measure.stage in DAY)

    def p99(self, stage: Stage) -> float | None:
        """The 99th percentile of the latency during a stage, in milliseconds; None without requests."""
        measure = self.stage(stage)
        return measure.traffic.p99 if measure is not None and measure.traffic is not None else None

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
        """Each once, with the first stage that found it, by their weight."""
        found: dict[Finding, Stage] = {}
        for measure in self.stages:
            for finding in measure.findings:
                found.setdefault(finding, measure.stage)
        if self.failed_stage is not None:
            for finding in self.findings:
                found.setdefault(finding, self.failed_stage)
        return tuple(
            (stage, finding) for finding, stage in sorted(found.items(), key=lambda one: one[0].weight)
        )
