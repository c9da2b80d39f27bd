"""The audit log: who changed what in the database, and when. It is only ever added to."""

from __future__ import annotations

import json

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer


def audit(
    connection: Connection, actor: Actor, action: str, table: Table | str | None = None, **details: object
) -> int:
    """Append to the audit log, in the transaction of what it tells of; its details never hold a value.

    Returns the entry's number, which is larger than that of every one before.
    """
    key = table.key if isinstance(table, Table) else table
    statement = (
        "INSERT INTO alphapulse_encryption.audit_log (actor, run_id, table_name, action, details) "
        "VALUES (%s, %s, %s, %s, %s) RETURNING id"
    )
    values = (actor.name, actor.run_id, key, action, json.dumps(details, default=str))
    return int(answer(connection, statement, *values))


def last_entry(connection: Connection, action: str, table: Table) -> int:
    """Number of the last entry that tells of an action on a table; 0 where none does."""
    query = "SELECT coalesce(max(id), 0) FROM alphapulse_encryption.audit_log WHERE table_name = %s AND action = %s"
    return int(answer(connection, query, table.key, action))
