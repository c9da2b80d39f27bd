"""PostgreSQL's client programs as children of ours: of the right version, connected in secret, heard out."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, LiteralString, cast

from psycopg.conninfo import make_conninfo

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.database import Database, answer, keep_values_out_of_the_log
from alphapulse_encryption.migration.postgres.unreachable import reason
from alphapulse_encryption.secrecy import bare_environment

# So much of the beginning and of the end of what a child says is kept, to find out what went wrong; it may quote
# values and is never shown.
_STDERR_BYTES = 64 * 1024
# Seconds for a child whose pipe is closed already.
_EXIT_TIMEOUT = 60


@dataclass(frozen=True)
class Pair:
    """``pg_dump`` and ``pg_restore`` of one installation."""

    pg_dump: str
    pg_restore: str
    version: str

    @property
    def major(self) -> int:
        return int(self.version.partition(".")[0])

    @property
    def minor(self) -> int:
        return int(self.version.partition(".")[2] or 0)

    def __str__(self) -> str:
        return f"{Path(self.pg_dump).parent} (version {self.version})"

    def has_tls(self) -> bool:
        """Asked of itself: libpq looks at the option before it looks for the server, and there is none there."""
        command = [self.pg_dump, "--no-password", "--dbname=host=/dev/null sslmode=require"]
        return "SSL support is not compiled in" not in _said(command)


# Of Debian and Ubuntu, of Red Hat and its like, of Homebrew, of Postgres.app, and of a build by hand.
_USUAL_PLACES = (
    *("/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"),
    *("/opt/homebrew/opt/postgresql@*/bin", "/opt/homebrew/opt/libpq/bin"),
    *("/usr/local/opt/postgresql@*/bin", "/usr/local/opt/libpq/bin"),
    *("/Applications/Postgres.app/Contents/Versions/*/bin", "/usr/local/pgsql/bin"),
)


def usual_places() -> list[Path]:
    """Where client programs are: the directories of the PATH, and those where they are installed beside it."""
    installed = (path for pattern in _USUAL_PLACES for path in sorted(glob.glob(pattern)))
    return [Path(path) for path in (*os.get_exec_path(), *installed)]


def choose(places: Iterable[Path], server: int, *, tls: bool) -> Pair:
    """The best pair for a server: not older, and nearest to its version; of several, the first.

    Args:
        server: its major version; it refuses the dump of an older program.
        tls: whether the address is reached over TLS.

    Raises:
        ConfigurationError: there is none; says which do not fit and what to install.
    """
    unfit = []
    for pair in sorted(_pairs(places), key=lambda pair: pair.major):
        if pair.major < server:
            unfit.append(f"{pair} is too old")
        elif tls and not pair.has_tls():
            unfit.append(f"{pair} is built without TLS")
        else:
            return pair
    raise ConfigurationError(
        f"There are no client programs for a server of version {server}{' over TLS' if tls else ''}: "
        f"{'; '.join(unfit) or 'pg_dump and pg_restore were found nowhere'}. Install PostgreSQL's client programs of "
        f"version {server} or newer: apt install postgresql-client-{server}, dnf install postgresql{server}, or brew "
        f"install postgresql@{server}; with apt and dnf, from the PGDG repository where the system's own has another "
        "version."
    )


def _pairs(places: Iterable[Path]) -> Iterator[Pair]:
    seen = set()
    for place in places:
        found = [shutil.which(name, path=str(place)) for name in ("pg_dump", "pg_restore")]
        # Debian's wrapper runs another version for another address; what it runs is at the usual place.
        real = [Path(path).resolve() for path in found if path is not None]
        if len(real) < 2 or real[0] in seen or real[0].name == "pg_wrapper":
            continue
        seen.add(real[0])
        dump, restore = (re.search(r"\s(\d+[.\d]*)", _said([str(path), "--version"])) for path in found)
        # An older pg_restore does not read what the other one writes.
        if dump is not None and restore is not None and dump[1] == restore[1]:
            yield Pair(str(found[0]), str(found[1]), dump[1])


def _said(command: list[str]) -> str:
    environment = bare_environment() | {"LC_ALL": "C"}
    try:
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return ended.stdout + ended.stderr


@dataclass(frozen=True)
class Way:
    """How a child reaches the very server that a session of ours reached: as the same role, over TLS if that was.

    A command line is seen by every user of the machine, an environment by its owner: it has the password. Nothing
    else of ours is in it, master keys least of all.

    Args:
        dbname: for the option of that name; no secret.
        server: major version.
        tls: whether our session is over TLS.
    """

    database: Database
    environment: Mapping[str, str] = field(repr=False)
    dbname: str
    server: int
    tls: bool


# Looked up already; told by us; or a dump's own affair: its encoding is the database's.
_NOT_HANDED_ON = (
    "service",
    "servicefile",
    "application_name",
    "fallback_application_name",
    "client_encoding",
)


def way_to(database: Database, *, unlogged: bool = False) -> Way:
    """Ask a session of ours where it got to: of several hosts, by a service, by variables of the environment.

    Args:
        unlogged: the child writes values; the server is to log none of them, as far as the role may say so.

    Raises:
        ConfigurationError: an option is a secret and has no variable, or the database cannot be reached.
        DatabaseFailure: the connection was lost.
    """
    with database.session("see how client programs reach it") as connection:
        reached = connection.pgconn
        server = connection.info.server_version // 10_000
        quiet = keep_values_out_of_the_log(connection) if unlogged else {}
        options = {option.keyword.decode(): option for option in reached.info}
        tls = bool(reached.ssl_in_use)
        given = {k: o.val.decode() for k, o in options.items() if o.val and o.val != o.compiled}
        given |= {"host": reached.host.decode(), "port": reached.port.decode(), "user": reached.user.decode()}
        given["hostaddr"] = "" if given["host"].startswith(("/", "@")) else reached.hostaddr.decode()
        dbname = reached.db.decode()
    environment = bare_environment() | {"PGDATABASE": dbname}
    rest = {"dbname": dbname}
    for keyword, value in given.items():
        option = options[keyword]
        if keyword in (*_NOT_HANDED_ON, "dbname") or not value:
            continue
        if option.envvar is not None:
            environment[option.envvar.decode()] = value
        elif option.dispchar == b"":
            rest[keyword] = value
        else:
            raise ConfigurationError(
                f"The connection option {keyword} cannot be handed to pg_dump in secret. Take it out of the address: "
                "use a key without a passphrase, or a password file (passfile)."
            )
    if tls and environment.get("PGSSLMODE", "prefer") in ("allow", "prefer"):
        # Left to itself, it would go without where TLS fails.
        environment["PGSSLMODE"] = "require"
    environment["LC_ALL"] = "C"
    environment["PGAPPNAME"] = f"{database.application_name} backup"
    # A pooler takes no options, whatever its mode.
    if quiet and not database.session_pooler:
        wanted = [f"-c {name}={value}" for name, value in quiet.items()]
        environment["PGOPTIONS"] = " ".join([environment.get("PGOPTIONS", ""), *wanted]).strip()
    return Way(database, environment, make_conninfo(**rest), server, tls)


def dump_command(pair: Pair, way: Way) -> list[str]:
    """Dumps all of the database to stdout, in custom format."""
    return [pair.pg_dump, "--format=custom", "--no-password", f"--dbname={way.dbname}"]


# What would reach beyond the database that is restored into, or names roles and disks that another server lacks.
_LEFT_OUT = (
    *("--no-owner", "--no-privileges", "--no-tablespaces", "--no-security-labels"),
    *("--no-publications", "--no-subscriptions"),
)


def restore_command(pair: Pair, way: Way) -> list[str]:
    """Restores what comes in at stdin into an empty database; :func:`restore_problem` says whether it went well.

    A program that is newer than the server begins with settings that the server may not know (``transaction_timeout``,
    from 17 on), and would stop there.
    """
    stop = [] if pair.major > way.server else ["--exit-on-error"]
    return [pair.pg_restore, *stop, "--no-password", f"--dbname={way.dbname}", *_LEFT_OUT]


def listing(pg_restore: str, feed: Callable[[subprocess.Popen[bytes]], int | None]) -> str | None:
    """What pg_restore says is in a dump; None where it cannot be read.

    Args:
        feed: gives the dump to pg_restore, which stops listening behind the list; returns its exit status.
    """
    listed: list[bytes] = []
    command = [pg_restore, "--list"]
    with child(command, bare_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as (process, _):
        output = cast(IO[bytes], process.stdout)
        reader = threading.Thread(target=lambda: listed.append(output.read()), name="list", daemon=True)
        reader.start()
        status = feed(process)
        reader.join()
    return b"".join(listed).decode(errors="replace") if status == 0 else None


_UNKNOWN_SETTING = r"pg_restore: error: could not execute query: [^\n]*\nCommand was: SET (\w+) = [^;\n]*;\n+"
# The first that it says, before anything of the archive: nothing in it can have said that.
_HEAD = re.compile(rf"(?:{_UNKNOWN_SETTING})+")


def restore_problem(status: int, said: str, way: Way) -> str | None:
    """What went wrong with a restore; None where all of the archive is there.

    Args:
        said: by pg_restore, all of it.
    """
    head = _HEAD.match(said)
    ignored = re.search(r"errors ignored on restore: (\d+)\s*\Z", said)
    if status == 1 and head is not None and ignored is not None:
        names = re.findall(_UNKNOWN_SETTING, head[0])
        if len(names) == int(ignored[1]) and _unknown(way.database, names):
            return None
    if status == 0:
        return None
    about = kind_of_failure(said[head.end() :] if head is not None else said)
    return f"pg_restore ended with exit status {status} ({about})"


def _unknown(database: Database, names: list[str]) -> bool:
    """Whether the server knows none of these settings."""
    with database.session("see which settings the server knows") as connection:
        query: LiteralString = (
            "SELECT bool_and(current_setting(name, true) IS NULL) FROM unnest(%s::text[]) AS s (name)"
        )
        return bool(answer(connection, query, names))


@contextlib.contextmanager
def child(
    command: list[str],
    environment: Mapping[str, str],
    *,
    stdin: int,
    stdout: int,
    inherited: Sequence[int] = (),
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A child process whose stderr is read beside, so that it never blocks; killed if the block fails.

    Args:
        inherited: file descriptors that it has as well.

    Yields:
        The process, and a function that returns what it said, once it has ended.

    Raises:
        ConfigurationError: it cannot be run.
    """
    said, end = bytearray(), b""
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
        )
    except OSError as error:
        raise ConfigurationError(f"{command[0]} cannot be run: {error.strerror}.") from None

    errors = cast(IO[bytes], process.stderr)

    def listen() -> None:
        nonlocal end
        for line in errors:
            room = _STDERR_BYTES - len(said)
            said.extend(line[:room])
            end = (end + line[room:])[-_STDERR_BYTES:]

    def heard() -> str:
        # Something that it started may be left, and keep its stderr open for as long as it likes.
        listener.join(_EXIT_TIMEOUT)
        return (said + end).decode(errors="replace")

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


