"""Indexes on the search columns, built after the backfill and beside the running application, then statistics."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration import sql, tracking
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.ddl import outside_transaction
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]

_LONGEST_NAME = 63  # bytes: NAMEDATALEN - 1 (PostgreSQL manual, 4.1.1)


@dataclass(frozen=True)
class WantedIndex:
    """An index the table is to have.

    Args:
        name: its name.
        columns: its key columns.
        unique: whether it is unique; None, after a drop, leaves it as it was carried over before.
        pending_only: whether it holds pending rows only.
    """

    name: str
    columns: tuple[str, ...]
    unique: bool | None
    pending_only: bool = False


@dataclass(frozen=True)
class IndexResult:
    """What :func:`build_search_indexes` did.

    Args:
        created: names of the indexes built now.
        existing: names of those found valid.
        rebuilt: of those created, the ones whose earlier build had been interrupted.
        analysed: whether statistics were taken.
        bytes: size of all of them together.
        seconds: duration.
    """

    created: tuple[str, ...]
    existing: tuple[str, ...]
    rebuilt: tuple[str, ...]
    analysed: bool
    bytes: int
    seconds: float

    @property
    def changed(self) -> bool:
        return bool(self.created)


# Types whose values are equal exactly when their texts are: for others (numeric, citext, interval, jsonb, …) two
# equal values can have two tokens, and a unique index on tokens would let both in.
_TEXTUALLY_UNIQUE = [
    "text",
    "varchar",
    "bpchar",
    "name",
    "uuid",
    "bool",
    "int2",
    "int4",
    "int8",
    "oid",
    "date",
    "bytea",
    "timestamp",
    "timestamptz",
]

# What a unique index on tokens cannot do: expressions, conditions, deferred checks, NULLs that count as equal,
# and equality other than that of the text.
_UNIQUE = """
SELECT i.relname, array_agg(a.attname::text ORDER BY k.position),
       x.indpred IS NOT NULL OR 0 = ANY (x.indkey::int2[]) OR NOT x.indimmediate
         OR coalesce((to_jsonb(x) ->> 'indnullsnotdistinct')::boolean, false)
         OR bool_or(a.attname = ANY (%s) AND NOT (t.typname = ANY (%s) AND t.typnamespace = 'pg_catalog'::regnamespace
                    AND coalesce(c.collisdeterministic, true)))
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
 CROSS JOIN unnest(x.indkey::int2[], x.indcollation::oid[]) WITH ORDINALITY AS k (attnum, collation_id, position)
  LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
  LEFT JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_collation c ON c.oid = k.collation_id
 WHERE x.indrelid = %s AND x.indisunique AND x.indisvalid AND NOT x.indisprimary AND k.position <= x.indnkeyatts
 GROUP BY i.relname, x.indexrelid, x.indpred, x.indkey, x.indimmediate, to_jsonb(x)
 ORDER BY i.relname
"""


@dataclass(frozen=True)
class UniqueIndex:
    """A unique index that a catalogued plaintext column takes part in.

    Args:
        name: the index.
        columns: its key columns.
        portable: whether the search columns can carry the same guarantee.
    """

    name: str
    columns: tuple[str, ...]
    portable: bool


def unique_indexes(connection: Connection, definition: TableDefinition) -> tuple[UniqueIndex, ...]:
    """The unique indexes on plaintext columns, which have to be carried over to the search columns."""
    sensitive = {column.name: column for column in definition.table.columns}
    found = []
    parameters = [list(sensitive), _TEXTUALLY_UNIQUE, definition.oid]
    for name, columns, special in connection.execute(_UNIQUE, parameters):
        touched = [sensitive[column] for column in columns if column in sensitive]
        if touched:
            portable = not special and all(column.searchable for column in touched)
            found.append(UniqueIndex(name, tuple(columns), portable))
    return tuple(found)


def wanted_indexes(connection: Connection, definition: TableDefinition) -> tuple[WantedIndex, ...]:
    """The indexes the table is to have, as its catalogue entry and its unique constraints ask for."""
    table = definition.table
    uniques = [index for index in unique_indexes(connection, definition) if index.portable]
    alone = {index.columns[0] for index in uniques if len(index.columns) == 1}
    wanted = [
        WantedIndex(
            column.search_index,
            (column.search,),
            column.name in alone if column.name in definition.columns else None,
        )
        for column in table.columns
        if column.search_index is not None
    ]
    search = {column.name: column.search for column in table.columns}
    for index in uniques:
        if len(index.columns) > 1:
            columns = tuple(search.get(name, name) for name in index.columns)
            wanted.append(WantedIndex(_short(f"{index.name}_search"), columns, unique=True))
    if definition.plaintext_columns:
        wanted.append(
            WantedIndex(
                pending_index(table), tuple(key.name for key in definition.key), False, pending_only=True
            )
        )
    return tuple(wanted)


def pending_index(table: Table) -> str:
    """Name of the partial index that answers "what is pending" in time proportional to the answer."""
    return _short(f"{table.name}{sql.PENDING_INDEX_SUFFIX}")


def _short(name: str) -> str:
    if len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"encryption_{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def build_search_indexes(database: Database, table: Table, actor: Actor) -> IndexResult:
    """Build what is missing of the table's indexes, concurrently, and take statistics.

    An index left unfinished by an interrupted build is dropped and built again.

    Args:
        database: the target.
        table: the catalogue's entry.
        actor: who does it.

    Raises:
        RefusedError: columns not added, or two rows would share one token of a unique column.
        ConfigurationError: an index of a wanted name is there and is another one.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with database.session(f"build the search indexes of {table.key}") as connection:
        tracking.require_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        created: list[str] = []
        rebuilt: list[str] = []
        existing: list[str] = []
        for index in wanted_indexes(connection, definition):
            state = _state(connection, definition, index)
            if state == "valid":
                existing.append(index.name)
                continue
            if state == "unfinished":
                _drop(connection, definition, index)
                rebuilt.append(index.name)
            _build(connection, definition, index)
            tracking.audit(connection, actor, "create_index", table, index=index.name, unique=index.unique)
            created.append(index.name)
        analysed = bool(created) or not _analysed_since(connection, table)
        if analysed:
            connection.execute(SQL("ANALYZE {}").format(definition.identifier))
            tracking.audit(connection, actor, "analyze", table)
        size = connection.execute(
            "SELECT coalesce(sum(pg_relation_size(c.oid)), 0)::bigint FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = ANY(%s)",
            [table.schema_name, created + existing],
        ).fetchone()
    return IndexResult(
        created=tuple(created),
        existing=tuple(existing),
        rebuilt=tuple(rebuilt),
        analysed=analysed,
        bytes=size[0] if size is not None else 0,
        seconds=time.monotonic() - started,
    )


