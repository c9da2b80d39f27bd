"""The demo, walked through, and Dagster's UI on the very instance that it used."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS, place_for_servers

# With this name, what a killed process leaves is removed by the next test session.
_PREFIX = "alphapulse-tests-"
_MASTER_KEY_FILE = "sample_master_key"
_ANNOUNCEMENT = "Dagster's UI is at"
_POLL = 0.1  # seconds
# Seconds. The UI has an orderly end, and takes half a minute at most for it.
_STOP_TIMEOUT = 90
_START_TIMEOUT = 300


@dataclass(frozen=True)
class Demonstration:
    """Where it can be seen.

    Args:
        address: of the UI.
        database_url: of the sample database.
        master_key: of the sample, as the environment variable holds it for the UI.
        pid: of ``make ui``.
    """

    address: str
    database_url: str
    master_key: str
    pid: int


@contextlib.contextmanager
def demonstration(*demo_arguments: str, ranges: int | None = None) -> Iterator[Demonstration]:
    """Run ``python -m alphapulse_encryption.cli.demo`` to its end, then ``python -m alphapulse_encryption.ui``.

    Args:
        demo_arguments: of the demo.
        ranges: how many batch ranges every table has; None for as many as by default.

    Raises:
        RuntimeError: one of them failed; with what it printed.
    """
    with tempfile.TemporaryDirectory(
        prefix=_PREFIX, dir=place_for_servers(), ignore_cleanup_errors=True
    ) as state:
        environment = {
            **{
                name: value
                for name, value in os.environ.items()
                if not name.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))
            },
            "ALPHAPULSE_STATE_DIR": state,
        }
        if ranges is not None:
            environment["ALPHAPULSE_BATCH_RANGES"] = str(ranges)
        # Held in this process: the server stays up between the demo and the UI, and for the tests.
        with EmbeddedPostgres(Path(state, "postgres"), settings=UNSAFE_SETTINGS) as server:
            _walk(demo_arguments, environment)
            # From now on it is in the environment only, as that of a database of one's own.
            key_file = Path(state, _MASTER_KEY_FILE)
            key = key_file.read_text().strip()
            key_file.unlink()
            environment["ALPHAPULSE_ENCRYPTION_MASTER_KEY"] = key
            with ui(Path(state, "ui.log"), environment) as (address, pid):
                yield Demonstration(address, server.url(SAMPLE_DATABASE), key, pid)


def _walk(arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    done = forked.run("alphapulse_encryption.cli.demo", arguments, environment)
    if done.returncode:
        raise RuntimeError(f"The demo ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")


@contextlib.contextmanager
def ui(log: Path, environment: dict[str, str]) -> Iterator[tuple[str, int]]:
    """Run ``python -m alphapulse_encryption.ui``.

    Args:
        log: where what it prints is kept.
        environment: all of it.

    Yields:
        Its address and its process id.

    Raises:
        RuntimeError: it did not begin; with what it printed.
    """
    port = _free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "alphapulse_encryption.ui", "--port", str(port)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    give_up = time.monotonic() + _START_TIMEOUT
    try:
        while _ANNOUNCEMENT not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > give_up:
                raise RuntimeError(
                    f"The UI did not begin (status {process.poll()}):\n{log.read_text(errors='replace')}"
                )
            time.sleep(_POLL)
        yield f"http://localhost:{port}", process.pid
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(_STOP_TIMEOUT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
