"""What an application that owns its database makes under our names, before an administrator or a migrator comes.

Each test does it as that role, and reads back what the role got by it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.install import LAYOUT, bookkeeping_exists
from alphapulse_encryption.migration.gates.roles import GROUPS, roles_sql
from alphapulse_encryption.migration.insight.status import read_status
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run, value

PREFIX = "planted_"
ENTRY = support.table("notes", "secret")
BOTH_TIMES = pytest.mark.parametrize("printed", ["before", "after"])
# Becomes a superuser, once it runs as one.
CODE = """BEGIN
    IF (SELECT rolsuper FROM pg_roles WHERE rolname = current_user) THEN EXECUTE 'ALTER ROLE mallory SUPERUSER'; END IF;
    RETURN NEW; EXCEPTION WHEN OTHERS THEN RETURN NEW; END"""
CLEAN = """DO $$ DECLARE name text; BEGIN
    FOR name IN SELECT quote_ident(rolname) FROM pg_roles
                 WHERE rolname IN ('mallory', 'victim') OR starts_with(rolname, 'planted_') LOOP
        EXECUTE format('REASSIGN OWNED BY %1$s TO postgres; DROP OWNED BY %1$s; DROP ROLE %1$s', name);
    END LOOP; END $$"""


@pytest.fixture
def url(database_url: str) -> Iterator[str]:
    """A database that the application owns, as a superuser sees it."""
    run(database_url, "CREATE ROLE mallory LOGIN")
    run(
        database_url,
        f"ALTER DATABASE {psycopg.conninfo.conninfo_to_dict(database_url)['dbname']} OWNER TO mallory",
    )
    run(
        mallory(database_url),
        "CREATE TABLE notes (id int PRIMARY KEY, secret text); INSERT INTO notes VALUES (1, 'x')",
    )
    yield database_url
    run(database_url, CLEAN)


def mallory(url: str) -> str:
    return url.replace("//postgres@", "//mallory@", 1)


def script(url: str, *tables: Any) -> str:
    with Database(url).session("look") as connection:
        return roles_sql(connection, Catalogue(tables=tables or (ENTRY,)), PREFIX)


def psql(postgres: EmbeddedPostgres, url: str, text: str, *options: str) -> tuple[int, str]:
    """As an administrator runs a script: its status, and what it says."""
    command = [str(postgres.bin_dir() / "psql"), "-XqAt", "--dbname", url, *options]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def tried(postgres: EmbeddedPostgres, url: str, plant: str, printed: str, *options: str) -> str:
    """Plant it before or after a script is printed, and run that: what it was refused with."""
    text = script(url) if printed == "before" else None
    run(mallory(url), plant)
    try:
        text = text or script(url)
    except RefusedError as error:
        return str(error)
    status, told = psql(postgres, url, text, *options)
    assert status == 3, told
    assert value(url, "SELECT count(*) FROM pg_roles WHERE starts_with(rolname, 'planted_')") == 0
    return told


def is_superuser(url: str) -> bool:
    return bool(value(url, "SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'"))


# What the tool makes is no secret.
COPY = "\n".join(LAYOUT.missing(0))
TRIGGERS = f"""CREATE FUNCTION planted() RETURNS trigger LANGUAGE plpgsql AS $f$ {CODE} $f$;
    DO $$ DECLARE name text; BEGIN
        FOR name IN SELECT oid::regclass FROM pg_class WHERE relnamespace = 'alphapulse_encryption'::regnamespace
                       AND relkind = 'r' LOOP
            EXECUTE format('CREATE TRIGGER aaa BEFORE INSERT OR UPDATE ON %s FOR EACH ROW EXECUTE FUNCTION planted()',
                           name);
        END LOOP; END $$"""


@BOTH_TIMES
@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (COPY + TRIGGERS, "alphapulse_encryption"),
        (COPY, "schema alphapulse_encryption"),
        ("CREATE SCHEMA alphapulse_encryption", "schema alphapulse_encryption"),
        ("CREATE TABLE encryption_migrations (x int)", "encryption_migrations"),
        ("CREATE VIEW encryption_tables AS SELECT 1 AS one", "encryption_tables"),
        (
            "CREATE FUNCTION encryption_report_key_usage(a text, b int, c bigint) RETURNS bigint LANGUAGE sql "
            "AS 'SELECT 1::bigint'",
            "encryption_report_key_usage",
        ),
    ],
    ids=["triggers", "copy", "schema", "table", "view", "function"],
)
def test_a_planted_bookkeeping(
    postgres: EmbeddedPostgres, url: str, printed: str, plant: str, named: str
) -> None:
    told = tried(postgres, url, plant, printed)
    assert named in told
    assert not is_superuser(url)
    left = "SELECT relowner::regrole::text FROM pg_trigger t JOIN pg_class c ON c.oid = t.tgrelid WHERE tgname = 'aaa'"
    assert set(run(url, left)) <= {("mallory",)}


@BOTH_TIMES
def test_one_that_an_administrator_vouches_for(postgres: EmbeddedPostgres, url: str, printed: str) -> None:
    """A role that has run the migration until now hands it over; not with code of its own on it."""
    support.encrypt(mallory(url), ENTRY)
    text = script(url)
    # Before PostgreSQL 15, the database's owner could do so.
    run(
        url,
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET alphapulse_encryption.bookkeeping_of TO mallory', "
        "current_database()); END $$",
    )
    assert psql(postgres, url, text)[0] == 3
    vouched = ("-v", "bookkeeping_of=mallory")
    assert psql(postgres, url, text, "-v", "bookkeeping_of=somebody")[0] == 3
    if printed == "before":
        run(mallory(url), TRIGGERS)
        status, told = psql(postgres, url, text, *vouched)
        assert status == 3 and "trigger aaa on alphapulse_encryption." in told
        assert not is_superuser(url)
        run(mallory(url), "DROP FUNCTION planted CASCADE")
    assert psql(postgres, url, text, *vouched) == (0, "")
    assert psql(postgres, url, script(url)) == (0, "")
    owners = "SELECT DISTINCT tableowner::text FROM pg_tables WHERE schemaname = 'alphapulse_encryption'"
    assert run(url, owners) == [(f"{PREFIX}bookkeeper",)]
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run(mallory(url), TRIGGERS)


def test_every_command_refuses_a_bookkeeping_of_somebody_elses(url: str) -> None:
    """In place of one table a view that runs code as the one who reads it."""
    run(
        mallory(url),
        COPY + f"CREATE FUNCTION look() RETURNS text LANGUAGE plpgsql AS $f$ DECLARE NEW text; {CODE} $f$; "
        "ALTER TABLE alphapulse_encryption.tables RENAME TO former; "
        "CREATE VIEW alphapulse_encryption.tables AS SELECT look() AS table_name, authority, stage, set_aside, "
        "changed_at FROM alphapulse_encryption.former; INSERT INTO alphapulse_encryption.former VALUES ('notes')",
    )
    for step in (
        lambda: read_status(Database(url), Catalogue(tables=(ENTRY,)), ["notes"]),
        lambda: support.add_columns(url, ENTRY),
    ):
        with pytest.raises(RefusedError, match=r"alphapulse_encryption belongs to mallory.*--roles-sql"):
            step()
    assert not is_superuser(url)
    # A role that is a member of the application's is no better off.
    run(url, "CREATE ROLE victim LOGIN; GRANT mallory TO victim")
    with (
        Database(url.replace("//postgres@", "//victim@", 1)).session("look") as connection,
        pytest.raises(RefusedError, match="belongs to mallory"),
    ):
        bookkeeping_exists(connection)


GUARD = "CREATE FUNCTION encryption_guard_notes() RETURNS {} LANGUAGE plpgsql {} AS $f$ {} $f$"


@BOTH_TIMES
@pytest.mark.parametrize(
    "plant",
    [
        GUARD.format("trigger", "SECURITY DEFINER", CODE),
        GUARD.format("int", "SECURITY DEFINER", "BEGIN RETURN (SELECT count(*) FROM notes); END"),
    ],
    ids=["body", "kind"],
)
def test_a_planted_guard(postgres: EmbeddedPostgres, url: str, printed: str, plant: str) -> None:
    text = script(url) if printed == "before" else None
    run(mallory(url), plant)
    if text is None:
        with pytest.raises(RefusedError, match=r"public\.encryption_guard_notes.*DROP FUNCTION"):
            script(url)
    else:
        # It knows of no guard, and leaves the function to its owner; then the step refuses it.
        assert psql(postgres, url, text) == (0, "")
        with pytest.raises(RefusedError, match=r"public\.encryption_guard_notes"):
            script(url)
    assert (
        value(url, "SELECT proowner::regrole::text FROM pg_proc WHERE proname = 'encryption_guard_notes'")
        == "mallory"
    )


def test_a_guard_that_is_changed_after_the_script_was_printed(postgres: EmbeddedPostgres, url: str) -> None:
    support.encrypt(mallory(url), ENTRY)
    text = script(url)
    run(mallory(url), "ALTER FUNCTION encryption_guard_notes() SECURITY DEFINER")
    status, told = psql(postgres, url, text, "-v", "bookkeeping_of=mallory")
    assert status == 3 and "public.encryption_guard_notes" in told
    with pytest.raises(RefusedError, match=r"public\.encryption_guard_notes.*--add-columns --table notes"):
        script(url)
    support.add_columns(mallory(url), ENTRY)
    assert psql(postgres, url, script(url), "-v", "bookkeeping_of=mallory") == (0, "")


@pytest.mark.parametrize(
    "plant",
    [
        "CREATE VIEW v_notes AS SELECT id, secret FROM notes WHERE id = (SELECT count(*) FROM theirs)",
        "CREATE VIEW v_notes AS SELECT id, as_is(secret) AS secret FROM notes",
        "CREATE VIEW v_theirs_safe AS SELECT id, secret FROM theirs",
    ],
)
def test_a_planted_view(postgres: EmbeddedPostgres, url: str, plant: str) -> None:
    """It would show another application's rows by the rights of the role that then owns both tables."""
    run(
        url,
        "CREATE TABLE theirs (id int PRIMARY KEY, secret text); INSERT INTO theirs VALUES (1, 'of others')",
    )
    run(mallory(url), "CREATE FUNCTION as_is(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    run(mallory(url), plant)
    name = plant.split()[2]
    run(mallory(url), f"COMMENT ON VIEW {name} IS 'alphapulse_encryption: as if it were ours'")
    status, told = psql(postgres, url, script(url, ENTRY, support.table("theirs", "secret")))
    assert status == 3 and name in told
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run(mallory(url), "SELECT * FROM theirs")


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        ("CREATE ROLE planted_bookkeeper; GRANT planted_bookkeeper TO mallory", "planted_bookkeeper"),
        (
            "CREATE ROLE planted_bookkeeper; COMMENT ON ROLE planted_bookkeeper IS 'alphapulse_encryption: owns'; "
            "GRANT planted_bookkeeper TO mallory",
            "planted_bookkeeper",
        ),
        ("CREATE ROLE planted_migrator; GRANT planted_migrator TO mallory", "planted_migrator"),
        (
            "CREATE ROLE planted_approver; COMMENT ON ROLE planted_approver IS 'alphapulse_encryption: approves'; "
            "GRANT planted_approver TO mallory WITH ADMIN OPTION",
            "planted_approver",
        ),
        ("CREATE ROLE planted_owner CREATEROLE", "planted_owner"),
    ],
)
def test_a_planted_role(postgres: EmbeddedPostgres, url: str, plant: str, named: str) -> None:
    run(url, plant)
    status, told = psql(postgres, url, script(url))
    assert status == 3 and named in told
    assert value(url, "SELECT to_regnamespace('alphapulse_encryption')") is None


