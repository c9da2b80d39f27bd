"""The stages of the guide as assets, with their partitions and metadata; not how a stage does its work."""

import dagster as dg

from alphapulse_encryption.defs.assets import (
    backup,
    by_range,
    by_table,
    preflight,
    slow_encrypted_queries,
    verified_data,
    verified_table,
)
from alphapulse_encryption.defs.resources.partitions import Partitions


def build_assets(partitions: Partitions) -> list[dg.AssetsDefinition | dg.AssetSpec]:
    """All assets."""
    return [
        preflight.build(),
        backup.build(),
        *by_table.build(partitions),
        *by_range.build(partitions),
        verified_data.build(partitions),
        verified_table.build(partitions),
        slow_encrypted_queries.build(),
    ]
