"""Writing past the ORM: values for statements on the table, and rows for COPY."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import Column, Table
from sqlalchemy import inspect as inspect_class
from sqlalchemy.types import JSON

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.orm.columns import EncryptedColumn
from alphapulse_encryption.orm.types import EncryptedValueError
from alphapulse_encryption.runtime import encrypt_fields, get_searchable_cipher

_BATCH = 1_000


def encrypted_values(model: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of all columns that go with some attributes, by the keys of the table's columns.

    For statements on the table that nothing else completes, such as the `set_` of an upsert. Values stay Python
    values, and the statement encrypts them; tokens are made here, with the errors of writing a value. Attributes that
    are not encrypted are returned as they are.
    """
    kinds = _kinds(model)
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name in kinds:
            given |= {key: kinds[name].beside(key, value) for key in kinds[name].attribute.keys}
        else:
            given[name] = value
    return given


class CopyRows(NamedTuple):
    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


def copy_rows(model: type[Any], attributes: Sequence[str], rows: Iterable[Sequence[Any]]) -> CopyRows:
    """Rows for `COPY … FROM STDIN`, encrypted in batches, with all columns that the phase of the table writes.

        columns, rows = copy_rows(User, ["username", "email"], source)
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        with cursor.copy(sql.SQL("COPY users ({}) FROM STDIN").format(names)) as copy:
            for row in rows:
                copy.write_row(row)

    Attributes that are left out get what the database gives them, not the default of the declaration.

    Raises:
        ConfigurationError: there is no such attribute.
        EncryptedTypeError, EncryptedValueError: of a value, as when it is written; raised while rows are taken.
    """
    kinds, table, mapped = _kinds(model), inspect_class(model).local_table, inspect_class(model).columns
    unknown = [name for name in attributes if name not in mapped]
    if unknown:
        raise ConfigurationError(f"{model.__name__} has no column attribute {', '.join(unknown)}")
    keys = [key for name in attributes for key in (kinds[name].attribute.keys if name in kinds else (name,))]
    sources = [kinds.get(name) or mapped[name] for name in attributes]
    return CopyRows(tuple(mapped[key].name for key in keys), _rows(sources, table, rows))


def _rows(
    sources: list[EncryptedColumn | Column[Any]], table: Table, rows: Iterable[Sequence[Any]]
) -> Iterator[tuple[Any, ...]]:
    source = iter(rows)
    while batch := list(islice(source, _BATCH)):
        columns: list[Sequence[Any]] = []
        for kind, values in zip(sources, zip(*batch, strict=True), strict=True):
            if isinstance(kind, EncryptedColumn):
                columns += _columns(kind, values, table)
            elif isinstance(kind.type, JSON):
                columns.append([None if value is None else json.dumps(value) for value in values])
            else:
                columns.append(values)
        yield from zip(*columns, strict=True)


def _columns(kind: EncryptedColumn, values: Sequence[Any], table: Table) -> list[Sequence[Any]]:
    attribute = kind.attribute
    if None in values and attribute.reads_ciphertext and not table.c[attribute.name].nullable:
        raise EncryptedValueError(f"{attribute} is required (nullable=False) and cannot be written as None")
    texts = [None if value is None else kind.checked_text(value) for value in values]
    columns: list[Sequence[Any]] = []
    for key in attribute.keys:
        if key == attribute.encrypted:
            columns.append(encrypt_fields(texts, kind.kind.context))
        elif key == attribute.search:
            columns.append(get_searchable_cipher().generate_search_token_many(texts, kind.kind.context))
        else:
            # COPY has a text form for every type; only JSON's Python values are not adapted by themselves.
            columns.append(texts if isinstance(table.c[key].type, JSON) else values)
    return columns


def _kinds(model: type[Any]) -> dict[str, EncryptedColumn]:
    types = [column.type for column in inspect_class(model).local_table.c]
    return {kind.attribute.name: kind for kind in types if isinstance(kind, EncryptedColumn)}
