"""Sessions of the engine: their settings, what their errors tell, and names that would break a statement."""

from __future__ import annotations

import traceback

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, RefusedError
from alphapulse_encryption.migration.database import Database, TextArray, mark_as_engine
from alphapulse_encryption_tests.migration import support

CANARY = "canary-7f3a@secret.example"
DSN_SECRET = "hunter2-in-the-dsn"


def told(error: BaseException) -> str:
    """Everything that a log would show of an error, its causes included."""
    return "".join(traceback.format_exception(error)) + repr(error)


def test_settings_do_not_depend_on_the_database(database_url: str) -> None:
    support.with_settings(database_url, support.STRANGE_SETTINGS)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SHOW TimeZone").fetchone() == ("Asia/Kathmandu",)
    with Database(database_url).connect() as connection:
        shown = {
            name: support.ask(connection, f"SHOW {name}")[0][0]
            for name in (*support.STRANGE_SETTINGS, "lc_monetary", "row_security", "client_encoding")
        }
    assert shown == {
        "TimeZone": "UTC",
        "DateStyle": "ISO, DMY",
        "IntervalStyle": "postgres",
        "bytea_output": "hex",
        "extra_float_digits": "1",
        "lc_monetary": "C",
        "search_path": "pg_catalog",
        "standard_conforming_strings": "on",
        "default_transaction_isolation": "read committed",
        "row_security": "off",
        "client_encoding": "UTF8",
    }


@pytest.mark.parametrize(
    "conninfo",
    [
        f"postgresql://nobody:{DSN_SECRET}@localhost:1/nothing",
        f"postgresql://nobody:{DSN_SECRET}@no-such-host.invalid/nothing",
        f"host=/nowhere password={DSN_SECRET}",
        f"postgresql://{DSN_SECRET}?unknown_option=1",
        f"={DSN_SECRET}=",
    ],
)
def test_unreachable_database_is_named_without_its_dsn(conninfo: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot be reached") as caught:
        Database(conninfo).connect()
    assert caught.value.exit_status == 2
    assert DSN_SECRET not in str(caught.value)
    assert "nobody" not in str(caught.value)
    assert DSN_SECRET not in repr(Database(conninfo))


@pytest.mark.parametrize(
    ("statement", "state", "named"),
    [
        ("INSERT INTO people (email) VALUES (%s)", "23505", "people_email_key"),
        ("INSERT INTO people (email, age) VALUES (%s, NULL)", "23502", "age"),
        ("INSERT INTO people (email, age) VALUES (%s || 'x', -1)", "23514", "people_age_check"),
        ("INSERT INTO people (email, friend) VALUES ('x', 'a' || %s)", "23503", "people_friend_fkey"),
        ("SELECT (%s::text)::int", "22P02", "22P02"),
        ("SELECT (%s::text)::jsonb", "22P02", "22P02"),
        ("DO $$ BEGIN RAISE EXCEPTION 'canary-7f3a@secret.example'; END $$", "P0001", "P0001"),
    ],
)
def test_errors_tell_the_code_and_the_constraint_and_no_value(
    database_url: str, statement: str, state: str, named: str
) -> None:
    support.run(
        database_url,
        "CREATE TABLE people (email text UNIQUE, age int NOT NULL DEFAULT 1 CHECK (age > 0), "
        "friend text REFERENCES people (email))",
    )
    support.run(database_url, "INSERT INTO people (email) VALUES (%s)", CANARY)
    parameters = [CANARY] if "%s" in statement else []
    with pytest.raises(psycopg.Error) as raw:
        support.run(database_url, statement, *parameters)
    assert "canary" in told(raw.value)  # the server does tell it

    with (
        pytest.raises(DatabaseFailure) as caught,
        Database(database_url).session("add a person") as connection,
    ):
        connection.execute("SET search_path TO public")
        support.ask(connection, statement, *parameters)
    assert caught.value.sqlstate == state
    assert "add a person" in str(caught.value)
    assert named in str(caught.value)
    assert "canary" not in told(caught.value).replace(statement, "")


def test_our_own_errors_pass_unchanged(database_url: str) -> None:
    with (
        pytest.raises(RefusedError, match=r"^not now$"),
        Database(database_url).session("wait"),
    ):
        raise RefusedError("not now")


def test_lost_connection(database_url: str) -> None:
    with (
        pytest.raises(DatabaseFailure, match="Could not count") as caught,
        Database(database_url).session("count") as connection,
    ):
        support.run(database_url, "SELECT pg_terminate_backend(%s)", connection.info.backend_pid)
        connection.execute("SELECT 1")
    assert caught.value.sqlstate in {"57P01", None}


def test_transaction_block_is_undone_on_an_error(database_url: str) -> None:
    support.run(database_url, "CREATE TABLE public.t (n int)")
    with (
        pytest.raises(DatabaseFailure),
        Database(database_url).session("insert", autocommit=False) as connection,
    ):
        connection.execute("INSERT INTO public.t VALUES (1)")
        connection.execute("SELECT 1 / 0")
    assert support.value(database_url, "SELECT count(*) FROM t") == 0
    with Database(database_url).session("insert", autocommit=False) as connection:
        connection.execute("INSERT INTO public.t VALUES (1)")
    assert support.value(database_url, "SELECT count(*) FROM t") == 1


def test_engine_mark_ends_with_its_transaction(database_url: str) -> None:
    with Database(database_url).connect() as connection:
        with connection.transaction():
            mark_as_engine(connection)
            marked = connection.execute("SELECT current_setting('alphapulse_encryption.writer', true)")
            assert marked.fetchone() == ("engine",)
        marked = connection.execute("SELECT current_setting('alphapulse_encryption.writer', true)")
        assert marked.fetchone() == ("",)


@pytest.mark.parametrize(
    "items",
    [[], [None], ["", None, "a,b", '"{}"', "\\", "NULL", "two\nlines", "\U0001f600\u00e9", "x" * 70_000]],
)
def test_ready_made_arrays_arrive_as_they_are(database_url: str, items: list[str | None]) -> None:
    with Database(database_url).connect() as connection:
        row = connection.execute(
            "SELECT %s, ARRAY(SELECT unnest(%s) IS NULL)", [TextArray(items), TextArray(items)]
        ).fetchone()
    assert row == (items, [item is None for item in items])


@pytest.mark.parametrize("name", ["100%", "%s", "a%(b)s", "%%", 'quo"te %t', "{} {x}"])
def test_names_with_percent_signs(database_url: str, name: str) -> None:
    column = sql.Identifier(name)
    with Database(database_url).connect() as connection:
        connection.execute("SET search_path TO public")
        connection.execute(sql.SQL("CREATE TABLE {} ({} text)").format(column, column))
        connection.execute(sql.SQL("INSERT INTO {} VALUES (%s)").format(column), ["with"])
        connection.execute(sql.SQL("INSERT INTO {} VALUES ({})").format(column, sql.Literal(name)))
        found = connection.execute("SELECT relname FROM pg_class WHERE relname = %s", [name]).fetchall()
        assert found == [(name,)]
        nested = sql.SQL("SELECT {} FROM {} WHERE {} ORDER BY 1").format(
            column, column, sql.SQL("{} = ANY (%s) AND {} <> ''").format(column, sql.Literal(name))
        )
        assert connection.execute(nested, [["with", name]]).fetchall() == sorted([("with",), (name,)])
        with connection.transaction(), connection.cursor(name="c") as cursor:
            cursor.execute(nested, [["with"]])
            assert cursor.fetchall() == [("with",)]
