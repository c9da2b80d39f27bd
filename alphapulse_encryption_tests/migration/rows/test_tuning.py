"""Tuning is undone: at the end, after an error, after a kill, after a crash of the server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import tuning
from alphapulse_encryption.migration.rows.tuning import restore_abandoned, tuned, use_memory
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

ENTRY = support.table("notes", "secret")
OTHER = support.table("other", "secret")
OFF = "autovacuum_enabled=false"

Options = tuple[set[str], set[str]]


def make(url: str, name: str = "notes") -> None:
    run(url, f"CREATE TABLE {name} (id int PRIMARY KEY, secret text)")
    run(url, f"INSERT INTO {name} SELECT i, 's' || i FROM generate_series(1, 20) AS i")
    support.add_columns(url, support.table(name, "secret"))


@pytest.fixture
def notes_url(database_url: str) -> str:
    make(database_url)
    return database_url


def options(url: str, name: str = "notes") -> Options:
    """Storage parameters of a table and of its TOAST table."""
    [(main, toast)] = run(
        url,
        "SELECT coalesce(c.reloptions, '{}'), coalesce(t.reloptions, '{}') FROM pg_class c "
        "LEFT JOIN pg_class t ON t.oid = c.reltoastrelid WHERE c.oid = %s::regclass",
        name,
    )
    return set(main), set(toast)


def bookkeeping(url: str) -> tuple[int, int]:
    return (
        support.value(url, "SELECT count(*) FROM alphapulse_encryption.tuning"),
        support.value(url, "SELECT count(*) FROM alphapulse_encryption.tuning_holders"),
    )


SET_BEFORE = {
    "nothing": ("SELECT 1", (set(), set())),
    "on": ("ALTER TABLE notes SET (autovacuum_enabled = on)", ({"autovacuum_enabled=on"}, set())),
    "off": (
        "ALTER TABLE notes SET (autovacuum_enabled = false, toast.autovacuum_enabled = off)",
        ({OFF}, {"autovacuum_enabled=off"}),
    ),
    "TOAST alone": (
        "ALTER TABLE notes SET (toast.autovacuum_enabled = true)",
        (set(), {"autovacuum_enabled=true"}),
    ),
    "others": (
        "ALTER TABLE notes SET (fillfactor = 71, autovacuum_vacuum_scale_factor = 0.02, autovacuum_enabled = true, "
        "toast.autovacuum_vacuum_threshold = 9)",
        (
            {"fillfactor=71", "autovacuum_vacuum_scale_factor=0.02", "autovacuum_enabled=true"},
            {"autovacuum_vacuum_threshold=9"},
        ),
    ),
}


@pytest.mark.parametrize("name", list(SET_BEFORE))
def test_what_the_application_had_set_comes_back(notes_url: str, name: str) -> None:
    statement, before = SET_BEFORE[name]
    run(notes_url, statement)
    assert options(notes_url) == before
    with tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True):
        main, toast = options(notes_url)
        assert OFF in main
        assert OFF in toast or "autovacuum_enabled=off" in toast
        assert bookkeeping(notes_url) == (1, 1)
    assert options(notes_url) == before
    assert bookkeeping(notes_url) == (0, 0)
    actions = run(notes_url, "SELECT action FROM alphapulse_encryption.audit_log ORDER BY id DESC LIMIT 2")
    assert actions == [("autovacuum_restored",), ("autovacuum_off",)]


def test_restored_after_an_error(notes_url: str) -> None:
    class OurError(Exception):
        pass

    with pytest.raises(OurError), tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True):
        assert OFF in options(notes_url)[0]
        raise OurError
    assert options(notes_url) == (set(), set())
    assert bookkeeping(notes_url) == (0, 0)


def test_an_error_of_the_block_keeps_its_kind(notes_url: str) -> None:
    """It is for whoever does the work to word it."""
    with (
        pytest.raises(psycopg.errors.UndefinedTable),
        tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True),
    ):
        run(notes_url, "SELECT * FROM nothing_there")


def test_the_last_of_several_restores(notes_url: str) -> None:
    database = Database(notes_url)
    run(notes_url, "ALTER TABLE notes SET (autovacuum_enabled = true)")
    first = tuned(database, ENTRY, ACTOR, autovacuum_off=True)
    second = tuned(database, ENTRY, ACTOR, autovacuum_off=True)
    first.__enter__()
    second.__enter__()
    assert bookkeeping(notes_url) == (1, 2)
    first.__exit__(None, None, None)
    assert options(notes_url)[0] == {OFF}
    assert restore_abandoned(database, ACTOR) == ()
    assert options(notes_url)[0] == {OFF}
    second.__exit__(None, None, None)
    assert options(notes_url)[0] == {"autovacuum_enabled=true"}


def test_what_somebody_decided_meanwhile_stays(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes SET (fillfactor = 90)")
    with tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True):
        run(notes_url, "ALTER TABLE notes SET (autovacuum_enabled = on, fillfactor = 80)")
    assert options(notes_url) == ({"autovacuum_enabled=on", "fillfactor=80"}, set())


def test_a_table_that_is_dropped_meanwhile(notes_url: str) -> None:
    with tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True):
        run(notes_url, "DROP TABLE notes")
    assert bookkeeping(notes_url) == (0, 0)


def test_every_partition(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, secret text) PARTITION BY RANGE (id)")
    run(database_url, "CREATE TABLE low PARTITION OF notes FOR VALUES FROM (0) TO (10)")
    run(
        database_url,
        "CREATE TABLE high PARTITION OF notes FOR VALUES FROM (10) TO (99) PARTITION BY HASH (id)",
    )
    run(database_url, "CREATE TABLE highest PARTITION OF high FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    run(database_url, "ALTER TABLE highest SET (autovacuum_enabled = true)")
    support.add_columns(database_url, ENTRY)
    with tuned(Database(database_url), ENTRY, ACTOR, autovacuum_off=True):
        assert options(database_url, "low") == ({OFF}, {OFF})
        assert options(database_url, "highest") == ({OFF}, {OFF})
    assert options(database_url, "low") == (set(), set())
    assert options(database_url, "highest") == ({"autovacuum_enabled=true"}, set())


KILLED = """
import os, sys
from alphapulse_encryption.migration.rows.tuning import tuned
from alphapulse_encryption_tests.migration.support import ACTOR, Database, table
with tuned(Database(sys.argv[1]), table(sys.argv[2], "secret"), ACTOR, autovacuum_off=True):
    print("tuned", flush=True)
    sys.stdin.read()
