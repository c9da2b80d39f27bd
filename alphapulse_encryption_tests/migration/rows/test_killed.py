"""kill -9 at random moments, a dozen times: what is run again always ends in the same verified state.

A hundred times, at other moments each time: ``make stress``.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import place
from alphapulse_encryption_tests.stress import kills, worker

SEED = 20260


@pytest.fixture
def chance() -> random.Random:
    """The same moments each time, as far as processes allow."""
    return random.Random(SEED)


@pytest.fixture
def durable(server_dir: Path) -> Iterator[EmbeddedPostgres]:
    """A server with everything that makes it durable, unlike the other tests' server."""
    with EmbeddedPostgres(server_dir) as server:
        server.ensure_database("target")
        yield server


def test_the_worker(database_url: str, chance: random.Random) -> None:
    kills.kill_workers(
        database_url, [("columns", "backfill", "backfill", "indexes", "verify", "switch")], chance
    )


def test_the_server(durable: EmbeddedPostgres, chance: random.Random) -> None:
    kills.kill_servers(durable, [("backfill",), ("verify", "switch")], chance)


def test_the_server_while_an_index_is_built(durable: EmbeddedPostgres) -> None:
    kills.kill_server_in_a_build(durable)


def test_the_command(
    postgres: EmbeddedPostgres, database_url: str, server_dir: Path, chance: random.Random
) -> None:
    key = base64.b64encode(support.MASTER_KEY).decode()
    catalogue = worker.CATALOGUE.format(name="payments")
    with place(postgres, database_url, server_dir.parent, key, catalogue) as theirs:
        kills.kill_commands(theirs, ("backfill", "verify", "switch"), chance)
