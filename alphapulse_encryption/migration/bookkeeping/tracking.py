"""The bookkeeping in the target database: what operators watch, what the engine resumes from, what is audited.

Everything lives in the schema ``public`` under names that begin with ``encryption_``; nothing here ever holds
a value of user data. Keys of rows and boundaries of ranges are kept in text form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from psycopg import sql

from alphapulse_encryption import lifecycle
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.lifecycle import Authority, State
from alphapulse_encryption.migration.postgres import locks, wire
from alphapulse_encryption.migration.postgres.database import Actor

Connection = psycopg.Connection[Any]
# The primary key of a row, each part in its text form.
Key = tuple[str, ...]
Status = Literal["pending", "in_progress", "completed", "failed"]
KeyState = Literal["current", "readable", "retired"]

# Any constant does; it only has to be ours, so that two processes do not create the tables at once.
_BOOKKEEPING_LOCK = 0x616C7068_61656E63

# Creates what is missing, and brings what is older up to this version; may be run again at any time. Whoever runs it
# owns what it creates: where duties are separated, that is not the role that migrates (see roles).
BOOKKEEPING_SQL = """
CREATE TABLE IF NOT EXISTS public.encryption_migrations (
    table_name text NOT NULL,
    column_name text NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    started_at timestamptz,
    completed_at timestamptz,
    records_processed bigint NOT NULL DEFAULT 0,
    error_message text,
    PRIMARY KEY (table_name, column_name));
