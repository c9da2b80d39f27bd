"""Rehearsals that nobody held, with known truth."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from alphapulse_encryption.rehearsal.measures import (
    Circumstances,
    Fault,
    Finding,
    Latency,
    Moment,
    Rehearsal,
    Sizes,
    Stage,
    StageMeasure,
    TableSize,
    TableWork,
    Traffic,
)

BEGAN = datetime(2026, 3, 1, 2, 0, tzinfo=UTC)
RANGES = 16
TABLES: Mapping[str, tuple[float, int]] = {
    # Share of the rows, and columns to encrypt.
    "trading_accounts": (0.1, 4),
    "positions": (0.2, 6),
    "trades": (0.55, 5),
    "users": (0.1, 6),
    "api_keys": (0.05, 2),
}

# The truth: seconds to begin a table, of each range, of each row and of each value.
BEGIN, PER_RANGE, PER_ROW, PER_VALUE = 0.12, 0.015, 12e-6, 3e-6


def circumstances(**changes: Any) -> Circumstances:
    told: dict[str, Any] = {
        "source": "alphapulse_staging",
        "cloned_by": "template",
        "server_version": "18.1",
        "cores": 2,
        "workers": 1,
        "batch_ranges": RANGES,
        "rate": 50.0,
        "version": "0.1.0",
    }
    return Circumstances(**(told | changes))


def sizes(rows: int, times: float = 1.0) -> Sizes:
    tables = {}
    for key, (share, _) in TABLES.items():
        count = round(rows * share)
        tables[key] = TableSize(
            rows=count, heap=round(count * 260 * times), indexes=round(count * 100 * times)
        )
    return Sizes(
        database=8_000_000 + sum(table.heap + table.indexes for table in tables.values()), tables=tables
    )


def true_seconds(stage: Stage, key: str, rows: int, growth: float = 0.0) -> float:
    """What a stage takes for a table, in truth, by one worker."""
    columns = TABLES[key][1]
    if stage in (Stage.BACKFILL, Stage.VERIFY, Stage.VERIFY_AGAIN):
        per_row = (PER_ROW + columns * PER_VALUE) * (1 + growth * math.log(max(rows, 1) / 1000))
        return BEGIN + RANGES * PER_RANGE + rows * per_row
    if stage is Stage.INDEXES:
        return 0.05 + 0.4e-6 * rows * math.log(max(rows, 2))
    if stage in (Stage.DROP, Stage.SWITCH, Stage.ERASURE, Stage.RESTORE):
        return (
            0.05 + {Stage.DROP: 1, Stage.SWITCH: 1, Stage.ERASURE: 6, Stage.RESTORE: 25}[stage] * 1e-6 * rows
        )
    return 0.04


def rehearsal(
    rows: int = 50_000,
    *,
    run_id: str = "3f1a5a52-0000-4000-8000-000000000001",
    day: int = 0,
    noise: float = 0.0,
    slower: float = 1.0,
    growth: float = 0.0,
    seed: int = 1,
    p99: float = 21.0,
    **changes: Any,
) -> Rehearsal:
    """A whole rehearsal; ``noise`` is the standard deviation of what a range takes, relative."""
    chance = random.Random(seed)
    before, at = sizes(rows), BEGAN + timedelta(days=day)
    started, stages = at, []
    for number, stage in enumerate(Stage):
        tables = {}
        if stage not in (
            Stage.CLONE,
            Stage.BASELINE,
            Stage.PREFLIGHT,
            Stage.BACKUP,
            Stage.AFTERWARDS,
            Stage.REMOVAL,
        ):
            tables = {
                key: _work(stage, key, size.rows, chance, noise, slower, growth)
                for key, size in before.tables.items()
            }
        seconds = sum(work.seconds for work in tables.values()) or 1.5
        ended = at + timedelta(seconds=seconds)
        grown = 1.0 if number < list(Stage).index(Stage.BACKFILL) else 2.6
        stages.append(
            StageMeasure(
                stage=stage,
                started=at,
                ended=ended,
                seconds=seconds,
                tables=tables,
                wal=rows * 900 if stage in (Stage.BACKFILL, Stage.RESTORE) else 100_000,
                sizes=sizes(rows, grown),
                traffic=traffic(at, seconds, p99 * (2.2 if stage is Stage.BACKFILL else 1), stage),
            )
        )
        at = ended
    told: dict[str, Any] = {
        "run_id": run_id,
        "started": started,
        "ended": at,
        "circumstances": circumstances(),
        "before": before,
        "stages": tuple(stages),
        "source_unchanged": True,
        "production": sizes(20_000_000),
    }
    return Rehearsal(**(told | changes))


def with_stage(whole: Rehearsal, stage: Stage, **changes: Any) -> Rehearsal:
    """The same with something else in one stage."""
    stages = tuple(
        measure.model_copy(update=changes) if measure.stage is stage else measure for measure in whole.stages
    )
    return whole.model_copy(update={"stages": stages})


def failed(stage: Stage = Stage.BACKFILL, **changes: Any) -> Rehearsal:
    """One that ended in a stage."""
    whole = rehearsal(**changes)
    stages = tuple(itertools.takewhile(lambda measure: measure.stage is not stage, whole.stages))
    return whole.model_copy(
        update={
            "stages": stages,
            "failed_stage": stage,
            "failure": "The disk is full.",
            "source_unchanged": None,
        }
    )


def surprising() -> Rehearsal:
    """One with something of everything."""
    whole = rehearsal(noise=0.2)
    backfill = whole.stage(Stage.BACKFILL)
    assert backfill is not None
    assert backfill.traffic is not None
    fault = Fault(
        kind="server restarted",
        at=backfill.started,
        seconds_away=2.5,
        seconds_lost=4.0,
        survived=True,
        what="The server was restarted; the backfill went on by itself.",
    )
    findings = (
        Finding(level="note", subject="trades", what="about 27,500 rows, 5 columns to encrypt"),
        Finding(
            level="warning",
            subject="users.email",
            what="the view active_users depends on it",
            advice="Point it at v_users before the drop.",
        ),
    )
    traffic_ = backfill.traffic.model_copy(
        update={
            "overall": backfill.traffic.overall.model_copy(update={"errors": 3}),
            "error_kinds": {"OperationalError 57P01": 3},
            "lock_waits": {"transactionid": 2},
            "longest_lock_wait": 0.08,
        }
    )
    whole = with_stage(whole, Stage.PREFLIGHT, findings=findings)
    return with_stage(whole, Stage.BACKFILL, faults=(fault,), traffic=traffic_, attempts=2)


def traffic(at: datetime, seconds: float, p99: float, stage: Stage) -> Traffic:
    requests = max(1, round(seconds * 50))
    kinds = tuple(
        Latency(
            kind=kind,
            way=way,
            requests=requests // 4,
            errors=0,
            wrong_answers=0,
            p50=p99 / 6,
            p95=p99 / 2,
            p99=p99,
            longest=p99 * 1.5,
        )
        for kind, way in itertools.product(("read by key", "update"), ("library, dual", "plain SQL"))
    )
    moments = tuple(
        Moment(
            at=at + timedelta(seconds=second),
            seconds=1,
            requests=50,
            errors=0,
            p50=p99 / 6,
            p99=p99 * (1 + 0.3 * math.sin(second)),
            longest=p99 * 2,
        )
        for second in range(max(1, round(seconds)))
    )
    return Traffic(
        phases=("off",) if stage is Stage.BASELINE else ("dual", "encrypted"),
        overall=kinds[0].model_copy(update={"kind": "all", "way": "all", "requests": requests}),
        by_kind=kinds,
        moments=moments,
        lock_waits={},
        longest_lock_wait=0.0,
        error_kinds={},
    )


def _work(
    stage: Stage, key: str, rows: int, chance: random.Random, noise: float, slower: float, growth: float
) -> TableWork:
    seconds = true_seconds(stage, key, rows, growth) * slower
    columns = TABLES[key][1]
    if stage not in (Stage.BACKFILL, Stage.VERIFY, Stage.VERIFY_AGAIN):
        return TableWork(seconds=seconds)
    ranges = [chance.gauss(1, noise) for _ in range(RANGES)]
    each = (seconds - BEGIN * slower) / RANGES
    return TableWork(
        rows=rows,
        values=rows * columns,
        seconds=BEGIN * slower + sum(each * max(0.3, times) for times in ranges),
    )
