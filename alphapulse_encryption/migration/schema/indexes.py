"""Indexes on the search columns, built after the backfill and beside the running application, then statistics."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, LiteralString
from typing import Literal as OneOf

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit, last_entry
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state, require_state
from alphapulse_encryption.migration.postgres.answers import answer
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction, outside_transaction
from alphapulse_encryption.migration.postgres.waits import telling
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.partitions import Part, lock_parts, read_parts, whole

Connection = psycopg.Connection[Any]

# Partitions may come and go while the indexes of the others are built.
LOOKS_AT_PARTITIONS = 5


@dataclass(frozen=True)
class WantedIndex:
    """An index the table is to have.

    Args:
        unique: whether it is unique; None, after a drop, leaves it as it was carried over before.
        condition: of the rows it holds, for a table's name; None for all rows.
        comment: written last, so that an index of this name without it is unfinished, or of another catalogue.
    """

    name: str
    columns: tuple[str, ...]
    unique: bool | None
    condition: Callable[[str], Composed] | None = None
    comment: str | None = None

    @property
    def pending_only(self) -> bool:
        """Whether it holds some rows only, and is there for the migration alone."""
        return self.condition is not None


@dataclass(frozen=True)
class IndexResult:
    """What :func:`build_search_indexes` did.

    Args:
        created: names of the indexes built now.
        existing: names of those found valid.
        rebuilt: of those created, the ones whose earlier build had been interrupted.
        analysed: whether statistics were taken.
        bytes: size of all of them together.
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
   AND (%s OR NOT i.relispartition)
 GROUP BY i.relname, x.indexrelid, x.indpred, x.indkey, x.indimmediate, to_jsonb(x)
 ORDER BY i.relname
"""


@dataclass(frozen=True)
class UniqueIndex:
    """A unique index that a catalogued plaintext column takes part in.

    Args:
        portable: whether the search columns can carry the same guarantee.
        partition: the only partition that it speaks of; None where it speaks of the whole table.
    """

    name: str
    columns: tuple[str, ...]
    portable: bool
    partition: str | None = None

    @property
    def obstacle(self) -> str:
        """Why the search columns cannot carry it, and what to do; for an index that is not portable."""
        if self.partition is not None:
            return (
                f"it holds within the partition {self.partition} alone, and an index of the partitioned table can be "
                "unique only where the partition key is part of it. Make a unique index with the partition key of the "
                "whole table in its place, or drop it"
            )
        return (
            "equal values are told by search tokens, and it has a column without, an expression or a condition. "
            "Give its columns a search_index in the catalogue, or drop the index"
        )


def unique_indexes(connection: Connection, definition: TableDefinition) -> tuple[UniqueIndex, ...]:
    """The unique indexes on plaintext columns, which have to be carried over to the search columns.

    A partitioned table's own ones contain its partition key, and so do those of the search columns then; those of
    single partitions have no counterpart.
    """
    sensitive = {column.name: column for column in definition.table.columns}
    found = []
    for part in read_parts(connection, definition.oid):
        whole = part.oid == definition.oid
        parameters = [list(sensitive), _TEXTUALLY_UNIQUE, part.oid, whole]
        for name, columns, special in connection.execute(_UNIQUE, parameters):
            touched = [sensitive[column] for column in columns if column in sensitive]
            if touched:
                portable = whole and not special and all(column.searchable for column in touched)
                partition = None if whole else f"{part.schema_name}.{part.name}"
                found.append(UniqueIndex(name, tuple(columns), portable, partition))
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
            wanted.append(WantedIndex(short_name(f"{index.name}_search"), columns, unique=True))
    if definition.plaintext_columns:
        wanted.append(
            WantedIndex(
                pending_index(table),
                tuple(key.name for key in definition.key),
                unique=False,
                condition=lambda name: sql.row_pending(definition, alias(name)),
                comment=_comment(definition),
            )
        )
    return tuple(wanted)


@dataclass(frozen=True)
class IndexState:
    """An index that is there.

    Args:
        usable: whether the server uses it; not so after a build that was interrupted.
    """

    usable: bool
    unique: bool


def read_indexes(connection: Connection, definition: TableDefinition) -> dict[str, IndexState]:
    """The table's indexes, by name."""
    rows = connection.execute(
        "SELECT i.relname, x.indisvalid AND x.indisready, x.indisunique "
        "FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid WHERE x.indrelid = %s",
        [definition.oid],
    )
    return {name: IndexState(usable, unique) for name, usable, unique in rows}


