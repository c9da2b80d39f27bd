"""Sessions of the engine: their settings, what their errors tell, and names that would break a statement."""

from __future__ import annotations

import contextlib
import secrets
import traceback
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, RefusedError
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import (
    LIMITS,
    LOG_SETTINGS,
    MARK_AS_ENGINE,
    Database,
)
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.leaks import Find, Scanner
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
        "array_nulls": "on",
        "xmloption": "content",
        "quote_all_identifiers": "off",
    }


def test_no_limit_of_the_database_ends_our_work(database_url: str) -> None:
    limits = {name: "1s" for name in LIMITS if name.endswith("_timeout")}
    with psycopg.connect(database_url) as connection:
        known = connection.execute("SELECT name FROM pg_settings WHERE name = ANY(%s)", [list(LIMITS)])
        names = {name for (name,) in known}
    assert len(names) >= 4
    support.with_settings(database_url, {name: limits.get(name, "on") for name in names})
    with Database(database_url).connect() as connection:
        assert {name: support.ask(connection, f"SHOW {name}")[0][0] for name in names} == {
            name: LIMITS[name] for name in names
        }
        connection.execute("CREATE TABLE public.written (id int)")
    with (
        pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
        Database(database_url, read_only=True).connect() as connection,
    ):
        connection.execute("CREATE TABLE public.refused (id int)")


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


@pytest.mark.parametrize("code", ["insufficient_privilege", "lock_not_available", "undefined_column"])
def test_words_of_a_trigger_are_not_repeated_whatever_their_code(database_url: str, code: str) -> None:
    body = f"""RAISE EXCEPTION '%', NEW.email USING ERRCODE = '{code}', TABLE = NEW.email, CONSTRAINT = NEW.email,
        SCHEMA = NEW.email, COLUMN = NEW.email, DETAIL = NEW.email, HINT = NEW.email"""
    support.run(database_url, "CREATE TABLE people (email text)")
    support.run(
        database_url,
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body}; END $$",
    )
    support.run(
        database_url,
        "CREATE TRIGGER refuse BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    with (
        pytest.raises(DatabaseFailure) as caught,
        Database(database_url).session("add a person") as connection,
    ):
        support.ask(
            connection, "INSERT INTO public.people VALUES (%s)", f"{CANARY} row-level security policy"
        )
    assert "raised by a function" in str(caught.value) and "BYPASSRLS" not in str(caught.value)
    assert "canary" not in told(caught.value)
    # Of the server's own words, those that name objects are.
    with (
        pytest.raises(DatabaseFailure, match='column "nonsense" does not exist'),
        Database(database_url).session("look") as connection,
    ):
        connection.execute("SELECT nonsense")


_SAYING_TOO_MUCH = """
CREATE TABLE people (email text UNIQUE, born text);
CREATE FUNCTION say() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE WARNING 'born %', NEW.born;
    IF NEW.email IS NULL THEN RAISE EXCEPTION 'refused: %', NEW.born; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER say BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION say();
INSERT INTO people VALUES ('a', 'b')
"""
_EVERYTHING_LOGGED = {
    "log_statement": "all",
    "log_min_duration_statement": "0",
    "log_parameter_max_length": "-1",
    "log_parameter_max_length_on_error": "-1",
    "log_error_verbosity": "verbose",
    "log_min_error_statement": "debug5",
    "log_min_messages": "debug1",
    "debug_print_plan": "on",
    "debug_print_parse": "on",
    "session_preload_libraries": "auto_explain",
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_verbose": "on",
}
_ROLE = "writes_no_log"


@pytest.mark.parametrize("who", ["superuser", "granted", "set for the role"])
def test_what_the_server_logs_of_our_sessions(
    postgres: EmbeddedPostgres, database_url: str, who: str
) -> None:
    support.run(database_url, _SAYING_TOO_MUCH)
    canary = f"canary-{secrets.token_hex(8)}"
    scanner = Scanner({"value": canary})

    def logged(connection: psycopg.Connection[Any]) -> list[Find]:
        before = postgres.log_file.stat().st_size
        for statement in (
            "INSERT INTO public.people VALUES (%s::text, %s::text)",
            "INSERT INTO public.people VALUES ('a', %s::text || %s::text)",
            "INSERT INTO public.people VALUES (NULL, %s::text || %s::text)",
            "SELECT %s::text::numeric, %s::text",
            "SELECT count(*) FROM public.people WHERE email = %s::text OR born = %s::text",
        ):
            with contextlib.suppress(psycopg.Error):
                connection.execute(statement.encode(), [canary, canary])
        with postgres.log_file.open("rb") as file:
            file.seek(before)
            text = file.read()
        assert b"INSERT INTO public.people" in text, "statements are logged still"
        return scanner.data(text, "log")

    with support.application(database_url) as admin:
        admin.execute(f"CREATE ROLE {_ROLE} LOGIN IN ROLE pg_write_all_data, pg_read_all_data".encode())
        try:
            support.with_settings(database_url, _EVERYTHING_LOGGED)
            url = database_url
            if who != "superuser":
                url = database_url.replace("//postgres@", f"//{_ROLE}@")
                assert url != database_url
                with Database(url).connect() as connection:
                    assert logged(connection), "a role that may not turn it off leaves values there"
            for name, value in LOG_SETTINGS.items() if who != "superuser" else ():
                remedy = f"GRANT SET ON PARAMETER {name} TO {_ROLE}"
                if who == "set for the role":
                    remedy = f"ALTER ROLE {_ROLE} SET {name} = '{value}'"
                admin.execute(remedy.encode())
            with psycopg.connect(database_url, autocommit=True) as connection:
                assert logged(connection), "this would find them"
            with Database(url).connect() as connection:
                assert logged(connection) == []
        finally:
            admin.execute(f"DROP OWNED BY {_ROLE}".encode())
            admin.execute(f"DROP ROLE {_ROLE}".encode())


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


def test_engine_mark_ends_with_its_transaction(database_url: str) -> None:
    with Database(database_url).connect() as connection:
        with connection.transaction():
            connection.execute(MARK_AS_ENGINE)
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
        found = wire.execute(connection, b"SELECT unnest($1::text[])", [wire.TextArray(items)])
        assert wire.columns(found) == [[None if item is None else item.encode() for item in items]]


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


def test_a_write_to_a_standby_tells_of_the_primary(database_url: str) -> None:
    reading = Database(database_url, read_only=True)
    with pytest.raises(DatabaseFailure, match="primary"), reading.session("write") as connection:
        connection.execute("CREATE TABLE public.t ()")


def test_a_moment_that_python_has_none_for_ends_no_report(database_url: str) -> None:
    """One row with such a moment, which others may write, would keep every report from being read."""
    with Database(database_url).session("look") as connection:
        ((last, late, first, early, now),) = connection.execute(
            "SELECT 'infinity'::timestamptz, '20000-01-01 UTC'::timestamptz, '-infinity'::timestamptz, "
            "'0044-03-15 BC'::timestamptz, '2026-01-02 03:04:05 UTC'::timestamptz"
        )
    assert last == late == datetime.max.replace(tzinfo=UTC)
    assert first == early == datetime.min.replace(tzinfo=UTC)
    assert now == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
