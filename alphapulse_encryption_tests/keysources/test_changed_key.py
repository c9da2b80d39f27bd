"""A key that is replaced in its source while a migration runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.keysources import test_vault
from alphapulse_encryption_tests.keysources.conftest import client
from alphapulse_encryption_tests.keysources.test_aws import NAME, text
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import target

ACTOR = Actor("tests")
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"


@dataclass(frozen=True)
class Source:
    """Where the key comes from.

    Args:
        place: as messages name it.
        put: puts a key there, in place of the one that is there.
    """

    place: str
    put: Callable[[bytes], None]


@pytest.fixture(params=["env", "aws", "vault"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Each kind of source, without a key in it yet."""
    if request.param == "env":
        monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_KEY_SOURCE", raising=False)
        return Source(
            f"the environment variable {VARIABLE}", lambda key: monkeypatch.setenv(VARIABLE, text(key))
        )
    front = request.getfixturevalue(request.param)
    if request.param == "vault":
        return Source(f"the secret {NAME} in Vault", lambda key: test_vault.put(front, value=text(key)))

    def put(key: bytes) -> None:
        try:
            client().create_secret(Name=NAME, SecretString=text(key))
        except client().exceptions.ResourceExistsException:
            client().put_secret_value(SecretId=NAME, SecretString=text(key))

    return Source(f"the secret {NAME} in AWS Secrets Manager", put)


def test_a_run_keeps_its_key_and_the_next_is_refused(
    source: Source, postgres: EmbeddedPostgres, database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.yaml"
    path.write_text(another.CATALOGUE, encoding="utf-8")
    table = load_catalogue(path).table("sessions")
    support.run(database_url, another.SCHEMA)
    source.put(another.MASTER_KEY)
    keys = load_key_ring()
    support.add_columns(database_url, table, keys=keys)
    batches: list[int] = []

    def replace(progress: Progress) -> None:
        if not batches:
            source.put(bytes(32))
        batches.append(progress.rows)

    cipher = get_format("AES-256-GCM", keys)
    backfill_range(
        target(database_url, keys=keys, cipher=cipher), table, 0, pace=Pace(10), on_progress=replace
    )
    assert len(batches) > 2
    # Every value, those after the change as well, is under the key with which the run began.
    assert another.decrypted(database_url, "sessions") == another.plaintexts(database_url, "sessions")

    before = walk.dump(database_url, postgres.bin_dir(), "--restrict-key", "x")
    other = load_key_ring()
    refusal = rf"of version 1, from {source.place}, is not the one"
    with pytest.raises(RefusedError, match=refusal):
        backfill_range(target(database_url, keys=other), table, 0)
    with pytest.raises(RefusedError, match=refusal):
        verify_range(target(database_url, keys=other), table, 0)
    assert walk.dump(database_url, postgres.bin_dir(), "--restrict-key", "x") == before
