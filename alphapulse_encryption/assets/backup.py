"""Backup: an encrypted, checksummed dump, listed back before anything is changed."""

import dagster as dg

from alphapulse_encryption.assets.groups import PREPARE, TARGET_POOL
from alphapulse_encryption.migration.backup import take_backup
from alphapulse_encryption.resources.border import actor, safely
from alphapulse_encryption.resources.environment import backup_directory, client_programs
from alphapulse_encryption.resources.target import Target


def build() -> dg.AssetsDefinition:
    """The asset ``backup``."""

    @dg.asset(
        name="backup",
        deps=["preflight"],
        group_name=PREPARE,
        kinds={"postgres", "age"},
        pool=TARGET_POOL,
        description="**Backup.** `pg_dump` in custom format, encrypted on its way to the disk with age (the "
        "unencrypted dump never touches it), checksummed, then decrypted again and listed with "
        "`pg_restore --list`. The drop insists on a recent one.",
    )
    def asset(context: dg.AssetExecutionContext, target: Target) -> dg.MaterializeResult:  # type: ignore[type-arg]
        with safely():
            result = take_backup(
                target.database,
                target.catalogue.tables,
                target.key_ring,
                actor(context),
                directory=backup_directory(),
                bin_dir=client_programs(),
            )
            return dg.MaterializeResult(
                metadata={
                    "file": dg.MetadataValue.path(result.backup.location),
                    "bytes": result.backup.bytes,
                    "sha256": result.backup.sha256,
                    "entries_listed": result.listed_entries,
                    "seconds": round(result.seconds, 3),
                }
            )

    return asset
