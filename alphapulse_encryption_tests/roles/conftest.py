"""A database with the sample whose roles are those that `--roles-sql` creates, and log-ins that are members of them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.migration.gates.roles import roles_sql
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import walk

PREFIX = "tested_"
TEMPLATE = "roles_template"
# Who logs in, as what. The application owned its tables before.
LOGINS: Mapping[str, tuple[str, ...]] = {
    "shop": (),
    "petra_plans": ("planner",),
    "vera_verifies": ("verifier",),
    "mia_migrates": ("migrator",),
    "max_migrates": ("migrator",),
    "wes_writes": ("writer",),
    "ada_approves": ("approver",),
    "bob_backs_up": ("backup",),
    "eve_erases": ("eraser",),
    "rita_rehearses": ("rehearser",),
    "jack_of_all": ("migrator", "approver", "verifier", "backup"),
}


def run_script(postgres: EmbeddedPostgres, url: str, script: str) -> None:
    """As a database administrator runs it."""
    command: list[str] = [str(postgres.bin_dir() / "psql"), "-XqAt", "--dbname", url]
    done = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


def script_for(url: str, prefix: str = PREFIX) -> str:
    """What `--roles-sql` prints for the packaged catalogue."""
    with Database(url).session("look") as connection:
        return roles_sql(connection, load_catalogue(), prefix)


@dataclass(frozen=True)
class Separated:
    """The database, as each of them sees it.

    Args:
        url: as a superuser.
        postgres: the server.
    """

    url: str
    postgres: EmbeddedPostgres

    def of(self, login: str) -> str:
        """The address for a log-in."""
        return self.url.replace("//postgres@", f"//{login}@", 1)


def separate(
    postgres: EmbeddedPostgres, url: str, tables: Iterable[str], script: Callable[[str], str]
) -> None:
    """Make the log-ins, and the groups by the script that is got for the address, for tables of the application's."""
    with psycopg.connect(url, autocommit=True) as connection:
        for login in LOGINS:
            connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(login)))
        for table in tables:
            connection.execute(SQL("ALTER TABLE {} OWNER TO shop").format(Identifier(table)))
        # As many do, for whatever comes later.
        connection.execute("ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO shop")
    text = script(url)
    run_script(postgres, url, text)
    with psycopg.connect(url, autocommit=True) as connection:
        # What it leaves to an administrator: before PostgreSQL 15 everybody may create something in public.
        for line in text.splitlines():
            if line.startswith("-- REVOKE CREATE ON SCHEMA public"):
                connection.execute(line.removeprefix("-- ").encode())
        for login, groups in LOGINS.items():
            for group in groups:
                connection.execute(
                    SQL("GRANT {} TO {}").format(Identifier(PREFIX + group), Identifier(login))
                )


@pytest.fixture(scope="session")
def _roles_template(postgres: EmbeddedPostgres, _sample_template: str) -> str:
    postgres.ensure_running()
    walk.query(postgres.url("postgres"), f"CREATE DATABASE {TEMPLATE} TEMPLATE {_sample_template}")
    url = postgres.url(TEMPLATE)
    separate(postgres, url, [table.name for table in walk.CATALOGUE.tables], script_for)
    return TEMPLATE


@pytest.fixture
def separated(postgres: EmbeddedPostgres, _roles_template: str) -> Iterator[Separated]:
    """A database of its own for the test."""
    for url in fresh_database(postgres, _roles_template):
        yield Separated(url, postgres)
