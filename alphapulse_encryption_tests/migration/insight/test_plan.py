"""The plan: nothing is changed by asking, and what it says is what the steps then do, statement by statement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.migration.insight.plan import Plan, Step, TablePlan, make_plan
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After
from alphapulse_encryption_tests.migration.support import run

PLANNER = "plan_reader"

# What the server itself says was executed: the statement's text as it came.
WITNESS = """
CREATE SCHEMA witness;
CREATE TABLE witness.said (n bigint GENERATED ALWAYS AS IDENTITY, statement text);
CREATE FUNCTION witness.note() RETURNS event_trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO witness.said (statement) VALUES (current_query());
END $$;
CREATE EVENT TRIGGER witness ON ddl_command_end EXECUTE FUNCTION witness.note();
"""


def plan(url: str, *entries: Table, ranges: int = walk.RANGES) -> Plan:
    catalogue = Catalogue(tables=entries) if entries else walk.CATALOGUE
    return make_plan(Database(url), catalogue.tables, walk.KEYS, batch_ranges=ranges)


def step(of: TablePlan, name: str) -> Step:
    return next(one for one in of.steps if one.name == name)


def statements(of: Plan, *steps: str, table: str) -> list[str]:
    found = next(one for one in of.tables if one.table == table)
    return [statement.sql for name in steps for statement in step(found, name).statements]


def said(url: str) -> list[str]:
    """The statements that were executed since the last look."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "WITH gone AS (DELETE FROM witness.said RETURNING *) SELECT statement FROM gone ORDER BY n"
        ).fetchall()
    # A statement that came with others, or that made several things, is seen several times.
    return [text.strip() for text in dict.fromkeys(text for (text,) in rows)]


def everything(url: str, bin_dir: Path) -> tuple[str, list[support.Row]]:
    """All rows and definitions, as pg_dump writes them, and every row of the system's own catalogues."""
    with psycopg.connect(url) as connection:
        names = [
            name
            for (name,) in connection.execute(
                "SELECT relname FROM pg_class WHERE relnamespace = 'pg_catalog'::regnamespace AND relkind = 'r' "
                # What the server's own background processes write.
                "AND relname NOT IN ('pg_statistic', 'pg_statistic_ext_data') ORDER BY 1"
            )
        ]
        counts = [
            connection.execute(
                sql.SQL(
                    "SELECT %s, count(*), sum(hashtextextended(t::text, 0)), max(xmin::text::bigint) "
                    "FROM pg_catalog.{} t"
                ).format(sql.Identifier(name)),
                [name],
            ).fetchall()[0]
            for name in names
            if name not in ("pg_class", "pg_database")  # vacuum's own: below
        ]
        counts += connection.execute(
            "SELECT oid::text, relname, relkind::text, relnatts::text, relhastriggers::text, reloptions::text, "
            "relfilenode::text FROM pg_class ORDER BY oid"
        ).fetchall()
    dumped = walk.dump(url, bin_dir, "--inserts")
    return "\n".join(
        line for line in dumped.splitlines() if not line.startswith(("\\restrict", "\\unres"))
    ), counts


@pytest.fixture
def planner(postgres: EmbeddedPostgres, sample_url: str) -> Iterator[str]:
    """The address for a role that may log in, and nothing else but what is everybody's."""
    with support.application(sample_url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(PLANNER)))
        try:
            yield sample_url.replace(f"//{urlsplit(sample_url).username or 'postgres'}@", f"//{PLANNER}@", 1)
        finally:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(PLANNER)))
            connection.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(PLANNER)))


