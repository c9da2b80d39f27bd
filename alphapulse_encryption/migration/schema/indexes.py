"""Indexes on the search columns, built after the backfill and beside the running application, then statistics."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal as OneOf

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit, last_entry
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state, require_state
from alphapulse_encryption.migration.postgres.build_progress import telling
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database, answer
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction, maintain, outside_transaction
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import refuse_unguarded
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.partitions import Part, lock_parts, read_parts

# Partitions may come and go while the indexes of the others are built.
LOOKS_AT_PARTITIONS = 5


@dataclass(frozen=True)
class WantedIndex:
    """An index the table is to have.

    Args:
        columns: by their names; an expression as the server printed it.
        unique: whether it is unique; None, after a drop, leaves it as it was carried over before.
        condition: of the rows it holds; None for all rows.
        comment: written last, so that an index of this name without it is unfinished, or of another catalogue or
            condition.
    """

    name: str
    columns: tuple[str | Composed, ...]
    unique: bool | None
    condition: Composed | None = None
    comment: str | None = None

    @property
    def keys(self) -> list[Composable]:
        """Its columns, quoted."""
        return [Identifier(column) if isinstance(column, str) else column for column in self.columns]

    @property
    def described(self) -> str:
        """What it is an index on, for messages."""
        return ", ".join(c if isinstance(c, str) else c.as_string() for c in self.columns)


@dataclass(frozen=True)
class IndexResult:
    """What :func:`build_search_indexes` did; rebuilt are, of those created, what an interrupted build had left."""

    created: tuple[str, ...]
    existing: tuple[str, ...]
    rebuilt: tuple[str, ...]
    analysed: bool
    bytes: int
    seconds: float

    @property
    def changed(self) -> bool:
        return bool(self.created)


# What a unique index on tokens cannot take over. Of other types than those named (numeric, citext, interval, jsonb, …)
# two equal values can have two tokens, and it would let both in. Which columns a condition or an expression reads is in
# its tree: pg_depend does not tell the one from the other.
_UNIQUE = r"""
SELECT i.relname, x.indrelid, keys.names, keys.expressions, pg_get_expr(x.indpred, x.indrelid),
       coalesce((SELECT format('ALTER TABLE %%s DROP CONSTRAINT %%I', c.conrelid::regclass, c.conname)
                   FROM pg_constraint c WHERE c.conindid = x.indexrelid AND c.contype IN ('u', 'x')),
                format('DROP INDEX %%s', x.indexrelid::regclass)),
       CASE WHEN x.indrelid <> %(table)s THEN 'partition' WHEN NOT x.indimmediate THEN 'deferrable'
            WHEN coalesce((to_jsonb(x) ->> 'indnullsnotdistinct')::boolean, false) THEN 'nulls'
            WHEN reads.in_condition THEN 'condition' WHEN reads.in_expression THEN 'expression'
            WHEN keys.spelled THEN 'type' WHEN keys.particular THEN 'collation' END
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
 CROSS JOIN LATERAL (
       SELECT bool_or(x.indpred::text ~ mentioned) AS in_condition,
              bool_or(x.indexprs::text ~ mentioned) AS in_expression
         FROM pg_attribute a CROSS JOIN format(':varattno (%%s|0)\M', a.attnum) AS mentioned
        WHERE a.attrelid = x.indrelid AND a.attname = ANY (%(columns)s)) AS reads
 CROSS JOIN LATERAL (
       SELECT array_agg(coalesce(a.attname::text, pg_get_indexdef(x.indexrelid, k.position::int, false))
                        ORDER BY k.position) AS names,
              array_agg(k.attnum = 0 ORDER BY k.position) AS expressions,
              bool_or(a.attname = ANY (%(columns)s)) AS catalogued,
              bool_or(a.attname = ANY (%(columns)s) AND NOT (
                t.typname IN ('text', 'varchar', 'bpchar', 'name', 'uuid', 'bool', 'int2', 'int4', 'int8', 'oid',
                              'date', 'bytea', 'timestamp', 'timestamptz')
                AND o.opcnamespace = 'pg_catalog'::regnamespace
                AND t.typnamespace = 'pg_catalog'::regnamespace AND coalesce(c.collisdeterministic, true))) AS spelled,
              bool_or(NOT (o.opcdefault OR o.opcnamespace = 'pg_catalog'::regnamespace)
                OR k.collation_id <> a.attcollation AND NOT c.collisdeterministic) AS particular
         FROM unnest(x.indkey::int2[], x.indclass::oid[], x.indcollation::oid[])
              WITH ORDINALITY AS k (attnum, class_id, collation_id, position)
         JOIN pg_opclass o ON o.oid = k.class_id LEFT JOIN pg_collation c ON c.oid = k.collation_id
         LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = k.attnum
         LEFT JOIN pg_type t ON t.oid = a.atttypid) AS keys
 WHERE x.indrelid = ANY (%(parts)s) AND x.indisunique AND x.indisvalid AND NOT x.indisprimary
   AND (x.indrelid = %(table)s OR NOT i.relispartition)
   AND (keys.catalogued OR reads.in_condition OR reads.in_expression)
 ORDER BY array_position(%(parts)s::oid[], x.indrelid), i.relname
