"""The approval of a drop: a person says, on purpose, that the plaintext of a table may go; and takes it back."""

from datetime import timedelta
from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption import settings
from alphapulse_encryption.defs.jobs.single_op import op_job
from alphapulse_encryption.defs.resources.effects import REPORT, NoConfig, On
from alphapulse_encryption.defs.resources.environment import backup_bucket
from alphapulse_encryption.defs.resources.processes import OWN_RUNS
from alphapulse_encryption.defs.resources.reporting import as_table
from alphapulse_encryption.defs.resources.target import default_rule
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.gates import approvals
from alphapulse_encryption.migration.gates.approvals import LONGEST_VALID_FOR, VALID_FOR
from alphapulse_encryption.migration.schema.definition import read_table

_HOUR = timedelta(hours=1)


class ApprovalConfig(dg.Config):
    """Who approves what, and why."""

    table: str = Field(description="The table whose plaintext columns may be dropped.", examples=["users"])
    approver: str = Field(description="Your name, for the audit log.", examples=["Ada Example"])
    reason: str = Field(description="Why now, for the audit log.", examples=["it has served for a month"])
    confirmation: str = Field(
        description="The table's name, typed once more. Without it nothing is approved, and the run's log says what "
        "would be dropped.",
        examples=[""],
    )
    valid_hours: float = Field(
        default=VALID_FOR / _HOUR,
        gt=0,
        le=LONGEST_VALID_FOR / _HOUR,
        description="How long the approval may be used, in hours.",
    )


class RevocationConfig(dg.Config):
    """Which approval is taken back, by whom, and why."""

    approval: int = Field(description="Its number, as the job `list_approvals` and `--approvals` show it.")
    operator: str = Field(default="", description="Your name, for the audit log.")
    reason: str = Field(default="", description="Why, for the audit log.")


def _approve(on: On[ApprovalConfig]) -> dict[str, Any]:
    config = on.config
    table = on.catalogue.table(config.table)
    with on.database.session(f"describe the drop of {table.key}") as connection:
        on.log(approvals.describe(connection, read_table(connection, table, plaintext=False, look=True)))
    approval = approvals.approve_drop(
        on.target,
        table,
        approver=config.approver,
        reason=config.reason,
        confirmation=config.confirmation,
        backups=settings.backup_directory(),
        bucket=backup_bucket(),
        valid_for=timedelta(hours=config.valid_hours),
        default_rule=default_rule(),
        for_another=on.context.run_id not in OWN_RUNS,
    )
    on.log(str(approval))
    expires_at = approval.expires_at.isoformat()
    return {
        "approval": approval.id,
        "expires_at": expires_at,
        REPORT: [
            f"  Approval {approval.id} holds until {expires_at}; --revoke-approval {approval.id} takes it back.",
            f"✓ Approved by {config.approver}: the plaintext of {table.key} may be dropped, once",
        ],
    }


def _revoke(on: On[RevocationConfig]) -> dict[str, Any]:
    config = on.config
    revoked = approvals.revoke(
        on.database, config.approval, on.actor, operator=config.operator, reason=config.reason
    )
    on.log(str(revoked))
    return {REPORT: [f"✓ Revoked approval {config.approval}"]}


def _list(on: On[NoConfig]) -> dict[str, Any]:
    with on.database.session("list the approvals") as connection:
        found = list_approvals(connection)
    for approval in found:
        on.log(str(approval))
    if not found:
        on.log("There is no approval.")
    records = [
        {
            "approval": approval.id,
            "table": approval.table,
            "state": str(approval).partition(": ")[2].partition(";")[0],
            "approver": approval.approver,
            "database_role": approval.database_role,
            "reason": approval.reason,
            "approved_at": approval.approved_at.isoformat(timespec="seconds"),
        }
        for approval in found
    ]
    return {"approvals": as_table(records) if records else "none"}


def build() -> list[dg.JobDefinition]:
    """The jobs ``approve_drop``, ``revoke_approval`` and ``list_approvals``."""
    return [
        op_job(
            "approve",
            ApprovalConfig,
            _approve,
            "**Step 8, first half: a person, on purpose.** Refuses unless the table is switched to ciphertext, "
            "verified since, and backed up. The approval holds for exactly what is there now, expires, and is used "
            "once; where the two-person rule holds, by somebody else. Where it holds for database roles, which it does "
            "outside the sample, approve at a terminal, over a role of your own. The `confirmation` is the name of the "
            "table once more; without it the job only says what would be dropped.",
        ),
        op_job(
            "revoke",
            RevocationConfig,
            _revoke,
            "**Step 8, undone.** Takes an approval back before it is used.",
        ),
        op_job(
            "list",
            NoConfig,
            _list,
            "**Step 8.** Lists every approval, the newest first: open, used, revoked or expired. Reads only.",
            job="list_approvals",
        ),
    ]
