"""What is there before anything is encrypted: columns and values of others, and rows that would be refused later.

Belongs here: questions that only the rows can answer, by a sample of them, and whose columns there are already. What
follows from definitions alone is in ``dependants``; what takes keys to tell, in ``rows.adopted``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import LiteralString

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import LiveColumn, TableDefinition
from alphapulse_encryption.migration.schema.sql import verbatim

# A question about rows is answered by so many of them.
SAMPLE = 1_000
# So much of a table is read to find them: all of a small one, and of a large one pages from everywhere.
_SAMPLE_BYTES = 16 * 1024 * 1024
_TOKEN_LENGTH = 44

_ALL: LiteralString = "SELECT {columns} FROM {table}"
# The newest rows as well: somebody may have begun to encrypt what is written from now on.
_SAMPLED: LiteralString = """
SELECT {columns} FROM {table} TABLESAMPLE SYSTEM ({share})
UNION ALL (SELECT {columns} FROM {table} ORDER BY {newest} LIMIT {most})
"""
# Single values may look like one by chance, or because a person put it into a text; not one in twenty.
_IS_ENVELOPE: LiteralString = """
SELECT count(*) FILTER (WHERE value ~ '^\\s*[{{]' AND value ~ '"ciphertext"\\s*:' AND value ~ '"algorithm"\\s*:') * 20
       > count(*)
  FROM (SELECT {column}::text AS value FROM ({rows}) AS r WHERE {column} IS NOT NULL LIMIT {most}) AS s
"""
_HAS_VALUES: LiteralString = "SELECT EXISTS (SELECT FROM ({rows}) AS r WHERE {column} IS NOT NULL)"


def sampled(definition: TableDefinition, columns: Sequence[Composable]) -> Composed:
    """A query of these columns, for a bounded number of the table's rows."""
    share = 100.0 * _SAMPLE_BYTES / max(definition.total_bytes, 1)
    return SQL(_ALL if share >= 100.0 else _SAMPLED).format(
        columns=SQL(", ").join(columns),
        table=definition.identifier,
        share=SQL(f"{share:.6f}"),
        newest=SQL(", ").join(SQL("{} DESC").format(Identifier(key.name)) for key in definition.key),
        most=SQL(str(SAMPLE)),
    )


def wanted_columns(table: Table) -> dict[str, str]:
    """The types of the encrypted and search columns, by name."""
    wanted = {}
    for column in table.columns:
        wanted[column.encrypted] = "text"
        if column.searchable:
            wanted[column.search] = "character varying(64)"
    return wanted


def unsuitable_columns(definition: TableDefinition) -> list[str]:
    """Encrypted and search columns that are there with a type which does not hold what they are for."""
    found = definition.columns
    return [
        name
        for name, wanted in wanted_columns(definition.table).items()
        if name in found and not _holds(found[name], tokens=wanted != "text")
    ]


def _holds(column: LiveColumn, *, tokens: bool) -> bool:
    """Whether envelopes of any length fit into a column, or tokens."""
    width = re.fullmatch(r"character varying\((\d+)\)", column.type)
    fits = tokens and int(width[1]) >= _TOKEN_LENGTH if width else column.type in _UNBOUNDED
    return fits and not column.generated


_UNBOUNDED = ("text", "character varying")


def of_others(connection: Connection, definition: TableDefinition) -> Iterator[str]:
    """What somebody else has put where the first step would begin, and what to do about it."""
    of = definition.table.key
    for name in unsuitable_columns(definition):
        found = definition.columns[name]
        yield (
            f"Column {of}.{name} exists with the type {found.type}{' (generated)' if found.generated else ''}, where "
            f"{wanted_columns(definition.table)[name]} is needed. Rename or drop it "
            f"({definition.alter('RENAME {} TO {}', name, f'{name[:40]}_before')})."
        )
    for column in definition.table.columns:
        if _is_so_of(connection, definition, column.name, _IS_ENVELOPE):
            yield (
                f"Column {of}.{column.name} holds envelopes already, and each would be put into another one. Take the "
                "column out of the catalogue where the application reads envelopes in it; or have the application "
                "write its plaintext back first."
            )
        for name in column.derived:
            if name in definition.columns and definition.columns[name].not_null:
                yield (
                    f"Column {of}.{name} is NOT NULL, and the guard clears it where plaintext is written alone. Run "
                    f"{definition.alter('ALTER {} DROP NOT NULL', name)}."
                )
            if not column.adopt and _is_so_of(connection, definition, name, _HAS_VALUES):
                yield (
                    f"Column {of}.{name} holds values already, which somebody else has put there. If they are the "
                    f"application's, under this key, write adopt: true beside {column.name} in the catalogue. Else "
                    f"rename the column ({definition.alter('RENAME {} TO {}', name, f'{name[:40]}_before')}), or take "
                    f"{column.name} out of the catalogue."
                )


