"""Programs of the package in processes of their own that need not load its modules.

Loading Dagster, SQLAlchemy and the package takes three seconds of a process that does its work in one. Here one process
loads them, once per test session, does nothing else, and each program is a fork of it: with the environment, the
arguments, the exit status and the output that it would have, and as easily killed. Its own module is loaded anew; the
others do not look at the environment when they are loaded (`test_imports`).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

LOADED_ONCE = [
    "alembic.context",
    "argon2",
    "bech32",
    "cryptography.hazmat.primitives.ciphers.aead",
    "cryptography.hazmat.primitives.kdf.hkdf",
    "dagster",
    "dagster._core.definitions.external_asset",
    "dagster._core.execution.api",
    "dagster._core.execution.plan.active",
    "dagster._core.instance.runs.run_domain",
    "dagster._core.secrets.env_file",
    "dagster._core.storage.event_log",
    "dagster._core.storage.noop_compute_log_manager",
    "dagster._core.storage.root",
    "dagster._core.system_config.composite_descent",
    "dagster._core.workspace.load",
    "dagster._utils.test.definitions",
    "dagster_postgres",
    "fastapi",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "platformdirs",
    "psutil",
    "psycopg",
    "psycopg2.extras",
    "pydantic",
    "pyrage",
    "requests",
    "rich.progress",
    "sqlalchemy.dialects.postgresql.psycopg",
    "sqlalchemy.dialects.postgresql.psycopg2",
    "sqlalchemy.orm",
    "tenacity",
    "upath.implementations.local",
    "uvicorn",
    # What the commands are made of.
    "alphapulse_encryption.cli.commands.at_once",
    "alphapulse_encryption.definitions",
    "alphapulse_encryption.cli.progress",
    "alphapulse_encryption.cli.reports.plan",
    "alphapulse_encryption.cli.reports.status",
    "alphapulse_encryption.cli.steps",
]
# Seconds. No program of a test takes that long; less than a test may take, so that it is known which one hangs.
PATIENCE = 600.0
_forkserver = multiprocessing.get_context("forkserver")
_forkserver.set_forkserver_preload(LOADED_ONCE)


class Program:
    """``python -m MODULE ARGUMENTS``, from its start to its end.

    Args:
        module: its name.
        arguments: of the program.
        environment: all of it.
    """

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._output = tempfile.TemporaryDirectory(prefix="alphapulse-output-")
        self._paths = Path(self._output.name, "out"), Path(self._output.name, "err")
        self._process = _forkserver.Process(
            target=_run,
            args=(module, list(arguments), dict(environment), *map(str, self._paths)),
            daemon=True,
        )
        self._process.start()

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._said(0)

    @property
    def errors(self) -> str:
        """What it has printed to stderr so far."""
        return self._said(1)

    def _said(self, which: int) -> str:
        path = self._paths[which]
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        """Ask it to end (SIGTERM)."""
        self._process.terminate()

    def interrupt(self) -> None:
        """What Ctrl-C sends."""
        if self._process.pid is not None:
            os.kill(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """kill -9."""
        self._process.kill()

    def ended(self, timeout: float = PATIENCE) -> subprocess.CompletedProcess[str]:
        """Wait for its end: status, output and errors, as `subprocess.run` has them.

        Raises:
            TimeoutExpired: it still runs after so many seconds; with what it has printed.
        """
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self._command, timeout, self.output, self.errors)
        with self._output:
            output, errors = self.output, self.errors
        return subprocess.CompletedProcess(self._command, status, output, errors)


def run(
    module: str, arguments: Sequence[str], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    return Program(module, arguments, environment).ended()


def _run(module: str, arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    # What was loaded before is never garbage here: looking at it would copy all of it into this process.
    gc.freeze()
    for descriptor, path in enumerate((os.devnull, output, errors)):
        opened = os.open(path, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    # Another module may have loaded it. Of a package, what is run is a module in it, which nobody loads.
    if not hasattr(sys.modules.get(module), "__path__"):
        sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        # As the interpreter does; a message instead of a number goes to stderr.
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
            sys.exit(1)
        raise
    finally:
        # Processes of multiprocessing leave these out.
        atexit._run_exitfuncs()
