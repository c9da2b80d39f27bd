"""Declared attributes when they are written: all columns of an attribute in one statement, or none."""

from __future__ import annotations

import contextlib
import copy
import json
import pickle
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from psycopg import sql
from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Table,
    bindparam,
    event,
    func,
    insert,
    null,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import IntegrityError, InvalidRequestError
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    MappedAsDataclass,
    Session,
    declarative_base,
    mapped_column,
)
from sqlalchemy.types import CHAR, DateTime, Float, Integer, Numeric, String, Text

from alphapulse_encryption.errors import ConfigurationError, DecryptionError
from alphapulse_encryption.orm import (
    EncryptedDateTime,
    EncryptedFloat,
    EncryptedInteger,
    EncryptedJSON,
    EncryptedNumeric,
    EncryptedString,
    EncryptedTypeError,
    EncryptedValueError,
    configure,
    copy_rows,
    encrypted,
    encrypted_values,
    reset_phases,
)
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.orm import models
from alphapulse_encryption_tests.orm.conftest import Place

ADA, GRACE = "ada@example.com", "grace@example.com"


@contextlib.contextmanager
def updates(engine: Engine) -> Iterator[list[set[str]]]:
    """The columns that each UPDATE sets."""
    found: list[set[str]] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("UPDATE"):
            assignments = statement.partition(" SET ")[2].partition(" WHERE ")[0]
            found.append({part.partition("=")[0].strip() for part in assignments.split(", ")})

    event.listen(engine, "before_cursor_execute", note)
    yield found
    event.remove(engine, "before_cursor_execute", note)


def columns_of(phase: str, name: str, *, search: bool = False) -> set[str]:
    """The columns that a phase writes for an attribute."""
    written = {
        "off": {name},
        "plaintext": {name, f"{name}_encrypted"},
        "dual": {name, f"{name}_encrypted"},
        "encrypted": {f"{name}_encrypted"},
    }[phase]
    return written | {f"{name}_search"} if search and phase != "off" else written


def add(place: Place, **values: Any) -> None:
    with Session(place.engine) as session:
        session.add(place.model(**{"id": 1, "email": ADA, **values}))
        session.commit()


def test_a_change_writes_all_columns_in_one_statement_and_no_other(place: Place) -> None:
    add(place, username="ada", phone="1", address={"city": "London"})
    with Session(place.engine) as session, updates(place.engine) as written:
        ada = session.get_one(place.model, 1)
        ada.email = GRACE
        session.flush()
        ada.username = "grace"
        session.flush()
        ada.email = GRACE
        ada.phone = "1"
        ada.address = {"city": "London"}
        session.flush()
        ada.phone = None
        ada.balance = Decimal("2.5")
        session.commit()
        assert (ada.email, ada.phone, ada.balance) == (GRACE, None, Decimal("2.5"))
    assert written == [
        columns_of(place.phase, "email", search=True),
        {"username"},
        columns_of(place.phase, "phone", search=True) | columns_of(place.phase, "balance"),
    ]
    models.assert_written(place.url, 1, place.phase, email=GRACE, phone=None, balance="2.50000000")


def test_an_attribute_is_set_without_being_loaded(place: Place) -> None:
    add(place, phone="1")
    with Session(place.engine) as session:
        ada = session.get_one(place.model, 1)
        session.expire(ada)
        ada.email = GRACE
        session.commit()
        ada.email = ADA
        session.rollback()
        assert ada.email == GRACE
    models.assert_written(place.url, 1, place.phase, email=GRACE, phone="1")


def test_changes_in_place_of_json_are_written_to_both_sides(place: Place) -> None:
    add(place, address={"city": "London"})
    with Session(place.engine) as session, updates(place.engine) as written:
        ada = session.get_one(place.model, 1)
        ada.address["street"] = "St James's Square"
        session.flush()
        ada.address["number"] = 12
        session.commit()
        ada.address.pop("city")
        session.commit()
        ada.address["number"] = 12
        fresh = place.model(id=2, email=GRACE, address={"a": 1})
        session.add(fresh)
        session.flush()
        fresh.address["b"] = 2
        session.commit()
        assert fresh.address == {"a": 1, "b": 2}
    assert written[:3] == [columns_of(place.phase, "address")] * 3
    models.assert_written(place.url, 1, place.phase, address='{"number": 12, "street": "St James\'s Square"}')
    models.assert_written(place.url, 2, place.phase, address='{"a": 1, "b": 2}')


