"""The sensor that finds rows which became pending again, and has their ranges backfilled."""

import dagster as dg

from alphapulse_encryption import guide
from alphapulse_encryption.defs.resources.partitions import TablePart
from alphapulse_encryption.defs.resources.reporting import safely
from alphapulse_encryption.defs.resources.running import NOT_ENDED
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows.catch_up import pending_ranges
from alphapulse_encryption.migration.rows.tuning import restore_abandoned

_JOB = guide.stage("encrypted_data").job


def build() -> dg.SensorDefinition:
    """The sensor ``pending_rows``, stopped until somebody starts it."""

    @dg.sensor(
        name="pending_rows",
        job_name=_JOB,
        minimum_interval_seconds=60,
        description="Looks for rows that an application wrote in plaintext after their range was done, by the small "
        "index on pending rows, and runs just those partitions of `encrypted_data` again. Does nothing while a "
        "backfill is under way. Also puts back autovacuum where a killed backfill had turned it off.",
    )
    def sensor(
        context: dg.SensorEvaluationContext, target: TargetResource
    ) -> dg.SensorResult | dg.SkipReason:
        with safely():
            restore_abandoned(target.database, Actor("sensor pending_rows"))
            under_way = dg.RunsFilter(job_name=_JOB, statuses=NOT_ENDED)
            if context.instance.get_runs(under_way, limit=1):
                return dg.SkipReason("A backfill is under way.")
            found = pending_ranges(target.database, target.catalogue.tables)
            if not found:
                return dg.SkipReason("Nothing is pending.")
            return dg.SensorResult([dg.RunRequest(partition_key=TablePart(*one).partition) for one in found])

    return sensor
