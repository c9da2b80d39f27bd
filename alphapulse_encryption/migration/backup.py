"""A backup that can undo everything: ``pg_dump`` in custom format, encrypted as it is written, and read back.

The file is plain age (https://age-encryption.org/v1): ``age -d -i key.txt FILE | pg_restore`` opens it
without us, with the identity that :func:`backup_identity` prints. A plaintext dump never touches the disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, cast

import bech32
import psycopg
import pyrage  # type: ignore[import-untyped,unused-ignore]
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from psycopg.conninfo import conninfo_to_dict

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration import saved, tracking
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.definition import read_table

Connection = psycopg.Connection[Any]

_KEY_CONTEXT = "alphapulse_encryption backup"
_KEY_INFO = b"alphapulse_encryption backup v1"
_IDENTITY_PREFIX = "age-secret-key-"  # age's specification, section "X25519 recipient stanza"

_SUFFIX = ".dump.age"
_PARTIAL = ".partial"
_CHUNK = 1024 * 1024
# What a child says is kept up to here, to find out what went wrong; it may quote values and is never shown.
_STDERR_BYTES = 64 * 1024
# Seconds for a child whose pipe is closed already.
_EXIT_TIMEOUT = 60


@dataclass(frozen=True)
class Backup:
    """A row of ``encryption_backups``.

    Args:
        id: its number.
        taken_at: the moment it speaks of, by the server's clock.
        location: path of the file.
        bytes: size of the file.
        sha256: of the file, hexadecimal.
        tables: keys of the catalogued tables whose data is in it.
    """

    id: int
    taken_at: datetime
    location: str
    bytes: int
    sha256: str
    tables: tuple[str, ...]


@dataclass(frozen=True)
class BackupResult:
    """What :func:`take_backup` did.

    Args:
        backup: the row recorded.
        recipients: who can open it, as age's public keys; the first is derived from the master key.
        listed_entries: entries that ``pg_restore --list`` found in it.
        seconds: duration.
    """

    backup: Backup
    recipients: tuple[str, ...]
    listed_entries: int
    seconds: float


def backup_identity(keys: KeyRing, version: int | None = None) -> str:
    """The age identity (``AGE-SECRET-KEY-1…``) that opens backups; a secret like the master key itself.

    An X25519 key of HKDF-SHA256 (RFC 5869) over a key derived from the master key under a context of its own.

    Args:
        keys: the key ring.
        version: key version the backup was made with; None for the current one.

    Raises:
        ConfigurationError: no master key of that version.
    """
    material = keys.derive(_KEY_CONTEXT, keys.current_version if version is None else version)
    secret = HKDF(algorithm=SHA256(), length=32, salt=None, info=_KEY_INFO).derive(material)
    digits = cast(list[int], bech32.convertbits(secret, 8, 5))
    return str(bech32.bech32_encode(_IDENTITY_PREFIX, digits)).upper()


def take_backup(
    database: Database,
    catalogue_tables: Sequence[Table],
    keys: KeyRing,
    actor: Actor,
    *,
    directory: Path,
    bin_dir: Path | None = None,
    recipients: Sequence[str] = (),
) -> BackupResult:
    """Dump the whole database into an encrypted file, read it back, and record it.

    Nothing is recorded, and no file is left, unless all of it went well.

    Args:
        database: the target.
        catalogue_tables: the tables whose data has to be in it.
        keys: for the recipient.
        actor: who does it.
        directory: where to; made where it is missing.
        bin_dir: where ``pg_dump`` and ``pg_restore`` are; None looks for them on the PATH.
        recipients: further age recipients (``age1…``) who can open it without the master key.

    Raises:
        ConfigurationError: ``pg_dump`` missing or older than the server, an invalid recipient, the directory
            cannot be written, or the database cannot be reached.
        RefusedError: the dump failed, or what was written does not hold every table.
    """
    started = time.monotonic()
    recipient = pyrage.x25519.Identity.from_str(backup_identity(keys)).to_public()
    to = [recipient, *(_recipient(text) for text in recipients)]
    with database.session("take a backup") as connection:
        tracking.ensure_bookkeeping(connection)
        tracking.ensure_key(connection, keys)
        version = connection.info.server_version // 10_000
        pg_dump, pg_restore = (_program(name, bin_dir, version) for name in ("pg_dump", "pg_restore"))
        expected = {table.key: _relations(connection, table) for table in catalogue_tables}
        taken_at, name = saved.only_row(connection.execute("SELECT clock_timestamp(), current_database()"))
    environment, arguments = _environment(database)
    path = _path(directory, name)
    with _new_file(path) as (file, keep):
        command = [pg_dump, "--format=custom", "--no-password", *arguments]
        digest = _dump(command, environment, to, file)
        listing = _list(pg_restore, environment, file, keys)
        entries = _check_listing(listing, expected)
        size = os.fstat(file.fileno()).st_size
        keep()
        try:
            backup_id = _record(
                database, actor, taken_at, path, size, digest, [str(r) for r in to], entries, list(expected)
            )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return BackupResult(
        backup=Backup(backup_id, taken_at, str(path), size, digest, tuple(expected)),
        recipients=tuple(str(r) for r in to),
        listed_entries=entries,
        seconds=time.monotonic() - started,
    )


def latest_backup(connection: Connection, table: Table) -> Backup | None:
    """The newest recorded backup that holds the table's data."""
    row = connection.execute(
        f"{_SELECT} WHERE %s = ANY(tables) ORDER BY id DESC LIMIT 1", [table.key]
    ).fetchone()
    return None if row is None else _backup(row)


