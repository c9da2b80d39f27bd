"""What a plaintext column refuses because of its type, so that its ciphertext does not hold what it could not."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Any

from sqlalchemy import BigInteger, Integer, Numeric, SmallInteger, String
from sqlalchemy.types import TypeEngine


def problem_of(text: str, plaintext: TypeEngine[Any]) -> str | None:
    """Why a column of a type cannot hold a value, given in its text form, in words that do not quote it; or None."""
    if isinstance(plaintext, String):
        if "\x00" in text:
            return "text cannot hold a NUL character"
        if plaintext.length is not None and len(text) > plaintext.length:
            return f"the value is longer than {plaintext.length} characters"
    elif isinstance(plaintext, Numeric) and plaintext.asdecimal and plaintext.precision is not None:
        digits = plaintext.precision - (plaintext.scale or 0)
        if _whole_digits(text) > digits:
            return f"the value has more than {digits} digits before the decimal point"
    elif isinstance(plaintext, Integer):
        small, big = isinstance(plaintext, SmallInteger), isinstance(plaintext, BigInteger)
        bits = 16 if small else 64 if big else 32
        if not -(2 ** (bits - 1)) <= int(text) < 2 ** (bits - 1):
            return f"the value is out of the range of an integer of {bits} bits"
    return None


def _whole_digits(text: str) -> float:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return 0
    # NaN fits every numeric; PostgreSQL refuses infinity where there is a precision.
    if number.is_infinite():
        return math.inf
    return max(number.adjusted() + 1, 0) if number.is_finite() and number else 0
