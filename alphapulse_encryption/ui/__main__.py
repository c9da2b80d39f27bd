"""`make ui`: Dagster's code server, web server and daemon on the instance that the command line uses.

The code server, and the runs that it executes, have the target and its keys; the other two have neither. All are
started directly and in sessions of their own, not through `dagster dev`: stopping this process, however it was
started, stops them in an orderly way, and then the embedded PostgreSQL if nobody else uses it.
"""

import argparse
import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from urllib.parse import urlsplit

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.bounds import whole_number
from alphapulse_encryption.defs.resources.instance import open_instance, prepare_dagster_home
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import embedded
from alphapulse_encryption.secrecy import environment_without_keys
from alphapulse_encryption.ui.server import EVERYWHERE, path_prefix

DEFAULT_PORT = 3000
_MAX_PORT = 65535
# The command `dagster-daemon` of this very Python: where its script is, differs between installations.
_DAEMON = (
    "from importlib.metadata import entry_points; "
    "[command] = entry_points(group='console_scripts', name='dagster-daemon'); command.load()()"
)
_LOCATION = "alphapulse_encryption"
_CODE_SERVER = (
    *("code-server", "start", "--log-level", "warning"),
    *("--module-name", "alphapulse_encryption.definitions", "--location-name", _LOCATION),
)
# What the daemon sends runs with, where there are workers.
_QUEUE = ("ALPHAPULSE_CELERY_BROKER_URL", "ALPHAPULSE_CELERY_BACKEND_URL")
_OF_THE_UI = {
    *("ALPHAPULSE_STATE_DIR", "ALPHAPULSE_RUN_LAUNCHER"),
    *(
        field.validation_alias
        for group in (settings.Logs, settings.Ui)
        for field in group.model_fields.values()
    ),
}
# Seconds between two looks at the children.
_POLL = 0.2
# How long an orderly end may take: the code servers first let go of their clients.
_STOP_TIMEOUT = 20
# How long killed processes may take to be gone. Where nobody reaps them they stay, as zombies that hold
# nothing.
_KILL_TIMEOUT = 2.0
_KILL_POLL = 0.02


class _Stop:
    """Set by the first SIGINT, SIGTERM or SIGHUP; a second one cuts the orderly end short."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.at_once = threading.Event()

    def __call__(self, number: int, frame: FrameType | None) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end(service: subprocess.Popen[bytes], stop: _Stop) -> None:
    """Wait for an orderly end, then end by force what is left of the service and of what it started."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    while service.poll() is None and time.monotonic() < deadline and not stop.at_once.wait(_POLL):
        pass
    # It leads a process group of its own, in which its code servers and their runs are. They are seen
    # off too: the embedded PostgreSQL stops with its last user.
    deadline = time.monotonic() + _KILL_TIMEOUT
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(service.pid, signal.SIGKILL)
            service.poll()
            time.sleep(_KILL_POLL)
    service.wait()


