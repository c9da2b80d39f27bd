"""Names of what the engine makes: PostgreSQL cuts long ones silently, and two that begin alike would become one."""

from __future__ import annotations

import hashlib

from alphapulse_encryption.catalogue import Table

LONGEST_NAME = 63  # bytes: NAMEDATALEN - 1 (PostgreSQL manual, 4.1.1)

# A trigger that never fires. The server keeps its columns by number; their names when it was made are its arguments.
GUARD_COLUMNS = "zzz_encryption_guard_columns"


def short_name(name: str, *, prefix: str = "encryption_") -> str:
    """``name``, or where it is too long for PostgreSQL one of this prefix, made unique by a hash."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{prefix}{hashlib.sha256(name.encode()).hexdigest()[:24]}"


def guard_name(table: Table) -> str:
    """The name of the table's guard function; long names are cut and made unique by a hash."""
    return short_name(f"encryption_guard_{table.key}", prefix="encryption_guard_")
