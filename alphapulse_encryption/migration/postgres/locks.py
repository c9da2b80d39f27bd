"""Advisory locks by name: what one session at a time may do is done under its lock."""

from __future__ import annotations

from collections.abc import Sequence

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.migration.postgres.database import Connection


def hold(connection: Connection, name: str, *, shared: bool = False, transaction: bool = False) -> None:
    """Wait for a lock, held until the end of the session or ``transaction``; ``shared`` with those who ask no more."""
    _call(connection, "pg_advisory_" + ("xact_" if transaction else "") + "lock" + "_shared" * shared, name)


def try_hold(connection: Connection, name: str, *, transaction: bool = False) -> bool:
    """Take a lock where nobody has it; whether that was so."""
    return bool(_call(connection, "pg_try_advisory_" + ("xact_" if transaction else "") + "lock", name))


def release(connection: Connection, name: str) -> bool:
    """Give a session's lock up; whether it was held."""
    return bool(_call(connection, "pg_advisory_unlock", name))


def _call(connection: Connection, function: str, name: str) -> object:
    query = SQL("SELECT {}(hashtextextended(%s, 0))").format(Identifier("pg_catalog", function))
    return connection.execute(query, [name]).fetchall()[0][0]


# A lock named by one bigint shows its halves as classid and objid, with 1 as objsubid (PostgreSQL manual, 53.13).
_HOLDERS = """
SELECT k.name, array_agg(DISTINCT l.pid) FROM unnest(%s::text[]) AS k (name)
  JOIN pg_locks l ON hashtextextended(k.name, 0) = (l.classid::bigint << 32 | l.objid::bigint)
 WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
   AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
 GROUP BY k.name
"""


def holders(connection: Connection, names: Sequence[str]) -> dict[str, frozenset[int]]:
    """The sessions of this database that hold each of these locks, by their process numbers; of held ones alone."""
    return {name: frozenset(pids) for name, pids in connection.execute(_HOLDERS, [list(names)])}
