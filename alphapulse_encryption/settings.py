"""What the environment says: one small function per variable, read when called, never at import.

The variables of the key sources (`ALPHAPULSE_ENCRYPTION_*MASTER_KEY*`, AWS, Vault) are not here: the
key sources read them themselves.
"""

import os
from pathlib import Path

import platformdirs

from alphapulse_encryption.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent

DEFAULT_BATCH_RANGES = 16
DEFAULT_ROTATION_SCHEDULE = "0 3 * * 0"
DEFAULT_REHEARSAL_SCHEDULE = "0 2 * * 6"
# Range names have a fixed width, and a grid of tables x ranges has to stay readable.
MAX_BATCH_RANGES = 999


def _variable(name: str) -> str | None:
    """The variable's text without surrounding blanks; None where it is unset or empty."""
    return os.environ.get(name, "").strip() or None


def _postgres_url(name: str) -> str | None:
    url = _variable(name)
    if url is not None and not url.startswith(("postgresql://", "postgres://")):
        raise ConfigurationError(
            f"{name} is not a PostgreSQL URL: it must begin with postgresql:// or postgres://, "
            "as in postgresql://user@host:5432/database."
        )
    return url


def database_url() -> str | None:
    """The target database (`ALPHAPULSE_DATABASE_URL`), None for the embedded one.

    Raises:
        ConfigurationError: it is set to something else than a PostgreSQL URL (never echoed).
    """
    return _postgres_url("ALPHAPULSE_DATABASE_URL")


def staging_database_url() -> str | None:
    """The database that staging rehearsals copy (`ALPHAPULSE_STAGING_DATABASE_URL`), None where unset.

    Raises:
        ConfigurationError: it is set to something else than a PostgreSQL URL (never echoed).
    """
    return _postgres_url("ALPHAPULSE_STAGING_DATABASE_URL")


def rehearsal_server_url() -> str | None:
    """A database on the server where rehearsals make their clones (`ALPHAPULSE_REHEARSAL_SERVER_URL`), None for the
    staging database's own server.

    Raises:
        ConfigurationError: it is set to something else than a PostgreSQL URL (never echoed).
    """
    return _postgres_url("ALPHAPULSE_REHEARSAL_SERVER_URL")


def rehearsal_schedule() -> str:
    """When the schedule of rehearsals runs (`ALPHAPULSE_REHEARSAL_SCHEDULE`, cron), default Saturdays at two."""
    return _variable("ALPHAPULSE_REHEARSAL_SCHEDULE") or DEFAULT_REHEARSAL_SCHEDULE


def restore_drill_url() -> str | None:
    """A database on the server that restore drills use (`ALPHAPULSE_RESTORE_DRILL_URL`), None for the target's own.

    Raises:
        ConfigurationError: it is set to something else than a PostgreSQL URL (never echoed).
    """
    return _postgres_url("ALPHAPULSE_RESTORE_DRILL_URL")


def backup_recipients() -> tuple[str, ...]:
    """Further age recipients of backups (`ALPHAPULSE_BACKUP_RECIPIENTS`), separated by blanks or commas."""
    return tuple((_variable("ALPHAPULSE_BACKUP_RECIPIENTS") or "").replace(",", " ").split())


def backup_bucket() -> str | None:
    """The S3 bucket that backups are uploaded to (`ALPHAPULSE_BACKUP_S3_BUCKET`), None for no upload."""
    return _variable("ALPHAPULSE_BACKUP_S3_BUCKET")


def backup_prefix() -> str:
    """What the keys of uploaded backups begin with (`ALPHAPULSE_BACKUP_S3_PREFIX`), default nothing."""
    return _variable("ALPHAPULSE_BACKUP_S3_PREFIX") or ""


def backup_encryption() -> str:
    """The server-side encryption of uploaded backups (`ALPHAPULSE_BACKUP_S3_ENCRYPTION`), default AES256."""
    return _variable("ALPHAPULSE_BACKUP_S3_ENCRYPTION") or "AES256"


def backup_kms_key() -> str | None:
    """The KMS key of uploaded backups (`ALPHAPULSE_BACKUP_S3_KMS_KEY`), None for the account's own."""
    return _variable("ALPHAPULSE_BACKUP_S3_KMS_KEY")


def batch_ranges() -> int:
    """How many batch ranges every table is cut into (`ALPHAPULSE_BATCH_RANGES`, default 16).

    Raises:
        ConfigurationError: it is not a whole number from 1 to 999.
    """
    name = "ALPHAPULSE_BATCH_RANGES"
    text = _variable(name)
    if text is None:
        return DEFAULT_BATCH_RANGES
    # int() alone would also take "1_6", "+16" and digits of other scripts.
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(MAX_BATCH_RANGES))
    if not digits or int(text) < 1:
        raise ConfigurationError(f"{name} must be a whole number from 1 to {MAX_BATCH_RANGES}.")
    return int(text)


def rotation_schedule() -> str:
    """When the schedule of key rotations runs (`ALPHAPULSE_ROTATION_SCHEDULE`, cron), default Sundays at three."""
    return _variable("ALPHAPULSE_ROTATION_SCHEDULE") or DEFAULT_ROTATION_SCHEDULE


def catalogue_path() -> Path | None:
    """The catalogue (`ALPHAPULSE_ENCRYPTION_CATALOGUE`), None for the packaged one."""
    text = _variable("ALPHAPULSE_ENCRYPTION_CATALOGUE")
    return Path(text).expanduser() if text else None


def state_dir() -> Path:
    """Where everything this project keeps on disk lives; it need not exist yet.

    `ALPHAPULSE_STATE_DIR`, else `.alphapulse` in the source checkout the package runs from, else the
    user's state directory.
    """
    text = _variable("ALPHAPULSE_STATE_DIR")
    if text:
        return Path(text).expanduser().absolute()
    checkout = _PACKAGE.parent
    if (checkout / "pyproject.toml").is_file():
        return checkout / ".alphapulse"
    return platformdirs.user_state_path("alphapulse_encryption")


def dagster_home() -> Path:
    """Dagster's instance directory: `DAGSTER_HOME`, else `dagster_home` in the state directory."""
    text = _variable("DAGSTER_HOME")
    return Path(text).expanduser().absolute() if text else state_dir() / "dagster_home"


def dagster_postgres_url() -> str | None:
    """Dagster's storage (`DAGSTER_POSTGRES_URL`), None for the embedded PostgreSQL.

    Returns:
        The URL with its driver spelled out, `postgresql+psycopg2://…`: a bare `postgresql://` makes
        SQLAlchemy 2.1 choose psycopg 3, with which Dagster's event log cannot notify.

    Raises:
        ConfigurationError: it is set to something else than a PostgreSQL URL (never echoed).
    """
    name = "DAGSTER_POSTGRES_URL"
    url = _variable(name)
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in {"postgresql", "postgres", "postgresql+psycopg2"}:
        raise ConfigurationError(
            f"{name} is not a URL Dagster's storage can use: it must begin with postgresql+psycopg2:// "
            "(postgresql:// and postgres:// are taken for it)."
        )
    return f"postgresql+psycopg2://{rest}"
