"""Performance tuning for the length of a step, undone whatever happens to it.

``work_mem`` is set for sessions of ours and ends with them. Autovacuum is turned off for the table by its storage
parameters; what they were before is remembered in the transaction that changes them, together with who holds the
change. A holder is alive while its session is: it has an advisory lock, which the server gives up with the session.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Sequence

import psycopg
from psycopg.sql import SQL, Composable, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.bookkeeping import tuning as kept
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database, safe_errors
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.partitions import read_parts

# Storage parameters take SHARE UPDATE EXCLUSIVE: nobody's reading and writing waits behind it, so it may wait
# longer than deadlock_timeout, after which PostgreSQL cancels an autovacuum that stands in the way.
LOCK_TIMEOUT = "4s"

_MEMORY = re.compile(r"[0-9]{1,10} ?(kB|MB|GB|TB)")
_OPTION = "autovacuum_enabled"
_OFF = SQL("ALTER TABLE {} SET (autovacuum_enabled = 'false', toast.autovacuum_enabled = 'false')")


def use_memory(connection: Connection, work_mem: str | None) -> None:
    """Give a session memory for one sort or hash, until its end; None leaves it as the server has it.

    Args:
        work_mem: a number with kB, MB, GB or TB (PostgreSQL manual, 19.1.1).

    Raises:
        ConfigurationError: it is not of that form, or the server does not accept it.
    """
    if work_mem is None:
        return
    if not _MEMORY.fullmatch(work_mem):
        raise ConfigurationError(
            f"work_mem has to be a number with its unit, like 64MB or 1GB, and is {work_mem[:40]!r}."
        )
    try:
        connection.execute("SELECT set_config('work_mem', %s, false)", [work_mem])
    except psycopg.errors.InvalidParameterValue:
        raise ConfigurationError(
            f"The server does not accept {work_mem} for work_mem. PostgreSQL's own bounds for it are in pg_settings."
        ) from None


@contextlib.contextmanager
def tuned(
    database: Database,
    table: Table,
    actor: Actor,
    *,
    work_mem: str | None = None,
    autovacuum_off: bool = False,
) -> Iterator[None]:
    """Tune for the length of a ``with`` block; several at once on one table are undone by the last of them.

    Args:
        work_mem: looked at here; the block gives it to its sessions with :func:`use_memory`.
        autovacuum_off: whether to turn autovacuum off, for the table (or its partitions) and for TOAST.

    Raises:
        ConfigurationError: a value that does not suit, or the table is missing; nothing was changed.
        RefusedError: a lock could not be had. At the end of the block: the next call restores.
    """
    restore_abandoned(database, actor)

    def end() -> None:
        with database.session(f"restore autovacuum for {table.key}") as another:
            _restore(another, table.key, holder, actor, why="done")

    # Not a session() around the block: its errors are not ours to word.
    with contextlib.closing(database.connect()) as connection:
        with safe_errors(f"tune {table.key}"):
            use_memory(connection, work_mem)
            holder = _begin(connection, table, actor) if autovacuum_off else None
        try:
            yield
        except BaseException:
            # What went wrong is what the caller has to see; what is not restored here is found later.
            if holder is not None:
                with contextlib.suppress(MigrationError):
                    end()
            raise
        if holder is not None:
            end()


def restore_abandoned(database: Database, actor: Actor) -> tuple[str, ...]:
    """Restore what killed processes, or a server that was stopped, left tuned; returns the tables.

    Costs one small query where there is nothing to do.

    Raises:
        RefusedError: a lock could not be had for one of them; the others are restored.
    """
    restored: list[str] = []
    failed: MigrationError | None = None
    with database.session("restore autovacuum") as connection:
        if not bookkeeping_exists(connection):
            return ()
        for key in kept.abandoned(connection):
            try:
                if _restore(connection, key, None, actor, why="abandoned"):
                    restored.append(key)
            except MigrationError as error:
                failed = error
    if failed is not None:
        raise failed
    return tuple(restored)


def _one_at_a_time(connection: Connection, key: str) -> None:
    locks.hold(connection, f"alphapulse_encryption tuning of {key}", transaction=True)


def _begin(connection: Connection, table: Table, actor: Actor) -> uuid.UUID:
    require_state(connection, table)
    holder = uuid.uuid4()
    # An idle session that the server ends would look like a dead holder.
    connection.execute("SELECT set_config('idle_session_timeout', '0', false)")
    locks.hold(connection, kept.holder_lock(holder))

    def turn_off() -> None:
        _one_at_a_time(connection, table.key)
        oid = read_table(connection, table, plaintext=False).oid
        changed = []
        for part in read_parts(connection, oid):
            if part.leaf and kept.keep_options(connection, table, part.oid):
                connection.execute(_OFF.format(part.identifier))
                changed.append(part.name)
        kept.keep_holder(connection, table, holder, actor)
        if changed:
            audit(connection, actor, "autovacuum_off", table, relations=changed)

    in_short_transaction(
        connection, f"turn autovacuum off for {table.key}", turn_off, lock_timeout=LOCK_TIMEOUT
    )
    return holder


def _restore(connection: Connection, key: str, holder: uuid.UUID | None, actor: Actor, *, why: str) -> bool:
    """Take a holder away, and restore unless another one is alive."""

    def restore() -> bool:
        _one_at_a_time(connection, key)
        if not kept.release_holder(connection, key, holder):
            return False
        remembered = kept.take_options(connection, key)
        names = [_put_back(connection, *options) for options in sorted(remembered)]
        if remembered:
            relations = [name for name in names if name is not None]
            audit(connection, actor, "autovacuum_restored", key, why=why, relations=relations)
        return bool(remembered)

    return in_short_transaction(
        connection, f"restore autovacuum for {key}", restore, lock_timeout=LOCK_TIMEOUT
    )


def _put_back(
    connection: Connection, oid: int, options: Sequence[str], toast_options: Sequence[str]
) -> str | None:
    """The two options as they were; returns the relation's name, None where it was dropped.

    Other options are not touched, and neither is one of the two that is not as we set it any more: somebody has
    decided otherwise meanwhile.
    """
    row = connection.execute(
        "SELECT n.nspname, c.relname, coalesce(c.reloptions, '{}'), coalesce(t.reloptions, '{}') FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_class t ON t.oid = c.reltoastrelid "
        "WHERE c.oid = %s",
        [oid],
    ).fetchone()
    if row is None:
        return None
    schema, name, current, toast_current = row
    actions: list[Composable] = []
    for prefix, before, now in (("", options, current), ("toast.", toast_options, toast_current)):
        option = SQL(prefix + _OPTION)
        value = _value(before)
        if _value(now) == "false" and value != "false":
            actions.append(
                SQL("RESET ({})").format(option)
                if value is None
                else SQL("SET ({} = {})").format(option, Literal(value))
            )
    if actions:
        connection.execute(SQL("ALTER TABLE {} {}").format(Identifier(schema, name), SQL(", ").join(actions)))
    return str(name)


def _value(options: Sequence[str]) -> str | None:
    return next((o.partition("=")[2] for o in options if o.partition("=")[0] == _OPTION), None)
