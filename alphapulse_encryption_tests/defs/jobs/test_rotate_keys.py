"""Key rotation of the sample database beside an application that reads and writes, killed half-way."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.cipher import SearchableCipher
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.rows.test_rotate import (
    assert_under,
    plaintexts,
    verified,
    versions,
)
from alphapulse_encryption_tests.place import Place, place

FIRST, SECOND = bytes(range(32)), bytes(range(1, 33))
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
USERS, ACCOUNTS = (walk.CATALOGUE.table(name) for name in ("users", "trading_accounts"))
NEW = {"ALPHAPULSE_ENCRYPTION_KEY_VERSION": "2"}


# Seconds.
BETWEEN = 0.02

Connection = psycopg.Connection[tuple[Any, ...]]


def text(key: bytes) -> str:
    return base64.b64encode(key).decode()


@pytest.fixture
def sample(postgres: EmbeddedPostgres, sample_url: str, server_dir: Path) -> Iterator[Place]:
    """Encrypted under version 1; the ciphertext of `users` is right, of the others the plaintext."""
    with place(postgres, sample_url, server_dir.parent, text(FIRST)) as found:
        found.ranges = walk.RANGES
        # Every instance can read the next version before anybody writes it.
        found.extra = {f"{VARIABLE}_V2": text(SECOND)}
        for table in walk.CATALOGUE.tables:
            walk.encrypt(sample_url, table)
        walk.verify(sample_url, USERS)
        switch_to_ciphertext(walk.target(sample_url), USERS)
        yield found


class Instance:
    """An instance of the application: reads, or writes its own rows, until it is told to stop.

    Args:
        url: the database.
        version: the key version it writes.
        share: which rows it writes: those whose number leaves this rest.
    """

    SHARES = 5

    def __init__(self, url: str, version: int, share: int) -> None:
        environ = {VARIABLE: text(FIRST), f"{VARIABLE}_V2": text(SECOND)}
        keys = load_key_ring(environ | {"ALPHAPULSE_ENCRYPTION_KEY_VERSION": str(version)})
        self.cipher = SearchableCipher(get_format("AES-256-GCM", keys), keys)
        self.version = version
        self.share = share
        self.done = 0
        self.failed: BaseException | None = None
        # What it has written last, by table, column and row.
        self.written: dict[tuple[str, str, int], str] = {}
        self.chance = random.Random(share)
        self._url = url
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, act: Callable[[Instance, Connection], None]) -> Instance:
        def work() -> None:
            try:
                with psycopg.connect(self._url, autocommit=True) as connection:
                    # The machine is there for the rotation, too.
                    while not self._stop.wait(BETWEEN):
                        act(self, connection)
                        self.done += 1
            except BaseException as error:
                self.failed = error

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(support.PATIENCE)
            assert not self._thread.is_alive()
        if self.failed is not None:
            raise self.failed

    def some_row(self, connection: Connection, table: Table) -> int:
        """One of its own."""
        statement = SQL("SELECT array_agg(id) FROM {} WHERE mod(id, %s) = %s").format(Identifier(table.name))
        ((ids,),) = connection.execute(statement, [self.SHARES, self.share]).fetchall()
        return int(self.chance.choice(ids))

    def new_value(self, row: int) -> str:
        return f"{self.share}.{row}.{self.chance.getrandbits(60)}"

    def found(self, connection: Connection, table: Table, column: Column, value: str) -> dict[int, str]:
        """Rows with a value, by its search tokens, and the values in their ciphertexts."""
        statement = SQL("SELECT id, {} FROM {} WHERE {} = ANY(%s)").format(
            *map(Identifier, (column.encrypted, table.name, column.search))
        )
        rows = connection.execute(statement, [self.cipher.generate_search_tokens(value, column.context)])
        return {row: self.cipher.decrypt(envelope, column.context) for row, envelope in rows}


def reads(instance: Instance, connection: Connection) -> None:
    """By search token and by decrypting."""
    looks_up(instance, connection)
    decrypts(instance, connection)


def looks_up(instance: Instance, connection: Connection) -> None:
    """Rows that nobody writes are found by their token, each once, at any moment."""
    for table, name in ((USERS, "email"), (ACCOUNTS, "account_number")):
        column = next(column for column in table.columns if column.name == name)
        row = instance.some_row(connection, table)
        ((value,),) = connection.execute(
            f"SELECT {name} FROM {table.name} WHERE id = %s".encode(), [row]
        ).fetchall()
        assert instance.found(connection, table, column, str(value)) == {row: value}


def decrypts(instance: Instance, connection: Connection) -> None:
    """Every value of a row opens, and beside a plaintext that is right it is that one."""
    table = instance.chance.choice(walk.CATALOGUE.tables)
    columns = [
        part
        for column in table.columns
        for part in (SQL("{}::text").format(Identifier(column.name)), Identifier(column.encrypted))
    ]
    rows = connection.execute(
        SQL("SELECT {} FROM {} TABLESAMPLE SYSTEM (20) LIMIT 5").format(
            SQL(", ").join(columns), Identifier(table.name)
        )
    ).fetchall()
    for row in rows:
        for column, plaintext, envelope in zip(table.columns, row[::2], row[1::2], strict=True):
            assert (plaintext is None) <= (envelope is None or table is USERS)
            value = instance.cipher.decrypt(envelope, column.context)
            assert plaintext is None or value == plaintext


def writes_both(instance: Instance, connection: Connection) -> None:
    """Before the switch: plaintext, ciphertext and token in one statement."""
    row = instance.some_row(connection, ACCOUNTS)
    number, balance = instance.new_value(row), f"{instance.chance.randrange(10**9)}.5000000000"
    cipher = instance.cipher
    connection.execute(
        "UPDATE trading_accounts SET account_number = %s, account_number_encrypted = %s, account_number_search = %s, "
        "balance = %s::numeric, balance_encrypted = %s WHERE id = %s",
        [
            *(number, cipher.encrypt(number, "trading_account")),
            cipher.generate_search_token(number, "trading_account"),
            *(balance, cipher.encrypt(balance, "account_balance"), row),
        ],
    )
    instance.written |= {
        ("trading_accounts", "account_number", row): number,
        ("trading_accounts", "balance", row): balance,
    }
    assert instance.found(connection, ACCOUNTS, ACCOUNTS.columns[0], number) == {row: number}


def writes_ciphertext(instance: Instance, connection: Connection) -> None:
    """After the switch: ciphertext and token; now and then of a new row."""
    email = next(column for column in USERS.columns if column.name == "email")
    new = instance.done % 10 == 0
    row = instance.some_row(connection, USERS)
    if new:
        ((highest,),) = connection.execute("SELECT max(id) FROM users").fetchall()
        row = highest // Instance.SHARES * Instance.SHARES + 20 * Instance.SHARES + instance.share
    value = instance.new_value(row) + "@example.org"
    parameters = [
        instance.cipher.encrypt(value, email.context),
        instance.cipher.generate_search_token(value, email.context),
        row,
    ]
    if new:
        connection.execute(
            "INSERT INTO users (email_encrypted, email_search, id, username, password_hash) "
            "VALUES (%s, %s, %s, %s, 'x')",
            [*parameters, f"new {row}"],
        )
    else:
        connection.execute(
            "UPDATE users SET email_encrypted = %s, email_search = %s WHERE id = %s", parameters
        )
    instance.written["users", "email", row] = value
    assert instance.found(connection, USERS, email, value) == {row: value}


def test_no_read_fails_and_no_write_is_lost(sample: Place) -> None:
    expected = {table.key: plaintexts(sample.url, table) for table in walk.CATALOGUE.tables}
    with ExitStack() as stack:

        def instance(version: int, share: int, act: Callable[[Instance, Connection], None]) -> Instance:
            started = Instance(sample.url, version, share).start(act)
            stack.callback(started.stop)
            return started

        # Rows of the share 0 are written by nobody.
        readers = [instance(version, 0, reads) for version in (1, 2)]
        old = [instance(1, 1, writes_both), instance(1, 2, writes_ciphertext)]
        new = [instance(2, 3, writes_both), instance(2, 4, writes_ciphertext)]
        everybody = [*readers, *old, *new]

        def go_on() -> None:
            """Each of them does something more."""
            before = {id(one): one.done for one in everybody}
            running = [one for one in everybody if one not in stopped]
            support.until(
                lambda: all(one.failed or one.done > before[id(one)] + 3 for one in running), "all go on"
            )
            for one in everybody:
                if one.failed:
                    raise one.failed

        stopped: list[Instance] = []
        go_on()

        # Held by a lock, it is killed in the middle.
        with support.application(sample.url, autocommit=False) as other:
            other.execute("SELECT FROM positions WHERE id = (SELECT max(id) FROM positions) FOR UPDATE")
            program = sample.start("--rotate-keys", "--batch-size", "40", **NEW)
            support.until(
                lambda: not program.running or support.engine_waits(sample.url, "UPDATE%", behind=other),
                "it waits for the row",
            )
            assert program.running, program.ended()
            program.kill()
            program.ended(support.PATIENCE)
        half = {frozenset(found) for t in walk.CATALOGUE.tables for found in versions(sample.url, t).values()}
        assert {frozenset({1}), frozenset({2})} <= half
        go_on()

        # Run again while instances still write the old version: it ends what it can.
        done = sample.fails(1, "--rotate-keys", "--batch-size", "200", "--workers", "2", **NEW)
        assert "Key version 1 is not retired: " in done.stdout
        go_on()
        for one in old:
            one.stop()
            stopped.append(one)
        again = sample.succeeds("--rotate-keys", **NEW)
        assert again[-1] == "✓ Key version 1 is retired: no value of it is left"
        go_on()

    for one in everybody:
        for (name, written, number), value in one.written.items():
            expected[name][written][str(number),] = value
    for (row,) in walk.query(sample.url, "SELECT id::text FROM users WHERE username LIKE 'new %'"):
        for column in USERS.columns:
            expected["users"][column.name].setdefault((row,), None)
    for table in walk.CATALOGUE.tables:
        assert_under(sample.url, 2, expected[table.key], table, {2: SECOND})
    assert all(one.done > 20 for one in everybody)
    assert walk.query(
        sample.url, "SELECT key_version, state FROM alphapulse_encryption.key_versions ORDER BY 1"
    ) == [*((1, "retired"), (2, "current"))]
    # Without the old key, as it may be removed now.
    keys = KeyRing({2: SECOND}, 2)
    for table in walk.CATALOGUE.tables:
        assert verified(sample.url, table, keys, walk.RANGES).passed
    with sample.instance() as dagster:
        names = {
            "rotated_data": 2 * len(walk.CATALOGUE.tables),
            "verified_data": 2 * len(walk.CATALOGUE.tables),
        }
        for name, partitions in names.items():
            assert len(dagster.get_materialized_partitions(dg.AssetKey(name))) == partitions
    shown = key_versions(sample)
    assert shown[0].startswith("version 1: retired since ")
    assert shown[1].startswith("version 2: current since ")
    rows = walk.value(sample.url, "SELECT count(*) FROM api_keys")
    values = walk.value(sample.url, "SELECT count(permissions) + count(usage_stats) FROM api_keys")
    assert shown[-1] == f"api_keys: version 2: {values} values in {rows} rows"


def key_versions(sample: Place) -> list[str]:
    with sample.in_environment(), pytest.MonkeyPatch.context() as patch, io.StringIO() as printed:
        for name, text_ in NEW.items():
            patch.setenv(name, text_)
        with contextlib.redirect_stdout(printed):
            assert main(["--key-versions"]) == 0
        return printed.getvalue().splitlines()


def test_the_job_and_a_partition_alone(sample: Place) -> None:
    """Re-encrypting one partition begins no rotation; the job begins it, and is a no-op when all is done."""
    definitions = sample.definitions()
    with sample.instance() as instance:
        # Nothing is of another version than the current one.
        assert sample.materialize(instance, "rotated_data", "00|api_keys").success
        assert instance.get_materialized_partitions(dg.AssetKey("rotated_data")) == {"00|api_keys"}
    sample.extra |= NEW
    with sample.instance() as instance:
        assert not sample.materialize(instance, "rotated_data", "01|api_keys").success
        with sample.in_environment():
            job = definitions.resolve_job_def("rotate_keys")
            one = {"ops": {"begin": {"config": {"tables": ["api_keys"]}}}}
            assert job.execute_in_process(instance=instance, run_config=one).success
        found = {frozenset(v) for v in versions(sample.url, walk.CATALOGUE.table("api_keys")).values()}
        assert found <= {frozenset({2}), frozenset()}
        assert {frozenset(v) for v in versions(sample.url, ACCOUNTS).values()} == {frozenset({1})}
        assert sample.materialize(instance, "rotated_data", "00|trading_accounts").success
        half = {frozenset(v) for v in versions(sample.url, ACCOUNTS).values()}
        assert half == {frozenset({1}), frozenset({2})}
        with sample.in_environment():
            assert job.execute_in_process(instance=instance).success
            before = support.fingerprints(sample.url, USERS)
            audited = walk.value(sample.url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
            again = job.execute_in_process(instance=instance)
        outputs = again.output_for_node("verify")
        assert (again.success, outputs["changed"]) == (True, False)
    assert support.fingerprints(sample.url, USERS) == before
    assert walk.value(sample.url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == audited
    assert walk.query(
        sample.url, "SELECT key_version, state FROM alphapulse_encryption.key_versions ORDER BY 1"
    ) == [*((1, "retired"), (2, "current"))]
