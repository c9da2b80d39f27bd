"""What a message says: what, where, since when, and what to do; and what a tick says of its delivery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from alphapulse_encryption.defs.alerts.delivery import Message
from alphapulse_encryption.migration.gates.findings import Alert

COMMAND = "python -m alphapulse_encryption"
# One message does not tell more than this; the rest comes with the next.
MOST_TOLD_AT_ONCE = 30

Kind = Literal["new", "changed", "over", "as before"]
# In the order of a message.
KINDS: tuple[Kind, ...] = ("new", "changed", "over", "as before")


@dataclass(frozen=True)
class News:
    """A line of a message; without a finding where what was told of is over."""

    kind: Kind
    key: str
    text: str
    finding: Alert | None = None


def subject(label: str | None, about: str, what: str) -> str:
    """``AlphaPulse encryption (production), drift: 2 new``."""
    return f"AlphaPulse encryption{f' ({label})' if label else ''}, {about}: {what}"


def written(news: Sequence[News], label: str | None, about: str, link: str | None) -> Message:
    """The message for a channel, with what the database is called and a link to the sensor's page."""
    lines: list[str] = []
    counts: list[str] = []
    told, left = news[:MOST_TOLD_AT_ONCE], len(news) - MOST_TOLD_AT_ONCE
    for kind in KINDS:
        of_kind = [f"- {plain(one.text)}" for one in told if one.kind == kind]
        if of_kind:
            counts.append(f"{len(of_kind)} {kind}")
            lines += [f"{kind.capitalize()}:", *of_kind]
    if left > 0:
        lines.append(f"{left:,} more follow in the next message.")
    if any(one.finding for one in told):
        lines.append(f"Options are those of: {COMMAND}")
    if link:
        lines.append(link)
    return Message(subject(label, about, ", ".join(counts)), "\n".join(lines))


def plain(text: str) -> str:
    """One line of a message: a name of a table may hold anything, a line's end too."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def line(finding: Alert, first_seen: datetime) -> str:
    """What is wrong, since when, and what to do."""
    since = f"Since {moment(finding.since)}." if finding.since else f"First seen at {moment(first_seen)}."
    return f"{finding.message[:1].upper()}{finding.message[1:]} {since} To do: {finding.remedy}"


def moment(at: datetime) -> str:
    """To the minute."""
    return f"{at:%F %R} UTC"


def outcome(results: Mapping[str, str | None], stands: str) -> str:
    """For a tick: what the look found, who was told, and who was not, and why."""
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