CREATE TABLE IF NOT EXISTS public.encryption_tables (
    table_name text PRIMARY KEY,
    authority text NOT NULL DEFAULT 'plaintext' CHECK (authority IN ('plaintext', 'ciphertext')),
    stage text NOT NULL DEFAULT 'columns' CHECK (stage IN ('columns', 'dropped', 'restoring')),
    set_aside jsonb NOT NULL DEFAULT '{}',
    changed_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS public.encryption_ranges (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    lower_key text[],
    upper_key text[],
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    position text[],
    rows_processed bigint NOT NULL DEFAULT 0,
    values_processed bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    updated_at timestamptz,
    completed_at timestamptz,
    waiting_for text,
    error_message text,
    PRIMARY KEY (table_name, batch_range));
CREATE TABLE IF NOT EXISTS public.encryption_verifications (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    verified_at timestamptz NOT NULL,
    definition text NOT NULL,
    key_check text NOT NULL,
    row_count bigint NOT NULL,
    columns jsonb NOT NULL,
    offenders jsonb NOT NULL,
    run_id text,
    since xid8,
    PRIMARY KEY (table_name, batch_range));
ALTER TABLE public.encryption_verifications ADD COLUMN IF NOT EXISTS since xid8;
CREATE TABLE IF NOT EXISTS public.encryption_row_counts (
    table_name text PRIMARY KEY,
    counted_at timestamptz NOT NULL,
    since xid8 NOT NULL,
    row_count bigint NOT NULL,
    verified_count bigint NOT NULL,
    missing_count bigint NOT NULL,
    run_id text);
CREATE TABLE IF NOT EXISTS public.encryption_key_checks (
    key_version int PRIMARY KEY,
    check_value text NOT NULL,
    first_used_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE IF NOT EXISTS public.encryption_key_usage (
    context text NOT NULL,
    key_version int NOT NULL,
    source text NOT NULL CHECK (source IN ('engine', 'application')),
    messages bigint NOT NULL CHECK (messages >= 0),
    first_used_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    updated_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (context, key_version, source));
CREATE OR REPLACE FUNCTION public.encryption_report_key_usage(context text, key_version int, messages bigint)
    RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF $1 IS NULL OR $2 IS NULL OR $3 IS NULL OR $3 < 0 THEN
        RAISE EXCEPTION 'encryption_report_key_usage takes a context, a key version and a number of messages';
    END IF;
    INSERT INTO public.encryption_key_usage AS u VALUES ($1, $2, 'application', $3)
        ON CONFLICT ON CONSTRAINT encryption_key_usage_pkey
        DO UPDATE SET messages = u.messages + excluded.messages, updated_at = clock_timestamp();
    RETURN (SELECT sum(u.messages) FROM public.encryption_key_usage u
             WHERE u.context = $1 AND u.key_version = $2);
END $$;
REVOKE ALL ON FUNCTION public.encryption_report_key_usage FROM PUBLIC;
CREATE TABLE IF NOT EXISTS public.encryption_key_versions (
    key_version int PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('current', 'readable', 'retired')),
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    changed_by text NOT NULL,
    run_id text,
    counted_at timestamptz,
    found jsonb);
CREATE UNIQUE INDEX IF NOT EXISTS encryption_one_current_key_version
    ON public.encryption_key_versions (state) WHERE state = 'current';
INSERT INTO public.encryption_key_versions (key_version, state, since, changed_by)
    SELECT key_version, CASE WHEN key_version = max(key_version) OVER () THEN 'current' ELSE 'readable' END,
           first_used_at, 'first use'
      FROM public.encryption_key_checks WHERE NOT EXISTS (SELECT FROM public.encryption_key_versions);
CREATE TABLE IF NOT EXISTS public.encryption_operations (
    table_name text NOT NULL,
    operation text NOT NULL CHECK (operation IN ('rotate', 'decrypt', 'discard', 'repair')),
    goal int NOT NULL DEFAULT 0,
    batch_range int NOT NULL,
    status text NOT NULL DEFAULT 'pending'
        CHECK (status IN ('pending', 'in_progress', 'completed', 'failed')),
    position text[],
    rows_processed bigint NOT NULL DEFAULT 0,
    values_processed bigint NOT NULL DEFAULT 0,
    started_at timestamptz,
    updated_at timestamptz,
    completed_at timestamptz,
    waiting_for text,
    error_message text,
    PRIMARY KEY (table_name, operation, goal, batch_range));
DO $$ BEGIN
    IF to_regclass('public.encryption_rotation_ranges') IS NOT NULL THEN
        INSERT INTO public.encryption_operations
            SELECT table_name, 'rotate', to_version, batch_range, status, position, rows_processed, values_processed,
                   started_at, updated_at, completed_at, waiting_for, error_message
              FROM public.encryption_rotation_ranges ON CONFLICT DO NOTHING;
        DROP TABLE public.encryption_rotation_ranges;
    END IF;
END $$;
CREATE TABLE IF NOT EXISTS public.encryption_backups (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    taken_at timestamptz NOT NULL,
    location text NOT NULL,
    bytes bigint NOT NULL,
    sha256 text NOT NULL,
    recipient text NOT NULL,
    listed_entries int NOT NULL,
    verified_at timestamptz NOT NULL,
    tables text[] NOT NULL,
    run_id text);
ALTER TABLE public.encryption_backups
    ADD COLUMN IF NOT EXISTS drilled_at timestamptz,
    ADD COLUMN IF NOT EXISTS drill jsonb,
    ADD COLUMN IF NOT EXISTS uploaded_at timestamptz,
    ADD COLUMN IF NOT EXISTS uploaded_to text;
CREATE TABLE IF NOT EXISTS public.encryption_approvals (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_name text NOT NULL,
    approver text NOT NULL,
    database_role text NOT NULL DEFAULT session_user,
    reason text NOT NULL,
    approved_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    definition text NOT NULL,
    catalogue_entry text NOT NULL,
    key_check text NOT NULL,
    verified_at timestamptz NOT NULL,
    backup_id bigint NOT NULL REFERENCES public.encryption_backups (id),
    run_id text,
    consumed_at timestamptz,
    consumed_by text,
    revoked_at timestamptz,
    revoked_by text);
CREATE TABLE IF NOT EXISTS public.encryption_definitions (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    table_name text NOT NULL,
    saved_at timestamptz NOT NULL DEFAULT now(),
    definition jsonb NOT NULL,
    restored_at timestamptz);
CREATE TABLE IF NOT EXISTS public.encryption_settings (
    name text PRIMARY KEY,
    value jsonb NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now(),
    changed_by text NOT NULL DEFAULT session_user);
CREATE TABLE IF NOT EXISTS public.encryption_quarantine (
    table_name text NOT NULL,
    batch_range int NOT NULL,
    key text[] NOT NULL,
    reason text NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp(),
    run_id text,
    step text NOT NULL DEFAULT 'backfill',
    PRIMARY KEY (table_name, key, step));
ALTER TABLE public.encryption_quarantine
    ADD COLUMN IF NOT EXISTS step text NOT NULL DEFAULT 'backfill',
    DROP CONSTRAINT IF EXISTS encryption_quarantine_pkey,
    ADD CONSTRAINT encryption_quarantine_pkey PRIMARY KEY (table_name, key, step);
CREATE TABLE IF NOT EXISTS public.encryption_tuning (
    relation regclass PRIMARY KEY,
    table_name text NOT NULL,
    options text[] NOT NULL,
    toast_options text[] NOT NULL,
    since timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE IF NOT EXISTS public.encryption_tuning_holders (
    holder uuid PRIMARY KEY,
    table_name text NOT NULL,
    pid int NOT NULL DEFAULT pg_backend_pid(),
    actor text NOT NULL,
    run_id text,
    since timestamptz NOT NULL DEFAULT clock_timestamp());
CREATE TABLE IF NOT EXISTS public.encryption_audit_log (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    database_role text NOT NULL DEFAULT session_user,
    actor text NOT NULL,
    run_id text,
    table_name text,
    action text NOT NULL,
    details jsonb NOT NULL DEFAULT '{}');
CREATE OR REPLACE FUNCTION public.encryption_audit_is_append_only() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog AS $$
BEGIN
    RAISE EXCEPTION 'encryption_audit_log is append-only';
END $$;
CREATE OR REPLACE TRIGGER encryption_append_only BEFORE UPDATE OR DELETE OR TRUNCATE
    ON public.encryption_audit_log FOR EACH STATEMENT
    EXECUTE FUNCTION public.encryption_audit_is_append_only();
CREATE OR REPLACE FUNCTION public.encryption_approval_is_final() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF has_table_privilege(TG_RELID, 'UPDATE') THEN
        RETURN NEW;
    END IF;
    IF OLD.consumed_at IS NOT NULL OR OLD.revoked_at IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = format('approval %s was used or revoked before', OLD.id);
    END IF;
    IF NEW.consumed_at IS NOT NULL THEN
        IF OLD.expires_at <= clock_timestamp() THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('approval %s has expired', OLD.id);
        END IF;
        IF OLD.database_role = session_user AND EXISTS (SELECT FROM public.encryption_settings s
                WHERE s.name = 'two_person_rule' AND s.value = '"roles"') THEN
            RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
                MESSAGE = format('approval %s was given over the role that wants to use it', OLD.id);
        END IF;
        NEW.consumed_at := clock_timestamp();
    ELSE
        NEW.consumed_by := NULL;
    END IF;
    IF NEW.revoked_at IS NOT NULL THEN
        NEW.revoked_at := clock_timestamp();
    ELSE
        NEW.revoked_by := NULL;
    END IF;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER encryption_approval_is_final BEFORE UPDATE ON public.encryption_approvals
    FOR EACH ROW EXECUTE FUNCTION public.encryption_approval_is_final();
CREATE OR REPLACE FUNCTION public.encryption_setting_is_allowed() RETURNS trigger
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF has_table_privilege(TG_RELID, 'INSERT') THEN
        RETURN NEW;
    END IF;
    IF NEW.name = 'two_person_rule' OR (TG_OP = 'UPDATE' AND OLD.name = 'two_person_rule') THEN
        RAISE EXCEPTION USING ERRCODE = 'insufficient_privilege',
            MESSAGE = 'two_person_rule is for the owner of encryption_settings to change';
    END IF;
    NEW.changed_at := now();
    NEW.changed_by := session_user;
    RETURN NEW;
END $$;
CREATE OR REPLACE TRIGGER encryption_setting_is_allowed BEFORE INSERT OR UPDATE ON public.encryption_settings
    FOR EACH ROW EXECUTE FUNCTION public.encryption_setting_is_allowed();
REVOKE ALL ON FUNCTION public.encryption_audit_is_append_only, public.encryption_approval_is_final,
    public.encryption_setting_is_allowed FROM PUBLIC;
"""

_MIGRATIONS_COLUMNS = {
    "table_name",
    "column_name",
    "status",
    "started_at",
    "completed_at",
    "records_processed",
    "error_message",
}

BOOKKEEPING_TABLES = (
    "encryption_migrations",
    "encryption_tables",
    "encryption_ranges",
    "encryption_verifications",
    "encryption_row_counts",
    "encryption_key_checks",
    "encryption_key_usage",
    "encryption_key_versions",
    "encryption_operations",
    "encryption_backups",
    "encryption_approvals",
    "encryption_definitions",
    "encryption_settings",
    "encryption_quarantine",
    "encryption_tuning",
    "encryption_tuning_holders",
    "encryption_audit_log",
)


def bookkeeping_exists(connection: Connection) -> bool:
    """Whether every table of the bookkeeping is there."""
    row = connection.execute(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname = ANY(%s)",
        [list(BOOKKEEPING_TABLES)],
    ).fetchone()
    return row is not None and row[0] == len(BOOKKEEPING_TABLES)


def _is_current(connection: Connection) -> bool:
    """Whether the tables have the columns and triggers that were added to them since."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM pg_attribute WHERE (attrelid, attname) IN "
        "(('public.encryption_backups'::regclass, 'uploaded_to'), "
        "('public.encryption_quarantine'::regclass, 'step'))) + "
        "(SELECT count(*) FROM pg_trigger WHERE (tgrelid, tgname) IN "
        "(('public.encryption_approvals'::regclass, 'encryption_approval_is_final'), "
        "('public.encryption_settings'::regclass, 'encryption_setting_is_allowed')))"
    ).fetchone()
    return row is not None and row[0] == 4


def ensure_bookkeeping(connection: Connection) -> None:
    """Create what is missing of the bookkeeping; nothing happens where all of it is there.

    Raises:
        ConfigurationError: a table of the name ``encryption_migrations`` is there and is another one.
        RefusedError: something is missing, and the role in use may not create it.
    """
    if bookkeeping_exists(connection) and _is_current(connection):
        return
    try:
        _create_bookkeeping(connection)
    except psycopg.errors.InsufficientPrivilege:
        raise RefusedError(
            "The bookkeeping (the tables public.encryption_…) is missing or older than this program, and the role in "
            "use may not create or change it. Have a database administrator run what --roles-sql prints: it does so, "
            "and may be run again at any time. Nothing was changed."
        ) from None


def _create_bookkeeping(connection: Connection) -> None:
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_BOOKKEEPING_LOCK])
        connection.execute("SELECT set_config('client_min_messages', 'warning', true)")
        connection.execute(BOOKKEEPING_SQL)
        found = {
            name
            for (name,) in connection.execute(
                "SELECT attname FROM pg_attribute "
                "WHERE attrelid = 'public.encryption_migrations'::regclass AND attnum > 0"
            )
        }
        if not found >= _MIGRATIONS_COLUMNS:
            raise ConfigurationError(
                "Table public.encryption_migrations exists and is not ours: it lacks "
                f"{', '.join(sorted(_MIGRATIONS_COLUMNS - found))}. Rename it and try again."
            )


