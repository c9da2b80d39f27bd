"""Batch ranges: every key belongs to exactly one, whatever the key, and they are about equally large."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from psycopg import sql

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.ranges import hold_plan
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import batch_ranges
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run


@dataclass(frozen=True)
class Shape:
    """A table: how it is made and filled, and the types of its key as a cast needs them."""

    entry: Table
    made_by: str
    key_types: tuple[str, ...]

    def make(self, url: str) -> None:
        for statement in self.made_by.split(";"):
            run(url, statement)


SHAPES = {
    "uuid": Shape(
        support.table("t", support.searchable("v", "idx_v")),
        "CREATE TABLE t (id uuid PRIMARY KEY, v text); INSERT INTO t SELECT md5(i::text)::uuid, 'v' || i "
        "FROM generate_series(1, 500) AS i",
        ("uuid",),
    ),
    "composite": Shape(
        support.table("t", "v", "w"),
        "CREATE TABLE t (b text, a int, v text, w numeric, PRIMARY KEY (a, b)); INSERT INTO t SELECT "
        "CASE i % 4 WHEN 0 THEN '' WHEN 1 THEN 'A,b' WHEN 2 THEN 'a\"}' ELSE 'Z\u00fc\\' END || i, i / 9, 'v' || i, "
        "i * 0.10 FROM generate_series(1, 500) AS i",
        ("int", "text"),
    ),
    "text": Shape(
        support.table("t", "v"),
        'CREATE TABLE t (id text COLLATE "pg_unicode_fast" PRIMARY KEY, v text); INSERT INTO t SELECT '
        "CASE i % 3 WHEN 0 THEN upper(md5(i::text)) WHEN 1 THEN md5(i::text) ELSE '\u00e4-' || i END, 'v' || i "
        "FROM generate_series(1, 500) AS i",
        ("text",),
    ),
    "timestamptz": Shape(
        support.table("t", "v"),
        "CREATE TABLE t (id timestamptz PRIMARY KEY, v text); INSERT INTO t SELECT "
        "timestamptz '2024-03-30 22:00Z' + i * interval '17 minutes 0.000001 seconds', 'v' || i "
        "FROM generate_series(1, 500) AS i; "
        "INSERT INTO t VALUES ('-infinity', 'first'), ('infinity', 'last'), ('0044-03-15 BC', 'ides')",
        ("timestamptz",),
    ),
    "numeric and char": Shape(
        support.table("t", "v"),
        "CREATE TABLE t (a numeric, b char(5), v text, PRIMARY KEY (a, b)); INSERT INTO t SELECT "
        "(i / 7) * 1.10, 'c' || i % 7, 'v' || i FROM generate_series(1, 500) AS i; "
        "INSERT INTO t VALUES ('NaN', '', 'n'), ('-Infinity', 'x', 'm')",
        ("numeric", "char(5)"),
    ),
    "float and date": Shape(
        support.table("t", "v"),
        "CREATE TABLE t (a float8, b date, v text, PRIMARY KEY (a, b)); INSERT INTO t SELECT "
        "(i / 5) * 0.1, date '2024-12-28' + i, 'v' || i FROM generate_series(1, 500) AS i; "
        "INSERT INTO t VALUES ('NaN', 'infinity', 'n'), (5e-324, '2024-01-01', 'm')",
        ("float8", "date"),
    ),
    "bytea and interval": Shape(
        support.table("t", "v"),
        "CREATE TABLE t (a bytea, b interval, v text, PRIMARY KEY (a, b)); INSERT INTO t SELECT "
        "decode(lpad(to_hex(i / 3), 4, '0'), 'hex'), i * interval '-1 hour 30 minutes', 'v' || i "
        "FROM generate_series(1, 500) AS i",
        ("bytea", "interval"),
    ),
    "enum, domain, array": Shape(
        support.table("t", "v"),
        "CREATE SCHEMA types; CREATE TYPE types.\"My Kind\" AS ENUM ('z', 'a', 'it''s'); "
        "CREATE DOMAIN types.short AS varchar(10) CHECK (length(value) < 9); "
        'CREATE TABLE t (a types."My Kind", b types.short, c int[], v text, PRIMARY KEY (a, b, c)); '
        "INSERT INTO t SELECT (ARRAY['z', 'a', 'it''s'])[1 + i % 3]::types.\"My Kind\", 'd' || i % 10, "
        "ARRAY[i % 5, i], 'v' || i FROM generate_series(1, 500) AS i",
        ('types."My Kind"', "types.short", "int[]"),
    ),
    "quoted names": Shape(
        support.table('Odd "Table" 100%s', 'My "Column" %(x)s', "It's {} \\ 5%", schema="My Schema"),
        'CREATE SCHEMA "My Schema"; CREATE TABLE "My Schema"."Odd ""Table"" 100%s" ("The Key %" bigint PRIMARY KEY, '
        '"My ""Column"" %(x)s" text, "It\'s {} \\ 5%" numeric NOT NULL); '
        'INSERT INTO "My Schema"."Odd ""Table"" 100%s" SELECT i, \'v\' || i, i FROM generate_series(1, 500) AS i',
        ("bigint",),
    ),
}
FEW = {
    "empty": "SELECT 1",
    "one row": "INSERT INTO t VALUES (7, 'v')",
    "fewer rows than ranges": "INSERT INTO t VALUES (3, 'v'), (5, 'w'), (900, NULL)",
    "as many rows as ranges": "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 8) AS i",
}
SMALL = support.table("t", "v")


def in_ranges(url: str, shape: Shape) -> dict[int, set[support.Row]]:
    """The keys in each range, by the bookkeeping's boundaries: above the lower one, up to the upper one."""
    found: dict[int, set[support.Row]] = {}
    with support.application(url) as connection:
        for name, text in support.DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, text])
        key = support.key_columns(connection, shape.entry)
        texts = sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(k)) for k in key)
        row = sql.SQL(", ").join(sql.Identifier(k) for k in key)
        for number, lower, upper in support.ask(
            connection,
            "SELECT batch_range, lower_key, upper_key FROM alphapulse_encryption.ranges WHERE table_name = %s",
            shape.entry.key,
        ):
            conditions: list[sql.Composable] = [sql.SQL("true")]
            for operator, bound in ((sql.SQL(">"), lower), (sql.SQL("<="), upper)):
                if bound is None:
                    continue
                if not bound:
                    conditions.append(sql.SQL("false"))
                    continue
                values = sql.SQL(", ").join(
                    sql.SQL("({}::{})").format(sql.Literal(text), sql.SQL(type_name))
                    for text, type_name in zip(bound, shape.key_types, strict=True)
                )
                conditions.append(sql.SQL("ROW({}) {} ROW({})").format(row, operator, values))
            rows = support.ask(
                connection,
                sql.SQL("SELECT {} FROM {} WHERE {}").format(
                    texts, support.name_of(shape.entry), sql.SQL(" AND ").join(conditions)
                ),
            )
            found[number] = set(rows)
            assert len(rows) == len(found[number])
    return found


