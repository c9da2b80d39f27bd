"""What a table holds before anything is encrypted, by a sample of its rows: what would go wrong with these very values.

Belongs here: questions that only the rows can answer. What follows from definitions alone is in ``dependants``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import LiteralString

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.sql import verbatim

# A question about rows is answered by so many of them; but whether a column that is there is empty takes all.
SAMPLE = 1_000

# Single values may look like one by chance, or because a person put it into a text; not one in twenty.
_IS_ENVELOPE: LiteralString = """
SELECT count(*) FILTER (WHERE value ~ '^\\s*[{{]' AND value ~ '"ciphertext"\\s*:' AND value ~ '"algorithm"\\s*:') * 20
       > count(*)
  FROM (SELECT {column}::text AS value FROM {table} WHERE {column} IS NOT NULL LIMIT {most}) AS s
"""
_HAS_VALUES: LiteralString = "SELECT EXISTS (SELECT FROM {table} WHERE {column} IS NOT NULL)"


def encrypted_already(connection: Connection, definition: TableDefinition) -> tuple[str, ...]:
    """What somebody else has encrypted: plaintext columns with envelopes, ciphertext and tokens that are not ours.

    To be asked of a table on which no step has worked yet.
    """
    found = []
    for column in definition.table.columns:
        asked = [(column.name, _IS_ENVELOPE, "holds envelopes already")]
        asked += [(name, _HAS_VALUES, "holds values already") for name in column.derived]
        for name, query, what in asked:
            if name in definition.columns:
                parts = {"column": Identifier(name), "table": definition.identifier, "most": SQL(str(SAMPLE))}
                if _is_so(connection, SQL(query).format(**parts)):
                    found.append(f"{name} {what}")
    return tuple(found)


# Constraints that are checked for every row, and columns made from others that have to have a value.
_CONDITIONS = """
SELECT 'constraint ' || c.conname, '(' || pg_get_expr(c.conbin, c.conrelid) || ') IS FALSE'
  FROM pg_constraint c
 WHERE c.conrelid = %(table)s AND c.contype = 'c' AND c.conname <> ALL(%(ours)s)
   AND EXISTS (SELECT FROM pg_attribute a
                WHERE a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey) AND a.attname = ANY(%(columns)s))
UNION ALL
SELECT 'generated column ' || g.attname, '(' || pg_get_expr(f.adbin, f.adrelid) || ') IS NULL'
  FROM pg_attribute g JOIN pg_attrdef f ON f.adrelid = g.attrelid AND f.adnum = g.attnum
 WHERE g.attrelid = %(table)s AND g.attgenerated <> '' AND g.attnotnull
   AND EXISTS (SELECT FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
                WHERE d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid AND d.refobjid = g.attrelid
                  AND a.attname = ANY(%(columns)s))
 ORDER BY 1
"""


def refuse_ciphertext_alone(connection: Connection, definition: TableDefinition) -> tuple[str, ...]:
    """Constraints and generated columns that refuse a row whose plaintext is NULL, as it is from the switch on.

    Each is asked of rows as they are, with NULL for the catalogued columns; and with NULL for all that may be NULL.
    """
    columns = [column.name for column in definition.plaintext_columns]
    asked = {"table": definition.oid, "columns": columns, "ours": saved_ddl.our_names(definition.table)}
    nullable = [name for name, column in definition.columns.items() if not column.not_null]
    found = []
    for name, condition in connection.execute(_CONDITIONS, asked).fetchall():
        samples = (_without(definition, names) for names in (set(columns), {*columns, *nullable}))
        if any(_holds(connection, sample, condition) for sample in samples):
            found.append(name)
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


def _holds(connection: Connection, sample: Composed, condition: str) -> bool:
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
