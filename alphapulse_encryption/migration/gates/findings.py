"""What a look at the database found that a person should know of: the checklist, the plan and the alerts tell it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from pydantic import ConfigDict

from alphapulse_encryption.visible import visible

Level = Literal["ok", "warning", "blocker"]
SIGNS = {"ok": "✓", "warning": "!", "blocker": "✗"}


@dataclass(frozen=True)
class Finding:
    """A line of the checklist, or something that a later step will refuse."""

    # All words are ours, and the names of tables and columns.
    level: Level
    subject: str
    message: str

    # Documents hold findings as they are.
    __pydantic_config__ = ConfigDict(extra="forbid")

    def __str__(self) -> str:
        return visible(f"{SIGNS[self.level]} {self.subject}: {self.message}").replace("\n", "\\n")


@dataclass(frozen=True)
class Checked(Finding):
    """A line of the checklist."""

    # About the role that asks, and not so for another one.
    of_role: bool = False
    # About the entry that the migration was begun with, and not so for a proposed one.
    of_entry: bool = False


@dataclass(frozen=True, kw_only=True)
class Alert(Finding):
    """What somebody is told of when it begins, changes and ends.

    Args:
        subject: in a few words, what it is about; this is what is said when it is over.
        message: a sentence: what is wrong, and where.
        key: tells it from all others, from one look to the next.
        remedy: what to do, with the command.
        state: another one than before means that it changed, so that it is told of again.
        since: from when on it is so, where the database knows; None where only the look can tell.
        waits: not told of before it has stood for so long.
        settles: not over before it has been away for so long: what comes and goes is told of once.
        reminds: whether it is worth telling again while it stands.
        ends_silently: whether nobody needs to hear that it is over.
    """

    level: Level = field(default="warning", init=False)
    key: str
    remedy: str
    state: str = ""
    since: datetime | None = None
    waits: timedelta = timedelta()
    settles: timedelta = timedelta()
    reminds: bool = True
    ends_silently: bool = False
