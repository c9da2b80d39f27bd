"""The drop of a table's plaintext columns: only what a person approved, and only while all of it still holds.

Everything that takes time is done without a lock: the rows changed since the verification are verified, and the
backup is read. Then one short transaction takes the lock, looks again at all that can be seen in time that does not
grow with the table, saves what it drops, drops it and uses the approval up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.approvals import Approval, consume
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.limits import read_limits
from alphapulse_encryption.migration.bookkeeping.tables import advance, keep_definition, require_state
from alphapulse_encryption.migration.gates import approvals
from alphapulse_encryption.migration.gates.approvals import TwoPersonRule
from alphapulse_encryption.migration.gates.offsite import Bucket
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.catch_up import has_pending_index
from alphapulse_encryption.migration.schema import guard, indexes, saved_ddl, sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.partitions import lock_parts, read_parts
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.target import Target

# Nothing done under the lock takes long. Should it all the same, or should this process stand still, the server ends
# the transaction, and the application goes on.
LONGEST_STATEMENT_UNDER_LOCK = "5s"
LONGEST_PAUSE_UNDER_LOCK = "5s"


@dataclass(frozen=True)
class DropResult:
    """What :func:`drop_plaintext` did.

    Args:
        what: all that was dropped now; None where that was done before.
        approver: who approved it; "" as well.
        required: encrypted columns that are NOT NULL from now on in the place of dropped ones.
        changed_rows: rows changed since the verification, which were verified before the lock.
    """

    what: saved_ddl.SavedTable | None
    approver: str
    required: tuple[str, ...]
    changed_rows: int
    seconds: float

    @property
    def changed(self) -> bool:
        return self.what is not None or bool(self.required)


def drop_plaintext(
    target: Target,
    table: Table,
    *,
    backups: Path,
    bucket: Bucket | None = None,
    operator: str = "",
    default_rule: TwoPersonRule = "roles",
) -> DropResult:
    """Drop the table's plaintext columns.

    Args:
        backups: the directory that backups are taken to.
        bucket: as :func:`.approvals.approve_drop` has it.
        operator: name of the person who does it.
        default_rule: the two-person rule, where the settings in the database have none.

    Raises:
        RefusedError: no valid approval, it was given by the same person, or anything it relies on does not hold now;
            nothing was changed.
        ConfigurationError: table or column missing.
    """
    started = time.monotonic()
    doing = f"drop the plaintext of {table.key}"
    what, approver, changed_rows = None, "", 0
    with target.database.session(doing) as connection:
        state = require_state(connection, table)
        check_key(connection, target.keys)
        ensure_bookkeeping(connection)
        if state.state is not State.DROPPED:
            # The cheap reasons to refuse first.
            definition = read_table(connection, table)
            approval = approvals.valid_approval(connection, target, definition)
            rule = approvals.two_person_rule(connection, default_rule)
            approvals.refuse_same_person(connection, approval, operator, rule)
            since, missing_rows = _refuse_unless_ready(connection, target, definition, approval)
            approvals.refuse_without_backup(connection, table, approval, backups, bucket, target.keys)
            changed_rows = _verify_changed(connection, target, table, since)
            if missing_rows is None:
                verify.count_rows(target, table)
            plan_by_key(connection)
            names = {"operator": operator.strip(), "two_person_rule": rule}
            what = in_short_transaction(
                connection, doing, partial(_drop, connection, target, table, approval, names)
            )
            approver = approval.approver
        required = _require_ciphertext(connection, table, target.actor)
    return DropResult(what, approver, required, changed_rows, time.monotonic() - started)


def _refuse_unless_ready(
    connection: Connection, target: Target, definition: TableDefinition, approval: Approval
) -> tuple[int, int | None]:
    """The table is droppable still, and guarded, by the verification that was approved or a later one.

    Returns the transaction since which rows may have changed, and how many rows were not reached; None where nobody
    counted.
    """
    table, key = definition.table, definition.table.key
    _, verification = approvals.refuse_unless_droppable(connection, table, target.keys)
    at, since = verification.verified_at, verification.since
    if at is None or since is None or at < approval.verified_at:
        raise RefusedError(
            f"The verification of {key} that approval {approval.id} relies on is not there any more. Verify "
            f"the table again (--verify --table {key}); nothing was changed."
        )
    if not has_pending_index(connection, definition):
        raise RefusedError(
            f"The index {indexes.pending_index(table)} is missing or invalid: without it the look "
            f"for pending values under the lock would read all of {key}. Build it first "
            "(asset search_indexes); nothing was changed."
        )
    return since, verification.missing_rows


def _verify_changed(connection: Connection, target: Target, table: Table, since: int) -> int:
    seconds = read_limits(connection).drop_verification_seconds
    found = verify.verify_changed(target, table, since, seconds=seconds)
    if not found.passed:
        named = "; ".join(str(offender) for offender in found.offenders[:10])
        raise RefusedError(
            f"Of the rows of {table.key} changed since the verification, values did not verify: {named}. Encrypt "
            f"what is pending (--migrate-data --table {table.key}), correct the others, and verify again; nothing "
            "was dropped."
        )
    return found.rows


def _drop(
    connection: Connection, target: Target, table: Table, before: Approval, names: dict[str, str]
) -> saved_ddl.SavedTable:
    """Look again at all of it under the lock, and drop; ``names`` are for the audit log."""
    state = require_state(connection, table, lock=True)
    if state.state is not State.SWITCHED:
        raise RefusedError(f"Table {table.key} was changed by another run meanwhile; nothing was dropped.")
    _lock(connection, read_table(connection, table))
    definition = read_table(connection, table)
    approval = approvals.valid_approval(connection, target, definition, lock=True)
    if approval.id != before.id:
        raise RefusedError(
            f"Table {table.key} was approved anew meanwhile. Run the step again; nothing was dropped."
        )
    if _refuse_unless_ready(connection, target, definition, approval)[1] is None:
        raise RefusedError(
            f"Nobody has counted the rows of {table.key} since its verification. Run the step again; nothing was "
            "dropped."
        )
    if answer(connection, sql.any_pending(definition)):
        raise RefusedError(
            f"Values of {table.key} are pending: they were written just now by an application that still "
            f"uses the plaintext columns. Encrypt them (--migrate-data --table {table.key}), and find out "
            "who it is; nothing was dropped."
        )
    what = saved_ddl.read_saved(connection, definition, state.set_aside)
    saved = what.model_dump(mode="json")
    definition_id = keep_definition(connection, target.keys, target.actor, table, saved)
    guard.drop_guard(connection, definition)
    for statement in _removal(definition, what):
        connection.execute(statement)
    advance(connection, target.keys, target.actor, table, State.DROPPED)
    if not consume(connection, approval.id, names["operator"] or target.actor.name):
        raise RefusedError(f"Approval {approval.id} is not valid any more; nothing was changed.")
    audit(
        connection,
        target.actor,
        "drop_plaintext",
        table,
        columns=[column.name for column in what.columns],
        approval=approval.id,
        approver=approval.approver,
        definition=definition_id,
        backup=approval.backup_id,
        **names,
    )
    return what


# The other tables that an ALTER TABLE of ours locks: those that a foreign key refers to lose its triggers.
_REFERRED_TO = """
SELECT DISTINCT c.confrelid
  FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)
 WHERE c.contype = 'f' AND c.conrelid = %s AND c.confrelid <> c.conrelid AND a.attname = ANY(%s)
   AND has_table_privilege(c.confrelid, 'UPDATE, DELETE, TRUNCATE')
 ORDER BY 1