def read_backup(connection: Connection, backup_id: int) -> Backup | None:
    """The backup of that number."""
    row = connection.execute(_SELECT + " WHERE id = %s", [backup_id]).fetchone()
    return None if row is None else _backup(row)


_SELECT = "SELECT id, taken_at, location, bytes, sha256, tables FROM public.encryption_backups"


def _backup(row: tuple[Any, ...]) -> Backup:
    return Backup(row[0], row[1], row[2], row[3], row[4], tuple(row[5]))


def check_backup(backup: Backup) -> None:
    """Hold a backup's file against what was recorded: it is there, and not a byte differs.

    Raises:
        RefusedError: it is missing, cannot be read or was altered.
    """
    try:
        with Path(backup.location).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RefusedError(
            f"The backup {backup.location} cannot be read ({error.strerror}). Take a new one (asset backup)."
        ) from None
    if digest != backup.sha256:
        raise RefusedError(
            f"The backup {backup.location} was altered since it was taken: its checksum differs. "
            "Take a new one (asset backup)."
        )


def _recipient(text: str) -> pyrage.x25519.Recipient:
    try:
        return pyrage.x25519.Recipient.from_str(text.strip())
    except pyrage.RecipientError:
        raise ConfigurationError(
            "A backup recipient is not an age public key: it must begin with age1, as age-keygen prints it."
        ) from None


def _program(name: str, bin_dir: Path | None, server: int) -> str:
    found = shutil.which(name, path=str(bin_dir) if bin_dir else None)
    if found is None:
        raise ConfigurationError(
            f"{name} is not {f'in {bin_dir}' if bin_dir else 'on the PATH'}. Install PostgreSQL's client "
            f"programs of version {server} or newer."
        )
    said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    number = re.search(r"\s(\d+)", said)
    if number is None or int(number[1]) < server:
        raise ConfigurationError(
            f"{found} is of version {number[1] if number else 'unknown'}, and the server of version "
            f"{server}. Install PostgreSQL's client programs of version {server} or newer."
        )
    return found


def _relations(connection: Connection, table: Table) -> set[tuple[str, str]]:
    """Schema and name of the relations that hold the table's rows: itself, or its partitions."""
    definition = read_table(connection, table, plaintext=False)
    rows = connection.execute(
        "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE c.relkind = 'r' AND (c.oid = %(oid)s OR c.oid IN (SELECT relid FROM "
        "pg_partition_tree(%(oid)s)))",
        {"oid": definition.oid},
    )
    return {(schema, name) for schema, name in rows}


