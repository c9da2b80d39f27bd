"""What goes with the plaintext columns, written down exactly, so that it can be put back.

A switch sets aside NOT NULL and defaults (:class:`SetAside`); a drop saves everything (:class:`SavedTable`)
in the bookkeeping. Definitions are the server's own text (``pg_get_indexdef`` and its kin,
PostgreSQL manual 9.27.5 "System Catalog Information Functions"), taken with an empty search path, so that
every name in them is qualified.
"""

from __future__ import annotations

from typing import Any, Literal, LiteralString

from psycopg.rows import dict_row
from psycopg.sql import SQL, Composable, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral
from pydantic import BaseModel, ConfigDict

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping.tables import (
    NotNull,
    OfPartition,
    SetAside,
    kept_definition,
)
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.stored import Constraint, Expression, Statement
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.indexes import pending_index
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.schema.sql import verbatim


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Grant(_Model):
    """A privilege on one column; ``grantee`` None is PUBLIC."""

    grantee: str | None
    # PostgreSQL manual, 5.8 "Privileges".
    privilege: Literal[
        "SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER", "MAINTAIN"
    ]
    grantable: bool

    def statement(self, relation: Identifier, column: str | None) -> Composed:
        """What grants it on a relation, or on a column of it."""
        return SQL("GRANT {}{} ON {} TO {}{}").format(
            verbatim(self.privilege),
            SQL(" ({})").format(Identifier(column)) if column is not None else SQL(""),
            relation,
            SQL("PUBLIC") if self.grantee is None else Identifier(self.grantee),
            SQL(" WITH GRANT OPTION" if self.grantable else ""),
        )


class SavedColumn(_Model):
    """A plaintext column; None and empty where it has the defaults of its type.

    Attributes:
        type: with its modifiers, quoted and qualified.
        collation: schema and name, as for sequences, which it owns.
        default: expression, set aside by the switch or still there.
        not_null: set aside by the switch.
        encrypted_was_required: whether the encrypted column was NOT NULL before the drop made it so.
        grants: privileges on the column alone.
        storage: TOAST strategy, one letter as in ``pg_attribute``; so is the compression.
        options: such as ``n_distinct=100``.
    """

    name: str
    type: Expression
    collation: tuple[str, str] | None = None
    default: Expression | None = None
    not_null: NotNull | None = None
    encrypted_was_required: bool = False
    comment: str | None = None
    grants: tuple[Grant, ...] = ()
    statistics: int | None = None
    storage: str | None = None
    compression: str | None = None
    options: tuple[str, ...] = ()
    sequences: tuple[tuple[str, str], ...] = ()


class SavedIndex(_Model):
    """An index: its CREATE INDEX, and what that does not tell; statistics targets by the number of its column.

    Attributes:
        parts: of a partitioned table's, those that belong to it, each with schema and name of its partition.
    """

    name: str
    definition: Statement
    comment: str | None = None
    tablespace: str | None = None
    clustered: bool = False
    statistics: dict[int, int] = {}
    parts: tuple[tuple[tuple[str, str], SavedIndex], ...] = ()


class SavedConstraint(_Model):
    """A constraint that involves a plaintext column.

    Attributes:
        kind: as in ``pg_constraint.contype``: check, foreign key, unique, exclusion.
        definition: what follows ADD CONSTRAINT name.
        deferred: initially; told of unique ones, as ``deferrable`` is.
        index: that enforces it.
    """

    name: str
    kind: Literal["c", "f", "u", "x"]
    definition: Constraint
    validated: bool = True
    deferrable: bool = False
    deferred: bool = False
    comment: str | None = None
    index: SavedIndex | None = None


class SavedStatistics(_Model):
    """An extended statistics object; ``target`` None is the default."""

    schema_name: str
    name: str
    definition: Statement
    owner: str
    target: int | None = None
    comment: str | None = None


class SavedTable(_Model):
    """Everything that a drop of a table's plaintext columns takes away.

    Attributes:
        of_partitions: indexes that single partitions have of their own, with schema and name of the partition.
        set_aside_of_partitions: as the switch had set it aside.
    """

    columns: tuple[SavedColumn, ...]
    constraints: tuple[SavedConstraint, ...] = ()
    indexes: tuple[SavedIndex, ...] = ()
    statistics: tuple[SavedStatistics, ...] = ()
    of_partitions: tuple[tuple[tuple[str, str], SavedIndex], ...] = ()
    set_aside_of_partitions: tuple[OfPartition, ...] = ()

    @property
    def set_aside(self) -> SetAside:
        """NOT NULL and defaults as the switch had set them aside."""
        return SetAside(
            defaults={c.name: c.default for c in self.columns if c.default is not None},
            not_null={c.name: c.not_null for c in self.columns if c.not_null is not None},
            partitions=self.set_aside_of_partitions,
        )