def is_usable(connection: Connection, definition: TableDefinition, name: str) -> bool | None:
    """Whether the table's index of that name can be used; None where it has none."""
    found = read_indexes(connection, definition).get(name)
    return None if found is None else found.usable


def pending_index(table: Table) -> str:
    """Name of the partial index that answers "what is pending" in time proportional to the answer."""
    return short_name(f"{table.name}{sql.PENDING_INDEX_SUFFIX}")


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
        found: dict[str, State] = {}
        for index in wanted_indexes(connection, definition):
            found[index.name] = _look(connection, whole(definition), index)
            if found[index.name] == "valid":
                continue
            if index.unique:
                _refuse_collisions(connection, definition, index)
            build_index(connection, definition, index)
            audit(connection, actor, "create_index", table, index=index.name, unique=index.unique)
        created = tuple(name for name, state in found.items() if state != "valid")
        analysed = bool(created) or not _analysed_since(connection, table)
        if analysed:
            connection.execute(SQL("ANALYZE {}").format(definition.identifier))
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


def _analysed_since(connection: Connection, table: Table) -> bool:
    """Whether statistics were taken after the last index was built: a killed build leaves that undone."""
    return last_entry(connection, "analyze", table) >= last_entry(connection, "create_index", table)


def alias(name: str) -> LiteralString:
    """A table's name where a statement has an alias; it is quoted there, as any identifier."""
    return name


def _comment(definition: TableDefinition) -> str:
    return f"alphapulse_encryption {definition.shape()}"


# What a statement goes on with, or not.
_BESIDE, _ONLY, _NOT = SQL("CONCURRENTLY "), SQL("ONLY "), SQL("")

State = OneOf["missing", "unfinished", "outdated", "valid"]

_LOOK = """
SELECT coalesce(x.indrelid = %s AND x.indisunique = coalesce(%s, x.indisunique) AND (x.indpred IS NOT NULL) = %s AND
         (SELECT array_agg(a.attname::text ORDER BY k.position) FROM unnest(x.indkey::int2[])
            WITH ORDINALITY AS k (attnum, position) JOIN pg_attribute a
              ON a.attrelid = x.indrelid AND a.attnum = k.attnum) = %s, false),
       x.indisvalid AND x.indisready, obj_description(c.oid, 'pg_class')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_index x ON x.indexrelid = c.oid
 WHERE n.nspname = %s AND c.relname = %s
"""


def _look(connection: Connection, part: Part, index: WantedIndex) -> State:
    """What there is under the index's name, on the table itself or on a partition."""
    row = connection.execute(
        _LOOK,
        [
            *(part.oid, index.unique, index.condition is not None, list(index.columns)),
            *(part.schema_name, index.name),
        ],
    ).fetchone()
    if row is None:
        return "missing"
    same, valid, comment = row
    if not same:
        raise ConfigurationError(
            f"{part.schema_name}.{index.name} exists and is not the index that {part.key} "
            f"needs ({'unique, ' if index.unique else ''}on {', '.join(index.columns)}). Rename it, or choose "
            "another search_index in the catalogue."
        )
    # What a pending row is follows the catalogue: an index of another catalogue would not find all of them.
    if index.comment is not None and comment != index.comment:
        return "outdated"
    return "valid" if valid else "unfinished"


