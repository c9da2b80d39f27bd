"""SQLAlchemy types for encrypted columns and search columns.

    class User(Base):
        __tablename__ = "users"
        id: Mapped[int] = mapped_column(primary_key=True)
        email: Mapped[str] = mapped_column("email_encrypted", EncryptedString("user_pii"))
        email_search: Mapped[str] = mapped_column(SearchToken("user_pii"))

    user = User(email="user@example.com", email_search="user@example.com")
    select(User).where(User.email_search == "user@example.com")

What is encrypted is the PostgreSQL text form of a value, the one that `value::text` has under `TimeZone=UTC`,
`DateStyle=ISO`, `bytea_output=hex` and `extra_float_digits=1`, so that the application and the migration write the same
plaintext. None is NULL.

SQLAlchemy quotes the parameters of a statement in some of its errors, before encryption. The types here raise errors
that it does not wrap; for those of other types, create the engine with `hide_parameters=True`.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Any, ClassVar, Concatenate, NoReturn, ParamSpec, TypeVar
from uuid import UUID

from sqlalchemy import Boolean, ColumnClause, String, Text, func
from sqlalchemy import cast as sql_cast
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import DontWrapMixin, InvalidRequestError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql import ColumnElement, operators
from sqlalchemy.sql.elements import BinaryExpression, Null
from sqlalchemy.sql.operators import OperatorType
from sqlalchemy.types import TypeDecorator, TypeEngine
from sqlalchemy.util import generic_repr

from alphapulse_encryption.crypto.text import UnencodableTextError
from alphapulse_encryption.errors import ConfigurationError, DecryptionError
from alphapulse_encryption.runtime import encrypt_field, get_cipher, get_searchable_cipher

SEARCH_COLUMN_LENGTH = 64

_BIGINT = range(-(2**63), 2**63)

# Digits before and after the decimal point of PostgreSQL's numeric (manual, section 8.1.2).
_NUMERIC_DIGITS_BEFORE = 131_072
_NUMERIC_DIGITS_AFTER = 16_383
_NUMERIC_CONTEXT = Context(prec=_NUMERIC_DIGITS_BEFORE + _NUMERIC_DIGITS_AFTER)

# PostgreSQL prints float8 in positional notation from 1e-4 up to below 1e15.
_FLOAT_POSITIONAL = range(-4, 15)
_FLOAT_MAX_DIGITS = 17
# Holds every float8 and every middle between two of them exactly.
_FLOAT_CONTEXT = Context(prec=2000)

_NULL_TESTS = frozenset({operators.eq, operators.ne, operators.is_, operators.is_not})

T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")
Kind = TypeVar("Kind", bound="_ContextType[Any]")


class EncryptedTypeError(DontWrapMixin, TypeError):
    """A value of the wrong Python type for its column. Names the types, never the value."""


class EncryptedValueError(DontWrapMixin, ValueError):
    """A value that its column cannot hold. Never quotes the value."""


class _UnquotedConfigurationError(DontWrapMixin, ConfigurationError):
    """SQLAlchemy raises it as it is, instead of with the statement's parameters."""


class _Refusing(TypeDecorator.Comparator[Any]):
    __slots__ = ()
    _column: ClassVar[str]
    _supports: ClassVar[str]
    _reason: ClassVar[str]

    def reverse_operate(self, op: OperatorType, other: Any, **kwargs: Any) -> ColumnElement[Any]:
        self._refuse(op)

    def _refuse(self, op: OperatorType) -> NoReturn:
        raise InvalidRequestError(
            f"the {self._column} {_name(self.expr)} supports {self._supports} only, not {operator_name(op)}: "
            f"{self._reason}"
        )


class NullTestsOnly(_Refusing):
    """Of an encrypted column."""

    __slots__ = ()
    _column, _supports = "encrypted column", "IS NULL"
    _reason = (
        "equal values have different envelopes. Compare its search column (SearchToken), "
        "or compare after loading."
    )

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        if op in {operators.eq, operators.ne} and isinstance(other[0], ColumnClause):
            return ColumnsCompared(self.expr, other[0], op, type_=Boolean())
        return self._compare(op, other)

    def _compare(self, op: OperatorType, other: tuple[Any, ...]) -> ColumnElement[Any]:
        if not is_null_test(op, other):
            self._refuse(op)
        return super().operate(op, *other)


