"""Real PostgreSQL for the tests: one server per test process, a fresh database per test."""

import contextlib
import fcntl
import gc
import itertools
import os
import random
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

if TYPE_CHECKING:
    from alphapulse_encryption_tests.place import Place

SAMPLE_ROWS = 3_000
# Nobody needs the data after a crash of the machine.
UNSAFE_SETTINGS = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    # In memory, space is dear, and a checkpoint costs nothing.
    "max_wal_size": "256MB",
}

# Files and directories whose tests start many programs.
_LONG_FIRST = (
    "scale",
    "docs/test_commands.py",
    "test_demo.py",
    "browser",
    "test_nothing_leaks.py",
    "roles/test_walk.py",
    "test_wheel.py",
    "test_command_line.py",
    "migration/rows/test_killed.py",
    "rehearsal",
    "jobs",
    "test_backup.py",
    "assets",
    "alerts",
    "test_wrong_key.py",
    "migration/steps/test_round_trip.py",
    "sample",
    "migration/rows/test_live_writes.py",
    "migration/steps/test_drop.py",
    "migration/steps/test_restore.py",
    "products",
    "test_bad_input.py",
)
# The markers that say what a test needs, by the fixtures that bring it; whoever uses one of them, through others too,
# is marked.
_NEEDS = {
    "postgres": {"postgres", "server_dir", "demo"},
    "dagster": {"theirs", "here", "sample", "small", "migrated", "somewhere", "there", "demo", "home"},
    "browser": {"programs"},
    "aws": {"s3_url", "_moto"},
}
_PREFIX = "alphapulse-tests-"
# A file system in memory, where Linux has one, and how many bytes it and the memory have to have left to be used:
# making a database, which most tests do, takes a third of the time there.
_IN_MEMORY = Path("/dev/shm")
_ENOUGH = 6 << 30

_numbers = itertools.count(1)

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seed", type=int, help="of the stress tests' random choices, to repeat them; random if not given"
    )
    parser.addoption(
        "--servers",
        default="",
        help="major versions of PostgreSQL for the tests of versions, or `ends`; all if not given",
    )


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until the tests are collected
    config.pluginmanager.register(_Announced(), "announced")
    if config.option.seed is None:
        config.option.seed = random.SystemRandom().randrange(1_000_000)


class _Announced:
    """Fails a test that starts a server in this process and is not marked for it: `make quick` goes by the markers."""

    def __init__(self) -> None:
        self._item: pytest.Item | None = None
        announced, start = self, EmbeddedPostgres._start_server

        def start_server(self: EmbeddedPostgres) -> None:
            item = announced._item
            if item is not None and item.get_closest_marker("postgres") is None:
                pytest.fail(f"{item.nodeid} starts PostgreSQL, and no fixture of it is known to (_NEEDS).")
            start(self)

        EmbeddedPostgres._start_server = start_server  # type: ignore[method-assign]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._item = item
        try:
            return (yield)
        finally:
            self._item = None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test by what its fixtures bring."""
    used = set(getattr(item, "fixturenames", ()))
    for marker, fixtures in _NEEDS.items():
        if used & fixtures:
            item.add_marker(marker)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first: at the end of a test session that has several processes, none waits for another."""
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(_LONG_FIRST)}

    def place(item: pytest.Item) -> int:
        return min(
            (rank[path] for path in (item.path, *item.path.parents) if path in rank), default=len(rank)
        )

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What the tests are made of is never garbage: looking for it there took a tenth of their time."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_report_header(config: pytest.Config) -> list[str]:
    left_out = not config.option.markexpr.replace("not stress", "").count("stress")
    return [] if left_out else [f"seed of the stress tests: {config.option.seed}"]


@pytest.fixture(scope="session")
def seed(pytestconfig: pytest.Config) -> int:
    """What the stress tests' random choices begin with; shown at the head of the report."""
    return int(pytestconfig.option.seed)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """A server of this test process alone, removed afterwards."""
    _remove_leftovers()
    with _server_directory() as directory, EmbeddedPostgres(directory, settings=UNSAFE_SETTINGS) as server:
        yield server


@pytest.fixture(scope="session")
def s3_url() -> Iterator[str]:
    """The address of an S3 server on loopback, of this test process alone."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def server_dir() -> Iterator[Path]:
    """A directory for a server of the test's own; whatever runs there is stopped afterwards."""
    with _server_directory() as directory:
        yield directory


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The address of an empty database, dropped after the test."""
    yield from fresh_database(postgres, "template0")


@pytest.fixture
def sample_url(postgres: EmbeddedPostgres, _sample_template: str) -> Iterator[str]:
    """The address of a database with the sample of about 3,000 rows, dropped after the test."""
    yield from fresh_database(postgres, _sample_template)


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator["Place"]:
    """Where a command runs on somebody else's database, with a catalogue of their own."""
    # Loads Dagster, which the programs that need this module for its settings alone do without.
    from alphapulse_encryption_tests import another
    from alphapulse_encryption_tests.place import place

    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(another.SCHEMA.encode())
    with place(
        postgres, database_url, server_dir.parent, another.MASTER_KEY_TEXT, another.CATALOGUE
    ) as found:
        yield found


@pytest.fixture(scope="session")
def _sample_template(postgres: EmbeddedPostgres) -> str:
    name = "sample_template"
    postgres.ensure_database(name)
    load_sample(postgres.url(name), rows=SAMPLE_ROWS)
    return name


@contextlib.contextmanager
def _server_directory() -> Iterator[Path]:
    # Not below pytest's own directory: every new test session closes that one to other users again,
    # and as root the server runs as another user.
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place_for_servers()))
    try:
        # A test may stop its server for a while; the lock says that the directory is in use all the same.
        with _lock(directory):
            yield directory / "postgres"
    finally:
        EmbeddedPostgres(directory / "postgres").stop()
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with (directory / "in_use").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def place_for_servers() -> Path:
    """The directory in which servers of tests have theirs: in memory, where there is enough of it."""
    on_disk = Path(tempfile.gettempdir())
    try:
        found = os.statvfs(_IN_MEMORY)
    except OSError:
        return on_disk
    free = min(found.f_bavail * found.f_frsize, psutil.virtual_memory().available)
    # Tests put programs there, too.
    usable = not found.f_flag & os.ST_NOEXEC and os.access(_IN_MEMORY, os.W_OK)
    return _IN_MEMORY if usable and free >= _ENOUGH else on_disk


def _remove_leftovers() -> None:
    """Stop and remove servers of test sessions that were killed; those in use are left alone."""
    places = {Path(tempfile.gettempdir()), _IN_MEMORY}
    for directory in itertools.chain.from_iterable(place.glob(f"{_PREFIX}*") for place in places):
        # Another user's, another session's, or gone meanwhile.
        with contextlib.suppress(ConfigurationError, OSError), _lock(directory):
            if EmbeddedPostgres(directory / "postgres").stop(if_unused=True):
                shutil.rmtree(directory, ignore_errors=True)


def fresh_database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    """The address of a copy of another database, dropped when the generator goes on."""
    postgres.ensure_running()  # a test may have killed it
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(
            # Written through the log, which is the default, a copy takes twice the work.
            sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
    yield postgres.url(name)
    postgres.ensure_running()
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