def test_asking_changes_nothing_and_takes_no_privilege(
    sample_url: str, planner: str, postgres: EmbeddedPostgres
) -> None:
    before = everything(sample_url, postgres.bin_dir())
    found = plan(planner)
    assert [table.table for table in found.tables] == list(walk.CATALOGUE.keys)
    assert found.role == PLANNER
    assert not found.blockers
    assert any("the role that asked could not do it" in finding.message for finding in found.findings)
    # It may not read the keys: where the ranges would be cut is left open, and said so.
    assert all(table.ranges == () and "may not read the key" in table.ranges_note for table in found.tables)
    as_owner = plan(sample_url)
    for ours, theirs in zip(found.tables, as_owner.tables, strict=True):
        assert ours.steps == theirs.steps
        assert ours.rows == theirs.rows > 0
    assert everything(sample_url, postgres.bin_dir()) == before

    # Once it is begun, it needs to read the bookkeeping.
    walk.encrypt(sample_url, walk.CATALOGUE.table("users"))
    support.grant_bookkeeping(sample_url, PLANNER)
    before = everything(sample_url, postgres.bin_dir())
    begun = plan(planner)
    users = next(table for table in begun.tables if table.table == "users")
    assert [step.name for step in users.steps if step.done] == ["columns", "data", "indexes"]
    assert len(users.ranges) == walk.RANGES and users.ranges_note == "as they were cut"
    assert everything(sample_url, postgres.bin_dir()) == before
    with (
        replace(Database(sample_url), read_only=True).session("try to write") as connection,
        pytest.raises(psycopg.errors.ReadOnlySqlTransaction),
    ):
        connection.execute("CREATE TABLE public.anything ()")


