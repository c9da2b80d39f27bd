"""People who use the sample application, and remember what they did: each answer has to be what they remember."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import httpx

from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.sample.application.instances import Traffic

SYMBOLS = ("AAPL", "BTC/USDT", "EUR/USD")
NAMES = ("Zoë", "O'Brien", "李", "\U0001f600 Smith", "Ada", "100%s :x")
_PASSWORD = "correct horse"
_DEPOSIT = Decimal("100000.5000000000")
_QUANTUM = Decimal("1e-10")


class WrongAnswer(AssertionError):
    """An answer that is not what is remembered."""


@dataclass
class Holding:
    """A position as its owner works it out."""

    size: Decimal = Decimal(0)
    entry_price: Decimal = Decimal(0)
    realized: float = 0.0
    fills: int = 0


@dataclass
class Account:
    """An account as its owner works it out."""

    number: str
    balance: Decimal
    trades: list[dict[str, Any]] = field(default_factory=list)
    holdings: dict[str, Holding] = field(default_factory=dict)
    realized_before: float = 0.0


@dataclass
class Person:
    """Somebody who has registered.

    Args:
        id: as the application gave it.
        username: never changes.
        email: for logging in.
        profile: what `/me` has to show beside these.
        key: of the current session.
        calls: with that key, by endpoint.
    """

    id: int
    username: str
    email: str
    profile: dict[str, Any]
    key: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    accounts: list[Account] = field(default_factory=list)


class Client:
    """One thread's people. They share nothing with those of other clients but the application.

    Args:
        traffic: where requests go.
        number: of the client.
        known: addresses of people who were there before.
    """

    def __init__(self, traffic: Traffic, number: int, known: Sequence[str]) -> None:
        self._traffic = traffic
        self._number = number
        self._known = known
        self._http = httpx.Client(timeout=support.PATIENCE)
        self._random = random.Random(number)
        self._count = itertools.count(1)
        self.people: list[Person] = []
        self.requests = 0

    # Requests

    def _ask(
        self,
        method: str,
        path: str,
        status: int,
        person: Person | None = None,
        body: dict[str, Any] | None = None,
        **members: Any,
    ) -> Any:
        headers = {"Authorization": f"Bearer {person.key}"} if person else {}
        with self._traffic.request() as address:
            answer = self._http.request(
                method, f"{address}{path}", headers=headers, json=body or members or None
            )
        self.requests += 1
        if answer.status_code >= 500:
            # An instance says what went wrong after it has answered.
            support.until(lambda: bool(self._traffic.complaints()), "a complaint of an instance")
            raise WrongAnswer(f"{method} {path}: {self._traffic.complaints()}")
        if answer.status_code != status:
            raise WrongAnswer(f"{method} {path}: {answer.status_code}, {status} expected: {answer.text}")
        if person is not None:
            route = f"{method} {_route(path)}"
            person.calls[route] = person.calls.get(route, 0) + 1
        return answer.json() if answer.content else None

    @staticmethod
    def _same(what: str, found: Any, wanted: Any) -> None:
        if found != wanted:
            raise WrongAnswer(f"{what}: {found!r}, {wanted!r} expected")

    # What people do

    def step(self) -> None:
        """Something, by somebody."""
        if not self.people or self._random.random() < 0.06:
            self.register()
            return
        person = self._random.choice(self.people)
        doing: list[tuple[int, Callable[[Person], None]]] = [
            (2, self.log_in),
            (1, self.mistype),
            (1, self.collide),
            (3, self.look),
            (2, self.change),
            (8, self.trade),
            (3, self.list_trades),
            (2, self.list_positions),
            (2, self.mark),
            (3, self.balances),
            (2, self.report),
            (1, self.work_with_keys),
        ]
        weights, actions = zip(*doing, strict=True)
        self._random.choices(actions, weights)[0](person)

    def register(self) -> None:
        """Somebody new, who logs in and opens an account."""
        number = f"{self._number}-{next(self._count)}"
        profile: dict[str, Any] = {
            "first_name": self._random.choice(NAMES),
            "last_name": None if self._random.random() < 0.2 else self._random.choice(NAMES),
            "phone_number": f"+{self._random.randrange(10**9)}",
            "address": {"street": f'{number} Main "St"', "zip": "01234", "nested": [1, 2.5, None, True]},
        }
        email = f"Person.{number}@Mail.example"
        registration = {"username": f"person{number}", "email": email, "password": _PASSWORD, **profile}
        answer = self._ask("POST", "/users", 201, body=registration)
        person = Person(answer["id"], f"person{number}", email, profile)
        self._same("registration", answer, self._shown(person))
        self.log_in(person)
        self._open_account(person)
        self.people.append(person)

    def _shown(self, person: Person) -> dict[str, Any]:
        return {"id": person.id, "username": person.username, "email": person.email, **person.profile}

    def _open_account(self, person: Person) -> None:
        account = Account(f"00{self._number}-{person.id}-{len(person.accounts)}", _DEPOSIT)
        opening = {"account_number": account.number, "deposit": str(_DEPOSIT)}
        answer = self._ask("POST", "/accounts", 201, person, opening)
        person.accounts.append(account)
        self._same("new account", answer, self._balance(account))

    @staticmethod
    def _balance(account: Account) -> dict[str, Any]:
        money = str(account.balance.quantize(_QUANTUM))
        return {
            "account_number": account.number,
            "exchange": "kraken",
            "currency": "USD",
            "balance": money,
            "available_balance": money,
        }

    def log_in(self, person: Person) -> None:
        """The key before is forgotten."""
        person.key = self._ask("POST", "/login", 200, email=person.email, password=_PASSWORD)["key"]
        person.calls = {}

    def mistype(self, person: Person) -> None:
        """A wrong password, and an address that differs in case only."""
        self._ask("POST", "/login", 401, email=person.email, password="wrong")
        self._ask("POST", "/login", 401, email=person.email.swapcase(), password=_PASSWORD)

    def collide(self, person: Person) -> None:
        """What is taken stays taken, whoever has it and whichever phase it was registered in."""
        other = self._random.choice([person.email, *self._known])
        new = f"nobody{self._number}-{next(self._count)}"
        self._ask("POST", "/users", 409, username=new, email=other, password=_PASSWORD)
        account = self._random.choice(person.accounts)
        self._ask("POST", "/accounts", 409, person, account_number=account.number, deposit="1")
        # What failed was taken back, the count of the call too.
        person.calls["POST /accounts"] -= 1

    def look(self, person: Person) -> None:
        """At oneself."""
        self._same("profile", self._ask("GET", "/me", 200, person), self._shown(person))

    def change(self, person: Person) -> None:
        """A new address, number or place; what is not named stays."""
        change: dict[str, Any] = {}
        kind = self._random.randrange(4)
        if kind == 0:
            change["email"] = f"moved.{self._number}-{next(self._count)}@x.example"
        if kind in (1, 3):
            change["phone_number"] = self._random.choice(["", f"0{self._random.randrange(10**9)}"])
        if kind in (2, 3):
            change["address"] = {"street": f"{next(self._count)} Nova"}
        answer = self._ask("PATCH", "/me", 200, person, change)
        person.email = change.pop("email", person.email)
        person.profile |= change
        self._same("changed profile", answer, self._shown(person))
        if kind == 0:
            self.log_in(person)

    def trade(self, person: Person) -> None:
        """Buy, or sell some of it."""
        account = self._random.choice(person.accounts)
        symbol = self._random.choice(SYMBOLS)
        quantity = Decimal(self._random.randrange(1, 500)).scaleb(-2)
        price = Decimal(self._random.randrange(1, 90_000)).scaleb(-self._random.randrange(4))
        holding = account.holdings.get(symbol, Holding())
        side = "sell" if holding.size and self._random.random() < 0.5 else "buy"
        if side == "sell":
            quantity = self._random.choice([holding.size, min(quantity, holding.size)])
        fee = (quantity * price / 1000).quantize(Decimal("0.0001"))
        order = {
            "symbol": symbol,
            "side": side,
            "quantity": str(quantity),
            "price": str(price),
            "fee": str(fee),
            "order_id": f"order-{self._number}-{next(self._count)}",
        }
        path = f"/accounts/{account.number}/trades"
        if side == "buy" and account.balance < quantity * price + fee:
            self._ask("POST", path, 409, person, order)
            person.calls["POST /accounts/{number}/trades"] -= 1
            return
        answer = self._ask("POST", path, 201, person, order)
        account.trades.append(self._filled(account, order, answer["id"], answer["position_id"]))
        self._same("trade", answer, account.trades[-1])
        self._book(account, symbol, side, quantity, price, fee)

    @staticmethod
    def _filled(account: Account, order: dict[str, str], number: int, position: int) -> dict[str, Any]:
        return {
            **order,
            "id": number,
            "position_id": position,
            "quantity": str(Decimal(order["quantity"]).quantize(_QUANTUM)),
            "fee": str(Decimal(order["fee"]).quantize(_QUANTUM)),
            "execution_details": {
                "venue": "kraken",
                "fills": [{"quantity": order["quantity"], "price": order["price"]}],
            },
        }

    @staticmethod
    def _book(
        account: Account, symbol: str, side: str, quantity: Decimal, price: Decimal, fee: Decimal
    ) -> None:
        holding = account.holdings.setdefault(symbol, Holding())
        worth = quantity * price
        holding.fills += 1
        if side == "buy":
            account.balance -= worth + fee
            cost = holding.size * holding.entry_price + worth
            holding.size += quantity
            bought_before = holding.fills > 1
            holding.entry_price = (cost / holding.size).quantize(_QUANTUM) if bought_before else price
            return
        account.balance += worth - fee
        holding.realized += float(quantity * (price - holding.entry_price))
        holding.size -= quantity
        if not holding.size:
            account.realized_before += holding.realized
            del account.holdings[symbol]

    def list_trades(self, person: Person) -> None:
        """All of an account, in order."""
        account = self._random.choice(person.accounts)
        self._same(
            "trades", self._ask("GET", f"/accounts/{account.number}/trades", 200, person), account.trades
        )

    def _open_positions(self, person: Person, account: Account) -> dict[str, dict[str, Any]]:
        shown = self._ask("GET", f"/accounts/{account.number}/positions", 200, person)
        found = {one["symbol"]: one for one in shown if one["status"] == "open"}
        self._same("open positions", set(found), set(account.holdings))
        return found

    def list_positions(self, person: Person) -> None:
        """What is held, at which price, and what it brought."""
        account = self._random.choice(person.accounts)
        for symbol, one in self._open_positions(person, account).items():
            holding = account.holdings[symbol]
            self._same("size", Decimal(one["size"]), holding.size)
            self._same("entry price", Decimal(one["entry_price"]), holding.entry_price)
            self._same("realized", one["realized_pnl"], holding.realized)
            self._same("fills", one["notes"]["fills"], holding.fills)

    def mark(self, person: Person) -> None:
        """To the market, with a note, read back."""
        account = self._random.choice(person.accounts)
        for symbol, one in self._open_positions(person, account).items():
            holding = account.holdings[symbol]
            price = Decimal(self._random.randrange(1, 10**6)).scaleb(-3)
            note = self._random.choice(NAMES)
            answer = self._ask("PATCH", f"/positions/{one['id']}", 200, person, price=str(price), note=note)
            worth = float(holding.size * (price - holding.entry_price))
            self._same("mark", (answer["current_price"], answer["unrealized_pnl"]), (str(price), worth))
            self._same("notes", answer["notes"], {"fills": holding.fills, "note": note})
            return

    def balances(self, person: Person) -> None:
        """Of all accounts."""
        wanted = [self._balance(account) for account in person.accounts]
        self._same("balances", self._ask("GET", "/accounts", 200, person), wanted)

    def report(self, person: Person) -> None:
        """Everything added up."""
        answer = self._ask("GET", "/report", 200, person)
        self._same("accounts", set(answer["accounts"]), {account.number for account in person.accounts})
        for account in person.accounts:
            found = answer["accounts"][account.number]
            self._same("balance", Decimal(found["balance"]), account.balance)
            for symbol, turnover in found["turnover"].items():
                trades = [one for one in account.trades if one["symbol"] == symbol]
                bought = sum(
                    (Decimal(t["quantity"]) * Decimal(t["price"]) for t in trades if t["side"] == "buy"),
                    Decimal(0),
                )
                fees = sum((Decimal(t["fee"]) for t in trades), Decimal(0))
                self._same("trades", turnover["trades"], len(trades))
                self._same("bought", Decimal(turnover["bought"]), bought)
                self._same("fees", Decimal(turnover["fees"]), fees)
            realized = account.realized_before + sum(h.realized for h in account.holdings.values())
            if abs(found["realized_pnl"] - realized) > 1e-6 * max(1.0, abs(realized)):
                raise WrongAnswer(f"realized: {found['realized_pnl']}, {realized} expected")

    def work_with_keys(self, person: Person) -> None:
        """Make a key, see that it may read only, count the calls, take it away."""
        made = self._ask("POST", "/api-keys", 201, person, name="robot", permissions=["read"])
        robot = Person(person.id, person.username, person.email, person.profile, made["key"])
        self._same("profile for the robot", self._ask("GET", "/me", 200, robot), self._shown(person))
        self._ask("PATCH", "/me", 401, robot, phone_number="1")
        listed = {one["id"]: one for one in self._ask("GET", "/api-keys", 200, person)}
        self._same("permissions", listed[made["id"]]["permissions"], ["read"])
        self._same("the robot's calls", listed[made["id"]]["usage_stats"], {"GET /me": 1})
        sessions = [one["usage_stats"] for one in listed.values() if one["name"] == "session"]
        # The newest is the current one.
        self._same("calls", sessions[0], {name: count for name, count in person.calls.items() if count})
        self._ask("DELETE", f"/api-keys/{made['id']}", 204, person)
        self._ask("GET", "/me", 401, robot)


def _route(path: str) -> str:
    """The endpoint that a path belongs to, as the application counts it."""
    parts = path.split("/")
    if len(parts) > 2:
        parts[2] = {"accounts": "{number}", "positions": "{position_id}", "api-keys": "{key_id}"}[parts[1]]
    return "/".join(parts)


class Load:
    """Clients at work, each in a thread of its own, until they are told to stop.

    Args:
        traffic: where requests go.
        clients: how many.
        known: addresses of people who were there before.
        rest: how long each rests before it does something else, in seconds: the machine is there for others, too.
    """

    def __init__(self, traffic: Traffic, clients: int, known: Sequence[str], rest: float = 0.0) -> None:
        self._rest = rest
        self.clients = [Client(traffic, number, known) for number in range(clients)]
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._busy = [threading.Lock() for _ in range(clients)]
        self._threads = [
            threading.Thread(target=self._work, args=(client, busy), daemon=True)
            for client, busy in zip(self.clients, self._busy, strict=True)
        ]

    def _work(self, client: Client, busy: threading.Lock) -> None:
        while not self._stop.wait(self._rest):
            self._go.wait()
            with busy:
                # Cleared while this one waited for its turn.
                if not self._go.is_set():
                    continue
                try:
                    client.step()
                except Exception as error:
                    self.failures.append(f"{type(error).__name__}: {error}")
                    return

    @property
    def requests(self) -> int:
        return sum(client.requests for client in self.clients)

    @property
    def people(self) -> list[Person]:
        return [person for client in self.clients for person in client.people]

    def more(self, requests: int) -> None:
        """Wait until so many more requests were answered."""
        wanted = self.requests + requests
        support.until(lambda: bool(self.failures) or self.requests >= wanted, f"{requests} more requests")
        assert not self.failures, "\n".join(self.failures)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._go.set()
        for thread in self._threads:
            thread.join(support.PATIENCE)

    def pause(self) -> None:
        """Let everybody finish what they are at."""
        self._go.clear()
        for busy in self._busy:
            with busy:
                pass

    def go_on(self) -> None:
        """After a pause."""
        self._go.set()
