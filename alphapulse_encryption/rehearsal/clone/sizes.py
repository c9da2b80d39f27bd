"""How large things are: of the clone, measured, and of production, from its statistics or as somebody says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.rehearsal.clone.source import production_database
from alphapulse_encryption.rehearsal.measures import Finding, Sizes, TableSize

# Of a partitioned table, those of its partitions; the planner's row estimates are -1 where there never was one.
_SIZE = """
SELECT sum(greatest(p.reltuples, 0))::bigint, sum(pg_table_size(p.oid))::bigint, sum(pg_indexes_size(p.oid))::bigint
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_class p ON p.oid = c.oid OR p.oid IN (SELECT relid FROM pg_partition_tree(c.oid))
 WHERE n.nspname = %s AND c.relname = %s AND p.relkind IN ('r', 'p')
HAVING count(*) > 0
"""


def read_sizes(
    connection: Connection, tables: Iterable[Table], *, rows: Mapping[str, int] | None = None
) -> Sizes:
    """The sizes of a database and of its tables that are there; rows as counted, else as the planner estimates."""
    found = {}
    for table in tables:
        for estimate, heap, indexes in connection.execute(_SIZE, [table.schema_name, table.name]):
            counted = (rows or {}).get(table.key, estimate)
            found[table.key] = TableSize(rows=counted, heap=heap, indexes=indexes)
    return Sizes(database=answer(connection, "SELECT pg_database_size(current_database())"), tables=found)


def count_rows(connection: Connection, tables: Iterable[Table]) -> dict[str, int]:
    """The rows of every table; reads all of them."""
    count = SQL("SELECT count(*) FROM {}")
    return {
        table.key: answer(connection, count.format(Identifier(table.schema_name, table.name)))
        for table in tables
    }


def production_sizes(
    tables: Iterable[Table], rows: Mapping[str, int], sizes: Mapping[str, int], clone: Sizes
) -> tuple[Sizes | None, tuple[Finding, ...]]:
    """How large production is, None where nothing is known of it; and what somebody should know of that.

    Args:
        rows, sizes: by table, as somebody says; bytes, indexes included.
        clone: the sizes before, for proportions.
    """
    known: Sizes | None = None
    findings: tuple[Finding, ...] = ()
    production = production_database()
    if production is not None:
        try:
            with production.session("read the size of production") as connection:
                known = read_sizes(connection, tables)
        except MigrationError as error:
            findings = (Finding(level="note", subject="size of production", what=error.args[0]),)
    if not rows and not sizes:
        return known, findings
    found = dict(known.tables) if known is not None else {}
    for key, small in clone.tables.items():
        before = found.get(key, small)
        wanted = rows.get(key, before.rows)
        scale = wanted / before.rows if before.rows else 1.0
        if key in sizes and before.bytes:
            scale = sizes[key] / before.bytes
        found[key] = before.times(scale).model_copy(update={"rows": wanted})
    whole = known or clone
    rest = whole.database - sum(size.bytes for size in whole.tables.values())
    total = rest + sum(size.bytes for size in found.values())
    return Sizes(database=max(total, 0), tables=found), findings
