"""A new try after a revert: ciphertext that no guard watched over is taken away, to be made anew."""

from __future__ import annotations

from typing import Any

import psycopg
from psycopg.sql import SQL, Composed, Identifier

from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.postgres.database import Actor, mark_as_engine
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows.batches import key_of, plan_by_key
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition

Connection = psycopg.Connection[Any]

ROWS_PER_BATCH = 2_000


def clear_unguarded(connection: Connection, definition: TableDefinition, actor: Actor) -> int:
    """Clear the ciphertexts and tokens that were there while a reverted table had no guard.

    The application may have changed the plaintext beside any of them since, and nothing in the row would tell. To be
    called when the guard is back in place: then whatever is cleared is pending, and encrypted by the next backfill. In
    short transactions; the state remembers that there is something to clear until all of it is.

    Args:
        connection: in autocommit mode.
        definition: the table.
        actor: who does it.

    Returns:
        The number of rows cleared; 0 where the table was not reverted.

    Raises:
        RefusedError: a lock could not be had; call it again.
    """
    table = definition.table
    state = tracking.require_state(connection, table)
    if state.state is not State.REVERTED:
        return 0
    plan_by_key(connection)
    rows = 0
    position: Key | None = None
    while True:
        condition, parameters = sql.within(definition, position, None)
        last = connection.execute(
            _last_of_batch(definition, condition), [*parameters, ROWS_PER_BATCH]
        ).fetchone()
        if last is None:
            break
        bounds, keys = sql.within(definition, position, key_of(definition, last))

        def clear(bounds: Composed = bounds, keys: list[str] = keys) -> int:
            mark_as_engine(connection)
            return connection.execute(_clear(definition, bounds), keys).rowcount

        rows += in_short_transaction(connection, f"clear old ciphertext of {table.key}", clear)
        position = key_of(definition, last)

    def finish() -> None:
        tracking.advance(connection, table, State.GUARDED)
        tracking.audit(connection, actor, "clear_ciphertext", table, rows=rows)

    in_short_transaction(connection, f"clear old ciphertext of {table.key}", finish)
    return rows


def _stored(definition: TableDefinition) -> list[str]:
    return [name for column in definition.encrypted_columns for name in column.derived]


def _filled(definition: TableDefinition) -> Composed:
    return SQL("({})").format(
        SQL(" OR ").join(SQL("{} IS NOT NULL").format(Identifier("t", name)) for name in _stored(definition))
    )


def _last_of_batch(definition: TableDefinition, condition: Composed) -> Composed:
    return SQL(
        "SELECT {key} FROM (SELECT {columns} FROM {table} t WHERE {condition} AND {filled} "
        "ORDER BY {columns} LIMIT %s) t ORDER BY {descending} LIMIT 1"
    ).format(
        key=sql.key_text(definition),
        columns=sql.key_list(definition),
        table=definition.identifier,
        condition=condition,
        filled=_filled(definition),
        descending=SQL(", ").join(SQL("{} DESC").format(Identifier("t", key.name)) for key in definition.key),
    )


def _clear(definition: TableDefinition, condition: Composed) -> Composed:
    return SQL("UPDATE {} t SET {} WHERE {} AND {}").format(
        definition.identifier,
        SQL(", ").join(SQL("{} = NULL").format(Identifier(name)) for name in _stored(definition)),
        condition,
        _filled(definition),
    )
