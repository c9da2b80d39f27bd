"""Figures as a person reads them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from alphapulse_encryption.migration.insight.estimates import Span

# An en dash: nothing is to be read as a minus.
UNKNOWN = "\u2013"
_MINUTE, _HOUR, _DAY = 60, 3600, 86_400
_CENTURY = 36_525 * _DAY
_UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def duration(seconds: float | None) -> str:
    """A duration, as exact as anybody needs it: ``0.4 s``, ``48 s``, ``12 min``, ``3 h 20 min``, ``2 days 4 h``."""
    if seconds is None or math.isnan(seconds):
        return "unknown"
    if seconds >= _CENTURY:
        return "more than 100 years"
    if seconds < 0.05:
        return "0 s" if seconds <= 0 else "< 0.1 s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 2 * _MINUTE:
        return f"{seconds:.0f} s"
    if seconds < 2 * _HOUR:
        return f"{seconds / _MINUTE:.0f} min"
    if seconds < 2 * _DAY:
        hours, minutes = divmod(round(seconds / _MINUTE), 60)
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(round(seconds / _HOUR), 24)
    return f"{days:,} days {hours} h" if hours else f"{days:,} days"


def size(amount: float | None) -> str:
    """An amount of bytes, in powers of 1024 as PostgreSQL counts them: ``12 MB``."""
    if amount is None or math.isnan(amount):
        return "unknown"
    sign, left = ("-" if amount < 0 else ""), abs(amount)
    for unit in _UNITS:
        if left < 1024 or unit == _UNITS[-1]:
            digits = 1 if left < 9.95 and unit != _UNITS[0] else 0
            return f"{sign}{min(left, 1e9):,.{digits}f} {unit}"
        left /= 1024
    raise AssertionError


def number(amount: float | None) -> str:
    """A number with separators, to three digits or so."""
    if amount is None or math.isnan(amount):
        return UNKNOWN
    if math.isinf(amount):
        return "∞"
    if amount == int(amount) or abs(amount) >= 100:
        return f"{amount:,.0f}" if abs(amount) < 1e15 else f"{amount:.2e}"
    return f"{amount:,.1f}" if abs(amount) >= 10 else f"{amount:,.2f}"


def number_or_nothing(amount: float) -> str:
    """As :func:`number`, where a zero says nothing."""
    return number(amount) if amount else ""


def milliseconds(amount: float | None) -> str:
    """A latency in milliseconds, without the unit."""
    if amount is None or math.isnan(amount):
        return UNKNOWN
    if amount >= 1e9:
        return "> 10⁹"
    return f"{amount:,.0f}" if amount >= 99.5 else f"{amount:.1f}"


def span_of_time(span: Span) -> str:
    low, high = duration(span.low), duration(span.high)
    return low if low == high else f"{low} to {high}"


def span_of_size(span: Span) -> str:
    low, high = size(span.low), size(span.high)
    return low if low == high else f"{low} to {high}"


def moment(at: datetime) -> str:
    """A time, to the minute."""
    return in_utc(at).strftime("%Y-%m-%d %H:%M UTC")


def in_utc(at: datetime) -> datetime:
    """The time in UTC; one without a time zone is taken as such."""
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


def share(part: float | None) -> str:
    """A share as a percentage, with its sign."""
    if part is None or math.isnan(part):
        return UNKNOWN
    if part >= 1e4:
        return "> +1,000,000 %"
    return f"{part * 100:+,.0f} %"
