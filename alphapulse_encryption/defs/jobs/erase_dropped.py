"""After step 8, ``--erase-dropped``: rewrite a table whose plaintext was dropped, in a maintenance window."""

from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.jobs.single_op import op_job
from alphapulse_encryption.defs.resources.effects import REPORT, TABLES_CHANGED, On
from alphapulse_encryption.defs.resources.reporting import as_table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.steps import erase
from alphapulse_encryption.migration.steps.erase import ErasureResult


class ErasureConfig(dg.Config):
    """Which table, said twice."""

    table: str = Field(description="The table whose plaintext was dropped.", examples=["users"])
    confirmation: str = Field(
        description="The table's name, typed once more: nobody reads or writes it while it is being rewritten.",
        examples=[""],
    )


def _erase(on: On[ErasureConfig]) -> dict[str, Any]:
    table = on.catalogue.table(on.config.table)
    result = erase.erase_dropped(on.target, table, confirmation=on.config.confirmation)
    lines = report_lines(result)
    for line in lines:
        on.log(line)
    if result.remaining:
        raise RefusedError(
            f"The table {result.table} was rewritten, and values that were dropped remain:\n"
            + "\n".join(lines)
        )
    places = [
        {
            "place": place.name,
            "finding": place.finding,
            "known_values": place.values,
            "before": "" if place.before is None else str(place.before),
            "bytes_read": place.bytes,
            "remark": place.remark,
        }
        for place in result.places
    ]
    return {
        TABLES_CHANGED: [result.table],
        REPORT: [f"✓ Erased what was dropped: {lines[0]}", *(f"  {line}" for line in lines[1:])],
        "places": as_table(places),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "locked_seconds": round(result.locked_seconds, 3),
        "seconds": round(result.seconds, 3),
    }


def report_lines(result: ErasureResult) -> list[str]:
    """The result in words, without any value."""
    lines = [
        f"{result.table} rewritten in {result.locked_seconds:.1f} s: "
        f"{result.bytes_before:,} bytes before, {result.bytes_after:,} after"
    ]
    if result.statistics_left:
        lines.append(f"the planner's statistics were left: {result.statistics_left}")
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
    return op_job(
        "erase",
        ErasureConfig,
        _erase,
        "**After step 8, in a maintenance window.** A drop erases nothing: this rewrites the table (`VACUUM FULL`) and "
        "the planner's statistics, then looks for known values in the data files and reports where they remain. Nobody "
        "reads or writes the table while it is being rewritten, and a second copy of it needs room on the disk. "
        "`restore_plaintext` works afterwards as before. The `confirmation` is the name of the table once more.",
    )