def missing_bookkeeping(connection: Connection) -> tuple[str, ...]:
    """The text that :func:`ensure_bookkeeping` would execute; empty where there is nothing to do."""
    if bookkeeping_exists(connection) and _is_current(connection):
        return ()
    return (BOOKKEEPING_SQL.strip(),)


def audit(
    connection: Connection, actor: Actor, action: str, table: Table | None = None, **details: object
) -> None:
    """Append to the audit log, in the transaction of what it tells of."""
    connection.execute(
        "INSERT INTO public.encryption_audit_log (actor, run_id, table_name, action, details) "
        "VALUES (%s, %s, %s, %s, %s)",
        [actor.name, actor.run_id, table.key if table else None, action, json.dumps(details, default=str)],
    )


@dataclass(frozen=True)
class TableState:
    """Where a table stands.

    Args:
        set_aside: what the switch took off the plaintext columns, to be put back by a revert.
    """

    state: State
    set_aside: Mapping[str, Any]

    @property
    def authority(self) -> Authority:
        """Which side is the source of truth."""
        return self.state.authority


def register_table(connection: Connection, table: Table) -> None:
    """Make the table and its columns known to the bookkeeping, where they are not."""
    connection.execute(
        "INSERT INTO public.encryption_tables (table_name) VALUES (%s) ON CONFLICT DO NOTHING", [table.key]
    )
    connection.execute(
        "INSERT INTO public.encryption_migrations (table_name, column_name) "
        "SELECT %s, c FROM unnest(%s::text[]) AS c ON CONFLICT DO NOTHING",
        [table.key, [column.name for column in table.columns]],
    )


