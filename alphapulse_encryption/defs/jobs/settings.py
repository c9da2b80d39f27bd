"""What an operator may change while backfills run, from the UI."""

import dagster as dg
from pydantic import Field

from alphapulse_encryption.defs.jobs.single_op import op_job
from alphapulse_encryption.defs.resources.effects import On
from alphapulse_encryption.migration.bookkeeping.limits import Limits, change_limits

_KNOWN = "\n".join(
    f"- `{name}` ({field.default}): {field.description}" for name, field in Limits.model_fields.items()
)


class SettingsConfig(dg.Config):
    """New values by name."""

    settings: dict[str, str] = Field(description="Read at once.", examples=[{"paused": "true"}])


def _change(on: On[SettingsConfig]) -> dict[str, str]:
    for name, value in change_limits(on.database, on.config.settings, on.actor).model_dump().items():
        on.log(f"{name} = {value}")
    return {}


def build() -> dg.JobDefinition:
    """The job ``change_settings``."""
    return op_job(
        "change",
        SettingsConfig,
        _change,
        f"**While backfills run.** Pause them, or change what they hold back for. Settings:\n\n{_KNOWN}",
        job="change_settings",
        pool=None,
    )
