"""The drop of a table's plaintext columns: only what a person approved, and only while all of it still holds.

Everything that takes time is done without a lock: the table is verified once more, rows written since the
last verification included, and the backup is read. Then one short transaction takes the lock, looks again at
all that can be seen in time that does not grow with the table, saves what it drops, drops it and uses the
approval up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration import approvals, columns, indexes, saved, sql, switch, tracking, verify
from alphapulse_encryption.migration.approvals import Approval
from alphapulse_encryption.migration.backup import check_backup, read_backup
from alphapulse_encryption.migration.batches import plan_by_key
from alphapulse_encryption.migration.catch_up import has_pending_index
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.ddl import in_short_transaction
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class DropResult:
    """What :func:`drop_plaintext` did.

    Args:
        changed: False where the plaintext was dropped, and all of it finished, before.
        columns: the columns dropped now.
        constraints: names of the constraints that went with them.
        indexes: names of the indexes that went with them.
        required: encrypted columns that are NOT NULL from now on in their place.
        approval: the approval used up; None where nothing was dropped now.
        definition_id: row of ``encryption_definitions`` from which a restore rebuilds them; None as well.
        seconds: duration.
    """

    changed: bool
    columns: tuple[str, ...]
    constraints: tuple[str, ...]
    indexes: tuple[str, ...]
    required: tuple[str, ...]
    approval: Approval | None
    definition_id: int | None
    seconds: float


def drop_plaintext(
    database: Database,
    catalogue: Catalogue,
    table: Table,
    cipher: EnvelopeFormat,
    keys: KeyRing,
    actor: Actor,
) -> DropResult:
    """Drop the table's plaintext columns.

    Args:
        database: the target.
        catalogue: as it is now; the approval is held against it.
        table: the table.
        cipher: the catalogue's envelope format.
        keys: the key ring; the approval is held against it.
        actor: who does it.

    Raises:
        RefusedError: no valid approval, or anything it relies on does not hold now; nothing was changed.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused; nothing was changed.
    """
    started = time.monotonic()
    doing = f"drop the plaintext of {table.key}"
    dropped: _Dropped | None = None
    with database.session(doing) as connection:
        state = tracking.require_state(connection, table)
        tracking.check_key(connection, keys)
        if state.stage != "dropped":
            approval = _refuse_unless_allowed(connection, catalogue, table, keys)
            _verify_now(database, connection, table, cipher, keys, actor)
            plan_by_key(connection)
            dropped = in_short_transaction(
                connection, doing, lambda: _drop(connection, catalogue, table, keys, actor, approval)
            )
        required = _require_ciphertext(connection, table, actor)
    return DropResult(
        changed=dropped is not None or bool(required),
        columns=tuple(column.name for column in dropped.what.columns) if dropped else (),
        constraints=tuple(constraint.name for constraint in dropped.what.constraints) if dropped else (),
        indexes=tuple(index.name for index in dropped.what.indexes) if dropped else (),
        required=required,
        approval=dropped.approval if dropped else None,
        definition_id=dropped.definition_id if dropped else None,
        seconds=time.monotonic() - started,
    )


@dataclass(frozen=True)
class _Dropped:
    what: saved.SavedTable
    approval: Approval
    definition_id: int


def _refuse_unless_allowed(
    connection: Connection, catalogue: Catalogue, table: Table, keys: KeyRing
) -> Approval:
    """The approval, and what can be said of it without a lock; the cheap reasons to refuse come first."""
    definition = read_table(connection, table)
    approval = approvals.valid_approval(connection, catalogue, definition, keys)
    approvals.refuse_unless_droppable(connection, table, keys)
    _refuse_without_pending_index(connection, definition)
    backup = read_backup(connection, approval.backup_id)
    if backup is None:
        raise RefusedError(f"The backup that approval {approval.id} relies on is not recorded any more.")
    check_backup(backup)
    return approval


def _verify_now(
    database: Database,
    connection: Connection,
    table: Table,
    cipher: EnvelopeFormat,
    keys: KeyRing,
    actor: Actor,
) -> None:
    for batch_range in tracking.read_ranges(connection, table):
        found = verify.verify_range(database, table, batch_range.number, cipher, keys, actor)
        if not found.passed:
            named = "; ".join(str(offender) for offender in found.offenders[:10])
            raise RefusedError(
                f"Just before the drop, values of {table.key} did not verify: {named}. Encrypt what is "
                f"pending (--migrate-data --table {table.key}), correct the others, and verify again; "
                "nothing was dropped."
            )


def _refuse_without_pending_index(connection: Connection, definition: TableDefinition) -> None:
    if not has_pending_index(connection, definition):
        raise RefusedError(
            f"The index {indexes.pending_index(definition.table)} is missing or invalid: without it the look "
            f"for pending values under the lock would read all of {definition.table.key}. Build it first "
            "(asset search_indexes); nothing was changed."
        )


def _drop(
    connection: Connection,
    catalogue: Catalogue,
    table: Table,
    keys: KeyRing,
    actor: Actor,
    before: Approval,
) -> _Dropped:
    state = tracking.require_state(connection, table, lock=True)
    if state.stage != "columns" or state.authority != "ciphertext":
        raise RefusedError(f"Table {table.key} was changed by another run meanwhile; nothing was dropped.")
    definition = read_table(connection, table)
    connection.execute(SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(definition.identifier))
    definition = read_table(connection, table)
    approval = approvals.valid_approval(connection, catalogue, definition, keys, lock=True)
    if approval.id != before.id:
        raise RefusedError(
            f"Table {table.key} was approved anew meanwhile. Run the step again; nothing was dropped."
        )
    if not columns.guard_in_place(connection, definition):
        raise RefusedError(
            f"The guard triggers of {table.key} are missing or disabled, so writes since the verification "
            f"may have gone unnoticed. Renew them (--add-columns --table {table.key}), verify and approve "
            "again; nothing was dropped."
        )
    approvals.refuse_dependants(connection, definition)
    _refuse_without_pending_index(connection, definition)
    row = connection.execute(sql.any_pending(definition, SQL("{}").format(SQL("true")))).fetchone()
    if row is None or row[0]:
        raise RefusedError(
            f"Values of {table.key} are pending: they were written just now by an application that still "
            f"uses the plaintext columns. Encrypt them (--migrate-data --table {table.key}), and find out "
            "who it is; nothing was dropped."
        )
    taken = switch.set_aside(state)
    what = saved.read_saved(connection, definition, taken)
    definition_id = saved.keep(connection, table, what)
    _alter(connection, definition, what)
    tracking.set_state(connection, table, authority="ciphertext", stage="dropped", set_aside={})
    approvals.consume(connection, approval, actor)
    tracking.audit(
        connection,
        actor,
        "drop_plaintext",
        table,
        columns=[column.name for column in what.columns],
        approval=approval.id,
        approver=approval.approver,
        definition=definition_id,
        backup=approval.backup_id,
    )
    return _Dropped(what, approval, definition_id)


def _alter(connection: Connection, definition: TableDefinition, what: saved.SavedTable) -> None:
    encrypted = {column.name: column.encrypted for column in definition.table.columns}
    columns.drop_guard(connection, definition)
    actions: list[Composable] = []
    for column in what.columns:
        for schema, name in column.sequences:
            # A sequence goes with the column that owns it, and its position with it.
            connection.execute(SQL("ALTER SEQUENCE {} OWNED BY NONE").format(Identifier(schema, name)))
        if column.not_null is not None and not column.encrypted_was_required:
            condition = SQL("{} IS NOT NULL").format(Identifier(encrypted[column.name]))
            actions.append(saved.add_check(saved.required_check(encrypted[column.name]), condition))
    # Without CASCADE: what we did not expect stops it.
    actions += [SQL("DROP COLUMN {}").format(Identifier(column.name)) for column in what.columns]
    connection.execute(saved.alter(definition, actions))


def _require_ciphertext(connection: Connection, table: Table, actor: Actor) -> tuple[str, ...]:
    """NOT NULL on the encrypted columns, in place of the checks that the drop added.

    No row is looked at under the lock; continues where an earlier call was interrupted.
    """
    definition = read_table(connection, table, plaintext=False)
    required = []
    for column in table.columns:
        name = saved.required_check(column.encrypted)
        if saved.constraint_state(connection, definition, name) is None:
            continue
        switch.validate(connection, definition, name)

        def finish(encrypted: str = column.encrypted, name: str = name) -> None:
            connection.execute(
                saved.alter(definition, [SQL("ALTER COLUMN {} SET NOT NULL").format(Identifier(encrypted))])
            )
            connection.execute(saved.alter(definition, [SQL("DROP CONSTRAINT {}").format(Identifier(name))]))
            tracking.audit(connection, actor, "set_not_null", table, column=encrypted)

        in_short_transaction(connection, f"set {table.key}.{column.encrypted} NOT NULL", finish)
        required.append(column.encrypted)
    return tuple(required)
