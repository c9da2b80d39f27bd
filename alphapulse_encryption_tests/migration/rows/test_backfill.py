"""The backfill: what it writes, that it can be killed and repeated, and that no write of the application is lost."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg import sql as pg

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres import database
from alphapulse_encryption.migration.postgres.database import SAFETY_SETTINGS, Database
from alphapulse_encryption.migration.rows import batches
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.batches import BATCH_BYTES, plan_by_key, read_texts
from alphapulse_encryption.migration.rows.engine import Pace, Progress, RangeResult, RowsQuarantined
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import OTHER_KEYS, run, target

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
CANARY = "canary-7f3a"


def make(url: str, rows: int, ranges: int = 1) -> str:
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, other int DEFAULT 0)")
    run(
        url,
        "INSERT INTO notes SELECT i, 'm' || i, CASE WHEN i % 10 = 0 THEN NULL ELSE i * 0.10 END "
        f"FROM generate_series(1, {rows}) AS i",
    )
    support.add_columns(url, ENTRY, ranges=ranges)
    return url


def ranges(url: str) -> list[support.Row]:
    return run(
        url,
        "SELECT batch_range, status, position, rows_processed FROM alphapulse_encryption.ranges ORDER BY 1",
    )


def encrypted_rows(url: str) -> int:
    return int(support.value(url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL"))


# The text form

# A column of every kind of type, and what PostgreSQL writes of these values under the design's settings.
KINDS = [
    ("timestamptz", "2024-03-31 01:59:59.123456+00", "2024-03-31 01:59:59.123456+00"),
    ("timestamp", "2024-12-01 23:00:00", "2024-12-01 23:00:00"),
    ("date", "2024-12-01", "2024-12-01"),
    ("timetz", "12:30:00+05:45", "12:30:00+05:45"),
    ("interval", "1 year 2 mons 3 days -04:05:06.7", "1 year 2 mons 3 days -04:05:06.7"),
    ("bytea", "\\x00ff5c27", "\\x00ff5c27"),
    ("float8", "0.30000000000000004", "0.30000000000000004"),
    ("float4", "1.1", "1.1"),
    ("boolean", "t", "true"),
    ("char(6)", "ab", "ab"),
    ("varchar(9)", " ab ", " ab "),
    ("uuid", "A0EEBC99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
    ("numeric(12, 4)", "1.5", "1.5000"),
    ("bigint", "-9223372036854775808", "-9223372036854775808"),
    ("text[]", '{a,NULL,"NULL","",  "q\\"\\\\"}', '{a,NULL,"NULL","","q\\"\\\\"}'),
    ("timestamptz[]", '{"2024-01-01 00:00+02"}', '{"2023-12-31 22:00:00+00"}'),
    ("float8[]", "{0.1,NaN,-0}", "{0.1,NaN,-0}"),
    ("json", ' {"b": 1,"a":1.0 } ', ' {"b": 1,"a":1.0 } '),
    ("jsonb", '{"b": 1,"a":1.0 }', '{"a": 1.0, "b": 1}'),
    ("inet", "10.1.2.3", "10.1.2.3/32"),
    ("public.mood", "so so", "so so"),
    ("public.whole", "42", "42"),
    ("public.pair", '(1,"2024-12-01 00:00+00")', '(1,"2024-12-01 00:00:00+00")'),
    # IS NOT NULL is false of the first two, and IS NULL is true of the second.
    ("public.pair", "(1,)", "(1,)"),
    ("public.pair", "(,)", "(,)"),
    ("int4range", "[1,3]", "[1,4)"),
    ("tstzrange", "[2024-01-01 00:00+02,)", '["2023-12-31 22:00:00+00",)'),
    ("tsvector", "b a:1", "'a':1 'b'"),
    ("bit varying", "0101", "0101"),
]


def test_text_form_does_not_depend_on_the_settings(database_url: str) -> None:
    for statement in (
        "CREATE TYPE mood AS ENUM ('so so', 'fine')",
        "CREATE DOMAIN whole AS numeric CHECK (value = trunc(value))",
        "CREATE TYPE pair AS (n int, t timestamptz)",
        "CREATE TABLE kinds (id timestamptz PRIMARY KEY, "
        + ", ".join(f"c{number} {kind}" for number, (kind, _, _) in enumerate(KINDS))
        + ")",
    ):
        run(database_url, statement)
    placeholders = ", ".join(f"%s::text::{kind}" for kind, _, _ in KINDS)
    run(
        database_url,
        f"INSERT INTO kinds VALUES ('2024-05-01Z', {placeholders})",
        *[text for _, text, _ in KINDS],
    )
    run(database_url, "INSERT INTO kinds VALUES ('2024-05-02Z')")
    entry = support.table("kinds", *[f"c{number}" for number in range(len(KINDS))])
    support.with_settings(database_url, support.STRANGE_SETTINGS)

    support.encrypt(database_url, entry)
    first = ("2024-05-01 00:00:00+00",)
    envelopes = [support.texts(database_url, entry, c.encrypted)[first] for c in entry.columns]
    decrypted = [support.opened(envelope or "", "test_context") for envelope in envelopes]
    assert decrypted == [expected for _, _, expected in KINDS]
    assert support.assert_encrypted(database_url, entry) == len(KINDS)  # all NULL in the other row
    assert support.verify(database_url, entry).passed


# What it does to rows, and what not


def test_null_stays_null_and_empty_is_a_value(database_url: str) -> None:
    make(database_url, 10)
    run(database_url, "UPDATE notes SET mail = NULL, secret = NULL WHERE id = 1")
    run(database_url, "UPDATE notes SET mail = '' WHERE id = 2")
    result = support.backfill(database_url, ENTRY)
    assert (result.rows, result.values) == (9, 9 + 8)
    assert run(
        database_url, "SELECT mail_encrypted, mail_search, secret_encrypted FROM notes WHERE id = 1"
    ) == [(None, None, None)]
    envelope, token = run(database_url, "SELECT mail_encrypted, mail_search FROM notes WHERE id = 2")[0]
    assert support.opened(envelope, "test_search") == ""
    assert token == support.token("", "test_search")
    support.assert_encrypted(database_url, ENTRY)


def test_second_run_writes_no_row(database_url: str) -> None:
    make(database_url, 300, ranges=3)
    support.backfill_all(database_url, ENTRY)
    before = support.fingerprints(database_url, ENTRY)
    bookkeeping = run(
        database_url, "SELECT xmin::text, * FROM alphapulse_encryption.ranges ORDER BY batch_range"
    )
    results = support.backfill_all(database_url, ENTRY)
    assert [(r.rows, r.values, r.batches, r.changed) for r in results] == [(0, 0, 0, False)] * 3
    assert support.fingerprints(database_url, ENTRY) == before
    assert (
        run(database_url, "SELECT xmin::text, * FROM alphapulse_encryption.ranges ORDER BY batch_range")
        == bookkeeping
    )


def test_only_what_is_pending_is_written(database_url: str) -> None:
    make(database_url, 200)
    support.backfill_all(database_url, ENTRY)
    before = support.fingerprints(database_url, ENTRY)
    kept = support.texts(database_url, ENTRY, "mail_encrypted")
    run(database_url, "UPDATE notes SET secret = 7.70 WHERE id IN (3, 150)")
    run(database_url, "INSERT INTO notes (id, mail) VALUES (1000, 'late')")
    result = support.backfill(database_url, ENTRY)
    assert (result.rows, result.values) == (3, 3)
    after = support.fingerprints(database_url, ENTRY)
    assert {key for key in after if after[key] != before.get(key)} == {("3",), ("150",), ("1000",)}
    # The other column of a row that is written is not encrypted anew.
    assert support.texts(database_url, ENTRY, "mail_encrypted")["3",] == kept["3",]
    support.assert_encrypted(database_url, ENTRY)


def test_a_missing_token_alone_is_pending(database_url: str) -> None:
    make(database_url, 5)
    support.backfill_all(database_url, ENTRY)
    with support.application(database_url) as connection:
        connection.execute(support.BEHIND)
        connection.execute("UPDATE notes SET mail_search = NULL WHERE id = 2")
    assert support.backfill(database_url, ENTRY).rows == 1
    support.assert_encrypted(database_url, ENTRY)


@pytest.mark.parametrize(("size", "expected"), [(1, 25), (10, 3), (25, 1), (1000, 1)])
def test_batch_size_is_kept(database_url: str, size: int, expected: int) -> None:
    make(database_url, 25)
    reports: list[Progress] = []
    result = backfill_range(target(database_url), ENTRY, 0, pace=Pace(size), on_progress=reports.append)
    assert result.batches == expected
    assert [report.rows for report in reports] == [min(25, (n + 1) * size) for n in range(expected)]
    # One transaction each: that many different xmin.
    assert support.value(database_url, "SELECT count(DISTINCT xmin::text) FROM notes") == expected
    support.assert_encrypted(database_url, ENTRY)


def test_large_values_make_small_batches(database_url: str) -> None:
    make(database_url, 0)
    run(database_url, "INSERT INTO notes SELECT i, 'm', NULL FROM generate_series(1, 200) AS i")
    entry = support.table("notes", "document")
    run(database_url, "ALTER TABLE notes ADD document text")
    support.add_columns(database_url, entry)
    run(database_url, "UPDATE notes SET document = repeat('x', 100000)")
    with Database(database_url).session("read") as connection:
        definition = read_table(connection, entry)
        query = sql.select_wanted(definition, sql.EVERYTHING, sql.pending_cells(definition))
        read = read_texts(connection, query, [], 10_000)
        assert 50 <= len(read[0]) < 100
        assert sum(len(value or "") for column in read for value in column) < 1.2 * BATCH_BYTES
        assert len(read_texts(connection, query, [], 20)[0]) == 20
        small_one = read_table(connection, ENTRY)
        small = sql.select_wanted(small_one, sql.EVERYTHING, sql.pending_cells(small_one))
        assert len(read_texts(connection, small, [], 10_000)[0]) == 200
    result = support.backfill(database_url, entry, batch_size=10_000)
    assert result.rows == 200
    assert result.batches >= 200 * 100_000 // BATCH_BYTES
    support.assert_encrypted(database_url, entry)


def test_progress_is_seen_while_it_runs(database_url: str) -> None:
    make(database_url, 100, ranges=2)
    seen: list[support.Row] = []

    def look(_: Progress) -> None:
        seen.append(
            run(
                database_url,
                "SELECT status, started_at IS NOT NULL, completed_at, records_processed, error_message "
                "FROM encryption_migrations WHERE column_name = 'mail'",
            )[0]
        )

    for number in (0, 1):
        backfill_range(target(database_url), ENTRY, number, pace=Pace(10), on_progress=look)
    assert seen == [("in_progress", True, None, (n + 1) * 10, None) for n in range(10)]
    done = run(
        database_url,
        "SELECT column_name, status, completed_at >= started_at, records_processed FROM encryption_migrations "
        "ORDER BY 1",
    )
    assert done == [("mail", "completed", True, 100), ("secret", "completed", True, 90)]


# Refusals and failures


def test_wrong_key_is_refused_before_anything_is_written(database_url: str) -> None:
    make(database_url, 20)
    before = support.fingerprints(database_url, ENTRY)
    bookkeeping = run(database_url, "SELECT xmin::text, * FROM alphapulse_encryption.ranges")
    with pytest.raises(RefusedError, match="not the one this database was begun with"):
        backfill_range(target(database_url, keys=OTHER_KEYS), ENTRY, 0)
    assert support.fingerprints(database_url, ENTRY) == before
    assert run(database_url, "SELECT xmin::text, * FROM alphapulse_encryption.ranges") == bookkeeping


# Of a check, of a trigger that names no code, and of one with a code of its own.
@pytest.mark.parametrize("code", ["23514", "P0001", "AP001", "45000"])
def test_a_row_the_server_refuses_is_set_aside_and_the_others_go_on(database_url: str, code: str) -> None:
    make(database_url, 30)
    run(
        database_url,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$BEGIN RAISE EXCEPTION '{CANARY} %', NEW.mail USING ERRCODE = '{code}'; END$$",
    )
    run(
        database_url,
        "CREATE TRIGGER refuse BEFORE UPDATE ON notes FOR EACH ROW WHEN (OLD.id IN (7, 25)) "
        "EXECUTE FUNCTION refuse(); ALTER TABLE notes ENABLE ALWAYS TRIGGER refuse",
    )
    with pytest.raises(
        RowsQuarantined, match=rf"range 00 .*: 2; .*key \(7\): .*{code}.*key \(25\)"
    ) as caught:
        support.backfill(database_url, ENTRY, batch_size=10)
    assert encrypted_rows(database_url) == 28
    assert run(database_url, "SELECT key FROM alphapulse_encryption.quarantine ORDER BY key") == [
        (["25"],),
        (["7"],),
    ]
    assert run(database_url, "SELECT DISTINCT status FROM encryption_migrations") == [("failed",)]
    told = [
        str(caught.value),
        *[str(row) for row in run(database_url, "SELECT * FROM alphapulse_encryption.ranges")],
        *[str(row) for row in run(database_url, "SELECT * FROM encryption_migrations")],
        *[str(row) for row in run(database_url, "SELECT * FROM alphapulse_encryption.quarantine")],
    ]
    assert not [text for text in told if CANARY in text or "m25" in text]
    run(database_url, "DROP TRIGGER refuse ON notes")
    assert support.backfill(database_url, ENTRY, batch_size=10).rows == 2
    support.assert_encrypted(database_url, ENTRY)
    assert run(database_url, "SELECT * FROM alphapulse_encryption.quarantine") == []
    assert run(database_url, "SELECT DISTINCT status, error_message FROM encryption_migrations") == [
        ("completed", None)
    ]


def test_a_value_that_cannot_be_read_is_set_aside(postgres: EmbeddedPostgres) -> None:
    """In a database without an encoding a text may be no text at all."""
    with fresh(postgres, "SQL_ASCII") as url:
        make(url, 30)
        run(url, "UPDATE notes SET mail = convert_from('\\xff', 'SQL_ASCII') WHERE id = 13")
        with pytest.raises(RowsQuarantined, match=r"key \(13\): its values cannot be read"):
            support.backfill(url, ENTRY, batch_size=8)
        assert encrypted_rows(url) == 29
        run(url, "UPDATE notes SET mail = 'readable' WHERE id = 13")
        assert support.backfill(url, ENTRY).rows == 1
        assert encrypted_rows(url) == 30


# A type's own cast to text gives up, and storage is damaged.
@pytest.mark.parametrize("code", ["P0001", "22023", "AP001", "XX001"])
def test_values_whose_text_cannot_be_had_are_set_aside(database_url: str, code: str) -> None:
    """Fifteen of them, in two columns and under a key of two columns; the server tells of the first one it meets."""
    bad = {(str(i // 10), f"k{i % 10}") for i in (1, 2, 3, 4, 5, 17, 18, 20, 31, 40, 41, 47, 57, 58, 59)}
    run(database_url, "CREATE TYPE delicate AS (value text)")
    run(
        database_url,
        "CREATE FUNCTION delicate_text(delicate) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$BEGIN "
        f"IF $1.value LIKE '{CANARY}%' THEN RAISE EXCEPTION '%', $1.value USING ERRCODE = '{code}'; END IF; "
        "RETURN $1.value; END$$",
    )
    run(database_url, "CREATE CAST (delicate AS text) WITH FUNCTION delicate_text(delicate)")
    run(database_url, "CREATE TABLE fragile (a int, b text, one delicate, two delicate, PRIMARY KEY (a, b))")
    run(
        database_url,
        "INSERT INTO fragile SELECT i / 10, 'k' || i % 10, ROW('one ' || i)::delicate, ROW('two ' || i)::delicate "
        "FROM generate_series(0, 59) AS i",
    )
    entry = support.table("fragile", "one", "two")
    support.add_columns(database_url, entry)
    keys = ", ".join(f"({a}, '{b}')" for a, b in sorted(bad))
    for column, remainder in (("one", 0), ("two", 1)):
        run(
            database_url,
            f"UPDATE fragile SET {column} = ROW('{CANARY}') WHERE (a, b) IN ({keys}) AND a % 2 = {remainder}",
        )
    with pytest.raises(
        RowsQuarantined, match=r": 15; .*key \(0, k1\): its values cannot be read .* 5 more"
    ) as caught:
        support.backfill(database_url, entry, batch_size=16)
    found = run(database_url, "SELECT key, reason FROM alphapulse_encryption.quarantine")
    assert {tuple(key) for key, _ in found} == bad
    assert all(code in reason for _, reason in found)
    assert CANARY not in str(caught.value) + str(found)
    left = "SELECT a::text, b FROM fragile WHERE one_encrypted IS NULL AND two_encrypted IS NULL"
    assert set(run(database_url, left)) == bad
    run(database_url, f"DELETE FROM fragile WHERE (a, b) IN ({keys})")
    assert support.assert_encrypted(database_url, entry) == 2 * 45
    assert support.backfill(database_url, entry).rows == 0
    assert run(database_url, "SELECT * FROM alphapulse_encryption.quarantine") == []


@contextlib.contextmanager
def fresh(postgres: EmbeddedPostgres, encoding: str) -> Iterator[str]:
    name = f"test_{encoding.lower()}"
    run(
        postgres.url("postgres"),
        f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'",
    )
    try:
        yield postgres.url(name)
    finally:
        run(postgres.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


def test_rows_that_are_held_for_long_are_left_for_later(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others do not wait for them."""
    monkeypatch.setitem(SAFETY_SETTINGS, "lock_timeout", "100ms")
    make(database_url, 30)
    with support.application(database_url, autocommit=False) as application:
        application.execute("SELECT FROM notes WHERE id IN (3, 17) FOR UPDATE")
        result = support.backfill(database_url, ENTRY, batch_size=10)
        assert (result.rows, len(result.left)) == (28, 2)
        assert encrypted_rows(database_url) == 28
        application.rollback()
    assert support.backfill(database_url, ENTRY).rows == 2
    support.assert_encrypted(database_url, ENTRY)


