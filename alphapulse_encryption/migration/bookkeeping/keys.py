"""Key-check values and key versions: which key the database was begun with, and which version is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists, ensure_bookkeeping
from alphapulse_encryption.migration.postgres.database import Actor, Connection

KeyState = Literal["current", "readable", "retired"]


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
                "INSERT INTO alphapulse_encryption.key_versions (key_version, state, changed_by) "
                "VALUES (%s, 'current', 'first use') ON CONFLICT DO NOTHING",
                [keys.current_version],
            )
    # Somebody else may have begun at the same moment, with another key.
    check_key(connection, keys)


def remember_key(connection: Connection, keys: KeyRing) -> None:
    """Keep the key-check value of the current version, where there is none."""
    version = keys.current_version
    connection.execute(
        "INSERT INTO alphapulse_encryption.key_checks (key_version, check_value) VALUES (%s, %s) "
        "ON CONFLICT DO NOTHING",
        [version, keys.check_value(version)],
    )


def stored_key_checks(connection: Connection) -> dict[int, str]:
    """The key-check value of every version that this database was begun with, ascending; empty where it was not."""
    if not bookkeeping_exists(connection):
        return {}
    stored = connection.execute(
        "SELECT key_version, check_value FROM alphapulse_encryption.key_checks ORDER BY key_version"
    )
    return dict(stored.fetchall())


def current_key_check(connection: Connection) -> str | None:
    """The key-check value of the database's current key version; None where it was not begun."""
    current = [version.number for version in key_versions(connection) if version.state == "current"]
    return stored_key_checks(connection).get(current[0]) if current else None


@dataclass(frozen=True)
class KeyVersion:
    """Where a key version stands in this database.

    Args:
        state: ``current`` for the one that is written; ``readable`` while values of it may be there; ``retired`` once
            none was found.
        since: when it came to be so.
    """

    number: int
    state: KeyState
    since: datetime
    changed_by: str


def key_versions(connection: Connection) -> tuple[KeyVersion, ...]:
    """Every key version this database knows, ascending; empty where it was never begun."""
    if not bookkeeping_exists(connection):
        return ()
    rows = connection.execute(
        "SELECT key_version, state, since, changed_by FROM alphapulse_encryption.key_versions ORDER BY key_version"
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


def hold_key_versions(connection: Connection) -> None:
    """Let nobody else change key versions until the end of the transaction."""
    connection.execute("LOCK TABLE alphapulse_encryption.key_versions IN SHARE ROW EXCLUSIVE MODE")


def set_key_state(connection: Connection, version: int, state: KeyState, actor: Actor) -> None:
    """A key version comes to be so, now and by this actor."""
    connection.execute(
        "INSERT INTO alphapulse_encryption.key_versions (key_version, state, changed_by, run_id) "
        "VALUES (%s, %s, %s, %s) ON CONFLICT (key_version) DO UPDATE SET state = excluded.state, "
        "since = clock_timestamp(), changed_by = excluded.changed_by, run_id = excluded.run_id",
        [version, state, actor.name, actor.run_id],
    )


def keep_key_count(connection: Connection, version: int, found: Mapping[str, Mapping[str, int]]) -> None:
    """Keep how many values of a version were found now, by table."""
    connection.execute(
        "UPDATE alphapulse_encryption.key_versions SET counted_at = clock_timestamp(), found = %s "
        "WHERE key_version = %s",
        [json.dumps(found), version],
    )
