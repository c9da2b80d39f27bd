"""One job per stage of the guide that is an asset: what its flags launch, and what a schedule would."""

from __future__ import annotations

import dagster as dg

from alphapulse_encryption import guide
from alphapulse_encryption.defs.dagster_private import UnresolvedAssetJobDefinition
from alphapulse_encryption.guide import Stage

__all__ = ["MIGRATE_DATA", "PER_RANGE", "STAGES", "WHOLE_DATABASE", "Stage", "build"]

PER_RANGE: tuple[Stage, ...] = tuple(stage for stage in guide.stages() if stage.over == "range")
WHOLE_DATABASE: tuple[Stage, ...] = tuple(
    stage for stage in guide.stages() if stage.asset and stage.over == "database"
)
STAGES: tuple[Stage, ...] = tuple(stage for stage in guide.stages() if stage.asset)
MIGRATE_DATA = guide.stage("encrypted_data")


def build() -> list[UnresolvedAssetJobDefinition]:
    """The stages' jobs, in the guide's order."""
    return [
        dg.define_asset_job(
            stage.job,
            selection=dg.AssetSelection.assets(stage.asset),
            description=stage.description,
            executor_def=dg.in_process_executor,
        )
        for stage in guide.stages()
        if stage.asset
    ]
