"""Declaratively partitioned tables, of several levels: every step through the table as a whole."""

from __future__ import annotations

from typing import Any, Self

import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, RefusedError
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows import batch_ranges
from alphapulse_encryption.migration.schema import partitions
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.guard import guard_faults
from alphapulse_encryption.migration.schema.indexes import IndexResult, build_search_indexes
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, KEYS, run, target

ENTRY = support.table("notes", support.searchable("mail", "idx_mail"), "secret")
PENDING = "notes_encryption_pending"
# By region, and within one of them by id; one partition has its columns in another order, another its own schema.
PARTS = ("notes", "north", "south", "other place.far", "south_a", "south_b", "south_rest")
LEAVES = ("north", "south_a", "south_b", "south_rest", "far")
MAKE = """
CREATE TABLE notes (region text, id int, mail text NOT NULL DEFAULT 'nobody', secret int, PRIMARY KEY (id, region),
    UNIQUE (mail, region, id)) PARTITION BY LIST (region);
CREATE TABLE north PARTITION OF notes FOR VALUES IN ('north');
CREATE TABLE south PARTITION OF notes FOR VALUES IN ('south') PARTITION BY RANGE (id);
CREATE TABLE south_a PARTITION OF south FOR VALUES FROM (MINVALUE) TO (100);
CREATE TABLE south_b PARTITION OF south FOR VALUES FROM (100) TO (200);
CREATE TABLE south_rest PARTITION OF south DEFAULT;
CREATE SCHEMA "other place";
CREATE TABLE "other place".far (gone int, secret int, mail text NOT NULL, id int NOT NULL, region text NOT NULL);
ALTER TABLE "other place".far DROP gone;
ALTER TABLE notes ATTACH PARTITION "other place".far DEFAULT;
INSERT INTO notes SELECT (ARRAY['north', 'south', 'east'])[1 + i % 3], i, 'm' || i / 2, i
    FROM generate_series(1, 300) AS i;
"""


@pytest.fixture
def notes_url(database_url: str) -> str:
    for statement in MAKE.split(";")[:-1]:
        run(database_url, statement)
    return database_url


# Milliseconds since the engine's statement began.
WAITED = (
    "SELECT coalesce(max(extract(epoch FROM clock_timestamp() - query_start)), 0) * 1000 FROM pg_stat_activity "
    "WHERE datname = current_database() AND application_name = 'alphapulse_encryption' AND state = 'active'"
)


def build(url: str) -> IndexResult:
    return build_search_indexes(Database(url), ENTRY, ACTOR)


def trees(url: str) -> dict[str, tuple[int, bool]]:
    """Of each index of the whole table: how many leaves it has, and whether all of it is valid."""
    rows = run(
        url,
        "SELECT c.relname, (SELECT count(*) FROM pg_partition_tree(c.oid) WHERE isleaf), "
        "  (SELECT bool_and(i.indisvalid AND i.indisready) FROM pg_partition_tree(c.oid) p "
        "     JOIN pg_index i ON i.indexrelid = p.relid) "
        "FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid WHERE x.indrelid = 'notes'::regclass",
    )
    return {name: (leaves, valid) for name, leaves, valid in rows}


def guarded(url: str) -> bool:
    with Database(url).session("look") as connection:
        return not guard_faults(connection, read_table(connection, ENTRY), "plaintext")


def refused_write(url: str, table: str, key: int) -> None:
    """Ciphertext alone, while the plaintext is right."""
    with pytest.raises(psycopg.errors.CheckViolation, match="written without"):
        run(url, f"UPDATE {table} SET secret_encrypted = 'x' WHERE id = %s", key)


