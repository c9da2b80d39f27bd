"""What a look at the database found that a person should know of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta


@dataclass(frozen=True)
class Finding:
    """Something that a person should know of. All of its words are ours, and the names of tables and columns.

    Args:
        key: tells it from all others, from one look to the next.
        title: in a few words, what it is about; this is what is said when it is over.
        what: a sentence: what is wrong, and where.
        remedy: what to do, with the command.
        state: another one than before means that it changed, so that it is told of again.
        since: from when on it is so, where the database knows; None where only the look can tell.
        waits: not told of before it has stood for so long.
        settles: not over before it has been away for so long: what comes and goes is told of once.
        reminds: whether it is worth telling again while it stands.
        ends_silently: whether nobody needs to hear that it is over.
    """

    key: str
    title: str
    what: str
    remedy: str
    state: str = ""
    since: datetime | None = None
    waits: timedelta = timedelta()
    settles: timedelta = timedelta()
    reminds: bool = True
    ends_silently: bool = False
