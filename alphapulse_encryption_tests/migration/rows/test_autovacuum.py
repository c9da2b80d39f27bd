"""An autovacuum under way gives way to schema changes, instead of keeping them out for as long as it runs."""

from __future__ import annotations

from pathlib import Path

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.tuning import tuned
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

ENTRY = support.table("notes", "secret")
# So slow that it would take minutes.
SLOW = (
    "ALTER TABLE notes SET (autovacuum_vacuum_threshold = 1, autovacuum_vacuum_scale_factor = 0, "
    "autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1, autovacuum_analyze_threshold = 1000000)"
)


def at_work(url: str) -> bool:
    return bool(
        support.value(
            url,
            "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'autovacuum worker' "
            "AND query LIKE '%public.notes%'",
        )
    )


def test_autovacuum_gives_way(server_dir: Path) -> None:
    with EmbeddedPostgres(server_dir, settings={**UNSAFE_SETTINGS, "autovacuum_naptime": "1s"}) as server:
        server.ensure_database("vacuumed")
        url = server.url("vacuumed")
        run(url, "CREATE TABLE notes (id int PRIMARY KEY, secret text)")
        run(url, "INSERT INTO notes SELECT i, repeat('x', 200) FROM generate_series(1, 50000) AS i")
        run(url, SLOW)
        run(url, "UPDATE notes SET secret = 'y'")
        support.until(lambda: at_work(url), "autovacuum has begun")
        assert support.add_columns(url, ENTRY).guards_created
        support.until(lambda: at_work(url), "autovacuum has begun again")
        with tuned(Database(url), ENTRY, ACTOR, autovacuum_off=True):
            assert not at_work(url)
            assert "autovacuum_enabled=false" in support.value(
                url, "SELECT reloptions FROM pg_class WHERE relname = 'notes'"
            )
