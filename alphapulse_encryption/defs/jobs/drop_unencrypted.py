"""Step 8, ``--drop-unencrypted --confirm``: the plaintext columns go, if somebody approved exactly this."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.assets import plaintext_dropped
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    EXAMPLE,
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    what_to_type,
)
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.environment import uses_sample
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.steps.drop import drop_plaintext


class DropConfig(TablesConfig):
    """Which tables, and who drops their plaintext."""

    operator: str = Field(
        default="",
        description="Your name, for the audit log. Where the two-person rule holds, which it does outside the sample, "
        "it cannot be the name of who approved.",
    )


@dg.op(
    name="drop",
    pool=TARGET_POOL,
    description="Drop the plaintext columns of the named tables, each with its own approval.",
)
def drop_unencrypted(context: dg.OpExecutionContext, config: DropConfig, target: TargetResource) -> None:
    """Drop table by table; the first refusal ends it, with the tables before it done."""
    with safely():
        catalogue = target.catalogue
        changed: list[str] = []
        for table in named_tables(catalogue, config.tables):
            result = drop_plaintext(
                target.by(actor(context)),
                table,
                operator=config.operator,
                default_rule="off" if uses_sample() else "names",
            )
            changed += [table.key] if result.changed else []
            if result.approval is None:
                outcome = "an interrupted drop was finished" if result.changed else "was dropped already"
                context.log.info(f"{table.key}: {outcome}")
                continue
            context.log.info(
                f"{table.key}: dropped {', '.join(result.columns)}; rows changed since the verification, which were "
                f"verified before: {result.changed_rows}"
            )
            context.log_event(
                dg.AssetMaterialization(
                    asset_key=plaintext_dropped.ASSET_KEY,
                    partition=table.key,
                    metadata={
                        "columns_dropped": list(result.columns),
                        "approved_by": result.approval.approver,
                        "dropped_by": config.operator or "not said",
                        "changed_rows_verified": result.changed_rows,
                        "seconds": round(result.seconds, 3),
                    },
                )
            )
        context.add_output_metadata({TABLES_CHANGED: changed})


def build() -> dg.JobDefinition:
    """The job ``drop_unencrypted``."""
    return dg.GraphDefinition(name="drop_unencrypted", node_defs=[drop_unencrypted]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {"drop": {"config": {"tables": [], "operator": ""}}}},
        executor_def=dg.in_process_executor,
        description="**Step 8.** Drops the plaintext columns of the named tables. Needs an approval of each, given "
        "with `approve_drop`, unused, unexpired, and for exactly what is there now; by another person, where the "
        "two-person rule holds. `restore_plaintext` undoes it."
        + what_to_type("drop", {**EXAMPLE, "operator": "Grace Example"}),
    )
