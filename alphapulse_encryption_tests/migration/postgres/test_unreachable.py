"""Why a connection failed: real servers refuse, and what is told names the reason and no secret."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import psycopg
import pytest

from alphapulse_encryption.migration.postgres.database import Database, DatabaseUnreachable
from alphapulse_encryption.migration.postgres.unreachable import reason, unreachable
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.postgres import installed
from alphapulse_encryption_tests.migration.postgres.installed import HOST, Server, installed_server

SECRET = "canary-5b1d"


@pytest.fixture(scope="module")
def server(postgres: EmbeddedPostgres) -> Iterator[Server]:
    if not installed.BINS:
        pytest.skip(installed.NEEDED)
    with installed_server(postgres) as server:
        for statement in (
            *(
                "CREATE DATABASE tls",
                "CREATE DATABASE refused",
                "CREATE DATABASE closed",
                "CREATE DATABASE shut",
            ),
            "ALTER DATABASE shut ALLOW_CONNECTIONS false",
            "REVOKE CONNECT ON DATABASE closed FROM PUBLIC",
            f"CREATE ROLE guarded LOGIN PASSWORD '{SECRET}-right'",
            *(
                "CREATE ROLE ada LOGIN",
                "CREATE ROLE owner LOGIN",
                "CREATE ROLE peered LOGIN",
                "CREATE ROLE group_only",
            ),
            "CREATE ROLE single LOGIN CONNECTION LIMIT 0",
        ):
            walk.query(server.socket("postgres"), statement)
        yield server


def told(conninfo: str) -> str:
    with pytest.raises(DatabaseUnreachable) as caught:
        Database(conninfo, variable="THE_VARIABLE").connect().close()
    message = str(caught.value)
    assert SECRET not in message
    return message


@pytest.mark.parametrize(
    ("database", "role", "options", "said"),
    [
        ("postgres", "guarded", {"password": SECRET}, "password is not accepted"),
        ("postgres", "guarded", {"passfile": "/dev/null"}, "a password is needed"),
        ("postgres", "nobody", {}, "no such role"),
        ("postgres", "group_only", {}, "may not log in"),
        ("postgres", "owner", {"sslmode": "require"}, "client certificate"),
        ("postgres", "single", {}, "too many connections"),
        ("nothing", "ada", {}, "no such database"),
        ("shut", "ada", {}, "does not take connections"),
        ("closed", "ada", {}, "may not connect"),
        ("refused", "ada", {}, "pg_hba.conf has no entry for us, with TLS or without"),
        ("tls", "ada", {"sslmode": "disable"}, "no entry for us without TLS"),
        ("postgres", "ada", {"options": "-cunknown=1"}, "does not take the address's options"),
        ("postgres", "ada", {"sslmode": "verify-full", "sslrootcert": "/nowhere"}, "sslrootcert"),
        ("postgres", "ada", {"target_session_attrs": "standby"}, "is a primary"),
        ("postgres", "ada", {"sslmode": "require", "sslcert": "/dev/null"}, "client certificate or its key"),
        ("postgres", "ada", {"sslmode": "require", "ssl_min_protocol_version": "x"}, "malformed"),
    ],
)
def test_what_a_server_refuses(
    server: Server, database: str, role: str, options: dict[str, str], said: str
) -> None:
    message = told(server.url(database, role, **options))
    assert said in message
    assert (
        "THE_VARIABLE" in message
        or "ALTER" in message
        or "GRANT" in message
        or "again" in message
        or "entry" in message
    )
    assert (
        f"port {server.port}" in message and f"database {database}" in message and f"role {role}" in message
    )


def test_the_certificate_of_the_server(server: Server) -> None:
    def address(host: str, **options: str) -> str:
        return server.url("tls", "ada", host=host, hostaddr="127.0.0.1", sslmode="verify-full", **options)

    with Database(address(HOST, sslrootcert=server.authority)).session("look") as connection:
        assert connection.pgconn.ssl_in_use
    assert "of another name" in told(address("other.example", sslrootcert=server.authority))
    assert "not accepted" in told(address(HOST, sslrootcert="system"))
    server.certify(-1)
    try:
        walk.query(server.socket("postgres"), "SELECT pg_reload_conf()")
        support.until(
            lambda: _refused(address(HOST, sslrootcert=server.authority)),
            "the server shows its new certificate",
        )
        assert "expired" in told(address(HOST, sslrootcert=server.authority))
    finally:
        server.certify(30)
        walk.query(server.socket("postgres"), "SELECT pg_reload_conf()")


def _refused(conninfo: str) -> bool:
    try:
        psycopg.connect(conninfo).close()
    except psycopg.OperationalError:
        return True
    return False


def test_without_tls_where_it_is_asked_for(postgres: EmbeddedPostgres, database_url: str) -> None:
    # The embedded server has none, and listens on a socket, where nobody asks: one that answers as it does.
    with _answering(b"N") as port:
        message = told(f"postgresql://ada@127.0.0.1:{port}/x?sslmode=require")
    assert "offers no TLS" in message and "sslmode" in message


def test_what_does_not_speak_the_protocol() -> None:
    with _answering(b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        assert "does not speak PostgreSQL's protocol" in told(f"postgresql://ada@127.0.0.1:{port}/x")
    with _answering(b"") as port:
        assert "ended before it was made" in told(f"postgresql://ada@127.0.0.1:{port}/x")


class _answering:
    """A server that gives every caller the same answer."""

    def __init__(self, answer: bytes) -> None:
        self._answer, self._socket = answer, socket.create_server(("127.0.0.1", 0))

    def __enter__(self) -> int:
        threading.Thread(target=self._serve, daemon=True).start()
        return int(self._socket.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._socket.accept()
            except OSError:
                return
            with caller:
                caller.recv(1024)
                caller.sendall(self._answer)


def test_each_of_several_hosts_has_a_reason_of_its_own(server: Server) -> None:
    message = told(
        f"postgresql://guarded:{SECRET}@127.0.0.1:1,127.0.0.1:{server.port}/postgres?sslmode=disable"
    )
    assert "127.0.0.1:1: connection refused" in message
    assert f"127.0.0.1:{server.port}: the password is not accepted" in message


@pytest.mark.parametrize(
    "conninfo",
    [
        f"postgresql://me:pa@{SECRET}@no-such.invalid/x",
        f"postgresql://me:1/{SECRET}@no-such.invalid/x",
        f"postgresql://me:pa@ss/{SECRET}@no-such.invalid/x",
        f"postgresql://me:{SECRET}/x@no-such.invalid/x",
        f"postgresql://me:1/2?{SECRET}@no-such.invalid/x",
        f"host=no-such.invalid password=pa {SECRET}",
    ],
)
def test_a_password_that_is_not_quoted_is_not_told_as_the_host(conninfo: str) -> None:
    assert "percent-encoded" in told(conninfo)


def test_a_socket_and_a_service_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    message = told("host=/nowhere dbname='of t' user=ada")
    assert "no server at that socket" in message and "/nowhere" in message and "database of t" in message
    monkeypatch.setenv("PGSERVICEFILE", "/dev/null")
    assert "service unknown" in (message := told("service=unknown")) and "no such service" in message


def test_variables_of_the_environment_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", "1")
    monkeypatch.setenv("PGPASSWORD", SECRET)
    message = told("dbname=x user=ada")
    assert "127.0.0.1" in message and "port 1" in message


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        # As libpq, servers and PgBouncer say it, where no server of a test does.
        ("FATAL:  the database system is starting up", "starting up"),
        ("FATAL:  the database system is not yet accepting connections", "starting up"),
        (
            "FATAL:  the database system is not accepting connections\nDETAIL:  Hot standby mode is disabled.",
            "standby",
        ),
        ("FATAL:  the database system is in recovery mode", "recovers"),
        ("FATAL:  the database system is shutting down", "shutting down"),
        ("FATAL:  sorry, too many clients already", "too many"),
        (
            "FATAL:  remaining connection slots are reserved for roles with the SUPERUSER attribute",
            "too many",
        ),
        ("FATAL:  unsupported startup parameter in options: search_path", "pooler"),
        ("FATAL:  query_wait_timeout", "pooler"),
        (
            "FATAL:  server login has been failing, cached error: connect failed (server_login_retry)",
            "pooler",
        ),
        ("FATAL:  no such database: x", "no such database"),
        ('FATAL:  Peer authentication failed for user "x"', "system user"),
        ("session is read-only", "standby"),
        ("SSL error: tlsv1 alert protocol version", "TLS could not be agreed on"),
        ('sslmode value "require" invalid when SSL support is not compiled in', "built without TLS"),
        (
            'could not translate host name "x" to address: Temporary failure in name resolution',
            "unknown host",
        ),
        ("timeout expired", "timed out"),
        ("No route to host", "no way"),
        ('connection to server on socket "/x/.s.PGSQL.5432" failed: Permission denied', "socket"),
        # libpq tries again without TLS, and what it is told then is not the reason.
        (
            'FATAL:  password authentication failed for user "u"\nFATAL:  no pg_hba.conf entry for host "1", user '
            '"u", database "d", no encryption',
            "password",
        ),
        ("etwas anderes", "not known"),
    ],
)
def test_reasons_follow_from_what_is_said(said: str, kind: str) -> None:
    assert kind in reason(said).what
    assert "THE_VARIABLE" in unreachable("host=h", said, "THE_VARIABLE") or "{}" not in reason(said).next
