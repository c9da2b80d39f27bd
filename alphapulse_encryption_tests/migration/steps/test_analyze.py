"""Statistics taken anew: of all partitions, beside the application, and never left out in silence."""

from __future__ import annotations

import pytest
from psycopg.conninfo import make_conninfo

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres import build_progress
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.steps.analyze import analyze
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

ENTRY = support.table("notes", "word")
AUDITED = "SELECT actor, run_id, table_name FROM alphapulse_encryption.audit_log WHERE action = 'analyze'"
STATISTICS = "SELECT tablename::text FROM pg_stats WHERE attname = 'word_encrypted' ORDER BY 1"


@pytest.fixture
def notes_url(database_url: str) -> str:
    # The server's own statistics of a table that has just been filled would be taken for ours.
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, word text) PARTITION BY RANGE (id);"
        "CREATE TABLE low PARTITION OF notes FOR VALUES FROM (0) TO (100) WITH (autovacuum_enabled = off);"
        "CREATE TABLE high PARTITION OF notes FOR VALUES FROM (100) TO (999) WITH (autovacuum_enabled = off);"
        "INSERT INTO notes SELECT i, 'w' || i FROM generate_series(1, 150) AS i",
    )
    support.encrypt(database_url, ENTRY)
    return database_url


def test_all_partitions(notes_url: str) -> None:
    assert run(notes_url, STATISTICS) == []
    rows = analyze(Database(notes_url), ENTRY, ACTOR)
    assert run(notes_url, STATISTICS) == [("high",), ("low",), ("notes",)]
    assert rows == 150
    assert run(notes_url, AUDITED) == [("tests", "run-7", "notes")]


def test_it_waits_in_short_attempts_and_keeps_nobody_out(notes_url: str) -> None:
    with support.application(notes_url, autocommit=False) as other:
        other.execute("LOCK TABLE high IN SHARE UPDATE EXCLUSIVE MODE")
        with support.Background(lambda: analyze(Database(notes_url), ENTRY, ACTOR)) as working:
            support.until(lambda: support.engine_waits(notes_url, "ANALYZE%", behind=other), "it waits")
            with support.application(notes_url) as application:
                application.execute("SET lock_timeout TO '1s'")
                application.execute("UPDATE notes SET word = 'new' WHERE id = 120")
            other.rollback()
            assert working.result() == 150


def test_a_role_that_may_not(notes_url: str) -> None:
    """The server only warns; here it is an error."""
    run(
        notes_url,
        "CREATE ROLE reader LOGIN; GRANT USAGE ON SCHEMA alphapulse_encryption TO reader; "
        "GRANT SELECT ON ALL TABLES IN SCHEMA public, alphapulse_encryption TO reader;"
        "GRANT INSERT ON alphapulse_encryption.audit_log TO reader",
    )
    try:
        with pytest.raises(RefusedError, match=r"did not analyse notes.*GRANT MAINTAIN"):
            analyze(Database(make_conninfo(notes_url, user="reader")), ENTRY, ACTOR)
        assert run(notes_url, STATISTICS) == []
        assert run(notes_url, AUDITED) == []
    finally:
        run(notes_url, "DROP OWNED BY reader; DROP ROLE reader")


def test_before_its_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, word text)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        analyze(Database(database_url), ENTRY, ACTOR)


def test_how_far_it_is(notes_url: str) -> None:
    """The view of an ANALYZE or a build that is under way, held up by what its own expression does."""
    run(
        notes_url,
        "CREATE FUNCTION held(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
        "'BEGIN PERFORM pg_advisory_lock_shared(4711); PERFORM pg_advisory_unlock_shared(4711); RETURN $1; END'",
    )
    entry = support.table("low", "word")
    with support.application(notes_url) as holder, support.application(notes_url) as watcher:
        assert build_progress.under_way(watcher, [ENTRY, entry]) is None
        holder.execute("SELECT pg_advisory_lock(4711)")
        with support.Background(
            lambda: run(notes_url, "CREATE INDEX by_word ON low (held(word))")
        ) as building:
            support.until(lambda: build_progress.under_way(watcher, [ENTRY]) is not None, "it is seen")
            found = build_progress.under_way(watcher, [ENTRY])
            assert found is not None and "building index" in found[0]
            assert build_progress.under_way(watcher, [support.table("high", "word")]) is None
            holder.execute("SELECT pg_advisory_unlock(4711)")
            building.result()
        holder.execute("SELECT pg_advisory_lock(4711)")
        with support.Background(lambda: run(notes_url, "ANALYZE low")) as working:
            support.until(
                lambda: (
                    (found := build_progress.under_way(watcher, [ENTRY])) is not None
                    and found[0].startswith("low: ")
                ),
                "it is seen",
            )
            holder.execute("SELECT pg_advisory_unlock(4711)")
            working.result()


def test_words() -> None:
    assert build_progress.how_far(512, 2048, "rows") == ", 25% (512 of 2,048 rows)"
    assert build_progress.how_far(0, 0, "rows") == ""
