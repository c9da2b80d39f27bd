"""Step 7: which side is right. ``switch_to_ciphertext`` and, back again, ``revert_to_plaintext``."""

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import (
    EXAMPLE,
    NEVER_AGAIN,
    TABLES_CHANGED,
    TablesConfig,
    named_tables,
    no_tables,
    what_to_type,
)
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext


@dg.op(pool=TARGET_POOL, description="Make the encrypted columns of the named tables the right side.")
def switch(context: dg.OpExecutionContext, config: TablesConfig, target: TargetResource) -> None:
    """Switch the tables one by one."""
    with safely():
        changed: list[str] = []
        for table in named_tables(target.catalogue, config.tables):
            result = switch_to_ciphertext(target.by(actor(context)), table)
            outcome = "switched to ciphertext" if result.changed else "was switched already"
            context.log.info(f"{table.key}: {outcome}")
            changed += [table.key] if result.changed else []
        context.add_output_metadata({TABLES_CHANGED: changed})


@dg.op(pool=TARGET_POOL, description="Make the plaintext columns of the named tables the right side again.")
def revert(context: dg.OpExecutionContext, config: TablesConfig, target: TargetResource) -> None:
    """Revert the tables one by one."""
    with safely():
        changed: list[str] = []
        for table in named_tables(target.catalogue, config.tables):
            result = revert_to_plaintext(target.by(actor(context)), table)
            outcome = "reverted to plaintext" if result.changed else "was on plaintext already"
            context.log.info(f"{table.key}: {outcome}")
            changed += [table.key] if result.changed else []
        context.add_output_metadata({TABLES_CHANGED: changed})


def build() -> list[dg.JobDefinition]:
    """The two jobs."""
    return [
        dg.GraphDefinition(name="switch_to_ciphertext", node_defs=[switch]).to_job(
            tags=NEVER_AGAIN,
            config=no_tables("switch"),
            executor_def=dg.in_process_executor,
            description="**Step 7.** Needs verified tables. From then on the encrypted columns are right, and the "
            "application may write them alone. Reversible until the drop, with `revert_to_plaintext`."
            + what_to_type("switch", EXAMPLE),
        ),
        dg.GraphDefinition(name="revert_to_plaintext", node_defs=[revert]).to_job(
            tags=NEVER_AGAIN,
            config=no_tables("revert"),
            executor_def=dg.in_process_executor,
            description="**Rollback before the drop.** Brings the plaintext columns up to date where the application "
            "wrote ciphertext alone, makes them the right side again, and removes guard triggers and views. The "
            "encrypted columns stay for a retry, which begins with `encrypted_columns`."
            + what_to_type("revert", EXAMPLE),
        ),
    ]