def _is_so_of(connection: Connection, definition: TableDefinition, name: str, query: LiteralString) -> bool:
    if name not in definition.columns:
        return False
    parts = {"column": Identifier(name), "rows": sampled(definition, [Identifier(name)])}
    return _is_so(connection, SQL(query).format(most=SQL(str(SAMPLE)), **parts))


# Constraints that are checked for every row, foreign keys whose columns are NULL together or not at all, and columns
# made from others that have to have a value.
_CONDITIONS = """
SELECT 'constraint', c.conname, '(' || pg_get_expr(c.conbin, c.conrelid) || ') IS FALSE'
  FROM pg_constraint c
 WHERE c.conrelid = %(table)s AND c.contype = 'c' AND c.conname <> ALL(%(ours)s)
   AND EXISTS (SELECT FROM pg_attribute a
                WHERE a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey) AND a.attname = ANY(%(columns)s))
UNION ALL
SELECT 'foreign key', c.conname, format('num_nulls(%%s) BETWEEN 1 AND %%s', string_agg(format('%%I', a.attname), ', '),
       count(*) - 1)
  FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)
 WHERE c.conrelid = %(table)s AND c.contype = 'f' AND c.confmatchtype = 'f'
 GROUP BY c.oid HAVING bool_or(a.attname = ANY(%(columns)s))
UNION ALL
SELECT 'generated column', g.attname, '(' || pg_get_expr(f.adbin, f.adrelid) || ') IS NOT DISTINCT FROM NULL'
  FROM pg_attribute g JOIN pg_attrdef f ON f.adrelid = g.attrelid AND f.adnum = g.attnum
 WHERE g.attrelid = %(table)s AND g.attgenerated <> '' AND g.attnotnull
   AND EXISTS (SELECT FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                WHERE (d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid
                       OR d.classid = 'pg_class'::regclass AND d.objid = g.attrelid AND d.objsubid = g.attnum)
                  AND d.refobjid = g.attrelid
                  AND a.attname = ANY(%(columns)s))
 ORDER BY 1, 2
"""
_CHANGES: dict[str, tuple[str, LiteralString]] = {
    "constraint": (
        "Let it take the ciphertext for the value, as in num_nonnulls(email, email_encrypted, phone) >= 1, or drop it",
        "DROP CONSTRAINT {}",
    ),
    "foreign key": ("It is MATCH FULL: make it one without, or drop it", "DROP CONSTRAINT {}"),
    "generated column": ("Let it be NULL", "ALTER {} DROP NOT NULL"),
}


def refuse_ciphertext_alone(
    connection: Connection, definition: TableDefinition
) -> tuple[tuple[str, str], ...]:
    """Constraints and generated columns that refuse a row whose plaintext is NULL, as it is from the switch on.

    Each with what to do about it.

    Each is asked of rows as they are, with NULL for the catalogued columns; and with NULL for all that may be NULL.
    """
    columns = [column.name for column in definition.plaintext_columns]
    asked = {"table": definition.oid, "columns": columns, "ours": saved_ddl.our_names(definition.table)}
    nullable = [name for name, column in definition.columns.items() if not column.not_null]
    found = []
    for kind, name, condition in connection.execute(_CONDITIONS, asked).fetchall():
        samples = (_without(definition, names) for names in (set(columns), {*columns, *nullable}))
        if any(_is_met(connection, sample, condition) for sample in samples):
            what, action = _CHANGES[kind]
            found.append((f"{kind} {name}", f"{what} ({definition.alter(action, name)})"))
    return tuple(found)


def _without(definition: TableDefinition, names: set[str]) -> Composed:
    derived = {name for column in definition.table.columns for name in column.derived}

    def each() -> Iterator[Composable]:
        for name, column in definition.columns.items():
            if column.generated:
                continue
            if name in derived:
                # As it will be: not pending.
                yield SQL("coalesce({0}, '') AS {0}").format(Identifier(name))
            else:
                # NULL of the column's own type.
                null = SQL("CASE WHEN false THEN {0} END AS {0}" if name in names else "{0}")
                yield null.format(Identifier(name))

    return SQL("SELECT {} FROM {} LIMIT {}").format(
        SQL(", ").join(each()), definition.identifier, SQL(str(SAMPLE))
    )


def _is_met(connection: Connection, sample: Composed, condition: str) -> bool:
    """Whether a condition, as the server printed it, holds for a row."""
    query = SQL("SELECT EXISTS (SELECT FROM ({}) AS s WHERE {})").format(sample, verbatim(condition))
    return _is_so(connection, query)


def _is_so(connection: Connection, query: Composed) -> bool:
    """The answer; no, where it cannot be asked of these rows, or not by this role, which the steps will say."""
    try:
        with connection.transaction():
            return bool(answer(connection, query))
    except (psycopg.DataError, psycopg.ProgrammingError, psycopg.errors.RaiseException):
        return False
