"""The stages of the guide as assets, with their partitions and metadata; not how a stage does its work."""

import dagster as dg

from alphapulse_encryption.defs.assets import (
    backup,
    by_range,
    by_table,
    plaintext_dropped,
    preflight,
    slow_encrypted_queries,
    verified_data,
    verified_table,
)
from alphapulse_encryption.defs.resources.partitions import Partitions


def build_assets(partitions: Partitions) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """All assets, in the guide's order."""
    return [
        preflight.build(),
        backup.build(),
        by_table.encrypted_columns(partitions),
        by_range.encrypted_data(partitions),
        by_table.search_indexes(partitions),
        verified_data.build(partitions),
        verified_table.build(partitions),
        by_table.compatibility_views(partitions),
        slow_encrypted_queries.build(),
        plaintext_dropped.build(partitions),
        by_range.rotated_data(partitions),
    ]