def _environment(database: Database) -> tuple[dict[str, str], list[str]]:
    """The child's environment: libpq's variables and nothing else of ours, master keys least of all.

    A command line is seen by every user of the machine, an environment by its owner.
    """
    kept = ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {name: value for name, value in os.environ.items() if name.startswith("PG")}
    options = {o.keyword.decode(): o for o in psycopg.pq.Conninfo.get_defaults()}
    arguments = []
    for keyword, value in conninfo_to_dict(database.conninfo).items():
        option = options[keyword]
        if option.envvar is not None:
            environment[option.envvar.decode()] = str(value)
        elif option.dispchar == b"":
            arguments.append(f"{keyword}={value}")
        else:
            raise ConfigurationError(
                f"The connection option {keyword} cannot be handed to pg_dump in secret. Use a password file "
                "(passfile) or a service file (service) instead."
            )
    environment["LC_ALL"] = "C"
    environment["PGAPPNAME"] = f"{database.application_name} backup"
    environment.setdefault("PGCONNECT_TIMEOUT", "10")
    return environment, [
        f"--dbname={psycopg.conninfo.make_conninfo(**_pairs(arguments))}"
    ] if arguments else []


def _pairs(arguments: Sequence[str]) -> dict[str, str]:
    return dict(argument.split("=", 1) for argument in arguments)


def _path(directory: Path, name: str) -> Path:
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "database"
    moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    return directory.absolute() / f"{safe}-{moment}{_SUFFIX}"


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """A file that gets its name only when it is kept, readable for its owner alone.

    A lock on it tells it from what a killed process left behind, which is removed.
    """
    partial = path.with_name(path.name + _PARTIAL)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in path.parent.glob(f"*{_SUFFIX}{_PARTIAL}"):
            _remove_abandoned(left)
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise ConfigurationError(
            f"The backup directory {path.parent} cannot be written: {error.strerror}."
        ) from None
    with os.fdopen(descriptor, "w+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

        def keep() -> None:
            os.fsync(file.fileno())
            partial.rename(path)
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)

        try:
            yield file, keep
        finally:
            partial.unlink(missing_ok=True)


def _remove_abandoned(partial: Path) -> None:
    try:
        with partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.unlink(missing_ok=True)
    except (BlockingIOError, FileNotFoundError):
        return  # another process is writing it, or has just ended


