"""kill -9 at random moments, a hundred times: what is run again always ends in the same verified state."""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.stress import kills, worker

pytestmark = pytest.mark.stress


@pytest.fixture
def chance(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.fixture
def durable(server_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A server with everything that makes it durable, unlike the other tests' server."""
    with EmbeddedPostgres(server_dir) as server:
        server.ensure_database("target")
        yield server


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, database_url: str, tmp_path: Path) -> Iterator[Place]:
    """Where commands run; Dagster's storage is on a server that is left alone."""
    key = base64.b64encode(support.MASTER_KEY).decode()
    with place(postgres, database_url, tmp_path, key, worker.CATALOGUE.format(name="payments")) as found:
        yield found


def test_the_worker(database_url: str, chance: random.Random) -> None:
    kills.kill_workers(database_url, kills.plans(55, chance), chance)


def test_the_server(durable: EmbeddedPostgres, chance: random.Random) -> None:
    kills.kill_servers(durable, kills.plans(25, chance), chance)


@pytest.mark.parametrize("turn", range(3))
def test_the_command(theirs: Place, seed: int, turn: int) -> None:
    chance = random.Random(f"{seed} {turn}")
    (steps,) = kills.plans(5, chance, tuple(kills.JOBS), size=5)
    kills.kill_commands(theirs, steps, chance)


def test_the_server_under_a_command(theirs: Place, durable: EmbeddedPostgres, chance: random.Random) -> None:
    theirs.url = durable.url("target")
    (steps,) = kills.plans(5, chance, tuple(kills.JOBS), size=5)
    kills.kill_commands(theirs, steps, chance, durable)
