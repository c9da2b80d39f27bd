"""What requests of the traffic are made of: rows that it owns, what it wrote to them, and what a table allows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import psycopg
from sqlalchemy import Engine, func, select, tablesample
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration.postgres.database import connection_was_lost
from alphapulse_encryption.orm import EncryptedTypeError, EncryptedValueError
from alphapulse_encryption.rehearsal.traffic.tables import Field, Shape, Values, digest
from alphapulse_encryption.rehearsal.traffic.ways import Key, Way

# Each request is tried out so often at least before the traffic begins.
_TRIALS = 3
# What says of a value that Python has none for it: the driver, of plaintext, and the runtime library, of ciphertext.
UNREADABLE = (DBAPIError, psycopg.DataError, DecryptionError)


class NoKeyOfItsOwn(Exception):
    """A new row would have no key of its own, or there is no row that it could be made of."""


class Remembered:
    """A row as its client left it: digests of its sensitive values, and the values that it can be looked up by."""

    def __init__(self, shape: Shape, key: Key, values: Values, *, inserted: bool = False) -> None:
        self.key = key
        self.inserted = inserted
        self.searched = {f.attribute: values.get(f.attribute) for f in shape.sensitive if f.searchable}
        self._digests = {f.attribute: digest(values.get(f.attribute)) for f in shape.sensitive}

    def agrees(self, values: Values | None) -> bool:
        """Whether this is what was written."""
        return values is not None and all(
            digest(values[name]) == known for name, known in self._digests.items()
        )

    def wrote(self, values: Values) -> None:
        """These values are in it from now on."""
        self._digests |= {name: digest(value) for name, value in values.items()}
        self.searched |= {name: value for name, value in values.items() if name in self.searched}


@dataclass
class Book:
    """What the traffic knows of a table."""

    # Those that it owns: nobody else writes them.
    rows: list[Remembered]
    # Values of each sensitive column, to be written to other rows.
    donors: dict[str, list[Any]]
    # Whole rows, to make new ones of.
    templates: list[Values]


@dataclass
class Target:
    """A table that requests go to."""

    shape: Shape
    # Through the runtime library, one for each phase; and past it, where that is allowed now.
    library: Sequence[Way]
    plain: Way | None
    book: Book
    # What updates write, and whether it takes new rows; what it does not allow, and why.
    changing: list[Field] = field(default_factory=list)
    inserting: bool = False
    left_out: list[str] = field(default_factory=list)

    @property
    def ways(self) -> list[Way]:
        return [*self.library, *([] if self.plain is None else [self.plain])]

    def new_values(self, chance: random.Random, fields: Sequence[Field]) -> Values:
        """Values that suit these columns: of other rows, and unique where they have to be."""
        values = {f.attribute: chance.choice(self.book.donors[f.attribute]) for f in fields}
        return values | {f.attribute: f.fresh(values[f.attribute]) for f in fields if f.unique}

    def new_row(self, chance: random.Random) -> Values:
        """The values of a new row.

        Raises:
            NoKeyOfItsOwn: it cannot be made.
        """
        row = self.shape.new_row(chance.choice(self.book.templates)) if self.book.templates else None
        if row is None:
            raise NoKeyOfItsOwn
        return row

    def try_out(self, engine: Engine, chance: random.Random) -> None:
        """Find out which requests the table allows, in transactions that are rolled back.

        All ways are gone once, so that the first request does not pay for what is done once in a process: deriving
        keys, making statements.
        """
        name = self.shape.table.key
        if not self.book.rows:
            self.left_out.append(f"table {name}: it has no rows that can be read")
            return
        ways = self.ways * -(-_TRIALS // len(self.ways))

        def update(session: Session, fields: Sequence[Field]) -> None:
            for way, row in zip(ways, cycle(self.book.rows[:_TRIALS]), strict=False):
                way.update(session, row.key, self.new_values(chance, fields))

        def insert(session: Session) -> None:
            for way in ways:
                way.delete(session, way.insert(session, self.new_row(chance)))

        possible = []
        for f in self.shape.sensitive:
            donors = self.book.donors[f.attribute]
            if donors and f.unique and f.fresh(donors[0]) is None:
                self.left_out.append(f"update of {name}.{f.name}: no other value would be unique")
            elif donors:
                possible.append(f)
        if _problem(engine, partial(update, fields=possible)) is None:
            self.changing = possible
        else:
            self.changing = [
                f
                for f in possible
                if self._allows(engine, f"update of {name}.{f.name}", partial(update, fields=[f]))
            ]
        self.inserting = self._allows(engine, f"insert into {name}", insert)

    def _allows(self, engine: Engine, what: str, attempt: Callable[[Session], None]) -> bool:
        problem = _problem(engine, attempt)
        if problem is not None:
            self.left_out.append(f"{what}: {problem}")
        return problem is None


def _problem(engine: Engine, attempt: Callable[[Session], None]) -> str | None:
    # Nothing is committed.
    with Session(engine) as session:
        try:
            attempt(session)
        except (NoKeyOfItsOwn, DBAPIError, EncryptedValueError, EncryptedTypeError) as error:
            if was_lost(error):
                raise
            return named(error)
    return None


def open_book(engine: Engine, shape: Shape, way: Way, rows: int, chance: random.Random) -> Book:
    """Choose so many rows all over a table, and remember what is in them, as this way reads them."""
    with Session(engine) as session:
        keys: list[Key] = []
        if shape.rows > rows:
            # Whole pages, and too many, because pages are not equally full.
            some = tablesample(way.table, func.system(min(100.0, 300.0 * rows / shape.rows)))
            keys = [
                tuple(row) for row in session.execute(select(*(some.c[field.name] for field in shape.key)))
            ]
        if len(keys) < rows:
            keys = [tuple(row) for row in session.execute(select(*way.key).limit(rows))]
        found = readable(way, session, chance.sample(keys, min(rows, len(keys))))
    return Book(
        rows=[Remembered(shape, key, values) for key, values in found.items()],
        donors={
            f.attribute: _writable(f, [row[f.attribute] for row in found.values()]) for f in shape.sensitive
        },
        # JSON's null is no NULL to the database, and None to Python.
        templates=[
            row
            for row in found.values()
            if not any(f.required and row[f.attribute] is None for f in shape.fields)
        ],
    )


def readable(way: Way, session: Session, keys: Sequence[Key]) -> dict[Key, Values]:
    """Rows by their keys; without those that Python has no values for, such as dates of infinity."""
    try:
        return way.read(session, keys) if keys else {}
    except UNREADABLE as error:
        if not has_no_value(error):
            raise
        session.rollback()
    one_by_one = ([key] for key in keys if len(keys) > 1)
    return {key: row for one in one_by_one for key, row in readable(way, session, one).items()}


def has_no_value(error: BaseException) -> bool:
    """Whether an error is about what was read, and not about reading it."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return isinstance(cause, DecryptionError) or (
        isinstance(cause, psycopg.DataError) and cause.sqlstate is None
    )


def _writable(field: Field, values: Sequence[Any]) -> list[Any]:
    """Those that may be written to other rows; there are such that can be read alone, such as JSON's 1e400."""
    found: list[Any] = []
    for value in values:
        if value is None and (field.required or field.unique):
            continue
        with suppress(EncryptedValueError, EncryptedTypeError):
            if value is not None:
                field.encrypted.text_of(value)
            found.append(value)
    return found


def was_lost(error: BaseException) -> bool:
    """Whether an error is about the connection and not about the request."""
    return isinstance(error, DBAPIError) and (
        error.connection_invalidated
        or (isinstance(error.orig, psycopg.Error) and connection_was_lost(error.orig))
    )


def named(error: BaseException) -> str:
    """Class and SQLSTATE of an error; never its message, which may quote a row."""
    if isinstance(error, NoKeyOfItsOwn):
        return "no key of its own can be made for a new row"
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    state = getattr(cause, "sqlstate", None)
    return f"{type(cause).__name__}{f' {state}' if state else ''}"
