"""A table as the traffic sees it: which columns are sensitive, of which types, and what may be written to them."""

from __future__ import annotations

import json
import re
import secrets
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial
from hashlib import blake2b
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA, JSON, JSONB
from sqlalchemy.types import NullType, TypeEngine

from alphapulse_encryption import orm
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.tables import states
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.schema.definition import LiveColumn, TableDefinition, read_table
from alphapulse_encryption.migration.schema.saved_ddl import latest

Values = dict[str, Any]

# Of a value made unique by what is put before it; so many digits never meet twice.
_DIGITS = 12


@dataclass(frozen=True)
class Field:
    """A column as an attribute of the application's."""

    name: str
    # Never a name that SQLAlchemy keeps for itself, such as ``metadata``.
    attribute: str
    type: TypeEngine[Any]
    # The runtime library's beside it, of a column that is encrypted.
    encrypted: Any
    # Rows can be looked up by it in every phase.
    searchable: bool
    # It may not be NULL, as far as is known.
    required: bool
    in_key: bool
    # The server gives it a value: a default or an identity.
    given: bool
    # No two rows may have the same value, or it has to make a combination unique.
    unique: bool

    def fresh(self, value: Any) -> Any:
        """A value that no other row has, nor ever had, made of one that suits; None where none can be made."""
        if isinstance(self.type, sa.Uuid):
            return uuid.uuid4()
        if isinstance(self.type, sa.String) and isinstance(value, str):
            length = self.type.length
            if length is not None and length < _DIGITS:
                return None
            return f"{secrets.randbelow(10**_DIGITS):0{_DIGITS}d}{value}"[:length]
        return None


@dataclass(frozen=True)
class Shape:
    table: Table
    # All columns that an application would write, the key first; not the generated ones, nor the engine's.
    fields: tuple[Field, ...]
    # By the planner's estimate.
    rows: int
    # Sensitive columns that no request names, and why.
    left_out: tuple[str, ...]

    @property
    def key(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.in_key)

    @property
    def sensitive(self) -> tuple[Field, ...]:
        return tuple(field for field in self.fields if field.encrypted is not None)

    def new_row(self, copied: Values) -> Values | None:
        """The values of a new row made of another one's, by attribute; None where it would have no key of its own."""
        row: Values = {}
        is_new = False
        for field in self.fields:
            value = copied.get(field.attribute)
            if field.in_key and field.given:
                is_new = True
                continue
            if field.unique or (field.in_key and isinstance(field.type, sa.Uuid)):
                value = None if value is None and not field.required else field.fresh(value)
                if value is None and field.required:
                    return None
                is_new = is_new or field.in_key
            row[field.attribute] = value
        return row if is_new else None


# Columns that unique indexes other than the primary key's begin with or consist of; expressions are column 0. Search
# columns stand for the columns they belong to.
_UNIQUE = """
SELECT i.indexrelid, array_agg(a.attname::text ORDER BY k.position)
  FROM pg_index i CROSS JOIN unnest(i.indkey::int2[]) WITH ORDINALITY AS k (attnum, position)
  JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
 WHERE i.indrelid = %s AND i.indisunique AND NOT i.indisprimary AND k.position <= i.indnkeyatts
 GROUP BY i.indexrelid ORDER BY i.indexrelid
"""


def read_shape(connection: Connection, table: Table) -> Shape:
    """Read what the traffic needs to know of a table.

    Raises:
        ConfigurationError: there is no such table, or it has no primary key.
        RefusedError: another session holds it exclusively.
    """
    definition = read_table(connection, table, plaintext=False)
    dropped = _dropped(connection, definition)
    unique = _unique_columns(connection, definition)
    state = states(connection).get(table.key)
    # NOT NULL before the switch; since then, not NULL on both sides.
    set_aside = state.set_aside.not_null if state is not None else ()
    sensitive = {column.name: column for column in table.columns}
    engines = {name for column in table.columns for name in column.derived}
    key = [column.name for column in definition.key]
    live = definition.columns
    fields: list[Field] = []
    left_out: list[str] = []
    # The same at every step of the migration.
    names = sorted({*live, *sensitive} - engines)
    for name in dict.fromkeys([*key, *names]):
        column = live.get(name) or dropped[name]
        if column.generated and name not in key:
            continue
        plain, encrypts = kind_of(column.type)
        entry = sensitive.get(name)
        if entry is not None and encrypts is None:
            left_out.append(f"column {table.key}.{name}: the runtime library has no type for {column.type}")
            # Needed for new rows, for as long as it is there.
            if not column.not_null or name not in live:
                continue
        fields.append(
            Field(
                name=name,
                attribute=f"column{names.index(name)}",
                type=plain,
                encrypted=encrypts(entry.context) if entry is not None and encrypts is not None else None,
                searchable=entry is not None and entry.searchable and _has_one_text(plain),
                required=column.not_null or name in set_aside,
                in_key=name in key,
                given=column.default is not None or column.generated,
                unique=name in unique,
            )
        )
    return Shape(table, tuple(fields), definition.estimated_rows, tuple(left_out))


