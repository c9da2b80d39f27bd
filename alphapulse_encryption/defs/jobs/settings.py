"""What an operator may change while backfills run, from the UI."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.jobs.once import NEVER_AGAIN
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.bookkeeping.limits import Limits, change_limits

_KNOWN = "\n".join(
    f"- `{name}` ({field.default}): {field.description}" for name, field in Limits.model_fields.items()
)


class SettingsConfig(dg.Config):
    """New values by name."""

    settings: dict[str, str] = Field(description='For example {"paused": "true"}.')


@dg.op(name="change", description="Change settings that running backfills read at once.")
def change_settings(context: dg.OpExecutionContext, config: SettingsConfig, target: TargetResource) -> None:
    """Change them, and log them as they are then."""
    with safely():
        limits = change_limits(target.database, config.settings, actor(context))
        for name, value in limits.model_dump().items():
            context.log.info(f"{name} = {value}")


def build() -> dg.JobDefinition:
    """The job ``change_settings``."""
    return dg.GraphDefinition(name="change_settings", node_defs=[change_settings]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {"change": {"config": {"settings": {"paused": "false"}}}}},
        executor_def=dg.in_process_executor,
        description=f"**While backfills run.** Pause them, or change what they hold back for. Settings:\n\n{_KNOWN}",
    )
