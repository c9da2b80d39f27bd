"""The SQLAlchemy types: text forms, round trips, refused comparisons, and errors that leak nothing."""

import enum
import json
import math
import pickle
import random
import struct
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import (
    Engine,
    MetaData,
    String,
    Table,
    Uuid,
    cast,
    create_engine,
    func,
    insert,
    null,
    select,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeDecorator

from alphapulse_encryption import decrypt_field, encrypt_field, get_searchable_cipher, reset_ciphers
from alphapulse_encryption.errors import ConfigurationError, DecryptionError
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
    EncryptedTypeError,
    EncryptedUUID,
    EncryptedValueError,
    SearchToken,
)
from alphapulse_encryption_tests.vectors import MASTER_KEY

SECRET = "secret@example.com"
DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]

DESIGN_SETTINGS = (
    "-c TimeZone=UTC -c DateStyle=ISO -c IntervalStyle=postgres -c bytea_output=hex -c extra_float_digits=1"
)


class Base(DeclarativeBase):
    """Tables of these tests."""


class Person(Base):
    """One column of every encrypted type, and a search column."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    email: Mapped[str | None] = mapped_column("email_encrypted", EncryptedString("user_pii"))
    email_search: Mapped[str | None] = mapped_column(SearchToken("user_pii"), unique=True)
    notes: Mapped[str | None] = mapped_column(EncryptedText("notes"))
    logins: Mapped[int | None] = mapped_column(EncryptedInteger("logins"))
    score: Mapped[float | None] = mapped_column(EncryptedFloat("score"))
    balance: Mapped[Decimal | None] = mapped_column(EncryptedNumeric("account_balance"))
    active: Mapped[bool | None] = mapped_column(EncryptedBoolean("active"))
    born: Mapped[date | None] = mapped_column(EncryptedDate("born"))
    seen: Mapped[datetime | None] = mapped_column(EncryptedDateTime("seen"))
    local: Mapped[datetime | None] = mapped_column(EncryptedDateTime("local", timezone=False))
    external: Mapped[UUID | None] = mapped_column(EncryptedUUID("external"))
    address: Mapped[Any] = mapped_column(EncryptedJSON("user_address"), nullable=True)
    photo: Mapped[bytes | None] = mapped_column(EncryptedBytes("photo"))
    plain_id: Mapped[UUID | None] = mapped_column(Uuid)


ENCRYPTED = [
    column.key for column in Person.__table__.columns if type(column.type).__name__.startswith("Encrypted")
]


class Kind(enum.StrEnum):
    """A str that is not exactly a str."""

    SPOT = "spot"


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_MASTER_KEY", MASTER_KEY)
    monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", raising=False)
    monkeypatch.delenv("ALPHAPULSE_ENCRYPTION_KEY_SOURCE", raising=False)
    reset_ciphers()
    yield
    reset_ciphers()


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An empty database with the tables of this module, under the session settings of the design."""
    address = "postgresql+psycopg" + database_url.removeprefix("postgresql")
    engine = create_engine(address, connect_args={"options": DESIGN_SETTINGS})
    Base.metadata.create_all(engine)
    yield engine
    engine.dispose()


def written(kind: TypeDecorator[Any], value: object) -> str:
    """The plaintext that a type encrypts for a value."""
    envelope = kind.process_bind_param(value, DIALECT)
    plaintext: str = decrypt_field(envelope, kind.context)
    return plaintext


def read(kind: TypeDecorator[Any], plaintext: str) -> Any:
    """What a type makes of a plaintext."""
    return kind.process_result_value(encrypt_field(plaintext, kind.context), DIALECT)


NUMERIC = EncryptedNumeric("c")
JSONB = EncryptedJSON("c")
AWARE = EncryptedDateTime("c")
NAIVE = EncryptedDateTime("c", timezone=False)
EAST = timezone(timedelta(hours=5, minutes=30))

