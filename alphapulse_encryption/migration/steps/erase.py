"""After the drop, in a maintenance window: rewrite the table and the planner's statistics, then look what remains.

``DROP COLUMN`` erases nothing: the values stay in the row versions until these are written again (PostgreSQL manual,
``ALTER TABLE``, notes), and in old versions of the planner's statistics. ``VACUUM FULL`` writes both again. It takes
the table's ACCESS EXCLUSIVE lock for as long as that lasts: nobody reads or writes the table meanwhile.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import LiteralString

import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.ddl import LOCK_TIMEOUT, maintain, outside_transaction
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.steps import residual_data
from alphapulse_encryption.migration.steps.residual_data import Place
from alphapulse_encryption.migration.target import Target

_STATISTICS = ("pg_statistic", "pg_statistic_ext_data")
_REWRITE = f"VACUUM (FULL) {', '.join(f'pg_catalog.{name}' for name in _STATISTICS)}"


@dataclass(frozen=True)
class Look:
    """What it took to look for known values, before and after.

    Args:
        database: bytes of the database's own files; so are ``wal`` and ``other``, of other files.
        most_wal: bytes of write-ahead log that the server means to keep at most; 0 where it sets no limit.
    """

    seconds: float = 0.0
    database: int = 0
    wal: int = 0
    most_wal: int = 0
    other: int = 0


@dataclass(frozen=True)
class ErasureResult:
    """What :func:`erase_dropped` did and saw.

    Args:
        bytes_before: size with indexes and TOAST.
        statistics_left: why the planner's statistics were not rewritten, and what to do; empty where they were.
        checkpointed: whether the files were made to show what the server has in memory; not every role may.
        values: how many known values were looked for.
        unsearchable: columns of which none could be.
        locked_seconds: how long the table was rewritten, under its lock.
    """

    table: str
    bytes_before: int
    bytes_after: int
    statistics_left: str
    checkpointed: bool
    values: int
    unsearchable: tuple[str, ...]
    places: tuple[Place, ...]
    locked_seconds: float
    look: Look
    seconds: float

    @property
    def remaining(self) -> tuple[Place, ...]:
        """The places that were to be clean and are not."""
        return tuple(place for place in self.places if place.erasable and place.finding == "found")


def erase_dropped(target: Target, table: Table, *, confirmation: str) -> ErasureResult:
    """Rewrite a table whose plaintext was dropped, and the planner's statistics; then look for known values.

    May be run again at any time, also after it was killed.

    Args:
        confirmation: the table's key, typed by a person.

    Raises:
        RefusedError: wrong confirmation, the plaintext is not dropped, the table's lock cannot be had, or the role may
            not rewrite it.
        DecryptionError: a value cannot be opened.
    """
    if confirmation != table.key:
        raise RefusedError(
            f"The confirmation is not the name of the table. Type {table.key} exactly; nothing was rewritten."
        )
    started = time.monotonic()
    with target.database.session(f"erase what was dropped from {table.key}") as connection:
        check_key(connection, target.keys)
        state = require_state(connection, table)
        dropped = saved_ddl.latest(connection, table, target.keys)
        if state.state is not State.DROPPED or dropped is None:
            raise RefusedError(
                f"The plaintext of {table.key} is not dropped, so there is nothing to erase; nothing was rewritten."
            )
        definition = read_table(connection, table, plaintext=False)
        parts = read_parts(connection, definition.oid)
        oids = [part.oid for part in parts]
        types = {column.name: column.type for column in dropped.columns}
        values = residual_data.sample_values(connection, definition, types, target.cipher)
        began = time.monotonic()
        _checkpoint(connection)
        # While they are still there: it shows what the later look is worth.
        files = residual_data.open_data_files(connection)
        before, looked = residual_data.look_into_table(connection, files, oids, values)
        looking = time.monotonic() - began
        began = time.monotonic()
        for part in parts:
            if part.leaf and not _rewrite(connection, part.schema_name, part.name):
                raise RefusedError(
                    f"The server did not rewrite {part.schema_name}.{part.name}: this role may not vacuum it. Let its "
                    f"owner erase {table.key}."
                )
        locked = time.monotonic() - began
        maintain(connection, SQL("ANALYZE {}").format(definition.identifier))
        left = "; ".join(dict.fromkeys(filter(None, (_left(connection, name) for name in _STATISTICS))))
        checkpointed = _checkpoint(connection)
        began = time.monotonic()
        files = residual_data.open_data_files(connection)
        places = [
            replace(place, before=before.get(place.name)) if place.erasable else place
            for place in residual_data.look_everywhere(
                connection, files, definition, oids, values, statistics_left=left
            )
        ]
        looking += time.monotonic() - began
        read = {place.name: place.bytes for place in places}
        wal, other = read.pop(residual_data.WAL), read.pop(residual_data.OTHER_FILES)
        most = answer(connection, "SELECT pg_size_bytes(current_setting('max_wal_size'))")
        result = ErasureResult(
            table=table.key,
            bytes_before=definition.total_bytes,
            bytes_after=read_table(connection, table, plaintext=False).total_bytes,
            statistics_left=left,
            checkpointed=checkpointed,
            values=len(values.patterns),
            unsearchable=values.unsearchable,
            places=tuple(places),
            locked_seconds=locked,
            look=Look(looking, looked + sum(read.values()), wal, most, other),
            seconds=time.monotonic() - started,
        )
        audit(
            connection,
            target.actor,
            "erase_dropped",
            table,
            bytes_before=result.bytes_before,
            bytes_after=result.bytes_after,
            statistics_rewritten=not left,
            found_in=[place.name for place in places if place.finding == "found"],
        )
    return result


def _left(connection: Connection, name: str) -> str:
    """Rewrite one of the tables that hold the planner's statistics; why that cannot be done, if so."""
    try:
        if _rewrite(connection, "pg_catalog", name):
            return ""
    except RefusedError as error:
        return str(error.args[0]).removesuffix(".")
    except psycopg.errors.InsufficientPrivilege:
        pass
    return f"this role may not rewrite them. Let a superuser or the database's owner run {_REWRITE}, and run again"


def _rewrite(connection: Connection, schema: str, name: str) -> bool:
    """``VACUUM FULL``; returns whether the table has another file now. Where a role may not, the server only warns."""
    table = Identifier(schema, name)
    file: LiteralString = "SELECT pg_relation_filepath(to_regclass(%s))"
    before = answer(connection, file, table.as_string(connection))
    outside_transaction(
        connection,
        f"rewrite {schema}.{name}",
        lambda: maintain(connection, SQL("VACUUM (FULL) {}").format(table)),
        # Whoever wants the table queues behind us while we wait.
        lock_timeout=LOCK_TIMEOUT,
    )
    return bool(answer(connection, file, table.as_string(connection)) != before)


def _checkpoint(connection: Connection) -> bool:
    """Write what the server has in memory to its files, and have it remove those that were replaced."""
    try:
        connection.execute("CHECKPOINT")
    except psycopg.errors.InsufficientPrivilege:
        return False
    return True
