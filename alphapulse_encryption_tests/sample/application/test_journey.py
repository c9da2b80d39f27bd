"""The sample application through all phases and all steps of the migration, under load: nobody notices anything."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.sample.application.client import Load
from alphapulse_encryption_tests.sample.application.instances import Traffic, traffic
from alphapulse_encryption_tests.stress.interleaved import unnoticed

TABLES = walk.CATALOGUE.tables
MASTER_KEY = bytes(range(32))
_QUANTUM = Decimal("1e-10")


class Journey:
    """The migration's steps on all tables, and the instances of the application that answer meanwhile.

    Args:
        url: the database.
        found: which instances answer.
        load: who asks them.
        pause: so many requests are answered between two events at least.
    """

    def __init__(self, url: str, found: Traffic, load: Load, pause: int) -> None:
        self.url = url
        self.traffic = found
        self.load = load
        self._pause = pause

    def moves_to(self, phase: str) -> None:
        """A rolling deployment: the new instance beside the old one for a while, then alone."""
        self.joined_by(phase)
        self.left_by_oldest()

    def joined_by(self, phase: str) -> None:
        self.traffic.start(phase)
        self.load.more(self._pause)

    def left_by_oldest(self) -> None:
        self.traffic.stop_oldest()
        self.load.more(self._pause)

    def columns(self) -> None:
        for table in TABLES:
            support.add_columns(self.url, table, ranges=walk.RANGES, keys=walk.KEYS)
        self.load.more(self._pause)

    def backfill(self, tables: slice = slice(None)) -> None:
        for table in TABLES[tables]:
            walk.backfill(self.url, table)
            build_search_indexes(Database(self.url), table, walk.ACTOR)

    def verify(self) -> None:
        """Nobody writes one side alone any more, so that nothing is pending."""
        for table in TABLES:
            found = walk.verify(self.url, table)
            assert found.passed, found.reasons

    def switch(self) -> None:
        for table in TABLES:
            switch_to_ciphertext(walk.target(self.url), table)
        self.load.more(self._pause)

    def drop(self, directory: Path, bin_dir: Path) -> None:
        walk.backup(self.url, TABLES, directory, bin_dir)
        for table in TABLES:
            walk.approve(self.url, table)
            walk.drop(self.url, table)
        self.load.more(self._pause)

    def restore(self, *, hold: bool) -> None:
        for table in TABLES:
            restored = restore_plaintext(walk.target(self.url), table, hold=hold)
            assert restored is not None and restored.held == hold
        self.load.more(self._pause)

    def revert(self) -> None:
        for table in TABLES:
            revert_to_plaintext(walk.target(self.url), table)
        self.load.more(self._pause)

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Nobody asks for anything."""
        self.load.pause()
        yield
        self.load.go_on()


def plaintexts(journey: Journey) -> None:
    """What people remember is in the plaintext columns."""
    _compare(journey, "{}::text", lambda text: text)


def ciphertexts(journey: Journey) -> None:
    """What people remember is in the encrypted columns, by cryptography that is not the package's."""
    _compare(journey, "{}_encrypted", _opened)


def _compare(journey: Journey, column: str, value: Callable[[str], str]) -> None:
    people = journey.load.people
    numbers = [person.id for person in people]

    def read(table: str, key: str, condition: str, *names: str) -> dict[object, list[str | None]]:
        columns = ", ".join(column.format(name) for name in names)
        rows = walk.query(journey.url, f"SELECT {key}, {columns} FROM {table} WHERE {condition}", numbers)
        return {row[0]: [None if text is None else value(text) for text in row[1:]] for row in rows}

    users = read("users", "id", "id = ANY(%s)", "email", "phone_number", "first_name", "last_name")
    balances = ("account_number", "balance", "available_balance")
    accounts = read("trading_accounts", "user_id", "user_id = ANY(%s)", *balances)
    of_people = "account_id IN (SELECT id FROM trading_accounts WHERE user_id = ANY(%s))"
    trades = read("trades", "id", of_people, "order_id", "quantity", "price", "fee")
    remembered = 0
    for person in people:
        known = [person.profile[name] for name in ("phone_number", "first_name", "last_name")]
        assert users[person.id] == [person.email, *known]
        (account,) = person.accounts
        money = str(account.balance.quantize(_QUANTUM))
        assert accounts[person.id] == [account.number, money, money]
        for trade in account.trades:
            assert trades[trade["id"]] == [trade[name] for name in ("order_id", "quantity", "price", "fee")]
            remembered += 1
    assert remembered == len(trades) > 0


