"""``--live-check``: the guide's "Verify Encryption Working", on the tables of the catalogue."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import NEVER_AGAIN, AnyTablesConfig, named_tables
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.insight.live_check import ColumnCheck
from alphapulse_encryption.migration.insight.live_check import live_check as check

# In the metadata of the op's output: a line per column.
REPORT = "report"


@dg.op(
    name="check",
    pool=TARGET_POOL,
    description="Write, read and look at the raw column, for every column of the named tables; leave nothing behind.",
)
def live_check(context: dg.OpExecutionContext, config: AnyTablesConfig, target: TargetResource) -> None:
    """Check table by table."""
    with safely():
        checks: list[ColumnCheck] = []
        for table in named_tables(target.catalogue, config.tables or list(target.catalogue.keys)):
            found = check(target.by(actor(context)), table)
            for column in found:
                context.log.info(line(column))
            checks += found
        report = [line(found) for found in checks]
        if any(found.failed for found in checks):
            raise RefusedError("Encryption does not work as it has to:\n" + "\n".join(report))
        context.add_output_metadata(
            {
                REPORT: report,
                "columns": dg.MetadataValue.table(
                    [
                        dg.TableRecord(
                            {
                                "column": f"{found.table}.{found.column}",
                                "what": look.what,
                                "verdict": look.verdict,
                                "remark": look.remark,
                            }
                        )
                        for found in checks
                        for look in found.looks
                    ]
                    or [dg.TableRecord({"column": "", "what": "no row to try", "verdict": "", "remark": ""})]
                ),
            }
        )


def line(found: ColumnCheck) -> str:
    """A column's findings, with a sign before them."""
    sign = "✗" if found.failed else "✓" if found.tried else "-"
    return f"{sign} {found}"


def build() -> dg.JobDefinition:
    """The job ``live_check``."""
    return dg.GraphDefinition(name="live_check", node_defs=[live_check]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {"check": {"config": {"tables": []}}}},
        executor_def=dg.in_process_executor,
        description="**Validation script.** For every column, gives a recent row its own value again under a fresh "
        "envelope, as an application writes it: looks at the raw column, decrypts it, finds it by its search token, "
        "and sees whether the guard acts. Each row is locked for some milliseconds, the transaction is always rolled "
        "back, and nothing remains.",
    )
