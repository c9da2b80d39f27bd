"""`make demo` and `make demo-drop` as a newcomer runs them: on an embedded server in a state directory of its own."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import bech32
import psycopg
import pytest

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.gates.backup import backup_identity
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.leaks import Processes, Scanner
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.vectors import MASTER_KEY

GUIDE = [
    "Adding encrypted columns to tables...",
    "✓ Added column trading_accounts.account_number_encrypted",
    "✓ Added column trading_accounts.balance_encrypted",
    "✓ Added column users.email_encrypted",
    "✓ Created index idx_user_email_search",
    "Migration verification results:",
    "  Total tables: 5",
    "  Total columns: 23",
    "  Successful: 23",
    "  Failed: 0",
    "✓ Created view v_users",
]
RESULTS = re.compile(
    r"Migration verification results:\n  Total tables: 5\n  Total columns: 23\n  Successful: 23\n  Failed: 0\n"
)
USERS = (
    "SELECT md5(string_agg(concat_ws('|', id, username, email, phone_number, first_name, last_name, "
    "address_data, two_factor_secret), E'\\n' ORDER BY id)) FROM users"
)
SHAPE = (
    "SELECT column_name, data_type, is_nullable, column_default FROM information_schema.columns "
    "WHERE table_name = 'users' AND column_name NOT LIKE '%\\_encrypted' AND column_name NOT LIKE '%\\_search' "
    "ORDER BY 1"
)


class Home:
    """A state directory, and what is run in it."""

    def __init__(self, server_dir: Path) -> None:
        self.state = server_dir.parent
        # Started by a test, the server need not outlive a crash of the machine; started by the demo, it does.
        self.server = EmbeddedPostgres(server_dir, settings=UNSAFE_SETTINGS)
        self._holder = EmbeddedPostgres(server_dir, settings=UNSAFE_SETTINGS)
        self._kept_up = False
        self.said = ""
        # What every process gets in its environment.
        self.variables: dict[str, str] = {}

    @contextlib.contextmanager
    def kept_up(self) -> Iterator[None]:
        """The server outlives its users for a while: each start and each stop takes as long as some of them."""
        with self._holder:
            self._kept_up = True
            try:
                yield
            finally:
                self._kept_up = False

    def run(
        self,
        *arguments: str,
        module: str = "alphapulse_encryption.cli.demo",
        alone: bool = False,
        variables: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a module; ``alone`` it loads everything and starts the server itself, and stops it as its last user."""
        with contextlib.nullcontext() if alone else self.server:
            done = self._run(module, arguments, variables or {}, alone)
        self.said += done.stdout + done.stderr
        assert self.server.is_running() == self._kept_up
        return done

    def _run(
        self, module: str, arguments: Sequence[str], variables: Mapping[str, str], alone: bool
    ) -> subprocess.CompletedProcess[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ALPHAPULSE_", "DAGSTER_", "PG"))
        }
        environment = {
            **inherited,
            "ALPHAPULSE_STATE_DIR": str(self.state),
            "ALPHAPULSE_BATCH_RANGES": "2",
            "COLUMNS": "200",
            **self.variables,
            **variables,
        }
        if not alone:
            return forked.run(module, arguments, environment)
        return subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    def succeeds(self, *arguments: str, alone: bool = False) -> str:
        done = self.run(*arguments, alone=alone)
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout[-2000:], done.stderr)
        return done.stdout

    def query(self, *statements: str) -> list[list[tuple[object, ...]]]:
        """The rows of each statement; the server runs for as long as that takes."""
        with self.server, psycopg.connect(self.server.url("alphapulse")) as connection:
            return [connection.execute(statement.encode()).fetchall() for statement in statements]

    @property
    def key(self) -> str:
        return (self.state / "sample_master_key").read_text().strip()


@pytest.fixture
def home(server_dir: Path) -> Iterator[Home]:
    yield Home(server_dir)


def appears_in_order(lines: Sequence[str], text: str) -> bool:
    remaining = iter(text.splitlines())
    return all(line in remaining for line in lines)


@pytest.mark.long
def test_demo_again_and_drop(home: Home) -> None:
    with Processes() as processes:
        _walk(home)
    _the_key_is_in_its_file_only(home, processes)


