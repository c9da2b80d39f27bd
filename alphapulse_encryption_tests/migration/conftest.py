"""What the tests of the engine begin with: a table that has come so far, and proof that an attempt changed nothing."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import USERS, After, Journeys, State

a_database = contextlib.contextmanager(fresh_database)


@pytest.fixture(scope="session")
def journeys(
    postgres: EmbeddedPostgres, _sample_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Journeys:
    """What is recorded of the way of the sample's tables, in this test process."""
    return Journeys(postgres, _sample_template, tmp_path_factory.mktemp("backups"))


@pytest.fixture
def after(postgres: EmbeddedPostgres, journeys: Journeys, tmp_path: Path) -> Iterator[After]:
    """Makes databases in which a table has come so far; a backup is in the test's own directory."""
    with contextlib.ExitStack() as made:

        def make(state: State, table: Table = USERS) -> str:
            url = made.enter_context(a_database(postgres, journeys.after(state, table)))
            support.sign_here(url, walk.KEYS)
            for location in support.backups(url):
                support.move_backup(url, location, str(shutil.copy(location, tmp_path)), walk.KEYS)
            return url

        yield make


@pytest.fixture
def approved_url(after: After) -> str:
    """A database in which the drop of `users` is approved."""
    return after("approved")


@pytest.fixture
def ready_url(approved_url: str) -> str:
    """A database in which `users` may be approved."""
    walk.query(approved_url, "DELETE FROM alphapulse_encryption.approvals")
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
