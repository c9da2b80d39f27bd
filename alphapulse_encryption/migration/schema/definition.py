"""What a table is in the database now: its primary key, its columns and what depends on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, LiteralString

from psycopg import sql
from psycopg.pq import TransactionStatus

from alphapulse_encryption.catalogue import Catalogue, Column, Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.schema.names import GUARD_COLUMNS, guard_name
from alphapulse_encryption.migration.schema.reachable_code import refuse_foreign_code

# Of tables c in schemas n, those of the application: no partitions, and none of the system, of an extension or ours.
OF_THE_APPLICATION: LiteralString = """
   NOT c.relispartition AND c.relpersistence <> 't'
   AND n.nspname <> 'information_schema' AND left(n.nspname, 3) <> 'pg_'
   AND n.nspname <> %(ours)s
   AND NOT EXISTS (SELECT FROM pg_depend d
                    WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
"""


@dataclass(frozen=True)
class LiveColumn:
    """A column as ``pg_attribute`` has it.

    Args:
        type: what ``format_type`` prints, modifiers included.
        base_type: the same without length and precision.
        type_default: whether the type, a domain, has a default, which fills in where the column has none.
    """

    name: str
    type: str
    not_null: bool
    default: str | None
    generated: bool
    base_type: str = ""
    type_default: bool = False


@dataclass(frozen=True)
class KeyColumn:
    """A column of the primary key; ``type`` is the type that its text form is cast back to."""

    name: str
    type: str


@dataclass(frozen=True)
class TableDefinition:
    """A catalogued table together with what the database says of it.

    Args:
        key_operators: schema of the comparison operators of the key's own types; using them by name keeps
            the comparison the index's own, whatever the search path is.
        estimated_rows: the planner's estimate; guessed from the size where the table was never analysed.
        total_bytes: size with indexes and TOAST, in bytes.
        toasted: whether any value is kept out of line, so that one may be of any size.
    """

    table: Table
    oid: int
    key: tuple[KeyColumn, ...]
    key_operators: str
    columns: Mapping[str, LiveColumn]
    partitioned: bool
    estimated_rows: int
    guessed: bool
    total_bytes: int
    toasted: bool

    @property
    def identifier(self) -> sql.Identifier:
        return sql.Identifier(self.table.schema_name, self.table.name)

    @property
    def plaintext_columns(self) -> tuple[Column, ...]:
        """The catalogued columns whose plaintext is (still) there."""
        return tuple(c for c in self.table.columns if c.name in self.columns)

    @property
    def encrypted_columns(self) -> tuple[Column, ...]:
        """The catalogued columns that have their encrypted column."""
        return tuple(c for c in self.table.columns if c.encrypted in self.columns)

    def shape(self) -> str:
        """A hash of what a verification speaks of: the table, its key, and the catalogued columns' types.

        Unlike :meth:`fingerprint` it stays the same when constraints or other columns change.
        """
        concerned = {name for column in self.table.columns for name in (column.name, *column.derived)}
        return self._digest([[c.name, c.type] for c in self.columns.values() if c.name in concerned])

    def alter(self, action: LiteralString, *names: str) -> str:
        """The statement ALTER TABLE, for a person to type; the names are those in the action's places."""
        what = sql.SQL(action).format(*map(sql.Identifier, names))
        return sql.SQL("ALTER TABLE {} {}").format(self.identifier, what).as_string(None)

    def fingerprint(self) -> str:
        """A hash of the columns with types, NOT NULL and defaults, and of the key: changes when they do."""
        return self._digest(
            [[c.name, c.type, c.not_null, c.default, c.generated] for c in self.columns.values()]
        )

    def _digest(self, columns: list[list[Any]]) -> str:
        key = [[k.name, k.type] for k in self.key]
        what = {"oid": self.oid, "key": key, "columns": sorted(columns, key=lambda column: column[0])}
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


_TABLE = """
SELECT c.oid, c.relkind = 'p', size.rows, size.guessed, size.bytes, size.toasted
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL (
       -- Of one that was never analysed, whose estimate is -1, by usual rows of 150 bytes; two pages may be empty.
       SELECT coalesce(sum(CASE WHEN l.reltuples < 0 AND heap > 16384 THEN heap / 150
                                ELSE greatest(l.reltuples, 0) END), 0)::bigint AS rows,
              coalesce(bool_or(l.reltuples < 0 AND heap > 16384), false) AS guessed,
              coalesce(sum(pg_total_relation_size(l.oid)), 0)::bigint AS bytes,
              coalesce(bool_or(pg_relation_size(nullif(l.reltoastrelid, 0)) > 0), false) AS toasted
         FROM pg_class l CROSS JOIN pg_relation_size(l.oid) AS heap WHERE l.relkind = 'r'
          AND l.oid = ANY (c.oid || ARRAY(SELECT relid::oid FROM pg_partition_tree(c.oid)))) AS size
 WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')
"""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
       pg_get_expr(d.adbin, d.adrelid), a.attgenerated <> '' OR a.attidentity <> '',
       -- A modifier of -1 and not NULL: as a type, plain "character" means one character.
       format_type(a.atttypid, -1), t.typdefault IS NOT NULL
  FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

_KEY = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), operator_schema.nspname
  FROM pg_index i
 CROSS JOIN unnest(i.indkey::int2[], i.indclass::oid[]) WITH ORDINALITY AS k (attnum, opclass, position)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
  JOIN pg_opclass c ON c.oid = k.opclass
  JOIN pg_amop o ON o.amopfamily = c.opcfamily AND o.amoplefttype = c.opcintype
                AND o.amoprighttype = c.opcintype AND o.amopstrategy = 3
  JOIN pg_operator p ON p.oid = o.amopopr
  JOIN pg_namespace operator_schema ON operator_schema.oid = p.oprnamespace
 WHERE i.indrelid = %s AND i.indisprimary AND i.indisvalid
   AND k.position <= i.indnkeyatts
 ORDER BY k.position
