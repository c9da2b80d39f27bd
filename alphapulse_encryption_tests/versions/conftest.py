"""A server of each version that is asked for, with the sample, a table of unusual types, and the roles' log-ins."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import SAMPLE_ROWS, UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated, separate
from alphapulse_encryption_tests.versions import unusual
from alphapulse_encryption_tests.versions.servers import Server, chosen

KEY = bytes(range(32))
DATABASE = "shop"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each test once for each version; those of a version stay together, where there are several processes."""
    if "version" in metafunc.fixturenames:
        try:
            versions = chosen(metafunc.config.option.servers.split())
        except ConfigurationError as error:
            raise pytest.UsageError(str(error)) from None
        metafunc.parametrize(
            "version", [pytest.param(v, marks=pytest.mark.xdist_group(f"version {v}")) for v in versions]
        )


@pytest.fixture
def server(version: int, server_dir: Path) -> Iterator[Server]:
    with Server(version, server_dir, settings=UNSAFE_SETTINGS) as found:
        assert walk.value(found.url("postgres"), "SHOW server_version").startswith(f"{version}.")
        yield found


@pytest.fixture
def loaded(server: Server) -> str:
    """The address of a database with the sample and the unusual table."""
    server.ensure_database(DATABASE)
    url = server.url(DATABASE)
    load_sample(url, rows=SAMPLE_ROWS)
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in unusual.statements(server.version):
            connection.execute(statement.encode())
    return url


@pytest.fixture
def theirs(server: Server, loaded: str, postgres: EmbeddedPostgres, server_dir: Path) -> Iterator[Place]:
    """Where a command runs on that database; Dagster keeps its storage elsewhere."""
    key = base64.b64encode(KEY).decode()
    with place(postgres, loaded, server_dir.parent, key, unusual.catalogue()) as found:
        yield replace(found, postgres=server)


@pytest.fixture
def separated(theirs: Place, server: Server) -> Separated:
    """Its roles are those that `--roles-sql` creates."""
    tables = [*(table.name for table in walk.CATALOGUE.tables), unusual.TABLE]
    separate(
        server,
        theirs.url,
        tables,
        lambda _: "\n".join(theirs.succeeds("--roles-sql", "--role-prefix", PREFIX)),
    )
    return Separated(theirs.url, server)