def test_two_processes_on_one_range(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is turned away, also when asked again; another range is free."""
    monkeypatch.setattr("alphapulse_encryption.migration.rows.engine.TRIES", 2)
    make(database_url, 20, ranges=2)
    with support.application(database_url, autocommit=False) as application:
        application.execute("SELECT FROM notes WHERE id = 1 FOR UPDATE")
        with support.Background(lambda: support.backfill(database_url, ENTRY, 0)) as first:
            support.until(lambda: support.engine_waits(database_url, "UPDATE%"), "the first one waits")
            with pytest.raises(RefusedError, match="range 00 of notes is being worked on by another process"):
                support.backfill(database_url, ENTRY, 0)
            assert support.backfill(database_url, ENTRY, 1).rows == 10
            assert ranges(database_url)[0][1] == "in_progress"
            application.rollback()
            assert first.result().rows == 10
    support.assert_encrypted(database_url, ENTRY)


# Other transactions


@pytest.mark.parametrize(
    ("write", "left_alone"),
    [
        ("UPDATE notes SET mail = 'new' WHERE id = 2", 1),
        ("UPDATE notes SET mail = NULL WHERE id = 2", 1),
        ("UPDATE notes SET other = 1 WHERE id = 2", 1),
        ("DELETE FROM notes WHERE id = 2", 1),
        ("DELETE FROM notes WHERE id = 2; INSERT INTO notes (id, mail) VALUES (2, 'new')", 1),
        ("SELECT FROM notes WHERE id = 2 FOR UPDATE", 0),
    ],
)
def test_a_row_that_changes_between_reading_and_writing(
    database_url: str, write: str, left_alone: int
) -> None:
    """The backfill has read and encrypted the old value and waits; the new one is committed before it writes."""
    make(database_url, 3)
    with support.application(database_url, autocommit=False) as application:
        for statement in write.split(";"):
            application.execute(statement.encode())
        with support.Background(lambda: support.backfill(database_url, ENTRY)) as filling:
            support.until(
                lambda: support.engine_waits(database_url, "UPDATE%"), "the engine waits for the row"
            )
            application.commit()
            result: RangeResult = filling.result()
    assert result.changed_meanwhile == left_alone
    assert result.left == ()
    support.assert_encrypted(database_url, ENTRY)
    counted: dict[str, int] = dict(
        run(database_url, "SELECT column_name, records_processed FROM encryption_migrations")
    )
    there = run(database_url, "SELECT count(mail), count(secret) FROM notes")[0]
    assert (counted["mail"], counted["secret"]) == there


def test_a_write_that_is_rolled_back_changes_nothing(database_url: str) -> None:
    make(database_url, 3)
    with support.application(database_url, autocommit=False) as application:
        application.execute("UPDATE notes SET mail = 'never' WHERE id = 2")
        with support.Background(lambda: support.backfill(database_url, ENTRY)) as filling:
            support.until(
                lambda: support.engine_waits(database_url, "UPDATE%"), "the engine waits for the row"
            )
            application.rollback()
            assert filling.result().changed_meanwhile == 0
    support.assert_encrypted(database_url, ENTRY)


def test_deadlock_is_tried_again(database_url: str) -> None:
    make(database_url, 3)
    with support.application(database_url, autocommit=False) as application:
        # The engine is the one to find the deadlock, so the one to be turned back.
        application.execute("SET deadlock_timeout TO '10min'")
        application.execute("UPDATE notes SET other = 1 WHERE id = 3")
        with support.Background(lambda: support.backfill(database_url, ENTRY)) as filling:
            support.until(
                lambda: support.engine_waits(database_url, "UPDATE%"), "the engine waits for the row"
            )
            application.execute("UPDATE notes SET mail = 'new' WHERE id = 1")  # the engine holds it
            application.commit()
            filling.result()
    assert support.value(
        database_url, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    )
    support.assert_encrypted(database_url, ENTRY)
    assert run(database_url, "SELECT mail, other FROM notes WHERE id IN (1, 3) ORDER BY id") == [
        ("new", 0),
        ("m3", 1),
    ]


def test_deadlock_of_two_ranges_is_tried_again(database_url: str) -> None:
    """A trigger of the application has one range lock one thing after another, and the other one crosswise."""
    make(database_url, 4, ranges=2)
    support.with_settings(database_url, {"deadlock_timeout": "50ms"})
    run(
        database_url,
        "CREATE FUNCTION cross() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN "
        "PERFORM pg_advisory_xact_lock(CASE WHEN NEW.id IN (1, 4) THEN 1 ELSE 2 END); "
        "PERFORM pg_advisory_xact_lock_shared(3); RETURN NEW; END$$",
    )
    run(database_url, "CREATE TRIGGER across BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION cross()")
    run(database_url, "ALTER TABLE notes ENABLE ALWAYS TRIGGER across")
    at_the_gate = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND objid = 3 AND NOT granted"
    with support.application(database_url) as gate:
        gate.execute("SELECT pg_advisory_lock(3)")
        with (
            support.Background(lambda: support.backfill(database_url, ENTRY, 0)) as lower,
            support.Background(lambda: support.backfill(database_url, ENTRY, 1)) as upper,
        ):
            support.until(lambda: support.value(database_url, at_the_gate) == 2, "both have their first lock")
            gate.execute("SELECT pg_advisory_unlock(3)")
            assert [lower.result().rows, upper.result().rows] == [2, 2]
    deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    support.until(lambda: support.value(database_url, deadlocks) == 1, "the server tells of the deadlock")
    assert ranges(database_url) == [(0, "completed", None, 2), (1, "completed", None, 2)]
    support.assert_encrypted(database_url, ENTRY)


def test_lock_timeout_is_tried_again(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(database.SAFETY_SETTINGS, "lock_timeout", "30ms")
    make(database_url, 3)
    with support.application(database_url, autocommit=False) as application:
        application.execute("SELECT 1 FROM notes WHERE id = 2 FOR UPDATE")
        with support.Background(lambda: support.backfill(database_url, ENTRY)) as filling:
            support.until(
                lambda: support.engine_waits(database_url, "UPDATE%"), "the engine waits for the row"
            )
            support.until(lambda: not support.engine_waits(database_url), "the engine gave up waiting")
            assert filling.running
            application.rollback()
            assert filling.result().rows == 3
    support.assert_encrypted(database_url, ENTRY)


def test_lost_connection_is_made_again(database_url: str) -> None:
    make(database_url, 40)
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if progress.rows == 20 and not killed:
            killed.append(1)
            support.run(
                database_url,
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'alphapulse_encryption'",
            )

    result = backfill_range(target(database_url), ENTRY, 0, pace=Pace(10), on_progress=kill)
    assert killed
    assert (result.rows, result.resumed) == (40, True)
    assert ranges(database_url) == [(0, "completed", None, 40)]
    support.assert_encrypted(database_url, ENTRY)


def test_application_writes_all_the_while(database_url: str) -> None:
    """Each thread owns its keys and remembers what it wrote last: nothing of it may be missing."""
    make(database_url, 2_000, ranges=2)
    stop = threading.Event()
    wanted: dict[int, str | None] = {i: f"m{i}" for i in range(1, 2_001)}

    def write(share: int) -> int:
        chance = random.Random(share)
        writes = 0
        with support.application(database_url) as connection:
            while not stop.is_set() or writes < 50:
                key = chance.randrange(1, 2_500) // 3 * 3 + share
                mail = chance.choice([None, "", f"new {writes}", f"NEW {writes}"])
                if key not in wanted:
                    connection.execute("INSERT INTO notes (id, mail) VALUES (%s, %s)", [key, mail])
                    wanted[key] = mail
                elif chance.random() < 0.2:
                    connection.execute("DELETE FROM notes WHERE id = %s", [key])
                    del wanted[key]
                else:
                    connection.execute("UPDATE notes SET mail = %s WHERE id = %s", [mail, key])
                    wanted[key] = mail
                writes += 1
        return writes

    def fill(number: int) -> Any:
        return support.backfill(database_url, ENTRY, number, batch_size=40)

    with (
        support.Background(lambda: write(0)) as zero,
        support.Background(lambda: write(1)) as one,
        support.Background(lambda: write(2)) as two,
    ):
        try:
            with support.Background(lambda: fill(0)) as lower, support.Background(lambda: fill(1)) as upper:
                filled = [lower.result(), upper.result()]
        finally:
            stop.set()
        assert all(writer.result() >= 50 for writer in (zero, one, two))
    assert sum(result.rows for result in filled) > 1_000
    support.backfill_all(database_url, ENTRY)
    support.assert_encrypted(database_url, ENTRY)
    mails = support.texts(database_url, ENTRY, "mail")
    assert {int(str(key)): mail for (key,), mail in mails.items()} == wanted
    assert support.verify(database_url, ENTRY).passed


# Killed

KILLED = """
import sys
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.rows import test_backfill
support.backfill(sys.argv[1], test_backfill.ENTRY, 0, batch_size=20)
"""


def test_killed_in_the_middle_it_goes_on(database_url: str) -> None:
    make(database_url, 6_000)
    process = subprocess.Popen([sys.executable, "-c", KILLED, database_url])
    try:
        support.until(lambda: ranges(database_url)[0][3] >= 200, "the first batches are committed")
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    sessions = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'alphapulse_encryption'"
    )
    support.until(lambda: support.value(database_url, sessions) == 0, "its sessions have ended")

    [(_, status, position, processed)] = ranges(database_url)
    assert status == "in_progress"
    assert 200 <= processed < 6_000
    # Position and counts were committed with the data they speak of.
    assert encrypted_rows(database_url) == processed
    assert support.value(database_url, "SELECT max(id) FROM notes WHERE mail_encrypted IS NOT NULL") == int(
        position[0]
    )
    migrated: dict[str, int] = dict(
        run(database_url, "SELECT column_name, records_processed FROM encryption_migrations")
    )
    assert migrated["mail"] == processed
    assert migrated["secret"] == support.value(database_url, "SELECT count(secret_encrypted) FROM notes")
    done = {
        k: f for k, f in support.fingerprints(database_url, ENTRY).items() if int(k[0]) <= int(position[0])
    }

    # Before the position, the application makes a value pending again.
    run(database_url, "UPDATE notes SET mail = 'changed' WHERE id = 1")
    result = support.backfill(database_url, ENTRY)
    assert result.resumed
    assert result.rows == 6_000 - processed + 1
    after = support.fingerprints(database_url, ENTRY)
    assert {k for k, f in done.items() if after[k] != f} == {("1",)}
    assert ranges(database_url) == [(0, "completed", None, 6_001)]
    support.assert_encrypted(database_url, ENTRY)


# Cost


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *[node for child in plan.get("Plans", ()) for node in nodes(child)]]


def explain(
    connection: support.Connection, query: pg.Composed, parameters: list[Any]
) -> list[dict[str, Any]]:
    """The nodes of a plan that was run, and undone."""
    with connection.transaction(force_rollback=True):
        connection.execute(database.MARK_AS_ENGINE)
        row = connection.execute(
            pg.SQL("EXPLAIN (ANALYZE, FORMAT JSON) {}").format(query), parameters
        ).fetchone()
    assert row is not None
    plan = row[0] if isinstance(row[0], list) else json.loads(row[0])
    return nodes(plan[0]["Plan"])


@pytest.mark.parametrize("key", ["id bigint", "a int, b text"])
@pytest.mark.parametrize("analysed", [False, True])
def test_a_batch_costs_what_a_batch_costs(database_url: str, key: str, analysed: bool) -> None:
    names = ", ".join(part.split()[0] for part in key.split(", "))
    columns = "i" if names == "id" else "i / 100, 'k' || lpad((i % 100)::text, 3, '0')"
    entry = support.table("large", support.searchable("mail", "idx_large_mail"), "secret")
    run(
        database_url,
        f"CREATE TABLE large ({key}, mail text, secret numeric, PRIMARY KEY ({names})) WITH (autovacuum_enabled = off)",
    )
    run(
        database_url,
        f"INSERT INTO large SELECT {columns}, 'mail ' || i, i FROM generate_series(1, 50000) AS i",
    )
    support.add_columns(database_url, entry)
    if analysed:
        run(database_url, "ANALYZE large")
    with Database(database_url).session("explain") as connection:
        plan_by_key(connection)
        definition = read_table(connection, entry)
        start = ("24000",) if names == "id" else ("240", "k000")
        condition, parameters = sql.within(definition, start, None)
        reading = sql.select_wanted(definition, condition, sql.pending_cells(definition))
        read = batches.read_texts(connection, reading, parameters, 500)
        assert len(read[0]) == 500
        arrays = read
        width = len(definition.key)
        mail, secret = arrays[width + 1 :]
        written = [*arrays[: width + 1], mail, mail, secret]
        bounds = [*batches.key_at(read, width, 0), *batches.key_at(read, width, -1)]
        verifying = sql.select_for_verification(definition, condition)
        for query, values, count in (
            (reading, [*parameters, 500], 500),
            (
                sql.update_rows(definition, sql.new_sides(definition, definition.plaintext_columns)),
                [*written, *bounds],
                500,
            ),
            (verifying, [*parameters, 500], 500),
        ):
            scans = [n for n in explain(connection, query, values) if n.get("Relation Name") == "large"]
            scans = [n for n in scans if n["Node Type"] != "ModifyTable"]
            assert scans
            for scan in scans:
                assert scan["Node Type"] in {"Index Scan", "Index Only Scan"}, scan
                assert scan["Index Name"] == "large_pkey"
                assert "Index Cond" in scan
                touched = (scan["Actual Rows"] + scan.get("Rows Removed by Filter", 0)) * scan["Actual Loops"]
                assert touched <= 2 * count, scan
