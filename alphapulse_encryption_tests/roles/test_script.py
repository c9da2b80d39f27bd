"""The SQL that creates the roles: again with the same result, for any names, and not over what is somebody else's."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.gates import roles
from alphapulse_encryption.migration.gates.roles import roles_sql
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.bookkeeping.test_install import BEGUN_BEFORE
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated, run_script, script_for

_PRIVILEGES = """
SELECT n.nspname, c.relname, c.relowner::regrole::text,
       (SELECT array_agg(p ORDER BY p) FROM (
          SELECT concat(x.grantee::regrole, x.privilege_type, x.is_grantable) AS p FROM aclexplode(c.relacl) x
          UNION SELECT concat(a.attname, x.grantee::regrole, x.privilege_type)
            FROM pg_attribute a CROSS JOIN aclexplode(a.attacl) x
           WHERE a.attrelid = c.oid AND x.grantee <> c.relowner) AS privileges)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'v', 'S') AND (c.oid >= 16384 OR c.relname = 'pg_statistic')
 ORDER BY 1, 2
"""
_FUNCTIONS = (
    "SELECT proname, proowner::regrole::text, proacl::text FROM pg_proc WHERE oid >= 16384 ORDER BY 1"
)
_MEMBERS = "SELECT roleid::regrole::text, member::regrole::text FROM pg_auth_members ORDER BY 1, 2"


def state(url: str) -> list[Any]:
    return [walk.query(url, query) for query in (_PRIVILEGES, _FUNCTIONS, _MEMBERS)]


def owner(url: str, relation: str) -> str:
    return str(
        walk.value(url, f"SELECT relowner::regrole::text FROM pg_class WHERE oid = '{relation}'::regclass")
    )


def catalogue(*tables: Any) -> Catalogue:
    return Catalogue(tables=tables)


def script(url: str, *tables: Any) -> str:
    with Database(url).session("look") as connection:
        return roles_sql(connection, catalogue(*tables), PREFIX)


def test_it_may_be_run_again_and_takes_back_what_was_given_away(separated: Separated) -> None:
    walk.encrypt(separated.of("mia_migrates"), walk.CATALOGUE.table("users"))
    walk.create_views(separated.of("mia_migrates"), walk.CATALOGUE.table("users"))
    before = state(separated.url)
    run_script(separated.postgres, separated.url, script_for(separated.url))
    assert state(separated.url) == before
    walk.query(
        separated.url,
        "GRANT ALL ON ALL TABLES IN SCHEMA public, alphapulse_encryption TO max_migrates; "
        "GRANT INSERT (database_role), UPDATE (expires_at) ON alphapulse_encryption.approvals TO mia_migrates, PUBLIC; "
        "ALTER VIEW v_users OWNER TO mia_migrates; ALTER FUNCTION encryption_guard_users OWNER TO postgres; "
        "ALTER TABLE alphapulse_encryption.approvals OWNER TO postgres",
    )
    given = state(separated.url)
    run_script(separated.postgres, separated.url, script_for(separated.url))
    after = state(separated.url)
    assert after != given
    bookkeeping = [row for row in after[0] if row[0] == "alphapulse_encryption"]
    assert bookkeeping == [row for row in before[0] if row[0] == "alphapulse_encryption"]
    assert owner(separated.url, "v_users") == f"{PREFIX}owner"
    assert after[1:] == before[1:]


def test_what_somebody_else_planted_is_not_taken_over(
    postgres: EmbeddedPostgres, _roles_template: str, database_url: str
) -> None:
    """A guard's function, and a function whose name would end the comment that names it."""
    shop = database_url.replace("//postgres@", "//shop@", 1)
    walk.query(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, v text); ALTER TABLE notes OWNER TO shop; "
        "GRANT CREATE ON SCHEMA public TO shop",
    )
    walk.query(
        shop,
        "CREATE FUNCTION encryption_guard_notes() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS "
        "'BEGIN EXECUTE ''CREATE TABLE mine ()''; RETURN NEW; END'; "
        "CREATE TRIGGER zzz_encryption_guard_update BEFORE UPDATE ON notes FOR EACH ROW "
        "EXECUTE FUNCTION encryption_guard_notes(); "
        'CREATE FUNCTION "f\n; ALTER ROLE shop SUPERUSER; --"() RETURNS trigger LANGUAGE plpgsql AS '
        "'BEGIN RETURN NEW; END'; CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW "
        'EXECUTE FUNCTION "f\n; ALTER ROLE shop SUPERUSER; --"()',
    )
    entry = support.table("notes", "v")
    with pytest.raises(RefusedError, match=r"public\.encryption_guard_notes.*DROP FUNCTION"):
        script(database_url, entry)
    walk.query(database_url, "DROP FUNCTION encryption_guard_notes() CASCADE")
    text = script(database_url, entry)
    run_script(postgres, database_url, text)
    owned = (
        "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE pronamespace = 'public'::regnamespace "
        "AND prorettype = 'trigger'::regtype"
    )
    assert walk.query(database_url, owned) == [("shop",)]
    assert owner(database_url, "notes") == f"{PREFIX}owner"
    assert not walk.value(database_url, "SELECT rolsuper FROM pg_roles WHERE rolname = 'shop'")
    assert any("ALTER FUNCTION" in line and line.startswith("-- ") for line in text.splitlines())


