"""What is tuned for the length of a step: storage parameters as they were before, and who holds the change."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Actor, Connection


def holder_lock(holder: uuid.UUID) -> str:
    """Name of the advisory lock by which a holder is known to be alive."""
    return f"alphapulse_encryption tuning {holder}"


def abandoned(connection: Connection) -> list[str]:
    """Keys of the tables that are tuned, and of which no holder is alive."""
    rows = connection.execute(
        "SELECT DISTINCT table_name FROM alphapulse_encryption.tuning ORDER BY 1"
    ).fetchall()
    return [key for (key,) in rows if not _alive(connection, key)]


def _alive(connection: Connection, key: str) -> list[uuid.UUID]:
    rows = connection.execute(
        "SELECT holder FROM alphapulse_encryption.tuning_holders WHERE table_name = %s", [key]
    ).fetchall()
    held = locks.holders(connection, [holder_lock(holder) for (holder,) in rows]) if rows else {}
    return [holder for (holder,) in rows if holder_lock(holder) in held]


def keep_holder(connection: Connection, table: Table, holder: uuid.UUID, actor: Actor) -> None:
    """Somebody holds a table's tuning."""
    connection.execute(
        "INSERT INTO alphapulse_encryption.tuning_holders (holder, table_name, actor, run_id) VALUES (%s, %s, %s, %s)",
        [holder, table.key, actor.name, actor.run_id],
    )


def keep_options(connection: Connection, table: Table, oid: int) -> bool:
    """Remember the storage parameters that a relation has; False where that was done before."""
    remembered = connection.execute(
        "INSERT INTO alphapulse_encryption.tuning (relation, table_name, options, toast_options) "
        "SELECT c.oid, %s, coalesce(c.reloptions, '{}'), coalesce(t.reloptions, '{}') "
        "FROM pg_class c LEFT JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.oid = %s ON CONFLICT DO NOTHING",
        [table.key, oid],
    )
    return bool(remembered.rowcount)


def release_holder(connection: Connection, key: str, holder: uuid.UUID | None) -> bool:
    """Take a holder of a table away, and all that are dead; whether none is left."""
    alive = [one for one in _alive(connection, key) if one != holder]
    connection.execute(
        "DELETE FROM alphapulse_encryption.tuning_holders WHERE table_name = %s AND holder <> ALL (%s)",
        [key, alive],
    )
    return not alive


def take_options(connection: Connection, key: str) -> list[tuple[int, Sequence[str], Sequence[str]]]:
    """Forget what was remembered of a table's relations, and return it: oid, parameters, and those of TOAST."""
    return connection.execute(
        "DELETE FROM alphapulse_encryption.tuning WHERE table_name = %s RETURNING relation::oid, "
        "options, toast_options",
        [key],
    ).fetchall()
