"""Values and keys that are told from anything else, a sample database full of them, and everywhere to look for them."""

from __future__ import annotations

import base64
import contextlib
import os
import random
import secrets
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.migration.postgres.database import LOG_SETTINGS
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.leaks import Find, Processes, Scanner

# More bytes than any form of a secret has, escaped several times over.
_LONGEST = 1 << 14

CATALOGUE: Catalogue = load_catalogue()
ROLE = "migrator"

# A server that tells its log whatever it can.
TALKATIVE = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_duration": "on",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_error_verbosity": "verbose",
    "log_min_error_statement": "debug5",
    "log_min_messages": "debug1",
    "log_lock_waits": "on",
    "log_temp_files": "0",
    "log_connections": "on",
    "log_disconnections": "on",
    "log_autovacuum_min_duration": "0",
}
# The same of sessions with the target database.
TALKATIVE_SESSIONS = {
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_verbose": "on",
    "debug_print_plan": "on",
}
# Sessions of the tests, whose statements hold the values.
_SILENT = {
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_min_messages": "panic",
    "session_preload_libraries": "",
    "debug_print_plan": "off",
}

DAGSTER_YAML = """
storage:
  custom:
    module: alphapulse_encryption.defs.resources.storage
    class: AlphaPulseStorage
python_logs:
  managed_python_loggers: [root]
  python_log_level: DEBUG
  dagster_handler_config:
    handlers:
      log_files:
        class: alphapulse_encryption.logfiles.RunLog
        level: DEBUG
telemetry: {enabled: false}
nux: {enabled: false}
"""


def word() -> str:
    """A word that occurs nowhere else."""
    return f"cnry{secrets.token_hex(7)}"


def number(digits: int) -> str:
    """A number of which the same holds, with ``digits`` behind its point, the last of them not zero."""
    chance = random.SystemRandom()
    return f"{chance.randrange(10**7, 10**8)}.{chance.randrange(10 ** (digits - 1), 10**digits) | 1}"


@dataclass(frozen=True)
class Canaries:
    """What must not be found.

    Args:
        values: by column, as ``table.column``.
        keys: master keys by version.
        password: of the database's address.
    """

    values: Mapping[str, str]
    keys: Mapping[int, bytes]
    password: str = field(default_factory=word)

    @classmethod
    def hatch(cls, url: str) -> Canaries:
        """One for each column of the catalogue, by its type."""
        with silent(url) as connection:
            types: dict[str, str] = {
                f"{table}.{column}": kind
                for table, column, kind in connection.execute(
                    "SELECT table_name, column_name, data_type FROM information_schema.columns "
                    "WHERE table_schema = 'public'"
                )
            }
        kinds = {name: types[name] for name in columns()}
        digits = {"numeric": 10, "double precision": 7}
        values = {name: number(digits[kind]) if kind in digits else word() for name, kind in kinds.items()}
        return cls(values, {1: secrets.token_bytes(32), 2: secrets.token_bytes(32)})

    @property
    def secrets(self) -> dict[str, bytes | str]:
        """Everything, by name: what is derived from the keys, and words in capitals, too."""
        found: dict[str, bytes | str] = dict(self.values)
        found |= {f"{name} in capitals": text.upper() for name, text in self.values.items()}
        contexts = {column.context for table in CATALOGUE.tables for column in table.columns}
        for version, key in self.keys.items():
            found[f"master key {version}"] = key
            for context in contexts:
                found[f"key {version} of {context}"] = independent.derive(key, context, version)
        return found | {"password": self.password}

    def key(self, version: int = 1) -> str:
        """As the environment variable holds it."""
        return base64.urlsafe_b64encode(self.keys[version]).decode()

    def plant(self, url: str) -> None:
        """Into every row of every table."""
        with silent(url) as connection:
            for table in CATALOGUE.tables:
                assignments: list[Composable] = []
                for column in table.columns:
                    value = self.values[f"{table.key}.{column.name}"]
                    kind = connection.execute(
                        "SELECT data_type FROM information_schema.columns WHERE (table_name, column_name) = (%s, %s)",
                        [table.name, column.name],
                    ).fetchall()[0][0]
                    form = {
                        "jsonb": "jsonb_build_object('k', {value}::text)",
                        "json": "json_build_object('k', {value}::text)",
                        "numeric": "{value}::numeric",
                        "double precision": "{value}::double precision",
                    }.get(kind, "{value} || '.' || id")
                    assignments.append(
                        SQL("{} = {}").format(Identifier(column.name), SQL(form).format(value=value))
                    )
                connection.execute(
                    SQL("UPDATE {} SET {}").format(Identifier(table.name), SQL(", ").join(assignments))
                )


def columns() -> list[str]:
    """All sensitive columns, as ``table.column``."""
    return [f"{table.key}.{column.name}" for table in CATALOGUE.tables for column in table.columns]


def silent(url: str) -> psycopg.Connection[Any]:
    """A session of a superuser of which the server logs nothing."""
    options = " ".join(f"-c {name}={value}" for name, value in _SILENT.items())
    return psycopg.connect(url, autocommit=True, options=options)


@contextlib.contextmanager
def talkative_server(directory: Path, settings: Mapping[str, str]) -> Iterator[EmbeddedPostgres]:
    """A server of its own, whose log is the test's alone."""
    with EmbeddedPostgres(directory, settings={**settings, **TALKATIVE}) as server:
        yield server