class _EqualityOnly(_Refusing):
    """Of a search column."""

    __slots__ = ()
    _column, _supports = "search column", "=, <>, IN and IS NULL"
    _reason = "a token says whether two values are equal and nothing else."
    _meaningful = _NULL_TESTS | {
        operators.in_op,
        operators.not_in_op,
        operators.is_distinct_from,
        operators.is_not_distinct_from,
    }

    def operate(self, op: OperatorType, *other: Any, **kwargs: Any) -> ColumnElement[Any]:
        if op not in self._meaningful:
            self._refuse(op)
        return super().operate(op, *other, **kwargs)


class ColumnsCompared(BinaryExpression[bool]):
    """An encrypted column compared with a column: refused when it is compiled.

    Not when it is built: SQLAlchemy itself compares columns where it keeps them in lists and dictionaries.
    """

    inherit_cache = True


@compiles(ColumnsCompared)
def _refuse_columns_compared(element: ColumnsCompared, compiler: object, **_: Any) -> NoReturn:
    raise InvalidRequestError(
        f"the encrypted column {_name(element.left)} cannot be compared with another column: equal values have "
        "different envelopes. Compare search columns, or compare after loading."
    )


def _name(expression: Any) -> str:
    return str(getattr(expression, "name", None) or "of this expression")


def operator_name(op: OperatorType) -> str:
    return str(getattr(op, "__name__", "this operator"))


def is_null_test(op: OperatorType, other: tuple[Any, ...]) -> bool:
    """Whether an operation asks for NULL or its opposite, and for nothing else."""
    return op in _NULL_TESTS and all(operand is None or isinstance(operand, Null) for operand in other)


def _unquoted(method: Callable[Concatenate[Kind, P], R]) -> Callable[Concatenate[Kind, P], R]:
    """A method of a type whose errors quote no value, and which SQLAlchemy does not wrap with the parameters."""

    @functools.wraps(method)
    def unquoted(kind: Kind, /, *arguments: P.args, **options: P.kwargs) -> R:
        failure: Exception
        try:
            return method(kind, *arguments, **options)
        except (EncryptedTypeError, EncryptedValueError):
            raise
        except ConfigurationError as error:
            failure = _UnquotedConfigurationError(str(error))
        except UnencodableTextError as error:
            failure = kind._wrong_value(str(error))
        except (ValueError, ArithmeticError, RecursionError):
            failure = kind._wrong_value("the value has no text form in PostgreSQL")
        # Not raised above: a chained exception could carry the value.
        raise failure

    return unquoted


class _ContextType(TypeDecorator[T]):
    """What encrypted columns and search columns share: the context of the catalogue, and values of one Python type."""

    impl: type[TypeEngine[Any]] = Text
    _takes: ClassVar[tuple[type, ...]] = ()
    _refuses: ClassVar[tuple[type, ...]] = ()
    _expected: ClassVar[str] = "nothing"
    _read: ClassVar["staticmethod[[str], Any]"]

    def __init_subclass__(
        cls,
        takes: tuple[type, ...] = (),
        refuses: tuple[type, ...] = (),
        expected: str = "",
        read: Callable[[str], Any] | None = None,
    ) -> None:
        """Of a type that takes values of some Python types, but not of those subclasses that mean something else.

        `read` makes a value of its text, or raises ValueError or ArithmeticError.
        """
        super().__init_subclass__()
        if takes:
            cls.cache_ok = True  # each class has to say so by itself
            cls._takes, cls._refuses = takes, refuses
            cls._expected = expected or takes[0].__name__
        if read is not None:
            cls._read = staticmethod(read)

    def __init__(self, context: str) -> None:
        if not context:
            raise ConfigurationError(
                f"{type(self).__name__} needs the context of its column, as in the catalogue"
            )
        super().__init__()
        self.context = context

    def _checked(self, value: Any) -> Any:
        if not isinstance(value, self._takes) or isinstance(value, self._refuses):
            raise self._wrong_type(value, self._expected)
        return value

    def _wrong_type(self, value: object, expected: str) -> EncryptedTypeError:
        return EncryptedTypeError(f"{self!r} takes {expected}, not {type(value).__name__}")

    def _wrong_value(self, problem: str) -> EncryptedValueError:
        return EncryptedValueError(f"{self!r}: {problem}")

    def __repr__(self) -> str:
        return generic_repr(self)


