"""Runs of commands that were killed: the next command ends them, and those that live it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest

from alphapulse_encryption.cli import launch
from alphapulse_encryption.defs.resources.processes import PROCESS_TAG, process_name
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place


@pytest.fixture
def here(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        yield found


@pytest.fixture
def command() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


@pytest.mark.parametrize("state", ["alive", "killed", "killed, and its parent has not asked"])
def test_runs_of_killed_commands(here: Place, command: subprocess.Popen[bytes], state: str) -> None:
    tag = {PROCESS_TAG: process_name(psutil.Process(command.pid))}
    with here.instance() as instance:
        run_id = instance.create_run_for_job(
            here.definitions().resolve_job_def("live_check"), status=dg.DagsterRunStatus.STARTED, tags=tag
        ).run_id
    if state != "alive":
        command.kill()
        process = psutil.Process(command.pid)
        support.until(lambda: process.status() == psutil.STATUS_ZOMBIE, "it is dead")
    if state == "killed":
        command.wait()
    with here.in_environment(), launch.launcher(here.ranges) as launcher:
        run = launcher.instance.get_run_by_id(run_id)
    assert run is not None
    assert run.status is (dg.DagsterRunStatus.STARTED if state == "alive" else dg.DagsterRunStatus.FAILURE)
