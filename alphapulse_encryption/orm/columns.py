"""The column of envelopes as a declared attribute has it: how values are written, read and compared.

Belongs here: what happens between Python values and that one column, and what a comparison with it means in terms of
its neighbours. Which columns an attribute has is decided in `declaration`; that all of them are written together is
seen to in `writes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, NoReturn, cast

from sqlalchemy import (
    BigInteger,
    Column,
    Integer,
    Numeric,
    SmallInteger,
    String,
    Text,
    and_,
    false,
    func,
    or_,
    type_coerce,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import PassiveFlag
from sqlalchemy.orm.base import LoaderCallableStatus
from sqlalchemy.sql import ClauseElement, ColumnElement, operators
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine

from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.orm.phases import Phase
from alphapulse_encryption.orm.types import (
    EncryptedValueError,
    NullTestsOnly,
    _Encrypted,
    is_null_test,
    operator_name,
)

# What a plaintext begins with where it stands in for an envelope, which begins with a brace.
_PLAINTEXT_MARK = "="


@dataclass(frozen=True)
class Attribute:
    """One declared attribute in one phase, and the columns it has then, by their keys in the mapped table.

    `plaintext` is None where the phase does not name that column, `search` where the attribute is not searchable.
    """

    table: str
    column: str
    """The name of the plaintext column, for messages."""
    phase: Phase
    name: str
    """Of the attribute, and the key of the column that it is read from."""
    encrypted: str
    plaintext: str | None
    search: str | None

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all its columns, that of the column that is read first."""
        others = (self.plaintext, self.encrypted, self.search)
        return (self.name, *(key for key in others if key is not None and key != self.name))

    @property
    def reads_ciphertext(self) -> bool:
        return self.encrypted == self.name

    def __str__(self) -> str:
        return f"{self.table}.{self.column}"


@dataclass(frozen=True, eq=False, repr=False)
class Unreadable:
    """Stands where a value could not be read, until somebody asks for it. Holds neither value nor ciphertext.

    In a mapped instance it becomes the attribute's loader, so that access raises. In a row of a Core statement on the
    table itself it stays, and whatever is done with it raises.
    """

    _place: str
    _reason: str

    def of_row(self, key: str) -> Unreadable:
        return Unreadable(f"{self._place} of the row {key}", self._reason)

    def error(self) -> DecryptionError:
        return DecryptionError(f"{self._place} cannot be read: {self._reason}")

    def __call__(self, state: object, passive: PassiveFlag) -> LoaderCallableStatus:
        """As the loader of an instance's attribute: SQLAlchemy calls it on access."""
        if not passive & PassiveFlag.SQL_OK:
            return LoaderCallableStatus.PASSIVE_NO_RESULT
        raise self.error()

    def __repr__(self) -> str:
        return f"<{self._place} cannot be read>"

    def _raise(self, *_: object) -> NoReturn:
        raise self.error()


_REFUSED = (
    "str bytes bool int float index complex format hash len iter contains getitem eq ne lt le gt ge neg pos abs round "
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod"
)
for _name in _REFUSED.split():
    setattr(Unreadable, f"__{_name}__", Unreadable._raise)


class _Operators(NullTestsOnly):
    """Operators on the column itself, for statements on the table; attributes have their own."""

    __slots__ = ()

    def _compare(self, op: OperatorType, other: tuple[Any, ...]) -> ColumnElement[Any]:
        kind = cast(EncryptedColumn, self.type)
        return kind.compare(op, other, lambda key: neighbour(self.expr, kind.attribute, key))

    def _refuse(self, op: OperatorType) -> NoReturn:
        cast(EncryptedColumn, self.type).refuse(op)


