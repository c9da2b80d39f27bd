"""Declaratively partitioned tables: the tree of their partitions, and locks on all of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.schema.definition import TableDefinition

LockMode = Literal["SHARE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"]


@dataclass(frozen=True)
class Part:
    """A table, or one of its partitions.

    Args:
        parent: of which it is a partition; None for the catalogued table itself.
        leaf: whether it holds rows, and not partitions of its own. (Never a foreign table: none can be a partition of
            a table that has a primary key.)
    """

    oid: int
    schema_name: str
    name: str
    parent: int | None
    leaf: bool

    @property
    def identifier(self) -> Identifier:
        return Identifier(self.schema_name, self.name)

    @property
    def key(self) -> str:
        """Its name, as the catalogue has it."""
        return self.name if self.schema_name == "public" else f"{self.schema_name}.{self.name}"


_PARTS = """
SELECT c.oid, n.nspname, c.relname, CASE WHEN p.level > 0 THEN p.parentrelid::oid END, c.relkind <> 'p'
  FROM (SELECT relid, parentrelid, isleaf, level FROM pg_partition_tree(%(table)s)
         UNION ALL
        SELECT %(table)s, NULL, true, 0 WHERE NOT EXISTS (SELECT FROM pg_partition_tree(%(table)s))) AS p
  JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
 ORDER BY p.level, n.nspname, c.relname
"""


def read_parts(connection: Connection, oid: int) -> tuple[Part, ...]:
    """A table and its partitions of every level, parents first; a plain table by itself."""
    return tuple(Part(*row) for row in connection.execute(_PARTS, {"table": oid}))


_CHILDREN = """
SELECT string_agg(format('ALTER TABLE %%s NO INHERIT %%s', i.inhrelid::regclass, i.inhparent::regclass), '; '
                  ORDER BY i.inhrelid::regclass::text)
  FROM pg_inherits i WHERE i.inhparent = %s
"""


def refuse_relatives(connection: Connection, definition: TableDefinition) -> None:
    """Refuse a partition, whose columns are those of the whole, and a table whose rows are other tables' as well.

    Raises:
        ConfigurationError: names the tables that it belongs to, or that inherit from it.
    """
    table = definition.table
    whole = answer(
        connection,
        "SELECT n.nspname || '.' || p.relname FROM pg_class c JOIN pg_inherits i ON i.inhrelid = c.oid "
        "JOIN pg_class p ON p.oid = i.inhparent JOIN pg_namespace n ON n.oid = p.relnamespace "
        "WHERE c.oid = %s AND c.relispartition",
        definition.oid,
    )
    if whole is not None:
        raise ConfigurationError(
            f"Table {table.key} is a partition of {whole}, and has the columns that one has. Put the "
            "partitioned table into the catalogue in its place."
        )
    children = None if definition.partitioned else answer(connection, _CHILDREN, definition.oid)
    if children is not None:
        raise ConfigurationError(
            f"Table {table.key}: other tables inherit from it, whose rows the guard would not see. List them in the "
            f"catalogue as tables of their own, and end the inheritance ({children})."
        )


def lock_parts(connection: Connection, parts: Sequence[Part], mode: LockMode) -> None:
    """Lock a table and its partitions, parents first, in the caller's transaction.

    ``lock_timeout`` counts for each lock by itself; here all of them together wait no longer than it says, because the
    application queues behind the first while the last is waited for.

    Raises:
        psycopg.errors.LockNotAvailable: in vain.
    """
    allowed = answer(connection, "SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'")
    deadline = time.monotonic() + allowed / 1000
    for part in parts:
        if allowed:
            left = max(1, int((deadline - time.monotonic()) * 1000))
            connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{left}ms"])
        connection.execute(SQL("LOCK TABLE ONLY {} IN {} MODE").format(part.identifier, SQL(mode)))
    if allowed:
        connection.execute("SELECT set_config('lock_timeout', %s, true)", [f"{allowed}ms"])


def lock_partitions(connection: Connection, definition: TableDefinition, mode: LockMode) -> None:
    """As :func:`lock_parts`, before a statement that changes a partitioned table; a plain table is left to it."""
    if definition.partitioned:
        lock_parts(connection, read_parts(connection, definition.oid), mode)
