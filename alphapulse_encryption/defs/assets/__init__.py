"""The stages of the guide as assets, with their partitions and metadata; not how a stage does its work."""

import dagster as dg

from alphapulse_encryption.defs.assets import (
    backup,
    compatibility_views,
    encrypted_columns,
    encrypted_data,
    plaintext_dropped,
    preflight,
    rotated_data,
    search_indexes,
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
        encrypted_columns.build(partitions),
        encrypted_data.build(partitions),
        search_indexes.build(partitions),
        verified_data.build(partitions),
        verified_table.build(partitions),
        compatibility_views.build(partitions),
        slow_encrypted_queries.build(),
        plaintext_dropped.build(partitions),
        rotated_data.build(partitions),
    ]