def test_values_that_python_calls_equal_are_changes_all_the_same(encrypted_place: Place) -> None:
    add(encrypted_place, report={"a": 1})
    with Session(encrypted_place.engine) as session:
        ada = session.get_one(encrypted_place.model, 1)
        ada.report = {"a": True}
        session.commit()
    models.assert_written(encrypted_place.url, 1, encrypted_place.phase, report='{"a": true}')


def test_many_rows_at_once(place: Place) -> None:
    model = place.model
    rows = [
        {"id": n, "email": f"{n}@example.com", "phone": str(n), "balance": Decimal(n)} for n in range(1, 6)
    ]
    with Session(place.engine) as session:
        session.execute(insert(model), rows)
        session.execute(
            insert(model).values([{"id": 6, "email": "6@x", "balance": 6}, {"id": 7, "email": "7@x"}])
        )
        session.execute(insert(model).values(id=8, email="8@x", phone=None))
        session.bulk_insert_mappings(model, [{"id": 9, "email": "9@x"}])
        session.bulk_save_objects([model(id=10, email="10@x", address={"a": 1})])
        returned = session.scalars(insert(model).returning(model), [{"id": 11, "email": "11@x"}]).one()
        assert returned.email == "11@x"
        assert (
            session.execute(insert(model).values(id=12, email="12@x").returning(model.email)).scalar_one()
            == "12@x"
        )
        session.commit()
    for number in (1, 5):
        models.assert_written(
            *(place.url, number, place.phase),
            email=f"{number}@example.com",
            phone=str(number),
            balance=f"{number}.00000000",
        )
    for number in (6, 7, 8, 9, 10, 11, 12):
        models.assert_written(place.url, number, place.phase, email=f"{number}@x", phone=None)
    models.assert_written(place.url, 7, place.phase, balance="0.00000000")
    models.assert_written(place.url, 10, place.phase, address='{"a": 1}')
    with Session(place.engine) as session:
        session.execute(update(model), [{"id": 1, "email": "first@x"}, {"id": 2, "email": "second@x"}])
        session.bulk_update_mappings(model, [{"id": 3, "phone": None, "username": "third"}])
        session.execute(update(model).where(model.id == 4).values({model.email: "fourth@x", "phone": null()}))
        session.commit()
    for number, address, phone in ((1, "first@x", "1"), (2, "second@x", "2"), (3, "3@example.com", None)):
        models.assert_written(place.url, number, place.phase, email=address, phone=phone)
    models.assert_written(place.url, 4, place.phase, email="fourth@x", phone=None)


def test_statements_on_the_table(place: Place) -> None:
    table = place.model.__table__
    with place.engine.begin() as connection:
        connection.execute(insert(table).values(id=1, email=ADA, phone="1"))
        connection.execute(insert(table), [{"id": 2, "email": "2@x"}, {"id": 3, "email": "3@x"}])
        connection.execute(update(table).where(table.c.email == ADA).values(email=GRACE, balance=Decimal(7)))
        connection.execute(update(table).where(table.c.id == 2), {"email": "two@x"})
        connection.execute(
            update(table).where(table.c.id == bindparam("key")),
            [{"key": 2, "phone": "22"}, {"key": 3, "phone": "33"}],
        )
        connection.execute(update(table).where(table.c.id == 1).values(phone=None, username="grace"))
        upsert = postgresql.insert(table).values(id=3, email="other@x")
        changed = encrypted_values(place.model, {"email": "three@x", "username": "third"})
        connection.execute(upsert.on_conflict_do_update(index_elements=["id"], set_=changed))
    models.assert_written(place.url, 1, place.phase, email=GRACE, phone=None, balance="7.00000000")
    models.assert_written(place.url, 2, place.phase, email="two@x", phone="22")
    models.assert_written(place.url, 3, place.phase, email="three@x", phone="33")
    assert [row["username"] for row in place.rows().values()] == ["grace", None, "third"]