def _analysed_since(connection: Connection, table: Table) -> bool:
    """Whether statistics were taken after the last index was built: a killed build leaves that undone."""
    row = connection.execute(
        "SELECT coalesce(max(id) FILTER (WHERE action = 'analyze'), 0) "
        " >= coalesce(max(id) FILTER (WHERE action = 'create_index'), 0) "
        "FROM public.encryption_audit_log WHERE table_name = %s",
        [table.key],
    ).fetchone()
    return bool(row and row[0])


def _comment(definition: TableDefinition) -> str:
    """Of the pending index; written last, so that one without it is unfinished, or of another catalogue."""
    return f"alphapulse_encryption {definition.shape()}"


def _state(connection: Connection, definition: TableDefinition, index: WantedIndex) -> str:
    row = connection.execute(
        "SELECT x.indrelid = %s AND x.indisunique = coalesce(%s, x.indisunique) AND (x.indpred IS NOT NULL) = %s AND "
        "  (SELECT array_agg(a.attname::text ORDER BY k.position) FROM unnest(x.indkey::int2[]) "
        "   WITH ORDINALITY AS k (attnum, position) JOIN pg_attribute a "
        "   ON a.attrelid = x.indrelid AND a.attnum = k.attnum) = %s, x.indisvalid AND x.indisready, "
        "  obj_description(c.oid, 'pg_class') "
        "FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index x ON x.indexrelid = c.oid "
        "WHERE n.nspname = %s AND c.relname = %s",
        [
            definition.oid,
            index.unique,
            index.pending_only,
            list(index.columns),
            definition.table.schema_name,
            index.name,
        ],
    ).fetchone()
    if row is None:
        return "missing"
    same, valid, comment = row
    if not same:
        raise ConfigurationError(
            f"{definition.table.schema_name}.{index.name} exists and is not the index that {definition.table.key} "
            f"needs ({'unique, ' if index.unique else ''}on {', '.join(index.columns)}). Rename it, or choose "
            "another search_index in the catalogue."
        )
    # What a pending row is follows the catalogue: an index of another catalogue would not find all of them.
    outdated = index.pending_only and comment != _comment(definition)
    return "unfinished" if outdated or not valid else "valid"


def _drop(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    statement = SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(
        Identifier(definition.table.schema_name, index.name)
    )
    outside_transaction(
        connection, f"drop the unfinished index {index.name}", lambda: connection.execute(statement)
    )


def _build(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    if index.unique:
        _refuse_collisions(connection, definition, index)
    statement = SQL("CREATE {unique} INDEX CONCURRENTLY {name} ON {table} ({columns}) {condition}").format(
        unique=SQL("UNIQUE" if index.unique else ""),
        name=Identifier(index.name),
        table=definition.identifier,
        columns=SQL(", ").join(Identifier(column) for column in index.columns),
        condition=SQL("WHERE {}").format(sql.row_pending(definition, definition.table.name))
        if index.pending_only
        else SQL(""),
    )
    try:
        outside_transaction(
            connection, f"build the index {index.name}", lambda: connection.execute(statement)
        )
        if index.pending_only:
            connection.execute(
                SQL("COMMENT ON INDEX {} IS {}").format(
                    Identifier(definition.table.schema_name, index.name), Literal(_comment(definition))
                )
            )
    except psycopg.Error:
        if not connection.broken:
            _drop(connection, definition, index)
        raise


def _refuse_collisions(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    columns = SQL(", ").join(Identifier(column) for column in index.columns)
    row = connection.execute(
        SQL(
            "SELECT count(*) FROM (SELECT FROM {table} WHERE {present} GROUP BY {columns} HAVING count(*) > 1) AS g"
        ).format(
            table=definition.identifier,
            present=SQL(" AND ").join(SQL("{} IS NOT NULL").format(Identifier(c)) for c in index.columns),
            columns=columns,
        )
    ).fetchone()
    if row is not None and row[0]:
        raise RefusedError(
            f"{row[0]} groups of rows of {definition.table.key} share the same {', '.join(index.columns)}, which "
            f"the unique index {index.name} does not allow. Verify the table (--verify) to find rows whose token "
            "is not that of their value; nothing was changed."
        )
