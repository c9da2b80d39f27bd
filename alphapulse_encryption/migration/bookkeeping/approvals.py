"""Approvals as they are kept: given, listed, used up and taken back. What makes one valid is the gates' to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from psycopg.sql import SQL, Composable

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.postgres.database import Connection


@dataclass(frozen=True)
class Approval:
    """A person's consent to one drop, as it is kept.

    Args:
        table: key of the table whose plaintext may be dropped.
        approver: the person, as they gave their name.
        database_role: the role that recorded it, which the database vouches for.
        reason: in the approver's words.
        approved_at: by the server's clock.
        expires_at: until then.
        definition: fingerprint of the table's definition, and of all that would be dropped with its columns.
        catalogue_entry: fingerprint of the catalogue's entry.
        key_check: identifies the current master key.
        verified_at: the verification it relies on.
        backup_id: the backup it relies on.
        run_id: the run that recorded it, where there was one.
        consumed_at: when it was used.
        consumed_by: by whom, as they gave their name.
        revoked_at: when it was taken back.
        revoked_by: by whom, as they gave their name.
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
    def is_open(self) -> bool:
        """Whether it could still be used, if nothing that it binds has changed."""
        return self.consumed_at is None and self.revoked_at is None and not self.expired

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


_SELECT = """
SELECT id, table_name, approver, database_role, reason, approved_at, expires_at, definition, catalogue_entry,
       key_check, verified_at, backup_id, run_id, consumed_at, consumed_by, revoked_at, revoked_by,
       expires_at <= clock_timestamp()
  FROM alphapulse_encryption.approvals
"""


def _read(connection: Connection, rest: Composable, parameters: Sequence[object]) -> tuple[Approval, ...]:
    rows = connection.execute(SQL("{} {}").format(SQL(_SELECT), rest), parameters)
    return tuple(Approval(*row) for row in rows)


def keep_approval(
    connection: Connection,
    table: Table,
    *,
    approver: str,
    reason: str,
    valid_for: timedelta,
    definition: str,
    catalogue_entry: str,
    key_check: str,
    verified_at: datetime | None,
    backup_id: int,
    run_id: str | None,
) -> Approval:
    """Keep a consent; see :class:`Approval` for what it is bound to."""
    row = connection.execute(
        "INSERT INTO alphapulse_encryption.approvals (table_name, approver, reason, expires_at, "
        "definition, catalogue_entry, key_check, verified_at, backup_id, run_id) "
        "VALUES (%s, %s, %s, now() + %s, %s, %s, %s, %s, %s, %s) RETURNING id",
        [
            *(table.key, approver, reason, valid_for, definition, catalogue_entry),
            *(key_check, verified_at, backup_id, run_id),
        ],
    ).fetchall()[0]
    return _read(connection, SQL("WHERE id = %s"), row)[0]


def list_approvals(connection: Connection, table: Table | None = None) -> tuple[Approval, ...]:
    """Every approval, the newest first; of one table where it is given."""
    if not bookkeeping_exists(connection):
        return ()
    key = table.key if table else None
    where = SQL("WHERE %s::text IS NULL OR table_name = %s ORDER BY id DESC")
    return _read(connection, where, [key, key])


def approvals_of(connection: Connection, table: Table, *, lock: bool) -> tuple[Approval, ...]:
    """The table's approvals, the newest first; locked until the end of the transaction where that is asked for."""
    where = SQL("WHERE table_name = %s ORDER BY id DESC {}").format(SQL("FOR UPDATE" if lock else ""))
    return _read(connection, where, [table.key])


def consume(connection: Connection, number: int, operator: str) -> bool:
    """Use an approval up; False where it is not open any more."""
    used = connection.execute(
        "UPDATE alphapulse_encryption.approvals SET consumed_at = clock_timestamp(), consumed_by = %s "
        "WHERE id = %s AND consumed_at IS NULL AND revoked_at IS NULL AND expires_at > clock_timestamp()",
        [operator, number],
    )
    return used.rowcount == 1


def revoke(connection: Connection, number: int, operator: str) -> Approval | None:
    """Take an approval back; None where it is not there, or was used or taken back before."""
    taken = _revoke(connection, SQL("AND id = %s"), operator, number)
    return _read(connection, SQL("WHERE id = %s"), taken)[0] if taken else None


def revoke_all(connection: Connection, operator: str, table: Table | None = None) -> tuple[int, ...]:
    """Take back every approval that was neither used nor taken back, of one table where it is given; their numbers."""
    if table is None:
        return _revoke(connection, SQL(""), operator)
    return _revoke(connection, SQL("AND table_name = %s"), operator, table.key)


def _revoke(connection: Connection, which: Composable, operator: str, *parameters: object) -> tuple[int, ...]:
    statement = SQL(
        "UPDATE alphapulse_encryption.approvals SET revoked_at = clock_timestamp(), revoked_by = %s "
        "WHERE consumed_at IS NULL AND revoked_at IS NULL {} RETURNING id"
    ).format(which)
    return tuple(number for (number,) in connection.execute(statement, [operator, *parameters]))