# A type, a value, and the type of the PostgreSQL column whose text form is expected.
FORMS: list[tuple[TypeDecorator[Any], Any, str]] = [
    (EncryptedString("c"), "", "text"),
    (EncryptedString("c"), "0012345", "text"),
    (EncryptedString("c"), "Zoë Ångström — 東京\t\n'\"\\", "text"),
    (EncryptedString("c"), Kind.SPOT, "text"),
    (EncryptedText("c"), "null", "text"),
    (EncryptedInteger("c"), 0, "bigint"),
    (EncryptedInteger("c"), -(2**63), "bigint"),
    (EncryptedInteger("c"), 2**63 - 1, "bigint"),
    (NUMERIC, Decimal("123.45000000"), "numeric"),
    (NUMERIC, Decimal("0E-8"), "numeric"),
    (NUMERIC, Decimal("-0.00"), "numeric"),
    (NUMERIC, Decimal("1E+30"), "numeric"),
    (NUMERIC, Decimal("-1E-30"), "numeric"),
    (NUMERIC, Decimal("9" * 60 + "." + "9" * 60), "numeric"),
    (NUMERIC, Decimal("NaN"), "numeric"),
    (NUMERIC, Decimal("Infinity"), "numeric"),
    (NUMERIC, Decimal("-Infinity"), "numeric"),
    (NUMERIC, 17, "numeric"),
    (EncryptedNumeric("c", scale=8), Decimal("123.45"), "numeric(20,8)"),
    (EncryptedNumeric("c", scale=2), Decimal("2.345"), "numeric(20,2)"),
    (EncryptedNumeric("c", scale=2), Decimal("-2.345"), "numeric(20,2)"),
    (EncryptedNumeric("c", scale=0), Decimal("0.5"), "numeric(20,0)"),
    (EncryptedNumeric("c", scale=10), Decimal("9" * 40), "numeric(60,10)"),
    (EncryptedNumeric("c", scale=2), Decimal("NaN"), "numeric(20,2)"),
    (EncryptedBoolean("c"), True, "boolean"),
    (EncryptedBoolean("c"), False, "boolean"),
    (EncryptedDate("c"), date(1, 1, 1), "date"),
    (EncryptedDate("c"), date(2024, 2, 29), "date"),
    (EncryptedDate("c"), date(9999, 12, 31), "date"),
    (AWARE, datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC), "timestamptz"),
    (AWARE, datetime(2024, 1, 2, 3, 4, 5, 120000, tzinfo=UTC), "timestamptz"),
    (AWARE, datetime(2024, 1, 2, 3, 4, 5, 1, tzinfo=UTC), "timestamptz"),
    (AWARE, datetime(2024, 1, 2, 3, 4, 10, tzinfo=EAST), "timestamptz"),
    (NAIVE, datetime(1, 1, 1), "timestamp"),
    (NAIVE, datetime(2024, 1, 2, 3, 4, 50, 500000), "timestamp"),
    (EncryptedUUID("c"), UUID("12345678-1234-5678-9ABC-DEF012345678"), "uuid"),
    (EncryptedBytes("c"), b"", "bytea"),
    (EncryptedBytes("c"), b"\x00\xff\\x", "bytea"),
    (EncryptedBytes("c"), bytearray(b"ab"), "bytea"),
]

FLOATS = [0.0, -0.0, 1.0, -1.5, 0.1, 1e-4, 9.999e-5, 1e14, 1e15, 123456789012345.6, 1234567890123456.0, 1e23]
FLOATS += [9e22, 1e16, 5e-324, 1.7976931348623157e308, 2.2250738585072014e-308, 9007199254740993.0, 1e100]
FLOATS += [float("nan"), float("inf"), float("-inf"), 2.0**80, 2.0**-44, 8.41e21, 1e22, 4.35, 3e-5, 7]

DOCUMENTS: list[Any] = [
    {},
    [],
    "",
    0,
    False,
    {"b": 1, "a": 2, "aa": {"z": None, "y": [True, False]}, "é": "ß", "": 0},
    ["Zoë", '\t\n"\\/\b\f\r\x01\x1f\x7f', "  ", "😀"],
    [1, -1, 10**30, 1.5, -0.0, 1e20, 1e-7, 100000.0, Decimal("1.10"), Decimal("1E+3")],
    {"tuple": (1, 2), "ключ": {"nested": [[], {}]}},
    "text",
]


def same(read_back: Any, value: Any) -> bool:
    if isinstance(value, float | Decimal) and math.isnan(value):
        return math.isnan(read_back)
    return bool(read_back == value)


