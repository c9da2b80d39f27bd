"""Backup: an encrypted, checksummed dump, listed back before anything is changed; restored and uploaded on request."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption import settings
from alphapulse_encryption.defs.assets.groups import PREPARE, TARGET_POOL
from alphapulse_encryption.defs.resources import environment
from alphapulse_encryption.defs.resources.effects import REPORT
from alphapulse_encryption.defs.resources.reporting import MetadataEntry, actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.gates import offsite
from alphapulse_encryption.migration.gates.backup import take_backup

# What a command prints of the metadata.
_TOLD = (
    *("file", "bytes", "sha256", "entries_listed", "tables_restored_and_equal", "rows_restored_and_equal"),
    *("uploaded_to", "seconds"),
)


class BackupConfig(dg.Config):
    """What is done beyond the backup itself."""

    restore_drill: bool = Field(
        default=False,
        description="Restore it into a scratch database, and compare every table with the original as it was at the "
        "moment of the dump. Takes as much room as the database, for as long as the drill lasts.",
    )


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
        "`pg_restore --list`; with `restore_drill`, restored into a scratch database and compared. Uploaded to S3 "
        "where `ALPHAPULSE_BACKUP_S3_BUCKET` is set. The drop insists on a recent one.",
    )
    def asset(
        context: dg.AssetExecutionContext, config: BackupConfig, target: TargetResource
    ) -> dg.MaterializeResult:  # type: ignore[type-arg]
        with safely():
            bucket = environment.backup_bucket()
            # What an upload needs is known before a long dump.
            client = offsite.open_client() if bucket is not None else None
            result = take_backup(
                target.by(actor(context)),
                target.catalogue.tables,
                directory=settings.backup_directory(),
                bin_dirs=environment.client_programs(),
                recipients=settings.Backups().recipients,
                drill_server=environment.restore_drill_server() if config.restore_drill else None,
            )
            backup, drill = result.backup, result.drill
            metadata: dict[str, MetadataEntry] = {
                "file": backup.location,
                "bytes": backup.bytes,
                "sha256": backup.sha256,
                "recipients": list(result.recipients),
                "entries_listed": result.listed_entries,
                "seconds": round(result.seconds, 3),
                "dump_seconds": round(result.dump_seconds, 3),
                "read_back_seconds": round(result.read_back_seconds, 3),
            }
            if drill is not None:
                metadata |= {
                    "tables_restored_and_equal": drill.tables,
                    "rows_restored_and_equal": drill.rows,
                    "drill_seconds": round(drill.seconds, 3),
                }
            if bucket is not None:
                upload = offsite.upload_backup(target.database, backup, bucket, actor(context), client=client)
                metadata |= {
                    "uploaded_to": upload.location,
                    "upload_encryption": upload.encryption,
                    "upload_seconds": round(upload.seconds, 3),
                }
            told = [f"  {name.replace('_', ' ')}: {metadata[name]}" for name in _TOLD if name in metadata]
            file = dg.MetadataValue.path(backup.location)
            return dg.MaterializeResult(metadata={**metadata, "file": file, REPORT: told})

    return asset
