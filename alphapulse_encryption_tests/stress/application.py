"""An application that writes while its table is migrated, and an oracle of what it has committed.

The application knows the envelope from the design alone (`crypto.independent`) and the tables from their shapes.
Nothing here asks the engine. What was committed is kept outside the database: an event is recorded after the commit has
returned, and never otherwise.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import psycopg
from psycopg import sql

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption_tests.migration import support

Connection = psycopg.Connection[Any]
Key = tuple[str, ...]
Values = Mapping[str, str | None]
# Which side a statement writes.
Mode = Literal["plaintext", "both", "ciphertext"]


@dataclass(frozen=True)
class Shape:
    """A kind of table.

    Args:
        name: of the table in the catalogue.
        definition: columns and constraints, in SQL.
        columns: the sensitive ones.
        key: names of the key's columns.
        key_of: the key of a row number, in text form.
        value: a value of a column that no other row number has, in its text form; of a number and a text.
        required: columns that are NOT NULL.
    """

    name: str
    definition: str
    columns: tuple[Column, ...]
    key: tuple[str, ...]
    key_of: Callable[[int], Key]
    value: Callable[[str, int, str], str]
    required: frozenset[str]
    schema: str = "public"

    @property
    def entry(self) -> Table:
        return support.table(self.name, *self.columns, schema=self.schema)

    def named(self, name: str) -> Shape:
        """The same under another name, with indexes of its own."""
        columns = [
            Column(
                name=c.name, context=c.context, search_index=f"idx_{name}_{c.name}" if c.searchable else None
            )
            for c in self.columns
        ]
        return Shape(
            name,
            self.definition,
            tuple(columns),
            self.key,
            self.key_of,
            self.value,
            self.required,
            self.schema,
        )


def _text(column: str, number: int, text: str) -> str:
    return f"{column} {number}: {text}"


def _money(column: str, number: int, text: str) -> str:
    return f"{number}.{zlib.crc32(text.encode()) % 10_000:04d}"


ACCOUNTS = Shape(
    name="accounts",
    definition="id bigint PRIMARY KEY, owner text NOT NULL DEFAULT 'nobody', balance numeric(14,4), hits int",
    columns=(
        Column(name="owner", context="account_owner"),
        Column(name="balance", context="account_balance"),
    ),
    key=("id",),
    key_of=lambda number: (str(number),),
    value=lambda column, number, text: (_money if column == "balance" else _text)(column, number, text),
    required=frozenset({"owner"}),
)
LINES = Shape(
    name="Order lines",
    definition='account int, "line no" text, price numeric NOT NULL, memo varchar(200), hits int, '
    'PRIMARY KEY (account, "line no")',
    columns=(Column(name="price", context="line_price"), Column(name="memo", context="line_memo")),
    key=("account", "line no"),
    key_of=lambda number: (str(number // 7), f"n{number % 7}"),
    value=lambda column, number, text: (_money if column == "price" else _text)(column, number, text),
    required=frozenset({"price"}),
)
PEOPLE = Shape(
    name="people",
    definition="id uuid PRIMARY KEY, mail text NOT NULL UNIQUE, phone text, hits int",
    columns=(
        Column(name="mail", context="person_mail", search_index="idx_people_mail"),
        Column(name="phone", context="person_phone"),
    ),
    key=("id",),
    key_of=lambda number: (str(uuid.UUID(int=number)),),
    value=_text,
    required=frozenset({"mail"}),
)
SHAPES = {"bigint key": ACCOUNTS, "composite key": LINES, "searchable and unique": PEOPLE}


def create(url: str, shape: Shape, numbers: Iterable[int]) -> dict[Key, dict[str, str | None]]:
    """The table with its first rows, plaintext.

    Returns:
        The rows by key.
    """
    rows: dict[Key, dict[str, str | None]] = {}
    for number in numbers:
        values: dict[str, str | None] = {
            c.name: shape.value(c.name, number, "at first") for c in shape.columns
        }
        if number % 10 == 3:
            values |= {name: None for name in values if name not in shape.required}
        rows[shape.key_of(number)] = values
    with support.application(url, autocommit=False) as connection:
        connection.execute(sql.SQL("CREATE TABLE {} ({})").format(_name(shape), sql.SQL(shape.definition)))
        names = [*shape.key, *(c.name for c in shape.columns)]
        with connection.cursor().copy(
            sql.SQL("COPY {} ({}) FROM STDIN").format(_name(shape), _list(names))
        ) as copy:
            for key, values in rows.items():
                copy.write_row([*key, *values.values()])
        connection.commit()
    return rows


def _name(shape: Shape) -> sql.Identifier:
    return sql.Identifier(shape.schema, shape.name)


def _list(names: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)


# Writing


def stored(shape: Shape, values: Values, mode: Mode) -> dict[str, str | None]:
    """What a statement of the application writes: columns with their values."""
    found: dict[str, str | None] = {}
    for column in shape.columns:
        if column.name not in values:
            continue
        value = values[column.name]
        if mode != "ciphertext":
            found[column.name] = value
        if mode != "plaintext":
            found[column.encrypted] = None if value is None else support.seal(value, column.context)
            if column.searchable:
                found[column.search] = None if value is None else support.token(value, column.context)
    return found


def _at(shape: Shape) -> sql.Composed:
    # An untyped parameter takes the column's type.
    return sql.SQL(" AND ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in shape.key)


def insert(
    connection: Connection, shape: Shape, key: Key, values: Values, mode: Mode, *, upsert: bool = False
) -> int:
    """Insert a row; with ``upsert``, update it where it is there.

    Returns:
        The number of rows written.
    """
    written = stored(shape, values, mode)
    names = [*shape.key, *written]
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        _name(shape), _list(names), sql.SQL(", ").join([sql.SQL("%s")] * len(names))
    )
    if upsert:
        statement += sql.SQL(" ON CONFLICT ({}) DO UPDATE SET {}").format(
            _list(shape.key),
            sql.SQL(", ").join(
                sql.SQL("{} = excluded.{}").format(sql.Identifier(name), sql.Identifier(name))
                for name in written
            ),
        )
    return connection.execute(statement, [*key, *written.values()]).rowcount


def update(connection: Connection, shape: Shape, key: Key, values: Values, mode: Mode) -> int:
    """Update some columns of a row.

    Returns:
        The number of rows written.
    """
    written = stored(shape, values, mode)
    assignments = [sql.SQL("{} = %s").format(sql.Identifier(name)) for name in written]
    assignments.append(sql.SQL("hits = coalesce(hits, 0) + 1").format())
    statement = sql.SQL("UPDATE {} SET {} WHERE {}").format(
        _name(shape), sql.SQL(", ").join(assignments), _at(shape)
    )
    return connection.execute(statement, [*written.values(), *key]).rowcount


def delete(connection: Connection, shape: Shape, key: Key) -> int:
    """Delete a row.

    Returns:
        The number of rows deleted.
    """
    statement = sql.SQL("DELETE FROM {} WHERE {}").format(_name(shape), _at(shape))
    return connection.execute(statement, key).rowcount


def move(connection: Connection, shape: Shape, key: Key, other: Key) -> int:
    """Give a row another key.

    Returns:
        The number of rows written.
    """
    statement = sql.SQL("UPDATE {} SET {} WHERE {}").format(
        _name(shape),
        sql.SQL(", ").join(sql.SQL("{} = %s").format(sql.Identifier(name)) for name in shape.key),
        _at(shape),
    )
    return connection.execute(statement, [*other, *key]).rowcount


# What was committed


@dataclass(frozen=True)
class Event:
    """A change of one row.

    Args:
        ticket: orders the events of one key.
        key: the row.
        values: columns that were written; None where the row was deleted or moved.
        whole: whether the row was inserted, so that nothing of an earlier one is left.
        moved_from: the key it had until now.
    """

    ticket: int
    key: Key
    values: Values | None
    whole: bool = False
    moved_from: Key | None = None


@dataclass
class Oracle:
    """The rows that have to be there, from what was committed."""

    rows: dict[Key, dict[str, str | None]] = field(default_factory=dict)

    def record(self, events: Iterable[Event]) -> None:
        """Apply committed events, in the order of their tickets."""
        for event in sorted(events, key=lambda event: event.ticket):
            if event.moved_from is not None:
                self.rows[event.key] = self.rows.pop(event.moved_from)
            elif event.values is None:
                del self.rows[event.key]
            elif event.whole:
                self.rows[event.key] = dict(event.values)
            else:
                self.rows[event.key] = {**self.rows[event.key], **event.values}


# What is there


def contents(url: str, shape: Shape) -> dict[Key, dict[str, tuple[str | None, str | None, str | None]]]:
    """Plaintext, ciphertext and token of every value, by key and column."""
    wanted: list[sql.Composable] = [sql.SQL("{}::text").format(sql.Identifier(name)) for name in shape.key]
    for column in shape.columns:
        for name in (column.name, column.encrypted, column.search if column.searchable else None):
            wanted.append(
                sql.SQL("{}::text").format(sql.Identifier(name)) if name else sql.SQL("NULL").format()
            )
    with support.application(url) as connection:
        rows = connection.execute(
            sql.SQL("SELECT {} FROM {}").format(sql.SQL(", ").join(wanted), _name(shape))
        ).fetchall()
    width = len(shape.key)
    return {
        tuple(row[:width]): {
            column.name: tuple(row[width + 3 * n : width + 3 * n + 3])
            for n, column in enumerate(shape.columns)
        }
        for row in rows
    }


def lost(url: str, shape: Shape, oracle: Oracle, *, pending_too: bool = True) -> list[str]:
    """What is not as it was last committed: rows, values, tokens. Empty where all is well.

    Args:
        url: the database.
        shape: the table.
        oracle: what has to be there.
        pending_too: whether a value without ciphertext is at fault, as it is after the last catch-up.
    """
    found = contents(url, shape)
    faults = [f"{key}: lost" for key in oracle.rows if key not in found]
    faults += [f"{key}: deleted, and there again" for key in found if key not in oracle.rows]
    opened: dict[str, str] = {}
    for key in found.keys() & oracle.rows.keys():
        for column in shape.columns:
            fault = _fault(
                column, oracle.rows[key][column.name], found[key][column.name], opened, pending_too
            )
            if fault is not None:
                faults.append(f"{key} {column.name}: {fault}")
    return sorted(faults)


def _fault(
    column: Column,
    wanted: str | None,
    found: tuple[str | None, str | None, str | None],
    opened: dict[str, str],
    pending_too: bool,
) -> str | None:
    plaintext, envelope, token = found
    if envelope is None:
        if token is not None:
            return f"a token without ciphertext, {wanted!r} is wanted"
        if plaintext != wanted:
            return f"plaintext {plaintext!r} and no ciphertext, {wanted!r} is wanted"
        return "pending" if pending_too and plaintext is not None else None
    if envelope not in opened:
        opened[envelope] = support.opened(envelope, column.context)
    if opened[envelope] != wanted:
        return f"decrypts to {opened[envelope]!r}, {wanted!r} is wanted"
    if plaintext not in (None, wanted):
        return f"plaintext {plaintext!r} beside a ciphertext of {wanted!r}"
    if column.searchable and token != support.token(opened[envelope], column.context):
        return f"token of another value than {wanted!r}"
    return None


def faults_named(faults: Sequence[str], limit: int = 20) -> str:
    """For an assertion's message."""
    return "\n".join([f"{len(faults)} faults", *faults[:limit]])