def presence_check(column: Column) -> str:
    """The check that stands for NOT NULL while the ciphertext is right: one of the two sides is there."""
    return short_name(f"{column.name}_encryption_present")


def required_check(name: str) -> str:
    """The check that lets a column become NOT NULL without a scan under the lock."""
    return short_name(f"{name}_encryption_required")


def unfilled_index(table: Table) -> str:
    """The index that answers "whose plaintext is still missing" while plaintext is being put back."""
    return short_name(f"{table.name}_encryption_unfilled")


def our_names(table: Table) -> list[str]:
    """The names of the checks and indexes that are there for the migration alone."""
    checks = [presence_check(column) for column in table.columns]
    checks += [required_check(name) for column in table.columns for name in (column.name, column.encrypted)]
    return [*checks, pending_index(table), unfilled_index(table)]


_COLUMNS = """
SELECT a.attnum AS number, a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
       CASE WHEN a.attcollation <> t.typcollation THEN ARRAY[n.nspname::text, c.collname::text] END AS collation,
       nullif(a.attstattarget, -1) AS statistics,
       CASE WHEN a.attstorage <> t.typstorage THEN a.attstorage::text END AS storage,
       nullif(a.attcompression::text, '') AS compression, coalesce(a.attoptions, '{}') AS options,
       col_description(a.attrelid, a.attnum) AS comment,
       (SELECT coalesce(jsonb_agg(jsonb_build_object('grantee', r.rolname, 'privilege', x.privilege_type,
                                                     'grantable', x.is_grantable)
                                  ORDER BY r.rolname NULLS FIRST, x.privilege_type), '[]')
          FROM aclexplode(a.attacl) x LEFT JOIN pg_roles r ON r.oid = x.grantee
         WHERE x.grantee = 0 OR r.oid IS NOT NULL) AS grants,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(n.nspname, s.relname) ORDER BY n.nspname, s.relname), '[]')
          FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S'
          JOIN pg_namespace n ON n.oid = s.relnamespace
         WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'
           AND d.refobjid = a.attrelid AND d.refobjsubid = a.attnum) AS sequences
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_collation c ON c.oid = a.attcollation LEFT JOIN pg_namespace n ON n.oid = c.collnamespace
 WHERE a.attrelid = %(table)s AND a.attname = ANY(%(names)s) AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

# Objects that depend on one of the columns; those of this table go with it without being asked.
_DEPENDENT: LiteralString = """
WITH dependent AS (SELECT classid, objid FROM pg_depend WHERE refclassid = 'pg_class'::regclass
                      AND refobjid = %(table)s AND refobjsubid = ANY(%(columns)s))"""
_INDEX: LiteralString = """
SELECT i.relname AS name, pg_get_indexdef(i.oid) AS definition, obj_description(i.oid, 'pg_class') AS comment,
       s.spcname AS tablespace, x.indisclustered AS clustered,
       (SELECT coalesce(jsonb_object_agg(a.attnum, a.attstattarget), '{}') FROM pg_attribute a
         WHERE a.attrelid = i.oid AND a.attstattarget >= 0) AS statistics"""
_INDEXES: LiteralString = """, c.contype::text AS kind, c.oid, i.oid AS index,
       -- One of an invalid index, which does not come back, is its partition's own.
       EXISTS (SELECT FROM pg_inherits h JOIN pg_index w ON w.indexrelid = h.inhparent AND w.indisvalid
                WHERE h.inhrelid = i.oid) AS attached
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
  LEFT JOIN pg_tablespace s ON s.oid = i.reltablespace
  LEFT JOIN pg_constraint c ON c.conindid = i.oid AND c.conrelid = x.indrelid AND c.contype IN ('p', 'u', 'x')
 WHERE x.indrelid = %(table)s AND x.indisvalid AND i.relname <> ALL(%(ours)s)
   AND (x.indkey::int2[] && %(columns)s::int2[] OR ('pg_class'::regclass, i.oid) IN (SELECT * FROM dependent))
 ORDER BY i.relname
