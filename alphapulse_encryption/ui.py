"""`make ui`: Dagster's web server and daemon on the instance that the command line uses.

They are started directly and in sessions of their own, not through `dagster dev`: whoever stops this
process, however it was started, stops them in an orderly way, and then the embedded PostgreSQL if
nobody else uses it.
"""

import argparse
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.bounds import whole_number
from alphapulse_encryption.defs.resources.instance import open_instance, packaged_file, prepare_dagster_home
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import embedded
from alphapulse_encryption.secrecy import environment_without_keys

DEFAULT_PORT = 3000
_MAX_PORT = 65535
# The command `dagster-daemon` of this very Python: where its script is, differs between installations.
_DAEMON = (
    "from importlib.metadata import entry_points; "
    "[command] = entry_points(group='console_scripts', name='dagster-daemon'); command.load()()"
)
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
    options = parser.parse_args(arguments)
    host, port = options.host, options.port
    _check_port(host, port)
    stop = _Stop()
    with stop.installed(), contextlib.ExitStack() as stack:
        if settings.Dagster().postgres_url is None or settings.TargetVariables().database_url is None:
            # Held here, it outlives the services: they find it running when they write their last events.
            stack.enter_context(embedded())
        # Opened once before the services: they would otherwise create the storage's tables side by side.
        with open_instance():
            pass
        services = stack.enter_context(_services(host, port, stop))
        return _watch(services, host, port, stop)


@contextlib.contextmanager
def _services(host: str, port: int, stop: _Stop) -> Iterator[Mapping[str, subprocess.Popen[bytes]]]:
    environment = {**os.environ, "DAGSTER_HOME": str(prepare_dagster_home())}
    workspace = ["--workspace", str(packaged_file("workspace.yaml")), "--code-server-log-level", "warning"]
    address = ["--host", host, "--port", str(port)]
    server = ["-m", "dagster_webserver", *address, "--dagster-log-level", "warning"]
    commands = (
        # Runs and sensors are the daemon's: the one that serves the network needs no key, and gets none.
        ("dagster-webserver", server, environment_without_keys(environment)),
        ("dagster-daemon", ["-c", _DAEMON, "run", "--log-level", "warning"], environment),
    )
    services: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command, variables in commands:
            services[name] = subprocess.Popen(
                [sys.executable, *command, *workspace],
                env=variables,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        yield services
    finally:
        for service in services.values():
            # Only the service itself: it ends its code servers in order.
            service.send_signal(signal.SIGINT)
        for service in services.values():
            _end(service, stop)


def _watch(services: Mapping[str, subprocess.Popen[bytes]], host: str, port: int, stop: _Stop) -> int:
    shown = "localhost" if host in {"127.0.0.1", "0.0.0.0", "::", "::1"} else host  # noqa: S104
    announced = False
    while not stop.asked.wait(_POLL):
        for name, service in services.items():
            status = service.poll()
            if status is not None:
                print(f"{name} ended with status {status}; stopping the rest.", file=sys.stderr)
                return 1
        if not announced and _answers(shown, port):
            announced = True
            print(f"Dagster's UI is at http://{shown}:{port} (Ctrl-C stops it).", flush=True)
    print("Stopping ...", flush=True)
    return 0


def _answers(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", "/server_info")
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
