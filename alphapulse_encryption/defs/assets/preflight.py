"""Pre-migration checklist: what would block the migration or surprise during it."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import PREPARE, TARGET_POOL
from alphapulse_encryption.defs.resources.effects import REPORT
from alphapulse_encryption.defs.resources.environment import client_programs, data_path
from alphapulse_encryption.defs.resources.reporting import as_table, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.gates.preflight import readable_size


def build() -> dg.AssetsDefinition:
    """The asset ``preflight``."""

    @dg.asset(
        name="preflight",
        group_name=PREPARE,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Pre-migration checklist.** Reads only. Checks the key (and that it is the one this database "
        "was begun with), every catalogued table, column and primary key, privileges, what depends on the plaintext "
        "columns, row-level security, logging of values, backup, disk and duration. Fails if anything would block "
        "the migration; what would only surprise is listed.",
    )
    def asset(context: dg.AssetExecutionContext, target: TargetResource) -> dg.MaterializeResult:  # type: ignore[type-arg]
        with safely():
            catalogue = target.catalogue
            report = preflight.check(
                *(target.database, catalogue.tables, target.key_ring),
                envelope=catalogue.format,
                source=catalogue.source,
                bin_dirs=client_programs(),
                data_path=data_path(),
            )
            for finding in report.findings:
                context.log.info(str(finding))
            preflight.refuse_blockers(report)
            told = (*report.warnings, *report.passed)
            return dg.MaterializeResult(
                metadata={
                    REPORT: report.lines,
                    "findings": as_table(
                        {"level": f.level, "finding": f.message, "subject": f.subject} for f in told
                    ),
                    "warnings": len(report.warnings),
                    "dagster/row_count": report.rows,
                    "size_now": readable_size(report.current_bytes),
                    "growth_estimated": readable_size(report.growth_bytes),
                    "disk_free": "not visible from here"
                    if report.free_bytes is None
                    else readable_size(report.free_bytes),
                    "seconds_estimated": round(report.estimated_seconds, 1),
                    "seconds": round(report.seconds, 3),
                }
            )

    return asset
