"""What a person or the command line launches, such as switch, approval and drop; not how it is done."""

import dagster as dg

from alphapulse_encryption import guide
from alphapulse_encryption.defs.assets import slow_encrypted_queries
from alphapulse_encryption.defs.dagster_private import UnresolvedAssetJobDefinition
from alphapulse_encryption.defs.jobs import (
    approve_drop,
    erase_dropped,
    rotate_keys,
    settings,
    tables,
    validation,
)


def build_jobs() -> list[dg.JobDefinition | UnresolvedAssetJobDefinition]:
    """All jobs."""
    return [
        *(
            _asset_job(stage.job, stage.works, f"{step.help[0].upper()}{step.help[1:]} ({step.flag}).")
            for step in guide.STEPS
            for stage in step.stages
            if stage.is_asset
        ),
        *validation.build(),
        *approve_drop.build(),
        *tables.build(),
        erase_dropped.build(),
        settings.build(),
        rotate_keys.build(),
        _asset_job(
            slow_encrypted_queries.JOB,
            slow_encrypted_queries.NAME,
            "Step 7, monitoring: what the application's statements on encrypted tables cost.",
        ),
    ]


def _asset_job(name: str, asset: str, description: str) -> UnresolvedAssetJobDefinition:
    """What a flag launches for all of an asset's partitions, and what a schedule would."""
    selection = dg.AssetSelection.assets(asset)
    return dg.define_asset_job(name, selection, description=description, executor_def=dg.in_process_executor)
