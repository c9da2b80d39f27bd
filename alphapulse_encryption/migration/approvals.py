"""A person's consent to one drop: bound to the state it was given for, for a short time, and used once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import psycopg
from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration import indexes, saved, switch, tracking, verify
from alphapulse_encryption.migration.backup import Backup, check_backup, latest_backup
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]

VALID_FOR = timedelta(hours=24)
LONGEST_VALID_FOR = timedelta(days=7)
# What was written after the backup is in the ciphertext only; so it has to be recent.
BACKUP_NOT_OLDER_THAN = timedelta(hours=24)


@dataclass(frozen=True)
class Approval:
    """A row of ``encryption_approvals``.

    Args:
        id: its number.
        table: key of the table whose plaintext may be dropped.
        approver: the person, as they gave their name.
        database_role: the role that recorded it, which the database vouches for.
        reason: in the approver's words.
        approved_at: by the server's clock.
        expires_at: until then.
        definition: fingerprint of the table's definition it was given for.
        catalogue_entry: fingerprint of the catalogue's entry.
        key_check: identifies the current master key.
        verified_at: the verification it relies on.
        backup_id: the backup it relies on.
        consumed_at: when it was used.
        revoked_at: when it was taken back.
        expired: by the server's clock, when it was read.
    """

    id: int
    table: str
    approver: str
    database_role: str
    reason: str
    approved_at: datetime
    expires_at: datetime
    definition: str
    catalogue_entry: str
    key_check: str
    verified_at: datetime
    backup_id: int
    consumed_at: datetime | None
    revoked_at: datetime | None
    expired: bool

    @property
    def is_open(self) -> bool:
        """Whether it could still be used, if nothing that it binds has changed."""
        return self.consumed_at is None and self.revoked_at is None and not self.expired


_SELECT = """
SELECT id, table_name, approver, database_role, reason, approved_at, expires_at, definition, catalogue_entry,
       key_check, verified_at, backup_id, consumed_at, revoked_at, expires_at <= clock_timestamp()
  FROM public.encryption_approvals
"""


def approve_drop(
    database: Database,
    catalogue: Catalogue,
    table: Table,
    keys: KeyRing,
    actor: Actor,
    *,
    approver: str,
    reason: str,
    confirmation: str,
    valid_for: timedelta = VALID_FOR,
) -> Approval:
    """Record a person's consent to dropping a table's plaintext columns.

    Args:
        database: the target.
        catalogue: as it is now; its entry is bound.
        table: the table.
        keys: the current key is bound.
        actor: the program that records it.
        approver: the person's name.
        reason: why, in their words.
        confirmation: the table's key, typed by them.
        valid_for: how long it may be used.

    Raises:
        RefusedError: confirmation, name or reason missing; not verified; authority not ciphertext; no recent,
            undamaged backup; other objects depend on the plaintext. Nothing was recorded.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    _check_words(table, approver, reason, confirmation, valid_for)
    with database.session(f"approve the drop of {table.key}") as connection:
        tracking.check_key(connection, keys)
        definition, verified_at = refuse_unless_droppable(connection, table, keys)
        backup = _recent_backup(connection, table)
        check_backup(backup)
        with connection.transaction():
            cursor = connection.execute(
                "INSERT INTO public.encryption_approvals (table_name, approver, reason, expires_at, "
                "definition, catalogue_entry, key_check, verified_at, backup_id, run_id) "
                "VALUES (%s, %s, %s, now() + %s, %s, %s, %s, %s, %s, %s) RETURNING id",
                [
                    table.key,
                    approver.strip(),
                    reason.strip(),
                    valid_for,
                    definition.fingerprint(),
                    catalogue.fingerprint(table.key),
                    keys.check_value(keys.current_version),
                    verified_at,
                    backup.id,
                    actor.run_id,
                ],
            )
            inserted = connection.execute(_SELECT + " WHERE id = %s", [saved.only_row(cursor)[0]])
            approval = _approval(saved.only_row(inserted))
            tracking.audit(
                connection,
                actor,
                "approve_drop",
                table,
                approval=approval.id,
                approver=approval.approver,
                reason=approval.reason,
                expires_at=approval.expires_at,
                backup=backup.id,
            )
    return approval


