"""After step 8, ``--erase-dropped``: rewrite a table whose plaintext was dropped, in a maintenance window."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import NEVER_AGAIN, TABLES_CHANGED, what_to_type
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.steps.erase import ErasureResult
from alphapulse_encryption.migration.steps.erase import erase_dropped as erase

# In the metadata of the op's output: what to print.
REPORT = "report"


class ErasureConfig(dg.Config):
    """Which table, said twice."""

    table: str = Field(description="The table whose plaintext was dropped.")
    confirmation: str = Field(
        description="The table's name, typed once more: nobody reads or writes it while it is being rewritten."
    )


@dg.op(
    name="erase", pool=TARGET_POOL, description="Rewrite the table and the planner's statistics, then look."
)
def erase_dropped(context: dg.OpExecutionContext, config: ErasureConfig, target: TargetResource) -> None:
    """Erase what was dropped from one table, and report what remains where."""
    with safely():
        table = target.catalogue.table(config.table)
        result = erase(
            target.by(actor(context)),
            table,
            confirmation=config.confirmation,
        )
        report = report_lines(result)
        for line in report:
            context.log.info(line)
        if result.remaining:
            raise RefusedError(
                f"The table {result.table} was rewritten, and values that were dropped remain:\n"
                + "\n".join(report)
            )
        context.add_output_metadata(
            {
                TABLES_CHANGED: [result.table],
                REPORT: report,
                "places": dg.MetadataValue.table(
                    [
                        dg.TableRecord(
                            {
                                "place": place.name,
                                "finding": place.finding,
                                "known_values": place.values,
                                "before": "" if place.before is None else str(place.before),
                                "bytes_read": place.bytes,
                                "remark": place.remark,
                            }
                        )
                        for place in result.places
                    ]
                ),
                "bytes_before": result.bytes_before,
                "bytes_after": result.bytes_after,
                "locked_seconds": round(result.locked_seconds, 3),
                "seconds": round(result.seconds, 3),
            }
        )


def report_lines(result: ErasureResult) -> list[str]:
    """The result in words, without any value."""
    lines = [
        f"{result.table} rewritten in {result.locked_seconds:.1f} s: "
        f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after"
    ]
    if not result.statistics_rewritten:
        lines.append(
            "the planner's statistics could not be rewritten: let a superuser or the database's owner do it"
        )
    if not result.checkpointed:
        lines.append(
            "no checkpoint was allowed: the server may hold in memory what its files do not show yet"
        )
    lines.append(f"looked for {result.values} known values:")
    for place in result.places:
        found = f"{place.finding} ({place.values} of them)" if place.finding == "found" else place.finding
        before = f", before: {place.before}" if place.before is not None else ""
        remark = f" ({place.remark})" if place.remark else ""
        lines.append(f"  {place.name}: {found}{before}{remark}")
    if result.unsearchable:
        lines.append(
            f"no value of {', '.join(result.unsearchable)} could be looked for: of their types, or too short, they "
            "cannot be told from chance"
        )
    lines.append("values compressed in TOAST or in the write-ahead log cannot be found by such a look")
    return lines


def build() -> dg.JobDefinition:
    """The job ``erase_dropped``."""
    return dg.GraphDefinition(name="erase_dropped", node_defs=[erase_dropped]).to_job(
        tags=NEVER_AGAIN,
        # Shown in the launchpad, to be filled in.
        config={"ops": {"erase": {"config": {"table": "", "confirmation": ""}}}},
        executor_def=dg.in_process_executor,
        description="**After step 8, in a maintenance window.** A drop erases nothing: this rewrites the table "
        "(`VACUUM FULL`) and the planner's statistics, then looks for known values in the data files and reports "
        "where they remain. Nobody reads or writes the table while it is being rewritten, and a second copy of it "
        "needs room on the disk. `restore_plaintext` works afterwards as before."
        + what_to_type("erase", {"table": "users", "confirmation": ""})
        + "\n\nand as `confirmation` the name of the table once more.",
    )
