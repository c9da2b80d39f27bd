"""``--repair-mismatched``: what a verification named as wrong is cleared, so that the backfill encrypts it again."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    no_tables,
)
from alphapulse_encryption.defs.resources.border import actor, counted, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.rows.repair import repair_mismatched as repair


@dg.op(
    name="repair",
    pool=TARGET_POOL,
    description="Clear what the last verification of the named tables found mismatched or undecryptable.",
)
def repair_mismatched(context: dg.OpExecutionContext, config: TablesConfig, target: TargetResource) -> None:
    """Repair table by table."""
    with safely():
        changed: list[str] = []
        for table in named_tables(target.catalogue, config.tables):
            result = repair(target.by(actor(context)), table)
            for column, count in result.values.items():
                context.log.info(f"{table.key}.{column}: {counted(count, 'value')} cleared")
            if result.changed_meanwhile:
                context.log.info(
                    f"{table.key}: {counted(result.changed_meanwhile, 'row')} left alone, just being written"
                )
            if result.changed:
                changed.append(table.key)
            else:
                context.log.info(f"{table.key}: the last verification named nothing to clear")
        context.add_output_metadata({TABLES_CHANGED: changed})


def build() -> dg.JobDefinition:
    """The job ``repair_mismatched``."""
    return dg.GraphDefinition(name="repair_mismatched", node_defs=[repair_mismatched]).to_job(
        tags=NEVER_AGAIN,
        config=no_tables("repair"),
        executor_def=dg.in_process_executor,
        description="**After step 4, where needed.** While plaintext is right: clears the ciphertext and tokens that "
        "the last verification found mismatched or undecryptable, and only those, so that `encrypted_data` encrypts "
        "them again. Their keys are in the audit log. What only the ciphertext held is lost: look at those rows first.",
    )
