"""Queries whose answer is one value."""

from __future__ import annotations

from typing import Any, LiteralString

from psycopg.rows import scalar_row
from psycopg.sql import SQL, Composed

from alphapulse_encryption.migration.postgres.database import Connection


def answer(connection: Connection, query: LiteralString | SQL | Composed, *parameters: object) -> Any:
    """The first value of a query's first row; None where there is no row."""
    return connection.cursor(row_factory=scalar_row).execute(query, parameters or None).fetchone()
