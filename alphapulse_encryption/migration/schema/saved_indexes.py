"""Puts saved indexes back beside the application; one of a partitioned table partition by partition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction, outside_transaction
from alphapulse_encryption.migration.postgres.stored import execute_one
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.indexes import LOOKS_AT_PARTITIONS
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.partitions import Part, lock_parts, read_parts
from alphapulse_encryption.migration.schema.saved_ddl import SavedConstraint, SavedIndex, comment_on
from alphapulse_encryption.migration.schema.sql import verbatim


def put_back(
    connection: Connection,
    definition: TableDefinition,
    index: SavedIndex,
    constraint: SavedConstraint | None = None,
    partition: tuple[str, str] | None = None,
) -> None:
    """Build an index; what an interrupted build left is gone on with, or built again.

    Args:
        connection: in autocommit mode.
        constraint: the unique one that it enforces; of a partitioned table it is added here, because an index there
            can belong to one from its beginning only.
        partition: that has it of its own; nothing is done where that is gone.

    Raises:
        RefusedError: a lock could not be had, or partitions come all the while; what is built stays.
    """
    for _ in range(LOOKS_AT_PARTITIONS):
        parts = read_parts(connection, definition.oid)
        wanted = partition or (definition.table.schema_name, definition.table.name)
        part = next((p for p in parts if (p.schema_name, p.name) == wanted), None)
        if part is None:
            return
        if part.leaf:
            _build(connection, part, index)
            return
        _tree(connection, parts, part, index, constraint)
        if _is_usable(connection, part, index.name):
            _dress(connection, part, index)
            return
    raise RefusedError(
        f"The index {index.name} of {definition.table.key} did not become valid: partitions were added meanwhile. Run "
        "the step again."
    )


def _is_usable(connection: Connection, part: Part, name: str) -> bool | None:
    """As :func:`.indexes.is_usable`, of a partition."""
    usable: bool | None = answer(
        connection,
        "SELECT x.indisvalid AND x.indisready FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
        "WHERE x.indrelid = %s AND i.relname = %s",
        *(part.oid, name),
    )
    return usable


def _tree(
    connection: Connection,
    parts: tuple[Part, ...],
    part: Part,
    index: SavedIndex,
    constraint: SavedConstraint | None,
) -> None:
    """The index of one part, and those of the parts below it, attached."""

    def execute(*statements: Composed) -> None:
        def run() -> None:
            lock_parts(connection, parts, "ACCESS EXCLUSIVE")
            for statement in statements:
                execute_one(connection, statement)

        in_short_transaction(connection, f"put back the index {index.name}", run)

    name = Identifier(index.name)
    if part.leaf:
        _build(connection, part, index)
        if constraint is not None and not _is_constraint(connection, part, index.name):
            execute(
                SQL("ALTER TABLE {} ADD CONSTRAINT {} UNIQUE USING INDEX {} {} {}").format(
                    part.identifier, name, name, *_when(constraint)
                )
            )
        return
    if _is_usable(connection, part, index.name) is None:
        # Without the partitions' rows; it becomes valid with the last one that is attached (CREATE INDEX, ONLY).
        unique = SQL("ALTER TABLE ONLY {} ADD CONSTRAINT {} {}")
        with _in_tablespace(connection, index):
            execute(
                verbatim(index.definition)
                if constraint is None
                else unique.format(part.identifier, name, verbatim(constraint.definition))
            )
    saved = dict(index.parts)
    for child in (p for p in parts if p.parent == part.oid):
        if _is_attached(connection, child, part, index.name):
            continue
        below = saved.get((child.schema_name, child.name)) or _of_new(child, index)
        _tree(connection, parts, child, below.model_copy(update={"parts": index.parts}), constraint)
        execute(
            SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
                Identifier(part.schema_name, index.name), Identifier(child.schema_name, below.name)
            )
        )


def _when(constraint: SavedConstraint) -> tuple[SQL, SQL]:
    return (
        SQL("DEFERRABLE" if constraint.deferrable else "NOT DEFERRABLE"),
        SQL("INITIALLY DEFERRED" if constraint.deferred else "INITIALLY IMMEDIATE"),
    )


def _of_new(child: Part, index: SavedIndex) -> SavedIndex:
    """The index of a partition that came after the drop, by that of the part above it."""
    name = short_name(f"{child.name}_{index.name}")
    create, _, rest = index.definition.partition(" USING ")
    definition = SQL("CREATE {}INDEX {} ON {}{} USING {}").format(
        SQL("UNIQUE " if create.startswith("CREATE UNIQUE") else ""),
        Identifier(name),
        SQL("" if child.leaf else "ONLY "),
        child.identifier,
        verbatim(rest),
    )
    return SavedIndex(name=name, definition=definition.as_string(None), tablespace=index.tablespace)


def _is_constraint(connection: Connection, part: Part, name: str) -> bool:
    query = "SELECT EXISTS (SELECT FROM pg_constraint WHERE conrelid = %s AND conname = %s)"
    return bool(answer(connection, query, part.oid, name))


def _is_attached(connection: Connection, child: Part, parent: Part, name: str) -> bool:
    return bool(
        answer(
            connection,
            "SELECT EXISTS (SELECT FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid "
            "JOIN pg_class p ON p.oid = i.inhparent JOIN pg_index w ON w.indexrelid = p.oid "
            "WHERE x.indrelid = %s AND w.indrelid = %s AND p.relname = %s)",
            *(child.oid, parent.oid, name),
        )
    )


@contextmanager
def _in_tablespace(connection: Connection, index: SavedIndex) -> Iterator[None]:
    # One that is gone since the drop, or closed to us, must not keep the rows' plaintext from coming back.
    connection.execute(
        "SELECT set_config('default_tablespace', coalesce((SELECT spcname FROM pg_tablespace WHERE spcname = %s "
        "AND has_tablespace_privilege(oid, 'CREATE')), ''), false)",
        [index.tablespace],
    )
    try:
        yield
    finally:
        if not connection.broken:
            connection.execute("SELECT set_config('default_tablespace', '', false)")


def _build(connection: Connection, part: Part, index: SavedIndex) -> None:
    name = Identifier(part.schema_name, index.name)
    doing = f"build the index {index.name}"

    def build() -> None:
        # What an interrupted build left, or the try before this one.
        if _is_usable(connection, part, index.name) is False:
            connection.execute(SQL("DROP INDEX CONCURRENTLY {}").format(name))
        execute_one(connection, verbatim(index.definition.replace(" INDEX ", " INDEX CONCURRENTLY ", 1)))

    if not _is_usable(connection, part, index.name):
        try:
            with _in_tablespace(connection, index):
                outside_transaction(connection, doing, build)
        except psycopg.Error:
            # An invalid index costs the application's writes what a valid one does, and serves nobody.
            if not connection.broken:
                drop = SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(name)
                outside_transaction(connection, doing, partial(connection.execute, drop))
            raise
    _dress(connection, part, index)


def _dress(connection: Connection, part: Part, index: SavedIndex) -> None:
    """What its definition does not tell."""
    name = Identifier(part.schema_name, index.name)
    if index.comment is not None:
        connection.execute(comment_on("INDEX", name, index.comment))
    for number, target in index.statistics.items():
        change = SQL("ALTER INDEX {} ALTER COLUMN {} SET STATISTICS {}")
        connection.execute(change.format(name, Literal(number), Literal(target)))
    if index.clustered:
        cluster = SQL("ALTER TABLE {} CLUSTER ON {}").format(part.identifier, Identifier(index.name))
        in_short_transaction(
            connection, f"cluster by the index {index.name}", partial(connection.execute, cluster)
        )