def test_an_upsert_takes_what_was_to_be_inserted(place: Place) -> None:
    add(place)
    table = place.model.__table__
    statement = postgresql.insert(table).values(id=1, email=GRACE)
    keys = encrypted_values(place.model, {"email": None})
    with place.engine.begin() as connection:
        connection.execute(
            statement.on_conflict_do_update(
                index_elements=["id"], set_={key: statement.excluded[key] for key in keys}
            )
        )
    models.assert_written(place.url, 1, place.phase, email=GRACE)


def test_part_of_an_attribute_is_refused(encrypted_place: Place) -> None:
    place, table = encrypted_place, encrypted_place.model.__table__
    add(place)
    before = support.run(place.url, "TABLE people")
    upsert = postgresql.insert(table).values(id=1, email=GRACE)
    only: dict[str, Any] = {"index_elements": ["id"]}
    statements: list[tuple[Callable[[], Any], str]] = [
        (lambda: update(table).values(email_search="token"), "without 'email'"),
        (lambda: upsert.on_conflict_do_update(**only, set_={"email": GRACE}), "without"),
        (lambda: upsert.on_conflict_do_update(**only, set_={"email": upsert.excluded.email}), "without"),
        (
            lambda: insert(table).from_select(["id", "email"], select(table.c.id + 100, table.c.email)),
            "without",
        ),
        (lambda: update(table).values(email=func.lower("X")), "not SQL expressions"),
        (lambda: update(place.model).values(email=func.lower("X")), "not SQL expressions"),
        (lambda: insert(table).values(id=5, email=func.lower("X")), "not SQL expressions"),
        (lambda: update(place.model).values(email=place.model.username), "not SQL expressions"),
        (lambda: update(table).values(balance=table.c.balance), "not SQL expressions"),
    ]
    for statement, problem in statements:
        with (
            Session(place.engine) as session,
            pytest.raises(InvalidRequestError, match=rf"people\.\w+ .*{problem}"),
        ):
            session.execute(statement())
    with Session(place.engine) as session:
        ada = session.get_one(place.model, 1)
        ada.email = func.lower("X")
        with pytest.raises(InvalidRequestError, match="not SQL expressions"):
            session.flush()
    assert support.run(place.url, "TABLE people") == before


def test_sql_expressions_leave_the_value_pending_in_the_plaintext_phase(at: Callable[..., Place]) -> None:
    place = at("plaintext", "columns")
    add(place, phone="1")
    model = place.model
    with Session(place.engine) as session:
        session.execute(update(model).values(email=func.upper(model.email)))
        ada = session.get_one(model, 1)
        ada.phone = func.concat("2", "3")
        session.commit()
        assert (ada.email, ada.phone) == (ADA.upper(), "23")
    row = place.rows()[1]
    assert (row["email"], row["email_encrypted"], row["email_search"]) == (ADA.upper(), None, None)
    assert (row["phone"], row["phone_encrypted"]) == ("23", None)


def test_what_is_required_cannot_be_none(place: Place) -> None:
    """In the phases that read ciphertext the library refuses it; the database does in the others."""
    add(place)
    before = support.run(place.url, "TABLE people")
    table = place.model.__table__
    reads_ciphertext = place.phase in {"dual", "encrypted"}
    problem: Any = EncryptedValueError if reads_ciphertext else IntegrityError

    def by_flush(session: Session) -> None:
        session.get_one(place.model, 1).email = None
        session.flush()

    def add_without(session: Session) -> None:
        session.add(place.model(id=2))
        session.flush()

    attempts: list[Callable[[Session], Any]] = [
        add_without,
        lambda session: session.execute(insert(place.model), [{"id": 2, "email": None}]),
        lambda session: session.execute(insert(table).values(id=2, email=None)),
        lambda session: session.execute(insert(table).values(id=2)),
        lambda session: session.execute(update(place.model).values(email=None)),
        lambda session: session.execute(update(table).values(email=null())),
        lambda session: session.execute(update(place.model), [{"id": 1, "email": None}]),
        by_flush,
    ]
    for attempt in attempts:
        with Session(place.engine) as session, pytest.raises(problem) as caught:
            attempt(session)
        if reads_ciphertext:
            assert "people.email is required" in str(caught.value)
    assert support.run(place.url, "TABLE people") == before


