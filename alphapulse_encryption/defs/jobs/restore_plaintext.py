"""Rollback after the drop: the plaintext columns rebuilt from the ciphertext."""

from collections.abc import Callable

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.assets import plaintext_dropped
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    EXAMPLE,
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    what_to_type,
)
from alphapulse_encryption.defs.resources.border import actor, counted, safely
from alphapulse_encryption.defs.resources.partitions import range_name
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.rows.fill import FillProgress
from alphapulse_encryption.migration.steps.restore import restore_plaintext as restore


class RestoreConfig(TablesConfig):
    """Which tables, and how far."""

    hold: bool = Field(
        default=False,
        description="Stop before the plaintext becomes right, so that every instance of the application can be "
        "brought to the phase dual; run again without it to end the restore.",
    )


@dg.op(
    name="restore", pool=TARGET_POOL, description="Rebuild the dropped plaintext columns of the named tables."
)
def restore_plaintext(context: dg.OpExecutionContext, config: RestoreConfig, target: TargetResource) -> None:
    """Restore table by table."""
    with safely():
        changed: list[str] = []
        for table in named_tables(target.catalogue, config.tables):
            result = restore(
                target.by(actor(context)),
                table,
                hold=config.hold,
                on_progress=_log_by_range(context),
            )
            if result.changed:
                changed.append(table.key)
                done = "held before the plaintext is right" if result.held else "the plaintext is right"
                context.log.info(
                    f"{table.key}: restored {', '.join(result.columns)}, {result.rows} rows; {done}"
                )
                context.log_event(
                    dg.AssetObservation(
                        asset_key=plaintext_dropped.ASSET_KEY,
                        partition=table.key,
                        description="The plaintext is back: restored from the ciphertext.",
                        metadata={"columns_restored": list(result.columns), "rows": result.rows},
                    )
                )
            else:
                context.log.info(f"{table.key}: nothing was dropped, nothing to restore")
        context.add_output_metadata({TABLES_CHANGED: changed})


def _log_by_range(context: dg.OpExecutionContext) -> Callable[[FillProgress], None]:
    """A line at the first batch of each batch range: the run's page shows how far it is."""
    begun: set[tuple[str, int | None]] = set()

    def log(progress: FillProgress) -> None:
        if (progress.table, progress.batch_range) in begun:
            return
        begun.add((progress.table, progress.batch_range))
        where = (
            "the rest" if progress.batch_range is None else f"batch range {range_name(progress.batch_range)}"
        )
        context.log.info(
            f"{progress.table}: filling {where}; {counted(progress.rows, 'row')} in {progress.seconds:.1f} s so far"
        )

    return log


def build() -> dg.JobDefinition:
    """The job ``restore_plaintext``."""
    return dg.GraphDefinition(name="restore_plaintext", node_defs=[restore_plaintext]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {"restore": {"config": {"tables": [], "hold": False}}}},
        executor_def=dg.in_process_executor,
        description="**Rollback after the drop.** Decrypts the ciphertext into new plaintext columns, with the types, "
        "defaults, constraints, indexes and privileges that the drop saved. Online; can be stopped and run again. Then "
        "every value is verified. Where instances write ciphertext alone, run it with `hold` first, and without it "
        "when all are in the phase dual: at its end ciphertext alone is refused."
        + what_to_type("restore", EXAMPLE),
    )
