"""What statements on encrypted tables cost, as a real server has counted it; and that no value gets out of there."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
from psycopg.conninfo import make_conninfo

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.insight import slow_queries as module
from alphapulse_encryption.migration.insight.slow_queries import (
    SlowQueries,
    SlowQuery,
    slow_queries,
    snapshot,
    worse_than,
)
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

NOTES = support.table("notes", support.searchable("mail", "idx_mail"), "secret")
OTHERS = support.table("others", "word", schema="Other Schema")
CANARY = "canary-4711@example.com"


@pytest.fixture
def counted_url(database_url: str) -> str:
    """Two encrypted tables; what the steps asked is not counted any more."""
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text, plain text);"
        "INSERT INTO notes SELECT i, 'm' || i, 's' || i, 'p' FROM generate_series(1, 40) AS i;"
        'CREATE SCHEMA "Other Schema"; CREATE TABLE "Other Schema".others (id int PRIMARY KEY, word text);'
        "CREATE SCHEMA stats; CREATE EXTENSION pg_stat_statements SCHEMA stats",
    )
    for entry in (NOTES, OTHERS):
        support.encrypt(database_url, entry)
    build_search_indexes(Database(database_url), NOTES, ACTOR)
    create_views(Database(database_url), NOTES, ACTOR)
    run(database_url, "SELECT stats.pg_stat_statements_reset()")
    return database_url


def look(url: str) -> SlowQueries:
    return slow_queries(Database(url), [NOTES, OTHERS])


def of(found: SlowQueries, beginning: str) -> SlowQuery:
    (query,) = [q for q in found.queries if q.shown.startswith(beginning)]
    return query


def test_what_is_counted(counted_url: str) -> None:
    with support.application(counted_url) as application:
        for number in range(3):
            application.execute(
                f"SELECT secret_encrypted FROM notes WHERE mail_search = 't{number}'".encode()
            )
        application.execute("SELECT mail, pg_sleep(0.02) FROM v_notes LIMIT 2")
        application.execute('UPDATE "Other Schema".others SET word_encrypted = NULL WHERE id = 1')
        application.execute("SELECT count(*) FROM pg_class")
        told = dict(
            application.execute(
                "SELECT queryid::text, (calls, total_exec_time, max_exec_time, rows) FROM stats.pg_stat_statements"
            ).fetchall()
        )
    found = look(counted_url)
    slowest = found.queries[0]
    assert slowest.shown == "SELECT mail, pg_sleep($1) FROM v_notes LIMIT $2"
    assert slowest.tables == ("notes",)
    assert found.worst_mean_ms == slowest.mean_ms > 20
    asked = of(found, "SELECT secret_encrypted")
    assert asked.text == "SELECT secret_encrypted FROM notes WHERE mail_search = $1"
    assert (asked.calls, asked.rows, asked.roles) == (3, 0, ("postgres",))
    assert asked.columns == ("notes.mail_search", "notes.secret_encrypted")
    assert (asked.hints, asked.own) == ((), False)
    calls, total, longest, rows = told[asked.query_id]
    assert (int(calls), int(rows)) == (3, 0)
    assert asked.total_ms == pytest.approx(float(total))
    assert asked.max_ms == pytest.approx(float(longest))
    assert asked.mean_ms == pytest.approx(asked.total_ms / 3)
    assert of(found, "UPDATE").tables == ("Other Schema.others",)
    assert {query.tables for query in found.queries} == {("notes",), ("Other Schema.others",)}
    assert found.total_ms("Other Schema.others") == of(found, "UPDATE").total_ms
    assert found.since == support.value(counted_url, "SELECT stats_reset FROM stats.pg_stat_statements_info")
    assert (found.hidden, found.left_out, found.remarks) == (0, 0, ())
    only_others = slow_queries(Database(counted_url), [OTHERS])
    assert {query.tables for query in only_others.queries} == {("Other Schema.others",)}


def test_this_tools_own_statements_are_told_apart(counted_url: str) -> None:
    with support.application(counted_url) as application:
        application.execute("UPDATE notes SET mail = 'new'")
    support.backfill_all(counted_url, NOTES)
    support.verify(counted_url, NOTES)
    found = look(counted_url)
    assert [query.shown for query in found.queries] == ["UPDATE notes SET mail = $1"]
    assert any(
        query.shown.startswith('UPDATE "public"."notes" t SET "mail_encrypted"') for query in found.own
    )
    assert len(found.own) >= 2
    assert all(query.own and not query.hints for query in found.own)


def test_no_value_gets_out(counted_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By every way that pg_stat_statements is known to keep one, and by names and comments."""
    statements = [
        f"/* {CANARY} */ SELECT id FROM notes WHERE mail = '{CANARY}' -- {CANARY}",
        f"SELECT id FROM notes WHERE mail = $${CANARY}$$ /* by='{CANARY}' */",
        f"SELECT id AS \"{CANARY}\" FROM notes WHERE mail = E'{CANARY}' AND id = 4711 ORDER BY 1",
        f"CREATE TABLE copied AS SELECT * FROM notes WHERE mail = '{CANARY}'",
        f"PREPARE asked AS SELECT * FROM notes WHERE mail = '{CANARY}'",
        f"EXPLAIN SELECT * FROM notes WHERE mail = '{CANARY}'",
        f"COPY (SELECT * FROM notes WHERE mail = '{CANARY}') TO STDOUT",
        f"DO $$ BEGIN PERFORM id FROM notes WHERE mail = '{CANARY}'; END $$",
        f"SELECT set_config('a.b', '{CANARY}', false) FROM notes LIMIT 1",
    ]
    with support.application(counted_url) as application:
        application.execute("SET pg_stat_statements.track_utility TO on")
        application.execute("SET pg_stat_statements.track TO 'all'")
        for statement in statements:
            if statement.startswith("COPY"):
                with application.cursor().copy(statement.encode()) as copy:
                    assert list(copy) == []
            else:
                application.execute(statement.encode())
    kept = support.value(counted_url, "SELECT string_agg(query, ' ') FROM stats.pg_stat_statements")
    assert CANARY in kept  # the server itself does keep it
    found = look(counted_url)
    assert len(found.queries) >= 3
    assert CANARY not in repr(found) and "4711" not in repr(found)

    # What the server keeps where an entry was evicted between planning and end: the text as it came.
    monkeypatch.setattr(module, "_STATEMENTS", _UNMASKED)
    with support.application(counted_url) as application:
        application.execute("CREATE TABLE kept (query text)")
        application.execute("INSERT INTO kept SELECT unnest(%s::text[])", [statements])
        application.execute("INSERT INTO kept VALUES ('SELECT id FROM notes WHERE id = 47114711')")
    unmasked = look(counted_url)
    assert {query.text for query in unmasked.queries} == {None}
    assert CANARY not in repr(unmasked) and "4711" not in repr(unmasked)
    assert {
        query.shown.partition(" (text not shown: it may hold a value)")[0] for query in unmasked.queries
    } == {f"{kind} on notes" for kind in ("SELECT", "CREATE", "PREPARE", "EXPLAIN", "COPY")}


