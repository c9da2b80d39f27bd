"""What the tests of approval and drop begin with: a table that is ready for it, and proof that nothing changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import support, walk

USERS = walk.CATALOGUE.table("users")
TEMPLATE = "approved_template"


@pytest.fixture(scope="session")
def _approved_template(
    postgres: EmbeddedPostgres, _sample_template: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    postgres.ensure_running()
    walk.query(postgres.url("postgres"), f"CREATE DATABASE {TEMPLATE} TEMPLATE {_sample_template}")
    url = postgres.url(TEMPLATE)
    walk.switch(url, USERS)
    walk.backup(url, (USERS,), tmp_path_factory.mktemp("backup"), postgres.bin_dir())
    walk.approve(url, USERS)
    return TEMPLATE


@pytest.fixture
def approved_url(postgres: EmbeddedPostgres, _approved_template: str, tmp_path: Path) -> Iterator[str]:
    """A database in which the drop of `users` is approved; the backup is in the test's own directory."""
    for url in fresh_database(postgres, _approved_template):
        ((location,),) = walk.query(url, "SELECT location FROM encryption_backups")
        walk.query(url, "UPDATE encryption_backups SET location = %s", str(shutil.copy(location, tmp_path)))
        yield url


@pytest.fixture
def ready_url(approved_url: str) -> str:
    """A database in which `users` may be approved."""
    walk.query(approved_url, "DELETE FROM encryption_approvals")
    return approved_url


class Unchanged:
    """Sees to it that an attempt changes nothing: neither schema nor data, the bookkeeping included."""

    def __init__(self, url: str, bin_dir: Path) -> None:
        self._url = url
        self.bin_dir = bin_dir

    def fingerprint(self) -> tuple[object, ...]:
        """All that pg_dump tells, and where each row of the table lies: a rewritten one lies elsewhere."""
        dumped = walk.dump(self._url, self.bin_dir, "--inserts")
        lines = sorted(line for line in dumped.splitlines() if not line.startswith(("\\restrict", "\\unres")))
        assert len(lines) > 3_000
        return lines, support.fingerprints(self._url, USERS)

    def refuses(self, reason: str, act: Callable[[], object] | None = None) -> None:
        """The drop, or another attempt at it, is refused for this reason."""
        before = self.fingerprint()
        with pytest.raises(RefusedError, match=reason):
            (act or (lambda: walk.drop(self._url, USERS)))()
        assert self.fingerprint() == before


@pytest.fixture
def unchanged(approved_url: str, postgres: EmbeddedPostgres) -> Unchanged:
    return Unchanged(approved_url, postgres.bin_dir())