def _dropped(connection: Connection, definition: TableDefinition) -> dict[str, LiveColumn]:
    """The plaintext columns that are not there any more, as they were."""
    missing = [column.name for column in definition.table.columns if column.name not in definition.columns]
    if not missing:
        return {}
    saved = latest(connection, definition.table, None)
    columns = {column.name: column for column in saved.columns} if saved is not None else {}
    unknown = [name for name in missing if name not in columns]
    if unknown:
        raise ConfigurationError(
            f"Table {definition.table.key} has no column {unknown[0]}, and no drop has saved its definition."
        )
    return {
        name: LiveColumn(name, columns[name].type, columns[name].not_null is not None, None, False)
        for name in missing
    }


def _unique_columns(connection: Connection, definition: TableDefinition) -> set[str]:
    """The columns that need a fresh value in a new row; of several that are unique together, one that can have it."""
    of_search = {column.search: column.name for column in definition.table.columns if column.searchable}
    of_search |= {column.encrypted: column.name for column in definition.table.columns}
    found: set[str] = set()
    for _, columns in connection.execute(_UNIQUE, [definition.oid]):
        names = [of_search.get(name, name) for name in columns]
        if found.intersection(names):
            continue
        fresh = [name for name in names if _can_be_fresh(definition.columns.get(name))]
        found.add(fresh[-1] if fresh else names[-1])
    return found


def _has_one_text(kind: TypeEngine[Any]) -> bool:
    """Whether equal values have one text form, which a token is that of."""
    unscaled = isinstance(kind, sa.Numeric) and kind.scale is None
    return not unscaled and not isinstance(kind, sa.Double | JSON | NullType)


def _can_be_fresh(column: LiveColumn | None) -> bool:
    return column is None or isinstance(kind_of(column.type)[0], sa.String | sa.Uuid)


def _moment(*, timezone: bool) -> Kind:
    return sa.DateTime(timezone=timezone), partial(orm.EncryptedDateTime, timezone=timezone)


# What PostgreSQL calls a type, SQLAlchemy's for it, and the runtime library's beside it, of a context.
Kind = tuple[TypeEngine[Any], Callable[[str], TypeEngine[Any]] | None]
_KINDS: Mapping[str, Kind] = {
    "text": (sa.Text(), orm.EncryptedString),
    "character varying": (sa.String(), orm.EncryptedString),
    "smallint": (sa.SmallInteger(), orm.EncryptedInteger),
    "integer": (sa.Integer(), orm.EncryptedInteger),
    "bigint": (sa.BigInteger(), orm.EncryptedInteger),
    "numeric": (sa.Numeric(), orm.EncryptedNumeric),
    "double precision": (sa.Double(), orm.EncryptedFloat),
    "boolean": (sa.Boolean(), orm.EncryptedBoolean),
    "date": (sa.Date(), orm.EncryptedDate),
    "timestamp with time zone": _moment(timezone=True),
    "timestamp without time zone": _moment(timezone=False),
    "uuid": (sa.Uuid(), orm.EncryptedUUID),
    "jsonb": (JSONB(none_as_null=True), orm.EncryptedJSON),
    "json": (JSON(none_as_null=True), partial(orm.EncryptedJSON, binary=False)),
    "bytea": (BYTEA(), orm.EncryptedBytes),
}
_LENGTH = re.compile(r"character varying\((\d+)\)")
_DIGITS_OF = re.compile(r"numeric\((\d+),(-?\d+)\)")
_PRECISION = re.compile(r"(timestamp)\(\d\)( with(?:out)? time zone)")


def kind_of(name: str) -> Kind:
    """The types for what ``format_type`` prints; of no encrypted one where an application would need its own."""
    name = _PRECISION.sub(r"\1\2", name.removeprefix("pg_catalog."))
    if match := _LENGTH.fullmatch(name):
        return sa.String(int(match[1])), orm.EncryptedString
    if match := _DIGITS_OF.fullmatch(name):
        scale = int(match[2])
        return sa.Numeric(int(match[1]), scale), partial(orm.EncryptedNumeric, scale=scale)
    return _KINDS.get(name, (NullType(), None))


def digest(value: Any) -> bytes:
    """What is remembered of a value: the same for equal values of one column, however they were read."""
    return blake2b(_text(value).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _text(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case Decimal() if value.is_finite():
            return f"number {value:f}"
        case datetime() if value.tzinfo is not None:
            return f"moment {value.timestamp()!r}"
        case memoryview():
            return f"{bytes(value)!r}"
        case dict() | list():
            return json.dumps(_comparable(value), sort_keys=True)
        case _:
            return f"{type(value).__name__} {value!r}"


def _comparable(value: Any) -> Any:
    """A JSON value whose numbers are texts: what is written as 1.5e19 is kept, and read, as a whole number."""
    match value:
        case dict():
            return {name: _comparable(one) for name, one in value.items()}
        case list():
            return [_comparable(one) for one in value]
        case int() | float() if not isinstance(value, bool):
            number = Decimal(repr(value))
            return f"{abs(number) if not number else number.normalize():f}"
        case _:
            return value