@secrecy.telling_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; 0 when stopped by a signal, 1 when a service died, 2 on wrong usage or configuration."""
    parser = argparse.ArgumentParser(prog="make ui", description="Open Dagster's UI.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", type=whole_number(1, _MAX_PORT), default=DEFAULT_PORT, help="port (default: %(default)s)"
    )
    parser.add_argument(
        "--path-prefix",
        type=path_prefix,
        default="",
        metavar="PREFIX",
        help="what every path begins with, as in /dagster",
    )
    parser.add_argument(
        "--read-only",
        action="store_true",
        help="for who only looks: nothing can be launched or changed, and no daemon is started",
    )
    options = parser.parse_args(arguments)
    options.read_only = options.read_only or settings.Ui().read_only
    _check_port(options.host, options.port)
    stop = _Stop()
    with stop.installed(), contextlib.ExitStack() as stack:
        if settings.Dagster().postgres_url is None or settings.TargetVariables().database_url is None:
            # Held here, it outlives the services: they find it running when they write their last events.
            stack.enter_context(embedded())
        # Opened once before the services: they would otherwise create the storage's tables side by side.
        with open_instance():
            pass
        services = stack.enter_context(_services(options, stop))
        return _watch(services, options, stop)


@contextlib.contextmanager
def _services(options: argparse.Namespace, stop: _Stop) -> Iterator[Mapping[str, subprocess.Popen[bytes]]]:
    whole = {**os.environ, "DAGSTER_HOME": str(prepare_dagster_home())}
    services: dict[str, subprocess.Popen[bytes]] = {}

    def start(name: str, environment: Mapping[str, str], *command: str) -> None:
        services[name] = subprocess.Popen(
            [sys.executable, *command], env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )

    # In a directory that only this user reaches: who can ask the code server can have it run anything.
    with tempfile.TemporaryDirectory(prefix="alphapulse-ui-") as place:
        answers = str(Path(place, "code"))
        workspace = Path(place, "workspace.yaml")
        location = {"socket": answers, "location_name": _LOCATION}
        workspace.write_text(json.dumps({"load_from": [{"grpc_server": location}]}), encoding="utf-8")
        try:
            keys = environment_without_keys(whole) if options.read_only else whole
            start("the code server", keys, "-m", "dagster", *_CODE_SERVER, "--socket", answers)
            while not (stop.asked.wait(_POLL) or os.path.exists(answers) or _ended(services)):
                pass
            if not (stop.asked.is_set() or _ended(services)):
                where = ("--workspace", str(workspace))
                address = ("--host", options.host, "--port", str(options.port))
                more = ("--path-prefix", options.path_prefix, *(["--read-only"] * options.read_only))
                few = _without_the_target(whole)
                start("the web server", few, "-m", "alphapulse_encryption.ui.server", *where, *address, *more)
                if not options.read_only:
                    queue = {name: whole[name] for name in _QUEUE if name in whole}
                    start(
                        "the daemon", {**few, **queue}, "-c", _DAEMON, "run", "--log-level", "warning", *where
                    )
            yield services
        finally:
            for service in services.values():
                # Only the service itself: it ends what it has started in order.
                service.send_signal(signal.SIGINT)
            for service in services.values():
                _end(service, stop)


def _without_the_target(environment: Mapping[str, str]) -> dict[str, str]:
    """What web server and daemon need: where Dagster's storage is, and what of the UI is set."""
    few = {
        name: value
        for name, value in environment_without_keys(environment).items()
        if not name.startswith("ALPHAPULSE_") or name in _OF_THE_UI
    }
    # One of the storage's own is in its address; else it may be this one.
    storage = settings.Dagster().postgres_url
    if storage is None or urlsplit(storage).password:
        few.pop("PGPASSWORD", None)
    return few


def _ended(services: Mapping[str, subprocess.Popen[bytes]]) -> str | None:
    """A service that has ended by itself, and how."""
    for name, service in services.items():
        if (status := service.poll()) is not None:
            return f"{name} ended with status {status}"
    return None


def _watch(services: Mapping[str, subprocess.Popen[bytes]], options: argparse.Namespace, stop: _Stop) -> int:
    host, port, prefix = options.host, options.port, options.path_prefix
    shown = "localhost" if host in {"127.0.0.1", "::1", *EVERYWHERE} else host
    announced = False
    while not stop.asked.wait(_POLL):
        if ended := _ended(services):
            print(f"{ended}; stopping the rest.", file=sys.stderr)
            return 1
        if not announced and _answers(shown, port, prefix):
            announced = True
            print(f"Dagster's UI is at http://{shown}:{port}{prefix} (Ctrl-C stops it).", flush=True)
    print("Stopping ...", flush=True)
    return 0


def _answers(host: str, port: int, prefix: str) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", f"{prefix}/server_info")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the web server does: connections of a predecessor that linger are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"Port {port} on {host} cannot be used ({error.strerror}). "
            f"Choose another one: make ui PORT={port % _MAX_PORT + 1} "
            f"(python -m alphapulse_encryption.ui --port {port % _MAX_PORT + 1})."
        ) from None


if __name__ == "__main__":
    secrecy.run_program(main)
