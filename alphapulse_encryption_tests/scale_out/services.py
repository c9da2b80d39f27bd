"""A daemon and workers in processes of their own, which can be killed with everything they have started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from alphapulse_encryption.defs.resources.instance import packaged_file
from alphapulse_encryption_tests.place import Place

# The daemon looks often, so that the test need not wait; what it looks for is as shipped.
_QUICK = {"run_monitoring": {"poll_interval_seconds": 2, "free_slots_after_run_end_seconds": 1}}


@dataclass
class Service:
    """A process that leads a session of its own.

    Args:
        process: it.
        log: where its output goes.
    """

    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """kill -9 of its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def pids(self) -> set[int]:
        """Its processes, itself included."""
        found = psutil.Process(self.process.pid)
        return {self.process.pid, *(child.pid for child in found.children(recursive=True))}

    @property
    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text() if self.log.exists() else ""


def configure(found: Place) -> None:
    """Have the place's instance send runs to workers."""
    home = found.state / "dagster_home"
    home.mkdir(exist_ok=True)
    configuration = yaml.safe_load(packaged_file("dagster-celery.yaml").read_text())
    for section, changes in _QUICK.items():
        configuration[section].update(changes)
    (home / "dagster.yaml").write_text(yaml.safe_dump(configuration))
    found.extra |= {"ALPHAPULSE_RUN_LAUNCHER": "celery", "DAGSTER_HOME": str(home)}


@contextlib.contextmanager
def started(found: Place, name: str, arguments: Sequence[str]) -> Iterator[Service]:
    """``python -m ARGUMENTS``, killed at the end."""
    log = found.state / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=found.environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    service = Service(process, log)
    try:
        yield service
    finally:
        service.kill()


def worker(found: Place, name: str) -> contextlib.AbstractContextManager[Service]:
    """A worker."""
    return started(found, name, ["alphapulse_encryption.scale_out.worker", "--name", name])


def daemon(found: Place) -> contextlib.AbstractContextManager[Service]:
    """Dagster's daemon."""
    return started(
        found,
        "daemon",
        [
            "dagster._daemon",
            "run",
            "--log-level",
            "info",
            "--workspace",
            str(packaged_file("workspace.yaml")),
        ],
    )
