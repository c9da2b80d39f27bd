"""What the environment says: each variable a declared field, read and checked when it is asked for, never at import.

The variables of the key sources (`ALPHAPULSE_ENCRYPTION_*MASTER_KEY*`, AWS, Vault) are not here: the
key sources read them themselves.
"""

import contextlib
import re
from argparse import ArgumentTypeError
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import platformdirs
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    HttpUrl,
    TypeAdapter,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from alphapulse_encryption.bounds import MOST_BATCH_RANGES, whole_number
from alphapulse_encryption.errors import ConfigurationError

_PACKAGE = Path(__file__).resolve().parent


class Wrong(ConfigurationError):
    """What is wrong with a variable, in words that follow its name and never quote it: it may be secret."""


class Variables(BaseSettings):
    """A group of variables; its docstring is the group's heading in the manual."""

    model_config = SettingsConfigDict(case_sensitive=True, enable_decoding=False, extra="ignore", frozen=True)

    @field_validator("*", mode="wrap")
    @classmethod
    def _checked(cls, value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """A variable's value; where it is wrong the error, to be raised when this variable is asked for."""
        about = cls.model_fields[info.field_name or ""]
        if not isinstance(value, str) or not value.strip():
            return about.default
        try:
            return handler(value.strip())
        except (Wrong, ArgumentTypeError) as error:
            return ConfigurationError(f"{about.validation_alias} {error}")

    def __getattribute__(self, name: str) -> Any:
        """Raise the error of this variable, if it is wrong."""
        value = super().__getattribute__(name)
        if isinstance(value, ConfigurationError):
            raise value
        return value

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Nothing: there are secrets among them."""
        return []


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _span(unit: str) -> BeforeValidator:
    # float() alone would also take "nan", "1e3" and "1_0".
    def read(text: str) -> timedelta:
        if not re.fullmatch(r"(?=.{1,8}$)([0-9]+\.?[0-9]*|\.[0-9]+)", text) or not float(text):
            raise Wrong(f"must be a number of {unit}, more than 0.")
        return timedelta(**{unit: float(text)})

    return BeforeValidator(read)


def _postgres_url(text: str) -> str:
    if not text.startswith(("postgresql://", "postgres://")):
        raise Wrong(
            "is not a PostgreSQL URL: it must begin with postgresql:// or postgres://, "
            "as in postgresql://user@host:5432/database."
        )
    return text


def _web_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        if re.fullmatch("https?://[!-~]+", text) and TypeAdapter(HttpUrl).validate_python(text):
            return text
    raise Wrong("is not a URL: it must begin with https:// or http://.")


def _address(text: str) -> str:
    if not text.isprintable() or not re.fullmatch(r'[^\s<>",;:]+@[^\s<>",;:@]+', text):
        raise Wrong("is not an e-mail address, as in alerts@example.com.")
    return text


def _mail_url(text: str) -> str:
    try:
        url = urlsplit(text)
        whole = url.hostname and url.port != 0 and not (url.path.strip("/") or url.query or url.fragment)
    except ValueError:
        whole = False
    if not whole or url.scheme not in {"smtp", "smtp+starttls", "smtps"}:
        raise Wrong(
            "is not a mail server's URL: smtp+starttls://user:password@host:587, smtps://… for TLS from the "
            "beginning, or smtp://host:25. What has a meaning in URLs is written %40, %3A, %2F in a password."
        )
    if bool(url.username) != bool(url.password):
        raise Wrong("needs a user and a password, or neither.")
    return text


_POSTGRES = ("postgresql", "postgres", "postgresql+psycopg2")


def _storage(text: str) -> str:
    # A bare `postgresql://` makes SQLAlchemy 2.1 choose psycopg 3, with which Dagster's event log cannot notify.
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in _POSTGRES:
        raise Wrong(
            "is not a URL Dagster's storage can use: it must begin with postgresql+psycopg2:// "
            "(postgresql:// and postgres:// are taken for it)."
        )
    return f"postgresql+psycopg2://{rest}"


def _queue(prefix: str, *others: str) -> AfterValidator:
    def read(text: str) -> str:
        scheme, separator, rest = text.partition("://")
        if scheme.removeprefix(f"{prefix}+") in _POSTGRES and rest:
            return f"{prefix}+postgresql+psycopg2://{rest}"
        if not separator or scheme not in {*others, "redis", "rediss", "sentinel"}:
            raise Wrong(
                "is not a URL that can be used: postgresql://user:password@host:5432/database, "
                f"redis://…, rediss://… or {others[0]}://…"
            )
        return text

    return AfterValidator(read)


def _pooler(text: str) -> bool:
    if text != "session":
        raise Wrong("must be session, for a connection pooler in session mode; others are refused.")
    return True


def _host(text: str) -> str:
    if not re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(:[0-9]{1,5})?", text):
        raise Wrong("must be names, each with or without a port, as in dagster.example.com or [::1]:3000.")
    return text


def _yes(text: str) -> bool:
    if text.lower() not in {"true", "false"}:
        raise Wrong("must be true or false.")
    return text.lower() == "true"


def _run_launcher(text: str) -> str:
    if text not in {"local", "celery"}:
        raise Wrong("must be local (runs on this machine) or celery (runs on workers).")
    return text


PostgresUrl = Annotated[str | None, AfterValidator(_postgres_url)]
WebUrl = Annotated[str | None, AfterValidator(_web_url)]
Address = Annotated[str, AfterValidator(_address)]
Host = Annotated[str, AfterValidator(_host)]
Words = BeforeValidator(_words)
File = Annotated[Path | None, BeforeValidator(_path)]
Directory = Annotated[Path | None, BeforeValidator(_path), AfterValidator(Path.absolute)]
Hours = Annotated[timedelta, _span("hours")]
Days = Annotated[timedelta, _span("days")]


def _variable(name: str, description: str, default: object = None) -> Any:
    return Field(default, validation_alias=name, description=description)


class TargetVariables(Variables):
    """Target and catalogue"""

    database_url: PostgresUrl = _variable(
        "ALPHAPULSE_DATABASE_URL",
        "the database to migrate, `postgresql://…`; unset: the embedded one with the sample",
    )
    writer_database_url: PostgresUrl = _variable(
        "ALPHAPULSE_WRITER_DATABASE_URL",
        "the same database, as [the log-in that reads and writes rows](roles.md#the-data-paths-own-log-in); unset: the "
        "one above. A secret",
    )
    session_pooler: Annotated[bool, BeforeValidator(_pooler)] = _variable(
        "ALPHAPULSE_DATABASE_POOLER",
        "`session`: the database is reached through a connection pooler in session mode; unset: any pooler is refused",
        False,
    )
    catalogue_path: File = _variable(
        "ALPHAPULSE_ENCRYPTION_CATALOGUE",
        "path of [the catalogue](catalogue.md); unset: AlphaPulse's own, which is packaged",
    )
    batch_ranges: Annotated[int, BeforeValidator(whole_number(1, MOST_BATCH_RANGES))] = _variable(
        "ALPHAPULSE_BATCH_RANGES",
        f"batch ranges per table, 1 to {MOST_BATCH_RANGES}; stays as it was at the first `--add-columns`, "
        "until `--replan`",
        16,
    )
    state_dir: Directory = _variable(
        "ALPHAPULSE_STATE_DIR",
        "where the embedded server, Dagster's home, backups and rehearsals are; unset: `.alphapulse` in "
        "the checkout, else the user's state directory",
    )


class Backups(Variables):
    """Backups"""

    recipients: Annotated[tuple[str, ...], Words] = _variable(
        "ALPHAPULSE_BACKUP_RECIPIENTS",
        "age public keys of others who can open backups without the master key, several with commas",
        (),
    )
    restore_drill_url: PostgresUrl = _variable(
        "ALPHAPULSE_RESTORE_DRILL_URL", "a database on the server to restore on; unset: the target's server"
    )
    bucket: str | None = _variable("ALPHAPULSE_BACKUP_S3_BUCKET", "upload every backup to this bucket, too")
    prefix: str = _variable("ALPHAPULSE_BACKUP_S3_PREFIX", "what the keys of uploaded backups begin with", "")
    encryption: str = _variable(
        "ALPHAPULSE_BACKUP_S3_ENCRYPTION",
        "server-side encryption: `AES256`, `aws:kms` or `aws:kms:dsse`",
        "AES256",
    )
    kms_key: str | None = _variable(
        "ALPHAPULSE_BACKUP_S3_KMS_KEY", "the KMS key, where it is not the account's own"
    )


class Logs(Variables):
    """Log files"""

    directory: Directory = _variable(
        "ALPHAPULSE_LOG_DIR",
        "where [the log files](logs.md) go; default `logs/migration` in the checkout or the state directory",
    )
    days: Annotated[int, BeforeValidator(whole_number(1, 99_999, "a whole number of days, at least 1."))] = (
        _variable("ALPHAPULSE_LOG_DAYS", "how long they are kept, in days", 90)
    )


class Workers(Variables):
    """Runs on several machines"""

    run_launcher: Annotated[str, AfterValidator(_run_launcher)] = _variable(
        "ALPHAPULSE_RUN_LAUNCHER",
        "`local`, or `celery`: runs are executed by [workers](scale-out.md)",
        "local",
    )
    broker_url: Annotated[str | None, _queue("sqla", "amqp", "amqps", "pyamqp")] = _variable(
        "ALPHAPULSE_CELERY_BROKER_URL", "where runs wait for workers; unset: Dagster's storage. A secret"
    )
    backend_url: Annotated[str | None, _queue("db", "rpc")] = _variable(
        "ALPHAPULSE_CELERY_BACKEND_URL", "where Celery keeps results; unset: Dagster's storage. A secret"
    )


class Rehearsals(Variables):
    """Rehearsals"""

    staging_database_url: PostgresUrl = _variable(
        "ALPHAPULSE_STAGING_DATABASE_URL",
        "the database that is rehearsed; only read. Unset: a staging copy of the sample",
    )
    server_url: PostgresUrl = _variable(
        "ALPHAPULSE_REHEARSAL_SERVER_URL",
        "a database on the server for the clones; unset: the staging database's own server",
    )


class Schedules(Variables):
    """Schedules, as cron has them; stopped until started"""

    rotation: str = _variable("ALPHAPULSE_ROTATION_SCHEDULE", "when `key_rotation` runs", "0 3 * * 0")
    rehearsal: str = _variable(
        "ALPHAPULSE_REHEARSAL_SCHEDULE", "when `staging_rehearsal_schedule` runs", "0 2 * * 6"
    )
    slow_queries: str = _variable(
        "ALPHAPULSE_SLOW_QUERIES_SCHEDULE",
        "when [the slow queries](after-the-switch.md) are looked for",
        "0 * * * *",
    )


class Alerts(Variables):
    """Alerts"""

    webhook_url: WebUrl = _variable("ALPHAPULSE_ALERT_WEBHOOK_URL", "where alerts are posted; a secret")
    mail_url: Annotated[str | None, AfterValidator(_mail_url)] = _variable(
        "ALPHAPULSE_SMTP_URL",
        "the mail server, `smtp+starttls://user:password@host:587`, `smtps://…` or `smtp://…`; a secret",
    )
    recipients: Annotated[tuple[Address, ...], Words] = _variable(
        "ALPHAPULSE_ALERT_EMAIL_TO", "whom alerts are mailed to, several with commas", ()
    )
    sender: Address | None = _variable("ALPHAPULSE_ALERT_EMAIL_FROM", "what address they come from")
    label: Annotated[str | None, AfterValidator(lambda text: " ".join(text.split())[:60])] = _variable(
        "ALPHAPULSE_ALERT_LABEL", "what alerts call this database, as in `production`"
    )
    remind_after: Hours = _variable(
        "ALPHAPULSE_ALERT_REMIND_HOURS",
        "after how long what stands is told again, in hours",
        timedelta(hours=24),
    )
    pending_after: Hours = _variable(
        "ALPHAPULSE_ALERT_PENDING_HOURS",
        "how long a row may wait for its ciphertext, and a backfill stand still, in hours",
        timedelta(hours=1),
    )
    rotate_after: Days = _variable(
        "ALPHAPULSE_ALERT_KEY_DAYS",
        "how long a key version may be the current one, in days",
        timedelta(days=365),
    )


class Ui(Variables):
    """Dagster's UI"""

    url: Annotated[WebUrl, AfterValidator(lambda url: url.rstrip("/"))] = _variable(
        "ALPHAPULSE_UI_URL",
        "where people find it: for links in alerts, and for [its own pages' requests](security.md#the-ui)",
    )
    hosts: Annotated[tuple[Host, ...], Words] = _variable(
        "ALPHAPULSE_UI_HOSTS",
        "further names by which it may be asked for, each with or without a port, several with commas; those of this "
        "machine are known",
        (),
    )
    read_only: Annotated[bool, BeforeValidator(_yes)] = _variable(
        "ALPHAPULSE_UI_READ_ONLY", "`true`: it shows and changes nothing, as with `--read-only`", False
    )


class Dagster(Variables):
    """Dagster"""

    home: Directory = _variable(
        "DAGSTER_HOME", "Dagster's instance; unset: in the state directory, of each run launcher another one"
    )
    postgres_url: Annotated[str | None, AfterValidator(_storage)] = _variable(
        "DAGSTER_POSTGRES_URL",
        "its storage, `postgresql+psycopg2://…`; unset: on the embedded server. A secret where it has a "
        "password",
    )


def state_dir() -> Path:
    """Where everything this project keeps on disk lives; it need not exist yet."""
    checkout = _PACKAGE.parent
    in_checkout = checkout / ".alphapulse" if (checkout / "pyproject.toml").is_file() else None
    return TargetVariables().state_dir or in_checkout or platformdirs.user_state_path("alphapulse_encryption")


def log_dir() -> Path:
    """Where log files go; it need not exist yet. Beside `.alphapulse` in the checkout, else in the state directory."""
    state = state_dir()
    beside = state.parent if state == _PACKAGE.parent / ".alphapulse" else state
    return Logs().directory or beside / "logs" / "migration"


def dagster_home() -> Path:
    """Dagster's instance directory: of each run launcher another one, because they are used side by side."""
    launcher = Workers().run_launcher
    name = "dagster_home" if launcher == "local" else f"dagster_home_{launcher}"
    return Dagster().home or state_dir() / name


def backup_directory() -> Path:
    """Where backups are taken to, and where a drop looks for them."""
    return state_dir() / "backups"