def neighbour(column: Any, attribute: Attribute, key: str) -> ColumnElement[Any]:
    """Another column of the same attribute, in the table, alias or subquery that its column of envelopes is in."""
    if key == attribute.encrypted:
        return type_coerce(column, Text)
    source = getattr(column, "table", None)
    for base in column.base_columns:
        if source is not None and isinstance(base, Column) and key in base.table.c:
            found = source.corresponding_column(base.table.c[key])
            if found is not None:
                return found  # type: ignore[no-any-return]
    raise InvalidRequestError(
        f"{attribute} in the phase {attribute.phase} goes with the column {key!r}, which the subquery does not "
        "select: add it there, or compare and select the attribute inside."
    )


class EncryptedColumn(TypeDecorator[Any]):
    """The type of a declared attribute's column of envelopes: the declared type, with the limits of the plaintext's."""

    impl = Text
    cache_ok = True
    comparator_factory = _Operators

    def __init__(self, kind: _Encrypted[Any], attribute: Attribute, plain: TypeEngine[Any]) -> None:
        super().__init__()
        self.kind, self.attribute, self.plain = kind, attribute, plain
        # Events of the declared type, as of `MutableDict.as_mutable`, reach the column through this.
        self.impl = kind  # type: ignore[assignment]
        self.hashable = kind.hashable

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Values to envelopes; raises what `checked_text` raises, and ConfigurationError where a key is missing."""
        return lambda value: None if value is None else self.kind.seal_text(self.checked_text(value))

    def checked_text(self, value: Any) -> str:
        """The text form of a value; EncryptedTypeError or EncryptedValueError where the plaintext column refuses it."""
        text = self.kind.text_of(value)
        problem = _problem_of(text, self.plain)
        if problem:
            raise EncryptedValueError(f"{self.attribute}: {problem}")
        return text

    def beside(self, key: str, value: Any) -> Any:
        """What a column of the attribute is given for a value: itself, or its search token."""
        return self.kind.search_token(value) if key == self.attribute.search else value

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:
        """Envelopes to values, and plaintext where it stands in for one."""

        def process(stored: str | None) -> Any:
            try:
                return self.read(stored, dialect)
            except DecryptionError as error:
                return Unreadable(str(self.attribute), str(error))

        return process

    def read(self, stored: str | None, dialect: Dialect) -> Any:
        """The value of what `reading` selects; raises what the declared type raises."""
        if stored is None or not stored.startswith(_PLAINTEXT_MARK) or not self.attribute.plaintext:
            return self.kind.process_result_value(stored, dialect)
        try:
            return self.kind.parse_json(stored[len(_PLAINTEXT_MARK) :])
        except (ValueError, ArithmeticError, RecursionError):
            pass
        raise DecryptionError(f"{self.kind!r}: the plaintext is not one that this type can represent")

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        """What is selected for the column: in the phase `dual`, the plaintext where the value is pending."""
        if self.attribute.plaintext is None or not self.attribute.reads_ciphertext:
            return column
        return type_coerce(self.reading(lambda key: neighbour(column, self.attribute, key)), self)

    def reading(self, column_of: Callable[[str], ColumnElement[Any]]) -> ColumnElement[Any]:
        """The envelope, or the marked plaintext where there is none."""
        encrypted = column_of(self.attribute.encrypted)
        if self.attribute.plaintext is None:
            return encrypted
        plaintext = self.kind.json_of(column_of(self.attribute.plaintext))
        return func.coalesce(encrypted, sql_cast(_PLAINTEXT_MARK, Text).concat(plaintext), type_=Text)

    def compare(
        self, op: OperatorType, other: tuple[Any, ...], column_of: Callable[[str], ColumnElement[Any]]
    ) -> ColumnElement[Any]:
        """An operator on the attribute, by its columns of each key; refuses what ciphertext cannot be asked."""
        attribute = self.attribute
        pending = None
        if attribute.plaintext is not None:
            pending = column_of(attribute.encrypted).is_(None), column_of(attribute.plaintext)
        if is_null_test(op, other):
            absent: ColumnElement[bool] = column_of(attribute.encrypted).is_(None)
            if pending is not None:
                absent = and_(absent, pending[1].is_(None))
            return absent if op in _POSITIVE else ~absent
        if op not in _LOOKUPS or attribute.search is None:
            self.refuse(op)
        values = list(other[0]) if op in _LISTS and isinstance(other[0], _COLLECTIONS) else list(other)
        if any(isinstance(value, ClauseElement) or hasattr(value, "__clause_element__") for value in values):
            raise InvalidRequestError(
                f"{attribute} is compared by search tokens, which are made when the query is built: compare it with "
                "values, not with bound parameters, columns or subqueries."
            )
        given = [value for value in values if value is not None]
        tokens = [token for value in given for token in self.kind.search_tokens(value)]
        search = column_of(attribute.search)
        if op is operators.eq and len(tokens) == 1:
            found = search == tokens[0]  # costs SQLAlchemy much less than IN
        elif op in _POSITIVE:
            found = search.in_(tokens)
        elif len(given) < len(values):
            return false()  # as SQL has it: NOT IN (NULL) is never true
        else:
            found = search.not_in(tokens)
        if pending is None:
            return found
        absent, plaintext = pending
        return or_(found, and_(absent, plaintext.in_(given) if op in _POSITIVE else plaintext.not_in(given)))

    def refuse(self, op: OperatorType) -> NoReturn:
        """Refuse an operator; the message names the attribute and what works."""
        possible, other = "=, <>, IN and IS NULL", ""
        if not self.attribute.search:
            possible, other = "IS NULL", ", or declare it with search=True for ="
        raise InvalidRequestError(
            f"{self.attribute} is encrypted in the phase {self.attribute.phase} and supports {possible} only, not "
            f"{operator_name(op)}. Compare after loading{other}."
        )

    def compare_values(self, x: Any, y: Any) -> bool:
        return self.kind.compare_values(x, y)

    def __repr__(self) -> str:
        return f"EncryptedColumn({self.kind!r})"


def _problem_of(text: str, plaintext: TypeEngine[Any]) -> str | None:
    """Why a column of a type cannot hold a value, given in its text form, in words that do not quote it; or None."""
    if isinstance(plaintext, String):
        if "\x00" in text:
            return "text cannot hold a NUL character"
        if plaintext.length is not None and len(text) > plaintext.length:
            return f"the value is longer than {plaintext.length} characters"
    elif isinstance(plaintext, Numeric) and plaintext.asdecimal and plaintext.precision is not None:
        digits = plaintext.precision - (plaintext.scale or 0)
        if _whole_digits(text) > digits:
            return f"the value has more than {digits} digits before the decimal point"
    elif isinstance(plaintext, Integer):
        small, big = isinstance(plaintext, SmallInteger), isinstance(plaintext, BigInteger)
        bits = 16 if small else 64 if big else 32
        if not -(2 ** (bits - 1)) <= int(text) < 2 ** (bits - 1):
            return f"the value is out of the range of an integer of {bits} bits"
    return None


def _whole_digits(text: str) -> float:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return 0
    # NaN fits every numeric; PostgreSQL refuses infinity where there is a precision.
    if number.is_infinite():
        return math.inf
    return max(number.adjusted() + 1, 0) if number.is_finite() and number else 0


_LISTS = frozenset({operators.in_op, operators.not_in_op})
_POSITIVE = frozenset({operators.eq, operators.is_, operators.in_op})
_LOOKUPS = _LISTS | {operators.eq, operators.ne}
_COLLECTIONS = (list, tuple, set, frozenset)


class SelectedValue(TypeDecorator[Any]):
    """The type of an attribute selected by itself: a value that cannot be read raises when its row is read."""

    impl = Text
    cache_ok = True
    comparator_factory = NullTestsOnly

    def __init__(self, column: EncryptedColumn) -> None:
        super().__init__()
        self.column = column
        self.hashable = column.hashable

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        try:
            return self.column.read(value, dialect)
        except DecryptionError as error:
            reason = str(error)
        raise Unreadable(str(self.column.attribute), reason).error()
