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
from alphapulse_encryption.migration.database import Database
from alphapulse_encryption.migration.preview import Plan, StepName, make_plan
from alphapulse_encryption.migration.switch import switch_to_ciphertext
from alphapulse_encryption.migration.tracking import BOOKKEEPING_TABLES
from alphapulse_encryption.migration.views import create_views
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
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
    return make_plan(Database(url), catalogue, walk.KEYS, catalogue.keys, batch_ranges=ranges)


def statements(of: Plan, *steps: StepName, table: str) -> list[str]:
    found = next(one for one in of.tables if one.table == table)
    return [statement.sql for name in steps for statement in found.step(name).statements]


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
    for name in BOOKKEEPING_TABLES:
        run(
            sample_url,
            sql.SQL("GRANT SELECT ON {} TO {}").format(sql.Identifier(name), sql.Identifier(PLANNER)),
        )
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
        switch_to_ciphertext(database, entry, walk.KEYS, walk.ACTOR)
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
