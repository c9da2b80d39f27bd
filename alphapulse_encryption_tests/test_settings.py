"""What the environment says, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest

from alphapulse_encryption import settings
from alphapulse_encryption.errors import ConfigurationError

URLS: list[tuple[str, Callable[[], str | None]]] = [
    ("ALPHAPULSE_DATABASE_URL", lambda: settings.TargetVariables().database_url),
    ("ALPHAPULSE_STAGING_DATABASE_URL", lambda: settings.Rehearsals().staging_database_url),
    ("ALPHAPULSE_RESTORE_DRILL_URL", lambda: settings.Backups().restore_drill_url),
    ("DAGSTER_POSTGRES_URL", lambda: settings.Dagster().postgres_url),
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
    assert settings.TargetVariables().database_url == url
    for storage in (url, "postgresql+psycopg2://me@host/db"):
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", storage)
        assert settings.Dagster().postgres_url == "postgresql+psycopg2://me@host/db"


def test_batch_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALPHAPULSE_BATCH_RANGES", raising=False)
    assert settings.TargetVariables().batch_ranges == 16
    for text, number in (("1", 1), (" 32 ", 32), ("999", 999)):
        monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", text)
        assert settings.TargetVariables().batch_ranges == number


@pytest.mark.parametrize("text", ["0", "1000", "-1", "1.5", "1_6", "many", "\u0663", "9" * 5000])
def test_bad_batch_ranges(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", text)
    with pytest.raises(
        ConfigurationError, match="ALPHAPULSE_BATCH_RANGES must be a whole number from 1 to 999"
    ):
        print(settings.TargetVariables().batch_ranges)


def test_directories(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("ALPHAPULSE_STATE_DIR", "DAGSTER_HOME", "ALPHAPULSE_ENCRYPTION_CATALOGUE"):
        monkeypatch.delenv(name, raising=False)
    assert settings.state_dir() == Path(settings.__file__).resolve().parents[1] / ".alphapulse"
    assert settings.dagster_home() == settings.state_dir() / "dagster_home"
    assert settings.TargetVariables().catalogue_path is None
    monkeypatch.setenv("ALPHAPULSE_STATE_DIR", str(tmp_path))
    assert settings.state_dir() == tmp_path
    assert settings.dagster_home() == tmp_path / "dagster_home"
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    assert settings.dagster_home() == tmp_path / "home"
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_CATALOGUE", "other.yaml")
    assert settings.TargetVariables().catalogue_path == Path("other.yaml")


def test_backups(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECIPIENTS", "S3_BUCKET", "S3_PREFIX", "S3_ENCRYPTION", "S3_KMS_KEY"):
        monkeypatch.delenv(f"ALPHAPULSE_BACKUP_{name}", raising=False)
    assert settings.Backups().recipients == ()
    assert settings.Backups().bucket is None and settings.Backups().kms_key is None
    assert (settings.Backups().prefix, settings.Backups().encryption) == ("", "AES256")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_RECIPIENTS", " age1a, age1b\nage1c ")
    assert settings.Backups().recipients == ("age1a", "age1b", "age1c")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_BUCKET", "ours")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_PREFIX", "nightly")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("ALPHAPULSE_BACKUP_S3_KMS_KEY", "alias/x")
    assert (settings.Backups().bucket, settings.Backups().prefix) == ("ours", "nightly")
    assert (settings.Backups().encryption, settings.Backups().kms_key) == ("aws:kms", "alias/x")


def test_what_is_wrong_is_told_to_those_who_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALPHAPULSE_DATABASE_URL", "canary")
    monkeypatch.setenv("ALPHAPULSE_BATCH_RANGES", "12")
    target = settings.TargetVariables()
    assert target.batch_ranges == 12
    assert "canary" not in repr(target) + str(target)
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="ALPHAPULSE_DATABASE_URL") as caught:
            print(target.database_url)
        assert caught.value.exit_status == 2


def test_every_variable_is_declared_once_and_described() -> None:
    fields = [f for group in settings.Variables.__subclasses__() for f in group.model_fields.values()]
    names = [field.validation_alias for field in fields]
    assert len(set(names)) == len(names) > 30
    assert all(field.description for field in fields)
