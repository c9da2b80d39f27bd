"""What a drop took away of a table, kept as JSON until a restore has rebuilt it."""

from __future__ import annotations

from typing import Any

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.answers import answer
from alphapulse_encryption.migration.postgres.database import Connection


def keep_definition(connection: Connection, table: Table, definition: str) -> int:
    """Keep a definition, in the transaction of the drop; its number."""
    statement = (
        "INSERT INTO alphapulse_encryption.definitions (table_name, definition) VALUES (%s, %s) RETURNING id"
    )
    return int(answer(connection, statement, table.key, definition))


def kept_definition(connection: Connection, table: Table) -> Any:
    """What the last drop that was not undone took away; None where there was none."""
    query = (
        "SELECT definition FROM alphapulse_encryption.definitions "
        "WHERE table_name = %s AND restored_at IS NULL ORDER BY id DESC LIMIT 1"
    )
    return answer(connection, query, table.key)


def mark_restored(connection: Connection, table: Table) -> None:
    """The table is as it was before the drop."""
    connection.execute(
        "UPDATE alphapulse_encryption.definitions SET restored_at = clock_timestamp() "
        "WHERE table_name = %s AND restored_at IS NULL",
        [table.key],
    )
