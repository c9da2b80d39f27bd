"""Who copies the database reads all of it and no password; the copy runs nothing with the rights of who made it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.gates.backup import BackupResult, take_backup
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.roles.conftest import Separated, run_script, script_for

USERS = walk.CATALOGUE.table("users")
COPIER = "copier"


@pytest.fixture
def copier(separated: Separated) -> Iterator[str]:
    """The address of a role that may make databases on the server, and nothing else."""
    walk.query(separated.url, f"CREATE ROLE {COPIER} LOGIN CREATEDB")
    try:
        yield separated.postgres.url("postgres").replace("//postgres@", f"//{COPIER}@", 1)
    finally:
        walk.query(separated.url, f"DROP ROLE {COPIER}")


def backup(separated: Separated, directory: Path, drill: str | None = None) -> BackupResult:
    return take_backup(
        walk.target(separated.of("bob_backs_up")),
        (USERS,),
        directory=directory,
        bin_dirs=[separated.postgres.bin_dir()],
        drill_server=None if drill is None else Database(drill),
    )


@pytest.mark.parametrize("login", ["bob_backs_up", "rita_rehearses"])
def test_who_dumps_reads_no_password(separated: Separated, login: str) -> None:
    # As an earlier script left it.
    walk.query(
        separated.url, f"GRANT pg_read_all_data TO tested_{'backup' if login[0] == 'b' else 'rehearser'}"
    )
    with psycopg.connect(separated.of(login), autocommit=True) as connection:
        connection.execute("SELECT rolpassword FROM pg_authid")
    run_script(separated.postgres, separated.url, script_for(separated.url))
    with psycopg.connect(separated.of(login), autocommit=True) as connection:
        for secret in ("SELECT rolpassword FROM pg_authid", "SELECT * FROM pg_statistic"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(secret.encode())
        connection.execute("SELECT * FROM users LIMIT 1")


def test_what_is_made_after_the_script(separated: Separated, tmp_path: Path) -> None:
    # Of its own owners it reads what they make later, schemas included.
    with psycopg.connect(separated.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA later AUTHORIZATION shop")
        connection.execute("SET SESSION AUTHORIZATION shop")
        connection.execute("CREATE TABLE later.made (id serial); INSERT INTO later.made DEFAULT VALUES")
        connection.execute("RESET SESSION AUTHORIZATION")
    assert backup(separated, tmp_path / "first").listed_entries > 0
    # Of others it reads nothing, and says so by name.
    walk.query(separated.url, "CREATE TABLE public.of_an_administrator AS SELECT 1 AS v")
    walk.query(separated.url, "ALTER TABLE public.of_an_administrator OWNER TO petra_plans")
    walk.query(separated.url, "REVOKE ALL ON public.of_an_administrator FROM tested_backup")
    with pytest.raises(MigrationError, match=r"of_an_administrator.*--roles-sql"):
        backup(separated, tmp_path / "second")
    assert walk.query(separated.url, "SELECT lo_from_bytea(0, 'x') > 0") == [(True,)]
    run_script(separated.postgres, separated.url, script_for(separated.url))
    assert backup(separated, tmp_path / "third").listed_entries > 0


def test_a_drill_over_a_role_that_may_make_databases_and_nothing_else(
    separated: Separated, copier: str, tmp_path: Path
) -> None:
    result = backup(separated, tmp_path, copier)
    assert result.drill is not None and result.drill.rows > 0
    # With a role of its own, where it may make one.
    walk.query(separated.url, f"ALTER ROLE {COPIER} CREATEROLE")
    result = backup(separated, tmp_path, copier)
    assert result.drill is not None and result.drill.rows > 0
    assert walk.query(separated.url, "SELECT rolname FROM pg_roles WHERE rolname LIKE '%drill%'") == []


def test_a_drill_over_a_role_with_more_is_refused(separated: Separated, copier: str, tmp_path: Path) -> None:
    """Its code could change the role's password, and then log in with all that the role may do."""
    walk.query(separated.url, f"GRANT tested_migrator TO {COPIER}")
    with pytest.raises(RefusedError, match=rf"{COPIER}.*CREATE ROLE .*ALPHAPULSE_RESTORE_DRILL_URL"):
        backup(separated, tmp_path / "backups", copier)
    assert not (tmp_path / "backups").exists()
