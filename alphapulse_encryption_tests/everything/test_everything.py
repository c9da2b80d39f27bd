"""What preflight tells of a database with one of everything: all of it at once, by name, with what to type."""

from __future__ import annotations

from pathlib import Path

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.everything.look import preflight_tells_all
from alphapulse_encryption_tests.everything.things import everything_at


def test_preflight_of_everything(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> None:
    with everything_at(postgres, database_url, server_dir.parent) as there:
        preflight_tells_all(there)
