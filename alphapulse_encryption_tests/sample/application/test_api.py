"""The sample application by itself: every endpoint, in every phase, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import forked
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.sample.application.instances import environment, instance, prepare

# Each phase has a database of its own, which takes seconds to prepare: not in every worker.
pytestmark = pytest.mark.xdist_group("sample application")

ADA = {
    "username": "ada",
    "email": "Ada@Example.com",
    "password": "correct horse",
    "first_name": "Ada",
    "phone_number": "+44 20 7946 0000",
    "address": {"street": "12 St James's Square", "zip": "01234"},
}
ACCOUNT = {"account_number": "0042", "deposit": "1000"}
ORDER = {"symbol": "AAPL", "side": "buy", "quantity": "2", "price": "100.5", "fee": "1", "order_id": "o-1"}


@pytest.fixture(scope="module", params=["off", "plaintext", "dual", "encrypted"])
def place(
    request: pytest.FixtureRequest, postgres: EmbeddedPostgres, _sample_template: str
) -> Iterator[tuple[str, httpx.Client]]:
    """A database and an instance of one phase on it, for all tests of the phase."""
    for url in fresh_database(postgres, _sample_template):
        prepare(url, request.param)
        with instance(url, request.param) as serving, httpx.Client(base_url=serving.address) as http:
            yield url, http


@pytest.fixture
def http(place: tuple[str, httpx.Client]) -> Iterator[httpx.Client]:
    """Nobody is logged in, and nobody of the tests is registered."""
    url, client = place
    yield client
    client.headers.pop("Authorization", None)
    walk.query(url, "DELETE FROM users WHERE username IN ('ada', 'bob') RETURNING id")


def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


def logged_in(http: httpx.Client, **changes: str) -> dict[str, Any]:
    """Somebody is registered and logged in; what the application says of them."""
    person = ADA | changes
    profile: dict[str, Any] = ok(http.post("/users", json=person), 201)
    key = ok(http.post("/login", json={"email": person["email"], "password": person["password"]}))["key"]
    http.headers["Authorization"] = f"Bearer {key}"
    return profile


def test_registration_and_login(http: httpx.Client) -> None:
    profile = logged_in(http)
    assert profile == {k: v for k, v in ADA.items() if k != "password"} | {
        "id": profile["id"],
        "last_name": None,
    }
    assert ok(http.get("/me")) == profile
    changed = ok(http.patch("/me", json={"email": "ada@new.example", "phone_number": None}))
    assert changed == profile | {"email": "ada@new.example", "phone_number": None}
    assert ok(http.get("/me")) == changed

    for email, password, status in (
        ("ada@new.example", "correct horse", 200),
        ("ada@new.example", "wrong", 401),
        ("Ada@Example.com", "correct horse", 401),
        ("ADA@new.example", "correct horse", 401),
        ("nobody@example.com", "correct horse", 401),
    ):
        assert http.post("/login", json={"email": email, "password": password}).status_code == status


def test_an_address_has_one_person(place: tuple[str, httpx.Client], http: httpx.Client) -> None:
    """Those who were there before included, whichever side their address is on."""
    url, _ = place
    profile = logged_in(http)
    for email in (ADA["email"], "A@x.example", "a+tag@x.example"):
        assert http.post("/users", json=ADA | {"username": "bob", "email": email}).status_code == 409
    assert http.post("/users", json=ADA | {"email": "other@x.example"}).status_code == 409
    assert http.patch("/me", json={"email": "a@x.example"}).status_code == 409
    assert ok(http.get("/me")) == profile
    assert walk.value(url, "SELECT count(*) FROM users WHERE username = 'bob'") == 0


def test_trading(http: httpx.Client) -> None:
    logged_in(http)
    account = ok(http.post("/accounts", json=ACCOUNT), 201)
    assert account == {
        "account_number": "0042",
        "exchange": "kraken",
        "currency": "USD",
        "balance": "1000",
        "available_balance": "1000",
    }
    first = ok(http.post("/accounts/0042/trades", json=ORDER), 201)
    assert first == ORDER | {
        "id": first["id"],
        "position_id": first["position_id"],
        "quantity": "2.0000000000",
        "fee": "1.0000000000",
        "execution_details": {"venue": "kraken", "fills": [{"quantity": "2", "price": "100.5"}]},
    }
    second = ok(http.post("/accounts/0042/trades", json=ORDER | {"price": "101.50", "order_id": "o-2"}), 201)
    third = ok(
        http.post("/accounts/0042/trades", json=ORDER | {"side": "sell", "quantity": "3", "order_id": "o-3"}),
        201,
    )
    assert [t["position_id"] for t in (second, third)] == [first["position_id"]] * 2
    assert ok(http.get("/accounts/0042/trades")) == [first, second, third]
    # 1000 - 201 - 1 - 203 - 1 + 301.5 - 1
    assert [a["balance"] for a in ok(http.get("/accounts"))] == ["894.5000000000"]

    (position,) = ok(http.get("/accounts/0042/positions"))
    assert position == {
        "id": first["position_id"],
        "symbol": "AAPL",
        "size": "1.0000000000",
        "entry_price": "101.0000000000",
        "current_price": "100.5",
        "unrealized_pnl": -0.5,
        "realized_pnl": -1.5,
        "notes": {"fills": 3},
        "status": "open",
    }
    marked = ok(http.patch(f"/positions/{position['id']}", json={"price": "111", "note": "going up"}))
    assert marked == position | {
        "current_price": "111",
        "unrealized_pnl": 10.0,
        "notes": {"fills": 3, "note": "going up"},
    }
    assert ok(http.get("/accounts/0042/positions")) == [marked]
    ok(
        http.post("/accounts/0042/trades", json=ORDER | {"side": "sell", "quantity": "1", "order_id": "o-4"}),
        201,
    )
    assert [p["status"] for p in ok(http.get("/accounts/0042/positions"))] == ["closed"]

    report = ok(http.get("/report"))
    assert report["user"] == "ada"
    assert report["accounts"]["0042"]["turnover"]["AAPL"]["trades"] == 4
    assert float(report["accounts"]["0042"]["turnover"]["AAPL"]["bought"]) == 404
    assert float(report["accounts"]["0042"]["turnover"]["AAPL"]["sold"]) == 402
    assert float(report["accounts"]["0042"]["balance"]) == 994
    assert report["accounts"]["0042"]["realized_pnl"] == -2.0


def test_what_is_not_possible(http: httpx.Client) -> None:
    logged_in(http)
    ok(http.post("/accounts", json=ACCOUNT), 201)
    for order, status in (
        (ORDER | {"quantity": "10"}, 409),
        (ORDER | {"side": "sell"}, 409),
        (ORDER | {"quantity": "0"}, 422),
        (ORDER | {"side": "steal"}, 422),
    ):
        assert http.post("/accounts/0042/trades", json=order).status_code == status
    assert http.post("/accounts/0043/trades", json=ORDER).status_code == 404
    assert http.post("/accounts", json=ACCOUNT).status_code == 409
    assert ok(http.get("/accounts/0042/trades")) == []

    # Of somebody else, nothing is seen or changed.
    logged_in(http, username="bob", email="bob@x.example")
    assert http.get("/accounts/0042/trades").status_code == 404
    assert http.get("/accounts/0042/positions").status_code == 404
    assert http.patch("/positions/1", json={"price": "1"}).status_code == 404
    assert ok(http.get("/accounts")) == []


def test_api_keys(http: httpx.Client) -> None:
    logged_in(http)
    made = ok(http.post("/api-keys", json={"name": "robot", "permissions": ["read"]}), 201)
    robot = {"Authorization": f"Bearer {made.pop('key')}"}
    assert ok(http.get("/accounts", headers=robot)) == []
    ok(http.get("/accounts", headers=robot))
    assert http.post("/accounts", json=ACCOUNT, headers=robot).status_code == 401
    keys = {key["name"]: key for key in ok(http.get("/api-keys"))}
    assert keys["robot"] == made | {"usage_stats": {"GET /accounts": 2}}
    assert keys["session"]["usage_stats"] == {"POST /api-keys": 1, "GET /api-keys": 1}
    assert ok(http.delete(f"/api-keys/{made['id']}"), 204) is None
    assert http.get("/accounts", headers=robot).status_code == 401
    assert http.delete("/api-keys/00000000-0000-0000-0000-000000000000").status_code == 404
    for header in ({"Authorization": "Bearer nonsense"}, {"Authorization": ""}):
        assert http.get("/me", headers=header).status_code == 401


def test_nothing_sensitive_is_kept_in_plaintext(place: tuple[str, httpx.Client], http: httpx.Client) -> None:
    """In the phase `encrypted`; in the others, plaintext is there for those who still read it."""
    url, _ = place
    number = logged_in(http)["id"]
    ok(http.post("/accounts", json=ACCOUNT), 201)
    ok(http.post("/accounts/0042/trades", json=ORDER), 201)
    rows = [
        str(walk.query(url, f"SELECT t::text FROM {table} t WHERE {condition}"))
        for table, condition in (
            ("users", f"id = {number}"),
            ("trading_accounts", f"user_id = {number}"),
            ("trades", f"account_id = (SELECT max(id) FROM trading_accounts WHERE user_id = {number})"),
            ("api_keys", f"user_id = {number}"),
        )
    ]
    words = ["Ada@Example.com", "7946", "James", "0042", "o-1", "kraken"]
    kept = [word for word in words if word in json.dumps(rows)]
    switched = walk.query(url, "SELECT to_regclass('alphapulse_encryption.tables') IS NOT NULL")[0][
        0
    ] and walk.value(url, "SELECT bool_and(authority = 'ciphertext') FROM alphapulse_encryption.tables")
    # The exchange's name is no secret.
    assert kept == (["kraken"] if switched else words)


def test_a_wrong_phase_does_not_start(sample_url: str) -> None:
    application = "alphapulse_encryption.sample.application"
    done = forked.run(application, ["--port", "0"], environment(sample_url, "dual"))
    assert (done.returncode > 0, done.stdout) == (True, "")
    assert "--add-columns" in done.stderr and "users" in done.stderr and "Traceback" not in done.stderr
    done = forked.run(application, ["--port", "0"], environment(sample_url, "both"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "ALPHAPULSE_ENCRYPTION_PHASE" in done.stderr and "Traceback" not in done.stderr
