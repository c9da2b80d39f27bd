"""What the environment says: one small function per variable, read when called, never at import.

The variables of the key sources (`ALPHAPULSE_ENCRYPTION_*MASTER_KEY*`, AWS, Vault) are not here: the
key sources read them themselves.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import platformdirs

from alphapulse_encryption.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent

DEFAULT_BATCH_RANGES = 16
DEFAULT_ROTATION_SCHEDULE = "0 3 * * 0"
DEFAULT_REHEARSAL_SCHEDULE = "0 2 * * 6"
DEFAULT_SLOW_QUERIES_SCHEDULE = "0 * * * *"
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


def slow_queries_schedule() -> str:
    """When the schedule of slow queries runs (`ALPHAPULSE_SLOW_QUERIES_SCHEDULE`, cron), default every hour."""
    return _variable("ALPHAPULSE_SLOW_QUERIES_SCHEDULE") or DEFAULT_SLOW_QUERIES_SCHEDULE


def alert_webhook_url() -> str | None:
    """Where alerts are posted (`ALPHAPULSE_ALERT_WEBHOOK_URL`), None for no webhook. A secret.

    Raises:
        ConfigurationError: it is not an HTTP URL (never echoed).
    """
    return _http_url("ALPHAPULSE_ALERT_WEBHOOK_URL")


def alert_recipients() -> tuple[str, ...]:
    """Whom alerts are mailed to (`ALPHAPULSE_ALERT_EMAIL_TO`), separated by blanks or commas.

    Raises:
        ConfigurationError: one of them is no address.
    """
    name = "ALPHAPULSE_ALERT_EMAIL_TO"
    return tuple(_address(name, text) for text in (_variable(name) or "").replace(",", " ").split())


def alert_sender() -> str | None:
    """What address alerts are mailed from (`ALPHAPULSE_ALERT_EMAIL_FROM`).

    Raises:
        ConfigurationError: it is no address.
    """
    name = "ALPHAPULSE_ALERT_EMAIL_FROM"
    text = _variable(name)
    return None if text is None else _address(name, text)


def _address(name: str, text: str) -> str:
    local, separator, domain = text.rpartition("@")
    if not (local and separator and domain) or not text.isprintable() or set(text) & set(' <>",;:'):
        raise ConfigurationError(f"{name} is not an e-mail address, as in alerts@example.com.")
    return text


@dataclass(frozen=True)
class MailServer:
    """A server that takes mail.

    Args:
        host: its name.
        port: its port.
        security: ``tls`` from the beginning, ``starttls`` before anything is said, or ``offered``: STARTTLS where the
            server offers it.
        user: whom to log in as, None for nobody.
        password: theirs.
    """

    host: str
    port: int
    security: Literal["tls", "starttls", "offered"]
    user: str | None = None
    password: str | None = field(default=None, repr=False)


_MAIL_SCHEMES: Mapping[str, tuple[Literal["tls", "starttls", "offered"], int]] = {
    "smtps": ("tls", 465),
    "smtp+starttls": ("starttls", 587),
    "smtp": ("offered", 25),
}


def mail_server() -> MailServer | None:
    """The server that alerts are mailed by (`ALPHAPULSE_SMTP_URL`), None where unset. Holds a password.

    Raises:
        ConfigurationError: it is not such a URL (never echoed).
    """
    name = "ALPHAPULSE_SMTP_URL"
    text = _variable(name)
    if text is None:
        return None
    try:
        url = urlsplit(text)
        security, port = _MAIL_SCHEMES[url.scheme]
        server = MailServer(
            host=url.hostname or "",
            port=url.port or port,
            security=security,
            user=unquote(url.username) if url.username else None,
            password=unquote(url.password) if url.password else None,
        )
    except (ValueError, KeyError):
        server = None
    if server is None or not server.host or url.path.strip("/") or url.query or url.fragment:
        raise ConfigurationError(
            f"{name} is not a mail server's URL: smtp+starttls://user:password@host:587, smtps://… for TLS from the "
            "beginning, or smtp://host:25. What has a meaning in URLs is written %40, %3A, %2F in a password."
        )
    if (server.user is None) != (server.password is None):
        raise ConfigurationError(f"{name} needs a user and a password, or neither.")
    return server


def ui_url() -> str | None:
    """Where people find Dagster's UI (`ALPHAPULSE_UI_URL`), for links in alerts; None for no links.

    Raises:
        ConfigurationError: it is not an HTTP URL.
    """
    url = _http_url("ALPHAPULSE_UI_URL")
    return None if url is None else url.rstrip("/")


def _http_url(name: str) -> str | None:
    text = _variable(name)
    if text is None:
        return None
    try:
        url = urlsplit(text)
        valid = url.scheme in {"http", "https"} and bool(url.hostname) and url.port != 0
    except ValueError:
        valid = False
    if not valid or not text.isascii() or any(character.isspace() for character in text):
        raise ConfigurationError(f"{name} is not a URL: it must begin with https:// or http://.")
    return text


def alert_label() -> str | None:
    """What alerts call this database (`ALPHAPULSE_ALERT_LABEL`), as in production; None for nothing."""
    text = _variable("ALPHAPULSE_ALERT_LABEL")
    return None if text is None else " ".join(text.split())[:_LONGEST_LABEL]


_LONGEST_LABEL = 60


def alert_reminder() -> timedelta:
    """After how long an alert that stands is told again (`ALPHAPULSE_ALERT_REMIND_HOURS`, default 24).

    Raises:
        ConfigurationError: it is not a number of hours.
    """
    return timedelta(hours=_amount("ALPHAPULSE_ALERT_REMIND_HOURS", 24, "hours"))


def alert_pending_after() -> timedelta:
    """How long a row may wait for its ciphertext (`ALPHAPULSE_ALERT_PENDING_HOURS`, default 1).

    Raises:
        ConfigurationError: it is not a number of hours.
    """
    return timedelta(hours=_amount("ALPHAPULSE_ALERT_PENDING_HOURS", 1, "hours"))


def alert_rotate_after() -> timedelta:
    """How long a key version may be the current one (`ALPHAPULSE_ALERT_KEY_DAYS`, default 365).

    Raises:
        ConfigurationError: it is not a number of days.
    """
    return timedelta(days=_amount("ALPHAPULSE_ALERT_KEY_DAYS", 365, "days"))


def _amount(name: str, default: float, unit: str) -> float:
    text = _variable(name)
    if text is None:
        return default
    # float() alone would also take "nan", "1e3" and "1_0".
    plain = text.isascii() and text.replace(".", "", 1).isdigit() and len(text) <= len("99999.99")
    if not plain or float(text) <= 0:
        raise ConfigurationError(f"{name} must be a number of {unit}, more than 0.")
    return float(text)


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


def log_dir() -> Path:
    """Where log files go (`ALPHAPULSE_LOG_DIR`); it need not exist yet.

    Default: `logs/migration` in the source checkout that the package runs from, beside `.alphapulse`; where there is
    none, or `ALPHAPULSE_STATE_DIR` names another place, in the state directory.
    """
    text = _variable("ALPHAPULSE_LOG_DIR")
    if text:
        return Path(text).expanduser().absolute()
    state = state_dir()
    return (state.parent if state == _PACKAGE.parent / ".alphapulse" else state) / "logs" / "migration"


def log_days() -> int:
    """How long log files are kept, in days (`ALPHAPULSE_LOG_DAYS`, default 90).

    Raises:
        ConfigurationError: it is not a whole number of days, at least 1.
    """
    name = "ALPHAPULSE_LOG_DAYS"
    text = _variable(name)
    if text is None:
        return 90
    if not text.isascii() or not text.isdigit() or len(text) > len("99999") or int(text) < 1:
        raise ConfigurationError(f"{name} must be a whole number of days, at least 1.")
    return int(text)


def dagster_home() -> Path:
    """Dagster's instance directory: `DAGSTER_HOME`, else `dagster_home` in the state directory.

    Of each run launcher another one: they have configurations of their own, and are used side by side.

    Raises:
        ConfigurationError: as :func:`run_launcher`.
    """
    text = _variable("DAGSTER_HOME")
    if text:
        return Path(text).expanduser().absolute()
    return state_dir() / ("dagster_home" if run_launcher() == "local" else f"dagster_home_{run_launcher()}")


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


RunLauncher = Literal["local", "celery"]


def run_launcher() -> RunLauncher:
    """Where runs are executed (`ALPHAPULSE_RUN_LAUNCHER`): `local`, the default, or `celery`.

    Raises:
        ConfigurationError: it is another word.
    """
    name = "ALPHAPULSE_RUN_LAUNCHER"
    text = _variable(name) or "local"
    if text == "celery":
        return "celery"
    if text != "local":
        raise ConfigurationError(f"{name} must be local (runs on this machine) or celery (runs on workers).")
    return "local"


def celery_broker_url() -> str | None:
    """Where runs wait for workers (`ALPHAPULSE_CELERY_BROKER_URL`), None for Dagster's own storage. A secret.

    Raises:
        ConfigurationError: it is no URL of a broker (never echoed).
    """
    return _celery_url("ALPHAPULSE_CELERY_BROKER_URL", "sqla", ("amqp", "amqps", "pyamqp"))


def celery_backend_url() -> str | None:
    """Where Celery keeps results (`ALPHAPULSE_CELERY_BACKEND_URL`), None for Dagster's own storage. A secret.

    Raises:
        ConfigurationError: it is no URL of a result backend (never echoed).
    """
    return _celery_url("ALPHAPULSE_CELERY_BACKEND_URL", "db", ("rpc",))


def _celery_url(name: str, prefix: str, others: tuple[str, ...]) -> str | None:
    url = _variable(name)
    if url is None:
        return None
    scheme, separator, rest = url.partition("://")
    if scheme.removeprefix(f"{prefix}+") in {"postgresql", "postgres", "postgresql+psycopg2"} and rest:
        return f"{prefix}+postgresql+psycopg2://{rest}"
    if separator and scheme in {*others, "redis", "rediss", "sentinel"}:
        return url
    raise ConfigurationError(
        f"{name} is not a URL that can be used: postgresql://user:password@host:5432/database, "
        f"redis://…, rediss://… or {others[0]}://…"
    )