def test_what_the_plaintext_column_refuses_is_refused(place: Place) -> None:
    secret = "s3cret" * 10
    attempts: list[dict[str, Any]] = [
        {"email": secret},
        {"email": "nul\x00"},
        {"balance": Decimal("1e12")},
        {"balance": Decimal("999999999999.999999999")},
        {"balance": Decimal("Infinity")},
    ]
    for values in attempts:
        with Session(place.engine) as session, pytest.raises(Exception) as caught:
            session.add(place.model(**{"id": 1, "email": ADA, **values}))
            session.commit()
        if place.phase == "encrypted":
            assert isinstance(caught.value, EncryptedValueError)
        assert secret not in str(caught.value)
    assert place.rows() == {}
    add(place, email="x" * 40, balance=Decimal("-999999999999.99999999"))
    models.assert_written(place.url, 1, place.phase, email="x" * 40, balance="-999999999999.99999999")


def test_a_second_row_of_a_unique_value_is_refused(place: Place) -> None:
    add(place)
    with Session(place.engine) as session:
        session.add(place.model(id=2, email=ADA))
        with pytest.raises(IntegrityError) as caught:
            session.commit()
    assert isinstance(caught.value.orig, psycopg.errors.UniqueViolation)
    assert len(place.rows()) == 1


def test_copy(place: Place) -> None:
    source = [
        (n, f"{n}@example.com", str(n) if n % 2 else None, Decimal(n), {"n": n}, {"b": n, "a": 1})
        for n in range(1, 2502)
    ]
    columns, rows = copy_rows(
        place.model, ["id", "email", "phone", "balance", "address", "report"], iter(source)
    )
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    with (
        psycopg.connect(place.url) as connection,
        connection.cursor().copy(sql.SQL("COPY people ({}) FROM STDIN").format(names)) as copying,
    ):
        for row in rows:
            copying.write_row(row)
    assert len(place.rows()) == len(source)
    for number, phone in ((1, "1"), (1000, None), (2501, "2501")):
        models.assert_written(
            *(place.url, number, place.phase),
            email=f"{number}@example.com",
            phone=phone,
            balance=f"{number}.00000000",
            address=f'{{"n": {number}}}',
            report=f'{{"b": {number}, "a": 1}}',
        )
    with Session(place.engine) as session:
        assert (
            session.scalars(select(place.model).where(place.model.email == "77@example.com")).one().id == 77
        )


def test_copy_refuses_what_a_statement_would(at: Callable[..., Place]) -> None:
    model = at("encrypted", "switched").model
    with pytest.raises(ConfigurationError, match="Person has no column attribute nothing"):
        copy_rows(model, ["nothing"], [])
    for row, problem in ((None, "is required"), ("x" * 41, "longer than 40"), (5, "takes str")):
        with pytest.raises((EncryptedValueError, EncryptedTypeError), match=problem):
            list(copy_rows(model, ["email"], [(row,)]).rows)


def test_merging_and_pickling(place: Place) -> None:
    add(place, address={"a": 1})
    with Session(place.engine) as session:
        ada = session.get_one(place.model, 1)
        detached = copy.copy(vars(ada))
        session.expunge(ada)
        assert detached["email"] == ADA
        ada.email = GRACE
        ada.address["b"] = 2
        merged = session.merge(ada)
        session.commit()
        assert (merged.email, merged.address) == (GRACE, {"a": 1, "b": 2})
        new = session.merge(place.model(id=2, email="new@example.com", phone="2"))
        session.commit()
        assert new.phone == "2"
    models.assert_written(place.url, 1, place.phase, email=GRACE, address='{"a": 1, "b": 2}')
    models.assert_written(place.url, 2, place.phase, email="new@example.com", phone="2")


