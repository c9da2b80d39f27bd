"""A person's consent to one drop: bound to the state it was given for, for a short time, and used once."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from datetime import timedelta
from pathlib import Path
from typing import Literal

from psycopg.errors import InsufficientPrivilege

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import approvals as kept
from alphapulse_encryption.migration.bookkeeping.approvals import Approval
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.backups import (
    Backup,
    is_genuine,
    latest_backup,
    read_backup,
)
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists, ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.limits import read_limits
from alphapulse_encryption.migration.bookkeeping.tables import authentic_state, require_state
from alphapulse_encryption.migration.gates import offsite, roles
from alphapulse_encryption.migration.gates.backup import NOT_OLDER_THAN_HOURS, check_backup, is_recent
from alphapulse_encryption.migration.gates.beginning import refuse_without_room_to_return
from alphapulse_encryption.migration.gates.offsite import Bucket
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database, answer
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.verify import TableVerification
from alphapulse_encryption.migration.schema import indexes, saved_ddl
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.dependants import stops_of_the_drop
from alphapulse_encryption.migration.schema.guard import refuse_unguarded
from alphapulse_encryption.migration.target import Target

VALID_FOR = timedelta(hours=24)
LONGEST_VALID_FOR = timedelta(days=7)

# Whom a drop is refused to: a person of the approver's name; who uses the approver's database role as well.
TwoPersonRule = Literal["off", "names", "roles"]


def approve_drop(
    target: Target,
    table: Table,
    *,
    approver: str,
    reason: str,
    confirmation: str,
    backups: Path,
    bucket: Bucket | None = None,
    valid_for: timedelta = VALID_FOR,
    default_rule: TwoPersonRule = "roles",
    for_another: bool = False,
) -> Approval:
    """Record a person's consent to dropping a table's plaintext columns.

    Args:
        approver: the person's name.
        confirmation: the table's key, typed by them.
        default_rule: the two-person rule, where the settings in the database have none.
        for_another: this process does what it is asked, and its database role is not the person's.
        backups: the directory that backups are taken to.
        bucket: where they are uploaded to, and one counts that is not in the directory of this machine.

    Raises:
        RefusedError: confirmation, name or reason missing; not verified, or rows left out by it; authority not
            ciphertext; no recent, undamaged backup; other objects depend on the plaintext. Nothing was recorded.
        ConfigurationError: table or column missing.
    """
    if confirmation != table.key:
        raise RefusedError(
            f"The confirmation is not the name of the table. Type {table.key} exactly; nothing was approved."
        )
    for what, text, most in (
        ("the name of the person who gives it", approver, 200),
        ("a reason", reason, 2000),
    ):
        if not text.strip() or len(text) > most or any(unicodedata.category(c) == "Cc" for c in text):
            raise RefusedError(
                f"An approval needs {what}, in a line of at most {most:,} characters; nothing was approved."
            )
    if not timedelta() < valid_for <= LONGEST_VALID_FOR:
        raise RefusedError(
            f"An approval is valid for more than no time and at most {LONGEST_VALID_FOR.days} days; nothing "
            "was approved."
        )
    with target.database.session(f"approve the drop of {table.key}") as connection:
        roles.refuse_unless_allowed(connection, "approve_drop", (table,))
        check_key(connection, target.keys)
        # What keeps approvals as they were given is a trigger.
        ensure_bookkeeping(connection)
        if for_another and two_person_rule(connection, default_rule) == "roles":
            role = answer(connection, "SELECT session_user::text")
            raise RefusedError(
                f"The two-person rule holds for database roles, and this run uses {role}, the role of all runs: "
                "anybody who reaches the UI could approve over it. Approve at a terminal, with ALPHAPULSE_DATABASE_URL "
                f"for a role of your own (--approve-drop --table {table.key}); nothing was approved."
            )
        definition, verification = refuse_unless_droppable(connection, table, target.keys)
        backup = latest_backup(connection, table)
        if backup is None:
            raise RefusedError(
                f"There is no backup of {table.key}. Take one first (asset backup); nothing was changed."
            )
        _refuse_unusable(connection, table, backup, backups, bucket, target.keys)
        if verification.missing_rows is None:
            _count_rows(target, table)
            definition, verification = refuse_unless_droppable(connection, table, target.keys)
        with connection.transaction():
            approval = kept.keep_approval(
                *(connection, target.keys, target.actor, table),
                approver=approver.strip(),
                reason=reason.strip(),
                valid_for=valid_for,
                definition=_bound_definition(connection, definition),
                catalogue_entry=target.catalogue.fingerprint(table.key),
                verified_at=verification.verified_at,
                backup_id=backup.id,
            )
            audit(
                connection,
                target.actor,
                "approve_drop",
                table,
                approval=approval.id,
                approver=approval.approver,
                reason=approval.reason,
                expires_at=approval.expires_at,
                backup=backup.id,
            )
    return approval


def _count_rows(target: Target, table: Table) -> None:
    try:
        verify.count_rows(target, table)
    except DatabaseFailure as error:
        # Who approves need not see the data.
        if error.sqlstate != InsufficientPrivilege.sqlstate:
            raise
        raise RefusedError(
            f"Nobody has counted the rows of {table.key} since its verification, and this role may not read them. Have "
            f"a verifier verify it again (--verify --table {table.key}), which counts them; nothing was approved."
        ) from None


def _bound_definition(connection: Connection, definition: TableDefinition) -> str:
    """The table's definition together with everything that would go with its plaintext columns."""
    goes = _what_goes(connection, definition)
    return hashlib.sha256(f"{definition.fingerprint()} {goes.model_dump_json()}".encode()).hexdigest()


