"""Products' databases, loaded once for a test process, and copies of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.products.product import ROLES, Product

a_database = contextlib.contextmanager(fresh_database)


@pytest.fixture(scope="session")
def _roles(postgres: EmbeddedPostgres) -> None:
    support.run(postgres.url("postgres"), ROLES)


@pytest.fixture
def database_of(postgres: EmbeddedPostgres, _roles: None) -> Iterator[Callable[[Product], str]]:
    """Makes a product's database, as its vendor delivers it."""
    with contextlib.ExitStack() as made:

        def make(product: Product) -> str:
            url = made.enter_context(a_database(postgres, "template0"))
            product.load(url)
            return url

        yield make
