"""The web server's process: Dagster's application behind the gate.

Its options are those of ``dagster-webserver`` that Dagster's Helm chart uses, so that the image's command of that name
is this program.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
from collections.abc import Sequence

import uvicorn

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.defs.dagster_private import web_server
from alphapulse_encryption.defs.resources.instance import open_instance, packaged_file
from alphapulse_encryption.ui.gate import Gate, Rules

# Addresses that stand for all of a machine's, and so name none.
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104
# How long requests under way have, when it is to end, in seconds.
_LAST_ANSWERS = 5


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    parser = argparse.ArgumentParser(prog="dagster-webserver", add_help=False, allow_abbrev=False)
    parser.add_argument("--help", action="help")
    parser.add_argument(
        "-h", "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    parser.add_argument("-p", "--port", type=int, default=3000, help="port (default: %(default)s)")
    parser.add_argument(
        "-w",
        "--workspace",
        action="append",
        metavar="FILE",
        help="code locations (default: the packaged one)",
    )
    parser.add_argument(
        "-l",
        "--path-prefix",
        type=path_prefix,
        default="",
        help="what every path begins with, as in /dagster",
    )
    parser.add_argument("--read-only", action="store_true", help="show all, and change nothing")
    parser.add_argument("--log-level", default="warning", help="of the web server (default: %(default)s)")
    # Milliseconds and seconds, as that command's own defaults.
    for name, default in (("statement-timeout", 15_000), ("pool-recycle", 3_600), ("pool-max-overflow", 20)):
        parser.add_argument(
            f"--db-{name}", type=int, default=default, help="of the storage (default: %(default)s)"
        )
    return parser


def path_prefix(text: str) -> str:
    """What every path begins with: empty, or as in /dagster."""
    if text and (not text.startswith("/") or text.endswith("/")):
        raise argparse.ArgumentTypeError("begins with a slash and does not end with one, as in /dagster")
    return text


@secrecy.telling_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal; 2 on wrong usage or configuration."""
    options = build_parser().parse_args(arguments)
    said = settings.Ui()
    listening = f"[{options.host}]" if ":" in options.host else options.host
    rules = Rules(
        (*said.hosts, *(() if options.host in EVERYWHERE else (listening,))), said.url, options.path_prefix
    )
    logging.basicConfig(level=logging.WARNING)
    # A shell that starts it in the background has SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    bounds = (options.db_statement_timeout, options.db_pool_recycle, options.db_pool_max_overflow)
    workspaces = options.workspace or [str(packaged_file("workspace.yaml"))]
    with (
        contextlib.suppress(KeyboardInterrupt),
        open_instance() as instance,
        web_server(
            instance, workspaces, options.path_prefix, bounds, read_only=options.read_only or said.read_only
        ) as app,
    ):
        uvicorn.run(
            Gate(app, rules),
            host=options.host,
            port=options.port,
            log_level=options.log_level,
            server_header=False,
            # What a proxy says of the client changes nothing here.
            proxy_headers=False,
            timeout_graceful_shutdown=_LAST_ANSWERS,
        )
    return 0


if __name__ == "__main__":
    secrecy.run_program(main)
