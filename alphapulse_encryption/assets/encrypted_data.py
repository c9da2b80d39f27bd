"""Step 3, ``--migrate-data``: encrypt what is pending, per table and batch range."""

import time
from collections.abc import Callable

import dagster as dg
from pydantic import Field

from alphapulse_encryption.assets.groups import MIGRATE, TARGET_POOL
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.backfill import LARGEST_BATCH, Pace, Progress, backfill_range
from alphapulse_encryption.resources.border import actor, counted, materialized, safely
from alphapulse_encryption.resources.partitions import Partitions, TablePart, over_ranges, parts_by_table
from alphapulse_encryption.resources.target import Target

# Each observation is a row in Dagster's storage; more often than this nobody looks.
SECONDS_BETWEEN_OBSERVATIONS = 5.0


class BackfillConfig(dg.Config):
    """Pace of a backfill."""

    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST_BATCH * 10,
        description="Rows per batch. Unset: adapted to the duration below.",
    )
    target_seconds: float = Field(
        default=0.25, gt=0, le=60, description="How long one batch's transaction is to take, in seconds."
    )


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``encrypted_data``, per table and batch range."""

    @dg.asset(
        name="encrypted_data",
        deps=[over_ranges("encrypted_columns")],
        partitions_def=partitions.by_table_and_range,
        backfill_policy=partitions.one_run_per_table,
        group_name=MIGRATE,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 3.** Encrypts what is pending in a batch range (`03` is the fourth slice of a table by "
        "its primary key), in short transactions, while the application goes on. Can be stopped and run again at any "
        "time: it goes on where it was, and rows that became pending again are found. A range with nothing pending "
        "changes nothing.",
    )
    def asset(context: dg.AssetExecutionContext, config: BackfillConfig, target: Target) -> None:
        with safely():
            failed: list[str] = []
            for part in parts_by_table(context.partition_keys):
                try:
                    _backfill(context, config, target, part)
                except MigrationError as error:
                    # The other ranges do not depend on this one.
                    context.log.error(f"{part.partition}: {error.args[0]}")
                    failed.append(f"{part.partition}: {error.args[0]}")
            if failed:
                raise MigrationError(
                    f"{len(failed)} of {len(context.partition_keys)} batch ranges failed:\n"
                    + "\n".join(f"- {line}" for line in failed)
                )

    return asset


def _backfill(
    context: dg.AssetExecutionContext, config: BackfillConfig, target: Target, part: TablePart
) -> None:
    result = backfill_range(
        target.database,
        target.catalogue.table(part.table),
        part.batch_range,
        target.cipher,
        target.key_ring,
        actor(context),
        pace=Pace(config.batch_size, config.target_seconds),
        on_progress=_observer(context, part),
    )
    materialized(
        context,
        part.partition,
        {
            "outcome": f"{counted(result.rows, 'row')} encrypted" if result.changed else "nothing to do",
            "rows_encrypted": result.rows,
            "values": result.values,
            "batches": result.batches,
            "changed_meanwhile": result.changed_meanwhile,
            "left_pending": result.left_pending,
            "resumed": result.resumed,
            "seconds": round(result.seconds, 3),
            "rows_per_second": round(result.rows / result.seconds) if result.seconds else 0,
        },
    )


def _observer(context: dg.AssetExecutionContext, part: TablePart) -> Callable[[Progress], None]:
    last = time.monotonic()

    def observe(progress: Progress) -> None:
        nonlocal last
        if time.monotonic() - last < SECONDS_BETWEEN_OBSERVATIONS:
            return
        last = time.monotonic()
        context.log_event(
            dg.AssetObservation(
                asset_key=context.asset_key,
                partition=part.partition,
                metadata={
                    "rows": progress.rows,
                    "values": progress.values,
                    "rows_per_second": round(progress.rows / progress.seconds) if progress.seconds else 0,
                    "batch_size": progress.batch_size,
                },
            )
        )

    return observe