def make_target(server: EmbeddedPostgres, database: str) -> tuple[str, Canaries]:
    """The sample full of canaries, owned by a role that may keep values out of the server's log.

    Returns:
        The address for a superuser, and the canaries.
    """
    url = server.url(database)
    with silent(server.url("postgres")) as connection:
        connection.execute(SQL("CREATE DATABASE {}").format(Identifier(database)))
    load_sample(url, rows=1_000)
    canaries = Canaries.hatch(url)
    canaries.plant(url)
    with silent(url) as connection:
        connection.execute(
            f"CREATE ROLE {ROLE} LOGIN CREATEDB CREATEROLE IN ROLE pg_monitor, pg_checkpoint".encode()
        )
        for name in LOG_SETTINGS:
            connection.execute(f"GRANT SET ON PARAMETER {name} TO {ROLE}".encode())
        connection.execute(
            SQL("ALTER DATABASE {} OWNER TO {}").format(Identifier(database), Identifier(ROLE))
        )
        for table in CATALOGUE.tables:
            connection.execute(
                SQL("ALTER TABLE {} OWNER TO {}").format(Identifier(table.name), Identifier(ROLE))
            )
        for name, value in TALKATIVE_SESSIONS.items():
            connection.execute(
                SQL("ALTER DATABASE {} SET {} = {}").format(Identifier(database), SQL(name), value)
            )
    return url, canaries


def address(url: str, canaries: Canaries) -> str:
    """The address for the role, with a password in it."""
    return url.replace("//postgres@", f"//{ROLE}:{quote(canaries.password)}@")


class Watch:
    """Looks, while a ``with`` block runs, at what may be gone when it ends: files, processes, and sessions.

    Args:
        url: of the target, for a superuser.
        scanner: knows what to look for.
        directories: the files below them are looked at.
        leave_out: but not those below this one.
    """

    def __init__(self, url: str, scanner: Scanner, directories: Iterable[Path], leave_out: Path) -> None:
        self.processes = Processes()
        self.files: set[Path] = set()
        self.sessions: set[tuple[str, ...]] = set()
        self._url = url
        self._scanner = scanner
        self._directories = tuple(directories)
        self._leave_out = leave_out
        self._found: list[Find] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=watch, name=f"watch: {watch.__name__}", daemon=True)
            for watch in (self._watch_files, self._watch_sessions)
        ]

    def __enter__(self) -> Watch:
        self.processes.__enter__()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self.processes.__exit__()

    def _watch_files(self) -> None:
        seen: dict[Path, tuple[int, int]] = {}
        looked_at: dict[Path, tuple[int, int]] = {}
        while not self._ended.wait(0.05):
            for path in self._paths():
                with contextlib.suppress(OSError):
                    state = path.stat()
                    if seen.get(path) == (state.st_mtime_ns, state.st_size):
                        continue
                    seen[path] = (state.st_mtime_ns, state.st_size)
                    content = path.read_bytes()
                    # A log grows a line at a time: what is as it was is not looked through again.
                    size, checksum = looked_at.get(path, (0, 0))
                    as_it_was = len(content) >= size and zlib.crc32(memoryview(content)[:size]) == checksum
                    begin = max(0, size - _LONGEST) if as_it_was else 0
                    self._found += self._scanner.data(content[begin:], f"file {path}")
                    looked_at[path] = len(content), zlib.crc32(content)
                    self._found += self._scanner.data(os.fsencode(path), f"name of {path}")
                    self.files.add(path)

    def _paths(self) -> Iterator[Path]:
        for directory in self._directories:
            for parent, below, names in os.walk(directory):
                if Path(parent) == self._leave_out:
                    below.clear()
                    continue
                for name in names:
                    path = Path(parent, name)
                    if path.is_file() and not path.is_symlink():
                        yield path

    def _watch_sessions(self) -> None:
        while not self._ended.is_set():
            # A test may have ended every session.
            with contextlib.suppress(psycopg.Error), silent(self._url) as connection:
                while not self._ended.wait(0.02):
                    rows = connection.execute(
                        "SELECT DISTINCT application_name, coalesce(query, '') FROM pg_stat_activity "
                        "WHERE pid <> pg_backend_pid() AND application_name LIKE 'alphapulse%'"
                    ).fetchall()
                    self.sessions.update(rows)

    def found(self) -> list[Find]:
        """What was seen of the secrets, when the block has ended."""
        found = [*self._found, *self.processes.with_secrets(self._scanner)]
        for session in self.sessions:
            found += self._scanner.text("\n".join(session), "pg_stat_activity")
        return found


def in_the_log(server: EmbeddedPostgres, scanner: Scanner) -> list[Find]:
    """What is found in what the server logged."""
    return scanner.data(server.log_file.read_bytes(), "the server's log")


def in_files_of(server: EmbeddedPostgres, database: str, scanner: Scanner) -> list[Find]:
    """What is found in the data files of a database."""
    with silent(server.url(database)) as connection:
        connection.execute("CHECKPOINT")
        ((oid,),) = connection.execute(
            "SELECT oid::text FROM pg_database WHERE datname = current_database()"
        ).fetchall()
    return scanner.files(server.log_file.parent / "base" / oid)


def in_statistics(url: str, scanner: Scanner) -> list[Find]:
    """What is found in the statements that the server remembers."""
    with silent(url) as connection:
        rows = connection.execute("SELECT query FROM pg_stat_statements").fetchall()
    assert rows
    return [find for (query,) in rows for find in scanner.text(query, "pg_stat_statements")]


def in_the_target(url: str, scanner: Scanner) -> list[Find]:
    """What is found in the target database outside of the plaintext columns."""
    plaintext = {f"column public.{name}" for name in columns()}
    return [find for find in scanner.database(url) if find.place not in plaintext]