def _walk(home: Home) -> None:
    not_yet = home.run("--drop", alone=True)
    assert (not_yet.returncode, not_yet.stdout) == (1, "")
    assert "run make demo first" in not_yet.stderr
    # In its file and in the environment, from where children could have it.
    home.variables = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": home.key, **CREDENTIALS}

    with home.kept_up():
        first = home.succeeds("--rows", "2000")
        assert appears_in_order(GUIDE, first), first
        assert len(RESULTS.findall(first)) == 1
        assert "Loaded: 2,000 rows" in first
        for shown in (
            "before and after",
            "search token",
            "Timings",
            "make ui",
            "make demo-drop",
            "--approve-drop",
        ):
            assert shown in first
        assert first.count("Timings") == 1
        assert "Nothing was changed" not in first
        (users,), shape, rows, (searched,) = home.query(
            USERS,
            SHAPE,
            "SELECT email, email_encrypted, email_search FROM users WHERE email IS NOT NULL",
            "SELECT email FROM users WHERE id = 100",
        )
        email_key = independent.derive(_key(home.key), "user_pii", 1)
        for email, envelope, token in rows:
            assert independent.open_envelope(email_key, str(envelope)) == email
            assert token == independent.token(email_key, str(email))
            assert json.loads(str(envelope))["algorithm"] == "AES-256-GCM"
        assert f"{searched[0]}  →  token {independent.token(email_key, str(searched[0]))}" in first

        # Again: it changes nothing, and says so.
        everything = "SELECT md5(string_agg(u::text, ',' ORDER BY id)) FROM users u"
        # Each verification is entered there, so that no older one passes for it.
        logged = "SELECT count(*) FROM alphapulse_encryption.audit_log WHERE action !~ '^keep_(verif|row)'"
        before = home.query(everything, logged)
    second = home.succeeds("--rows", "2000", alone=True)
    with home.kept_up():
        assert "Nothing was changed" in second
        assert len(RESULTS.findall(second)) == 1
        assert "✓ Added" not in second and "✓ Created" not in second and "✓ Migrated" not in second
        assert home.query(everything, logged) == before

        dropped = home.succeeds("--drop")
        assert appears_in_order(
            [
                "✓ Switched to the encrypted columns: users",
                "✓ Dropped the unencrypted columns: users",
                "✓ Restored the plaintext columns: users",
                "  Successful: 6",
                "✓ The row of users with id 100 reads as it did before the drop",
            ],
            dropped,
        ), dropped
        assert "There is no approval for dropping the plaintext of users" in dropped
        assert home.query(USERS, SHAPE) == [[users], shape]

        other_key = home.run("--rows", "2000", variables={"ALPHAPULSE_ENCRYPTION_MASTER_KEY": MASTER_KEY})
        assert other_key.returncode == 1
        assert "is not the one this database was begun with" in other_key.stdout


@pytest.mark.long
def test_by_hand(home: Home) -> None:
    """The commands that the demo names, as it names them; then the demo again, on what they leave."""
    with home.kept_up():
        first = home.succeeds("--rows", "2000")
        before = home.query(USERS, SHAPE)
        _what_it_names(home, first)
        assert home.query(USERS, SHAPE) == before


def _what_it_names(home: Home, first: str) -> None:
    commands = [shlex.split(line)[1:] for line in first.splitlines() if line.startswith("  P --")]
    assert [command[0] for command in commands] == [
        *("--switch-to-encrypted", "--approve-drop", "--drop-unencrypted", "--restore-plaintext")
    ]
    *until_dropped, restore = commands
    together = sorted({argument for command in until_dropped for argument in command[:1]})
    approve = next(command for command in until_dropped if command[0] == "--approve-drop")
    # At once, as the command line allows: it orders the steps by itself.
    done = home.run(
        *approve,
        *(flag for flag in together if flag != "--approve-drop"),
        "--confirm",
        module="alphapulse_encryption",
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    assert "✓ Dropped the unencrypted columns: users" in done.stdout
    assert home.query(
        "SELECT FROM information_schema.columns WHERE (table_name, column_name) = ('users', 'email')"
    ) == [[]]
    again = home.succeeds("--rows", "2000")
    assert "The plaintext of users was dropped; make demo-drop brings it back." in again
    assert len(RESULTS.findall(again)) == 1
    assert restore == ["--restore-plaintext", "--table", "users", "brings", "it", "back"]
    assert "✓ Restored the plaintext columns: users" in home.succeeds("--drop")


def _key(text: str) -> bytes:
    return base64.urlsafe_b64decode(text)


# Of stores that hold keys elsewhere: the demo needs them as little as its children do. No other process has them.
CREDENTIALS = {
    name: f"canary/of+{os.urandom(10).hex()}"
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "VAULT_TOKEN")
}
# Every program that the demo starts, PostgreSQL's servers among them.
WITHOUT_KEYS = ("postgres", "pg_ctl", "initdb", "pg_dump", "pg_restore", "psql", "sh", "useradd")