class _Encrypted(_ContextType[T]):
    """A column of envelopes. Subclasses say how a value is written as text and read back.

    Whatever takes a value raises EncryptedTypeError where it is of another Python type, EncryptedValueError where the
    column cannot hold it, and ConfigurationError where a key is missing or malformed. None of them quotes it.
    """

    comparator_factory = NullTestsOnly

    def _render(self, value: Any) -> str:
        return str(self._checked(value))

    def _parse(self, text: str) -> T:
        return self._read(text)  # type: ignore[no-any-return]

    @_unquoted
    def process_bind_param(self, value: T | None, dialect: Dialect) -> str | None:
        return None if value is None else encrypt_field(self._render(value), self.context)

    @_unquoted
    def seal_text(self, text: str) -> str:
        return encrypt_field(text, self.context)

    @_unquoted
    def search_tokens(self, value: Any) -> list[str]:
        """The tokens under which a value is found, of every readable key version, the current one first."""
        return get_searchable_cipher().generate_search_tokens(self._render(value), self.context)

    @_unquoted
    def search_token(self, value: Any) -> str | None:
        """The token that is stored beside a value; None for None."""
        text = None if value is None else self._render(value)
        return get_searchable_cipher().generate_search_token(text, self.context)

    @_unquoted
    def text_of(self, value: Any) -> str:
        """The PostgreSQL text form of a value, which is what is encrypted."""
        return self._render(value)

    def json_of(self, column: ColumnElement[Any]) -> ColumnElement[str]:
        """A plaintext column of this type as JSON text, which no setting of a session has a say in."""
        return sql_cast(func.to_json(column), Text)

    def parse_json(self, text: str) -> T:
        """What `json_of` gave, as a value. Raises ValueError for what this type cannot represent."""
        return self._parse(json.loads(text) if text.startswith('"') else text)

    def process_result_value(self, value: str | None, dialect: Dialect) -> T | None:
        """Raises DecryptionError for what is no readable envelope of the context, or holds no value of this type."""
        if value is None:
            return None
        text = get_cipher().decrypt(value, self.context)
        try:
            return self._parse(text)
        except (ValueError, ArithmeticError, RecursionError):
            pass
        raise DecryptionError(f"{self!r}: a decrypted value is not one that this type can represent")


class EncryptedString(_Encrypted[str], takes=(str,), read=str):
    """Text: `varchar`, `text`."""

    def _render(self, value: Any) -> str:
        # The most frequent type saves a call.
        return value if isinstance(value, str) else str(self._checked(value))


class EncryptedText(EncryptedString, takes=(str,)):
    """Text, the same as `EncryptedString`: encrypted columns have no length."""


class EncryptedInteger(_Encrypted[int], takes=(int,), refuses=(bool,), read=int):
    """Whole numbers: `smallint`, `integer`, `bigint`."""

    def _render(self, value: Any) -> str:
        if self._checked(value) not in _BIGINT:
            raise self._wrong_value("the value is out of the range of bigint")
        return str(int(value))


class EncryptedFloat(_Encrypted[float], takes=(float, int), refuses=(bool,), read=float):
    """Floating point: `double precision`."""

    def _render(self, value: Any) -> str:
        return _float8_text(float(self._checked(value)))


