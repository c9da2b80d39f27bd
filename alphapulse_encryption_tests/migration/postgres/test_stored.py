"""Stored SQL: what the server prints passes, and no text gets out of its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.sql import SQL
from pydantic import TypeAdapter

from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.migration.postgres import stored
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration.support import run, value

EXPRESSION, CONSTRAINT, STATEMENT = (
    TypeAdapter[Any](kind).validate_python
    for kind in (stored.Expression, stored.Constraint, stored.Statement)
)

# Expressions with all that has quotes, brackets, commas and signs; as somebody types them.
TYPED = (
    "1",
    "'it''s; -- (no) /* comment */ $$ \\ '",
    "'x'::character varying(20)",
    "ARRAY[1, 2]::integer[]",
    "(ARRAY['a)', '(b'])[1]",
    "nextval('\"My ; Seq\"')::text",
    "B'101'::bit varying",
    "E'a\\tb\\'c'",
    "U&'\\0041' || '\U0001f600'",
    "- (- 5)",
    "CASE WHEN 1 < 2 THEN 'e' ELSE 'u&' END",
    "date '2020-01-01' + interval '1 day'",
    "'{\"a\": [1, 2]}'::jsonb ->> 'a'",
    "coalesce(NULL, 'b', now()::text)",
    "pg_catalog.concat_ws(', ', 'a', 'b')",
    "(1 OPERATOR(pg_catalog.+) 2)",
    "'a' COLLATE \"C\"",
    "CURRENT_TIMESTAMP",
    "ROW(1, '2')",
)
OUT = (
    "",
    " ",
    "1; DROP TABLE t",
    "1, ADD COLUMN b int",
    "1), OWNER TO attacker, ALTER COLUMN a SET DEFAULT (1",
    "1) , b int DEFAULT (2",
    "(1",
    "1)",
    "[1)",
    "1 -- the rest",
    "1 /* the rest",
    "$$a$$",
    "$tag$ ' $tag$",
    "E'\\'; DROP TABLE t; --'",
    "e'\\'), OWNER TO x --'",
    "U&'\\0027'",
    '1 + u&"a"',
    "'not closed",
    '"not closed',
    "1 \\",
    "1\x00",
)


@pytest.mark.parametrize("typed", TYPED)
def test_what_the_server_prints_passes_and_comes_back_the_same(database_url: str, typed: str) -> None:
    run(database_url, 'CREATE SEQUENCE "My ; Seq"')
    try:
        run(database_url, f"CREATE TABLE t (a text); ALTER TABLE t ALTER a SET DEFAULT {typed}")
    except (psycopg.errors.DatatypeMismatch, psycopg.errors.CannotCoerce):
        run(database_url, "DROP TABLE IF EXISTS t")
        run(database_url, f"CREATE TABLE t AS SELECT {typed} AS a; ALTER TABLE t ALTER a SET DEFAULT {typed}")
    printed = "SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef"
    with Database(database_url).session("look") as connection:
        ((text,),) = connection.execute(printed.encode())
        assert EXPRESSION(text) == text
        change = SQL("ALTER TABLE public.t ALTER a SET DEFAULT {}").format(stored.in_parentheses(text))
        stored.execute_one(connection, change)
        assert connection.execute(printed.encode()).fetchall() == [(text,)]


@pytest.mark.parametrize("text", OUT)
def test_what_would_get_out_is_refused(text: str) -> None:
    for take in (EXPRESSION, stored.in_parentheses):
        with pytest.raises(RefusedError, match="one expression"):
            take(text)
    for take, beginning in ((CONSTRAINT, "CHECK (true) "), (STATEMENT, "CREATE INDEX i ON t (a) ")):
        if text.strip() and (take is CONSTRAINT or not text.startswith("1, ")):
            with pytest.raises(RefusedError, match=r"one constraint|one statement"):
                take(beginning + text)


@given(st.text(alphabet="'\"()[],;$\\-/*eEuU& \n1aé", max_size=24))
def test_between_parentheses_it_is_all_that_is_there(text: str) -> None:
    """Whatever passes leaves no parenthesis, quote or comment open, told by a reader that goes sign by sign."""
    try:
        EXPRESSION(text)
    except RefusedError:
        return
    depth, quote = 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            assert sign not in ";$\\"
            depth += (sign in "([") - (sign in ")]")
            assert depth >= 0
            assert depth or sign != ","
    assert depth == 0
    assert quote == ""


@pytest.mark.parametrize(
    ("take", "text"),
    [
        (CONSTRAINT, "PRIMARY KEY (a)"),
        (CONSTRAINT, "CHECK"),
        (CONSTRAINT, "check (true)"),
        (STATEMENT, "DROP TABLE t"),
        (STATEMENT, "CREATE TABLE t ()"),
        (STATEMENT, "CREATE FUNCTION f() RETURNS int"),
    ],
)
def test_it_is_of_the_kind_that_is_expected(take: Callable[[str], str], text: str) -> None:
    with pytest.raises(RefusedError):
        take(text)


def test_one_statement_alone_is_executed(database_url: str) -> None:
    run(database_url, "CREATE TABLE t (a int)")
    with pytest.raises(DatabaseFailure, match="42601"), Database(database_url).session("try") as connection:
        stored.execute_one(connection, SQL("DROP TABLE public.t; CREATE ROLE attacker"))
    assert value(database_url, "SELECT to_regclass('t') IS NOT NULL")


@pytest.mark.parametrize(
    ("text", "reason"), [("int DEFAULT 1", "42601"), ("nothing", "none of this database")]
)
def test_a_type_is_a_type(database_url: str, text: str, reason: str) -> None:
    with Database(database_url).session("look") as connection:
        for right in ("text", "numeric(10,2)", "character varying(20)[]", "timestamp(3) without time zone"):
            stored.refuse_no_type(connection, right)
    with (
        pytest.raises((RefusedError, DatabaseFailure), match=reason),
        Database(database_url).session("look") as connection,
    ):
        stored.refuse_no_type(connection, text)


def test_a_superuser_is_the_owner_meanwhile_and_nobody_else_is(database_url: str) -> None:
    run(database_url, "CREATE ROLE the_owner; CREATE TABLE t (); ALTER TABLE t OWNER TO the_owner")
    try:
        with Database(database_url).session("look") as connection:
            oid = connection.execute("SELECT 'public.t'::regclass::oid::int").fetchall()[0][0]
            me = connection.execute("SELECT current_user, session_user").fetchall()
            with connection.transaction():
                with stored.as_owner(connection, oid):
                    assert connection.execute("SELECT current_user::text").fetchall() == [("the_owner",)]
                assert connection.execute("SELECT current_user, session_user").fetchall() == me
            # An error in the middle leaves nobody behind.
            with (
                pytest.raises(psycopg.errors.UndefinedTable),
                connection.transaction(),
                stored.as_owner(connection, oid),
            ):
                connection.execute("SELECT * FROM nothing")
            assert connection.execute("SELECT current_user, session_user").fetchall() == me
    finally:
        run(database_url, "DROP OWNED BY the_owner; DROP ROLE the_owner")
