"""The assets with one partition for each batch range that the row engine writes: the backfill and the rotation."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import MIGRATE, TARGET_POOL, UPKEEP
from alphapulse_encryption.defs.resources.effects import NOTHING
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges, parts_by_table
from alphapulse_encryption.defs.resources.pools import in_table_pools
from alphapulse_encryption.defs.resources.reporting import MetadataEntry, counted, materialized, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import PaceConfig, Work, work_through
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import RangeResult
from alphapulse_encryption.migration.rows.rotate import rotate_range

ENCRYPTED, ROTATED = "encrypted_data", "rotated_data"
# How many rows were done is counted under this name; what was done to them, in words.
_DONE = {ENCRYPTED: ("rows_encrypted", "encrypted"), ROTATED: ("rows_rotated", "encrypted again")}


def _asset(
    name: str, partitions: Partitions, work: Work, *, after: str, group: str, description: str
) -> dg.AssetsDefinition:
    @dg.asset(
        name=name,
        deps=[over_ranges(after)],
        partitions_def=partitions.by_table_and_range,
        backfill_policy=partitions.one_run_per_table,
        group_name=group,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description=description,
    )
    def asset(context: dg.AssetExecutionContext, config: PaceConfig, target: TargetResource) -> None:
        parts = parts_by_table(context.partition_keys)
        with safely(), in_table_pools(context, [part.table for part in parts]):
            work_through(
                context,
                config,
                target,
                name,
                parts,
                work,
                lambda part, result: materialized(context, part.partition, describe(name, result)),
            )

    return asset


def describe(asset: str, result: RangeResult) -> dict[str, MetadataEntry]:
    """The metadata of a range's partition."""
    count, done = _DONE[asset]
    return {
        "outcome": f"{counted(result.rows, 'row')} {done}" if result.changed else NOTHING,
        count: result.rows,
        "values": result.values,
        "batches": result.batches,
        "changed_meanwhile": result.changed_meanwhile,
        "left_pending": len(result.left),
        "resumed": result.resumed,
        "seconds": round(result.seconds, 3),
        "seconds_held_back": round(result.seconds_held_back, 3),
        "seconds_rested": round(result.seconds_rested, 3),
        "rows_per_second": round(result.rows / result.seconds) if result.seconds else 0,
        # Of the 2^32 that each may.
        "values_encrypted_by_key": {
            f"{usage.context}, version {usage.key_version}": usage.messages for usage in result.key_usage
        },
    }


def build(partitions: Partitions) -> list[dg.AssetsDefinition]:
    """The assets ``encrypted_data`` and ``rotated_data``."""
    return [
        _asset(
            ENCRYPTED,
            partitions,
            backfill_range,
            after="encrypted_columns",
            group=MIGRATE,
            description="**Step 3.** Encrypts what is pending in a batch range (`03` is the fourth slice of a table by "
            "its primary key), in short transactions, while the application goes on. Can be stopped and run again at "
            "any time: it goes on where it was, and rows that became pending again are found. A range with nothing "
            "pending changes nothing.",
        ),
        _asset(
            ROTATED,
            partitions,
            rotate_range,
            after="verified_table",
            group=UPKEEP,
            description="**Key rotation, a part of it.** Encrypts again what is of another key version than the "
            "current one in a batch range, search tokens included, in short transactions, while the application goes "
            "on. The job `rotate_keys` does it for all; here single partitions can be run again. Begins no rotation. A "
            "range in which everything is current changes nothing.",
        ),
    ]