"""


def read_table(
    connection: Connection, table: Table, *, plaintext: bool = True, once: bool = False, look: bool = False
) -> TableDefinition:
    """Read a table's definition, and refuse to go on where code of others would run with our rights.

    A look waits for who holds the table exclusively: outside a transaction it waits briefly and tries again, as
    schema changes do. In one, that is up to who began it.

    Args:
        plaintext: whether every catalogued plaintext column has to be there (not so after a drop).
        once: without another try; for a report that somebody waits for.
        look: whether no row and no definition is touched, so that nobody's code runs.

    Raises:
        ConfigurationError: the table, one of its catalogued columns or its primary key is missing, or a
            catalogued column is part of the key or generated. Names it and says what to do.
        RefusedError: another session holds the table exclusively, or :func:`.reachable_code.refuse_foreign_code`.
    """
    read = partial(_read_table, connection, table, plaintext=plaintext, look=look)
    if connection.info.transaction_status is not TransactionStatus.IDLE:
        return read()
    doing = f"look at the table {table.key}"
    if once:
        return in_short_transaction(connection, doing, read, attempts=1)
    return in_short_transaction(connection, doing, read)


def _read_table(connection: Connection, table: Table, *, plaintext: bool, look: bool) -> TableDefinition:
    row = connection.execute(_TABLE, [table.schema_name, table.name]).fetchone()
    if row is None:
        kind = answer(connection, _KIND, table.schema_name, table.name)
        if kind is not None:
            raise ConfigurationError(
                f"{table.schema_name}.{table.name} is in the catalogue and no table: "
                f"{NO_TABLES.get(kind, 'put one in its place')}."
            )
        now = answer(connection, _MOVED, GUARD_COLUMNS, guard_name(table))
        raise ConfigurationError(
            f"Table {table.schema_name}.{table.name} is in the catalogue but not in the database. "
            + (
                f"It was renamed or moved: its guard is on {now}, and keeps working. What is kept of the table is kept "
                "under its name: rename it or move it back (ALTER TABLE … RENAME TO, SET SCHEMA)."
                if now
                else "Names are exact and case-sensitive: correct the catalogue, or create the table."
            )
        )
    oid, partitioned, rows, guessed, size, toasted = row
    columns = {row[0]: LiveColumn(*row) for row in connection.execute(_COLUMNS, [oid])}
    key_rows = connection.execute(_KEY, [oid]).fetchall()
    _refuse_renamed(connection, table, oid)
    _check_key(table, [name for name, _, _ in key_rows], {schema for _, _, schema in key_rows})
    if plaintext:
        _check_columns(table, columns)
    if not look:
        refuse_foreign_code(connection, table.key, oid)
    return TableDefinition(
        table=table,
        oid=oid,
        key=tuple(KeyColumn(name, type_) for name, type_, _ in key_rows),
        key_operators=key_rows[0][2],
        columns=columns,
        partitioned=partitioned,
        estimated_rows=rows,
        guessed=guessed,
        total_bytes=size,
        toasted=toasted,
    )


# What may be catalogued by mistake, by pg_class.relkind, and what to do.
NO_TABLES = {
    "v": "it is a view: put the tables that it reads into the catalogue in its place",
    "f": "it is a foreign table: encrypt it where its rows are",
    "m": "it is a materialized view: encrypt what it is made of, and have it made of ciphertext",
}
_KIND = """
SELECT c.relkind::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s
"""

# The table that a guard went along with.
_MOVED = """
SELECT format('%%I.%%I', n.nspname, c.relname) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
  JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE t.tgname = %s AND p.proname = %s LIMIT 1