"""

_OBSTACLES = {
    "partition": "it holds within the partition {partition} alone, and an index of the partitioned table can be unique "
    "only where the partition key is part of it. Make a unique index with the partition key of the whole table in its "
    "place, or drop it",
    "deferrable": "it is DEFERRABLE, and a unique index on tokens is checked with every row. Make it a constraint that "
    "is not deferrable, or drop it",
    "nulls": "it takes NULLs as equal (NULLS NOT DISTINCT), and the token of every value that is not encrypted yet is "
    "NULL. Make it one without, or drop it",
    "condition": "its condition ({condition}) reads a plaintext column, which is NULL where only the ciphertext is "
    "written. Give it a condition on other columns or none, or drop it",
    "expression": "it has an expression over a plaintext column, and search tokens tell only whether whole values are "
    "equal. Keep the values in one form (such as lower case) and make the index one on the column itself, or drop it",
    "type": "by the type or collation of a column, values are equal that are written differently, and tokens are of "
    "what is written. Give the column another one, or drop the index",
    "collation": "another column in it has a collation or an operator class of its own. Make the index without it, or "
    "drop it",
    "search_index": "equal values are told by search tokens, and {plain} has none. Give it a search_index in the "
    "catalogue, or drop the index",
}


@dataclass(frozen=True)
class UniqueIndex:
    """A unique index whose guarantee depends on a catalogued plaintext column.

    Args:
        columns: of the search columns, where they can carry it, that of an index of the same guarantee.
        condition: of the rows that it speaks of; None for all.
        obstacle: why the search columns cannot carry it, and what to do; None where they can.
    """

    name: str
    columns: tuple[str | Composed, ...]
    condition: str | None
    obstacle: str | None


def unique_indexes(connection: Connection, definition: TableDefinition) -> tuple[UniqueIndex, ...]:
    """The unique indexes on plaintext columns, which have to be carried over to the search columns.

    A partitioned table's own ones contain its partition key, and so do those of the search columns then; those of
    single partitions have no counterpart.
    """
    plain = [column.name for column in definition.table.columns if not column.searchable]
    parts = {part.oid: part for part in read_parts(connection, definition.oid)}
    parameters = {
        "columns": [column.name for column in definition.table.columns],
        "table": definition.oid,
        "parts": list(parts),
    }
    found = []
    for name, oid, names, expressions, condition, remove, why in connection.execute(_UNIQUE, parameters):
        without = ", ".join(column for column in names if column in plain)
        said = _OBSTACLES.get(why or ("search_index" if without else ""))
        partition = f"{parts[oid].schema_name}.{parts[oid].name}"
        columns = (
            sql.verbatim(n) if expression else n for n, expression in zip(names, expressions, strict=True)
        )
        obstacle = (
            said and f"{said.format(partition=partition, condition=condition, plain=without)} ({remove})"
        )
        found.append(UniqueIndex(name, tuple(columns), condition, obstacle))
    return tuple(found)


def wanted_indexes(connection: Connection, definition: TableDefinition) -> tuple[WantedIndex, ...]:
    """The indexes the table is to have, as its catalogue entry and its unique constraints ask for."""
    table = definition.table
    uniques = [index for index in unique_indexes(connection, definition) if index.obstacle is None]
    alone = {index.columns[0] for index in uniques if len(index.columns) == 1 and index.condition is None}
    wanted = [
        WantedIndex(
            column.search_index,
            (column.search,),
            column.name in alone if column.name in definition.columns else None,
        )
        for column in table.columns
        if column.search_index is not None
    ]
    wanted += carrying_indexes(table, uniques)
    if definition.plaintext_columns:
        wanted.append(
            WantedIndex(
                pending_index(table),
                tuple(key.name for key in definition.key),
                unique=False,
                condition=sql.row_pending(definition),
                comment=f"alphapulse_encryption {definition.shape()}",
            )
        )
    return tuple(wanted)


def carrying_indexes(table: Table, uniques: Iterable[UniqueIndex]) -> Iterator[WantedIndex]:
    """The unique indexes beside those of the catalogue that carry a guarantee over more than a column's values."""
    search = {column.name: column.search for column in table.columns}
    for index in uniques:
        if index.obstacle is None and (len(index.columns) > 1 or index.condition is not None):
            name = short_name(f"{index.name}_search")
            if name in {column.search_index for column in table.columns}:
                name = short_name(f"{index.name}_search_unique")
            columns = tuple(search.get(c, c) if isinstance(c, str) else c for c in index.columns)
            wanted = WantedIndex(name, columns, unique=True)
            if index.condition is not None or not all(isinstance(c, str) for c in columns):
                # The server may print what it printed another time: so the text that it was made of is compared.
                text = hashlib.sha256(f"{wanted.described} {index.condition}".encode()).hexdigest()
                condition = None if index.condition is None else sql.verbatim(index.condition)
                wanted = replace(wanted, condition=condition, comment=f"alphapulse_encryption {text}")
            yield wanted