def test_text_forms_are_those_of_postgresql(engine: Engine) -> None:
    with engine.connect() as connection:
        for kind, value, column_type in FORMS:
            plaintext = written(kind, value)
            bound = value.hex() if column_type == "bytea" else plaintext
            source = "decode(:value, 'hex')" if column_type == "bytea" else f"CAST(:value AS {column_type})"
            expected = connection.execute(
                text(f"SELECT CAST({source} AS text)"), {"value": bound}
            ).scalar_one()
            assert plaintext == expected, (kind, column_type)
            # And that is what PostgreSQL prints for the value as a driver would send it.
            if column_type not in {"bytea", "text", "uuid"} and not column_type.startswith("numeric("):
                native = text(f"SELECT CAST(CAST(:value AS {column_type}) AS text)")
                assert connection.execute(native, {"value": value}).scalar_one() == plaintext


def test_scale_rounds_as_postgresql_does(engine: Engine) -> None:
    with engine.connect() as connection:
        for number in ("2.345", "-2.345", "2.355", "0.005", "-0.004", "1E+3", "123"):
            query = text("SELECT CAST(CAST(CAST(:value AS numeric) AS numeric(20,2)) AS text)")
            expected = connection.execute(query, {"value": number}).scalar_one()
            assert written(EncryptedNumeric("c", scale=2), Decimal(number)) == expected


def test_float_text_is_that_of_postgresql(engine: Engine) -> None:
    generator = random.Random(20240102)
    values = [float(value) for value in FLOATS]
    values += [struct.unpack("d", generator.randbytes(8))[0] for _ in range(3000)]
    values += [generator.uniform(-1, 1) * 10.0 ** generator.randrange(-8, 20) for _ in range(1000)]
    # Halfway cases live among powers of two and short decimals.
    values += [2.0**exponent for exponent in range(-1074, 1024)]
    values += [digits * 10.0**exponent for digits in range(1, 10) for exponent in range(-30, 40)]
    query = text(
        "SELECT CAST(v AS text) FROM unnest(CAST(:v AS float8[])) WITH ORDINALITY AS u(v, n) ORDER BY n"
    )
    with engine.connect() as connection:
        expected = list(connection.execute(query, {"v": values}).scalars())
    kind = EncryptedFloat("c")
    assert [kind._render(value) for value in values] == expected
    assert all(same(kind._parse(plaintext), value) for plaintext, value in zip(expected, values, strict=True))


def test_json_text_is_that_of_jsonb(engine: Engine) -> None:
    with engine.connect() as connection:
        for document in DOCUMENTS:
            plaintext = written(JSONB, document)
            query = text("SELECT CAST(CAST(:value AS jsonb) AS text)")
            assert connection.execute(query, {"value": plaintext}).scalar_one() == plaintext
            sent = json.dumps(document, default=float)
            assert connection.execute(query, {"value": sent}).scalar_one() == plaintext.replace(
                "1.10", "1.1"
            ).replace(", 1000]", ", 1000.0]")


@pytest.mark.parametrize(("kind", "value", "_column_type"), FORMS)
def test_values_come_back_with_their_type(kind: TypeDecorator[Any], value: Any, _column_type: str) -> None:
    result = read(kind, written(kind, value))
    if getattr(kind, "scale", None) is None:
        assert same(result, value)
    if isinstance(value, Decimal) and value.is_finite():
        assert isinstance(result, Decimal)
        assert format(result, "f") == written(kind, value)
        assert result.as_tuple().exponent == Decimal(written(kind, value)).as_tuple().exponent
    if isinstance(value, datetime):
        assert result.utcoffset() == (timedelta(0) if value.tzinfo else None)


def test_rows_round_trip(engine: Engine) -> None:
    values: dict[str, Any] = {
        "email": SECRET,
        "notes": "",
        "logins": 7,
        "score": 0.1,
        "balance": Decimal("12.3400"),
        "active": False,
        "born": date(1990, 5, 6),
        "seen": datetime(2024, 1, 2, 3, 4, 5, 678, tzinfo=EAST),
        "local": datetime(2024, 1, 2),
        "external": UUID(int=5),
        "address": {"city": "東京", "lines": [1, 2.5, None]},
        "photo": b"\x00\x01",
    }
    with Session(engine) as session:
        session.add(Person(id=1, email_search=SECRET, **values))
        session.add(Person(id=2))
        session.commit()
        session.expire_all()
        person, empty = session.scalars(select(Person).order_by(Person.id))
        assert {name: getattr(person, name) for name in values} == values
        assert {type(getattr(person, name)) for name in values} == {type(value) for value in values.values()}
        assert person.email_search == get_searchable_cipher().generate_search_token(SECRET, "user_pii")
        assert all(getattr(empty, name) is None for name in [*values, "email_search"])
        person.balance = Decimal("0.00")
        person.email = None
        session.commit()
        assert (person.balance, person.email) == (Decimal("0.00"), None)
    with engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM person WHERE id = 1")).mappings().one()
        assert row["email_encrypted"] is None
        assert json.loads(row["notes"])["context"] == "notes"
        assert SECRET not in str(dict(row))