def _check_words(table: Table, approver: str, reason: str, confirmation: str, valid_for: timedelta) -> None:
    if confirmation != table.key:
        raise RefusedError(
            f"The confirmation is not the name of the table. Type {table.key} exactly; nothing was approved."
        )
    if not approver.strip():
        raise RefusedError("An approval needs the name of the person who gives it; nothing was approved.")
    if not reason.strip():
        raise RefusedError("An approval needs a reason; nothing was approved.")
    if not timedelta() < valid_for <= LONGEST_VALID_FOR:
        raise RefusedError(
            f"An approval is valid for more than no time and at most {LONGEST_VALID_FOR.days} days; nothing "
            "was approved."
        )


def refuse_unless_droppable(
    connection: Connection, table: Table, keys: KeyRing
) -> tuple[TableDefinition, datetime]:
    """What an approval and a drop both need of the table itself; takes no lock.

    Returns:
        The table's definition, and the moment its verification speaks of.

    Raises:
        RefusedError: says which of them is missing.
    """
    state = tracking.require_state(connection, table)
    if state.stage == "dropped":
        raise RefusedError(f"The plaintext of {table.key} is dropped already; nothing was changed.")
    if state.stage == "restoring":
        raise RefusedError(
            f"The plaintext of {table.key} is being restored. Let restore_plaintext end first."
        )
    if state.authority != "ciphertext":
        raise RefusedError(
            f"The authority of {table.key} is still plaintext: its readers use the plaintext columns. Switch "
            "it first (switch_to_ciphertext); nothing was changed."
        )
    definition = read_table(connection, table)
    if saved.has_children(connection, definition):
        raise RefusedError(
            f"Table {table.key} is partitioned or takes part in inheritance. What its partitions have of "
            "their own could not be brought back exactly, so its plaintext is not dropped."
        )
    verification = verify.verify_table(connection, table, keys)
    if not verification.passed or verification.verified_at is None:
        raise RefusedError(
            f"Table {table.key} is not verified: {'; '.join(verification.reasons)}. Run the verification "
            f"(--verify --table {table.key}); nothing was changed."
        )
    refuse_dependants(connection, definition)
    return definition, verification.verified_at


def refuse_dependants(connection: Connection, definition: TableDefinition) -> None:
    """Refuse where somebody else's object needs a plaintext column.

    Raises:
        RefusedError: names them.
    """
    depending = saved.dependants(connection, definition)
    if depending:
        raise RefusedError(
            f"Other objects depend on the plaintext columns of {definition.table.key}: "
            f"{'; '.join(depending)}. Move them to the encrypted columns or the compatibility views, or drop "
            "them; nothing was changed."
        )


