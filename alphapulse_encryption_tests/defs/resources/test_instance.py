"""The instance that the command line and the UI share: where it is, and what its storage says when it is not there."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import LiteralString

import dagster as dg
import psycopg
import pytest
import sqlalchemy
from psycopg.sql import SQL

from alphapulse_encryption.defs.resources.instance import open_instance, packaged_file, prepare_dagster_home
from alphapulse_encryption.defs.resources.storage import kept
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration.support import until
from alphapulse_encryption_tests.place import Place, place


@pytest.fixture
def here(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        yield found


def test_the_home_is_made_and_renewed(here: Place) -> None:
    with here.in_environment():
        home = prepare_dagster_home()
        assert home == here.state / "dagster_home"
        assert (home / "dagster.yaml").read_bytes() == packaged_file("dagster.yaml").read_bytes()
        (home / "dagster.yaml").write_text("outdated: true")
        prepare_dagster_home()
        assert (home / "dagster.yaml").read_bytes() == packaged_file("dagster.yaml").read_bytes()
        assert [path.name for path in home.iterdir()] == ["dagster.yaml"]
        # Others could read reports and logs, or put a file of theirs in the place of one.
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        home.chmod(0o755)
        prepare_dagster_home()
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_it_is_for_its_user_alone(here: Place) -> None:
    """Also where an earlier version made it; a state directory that somebody names may be anything, as /tmp."""
    home = here.state / "dagster_home"
    home.mkdir(exist_ok=True)
    home.chmod(0o755)
    here.state.chmod(0o755)
    with here.in_environment():
        prepare_dagster_home()
    assert (stat.S_IMODE(home.stat().st_mode), stat.S_IMODE(here.state.stat().st_mode)) == (0o700, 0o755)
    (home / "dagster.yaml").unlink()
    here.run("--preflight", ALPHAPULSE_ENCRYPTION_MASTER_KEY="A" * 43 + "=")
    made = [path for path in here.state.rglob("*") if here.state / "postgres" not in (path, *path.parents)]
    assert {"dagster.yaml", "logs", "migration"} <= {path.name for path in made}
    for path in made:
        loose = stat.S_IMODE(path.stat().st_mode) & 0o077
        assert not loose or path.name == "in_use", path


def test_a_given_home_keeps_its_configuration(here: Place) -> None:
    home = here.state / "given"
    here.extra["DAGSTER_HOME"] = str(home)
    with here.in_environment():
        prepare_dagster_home()
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        home.chmod(0o750)
        (home / "dagster.yaml").write_text("canary: [unreadable")
        assert prepare_dagster_home() == home
        assert (home / "dagster.yaml").read_text() == "canary: [unreadable"
        assert stat.S_IMODE(home.stat().st_mode) == 0o750, "it may be anything that somebody shares"
        (home / "dagster.yaml").write_text("canary: {password: canary}")
        with pytest.raises(ConfigurationError, match="is not valid") as caught, open_instance():
            pass
    assert "canary:" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_storage_is_ours_and_its_address_is_kept_nowhere(here: Place) -> None:
    with here.instance() as instance:
        reference = instance.get_ref().to_dict()
        assert "AlphaPulseStorage" in str(reference)
        assert here.dagster_url not in str(reference)
        with psycopg.connect(here.dagster_url) as connection:
            assert connection.execute("SELECT to_regclass('event_logs') IS NOT NULL").fetchone() == (True,)
        assert not instance.telemetry_enabled
        assert instance.run_retries_max_retries == 0
        assert not instance.run_retries_retry_on_asset_or_op_failure


def test_sessions_are_kept_and_a_dead_one_is_replaced(here: Place) -> None:
    with psycopg.connect(here.dagster_url, autocommit=True) as connection:

        def theirs(query: LiteralString) -> list[int]:
            others = " FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            return [number for (number,) in connection.execute(SQL(query + others)).fetchall()]

        with here.instance() as instance:
            assert instance.get_runs() == []
            kept = theirs("SELECT pid")
            assert len(kept) == 1
            # Runs and events have their own storages.
            assert instance.get_runs_count() == 0
            assert instance.get_materialized_partitions(dg.AssetKey("nothing")) == set()
            assert theirs("SELECT pid") == kept
            assert theirs("SELECT pg_terminate_backend(pid, 10000)::int") == [1]
            assert instance.get_runs() == []
            assert len(theirs("SELECT pid")) == 1
        until(lambda: theirs("SELECT pid") == [], "the instance's sessions have ended")


def test_what_columns_there_are_is_asked_once(here: Place) -> None:
    with here.instance() as instance:
        asked: list[str] = []

        def listen(*arguments: object) -> None:
            asked.append(str(arguments[2]))

        sessions = getattr(instance.run_storage, "_engine")  # noqa: B009
        sqlalchemy.event.listen(sessions, "before_cursor_execute", listen)
        for _ in range(3):
            assert instance.get_run_records() == []
            assert instance.get_asset_records([dg.AssetKey("nothing")]) == []
        of_columns = [statement for statement in asked if "pg_attribute" in statement]
        # Of the runs' table, and of two columns of the assets'.
        assert len(of_columns) == 3 < len(asked)


def test_only_a_yes_is_kept() -> None:
    answers = iter([False, True, False])
    ask = kept(lambda _: next(answers))
    assert [ask("one"), ask("one"), ask("one"), ask("other")] == [False, True, True, False]