def test_the_same_plaintext_has_another_envelope_every_time(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(
            insert(Person), [{"id": number, "email_encrypted": SECRET} for number in range(20)]
        )
        assert (
            connection.execute(text("SELECT count(DISTINCT email_encrypted) FROM person")).scalar_one() == 20
        )


def test_search_by_plaintext(engine: Engine) -> None:
    with Session(engine) as session:
        addresses = ["a@x", "b@x", "c@x"]
        session.add_all([Person(id=n, email=a, email_search=a) for n, a in enumerate(addresses)])
        session.add(Person(id=9))
        session.commit()

        def found(*criteria: Any) -> list[str | None]:
            return list(session.scalars(select(Person.email).where(*criteria).order_by(Person.id)))

        assert found(Person.email_search == "b@x") == ["b@x"]
        assert found(Person.email_search != "b@x") == ["a@x", "c@x"]
        assert found(Person.email_search.in_(["a@x", "c@x", "d@x"])) == ["a@x", "c@x"]
        assert found(Person.email_search.not_in(["a@x"])) == ["b@x", "c@x"]
        assert found(Person.email_search.is_(None)) == [None]
        assert found(Person.email_search == None) == [None]  # noqa: E711
        assert found(Person.email_search.is_not_distinct_from("a@x")) == ["a@x"]
        by_hand = session.query(Person).filter_by(email_search="c@x").first()
        assert by_hand is not None
        assert by_hand.id == 2


def test_tests_for_null(engine: Engine) -> None:
    with Session(engine) as session:
        session.add_all([Person(id=1, email="a"), Person(id=2)])
        session.commit()
        for present in (Person.email.is_not(None), Person.email != None, Person.email.is_not(null())):  # noqa: E711
            assert list(session.scalars(select(Person.id).where(present))) == [1]
        for absent in (Person.email.is_(None), Person.email == None, Person.email == null()):  # noqa: E711
            assert list(session.scalars(select(Person.id).where(absent))) == [2]
        assert session.scalar(select(func.count(Person.email))) == 1


COMPARISONS: list[Callable[[Any], Any]] = [
    lambda column: column == SECRET,
    lambda column: column != SECRET,
    lambda column: SECRET == column,  # noqa: SIM300
    lambda column: column.is_(True),
    lambda column: column < SECRET,
    lambda column: column >= SECRET,
    lambda column: column.in_([SECRET]),
    lambda column: column.not_in([None]),
    lambda column: column.like("%x%"),
    lambda column: column.ilike("%x%"),
    lambda column: column.contains("x"),
    lambda column: column.startswith("x"),
    lambda column: column.between("a", "b"),
    lambda column: column.is_distinct_from(SECRET),
    lambda column: column + "x",
    lambda column: "x" + column,
    lambda column: column.desc(),
    lambda column: column.distinct(),
    lambda column: column.op("~")("x"),
    lambda column: column.regexp_match("x"),
]


@pytest.mark.parametrize("compare", COMPARISONS)
@pytest.mark.parametrize("name", ENCRYPTED)
def test_comparisons_of_encrypted_columns_are_refused(compare: Callable[[Any], Any], name: str) -> None:
    column = Person.__table__.columns[name]
    with pytest.raises(InvalidRequestError, match="supports IS NULL only") as caught:
        compare(column)
    assert column.name in str(caught.value)
    assert "search column" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_comparisons_with_columns_are_refused_before_they_are_sent(engine: Engine) -> None:
    with Session(engine) as session:
        columns = Person.__table__.c
        returned = session.scalars(insert(Person).returning(Person), [{"id": 1, "email": SECRET}]).one()
        assert returned.email == SECRET
        with pytest.raises(
            InvalidRequestError, match="email_encrypted cannot be compared with another column"
        ):
            session.scalars(select(Person.id).where(columns.email_encrypted == columns.notes)).all()


def test_comparisons_through_the_mapped_class_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match="email_encrypted supports IS NULL only, not eq"):
        select(Person).filter_by(email=SECRET)
    with pytest.raises(InvalidRequestError, match="supports IS NULL only"):
        select(Person).where(Person.address["city"] == "x")


