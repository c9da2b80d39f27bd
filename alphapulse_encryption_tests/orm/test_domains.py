"""Every type over its whole domain, through a real PostgreSQL: what goes in comes out, on both sides alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Date,
    DateTime,
    Double,
    Numeric,
    Text,
    Uuid,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import BYTEA, JSON, JSONB
from sqlalchemy.orm import DeclarativeBase, mapped_column

from alphapulse_encryption import decrypt_fields
from alphapulse_encryption.orm import (
    EncryptedBoolean,
    EncryptedBytes,
    EncryptedDate,
    EncryptedDateTime,
    EncryptedFloat,
    EncryptedInteger,
    EncryptedJSON,
    EncryptedNumeric,
    EncryptedString,
    EncryptedText,
    EncryptedUUID,
    configure,
    encrypted,
    reset_phases,
)
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.orm.conftest import Place

# PostgreSQL's text holds everything but NUL.
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))
# Drivers cannot send a NaN that has a sign or a payload.
NUMBERS = st.decimals(allow_nan=False) | st.decimals(allow_nan=False, places=20) | st.just(Decimal("NaN"))
DOCUMENTS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)
# Of the attribute, its type, the plaintext's, and its values.
KINDS: dict[str, tuple[Any, Any, st.SearchStrategy[Any]]] = {
    "string": (EncryptedString("c"), Text, TEXTS),
    "long": (EncryptedText("c"), Text, TEXTS),
    "whole": (EncryptedInteger("c"), BigInteger, st.integers(-(2**63), 2**63 - 1)),
    "real": (EncryptedFloat("c"), Double, st.floats()),
    "exact": (EncryptedNumeric("c"), Numeric, NUMBERS),
    "scaled": (
        EncryptedNumeric("c"),
        Numeric(28, 10),
        st.decimals(Decimal(-(10**17)), Decimal(10**17), places=10),
    ),
    "truth": (EncryptedBoolean("c"), Boolean, st.booleans()),
    "day": (EncryptedDate("c"), Date, st.dates(date(1, 1, 1))),
    "moment": (EncryptedDateTime("c"), DateTime(timezone=True), st.datetimes(timezones=st.just(UTC))),
    "local": (EncryptedDateTime("c", timezone=False), DateTime, st.datetimes(datetime(1, 1, 1))),
    "name": (EncryptedUUID("c"), Uuid, st.uuids()),
    "document": (EncryptedJSON("c"), JSONB(none_as_null=True), DOCUMENTS),
    "verbatim": (EncryptedJSON("c", binary=False), JSON(none_as_null=True), DOCUMENTS),
    "octets": (EncryptedBytes("c"), BYTEA, st.binary()),
}
ROWS = st.lists(
    st.fixed_dictionaries({name: st.none() | values for name, (_, _, values) in KINDS.items()}),
    min_size=1,
    max_size=20,
)


def model() -> Any:
    """All types in the phase `dual`, which writes and reads both sides."""
    configure(phase="dual")

    class Base(DeclarativeBase):
        pass

    attributes: dict[str, Any] = {
        name: encrypted(kind, plain, nullable=True) for name, (kind, plain, _) in KINDS.items()
    }
    identity = mapped_column(BigInteger, primary_key=True)
    return type("Thing", (Base,), {"__tablename__": "things", "id": identity, **attributes})


def same(found: Any, value: Any) -> bool:
    """Equal, of the same type, digit by digit."""
    return type(found) is type(value) and repr(found) == repr(value)


def expected(value: Any) -> Any:
    """What is read back: PostgreSQL prints numbers in full, has no negative zero in them, and no fold in moments."""
    if isinstance(value, Decimal) and value.is_finite():
        positional = Decimal(format(value, "f"))
        return positional if positional else abs(positional)
    if isinstance(value, datetime):
        return value.replace(fold=0)
    return value


def test_what_goes_in_comes_out_on_both_sides(at: Callable[..., Place]) -> None:
    place = at("off", "plain")
    reset_phases()
    thing = model()
    thing.metadata.create_all(place.engine)

    @settings(max_examples=40, suppress_health_check=list(HealthCheck))
    @given(ROWS)
    def round_trip(rows: list[dict[str, Any]]) -> None:
        with place.engine.connect() as connection:
            for setting, value in support.DESIGN_SETTINGS.items():
                connection.execute(text(f"SET {setting} TO '{value}'"))
            check(connection, thing, rows)
            connection.rollback()

    round_trip()


def check(connection: Connection, thing: Any, rows: list[dict[str, Any]]) -> None:
    table = thing.__table__
    connection.execute(insert(table), [{"id": number, **row} for number, row in enumerate(rows)])
    raw = connection.execute(text("SELECT * FROM things ORDER BY id")).mappings().all()
    documents: dict[str, list[Any]] = {}
    for name in KINDS:
        envelopes = [row[f"{name}_encrypted"] for row in raw]
        texts = connection.scalars(text(f"SELECT {name}::text FROM things ORDER BY id")).all()
        # What is encrypted is the text that PostgreSQL has of the plaintext.
        assert decrypt_fields(envelopes, "c") == texts, name
        if name in {"document", "verbatim"}:
            documents[name] = [None if text is None else json.loads(text) for text in texts]
    attributes = [getattr(thing, name) for name in KINDS]
    for pending in (False, True):
        if pending:
            sides = ", ".join(f"{name}_encrypted = NULL" for name in KINDS)
            connection.execute(text(f"UPDATE things SET {sides}"))
        found = connection.execute(select(*attributes).order_by(thing.id)).mappings().all()
        for number, (row, read) in enumerate(zip(rows, found, strict=True)):
            for name, value in row.items():
                if name in documents:
                    assert same(read[name], documents[name][number]), name
                else:
                    assert same(read[name], expected(value)), (name, pending)
