"""Staging databases: the sample, and a small one with awkward names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import staging


@pytest.fixture
def sample(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    """The sample as the staging database."""
    with staging(postgres, sample_url, server_dir.parent) as found:
        yield found


@pytest.fixture
def small(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    """Three small tables of another catalogue as the staging database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(another.SCHEMA.encode())
    with staging(postgres, database_url, server_dir.parent, another.CATALOGUE) as found:
        yield found
