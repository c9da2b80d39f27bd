"""Step 8 in the graph: what the drop jobs report. Nobody can materialize it."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import DROP
from alphapulse_encryption.defs.resources.partitions import Partitions

ASSET_KEY = dg.AssetKey("plaintext_dropped")


def build(partitions: Partitions) -> dg.AssetSpec:
    """The external asset ``plaintext_dropped``, per table."""
    return dg.AssetSpec(
        key=ASSET_KEY,
        deps=["verified_table", "compatibility_views"],
        partitions_def=partitions.by_table,
        group_name=DROP,
        description="**Step 8.** The plaintext columns are gone. Reported by the job `drop_unencrypted`, which needs "
        "an approval given by a person with the job `approve_drop`; it cannot be materialized from here, and what the "
        "database's audit log says counts, not the colour. The job `restore_plaintext` undoes it.",
    )
