"""Batch ranges planned anew, where the old ones do not suit any more."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    no_tables,
)
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.rows.plan import replan_ranges as replan


@dg.op(name="replan", pool=TARGET_POOL, description="Cut the named tables anew into batch ranges.")
def replan_ranges(context: dg.OpExecutionContext, config: TablesConfig, target: TargetResource) -> None:
    """Plan table by table."""
    with safely():
        target.refuse_another_key()
        changed: list[str] = []
        for table in named_tables(target.catalogue, config.tables):
            count = replan(target.database, table, actor(context), count=target.batch_ranges)
            context.log.info(f"{table.key}: cut into {count} batch ranges")
            changed.append(table.key)
        context.add_output_metadata({TABLES_CHANGED: changed})


def build() -> dg.JobDefinition:
    """The job ``replan_ranges``."""
    return dg.GraphDefinition(name="replan_ranges", node_defs=[replan_ranges]).to_job(
        tags=NEVER_AGAIN,
        config=no_tables("replan"),
        executor_def=dg.in_process_executor,
        description="**Before step 3, where needed.** Cuts tables anew into `ALPHAPULSE_BATCH_RANGES` batch ranges, "
        "for example after they have grown. What is encrypted stays so; verification results are discarded. Refused "
        "while a range is being worked on.",
    )
