"""Batch ranges: every table is cut once into the same number of parts by quantiles of its primary key."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration import sql, tracking
from alphapulse_encryption.migration.definition import TableDefinition

Connection = psycopg.Connection[Any]

# A sample of this many pages places the boundaries of a large table; a smaller table is read whole.
SAMPLED_PAGES = 2_000

_QUANTILES = """
SELECT {names} FROM generate_series(1, %s - 1) AS i
  JOIN (SELECT {key}, row_number() OVER (ORDER BY {order}) AS position, count(*) OVER () AS total
          FROM {table} t {sample}) s ({names}, position, total)
    ON s.position = greatest(1, s.total * i / %s)
 ORDER BY i
"""


def ensure_ranges(connection: Connection, definition: TableDefinition, count: int) -> int:
    """Plan the table's batch ranges where that was not done; once planned they stay.

    The first range is open below and the last one above, so that rows inserted later belong somewhere.
    A large table is not read whole: the boundaries come from a sample of its pages.

    Args:
        connection: in autocommit mode.
        definition: the table.
        count: how many ranges.

    Returns:
        The number of ranges.

    Raises:
        ConfigurationError: ranges were planned with another number.
    """
    table = definition.table
    if planned := check_ranges(connection, table, count):
        return planned
    boundaries = _boundaries(connection, definition, count)
    lowers: list[list[str] | None] = [None, *boundaries]
    uppers: list[list[str] | None] = [*boundaries, None]
    if not boundaries:
        # Nothing to go by: the last range holds everything, those before it are empty for good.
        lowers = [[] for _ in range(count - 1)] + [None]
        uppers = [[] for _ in range(count - 1)] + [None]
    with connection.transaction():
        for number, (lower, upper) in enumerate(zip(lowers, uppers, strict=True)):
            connection.execute(
                "INSERT INTO public.encryption_ranges (table_name, batch_range, lower_key, upper_key) "
                "VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                [table.key, number, lower, upper],
            )
    return count


def check_ranges(connection: Connection, table: Table, count: int) -> int:
    """Hold a number of ranges against the table's planned ones; reads only.

    Returns:
        How many are planned; 0 before the first time.

    Raises:
        ConfigurationError: ranges were planned with another number.
    """
    planned = len(tracking.read_ranges(connection, table)) if tracking.bookkeeping_exists(connection) else 0
    if planned not in (0, count):
        raise ConfigurationError(
            f"Table {table.key} is cut into {planned} batch ranges, and ALPHAPULSE_BATCH_RANGES asks for "
            f"{count}. Set it to {planned}: ranges stay as they were planned."
        )
    return planned


def _boundaries(connection: Connection, definition: TableDefinition, count: int) -> list[list[str]]:
    row = connection.execute(
        "SELECT coalesce(sum(pg_relation_size(relid)), 0) / current_setting('block_size')::int "
        "FROM (SELECT relid FROM pg_partition_tree(%s) UNION SELECT %s::oid) AS parts",
        [definition.oid, definition.oid],
    ).fetchone()
    pages = int(row[0]) if row is not None else 0
    sample = SQL("")
    if pages > SAMPLED_PAGES:
        percent = 100.0 * SAMPLED_PAGES / pages
        sample = SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (0)").format(Literal(percent))  # type: ignore[assignment]
    names = SQL(", ").join(Identifier(f"k{number}") for number in range(len(definition.key)))
    query = SQL(_QUANTILES).format(
        names=names,
        key=sql.key_text(definition),
        order=sql.key_list(definition),
        table=definition.identifier,
        sample=sample,
    )
    return [list(row) for row in connection.execute(query, [count, count])]
