"""Where each table stands: which side is right, whether its plaintext is there, and what a switch or a drop took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, LiteralString

from pydantic import BaseModel, ConfigDict

from alphapulse_encryption import lifecycle
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import Authority, State
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.bookkeeping.evidence import DEFINITION, SET_ASIDE, Row
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer
from alphapulse_encryption.migration.postgres.stored import Constraint, Expression


class NotNull(BaseModel):
    """A column's NOT NULL, and its constraint: nothing of that before PostgreSQL 18, which names them first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    definition: Constraint | None = None
    comment: str | None = None


class OfPartition(BaseModel):
    """What one partition had otherwise than the table above it gives: defaults (None is none), NOT NULL by column."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_name: str
    name: str
    defaults: dict[str, Expression | None] = {}
    not_null: dict[str, NotNull] = {}


class SetAside(BaseModel):
    """What the switch took off the plaintext columns, to be put back by a revert.

    Attributes:
        defaults: expressions by column.
        partitions: upper ones first.
        unguarded: nothing was, but the guard is gone with the views since a revert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    defaults: dict[str, Expression] = {}
    not_null: dict[str, NotNull] = {}
    partitions: tuple[OfPartition, ...] = ()
    unguarded: bool = False


@dataclass(frozen=True)
class TableState:
    """Where a table stands."""

    state: State
    kept: Mapping[str, Any]

    @property
    def set_aside(self) -> SetAside:
        """What a switch took off.

        Raises:
            RefusedError: it is not what a switch writes; whether it is ours, :func:`authentic_state` tells.
        """
        return SetAside.model_validate(self.kept)

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


def _decoded(authority: Authority, stage: str, kept: Mapping[str, Any]) -> TableState:
    state = lifecycle.decode(
        authority, stage, unguarded=bool(kept.get("unguarded")), set_aside=_took(kept, "defaults", "not_null")
    )
    return TableState(state, kept)


def _took(kept: Mapping[str, Any], *names: str) -> bool:
    return any(kept.get(name) for name in names)


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


def authentic_state(connection: Connection, table: Table, keys: KeyRing, *, lock: bool = False) -> TableState:
    """The table's state, once it is known that what it set aside was written with a key of this key ring.

    Raises:
        RefusedError: its encrypted columns were never added; or somebody else wrote it, or put an older one back.
    """
    state = require_state(connection, table, lock=lock)
    if unsigned_state(connection, table, keys) is not None:
        raise RefusedError(
            f"What a switch set aside of {table.key} (alphapulse_encryption.tables) is not authenticated"
            f"{_UNSIGNED} --sign-saved show --table {table.key} shows it, and signs it where you say so; nothing was "
            "changed."
        )
    return state


_UNSIGNED = (
    ": it was changed, is not the newest, comes from another database, or was kept by an older program."
)


def unsigned_state(connection: Connection, table: Table, keys: KeyRing) -> Row | None:
    """The row of a table's state, where that is not authenticated and something goes by it."""
    for row in evidence.read(connection, SET_ASIDE, "table_name = %s", table.key):
        newest = evidence.newest(connection, SET_ASIDE, table.key)
        aside = SetAside.model_validate(row["set_aside"])
        nothing = row["authority"] == "plaintext" and not (
            aside.defaults or aside.not_null or aside.partitions
        )
        # One that was only begun.
        if newest is None and nothing:
            continue
        if row["number"] != newest or not all(evidence.are_genuine(connection, keys, SET_ASIDE, [(row,)])):
            return row
    return None


def advance(
    connection: Connection,
    keys: KeyRing,
    actor: Actor,
    table: Table,
    to: State,
    set_aside: SetAside | None = None,
) -> None:
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
    aside = kept.model_dump(mode="json", exclude_defaults=True)
    now_at = answer(connection, "SELECT now()")
    values = {"table_name": table.key, "authority": to.authority, "stage": stage, "set_aside": aside}
    evidence.keep(connection, keys, actor, SET_ASIDE, {**values, "changed_at": now_at})


def states(connection: Connection) -> dict[str, TableState]:
    """The state of every known table, by its key; empty where nothing was begun."""
    if not bookkeeping_exists(connection):
        return {}
    rows = connection.execute(
        "SELECT table_name, authority, stage, set_aside FROM alphapulse_encryption.tables"
    )
    return {key: _decoded(*rest) for key, *rest in rows}


def keep_definition(
    connection: Connection, keys: KeyRing, actor: Actor, table: Table, definition: Mapping[str, Any]
) -> int | None:
    """Keep what a drop takes away, in its transaction; its number."""
    values = {"table_name": table.key, "definition": definition}
    return evidence.keep(connection, keys, actor, DEFINITION, values)


def kept_definition(connection: Connection, table: Table, keys: KeyRing | None) -> Any:
    """What the last drop took away; None where there was none. Without keys nothing is checked.

    Raises:
        RefusedError: it is not the one that the last drop kept with a key of this key ring.
    """
    row = _last_definition(connection, table)
    if row is not None and keys is not None and unsigned_definition(connection, table, keys) is not None:
        raise RefusedError(
            f"Definition {row['id']}, saved at a drop of {table.key} (alphapulse_encryption.definitions), is not "
            f"authenticated{_UNSIGNED} --sign-saved show --table {table.key} shows it, and signs it where you say so; "
            "nothing was changed."
        )
    return None if row is None else row["definition"]


def unsigned_definition(connection: Connection, table: Table, keys: KeyRing) -> Row | None:
    """The row of the last definition, where that is not authenticated."""
    row = _last_definition(connection, table)
    if row is None:
        return None
    newest = evidence.newest(connection, DEFINITION, table.key)
    genuine = row["number"] == newest and all(evidence.are_genuine(connection, keys, DEFINITION, [(row,)]))
    return None if genuine else row


def _last_definition(connection: Connection, table: Table) -> Row | None:
    # Restored or not, which is for people to see: what is dropped now is what the last one tells of.
    rows = evidence.read(connection, DEFINITION, "table_name = %s", table.key)
    return rows[-1] if rows else None


def mark_restored(connection: Connection, table: Table) -> None:
    """The table is as it was before the drop."""
    connection.execute(
        "UPDATE alphapulse_encryption.definitions SET restored_at = clock_timestamp() "
        "WHERE table_name = %s AND restored_at IS NULL",
        [table.key],
    )
