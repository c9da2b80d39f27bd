"""Where each table stands: which side is right, whether its plaintext is there, and what a switch or a drop took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, LiteralString

from pydantic import BaseModel, ConfigDict

from alphapulse_encryption import lifecycle
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import Authority, State
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.postgres.database import Connection, answer


class NotNull(BaseModel):
    """A column's NOT NULL, and its constraint: nothing of that before PostgreSQL 18, which names them first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    definition: str | None = None
    comment: str | None = None


class OfPartition(BaseModel):
    """What one partition had otherwise than the table above it gives: defaults (None is none), NOT NULL by column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_name: str
    name: str
    defaults: dict[str, str | None] = {}
    not_null: dict[str, NotNull] = {}


class SetAside(BaseModel):
    """What the switch took off the plaintext columns, to be put back by a revert.

    Attributes:
        defaults: expressions by column.
        partitions: upper ones first.
        unguarded: nothing was, but the guard is gone with the views since a revert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defaults: dict[str, str] = {}
    not_null: dict[str, NotNull] = {}
    partitions: tuple[OfPartition, ...] = ()
    unguarded: bool = False


@dataclass(frozen=True)
class TableState:
    """Where a table stands."""

    state: State
    set_aside: SetAside

    @property
    def authority(self) -> Authority:
        """Which side is the source of truth."""
        return self.state.authority


def register_table(connection: Connection, table: Table) -> None:
    """Make the table and its columns known to the bookkeeping, where they are not."""
    connection.execute(
        "INSERT INTO alphapulse_encryption.tables (table_name) VALUES (%s) ON CONFLICT DO NOTHING",
        [table.key],
    )
    connection.execute(
        "INSERT INTO alphapulse_encryption.columns (table_name, column_name) "
        "SELECT %s, c FROM unnest(%s::text[]) AS c ON CONFLICT DO NOTHING",
        [table.key, [column.name for column in table.columns]],
    )


def table_state(connection: Connection, table: Table, *, lock: bool = False) -> TableState | None:
    """The table's state, or None where its encrypted columns were never added.

    Args:
        lock: hold the row until the end of the transaction, so that no other step changes it meanwhile.
    """
    query: LiteralString = (
        "SELECT authority, stage, set_aside FROM alphapulse_encryption.tables WHERE table_name = %s"
    )
    row = connection.execute(query + (" FOR UPDATE" if lock else ""), [table.key]).fetchone()
    return None if row is None else _decoded(*row)


def _decoded(authority: Authority, stage: str, kept: object) -> TableState:
    aside = SetAside.model_validate(kept)
    taken = bool(aside.defaults or aside.not_null)
    state = lifecycle.decode(authority, stage, unguarded=aside.unguarded, set_aside=taken)
    return TableState(state, aside)


def require_state(connection: Connection, table: Table, *, lock: bool = False) -> TableState:
    """The table's state.

    Raises:
        RefusedError: its encrypted columns were never added.
    """
    state = table_state(connection, table, lock=lock) if bookkeeping_exists(connection) else None
    if state is None:
        raise RefusedError(
            f"Table {table.key} has no encrypted columns yet. Run the step encrypted_columns "
            f"(--add-columns --table {table.key}) first."
        )
    return state


def require_guarded_state(connection: Connection, table: Table) -> TableState:
    """The table's state, where its migration is under way.

    Raises:
        RefusedError: the encrypted columns were never added, or the table was reverted since.
    """
    state = require_state(connection, table)
    if state.state is State.REVERTED:
        raise RefusedError(
            f"Table {table.key} was reverted to plaintext. Begin again with the encrypted columns "
            f"(--add-columns --table {table.key}); nothing was changed."
        )
    return state


def advance(connection: Connection, table: Table, to: State, set_aside: SetAside | None = None) -> None:
    """Record where the table stands now; called in the transaction that brings it there.

    Raises:
        RefusedError: no step leads there from where it stands.
    """
    now = require_state(connection, table, lock=True).state
    if not lifecycle.leads(now, to):
        raise RefusedError(
            f"Table {table.key} was changed by another run meanwhile: it is {now}, from which no step leads to {to}. "
            "Run the step again; nothing was changed."
        )
    kept = SetAside(unguarded=True) if to is State.REVERTED else set_aside or SetAside()
    stage = "columns" if to.has_both_sides else to.stage
    connection.execute(
        "UPDATE alphapulse_encryption.tables SET authority = %s, stage = %s, set_aside = %s, changed_at = now() "
        "WHERE table_name = %s",
        [to.authority, stage, kept.model_dump_json(exclude_defaults=True), table.key],
    )


def states(connection: Connection) -> dict[str, TableState]:
    """The state of every known table, by its key; empty where nothing was begun."""
    if not bookkeeping_exists(connection):
        return {}
    rows = connection.execute(
        "SELECT table_name, authority, stage, set_aside FROM alphapulse_encryption.tables"
    )
    return {key: _decoded(*rest) for key, *rest in rows}


def keep_definition(connection: Connection, table: Table, definition: str) -> int:
    """Keep what a drop takes away as JSON, in its transaction, until a restore has rebuilt it; its number."""
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