def assert_partition(url: str, shape: Shape, ranges: int) -> list[int]:
    """Every key is in exactly one range.

    Returns:
        How many are in each.
    """
    keys = set(support.fingerprints(url, shape.entry))
    found = in_ranges(url, shape)
    assert set(found) == set(range(ranges))
    assert set().union(*found.values()) == {tuple(k) for k in all_keys(url, shape)}
    assert sum(map(len, found.values())) == len(keys)
    return [len(found[number]) for number in range(ranges)]


def all_keys(url: str, shape: Shape) -> set[support.Row]:
    return set(support.texts(url, shape.entry, shape.entry.columns[0].name))


@pytest.mark.parametrize("name", list(SHAPES))
def test_any_key(database_url: str, name: str) -> None:
    """Ranges, backfill in small batches, verification and views of a table of this shape."""
    shape = SHAPES[name]
    shape.make(database_url)
    support.add_columns(database_url, shape.entry, ranges=6)
    sizes = assert_partition(database_url, shape, 6)
    assert min(sizes) > 60
    results = support.backfill_all(database_url, shape.entry, batch_size=17)
    assert [result.rows for result in results] == sizes
    assert support.assert_encrypted(database_url, shape.entry) > 500 - 1
    before = support.fingerprints(database_url, shape.entry)
    assert not any(r.changed for r in support.backfill_all(database_url, shape.entry, batch_size=17))
    assert support.fingerprints(database_url, shape.entry) == before
    verified = support.verify(database_url, shape.entry)
    assert verified.passed
    assert verified.rows == sum(sizes)