@dataclass(frozen=True)
class _Piece:
    """A part of the work on an index: of a table or partition that has rows, or of the tree above.

    Args:
        doing: for a message.
        statements: what is to be executed.
        part: where rows are; built concurrently.
        index: of that part.
    """

    doing: str
    statements: list[Composed]
    part: Part
    index: WantedIndex
    beside: bool = False


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
        parts: all of the table's.
        afresh: take nothing for there: the whole tree goes first.
        attached: the index belongs to that of the part above already, whatever its name.
    """
    state = "missing" if afresh else _look(connection, part, index)
    if part.leaf:
        if state != "valid" and not attached:
            dropped = [_drop_statement(part, index, _BESIDE)] if state != "missing" else []
            statements = [*dropped, *_create(part, index, _BESIDE, _NOT)]
            yield _Piece(f"build the index {index.name}", statements, part, index, beside=True)
        return
    if state == "missing" and not attached:
        yield _Piece(f"begin the index {index.name}", _create(part, index, _NOT, _ONLY), part, index)
    for child in (p for p in parts if p.parent == part.oid):
        name = None if afresh else _attached_to(connection, child, part, index)
        below = replace(index, name=name or part_index(child, index.name))
        if name is not None:
            # Made by the server with a partition that came later, without our comment.
            below = replace(below, comment=None)
        yield from _pieces(connection, parts, child, below, afresh=afresh, attached=name is not None)
        if name is None:
            attach = SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
                Identifier(part.schema_name, index.name), Identifier(child.schema_name, below.name)
            )
            yield _Piece(f"attach the index {below.name} to {index.name}", [attach], part, index)


def build_index(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    """Build an index beside the application's writes, from where an interrupted build stopped.

    That of a partitioned table is made invalid at first and without any rows, built for each partition concurrently,
    and becomes valid when the last one is attached (PostgreSQL manual, CREATE INDEX and ALTER INDEX).

    Args:
        connection: in autocommit mode.
        index: what is wanted; there is nothing valid of its name.

    Raises:
        RefusedError: a lock could not be had; what is built stays and is gone on with.
        ConfigurationError: a name is taken.
    """
    if definition.partitioned and _look(connection, whole(definition), index) == "outdated":
        _drop_tree(connection, definition, index)
    for _ in range(LOOKS_AT_PARTITIONS):
        parts = read_parts(connection, definition.oid)
        for piece in _pieces(connection, parts, parts[0], index):
            if piece.beside:
                _build_beside(connection, piece)
            else:
                in_short_transaction(connection, piece.doing, partial(_execute, connection, piece.statements))
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
    state = _look(connection, parts[0], index)
    if state == "valid":
        return []
    afresh = definition.partitioned and state == "outdated"
    statements = [_drop_statement(parts[0], index, _NOT)] if afresh else []
    for piece in _pieces(connection, parts, parts[0], index, afresh=afresh):
        statements += piece.statements
    return statements


def part_index(part: Part, name: str) -> str:
    """Name of a partition's share in a partitioned table's index."""
    return short_name(f"{part.name}_{name}")


def _attached_to(connection: Connection, child: Part, parent: Part, index: WantedIndex) -> str | None:
    """Name of the child's index that is part of its parent's, however it came about."""
    found = answer(
        connection,
        "SELECT c.relname::text FROM pg_inherits i JOIN pg_index x ON x.indexrelid = i.inhrelid "
        "JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_class p ON p.oid = i.inhparent "
        "JOIN pg_namespace n ON n.oid = p.relnamespace "
        "WHERE x.indrelid = %s AND n.nspname = %s AND p.relname = %s",
        *(child.oid, parent.schema_name, index.name),
    )
    return None if found is None else str(found)


def _execute(connection: Connection, statements: list[Composed]) -> None:
    for statement in statements:
        connection.execute(statement)


def _drop_statement(part: Part, index: WantedIndex, beside: SQL) -> Composed:
    return SQL("DROP INDEX {}IF EXISTS {}").format(beside, Identifier(part.schema_name, index.name))


def _drop_tree(connection: Connection, definition: TableDefinition, index: WantedIndex) -> None:
    """A partitioned index cannot be dropped concurrently; dropping takes no time, but every partition's lock."""

    def drop() -> None:
        lock_parts(connection, read_parts(connection, definition.oid), "ACCESS EXCLUSIVE")
        connection.execute(_drop_statement(whole(definition), index, _NOT))

    in_short_transaction(connection, f"drop the outdated index {index.name}", drop)


def _build_beside(connection: Connection, piece: _Piece) -> None:
    part, index = piece.part, piece.index
    drop = _drop_statement(part, index, _BESIDE)

    def build() -> None:
        # What is there was left by an interrupted build, or by the try before this one.
        if _look(connection, part, index) != "missing":
            connection.execute(drop)
        _execute(connection, _create(part, index, _BESIDE, _NOT))

    try:
        outside_transaction(connection, piece.doing, build)
    except psycopg.Error:
        if not connection.broken:
            doing = f"drop the unfinished index {index.name}"
            outside_transaction(connection, doing, lambda: connection.execute(drop))
        raise


