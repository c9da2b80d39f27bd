"""The target as the environment says, and the sample's own key for the sample alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from alphapulse_encryption.defs.resources import environment
from alphapulse_encryption.defs.resources.partitions import parts_by_table, range_name
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.sample.key import make_sample_key, read_sample_key, sample_key_file

KEY = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
URL = "ALPHAPULSE_DATABASE_URL"
OTHER = "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVowMTIzNDU="


@pytest.fixture(autouse=True)
def _state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith(("ALPHAPULSE_", "DAGSTER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ALPHAPULSE_STATE_DIR", str(tmp_path / "state"))


def test_the_samples_key_is_made_once_and_for_its_owner_only() -> None:
    assert read_sample_key() is None
    make_sample_key()
    key = read_sample_key()
    make_sample_key()
    assert read_sample_key() == key
    assert sample_key_file().stat().st_mode & 0o777 == 0o600
    assert [path.name for path in sample_key_file().parent.iterdir()] == [sample_key_file().name]


def test_the_samples_key_serves_the_sample_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    make_sample_key()
    assert environment.key_environment()[KEY] == read_sample_key()
    assert KEY not in os.environ
    # A database of somebody's needs a key of theirs.
    monkeypatch.setenv(URL, "postgresql://me@host/db")
    with pytest.raises(ConfigurationError, match=f"{KEY} is not set"):
        load_key_ring(environment.key_environment())
    monkeypatch.delenv(URL)
    monkeypatch.setenv(KEY, OTHER)
    assert environment.key_environment()[KEY] == OTHER
    monkeypatch.delenv(KEY)
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_KEY_SOURCE", "vault")
    assert KEY not in environment.key_environment()


def test_nothing_of_the_target_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URL, "postgresql://me:canary@host/db")
    monkeypatch.setenv(KEY, OTHER)
    target = TargetResource()
    assert target.database.conninfo == "postgresql://me:canary@host/db"
    assert target.key_ring is target.key_ring
    for shown in (repr(target), repr(target.database), repr(target.key_ring), repr(target.cipher)):
        assert "canary" not in shown
        assert OTHER not in shown
    assert set(TargetResource.model_fields) == set()


def test_where_things_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.uses_sample()
    # Where no others fit, the embedded ones may.
    assert (environment.client_programs()[-1] / "pg_dump").is_file()
    monkeypatch.setenv(URL, "postgresql://me@host/db")
    assert not environment.uses_sample()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.client_programs()[0] == tmp_path


def test_partitions_are_worked_through_table_by_table() -> None:
    parts = parts_by_table(["01|b", "00|b", "10|a", "02|a", "00|x.A b"])
    assert [(part.table, part.batch_range) for part in parts] == [
        *(("a", 2), ("a", 10), ("b", 0), ("b", 1), ("x.A b", 0))
    ]
    assert [part.partition for part in parts] == ["02|a", "10|a", "00|b", "01|b", "00|x.A b"]
    assert [range_name(number) for number in (0, 9, 10, 998)] == ["00", "09", "10", "998"]