@pytest.mark.parametrize(
    "compare",
    [
        lambda column: column < "x",
        lambda column: column.like("x%"),
        lambda column: column.contains("x"),
        lambda column: column.between("a", "b"),
        lambda column: column + "x",
        lambda column: "x" + column,
        lambda column: column.desc(),
    ],
)
def test_comparisons_without_meaning_for_tokens_are_refused(compare: Callable[[Any], Any]) -> None:
    with pytest.raises(InvalidRequestError, match="supports =, <>, IN and IS NULL only"):
        compare(Person.email_search)


WRONG_TYPES: list[tuple[TypeDecorator[Any], Any]] = [
    (EncryptedString("c"), 5),
    (EncryptedString("c"), b"x"),
    (EncryptedInteger("c"), True),
    (EncryptedInteger("c"), SECRET),
    (EncryptedFloat("c"), Decimal(1)),
    (EncryptedFloat("c"), False),
    (NUMERIC, 1.5),
    (NUMERIC, True),
    (EncryptedBoolean("c"), 1),
    (EncryptedDate("c"), datetime(2024, 1, 1)),
    (EncryptedDate("c"), "2024-01-01"),
    (AWARE, date(2024, 1, 1)),
    (EncryptedUUID("c"), str(UUID(int=1))),
    (EncryptedBytes("c"), "x"),
    (JSONB, {SECRET: object()}),
    (JSONB, {1: 2}),
    (JSONB, [datetime(2024, 1, 1)]),
    (SearchToken("c"), 5),
]

CYCLE: list[Any] = [SECRET]
CYCLE.append(CYCLE)

WRONG_VALUES: list[tuple[TypeDecorator[Any], Any]] = [
    (EncryptedString("c"), SECRET + "\ud800"),
    (SearchToken("c"), SECRET + "\ud800"),
    (EncryptedInteger("c"), 2**63),
    (EncryptedInteger("c"), 10**5000),
    (EncryptedFloat("c"), 10**400),
    (NUMERIC, Decimal("1E+131072")),
    (NUMERIC, Decimal("1E-16384")),
    (NUMERIC, Decimal("1E+999999")),
    (EncryptedNumeric("c", scale=2), Decimal("1E+999999")),
    (AWARE, datetime(2024, 1, 1)),
    (NAIVE, datetime(2024, 1, 1, tzinfo=UTC)),
    (AWARE, datetime.min.replace(tzinfo=EAST)),
    (JSONB, {SECRET: float("nan")}),
    (JSONB, [Decimal("Infinity")]),
    (JSONB, SECRET + "\x00"),
    (JSONB, SECRET + "\ud800"),
    (JSONB, {SECRET + "\ud800": 1}),
    (JSONB, CYCLE),
]


@pytest.mark.parametrize(("kind", "value"), WRONG_TYPES, ids=lambda _: "")
def test_wrong_types_are_named_and_not_quoted(kind: TypeDecorator[Any], value: Any) -> None:
    with pytest.raises(EncryptedTypeError, match=type(kind).__name__) as caught:
        kind.process_bind_param(value, DIALECT)
    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))
    assert caught.value.__context__ is None


