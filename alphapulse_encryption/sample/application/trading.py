"""What people do: accounts, trades, positions, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Literal

from fastapi import HTTPException
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from alphapulse_encryption.sample.application.models import Position, Trade, TradingAccount

Amount = Annotated[Decimal, Field(gt=0, max_digits=18, decimal_places=8)]
# Average prices are kept to this many decimals.
_PRICE = Decimal("1e-10")


class Order(BaseModel):
    symbol: str = Field(min_length=1, max_length=32)
    side: Literal["buy", "sell"]
    quantity: Amount
    price: Amount
    fee: Annotated[Decimal, Field(ge=0, max_digits=18, decimal_places=8)] = Decimal(0)
    order_id: str


def trade(session: Session, account: TradingAccount, order: Order) -> Trade:
    """Fill an order: a trade, the position it changes, and the money it costs or brings.

    The account is locked in this transaction. Price and fee are in its currency.
    """
    position = session.scalars(
        select(Position)
        .where(Position.account_id == account.id, Position.symbol == order.symbol, Position.status == "open")
        .with_for_update()
    ).one_or_none()
    worth = order.quantity * order.price
    if order.side == "buy":
        if account.available_balance < worth + order.fee:
            raise HTTPException(409, "The account has too little money.")
        if position is None:
            position = Position(
                account_id=account.id,
                symbol=order.symbol,
                size=order.quantity,
                entry_price=order.price,
                realized_pnl=0.0,
                notes={"fills": 0},
            )
            session.add(position)
        else:
            cost = position.size * position.entry_price + worth
            position.size += order.quantity
            position.entry_price = (cost / position.size).quantize(_PRICE)
        change = -worth - order.fee
    else:
        if position is None or position.size < order.quantity:
            raise HTTPException(409, "The account holds too few units.")
        position.realized_pnl += float(order.quantity * (order.price - position.entry_price))
        position.size -= order.quantity
        if not position.size:
            position.status = "closed"
            position.closed_at = datetime.now(UTC)
        change = worth - order.fee
    position.notes["fills"] += 1
    mark(position, order.price)
    session.flush()
    account.balance += change
    account.available_balance += change
    fill = {"quantity": str(order.quantity), "price": str(order.price)}
    filled = Trade(
        account_id=account.id,
        position_id=position.id,
        **order.model_dump(),
        execution_details={"venue": account.exchange, "fills": [fill]},
    )
    session.add(filled)
    session.flush()
    # As it is kept: with all the decimals of its columns.
    session.refresh(filled)
    return filled


def mark(position: Position, price: Decimal, note: str | None = None) -> None:
    """Give a position the market's price, and what that makes it worth; and a note."""
    position.current_price = price
    position.unrealized_pnl = float(position.size * (price - position.entry_price))
    if note is not None:
        position.notes["note"] = note


@dataclass
class Turnover:
    trades: int = 0
    bought: Decimal = Decimal(0)
    sold: Decimal = Decimal(0)
    fees: Decimal = Decimal(0)


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
