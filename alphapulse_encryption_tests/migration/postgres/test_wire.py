"""Statements through libpq's blocking calls do, and fail, as psycopg's own do."""

from __future__ import annotations

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import Database, connection_was_lost
from alphapulse_encryption.migration.postgres.wire import TextArray
from alphapulse_encryption.migration.rows.batches import read_columns
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration.support import run

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
# Lengths around those that are common, in several sizes of their length word.
long_texts = st.integers(1020, 1030).map(lambda size: "x" * size)


@given(items=st.lists(st.none() | texts | long_texts, max_size=30))
@settings(max_examples=60, suppress_health_check=list(HealthCheck))
def test_what_goes_in_comes_back(database_url: str, items: list[str | None]) -> None:
    with Database(database_url).connect() as connection:
        for given_as in (items, [None if i is None else i.encode() for i in items]):
            result = wire.execute(connection, b"SELECT unnest($1)", [TextArray(given_as)], binary=True)
            (column,) = wire.columns(result)
            assert column == [None if i is None else i.encode() for i in items]


def test_placeholders_are_numbered_and_names_kept(database_url: str) -> None:
    run(database_url, 'CREATE TABLE odd ("%s" text, "100%%" int)')
    query = SQL("INSERT INTO public.odd ({}, {}) VALUES (%s, %s) RETURNING {}").format(
        Identifier("%s"), Identifier("100%%"), SQL("{} || %s").format(Literal("50% "))
    )
    with Database(database_url).connect() as connection:
        statement = wire.numbered(connection, query)
        result = wire.execute(connection, statement, ["a % sign", 7, "%s"])
    assert wire.columns(result) == [[b"50% %s"]]
    assert run(database_url, "SELECT * FROM odd") == [("a % sign", 7)]


def test_errors_are_those_of_psycopg(database_url: str) -> None:
    run(database_url, "CREATE TABLE one (id int PRIMARY KEY)")
    run(database_url, "INSERT INTO one VALUES (1)")
    with Database(database_url).connect() as connection:
        with pytest.raises(psycopg.errors.UniqueViolation) as refused, wire.transaction(connection):
            wire.execute(connection, b"INSERT INTO public.one VALUES (2)")
            wire.execute(connection, b"INSERT INTO public.one VALUES (1)")
        assert (refused.value.sqlstate, refused.value.diag.table_name) == ("23505", "one")
        # Rolled back, and usable.
        assert connection.execute("SELECT count(*) FROM public.one").fetchone() == (1,)


def test_a_transaction_within_another_is_a_part_of_it(database_url: str) -> None:
    run(database_url, "CREATE TABLE one (id int PRIMARY KEY)")
    with Database(database_url).connect() as connection:
        with pytest.raises(ZeroDivisionError), connection.transaction():
            with wire.transaction(connection):
                wire.execute(connection, b"INSERT INTO public.one VALUES (1)")
            raise ZeroDivisionError
        with wire.transaction(connection):
            wire.execute(connection, b"INSERT INTO public.one VALUES (2)")
    assert run(database_url, "SELECT id FROM one") == [(2,)]


@pytest.mark.parametrize("gracefully", [True, False])
def test_a_lost_connection_is_told_from_a_refusal(database_url: str, gracefully: bool) -> None:
    with Database(database_url).connect() as connection:
        if gracefully:
            run(database_url, f"SELECT pg_terminate_backend({connection.info.backend_pid})")
        else:
            connection.pgconn.finish()
        with pytest.raises(psycopg.Error) as lost, wire.transaction(connection):
            wire.execute(connection, b"SELECT 1")
        assert connection_was_lost(lost.value)


def test_text_that_is_not_utf8_is_not_taken_for_it(postgres: EmbeddedPostgres, database_url: str) -> None:
    run(database_url, "CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    ascii_url = postgres.url("ascii")
    try:
        run(ascii_url, "CREATE TABLE raw (id int PRIMARY KEY, v text)")
        with psycopg.connect(ascii_url, client_encoding="SQL_ASCII") as connection:
            connection.execute(r"INSERT INTO raw VALUES (1, E'\xC3'), (2, E'\xA9'), (3, E'\xC3\xA9')")
        with Database(ascii_url).connect() as connection:
            query = b"SELECT v FROM public.raw WHERE id = ANY ($1::int[]) ORDER BY id LIMIT $2"
            assert read_columns(connection, query, ["{3}"], 5) == [["é".encode()]]
            with pytest.raises(psycopg.DataError):
                read_columns(connection, query, ["{1,2}"], 5)
    finally:
        run(database_url, "DROP DATABASE ascii WITH (FORCE)")
