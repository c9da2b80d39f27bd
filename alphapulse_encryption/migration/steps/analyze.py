"""The planner's statistics of a table, taken again beside the running application (``ANALYZE``)."""

from __future__ import annotations

from collections.abc import Callable

from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres.build_progress import telling
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.postgres.ddl import maintain, outside_transaction
from alphapulse_encryption.migration.rows.tuning import LOCK_TIMEOUT
from alphapulse_encryption.migration.schema.definition import read_table


def analyze(
    database: Database, table: Table, actor: Actor, *, on_progress: Callable[[str], None] | None = None
) -> int:
    """Take a table's statistics again, those of its partitions included; returns its rows, as estimated now.

    Nobody's reading or writing waits for it: its lock (SHARE UPDATE EXCLUSIVE) keeps out schema changes and other
    maintenance only, and is waited for in short attempts.

    Args:
        on_progress: told, from another thread, how far it is.

    Raises:
        RefusedError: columns not added, the role may not analyse the table, or a lock could not be had.
        ConfigurationError: the table is missing.
    """
    doing = f"analyze {table.key}"
    with database.session(doing) as connection, telling(database, table, on_progress, progress=True):
        require_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        told: list[str | None] = []
        connection.add_notice_handler(lambda notice: told.append(notice.severity_nonlocalized))
        statement = SQL("ANALYZE {}").format(definition.identifier)
        outside_transaction(
            connection, doing, lambda: maintain(connection, statement), lock_timeout=LOCK_TIMEOUT
        )
        # What a role may not analyse, the server leaves out with a warning.
        if "WARNING" in told:
            raise RefusedError(
                f"The server did not analyse {table.key}, or not all of its partitions: this role may not. Let their "
                "owner do it, or from PostgreSQL 17 on GRANT MAINTAIN on them."
            )
        audit(connection, actor, "analyze", table)
        return read_table(connection, table, plaintext=False).estimated_rows