def secrets(master_key: bytes) -> dict[str, bytes | str]:
    """The master key and every key derived from it."""
    contexts = {column.context for table in walk.CATALOGUE.tables for column in table.columns}
    assert len(contexts) == 16
    found: dict[str, bytes | str] = {
        f"key of {context}, version {version}": independent.derive(master_key, context, version)
        for context in (*contexts, "\x00key-check-value", "alphapulse_encryption backup")
        for version in (1, 2)
    }
    identity = backup_identity(KeyRing({1: master_key}, 1))
    found |= CREDENTIALS
    found |= {"master key": master_key, "identity": identity, "identity in small letters": identity.lower()}
    digits = cast(list[int], bech32.bech32_decode(identity)[1])
    found["identity's bytes"] = bytes(cast(list[int], bech32.convertbits(digits, 5, 8, False)))
    return found


def _the_key_is_in_its_file_only(home: Home, processes: Processes) -> None:
    """Nor is any derived key anywhere: run storage, bookkeeping, files, logs, terminal, process list, environments."""
    scanner = Scanner(secrets(_key(home.key)))
    key_file = home.state / "sample_master_key"
    found = scanner.text(home.said, "terminal")
    with home.server:
        for database in ("dagster", "alphapulse"):
            found += scanner.database(home.server.url(database))
    found += scanner.files(home.state, leave_out=[key_file])
    found += processes.with_secrets(scanner)
    found += processes.that_were_given(scanner, WITHOUT_KEYS)
    assert not found, "\n".join(sorted({f"{find.secret} in {find.place}" for find in found}))
    # What was looked at is what there is to look at, and is looked at with open eyes.
    assert {find.secret for find in scanner.data(key_file.read_bytes(), "")} == {"master key"}
    files = {path.name for path in home.state.rglob("*") if path.is_file()}
    assert {"dagster.yaml", home.server.log_file.name, "PG_VERSION"} <= files
    assert any(name.endswith(".dump.age") for name in files)
    assert key_file.stat().st_mode & 0o777 == 0o600
    seen = {process.program for process in processes.seen}
    if Path("/proc/self/environ").exists():
        assert {"postgres", "pg_dump"} <= seen
        given = {find.secret for find in processes.that_were_given(scanner, seen - {*WITHOUT_KEYS})}
        assert given == {"master key", *CREDENTIALS}, "the demo's own process had them"


BAD_INPUT: tuple[tuple[list[str], dict[str, str], str], ...] = (
    (["--rows", "0"], {}, "--rows: must be a whole number of at least"),
    (["--rows", "many"], {}, "--rows: must be a whole number of at least"),
    (["--everything"], {}, "unrecognized arguments: --everything"),
    ([], {"ALPHAPULSE_DATABASE_URL": "postgresql://canary@127.0.0.1:1/x"}, "unset ALPHAPULSE_DATABASE_URL"),
    ([], {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": "canary"}, "ALPHAPULSE_ENCRYPTION_MASTER_KEY is not base64"),
    ([], {"ALPHAPULSE_BATCH_RANGES": "canary"}, "ALPHAPULSE_BATCH_RANGES must be a whole number"),
)


def test_bad_input(home: Home) -> None:
    for arguments, variables, says in BAD_INPUT:
        done = home.run(*arguments, variables=variables)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert says in done.stderr.splitlines()[-1]
        assert "canary" not in done.stderr
        assert "Traceback" not in done.stderr
    databases = "SELECT count(*)::int FROM pg_database WHERE datname = 'alphapulse'"
    with home.server, psycopg.connect(home.server.url("postgres")) as connection:
        assert connection.execute(databases.encode()).fetchall() == [(0,)]