class EncryptedNumeric(
    _Encrypted[Decimal],
    takes=(Decimal, int),
    refuses=(bool,),
    expected="Decimal or int (a float is rounded to binary: use Decimal(str(x)))",
    read=Decimal,
):
    """Exact numbers: `numeric`. All digits are kept, trailing zeros included.

    With the scale of a column `numeric(precision, scale)`, values are written with exactly so many decimals, rounded
    half away from zero as PostgreSQL does.
    """

    def __init__(self, context: str, scale: int | None = None) -> None:
        super().__init__(context)
        self.scale = scale

    def _render(self, value: Any) -> str:
        number = Decimal(self._checked(value))
        if self.scale is not None and number.is_finite():
            number = number.quantize(Decimal((0, (1,), -self.scale)), ROUND_HALF_UP, _NUMERIC_CONTEXT)
        return _numeric_text(number)

    def compare_values(self, x: Any, y: Any) -> bool:
        """Digits included: 1.5 over 1.50 is a change, unless the scale is given."""
        if self.scale is None and isinstance(x, Decimal) and isinstance(y, Decimal):
            return x.compare_total(y) == 0
        return bool(x == y)


class EncryptedBoolean(_Encrypted[bool], takes=(bool,)):
    """`boolean`."""

    def _render(self, value: Any) -> str:
        return "true" if self._checked(value) else "false"

    def _parse(self, text: str) -> bool:
        if text not in {"true", "false"}:
            raise ValueError
        return text == "true"


class EncryptedDate(_Encrypted[date], takes=(date,), refuses=(datetime,), read=date.fromisoformat):
    """`date`. PostgreSQL's `infinity` and years that Python does not have cannot be read."""


class EncryptedDateTime(_Encrypted[datetime], takes=(datetime,), read=datetime.fromisoformat):
    """`timestamp with time zone`, of aware values, which are returned in UTC; or `timestamp`, of naive ones.

    PostgreSQL's `infinity` and years that Python does not have cannot be read.
    """

    def __init__(self, context: str, timezone: bool = True) -> None:
        super().__init__(context)
        self.timezone = timezone

    def _render(self, value: Any) -> str:
        if (self._checked(value).utcoffset() is not None) != self.timezone:
            raise self._wrong_value("the value must be " + ("aware" if self.timezone else "naive"))
        moment = value.astimezone(UTC) if self.timezone else value
        text: str = moment.replace(tzinfo=None).isoformat(sep=" ")
        if moment.microsecond:
            text = text.rstrip("0")
        return text + "+00" if self.timezone else text

    def _parse(self, text: str) -> datetime:
        value = super()._parse(text)
        if (value.tzinfo is not None) != self.timezone:
            raise ValueError
        return value

    def parse_json(self, text: str) -> datetime:
        # JSON has the offset of the session's time zone.
        value = super().parse_json(text)
        return value.astimezone(UTC) if self.timezone else value


class EncryptedUUID(_Encrypted[UUID], takes=(UUID,), read=UUID):
    """`uuid`."""


class EncryptedJSON(_Encrypted[Any], takes=(object,), expected="what JSON can hold", read=json.loads):
    """`jsonb`: dicts with str keys, lists, tuples, str, int, float, Decimal, bool and None inside them.

    None itself is NULL; a JSON null in the column is read as None. Numbers with a decimal point are read as float. Wrap
    it in `MutableDict.as_mutable` or `MutableList.as_mutable` to have changes in place seen.

    A plaintext column of the type `json` (`binary=False`) keeps the text as it was written: values are written as the
    engine's JSON serializer (`json.dumps`) writes them, so that both sides agree.
    """

    # Values are dicts and lists.
    hashable = False

    def __init__(self, context: str, binary: bool = True) -> None:
        super().__init__(context)
        self.binary = binary

    def _render(self, value: Any) -> str:
        if self.binary:
            return self._jsonb_text(value)
        return json.dumps(value, allow_nan=False, default=self._refuse)

    def _refuse(self, value: object) -> NoReturn:
        raise self._wrong_type(value, self._expected)

    def compare_values(self, x: Any, y: Any) -> bool:
        """1 and true, which Python calls equal, are not the same JSON."""
        if x is None or y is None:
            return x is y
        try:
            return bool(x == y) and self._render(x) == self._render(y)
        except (TypeError, ValueError, ArithmeticError, RecursionError):
            return False

    def _jsonb_text(self, value: Any) -> str:
        """As `value::jsonb::text` prints it: keys by length and then by bytes, numbers positional."""
        match value:
            case None:
                return "null"
            case bool():
                return "true" if value else "false"
            case str():
                if "\x00" in value:
                    raise self._wrong_value("jsonb cannot hold a NUL character")
                return json.dumps(value, ensure_ascii=False)
            case int() | float() | Decimal():
                number = Decimal(repr(float(value)) if isinstance(value, float) else value)
                if not number.is_finite():
                    raise self._wrong_value("JSON has neither NaN nor infinity")
                return _numeric_text(number)
            case Mapping():
                for key in value:
                    if not isinstance(key, str):
                        raise self._wrong_type(key, "str as keys of a JSON object")
                members = sorted(value.items(), key=lambda member: (len(name := member[0].encode()), name))
                texts = [f"{self._jsonb_text(key)}: {self._jsonb_text(member)}" for key, member in members]
                return "{" + ", ".join(texts) + "}"
            case list() | tuple():
                return "[" + ", ".join([self._jsonb_text(item) for item in value]) + "]"
            case _:
                self._refuse(value)

    def parse_json(self, text: str) -> Any:
        return self._parse(text)