_UNMASKED = """
SELECT row_number() OVER ()::text, query, ARRAY['app'], 1::bigint, 2::float8, 3::float8, 4::bigint
  FROM public.kept, (SELECT FROM {view} LIMIT 1) AS s WHERE length(query) <= %s AND %s::text[] IS NOT NULL
"""


def hints(url: str, *statements: str) -> set[str]:
    run(url, "SELECT stats.pg_stat_statements_reset()")
    with support.application(url) as application:
        for statement in statements:
            application.execute(statement.encode())
    return {hint for query in look(url).queries for hint in query.hints}


def test_hints(counted_url: str) -> None:
    assert (
        hints(
            counted_url,
            "SELECT id FROM notes WHERE mail_search = 'x'",
            "SELECT id, mail FROM notes WHERE id = 1 ORDER BY plain",
            "SELECT id FROM notes WHERE mail = 'x' AND mail_search = 'y'",
            "SELECT mail FROM v_notes WHERE mail = 'x'",
            "UPDATE notes SET mail = 'x' WHERE id = 1",
            "SELECT id FROM notes WHERE secret IS NULL",
        )
        == set()
    )
    by_plaintext = (
        "SELECT n.id FROM notes n JOIN \"Other Schema\".others o USING (id) WHERE n.mail IN ('x', 'y')"
    )
    before = "which it will not find after the switch"
    assert hints(counted_url, by_plaintext) == {
        f"reads notes.mail by equality and not mail_search: the plaintext, {before}"
    }
    assert hints(counted_url, "DELETE FROM notes WHERE secret = 'x'") == {
        f"reads notes.secret by equality, the plaintext, {before}; it is not searchable: give it a search_index in "
        "the catalogue"
    }
    assert hints(counted_url, "SELECT id FROM notes WHERE secret LIKE 'x%' ORDER BY mail") == {
        f"sorts or filters by notes.secret, the plaintext, {before}",
        f"sorts or filters by notes.mail, the plaintext, {before}",
    }
    assert hints(counted_url, "SELECT id FROM notes WHERE mail_encrypted = 'x'") == {
        "compares notes.mail_encrypted, which is another text each time a value is encrypted and so equals nothing: "
        "ask mail_search for its token"
    }
    assert hints(counted_url, "SELECT id FROM notes ORDER BY secret_encrypted") == {
        "sorts or filters by the ciphertext of notes.secret_encrypted, which says nothing of its value"
    }
    run(counted_url, "UPDATE alphapulse_encryption.tables SET authority = 'ciphertext'")
    assert hints(counted_url, by_plaintext) == {
        "reads notes.mail by equality and not mail_search: the plaintext, which may be missing since the switch"
    }


