"""One job per stage of the guide: what its flags launch, and what a schedule would."""

from __future__ import annotations

from dataclasses import dataclass

import dagster as dg

from alphapulse_encryption.defs.dagster_private import UnresolvedAssetJobDefinition


@dataclass(frozen=True)
class Stage:
    """A job over one asset, all of whose partitions can be run.

    Args:
        job: name of the job.
        asset: name of the asset, and of its op.
        description: for the UI.
    """

    job: str
    asset: str
    description: str


PREFLIGHT = Stage("run_preflight", "preflight", "Pre-migration checklist; reads only (--preflight).")
BACKUP = Stage("take_backup", "backup", "An encrypted backup, read back (--backup).")
ADD_COLUMNS = Stage(
    "add_columns",
    "encrypted_columns",
    "Step 2: encrypted columns beside the plaintext ones, and guards (--add-columns).",
)
MIGRATE_DATA = Stage("migrate_data", "encrypted_data", "Step 3: encrypt what is pending (--migrate-data).")
BUILD_INDEXES = Stage(
    "build_indexes",
    "search_indexes",
    "Step 3, after the data: search indexes and statistics (--migrate-data).",
)
VERIFY_DATA = Stage("verify_data", "verified_data", "Step 4: decrypt and compare every value (--verify).")
VERIFY_TABLES = Stage("verify_tables", "verified_table", "Step 4: the verdict per table (--verify).")
CREATE_VIEWS = Stage("create_views", "compatibility_views", "Step 6: compatibility views (--create-views).")

STAGES = (
    PREFLIGHT,
    BACKUP,
    ADD_COLUMNS,
    MIGRATE_DATA,
    BUILD_INDEXES,
    VERIFY_DATA,
    VERIFY_TABLES,
    CREATE_VIEWS,
)
PER_RANGE = (MIGRATE_DATA, VERIFY_DATA)
WHOLE_DATABASE = (PREFLIGHT, BACKUP)


def build() -> list[UnresolvedAssetJobDefinition]:
    """The stages' jobs, in the guide's order."""
    return [
        dg.define_asset_job(
            stage.job,
            selection=dg.AssetSelection.assets(stage.asset),
            description=stage.description,
            executor_def=dg.in_process_executor,
        )
        for stage in STAGES
    ]
