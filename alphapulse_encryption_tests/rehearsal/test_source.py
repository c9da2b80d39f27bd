"""What is refused as a source, and that nothing is created then; that the source is only read."""

from __future__ import annotations

from collections.abc import Mapping

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.postgres.identity import Identity
from alphapulse_encryption.rehearsal.clone import source
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption_tests.migration.walk import query, value
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.rehearsal.circle import SERVER, STAGING, clones, contents, rehearse

TARGET = "ALPHAPULSE_DATABASE_URL"
NOBODY = "postgresql://nobody@127.0.0.1:1/nothing"


def check(small: Place, changes: Mapping[str, str | None] | None = None, *, declared: bool = False) -> None:
    """What the first stage asks."""
    small.extra = {**small.extra, **(changes or {})}
    with small.in_environment():
        source.refuse_production(source.source_database(), declared=declared)


def test_the_same_database_is_never_rehearsed(small: Place) -> None:
    before = contents(small.url)
    # Spelled differently, so that only the server can tell.
    small.extra[TARGET] = f"{small.url}&application_name=another"
    for config in ({}, {"source_is_not_production": True}):
        with small.instance() as instance:
            outcome = rehearse(small, instance, **config)
            assert not outcome.succeeded
            assert "are the same database" in outcome.problems[0]
            # Nothing began, so there is nothing to remember.
            assert history.read(instance) == ()
    assert clones(small) == []
    assert contents(small.url) == before


@pytest.mark.parametrize(
    ("conninfo", "name", "sign"),
    [
        ("host=db.prod.example.com", "alphapulse", "host db.prod.example.com"),
        ("host=prod-db1", "alphapulse", "host prod-db1"),
        ("postgresql://a@staging.example,production.example/b", "b", "host production.example"),
        ("service=alphapulse_production", "alphapulse", "service alphapulse_production"),
        ("host=/srv/prod/run", "alphapulse", None),
        ("host=db", "PROD", "name PROD"),
        ("host=db", "eu.prod2.alphapulse", "name eu.prod2.alphapulse"),
        ("host=products.example", "reproduction", None),
        ("host=db", "staging", None),
    ],
)
def test_what_says_that_it_is_production(conninfo: str, name: str, sign: str | None) -> None:
    assert source.production_sign(conninfo, name) == sign


def test_a_name_that_says_production(small: Place) -> None:
    old = value(small.url, "SELECT current_database()")
    name = "alphapulse_production"
    with psycopg.connect(small.postgres.url("postgres"), autocommit=True) as connection:
        rename = SQL("ALTER DATABASE {} RENAME TO {}")
        connection.execute(rename.format(Identifier(old), Identifier(name)))
        try:
            small.extra[STAGING] = small.postgres.url(name)
            with small.instance() as instance:
                outcome = rehearse(small, instance)
            assert "The name alphapulse_production of the staging database says" in outcome.problems[0]
            assert clones(small) == []
            check(small, declared=True)
        finally:
            connection.execute(rename.format(Identifier(name), Identifier(old)))


def test_a_production_that_cannot_be_asked(small: Place) -> None:
    with pytest.raises(RefusedError, match=f"{TARGET} cannot be reached"):
        check(small, {TARGET: NOBODY})
    # Somebody says that it is another one, and the addresses are not the same.
    check(small, declared=True)
    same = f"{small.url}&connect_timeout=1"
    with pytest.raises(RefusedError, match="are the same database"):
        check(small, {TARGET: same}, declared=True)


def test_a_physical_copy_is_told_from_the_original(small: Place) -> None:
    original = Identity("7", "2026-01-01", 5, "alphapulse")
    assert original.same_database(Identity(None, "2026-01-01", 5, "alphapulse"))
    copy = Identity("7", "2026-02-02", 5, "alphapulse")
    assert not original.same_database(copy) and copy.copy_of(original)
    assert not original.same_server(Identity("8", "2026-01-01", 5, "alphapulse"))
    # Another database of the same server is neither.
    other = Identity("7", "2026-01-01", 6, "staging")
    assert original.same_server(other) and not original.same_database(other) and not other.copy_of(original)


def test_nothing_to_rehearse(small: Place) -> None:
    small.extra[STAGING] = None
    with small.in_environment(), pytest.raises(ConfigurationError, match="There is nothing to rehearse"):
        source.source_database()
    assert not (small.state / "postgres").exists()


def test_an_address_that_nobody_answers_at_names_its_variable(small: Place) -> None:
    for variable in (STAGING, SERVER):
        small.extra = {TARGET: None, STAGING: small.url, variable: NOBODY}
        with small.instance() as instance:
            outcome = rehearse(small, instance)
            assert variable in outcome.problems[0]
            assert "127.0.0.1, port 1" in outcome.problems[0]
            assert history.read(instance) == ()
    assert clones(small) == []


def test_its_sessions_cannot_write(small: Place) -> None:
    with small.in_environment():
        database = source.source_database()
    with (
        pytest.raises(Exception, match="25006"),
        database.session("write") as connection,
    ):
        connection.execute("DELETE FROM public.sessions")
    assert value(small.url, "SELECT count(*) FROM sessions") == 60
    small.extra[STAGING] = f"{small.url}&options=-c%20work_mem%3D7MB"
    with small.in_environment():
        options = source.source_database()
    with options.session("look") as connection:
        row = connection.execute(
            "SELECT current_setting('work_mem'), current_setting('default_transaction_read_only')"
        ).fetchone()
    assert row == ("7MB", "on")


def test_a_role_that_may_not_create_a_database(small: Place) -> None:
    query(small.url, "CREATE ROLE reader LOGIN")
    try:
        query(small.url, "GRANT USAGE ON SCHEMA crm TO reader")
        query(small.url, "GRANT SELECT ON ALL TABLES IN SCHEMA public, crm TO reader")
        small.extra[STAGING] = small.url.replace("postgres@", "reader@")
        with small.instance() as instance:
            outcome = rehearse(small, instance)
        assert "may not create a database" in outcome.problems[0]
        assert clones(small) == []
    finally:
        query(small.url, "DROP OWNED BY reader")
        query(small.url, "DROP ROLE reader")