def table_state(connection: Connection, table: Table, *, lock: bool = False) -> TableState | None:
    """The table's state, or None where its encrypted columns were never added.

    Args:
        lock: hold the row until the end of the transaction, so that no other step changes it meanwhile.
    """
    query = sql.SQL(
        "SELECT authority, stage, set_aside FROM public.encryption_tables WHERE table_name = %s {lock}"
    ).format(lock=sql.SQL("FOR UPDATE" if lock else ""))
    row = connection.execute(query, [table.key]).fetchone()
    if row is None:
        return None
    authority, stage, set_aside = row
    taken = any(set_aside.get(name) for name in ("defaults", "not_null"))
    unguarded = bool(set_aside.get("unguarded"))
    return TableState(lifecycle.decode(authority, stage, unguarded=unguarded, set_aside=taken), set_aside)


def require_state(connection: Connection, table: Table, *, lock: bool = False) -> TableState:
    """The table's state.

    Raises:
        RefusedError: its encrypted columns were never added.
    """
    state = table_state(connection, table, lock=lock) if bookkeeping_exists(connection) else None
    if state is None:
        raise RefusedError(
            f"Table {table.key} has no encrypted columns yet. Run the step encrypted_columns "
            f"(--add-columns --table {table.key}) first."
        )
    return state


