"""Step 2, ``--add-columns``: encrypted columns beside the plaintext ones, and the guard on every write."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import COLUMNS, TARGET_POOL
from alphapulse_encryption.defs.resources.border import actor, counted, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``encrypted_columns``, per table."""

    @dg.asset(
        name="encrypted_columns",
        deps=["preflight", "backup"],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=COLUMNS,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 2.** Adds `<column>_encrypted` and, for searchable columns, `<column>_search`, without "
        "rewriting the table, and the guard triggers that from now on keep every write of the application "
        "consistent. Cuts the table into its batch ranges. Nothing that is there already is changed.",
    )
    def asset(context: dg.AssetExecutionContext, target: TargetResource) -> None:
        with safely():
            for key in context.partition_keys:
                result = add_encrypted_columns(
                    target.by(actor(context)), target.catalogue.table(key), batch_ranges=target.batch_ranges
                )
                for name in result.added:
                    context.log.info(f"Added column {key}.{name}")
                materialized(
                    context,
                    key,
                    {
                        "outcome": f"{counted(len(result.added), 'column')} added"
                        if result.changed
                        else "nothing to do",
                        "columns_added": list(result.added),
                        "columns_found": list(result.existing),
                        **({"rows_cleared_since_revert": result.cleared} if result.cleared else {}),
                        "batch_ranges": result.ranges,
                        "seconds": round(result.seconds, 3),
                    },
                )

    return asset