def _opened(text: str) -> str:
    return independent.open_envelope(_derived(json.loads(text)["context"]), text)


@functools.cache
def _derived(context: str) -> bytes:
    return independent.derive(MASTER_KEY, context, 1)


def carry(
    url: str,
    directory: Path,
    bin_dir: Path,
    *,
    clients: int,
    pause: int,
    rest: float = 0.0,
    guarded: bool = True,
    hold: bool = True,
) -> tuple[Load, Traffic]:
    """There and back again.

    Args:
        url: a plain sample database.
        directory: for the backup.
        bin_dir: PostgreSQL's programs.
        clients: how many threads ask.
        pause: requests between two events.
        rest: how long each of them does nothing between two things, in seconds.
        guarded: False takes the guard away when it has just been made.
        hold: False restores in one go, while instances write ciphertext alone.

    Raises:
        AssertionError: a request failed, an answer was wrong, or a value is not what it has to be.
    """
    known = [email for (email,) in walk.query(url, "SELECT email FROM users") if 3 <= len(email) <= 320]
    with traffic(url, "off") as found, Load(found, clients, known, rest) as load:
        journey = Journey(url, found, load, pause)
        load.more(pause)

        journey.columns()
        for table in () if guarded else TABLES:
            walk.query(url, f"ALTER TABLE {table.name} DISABLE TRIGGER USER")
        journey.moves_to("plaintext")
        journey.backfill(slice(0, 3))
        # Reads values that are still pending, beside instances that read plaintext.
        journey.joined_by("dual")
        journey.backfill()
        journey.left_by_oldest()
        journey.verify()

        journey.switch()
        journey.moves_to("encrypted")
        journey.verify()
        with journey.at_rest():
            ciphertexts(journey)

        journey.drop(directory, bin_dir)
        with journey.at_rest():
            ciphertexts(journey)

        journey.restore(hold=hold)
        journey.moves_to("dual")
        journey.restore(hold=False)
        with journey.at_rest():
            plaintexts(journey)
            ciphertexts(journey)
        journey.moves_to("plaintext")
        journey.revert()
        journey.moves_to("off")
        with journey.at_rest():
            plaintexts(journey)
        load.more(pause)
    assert load.failures == []
    return load, found


def test_there_and_back_again(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    load, found = carry(sample_url, tmp_path, postgres.bin_dir(), clients=3, pause=15, rest=0.05)
    assert set(found.answered) == {"off", "plaintext", "dual", "encrypted"}
    assert load.people


@pytest.mark.stress
def test_there_and_back_again_at_length(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    carry(sample_url, tmp_path, postgres.bin_dir(), clients=8, pause=400)


@pytest.mark.stress
def test_without_the_guard_answers_are_wrong(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unnoticed(monkeypatch)
    with pytest.raises(AssertionError, match=r"WrongAnswer|mismatched"):
        carry(sample_url, tmp_path, postgres.bin_dir(), clients=4, pause=300, guarded=False)


@pytest.mark.stress
def test_a_restore_in_one_go_fails_those_who_write_ciphertext_alone(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="SQLSTATE 23514"):
        carry(sample_url, tmp_path, postgres.bin_dir(), clients=3, pause=15, hold=False)
