"""Everything private of Dagster's that we use, each with the reason why nothing public does: no other module does so.

Belongs here: an import of ``dagster._…``, and what makes one call of several of them. Does not belong here: anything
that ``import dagster`` offers. Dagster may change all of it in any release: a new one is held against this file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

# For runs with an id and a code location of our own (see CodeLocation), as are execute_run, origin and workspace.
from dagster._core.definitions.reconstruct import ReconstructableRepository

# What dagster.define_asset_job returns and dagster.Definitions takes: the type has no public name.
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition
from dagster._core.execution.api import execute_run

# A step's own places in pools, as many as it likes: dagster.op(pool=…) names one, for all steps of an op.
from dagster._core.execution.plan.instance_concurrency_context import InstanceConcurrencyContext

# What a run launcher is given and answers: of launchers, Dagster exports its default one alone.
from dagster._core.launcher import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.remote_origin import RemoteRepositoryOrigin
from dagster._core.workspace.load import location_origins_from_yaml_paths

# What a class that dagster.yaml names is built from: documented, and exported nowhere.
from dagster._serdes import ConfigurableClassData

# Has SIGINT end a step between two of its events: only the entry points of Dagster's own do so by themselves.
from dagster._utils.interrupts import capture_interrupts

if TYPE_CHECKING:
    from starlette.types import ASGIApp

__all__ = [
    "CheckRunHealthResult",
    "CodeLocation",
    "ConfigurableClassData",
    "InstanceConcurrencyContext",
    "LaunchRunContext",
    "UnresolvedAssetJobDefinition",
    "WorkerStatus",
    "capture_interrupts",
    "execute_launched_run",
    "submit",
    "web_server",
]


class CodeLocation:
    """The definitions as the UI's code location has them: runs made here are shown there with their jobs.

    ``dagster.execute_job`` takes neither the id of a run nor a code location. Nobody could hold the run's lease from
    its first moment on, and the UI could neither show the run's job nor run it again. The module's function makes the
    definitions, and the workspace is the ``workspace.yaml`` that the UI loads.
    """

    def __init__(self, module: str, function: str, workspace: Path) -> None:
        location, *_ = location_origins_from_yaml_paths([str(workspace)])
        self._origin = RemoteRepositoryOrigin(location, "__repository__")
        # In a container of Dagster's Helm chart these say how runs that are launched from here get one of their own.
        context = os.environ.get("DAGSTER_CLI_API_GRPC_CONTAINER_CONTEXT") or os.environ.get(
            "DAGSTER_CONTAINER_CONTEXT"
        )
        self._repository = _BuiltOnce.for_module(
            module,
            function,
            container_image=os.environ.get("DAGSTER_CURRENT_IMAGE"),
            container_context=json.loads(context) if context else None,
        )

    def create_run(
        self,
        instance: dg.DagsterInstance,
        job: str,
        run_config: Mapping[str, Any],
        tags: Mapping[str, str],
        run_id: str | None = None,
    ) -> dg.DagsterRun:
        """Make a run, which is neither queued nor begun yet."""
        reconstructable = self._repository.get_reconstructable_job(job)
        definition = reconstructable.get_definition()
        return instance.create_run_for_job(
            job_def=definition,
            run_id=run_id,
            run_config=run_config,
            tags={**definition.run_tags, **tags},
            remote_job_origin=self._origin.get_job_origin(job),
            job_code_origin=reconstructable.get_python_origin(),
            repository_load_data=self._repository.get_definition().repository_load_data,
        )

    def execute(self, instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.JobExecutionResult:
        """Execute a run in this process."""
        return execute_run(self._repository.get_reconstructable_job(run.job_name), run, instance)


class _BuiltOnce(ReconstructableRepository):
    """Dagster would build the definitions for every run of a command once more."""

    _built: dg.RepositoryDefinition

    def get_definition(self) -> dg.RepositoryDefinition:
        if not hasattr(self, "_built"):
            self._built = super().get_definition()
        return self._built


def submit(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """Put a run into the instance's queue: only Dagster's server does so in public, and a command may have none.

    The workspace that Dagster asks for is for launchers which start a run inside a code server. Ours is empty.
    """
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import EmptyWorkspaceTarget

    with WorkspaceProcessContext(instance, EmptyWorkspaceTarget()) as process:
        instance.submit_run(run.run_id, process.create_request_context())


@contextmanager
def web_server(
    instance: dg.DagsterInstance,
    workspaces: Sequence[str],
    prefix: str,
    bounds: tuple[int, int, int],
    *,
    read_only: bool,
) -> Iterator[ASGIApp]:
    """What ``dagster-webserver`` serves: how to make the application is public, what it is made of is not.

    Args:
        workspaces: files that name the code locations.
        prefix: what every path begins with.
        bounds: what pages may ask of the storage: a statement's milliseconds, a session's seconds, more sessions.
    """
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster_webserver import app
    from dagster_webserver.version import __version__

    instance.optimize_for_webserver(*bounds)
    with WorkspaceProcessContext(
        instance,
        WorkspaceFileTarget([*workspaces]),
        version=__version__,
        read_only=read_only,
        code_server_log_level="WARNING",
    ) as process:
        yield app.create_app_from_workspace_process_context(process, prefix, live_data_poll_rate=2_000)


def execute_launched_run(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Execute a run as ``dagster api execute_run`` does, in this process, which has the definitions loaded.

    That command is a process of its own, which first loads everything, and is not public either. Says whether the run
    succeeded.
    """
    from dagster._cli.api import _execute_run_command_body

    return not _execute_run_command_body(run_id, instance, lambda _event: None, True)