def _what_goes(connection: Connection, definition: TableDefinition) -> saved_ddl.SavedTable:
    state = require_state(connection, definition.table)
    return saved_ddl.read_saved(connection, definition, state.set_aside)


def refuse_unless_droppable(
    connection: Connection, table: Table, keys: KeyRing
) -> tuple[TableDefinition, TableVerification]:
    """What an approval and a drop both need of the table itself; takes no lock, and reads no row of it.

    Raises:
        RefusedError: says what is missing.
    """
    state = require_state(connection, table)
    if state.state is State.DROPPED:
        raise RefusedError(f"The plaintext of {table.key} is dropped already; nothing was changed.")
    if state.state in (State.RESTORING, State.RESTORED):
        raise RefusedError(
            f"The plaintext of {table.key} is being restored. Let restore_plaintext end first."
        )
    if state.authority != "ciphertext":
        raise RefusedError(
            f"The authority of {table.key} is still plaintext: its readers use the plaintext columns. Switch "
            "it first (switch_to_ciphertext); nothing was changed."
        )
    # The drop saves what was set aside, for a restore to execute.
    authentic_state(connection, table, keys)
    definition = read_table(connection, table)
    refuse_unguarded(connection, definition)
    verification = verify.verify_table(connection, table, keys)
    if not verification.passed:
        raise RefusedError(
            f"Table {table.key} is not verified: {'; '.join(verification.reasons)}. "
            f"{' '.join(verification.advice)} Nothing was changed."
        )
    if depending := stops_of_the_drop(connection, definition):
        raise RefusedError(
            f"Other objects depend on the plaintext columns of {table.key}: {'; '.join(depending)}. Move them to the "
            "encrypted columns or the compatibility views, or drop them; nothing was changed."
        )
    refuse_without_room_to_return(connection, definition)
    return definition, verification


