"""Performance tuning for the length of a step, undone whatever happens to it.

``work_mem`` is set for sessions of ours and ends with them. Autovacuum is turned off for the table by its storage
parameters; what they were before is remembered in the transaction that changes them, together with who holds the
change. A holder is alive while its session is: it has an advisory lock, which the server gives up with the session.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.sql import SQL, Composable, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.bookkeeping import tuning as kept
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Actor, Database, safe_errors
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.partitions import read_parts

Connection = psycopg.Connection[Any]

# Storage parameters take SHARE UPDATE EXCLUSIVE: nobody's reading and writing waits behind it, so it may wait
# longer than deadlock_timeout, after which PostgreSQL cancels an autovacuum that stands in the way.
LOCK_TIMEOUT = "4s"

_MEMORY = re.compile(r"[0-9]{1,10} ?(kB|MB|GB|TB)")
_OPTION = "autovacuum_enabled"


@dataclass(frozen=True)
class Tuned:
    """What is tuned while it lasts: settings for the sessions that do the work."""

    settings: Mapping[str, str] = field(default_factory=dict)

    def apply(self, connection: Connection) -> None:
        """Give a session the settings; they end with it.

        Raises:
            ConfigurationError: the server does not accept one of them.
        """
        for name, value in self.settings.items():
            try:
                connection.execute("SELECT set_config(%s, %s, false)", [name, value])
            except psycopg.errors.InvalidParameterValue:
                raise ConfigurationError(
                    f"The server does not accept {value} for {name}. PostgreSQL's own bounds for it are in "
                    "pg_settings."
                ) from None


def session_settings(work_mem: str | None) -> dict[str, str]:
    """Settings for the sessions of a step.

    Args:
        work_mem: memory of one sort or hash, a number with kB, MB, GB or TB (PostgreSQL manual, 19.1.1); None
            leaves it as the server has it.

    Raises:
        ConfigurationError: it is not of that form.
    """
    if work_mem is None:
        return {}
    if not _MEMORY.fullmatch(work_mem):
        raise ConfigurationError(
            f"work_mem has to be a number with its unit, like 64MB or 1GB, and is {work_mem[:40]!r}."
        )
    return {"work_mem": work_mem}


@contextlib.contextmanager
def tuned(
    database: Database,
    table: Table,
    actor: Actor,
    *,
    work_mem: str | None = None,
    autovacuum_off: bool = False,
) -> Iterator[Tuned]:
    """Tune for the length of a ``with`` block; several at once on one table are undone by the last of them.

    Args:
        work_mem: see :func:`session_settings`; the block gives it to its sessions with :meth:`Tuned.apply`.
        autovacuum_off: whether to turn autovacuum off, for the table (or its partitions) and for TOAST.

    Raises:
        ConfigurationError: a value that does not suit, or the table is missing; nothing was changed.
        RefusedError: a lock could not be had. At the end of the block: the next call restores.
    """
    what = Tuned(session_settings(work_mem))
    restore_abandoned(database, actor)
    doing = f"tune {table.key}"
    # Not a session() around the block: its errors are not ours to word.
    with contextlib.closing(database.connect()) as connection:
        with safe_errors(doing):
            what.apply(connection)
            holder = _begin(connection, table, actor) if autovacuum_off else None
        try:
            yield what
        except BaseException:
            # What went wrong is what the caller has to see; what is not restored here is found later.
            if holder is not None:
                with contextlib.suppress(MigrationError, psycopg.Error):
                    _end(database, connection, table, holder, actor)
            raise
        if holder is not None:
            with safe_errors(f"undo what was tuned for {table.key}"):
                _end(database, connection, table, holder, actor)


def restore_abandoned(database: Database, actor: Actor) -> tuple[str, ...]:
    """Restore what killed processes, or a server that was stopped, left tuned.

    Costs one small query where there is nothing to do.

    Returns:
        The tables restored now.

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
            if part.leaf and _turn_off(connection, table, part.oid, part.identifier):
                changed.append(part.name)
        kept.keep_holder(connection, table, holder, actor)
        if changed:
            audit(connection, actor, "autovacuum_off", table, relations=changed)

    in_short_transaction(
        connection, f"turn autovacuum off for {table.key}", turn_off, lock_timeout=LOCK_TIMEOUT
    )
    return holder


def _turn_off(connection: Connection, table: Table, oid: int, name: Identifier) -> bool:
    """Remember what a relation has and turn its autovacuum off; False where that was done before."""
    if not kept.keep_options(connection, table, oid):
        return False
    connection.execute(
        SQL("ALTER TABLE {} SET (autovacuum_enabled = 'false', toast.autovacuum_enabled = 'false')").format(
            name
        )
    )
    return True


def _end(database: Database, connection: Connection, table: Table, holder: uuid.UUID, actor: Actor) -> None:
    try:
        if not connection.broken:
            _restore(connection, table.key, holder, actor, why="done")
            return
    except psycopg.Error:
        if not connection.broken:
            raise
    # The server was restarted meanwhile, or ended the session.
    with database.session(f"restore autovacuum for {table.key}") as another:
        _restore(another, table.key, holder, actor, why="done")


def _restore(connection: Connection, key: str, holder: uuid.UUID | None, actor: Actor, *, why: str) -> bool:
    """Take a holder away, and restore unless another one is alive."""

    def restore() -> bool:
        _one_at_a_time(connection, key)
        if not kept.release_holder(connection, key, holder):
            return False
        remembered = kept.take_options(connection, key)
        relations = []
        for oid, options, toast_options in sorted(remembered):
            name = _put_back(connection, oid, options, toast_options)
            if name is not None:
                relations.append(name)
        if remembered:
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
