"""The restore drill: a backup counts for more once it was restored and found equal to the original.

The original goes on being written meanwhile. So ``pg_dump`` dumps under the exported snapshot of a session that
computes the original's checksums as well (PostgreSQL manual, 9.28.5 "Snapshot Synchronization Functions"). A scratch
database whose process was killed is known by its name and the lock that nobody holds any more, and removed by the next
drill.
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, cast

import psycopg
import pyrage  # type: ignore[import-untyped,unused-ignore]
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.postgres import locks, scratch
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer
from alphapulse_encryption.migration.postgres.programs import (
    Pair,
    PipeWriter,
    way_to,
)

_PREFIX = "encryption_drill"
# While we hold our locks for pg_dump's sake, it may wait behind somebody who waits for us: that has to end.
LOCK_WAIT = "60s"


@dataclass(frozen=True)
class Contents:
    """What a table holds."""

    rows: int
    # The sum of 128 bits of every row's SHA-256, of its text form: does not depend on their order.
    checksum: str


# Schema and name of a table.
TableName = tuple[str, str]


@dataclass(frozen=True)
class DrillResult:
    """What a drill that succeeded compared, and how long it took, the original's checksums too."""

    tables: int
    rows: int
    seconds: float


# Ordinary tables and partitions, but for those that come with an extension: pg_dump leaves these to it.
_TABLES = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind = 'r' AND c.relpersistence <> 't' AND n.nspname !~ '^pg_' AND n.nspname <> 'information_schema'
   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid
                      AND d.deptype = 'e')
 ORDER BY 1, 2
"""

# The row's text form under the session settings that `Database.connect` makes. Converting to the database's own
# encoding converts nothing: so every byte counts, those of SQL_ASCII too.
_CONTENTS = """
SELECT count(*), coalesce(sum(('x' || substr(h, 1, 16))::bit(64)::bigint), 0)::text || ' '
              || coalesce(sum(('x' || substr(h, 17, 16))::bit(64)::bigint), 0)::text
  FROM (SELECT encode(sha256(convert_to(ROW(t.*)::text, getdatabaseencoding())), 'hex') AS h FROM ONLY {} AS t) AS r
"""


def read_tables(connection: Connection) -> tuple[TableName, ...]:
    """The tables whose rows a dump holds."""
    return tuple((schema, name) for schema, name in connection.execute(_TABLES))


def read_contents(connection: Connection, table: TableName) -> Contents:
    """Count and checksum of a table's rows, computed by the server."""
    (row,) = connection.execute(SQL(_CONTENTS).format(Identifier(*table)))
    return Contents(*row)


def read_everything(connection: Connection) -> dict[TableName, Contents]:
    """What every table of the database holds."""
    return {table: read_contents(connection, table) for table in read_tables(connection)}


@contextlib.contextmanager
def hold_snapshot(database: Database) -> Iterator[Connection]:
    """A transaction that sees one moment of the original, which a dump and the checksums can both speak of.

    Its tables keep their form until the end of the block: an ``ALTER TABLE`` waits for us, reads and writes do not.

    Raises:
        DatabaseFailure: a table is locked by somebody else for too long.
    """
    with (
        database.session("hold a snapshot of the database for the backup") as connection,
        connection.transaction(),
    ):
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        connection.execute("SELECT set_config('lock_timeout', %s, true)", [LOCK_WAIT])
        if tables := read_tables(connection):
            names = SQL(", ").join(SQL("ONLY {}").format(Identifier(*table)) for table in tables)
            connection.execute(SQL("LOCK TABLE {} IN ACCESS SHARE MODE").format(names))
        yield connection


def refuse_unless_possible(server: Database) -> bool:
    """Find out before a long dump that there could be no drill after it; whether the server is reached over TLS.

    Raises:
        RefusedError: the role may not make a scratch database there.
        ConfigurationError: it cannot be reached.
    """
    with server.session("prepare the restore drill") as connection:
        scratch.refuse_unless_possible(connection, "The restore drill", "ALPHAPULSE_RESTORE_DRILL_URL")
        _remove_abandoned(connection)
        return bool(connection.pgconn.ssl_in_use)