def test_it_is_for_any_names(postgres: EmbeddedPostgres, _roles_template: str, database_url: str) -> None:
    schema, name = 'a "schema"; --', "t'able $roles$ %I; DROP TABLE public.witness; \\"
    walk.query(
        database_url,
        'CREATE TABLE witness (id int PRIMARY KEY); CREATE SCHEMA "a ""schema""; --"; '
        f'CREATE TABLE "a ""schema""; --"."{name}" (id serial PRIMARY KEY, v text)',
    )
    entry = support.table(name, "v", schema=schema)
    text = script(database_url, entry)
    run_script(postgres, database_url, text)
    run_script(postgres, database_url, script(database_url, entry))
    (found,) = walk.query(
        database_url,
        "SELECT relowner::regrole::text, has_table_privilege('vera_verifies', oid, 'SELECT'), "
        "has_table_privilege('vera_verifies', oid, 'UPDATE') FROM pg_class WHERE relname = %s",
        name,
    )
    assert found == (f"{PREFIX}owner", True, False)
    assert walk.value(database_url, "SELECT to_regclass('public.witness') IS NOT NULL")
    migrator = database_url.replace("//postgres@", "//mia_migrates@", 1)
    support.encrypt(migrator, entry)
    assert support.verify(database_url.replace("//postgres@", "//vera_verifies@", 1), entry).passed


def test_statistics_change_hands_with_their_table(
    postgres: EmbeddedPostgres, _roles_template: str, database_url: str
) -> None:
    walk.query(
        database_url,
        "CREATE TABLE pairs (id int PRIMARY KEY, v text, w text); CREATE STATISTICS of_pairs ON v, w FROM pairs; "
        "ALTER TABLE pairs OWNER TO shop; ALTER STATISTICS of_pairs OWNER TO shop",
    )
    run_script(postgres, database_url, script(database_url, support.table("pairs", "v")))
    # Who migrates makes it again, and has to be able to give it back.
    owners = "SELECT stxowner::regrole::text FROM pg_statistic_ext"
    assert walk.query(database_url, owners) == [(f"{PREFIX}owner",)]


def test_what_a_group_role_owns_stays_with_it(
    postgres: EmbeddedPostgres, _roles_template: str, database_url: str
) -> None:
    walk.query(
        database_url,
        "DO $$ BEGIN CREATE ROLE house NOLOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$; "
        "CREATE TABLE parted (id int PRIMARY KEY, v text) PARTITION BY RANGE (id); "
        "CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (1) TO (9); "
        "CREATE TABLE kept (id int PRIMARY KEY, v text); ALTER TABLE kept OWNER TO house; "
        "INSERT INTO kept VALUES (1, 'x')",
    )
    kept, parted = support.table("kept", "v"), support.table("parted", "v")
    try:
        run_script(postgres, database_url, script(database_url, kept, parted))
        owners = {name: owner(database_url, name) for name in ("kept", "parted", "parted_1")}
        assert owners == {"kept": "house", "parted": f"{PREFIX}owner", "parted_1": f"{PREFIX}owner"}
        support.encrypt(database_url.replace("//postgres@", "//mia_migrates@", 1), kept)
        assert support.assert_encrypted(database_url, kept) == 1
        functions = "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'encryption_guard_kept'"
        assert walk.query(database_url, functions) == [("house",)]
    finally:
        walk.query(database_url, f"REVOKE house FROM {PREFIX}migrator")


