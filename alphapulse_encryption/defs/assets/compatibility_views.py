"""Step 6, ``--create-views``: the original column names over the encrypted columns."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL, VIEWS
from alphapulse_encryption.defs.resources.border import actor, counted, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.schema.views import create_views


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``compatibility_views``, per table."""

    @dg.asset(
        name="compatibility_views",
        deps=["verified_table"],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=VIEWS,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 6.** `v_<table>` has the original column names over the encrypted columns, "
        "`v_<table>_safe` leaves the sensitive ones out. Both go on working after the drop.",
    )
    def asset(context: dg.AssetExecutionContext, target: TargetResource) -> None:
        with safely():
            target.refuse_another_key()
            for key in context.partition_keys:
                result = create_views(target.database, target.catalogue.table(key), actor(context))
                materialized(
                    context,
                    key,
                    {
                        "outcome": f"{counted(len(result.created), 'view')} created"
                        if result.changed
                        else "nothing to do",
                        "views_created": list(result.created),
                        "views_found": list(result.existing),
                        "seconds": round(result.seconds, 3),
                    },
                )

    return asset