def is_usable(connection: Connection, definition: TableDefinition, name: str) -> bool | None:
    """Whether the server uses the table's index of that name, not so after an interrupted build; None without one."""
    usable: bool | None = answer(
        connection,
        "SELECT x.indisvalid AND x.indisready FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid "
        "WHERE x.indrelid = %s AND i.relname = %s",
        *(definition.oid, name),
    )
    return usable


def is_built(connection: Connection, definition: TableDefinition, index: WantedIndex) -> bool:
    """Whether the table has the index, as it is wanted.

    Raises:
        ConfigurationError: another one has its name.
    """
    return _look(connection, read_parts(connection, definition.oid)[0], index) == "valid"


def pending_index(table: Table) -> str:
    """Name of the partial index that answers "what is pending" in time proportional to the answer."""
    return short_name(f"{table.name}_encryption_pending")


def build_search_indexes(
    database: Database, table: Table, actor: Actor, *, on_wait: Callable[[str], None] | None = None
) -> IndexResult:
    """Build what is missing of the table's indexes, concurrently, and take statistics.

    An index left unfinished by an interrupted build is dropped and built again.

    Args:
        on_wait: told, from another thread, for which session a build waits.

    Raises:
        RefusedError: columns not added, or two rows would share one token of a unique column.
        ConfigurationError: an index of a wanted name is there and is another one.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with (
        database.session(f"build the search indexes of {table.key}") as connection,
        telling(database, table, on_wait),
    ):
        require_guarded_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        refuse_unguarded(connection, definition)
        part = read_parts(connection, definition.oid)[0]
        found: dict[str, State] = {}
        for index in wanted_indexes(connection, definition):
            found[index.name] = _look(connection, part, index)
            if found[index.name] == "valid":
                continue
            if index.unique:
                _refuse_collisions(connection, definition, index)
            build_index(connection, definition, index)
            audit(connection, actor, "create_index", table, index=index.name, unique=index.unique)
        created = tuple(name for name, state in found.items() if state != "valid")
        # A killed build leaves that undone.
        analysed = bool(created) or last_entry(connection, "analyze", table) < last_entry(
            connection, "create_index", table
        )
        if analysed:
            maintain(connection, SQL("ANALYZE {}").format(definition.identifier))
            audit(connection, actor, "analyze", table)
        size = answer(
            connection,
            "SELECT coalesce(sum(pg_relation_size(coalesce(p.relid, c.oid))), 0)::bigint FROM pg_class c "
            "JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_partition_tree(c.oid) p ON true "
            "WHERE n.nspname = %s AND c.relname = ANY(%s)",
            *(table.schema_name, list(found)),
        )
    return IndexResult(
        created=created,
        existing=tuple(name for name, state in found.items() if state == "valid"),
        rebuilt=tuple(name for name in created if found[name] != "missing"),
        analysed=analysed,
        bytes=size,
        seconds=time.monotonic() - started,
    )


State = OneOf["missing", "unfinished", "outdated", "valid"]

_LOOK = """
SELECT coalesce(x.indrelid = %s AND x.indisunique = coalesce(%s, x.indisunique) AND (x.indpred IS NOT NULL) = %s AND
         (SELECT array_agg(a.attname::text ORDER BY k.position) FROM unnest(x.indkey::int2[])
            WITH ORDINALITY AS k (attnum, position) LEFT JOIN pg_attribute a
              ON a.attrelid = x.indrelid AND a.attnum = k.attnum) = %s::text[], false),
       x.indisvalid AND x.indisready, obj_description(c.oid, 'pg_class')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index x ON x.indexrelid = c.oid
 WHERE n.nspname = %s AND c.relname = %s