"""
# Of a row, what is no part of what is saved.
_ABOUT = ("kind", "oid", "index", "attached")
_INDEXES_OF_PARTITIONS: LiteralString = """, ARRAY[n.nspname::text, t.relname::text] AS of
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
  LEFT JOIN pg_tablespace s ON s.oid = i.reltablespace
  JOIN pg_partition_tree(%(index)s) p ON p.relid = i.oid AND p.level > 0
  JOIN pg_class t ON t.oid = x.indrelid JOIN pg_namespace n ON n.oid = t.relnamespace
 ORDER BY p.level, n.nspname, t.relname
"""

_NUMBERS: LiteralString = """
SELECT coalesce(array_agg(attnum), '{}') AS columns FROM pg_attribute
 WHERE attrelid = %(table)s AND attname = ANY(%(names)s)
"""

_CONSTRAINTS: LiteralString = """
SELECT c.oid, c.conname AS name, c.contype::text AS kind, pg_get_constraintdef(c.oid) AS definition,
       c.convalidated AS validated, c.condeferrable AS deferrable, c.condeferred AS deferred,
       obj_description(c.oid, 'pg_constraint') AS comment
  FROM pg_constraint c
 WHERE c.conrelid = %(table)s AND c.contype IN ('c', 'f', 'u', 'x') AND c.conname <> ALL(%(ours)s)
   AND (c.oid = ANY(%(with_index)s) OR c.conkey && %(columns)s::int2[]
     OR ('pg_constraint'::regclass, c.oid) IN (SELECT * FROM dependent))
 ORDER BY c.conname
"""

_STATISTICS: LiteralString = """
SELECT n.nspname AS schema_name, s.stxname AS name, pg_get_statisticsobjdef(s.oid) AS definition,
       pg_get_userbyid(s.stxowner) AS owner, nullif(s.stxstattarget, -1) AS target,
       obj_description(s.oid, 'pg_statistic_ext') AS comment
  FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace
 WHERE s.stxrelid = %(table)s
   AND ('pg_statistic_ext'::regclass, s.oid) IN (SELECT * FROM dependent)
 ORDER BY 1, 2
"""


def read_saved(connection: Connection, definition: TableDefinition, set_aside: SetAside) -> SavedTable:
    """Everything that dropping the table's plaintext columns takes away, but for what is ours."""
    table = definition.table
    parameters = {
        "table": definition.oid,
        "names": [column.name for column in definition.plaintext_columns],
        "ours": our_names(table),
    }

    def read(query: LiteralString, **more: object) -> list[dict[str, Any]]:
        cursor = connection.cursor(row_factory=dict_row)
        return cursor.execute(query, {**parameters, **more}).fetchall()

    encrypted = {column.name: definition.columns.get(column.encrypted) for column in table.columns}
    rows = read(_COLUMNS)
    parameters["columns"] = [row.pop("number") for row in rows]
    columns = tuple(
        SavedColumn(
            **row,
            default=set_aside.defaults.get(row["name"], None if live.type_default else live.default),
            not_null=set_aside.not_null.get(row["name"]),
            encrypted_was_required=(there := encrypted[row["name"]]) is not None and there.not_null,
        )
        for row in rows
        for live in [definition.columns[row["name"]]]
    )

    def with_parts(row: dict[str, Any], index: int) -> SavedIndex:
        parts = [(one.pop("of"), one) for one in read(_INDEX + _INDEXES_OF_PARTITIONS, index=index)]
        return SavedIndex.model_validate({**row, "parts": parts})

    indexes: list[SavedIndex] = []
    of_constraint: dict[int, SavedIndex] = {}
    for row in read(_DEPENDENT + _INDEX + _INDEXES):
        kind, oid, index, _ = (row.pop(name) for name in _ABOUT)
        saved = with_parts(row, index)
        if kind is None:
            indexes.append(saved)
        elif kind != "p":
            of_constraint[oid] = saved
    of_partitions = []
    for part in read_parts(connection, definition.oid)[1:]:
        (numbers,) = read(_NUMBERS, table=part.oid)
        for row in read(_DEPENDENT + _INDEX + _INDEXES, table=part.oid, **numbers):
            kind, _, index, attached = (row.pop(name) for name in _ABOUT)
            if kind is None and not attached:
                of_partitions.append(((part.schema_name, part.name), with_parts(row, index)))
    return SavedTable(
        of_partitions=tuple(of_partitions),
        set_aside_of_partitions=set_aside.partitions,
        columns=columns,
        constraints=tuple(
            SavedConstraint(index=of_constraint.get(row.pop("oid")), **row)
            for row in read(_DEPENDENT + _CONSTRAINTS, with_index=list(of_constraint))
        ),
        indexes=tuple(indexes),
        statistics=tuple(SavedStatistics(**row) for row in read(_DEPENDENT + _STATISTICS)),
    )


