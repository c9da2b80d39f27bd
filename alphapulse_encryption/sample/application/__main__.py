"""Serve the application: `python -m alphapulse_encryption.sample.application [--port N]`."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence

from alphapulse_encryption.errors import MigrationError

DEFAULT_PORT = 8000
_WAITING = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until told to stop, and answer requests under way; 2 where the database is not ready for the phase."""
    parser = argparse.ArgumentParser(
        prog="python -m alphapulse_encryption.sample.application", description="Serve the sample application."
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="0: any that is free (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        import uvicorn

        from alphapulse_encryption.sample.application.api import app
        from alphapulse_encryption.sample.application.database import get_engine

        get_engine()
    except ImportError as error:
        print(f"{error.name} is missing: pip install 'alphapulse-encryption[application]'", file=sys.stderr)
        return 2
    except MigrationError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    # Loopback only: it is a sample. Listening already when its address is printed.
    with socket.create_server(("127.0.0.1", options.port), backlog=_WAITING) as listening:
        print(f"http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    sys.exit(main())
