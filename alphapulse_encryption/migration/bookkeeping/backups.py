"""Backups as they are recorded: where each is, what is in it, and when it was verified, drilled and uploaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, LiteralString

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Connection


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


def record_backup(
    connection: Connection,
    backup: Backup,
    *,
    recipients: Sequence[str],
    entries: int,
    tables: Sequence[str],
    run_id: str | None,
    drill: Mapping[str, Any] | None,
) -> Backup:
    """Record a backup that was verified just now, and restored where a drill says so; it gets its number."""
    ((number,),) = connection.execute(
        "INSERT INTO alphapulse_encryption.backups (taken_at, location, bytes, sha256, recipient, listed_entries, "
        "verified_at, tables, run_id, drilled_at, drill) VALUES (%(taken_at)s, %(location)s, %(bytes)s, %(sha256)s, "
        "%(recipient)s, %(entries)s, clock_timestamp(), %(tables)s, %(run)s, "
        "CASE WHEN %(drill)s::jsonb IS NOT NULL THEN clock_timestamp() END, %(drill)s) RETURNING id",
        {
            **vars(backup),
            "recipient": ",".join(recipients),
            "entries": entries,
            "tables": list(tables),
            "run": run_id,
            "drill": None if drill is None else json.dumps(drill),
        },
    )
    return replace(backup, id=number)


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