def test_every_planned_statement_is_executed_and_no_other(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    users, trades = walk.CATALOGUE.table("users"), walk.CATALOGUE.table("trades")
    run(sample_url, "CREATE ROLE plan_analyst")
    run(sample_url, "GRANT SELECT ON users TO plan_analyst WITH GRANT OPTION")
    run(sample_url, "GRANT SELECT (id, symbol) ON trades TO plan_analyst")
    run(sample_url, "CREATE SEQUENCE fees OWNED BY trades.fee")
    run(sample_url, WITNESS)
    database = Database(sample_url)
    promised = plan(sample_url)
    assert not promised.blockers

    walk.encrypt(sample_url, users)
    done = said(sample_url)
    assert done == [*promised.bookkeeping, *statements(promised, "columns", "indexes", table="users")]
    walk.encrypt(sample_url, trades)
    assert said(sample_url) == statements(promised, "columns", "indexes", table="trades")
    for entry in (users, trades):
        create_views(database, entry, walk.ACTOR)
        assert said(sample_url) == statements(promised, "views", table=entry.key)
        walk.verify(sample_url, entry)
        switch_to_ciphertext(walk.target(database), entry)
        assert said(sample_url) == statements(promised, "switch", table=entry.key)
        assert walk.verify(sample_url, entry).passed
    half = plan(sample_url)
    walk.backup(sample_url, (users, trades), tmp_path, postgres.bin_dir())
    said(sample_url)
    for entry in (users, trades):
        walk.approve(sample_url, entry)
        walk.drop(sample_url, entry)
        executed = said(sample_url)
        assert executed == statements(promised, "drop", table=entry.key)
        assert executed == statements(half, "drop", table=entry.key)
        assert len(executed) >= 10
    after = plan(sample_url)
    for entry in (users, trades):
        steps = next(table for table in after.tables if table.table == entry.key).steps
        assert all(step.done and not step.statements for step in steps)
    run(sample_url, "DROP OWNED BY plan_analyst")
    run(sample_url, "DROP ROLE plan_analyst")


def test_what_is_half_done_is_planned_from_there(after: After) -> None:
    url = after("encrypted")
    users, database = walk.CATALOGUE.table("users"), Database(url)

    def goes_on(promised: Plan) -> None:
        assert promised.bookkeeping == ()
        add_encrypted_columns(walk.target(database), users, batch_ranges=walk.RANGES)
        assert said(url) == statements(promised, "columns", table="users") != []
        build_search_indexes(database, users, walk.ACTOR)
        assert said(url) == statements(promised, "indexes", table="users") != []
        create_views(database, users, walk.ACTOR)
        assert said(url) == statements(promised, "views", table="users") != []
        (now,) = plan(url, users).tables
        assert all(step(now, name).done for name in ("columns", "indexes", "views"))

    create_views(database, users, walk.ACTOR)
    run(url, WITNESS)
    run(url, "DROP TRIGGER zzz_encryption_guard_insert ON users")
    run(url, "DROP INDEX idx_user_email_search")
    run(
        url,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'users_encryption_pending'::regclass",
    )
    run(url, "ALTER TABLE users ADD COLUMN nickname text")
    said(url)
    promised = plan(url, users)
    indexes = statements(promised, "indexes", table="users")
    assert indexes[0].startswith('CREATE UNIQUE INDEX CONCURRENTLY "idx_user_email_search"')
    assert indexes[1] == 'DROP INDEX CONCURRENTLY IF EXISTS "public"."users_encryption_pending"'
    goes_on(promised)

    # A search column is gone, and with it all that depended on it.
    run(url, "ALTER TABLE users DROP COLUMN email_search CASCADE")
    said(url)
    promised = plan(url, users)
    columns = statements(promised, "columns", table="users")
    assert columns[0] == 'ALTER TABLE "public"."users" ADD COLUMN "email_search" character varying(64)'
    goes_on(promised)


def test_a_partitioned_table(database_url: str) -> None:
    run(
        database_url,
        "CREATE TABLE notes (id int, region text, mail text, note text, PRIMARY KEY (id, region), "
        "UNIQUE (mail, region, id)) PARTITION BY LIST (region)",
    )
    run(database_url, "CREATE TABLE north PARTITION OF notes FOR VALUES IN ('north')")
    run(database_url, "CREATE TABLE south PARTITION OF notes FOR VALUES IN ('south') PARTITION BY RANGE (id)")
    run(database_url, "CREATE TABLE south_a PARTITION OF south FOR VALUES FROM (MINVALUE) TO (100)")
    run(database_url, "CREATE TABLE south_b PARTITION OF south DEFAULT")
    run(database_url, "INSERT INTO notes SELECT n, 'south', 'm' || n, 'x' FROM generate_series(1, 300) AS n")
    entry = support.table("notes", support.searchable("mail", "idx_notes_mail"), "note")
    run(database_url, WITNESS)
    promised = plan(database_url, entry)
    walk.encrypt(database_url, entry)
    executed = said(database_url)
    assert executed == [*promised.bookkeeping, *statements(promised, "columns", "indexes", table="notes")]
    assert sum("ATTACH PARTITION" in text for text in executed) == 12
    assert step(promised.tables[0], "drop").statements
    # One part of an index is gone with its partition, which comes again.
    run(database_url, "DROP TABLE south_b")
    run(database_url, "COMMENT ON INDEX notes_encryption_pending IS 'of another catalogue'")
    run(database_url, "CREATE TABLE south_b PARTITION OF south DEFAULT")
    said(database_url)
    again = plan(database_url, entry)
    assert not step(again.tables[0], "indexes").done
    build_search_indexes(Database(database_url), entry, walk.ACTOR)
    assert said(database_url) == statements(again, "indexes", table="notes")
    assert step(plan(database_url, entry).tables[0], "indexes").done


# The server's names of the modes, weakest first.
MODES = [
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
]


def test_locks_are_those_that_the_server_takes(sample_url: str) -> None:
    run(sample_url, "CREATE SEQUENCE fees OWNED BY trades.fee")
    promised = plan(sample_url, walk.CATALOGUE.table("trades"))
    (found,) = promised.tables
    for text in promised.bookkeeping:
        run(sample_url, text)
    # Without rows none is in the way of a constraint.
    run(sample_url, "TRUNCATE trades")
    checked = 0
    with psycopg.connect(sample_url) as connection:
        for step in found.steps:
            for statement in step.statements:
                if "CONCURRENTLY" in statement.sql:
                    # As good as that, and possible in a transaction.
                    connection.execute(statement.sql.replace("CONCURRENTLY ", "").encode())
                    connection.commit()
                    continue
                connection.execute(statement.sql.encode())
                held = [
                    mode
                    for (mode,) in connection.execute(
                        "SELECT mode FROM pg_locks WHERE pid = pg_backend_pid() AND relation = 'trades'::regclass"
                    )
                ]
                connection.commit()
                strongest = max(held, key=MODES.index, default="").removesuffix("Lock").upper()
                said_to_be = (statement.lock.mode if statement.lock else "").replace(" ", "")
                assert strongest == said_to_be, statement.sql
                checked += 1
    assert checked > 40


def test_growth_is_as_it_comes(sample_url: str) -> None:
    def sizes() -> tuple[int, int, int]:
        sums = [
            walk.value(sample_url, f"SELECT sum({what}(oid))::bigint FROM pg_class WHERE relname = 'trades'")
            for what in ("pg_table_size", "pg_indexes_size")
        ]
        return sums[0], sums[1], walk.value(sample_url, "SELECT pg_current_wal_lsn() - '0/0'::pg_lsn")

    entry = walk.CATALOGUE.table("trades")
    (found,) = plan(sample_url, entry).tables
    assert found.growth is not None
    before = sizes()
    walk.encrypt(sample_url, entry)
    after = sizes()
    table, indexes, wal = (float(now - then) for now, then in zip(after, before, strict=True))
    for real, span in ((table, found.growth.table), (indexes, found.growth.indexes), (wal, found.growth.wal)):
        assert span.low <= real <= span.high, (real, span)
    assert found.growth.table.likely == pytest.approx(table, rel=0.3)


def test_a_table_without_statistics_is_guessed_and_said_to_be(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, note text)")
    run(database_url, "INSERT INTO notes SELECT n, repeat('x', 100) FROM generate_series(1, 5000) AS n")
    entry = support.table("notes", "note")
    found = plan(database_url, entry)
    assert 1_000 < found.tables[0].rows < 20_000
    assert any("was never analysed" in finding.message for finding in found.findings)
    run(database_url, "ANALYZE notes")
    found = plan(database_url, entry)
    assert found.tables[0].rows == 5_000
    assert not any("was never analysed" in finding.message for finding in found.findings)


def test_a_table_that_somebody_holds_is_not_waited_for_again_and_again(sample_url: str) -> None:
    users, trades = walk.CATALOGUE.table("users"), walk.CATALOGUE.table("trades")
    with support.application(sample_url, autocommit=False) as holder:
        holder.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        found = plan(sample_url, users, trades)
    (blocker,) = [finding for finding in found.findings if finding.level == "blocker"]
    assert blocker.subject == "users"
    assert "another session kept its lock for longer than" in blocker.message
    assert [table.table for table in found.tables] == ["trades"]


def test_ranges_are_cut_as_they_were_planned(sample_url: str) -> None:
    entry = walk.CATALOGUE.table("trades")
    (before,) = plan(sample_url, entry, ranges=5).tables
    add_encrypted_columns(walk.target(sample_url), entry, batch_ranges=5)
    (after,) = plan(sample_url, entry, ranges=5).tables
    assert [(r.lower, r.upper, r.empty) for r in before.ranges] == [
        (r.lower, r.upper, r.empty) for r in after.ranges
    ]
    stored = run(sample_url, "SELECT upper_key FROM alphapulse_encryption.ranges ORDER BY batch_range")
    assert [r.upper for r in before.ranges] == [tuple(key) if key else None for (key,) in stored]
    assert {r.status for r in before.ranges} == {"planned"} and {r.status for r in after.ranges} == {
        "pending"
    }
    # Half of the ranges done: half of the time.
    walk.backfill(sample_url, entry)
    (half,) = plan(sample_url, entry, ranges=5).tables
    ours, theirs = step(half, "data").seconds, step(before, "data").seconds
    assert ours is not None and theirs is not None
    assert ours.likely == pytest.approx(theirs.likely * 3 / 5)
