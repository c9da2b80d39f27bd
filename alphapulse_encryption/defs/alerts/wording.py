"""What a message says: what, where, since when, and what to do; and what a tick says of its delivery."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from alphapulse_encryption.defs.alerts.delivery import Message
from alphapulse_encryption.defs.alerts.ledger import Item, News

COMMAND = "python -m alphapulse_encryption"


def subject(label: str | None, about: str, what: str) -> str:
    """``AlphaPulse encryption (production), drift: 2 new``."""
    return f"AlphaPulse encryption{f' ({label})' if label else ''}, {about}: {what}"


def written(news: News, label: str | None, about: str, link: str | None) -> Message:
    """The message for a channel.

    Args:
        label: what the database is called.
        link: to the sensor's page; None for no link.
    """
    lines: list[str] = []
    counts: list[str] = []
    over = [f"{told.title} (told of at {_moment(told.at)})" for _, told in news.ended]
    for heading, count, entries in (
        ("New:", "new", [_line(item) for item in news.begun]),
        ("Changed:", "changed", [_line(item) for item in news.changed]),
        ("Over:", "over", over),
        ("As before:", "as before", [_line(item) for item in news.reminded]),
    ):
        if entries:
            counts.append(f"{len(entries)} {count}")
            lines += [heading, *(f"- {plain(entry)}" for entry in entries)]
    if news.left:
        lines.append(f"{news.left:,} more follow in the next message.")
    if news.begun or news.changed or news.reminded:
        lines.append(f"Options are those of: {COMMAND}")
    if link:
        lines.append(link)
    return Message(subject(label, about, ", ".join(counts)), "\n".join(lines))


def plain(text: str) -> str:
    """One line of a message: a name of a table may hold anything, a line's end too."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _line(item: Item) -> str:
    finding = item.finding
    since = (
        f"Since {_moment(finding.since)}." if finding.since else f"First seen at {_moment(item.first_seen)}."
    )
    return f"{finding.message[:1].upper()}{finding.message[1:]} {since} To do: {finding.remedy}"


def _moment(at: datetime) -> str:
    return f"{at:%F %R} UTC"


def outcome(results: Mapping[str, str | None], stands: str) -> str:
    """For a tick: who was told, and who was not.

    Args:
        results: by channel, why a message did not arrive; None where it did.
        stands: what the look found, in words.
    """
    told = [name for name, problem in results.items() if problem is None]
    missed = [f"{name} ({problem})" for name, problem in results.items() if problem is not None]
    parts = [stands[:1].upper() + stands[1:]]
    if missed:
        parts.append(f"NOT DELIVERED by {' and '.join(missed)}; tried again at the next tick")
    if told:
        parts.append(f"told by {' and '.join(told)}")
    if not results:
        parts.append("nothing new to tell")
    return "; ".join(parts) + "."
