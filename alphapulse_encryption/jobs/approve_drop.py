"""The approval of a drop: a person says, on purpose, that the plaintext of a table may go."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.assets.groups import TARGET_POOL
from alphapulse_encryption.jobs.once import NEVER_AGAIN, what_to_type
from alphapulse_encryption.migration.approvals import approve_drop as approve
from alphapulse_encryption.migration.approvals import describe
from alphapulse_encryption.migration.definition import read_table
from alphapulse_encryption.resources.border import actor, safely
from alphapulse_encryption.resources.target import Target


class ApprovalConfig(dg.Config):
    """Who approves what, and why."""

    table: str = Field(description="The table whose plaintext columns may be dropped.")
    approver: str = Field(description="Your name, for the audit log.")
    reason: str = Field(description="Why now, for the audit log.")
    confirmation: str = Field(description="The table's name, typed once more.")


@dg.op(name="approve", pool=TARGET_POOL, description="Record an approval for exactly what is there now.")
def approve_drop(context: dg.OpExecutionContext, config: ApprovalConfig, target: Target) -> None:
    """Approve the drop of one table's plaintext."""
    with safely():
        catalogue = target.catalogue
        table = catalogue.table(config.table)
        approval = approve(
            target.database,
            catalogue,
            table,
            target.key_ring,
            actor(context),
            approver=config.approver,
            reason=config.reason,
            confirmation=config.confirmation,
        )
        with target.database.session(f"describe the drop of {table.key}") as connection:
            context.log.info(describe(connection, read_table(connection, table)))
        context.log.info(
            f"Approval {approval.id} by {approval.approver} holds until {approval.expires_at:%F %R} UTC"
        )


def build() -> dg.JobDefinition:
    """The job ``approve_drop``."""
    return dg.GraphDefinition(name="approve_drop", node_defs=[approve_drop]).to_job(
        tags=NEVER_AGAIN,
        # Shown in the launchpad, to be filled in.
        config={
            "ops": {"approve": {"config": {"table": "", "approver": "", "reason": "", "confirmation": ""}}}
        },
        executor_def=dg.in_process_executor,
        description="**Step 8, first half: a person, on purpose.** Refuses unless the table is switched to ciphertext, "
        "verified since, and backed up. The approval holds for exactly what is there now, expires, and is used once."
        + what_to_type(
            "approve",
            {
                "table": "users",
                "approver": "Ada Example",
                "reason": "it has served for a month",
                "confirmation": "",
            },
        )
        + "\n\nand as `confirmation` the name of the table once more.",
    )