@pytest.mark.parametrize(("kind", "value"), WRONG_VALUES, ids=lambda _: "")
def test_wrong_values_are_refused_and_not_quoted(kind: TypeDecorator[Any], value: Any) -> None:
    with pytest.raises(EncryptedValueError, match=type(kind).__name__) as caught:
        kind.process_bind_param(value, DIALECT)
    assert len(str(caught.value)) < 200
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("kind", "plaintext"),
    [
        (EncryptedInteger("c"), SECRET),
        (EncryptedFloat("c"), SECRET),
        (NUMERIC, SECRET),
        (EncryptedBoolean("c"), "t"),
        (EncryptedDate("c"), "infinity"),
        (EncryptedDate("c"), "0044-03-15 BC"),
        (EncryptedDate("c"), "10000-01-01"),
        (AWARE, "infinity"),
        (AWARE, "2024-01-01 00:00:00"),
        (NAIVE, "2024-01-01 00:00:00+00"),
        (EncryptedUUID("c"), SECRET),
        (EncryptedBytes("c"), SECRET),
        (EncryptedBytes("c"), "\\xzz"),
        (JSONB, SECRET),
        (JSONB, "[" * 100_000),
    ],
)
def test_plaintexts_of_another_type_are_refused_and_not_quoted(
    kind: TypeDecorator[Any], plaintext: str
) -> None:
    with pytest.raises(DecryptionError, match=f"{type(kind).__name__}.*not one that this type can") as caught:
        read(kind, plaintext)
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


def test_errors_through_sqlalchemy_hold_no_plaintext(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLAlchemy would quote the parameters of the whole statement."""

    def failure(expected: type[Exception], **values: Any) -> str:
        with pytest.raises(expected) as caught, engine.begin() as connection:
            connection.execute(insert(Person).values(id=1, email=SECRET, email_search=SECRET, **values))
        return "".join(traceback.format_exception(caught.value, chain=True))

    assert SECRET not in failure(EncryptedTypeError, logins="7")
    assert SECRET not in failure(EncryptedValueError, notes="x\ud800")
    with engine.begin() as connection:
        connection.execute(insert(Person).values(id=2, email_search=SECRET))
    assert SECRET not in failure(IntegrityError)
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_MASTER_KEY", "short")
    reset_ciphers()
    assert SECRET not in failure(ConfigurationError)
    with (
        pytest.raises(ConfigurationError, match="ALPHAPULSE_ENCRYPTION_MASTER_KEY") as caught,
        engine.connect() as c,
    ):
        c.execute(select(Person.id).where(Person.email_search == SECRET))
    assert SECRET not in "".join(traceback.format_exception(caught.value, chain=True))


def test_an_altered_or_foreign_envelope_is_refused(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(insert(Person).values(id=1, email=SECRET))
        connection.execute(text("UPDATE person SET notes = email_encrypted"))
        with pytest.raises(DecryptionError, match="context is not notes"):
            connection.execute(select(Person.notes)).scalar_one()


def test_columns_as_created(engine: Engine) -> None:
    reflected = Table("person", MetaData(), autoload_with=engine)
    search = reflected.c.email_search.type
    assert isinstance(search, String)
    assert search.length == 64
    assert all(str(reflected.c[name].type) == "TEXT" for name in ENCRYPTED)


def test_statements_are_cached_per_context() -> None:
    def key(kind: TypeDecorator[Any]) -> Any:
        cache_key = select(cast(Person.__table__.c.id, kind))._generate_cache_key()
        assert cache_key is not None
        return cache_key.key

    assert key(EncryptedString("a")) == key(EncryptedString("a"))
    different: list[TypeDecorator[Any]] = [
        EncryptedString("a"),
        EncryptedString("b"),
        EncryptedText("a"),
        EncryptedNumeric("a"),
    ]
    different += [
        EncryptedNumeric("a", scale=2),
        EncryptedDateTime("a"),
        EncryptedDateTime("a", timezone=False),
    ]
    assert len({key(kind) for kind in different}) == len(different)


def test_repr_recreates_the_type() -> None:
    assert repr(EncryptedString("user_pii")) == "EncryptedString('user_pii')"
    assert repr(EncryptedNumeric("c", scale=8)) == "EncryptedNumeric('c', scale=8)"
    assert repr(EncryptedDateTime("c", timezone=False)) == "EncryptedDateTime('c', timezone=False)"
    assert repr(SearchToken("c")) == "SearchToken('c')"


def test_types_and_columns_can_be_pickled_and_copied() -> None:
    kind = pickle.loads(pickle.dumps(EncryptedNumeric("c", scale=8)))
    assert repr(kind) == repr(kind.copy()) == "EncryptedNumeric('c', scale=8)"
    table = pickle.loads(pickle.dumps(Person.__table__))
    with pytest.raises(InvalidRequestError):
        table.c.email_encrypted == SECRET  # noqa: B015


def test_a_context_is_needed() -> None:
    with pytest.raises(ConfigurationError, match="EncryptedString needs the context of its column"):
        EncryptedString("")
