"""What people do: accounts, trades, positions, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal

from sqlalchemy import select
from sqlalchemy.orm import Session

from alphapulse_encryption.sample.application.models import Position, Trade, TradingAccount, User

# Average prices are kept to this many decimals.
_PRICE = Decimal("1e-10")


class NotPossible(Exception):
    """A trade that the account cannot make. The text says why and can be shown."""


def account_of(session: Session, user: User, number: str, *, lock: bool = False) -> TradingAccount | None:
    """A person's account of that number."""
    query = select(TradingAccount).where(
        TradingAccount.account_number == number, TradingAccount.user_id == user.id
    )
    return session.scalars(query.with_for_update() if lock else query).one_or_none()


def trade(
    session: Session,
    account: TradingAccount,
    *,
    symbol: str,
    side: str,
    quantity: Decimal,
    price: Decimal,
    fee: Decimal,
    order_id: str,
) -> Trade:
    """Fill an order: a trade, the position it changes, and the money it costs or brings.

    The account is locked in this transaction. Price and fee are in its currency.

    Raises:
        NotPossible: too little money, or too few units.
    """
    position = session.scalars(
        select(Position)
        .where(Position.account_id == account.id, Position.symbol == symbol, Position.status == "open")
        .with_for_update()
    ).one_or_none()
    worth = quantity * price
    if side == "buy":
        if account.available_balance < worth + fee:
            raise NotPossible("The account has too little money.")
        position = _bought(session, account, position, symbol, quantity, price)
        change = -worth - fee
    else:
        if position is None or position.size < quantity:
            raise NotPossible("The account holds too few units.")
        _sold(position, quantity, price)
        change = worth - fee
    account.balance += change
    account.available_balance += change
    filled = Trade(
        account_id=account.id,
        position_id=position.id,
        symbol=symbol,
        side=side,
        order_id=order_id,
        quantity=quantity,
        price=price,
        fee=fee,
        execution_details={
            "venue": account.exchange,
            "fills": [{"quantity": str(quantity), "price": str(price)}],
        },
    )
    session.add(filled)
    session.flush()
    # As it is kept: with all the decimals of its columns.
    session.refresh(filled)
    return filled


def _bought(
    session: Session,
    account: TradingAccount,
    position: Position | None,
    symbol: str,
    quantity: Decimal,
    price: Decimal,
) -> Position:
    if position is None:
        position = Position(
            account_id=account.id,
            symbol=symbol,
            size=quantity,
            entry_price=price,
            current_price=price,
            unrealized_pnl=0.0,
            realized_pnl=0.0,
            notes={"fills": 1},
        )
        session.add(position)
        session.flush()
        return position
    cost = position.size * position.entry_price + quantity * price
    position.size += quantity
    position.entry_price = (cost / position.size).quantize(_PRICE)
    position.notes["fills"] += 1
    mark(position, price)
    return position


def _sold(position: Position, quantity: Decimal, price: Decimal) -> None:
    position.realized_pnl += float(quantity * (price - position.entry_price))
    position.size -= quantity
    position.notes["fills"] += 1
    mark(position, price)
    if not position.size:
        position.status = "closed"
        position.closed_at = datetime.now(UTC)


def mark(position: Position, price: Decimal, note: str | None = None) -> None:
    """Give a position the market's price, and what that makes it worth; and a note."""
    position.current_price = price
    position.unrealized_pnl = float(position.size * (price - position.entry_price))
    if note is not None:
        position.notes["note"] = note


def position_of(session: Session, user: User, position_id: int) -> Position | None:
    """A person's position, locked."""
    return session.scalars(
        select(Position)
        .join(TradingAccount, TradingAccount.id == Position.account_id)
        .where(Position.id == position_id, TradingAccount.user_id == user.id)
        .with_for_update(of=Position)
    ).one_or_none()


@dataclass
class Turnover:
    """What was traded of an instrument."""

    trades: int = 0
    bought: Decimal = field(default_factory=Decimal)
    sold: Decimal = field(default_factory=Decimal)
    fees: Decimal = field(default_factory=Decimal)


def turnover(trades: Sequence[Trade]) -> dict[str, Turnover]:
    """By symbol. Summed up here: the server cannot add what it cannot read."""
    found: dict[str, Turnover] = {}
    for one in trades:
        total = found.setdefault(one.symbol, Turnover())
        worth = one.quantity * one.price
        total.trades += 1
        total.bought += worth if one.side == "buy" else 0
        total.sold += worth if one.side == "sell" else 0
        total.fees += one.fee or 0
    return found
