"""Tables composed at random go the whole way and back: each is refused by name beforehand, or comes back as it was."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.engine import RowsQuarantined
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import dumps, support, walk
from alphapulse_encryption_tests.products.any_schema import Made, make, quoted

MASTER_KEY = bytes(range(32))
# The first number of rows that the application writes on the way.
NEW = 1_000
# Such as come all the way.
SOME = (0, 3, 9)


class Way:
    """A table on its way, and what an application writes that knows the encrypted columns only."""

    def __init__(self, made: Made, url: str, bin_dir: Path, directory: Path) -> None:
        self.made, self.url, self.bin_dir, self.directory = made, url, bin_dir, directory
        self.table = made.table
        self.catalogue = Catalogue(tables=(self.table,))
        self.written = NEW
        self.texts: dict[int, dict[str, str]] = {}

    def dump(self) -> Counter[str]:
        return dumps.dump(self.url, self.bin_dir, dumps.added_columns(self.table))

    def go(self, choices: random.Random) -> str:
        """All of it; returns how far it went."""
        told_of = check(Database(self.url), (self.table,), None)
        told = "\n".join(f"{found.subject}: {found.message}" for found in told_of.findings)
        before = self.dump()
        if told_of.blockers:
            with pytest.raises(MigrationError):
                walk.encrypt(self.url, self.table)
            assert self.dump() == before
            return "blocked"
        try:
            walk.encrypt(self.url, self.table)
        except RowsQuarantined as error:
            assert "NOT VALID" in told, error
            self.revert(before)
            return "not encrypted"
        assert walk.verify(self.url, self.table).passed
        try:
            walk.hand_over(self.url, self.table)
        except RefusedError as error:
            assert "switch_to_ciphertext will refuse" in told, error
            self.revert(before)
            return "not switched"
        self.write()
        assert walk.verify(self.url, self.table).passed
        if choices.random() < 0.2:
            self.revert(before)
            walk.encrypt(self.url, self.table)
            assert walk.verify(self.url, self.table).passed
            walk.hand_over(self.url, self.table)
            self.write()
        walk.backup(self.url, (self.table,), self.directory, self.bin_dir)
        try:
            walk.approve(self.url, self.table, self.catalogue)
        except RefusedError as error:
            assert "stops its drop" in told, error
            self.revert(before)
            return "not dropped"
        walk.drop(self.url, self.table, self.catalogue)
        self.write()
        assert restore_plaintext(walk.target(self.url, catalogue=self.catalogue), self.table) is not None
        self.revert(before)
        return "restored"

    def revert(self, before: Counter[str]) -> None:
        assert revert_to_plaintext(walk.target(self.url, catalogue=self.catalogue), self.table) is not None
        for number, texts in self.texts.items():
            rows = support.run(
                self.url,
                SQL("SELECT {} FROM {} WHERE {} = {}").format(
                    SQL(", ").join(SQL("{}::text").format(Identifier(name)) for name in texts),
                    support.name_of(self.table),
                    *(Identifier("Key 1"), number),
                ),
            )
            assert rows == [tuple(texts.values())], (rows, texts)
        with support.application(self.url) as application:
            application.execute("SET session_replication_role = replica")
            application.execute(f'DELETE FROM {self.made.relation} WHERE "Key 1" >= {NEW}'.encode())
        self.texts.clear()
        after = self.dump()
        gone = sorted(before - after)
        assert gone == []
        # What was added stays.
        added = dumps.indexes_of_added_columns(self.table) | dumps.added_columns(self.table)
        assert [s for s in after - before if not any(n in s or quoted(n) in s for n in added)] == []

    def write(self) -> None:
        """New rows in each partition, and a changed one, by the ciphertext alone."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name, text in support.DESIGN_SETTINGS.items():
                connection.execute("SELECT set_config(%s, %s, false)", [name, text])
            for region in range(4):
                for number in (self.written, self.written + 1):
                    self.insert(connection, region, number)
                changed = self.sealed(connection, self.written + 2)
                connection.execute(
                    SQL("UPDATE {} SET {} WHERE {} = {}").format(
                        support.name_of(self.table),
                        SQL(", ").join(
                            SQL("{} = {}").format(Identifier(name), text) for name, text in changed.items()
                        ),
                        *(Identifier("Key 1"), self.written),
                    )
                )
                self.texts[self.written] = self.texts.pop(self.written + 2)
                self.written += 3

    def insert(self, connection: psycopg.Connection[Any], region: int, number: int) -> None:
        row = {"Key 1": str(number), "region": str(region), "other": str(number * 2)}
        row |= {name: self.value(connection, name, number) for name in self.others if name not in row}
        row |= self.sealed(connection, number)
        connection.execute(
            SQL("INSERT INTO {} ({}) OVERRIDING SYSTEM VALUE VALUES ({})").format(
                support.name_of(self.table),
                SQL(", ").join(map(Identifier, row)),
                SQL(", ").join(map(Literal, row.values())),
            )
        )

    @property
    def others(self) -> list[str]:
        names = {column.name for column in self.table.columns}
        return [name for name in self.made.values if name not in names]

    def value(self, connection: psycopg.Connection[Any], name: str, number: int, kind: str = "text") -> str:
        statement = f"SELECT (({self.made.values[name]})::{kind})::text FROM (SELECT {number} AS i) AS one"
        return str(connection.execute(statement.encode()).fetchall()[0][0])

    def sealed(self, connection: psycopg.Connection[Any], number: int) -> dict[str, str]:
        """The encrypted and search columns of new values, which are kept for a look at the plaintext later."""
        found: dict[str, str] = {}
        self.texts[number] = {}
        for column in self.table.columns:
            text = self.value(connection, column.name, number, self.made.kinds[column.name])
            self.texts[number][column.name] = text
            key = independent.derive(MASTER_KEY, column.context, 1)
            iv = independent.token(key, f"{text} {number}").encode()[:12]
            found[column.encrypted] = independent.seal(key, iv, text, column.context, 1)
            if column.searchable:
                found[column.search] = independent.token(key, text)
        return found


def go(seed: int, server: EmbeddedPostgres, directory: Path) -> str:
    """One table; returns how far it went."""
    name = f"any_schema_{seed}"
    server.ensure_database(name)
    try:
        made = make(seed)
        made.make(server.url(name))
        return Way(made, server.url(name), server.bin_dir(), directory).go(random.Random(seed))
    finally:
        support.run(server.url("postgres"), f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.parametrize("number", SOME)
def test_a_table_comes_back_as_it_was(number: int, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    assert go(number, postgres, tmp_path) == "restored"


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_many_tables(number: int, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    go(number, postgres, tmp_path)