"""

# Columns that a guard was made for, by what they were called then and what they are called now.
_RENAMED = r"""
SELECT k.before, a.attname
  FROM pg_trigger t CROSS JOIN LATERAL (
       SELECT k.number, convert_from(decode(k.name, 'escape'), getdatabaseencoding()) AS before
         FROM unnest(t.tgattr::int2[], string_to_array(encode(t.tgargs, 'escape'), '\000')) AS k (number, name)) k
  JOIN pg_attribute a ON a.attrelid = t.tgrelid AND a.attnum = k.number
 WHERE t.tgrelid = %s AND t.tgname = %s AND a.attname <> k.before
 ORDER BY k.number
"""


def _refuse_renamed(connection: Connection, table: Table, oid: int) -> None:
    """Refuse a table whose guard knows a catalogued column by another name; the guard itself goes by the column."""
    names = {name: column for column in table.columns for name in (column.name, *column.derived)}
    for before, now in connection.execute(_RENAMED, [oid, GUARD_COLUMNS]).fetchall():
        if (column := names.get(before)) is None:
            continue
        back = sql.SQL("ALTER TABLE {} RENAME COLUMN {} TO {}").format(
            sql.Identifier(table.schema_name, table.name), sql.Identifier(now), sql.Identifier(before)
        )
        with_it = ", ".join(name for name in (column.name, *column.derived) if name != before)
        raise ConfigurationError(
            f"Column {table.key}.{before} was renamed to {now}. The guard keeps working; the steps go by the names of "
            f"the catalogue. Rename it back ({back.as_string(connection)}), or rename {with_it} alike, put the new "
            "name into the catalogue, and run --add-columns --migrate-data --verify. Nothing was changed."
        )


def _check_key(table: Table, key: list[str], operator_schemas: set[str]) -> None:
    if not key:
        raise ConfigurationError(
            f"Table {table.key} has no primary key, which batches and resumption go by. Add one, for example "
            f'ALTER TABLE "{table.schema_name}"."{table.name}" ADD COLUMN id bigint '
            "GENERATED ALWAYS AS IDENTITY PRIMARY KEY, or take the table out of the catalogue."
        )
    if len(operator_schemas) > 1:
        raise ConfigurationError(
            f"The primary key of {table.key} mixes types whose operators live in different schemas "
            f"({', '.join(sorted(operator_schemas))}), so its rows cannot be compared as the index does."
        )
    for column in table.columns:
        if column.name in key:
            raise ConfigurationError(
                f"Column {table.key}.{column.name} is part of the primary key. Key values are kept in the "
                "bookkeeping and cannot be encrypted: give the table another key, or take the column out "
                "of the catalogue."
            )


def _check_columns(table: Table, columns: Mapping[str, LiveColumn]) -> None:
    missing = [c.name for c in table.columns if c.name not in columns]
    if missing:
        raise ConfigurationError(
            f"Table {table.key} has no column {', '.join(missing)}, which the catalogue names. "
            "Names are exact and case-sensitive: correct the catalogue."
        )
    for column in table.columns:
        if columns[column.name].generated:
            raise ConfigurationError(
                f"Column {table.key}.{column.name} is a generated or identity column: its value follows "
                "from others and cannot be encrypted by itself. Take it out of the catalogue."
            )


def check_catalogue(
    connection: Connection, catalogue: Catalogue, keys: tuple[str, ...] | None = None
) -> None:
    """Hold the catalogue against the database.

    Columns whose plaintext was dropped by us are not missing.

    Args:
        keys: the tables to look at; all of them where None.

    Raises:
        ConfigurationError: names what is wrong with any of them, as :func:`read_table` does, and the catalogue.
    """
    problems = []
    for key in keys or catalogue.keys:
        table = catalogue.table(key)
        try:
            found = read_table(connection, table, plaintext=False, look=True)
            if not all(c.encrypted in found.columns and c.name not in found.columns for c in table.columns):
                _check_columns(table, found.columns)
            check_hidden(found)
        except ConfigurationError as error:
            problems.append(error.args[0])
    if problems:
        raise ConfigurationError(" ".join(("\n".join(problems), catalogue.source)).rstrip())


def check_hidden(definition: TableDefinition) -> None:
    """Refuse a table that lacks a column which its safe view is to leave out: another one may show it."""
    missing = [name for name in definition.table.hide if name not in definition.columns]
    if missing:
        raise ConfigurationError(
            f"Table {definition.table.key} has no column {', '.join(missing)}, which the catalogue names under hide. "
            "Names are exact and case-sensitive: correct the catalogue."
        )