def test_a_role_of_that_name_that_is_somebodys_is_left_alone(
    postgres: EmbeddedPostgres, database_url: str
) -> None:
    walk.query(database_url, "CREATE TABLE notes (id int PRIMARY KEY, v text)")
    walk.query(
        database_url,
        "DO $$ BEGIN CREATE ROLE mine_migrator LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$",
    )
    with Database(database_url).session("look") as connection:
        text = roles_sql(connection, catalogue(support.table("notes", "v")), "mine_")
    before = state(database_url)
    done = subprocess.run(
        [str(postgres.bin_dir() / "psql"), "-XqAt", "--dbname", database_url],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "mine_migrator exists and is more than a group role: choose another --role-prefix" in done.stderr
    assert state(database_url) == before
    assert walk.query(database_url, "SELECT FROM pg_roles WHERE rolname = 'mine_planner'") == []


@pytest.mark.parametrize("prefix", ["", "1a", "Upper_", "a-b", 'q"', "x" * 41, "é"])
def test_prefixes_that_would_need_quoting(database_url: str, prefix: str) -> None:
    with (
        Database(database_url).session("look") as connection,
        pytest.raises(ConfigurationError, match="--role-prefix has to begin with a letter"),
    ):
        roles_sql(connection, load_catalogue(), prefix)


def test_older_servers_get_what_they_know(separated: Separated, monkeypatch: pytest.MonkeyPatch) -> None:
    made = roles._Script

    def text(version: int) -> str:
        monkeypatch.setattr(roles, "_Script", lambda *given: replace(made(*given), version=version))
        return script_for(separated.url)

    since = {"SET ON PARAMETER": 150000, "pg_checkpoint": 150000, "GRANT MAINTAIN": 170000}
    for version in (140000, 150004, 160001, 170000, 180000):
        assert {word: word in text(version) for word in since} == {
            word: version >= first for word, first in since.items()
        }


def test_the_command_prints_it(
    separated: Separated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For whoever may connect; it tells nothing but who owns what."""
    monkeypatch.setenv("ALPHAPULSE_DATABASE_URL", separated.of("petra_plans"))
    monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_CATALOGUE", raising=False)
    assert main(["--roles-sql", "--role-prefix", PREFIX]) == 0
    printed = capsys.readouterr()
    assert printed.out == script_for(separated.url) and printed.err == ""
    assert main(["--roles-sql"]) == 0
    assert capsys.readouterr().out == script_for(separated.url, "alphapulse_")
    assert main(["--roles-sql", "--role-prefix", "No"]) == 2
    assert "--role-prefix" in capsys.readouterr().err
    for wrong in (["--role-prefix", "x_", "--verify"], ["--roles-sql", "--verify"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        capsys.readouterr()


@pytest.mark.parametrize(
    "damage",
    [
        "DROP TRIGGER approval_is_final ON alphapulse_encryption.approvals",
        "CREATE OR REPLACE FUNCTION alphapulse_encryption.approval_is_final() RETURNS trigger LANGUAGE plpgsql "
        "AS 'BEGIN RETURN NEW; END'",
    ],
)
def test_what_was_changed_of_the_bookkeeping_is_made_again_by_an_administrator_only(
    separated: Separated, damage: str
) -> None:
    walk.query(separated.url, damage)
    before = state(separated.url)
    for login in ("mia_migrates", "bob_backs_up"):
        with (
            Database(separated.of(login)).session("begin") as connection,
            pytest.raises(RefusedError, match="Have a database administrator run what --roles-sql prints"),
        ):
            ensure_bookkeeping(connection)
    assert state(separated.url) == before
    run_script(separated.postgres, separated.url, script_for(separated.url))
    walk.encrypt(separated.of("mia_migrates"), walk.CATALOGUE.table("api_keys"))


def test_the_layout_before_is_brought_up_to_date_by_an_administrator(
    postgres: EmbeddedPostgres, _roles_template: str, database_url: str
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(BEGUN_BEFORE.read_bytes())
    entries = [support.table(name, "secret", "other") for name in ("begun", "half", "switched")]
    migrator = database_url.replace("//postgres@", "//mia_migrates@", 1)
    with (
        Database(migrator).session("begin") as connection,
        pytest.raises(RefusedError, match="Have a database administrator run what --roles-sql prints"),
    ):
        ensure_bookkeeping(connection)
    text = script(database_url, *entries)
    run_script(postgres, database_url, text)
    before = state(database_url)
    run_script(postgres, database_url, text)
    assert state(database_url) == before
    owners = {
        row[2] for row in before[0] if row[0] == "alphapulse_encryption" or row[1].startswith("encryption_")
    }
    assert owners == {f"{PREFIX}bookkeeper"}
    with Database(migrator).session("look") as connection:
        ensure_bookkeeping(connection)
        assert require_state(connection, entries[2]).authority == "ciphertext"


def test_a_planted_bookkeeping_is_refused_by_name(database_url: str) -> None:
    walk.query(database_url, "CREATE TABLE notes (id int PRIMARY KEY, v text)")
    with Database(database_url).session("plant") as connection:
        ensure_bookkeeping(connection)
    walk.query(
        database_url,
        "CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER aaa BEFORE INSERT ON alphapulse_encryption.settings FOR EACH ROW EXECUTE FUNCTION planted()",
    )
    with pytest.raises(RefusedError, match=r"trigger aaa on alphapulse_encryption\.settings is not ours"):
        script(database_url, support.table("notes", "v"))
