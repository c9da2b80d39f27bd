"""Advisory locks, by name: how the processes of this program keep out of each other's way in one database.

A session's lock ends with the session, a transaction's with the transaction: of a killed process nothing stays.
"""

from __future__ import annotations

from typing import Any

import psycopg

Connection = psycopg.Connection[Any]


def take(connection: Connection, name: str, *, shared: bool = False) -> None:
    """Wait for a lock of the session, and keep it until :func:`release` or the session's end."""
    function = b"pg_advisory_lock_shared" if shared else b"pg_advisory_lock"
    connection.execute(b"SELECT %s(hashtextextended(%%s, 0))" % function, [name])


def try_to_take(connection: Connection, name: str) -> bool:
    """Take a lock of the session if nobody has it."""
    return _had(connection, b"pg_try_advisory_lock", name)


def release(connection: Connection, name: str) -> None:
    """Give a lock of the session up."""
    connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [name])


def take_in_transaction(connection: Connection, name: str) -> None:
    """Wait for a lock, and keep it until the end of the transaction."""
    connection.execute("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", [name])


def try_to_take_in_transaction(connection: Connection, name: str) -> bool:
    """Take a lock until the end of the transaction if nobody has it."""
    return _had(connection, b"pg_try_advisory_xact_lock", name)


def _had(connection: Connection, function: bytes, name: str) -> bool:
    row = connection.execute(b"SELECT %s(hashtextextended(%%s, 0))" % function, [name]).fetchone()
    return bool(row and row[0])