class EncryptedBytes(_Encrypted[bytes], takes=(bytes, bytearray, memoryview)):
    r"""`bytea`, as `\x` and hexadecimal digits."""

    def _render(self, value: Any) -> str:
        return f"\\x{self._checked(value).hex()}"

    def json_of(self, column: ColumnElement[Any]) -> ColumnElement[str]:
        # In hexadecimal digits whatever `bytea_output` says.
        return sql_cast(func.to_json("\\x" + func.encode(column, "hex")), Text)

    def _parse(self, text: str) -> bytes:
        if not text.startswith("\\x"):
            raise ValueError
        return bytes.fromhex(text[2:])


class SearchToken(_ContextType[str], takes=(str,)):
    """A search column: what is compared with it or stored in it is plaintext, bound as its token.

    What is loaded is the stored token. Do not assign it to another row: it would be taken for plaintext.
    """

    impl = String
    comparator_factory = _EqualityOnly

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(String(SEARCH_COLUMN_LENGTH))

    @_unquoted
    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """The token under the current key version; raises what an encrypted column raises."""
        text: str | None = None if value is None else self._checked(value)
        return get_searchable_cipher().generate_search_token(text, self.context)


def _numeric_text(number: Decimal) -> str:
    """As PostgreSQL prints numeric: positional, every digit of the scale, no negative zero."""
    if number.is_nan():
        return "NaN"
    if number.is_infinite():
        return "Infinity" if number > 0 else "-Infinity"
    exponent = number.as_tuple().exponent
    if number.adjusted() >= _NUMERIC_DIGITS_BEFORE or (
        isinstance(exponent, int) and exponent < -_NUMERIC_DIGITS_AFTER
    ):
        raise ValueError
    return format(number if number else number.copy_abs(), "f")


def _float8_text(value: float) -> str:
    """As PostgreSQL prints float8: the shortest digits that lie closer to it than to any other float8."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    number = Decimal(_shortest(value)).normalize(_FLOAT_CONTEXT)
    if not number or number.adjusted() in _FLOAT_POSITIONAL:
        return format(number, "f")
    sign, digits, _ = number.as_tuple()
    first, *rest = map(str, digits)
    fraction = f".{''.join(rest)}" if rest else ""
    return f"{'-' * sign}{first}{fraction}e{number.adjusted():+03d}"


def _shortest(value: float) -> str:
    """The shortest digits; Python's own may lie exactly between two floats, which PostgreSQL avoids."""
    longer = (f"{value:.{digits}e}" for digits in range(_FLOAT_MAX_DIGITS))
    texts = itertools.chain([repr(value)], longer)
    return next(text for text in texts if float(text) == value and not _lies_between(text, value))


def _lies_between(text: str, value: float) -> bool:
    """Whether a decimal is the exact middle between the float and one of its neighbours."""
    decimal, exact = Decimal(text), Decimal(value)
    if decimal == exact:
        return False
    towards = math.inf if decimal > exact else -math.inf
    neighbour = Decimal(math.nextafter(value, towards))
    return _FLOAT_CONTEXT.add(exact, neighbour) == _FLOAT_CONTEXT.multiply(decimal, Decimal(2))