def test_every_step(notes_url: str) -> None:
    support.add_columns(notes_url, ENTRY, ranges=4)
    assert guarded(notes_url)
    with Database(notes_url).session("look") as connection:
        assert read_table(connection, ENTRY).partitioned
    results = support.backfill_all(notes_url, ENTRY, batch_size=17)
    assert sum(result.rows for result in results) == 300
    assert min(result.rows for result in results) > 60
    assert support.assert_encrypted(notes_url, ENTRY) == 600
    assert set(build(notes_url).created) == {"idx_mail", "notes_mail_region_id_key_search", PENDING}
    assert support.verify(notes_url, ENTRY).passed
    switch_to_ciphertext(target(notes_url), ENTRY)
    # The new application, through the table and past it.
    for number, (into, region) in enumerate(
        (("notes", "south"), ('"other place".far', "west"), ("south_rest", "south")), start=901
    ):
        sealed, token = (
            support.seal(f"new{number}", "test_search"),
            support.token(f"new{number}", "test_search"),
        )
        run(
            notes_url,
            f"INSERT INTO {into} (region, id, mail_encrypted, mail_search) VALUES (%s, %s, %s, %s)",
            region,
            number,
            sealed,
            token,
        )
        assert run(notes_url, "SELECT mail FROM notes WHERE id = %s", number) == [(None,)]
        with pytest.raises(psycopg.errors.CheckViolation, match="mail_encryption_present"):
            run(notes_url, f"INSERT INTO {into} (region, id) VALUES (%s, %s)", region, number + 10)
    run(
        notes_url,
        "UPDATE notes SET mail_encrypted = %s, mail_search = %s WHERE id = 5",
        support.seal("five", "test_search"),
        support.token("five", "test_search"),
    )
    result = revert_to_plaintext(target(notes_url), ENTRY)
    assert result is not None and result.rows == 4
    assert run(notes_url, "SELECT id, mail FROM notes WHERE id > 900 OR id = 5 ORDER BY id") == [
        (5, "five"),
        (901, "new901"),
        (902, "new902"),
        (903, "new903"),
    ]
    support.assert_encrypted(notes_url, ENTRY)
    rules = run(
        notes_url,
        "SELECT bool_and(attnotnull), count(*) FROM pg_attribute WHERE attname = 'mail' AND attrelid IN "
        "(SELECT relid FROM pg_partition_tree('notes'))",
    )
    assert rules == [(True, len(PARTS))]
    guards = "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'zzz_encryption_guard%'"
    assert support.value(notes_url, guards) == 0
    assert support.add_columns(notes_url, ENTRY, ranges=4).cleared > 0
    for leaf in ("north", "south_b", '"other place".far'):
        key = support.value(notes_url, f"SELECT min(id) FROM {leaf}")
        refused_write(notes_url, leaf, key)


