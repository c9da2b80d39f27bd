"""A key that is replaced in its source while a migration runs."""

from __future__ import annotations

import pytest

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.backfill import Pace, Progress, backfill_range
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.verify import verify_range
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.keysources.conftest import client
from alphapulse_encryption_tests.keysources.servers import Front
from alphapulse_encryption_tests.keysources.test_aws import NAME, text
from alphapulse_encryption_tests.migration import support, walk

ACTOR = Actor("tests")


def test_a_run_keeps_its_key_and_the_next_is_refused(
    aws: Front, postgres: EmbeddedPostgres, database_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("catalogue") / "catalogue.yaml"
    path.write_text(another.CATALOGUE, encoding="utf-8")
    table = load_catalogue(path).table("sessions")
    support.run(database_url, another.SCHEMA)
    client().create_secret(Name=NAME, SecretString=text(another.MASTER_KEY))
    keys = load_key_ring()
    support.add_columns(database_url, table, keys=keys)
    batches: list[int] = []

    def replace(progress: Progress) -> None:
        if not batches:
            client().put_secret_value(SecretId=NAME, SecretString=text(bytes(32)))
        batches.append(progress.rows)

    cipher = get_format("AES-256-GCM", keys)
    backfill_range(Database(database_url), table, 0, cipher, keys, ACTOR, pace=Pace(10), on_progress=replace)
    assert len(batches) > 2
    # Every value, those after the change as well, is under the key with which the run began.
    assert another.decrypted(database_url, "sessions") == another.plaintexts(database_url, "sessions")

    before = walk.dump(database_url, postgres.bin_dir(), "--restrict-key", "x")
    other = load_key_ring()
    refusal = rf"of version 1, from the secret {NAME} in AWS Secrets Manager, is not the one"
    with pytest.raises(RefusedError, match=refusal):
        backfill_range(Database(database_url), table, 0, get_format("AES-256-GCM", other), other, ACTOR)
    with pytest.raises(RefusedError, match=refusal):
        verify_range(Database(database_url), table, 0, get_format("AES-256-GCM", other), other, ACTOR)
    assert walk.dump(database_url, postgres.bin_dir(), "--restrict-key", "x") == before
