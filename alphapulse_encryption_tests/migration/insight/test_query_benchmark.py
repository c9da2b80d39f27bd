"""The query benchmark: asks what it says, of both sides where there are two, and writes nothing."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.jobs.validation import plot, report_lines
from alphapulse_encryption.errors import DecryptionError, RefusedError
from alphapulse_encryption.migration.insight.query_benchmark import QueryBenchmark, Timings, benchmark_queries
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After
from alphapulse_encryption_tests.migration.support import target

USERS = walk.CATALOGUE.table("users")
QUESTIONS = ["one row by key", "1,000 rows in key order", "one row by email"]
REPETITIONS = 12


def measure(url: str) -> QueryBenchmark:
    before = support.fingerprints(url, USERS)
    found = benchmark_queries(walk.target(url), USERS, repetitions=REPETITIONS)
    assert support.fingerprints(url, USERS) == before
    return found


def test_both_sides_while_both_are_there(sample_url: str) -> None:
    with pytest.raises(RefusedError, match="--add-columns"):
        measure(sample_url)
    walk.encrypt(sample_url, USERS)
    walk.query(sample_url, "SELECT pg_stat_statements_reset()")
    found = measure(sample_url)
    assert [(e.question, p is not None) for e, p in found.pairs()] == [(q, True) for q in QUESTIONS]
    assert {len(timings.seconds) for timings in found.timings} == {REPETITIONS}
    assert all(list(t.seconds) == sorted(t.seconds) and t.seconds[0] > 0 for t in found.timings)
    assert found.remarks == ()
    asked = lookups(sample_url)
    assert len(set(asked.values())) == 1 and min(asked.values()) >= REPETITIONS


def lookups(url: str) -> dict[str, int]:
    """How often the server was asked for an address on each side, and found a row each time."""
    asked = walk.query(
        url,
        'SELECT query, calls, rows FROM pg_stat_statements WHERE query LIKE \'SELECT "t"."email%%\' '
        "AND query NOT LIKE '%%::text%%' AND dbid = (SELECT oid FROM pg_database WHERE datname = current_database())",
    )
    by_email = {'"t"."email" =': 0, '"t"."email_search" =': 0}
    for query, calls, rows in asked:
        for condition in by_email:
            if condition in query:
                # A lookup that finds no row would measure nothing.
                assert calls == rows
                by_email[condition] += calls
    return by_email


def test_rows_of_an_older_key_version_are_found(after: After) -> None:
    url = after("encrypted")
    walk.query(url, "SELECT pg_stat_statements_reset()")
    keys = KeyRing({1: bytes(range(32)), 2: bytes(32)}, 2)
    begin_rotation(walk.target(url, keys=keys))
    cipher = get_format("AES-256-GCM", keys)
    benchmark_queries(target(url, keys=keys, cipher=cipher), USERS, repetitions=REPETITIONS)
    assert min(lookups(url).values()) >= REPETITIONS


def test_after_the_drop_one_side(approved_url: str) -> None:
    walk.drop(approved_url, USERS)
    found = measure(approved_url)
    assert [(e.question, p) for e, p in found.pairs()] == [(q, None) for q in QUESTIONS]
    assert "dropped" in found.remarks[0]
    text = "\n".join(report_lines([found]))
    assert "plaintext was dropped" in text and "encrypted" in text and "times the plaintext" not in text


def test_nothing_to_measure(sample_url: str) -> None:
    support.add_columns(sample_url, USERS, keys=walk.KEYS)
    found = measure(sample_url)
    assert found.timings == ()
    assert "nothing to measure" in found.remarks[0]
    assert plot([found]) == b""


def test_unreadable_values_are_named_and_not_measured(after: After) -> None:
    url = after("encrypted")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(support.BEHIND)
        connection.execute("UPDATE users SET email_encrypted = 'garbage'")
    with pytest.raises(DecryptionError) as failure:
        measure(url)
    assert "garbage" not in str(failure.value)


def test_a_slow_question_is_asked_for_so_long_only(after: After) -> None:
    url = after("encrypted")
    found = benchmark_queries(walk.target(url), USERS, seconds=0)
    assert {len(timings.seconds) for timings in found.timings} == {1}


def test_percentiles_are_times_that_were_measured() -> None:
    timings = Timings("users", "one row by key", "encrypted", tuple(n / 1000 for n in range(1, 201)))
    assert [timings.percentile(p) for p in (0, 50, 95, 99, 100)] == [0.001, 0.1, 0.19, 0.198, 0.2]
    plain = Timings("users", "one row by key", "plaintext", (0.05,))
    (question, encrypted, other, ratio) = report_lines([QueryBenchmark("users", (timings, plain), ())])
    assert question == "users: one row by key"
    assert encrypted.strip().startswith("encrypted ")
    assert encrypted.endswith(" p50 100.00 ms, p95 190.00 ms, p99 198.00 ms (200 times)")
    assert "p99 50.00 ms (1 times)" in other
    assert ratio.strip() == "2.00 times the plaintext's median"
    picture = plot([QueryBenchmark("users", (timings, plain), ())])
    assert picture.startswith(b"\x89PNG")


def test_a_composite_value_with_a_field_that_is_null_is_a_value(database_url: str) -> None:
    entry = support.table("places", support.searchable("at", "idx_places_at"))
    support.run(database_url, "CREATE TYPE place AS (street text, town text)")
    support.run(database_url, "CREATE TABLE places (id int PRIMARY KEY, at place)")
    support.run(
        database_url,
        "INSERT INTO places SELECT i, ROW('a' || i, NULL)::place FROM generate_series(1, 20) AS i",
    )
    support.encrypt(database_url, entry)
    found = benchmark_queries(target(database_url), entry, repetitions=REPETITIONS)
    assert [encrypted.question for encrypted, _ in found.pairs()][-1] == "one row by at"
