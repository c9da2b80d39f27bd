"""Schema changes that the application does not queue behind: a short wait for the lock, then another try."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import psycopg
from psycopg.sql import SQL, Composed, Identifier

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.postgres.retry import again

T = TypeVar("T")

# While an ALTER TABLE waits for its lock, every later query on the table waits behind it: so it waits briefly. But
# longer than deadlock_timeout (1s, unless an administrator changed it): only then does PostgreSQL cancel an autovacuum
# that stands in the way, which would keep us out for as long as it runs.
LOCK_TIMEOUT = "1500ms"
ATTEMPTS = 8
# Whoever holds the lock needs a moment to let go, and those who queued behind us one to get on.
SHORTEST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 8.0

_TRY_AGAIN = (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected)


def in_short_transaction(
    connection: Connection,
    doing: str,
    change: Callable[[], T],
    *,
    attempts: int = ATTEMPTS,
    lock_timeout: str = LOCK_TIMEOUT,
) -> T:
    """Run ``change`` in a transaction of its own, again with growing, jittered pauses while a lock is taken.

    Args:
        connection: in autocommit mode.
        doing: for the message, as in "add columns to users".
        change: the statements; run from the beginning at each try, so it has to look at the database again.
        lock_timeout: how long one statement waits for a lock, in PostgreSQL's notation.

    Raises:
        RefusedError: the lock could not be had; nothing was changed.
    """

    def attempt() -> T:
        with connection.transaction():
            connection.execute("SELECT set_config('lock_timeout', %s, true)", [lock_timeout])
            return change()

    return _retrying(doing, attempt, attempts, lock_timeout)


def outside_transaction(
    connection: Connection, doing: str, change: Callable[[], T], *, lock_timeout: str = "0"
) -> T:
    """As :func:`in_short_transaction`, for statements that cannot run in one (``CREATE INDEX CONCURRENTLY``).

    Those wait for other transactions while the application goes on, so they keep the session's lock timeout off.
    ``VACUUM FULL`` is another matter: the application queues behind it.
    """

    def attempt() -> T:
        connection.execute("SELECT set_config('lock_timeout', %s, false)", [lock_timeout])
        try:
            return change()
        finally:
            if not connection.broken:
                connection.execute("SELECT set_config('lock_timeout', '5s', false)")

    return _retrying(doing, attempt, ATTEMPTS, lock_timeout)


def maintain(connection: Connection, statement: Composed) -> None:
    """Execute ANALYZE, REINDEX or VACUUM, which call the functions of a table's indexes, and name none.

    Before PostgreSQL 17 those find what they name by the session's search path; from then on by the server's own.

    Args:
        connection: in autocommit mode.
    """
    connection.execute(
        "SELECT set_config('search_path', current_setting('alphapulse_encryption.search_path'), false)"
    )
    try:
        connection.execute(statement)
    finally:
        if not connection.broken:
            connection.execute("SET search_path TO pg_catalog")


_OWNER = """
SELECT pg_get_userbyid(relowner),
       pg_get_userbyid(relowner) <> current_user
         AND pg_has_role(relowner, 'USAGE') AND has_schema_privilege(relowner, relnamespace, 'CREATE')
         AND has_schema_privilege(relowner, 'public', 'CREATE')
  FROM pg_class WHERE oid = %s
"""


def give_to_owner(connection: Connection, what: Composed, table: int) -> tuple[str, list[Composed]]:
    """What lets something that was created for a table belong to the table's owner, as its indexes do.

    Otherwise it would belong to the role that happened to run the step, and a colleague, as good a member of the
    table's owner, could not renew it. Left as it is where that owner may create nothing there.

    Returns:
        The owner of the table of that oid, and the statements for what has a kind and name, as ``VIEW public.v_users``;
        none where nothing has to be done, or can be.
    """
    owner, possible = connection.execute(_OWNER, [table]).fetchall()[0]
    statement = SQL("ALTER {} OWNER TO {}").format(what, Identifier(owner))
    return str(owner), [statement] if possible else []


def _retrying(doing: str, attempt: Callable[[], T], attempts: int, lock_timeout: str) -> T:
    pauses = (SHORTEST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS)
    try:
        return again(attempt, lambda e: isinstance(e, _TRY_AGAIN), attempts=attempts, pauses=pauses)
    except _TRY_AGAIN:
        kept = f"through {attempts} tries" if attempts > 1 else f"for longer than {lock_timeout}"
        raise RefusedError(
            f"Could not {doing}: another session kept its lock {kept}. Nothing was changed. "
            "Look for long transactions in pg_stat_activity, and run the step again."
        ) from None