# Of the server's messages, whole lines that name objects only; of pg_dump's and pg_restore's own, what they begin with.
_OBJECT = (
    "table|view|materialized view|sequence|schema|function|type|large object|foreign server|column|database"
)
_KINDS = tuple(
    (re.compile(pattern, re.MULTILINE), kind)
    for pattern, kind in (
        ("row-level security", "row-level security hides rows from this role: it needs BYPASSRLS (42501)"),
        (
            rf'ERROR: +permission denied for (?P<what>{_OBJECT}) "?(?P<name>[^"\n]+?)"?$',
            "permission denied for {what} {name} (42501); to dump, the role has to be able to read every table. Run "
            "what --roles-sql prints again, where this was made later",
        ),
        (
            "permission denied (for language|for foreign-data wrapper|to create)|must be superuser|Must be superuser",
            "the role has to be a superuser for that (42501)",
        ),
        (
            "permission denied",
            "permission denied (42501); to dump, the role has to be able to read every table",
        ),
        ("server version mismatch", "pg_dump is older than the server"),
        ("lock timeout|could not obtain lock", "a table was locked for too long (55P03); run it again"),
        ("No space left on device", "the server's disk is full (53100); make room"),
        ("already exists$", "it exists already"),
        (
            'violates foreign key constraint "(?P<name>[^"]+)"$',
            "a row violates the foreign key {name} (23503)",
        ),
        ('violates check constraint "(?P<name>[^"]+)"$', "a row violates the check {name} (23514)"),
        (
            'violates unique constraint "(?P<name>[^"]+)"$|create unique index "(?P<index>[^"]+)"$',
            "rows have the same key in {name}{index} (23505)",
        ),
        ("violates (not-null|exclusion)", "a row violates a constraint (23)"),
        (
            'ERROR: +(?P<what>role|schema|type|tablespace|language|extension|text search \\w+) "(?P<name>[^"]+)" '
            "does not exist$",
            "the {what} {name} is missing on that server (42704); create it there",
        ),
        (
            "is not available",
            "an extension is not installed on that server (0A000); install its package there",
        ),
        ("terminating connection|closed the connection", "the server ended the connection; see its log"),
        (
            "unexpected end of file|could not read from input file|did not find magic string|does not appear to be a "
            "valid archive|input file is too short",
            "the archive is cut short or damaged; take it again",
        ),
        ("unsupported version .* in file header", "pg_restore is older than the pg_dump that made it"),
        ("invalid page", "a page of the database is damaged (XX001)"),
        ("could not open file", "a file on the server cannot be read (58P01)"),
    )
)
_ABOUT = (
    r"^Command was: ((?:CREATE|ALTER) [A-Z ]+[^\s(;]*)",
    r"COPY failed for (table \"[^\"]*\")",
    r"[Dd]umping the contents of (table \"[^\"]*\") failed",
)


def kind_of_failure(said: str) -> str:
    """What went wrong first, of what a child said: its kind, SQLSTATE where that is known, and the object it was about.

    What it says may hold statements, and statements values, as rows may be quoted: of these nothing is told.
    """
    if "connection to server" in said or "could not translate host name" in said:
        return f"the database cannot be reached: {reason(said).what}"
    # The rest tells of the next one.
    said = "".join(said.split("pg_restore: error: ")[:2])
    about = next((found[1] for pattern in _ABOUT if (found := re.search(pattern, said, re.MULTILINE))), None)
    at = f"at {about}: " if about else ""
    for pattern, kind in _KINDS:
        if found := pattern.search(said):
            return at + kind.format_map({name: text or "" for name, text in found.groupdict().items()})
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
