"""Indexes for search, and statistics: built beside the running application, after the backfill."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.assets.groups import MIGRATE, TARGET_POOL
from alphapulse_encryption.defs.resources.border import actor, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.schema.indexes import build_search_indexes, reindex


class IndexConfig(dg.Config):
    """What else to do."""

    reindex: bool = Field(
        default=False,
        description="Also rebuild every index of the table, concurrently (post-migration tuning).",
    )


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``search_indexes``, per table."""

    @dg.asset(
        name="search_indexes",
        deps=[over_ranges("encrypted_data")],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=MIGRATE,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Indexes and statistics.** Builds the indexes on the search columns (unique where the plaintext "
        "column is) and the small one that finds pending rows, `CONCURRENTLY`, then runs `ANALYZE`. An index left "
        "invalid by an interrupted build is built again.",
    )
    def asset(context: dg.AssetExecutionContext, config: IndexConfig, target: TargetResource) -> None:
        with safely():
            target.refuse_another_key()
            for key in context.partition_keys:
                table = target.catalogue.table(key)
                result = build_search_indexes(
                    target.database, table, actor(context), on_wait=context.log.info
                )
                rebuilt = (
                    reindex(target.database, table, actor(context), on_wait=context.log.info)
                    if config.reindex
                    else None
                )
                for name in result.created:
                    context.log.info(f"Created index {name}")
                materialized(
                    context,
                    key,
                    {
                        "outcome": f"indexes built: {len(result.created)}"
                        if result.changed
                        else "nothing to do",
                        "indexes_built": list(result.created),
                        "indexes_found": list(result.existing),
                        "rebuilt_after_interruption": list(result.rebuilt),
                        "reindexed": list(rebuilt.reindexed) if rebuilt is not None else "not asked for",
                        "bytes": result.bytes,
                        "seconds": round(result.seconds, 3),
                    },
                )

    return asset
