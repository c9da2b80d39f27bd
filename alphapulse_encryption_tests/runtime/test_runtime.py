"""The application's ciphers of one process, and what importing them loads."""

import json
import subprocess
import sys

import psycopg
import pytest

import alphapulse_encryption
from alphapulse_encryption import (
    decrypt_field,
    encrypt_field,
    get_cipher,
    get_searchable_cipher,
    reset_ciphers,
)
from alphapulse_encryption.crypto.usage import KeyUsage
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.runtime import key_usage, report_key_usage
from alphapulse_encryption_tests.vectors import ENVELOPES, MASTER_KEY, TOKENS

VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, MASTER_KEY)
    monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", raising=False)
    monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_KEY_SOURCE", raising=False)
    reset_ciphers()


def test_the_functions_of_the_guide() -> None:
    vector = ENVELOPES[0]
    assert decrypt_field(vector.envelope, vector.context) == vector.plaintext
    assert get_cipher().decrypt(vector.envelope, vector.context) == vector.plaintext
    assert decrypt_field(encrypt_field("x", "c"), "c") == "x"
    assert encrypt_field(None, "c") is None
    assert decrypt_field(None, "c") is None
    token = TOKENS[0]
    assert get_searchable_cipher().generate_search_token(token.plaintext, token.context) == token.token


def test_ciphers_are_kept_until_they_are_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    cipher = get_cipher()
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", "2")
    assert get_cipher() is cipher
    assert get_searchable_cipher() is get_searchable_cipher()
    envelope = encrypt_field("x", "c")
    reset_ciphers()
    assert get_cipher() is not cipher
    assert json.loads(envelope)["key_version"] == 1
    assert json.loads(encrypt_field("x", "c"))["key_version"] == 2
    assert decrypt_field(envelope, "c") == "x"


def test_a_missing_key_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigurationError, match=f"{VARIABLE} is not set"):
        get_cipher()
    monkeypatch.setenv(VARIABLE, MASTER_KEY)
    assert decrypt_field(encrypt_field("x", "c"), "c") == "x"


def loaded_by(statement: str) -> set[str]:
    script = f"{statement}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout))


@pytest.mark.parametrize("use", ["", "alphapulse_encryption.encrypt_field('x', 'c')"])
def test_importing_the_package_loads_little(use: str) -> None:
    modules = loaded_by(f"import alphapulse_encryption; {use}")
    heavy = {"dagster", "psycopg", "psycopg2", "sqlalchemy", "pydantic", "yaml"}
    assert not modules & (
        heavy | {f"alphapulse_encryption.{name}" for name in ("migration", "catalogue", "orm")}
    )
    assert "alphapulse_encryption.crypto.envelope" in modules


def test_importing_the_types_loads_no_engine() -> None:
    modules = loaded_by("import alphapulse_encryption.orm")
    assert "sqlalchemy" in modules
    assert not modules & {"dagster", "psycopg", "psycopg2", "alphapulse_encryption.migration"}


def test_everything_promised_is_exported() -> None:
    assert set(alphapulse_encryption.__all__) == {
        "decrypt_field",
        "decrypt_fields",
        "encrypt_field",
        "encrypt_fields",
        "get_cipher",
        "get_searchable_cipher",
        "reset_ciphers",
    }


def test_what_this_process_has_encrypted_is_added_up_in_the_database(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        ensure_bookkeeping(connection)
        connection.execute(
            "INSERT INTO alphapulse_encryption.key_checks SELECT v, '' FROM generate_series(1, 9) v"
        )

        def send(context: str, version: int, messages: int) -> int:
            row = connection.execute(
                "SELECT encryption_report_key_usage(%s, %s, %s)", [context, version, messages]
            ).fetchone()
            assert row is not None
            return int(row[0])

        for context in {"reported", *(used.context for used in key_usage())}:
            known = "INSERT INTO alphapulse_encryption.key_usage VALUES (%s, 1, 'engine', 0)"
            connection.execute(known, [context])
        report_key_usage(send)
        connection.execute("UPDATE alphapulse_encryption.key_usage SET messages = 0")
        before = {usage.context: usage.messages for usage in key_usage()}
        for value in ("x", "y", None):
            encrypt_field(value, "reported")
        reset_ciphers()
        encrypt_field("z", "reported")
        assert {u.context: u.messages for u in key_usage()} == {**before, "reported": 3}
        assert report_key_usage(send) == (KeyUsage("reported", 1, 3),)
        assert report_key_usage(send) == ()
        used = connection.execute(
            "SELECT * FROM alphapulse_encryption.key_usage WHERE messages > 0"
        ).fetchone()
        assert used is not None and used[:4] == ("reported", 1, "application", 3)
        assert not caplog.records
        send("reported", 1, 2**32 - 5)
        encrypt_field("the last but one", "reported")
        report_key_usage(send)
        assert [record.name for record in caplog.records] == ["alphapulse_encryption"]
        assert "Plan a rotation" in caplog.text
        encrypt_field("the last one", "reported")
        # What others say they have encrypted stops nobody here.
        send("reported", 1, 2**32)
        encrypt_field("one more", "reported")
        report_key_usage(send)
        assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