def corrupt(place: Place, key: int) -> None:
    """Put another context's envelope into a row, as a session can that the guard trusts."""
    with support.application(place.url, autocommit=False) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        connection.execute(
            "UPDATE people SET email_encrypted = replace(email_encrypted, 'user_pii', 'user_pij') WHERE id = %s",
            [key],
        )
        connection.commit()


def test_a_value_that_cannot_be_read_raises_on_access_and_leaves_others_alone(encrypted_place: Place) -> None:
    place, model = encrypted_place, encrypted_place.model
    add(place, address={"a": 1})
    with Session(place.engine) as session:
        session.add(model(id=2, username="grace", email=GRACE))
        session.commit()
    corrupt(place, 2)
    with Session(place.engine) as session:
        ada, grace = session.scalars(select(model).order_by(model.id))
        assert (ada.email, grace.username, grace.balance) == (ADA, "grace", 0)
        for _ in range(2):
            with pytest.raises(
                DecryptionError, match=r"people\.email of the row id=2 cannot be read: .*context"
            ) as caught:
                _ = grace.email
            assert "ciphertext" not in str(caught.value)
        with pytest.raises(DecryptionError, match="id=2"):
            _ = (
                pickle.loads(pickle.dumps(grace)).email
                if place.model.__qualname__.isidentifier()
                else grace.email
            )
        with pytest.raises(DecryptionError, match="id=2"):
            session.refresh(grace)
        assert [person.username for person in session.scalars(select(model).order_by(model.id))] == [
            None,
            "grace",
        ]
        grace.username = "Grace"
        session.commit()
        assert grace.username == "Grace"  # loaded again, and in the way of nothing
        with pytest.raises(DecryptionError, match="id=2"):
            _ = grace.email
        with pytest.raises(DecryptionError, match=r"people\.email cannot be read"):
            session.scalars(select(model.email)).all()
        with pytest.raises(DecryptionError, match=r"people\.email cannot be read"):
            str(
                session.execute(select(model.__table__).where(model.id == 2))
                .mappings()
                .one()[model.__table__.c.email]
            )
        grace.email = GRACE
        session.commit()
        assert grace.email == GRACE
        session.expire(grace)
        assert grace.email == GRACE
    models.assert_written(place.url, 2, place.phase, email=GRACE)


def test_mixins_and_abstract_classes(at: Callable[..., Place]) -> None:
    for phase, stage in (
        ("off", "plain"),
        ("plaintext", "columns"),
        ("dual", "columns"),
        ("encrypted", "dropped"),
    ):
        place = at(phase, stage)
        reset_phases()
        configure(tables={"people": phase})

        class Base(DeclarativeBase):
            pass

        class Reachable:
            email: Mapped[str] = encrypted(EncryptedString("user_pii"), String(40), search=True)

        class Balanced(Base):
            __abstract__ = True
            balance: Mapped[Decimal] = encrypted(
                EncryptedNumeric("account_balance"), Numeric(20, 8), default=Decimal(0)
            )
            phone: Mapped[str | None] = encrypted(EncryptedString("user_pii"), Text, search=True)

        # In either order.
        class Person(Balanced, Reachable):
            __tablename__ = "people"
            id: Mapped[int] = mapped_column(BigInteger, primary_key=True)

        class Company(Reachable, Base):
            __tablename__ = "companies"
            id: Mapped[int] = mapped_column(BigInteger, primary_key=True)

        with Session(place.engine) as session:
            session.add(Person(id=1, email=ADA, balance=Decimal(1)))
            session.commit()
            found = session.scalars(select(Person).where(Person.email == ADA)).one()
            found.email = GRACE
            session.commit()
            assert (found.email, found.phone) == (GRACE, None)
        models.assert_written(place.url, 1, phase, email=GRACE, balance="1.00000000", phone=None)
        assert Company.__table__.c.keys() == ["id", "email"]
        assert not Person.__table__.c.email.nullable
        assert Person.__table__.c.phone.nullable


