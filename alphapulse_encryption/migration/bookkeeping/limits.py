"""What an operator may change at any time: kept in the database, read again by running backfills at each look.

``UPDATE alphapulse_encryption.settings SET value = 'true' WHERE name = 'paused'`` works as well as the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphapulse_encryption.bounds import HIGHEST_REST_RATIO, LARGEST_BATCH_SIZE, LONGEST_BATCH_SECONDS
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists, ensure_bookkeeping
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database


class Limits(BaseModel):
    """The settings and their defaults. A limit of 0 is no limit, but for ``max_blocked_sessions``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    paused: bool = Field(default=False, description="everything that writes rows waits at its next batch")
    batch_size: int = Field(default=0, ge=0, le=LARGEST_BATCH_SIZE, description="rows per batch; 0 adapts it")
    target_seconds: float = Field(
        default=0.25, gt=0, le=LONGEST_BATCH_SECONDS, description="duration of a batch to aim at"
    )
    rest_ratio: float = Field(
        default=0,
        ge=0,
        le=HIGHEST_REST_RATIO,
        description="seconds of rest for each second of work, so that the application has the machine to itself in "
        "between; the backfill takes so much longer",
    )
    max_blocked_sessions: int = Field(
        default=0, ge=0, description="wait while more sessions than this wait for a lock of ours"
    )
    max_replication_lag_seconds: float = Field(
        default=10, ge=0, description="wait while a replica is further behind"
    )
    max_replication_lag_mib: int = Field(
        default=1024, ge=0, description="wait while a replica has more write-ahead log left to replay"
    )
    max_kept_wal_mib: int = Field(
        default=10_240,
        ge=0,
        description="wait while a replication slot, or the archive, has more write-ahead log left to read",
    )
    max_wait_minutes: float = Field(
        default=60,
        ge=0,
        description="end a step that has waited so long for a replication slot, the archive or a synchronous standby",
    )
    max_wal_mib_per_second: float = Field(
        default=0, ge=0, description="wait while the server writes more write-ahead log"
    )
    min_free_disk_mib: int = Field(
        default=1024, ge=0, description="wait while less disk is free (servers on this machine only)"
    )
    two_person_rule: Literal["default", "off", "names", "roles"] = Field(
        default="default",
        description="who may drop: somebody of another name than the approver (names), over another database role as "
        "well (roles), or anybody (off); default is roles, and off for the sample",
    )
    drop_verification_seconds: float = Field(
        default=300,
        gt=0,
        le=86_400,
        description="how long a drop may verify the rows changed since the verification",
    )


def read_limits(connection: Connection) -> Limits:
    """The settings as they are now.

    Raises:
        ConfigurationError: a value in the table means nothing; names the setting.
    """
    return _validated(
        dict(connection.execute("SELECT name, value FROM alphapulse_encryption.settings").fetchall())
    )


def change_limits(database: Database, changes: Mapping[str, str], actor: Actor) -> Limits:
    """Change settings; reads only, where there is nothing to change.

    Args:
        changes: new values by name, as text.

    Raises:
        ConfigurationError: an unknown name, or a value that does not suit it; nothing was changed.
    """
    values = _validated(changes).model_dump(include=set(changes))
    with database.session(
        f"{'change' if values else 'read'} the settings of running backfills"
    ) as connection:
        if not values:
            return read_limits(connection) if bookkeeping_exists(connection) else Limits()
        ensure_bookkeeping(connection)
        with connection.transaction():
            for name, value in values.items():
                connection.execute(
                    "INSERT INTO alphapulse_encryption.settings (name, value) VALUES (%s, %s) "
                    "ON CONFLICT (name) DO UPDATE SET value = excluded.value, changed_at = now(), "
                    "changed_by = session_user",
                    [name, json.dumps(value)],
                )
            audit(connection, actor, "change_settings", settings=values)
        return read_limits(connection)


def _validated(values: Mapping[str, Any]) -> Limits:
    try:
        return Limits.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(Limits.model_fields)
            raise ConfigurationError(f"There is no setting {name}; there are {known}.") from None
        raise ConfigurationError(f"The setting {name} does not suit: {first['msg']}.") from None
