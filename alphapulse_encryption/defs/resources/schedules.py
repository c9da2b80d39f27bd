"""When schedules run, as environment variables ask for it."""

import dagster as dg

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError


def cron(schedule: str) -> str:
    """The cron schedule that a field of :class:`settings.Schedules` is set to.

    Raises:
        ConfigurationError: Dagster would not take it.
    """
    wanted: str = getattr(settings.Schedules(), schedule)
    try:
        dg.ScheduleDefinition(name="asked_for", job_name="any", cron_schedule=wanted)
    except dg.DagsterInvalidDefinitionError:
        about = settings.Schedules.model_fields[schedule]
        raise ConfigurationError(
            f"{about.validation_alias} is not a cron schedule: five fields, for example {about.default}."
        ) from None
    return wanted