def test_a_missing_index(counted_url: str) -> None:
    """Told only where the planner agrees: the plan is looked at."""
    asked = "SELECT id FROM notes WHERE mail_search = 'x'"
    run(
        counted_url,
        "INSERT INTO notes SELECT i, 'm', 's', 'p' FROM generate_series(100, 20000) AS i; ANALYZE notes",
    )
    assert hints(counted_url, asked) == set()
    assert "Index" in str(run(counted_url, "EXPLAIN " + asked))
    run(counted_url, "DROP INDEX idx_mail")
    (hint,) = hints(counted_url, asked)
    assert hint.startswith(
        "sequential scan expected: no index of notes begins with mail_search, and it has about "
    )
    assert "Seq Scan" in str(run(counted_url, "EXPLAIN " + asked))
    # Where another index may help, nothing is said.
    assert hints(counted_url, asked + " AND id = 7", asked + " OR id = 7", asked + " LIMIT 1") == {hint}
    assert hints(counted_url, asked + " AND id = 7", asked + " OR id = 7") == set()
    run(counted_url, "TRUNCATE notes; ANALYZE notes")
    assert hints(counted_url, asked) == set()


def test_not_installed(database_url: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"not installed.*shared_preload_libraries.*CREATE EXTENSION"
    ):
        look(database_url)


@pytest.fixture
def stranger_url(counted_url: str) -> Iterator[str]:
    run(counted_url, "CREATE ROLE stranger LOGIN")
    yield make_conninfo(counted_url, user="stranger")
    run(counted_url, "DROP OWNED BY stranger; DROP ROLE stranger")


def test_another_role(counted_url: str, stranger_url: str) -> None:
    with support.application(counted_url) as application:
        application.execute("SELECT mail FROM notes WHERE id = 1")
    with pytest.raises(
        RefusedError, match=r"may not read stats\.pg_stat_statements.*GRANT USAGE ON SCHEMA stats"
    ):
        look(stranger_url)
    run(counted_url, "GRANT USAGE ON SCHEMA stats TO stranger")
    found = look(stranger_url)
    assert (found.queries, found.since is None) == ((), False)
    assert found.hidden > 0
    assert found.remarks == (
        f"{found.hidden} statements of other roles cannot be seen: GRANT pg_read_all_stats TO this role.",
    )
    run(counted_url, "GRANT pg_read_all_stats TO stranger")
    found = look(stranger_url)
    assert of(found, "SELECT mail").roles == ("postgres",)
    assert (found.hidden, found.remarks) == (0, ())


def query(number: int, calls: int, total_ms: float) -> SlowQuery:
    return SlowQuery(
        str(number), "SELECT $1", ("app",), ("notes",), (), False, calls, total_ms, total_ms / calls, 9.0, 1
    )


def report(*queries: SlowQuery) -> SlowQueries:
    return SlowQueries(None, queries, (), 0, 0)


def test_compared_with_the_last_time() -> None:
    before = snapshot(
        report(
            query(1, 100, 100.0),
            query(2, 100, 100.0),
            query(3, 5, 5.0),
            query(4, 100, 100.0),
            query(6, 50, 1.0),
        )
    )
    now = report(
        query(1, 200, 600.0),  # 5 ms since, 1 ms before
        query(2, 200, 210.0),  # about as before
        query(3, 100, 5000.0),  # too seldom before
        query(4, 50, 500.0),  # began anew: 10 ms
        query(5, 100, 5000.0),  # new
        query(6, 100, 3.0),  # 0.04 ms instead of 0.02
    )
    worse = worse_than(now, before)
    assert [(w.query.query_id, w.before_ms, w.now_ms, w.calls) for w in worse] == [
        ("4", 1.0, 10.0, 50),
        ("1", 1.0, 5.0, 100),
    ]
    assert str(worse[1]) == "worse than last time: 5.0 ms in 100 calls since, 1.0 ms before: SELECT $1"
    assert worse_than(now, {}) == ()


def test_a_long_text_is_cut() -> None:
    long = dataclasses.replace(query(1, 1, 1.0), text="SELECT " + "a, " * 2000)
    assert len(long.shown) < 2_100 and long.shown.endswith(" …")
