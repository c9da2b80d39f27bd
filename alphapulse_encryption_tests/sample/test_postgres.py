"""The embedded server: who starts it, who stops it, and what it survives."""

import contextlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

SETTINGS = {"fsync": "off", "max_connections": "20", "shared_buffers": "16MB"}

# Starts the server, says so, and ends when its standard input does.
HOLDER = """
import sys
from pathlib import Path
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
server = EmbeddedPostgres(Path(sys.argv[1]), settings={"fsync": "off"})
server.ensure_running()
print(server.postmaster().pid, flush=True)
sys.stdin.read()
"""

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def server(server_dir: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(server_dir, settings=SETTINGS)


@pytest.fixture
def holder(server_dir: Path) -> Iterator[Start]:
    """Starts processes that hold a lease each; those still there are killed after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(server_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def postmaster_of(process: "subprocess.Popen[str]") -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def let_go(process: "subprocess.Popen[str]") -> None:
    process.communicate()
    assert process.returncode == 0


def query(server: EmbeddedPostgres, statement: str) -> object:
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        row = connection.execute(statement.encode()).fetchone()
    assert row is not None
    return row[0]


def test_last_process_out_stops_the_server(server: EmbeddedPostgres, holder: Start) -> None:
    first, second = holder(), holder()
    # Both find an empty directory: one makes the cluster, the other waits for it.
    assert postmaster_of(first) == postmaster_of(second)
    let_go(first)
    assert server.is_running()
    assert query(server, "SELECT 1") == 1
    let_go(second)
    assert not server.is_running()
    assert "database system is shut down" in server.log_file.read_text()


def test_killed_process_holds_nothing(server: EmbeddedPostgres, holder: Start) -> None:
    killed, other = holder(), holder()
    postmaster_of(killed)
    postmaster_of(other)
    killed.kill()
    killed.wait()
    let_go(other)
    assert not server.is_running()


def test_server_of_killed_process_is_taken_over(server: EmbeddedPostgres, holder: Start) -> None:
    killed = holder()
    pid = postmaster_of(killed)
    killed.kill()
    killed.wait()
    with server:
        assert (found := server.postmaster()) is not None
        assert found.pid == pid
    assert not server.is_running()


def test_stop_if_unused(server: EmbeddedPostgres, holder: Start) -> None:
    assert not server.stop(if_unused=True)
    process = holder()
    postmaster_of(process)
    assert not server.stop(if_unused=True)
    assert server.is_running()
    process.kill()
    process.wait()
    assert server.stop(if_unused=True)
    assert not server.is_running()


def test_commands_started_meanwhile_hold_nothing(server: EmbeddedPostgres) -> None:
    server.ensure_running()
    with subprocess.Popen(
        [sys.executable, "-c", "print('up', flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    ) as command:
        # The kernel closes descriptors while the new program is on its way in.
        assert command.stdout is not None
        assert command.stdout.readline() == b"up\n"
        server.release()
        assert command.poll() is None
        assert not server.is_running()
        command.communicate(b"\n")


def test_forked_child_takes_no_lease_away(server: EmbeddedPostgres) -> None:
    server.ensure_running()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            server.release()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert server.is_running()
    assert not EmbeddedPostgres(server.log_file.parents[1]).stop(if_unused=True)
    server.release()
    assert not server.is_running()


def test_killed_server_recovers(server: EmbeddedPostgres) -> None:
    with server:
        server.ensure_database("kept")
        with psycopg.connect(server.url("kept")) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        killed = server.postmaster()
        assert killed is not None
        with psycopg.connect(server.url("kept")):  # a backend that outlives its postmaster for a moment
            killed.kill()
            while server.is_running():
                pass  # it dies a moment later
            server.ensure_running()
        assert server.postmaster() != killed
        with psycopg.connect(server.url("kept")) as connection:
            assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)
    assert not server.is_running()


@pytest.mark.parametrize("content", ["", "{pid}\n/elsewhere\n1700000000\n5432\n\n\n\nready   \n"])
def test_lock_file_of_another_life(server: EmbeddedPostgres, content: str) -> None:
    with server:
        cluster = server.log_file.parent
    (cluster / "postmaster.pid").write_text(content.format(pid=os.getpid()))
    assert not server.is_running()
    with server:
        assert query(server, "SELECT 1") == 1


def test_stopped_under_a_lease_and_started_again(server: EmbeddedPostgres, holder: Start) -> None:
    process = holder()
    postmaster_of(process)
    server.ensure_running()
    EmbeddedPostgres(server.log_file.parents[1]).stop()
    assert not server.is_running()
    server.ensure_running()
    assert query(server, "SELECT 1") == 1
    server.release()
    assert server.is_running()  # the other process still has its lease
    let_go(process)
    assert not server.is_running()


def test_threads_share_one_lease(server: EmbeddedPostgres) -> None:
    found: list[psutil.Process | None] = []

    def use() -> None:
        server.ensure_running()
        found.append(server.postmaster())

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(threads)
    assert len(set(found)) == 1
    server.release()
    assert not server.is_running()


def test_unfinished_cluster_is_made_anew(server: EmbeddedPostgres) -> None:
    unfinished = server.log_file.parents[1] / "cluster.new"
    unfinished.mkdir(parents=True)
    (unfinished / "PG_VERSION").write_text("18\n")
    with server:
        assert query(server, "SELECT 1") == 1


def test_directory_deleted_under_the_server(server: EmbeddedPostgres) -> None:
    with server:
        forgotten = server.postmaster()
        shutil.rmtree(server.log_file.parent)
        server.ensure_running()
        assert server.postmaster() not in (None, forgotten)
        assert query(server, "SELECT 1") == 1


@pytest.mark.parametrize("name", ["deep/" * 40 + "postgres", "it's, a \u00e4 \u65e5 100% path/postgres"])
def test_paths_that_no_socket_could_have(server_dir: Path, name: str) -> None:
    server = EmbeddedPostgres(server_dir / name, settings=SETTINGS)
    with server:
        server.ensure_database("strange \u00e4 name?")
        with psycopg.connect(server.url("strange \u00e4 name?")) as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("strange \u00e4 name?",)
        sockets = Path(str(query(server, "SHOW unix_socket_directories")))
    assert not sockets.is_relative_to(server_dir)
    assert not sockets.exists()


def test_two_servers_side_by_side(server_dir: Path) -> None:
    one = EmbeddedPostgres(server_dir / "one", settings=SETTINGS)
    two = EmbeddedPostgres(server_dir / "two", settings=SETTINGS)
    with one, two:
        for server in (one, two):
            assert query(server, "SHOW data_directory") == str(server.log_file.parent)
            assert query(server, "SHOW listen_addresses") == ""
    assert not one.is_running()
    assert not two.is_running()


def test_other_programs_settings_do_not_matter(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PGPORT": "1",
        "PGHOST": "nowhere.invalid",
        "PGDATA": "/nowhere",
        "PGUSER": "no",
    }.items():
        monkeypatch.setenv(name, value)
    with server:
        assert query(server, "SELECT current_user") == "postgres"


def test_settings(postgres: EmbeddedPostgres) -> None:
    postgres.ensure_running()
    assert query(postgres, "SHOW fsync") == "off"
    assert query(postgres, "SHOW max_connections") == "200"
    assert query(postgres, "SHOW shared_preload_libraries") == "pg_stat_statements"
    assert query(postgres, "SHOW timezone") == "UTC"
    assert query(postgres, "SHOW server_encoding") == "UTF8"
    # Sorted by code point, and yet every script has its upper and lower case.
    assert query(postgres, "SELECT 'Z' < 'a' AND upper('\u00e4\u03c3') = '\u00c4\u03a3'") is True


def test_driver_in_the_address(postgres: EmbeddedPostgres) -> None:
    assert postgres.url("dagster", "postgresql+psycopg2").startswith(
        "postgresql+psycopg2://postgres@/dagster?host=/"
    )


def test_socket_is_for_its_owner_alone(server: EmbeddedPostgres) -> None:
    with server:
        sockets = Path(str(query(server, "SHOW unix_socket_directories")))
        assert sockets.stat().st_mode & 0o077 == 0
        # Where the server runs as another user, parents were opened for passing through, not for reading.
        assert server.log_file.parents[2].stat().st_mode & 0o076 == 0


def test_log_holds_no_values(server: EmbeddedPostgres) -> None:
    with server:
        with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
            connection.execute("CREATE TABLE secrets (value text UNIQUE CHECK (value <> 'refused-secret'))")
            connection.execute("INSERT INTO secrets VALUES ('double-secret')")
            for statement, values in (
                ("INSERT INTO secrets VALUES ('double-secret')", None),
                ("INSERT INTO secrets VALUES (%s)", ["refused-secret"]),
                ("SELECT %s::text::integer", ["cast-secret"]),
                ("SELECT nothing, 'statement-secret'", None),
            ):
                with pytest.raises(psycopg.Error):
                    connection.execute(statement.encode(), values)
        log = server.log_file.read_text()
    assert "ready to accept connections" in log
    assert "secret" not in log


def test_other_major_version_is_refused(server: EmbeddedPostgres) -> None:
    with server:
        pass
    version = server.log_file.with_name("PG_VERSION")
    version.write_text("9\n")
    with pytest.raises(ConfigurationError, match="was made by PostgreSQL 9"):
        server.ensure_running()


def test_server_that_cannot_start_says_why(server_dir: Path) -> None:
    server = EmbeddedPostgres(server_dir, settings={"shared_preload_libraries": "no_such_library"})
    with pytest.raises(ConfigurationError, match="no_such_library"):
        server.ensure_running()
    assert not server.is_running()


def test_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="ALPHAPULSE_STATE_DIR"):
        EmbeddedPostgres(tmp_path / "file" / "postgres").ensure_running()


class TestCommandLine:
    @pytest.fixture
    def environment(self, server_dir: Path) -> dict[str, str]:
        return {**os.environ, "ALPHAPULSE_STATE_DIR": str(server_dir.parent)}

    @staticmethod
    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "alphapulse_encryption.sample.postgres", *arguments]

    def run(self, environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            self.command(*arguments), env=environment, capture_output=True, text=True, check=False
        )

    def test_psql(self, environment: dict[str, str], server: EmbeddedPostgres) -> None:
        result = self.run(environment, "psql", "-Atc", "SELECT current_database()")
        assert (result.returncode, result.stdout, result.stderr) == (0, "alphapulse\n", "")
        assert not server.is_running()
        assert self.run(environment, "psql", "-c", "SELECT broken").returncode == 1
        assert not server.is_running()

    def test_stop_a_server_in_use(
        self, environment: dict[str, str], server: EmbeddedPostgres, holder: Start
    ) -> None:
        assert self.run(environment, "stop").returncode == 0
        postmaster_of(holder())
        assert self.run(environment, "stop").returncode == 0
        assert not server.is_running()
