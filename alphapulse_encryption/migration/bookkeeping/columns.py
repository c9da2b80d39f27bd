"""The columns' status, which operators watch: what is kept of each, and when it changes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from psycopg.rows import dict_row

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Connection

Status = Literal["pending", "in_progress", "completed", "failed"]


def set_status(connection: Connection, table: Table, status: Status, message: str | None = None) -> None:
    """All columns of a table come to be so, in the transaction of what makes them; a message has no values."""
    lock_columns(connection, table)
    connection.execute(
        "UPDATE alphapulse_encryption.columns SET status = %(status)s, error_message = %(message)s, "
        "started_at = coalesce(started_at, clock_timestamp()), "
        "completed_at = CASE WHEN %(status)s = 'completed' THEN clock_timestamp() END "
        "WHERE table_name = %(table)s AND column_name = ANY(%(columns)s) "
        "AND (status, error_message) IS DISTINCT FROM (%(status)s, %(message)s::text)",
        {
            "table": table.key,
            "columns": [column.name for column in table.columns],
            "status": status,
            "message": message,
        },
    )


def lock_columns(connection: Connection, table: Table) -> None:
    """Keep the table's rows until the end of the transaction."""
    # Always in order of their names: two ranges of one table never wait for each other crosswise.
    connection.execute(
        "SELECT FROM alphapulse_encryption.columns WHERE table_name = %s ORDER BY column_name FOR UPDATE",
        [table.key],
    )


def reset_status(connection: Connection, table: Table, *, uncounted: bool = False) -> None:
    """Every column of the table is pending; uncounted, where the records processed are forgotten, too."""
    connection.execute(
        "UPDATE alphapulse_encryption.columns SET status = 'pending', completed_at = NULL, error_message = NULL, "
        "records_processed = CASE WHEN %(uncounted)s THEN 0 ELSE records_processed END, "
        "started_at = CASE WHEN %(uncounted)s THEN NULL ELSE started_at END WHERE table_name = %(table)s",
        {"table": table.key, "uncounted": uncounted},
    )


def column_progress(connection: Connection, table: Table) -> dict[str, dict[str, Any]]:
    """What is kept of each column that is known, by its name."""
    rows = connection.cursor(row_factory=dict_row).execute(
        "SELECT column_name, status, records_processed, started_at, completed_at, error_message "
        "FROM alphapulse_encryption.columns WHERE table_name = %s",
        [table.key],
    )
    return {row.pop("column_name"): row for row in rows}


_UNCATALOGUED = """
SELECT m.table_name, m.column_name FROM alphapulse_encryption.columns m
  JOIN pg_class c ON c.relkind IN ('r', 'p') JOIN pg_namespace n ON n.oid = c.relnamespace
   AND m.table_name = CASE n.nspname WHEN 'public' THEN c.relname ELSE n.nspname || '.' || c.relname END
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = m.column_name || '_encrypted' AND NOT a.attisdropped
 WHERE NOT EXISTS (SELECT FROM unnest(%s::text[], %s::text[]) AS k (t, c)
                    WHERE (k.t, k.c) = (m.table_name, m.column_name))
 ORDER BY 1, 2
"""


def uncatalogued_columns(connection: Connection, tables: Iterable[Table]) -> list[tuple[str, str]]:
    """Table and column of what has an encrypted column in the database and is not among these tables' columns."""
    named = [(table.key, column.name) for table in tables for column in table.columns]
    rows = connection.execute(_UNCATALOGUED, [[table for table, _ in named], [column for _, column in named]])
    return [(table, column) for table, column in rows]