def _create(part: Part, index: WantedIndex, beside: SQL, only: SQL) -> list[Composed]:
    create = SQL("CREATE {unique}INDEX {beside}{name} ON {only}{table} ({columns}){condition}").format(
        unique=SQL("UNIQUE " if index.unique else ""),
        beside=beside,
        name=Identifier(index.name),
        only=only,
        table=part.identifier,
        columns=SQL(", ").join(Identifier(column) for column in index.columns),
        condition=SQL(" WHERE {}").format(index.condition(part.name)) if index.condition else SQL(""),
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
            present=SQL(" AND ").join(SQL("{} IS NOT NULL").format(Identifier(c)) for c in index.columns),
            columns=SQL(", ").join(Identifier(column) for column in index.columns),
        ),
    )
    if groups:
        raise RefusedError(
            f"{groups} groups of rows of {definition.table.key} share the same {', '.join(index.columns)}, which "
            f"the unique index {index.name} does not allow. Verify the table (--verify) to find rows whose token "
            "is not that of their value; nothing was changed."
        )


@dataclass(frozen=True)
class ReindexResult:
    """What :func:`reindex` did.

    Args:
        reindexed: names of the indexes that were rebuilt.
        leftovers: names of what an interrupted call had left, dropped now.
        bytes_before: size of the table's indexes before, in bytes.
        bytes_after: after.
    """

    reindexed: tuple[str, ...]
    leftovers: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds: float


IndexChoice = OneOf["all", "encrypted"]

# Of the table, its partitions and their TOAST tables; with the columns that keys, conditions and expressions name.
_ALL_INDEXES = """
SELECT n.nspname, i.relname, i.oid, x.indisvalid, pg_relation_size(i.oid),
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
# What REINDEX CONCURRENTLY calls its indexes while it works (PostgreSQL manual, REINDEX).
_TRANSIENT = re.compile(r"_cc(new|old)[0-9]*$")


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
        before = _all_indexes(connection, definition)
        after = dict(before)
        leftovers: list[str] = []
        reindexed: tuple[str, ...] = ()

        def work(statement: Composed | None = None) -> None:
            leftovers.extend(_drop_leftovers(connection, definition))
            if statement is not None:
                connection.execute(statement)

        try:
            outside_transaction(connection, doing, work)
            for statement in _reindexing(definition, before, choice):
                # A try that follows another one begins with what that one left.
                outside_transaction(connection, doing, partial(work, statement))
        except (psycopg.Error, RefusedError):
            if not connection.broken:
                work()
            raise
        finally:
            if not connection.broken:
                after = _all_indexes(connection, definition)
                # An index that was rebuilt is another one under the same name.
                old = {entry.oid for entry in before.values()}
                reindexed = tuple(name for (_, name), e in after.items() if e.valid and e.oid not in old)
                if reindexed or leftovers:
                    audit(connection, actor, "reindex", table, indexes=reindexed, leftovers=leftovers)
    return ReindexResult(
        reindexed=reindexed,
        leftovers=tuple(leftovers),
        bytes_before=sum(entry.bytes for entry in before.values()),
        bytes_after=sum(entry.bytes for entry in after.values()),
        seconds=time.monotonic() - started,
    )


def _reindexing(
    definition: TableDefinition, there: Mapping[tuple[str, str], _Entry], choice: IndexChoice
) -> list[Composed]:
    if choice == "all":
        return [SQL("REINDEX TABLE CONCURRENTLY {}").format(definition.identifier)]
    return [
        SQL("REINDEX INDEX CONCURRENTLY {}").format(Identifier(*name))
        for name, entry in there.items()
        if entry.valid and entry.encrypted
    ]


@dataclass(frozen=True)
class _Entry:
    oid: int
    valid: bool
    bytes: int
    encrypted: bool


def _all_indexes(connection: Connection, definition: TableDefinition) -> dict[tuple[str, str], _Entry]:
    columns = [name for column in definition.table.columns for name in (column.encrypted, column.search)]
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    rows = connection.execute(_ALL_INDEXES, {"parts": parts, "columns": columns})
    return {(schema, name): _Entry(*entry) for schema, name, *entry in rows}


def _drop_leftovers(connection: Connection, definition: TableDefinition) -> list[str]:
    dropped = []
    for (schema, name), entry in _all_indexes(connection, definition).items():
        if not entry.valid and _TRANSIENT.search(name):
            connection.execute(SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(Identifier(schema, name)))
            dropped.append(name)
    return dropped
