"""After the migration, ``--rotate-keys``: encrypt again what is of an older key version, per table and batch range."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL, UPKEEP
from alphapulse_encryption.defs.resources.border import MetadataEntry, counted, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges, parts_by_table
from alphapulse_encryption.defs.resources.pools import in_table_pools
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import PaceConfig, figures, work_through
from alphapulse_encryption.migration.rows.engine import RangeResult
from alphapulse_encryption.migration.rows.rotate import rotate_range

NAME = "rotated_data"


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``rotated_data``, per table and batch range."""

    @dg.asset(
        name=NAME,
        deps=[over_ranges("verified_table")],
        partitions_def=partitions.by_table_and_range,
        backfill_policy=partitions.one_run_per_table,
        group_name=UPKEEP,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Key rotation, a part of it.** Encrypts again what is of another key version than the current "
        "one in a batch range, search tokens included, in short transactions, while the application goes on. The job "
        "`rotate_keys` does it for all; here single partitions can be run again. Begins no rotation. A range in which "
        "everything is current changes nothing.",
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
                rotate_range,
                lambda part, result: materialized(context, part.partition, describe(result)),
            )

    return asset


def describe(result: RangeResult) -> dict[str, MetadataEntry]:
    """The metadata of a range's partition."""
    return {
        "outcome": f"{counted(result.rows, 'row')} encrypted again" if result.changed else "nothing to do",
        "rows_rotated": result.rows,
        **figures(result),
    }