def test_classic_declarative_bases(at: Callable[..., Place]) -> None:
    place = at("dual", "columns")
    base: Any = declarative_base()
    reset_phases()
    configure(phase="dual")

    class Person(base):  # type: ignore[misc]
        __tablename__ = "people"
        id = mapped_column(BigInteger, primary_key=True)
        email = encrypted(EncryptedString("user_pii"), String(40), search=True, nullable=False)
        contact = encrypted(EncryptedString("user_pii"), Text, search=True, name="phone")

    with Session(place.engine) as session:
        session.add(Person(id=1, email=ADA, contact="1"))
        session.commit()
        assert session.scalars(select(Person.contact).where(Person.contact == "1")).one() == "1"
    models.assert_written(place.url, 1, "dual", email=ADA, phone="1")


def test_declarations_that_cannot_work_are_refused() -> None:
    reset_phases()
    configure(phase="dual")
    pairs: list[tuple[Any, Any, str]] = [
        (EncryptedString("c"), CHAR(5), "pads"),
        (EncryptedDateTime("c"), DateTime(), "timezone"),
        (EncryptedNumeric("c", scale=2), Numeric(20, 8), "another scale"),
        (EncryptedJSON("c"), postgresql.JSON(), r"json needs EncryptedJSON\('c', binary=False\)"),
        (EncryptedJSON("c", binary=False), postgresql.JSONB(), r"jsonb needs EncryptedJSON\('c'\)"),
        (String(5), String(5), "takes one of the encrypted types first"),
    ]
    for kind, plain, problem in pairs:
        with pytest.raises(ConfigurationError, match=problem):
            encrypted(kind, plain)
    unsearchable: list[tuple[Any, Any]] = [
        (EncryptedNumeric("c"), Numeric()),
        (EncryptedFloat("c"), Float()),
        (EncryptedJSON("c"), postgresql.JSONB()),
    ]
    for kind, plain in unsearchable:
        with pytest.raises(ConfigurationError, match="search=True"):
            encrypted(kind, plain, search=True)

    class Base(DeclarativeBase):
        pass

    with pytest.raises(ConfigurationError, match="is declared beside"):

        class Twice(Base):
            __tablename__ = "twice"
            id: Mapped[int] = mapped_column(primary_key=True)
            email_search: Mapped[str] = mapped_column()
            email: Mapped[str] = encrypted(EncryptedString("c"), String(5), search=True)

    with pytest.raises(ConfigurationError, match="does not work with dataclass mappings"):

        class AsDataclass(MappedAsDataclass, Base):
            __tablename__ = "dataclass"
            id: Mapped[int] = mapped_column(primary_key=True)
            age: Mapped[int] = encrypted(EncryptedInteger("c"), Integer)

    with pytest.raises(ConfigurationError, match="__tablename__"):

        class OfTable(Base):
            __table__ = Table("of_table", Base.metadata, Column("id", Integer, primary_key=True))
            age: Mapped[int] = encrypted(EncryptedInteger("c"), Integer)


def test_only_the_columns_of_the_phase_are_named() -> None:
    """After the drop there is no plaintext column, before step 2 no encrypted one."""
    names = {
        phase: {column.name for column in models.declare(phase).__table__.columns}
        for phase in ("off", "plaintext", "dual", "encrypted")
    }
    plain = {column.name for column in models.ENTRY.columns}
    ciphertext = {name for column in models.ENTRY.columns for name in column.derived}
    assert names["off"] & ciphertext == set()
    assert names["encrypted"] & plain == set()
    assert names["plaintext"] == names["dual"] == plain | ciphertext | {"id", "username"}


def test_search_columns_take_tokens(at: Callable[..., Place]) -> None:
    """The guide's new code compares the search column with a token."""
    for phase, stage in (("plaintext", "columns"), ("dual", "columns"), ("encrypted", "dropped")):
        place = at(phase, stage)
        add(place)
        with Session(place.engine) as session:
            found = session.query(place.model).filter_by(email_search=support.token(ADA, "user_pii")).first()
            assert found is not None
            assert found.email == ADA
            raw = session.execute(text("SELECT email_encrypted FROM people")).scalar_one()
            assert json.loads(raw)["context"] == "user_pii"
