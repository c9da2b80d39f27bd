"""Step 3, ``--migrate-data``: encrypt what is pending, per table and batch range."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import MIGRATE, TARGET_POOL
from alphapulse_encryption.defs.resources.border import MetadataEntry, counted, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges, parts_by_table
from alphapulse_encryption.defs.resources.pools import in_table_pools
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import PaceConfig, figures, work_through
from alphapulse_encryption.migration.rows.backfill import RangeResult, backfill_range

NAME = "encrypted_data"


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``encrypted_data``, per table and batch range."""

    @dg.asset(
        name=NAME,
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
    def asset(context: dg.AssetExecutionContext, config: PaceConfig, target: TargetResource) -> None:
        parts = parts_by_table(context.partition_keys)
        with safely(), in_table_pools(context, [part.table for part in parts]):
            work_through(
                context,
                config,
                target,
                NAME,
                parts,
                backfill_range,
                lambda part, result: materialized(context, part.partition, _metadata(result)),
            )

    return asset


def _metadata(result: RangeResult) -> dict[str, MetadataEntry]:
    return {
        "outcome": f"{counted(result.rows, 'row')} encrypted" if result.changed else "nothing to do",
        "rows_encrypted": result.rows,
        **figures(result),
    }
