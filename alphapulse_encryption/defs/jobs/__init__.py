"""What a person or the command line launches, such as switch, approval and drop; not how it is done."""

import dagster as dg

from alphapulse_encryption.defs.assets import slow_encrypted_queries
from alphapulse_encryption.defs.dagster_private import UnresolvedAssetJobDefinition
from alphapulse_encryption.defs.jobs import (
    approve_drop,
    benchmark_queries,
    catch_up,
    drop_unencrypted,
    erase_dropped,
    live_check,
    repair_mismatched,
    replan_ranges,
    restore_plaintext,
    rotate_keys,
    settings,
    stages,
    switch,
    tune_tables,
)


def build_jobs() -> list[dg.JobDefinition | UnresolvedAssetJobDefinition]:
    """All jobs, in the guide's order."""
    return [
        *stages.build(),
        live_check.build(),
        benchmark_queries.build(),
        *switch.build(),
        *approve_drop.build(),
        drop_unencrypted.build(),
        erase_dropped.build(),
        restore_plaintext.build(),
        settings.build(),
        replan_ranges.build(),
        repair_mismatched.build(),
        rotate_keys.build(),
        slow_encrypted_queries.build_job(),
        *tune_tables.build(),
    ]


def build_sensors() -> list[dg.SensorDefinition]:
    """All sensors; each is stopped until somebody starts it."""
    return [catch_up.build()]


def build_schedules() -> list[dg.ScheduleDefinition]:
    """All schedules; each is stopped until somebody starts it."""
    return [rotate_keys.build_schedule(), slow_encrypted_queries.build_schedule()]
