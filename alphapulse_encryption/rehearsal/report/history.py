"""The history of rehearsals, kept by Dagster itself: a materialization of an asset that nobody can materialize.

Its numbers are plotted there; the whole of what was measured is in its metadata as JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import dagster as dg
from pydantic import ValidationError

from alphapulse_encryption.defs.resources.reporting import MetadataEntry
from alphapulse_encryption.rehearsal.measures import Rehearsal, StageMeasure
from alphapulse_encryption.rehearsal.report import wording
from alphapulse_encryption.rehearsal.report.plots import OBSERVED
from alphapulse_encryption.rehearsal.report.report import Found, render
from alphapulse_encryption.rehearsal.report.verdict import Level

ASSET_KEY = dg.AssetKey("staging_rehearsal")
# More are not compared.
REMEMBERED = 50
_MEASURES = "measurements"

Record = dict[str, str | int | float | bool | None]


def build_asset() -> dg.AssetSpec:
    return dg.AssetSpec(
        key=ASSET_KEY,
        group_name="rehearsal",
        description="**Test in staging.** Every rehearsal of the migration on a clone of the staging database, with "
        "what it measured. Reported by the job `staging_rehearsal`, which its schedule starts; it cannot be "
        "materialized from here, and says nothing of the target database.",
    )


def keep(
    context: dg.OpExecutionContext, rehearsal: Rehearsal, past: Sequence[Rehearsal], page: Path | None
) -> None:
    context.log_event(
        dg.AssetMaterialization(
            asset_key=ASSET_KEY,
            description=rehearsal.failure or None,
            metadata={
                "seconds": (rehearsal.ended - rehearsal.started).total_seconds(),
                **metadata(rehearsal, past, page),
                _MEASURES: dg.MetadataValue.json(rehearsal.model_dump(mode="json")),
            },
        )
    )


def read(instance: dg.DagsterInstance, limit: int = REMEMBERED) -> tuple[Rehearsal, ...]:
    """The latest rehearsals, the oldest of them first; those of another version's form are left out."""
    found = []
    for record in instance.fetch_materializations(ASSET_KEY, limit=limit).records:
        materialization = record.asset_materialization
        kept = materialization.metadata.get(_MEASURES) if materialization is not None else None
        if isinstance(kept, dg.JsonMetadataValue):
            with suppress(ValidationError):
                found.append(Rehearsal.model_validate(kept.data))
    return tuple(reversed(found))


def metadata(
    rehearsal: Rehearsal, history: Sequence[Rehearsal], path: Path | None = None
) -> dict[str, MetadataEntry]:
    """What Dagster shows of a rehearsal: verdict, figures that it plots over time, and tables."""
    found = Found.of(rehearsal, history)
    shown: dict[str, MetadataEntry] = {"verdict": dg.MetadataValue.md(render("verdict.md", found=found))}
    if path is not None:
        shown["report"] = dg.MetadataValue.path(str(path))
    shown |= {
        name: round(figure, 3) if isinstance(figure, float) else figure
        for name, figure in _figures(found).items()
        if figure is not None and abs(figure) < 2**63
    }
    tables: dict[str, list[Record]] = {
        "stages": [_record(measure) for measure in rehearsal.stages],
        "findings": [
            {"weight": one.level, "subject": one.subject, "finding": one.what, "advice": one.advice}
            for _, one in rehearsal.all_findings
        ],
        "predicted": [
            {
                "stage": str(one.stage),
                "likely": wording.duration(one.seconds.likely),
                "range": wording.span_of_time(one.seconds),
                "holds_locks": "yes" if one.locked else "no",
            }
            for one in found.prediction.stages
        ],
    }
    for name, records in tables.items():
        if records:
            shown[name] = dg.MetadataValue.table([dg.TableRecord(record) for record in records])
    return shown


def _figures(found: Found) -> dict[str, float | int | None]:
    rehearsal, seconds = found.rehearsal, found.prediction.seconds
    traffic = [measure.traffic.overall for measure in rehearsal.stages if measure.traffic is not None]
    figures: dict[str, float | int | None] = {
        "ready": int(found.verdict.level is not Level.NOT_READY),
        "blockers": len(found.verdict.blockers),
        "warnings": len(found.verdict.warnings),
        "findings": sum(finding.level != "note" for _, finding in rehearsal.all_findings),
        "rows": rehearsal.before.rows,
        "growth": rehearsal.growth,
        "wal_bytes": sum(measure.wal for measure in rehearsal.stages),
        "p99_times_baseline": rehearsal.p99_ratio,
        "requests": sum(one.requests for one in traffic),
        "failed_requests": sum(one.errors for one in traffic),
        "wrong_answers": sum(one.wrong_answers for one in traffic),
        "prediction_error": found.accuracy.trials[-1].error if found.accuracy.trials else None,
    }
    if found.prediction.stages:
        figures |= {
            "predicted_seconds": seconds.likely,
            "predicted_seconds_low": seconds.low,
            "predicted_seconds_high": seconds.high,
            "predicted_locked_seconds": found.prediction.locked.likely,
        }
    figures |= {f"seconds_{measure.stage}": measure.seconds for measure in rehearsal.stages}
    return figures | {f"p99_ms_{stage}": rehearsal.p99(stage) for stage in OBSERVED}


def _record(measure: StageMeasure) -> Record:
    traffic = measure.traffic.overall if measure.traffic is not None else None
    return {
        "stage": str(measure.stage),
        "seconds": round(measure.seconds, 3),
        "rows": str(measure.rows),
        "wal": wording.size(measure.wal),
        "p50_ms": wording.milliseconds(traffic.p50 if traffic else None),
        "p99_ms": wording.milliseconds(traffic.p99 if traffic else None),
        "requests": str(traffic.requests if traffic else 0),
        "failed": str(traffic.errors if traffic else 0),
    }
