"""The ways of the application to a table: through the runtime library, in a phase, and in plain SQL without it.

Each makes the same requests, in a transaction of its caller's, and gives back values by attribute. They are those of
an ORM: load, change, flush. Plain SQL is what it sends for a model that knows of no encryption.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sqlalchemy import Column, Engine, select, tuple_
from sqlalchemy.orm import DeclarativeBase, Session
from sqlalchemy.schema import FetchedValue

from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.orm import Phase, check_phases, configure, encrypted, reset_phases
from alphapulse_encryption.rehearsal.traffic.tables import Shape, Values

Key = tuple[Any, ...]

# Rows of one look-up; of a value that more rows have, nothing can be said about any one of them.
MOST_FOUND = 50


class RowIsMissing(Exception):
    """A row that should be there is not."""


class Way:
    """How requests reach one table; what changes a row raises :class:`RowIsMissing` where it is not there."""

    def __init__(self, name: str, shape: Shape, model: type[Any]) -> None:
        self.name = name
        self.table = model.__table__
        self.key = [getattr(model, field.attribute) for field in shape.key]
        self._model = model
        self._shape = shape

    def _values(self, row: Any) -> Values:
        return {field.attribute: getattr(row, field.attribute) for field in self._shape.fields}

    def _key_of(self, row: Any) -> Key:
        return tuple(getattr(row, field.attribute) for field in self._shape.key)

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
        rows = session.scalars(select(self._model).where(tuple_(*self.key).in_(keys)))
        return {self._key_of(row): self._values(row) for row in rows}

    def look_up(self, session: Session, attribute: str, value: Any) -> list[Key]:
        """Keys of rows with a value, at most ``MOST_FOUND``."""
        found = select(self._model).where(getattr(self._model, attribute) == value).limit(MOST_FOUND)
        return [self._key_of(row) for row in session.scalars(found)]

    def read_on(self, session: Session, key: Key, limit: int) -> dict[Key, Values]:
        """Rows from a key on, in its order; without those that the library cannot read, as it lets applications."""
        wanted = select(self._model).where(tuple_(*self.key) >= key).order_by(*self.key).limit(limit)
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


def libraries(shapes: Sequence[Shape], phase: Phase, engine: Engine) -> list[Way]:
    """The ways through the runtime library in one phase, a table each.

    Raises:
        RefusedError: the phase contradicts where the migration stands.
    """
    # Phases are a property of the process; here each belongs to an instance of its own.
    reset_phases()
    configure(phase=phase)

    class Base(DeclarativeBase):
        """Of this phase alone."""

    made = [Way(f"library, {phase}", shape, _model(shape, Base)) for shape in shapes]
    check_phases(engine)
    return made


def plain(shape: Shape) -> Way:
    """The way past the library, to the plaintext columns."""

    class Base(DeclarativeBase):
        """Of this table alone."""

    return Way("plain SQL", shape, _model(shape, Base, encrypts=False))


def _model(shape: Shape, base: type[DeclarativeBase], *, encrypts: bool = True) -> type[Any]:
    body: dict[str, Any] = {
        "__tablename__": shape.table.name,
        "__table_args__": {"schema": shape.table.schema_name},
        "__module__": __name__,
    }
    for field in shape.fields:
        nullable = not field.required
        if encrypts and field.encrypted is not None:
            body[field.attribute] = encrypted(
                field.encrypted, field.type, search=field.searchable, nullable=nullable, name=field.name
            )
            continue
        # Where there is one, SQLAlchemy writes no NULL; a sensitive column gets what is remembered of it.
        default = FetchedValue() if field.given and field.encrypted is None else None
        # A mapped_column takes no type that it does not know, such as an enumeration.
        body[field.attribute] = Column(
            field.name, field.type, primary_key=field.in_key, nullable=nullable, server_default=default
        )
    return type(f"Row of {shape.table.key}", (base,), body)
