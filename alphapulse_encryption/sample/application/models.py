"""The application's tables. A column that is encrypted says so here, once for all phases."""

from __future__ import annotations

import uuid
from datetime import datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Identity, Numeric, String, Text, func
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.ext.mutable import MutableDict, MutableList
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from alphapulse_encryption.orm import (
    EncryptedFloat,
    EncryptedJSON,
    EncryptedNumeric,
    EncryptedString,
    EncryptedText,
    encrypted,
)

# Columns numeric(28, 10) pad to ten decimals, so what is encrypted has them too.
_SCALE = 10
_MONEY = Numeric(28, _SCALE)


def _jsonb() -> JSONB:
    """None is NULL, as in the encrypted column. One for each attribute: `as_mutable` tells attributes by their type."""
    return JSONB(none_as_null=True)


class Base(DeclarativeBase):
    """Where the tables are kept, and which SQL type a Python type has."""

    type_annotation_map = {  # noqa: RUF012
        int: BigInteger,
        str: Text,
        datetime: TIMESTAMP(timezone=True),
    }


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    username: Mapped[str] = mapped_column(String(64), unique=True)
    email: Mapped[str] = encrypted(EncryptedString("user_pii"), String(320), search=True)
    phone_number: Mapped[str | None] = encrypted(EncryptedString("user_pii"), String(64))
    first_name: Mapped[str | None] = encrypted(EncryptedString("user_personal"), String(320))
    last_name: Mapped[str | None] = encrypted(EncryptedText("user_personal"), Text)
    address_data: Mapped[dict[str, Any] | None] = encrypted(
        MutableDict.as_mutable(EncryptedJSON("user_address")), MutableDict.as_mutable(_jsonb())
    )
    two_factor_secret: Mapped[str | None] = encrypted(EncryptedText("user_security"), Text)
    password_hash: Mapped[str]
    status: Mapped[str] = mapped_column(String(16), default="active")
    is_active: Mapped[bool] = mapped_column(default=True)
    last_login_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())
    accounts: Mapped[list[TradingAccount]] = relationship(order_by="TradingAccount.id", viewonly=True)


class TradingAccount(Base):
    __tablename__ = "trading_accounts"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    exchange: Mapped[str] = mapped_column(String(32))
    account_type: Mapped[str] = mapped_column(String(16), default="spot")
    currency: Mapped[str] = mapped_column(String(8), default="USD")
    account_number: Mapped[str] = encrypted(EncryptedText("trading_account"), Text, search=True)
    balance: Mapped[Decimal] = encrypted(EncryptedNumeric("account_balance", _SCALE), _MONEY)
    available_balance: Mapped[Decimal] = encrypted(EncryptedNumeric("account_balance", _SCALE), _MONEY)
    api_key_reference: Mapped[str | None] = encrypted(EncryptedText("api_credentials"), Text)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())
    positions: Mapped[list[Position]] = relationship(order_by="Position.id", viewonly=True)
    trades: Mapped[list[Trade]] = relationship(order_by="Trade.id", viewonly=True)


class Position(Base):
    __tablename__ = "positions"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey(TradingAccount.id))
    symbol: Mapped[str] = mapped_column(String(32))
    side: Mapped[str] = mapped_column(String(8), default="long")
    size: Mapped[Decimal] = encrypted(EncryptedNumeric("position_size", _SCALE), _MONEY)
    entry_price: Mapped[Decimal] = encrypted(EncryptedNumeric("position_pricing"), Numeric())
    current_price: Mapped[Decimal | None] = encrypted(EncryptedNumeric("position_pricing"), Numeric())
    unrealized_pnl: Mapped[float | None] = encrypted(EncryptedFloat("position_pnl"), Double())
    realized_pnl: Mapped[float] = encrypted(EncryptedFloat("position_pnl"), Double())
    # The column's name is one that declarative classes keep for themselves.
    notes: Mapped[dict[str, Any]] = encrypted(
        MutableDict.as_mutable(EncryptedJSON("position_metadata")),
        MutableDict.as_mutable(_jsonb()),
        name="metadata",
    )
    status: Mapped[str] = mapped_column(String(16), default="open")
    opened_at: Mapped[datetime] = mapped_column(server_default=func.now())
    closed_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(server_default=func.now(), onupdate=func.now())


class Trade(Base):
    __tablename__ = "trades"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    account_id: Mapped[int] = mapped_column(ForeignKey(TradingAccount.id))
    position_id: Mapped[int | None] = mapped_column(ForeignKey(Position.id))
    symbol: Mapped[str] = mapped_column(String(32))
    side: Mapped[str] = mapped_column(String(8))
    order_id: Mapped[str] = encrypted(EncryptedText("trade_order"), Text)
    quantity: Mapped[Decimal] = encrypted(EncryptedNumeric("trade_execution", _SCALE), _MONEY)
    price: Mapped[Decimal] = encrypted(EncryptedNumeric("trade_execution"), Numeric())
    fee: Mapped[Decimal | None] = encrypted(EncryptedNumeric("trade_execution", _SCALE), _MONEY)
    execution_details: Mapped[dict[str, Any] | None] = encrypted(
        EncryptedJSON("trade_details", binary=False), JSON(none_as_null=True)
    )
    executed_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ApiKey(Base):
    """What a program, or somebody who has logged in, identifies itself by."""

    __tablename__ = "api_keys"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=uuid.uuid4)
    user_id: Mapped[int] = mapped_column(ForeignKey(User.id))
    name: Mapped[str] = mapped_column(String(64))
    key_hash: Mapped[str] = mapped_column(String(64), unique=True)
    permissions: Mapped[list[str]] = encrypted(
        MutableList.as_mutable(EncryptedJSON("api_permissions")), MutableList.as_mutable(_jsonb())
    )
    usage_stats: Mapped[dict[str, int] | None] = encrypted(
        MutableDict.as_mutable(EncryptedJSON("api_usage")), MutableDict.as_mutable(_jsonb())
    )
    is_active: Mapped[bool] = mapped_column(default=True)
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