def read_not_null(connection: Connection, definition: TableDefinition) -> dict[str, NotNull]:
    """The plaintext columns that are NOT NULL, with their constraints where the server names them."""
    rows = connection.execute(
        "SELECT a.attname, c.conname, pg_get_constraintdef(c.oid), obj_description(c.oid, 'pg_constraint') "
        "FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1] "
        "WHERE c.conrelid = %s AND c.contype = 'n'",
        [definition.oid],
    )
    named = {
        column: NotNull(name=name, definition=text, comment=comment) for column, name, text, comment in rows
    }
    return {
        column.name: named.get(column.name, NotNull())
        for column in definition.plaintext_columns
        if definition.columns[column.name].not_null
    }


# A NOT NULL that a partition had before the table above it is its own, and stays when that one's is dropped.
_OF_PARTITIONS = """
SELECT n.nspname, c.relname, a.attname, pg_get_expr(d.adbin, d.adrelid),
       CASE WHEN x.conislocal OR x.conname <> w.conname OR x.comment IS NOT NULL
            THEN jsonb_build_object('name', x.conname, 'definition', pg_get_constraintdef(x.oid),
                                    'comment', x.comment) END
  FROM pg_partition_tree(%(table)s) p JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = p.relid AND a.attname = ANY(%(names)s)
  JOIN pg_attribute b ON b.attrelid = p.parentrelid AND b.attname = a.attname
  LEFT JOIN pg_attrdef d ON d.adrelid = p.relid AND d.adnum = a.attnum
  LEFT JOIN (SELECT *, obj_description(oid, 'pg_constraint') AS comment FROM pg_constraint) x
         ON x.conrelid = p.relid AND x.contype = 'n' AND x.conkey[1] = a.attnum
  LEFT JOIN pg_constraint w ON w.conrelid = p.parentrelid AND w.contype = 'n' AND w.conkey[1] = b.attnum
 WHERE p.level > 0 ORDER BY p.level, n.nspname, c.relname
"""


def read_of_partitions(connection: Connection, definition: TableDefinition) -> tuple[OfPartition, ...]:
    """Defaults and NOT NULL of plaintext columns that partitions have of their own, upper ones first."""
    found: dict[tuple[str, str], OfPartition] = {}
    parameters = {"table": definition.oid, "names": [column.name for column in definition.plaintext_columns]}
    for schema, name, column, default, not_null in connection.execute(_OF_PARTITIONS, parameters):
        own = found.setdefault((schema, name), OfPartition(schema_name=schema, name=name))
        if default != definition.columns[column].default:
            own.defaults[column] = default
        if not_null is not None:
            own.not_null[column] = NotNull.model_validate(not_null)
    return tuple(own for own in found.values() if own.defaults or own.not_null)


def latest(connection: Connection, table: Table, keys: KeyRing | None) -> SavedTable | None:
    """What the last drop took away.

    Args:
        keys: None where nothing of it is executed.

    Raises:
        RefusedError: as :func:`kept_definition`.
    """
    kept = kept_definition(connection, table, keys)
    return None if kept is None else SavedTable.model_validate(kept)


def alter(definition: TableDefinition, actions: list[Composable]) -> Composed:
    """``ALTER TABLE t action, action``: one pass, one lock."""
    return SQL("ALTER TABLE {} {}").format(definition.identifier, SQL(", ").join(actions))


def constraint_state(connection: Connection, definition: TableDefinition, name: str) -> bool | None:
    """Whether a constraint of the table is validated; None where there is no such constraint."""
    query: LiteralString = "SELECT convalidated FROM pg_constraint WHERE conrelid = %s AND conname = %s"
    validated: bool | None = answer(connection, query, definition.oid, name)
    return validated


def add_check(name: str, condition: Composable) -> Composed:
    """A check that binds new rows at once and the old ones when it is validated."""
    return SQL("ADD CONSTRAINT {} CHECK ({}) NOT VALID").format(Identifier(name), condition)


def validate_check(definition: TableDefinition, name: str) -> Composed:
    """Has the server look at the rows that a check does not bind yet; readers and writers go on."""
    return alter(definition, [SQL("VALIDATE CONSTRAINT {}").format(Identifier(name))])


def comment_on(kind: LiteralString, name: Composable, comment: str | None) -> Composed:
    """``COMMENT ON kind name IS …``."""
    return SQL("COMMENT ON {} {} IS {}").format(SQL(kind), name, SqlLiteral(comment))
