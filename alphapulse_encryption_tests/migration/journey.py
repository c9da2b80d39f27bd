"""One journey of a table of the sample, recorded after each step; a test of what comes after one begins with a copy.

What belongs here is the way that all tables go. A test whose subject is a step, or which needs another database at the
beginning, walks by itself (`walk`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol, get_args

import psycopg
from psycopg import sql

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk

State = Literal["encrypted", "verified", "switched", "approved", "dropped"]
STATES: tuple[State, ...] = get_args(State)
USERS = walk.CATALOGUE.table("users")


class After(Protocol):
    """Makes a database of the sample in which a table has come so far."""

    def __call__(self, state: State, table: Table = USERS) -> str: ...


class Journeys:
    """Databases by what their table has been through, each made of the one before when a test first asks.

    Args:
        postgres: the server.
        sample: the database that every journey begins with.
        backups: a directory for the tables' backups.
    """

    def __init__(self, postgres: EmbeddedPostgres, sample: str, backups: Path) -> None:
        self._postgres = postgres
        self._sample = sample
        self._backups = backups
        self._recorded: set[str] = set()

    def after(self, state: State, table: Table) -> str:
        """The name of the database, which is there to be copied and for nothing else."""
        name = f"{table.name}_{state}"
        if name not in self._recorded:
            place = STATES.index(state)
            self._begin(name, self.after(STATES[place - 1], table) if place else self._sample)
            if place:
                support.sign_here(self._postgres.url(name), walk.KEYS)
            self._go_on(state, self._postgres.url(name), table)
            self._recorded.add(name)
        return name

    def _begin(self, name: str, before: str) -> None:
        self._postgres.ensure_running()
        target = sql.Identifier(name)
        with psycopg.connect(self._postgres.url("postgres"), autocommit=True) as connection:
            # Left by a step that failed.
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(target))
            connection.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY").format(
                    target, sql.Identifier(before)
                )
            )

    def _go_on(self, state: State, url: str, table: Table) -> None:
        match state:
            case "encrypted":
                walk.encrypt(url, table)
            case "verified":
                assert walk.verify(url, table).passed
            case "switched":
                walk.hand_over(url, table)
            case "approved":
                directory = self._backups / table.name
                directory.mkdir(exist_ok=True)
                walk.backup(url, (table,), directory, self._postgres.bin_dir())
                walk.approve(url, table)
            case "dropped":
                walk.drop(url, table)
