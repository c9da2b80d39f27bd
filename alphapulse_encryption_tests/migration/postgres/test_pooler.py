"""Connection poolers: one in transaction mode is refused untouched, one in session mode serves where it is allowed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psycopg
import pytest

from alphapulse_encryption.migration.postgres.database import Database, DatabaseUnreachable, Pooled
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="There is no PgBouncer (Debian: apt install pgbouncer)."
)

SESSIONS = 4
_CONFIGURATION = """
[databases]
* = host={host} port={port} user={user}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
auth_file = {folder}/users.txt
pool_mode = {mode}
default_pool_size = 40
server_round_robin = 1
ignore_startup_parameters = extra_float_digits
logfile = {folder}/log
pidfile = {folder}/pid
"""

Pooler = Callable[[str, str], str]


@pytest.fixture
def pooler() -> Iterator[Pooler]:
    """Starts a PgBouncer in a mode, before a database; the address that it gives the database."""
    # Not below pytest's own directory, which is closed to the user that it runs as.
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:

        def start(mode: str, url: str) -> str:
            return stack.enter_context(_started(mode, url, Path(folder)))

        yield start


@contextlib.contextmanager
def _started(mode: str, url: str, folder: Path) -> Iterator[str]:
    assert PROGRAM is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = probe.getsockname()[1]
    with psycopg.connect(url) as connection:
        user, name = connection.info.user, connection.info.dbname
    host = parse_qs(urlsplit(url).query)
    (folder / "users.txt").write_text(f'"{user}" ""\n')
    settings = {"host": host["host"][0], "port": host.get("port", ["5432"])[0], "user": user}
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(_CONFIGURATION.format(listen=listen, folder=folder, mode=mode, **settings))
    # It does not run as root; the server's own user may use the server's socket.
    root = os.geteuid() == 0
    account = Path(settings["host"]).stat()
    os.chown(folder, account.st_uid, account.st_gid)
    process = subprocess.Popen(
        [PROGRAM, configuration],
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=account.st_uid if root else None,
        group=account.st_gid if root else None,
        extra_groups=[] if root else None,
    )
    pooled = f"postgresql://{user}@127.0.0.1:{listen}/{name}"

    def answers() -> bool:
        with contextlib.suppress(psycopg.Error):
            psycopg.connect(pooled, connect_timeout=5).close()
            return True
        return False

    try:
        support.until(answers, "the pooler answers")
        yield pooled
    finally:
        process.terminate()
        process.wait()


def seen_by(sessions: list[psycopg.Connection[tuple[object, ...]]]) -> set[tuple[object, ...]]:
    """What the application finds in every session of the server that the pooler has for it."""
    query = (
        "SELECT current_setting('search_path'), current_setting('TimeZone'), current_setting('lock_timeout')"
    )
    for session in sessions:
        session.execute("BEGIN")
    seen = {session.execute(query).fetchall()[0] for session in sessions}
    for session in sessions:
        session.execute("ROLLBACK")
    return seen


@pytest.mark.parametrize("allowed", [False, True])
def test_one_in_transaction_mode_is_refused_and_keeps_nothing(
    pooler: Pooler, database_url: str, allowed: bool
) -> None:
    url = pooler("transaction", database_url)
    with contextlib.ExitStack() as stack:
        sessions = [
            stack.enter_context(psycopg.connect(url, autocommit=True, prepare_threshold=None))
            for _ in range(SESSIONS)
        ]
        before = seen_by(sessions)
        for _ in range(2 * SESSIONS):
            with pytest.raises(Pooled, match="pooler") as caught:
                Database(url, session_pooler=allowed).connect()
            assert caught.value.exit_status == 2
        assert seen_by(sessions) == before
    assert support.value(database_url, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == 0


def test_one_in_session_mode_has_to_be_allowed(pooler: Pooler, database_url: str) -> None:
    url = pooler("session", database_url)
    with pytest.raises(Pooled, match="ALPHAPULSE_DATABASE_POOLER=session"):
        Database(url).connect()
    with Database(url, session_pooler=True).connect() as connection:
        assert support.ask(connection, "SHOW search_path") == [("pg_catalog",)]
    # PgBouncer takes back what a session had set.
    with psycopg.connect(url) as connection:
        assert support.ask(connection, "SHOW search_path") != [("pg_catalog",)]


def test_the_whole_way_through_one_in_session_mode(pooler: Pooler, theirs: Place) -> None:
    direct = theirs.url
    assert theirs.catalogue is not None
    url = pooler("session", direct)
    theirs.url = url
    assert "connection pooler" in theirs.fails(2, "--status").stderr
    theirs.extra["ALPHAPULSE_DATABASE_POOLER"] = "session"
    assert (
        "ALPHAPULSE_DATABASE_POOLER" in theirs.fails(2, "--status", ALPHAPULSE_DATABASE_POOLER="mine").stderr
    )
    theirs.succeeds("--add-columns", "--migrate-data", "--verify", "--create-views")
    theirs.succeeds("--backup", "--restore-drill", "--switch-to-encrypted")
    state = support.run(direct, "SELECT DISTINCT authority FROM alphapulse_encryption.tables")
    assert state == [("ciphertext",)]


def test_one_that_takes_no_options_of_the_address_is_named(pooler: Pooler, database_url: str) -> None:
    address = pooler("session", database_url)
    with pytest.raises(DatabaseUnreachable, match="pooler does not take the address's options"):
        Database(f"{address}?options=-cstatement_timeout%3D9min", session_pooler=True).connect()
