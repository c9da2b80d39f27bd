"""Programs of PostgreSQL's as children."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from psycopg.conninfo import make_conninfo

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres import programs
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.postgres import installed
from alphapulse_encryption_tests.migration.postgres.installed import Server, installed_server

SECRET = "canary/5b1d@:%"
ODD = "of 'a' b=c"


def test_what_a_child_leaves_behind_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_EXIT_TIMEOUT", 0.2)
    command = ["sh", "-c", "sleep 600 & echo $!; echo something went wrong >&2"]
    environment = {"PATH": os.environ["PATH"]}
    with programs.child(command, environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as (
        process,
        said,
    ):
        assert process.stdout is not None
        left = int(process.stdout.readline())
        try:
            assert process.wait() == 0
            assert said() == "something went wrong\n"
        finally:
            # Had it ended by itself, there would be nothing to see here.
            os.kill(left, signal.SIGKILL)


def test_of_much_that_a_child_says_beginning_and_end_are_heard() -> None:
    command = ["sh", "-c", "echo first >&2; head -c 300000 /dev/zero | tr '\\0' '\\n' >&2; echo last >&2"]
    running = programs.child(
        command, {"PATH": os.environ["PATH"]}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    with running as (process, said):
        process.wait()
    assert said().startswith("first\n") and said().endswith("\nlast\n") and len(said()) < 200_000


@pytest.fixture(scope="module")
def server(postgres: EmbeddedPostgres) -> Iterator[Server]:
    if not installed.BINS:
        pytest.skip(installed.NEEDED)
    with installed_server(postgres) as server:
        walk.query(server.socket("postgres"), f"CREATE ROLE guarded SUPERUSER LOGIN PASSWORD '{SECRET}'")
        for name in ("tls", ODD, "restored"):
            walk.query(server.socket("postgres"), f'CREATE DATABASE "{name}"')
        walk.query(
            server.socket(_quoted(ODD)), "CREATE TABLE people (name text); INSERT INTO people VALUES ('x')"
        )
        yield server


def _quoted(name: str) -> str:
    return make_conninfo(dbname=name).partition("=")[2]


def _fake(directory: Path, version: str, *, tls: bool = True) -> Path:
    directory.mkdir()
    for name in ("pg_dump", "pg_restore"):
        said = (
            "no such server" if tls else 'sslmode value "require" invalid when SSL support is not compiled in'
        )
        (directory / name).write_text(
            f"#!/bin/sh\n[ \"$1\" = --version ] && echo '{name} (PostgreSQL) {version}' || echo '{said}' >&2\n"
        )
        (directory / name).chmod(0o755)
    return directory


def test_the_pair_nearest_to_the_server_is_chosen(tmp_path: Path) -> None:
    old, same, newer, twin = (
        _fake(tmp_path / f"{n}", version)
        for n, version in enumerate(("15.9", "16.2 (Debian 16.2-1)", "18.1", "16.4"))
    )
    places = [tmp_path, old, newer, same, twin]
    assert programs.choose(places, 16, tls=False).pg_dump == str(same / "pg_dump")
    assert programs.choose(places, 17, tls=True).pg_dump == str(newer / "pg_dump")
    (same / "pg_restore").unlink()
    assert programs.choose(places, 16, tls=False).version == "16.4"
    with pytest.raises(ConfigurationError, match=r"18\.1.* too old.*apt install postgresql-client-19"):
        programs.choose(places, 19, tls=False)


def test_one_without_tls_is_not_chosen_for_an_address_over_tls(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    without = _fake(tmp_path / "without", "18.2", tls=False)
    able = _fake(tmp_path / "able", "18.3")
    assert programs.choose([without, able], 18, tls=False).version == "18.2"
    assert programs.choose([without, able], 18, tls=True).version == "18.3"
    with pytest.raises(ConfigurationError, match=r"built without TLS.*postgresql18"):
        programs.choose([without], 18, tls=True)
    # The embedded ones answer for themselves.
    embedded = programs.choose([postgres.bin_dir()], 14, tls=False)
    said = subprocess.run(
        [embedded.pg_dump, "--host=127.0.0.1", "--port=1"],
        env={"PGSSLMODE": "require"},
        capture_output=True,
        check=False,
    ).stderr
    assert embedded.has_tls() is (b"not compiled in" not in said)


@pytest.mark.skipif(not installed.BINS, reason=installed.NEEDED)
def test_the_usual_places_have_what_the_path_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    pair = programs.choose(programs.usual_places(), 14, tls=True)
    assert Path(pair.pg_dump).parent in installed.BINS


def test_debians_wrapper_is_passed_over(tmp_path: Path) -> None:
    # It chooses the version by the address, and tells another one when it is asked without.
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "pg_wrapper"
    wrapper.write_text("#!/bin/sh\necho 'pg_dump (PostgreSQL) 18.1'\n")
    wrapper.chmod(0o755)
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / "bin" / name).symlink_to(wrapper)
    with pytest.raises(ConfigurationError, match="found nowhere"):
        programs.choose([tmp_path / "bin"], 14, tls=False)


def _dumped(way: programs.Way, directory: Path) -> str:
    """What a pg_dump reached: where it got its data from."""
    pair = programs.choose([directory], way.server, tls=way.tls)
    ended = subprocess.run(
        [pair.pg_dump, "--no-password", f"--dbname={way.dbname}"],
        env=dict(way.environment),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_child_reaches_what_our_session_reached(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the operator's environment says besides."""
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_MASTER_KEY", "secret")
    services = server.folder / "services"
    services.write_text(
        f"[other]\nhost=127.0.0.1\nport=1\ndbname=nothing\nuser=nobody\n[here]\nport={server.port}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    odd = make_conninfo(dbname=ODD)
    password = f"host=127.0.0.1 port={server.port} user=guarded password={SECRET}"
    for conninfo in (
        f"{password} {odd} service=other",
        f"{password} {odd} service=other keepalives=1 keepalives_idle=5",
        f"host=127.0.0.1,127.0.0.1 port=1,{server.port} user=guarded password={SECRET} {odd} "
        "target_session_attrs=read-write",
        f"host={server.folder} service=here user=guarded {odd}",
        f"postgresql://guarded:{quote(SECRET, safe='')}@127.0.0.1:{server.port}/{quote(ODD, safe='')}"
        "?options=-cstatement_timeout%3D9min",
        f"postgresql://guarded:{quote(SECRET, safe='')}@127.0.0.1:{server.port}/{quote(ODD, safe='')}?sslmode=require",
    ):
        way = programs.way_to(Database(conninfo))
        assert "people" in _dumped(way, server.bin_dir), conninfo
        assert SECRET not in way.dbname
        assert not any(
            name.startswith("ALPHAPULSE") or name.startswith("PGSERVICE") for name in way.environment
        )
        # Over TLS as our session is, though the address only prefers it.
        assert way.tls is (str(server.folder) not in conninfo)
        assert (way.environment.get("PGSSLMODE") == "require") is way.tls
    # A variable is heard where the address says nothing, by both.
    monkeypatch.setenv("PGHOST", str(server.folder))
    monkeypatch.setenv("PGPORT", str(server.port))
    assert "people" in _dumped(programs.way_to(Database(f"user=guarded {odd}")), server.bin_dir)
    file = server.folder / "pass"
    file.write_text(f"127.0.0.1:{server.port}:*:guarded:{SECRET.replace(':', chr(92) + ':')}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    assert "people" in _dumped(
        programs.way_to(Database(f"host=127.0.0.1 user=guarded {odd}")), server.bin_dir
    )


def test_a_passphrase_has_no_way_in_secret(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="sslpassword") as caught:
        programs.way_to(Database(f"{server.socket('postgres')} sslpassword={SECRET}"))
    assert SECRET not in str(caught.value)


def _restored(archive: bytes, into: Database, postgres: EmbeddedPostgres) -> str | None:
    """Restores with the embedded programs, which are newer than the installed server."""
    way = programs.way_to(into)
    pair = programs.choose([postgres.bin_dir()], way.server, tls=way.tls)
    running = programs.child(
        programs.restore_command(pair, way), way.environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    with running as (process, said):
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(archive)
            process.stdin.close()
        status = process.wait()
    return programs.restore_problem(status, said(), way)


def _archive(way: programs.Way, postgres: EmbeddedPostgres) -> bytes:
    pair = programs.choose([postgres.bin_dir()], way.server, tls=way.tls)
    return subprocess.run(
        programs.dump_command(pair, way), env=dict(way.environment), capture_output=True, check=True
    ).stdout


ROWS = f"""
CREATE TABLE kinds (id int PRIMARY KEY); INSERT INTO kinds SELECT generate_series(1, 9);
CREATE TABLE things (id int PRIMARY KEY, kind int REFERENCES kinds, note text CHECK (note <> 'x'));
INSERT INTO things SELECT i, i, '{SECRET}' FROM generate_series(1, 9) i;
"""


@pytest.mark.parametrize(
    ("broken", "there", "said"),
    [
        ("", "", None),
        ("", "CREATE TABLE things (id text)", r"at CREATE TABLE public\.things: it exists already"),
        (
            "CREATE DOMAIN d AS text; CREATE TABLE u (a d, b text); INSERT INTO u VALUES ('{}', '{}'), ('{}', 'z');"
            "CREATE FUNCTION one(t text) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'k' || t $$;"
            "CREATE UNIQUE INDEX u_key ON u (one(b)); DROP FUNCTION IF EXISTS nothing;"
            "UPDATE pg_proc SET prosrc = $$ SELECT 'k' $$ WHERE proname = 'one'",
            "",
            r"at CREATE UNIQUE INDEX u_key: rows have the same key in u_key \(23505\)",
        ),
        (
            "UPDATE pg_constraint SET convalidated = convalidated; SET session_replication_role = replica;"
            "DELETE FROM kinds WHERE id = 5",
            "",
            r"at ALTER TABLE ONLY public.things: a row violates the foreign key things_kind_fkey \(23503\)",
        ),
        (
            "ALTER TABLE things DROP CONSTRAINT things_note_check;"
            "ALTER TABLE things ADD CONSTRAINT longer CHECK (length(note) > 99) NOT VALID;"
            "UPDATE pg_constraint SET convalidated = true WHERE conname = 'longer'",
            "",
            r'at table "things": a row violates the check longer \(23514\)',
        ),
        (
            "CREATE POLICY p ON things TO missing_there; CREATE TYPE missing_type AS ENUM ('a')",
            "RENAME",
            r"at CREATE POLICY p: the role missing_there is missing on that server \(42704\)",
        ),
    ],
)
def test_a_restore_by_a_newer_program_succeeds_or_says_why(
    server: Server, postgres: EmbeddedPostgres, broken: str, there: str, said: str | None
) -> None:
    if server_version(server) >= 17:
        pytest.skip("The installed server knows what the newest programs set.")
    for name in ("from_there", "to_here"):
        walk.query(server.socket("postgres"), f"CREATE DATABASE {name}")
    walk.query(server.socket("postgres"), "CREATE ROLE missing_there")
    try:
        walk.query(server.socket("from_there"), ROWS + broken.replace("{}", SECRET))
        archive = _archive(programs.way_to(Database(server.socket("from_there"))), postgres)
        if there == "RENAME":
            walk.query(server.socket("from_there"), "DROP POLICY p ON things; DROP ROLE missing_there")
        elif there:
            walk.query(server.socket("to_here"), there)
        problem = _restored(archive, Database(server.socket("to_here")), postgres)
        if said is None:
            assert problem is None
            assert walk.value(server.socket("to_here"), "SELECT count(*) FROM things") == 9
            cut = _restored(archive[: len(archive) // 2], Database(server.socket("restored")), postgres)
            assert cut is not None and "cut short" in cut
        else:
            assert problem is not None and re.search(said, problem), problem
            assert SECRET not in problem
    finally:
        for name in ("from_there", "to_here"):
            walk.query(server.socket("postgres"), f"DROP DATABASE {name} WITH (FORCE)")
        walk.query(server.socket("postgres"), "DROP ROLE IF EXISTS missing_there")


def server_version(server: Server) -> int:
    return int(
        walk.value(server.socket("postgres"), "SELECT current_setting('server_version_num')::int / 10000")
    )


_HEAD = (
    "pg_restore: error: could not execute query: ERROR:  unrecognized configuration "
    'parameter "{0}"\nCommand was: SET {0} = 0;\n'
)
_LAST = "pg_restore: warning: errors ignored on restore: {}\n"


@pytest.mark.parametrize(
    ("status", "said", "whole"),
    [
        (1, _HEAD.format("no_such_setting") + _LAST.format(1), True),
        # A setting that the server knows was refused for another reason.
        (1, _HEAD.format("statement_timeout") + _LAST.format(1), False),
        # One more than those.
        (1, _HEAD.format("no_such_setting") + _LAST.format(2), False),
        # It did not come to its end.
        (1, _HEAD.format("no_such_setting"), False),
        (-9, _HEAD.format("no_such_setting") + _LAST.format(1), False),
        # Not at the head.
        (1, "pg_restore: x\n" + _HEAD.format("no_such_setting") + _LAST.format(1), False),
    ],
)
def test_no_other_error_is_passed_over(database_url: str, status: int, said: str, whole: bool) -> None:
    way = programs.way_to(Database(database_url))
    assert (programs.restore_problem(status, said, way) is None) is whole


def test_a_child_that_cannot_connect_tells_why(server: Server) -> None:
    way = programs.way_to(Database(server.url("tls", "guarded", password=SECRET)))
    pair = programs.choose([server.bin_dir], way.server, tls=True)
    said = subprocess.run(
        programs.dump_command(pair, way),
        env={**way.environment, "PGPASSWORD": "canary-wrong"},
        capture_output=True,
        text=True,
        check=False,
    ).stderr
    assert "the password is not accepted" in programs.kind_of_failure(said)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "pg_dump: error: query failed: ERROR:  permission denied for table of t\n",
            "for table of t (42501)",
        ),
        ("pg_restore: error: ERROR:  permission denied for customer canary-1\n", "permission denied (42501)"),
        (
            'pg_restore: error: COPY failed for table "t": ERROR:  could not extend file "base/1/2": No space left on '
            'device\nHINT:  Check free disk space.\nCONTEXT:  COPY t, line 7, column a: "canary-1"\n',
            'at table "t": the server\'s disk is full (53100)',
        ),
        (
            'pg_dump: error: Dumping the contents of table "t" failed: PQgetResult() failed.\npg_dump: detail: Error '
            'message from server: ERROR:  invalid page in block 0 of relation "canary-1"\n',
            'at table "t": a page of the database is damaged',
        ),
        (
            'pg_restore: error: COPY failed for table "t": ERROR:  invalid input syntax for type integer: "canary-1"\n',
            'at table "t": its messages may quote values',
        ),
        ("pg_restore: error: unsupported version (1.17) in file header\n", "older than the pg_dump"),
        # What follows is because of the first.
        (
            'pg_restore: error: could not execute query: ERROR:  role "a" does not exist\nCommand was: ALTER TABLE t\n'
            'pg_restore: error: COPY failed for table "u": ERROR:  relation "u" already exists\n',
            "at ALTER TABLE t: the role a is missing",
        ),
    ],
)
def test_kind_and_object_of_a_failure_are_told_and_no_value(said: str, told: str) -> None:
    assert told in programs.kind_of_failure(said)
    assert "canary" not in programs.kind_of_failure(said)
