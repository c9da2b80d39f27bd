"""The two ways of the application to a table: through the runtime library, in a phase, and in plain SQL.

Each makes the same requests, in a transaction of its caller's, and gives back values by attribute. The library's are
those of an ORM: load, change, flush. Plain SQL is what the application sent before it knew of any encryption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Column as SqlColumn
from sqlalchemy import Engine, MetaData, Table, delete, insert, select, tuple_, update
from sqlalchemy.orm import DeclarativeBase, Session, mapped_column
from sqlalchemy.schema import FetchedValue

from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.orm import Phase, check_phases, configure, encrypted, reset_phases
from alphapulse_encryption.rehearsal.traffic.tables import Shape, Values

Key = tuple[Any, ...]

# Rows of one look-up; of a value that more rows have, nothing can be said about any one of them.
MOST_FOUND = 50

PLAIN = "plain SQL"


class RowIsMissing(Exception):
    """A row that should be there is not."""


class Library:
    """Through the runtime library."""

    def __init__(self, shape: Shape, phase: Phase, model: type[Any]) -> None:
        self.name = f"library, {phase}"
        self.phase = phase
        self._model = model
        self._key = [field.attribute for field in shape.key]
        self._columns = [getattr(model, name) for name in self._key]
        self._sensitive = [field.attribute for field in shape.sensitive]

    def _values(self, row: Any) -> Values:
        return {name: getattr(row, name) for name in self._sensitive}

    def _key_of(self, row: Any) -> Key:
        return tuple(getattr(row, name) for name in self._key)

    def _load(self, session: Session, key: Key) -> Any:
        row = session.get(self._model, key)
        if row is None:
            raise RowIsMissing
        return row

    def read(self, session: Session, keys: Sequence[Key]) -> dict[Key, Values]:
        """Rows by their keys, those that are there."""
        if len(keys) == 1:
            row = session.get(self._model, keys[0])
            return {} if row is None else {keys[0]: self._values(row)}
        rows = session.scalars(select(self._model).where(tuple_(*self._columns).in_(keys)))
        return {self._key_of(row): self._values(row) for row in rows}

    def look_up(self, session: Session, attribute: str, value: Any) -> list[Key]:
        """Keys of rows with a value, at most ``MOST_FOUND``."""
        found = select(self._model).where(getattr(self._model, attribute) == value).limit(MOST_FOUND)
        return [self._key_of(row) for row in session.scalars(found)]

    def read_on(self, session: Session, key: Key, limit: int) -> dict[Key, Values]:
        """Rows from a key on, in its order; without those that the library cannot read, as it lets applications."""
        wanted = (
            select(self._model).where(tuple_(*self._columns) >= key).order_by(*self._columns).limit(limit)
        )
        found = {}
        for row in session.scalars(wanted):
            with suppress(DecryptionError):
                found[self._key_of(row)] = self._values(row)
        return found

    def update(self, session: Session, key: Key, values: Values) -> None:
        row = self._load(session, key)
        for name, value in values.items():
            setattr(row, name, value)
        session.flush()

    def insert(self, session: Session, values: Values) -> Key:
        row = self._model(**values)
        session.add(row)
        session.flush()
        return self._key_of(row)

    def delete(self, session: Session, key: Key) -> None:
        session.delete(self._load(session, key))
        session.flush()


class Plain:
    """In plain SQL, which knows the plaintext columns only.

    Args:
        shape: the table, with its plaintext columns.
    """

    name = PLAIN

    def __init__(self, shape: Shape) -> None:
        columns = [SqlColumn(f.name, f.type, key=f.attribute, primary_key=f.in_key) for f in shape.fields]
        self._table = Table(shape.table.name, MetaData(), *columns, schema=shape.table.schema_name)
        self._key = [self._table.c[field.attribute] for field in shape.key]
        self._read = [
            *self._key,
            *(c for c in (self._table.c[f.attribute] for f in shape.sensitive) if c not in set(self._key)),
        ]

    def _is(self, key: Key) -> list[Any]:
        return [column == value for column, value in zip(self._key, key, strict=True)]

    def _rows(self, rows: Any) -> dict[Key, Values]:
        width, names = len(self._key), [column.key for column in self._read]
        return {tuple(row[:width]): dict(zip(names[width:], row[width:], strict=True)) for row in rows}

    def read(self, session: Session, keys: Sequence[Key]) -> dict[Key, Values]:
        wanted = self._is(keys[0]) if len(keys) == 1 else [tuple_(*self._key).in_(keys)]
        return self._rows(session.execute(select(*self._read).where(*wanted)))

    def look_up(self, session: Session, attribute: str, value: Any) -> list[Key]:
        found = select(*self._key).where(self._table.c[attribute] == value).limit(MOST_FOUND)
        return [tuple(row) for row in session.execute(found)]

    def read_on(self, session: Session, key: Key, limit: int) -> dict[Key, Values]:
        found = select(*self._read).where(tuple_(*self._key) >= key).order_by(*self._key).limit(limit)
        return self._rows(session.execute(found))

    def update(self, session: Session, key: Key, values: Values) -> None:
        changed = update(self._table).where(*self._is(key)).values(_by_column(self._table, values))
        self._one(session, changed)

    def insert(self, session: Session, values: Values) -> Key:
        made = insert(self._table).values(_by_column(self._table, values)).returning(*self._key)
        return tuple(session.execute(made).one())

    def delete(self, session: Session, key: Key) -> None:
        self._one(session, delete(self._table).where(*self._is(key)))

    @staticmethod
    def _one(session: Session, statement: Any) -> None:
        if getattr(session.execute(statement), "rowcount", 0) != 1:
            raise RowIsMissing


# How requests reach one table; what changes a row raises RowIsMissing where it is not there.
Way = Library | Plain


def _by_column(table: Table, values: Values) -> Mapping[Any, Any]:
    return {table.c[name]: value for name, value in values.items()}


def libraries(shapes: Sequence[Shape], phase: Phase, engine: Engine) -> dict[str, Library]:
    """The models of all tables in one phase, by the table's key.

    Raises:
        RefusedError: the phase contradicts where the migration stands.
    """
    # Phases are a property of the process; here each belongs to an instance of its own.
    reset_phases()
    configure(phase=phase)

    class Base(DeclarativeBase):
        """Of this phase alone."""

    made = {shape.table.key: Library(shape, phase, _model(shape, Base)) for shape in shapes}
    check_phases(engine)
    return made


def _model(shape: Shape, base: type[DeclarativeBase]) -> type[Any]:
    body: dict[str, Any] = {
        "__tablename__": shape.table.name,
        "__table_args__": {"schema": shape.table.schema_name},
        "__module__": __name__,
    }
    for field in shape.fields:
        if field.sensitive is not None:
            body[field.attribute] = encrypted(
                field.encrypted_type(),
                field.type,
                search=field.searchable,
                nullable=not field.required,
                name=field.name,
            )
        else:
            body[field.attribute] = mapped_column(
                field.name,
                field.type,
                primary_key=field.in_key,
                nullable=not field.required,
                server_default=FetchedValue() if field.given else None,
            )
    return type(f"Row of {shape.table.key}", (base,), body)
