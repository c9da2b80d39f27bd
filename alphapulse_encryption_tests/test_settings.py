"""What the environment says, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError

URLS: list[tuple[str, Callable[[], str | None]]] = [
    ("ALPHAPULSE_DATABASE_URL", settings.database_url),
    ("ALPHAPULSE_STAGING_DATABASE_URL", settings.staging_database_url),
    ("ALPHAPULSE_RESTORE_DRILL_URL", settings.restore_drill_url),
    ("DAGSTER_POSTGRES_URL", settings.dagster_postgres_url),
]


@pytest.mark.parametrize(("name", "read"), URLS)
def test_urls_unset_or_empty(
    monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[], str | None]
) -> None:
    monkeypatch.delenv(name, raising=False)
    assert read() is None
    monkeypatch.setenv(name, " ")
    assert read() is None


@pytest.mark.parametrize(("name", "read"), URLS)
@pytest.mark.parametrize(
    "url", ["mysql://me:secret@host/db", "host=db password=secret", "postgresql:/secret"]
)
def test_bad_urls_are_named_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[], str | None], url: str
) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(ConfigurationError, match=name) as caught:
        read()
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["postgresql://me@host/db", "postgres://me@host/db"])
def test_urls(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("ALPHAPULSE_DATABASE_URL", url)
    assert settings.database_url() == url
    for storage in (url, "postgresql+psycopg2://me@host/db"):
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", storage)
        assert settings.dagster_postgres_url() == "postgresql+psycopg2://me@host/db"


def test_batch_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALPHAPULSE_BATCH_RANGES", raising=False)
    assert settings.batch_ranges() == 16
    for text, number in (("1", 1), (" 32 ", 32), ("999", 999)):
        monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", text)
        assert settings.batch_ranges() == number


@pytest.mark.parametrize("text", ["0", "1000", "-1", "1.5", "1_6", "many", "\u0663", "9" * 5000])
def test_bad_batch_ranges(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", text)
    with pytest.raises(
        ConfigurationError, match="ALPHAPULSE_BATCH_RANGES must be a whole number from 1 to 999"
    ):
        settings.batch_ranges()


def test_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ALPHAPULSE_STATE_DIR", "DAGSTER_HOME", "ALPHAPULSE_ENCRYPTION_CATALOGUE"):
        monkeypatch.delenv(name, raising=False)
    assert settings.state_dir() == Path(settings.__file__).resolve().parents[1] / ".alphapulse"
    assert settings.dagster_home() == settings.state_dir() / "dagster_home"
    assert settings.catalogue_path() is None
    monkeypatch.setenv("ALPHAPULSE_STATE_DIR", str(tmp_path))
    assert settings.state_dir() == tmp_path
    assert settings.dagster_home() == tmp_path / "dagster_home"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    assert settings.dagster_home() == tmp_path / "home"
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_CATALOGUE", "other.yaml")
    assert settings.catalogue_path() == Path("other.yaml")


def test_backups(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECIPIENTS", "S3_BUCKET", "S3_PREFIX", "S3_ENCRYPTION", "S3_KMS_KEY"):
        monkeypatch.delenv(f"ALPHAPULSE_BACKUP_{name}", raising=False)
    assert settings.backup_recipients() == ()
    assert settings.backup_bucket() is None and settings.backup_kms_key() is None
    assert (settings.backup_prefix(), settings.backup_encryption()) == ("", "AES256")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_RECIPIENTS", " age1a, age1b\nage1c ")
    assert settings.backup_recipients() == ("age1a", "age1b", "age1c")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_BUCKET", "ours")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_PREFIX", "nightly")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_KMS_KEY", "alias/x")
    assert (settings.backup_bucket(), settings.backup_prefix()) == ("ours", "nightly")
    assert (settings.backup_encryption(), settings.backup_kms_key()) == ("aws:kms", "alias/x")
