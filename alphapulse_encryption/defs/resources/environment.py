"""What the environment says about the target, without Dagster: the command line asks before Dagster is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.gates.offsite import Bucket
from alphapulse_encryption.migration.postgres import programs
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.key import read_sample_key
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded, embedded_url

WRITER_VARIABLE = "ALPHAPULSE_WRITER_DATABASE_URL"
_MASTER_KEY = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
_KEY_SOURCE = "ALPHAPULSE_ENCRYPTION_KEY_SOURCE"


def uses_sample() -> bool:
    """Whether the target is the embedded database with the sample."""
    return settings.TargetVariables().database_url is None


def target_database() -> Database:
    """``ALPHAPULSE_DATABASE_URL``, or the embedded database, which is started if need be."""
    return database_at(settings.TargetVariables().database_url or embedded_url(SAMPLE_DATABASE))


def writer_database() -> Database | None:
    """``ALPHAPULSE_WRITER_DATABASE_URL``: the target, as the log-in that reads and writes rows; None where it is unset.

    Raises:
        ConfigurationError: it is set, and the target is the embedded sample.
    """
    url = settings.TargetVariables().writer_database_url
    if url is None:
        return None
    if uses_sample():
        raise ConfigurationError(
            f"{WRITER_VARIABLE} is set, and ALPHAPULSE_DATABASE_URL is not: set both, or unset {WRITER_VARIABLE}."
        )
    return database_at(url, Database.application_name, WRITER_VARIABLE)


def data_path() -> Database | None:
    """As whom rows of the target are read and written; None of the sample, where that does not matter."""
    return None if uses_sample() else writer_database() or target_database()


def database_at(url: str, *names: str, read_only: bool = False) -> Database:
    """The database at an address that a variable holds, through a pooler where the environment allows one.

    Args:
        names: of the application and of the variable, where they are not the target's.
    """
    application, variable = names or (Database.application_name, Database.variable)
    return Database(url, application, variable, read_only, settings.TargetVariables().session_pooler)


def target_exists() -> bool:
    """Whether there is a target to ask: the embedded database is made at its first use only."""
    return not uses_sample() or embedded().exists()


def key_environment() -> Mapping[str, str]:
    """The variables that the key source reads: with the sample's own key, for the embedded database alone."""
    environ = secrecy.with_keys()
    sample_key = read_sample_key() if uses_sample() else None
    if sample_key is None or _MASTER_KEY in environ or (environ.get(_KEY_SOURCE) or "env") != "env":
        return environ
    return {**environ, _MASTER_KEY: sample_key}


def client_programs() -> list[Path]:
    """Where ``pg_dump`` and ``pg_restore`` may be, the embedded ones last."""
    places = programs.usual_places()
    with contextlib.suppress(ConfigurationError):  # none for this platform
        places.append(embedded().bin_dir())
    return places


def backup_bucket() -> Bucket | None:
    """Where backups are uploaded to; None where they are not."""
    said = settings.Backups()
    if said.bucket is None:
        return None
    return Bucket(said.bucket, said.prefix, said.encryption, said.kms_key)


def restore_drill_server() -> Database:
    """A database of the server on which restore drills make their scratch database."""
    url = settings.Backups().restore_drill_url
    if url is None:
        return target_database()
    return database_at(url, Database.application_name, "ALPHAPULSE_RESTORE_DRILL_URL")