def test_a_role_that_somebody_made_who_may_make_roles(postgres: EmbeddedPostgres, url: str) -> None:
    run(url, "ALTER ROLE mallory CREATEROLE")
    run(
        mallory(url),
        "CREATE ROLE planted_migrator; COMMENT ON ROLE planted_migrator IS 'alphapulse_encryption: mine'",
    )
    status, told = psql(postgres, url, script(url))
    assert status == 3 and "planted_migrator" in told and "mallory" in told


def test_default_privileges_give_nothing_away(postgres: EmbeddedPostgres, url: str) -> None:
    """As an administrator sets them who means the application's own objects."""
    for what in ("TABLES", "SEQUENCES", "FUNCTIONS", "SCHEMAS"):
        run(url, f"ALTER DEFAULT PRIVILEGES GRANT ALL ON {what} TO mallory")
    support.encrypt(url, ENTRY)
    assert _given(url) == {
        ("encryption_migrations", "SELECT"),
        ("encryption_tables", "SELECT"),
        ("encryption_report_key_usage", "EXECUTE"),
    }
    assert psql(postgres, url, script(url)) == (0, "")
    assert _given(url) == set()
    run(mallory(url), "UPDATE notes SET secret = 'new'")


def _given(url: str) -> set[tuple[str, str]]:
    return set(
        run(
            url,
            "SELECT name, privilege_type FROM (SELECT nspname AS name, nspacl AS acl FROM pg_namespace "
            "UNION ALL SELECT relname, relacl FROM pg_class WHERE relnamespace IN "
            "(to_regnamespace('alphapulse_encryption'), 'public'::regnamespace) "
            "UNION ALL SELECT proname, proacl FROM pg_proc) o CROSS JOIN aclexplode(acl) x "
            "WHERE (name LIKE '%%encryption%%' OR name IN ('approvals', 'settings')) AND name !~ 'encryption_guard' "
            "AND grantee = %s::regrole",
            "mallory",
        )
    )


