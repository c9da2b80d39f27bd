"""The HTTP API. Each request is one transaction."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from psycopg.errors import UniqueViolation
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from alphapulse_encryption.sample.application import people, trading
from alphapulse_encryption.sample.application.database import get_db_session
from alphapulse_encryption.sample.application.models import ApiKey, Position, Trade, TradingAccount, User
from alphapulse_encryption.sample.application.trading import Amount, Order

app = FastAPI(title="AlphaPulse sample application")

_log = logging.getLogger(__name__)


class Registration(BaseModel):
    username: str = Field(min_length=1, max_length=64)
    email: str = Field(min_length=3, max_length=320)
    password: str = Field(min_length=8, max_length=1000)
    first_name: str | None = None
    last_name: str | None = None
    phone_number: str | None = None
    address: dict[str, Any] | None = None


class Credentials(BaseModel):
    email: str
    password: str


class Profile(BaseModel):
    id: int
    username: str
    email: str
    first_name: str | None
    last_name: str | None
    phone_number: str | None
    address: dict[str, Any] | None = Field(validation_alias="address_data")


class ProfileChange(BaseModel):
    email: str | None = None
    phone_number: str | None = None
    address: dict[str, Any] | None = None


class NewAccount(BaseModel):
    account_number: str
    exchange: str = "kraken"
    currency: str = "USD"
    deposit: Amount


class Account(BaseModel):
    account_number: str
    exchange: str
    currency: str
    balance: Decimal
    available_balance: Decimal


class FilledOrder(BaseModel):
    id: int
    position_id: int | None
    symbol: str
    side: str
    order_id: str
    quantity: Decimal
    price: Decimal
    fee: Decimal | None
    execution_details: Any


class OpenPosition(BaseModel):
    id: int
    symbol: str
    size: Decimal
    entry_price: Decimal
    current_price: Decimal | None
    unrealized_pnl: float | None
    realized_pnl: float
    notes: dict[str, Any]
    status: str


class Mark(BaseModel):
    price: Amount
    note: str | None = None


class NewKey(BaseModel):
    name: str = Field(min_length=1, max_length=64)
    permissions: list[Literal["read", "trade", "manage"]]


class Key(BaseModel):
    id: uuid.UUID
    name: str
    permissions: list[str]
    usage_stats: dict[str, int] | None
    expires_at: datetime | None


def _session() -> Iterator[Session]:
    with get_db_session() as session, session.begin():
        yield session


# The transaction ends before the answer goes out: who has read an answer finds what it says.
Transaction = Annotated[Session, Depends(_session, scope="function")]
_bearer = HTTPBearer(auto_error=False)


def _with(permission: str) -> Any:
    """Whose key came with the request, which has to permit this."""

    def identified(
        request: Request,
        session: Transaction,
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> User:
        if credentials is None:
            raise people.NotAllowed
        endpoint = f"{request.method} {request.scope['route'].path}"
        return people.identify(session, credentials.credentials, permission, endpoint)

    return Depends(identified, scope="function")


Reader = Annotated[User, _with("read")]
Trader = Annotated[User, _with("trade")]
Manager = Annotated[User, _with("manage")]


@app.exception_handler(IntegrityError)
def refused(request: Request, error: Exception) -> JSONResponse:
    """A name, an address or a number that somebody has already; the database's message would tell it, with the value.

    Whatever else the database refuses is a fault of ours: its code goes into the log, its message, which can hold the
    row, does not.
    """
    state = getattr(getattr(error, "orig", None), "sqlstate", None)
    if state == UniqueViolation.sqlstate:
        return JSONResponse({"detail": "Taken already."}, status_code=409)
    _log.error("%s was refused by the database: SQLSTATE %s", request.scope["route"].path, state)
    return JSONResponse({"detail": "Something went wrong."}, status_code=500)


@app.post("/users", status_code=201, response_model=Profile)
def register(new: Registration, session: Transaction) -> User:
    user = User(
        **new.model_dump(exclude={"password", "address"}),
        password_hash=people.passwords.hash(new.password),
        address_data=new.address,
    )
    session.add(user)
    session.flush()
    return user


@app.post("/login")
def log_in(credentials: Credentials, session: Transaction) -> dict[str, str]:
    """Log in; the key goes into the header `Authorization: Bearer …` of what follows."""
    return {"key": people.log_in(session, credentials.email, credentials.password)}


@app.get("/me", response_model=Profile)
def profile(user: Reader) -> User:
    return user


@app.patch("/me", response_model=Profile)
def change_profile(change: ProfileChange, user: Manager) -> User:
    for name in change.model_fields_set:
        setattr(user, "address_data" if name == "address" else name, getattr(change, name))
    return user


@app.post("/accounts", status_code=201, response_model=Account)
def open_account(new: NewAccount, user: Manager, session: Transaction) -> TradingAccount:
    account = TradingAccount(
        **new.model_dump(exclude={"deposit"}),
        user_id=user.id,
        balance=new.deposit,
        available_balance=new.deposit,
        api_key_reference=f"vault:secret/exchanges/{new.exchange}",
    )
    session.add(account)
    session.flush()
    return account


@app.get("/accounts", response_model=list[Account])
def accounts(user: Reader) -> list[TradingAccount]:
    return user.accounts


def _account(session: Session, user: User, number: str, *, lock: bool = False) -> TradingAccount:
    query = select(TradingAccount).where(
        TradingAccount.account_number == number, TradingAccount.user_id == user.id
    )
    account = session.scalars(query.with_for_update() if lock else query).one_or_none()
    if account is None:
        raise HTTPException(404, "There is no such account.")
    return account


@app.post("/accounts/{number}/trades", status_code=201, response_model=FilledOrder)
def place_trade(number: str, order: Order, user: Trader, session: Transaction) -> Trade:
    return trading.trade(session, _account(session, user, number, lock=True), order)


@app.get("/accounts/{number}/trades", response_model=list[FilledOrder])
def trades(number: str, user: Reader, session: Transaction) -> list[Trade]:
    return _account(session, user, number).trades


@app.get("/accounts/{number}/positions", response_model=list[OpenPosition])
def positions(number: str, user: Reader, session: Transaction) -> list[Position]:
    return _account(session, user, number).positions


@app.patch("/positions/{position_id}", response_model=OpenPosition)
def mark_position(position_id: int, mark: Mark, user: Trader, session: Transaction) -> Position:
    position = session.scalars(
        select(Position)
        .join(TradingAccount, TradingAccount.id == Position.account_id)
        .where(Position.id == position_id, TradingAccount.user_id == user.id)
        .with_for_update(of=Position)
    ).one_or_none()
    if position is None:
        raise HTTPException(404, "There is no such position.")
    trading.mark(position, mark.price, mark.note)
    return position


@app.get("/report")
def report(user: Reader) -> dict[str, Any]:
    """All accounts: balances, turnover by symbol, and what positions gained."""
    found = {}
    for account in user.accounts:
        found[account.account_number] = {
            "balance": account.balance,
            "turnover": trading.turnover(account.trades),
            "realized_pnl": sum(position.realized_pnl for position in account.positions),
        }
    return {"user": user.username, "accounts": found}


@app.post("/api-keys", status_code=201)
def make_key(new: NewKey, user: Manager, session: Transaction) -> dict[str, Any]:
    """Make a key; it is shown this once."""
    kept, key = people.make_key(session, user, new.name, list(new.permissions))
    return {"key": key, **Key.model_validate(kept, from_attributes=True).model_dump(mode="json")}


@app.get("/api-keys", response_model=list[Key])
def keys(user: Reader, session: Transaction) -> Sequence[ApiKey]:
    """The newest first, with what was called with them."""
    query = select(ApiKey).where(ApiKey.user_id == user.id, ApiKey.is_active)
    return session.scalars(query.order_by(ApiKey.created_at.desc())).all()


@app.delete("/api-keys/{key_id}", status_code=204)
def revoke_key(key_id: uuid.UUID, user: Manager, session: Transaction) -> None:
    found = session.get(ApiKey, key_id)
    if found is None or found.user_id != user.id:
        raise HTTPException(404, "There is no such key.")
    found.is_active = False