"""


def _lock(connection: Connection, definition: TableDefinition) -> None:
    """Lock all that the drop will need at once, waiting no longer than for one lock in all.

    A table that we may not lock by itself is locked by the drop of the foreign key, which waits for that once more.
    """
    connection.execute(
        "SELECT set_config('statement_timeout', %s, true), "
        "set_config('idle_in_transaction_session_timeout', %s, true)",
        [LONGEST_STATEMENT_UNDER_LOCK, LONGEST_PAUSE_UNDER_LOCK],
    )
    names = [column.name for column in definition.plaintext_columns]
    others = connection.execute(_REFERRED_TO, [definition.oid, names]).fetchall()
    parts = [part for (oid,) in others for part in read_parts(connection, oid)]
    # Our own last: the application waits for it from the moment that we do.
    lock_parts(connection, [*parts, *read_parts(connection, definition.oid)], "ACCESS EXCLUSIVE")


def drop_statements(definition: TableDefinition, what: saved_ddl.SavedTable) -> list[Composed]:
    """What the drop of a switched table executes, and the ciphertext's NOT NULL after it."""
    statements = [*guard.drop_guard_statements(definition), *_removal(definition, what)]
    for name in _to_require(definition, what):
        statements.append(saved_ddl.validate_check(definition, saved_ddl.required_check(name)))
        statements += _not_null_for_check(definition, name)
    return statements


def _to_require(definition: TableDefinition, what: saved_ddl.SavedTable) -> list[str]:
    """The encrypted columns that become NOT NULL in the place of dropped ones."""
    names = {c.name for c in what.columns if c.not_null is not None and not c.encrypted_was_required}
    return [column.encrypted for column in definition.table.columns if column.name in names]


def _removal(definition: TableDefinition, what: saved_ddl.SavedTable) -> list[Composed]:
    # A sequence goes with the column that owns it, and its position with it.
    keep = SQL("ALTER SEQUENCE {} OWNED BY NONE")
    sequences = [keep.format(Identifier(*name)) for column in what.columns for name in column.sequences]
    actions: list[Composable] = [*map(switch.required, _to_require(definition, what))]
    # Without CASCADE: what we did not expect stops it.
    actions += [SQL("DROP COLUMN {}").format(Identifier(column.name)) for column in what.columns]
    return [*sequences, saved_ddl.alter(definition, actions)]


def _not_null_for_check(definition: TableDefinition, encrypted: str) -> tuple[Composed, Composed]:
    check = saved_ddl.required_check(encrypted)
    return (
        saved_ddl.alter(definition, [SQL("ALTER COLUMN {} SET NOT NULL").format(Identifier(encrypted))]),
        saved_ddl.alter(definition, [SQL("DROP CONSTRAINT {}").format(Identifier(check))]),
    )


def _require_ciphertext(connection: Connection, table: Table, actor: Actor) -> tuple[str, ...]:
    """NOT NULL on the encrypted columns, in place of the checks that the drop added.

    No row is looked at under the lock; continues where an earlier call was interrupted.
    """
    definition = read_table(connection, table, plaintext=False)
    required = []
    for column in table.columns:
        name = saved_ddl.required_check(column.encrypted)
        if saved_ddl.constraint_state(connection, definition, name) is None:
            continue
        switch.validate(connection, definition, name)

        def finish(encrypted: str = column.encrypted) -> None:
            for statement in _not_null_for_check(definition, encrypted):
                connection.execute(statement)
            audit(connection, actor, "set_not_null", table, column=encrypted)

        in_short_transaction(connection, f"set {table.key}.{column.encrypted} NOT NULL", finish)
        required.append(column.encrypted)
    return tuple(required)
