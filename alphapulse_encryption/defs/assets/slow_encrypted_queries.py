"""Step 7, monitoring, ``--slow-queries``: what the application's statements on encrypted tables cost."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.assets.groups import MONITOR, TARGET_POOL
from alphapulse_encryption.defs.resources.reporting import MetadataEntry, as_table, safely
from alphapulse_encryption.defs.resources.schedules import cron
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.insight import slow_queries

NAME = "slow_encrypted_queries"
JOB = "look_for_slow_queries"

_SNAPSHOT = "counted_so_far"
# How many statements are remembered for the next comparison: those that take longest altogether.
_REMEMBERED = 500


class SlowQueriesConfig(dg.Config):
    """What is called slow."""

    slow_ms: float = Field(
        default=100.0,
        gt=0,
        description="A statement whose mean time is at least this, in milliseconds, is slow.",
    )
    limit: int = Field(
        default=slow_queries.DEFAULT_LIMIT,
        ge=1,
        le=200,
        description="How many statements the table shows, slowest first.",
    )


def build() -> dg.AssetsDefinition:
    """The asset ``slow_encrypted_queries``."""

    @dg.asset(
        name=NAME,
        deps=["compatibility_views"],
        group_name=MONITOR,
        kinds={"postgres"},
        pool=TARGET_POOL,
        output_required=False,
        description="**Step 7, monitoring.** What the application's statements on the catalogue's tables cost, from "
        "`pg_stat_statements`: a table, slowest first, with hints, and numbers that are plotted over the runs. A "
        "statement that takes longer since the last run than before it is named. Reads only; texts are kept without "
        "any constant. Materialize it whenever you like, or start its schedule. Left out of a run that has others, "
        "with a warning, where the database has no such extension.",
    )
    def asset(
        context: dg.AssetExecutionContext, config: SlowQueriesConfig, target: TargetResource
    ) -> Iterator[dg.MaterializeResult]:  # type: ignore[type-arg]
        with safely():
            tables = target.catalogue.tables
            try:
                found = slow_queries.slow_queries(target.database, tables)
            except slow_queries.NotCounted as missing:
                if len(context.job_def.nodes) == 1:
                    raise
                # The others were asked for, too: they are not to end as a failed run for want of a help with tuning.
                context.log.warning(f"Left out. {missing}")
                return
            worse = slow_queries.worse_than(found, _last_snapshot(context))
            for warning in (*map(str, worse), *found.remarks):
                context.log.warning(warning)
            slow = [query for query in found.queries if query.mean_ms >= config.slow_ms]
            shown = [*found.queries[: config.limit], *found.own[: config.limit]]
            counted = sorted(slow_queries.snapshot(found).items(), key=lambda item: -item[1][1])
            remembered = {query: [calls, total] for query, (calls, total) in counted[:_REMEMBERED]}
            listed = "\n".join(f"- {change}" for change in worse)
            metadata: dict[str, MetadataEntry] = {
                "slow_queries": len(slow),
                "queries": len(found.queries),
                "worst_mean_ms": round(found.worst_mean_ms, 3),
                **{f"total_ms_{t.key}": round(found.total_ms(t.key), 3) for t in tables},
                "worse_than_last_time": dg.MetadataValue.md(listed or "none"),
                "statements": as_table([_record(query) for query in shown] or [_NOTHING]),
                "counted_since": "not known" if found.since is None else f"{found.since:%Y-%m-%d %H:%M} UTC",
                "remarks": list(found.remarks),
                _SNAPSHOT: dg.MetadataValue.json(remembered),
            }
            yield dg.MaterializeResult(metadata=metadata)

    return asset


_NOTHING = {"of": "", "statement": "no statement on an encrypted table was counted"}


def _record(query: slow_queries.SlowQuery) -> dict[str, object]:
    return {
        "of": "this tool" if query.own else "application",
        "mean_ms": round(query.mean_ms, 3),
        "calls": query.calls,
        "total_ms": round(query.total_ms, 3),
        "max_ms": round(query.max_ms, 3),
        "rows": query.rows,
        "tables": ", ".join(query.tables),
        "hints": "; ".join(query.hints),
        "statement": query.shown,
        "roles": ", ".join(query.roles),
        "query_id": query.query_id,
    }


def _last_snapshot(context: dg.AssetExecutionContext) -> slow_queries.Snapshot:
    """What the last run has counted; a materialization of another version of this may have no such thing."""
    event = context.instance.get_latest_materialization_event(context.asset_key)
    materialization = None if event is None else event.asset_materialization
    value: Any = None if materialization is None else materialization.metadata.get(_SNAPSHOT)
    kept = value.value if isinstance(value, dg.JsonMetadataValue) else {}
    if not isinstance(kept, Mapping):
        return {}
    return {str(query): (int(calls), float(total)) for query, (calls, total) in kept.items()}


def build_schedule() -> dg.ScheduleDefinition:
    """The schedule ``slow_queries``, stopped until somebody starts it."""
    return dg.ScheduleDefinition(
        name="slow_queries",
        job_name=JOB,
        cron_schedule=cron("slow_queries"),
        description="Looks for slow statements on encrypted tables (ALPHAPULSE_SLOW_QUERIES_SCHEDULE says when), and "
        "so plots what they cost. Reads only.",
    )