def require_guarded_state(connection: Connection, table: Table) -> TableState:
    """The table's state, where its migration is under way.

    Raises:
        RefusedError: the encrypted columns were never added, or the table was reverted since.
    """
    state = require_state(connection, table)
    if state.state is State.REVERTED:
        raise RefusedError(
            f"Table {table.key} was reverted to plaintext. Begin again with the encrypted columns "
            f"(--add-columns --table {table.key}); nothing was changed."
        )
    return state


def advance(
    connection: Connection, table: Table, to: State, set_aside: Mapping[str, Any] | None = None
) -> None:
    """Record where the table stands now; called in the transaction that brings it there.

    Raises:
        RefusedError: no step leads there from where it stands.
    """
    now = require_state(connection, table, lock=True).state
    if not lifecycle.leads(now, to):
        raise RefusedError(
            f"Table {table.key} was changed by another run meanwhile: it is {now}, from which no step leads to {to}. "
            "Run the step again; nothing was changed."
        )
    kept = {"unguarded": True} if to is State.REVERTED else dict(set_aside or {})
    stage = "columns" if to.has_both_sides else to.stage
    connection.execute(
        "UPDATE public.encryption_tables SET authority = %s, stage = %s, set_aside = %s, changed_at = now() "
        "WHERE table_name = %s",
        [to.authority, stage, json.dumps(kept), table.key],
    )


def ensure_key(connection: Connection, keys: KeyRing) -> None:
    """Refuse a key other than the one this database was begun with; remember it at first use.

    The bookkeeping is made where it is missing, once the key is known to be the right one.

    Raises:
        RefusedError: as :func:`check_key`.
        ConfigurationError: as :func:`ensure_bookkeeping`.
    """
    check_key(connection, keys)
    ensure_bookkeeping(connection)
    if not key_versions(connection):
        with connection.transaction():
            remember_key(connection, keys)
            connection.execute(
                "INSERT INTO public.encryption_key_versions (key_version, state, changed_by) "
                "VALUES (%s, 'current', 'first use') ON CONFLICT DO NOTHING",
                [keys.current_version],
            )
    # Somebody else may have begun at the same moment, with another key.
    check_key(connection, keys)


def remember_key(connection: Connection, keys: KeyRing) -> None:
    """Keep the key-check value of the current version, where there is none."""
    version = keys.current_version
    connection.execute(
        "INSERT INTO public.encryption_key_checks (key_version, check_value) VALUES (%s, %s) "
        "ON CONFLICT DO NOTHING",
        [version, keys.check_value(version)],
    )


