"""What a plaintext column refuses because of its type, so that its ciphertext does not hold what it could not."""

from __future__ import annotations

import math
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

from sqlalchemy import BigInteger, Integer, Numeric, SmallInteger, String
from sqlalchemy.types import TypeEngine


class Limit(NamedTuple):
    """Limits on a value's text form; None is none.

    Args:
        characters: of `varchar(n)`.
        text: whether it is text, which holds no NUL (PostgreSQL manual, section 8.3).
        whole_digits: before the decimal point, of `numeric(precision, scale)`.
        bits: of an integer.
    """

    characters: int | None = None
    text: bool = False
    whole_digits: int | None = None
    bits: int | None = None

    def problem(self, text: str) -> str | None:
        """What is wrong with a value, in words that do not quote it; None if nothing is."""
        if self.text and "\x00" in text:
            return "text cannot hold a NUL character"
        if self.characters is not None and len(text) > self.characters:
            return f"the value is longer than {self.characters} characters"
        if self.whole_digits is not None and _whole_digits(text) > self.whole_digits:
            return f"the value has more than {self.whole_digits} digits before the decimal point"
        if self.bits is not None and not -(2 ** (self.bits - 1)) <= int(text) < 2 ** (self.bits - 1):
            return f"the value is out of the range of an integer of {self.bits} bits"
        return None


def limit_of(plaintext: TypeEngine[Any]) -> Limit:
    """The limits of a plaintext column of that type."""
    if isinstance(plaintext, String):
        return Limit(characters=plaintext.length, text=True)
    if isinstance(plaintext, Numeric) and plaintext.asdecimal and plaintext.precision is not None:
        return Limit(whole_digits=plaintext.precision - (plaintext.scale or 0))
    if isinstance(plaintext, Integer):
        small, big = isinstance(plaintext, SmallInteger), isinstance(plaintext, BigInteger)
        return Limit(bits=16 if small else 64 if big else 32)
    return Limit()


def _whole_digits(text: str) -> float:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return 0
    # NaN fits every numeric; PostgreSQL refuses infinity where there is a precision.
    if number.is_infinite():
        return math.inf
    return max(number.adjusted() + 1, 0) if number.is_finite() and number else 0