"""


def _look(connection: Connection, part: Part, index: WantedIndex) -> State:
    """What there is under the index's name, on the table itself or on a partition."""
    row = connection.execute(
        _LOOK,
        [
            *(part.oid, index.unique, index.condition is not None),
            [column if isinstance(column, str) else None for column in index.columns],
            *(part.schema_name, index.name),
        ],
    ).fetchone()
    if row is None:
        return "missing"
    same, valid, comment = row
    if not same:
        raise ConfigurationError(
            f"{part.schema_name}.{index.name} exists and is not the index that {part.key} "
            f"needs ({'unique, ' if index.unique else ''}on {index.described}). Rename it, or choose "
            "another search_index in the catalogue."
        )
    # What a pending row is follows the catalogue: an index of another catalogue would not find all of them.
    if index.comment is not None and comment != index.comment:
        return "outdated"
    return "valid" if valid else "unfinished"


@dataclass(frozen=True)
class _Piece:
    """A part of the work on an index: built beside the application where rows are, or on the tree above."""

    doing: str
    statements: list[Composed]
    # Exclusively, before.
    locked: tuple[Part, ...] = ()
    beside: tuple[Part, WantedIndex] | None = None


def _pieces(
    connection: Connection,
    parts: tuple[Part, ...],
    part: Part,
    index: WantedIndex,
    *,
    afresh: bool = False,
    attached: bool = False,
) -> Iterator[_Piece]:
    """What is to be done for the index of one part of a table, and for those of the parts below it.

    Args:
        afresh: take nothing for there.
        attached: the index belongs to that of the part above already, whatever its name.
    """
    state = "missing" if afresh else _look(connection, part, index)
    if state == "valid":
        return
    if part.leaf:
        if not attached:
            dropped = [_drop_statement(part, index)] if state != "missing" else []
            statements = [*dropped, *_create(part, index)]
            yield _Piece(f"build the index {index.name}", statements, beside=(part, index))
        return
    if state == "outdated":
        # A partitioned index cannot be dropped concurrently; it takes no time, but every partition's lock.
        drop = [_drop_statement(part, index)]
        yield _Piece(f"drop the outdated index {index.name}", drop, locked=parts)
        state = "missing"
        # Where it is only told, it is there still.
        afresh = _look(connection, part, index) != "missing"
    if state == "missing" and not attached:
        yield _Piece(f"begin the index {index.name}", _create(part, index))
    for child in (p for p in parts if p.parent == part.oid):
        name = None if afresh else _attached_to(connection, child, part, index)
        below = replace(index, name=name or short_name(f"{child.name}_{index.name}"))
        if name is not None:
            # Made by the server with a partition that came later, without our comment.
            below = replace(below, comment=None)
        yield from _pieces(connection, parts, child, below, afresh=afresh, attached=name is not None)
        if name is None:
            attach = SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
                Identifier(part.schema_name, index.name), Identifier(child.schema_name, below.name)
            )
            yield _Piece(f"attach the index {below.name} to {index.name}", [attach])