def test_an_event_trigger_whose_function_is_somebody_elses(postgres: EmbeddedPostgres, url: str) -> None:
    run(mallory(url), "CREATE FUNCTION on_ddl() RETURNS event_trigger LANGUAGE plpgsql AS $f$ BEGIN END $f$")
    run(url, "CREATE EVENT TRIGGER watched ON ddl_command_end EXECUTE FUNCTION on_ddl()")
    try:
        status, told = psql(postgres, url, script(url))
        assert status == 3 and "event trigger watched" in told and "mallory" in told
        with pytest.raises(RefusedError, match="event trigger watched belongs to mallory"):
            support.add_columns(url, ENTRY)
        run(url, "ALTER FUNCTION on_ddl() OWNER TO postgres")
        support.add_columns(url, ENTRY)
    finally:
        run(url, "DROP EVENT TRIGGER watched")


def test_settings_of_the_database_do_not_change_how_a_script_is_read(
    postgres: EmbeddedPostgres, url: str
) -> None:
    """With backslashes for escapes, or in an encoding whose characters end in a quote, names would end early."""
    name = "a\\'; ALTER ROLE mallory SUPERUSER; --ソ\""
    quoted = '"' + name.replace('"', '""') + '"'
    run(mallory(url), f"CREATE TABLE {quoted} (id int PRIMARY KEY, secret text)")
    database = psycopg.conninfo.conninfo_to_dict(url)["dbname"]
    entry = support.table(name, "secret")
    support.encrypt(mallory(url), entry)
    text = script(url, entry)
    for setting in (
        "standard_conforming_strings TO off",
        "client_encoding TO 'SJIS'",
        "search_path TO public",
    ):
        run(mallory(url), f"ALTER DATABASE {database} SET {setting}")
    assert psql(postgres, url, text, "-v", "bookkeeping_of=mallory") == (0, "")
    assert not is_superuser(url)
    assert (
        value(url, "SELECT relowner::regrole::text FROM pg_class WHERE relname = %s", name)
        == f"{PREFIX}owner"
    )
    assert value(url, "SELECT count(*) FROM pg_roles WHERE starts_with(rolname, 'planted_')") == len(GROUPS)
