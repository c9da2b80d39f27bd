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
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, LiteralString, cast

import bech32
import pyrage  # type: ignore[import-untyped,unused-ignore]
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.backups import Backup, record_backup
from alphapulse_encryption.migration.bookkeeping.keys import ensure_key
from alphapulse_encryption.migration.gates import drill
from alphapulse_encryption.migration.gates.drill import DrillResult
from alphapulse_encryption.migration.postgres import programs
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.target import Target

NOT_OLDER_THAN_HOURS = 24
_KEY_CONTEXT = "alphapulse_encryption backup"
_KEY_INFO = b"alphapulse_encryption backup v1"
_IDENTITY_PREFIX = "age-secret-key-"  # age's specification, section "X25519 recipient stanza"

_DUMP = b"PGDMP"  # what pg_dump's custom format begins with
_CHUNK = 1024 * 1024

_SUFFIX = ".dump.age"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class BackupResult:
    """What :func:`take_backup` did.

    Args:
        recipients: who can open it, as age's public keys; the first is derived from the master key.
        listed_entries: entries that ``pg_restore --list`` found in it.
        drill: what the restore drill compared; None where none was asked for.
        dump_seconds: of all the seconds, those of ``pg_dump`` and the encryption.
        read_back_seconds: those of the decryption and the list.
    """

    backup: Backup
    recipients: tuple[str, ...]
    listed_entries: int
    drill: DrillResult | None
    seconds: float
    dump_seconds: float
    read_back_seconds: float


def backup_identity(keys: KeyRing, version: int | None = None) -> str:
    """The age identity (``AGE-SECRET-KEY-1…``) that opens backups; a secret like the master key itself.

    An X25519 key of HKDF-SHA256 (RFC 5869) over a key derived from a version's master key, the current one's where none
    is given, under a context of its own.
    """
    material = keys.derive(_KEY_CONTEXT, version or keys.current_version)
    secret = HKDF(algorithm=SHA256(), length=32, salt=None, info=_KEY_INFO).derive(material)
    digits = cast(list[int], bech32.convertbits(secret, 8, 5))
    return str(bech32.bech32_encode(_IDENTITY_PREFIX, digits)).upper()


def take_backup(
    target: Target,
    catalogue_tables: Sequence[Table],
    *,
    directory: Path,
    bin_dirs: Sequence[Path],
    recipients: Sequence[str] = (),
    drill_server: Database | None = None,
) -> BackupResult:
    """Dump the whole database into an encrypted file, read it back, and record it.

    Nothing is recorded, and no file is left, unless all of it went well, the restore drill included.

    Args:
        catalogue_tables: the tables whose data has to be in it.
        directory: where to; made where it is missing.
        bin_dirs: where to look for ``pg_dump`` and ``pg_restore``.
        recipients: further age recipients (``age1…``) who can open it without the master key.
        drill_server: a database on the server to restore on for comparison; None for no restore drill.

    Raises:
        ConfigurationError: ``pg_dump`` missing or older than the server, an invalid recipient, the directory
            cannot be written, or the database cannot be reached.
        RefusedError: the dump failed, or what was written does not hold every table, or does not restore to what
            the original was.
    """
    started = time.monotonic()
    identity = backup_identity(target.keys)
    to = [pyrage.x25519.Identity.from_str(identity).to_public(), *map(_recipient, recipients)]
    told = [str(recipient) for recipient in to]
    with target.database.session("take a backup") as connection:
        ensure_key(connection, target.keys)
        expected = {table.key: _relations(connection, table) for table in catalogue_tables}
        ((taken_at, name),) = connection.execute("SELECT clock_timestamp(), current_database()")
    way = programs.way_to(target.database)
    tls = drill_server is not None and drill.refuse_unless_possible(drill_server)
    pair = programs.choose(bin_dirs, way.server, tls=way.tls or tls)
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "database"
    path = directory.absolute() / f"{safe}-{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}{_SUFFIX}"
    with _new_file(path) as (file, keep):
        held = contextlib.nullcontext() if drill_server is None else drill.hold_snapshot(target.database)
        with held as holder:
            command = programs.dump_command(pair, way)
            if holder is not None:
                snapshot = answer(holder, "SELECT pg_export_snapshot()")
                command += [f"--snapshot={snapshot}", f"--lock-wait-timeout={drill.LOCK_WAIT}"]
            digest = _dump(command, way.environment, to, file)
            dumped = time.monotonic()
            contents = drill.read_everything(holder) if holder is not None else {}
        summed = time.monotonic()
        listing = _list(pair.pg_restore, file, identity)
        entries = _check_listing(listing, expected)
        listed = time.monotonic()
        drilled = None
        if drill_server is not None:
            drill.rehearse(drill_server, target.database, contents, pair, file, identity, listing)
            rows = sum(each.rows for each in contents.values())
            drilled = DrillResult(len(contents), rows, summed - dumped + time.monotonic() - listed)
        size = os.fstat(file.fileno()).st_size
        backup = Backup(0, taken_at, str(path), size, digest)
        keep()
        try:
            backup = _recorded(target, backup, list(expected), told, entries, drilled)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return BackupResult(
        backup=backup,
        recipients=tuple(told),
        listed_entries=entries,
        drill=drilled,
        seconds=time.monotonic() - started,
        dump_seconds=dumped - started,
        read_back_seconds=listed - summed,
    )