def build_index(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    """Build an index beside the application's writes, from where an interrupted build stopped.

    That of a partitioned table is made invalid at first and without any rows, built for each partition concurrently,
    and becomes valid when the last one is attached (PostgreSQL manual, CREATE INDEX and ALTER INDEX).

    Args:
        connection: in autocommit mode.

    Raises:
        RefusedError: a lock could not be had; what is built stays and is gone on with.
        ConfigurationError: a name is taken.
    """
    for _ in range(LOOKS_AT_PARTITIONS):
        parts = read_parts(connection, definition.oid)
        for piece in _pieces(connection, parts, parts[0], index):
            if piece.beside is not None:
                _build_beside(connection, piece.doing, *piece.beside)
            else:
                in_short_transaction(connection, piece.doing, partial(_execute, connection, piece))
        if _look(connection, parts[0], index) == "valid":
            return
    raise RefusedError(
        f"The index {index.name} of {definition.table.key} did not become valid: partitions were added meanwhile, or "
        "an index of a partition that is attached to it is invalid (REINDEX INDEX CONCURRENTLY makes it valid). Run "
        "the step again."
    )


def index_statements(
    connection: Connection, definition: TableDefinition, index: WantedIndex
) -> list[Composed]:
    """What :func:`build_index` would execute, as the index and those of the partitions stand; executes nothing.

    Raises:
        ConfigurationError: a name is taken.
    """
    parts = read_parts(connection, definition.oid)
    return [s for piece in _pieces(connection, parts, parts[0], index) for s in piece.statements]


def _attached_to(connection: Connection, child: Part, parent: Part, index: WantedIndex) -> str | None:
    """Name of the child's index that is part of its parent's, however it came about."""
    name: str | None = answer(
        connection,
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid "
        "JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent "
        "JOIN pg_namespace n ON n.oid = p.relnamespace "
        "WHERE x.indrelid = %s AND n.nspname = %s AND p.relname = %s",
        *(child.oid, parent.schema_name, index.name),
    )
    return name


def _execute(connection: Connection, piece: _Piece) -> None:
    lock_parts(connection, piece.locked, "ACCESS EXCLUSIVE")
    for statement in piece.statements:
        connection.execute(statement)


def _drop_statement(part: Part, index: WantedIndex) -> Composed:
    beside = SQL("CONCURRENTLY " if part.leaf else "")
    return SQL("DROP INDEX {}IF EXISTS {}").format(beside, Identifier(part.schema_name, index.name))


def _build_beside(connection: Connection, doing: str, part: Part, index: WantedIndex) -> None:
    drop = _drop_statement(part, index)

    def build() -> None:
        # What is there was left by an interrupted build, or by the try before this one.
        if _look(connection, part, index) != "missing":
            connection.execute(drop)
        for statement in _create(part, index):
            connection.execute(statement)

    try:
        outside_transaction(connection, doing, build)
    except psycopg.Error:
        if not connection.broken:
            doing = f"drop the unfinished index {index.name}"
            outside_transaction(connection, doing, lambda: connection.execute(drop))
        raise


def _create(part: Part, index: WantedIndex) -> list[Composed]:
    create = SQL("CREATE {}INDEX {}{} ON {}{} ({}){}").format(
        SQL("UNIQUE " if index.unique else ""),
        SQL("CONCURRENTLY " if part.leaf else ""),
        Identifier(index.name),
        SQL("" if part.leaf else "ONLY "),
        part.identifier,
        SQL(", ").join(index.keys),
        SQL(" WHERE {}").format(index.condition) if index.condition else SQL(""),
    )
    if index.comment is None:
        return [create]
    name = Identifier(part.schema_name, index.name)
    return [create, SQL("COMMENT ON INDEX {} IS {}").format(name, Literal(index.comment))]


def _refuse_collisions(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    groups = answer(
        connection,
        SQL(
            "SELECT count(*) FROM (SELECT FROM {table} WHERE {present} GROUP BY {columns} HAVING count(*) > 1) AS g"
        ).format(
            table=definition.identifier,
            present=SQL(" AND ").join(
                [
                    *map(sql.has_value, index.keys),
                    index.condition or sql.EVERYTHING,
                ]
            ),
            columns=SQL(", ").join(index.keys),
        ),
    )
    if groups:
        raise RefusedError(
            f"{groups} groups of rows of {definition.table.key} share the same {index.described}, which "
            f"the unique index {index.name} does not allow. Verify the table (--verify) to find rows whose token "
            "is not that of their value; nothing was changed."
        )


@dataclass(frozen=True)
class ReindexResult:
    """What :func:`reindex` did; leftovers are what an interrupted call had left, dropped now."""

    reindexed: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float


def invalid_indexes(connection: Connection, definition: TableDefinition) -> list[tuple[str, str]]:
    """Indexes that an interrupted build has left, and no query uses; each with the statement to type.

    None while one of the table's is built. The one on pending rows is left to the step that builds it.
    """
    if answer(
        connection,
        "SELECT EXISTS (SELECT FROM pg_stat_progress_create_index WHERE relid = %s)",
        definition.oid,
    ):
        return []
    return [
        (
            one.name,
            f"{'DROP' if one.leftover else 'REINDEX'} INDEX CONCURRENTLY {one.identifier.as_string(connection)}",
        )
        for one in _all_indexes(connection, definition)
        if not one.valid and one.name != pending_index(definition.table)
    ]


IndexChoice = OneOf["all", "encrypted"]

# Of the table, its partitions and their TOAST tables; with the columns that keys, conditions and expressions name, and
# told from what REINDEX CONCURRENTLY leaves when it is interrupted (PostgreSQL manual, REINDEX).
_ALL_INDEXES = """
SELECT n.nspname, i.relname, i.oid, x.indisvalid, NOT x.indisvalid AND i.relname ~ '_cc(new|old)[0-9]*$',
       pg_relation_size(i.oid),
       EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = x.indrelid AND a.attname = ANY(%(columns)s)
                  AND (a.attnum = ANY (x.indkey::int2[]) OR EXISTS (
                      SELECT FROM pg_depend d
                       WHERE d.classid = 'pg_class'::regclass AND d.objid = i.oid
                         AND d.refclassid = 'pg_class'::regclass AND d.refobjid = x.indrelid
                         AND d.refobjsubid = a.attnum)))
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid JOIN pg_namespace n ON n.oid = i.relnamespace
 WHERE i.relkind = 'i' AND (x.indrelid = ANY (%(parts)s)
        OR x.indrelid IN (SELECT reltoastrelid FROM pg_class WHERE oid = ANY (%(parts)s)))
 ORDER BY 1, 2
"""


def reindex(
    database: Database,
    table: Table,
    actor: Actor,
    *,
    choice: IndexChoice = "all",
    on_wait: Callable[[str], None] | None = None,
    progress: bool = False,
) -> ReindexResult:
    """Rebuild valid indexes of a table, beside the application, after dropping what an earlier call left.

    Args:
        choice: all of them, at once; or those that have an encrypted or search column in them, one after the other.
        on_wait: told, from another thread, for which session a build waits.
        progress: tell it how far the builds are, too.

    Raises:
        RefusedError: columns not added, or a lock could not be had.
        ConfigurationError: the table is missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    doing = f"reindex {table.key}"
    with database.session(doing) as connection, telling(database, table, on_wait, progress=progress):
        require_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        before = after = _all_indexes(connection, definition)
        leftovers: list[str] = []
        reindexed: tuple[str, ...] = ()

        def work(statement: Composed | None = None) -> None:
            for index in _all_indexes(connection, definition):
                if index.leftover:
                    connection.execute(SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(index.identifier))
                    leftovers.append(index.name)
            if statement is not None:
                maintain(connection, statement)

        statements = [SQL("REINDEX TABLE CONCURRENTLY {}").format(definition.identifier)]
        if choice == "encrypted":
            chosen = [index for index in before if index.valid and index.encrypted]
            statements = [SQL("REINDEX INDEX CONCURRENTLY {}").format(one.identifier) for one in chosen]
        try:
            # A try that follows another one begins with what that one left.
            for statement in (None, *statements):
                outside_transaction(connection, doing, partial(work, statement))
        except (psycopg.Error, RefusedError):
            if not connection.broken:
                work()
            raise
        finally:
            if not connection.broken:
                after = _all_indexes(connection, definition)
                # An index that was rebuilt is another one under the same name.
                old = {index.oid for index in before}
                reindexed = tuple(index.name for index in after if index.valid and index.oid not in old)
                if reindexed or leftovers:
                    audit(connection, actor, "reindex", table, indexes=reindexed, leftovers=leftovers)
    return ReindexResult(
        reindexed=reindexed,
        leftovers=tuple(leftovers),
        bytes_before=sum(index.bytes for index in before),
        bytes_after=sum(index.bytes for index in after),
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Index:
    schema_name: str
    name: str
    oid: int
    valid: bool
    leftover: bool
    bytes: int
    encrypted: bool

    @property
    def identifier(self) -> Identifier:
        return Identifier(self.schema_name, self.name)


def _all_indexes(connection: Connection, definition: TableDefinition) -> list[_Index]:
    columns = [name for column in definition.table.columns for name in (column.encrypted, column.search)]
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    rows = connection.execute(_ALL_INDEXES, {"parts": parts, "columns": columns})
    return [_Index(*row) for row in rows]
