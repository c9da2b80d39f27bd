"""When schedules run, as environment variables ask for it."""

import dagster as dg

from alphapulse_encryption.errors import ConfigurationError


def valid_cron(variable: str, cron: str, *, example: str) -> str:
    """A cron schedule that Dagster takes.

    Raises:
        ConfigurationError: Dagster would not take it.
    """
    try:
        dg.ScheduleDefinition(name="asked_for", job_name="any", cron_schedule=cron)
    except dg.DagsterInvalidDefinitionError:
        raise ConfigurationError(
            f"{variable} is not a cron schedule: five fields, for example {example}."
        ) from None
    return cron
