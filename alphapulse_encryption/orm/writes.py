"""Every column of an attribute is written by the statement that writes the attribute, or none is.

An INSERT gets what it lacks from the columns' defaults, in the ORM and in Core. An instance that is flushed gets it
here, before its UPDATE, if the attribute has changed. What goes past both, bulk updates and Core updates, is completed
or refused when the statement is executed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from sqlalchemy import Connection, Engine, event
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.dialects.postgresql.dml import OnConflictDoUpdate
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import InstanceState, attributes
from sqlalchemy.sql import ClauseElement, Executable, Insert, Update
from sqlalchemy.sql.elements import BindParameter, Null

from alphapulse_encryption.orm.attributes import refuse_expression
from alphapulse_encryption.orm.columns import EncryptedColumn, Unreadable
from alphapulse_encryption.orm.types import EncryptedValueError

_DECLARED = "__encrypted_columns__"


def keep_written_together(owner: type, name: str, kind: EncryptedColumn) -> None:
    """See to the instances of a class that is about to be mapped, and of its subclasses."""
    kinds: dict[str, EncryptedColumn] = vars(owner).get(_DECLARED, {})
    kinds[name] = kind
    if len(kinds) > 1:
        return
    setattr(owner, _DECLARED, kinds)

    def load(target: Any, context: Any, attrs: Any = None) -> None:
        _set_unreadable_aside(target, context, kinds)

    event.listen(
        owner, "before_update", lambda _, __, target: _complete_instance(target, kinds), propagate=True
    )
    event.listen(owner, "load", load, propagate=True)
    event.listen(owner, "refresh", load, propagate=True)
    event.listen(owner, "expire", _keep_aside, propagate=True)


def _complete_instance(target: Any, kinds: Mapping[str, EncryptedColumn]) -> None:
    state: InstanceState[Any] = inspect_instance(target)
    for name, kind in kinds.items():
        # A change in place of a shared JSON value may be noted on any of the attributes.
        noted = state.committed_state.keys() & set(kind.attribute.keys)
        changed = {key for key in noted if state.attrs[key].history.has_changes()}
        if not changed or name not in state.dict:
            continue
        value = state.dict[name]
        if isinstance(value, Null):
            value = None
        if isinstance(value, ClauseElement):
            if kind.attribute.reads_ciphertext:
                refuse_expression(kind)
            continue
        state.info.get(_UNREADABLE, {}).pop(name, None)
        if name not in changed:
            attributes.flag_modified(target, name)
        for key in kind.attribute.keys[1:]:
            setattr(target, key, kind.beside(key, value))
            if key not in changed:
                attributes.flag_modified(target, key)


# Of `InstanceState.info`: the attributes that could not be read, by name.
_UNREADABLE = "alphapulse_encryption.unreadable"


def _set_unreadable_aside(target: Any, context: Any, kinds: Mapping[str, EncryptedColumn]) -> None:
    """Take what could not be read out of an instance that was just loaded: access raises instead.

    Raises:
        DecryptionError: the instance was loaded because somebody asked for one of its attributes, or for all of them
            again; SQLAlchemy would not take a missing one for an answer.
    """
    state: InstanceState[Any] = inspect_instance(target)
    found: Unreadable | None = None
    for name in kinds:
        value = state.dict.get(name)
        if type(value) is Unreadable:
            columns = [column.name for column in state.mapper.primary_key]
            key = zip(columns, state.key[1], strict=True) if state.key else ()
            found = value.of_row(", ".join(f"{column}={part}" for column, part in key) or "without a key")
            del state.dict[name]
            state.info.setdefault(_UNREADABLE, {})[name] = found
            state.callables = {**state.callables, name: found}
        elif name in state.dict and _UNREADABLE in state.info:
            state.info[_UNREADABLE].pop(name, None)
    if found is not None and context.refresh_state is state:
        raise found.error()


def _keep_aside(target: Any | None, attrs: Iterable[str] | None) -> None:
    """An instance as a whole expires: its other attributes can be loaded again without what cannot be read."""
    if target is None:
        return  # nobody holds it any more
    state: InstanceState[Any] = inspect_instance(target)
    for name, unreadable in state.info.get(_UNREADABLE, {}).items():
        if attrs is None:
            state.expired_attributes.discard(name)
            state.callables = {**state.callables, name: unreadable}


@event.listens_for(Engine, "before_execute", retval=True)
def _before_execute(
    connection: Connection,
    statement: Executable,
    multiple: list[Mapping[str, Any]],
    single: Mapping[str, Any],
    options: Mapping[str, Any],
) -> tuple[Executable, list[Mapping[str, Any]], Mapping[str, Any]]:
    if isinstance(statement, Insert | Update):
        for column in statement.table.c:
            if isinstance(column.type, EncryptedColumn):
                written = _Written(statement, column.type, list(multiple) or [single])
                written.complete_or_refuse()
                statement = written.statement
                multiple, single = (written.rows, {}) if multiple else ([], written.rows[0])
    return statement, multiple, single


class _Written:
    """What one statement writes to one attribute, by itself and by the parameters it is executed with."""

    def __init__(
        self, statement: Insert | Update, kind: EncryptedColumn, rows: list[Mapping[str, Any]]
    ) -> None:
        self.statement, self.rows = statement, rows
        self.kind, self.attribute = kind, kind.attribute
        self.fixed = _values_of(statement)
        main = statement.table.c[self.attribute.name]
        self.required = not main.nullable and self.attribute.reads_ciphertext
        self.has_default = main.default is not None

    def complete_or_refuse(self) -> None:
        if self.attribute.reads_ciphertext:
            for values in self.fixed:
                value = values.get(self.attribute.name)
                if isinstance(value, ClauseElement) and not isinstance(value, BindParameter | Null):
                    refuse_expression(self.kind)
        if isinstance(self.statement, Update):
            self._complete_update()
        else:
            self._check_insert(self.statement)
        if self.required:
            for row in (*self.rows, *self.fixed):
                self._check_required(row)

    def _complete_update(self) -> None:
        attribute = self.attribute
        written = self._part_of([*self.fixed[0], *self.rows[0]])
        missing = [key for key in attribute.keys if key not in written]
        if not written or not missing:
            return
        if attribute.name in self.rows[0]:
            self.rows = [{**row, **self._beside(row[attribute.name], missing)} for row in self.rows]
            return
        value = self.fixed[0].get(attribute.name)
        if isinstance(value, Null):
            self.statement = self.statement.values(self._beside(None, missing))
        elif isinstance(value, BindParameter) and not value.required and value.key not in self.rows[0]:
            self.statement = self.statement.values(self._beside(value.effective_value, missing))
        elif attribute.reads_ciphertext or attribute.name not in written:
            self._refuse_part(written)

    def _check_insert(self, statement: Insert) -> None:
        attribute = self.attribute
        parts: list[list[str]] = []
        if statement.select is not None:
            parts.append(_keys(statement._select_names or ()))
        upsert = getattr(statement, "_post_values_clause", None)
        if isinstance(upsert, OnConflictDoUpdate):
            parts.append(_keys(dict(upsert.update_values_to_set)))
        for part in parts:
            written = self._part_of(part)
            # Plaintext alone is a way to write: the value is pending.
            alone = not attribute.reads_ciphertext and written == [attribute.name]
            if written and not alone and len(written) < len(attribute.keys):
                self._refuse_part(written)
        if self.required and statement.select is None and not self.has_default:
            given = set().union(*self.fixed)
            if any(attribute.name not in given and attribute.name not in row for row in self.rows):
                self._refuse_none()

    def _check_required(self, values: Mapping[str, Any]) -> None:
        value = values.get(self.attribute.name, True)
        if isinstance(value, BindParameter):
            # Without a value of its own, it gets one from the parameters.
            value = True if value.required else value.effective_value
        if value is None or isinstance(value, Null):
            self._refuse_none()

    def _beside(self, value: Any, keys: Iterable[str]) -> dict[str, Any]:
        return {key: self.kind.beside(key, value) for key in keys}

    def _part_of(self, keys: Collection[str]) -> list[str]:
        return [key for key in self.attribute.keys if key in keys]

    def _refuse_none(self) -> NoReturn:
        raise EncryptedValueError(
            f"{self.attribute} is required (nullable=False) and cannot be written as None"
        )

    def _refuse_part(self, written: list[str]) -> NoReturn:
        missing = [key for key in self.attribute.keys if key not in written]
        raise InvalidRequestError(
            f"{self.attribute} in the phase {self.attribute.phase} is written to {', '.join(map(repr, written))} "
            f"without {', '.join(map(repr, missing))}, and the two would not agree. Give the value of "
            f"{self.attribute.name!r}, or all of them as encrypted_values() makes them."
        )


def _values_of(statement: Insert | Update) -> list[dict[str, Any]]:
    """What `.values()` was given, by key; each of several rows."""
    rows = [row for rows in statement._multi_values for row in rows if isinstance(row, Mapping)]
    given = rows or [statement._values or {}]
    return [dict(zip(_keys(values), values.values(), strict=True)) for values in given]


def _keys(columns: Iterable[Any]) -> list[str]:
    return [column if isinstance(column, str) else column.key for column in columns]