def test_second_run_changes_nothing(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    build(notes_url)
    log = support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
    before = run(notes_url, "SELECT oid, relfilenode, xmin::text FROM pg_class ORDER BY 1")
    assert not support.add_columns(notes_url, ENTRY).guards_created
    assert not build(notes_url).changed
    assert run(notes_url, "SELECT oid, relfilenode, xmin::text FROM pg_class ORDER BY 1") == before
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == log


def test_partitions_that_come_later(notes_url: str) -> None:
    """Before the indexes, between and after: made by the application, or filled elsewhere and attached."""
    support.encrypt(notes_url, ENTRY)
    run(notes_url, "CREATE TABLE east PARTITION OF notes FOR VALUES IN ('west')")
    build(notes_url)
    run(notes_url, "CREATE TABLE up PARTITION OF notes FOR VALUES IN ('up') PARTITION BY HASH (id)")
    run(notes_url, "CREATE TABLE up_0 PARTITION OF up FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    run(notes_url, "CREATE TABLE down (LIKE notes INCLUDING DEFAULTS)")
    run(notes_url, "INSERT INTO down SELECT 'down', i, 'd' || i, i FROM generate_series(500, 520) AS i")
    run(notes_url, "ALTER TABLE notes ATTACH PARTITION down FOR VALUES IN ('down')")
    assert guarded(notes_url)
    assert not build(notes_url).changed
    assert {leaves for leaves, _ in trees(notes_url).values()} == {len(LEAVES) + 3}
    run(notes_url, "INSERT INTO notes VALUES ('up', 7, 'seven', 7), ('west', 8, 'eight', 8)")
    refused_write(notes_url, "down", 500)
    refused_write(notes_url, "up_0", 7)
    assert sum(result.rows for result in support.backfill_all(notes_url, ENTRY)) == 23
    support.assert_encrypted(notes_url, ENTRY)
    assert support.verify(notes_url, ENTRY).passed


@pytest.mark.parametrize("leaf", ["notes", "south", "south_b", '"other place".far'])
def test_a_guard_that_is_off_in_one_partition(notes_url: str, leaf: str) -> None:
    support.encrypt(notes_url, ENTRY)
    run(notes_url, f"ALTER TABLE {leaf} DISABLE TRIGGER zzz_encryption_guard_update")
    assert not guarded(notes_url)
    assert support.add_columns(notes_url, ENTRY).guards_created
    assert guarded(notes_url)
    refused_write(notes_url, "notes", 110)
    enabled = run(
        notes_url,
        "SELECT count(*) FROM pg_trigger WHERE tgname = 'zzz_encryption_guard_update' AND tgenabled = 'A'",
    )
    assert enabled == [(len(PARTS),)]


def test_a_fresh_envelope_of_the_same_value(notes_url: str) -> None:
    """Both are named: kept in every partition, whatever the order of its columns, and on the way to another one."""
    support.encrypt(notes_url, ENTRY)
    count = (
        "SELECT count(*), count(*) FILTER (WHERE secret_encrypted = %s AND secret = id AND mail_encrypted IS NOT NULL) "
        "FROM notes"
    )
    for name in ("first", "second"):
        assert (
            run(notes_url, f"UPDATE notes SET secret = id, secret_encrypted = '{name}' RETURNING 1")
            == [(1,)] * 300
        )
        assert run(notes_url, count, name) == [(300, 300)]
    run(notes_url, "UPDATE notes SET region = 'west', secret = secret, secret_encrypted = 'moved'")
    assert run(notes_url, count, "moved") == [(300, 300)]
    assert run(notes_url, 'SELECT count(*) FROM ONLY "other place".far') == [(300,)]
    run(notes_url, "UPDATE \"other place\".far SET secret = secret, secret_encrypted = 'direct'")
    assert run(notes_url, count, "direct") == [(300, 300)]
    for table in ("notes", '"other place".far'):
        # It is another column that is named.
        with pytest.raises(psycopg.errors.CheckViolation, match=r"notes\.secret_encrypted"):
            run(notes_url, f"UPDATE {table} SET mail = mail, secret_encrypted = 'alone'")


# Indexes.


def test_what_is_built(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    result = build(notes_url)
    found = trees(notes_url)
    assert {found[name] for name in result.created} == {(len(LEAVES), True)}
    assert result.analysed
    sizes = support.value(
        notes_url,
        "SELECT sum(pg_relation_size(relid)) FROM unnest(%s::text[]) n, pg_partition_tree(n::regclass)",
        list(result.created),
    )
    assert result.bytes == sizes > 0
    definitions: dict[str, str] = dict(
        run(
            notes_url,
            "SELECT c.relname, pg_get_indexdef(x.indexrelid) FROM pg_index x "
            "JOIN pg_class c ON c.oid = x.indexrelid WHERE x.indrelid = 'notes'::regclass",
        )
    )
    assert definitions["idx_mail"] == "CREATE INDEX idx_mail ON ONLY public.notes USING btree (mail_search)"
    assert definitions["notes_mail_region_id_key_search"].endswith("(mail_search, region, id)")
    assert definitions["notes_mail_region_id_key_search"].startswith("CREATE UNIQUE")
    with support.application(notes_url) as connection:
        connection.execute("SET enable_seqscan TO off")
        token = support.token("m50", "test_search")
        lines = support.ask(connection, f"EXPLAIN SELECT id FROM notes WHERE mail_search = '{token}'")
        conditions = [line for (line,) in lines if "Index Cond: " in line and "mail_search" in line]
        assert len(conditions) == len(LEAVES)


@pytest.mark.parametrize("step", range(0, 42, 3))
def test_interrupted_at_any_point(notes_url: str, step: int) -> None:
    """The session is ended by the server after so many changes; whatever is there is gone on with."""
    support.encrypt(notes_url, ENTRY)
    # An event trigger counts what is done, and ends the session at the chosen change, or after it.
    run(notes_url, "CREATE SEQUENCE done")
    run(
        notes_url,
        "CREATE FUNCTION interrupt() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN "
        f"IF current_setting('application_name') = 'alphapulse_encryption' AND nextval('public.done') = {step + 1} "
        "THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(0.01); END IF; END $$",
    )
    run(notes_url, "CREATE EVENT TRIGGER interrupt ON ddl_command_start EXECUTE FUNCTION interrupt()")
    with pytest.raises(DatabaseFailure, match="build the search indexes"):
        build(notes_url)
    before = trees(notes_url)
    run(notes_url, "DROP EVENT TRIGGER interrupt")
    result = build(notes_url)
    assert set(result.created) | set(result.existing) == {
        "idx_mail",
        "notes_mail_region_id_key_search",
        PENDING,
    }
    assert set(result.created).isdisjoint({name for name, (_, valid) in before.items() if valid})
    found = trees(notes_url)
    assert {found[name] for name in (*result.created, *result.existing)} == {(len(LEAVES), True)}
    # Nothing is left over: each leaf has one index for each of the whole table's.
    assert run(
        notes_url,
        "SELECT DISTINCT count(*) FROM pg_index x JOIN pg_partition_tree('notes') p ON p.relid = x.indrelid "
        "GROUP BY x.indrelid",
    ) == [(len(found),)]
    assert not build(notes_url).changed


def test_interrupted_while_a_leaf_is_built(notes_url: str) -> None:
    """An invalid index of a leaf is dropped and built again."""
    support.encrypt(notes_url, ENTRY)
    with support.application(notes_url, autocommit=False) as application:
        application.execute("UPDATE south_b SET secret = 2 WHERE id = 100")
        with support.Background(lambda: build(notes_url)) as building:
            support.until(
                lambda: support.engine_waits(notes_url, "CREATE%CONCURRENTLY%", behind=application),
                "it waits",
            )
            with support.application(notes_url) as quick:
                quick.execute("SET lock_timeout TO '5s'")
                quick.execute("UPDATE notes SET mail = 'new' WHERE id = 101")
            run(
                notes_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'alphapulse_encryption'",
            )
            with pytest.raises(DatabaseFailure):
                building.result()
        application.commit()
    assert run(notes_url, "SELECT 1 FROM pg_index WHERE NOT indisvalid")
    result = build(notes_url)
    assert "idx_mail" in result.rebuilt
    assert not run(notes_url, "SELECT 1 FROM pg_index WHERE NOT indisvalid")


def test_pending_index_of_another_catalogue(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    build(notes_url)
    less = support.table("notes", "secret")
    support.add_columns(notes_url, less)
    result = build_search_indexes(Database(notes_url), less, ACTOR)
    assert result.rebuilt == (PENDING,)
    assert trees(notes_url)[PENDING] == (len(LEAVES), True)
    predicates = run(
        notes_url,
        "SELECT DISTINCT pg_get_expr(indpred, indrelid) LIKE '%mail%' FROM pg_index WHERE indpred IS NOT NULL",
    )
    assert predicates == [(False,)]


def test_pending_is_found_through_the_index(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    build(notes_url)
    run(notes_url, "UPDATE notes SET secret = -1 WHERE id IN (5, 150)")
    assert sum(r.rows for r in support.backfill_all(notes_url, ENTRY)) == 2
    support.assert_encrypted(notes_url, ENTRY)


def test_uniqueness_within_a_partition_only(notes_url: str) -> None:
    run(notes_url, "CREATE UNIQUE INDEX once ON north (mail)")
    run(notes_url, "DELETE FROM notes WHERE id > 5")
    support.encrypt(notes_url, ENTRY)
    build(notes_url)
    assert not support.value(
        notes_url, "SELECT indisunique FROM pg_index WHERE indexrelid = 'idx_mail'::regclass"
    )
    support.verify(notes_url, ENTRY)
    with pytest.raises(RefusedError, match=r"unique index once .*within the partition public\.north"):
        switch_to_ciphertext(target(notes_url), ENTRY)
    run(notes_url, "DROP INDEX once")
    assert switch_to_ciphertext(target(notes_url), ENTRY) is not None


@pytest.mark.parametrize(
    ("rule", "named"),
    [
        ("ALTER TABLE south_a ALTER secret SET NOT NULL", "NOT NULL on secret"),
        ("ALTER TABLE north ADD CONSTRAINT apart EXCLUDE (secret WITH =)", "constraint apart"),
    ],
)
def test_a_rule_of_one_partition(notes_url: str, rule: str, named: str) -> None:
    run(notes_url, rule)
    support.encrypt(notes_url, ENTRY)
    build(notes_url)
    support.verify(notes_url, ENTRY)
    with pytest.raises(RefusedError, match=named):
        switch_to_ciphertext(target(notes_url), ENTRY)


# Rows that move between partitions.


def test_rows_that_move_while_they_are_encrypted(notes_url: str) -> None:
    """From each partition to another, to keys before and behind the batch, between reading and writing too."""
    support.add_columns(notes_url, ENTRY, ranges=2)
    moves = iter(range(1, 300, 7))

    def move() -> None:
        with support.application(notes_url) as connection:
            for key in moves:
                connection.execute("UPDATE notes SET region = 'south', id = 1000 - id WHERE id = %s", [key])
                connection.execute(
                    "UPDATE notes SET region = 'far', secret = secret + 1 WHERE id = %s", [key + 1]
                )
                connection.execute("UPDATE notes SET region = 'north' WHERE id = %s", [key + 2])

    with support.Background(move) as moving:
        support.backfill_all(notes_url, ENTRY, batch_size=5)
        moving.result()
    support.backfill_all(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 600
    assert support.value(notes_url, "SELECT sum(secret) FROM notes") == sum(range(1, 301)) + 43
    assert support.verify(notes_url, ENTRY).passed


@pytest.mark.parametrize("change", ["secret = -1", "secret = secret"])
def test_a_row_that_moves_between_reading_and_writing(notes_url: str, change: str) -> None:
    """The engine waits for a row that another transaction moves to another partition."""
    support.add_columns(notes_url, ENTRY)
    with support.application(notes_url, autocommit=False) as application:
        application.execute(f"UPDATE notes SET region = 'north', {change} WHERE id = 4".encode())
        with support.Background(lambda: support.backfill(notes_url, ENTRY)) as encrypting:
            support.until(
                lambda: (
                    support.engine_waits(notes_url, "UPDATE%", behind=application)
                    or bool(
                        support.value(
                            notes_url, "SELECT count(*) FROM notes WHERE secret_encrypted IS NOT NULL"
                        )
                    )
                    or not encrypting.running
                ),
                "it has come to the row",
            )
            application.commit()
            encrypting.result()
    support.backfill(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 600
    assert support.value(notes_url, "SELECT count(*) FROM north WHERE id = 4") == 1


def test_an_encrypted_row_that_moves(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    run(notes_url, "UPDATE notes SET region = 'south' WHERE id = 3")  # keeps its ciphertext
    run(notes_url, "UPDATE notes SET region = 'south', secret = 77 WHERE id = 6")  # becomes pending
    found = run(
        notes_url,
        "SELECT id, secret_encrypted IS NULL, mail_encrypted IS NULL FROM south WHERE id IN (3, 6) ORDER BY id",
    )
    assert found == [(3, False, False), (6, True, False)]
    support.backfill_all(notes_url, ENTRY)
    support.assert_encrypted(notes_url, ENTRY)


# What is told and refused.


def test_preflight(notes_url: str) -> None:
    run(notes_url, "ANALYZE")
    run(notes_url, "CREATE UNIQUE INDEX once ON north (mail) WHERE secret > 0")
    report = preflight.check(Database(notes_url), (ENTRY,), KEYS)
    assert report.blockers == ()
    assert report.rows == 300
    assert any("once" in f.message and "partition public.north" in f.message for f in report.warnings)
    run(
        notes_url,
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.secret := 1; RETURN NEW; END'",
    )
    run(
        notes_url,
        "CREATE TRIGGER zzzz BEFORE UPDATE ON south_b FOR EACH ROW EXECUTE FUNCTION touch()",
    )
    [blocker] = preflight.check(Database(notes_url), (ENTRY,), KEYS).blockers
    assert "the trigger zzzz runs after the guard" in blocker.message


def test_a_partition_is_not_a_table_of_its_own(notes_url: str) -> None:
    entry = support.table("north", "secret")
    [blocker] = preflight.check(Database(notes_url), (entry,), KEYS).blockers
    assert "is a partition of public.notes" in blocker.message
    with pytest.raises(ConfigurationError, match=r"is a partition of public\.notes"):
        support.add_columns(notes_url, entry)


def test_the_tree(notes_url: str) -> None:
    with Database(notes_url).session("look") as connection:
        parts = partitions.read_parts(connection, read_table(connection, ENTRY).oid)
        assert {p.name for p in parts if p.leaf} == set(LEAVES)
        assert parts[0].name == "notes"
        assert parts[0].parent is None
        by_oid = {p.oid: p for p in parts}
        assert {(p.name, by_oid[p.parent].name) for p in parts if p.parent} == {
            ("north", "notes"),
            ("south", "notes"),
            ("far", "notes"),
            ("south_a", "south"),
            ("south_b", "south"),
            ("south_rest", "south"),
        }


def test_locks_on_all_partitions_wait_once_and_not_each_for_itself(notes_url: str) -> None:
    """While we wait for one partition, the application queues behind those that we have."""
    with Database(notes_url).session("look") as connection:
        definition = read_table(connection, ENTRY)
        waits: list[str] = []

        def change() -> None:
            partitions.lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
            waits.append(support.ask(connection, "SHOW lock_timeout")[0][0])

        in_short_transaction(connection, "lock", change, lock_timeout="700ms")
        assert waits == ["700ms"]
        asked: list[int] = []

        class Recording(psycopg.Cursor[support.Row]):
            def execute(self, query: Any, params: Any = None, **options: Any) -> Self:
                if isinstance(params, list) and str(params[0]).endswith("ms"):
                    asked.append(int(params[0].removesuffix("ms")))
                return super().execute(query, params, **options)

        connection.cursor_factory = Recording
        with (
            support.application(notes_url, autocommit=False) as first,
            support.application(notes_url, autocommit=False) as second,
        ):
            first.execute("SELECT count(*) FROM north")
            second.execute("SELECT count(*) FROM south_rest")

            def lock() -> None:
                in_short_transaction(connection, "lock", change, lock_timeout="3s", attempts=1)

            with support.Background(lock) as locking:
                support.until(
                    lambda: support.engine_waits(notes_url, "LOCK%north%", behind=first),
                    "it waits for the first",
                )
                support.until(lambda: support.value(notes_url, WAITED) > 100, "for a while")
                first.rollback()
                with pytest.raises(RefusedError, match="Could not lock"):
                    locking.result()
        # Each lock is asked for with what is left of the time, and nothing stays locked.
        assert len(asked) == len(PARTS)
        assert asked == sorted(asked, reverse=True)
        assert asked[-1] < 2950
        assert not run(
            notes_url,
            "SELECT 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND locktype = 'relation' AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())",
        )


def test_ranges_of_a_large_partitioned_table_are_sampled(database_url: str) -> None:
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text STORAGE PLAIN) PARTITION BY RANGE (id)",
    )
    run(database_url, "CREATE TABLE low PARTITION OF notes FOR VALUES FROM (MINVALUE) TO (3000)")
    run(database_url, "CREATE TABLE high PARTITION OF notes FOR VALUES FROM (3000) TO (MAXVALUE)")
    run(database_url, "INSERT INTO notes SELECT i, 'm', repeat('x', 3000) FROM generate_series(1, 8000) AS i")
    pages = support.value(database_url, "SELECT (pg_relation_size('low') + pg_relation_size('high')) / 8192")
    assert pages > 1.5 * batch_ranges.SAMPLED_PAGES
    support.add_columns(database_url, support.table("notes", "mail"), ranges=4)
    bounds = [
        int(upper[0])
        for (upper,) in run(
            database_url, "SELECT upper_key FROM alphapulse_encryption.ranges ORDER BY batch_range"
        )
        if upper
    ]
    assert len(bounds) == 3
    for expected, bound in zip((2000, 4000, 6000), bounds, strict=True):
        assert abs(bound - expected) < 500
