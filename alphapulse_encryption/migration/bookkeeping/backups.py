"""Backups as they are recorded: where each is, what is in it, and when it was verified, drilled and uploaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, LiteralString

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.bookkeeping.evidence import BACKUP
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer


@dataclass(frozen=True)
class Backup:
    """A file, as it was recorded; ``taken_at`` is the moment it speaks of, by the server's clock."""

    id: int
    taken_at: datetime
    location: str
    bytes: int
    sha256: str


_SELECT = "SELECT id, taken_at, location, bytes, sha256 FROM alphapulse_encryption.backups "


def latest_backup(connection: Connection, table: Table) -> Backup | None:
    """The newest recorded backup that holds the table's data."""
    return _read(connection, _SELECT + "WHERE %s = ANY(tables) ORDER BY id DESC LIMIT 1", table.key)


def read_backup(connection: Connection, backup_id: int) -> Backup | None:
    """The backup of that number."""
    return _read(connection, _SELECT + "WHERE id = %s", backup_id)


def _read(connection: Connection, query: LiteralString, parameter: object) -> Backup | None:
    row = connection.execute(query, [parameter]).fetchone()
    return None if row is None else Backup(*row)


def is_genuine(connection: Connection, backup: Backup, keys: KeyRing) -> bool:
    """Whether a backup is recorded as it was by who had a key of this key ring."""
    rows = evidence.read(connection, BACKUP, "id = %s", backup.id)
    return bool(rows) and all(evidence.are_genuine(connection, keys, BACKUP, [(row,) for row in rows]))


def record_backup(
    connection: Connection,
    keys: KeyRing,
    actor: Actor,
    backup: Backup,
    *,
    recipients: Sequence[str],
    entries: int,
    tables: Sequence[str],
    drill: Mapping[str, Any] | None,
) -> Backup:
    """Record a backup that was verified just now, and restored where a drill says so; it gets its number."""
    now = answer(connection, "SELECT clock_timestamp()")
    values = {
        **{name: value for name, value in vars(backup).items() if name != "id"},
        **{"recipient": ",".join(recipients), "listed_entries": entries, "tables": list(tables)},
        **{"verified_at": now, "run_id": actor.run_id},
        **({} if drill is None else {"drilled_at": now, "drill": drill}),
    }
    return replace(backup, id=evidence.keep(connection, keys, actor, BACKUP, values) or 0)


def record_upload(connection: Connection, backup: Backup, location: str) -> None:
    """A backup has been uploaded there just now."""
    connection.execute(
        "UPDATE alphapulse_encryption.backups SET uploaded_at = clock_timestamp(), uploaded_to = %s WHERE id = %s",
        [location, backup.id],
    )


def backups_known(connection: Connection) -> tuple[int, datetime | None]:
    """How many backups are recorded, and when the last of them was verified."""
    query = "SELECT count(*), max(verified_at) FROM alphapulse_encryption.backups"
    ((backups, last),) = connection.execute(query)
    return backups, last