def stored_key_checks(connection: Connection) -> dict[int, str]:
    """The key-check value of every version that this database was begun with, ascending; empty where it was not."""
    if not _exists(connection, "encryption_key_checks"):
        return {}
    stored = connection.execute(
        "SELECT key_version, check_value FROM public.encryption_key_checks ORDER BY key_version"
    )
    return dict(stored.fetchall())


def current_key_check(connection: Connection) -> str | None:
    """The key-check value of the database's current key version; None where it was not begun."""
    current = [version.number for version in key_versions(connection) if version.state == "current"]
    return stored_key_checks(connection).get(current[0]) if current else None


def _exists(connection: Connection, table: str) -> bool:
    return connection.execute(
        "SELECT to_regclass('public.' || %s::text) IS NOT NULL", [table]
    ).fetchone() == (True,)


@dataclass(frozen=True)
class KeyVersion:
    """Where a key version stands in this database.

    Args:
        number: the version.
        state: ``current`` for the one that is written; ``readable`` while values of it may be there; ``retired`` once
            none was found.
        since: when it came to be so.
        changed_by: who brought it there.
    """

    number: int
    state: KeyState
    since: datetime
    changed_by: str


def key_versions(connection: Connection) -> tuple[KeyVersion, ...]:
    """Every key version this database knows, ascending; empty where it was never begun."""
    if not _exists(connection, "encryption_key_versions"):
        return ()
    rows = connection.execute(
        "SELECT key_version, state, since, changed_by FROM public.encryption_key_versions ORDER BY key_version"
    )
    return tuple(KeyVersion(*row) for row in rows)


def retired_versions(connection: Connection) -> frozenset[int]:
    """The key versions that no value should have."""
    return frozenset(v.number for v in key_versions(connection) if v.state == "retired")


def check_key(connection: Connection, keys: KeyRing) -> None:
    """Hold the key ring against the database without writing.

    Raises:
        RefusedError: the key-check value of a version differs from the stored one; another version is current in the
            database; or there is no key of a version that is not retired.
    """
    check_key_values(connection, keys)
    versions = key_versions(connection)
    for version in versions:
        if version.state == "current" and version.number != keys.current_version:
            raise RefusedError(_other_version(version, keys.current_version))
    check_readable(versions, keys)


def check_key_values(connection: Connection, keys: KeyRing) -> None:
    """Hold the keys of the key ring against the stored key-check values, whatever version is current.

    Raises:
        RefusedError: one differs.
    """
    for version, check in stored_key_checks(connection).items():
        if version in keys.versions and keys.check_value(version) != check:
            raise RefusedError(
                f"The master key of version {version}, from {keys.origin(version)}, is not the one this database was "
                "begun with. Nothing was written. Put the original key back there; a new key needs a new key version."
            )


def check_readable(versions: Iterable[KeyVersion], keys: KeyRing) -> None:
    """Hold the key ring against the versions that values may have.

    Raises:
        RefusedError: there is no key of one of them.
    """
    missing = [v.number for v in versions if v.state != "retired" and v.number not in keys.versions]
    if missing:
        raise RefusedError(
            f"There is no key of version {', '.join(map(str, missing))}, and this database may hold values of it: "
            "it is not retired. Make its key readable again (ALPHAPULSE_ENCRYPTION_READABLE_KEY_VERSIONS, or the "
            "key source); nothing was changed."
        )


def _other_version(current: KeyVersion, ours: int) -> str:
    if ours < current.number:
        return (
            f"This database's current key version is {current.number}, since {current.since:%Y-%m-%d %H:%M} UTC, "
            f"and the environment says {ours}: what was written now would be of an old version. Set "
            f"ALPHAPULSE_ENCRYPTION_KEY_VERSION={current.number}; nothing was changed."
        )
    return (
        f"This database's current key version is {current.number}, and the environment says {ours}, to which no "
        "rotation was begun. Run --rotate-keys first (job rotate_keys), or set "
        f"ALPHAPULSE_ENCRYPTION_KEY_VERSION={current.number}; nothing was changed."
    )


