"""kill -9 at random moments, a hundred times: what is run again always ends in the same verified state."""

from __future__ import annotations

import base64
import random
from pathlib import Path

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import place
from alphapulse_encryption_tests.stress import kills, worker

pytestmark = pytest.mark.stress
# Printed by the kills; put one here to repeat them.
SEED = random.SystemRandom().randrange(1_000_000)


def test_the_worker(database_url: str) -> None:
    kills.kill_workers(database_url, kills=60, seed=SEED)


def test_the_server(server_dir: Path) -> None:
    """With everything that makes a server durable, unlike the other tests' server."""
    with EmbeddedPostgres(server_dir) as server:
        kills.kill_servers(server, kills=28, seed=SEED)


@pytest.mark.parametrize("turn", range(3))
def test_the_command(postgres: EmbeddedPostgres, database_url: str, server_dir: Path, turn: int) -> None:
    worker.create(database_url, "payments")
    key = base64.b64encode(support.MASTER_KEY).decode()
    catalogue = worker.CATALOGUE.format(name="payments")
    with place(postgres, database_url, server_dir.parent, key, catalogue) as theirs:
        assert kills.kill_commands(theirs, "payments", kills=4, seed=SEED + turn) >= 1
