"""Approvals as they are kept: given, listed, used up and taken back. What makes one valid is the gates' to say."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, LiteralString

from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.bookkeeping.evidence import APPROVAL
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer


@dataclass(frozen=True)
class Approval:
    """A person's consent to one drop, as it is kept.

    Args:
        table: key of the table whose plaintext may be dropped.
        approver: the person, as they gave their name; so are who used it and who took it back.
        database_role: the role that recorded it, which the database vouches for.
        definition: fingerprint of the table's definition, and of all that would be dropped with its columns.
        catalogue_entry: fingerprint of the catalogue's entry.
        key_check: identifies the current master key.
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
    run_id: str | None
    consumed_at: datetime | None
    consumed_by: str | None
    revoked_at: datetime | None
    revoked_by: str | None
    expired: bool

    @property
    def state(self) -> Literal["open", "used", "revoked", "expired"]:
        if self.consumed_at is not None:
            return "used"
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expired else "open"

    @property
    def is_open(self) -> bool:
        """Whether it could still be used, if nothing that it binds has changed."""
        return self.state == "open"

    def __str__(self) -> str:
        if self.consumed_at is not None:
            state = f"used by {self.consumed_by} at {self.consumed_at:%F %R} UTC"
        elif self.revoked_at is not None:
            state = f"revoked by {self.revoked_by} at {self.revoked_at:%F %R} UTC"
        else:
            state = f"{'expired' if self.expired else 'open until'} {self.expires_at:%F %R} UTC"
        return (
            f"approval {self.id} of {self.table}: {state}; given by {self.approver} (database role "
            f"{self.database_role}) at {self.approved_at:%F %R} UTC: {self.reason}"
        )


_COLUMNS = SQL(
    "id, table_name, approver, database_role, reason, approved_at, expires_at, definition, catalogue_entry, key_check, "
    "verified_at, backup_id, run_id, consumed_at, consumed_by, revoked_at, revoked_by, expires_at <= clock_timestamp()"
)


def _read(connection: Connection, query: LiteralString, *parameters: object) -> tuple[Approval, ...]:
    rows = connection.execute(SQL(query).format(columns=_COLUMNS), parameters)
    return tuple(Approval(*row) for row in rows)


def keep_approval(
    connection: Connection,
    keys: KeyRing,
    actor: Actor,
    table: Table,
    *,
    approver: str,
    reason: str,
    valid_for: timedelta,
    definition: str,
    catalogue_entry: str,
    verified_at: datetime | None,
    backup_id: int,
) -> Approval:
    """Keep a consent, in a transaction; see :class:`Approval` for what it is bound to."""
    ((role, now, expires_at),) = connection.execute(
        "SELECT session_user::text, now(), now() + %s", [valid_for]
    )
    number = evidence.keep(
        *(connection, keys, actor, APPROVAL),
        {
            **{"table_name": table.key, "approver": approver, "reason": reason, "expires_at": expires_at},
            **{"definition": definition, "catalogue_entry": catalogue_entry, "verified_at": verified_at},
            **{
                "key_check": keys.check_value(keys.current_version),
                "backup_id": backup_id,
                "run_id": actor.run_id,
            },
        },
        filled={"database_role": role, "approved_at": now},
    )
    (kept,) = _read(connection, "SELECT {columns} FROM alphapulse_encryption.approvals WHERE id = %s", number)
    return kept


def is_genuine(connection: Connection, approval: Approval, keys: KeyRing) -> bool:
    """Whether an approval is as it was given by who had a key of this key ring, and nobody opened it again."""
    rows = evidence.read(connection, APPROVAL, "id = %s", approval.id)
    used = answer(
        connection,
        "SELECT EXISTS (SELECT FROM alphapulse_encryption.audit_log WHERE table_name = %s "
        "AND action = 'drop_plaintext' AND details ->> 'approval' = %s::text)",
        *(approval.table, approval.id),
    )
    return (
        bool(rows)
        and not used
        and all(evidence.are_genuine(connection, keys, APPROVAL, [(r,) for r in rows]))
    )


def list_approvals(
    connection: Connection, table: Table | None = None, *, lock: bool = False
) -> tuple[Approval, ...]:
    """Every approval, the newest first; of one table where it is given, locked until the end of the transaction."""
    if not bookkeeping_exists(connection):
        return ()
    query: LiteralString = (
        "SELECT {columns} FROM alphapulse_encryption.approvals "
        "WHERE %s::text IS NULL OR table_name = %s ORDER BY id DESC"
    )
    key = table.key if table else None
    return _read(connection, query + (" FOR UPDATE" if lock else ""), key, key)


def consume(connection: Connection, number: int, operator: str) -> bool:
    """Use an approval up; False where it is not open any more."""
    used = connection.execute(
        "UPDATE alphapulse_encryption.approvals SET consumed_at = clock_timestamp(), consumed_by = %s "
        "WHERE id = %s AND consumed_at IS NULL AND revoked_at IS NULL AND expires_at > clock_timestamp()",
        [operator, number],
    )
    return used.rowcount == 1


def revoke(
    connection: Connection, operator: str, *, number: int | None = None, table: Table | None = None
) -> tuple[Approval, ...]:
    """Take back every approval that was neither used nor taken back; that of a number, or those of a table."""
    key = table.key if table else None
    return _read(
        connection,
        "UPDATE alphapulse_encryption.approvals SET revoked_at = clock_timestamp(), revoked_by = %s "
        "WHERE consumed_at IS NULL AND revoked_at IS NULL AND (%s::bigint IS NULL OR id = %s) "
        "AND (%s::text IS NULL OR table_name = %s) RETURNING {columns}",
        *(operator, number, number, key, key),
    )
