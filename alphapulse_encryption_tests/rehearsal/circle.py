"""Rehearsing in a place of the test's own, and looking at it from outside."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import dagster as dg
import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.cli.launch import Launcher
from alphapulse_encryption.cli.outcomes import Outcome
from alphapulse_encryption.rehearsal.measures import Rehearsal
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration.walk import query
from alphapulse_encryption_tests.place import Place, place

KEY = base64.b64encode(bytes(range(32))).decode()
JOB, FIRST = "staging_rehearsal", "clone"
STAGING, SERVER = "ALPHAPULSE_STAGING_DATABASE_URL", "ALPHAPULSE_REHEARSAL_SERVER_URL"
CLONES = "SELECT datname FROM pg_database WHERE datname LIKE 'alphapulse\\_rehearsal\\_%' ORDER BY 1"


@contextlib.contextmanager
def staging(
    postgres: EmbeddedPostgres, url: str, state: Any, catalogue: str | None = None
) -> Iterator[Place]:
    """A place whose staging database is this one, and which has no target."""
    with place(postgres, url, state, KEY, catalogue) as found:
        found.extra = {"ALPHAPULSE_DATABASE_URL": None, STAGING: url}
        try:
            yield found
        finally:
            for name in clones(found):
                drop(found, name)


def clones(here: Place) -> list[str]:
    """The databases that look like clones."""
    return [name for (name,) in query(here.postgres.url("postgres"), CLONES)]


def drop(here: Place, name: str) -> None:
    with psycopg.connect(here.postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def rehearse(here: Place, instance: dg.DagsterInstance, **config: object) -> Outcome:
    """One rehearsal, in this process; without traffic, where none is asked for."""
    return Launcher(instance, here.ranges).job(JOB, FIRST, {"traffic": {"rate": 0}, **config})


def last(instance: dg.DagsterInstance) -> Rehearsal:
    """The newest of the history."""
    return history.read(instance)[-1]


def contents(url: str) -> dict[str, list[str]]:
    """Every row of every table, in text form, and in an order of its own."""
    tables = query(
        url,
        "SELECT format('%I.%I', nspname, relname) FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace "
        "WHERE relkind = 'r' AND nspname !~ '^(pg_|information_schema)' ORDER BY 1",
    )
    return {
        table: [text for (text,) in query(url, f"SELECT t::text FROM {table} t ORDER BY 1")]
        for (table,) in tables
    }
