"""The table of contents: what Dagster loads, nothing else."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import dagster as dg
from dagster.components.core.component_tree import ComponentTreeException

from alphapulse_encryption import defs as ours
from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.defs.alerts import sensors as alerts
from alphapulse_encryption.defs.assets import build_assets, slow_encrypted_queries
from alphapulse_encryption.defs.jobs import build_jobs, catch_up, rotate_keys
from alphapulse_encryption.defs.resources.outputs import json_outputs
from alphapulse_encryption.defs.resources.partitions import Partitions
from alphapulse_encryption.defs.resources.reporting import loading
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.rehearsal import job as rehearsal
from alphapulse_encryption.rehearsal.report import history


def build_defs(*, resource_overrides: Mapping[str, object] | None = None) -> dg.Definitions:
    """Assemble everything, with these resources, by name, in place of ours.

    Raises:
        ConfigurationError: the catalogue, ``ALPHAPULSE_BATCH_RANGES`` or the variable of a schedule is not valid.
    """
    partitions = Partitions(
        load_catalogue(settings.TargetVariables().catalogue_path), settings.TargetVariables().batch_ranges
    )
    with warnings.catch_warnings():
        # Backfill policies and mappings between partitions are still marked as beta.
        warnings.simplefilter("ignore", dg.BetaWarning)
        return dg.Definitions(
            assets=[*build_assets(partitions), history.build_asset()],
            jobs=[*build_jobs(), rehearsal.build_job()],
            sensors=[catch_up.build(), rehearsal.build_sensor(), *alerts.build_sensors()],
            schedules=[
                rotate_keys.build_schedule(),
                slow_encrypted_queries.build_schedule(),
                rehearsal.build_schedule(),
            ],
            resources={
                "target": TargetResource(),
                "io_manager": json_outputs,
                **(resource_overrides or {}),
            },
            executor=dg.in_process_executor,
        )


@dg.definitions
def defs() -> dg.Definitions:
    """What the code location holds."""
    # Whatever loads it holds keys from then on.
    secrecy.leave_no_core()
    with loading():
        return dg.Definitions.merge(build_defs(), _scaffolded())


def _scaffolded() -> dg.Definitions:
    """What ``dg scaffold defs`` has put into `defs`. Our own modules there define nothing before they are asked to."""
    project = Path(ours.__path__[0]).parents[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        try:
            return dg.ComponentTree.from_module(defs_module=ours, project_root=project).build_defs()
        except ComponentTreeException as error:
            # What is wrong, and where, its cause says.
            raise error.__cause__ or error from None