def test_key_whose_order_is_not_that_of_its_bytes(database_url: str) -> None:
    """`a` before `B`, by operators that live in the schema of an extension."""
    run(database_url, "CREATE SCHEMA extra; CREATE EXTENSION citext SCHEMA extra")
    shape = Shape(
        support.table("t", "v"),
        "CREATE TABLE t (id extra.citext PRIMARY KEY, v text); INSERT INTO t SELECT CASE i % 2 "
        "WHEN 0 THEN upper(md5(i::text)) ELSE md5(i::text) END, 'v' FROM generate_series(1, 300) AS i",
        ("extra.citext",),
    )
    shape.make(database_url)
    support.add_columns(database_url, shape.entry, ranges=3)
    assert sum(r.rows for r in support.backfill_all(database_url, shape.entry, batch_size=17)) == 300
    assert support.assert_encrypted(database_url, shape.entry) == 300
    assert support.verify(database_url, shape.entry).rows == 300


@pytest.mark.parametrize("name", list(FEW))
def test_small_tables(database_url: str, name: str) -> None:
    """Rows that come later belong somewhere, too."""
    run(database_url, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    run(database_url, FEW[name])
    support.encrypt(database_url, SMALL, ranges=8)
    shape = Shape(SMALL, "", ("int",))
    assert_partition(database_url, shape, 8)
    support.assert_encrypted(database_url, SMALL)
    assert support.verify(database_url, SMALL).passed
    statuses = run(database_url, "SELECT DISTINCT status FROM alphapulse_encryption.ranges")
    assert statuses == [("completed",)]
    run(
        database_url,
        "INSERT INTO t SELECT i, 'later' FROM generate_series(-50, 2000, 50) AS i ON CONFLICT DO NOTHING",
    )
    assert_partition(database_url, shape, 8)
    support.backfill_all(database_url, SMALL)
    support.assert_encrypted(database_url, SMALL)
    assert support.verify(database_url, SMALL).rows == support.value(database_url, "SELECT count(*) FROM t")


def test_large_table_is_sampled_and_cut_evenly(database_url: str) -> None:
    """Filler makes it large: more pages than are read, in an order that has nothing to do with the key."""
    run(database_url, "CREATE TABLE t (id int PRIMARY KEY, v text, filler text STORAGE PLAIN)")
    run(
        database_url,
        "INSERT INTO t SELECT (i * 7919::bigint) % 20011, 'v', repeat('x', 3000) FROM generate_series(1, 9000) AS i",
    )
    pages = support.value(database_url, "SELECT pg_relation_size('t') / 8192")
    assert pages > 2 * batch_ranges.SAMPLED_PAGES
    assert support.value(database_url, "SELECT reltuples FROM pg_class WHERE relname = 't'") == -1
    support.add_columns(database_url, SMALL, ranges=8)
    sizes = assert_partition(database_url, Shape(SMALL, "", ("int",)), 8)
    assert min(sizes) > 9000 / 8 * 0.7
    assert max(sizes) < 9000 / 8 * 1.3


def test_ranges_stay_as_they_were_planned(database_url: str) -> None:
    run(database_url, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    run(database_url, "INSERT INTO t SELECT i, 'v' FROM generate_series(1, 100) AS i")
    support.add_columns(database_url, SMALL, ranges=4)
    before = run(database_url, "SELECT * FROM alphapulse_encryption.ranges ORDER BY batch_range")
    assert [entry[2:4] for entry in before] == [
        (None, ["25"]),
        (["25"], ["50"]),
        (["50"], ["75"]),
        (["75"], None),
    ]
    run(database_url, "INSERT INTO t SELECT i, 'v' FROM generate_series(101, 1000) AS i")
    support.add_columns(database_url, SMALL, ranges=4)
    assert run(database_url, "SELECT * FROM alphapulse_encryption.ranges ORDER BY batch_range") == before


# Planning anew.


def filled(url: str, rows: int = 100, ranges: int = 4) -> None:
    run(url, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    run(url, "INSERT INTO t SELECT i, 'v' || i FROM generate_series(1, %s) AS i", rows)
    support.add_columns(url, SMALL, ranges=ranges)


def replan(url: str, count: int) -> int:
    return batch_ranges.replan_ranges(Database(url), SMALL, ACTOR, count=count)


def bookkeeping(url: str) -> dict[str, list[support.Row]]:
    return {
        name: run(url, f"SELECT * FROM {name} ORDER BY 1, 2")
        for name in (
            "alphapulse_encryption.ranges",
            "encryption_migrations",
            "alphapulse_encryption.verifications",
            "alphapulse_encryption.audit_log",
        )
    }


@pytest.mark.parametrize("count", [1, 4, 7])
def test_planned_anew(database_url: str, count: int) -> None:
    filled(database_url)
    support.backfill_all(database_url, SMALL)
    build_search_indexes(Database(database_url), SMALL, ACTOR)
    run(database_url, "INSERT INTO t SELECT i, 'w' || i FROM generate_series(101, 1400) AS i")
    assert replan(database_url, count) == count
    sizes = assert_partition(database_url, Shape(SMALL, "", ("int",)), count)
    assert min(sizes) >= 1400 // count
    assert run(
        database_url, "SELECT DISTINCT status, rows_processed, position FROM alphapulse_encryption.ranges"
    ) == [("pending", 0, None)]
    assert run(database_url, "SELECT status, records_processed, completed_at FROM encryption_migrations") == [
        ("pending", 100, None)
    ]
    before = support.fingerprints(database_url, SMALL)
    results = support.backfill_all(database_url, SMALL)
    assert sum(result.rows for result in results) == 1300
    # What was encrypted before is not written again.
    after = support.fingerprints(database_url, SMALL)
    assert {key for key in before if before[key] == after[key]} == {(str(i),) for i in range(1, 101)}
    support.assert_encrypted(database_url, SMALL)
    assert run(database_url, "SELECT status, records_processed FROM encryption_migrations") == [
        ("completed", 1400)
    ]
    details = run(
        database_url,
        "SELECT actor, details FROM alphapulse_encryption.audit_log WHERE action = 'replan_ranges'",
    )
    assert details == [("tests", {"ranges": count, "before": 4})]
    # Other steps ask for as many from now on.
    support.add_columns(database_url, SMALL, ranges=count)


def test_half_done_and_planned_anew(database_url: str) -> None:
    """What an interrupted range had reached is not skipped: it may lie in another one now."""
    filled(database_url)
    support.backfill(database_url, SMALL, 2)
    run(
        database_url,
        "UPDATE alphapulse_encryption.ranges SET status = 'in_progress', position = '{10}' WHERE batch_range = 0",
    )
    run(database_url, "UPDATE t SET v = 'again' WHERE id = 60")
    replan(database_url, 4)
    assert sum(result.rows for result in support.backfill_all(database_url, SMALL)) == 76
    support.assert_encrypted(database_url, SMALL)


def test_verification_is_worth_nothing_afterwards(database_url: str) -> None:
    filled(database_url)
    support.backfill_all(database_url, SMALL)
    assert support.verify(database_url, SMALL).passed
    replan(database_url, 4)
    assert run(database_url, "SELECT * FROM alphapulse_encryption.verifications") == []
    assert not support.verification(database_url, SMALL).passed
    assert support.verify(database_url, SMALL).passed


@pytest.mark.parametrize("number", [0, 3])
def test_not_while_a_range_is_worked_on(database_url: str, number: int) -> None:
    """The batch of the range waits for the application meanwhile."""
    filled(database_url)
    with support.application(database_url, autocommit=False) as slow:
        slow.execute("LOCK TABLE encryption_migrations IN ROW EXCLUSIVE MODE")
        slow.execute("SELECT FROM encryption_migrations FOR UPDATE")
        with support.Background(lambda: support.backfill(database_url, SMALL, number)) as working:
            support.until(lambda: support.engine_waits(database_url, behind=slow), "it works on the range")
            before = bookkeeping(database_url)
            for count in (2, 4, 9):
                with pytest.raises(RefusedError, match="are being worked on"):
                    replan(database_url, count)
            assert bookkeeping(database_url) == before
            slow.commit()
            assert working.result().rows == 25
    assert replan(database_url, 2) == 2


def test_not_while_somebody_relies_on_the_boundaries(database_url: str) -> None:
    filled(database_url)
    with Database(database_url).session("hold") as connection:
        hold_plan(connection, SMALL)
        with Database(database_url).session("hold, too") as another:
            hold_plan(another, SMALL)
        with pytest.raises(RefusedError, match="are being worked on"):
            replan(database_url, 4)
    assert replan(database_url, 4) == 4


def test_a_backfill_that_comes_meanwhile_sees_the_new_ranges(database_url: str) -> None:
    filled(database_url)
    with support.application(database_url, autocommit=False) as slow:
        slow.execute("LOCK TABLE alphapulse_encryption.audit_log IN SHARE MODE")
        with support.Background(lambda: replan(database_url, 2)) as planning:
            support.until(
                lambda: support.engine_waits(database_url, "INSERT%audit%", behind=slow),
                "it is about to commit",
            )
            with support.Background(lambda: support.backfill(database_url, SMALL, 0)) as working:
                support.until(
                    lambda: (
                        support.value(
                            database_url,
                            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%%pg_try_advisory_lock%%' "
                            "AND pid <> pg_backend_pid() AND datname = current_database()",
                        )
                        > 0
                    ),
                    "it asks for its range",
                )
                slow.commit()
                assert planning.result() == 2
                assert working.result().rows == 50


@pytest.mark.parametrize("count", [0, -1])
def test_numbers_of_ranges_that_mean_nothing(database_url: str, count: int) -> None:
    filled(database_url)
    with pytest.raises(ConfigurationError, match="cannot be cut"):
        replan(database_url, count)


@pytest.mark.parametrize("stage", ["dropped", "restoring"])
def test_not_where_there_is_nothing_to_encrypt(database_url: str, stage: str) -> None:
    filled(database_url)
    run(database_url, "UPDATE alphapulse_encryption.tables SET stage = %s", stage)
    before = bookkeeping(database_url)
    with pytest.raises(RefusedError, match="nothing to encrypt"):
        replan(database_url, 4)
    assert bookkeeping(database_url) == before


def test_not_before_the_first_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE t (id int PRIMARY KEY, v text)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        replan(database_url, 4)


def test_planning_costs_the_same_whatever_the_size_of_the_table(database_url: str) -> None:
    read = {}
    for rows in (6_000, 24_000):
        run(database_url, "DROP TABLE IF EXISTS t")
        run(database_url, "CREATE TABLE t (id int PRIMARY KEY, v text, filler text STORAGE PLAIN)")
        run(database_url, "ALTER TABLE t SET (autovacuum_enabled = false)")
        run(
            database_url,
            "INSERT INTO t SELECT (i * 7919::bigint) %% 50021, 'v', repeat('x', 5000) FROM generate_series(1, %s) AS i",
            rows,
        )
        support.add_columns(database_url, SMALL, ranges=8)
        before = blocks_read(database_url)
        replan(database_url, 8)
        read[rows] = blocks_read(database_url) - before
        sizes = assert_partition(database_url, Shape(SMALL, "", ("int",)), 8)
        assert min(sizes) > rows / 8 * 0.7
    assert batch_ranges.SAMPLED_PAGES * 0.8 < read[6_000] < batch_ranges.SAMPLED_PAGES * 1.2
    assert batch_ranges.SAMPLED_PAGES * 0.8 < read[24_000] < batch_ranges.SAMPLED_PAGES * 1.2


def blocks_read(url: str) -> int:
    """Of the table and its index, by all sessions that have ended."""
    blocks = "heap_blks_read + heap_blks_hit + idx_blks_read + idx_blks_hit"
    with support.application(url) as connection:
        # Others hand in what they counted when they end; one of them may be about to.
        support.until(
            lambda: (
                not support.value(
                    url,
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND application_name = 'alphapulse_encryption'",
                )
            ),
            "the engine's sessions have ended",
        )
        return int(
            support.ask(connection, f"SELECT {blocks} FROM pg_statio_all_tables WHERE relid = 't'::regclass")[
                0
            ][0]
        )