"""


def killed_while_tuned(url: str, name: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "tuned\n"
        assert OFF in options(url, name)[0]
        assert restore_abandoned(Database(url), ACTOR) == ()  # it lives
        assert OFF in options(url, name)[0]
        os.kill(process.pid, signal.SIGKILL)
    # The server notices when it next reads from the connection.
    support.until(
        lambda: not support.value(url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"),
        "it is gone",
    )


def test_found_and_restored_after_a_kill(notes_url: str) -> None:
    make(notes_url, "other")
    run(notes_url, "ALTER TABLE notes SET (autovacuum_enabled = true, fillfactor = 60)")
    killed_while_tuned(notes_url, "notes")
    killed_while_tuned(notes_url, "other")
    # Whatever is tuned next, anything abandoned is restored first.
    with tuned(Database(notes_url), ENTRY, ACTOR):
        assert options(notes_url) == ({"autovacuum_enabled=true", "fillfactor=60"}, set())
        assert options(notes_url, "other") == (set(), set())
    assert bookkeeping(notes_url) == (0, 0)
    assert restore_abandoned(Database(notes_url), ACTOR) == ()


def test_a_killed_one_and_a_living_one(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes SET (autovacuum_enabled = true)")
    database = Database(notes_url)
    living = tuned(database, ENTRY, ACTOR, autovacuum_off=True)
    living.__enter__()
    killer = "SELECT pg_terminate_backend(pid) FROM alphapulse_encryption.tuning_holders ORDER BY since DESC LIMIT 1"
    dying = tuned(database, ENTRY, ACTOR, autovacuum_off=True)
    dying.__enter__()
    run(notes_url, killer)
    support.until(
        lambda: support.value(notes_url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 1,
        "gone",
    )
    assert restore_abandoned(database, ACTOR) == ()
    assert options(notes_url)[0] == {OFF}
    living.__exit__(None, None, None)
    assert options(notes_url)[0] == {"autovacuum_enabled=true"}
    # Its process lived on, and only its session was ended: it finds nothing left to do.
    dying.__exit__(None, None, None)
    assert options(notes_url)[0] == {"autovacuum_enabled=true"}
    assert bookkeeping(notes_url) == (0, 0)


def test_restored_after_a_crash_of_the_server(server_dir: Path) -> None:
    with EmbeddedPostgres(server_dir, settings={**UNSAFE_SETTINGS, "synchronous_commit": "on"}) as server:
        server.ensure_database("crashing")
        url = server.url("crashing")
        make(url)
        run(url, "ALTER TABLE notes SET (autovacuum_enabled = true)")
        with tuned(Database(url), ENTRY, ACTOR, autovacuum_off=True):
            postmaster = server.postmaster()
            assert postmaster is not None
            postmaster.send_signal(signal.SIGQUIT)  # immediate shutdown: as after a power cut
            support.until(lambda: not server.is_running(), "it is down")
            server.ensure_running()
            url = server.url("crashing")
            assert options(url)[0] == {OFF}
            assert restore_abandoned(Database(url), ACTOR) == ("notes",)
            assert options(url)[0] == {"autovacuum_enabled=true"}
        assert options(url)[0] == {"autovacuum_enabled=true"}
        assert bookkeeping(url) == (0, 0)


def test_the_end_survives_a_lost_session(notes_url: str) -> None:
    with tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True):
        run(notes_url, "SELECT pg_terminate_backend(pid) FROM alphapulse_encryption.tuning_holders")
    assert options(notes_url) == (set(), set())
    assert bookkeeping(notes_url) == (0, 0)


def test_a_lock_that_cannot_be_had_at_the_end(notes_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call restores; meanwhile, nothing is forgotten."""
    monkeypatch.setattr(tuning, "LOCK_TIMEOUT", "5ms")
    monkeypatch.setattr("alphapulse_encryption.migration.postgres.ddl.LONGEST_PAUSE_SECONDS", 0.01)
    with support.application(notes_url, autocommit=False) as other:
        with (
            pytest.raises(RefusedError, match="restore autovacuum for notes"),
            tuned(Database(notes_url), ENTRY, ACTOR, autovacuum_off=True),
        ):
            other.execute("LOCK TABLE notes IN SHARE UPDATE EXCLUSIVE MODE")
        assert options(notes_url)[0] == {OFF}
        with pytest.raises(RefusedError):
            restore_abandoned(Database(notes_url), ACTOR)
        other.rollback()
    assert restore_abandoned(Database(notes_url), ACTOR) == ("notes",)
    assert options(notes_url) == (set(), set())


def test_nothing_to_restore_where_nothing_was_begun(database_url: str) -> None:
    assert restore_abandoned(Database(database_url), ACTOR) == ()
    assert run(database_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'alphapulse_encryption'") == []


def test_work_mem_is_the_sessions_own(notes_url: str) -> None:
    database = Database(notes_url)
    with tuned(database, ENTRY, ACTOR, work_mem="77MB"):
        with database.session("work") as connection:
            use_memory(connection, "77MB")
            assert support.ask(connection, "SHOW work_mem") == [("77MB",)]
        assert support.value(notes_url, "SHOW work_mem") != "77MB"
        assert options(notes_url) == (set(), set())


@pytest.mark.parametrize(
    "value", ["", "lots", "64", "64 mb", "-1MB", "1MB; DROP TABLE notes", "1kB", "9999999999TB"]
)
def test_work_mem_that_means_nothing(notes_url: str, value: str) -> None:
    with (
        pytest.raises(ConfigurationError, match="work_mem"),
        tuned(Database(notes_url), ENTRY, ACTOR, work_mem=value, autovacuum_off=True),
    ):
        pass
    assert options(notes_url) == (set(), set())
    assert bookkeeping(notes_url) == (0, 0)
