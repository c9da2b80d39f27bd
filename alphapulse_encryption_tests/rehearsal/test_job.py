"""The whole circle on a clone, seen from outside: what it does, what it leaves, and what it never touches."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psycopg
import pytest

from alphapulse_encryption.launch import Launcher, Outcome
from alphapulse_encryption.rehearsal import history
from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration.walk import query, value
from alphapulse_encryption_tests.place import Place, place

KEY = base64.b64encode(bytes(range(32))).decode()
ROWS = {"users": 300, "trading_accounts": 300, "positions": 600, "trades": 1650, "api_keys": 150}
CLONES = "SELECT datname FROM pg_database WHERE datname LIKE 'alphapulse\\_rehearsal\\_%' ORDER BY 1"


@pytest.fixture
def here(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, sample_url, server_dir.parent, KEY) as found:
        found.extra = {"ALPHAPULSE_DATABASE_URL": None, "ALPHAPULSE_STAGING_DATABASE_URL": sample_url}
        yield found
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        for name in clones(found):
            connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())


def clones(here: Place) -> list[str]:
    """The databases that look like clones."""
    return [name for (name,) in query(here.postgres.url("postgres"), CLONES)]


def rehearse(here: Place, instance: dg.DagsterInstance, **config: object) -> Outcome:
    return Launcher(instance, here.ranges).job("staging_rehearsal", "clone", config)


def contents(url: str) -> dict[str, tuple[str, ...]]:
    """Every row of every table of the source, and its definition, by something that is not the package's own."""
    tables = [
        name
        for (name,) in query(
            url,
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relowner <> 0 "
            "AND relnamespace = 'public'::regnamespace ORDER BY 1",
        )
    ]
    return {
        table: tuple(text for (text,) in query(url, f'SELECT t::text FROM "{table}" t ORDER BY 1'))
        for table in tables
    }


def test_the_whole_circle(here: Place) -> None:
    before, dump = contents(here.url), here.dump()
    with here.instance() as instance:
        outcome = rehearse(here, instance)
        assert (outcome.problems, outcome.succeeded) == ((), True)
        (found,) = history.read(instance)
        events = instance.event_log_storage
        told = {key.to_user_string() for key in events.all_asset_keys()}
    # Nothing is told of the assets of the target.
    assert told == {"staging_rehearsal"}
    # There is a page of it, and one of all of them.
    page = here.state / "rehearsals" / outcome.run_id / "index.html"
    assert "unchanged: its tables had the same checksums" in page.read_text()
    assert f'href="{outcome.run_id}/index.html"' in (page.parent.parent / "history.html").read_text()
    # The source is as it was, and nothing is left beside it.
    assert (contents(here.url), here.dump()) == (before, dump)
    assert clones(here) == []
    assert list(here.state.rglob("*.dump.age*")) == []

    assert [measure.stage for measure in found.stages] == list(Stage)
    assert (found.run_id, found.failed_stage, found.source_unchanged) == (outcome.run_id, None, True)
    assert found.circumstances.cloned_by == "template"
    assert {table: size.rows for table, size in found.before.tables.items()} == ROWS
    backfill = found.stage(Stage.BACKFILL)
    assert backfill is not None
    assert {table: work.rows for table, work in backfill.tables.items()} == ROWS
    for work in backfill.tables.values():
        assert len(work.ranges) == here.ranges
        assert sum(rows for rows, _ in work.ranges) == work.rows
        assert 0 < work.seconds <= backfill.seconds
    for measure in found.stages:
        assert measure.attempts == 1
        assert measure.started <= measure.ended
        assert (measure.sizes is None) == (measure.stage is Stage.REMOVAL)
    for stage in (Stage.VERIFY, Stage.VERIFY_AGAIN, Stage.RESTORE):
        again = found.stage(stage)
        assert again is not None
        assert {table: work.rows for table, work in again.tables.items()} == ROWS
    assert backfill.wal > 100_000
    kinds = {finding.level for measure in found.stages for finding in measure.findings}
    assert "blocker" not in kinds and "warning" in kinds
    assert (
        value(here.postgres.url("postgres"), "SELECT count(*) FROM pg_database WHERE datname ~ 'drill'") == 0
    )