@dataclass(frozen=True)
class BatchRange:
    """One batch range of a table: the rows with ``lower < key <= upper``; None leaves that side open."""

    number: int
    lower: tuple[str, ...] | None
    upper: tuple[str, ...] | None
    status: Status
    position: tuple[str, ...] | None
    rows_processed: int
    values_processed: int

    @property
    def is_empty(self) -> bool:
        """Whether no key can fall into it: a table with fewer rows than ranges leaves some empty."""
        return self.lower is not None and self.lower == self.upper


_RANGE = """
SELECT batch_range, lower_key, upper_key, status, position, rows_processed, values_processed
  FROM public.encryption_ranges WHERE table_name = %s
"""


def read_ranges(connection: Connection, table: Table) -> tuple[BatchRange, ...]:
    """The table's batch ranges in order; empty where they were not planned yet."""
    rows = connection.execute(_RANGE + " ORDER BY batch_range", [table.key]).fetchall()
    return tuple(_batch_range(row) for row in rows)


def read_range(connection: Connection, table: Table, number: int) -> BatchRange:
    """One batch range.

    Raises:
        RefusedError: it was never planned.
    """
    row = connection.execute(_RANGE + " AND batch_range = %s", [table.key, number]).fetchone()
    if row is None:
        raise RefusedError(
            f"Batch range {number:02d} of {table.key} is not planned. Ranges are planned by encrypted_columns "
            f"(--add-columns --table {table.key}); ALPHAPULSE_BATCH_RANGES has to be what it was then."
        )
    return _batch_range(row)


def _batch_range(row: tuple[Any, ...]) -> BatchRange:
    number, lower, upper, status, position, rows, values = row
    return BatchRange(
        number,
        tuple(lower) if lower is not None else None,
        tuple(upper) if upper is not None else None,
        status,
        tuple(position) if position is not None else None,
        rows,
        values,
    )


def range_lock(table: Table, number: int) -> str:
    """Name of the advisory lock that whoever works on a range holds; hashed by ``hashtextextended(name, 0)``."""
    return f"alphapulse_encryption range {table.key} {number}"


def plan_lock(table: Table) -> str:
    """Name of the advisory lock on a table's boundaries: shared by who relies on them, exclusive to who moves them."""
    return f"alphapulse_encryption plan {table.key}"


def hold_plan(connection: Connection, table: Table) -> None:
    """Keep the table's ranges as they are planned for as long as this session lasts.

    To be called before the ranges are read, by whatever keeps a result under a range's number.
    """
    locks.hold(connection, plan_lock(table), shared=True)


def begin_range(connection: Connection, table: Table, number: int) -> None:
    """A range begins: it and the table's columns are ``in_progress``."""
    connection.execute(
        "UPDATE public.encryption_ranges SET status = 'in_progress', error_message = NULL, waiting_for = NULL, "
        "started_at = coalesce(started_at, clock_timestamp()), updated_at = clock_timestamp(), "
        "completed_at = NULL WHERE table_name = %s AND batch_range = %s",
        [table.key, number],
    )
    _columns_status(connection, table, "in_progress")


def prepare_progress(connection: Connection) -> None:
    """Prepare what :func:`advance_range` executes, for as long as the connection lasts."""
    known = connection.execute("SELECT 1 FROM pg_prepared_statements WHERE name = %s", [_ADVANCE_NAME])
    if known.fetchone() is None:
        wire.script(connection, _ADVANCE)


def advance_range(
    connection: Connection,
    table: Table,
    number: int,
    *,
    position: tuple[str, ...],
    rows: int,
    values: Mapping[str, int],
) -> bytes:
    """The statement that keeps the progress of one batch, for the transaction that holds its data.

    It needs no parameters, so that it can be sent along with others; :func:`prepare_progress` comes before it.
    """
    arguments = [
        list(position),
        rows,
        sum(values.values()),
        table.key,
        number,
        list(values),
        list(values.values()),
    ]
    return (
        sql.SQL("EXECUTE {} ({})")
        .format(sql.Identifier(_ADVANCE_NAME), sql.SQL(", ").join(map(sql.Literal, arguments)))
        .as_bytes(connection)
    )


_ADVANCE_NAME = "encryption_advance_range"