def _refuse_unusable(
    connection: Connection,
    table: Table,
    backup: Backup,
    directory: Path,
    bucket: Bucket | None,
    keys: KeyRing,
) -> None:
    if not is_genuine(connection, backup, keys):
        raise RefusedError(
            f"The record of backup {backup.id} of {table.key} (alphapulse_encryption.backups) is not authenticated: "
            "somebody changed or added it, it comes from another database, or an older program kept it. Take a new one "
            "(asset backup), and approve the drop after it; nothing was changed."
        )
    if not is_recent(connection, backup):
        raise RefusedError(
            f"The backup of {table.key} is more than {NOT_OLDER_THAN_HOURS} hours old. Take a new one (asset backup), "
            "and approve the drop after it; nothing was changed."
        )
    if bucket is not None and not os.path.lexists(backup.location):
        offsite.check_object(backup, bucket, client=offsite.open_client())
    else:
        check_backup(backup, directory, keys)


def refuse_without_backup(
    connection: Connection,
    table: Table,
    approval: Approval,
    directory: Path,
    bucket: Bucket | None,
    keys: KeyRing,
) -> None:
    """Refuse where the backup that an approval relies on would not serve; reads all of its file.

    Args:
        directory: where backups are taken to.
        bucket: as :func:`approve_drop` has it.

    Raises:
        RefusedError: it is not recorded any more, or not by us, stale, missing or damaged.
    """
    backup = read_backup(connection, approval.backup_id)
    if backup is None:
        raise RefusedError(
            f"The backup that approval {approval.id} relies on is not recorded any more; nothing was changed."
        )
    _refuse_unusable(connection, table, backup, directory, bucket, keys)


def two_person_rule(connection: Connection, default: TwoPersonRule) -> TwoPersonRule:
    """The rule that holds: the one set by ``two_person_rule`` in the settings, or the default."""
    chosen = read_limits(connection).two_person_rule
    return default if chosen == "default" else chosen


def refuse_same_person(
    connection: Connection, approval: Approval, operator: str, rule: TwoPersonRule
) -> None:
    """Refuse to the approver what they approved, and to anybody who drops it without a name.

    A name is what somebody says of themselves. A database role is what the server vouches for; who gives out the
    passwords sees to it that two roles are two people.
    """
    if rule == "off":
        return
    turned_off = "Where one person has to do both, turn the rule off (--set two_person_rule=off)"
    if not operator.strip():
        raise RefusedError(
            f"The two-person rule holds: say who drops (--operator NAME, or operator in the job's configuration), who "
            f"cannot be {approval.approver}, who approved. {turned_off}; nothing was changed."
        )
    if _plain_name(operator) == _plain_name(approval.approver):
        raise RefusedError(
            f"The two-person rule holds: {approval.approver} approved the drop of {approval.table}, so somebody else "
            f"has to carry it out. {turned_off}; nothing was changed."
        )
    if rule == "roles":
        role = answer(connection, "SELECT session_user::text")
        if role == approval.database_role:
            raise RefusedError(
                f"The two-person rule holds for database roles: the drop of {approval.table} was approved over the "
                f"role {role}, and has to be carried out over another one (ALPHAPULSE_DATABASE_URL); nothing was "
                "changed."
            )


