"""PostgreSQL's client programs as children of ours: of the right version, connected in secret, heard out."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, cast

import psycopg
from psycopg.conninfo import conninfo_to_dict

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.database import Database, keep_values_out_of_the_log
from alphapulse_encryption.secrecy import bare_environment

# What a child says is kept up to here, to find out what went wrong; it may quote values and is never shown.
_STDERR_BYTES = 64 * 1024
# Seconds for a child whose pipe is closed already.
_EXIT_TIMEOUT = 60


def find_program(name: str, bin_dir: Path | None, server: int) -> str:
    """Path of a client program.

    Args:
        bin_dir: where to look; None for the PATH.
        server: major version of the server, which the program's must not be below.

    Raises:
        ConfigurationError: it is not there, or too old.
    """
    found = shutil.which(name, path=str(bin_dir) if bin_dir else None)
    if found is None:
        raise ConfigurationError(
            f"{name} is not {f'in {bin_dir}' if bin_dir else 'on the PATH'}. Install PostgreSQL's client "
            f"programs of version {server} or newer."
        )
    said = subprocess.run(
        [found, "--version"], env=bare_environment(), capture_output=True, text=True, check=False
    ).stdout
    number = re.search(r"\s(\d+)", said)
    if number is None or int(number[1]) < server:
        raise ConfigurationError(
            f"{found} is of version {number[1] if number else 'unknown'}, and the server of version "
            f"{server}. Install PostgreSQL's client programs of version {server} or newer."
        )
    return found


def connection_environment(
    database: Database, *, unlogged: bool = False
) -> tuple[dict[str, str], dict[str, str]]:
    """How a child is told of the database: libpq's variables and nothing else of ours, master keys least of all.

    A command line is seen by every user of the machine, an environment by its owner.

    Args:
        unlogged: the child writes values; the server is to log none of them, as far as the role may say so.

    Returns:
        The child's environment, and the connection options for which libpq has no variable and which are no secret.

    Raises:
        ConfigurationError: an option is a secret and has no variable.
    """
    environment = bare_environment()
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PG")}
    options = {o.keyword.decode(): o for o in psycopg.pq.Conninfo.get_defaults()}
    rest = {}
    for keyword, value in conninfo_to_dict(database.conninfo).items():
        option = options[keyword]
        if option.envvar is not None:
            environment[option.envvar.decode()] = str(value)
        elif option.dispchar == b"":
            rest[keyword] = str(value)
        else:
            raise ConfigurationError(
                f"The connection option {keyword} cannot be handed to pg_dump in secret. Use a password file "
                "(passfile) or a service file (service) instead."
            )
    environment["LC_ALL"] = "C"
    environment["PGAPPNAME"] = f"{database.application_name} backup"
    environment.setdefault("PGCONNECT_TIMEOUT", "10")
    # A pooler takes no options, whatever its mode.
    if unlogged and not database.session_pooler:
        with database.session("look what may be set") as connection:
            wanted = [f"-c {name}={value}" for name, value in keep_values_out_of_the_log(connection).items()]
        environment["PGOPTIONS"] = " ".join([environment.get("PGOPTIONS", ""), *wanted]).strip()
    return environment, rest


@contextlib.contextmanager
def child(
    command: list[str], environment: Mapping[str, str], *, stdin: int, stdout: int
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A child process whose stderr is read beside, so that it never blocks; killed if the block fails.

    Yields:
        The process, and a function that returns what it said, once it has ended.

    Raises:
        ConfigurationError: it cannot be run.
    """
    said = bytearray()
    try:
        process = subprocess.Popen(
            command, env=dict(environment), stdin=stdin, stdout=stdout, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise ConfigurationError(f"{command[0]} cannot be run: {error.strerror}.") from None

    errors = cast(IO[bytes], process.stderr)

    def listen() -> None:
        for line in errors:
            said.extend(line[: _STDERR_BYTES - len(said)])

    def heard() -> str:
        # Something that it started may be left, and keep its stderr open for as long as it likes.
        listener.join(_EXIT_TIMEOUT)
        return said.decode(errors="replace")

    listener = threading.Thread(target=listen, name="stderr of a child", daemon=True)
    listener.start()
    try:
        yield process, heard
    except BaseException:
        process.kill()
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.wait(_EXIT_TIMEOUT)
        listener.join(_EXIT_TIMEOUT)
        # Closing waits for who reads.
        if not listener.is_alive():
            errors.close()


def kind_of_failure(said: str) -> str:
    """What went wrong, of what a child said: its kind, and the object it was about.

    What it says may hold statements, and statements values: of a statement only verb and object are told.
    """
    about = re.search(r"^Command was: ((?:CREATE|ALTER) [A-Z ]+[^\s(;]*)", said, re.MULTILINE) or re.search(
        r"COPY failed for (table \"[^\"]*\")", said
    )
    at = f"at {about[1]}: " if about else ""
    for needle, kind in (
        ("row-level security", "row-level security hides rows from this role: it needs BYPASSRLS"),
        ("permission denied", "permission denied; to dump, the role has to be able to read every table"),
        ("server version mismatch", "pg_dump is older than the server"),
        ("password authentication failed", "the password is not accepted"),
        ("no password supplied", "a password is needed"),
        ("lock timeout", "a table was locked for too long"),
        ("No space left on device", "the server's disk is full"),
        ("already exists", "it exists already"),
        ("is not available", "an extension is not installed on that server"),
        ("must be superuser", "the role has to be a superuser for that"),
        ("terminating connection", "the server ended the connection"),
        ("server closed the connection", "the server ended the connection"),
        ("connection to server", "the database cannot be reached"),
        ("could not open file", "a file on the server cannot be read"),
        ("invalid page", "a page of the database is damaged"),
    ):
        if needle in said:
            return f"{at}{kind}"
    return f"{at}its messages may quote values and are not shown; run it by hand to see them"


class PipeWriter:
    """What comes out of the file, on its way to pg_restore, which stops listening behind the list.

    The rest is read all the same: every chunk of the file is authenticated by that.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe = pipe

    def write(self, data: bytes) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.write(data)
        return len(data)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._pipe.flush()
