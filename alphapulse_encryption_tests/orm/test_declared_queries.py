"""Declared attributes in queries: the same statements in every phase, at every stage that it is right at."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import BigInteger, ForeignKey, and_, delete, exists, func, literal, null, select, text, update
from sqlalchemy.exc import ArgumentError, InvalidRequestError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import (
    Session,
    aliased,
    configure_mappers,
    defer,
    joinedload,
    load_only,
    mapped_column,
    relationship,
    selectinload,
    undefer,
    with_loader_criteria,
)

from alphapulse_encryption import reset_ciphers
from alphapulse_encryption.orm import EncryptedTypeError
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.orm import models
from alphapulse_encryption_tests.orm.conftest import Place

ADA, GRACE, EDSGER = "ada@example.com", "grace@example.com", "edsger@example.com"


def fill(place: Place) -> None:
    """Three rows; the last one has only what it must have."""
    model = place.model
    with Session(place.engine) as session:
        session.add(
            model(
                id=1,
                username="ada",
                email=ADA,
                phone="+1 555 0100",
                balance=Decimal("1.5"),
                address={"city": "London", "lines": [1, 2.5, None]},
                report={"b": 1, "a": "東京"},
            )
        )
        session.add(model(id=2, username="grace", email=GRACE, phone="+1 555 0100"))
        session.add(model(id=3, username="edsger", email=EDSGER))
        session.commit()


def ids(place: Place, *criteria: Any) -> list[int]:
    with Session(place.engine) as session:
        return list(session.scalars(select(place.model.id).where(*criteria).order_by(place.model.id)))


def test_a_row_is_stored_as_the_phase_says_and_read_back(place: Place) -> None:
    fill(place)
    models.assert_written(
        place.url,
        1,
        place.phase,
        email=ADA,
        phone="+1 555 0100",
        balance="1.50000000",
        address='{"city": "London", "lines": [1, 2.5, null]}',
        report='{"b": 1, "a": "\\u6771\\u4eac"}',
    )
    models.assert_written(
        place.url, 3, place.phase, email=EDSGER, phone=None, balance="0.00000000", address=None, report=None
    )
    with Session(place.engine) as session:
        ada = session.get_one(place.model, 1)
        assert (ada.email, ada.phone, ada.balance) == (ADA, "+1 555 0100", Decimal("1.50000000"))
        assert (ada.address, ada.report) == (
            {"city": "London", "lines": [1, 2.5, None]},
            {"b": 1, "a": "東京"},
        )
        edsger = session.get_one(place.model, 3)
        assert (edsger.phone, edsger.balance, edsger.address, edsger.report) == (None, 0, None, None)


def test_lookups(place: Place) -> None:
    fill(place)
    model = place.model
    assert ids(place, model.email == ADA) == [1]
    assert ids(place, model.email == "nobody@example.com") == []
    assert ids(place, model.email != ADA) == [2, 3]
    assert ids(place, model.email.in_([ADA, EDSGER, "nobody@example.com"])) == [1, 3]
    assert ids(place, model.email.in_([])) == []
    assert ids(place, model.email.not_in([ADA, EDSGER])) == [2]
    assert ids(place, model.phone == "+1 555 0100") == [1, 2]
    assert ids(place, model.phone != "another") == [1, 2]
    assert ids(place, model.phone.in_(["+1 555 0100", None])) == [1, 2]
    assert ids(place, model.phone.not_in(["another", None])) == []
    assert ids(place, model.phone.is_(None)) == ids(place, model.phone == None) == [3]  # noqa: E711
    assert ids(place, model.phone.is_not(None)) == ids(place, model.phone != null()) == [1, 2]
    assert ids(place, model.address.is_(None)) == [2, 3]
    assert ids(place, and_(model.email == ADA, model.phone == "+1 555 0100")) == [1]
    assert ids(place, ~(model.email == ADA)) == [2, 3]
    assert ids(place, exists().where(model.email == ADA)) == [1, 2, 3]
    with Session(place.engine) as session:
        assert session.query(model).filter_by(email=GRACE).one().id == 2
        assert session.query(model).filter_by(email=GRACE, phone=None).first() is None
        assert session.scalar(select(func.count()).where(model.email == ADA)) == 1
        assert session.scalar(select(func.count(model.phone))) == 2


def test_attributes_by_themselves(place: Place) -> None:
    fill(place)
    model = place.model
    with Session(place.engine) as session:
        rows = session.execute(select(model.id, model.email, model.balance).order_by(model.id)).all()
        assert [(row.email, row.balance) for row in rows] == [
            (ADA, Decimal("1.50000000")),
            (GRACE, 0),
            (EDSGER, 0),
        ]
        assert session.scalars(select(model.address).where(model.id == 1)).one() == {
            "city": "London",
            "lines": [1, 2.5, None],
        }
        labelled = session.execute(select(model.email.label("address")).where(model.id == 1)).one()
        assert labelled.address == ADA
        both = session.execute(select(model, model.email).where(model.email == ADA)).one()
        assert (both[0].email, both[1]) == (ADA, ADA)
        assert session.query(model.email).filter(model.id == 2).scalar() == GRACE


def test_aliases_and_subqueries(place: Place) -> None:
    fill(place)
    model = place.model
    other = aliased(model)
    with Session(place.engine) as session:
        pairs = select(model.id, other.email).where(
            model.id < other.id, model.phone == "+1 555 0100", other.phone.is_(None), other.email == EDSGER
        )
        assert [tuple(row) for row in session.execute(pairs.order_by(model.id))] == [(1, EDSGER), (2, EDSGER)]
        inside = select(model.id, model.email, model.phone).where(model.email.in_([ADA, GRACE])).subquery()
        outside = select(inside.c.email).where(inside.c.id == 2)
        assert session.scalars(outside).one() == GRACE
        found = select(model.email).where(model.id.in_(select(model.id).where(model.email == ADA)))
        assert session.scalars(found).one() == ADA
        entity = aliased(model, select(model).where(model.id > 1).subquery())
        assert list(session.scalars(select(entity.email).order_by(entity.id))) == [GRACE, EDSGER]
        assert session.scalars(select(entity).where(entity.email == EDSGER)).one().email == EDSGER


def test_statements_on_the_table(place: Place) -> None:
    fill(place)
    table = place.model.__table__
    with place.engine.connect() as connection:
        row = connection.execute(select(table).where(table.c.email == ADA)).mappings().one()
        assert (row[table.c.email], row[table.c.id]) == (ADA, 1)
        found = select(table.c.email).where(table.c.phone.in_(["+1 555 0100"])).order_by(table.c.id)
        assert list(connection.scalars(found)) == [ADA, GRACE]
        other = table.alias()
        assert connection.execute(select(other.c.id).where(other.c.email == GRACE)).scalar_one() == 2


def test_updates_and_deletes_by_a_lookup(place: Place) -> None:
    fill(place)
    model = place.model
    with Session(place.engine) as session:
        ada = session.get_one(model, 1)
        session.execute(update(model).where(model.email == ADA).values(email="ada@example.org", phone=None))
        assert (ada.email, ada.phone) == ("ada@example.org", None)
        session.execute(delete(model).where(model.email.in_([GRACE, EDSGER])))
        session.commit()
        assert (ada.email, ada.phone) == ("ada@example.org", None)
    models.assert_written(place.url, 1, place.phase, email="ada@example.org", phone=None)
    assert list(place.rows()) == [1]


def test_loading_options(place: Place) -> None:
    fill(place)
    model = place.model
    with Session(place.engine) as session:
        ada = session.scalars(select(model).options(defer(model.email)).where(model.id == 1)).one()
        assert "email" not in vars(ada)
        assert ada.email == ADA
        session.expunge_all()
        ada = session.scalars(select(model).options(load_only(model.email)).where(model.id == 1)).one()
        assert "phone" not in vars(ada)
        assert (ada.email, ada.phone) == (ADA, "+1 555 0100")
        session.refresh(ada, ["email"])
        session.expire(ada, ["email"])
        assert ada.email == ADA
        session.expunge_all()
        query = select(model).options(undefer("*")).where(model.id == 1)
        assert session.scalars(query).one().email == ADA


def test_relationships(place: Place) -> None:
    """Eager loading with a limit puts the entity into a subquery."""
    fill(place)
    base: Any = place.model.__bases__[0]

    class Visit(base):  # type: ignore[misc]
        __tablename__ = "visits"
        id = mapped_column(BigInteger, primary_key=True)
        person_id = mapped_column(ForeignKey("people.id"))
        person = relationship(place.model, backref="visits")

    support.run(place.url, "CREATE TABLE visits (id bigint PRIMARY KEY, person_id bigint)")
    support.run(place.url, "INSERT INTO visits VALUES (10, 1), (11, 1), (12, 3)")
    configure_mappers()
    model = place.model
    with Session(place.engine) as session:
        query = select(model).options(joinedload(model.visits)).where(model.email != GRACE).limit(2)
        people = session.scalars(query.order_by(model.id)).unique().all()
        assert [(person.email, len(person.visits)) for person in people] == [(ADA, 2), (EDSGER, 1)]
        session.expunge_all()
        for loading in (joinedload(Visit.person), selectinload(Visit.person)):
            visits = session.scalars(select(Visit).options(loading).order_by(Visit.id)).all()
            assert [visit.person.email for visit in visits] == [ADA, ADA, EDSGER]
            session.expunge_all()
        joined = select(model.email).join(Visit.person).where(Visit.id == 12)
        assert session.scalars(joined).one() == EDSGER
        criteria = with_loader_criteria(model, model.username == "ada")
        assert session.scalar(select(func.count()).where(model.email == ADA).options(criteria)) == 1
        assert session.scalar(select(func.count()).where(model.email == GRACE).options(criteria)) == 0


REFUSED: list[Callable[[Any], Any]] = [
    lambda model: model.email < ADA,
    lambda model: model.email >= ADA,
    lambda model: model.email.like("ada%"),
    lambda model: model.email.ilike("ada%"),
    lambda model: model.email.startswith("ada"),
    lambda model: model.email.contains("ada"),
    lambda model: model.email.between("a", "b"),
    lambda model: model.email + "x",
    lambda model: "x" + model.email,
    lambda model: model.email.desc(),
    lambda model: model.email.op("~")("a"),
    lambda model: model.email.is_distinct_from(ADA),
    lambda model: model.email.collate("C"),
    lambda model: model.email == model.phone,
    lambda model: model.email == literal(ADA),
    lambda model: model.email.in_(select(model.phone)),
    lambda model: model.email.in_([ADA, model.phone]),
    lambda model: model.balance == Decimal(1),
    lambda model: model.balance.in_([Decimal(1)]),
    lambda model: model.balance > 0,
    lambda model: model.address["city"],
    lambda model: select(model).order_by(model.email),
    lambda model: select(model).order_by(model.id, model.balance),
    lambda model: select(model).filter_by(balance=Decimal(1)),
    lambda model: model.__table__.c.email < ADA,
    lambda model: model.__table__.c.balance == Decimal(1),
    lambda model: model.__table__.c.email.desc(),
]


@pytest.mark.parametrize("build", range(len(REFUSED)))
@pytest.mark.parametrize("phase", ["dual", "encrypted"])
def test_what_ciphertext_cannot_do_is_refused_as_the_query_is_built(phase: str, build: int) -> None:
    model = models.declare(phase)
    with pytest.raises(InvalidRequestError, match=r"people\.(email|balance|address) is .*") as caught:
        REFUSED[build](model)
    assert ADA not in str(caught.value)
    assert "ada" not in str(caught.value)


@pytest.mark.parametrize("build", range(len(REFUSED)))
@pytest.mark.parametrize("phase", ["off", "plaintext"])
def test_plaintext_can_do_all_of_it(phase: str, build: int) -> None:
    str(REFUSED[build](models.declare(phase)))


REFUSED_BEFORE_IT_IS_SENT: list[Callable[[Any], Any]] = [
    lambda model: select(func.count()).group_by(model.email),
    lambda model: select(model.email).distinct(),
    lambda model: select(func.lower(model.email)),
    lambda model: select(func.max(model.balance)),
    lambda model: select(model.id).where(func.lower(model.email) == ADA),
    lambda model: select(func.sum(model.balance)).where(model.email == ADA),
    lambda model: select(model.id).where(model.__table__.c.email == model.__table__.c.phone),
]


def test_what_ciphertext_cannot_do_elsewhere_is_refused_before_it_is_sent(encrypted_place: Place) -> None:
    with Session(encrypted_place.engine) as session:
        for build in REFUSED_BEFORE_IT_IS_SENT:
            with pytest.raises(InvalidRequestError, match=r"cannot be (used in|compared with)"):
                session.execute(build(encrypted_place.model))


def test_values_of_the_wrong_type_are_refused_as_the_query_is_built(encrypted_place: Place) -> None:
    with pytest.raises(EncryptedTypeError, match="takes str, not int"):
        _ = encrypted_place.model.email == 5


def test_a_subquery_without_what_a_comparison_needs_is_refused(encrypted_place: Place) -> None:
    model = encrypted_place.model
    table = model.__table__
    part = select(table.c.id, table.c.email).subquery()
    with pytest.raises(
        InvalidRequestError, match=r"people\.email .* goes with the column 'email_(search|plaintext)'"
    ):
        _ = part.c.email == ADA
    inside = select(model.id, model.email).subquery()
    with pytest.raises((InvalidRequestError, ArgumentError), match="IS NULL only"):
        _ = inside.c.email == ADA


def test_the_dual_phase_reads_plaintext_where_the_value_is_pending(at: Callable[..., Place]) -> None:
    for stage in ("columns", "switched"):
        place = at("dual", stage)
        fill(place)
        pending = "pending@example.com"
        support.run(
            place.url,
            "UPDATE people SET email = %s, phone = 'p', balance = 2.5, address = '{\"city\": \"Paris\"}', "
            'report = \'{"z": 1, "a": 2}\' WHERE id = 2',
            pending,
        )
        assert place.rows()[2]["email_encrypted"] is place.rows()[2]["balance_encrypted"] is None
        model = place.model
        assert ids(place, model.email == pending) == [2]
        assert ids(place, model.email.in_([ADA, pending])) == [1, 2]
        assert ids(place, model.email != pending) == [1, 3]
        assert ids(place, model.email.not_in([ADA])) == [2, 3]
        assert ids(place, model.email == GRACE) == []
        assert ids(place, model.phone.is_(None)) == [3]
        with Session(place.engine) as session:
            expected = (pending, "p", Decimal("2.50000000"), {"city": "Paris"}, {"z": 1, "a": 2})
            row = session.get_one(model, 2)
            assert (row.email, row.phone, row.balance, row.address, row.report) == expected
            columns = (model.email, model.phone, model.balance, model.address, model.report)
            assert tuple(session.execute(select(*columns).where(model.email == pending)).one()) == expected
            inside = select(model.id, model.email).subquery()
            assert session.scalars(select(inside.c.email).where(inside.c.id == 2)).one() == pending
            assert session.scalar(select(func.count(model.email))) == 3
            table = model.__table__
            assert (
                session.execute(select(table.c.email).where(table.c.email == pending)).scalar_one() == pending
            )
            # A change of one attribute writes both of its sides and leaves the others pending.
            row.balance = Decimal(3)
            session.commit()
        models.assert_written(place.url, 2, "dual", balance="3.00000000")
        assert place.rows()[2]["email_encrypted"] is None


def test_pending_values_do_not_depend_on_the_session(at: Callable[..., Place]) -> None:
    place = at("dual", "columns")
    support.run(place.url, "INSERT INTO people (id, email, address) VALUES (1, 'a@x', '{\"a\": 1.50}')")
    support.with_settings(place.url, support.STRANGE_SETTINGS | {"search_path": "public"})
    place.engine.dispose()
    with Session(place.engine) as session:
        row = session.get_one(place.model, 1)
        assert (row.email, row.address, row.balance) == ("a@x", {"a": 1.5}, 0)


def test_both_sides_of_a_lookup_use_their_index(at: Callable[..., Place]) -> None:
    for phase, stage, indexes in (
        ("plaintext", "columns", {"people_email_key"}),
        ("dual", "columns", {"people_email_key", "idx_people_email_search"}),
        ("dual", "switched", {"people_email_key", "idx_people_email_search"}),
        ("encrypted", "switched", {"idx_people_email_search"}),
    ):
        place = at(phase, stage)
        with place.engine.begin() as connection:
            query = select(place.model.id).where(place.model.email == ADA)
            compiled = query.compile(connection, compile_kwargs={"literal_binds": True})
            connection.execute(
                text(
                    "INSERT INTO people (email, balance) "
                    "SELECT 'user' || i || '@example.com', 0 FROM generate_series(1, 20000) i"
                )
            )
            connection.execute(text("ANALYZE people"))
            plan = "\n".join(connection.scalars(text(f"EXPLAIN {compiled}")))
        assert "Seq Scan" not in plan, plan
        assert {name for name in ("people_email_key", "idx_people_email_search") if name in plan} == indexes


def test_lookups_match_every_key_version(at: Callable[..., Place], monkeypatch: pytest.MonkeyPatch) -> None:
    place = at("encrypted", "switched")
    fill(place)
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", "2")
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_MASTER_KEY_V2", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=")
    reset_ciphers()
    with Session(place.engine) as session:
        session.add(place.model(id=4, email="new@example.com", phone="+1 555 0100"))
        session.commit()
    versions = support.run(
        place.url, "SELECT id, email_encrypted::json ->> 'key_version' FROM people ORDER BY id"
    )
    assert versions == [(1, "1"), (2, "1"), (3, "1"), (4, "2")]
    assert ids(place, place.model.phone == "+1 555 0100") == [1, 2, 4]
    assert ids(place, place.model.email.in_([ADA, "new@example.com"])) == [1, 4]
    assert ids(place, place.model.phone != "+1 555 0100") == []


async def _in_an_asynchronous_session(place: Place) -> None:
    engine = create_async_engine(models.sqlalchemy_url(place.url))
    model = place.model
    async with AsyncSession(engine) as session:
        session.add(model(id=9, email="async@example.com", address={"a": 1}))
        await session.commit()
    async with AsyncSession(engine, expire_on_commit=False) as session:
        row = (await session.scalars(select(model).where(model.email == "async@example.com"))).one()
        assert (row.email, row.address) == ("async@example.com", {"a": 1})
        row.address["b"] = 2
        row.email = "changed@example.com"
        await session.commit()
        assert (await session.scalars(select(model.email))).all() == ["changed@example.com"]
    await engine.dispose()


def test_asynchronous_sessions(place: Place) -> None:
    import asyncio

    asyncio.run(_in_an_asynchronous_session(place))
    models.assert_written(place.url, 9, place.phase, email="changed@example.com", address='{"a": 1, "b": 2}')
