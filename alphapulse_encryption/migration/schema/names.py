"""Names of what the engine makes: PostgreSQL cuts long ones silently, and two that begin alike would become one."""

from __future__ import annotations

import hashlib

LONGEST_NAME = 63  # bytes: NAMEDATALEN - 1 (PostgreSQL manual, 4.1.1)


def short_name(name: str, *, prefix: str = "encryption_") -> str:
    """``name``, or where it is too long for PostgreSQL one of this prefix, made unique by a hash."""
    if len(name.encode()) <= LONGEST_NAME:
        return name
    return f"{prefix}{hashlib.sha256(name.encode()).hexdigest()[:24]}"