def _plain_name(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def valid_approval(
    connection: Connection, target: Target, definition: TableDefinition, *, lock: bool = False
) -> Approval:
    """The approval that a drop may use now: the newest open one, with everything it binds as it was.

    Args:
        lock: hold the row until the end of the transaction, so that nobody else uses or revokes it.

    Raises:
        RefusedError: there is none; says why.
    """
    table = definition.table
    approvals = kept.list_approvals(connection, table, lock=lock)
    found = next((approval for approval in approvals if approval.is_open), None)
    if found is None:
        raise RefusedError(
            f"There is no approval for dropping the plaintext of {table.key}"
            f"{_why_closed(approvals[0]) if approvals else ''}. A person has to approve it (job "
            "approve_drop); nothing was changed."
        )
    if not kept.is_genuine(connection, found, target.keys):
        raise RefusedError(
            f"Approval {found.id} of {table.key}, recorded over the role {found.database_role}, is not authenticated: "
            "somebody wrote or changed it without the master key, it was used before, comes from another database, or "
            f"an older program kept it. Revoke it (--revoke-approval {found.id}) and approve again; nothing was "
            "changed."
        )
    key_check = target.keys.check_value(target.keys.current_version)
    if changed := changed_since(connection, target.catalogue, definition, key_check, found):
        raise RefusedError(
            f"Since the plaintext drop of {table.key} was approved, {' and '.join(changed)} changed. Verify "
            "and approve it again (--verify, job approve_drop); nothing was dropped."
        )
    return found


def changed_since(
    connection: Connection,
    catalogue: Catalogue,
    definition: TableDefinition,
    key_check: str,
    approval: Approval,
) -> list[str]:
    """What an approval binds and is another one now (``key_check`` is of the current key); empty where it holds."""
    return [
        what
        for what, same in (
            ("the table's definition", approval.definition == _bound_definition(connection, definition)),
            ("the catalogue's entry", approval.catalogue_entry == catalogue.fingerprint(approval.table)),
            ("the master key", approval.key_check == key_check),
        )
        if not same
    ]


def _why_closed(last: Approval) -> str:
    if last.consumed_at is not None:
        return ": the last one was used already"
    if last.revoked_at is not None:
        return ": the last one was revoked"
    return ": the last one has expired"


def revoke(
    database: Database, approval_id: int, actor: Actor, *, operator: str = "", reason: str = ""
) -> Approval:
    """Take an approval back.

    Args:
        operator: name of the person who takes it back; the actor's where it is empty.

    Raises:
        RefusedError: there is none of that number, or it was used or revoked before; nothing was changed.
    """
    with database.session(f"revoke approval {approval_id}") as connection:
        if bookkeeping_exists(connection):
            with connection.transaction():
                name = operator.strip() or actor.name
                for revoked in kept.revoke(connection, name, number=approval_id):
                    audit(
                        connection,
                        actor,
                        "revoke_approval",
                        approval=approval_id,
                        of_table=revoked.table,
                        operator=operator.strip(),
                        reason=reason.strip(),
                    )
                    return revoked
        raise RefusedError(
            f"There is no approval {approval_id} that could be revoked: it does not exist, or was used or revoked "
            "before; nothing was changed."
        )


def describe(connection: Connection, definition: TableDefinition) -> str:
    """In plain words: what a drop takes away, what stays in its place, and how it is undone."""
    table = definition.table
    what = _what_goes(connection, definition)
    encrypted = {column.name: column.encrypted for column in table.columns}
    required = [encrypted[column.name] for column in what.columns if column.not_null is not None]
    unique = [want.name for want in indexes.wanted_indexes(connection, definition) if want.unique]
    uncarried = [c.name for c in what.constraints if c.kind in ("c", "f")]
    lines = [
        f"Dropping the plaintext of {table.key} removes",
        *(f"  column {column.name} ({column.type})" for column in what.columns),
        *(f"  constraint {c.name}: {c.definition}" for c in what.constraints),
        *(f"  index {index.name}" for index in what.indexes),
        *(f"  index {index.name} of the partition {'.'.join(of)}" for of, index in what.of_partitions),
        *(f"  statistics {statistics.name}" for statistics in what.statistics),
    ]
    if required or unique:
        lines.append("In their place")
    if required:
        lines.append(f"  NOT NULL on {', '.join(required)}")
    lines += [f"  uniqueness by the index {name}" for name in unique]
    if uncarried:
        lines.append(
            f"Nothing takes the place of {', '.join(uncarried)}: the database cannot look into ciphertext."
        )
    lines += [
        "It is undone by restore_plaintext, which rebuilds all of this from the ciphertext as it is then, "
        "as long as the master key is there; or from the encrypted backup with age and pg_restore.",
        "It erases nothing by itself: the values stay in dead tuples, WAL, replicas and old backups.",
    ]
    return "\n".join(lines)