def rehearse(
    server: Database,
    original: Database,
    expected: Mapping[TableName, Contents],
    pair: Pair,
    file: IO[bytes],
    identity: str,
    listing: str,
) -> None:
    """Restore a backup into a scratch database, and compare every table's rows with what they were.

    Args:
        original: whose encoding and locale the scratch database gets.
        expected: what the original held at the moment of the dump.
        listing: what pg_restore says is in the backup.

    Raises:
        RefusedError: it cannot be restored, or is not equal; names the tables.
    """
    with original.session("read the database's locale") as connection:
        like = scratch.read_like(connection)

    def decrypted(process: subprocess.Popen[bytes]) -> int:
        status = decrypt_into(process, file, identity)
        if status is None:
            raise RefusedError(
                "The backup that was just written cannot be decrypted. No backup was recorded, and no file is "
                "left: check the disk, and take it again."
            )
        return status

    with scratch_database(server, like) as restored:
        problem, _ = scratch.restore(way_to(restored, unlogged=True), pair, listing, like, decrypted)
        if problem:
            raise RefusedError(
                f"The restore drill failed: {problem}. No backup was recorded, and no file is left."
            )
        with restored.session("compare the restored database") as connection:
            found = read_everything(connection)
    differences = _differences(expected, found)
    if differences:
        raise RefusedError(
            f"The backup was restored, and is not equal to the original: {'; '.join(differences)}. No backup was "
            "recorded, and no file is left: check the disks, and take it again."
        )


def _differences(expected: Mapping[TableName, Contents], found: Mapping[TableName, Contents]) -> list[str]:
    differences = []
    for table in sorted({*expected, *found}):
        name, there, restored = ".".join(table), expected.get(table), found.get(table)
        if restored is None:
            differences.append(f"table {name} is missing")
        elif there is None:
            differences.append(f"table {name} was not there")
        elif there.rows != restored.rows:
            differences.append(f"table {name} has {restored.rows:,} rows in place of {there.rows:,}")
        elif there != restored:
            differences.append(f"table {name} has other values")
    return differences


def decrypt_into(process: subprocess.Popen[bytes], file: IO[bytes], identity: str) -> int | None:
    """Decrypt a backup, all of it, for a child that reads it; the child's exit status, None for a damaged file."""
    file.seek(0)
    entrance = cast(IO[bytes], process.stdin)
    try:
        pyrage.decrypt_io(file, PipeWriter(entrance), [pyrage.x25519.Identity.from_str(identity)])
    except (pyrage.DecryptError, OSError):  # of the header, and of what follows it
        process.kill()
        return None
    with contextlib.suppress(BrokenPipeError):
        entrance.close()
    return process.wait()


@contextlib.contextmanager
def scratch_database(server: Database, like: scratch.Like) -> Iterator[Database]:
    """A new, empty database for the length of the block, beside another one of its server; as its owner."""
    with server.session("make a scratch database for the restore drill") as connection:
        _remove_abandoned(connection)
        name = f"{_prefix(connection)}{secrets.token_hex(6)}"
        # Held for as long as this session lasts; only then does anybody else remove the database.
        locks.hold(connection, name)
        try:
            yield scratch.make(server, connection, name, like)
        finally:
            _remove(server, connection, name)


def _remove(server: Database, connection: Connection, name: str) -> None:
    try:
        scratch.drop(connection, name)
    except psycopg.Error:
        # The session may be the one that was lost; what cannot be removed now is found by the next drill.
        with contextlib.suppress(MigrationError), server.session("remove the scratch database") as another:
            scratch.drop(another, name)


def _prefix(connection: Connection) -> str:
    # Locks are per database: only who is connected to the same one can tell whether a drill is under way.
    oid = answer(connection, "SELECT oid FROM pg_database WHERE datname = current_database()")
    return f"{_PREFIX}_{oid}_"


def _remove_abandoned(connection: Connection) -> None:
    """Remove the scratch databases of drills that were killed, where this role may."""
    prefix = _prefix(connection)
    left = connection.execute(
        "SELECT datname FROM pg_database WHERE starts_with(datname, %s) AND pg_has_role(datdba, 'MEMBER')",
        [prefix],
    ).fetchall()
    for (name,) in left:
        if not locks.try_hold(connection, name):
            continue
        try:
            scratch.drop(connection, name)
        finally:
            locks.release(connection, name)
    scratch.drop_abandoned_owners(connection, prefix)
