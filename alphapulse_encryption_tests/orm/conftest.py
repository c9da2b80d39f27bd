"""Databases at every stage of the migration of one table, and a model of it in a phase that is right there."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine

from alphapulse_encryption import reset_ciphers
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.migration.gates.approvals import approve_drop
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.drop import drop_plaintext
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.orm import reset_phases
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import target
from alphapulse_encryption_tests.orm import models

STAGES = ("plain", "columns", "switched", "dropped")
# Every phase at every stage that it is right at.
PLACES = [
    ("off", "plain"),
    ("off", "columns"),
    ("plaintext", "columns"),
    ("dual", "columns"),
    ("dual", "switched"),
    ("encrypted", "switched"),
    ("encrypted", "dropped"),
]
ENCRYPTED_PLACES = [place for place in PLACES if place[0] in {"dual", "encrypted"}]


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_MASTER_KEY", base64.b64encode(support.MASTER_KEY).decode())
    for name in ("KEY_VERSION", "KEY_SOURCE", "PHASE"):
        monkeypatch.delenv(f"ALPHAPULSE_ENCRYPTION_{name}", raising=False)
    reset_ciphers()
    reset_phases()
    yield
    reset_ciphers()
    reset_phases()


@pytest.fixture(scope="session")
def _templates(postgres: EmbeddedPostgres, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    made: set[str] = set()

    def template(stage: str) -> str:
        name = f"orm_{stage}"
        if stage not in made:
            postgres.ensure_database(name)
            _bring_to(postgres.url(name), stage, tmp_path_factory.mktemp("backup"), postgres.bin_dir())
            made.add(stage)
        return name

    return template


def _bring_to(url: str, stage: str, directory: Path, bin_dir: Path) -> None:
    """Walk the empty table so far."""
    entry, database, keys, actor = models.ENTRY, Database(url), support.KEYS, support.ACTOR
    support.run(url, models.CREATE)
    if stage == "plain":
        return
    support.add_columns(url, entry)
    support.backfill_all(url, entry)
    build_search_indexes(database, entry, actor)
    if stage == "columns":
        return
    support.verify(url, entry)
    switch_to_ciphertext(target(database, keys=keys, actor=actor), entry)
    if stage == "switched":
        return
    support.verify(url, entry)
    catalogue = Catalogue(tables=(entry,))
    take_backup(target(database, keys=keys, actor=actor), (entry,), directory=directory, bin_dirs=[bin_dir])
    approve_drop(
        target(database, keys=keys, actor=actor, catalogue=catalogue),
        entry,
        approver="Ada",
        reason="the encrypted columns serve for a month",
        confirmation=entry.key,
        backups=directory,
    )
    drop_plaintext(
        support.target(database, keys=keys, actor=actor, catalogue=catalogue),
        entry,
        backups=directory,
        operator="Grace",
        default_rule="names",
    )


@dataclass
class Place:
    """A model in a phase, at a stage of the migration.

    Args:
        phase: of the model.
        stage: of the database.
        url: of the database.
        engine: to it.
        model: the mapped class.
    """

    phase: str
    stage: str
    url: str
    engine: Engine
    model: Any

    @property
    def has_plaintext(self) -> bool:
        return self.stage != "dropped"

    def rows(self) -> dict[int, dict[str, Any]]:
        """What is stored, read by a session that knows nothing of the package: opened envelopes by column."""
        return models.stored(self.url)


@pytest.fixture
def database(postgres: EmbeddedPostgres, _templates: Callable[[str], str]) -> Iterator[Callable[[str], str]]:
    """Makes databases at a stage; dropped after the test."""
    open_ones: list[Iterator[str]] = []

    def make(stage: str) -> str:
        iterator = fresh_database(postgres, _templates(stage))
        open_ones.append(iterator)
        url = next(iterator)
        if stage != "plain":
            support.sign_here(url)
        return url

    yield make
    for iterator in open_ones:
        next(iterator, None)


@pytest.fixture
def at(database: Callable[[str], str]) -> Iterator[Callable[..., Place]]:
    """Declares the model in a phase, at a stage of the migration."""
    engines: list[Engine] = []

    def make(phase: str, stage: str) -> Place:
        url = database(stage)
        engine = create_engine(models.sqlalchemy_url(url), hide_parameters=True)
        engines.append(engine)
        return Place(phase, stage, url, engine, models.declare(phase))

    yield make
    for engine in engines:
        engine.dispose()


@pytest.fixture(params=PLACES, ids="-".join)
def place(request: pytest.FixtureRequest, at: Callable[..., Place]) -> Place:
    """Every phase at every stage that it is right at."""
    return at(*request.param)


@pytest.fixture(params=ENCRYPTED_PLACES, ids="-".join)
def encrypted_place(request: pytest.FixtureRequest, at: Callable[..., Place]) -> Place:
    """The phases that read ciphertext, at every stage that they are right at."""
    return at(*request.param)
