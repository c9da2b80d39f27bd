"""A product's database: its schema and rows, its catalogue, its roles, what it writes, and what it asks.

A twin of the database, which no engine ever touches, takes the same writes as plaintext. It says what has to come out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Placeholder

from alphapulse_encryption.catalogue import Catalogue, Table, load_catalogue
from alphapulse_encryption_tests.migration import support

_HERE = Path(__file__).parent

# Those of all products; a server has them once. Who logs in for the requests of people takes on their roles.
ROLES = """
CREATE ROLE products_auth_admin LOGIN;
ALTER ROLE products_auth_admin SET search_path = auth;
CREATE ROLE products_anon NOLOGIN;
CREATE ROLE products_authenticated NOLOGIN;
CREATE ROLE products_service NOLOGIN BYPASSRLS;
CREATE ROLE products_authenticator LOGIN NOINHERIT;
GRANT products_anon, products_authenticated, products_service TO products_authenticator;
CREATE ROLE products_steward LOGIN BYPASSRLS;
GRANT products_auth_admin TO products_steward;
CREATE ROLE products_till LOGIN;
CREATE ROLE products_report LOGIN;
CREATE ROLE products_app LOGIN;
CREATE ROLE products_support LOGIN;
CREATE ROLE products_mia LOGIN;
CREATE ROLE products_ada LOGIN;
"""

Change = Literal["insert", "update", "delete"]
# Which columns an instance of the application writes.
Phase = Literal["plaintext", "both", "ciphertext"]


@dataclass(frozen=True)
class Write:
    """A statement of the application; in keys and values, ``{n}`` is the number of the round.

    Args:
        login: who connects.
        values: by column, in PostgreSQL's text form.
        role: taken on by ``SET ROLE``.
        claims: what the token of the request says, for row-level security.
        checked: refused by a check on the plaintext, which an application that writes ciphertext alone has lost.
    """

    login: str
    change: Change
    table: str
    key: Mapping[str, str]
    values: Mapping[str, str | None] = field(default_factory=dict)
    role: str | None = None
    claims: Mapping[str, str] | None = None
    checked: bool = False

    def statement(self, table: Table | None, phase: Phase, n: int) -> tuple[Composed, list[str | None]]:
        """The SQL of an instance of that phase, with its parameters."""
        key = {name: text.format(n=n) for name, text in self.key.items()}
        values = {name: text and text.replace("{n}", str(n)) for name, text in self.values.items()}
        for column in table.columns if table else ():
            if phase != "plaintext" and column.name in values:
                text = values[column.name]
                values[column.encrypted] = None if text is None else support.seal(text, column.context)
                if column.searchable:
                    values[column.search] = None if text is None else support.token(text, column.context)
                if phase == "ciphertext":
                    del values[column.name]
        schema, _, name = self.table.rpartition(".")
        relation = Identifier(schema or "public", name)
        where = SQL(" AND ").join(SQL("{} = %s").format(Identifier(c)) for c in key)
        match self.change:
            case "insert":
                row = {**key, **values}
                names = SQL(", ").join(map(Identifier, row))
                marks = SQL(", ").join(Placeholder() for _ in row)
                return SQL("INSERT INTO {} ({}) VALUES ({})").format(relation, names, marks), [*row.values()]
            case "update":
                pairs = SQL(", ").join(SQL("{} = %s").format(Identifier(c)) for c in values)
                update = SQL("UPDATE {} SET {} WHERE {}").format(relation, pairs, where)
                return update, [*values.values(), *key.values()]
            case "delete":
                return SQL("DELETE FROM {} WHERE {}").format(relation, where), [*key.values()]


@dataclass(frozen=True)
class Product:
    """A database that somebody else made.

    Args:
        login: who migrates it.
        prepared: what the findings ask of the application, and changes what it does; on the twin as well.
        set_aside: what the findings ask for otherwise, before the first step.
        beside: the same, with the encrypted columns, before the switch.
        put_back: how all of that is undone, after the revert.
        differs: columns that cannot be the same as on the twin.
        told: names that preflight has to name on the database as it is.
        asked: the product's functions, by what preflight calls them; what a drop breaks is told before.
    """

    name: str
    login: str
    told: tuple[str, ...]
    writes: tuple[Write, ...]
    asked: Mapping[str, str]
    prepared: str = ""
    set_aside: str = ""
    beside: str = ""
    put_back: str = ""
    differs: tuple[str, ...] = ()

    @property
    def catalogue(self) -> Catalogue:
        return load_catalogue(_HERE / f"{self.name}.yaml")

    def load(self, url: str) -> None:
        """Schema and rows."""
        support.run(url, (_HERE / f"{self.name}.sql").read_text())


def of(url: str, login: str) -> str:
    """The address of a database for another role."""
    return url.replace("//postgres@", f"//{login}@", 1)


@contextmanager
def session(url: str, write: Write) -> Iterator[support.Connection]:
    with support.application(of(url, write.login)) as connection:
        if write.claims is not None:
            claims = json.dumps(dict(write.claims))
            connection.execute("SELECT set_config('request.jwt.claims', %s, false)", [claims])
        if write.role is not None:
            connection.execute(SQL("SET ROLE {}").format(Identifier(write.role)))
        yield connection


def outcome(connection: support.Connection, statement: Composed | str, *parameters: object) -> object:
    """How many rows a statement had, or the error's code."""
    text = statement.encode() if isinstance(statement, str) else statement
    try:
        return connection.execute(text, parameters or None).rowcount
    except psycopg.Error as error:
        return error.sqlstate


def write_all(
    url: str, catalogue: Catalogue, writes: Iterable[Write], phase: Phase, n: int
) -> list[tuple[str, str, object]]:
    """What became of each statement of a round."""
    tables = {table.key: table for table in catalogue.tables}
    outcomes = []
    for write in writes:
        statement, parameters = write.statement(tables.get(write.table), phase, n)
        with session(url, write) as connection:
            came = outcome(connection, statement, *parameters)
        outcomes.append((write.table, f"{write.change} {dict(write.key)} {dict(write.values)}", came))
    return outcomes