def is_recent(connection: Connection, backup: Backup) -> bool:
    """Whether a backup is recent enough for a drop: what was written after it is in the ciphertext alone."""
    query: LiteralString = "SELECT %s >= clock_timestamp() - make_interval(hours => %s)"
    return bool(answer(connection, query, backup.taken_at, NOT_OLDER_THAN_HOURS))


def check_backup(backup: Backup, directory: Path, keys: KeyRing) -> None:
    """Hold a backup's file against what was recorded: it is there, not a byte differs, and our identity opens it.

    Args:
        directory: where backups are taken to; a record could name any other file of this machine.

    Raises:
        RefusedError: it is missing, elsewhere, no regular file, cannot be read, or was altered.
    """
    path, again = Path(backup.location), "Take a new one (asset backup)."
    try:
        if path.parent.resolve() != directory.resolve():
            raise RefusedError(
                f"The backup {path} is not in the directory of the backups, {directory}. {again}"
            )
        # A link, what never ends, a pipe that would be waited for; the same again where it is exchanged meanwhile.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise RefusedError(f"The backup {path} is no regular file. {again}")
        with open(path, "rb", opener=_of_a_regular_file) as file:
            if (
                os.fstat(file.fileno()).st_size != backup.bytes
                or _digest(file, backup.bytes) != backup.sha256
            ):
                raise RefusedError(
                    f"The backup {path} was altered since it was taken: its size or checksum differs. {again}"
                )
            if not _opens(file, keys):
                raise RefusedError(
                    f"The backup {path} is no age file that the master key's identity opens. {again}"
                )
    except OSError as error:
        raise RefusedError(f"The backup {path} cannot be read ({error.strerror}). {again}") from None


def _of_a_regular_file(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _digest(file: IO[bytes], size: int) -> str:
    """SHA-256 of so many bytes, also of a file that is being written to."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, _CHUNK))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()


class _Opened(Exception):
    """The first bytes are there."""


class _FirstBytes:
    def write(self, data: bytes) -> int:
        raise _Opened if data.startswith(_DUMP) else OSError

    def flush(self) -> None:
        pass


def _opens(file: IO[bytes], keys: KeyRing) -> bool:
    """Whether an identity of ours opens it, and a dump is in it; of all the rest the checksum tells."""
    file.seek(0)
    identities = [
        pyrage.x25519.Identity.from_str(backup_identity(keys, version)) for version in keys.versions
    ]
    try:
        pyrage.decrypt_io(file, _FirstBytes(), identities)
    except _Opened:
        return True
    except (pyrage.DecryptError, OSError):
        return False
    return False


def _recipient(text: str) -> pyrage.x25519.Recipient:
    try:
        return pyrage.x25519.Recipient.from_str(text.strip())
    except pyrage.RecipientError:
        raise ConfigurationError(
            "A backup recipient is not an age public key: it must begin with age1, as age-keygen prints it."
        ) from None


def _relations(connection: Connection, table: Table) -> set[tuple[str, str]]:
    """Schema and name of the relations that hold the table's rows: itself, or its partitions."""
    parts = read_parts(connection, read_table(connection, table, plaintext=False, look=True).oid)
    return {(part.schema_name, part.name) for part in parts if part.leaf}


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
    running = programs.child(command, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    with running as (process, said):
        try:
            pyrage.encrypt_io(process.stdout, writer, list(recipients))
        except (pyrage.EncryptError, OSError):  # of the header, and of what follows it
            process.kill()
            reason = writer.error.strerror if writer.error else "encryption failed"
            raise RefusedError(
                f"The backup could not be written: {reason}. No backup was recorded; make room in its "
                "directory, or choose another."
            ) from None
        status = process.wait()
    if status != 0:
        raise RefusedError(
            f"pg_dump failed with exit status {status} ({programs.kind_of_failure(said())}). No backup was recorded, "
            "and no file is left."
        )
    file.flush()
    os.fsync(file.fileno())
    return writer.digest.hexdigest()


def _list(pg_restore: str, file: IO[bytes], identity: str) -> str:
    """Decrypt the whole file again, which authenticates every byte, and have pg_restore list what is in it."""
    listed = programs.listing(pg_restore, lambda process: drill.decrypt_into(process, file, identity))
    if listed is None:
        raise RefusedError(
            "The backup that was just written cannot be read back. No backup was recorded, and no file is left: "
            "check the disk, and take it again."
        )
    return listed


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


def _recorded(
    target: Target,
    backup: Backup,
    tables: list[str],
    recipients: list[str],
    entries: int,
    drilled: DrillResult | None,
) -> Backup:
    """The backup with its number."""
    with target.database.session("record the backup") as connection, connection.transaction():
        recorded = record_backup(
            *(connection, target.keys, target.actor, backup),
            recipients=recipients,
            entries=entries,
            tables=tables,
            drill=None if drilled is None else asdict(drilled),
        )
        audit(
            *(connection, target.actor, "backup"),
            backup=recorded.id,
            bytes=recorded.bytes,
            sha256=recorded.sha256,
            tables=tables,
            drilled=drilled is not None,
        )
    return recorded
