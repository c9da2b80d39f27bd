"""What was told already: kept in a sensor's cursor, so that a thing is told when it begins, changes and ends.

Each channel has an account of its own: one that could not be reached is told the next time, and the others are not told
twice. The cursor holds names and times, never a value.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, PrivateAttr, ValidationError

from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight.overdue import Mark

# One message does not tell more than this; the rest comes with the next.
MOST_TOLD_AT_ONCE = 30


@dataclass(frozen=True)
class Standing:
    """Something that is so.

    Args:
        since: when a look found it first.
        settles: how long it has to be away to be over.
        absent_since: since when no look has found it, while that may be a pause.
    """

    since: datetime
    settles: timedelta = timedelta()
    absent_since: datetime | None = None


@dataclass(frozen=True)
class Told:
    """What a channel was told last of a finding, and when; of a silent one its end need not be told."""

    title: str
    state: str
    at: datetime
    silent: bool = False


@dataclass(frozen=True)
class Item:
    """A finding, and when a look found it first."""

    finding: Alert
    first_seen: datetime


@dataclass(frozen=True)
class News:
    """What a channel is to be told now.

    Args:
        begun: not told of before.
        changed: in another state than when it was told.
        reminded: as it was, for a long time.
        ended: what was told is over: keys, with what was told.
        left: how many more there are, for the next message.
    """

    begun: tuple[Item, ...] = ()
    changed: tuple[Item, ...] = ()
    reminded: tuple[Item, ...] = ()
    ended: tuple[tuple[str, Told], ...] = ()
    left: int = 0

    def __bool__(self) -> bool:
        return bool(self.begun or self.changed or self.reminded or self.ended)


class Ledger(BaseModel):
    """What stands, and what each channel was told of it.

    Args:
        standing: by the findings' keys.
        told: by channel, by the findings' keys.
        marks: moments in the database's reckoning, for those who ask how old something is; the oldest first.
    """

    version: Literal[2] = 2
    standing: dict[str, Standing] = {}
    told: dict[str, dict[str, Told]] = {}
    marks: list[Mark] = []
    _found: list[Alert] = PrivateAttr(default_factory=list)

    @classmethod
    def load(cls, cursor: str | None) -> Self:
        """From a sensor's cursor; one that is not ours, or is damaged, counts as none."""
        try:
            return cls.model_validate_json(cursor or "{}")
        except ValidationError:
            return cls()

    def dump(self) -> str:
        """The cursor to keep."""
        return self.model_dump_json()

    def looked(self, findings: Iterable[Alert], now: datetime, *, blind: Alert | None = None) -> None:
        """A look found this.

        Args:
            blind: in place of them, why nobody could look: what stood before is neither there nor over then.
        """
        self._found = [blind] if blind is not None else list(findings)
        found = {finding.key: finding for finding in self._found}
        for key, finding in found.items():
            before = self.standing.get(key)
            since = now if before is None else before.since
            self.standing[key] = Standing(since, finding.settles)
        if blind is not None:
            return
        for key in set(self.standing) - set(found):
            before = self.standing[key]
            absent = before.absent_since or now
            if now - absent < before.settles:
                self.standing[key] = replace(before, absent_since=absent)
            else:
                del self.standing[key]

    def news(self, channel: str, now: datetime, remind_after: timedelta) -> News:
        """What a channel has not been told."""
        told = self.told.get(channel, {})
        begun, changed, reminded = list[Item](), list[Item](), list[Item]()
        for finding in self._found:
            item = Item(finding, self.standing[finding.key].since)
            before = told.get(finding.key)
            if before is None:
                if now - item.first_seen >= finding.waits:
                    begun.append(item)
            elif before.state != finding.state:
                changed.append(item)
            elif finding.reminds and now - before.at >= remind_after:
                reminded.append(item)
        ended = [(k, told[k]) for k in sorted(told) if k not in self.standing and not told[k].silent]
        return _at_most(News(tuple(begun), tuple(changed), tuple(reminded), tuple(ended)))

    def delivered(self, channel: str, news: News, now: datetime) -> None:
        """A channel was told."""
        told = self.told.setdefault(channel, {})
        for item in (*news.begun, *news.changed, *news.reminded):
            finding = item.finding
            told[finding.key] = Told(finding.subject, finding.state, now, finding.ends_silently)
        for key, _ in news.ended:
            del told[key]

    def only(self, channels: Iterable[str]) -> None:
        """Forget channels that are not there any more, and what needs no words at its end."""
        for channel in set(self.told) - set(channels):
            del self.told[channel]
        for told in self.told.values():
            for key in [key for key, entry in told.items() if entry.silent and key not in self.standing]:
                del told[key]


def _at_most(news: News) -> News:
    room, kept = MOST_TOLD_AT_ONCE, dict[str, tuple[Any, ...]]()
    for part in ("begun", "changed", "ended", "reminded"):
        entries = getattr(news, part)
        kept[part] = entries[: max(room, 0)]
        room -= len(entries)
    return News(**kept, left=max(-room, 0))


def add_mark(marks: list[Mark], mark: Mark, length: timedelta) -> list[Mark]:
    """Keep a mark, and of those before as few as will do to have one that is about ``length`` old.

    Args:
        marks: the oldest first.
        mark: of now.
        length: how far back the oldest one that is needed lies.
    """
    kept = [*marks, mark] if not marks or mark.at - marks[-1].at >= length / 12 else list(marks)
    # The newest one that is old enough is all that is needed of the old ones.
    old = [m for m in kept if mark.at - m.at >= length]
    return kept[len(old) - 1 :] if old else kept