# One statement, because it comes with every batch. The columns are locked in order of their names: two ranges of
# one table never wait for each other crosswise.
_ADVANCE = b"""
PREPARE encryption_advance_range (text[], bigint, bigint, text, int, text[], bigint[]) AS
WITH advanced AS (
    UPDATE public.encryption_ranges SET position = $1, rows_processed = rows_processed + $2,
           values_processed = values_processed + $3, updated_at = clock_timestamp()
     WHERE table_name = $4 AND batch_range = $5),
locked AS MATERIALIZED (
    SELECT column_name FROM public.encryption_migrations
     WHERE table_name = $4 AND column_name = ANY ($6) ORDER BY column_name FOR UPDATE)
UPDATE public.encryption_migrations m SET records_processed = records_processed + d.n
  FROM (SELECT unnest($6) AS column_name, unnest($7) AS n) AS d JOIN locked USING (column_name)
 WHERE m.table_name = $4 AND m.column_name = d.column_name AND d.n <> 0
"""


def range_waits(connection: Connection, table: Table, number: int, reason: str | None) -> None:
    """A range holds back, or goes on where ``reason`` is None."""
    connection.execute(
        "UPDATE public.encryption_ranges SET waiting_for = %s, updated_at = clock_timestamp() "
        "WHERE table_name = %s AND batch_range = %s",
        [reason, table.key, number],
    )


def complete_range(connection: Connection, table: Table, number: int) -> None:
    """A range is done; with its last one the table's columns are ``completed``."""
    connection.execute(
        "UPDATE public.encryption_ranges SET status = 'completed', position = NULL, error_message = NULL, "
        "updated_at = clock_timestamp(), completed_at = clock_timestamp() "
        "WHERE table_name = %s AND batch_range = %s",
        [table.key, number],
    )
    # Of two ranges that end at once, the later one waits here and then sees the other completed.
    _lock_columns(connection, table)
    row = connection.execute(
        "SELECT count(*) FROM public.encryption_ranges WHERE table_name = %s AND status <> 'completed'",
        [table.key],
    ).fetchone()
    if row is not None and row[0] == 0:
        _columns_status(connection, table, "completed")


def fail_range(connection: Connection, table: Table, number: int, message: str) -> None:
    """A range ended with an error; ``message`` has to be free of values."""
    connection.execute(
        "UPDATE public.encryption_ranges SET status = 'failed', error_message = %s, waiting_for = NULL, "
        "updated_at = clock_timestamp() WHERE table_name = %s AND batch_range = %s",
        [message, table.key, number],
    )
    _columns_status(connection, table, "failed", message)


def _columns_status(connection: Connection, table: Table, status: Status, message: str | None = None) -> None:
    _lock_columns(connection, table)
    connection.execute(
        "UPDATE public.encryption_migrations SET status = %(status)s, error_message = %(message)s, "
        "started_at = coalesce(started_at, clock_timestamp()), "
        "completed_at = CASE WHEN %(status)s = 'completed' THEN clock_timestamp() END "
        "WHERE table_name = %(table)s AND column_name = ANY(%(columns)s) "
        "AND (status, error_message) IS DISTINCT FROM (%(status)s, %(message)s::text)",
        {
            "table": table.key,
            "columns": [column.name for column in table.columns],
            "status": status,
            "message": message,
        },
    )


def _lock_columns(connection: Connection, table: Table) -> None:
    # Always in order of their names: two ranges of one table never wait for each other crosswise.
    connection.execute(
        "SELECT FROM public.encryption_migrations WHERE table_name = %s ORDER BY column_name FOR UPDATE",
        [table.key],
    )


def status_rows(
    connection: Connection, tables: Iterable[Table]
) -> list[tuple[str, str, Status, int, datetime | None]]:
    """Rows of ``encryption_migrations``: table, column, status, records processed, completion."""
    rows = connection.execute(
        "SELECT table_name, column_name, status, records_processed, completed_at "
        "FROM public.encryption_migrations WHERE table_name = ANY(%s) ORDER BY table_name, column_name",
        [[table.key for table in tables]],
    ).fetchall()
    return [(row[0], row[1], row[2], row[3], row[4]) for row in rows]