class _HashingWriter:
    """What age writes, on its way to the file."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def _dump(
    command: list[str], environment: Mapping[str, str], recipients: Sequence[Any], file: IO[bytes]
) -> str:
    """Run pg_dump through age into the file; returns the file's SHA-256."""
    writer = _HashingWriter(file)
    with _child(command, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (process, said):
        try:
            pyrage.encrypt_io(process.stdout, writer, list(recipients))
        except pyrage.EncryptError:
            process.kill()
            reason = writer.error.strerror if writer.error else "encryption failed"
            raise RefusedError(
                f"The backup could not be written: {reason}. No backup was recorded; make room in its "
                "directory, or choose another."
            ) from None
        status = process.wait()
    if status != 0:
        raise RefusedError(
            f"pg_dump failed with exit status {status} ({_kind_of_failure(said())}). No backup was recorded, "
            "and no file is left."
        )
    file.flush()
    os.fsync(file.fileno())
    return writer.digest.hexdigest()


@contextlib.contextmanager
def _child(
    command: list[str], environment: Mapping[str, str], *, stdin: int, stdout: int
) -> Iterator[tuple[subprocess.Popen[bytes], Callable[[], str]]]:
    """A child process whose stderr is read beside, so that it never blocks; killed if the block fails."""
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
        listener.join()
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
        listener.join()
        errors.close()


def _kind_of_failure(said: str) -> str:
    # What pg_dump prints may hold statements, and statements values; only its kind is told.
    for needle, kind in (
        ("row-level security", "row-level security hides rows from this role: it needs BYPASSRLS"),
        ("permission denied", "permission denied: the role has to be able to read every table"),
        ("server version mismatch", "pg_dump is older than the server"),
        ("password authentication failed", "the password is not accepted"),
        ("no password supplied", "a password is needed"),
        ("lock timeout", "a table was locked for too long"),
        ("terminating connection", "the server ended the connection"),
        ("server closed the connection", "the server ended the connection"),
        ("connection to server", "the database cannot be reached"),
        ("could not open file", "a file on the server cannot be read"),
        ("invalid page", "a page of the database is damaged"),
    ):
        if needle in said:
            return kind
    return "its messages may quote values and are not shown; run pg_dump by hand to see them"


class _PipeWriter:
    """What comes out of the file, on its way to pg_restore, which stops listening behind the list.

    The rest is read all the same: every chunk of the file is authenticated by that.
    """

    def __init__(self, pipe: IO[bytes]) -> None:
        self._pipe: IO[bytes] | None = pipe

    def write(self, data: bytes) -> int:
        if self._pipe is not None:
            try:
                self._pipe.write(data)
            except BrokenPipeError:
                self._pipe = None
        return len(data)

    def flush(self) -> None:
        if self._pipe is not None:
            try:
                self._pipe.flush()
            except BrokenPipeError:
                self._pipe = None


def _list(pg_restore: str, environment: Mapping[str, str], file: IO[bytes], keys: KeyRing) -> str:
    """Decrypt the whole file again and have pg_restore list what is in it."""
    identity = pyrage.x25519.Identity.from_str(backup_identity(keys))
    file.seek(0)
    # pg_restore needs no database for this, so it gets none.
    bare = {name: value for name, value in environment.items() if not name.startswith("PG")}
    listed: list[bytes] = []
    with _child([pg_restore, "--list"], bare, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as (process, _):
        entrance, output = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        reader = threading.Thread(target=lambda: listed.append(output.read()), name="list", daemon=True)
        reader.start()
        try:
            pyrage.decrypt_io(file, _PipeWriter(entrance), [identity])
        except pyrage.DecryptError:
            raise _damaged() from None
        with contextlib.suppress(BrokenPipeError):
            entrance.close()
        reader.join()
        status = process.wait()
    if status != 0:
        raise _damaged()
    return b"".join(listed).decode(errors="replace")


def _damaged() -> MigrationError:
    return RefusedError(
        "The backup that was just written cannot be read back. No backup was recorded, and no file is left: "
        "check the disk, and take it again."
    )


def _check_listing(listing: str, expected: Mapping[str, set[tuple[str, str]]]) -> int:
    """Every catalogued table's data is in the list; returns the number of entries.

    A line reads ``4321; 0 16385 TABLE DATA public users owner`` (pg_restore's manual, option ``-l``).
    """
    entries = [line for line in listing.splitlines() if line and not line.startswith(";")]
    data = [line.partition(" TABLE DATA ")[2] for line in entries if " TABLE DATA " in line]
    for key, relations in expected.items():
        for schema, name in relations:
            wanted = " ".join(f"{schema} {name} ".splitlines())
            if not any(line.startswith(wanted) for line in data):
                raise RefusedError(
                    f"The data of table {key} is not in the dump. No backup was recorded, and no file is "
                    "left: see that the role may read the table."
                )
    return len(entries)


def _record(
    database: Database,
    actor: Actor,
    taken_at: datetime,
    path: Path,
    size: int,
    digest: str,
    recipients: list[str],
    entries: int,
    tables: list[str],
) -> int:
    with database.session("record the backup") as connection, connection.transaction():
        cursor = connection.execute(
            "INSERT INTO public.encryption_backups "
            "(taken_at, location, bytes, sha256, recipient, listed_entries, verified_at, tables, run_id) "
            "VALUES (%s, %s, %s, %s, %s, %s, clock_timestamp(), %s, %s) RETURNING id",
            [taken_at, str(path), size, digest, ",".join(recipients), entries, tables, actor.run_id],
        )
        number = int(saved.only_row(cursor)[0])
        tracking.audit(connection, actor, "backup", backup=number, bytes=size, sha256=digest, tables=tables)
        return number