def _recent_backup(connection: Connection, table: Table) -> Backup:
    backup = latest_backup(connection, table)
    if backup is None:
        raise RefusedError(f"There is no backup of {table.key}. Take one first (asset backup).")
    row = connection.execute(
        "SELECT %s < clock_timestamp() - %s", [backup.taken_at, BACKUP_NOT_OLDER_THAN]
    ).fetchone()
    if row is None or row[0]:
        hours = int(BACKUP_NOT_OLDER_THAN.total_seconds() // 3600)
        raise RefusedError(
            f"The newest backup of {table.key} is more than {hours} hours old. Take a new one (asset backup)."
        )
    return backup


def valid_approval(
    connection: Connection,
    catalogue: Catalogue,
    definition: TableDefinition,
    keys: KeyRing,
    *,
    lock: bool = False,
) -> Approval:
    """The approval that a drop may use now: the newest open one, with everything it binds as it was.

    Args:
        connection: an open session.
        catalogue: as it is now.
        definition: the table as it is now.
        keys: the key ring as it is now.
        lock: hold the row until the end of the transaction, so that nobody else uses or revokes it.

    Raises:
        RefusedError: there is none; says why.
    """
    table = definition.table
    query = SQL(_SELECT + " WHERE table_name = %s ORDER BY id DESC {}").format(
        SQL("FOR UPDATE" if lock else "")
    )
    approvals = [_approval(row) for row in connection.execute(query, [table.key])]
    found = next((approval for approval in approvals if approval.is_open), None)
    if found is None:
        raise RefusedError(
            f"There is no approval for dropping the plaintext of {table.key}"
            f"{_why_closed(approvals[0]) if approvals else ''}. A person has to approve it (job "
            "approve_drop); nothing was changed."
        )
    changed = [
        what
        for what, same in (
            ("the table's definition", found.definition == definition.fingerprint()),
            ("the catalogue's entry", found.catalogue_entry == catalogue.fingerprint(table.key)),
            ("the master key", found.key_check == keys.check_value(keys.current_version)),
        )
        if not same
    ]
    if changed:
        raise RefusedError(
            f"Since the plaintext drop of {table.key} was approved, {' and '.join(changed)} changed. Verify "
            "and approve it again (--verify, job approve_drop); nothing was changed."
        )
    return found


def _why_closed(last: Approval) -> str:
    if last.consumed_at is not None:
        return ": the last one was used already"
    if last.revoked_at is not None:
        return ": the last one was revoked"
    return ": the last one has expired"


def consume(connection: Connection, approval: Approval, actor: Actor) -> None:
    """Use an approval up, in the transaction of the drop.

    Raises:
        RefusedError: it is not open any more.
    """
    used = connection.execute(
        "UPDATE public.encryption_approvals SET consumed_at = clock_timestamp(), consumed_by = %s "
        "WHERE id = %s AND consumed_at IS NULL AND revoked_at IS NULL AND expires_at > clock_timestamp()",
        [actor.name, approval.id],
    )
    if used.rowcount != 1:
        raise RefusedError(f"Approval {approval.id} is not valid any more; nothing was changed.")


def revoke(database: Database, approval_id: int, actor: Actor) -> None:
    """Take an approval back.

    Raises:
        RefusedError: there is none of that number, or it was used or revoked before.
    """
    with database.session(f"revoke approval {approval_id}") as connection, connection.transaction():
        tracking.ensure_bookkeeping(connection)
        row = connection.execute(
            "UPDATE public.encryption_approvals SET revoked_at = clock_timestamp(), revoked_by = %s "
            "WHERE id = %s AND consumed_at IS NULL AND revoked_at IS NULL RETURNING table_name",
            [actor.name, approval_id],
        ).fetchone()
        if row is None:
            raise RefusedError(
                f"There is no approval {approval_id} that could be revoked: it does not exist, or was used "
                "or revoked before."
            )
        tracking.audit(connection, actor, "revoke_approval", approval=approval_id, of_table=row[0])


def list_approvals(connection: Connection, table: Table | None = None) -> tuple[Approval, ...]:
    """Every approval, the newest first; of one table where it is given."""
    if not tracking.bookkeeping_exists(connection):
        return ()
    rows = connection.execute(
        f"{_SELECT} WHERE %(table)s::text IS NULL OR table_name = %(table)s ORDER BY id DESC",
        {"table": table.key if table else None},
    )
    return tuple(_approval(row) for row in rows)


def _approval(row: tuple[Any, ...]) -> Approval:
    return Approval(*row)


def describe(connection: Connection, definition: TableDefinition) -> str:
    """In plain words: what a drop takes away, what stays in its place, and how it is undone."""
    table = definition.table
    state = tracking.require_state(connection, table)
    what = saved.read_saved(connection, definition, switch.set_aside(state))
    encrypted = {column.name: column.encrypted for column in table.columns}
    lines = [f"Dropping the plaintext of {table.key} removes"]
    lines += [f"  column {column.name} ({column.type})" for column in what.columns]
    lines += [f"  constraint {c.name}: {c.definition}" for c in what.constraints]
    lines += [f"  index {index.name}" for index in what.indexes]
    lines += [f"  statistics {statistics.name}" for statistics in what.statistics]
    required = [encrypted[column.name] for column in what.columns if column.not_null is not None]
    unique = [want.name for want in indexes.wanted_indexes(connection, definition) if want.unique]
    if required or unique:
        lines.append("In their place")
    if required:
        lines.append(f"  NOT NULL on {', '.join(required)}")
    lines += [f"  uniqueness by the index {name}" for name in unique]
    lines += [
        "It is undone by restore_plaintext, which rebuilds all of this from the ciphertext as it is then, "
        "as long as the master key is there; or from the encrypted backup with age and pg_restore.",
        "It erases nothing by itself: the values stay in dead tuples, WAL, replicas and old backups.",
    ]
    return "\n".join(lines)
