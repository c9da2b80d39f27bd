"""What was told already: kept in a sensor's cursor, so that a thing is told when it begins, changes and ends.

Each channel has an account of its own: one that could not be reached is told the next time, and the others are not told
twice. The cursor holds names and times, never a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal, Self

from pydantic import BaseModel, PrivateAttr, ValidationError

from alphapulse_encryption.defs.alerts.wording import KINDS, MOST_TOLD_AT_ONCE, Kind, News, line, moment
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight.overdue import Mark


@dataclass(frozen=True)
class Standing:
    """Something that is so since a look found it first, until no look has found it for as long as it settles."""

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


class Ledger(BaseModel):
    """What stands, and what each channel was told of it, by the findings' keys.

    Its marks, the oldest first, are for those who ask how old something is.
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
        """A look found this; or, where nobody could look, why: what stood before is neither there nor over then."""
        self._found = [blind] if blind is not None else list(findings)
        found = {finding.key: finding for finding in self._found}
        for key, finding in found.items():
            before = self.standing.get(key, Standing(now))
            self.standing[key] = Standing(before.since, finding.settles)
        if blind is not None:
            return
        for key in set(self.standing) - set(found):
            before = self.standing[key]
            absent = before.absent_since or now
            if now - absent < before.settles:
                self.standing[key] = replace(before, absent_since=absent)
            else:
                del self.standing[key]

    def news(self, channel: str, now: datetime, remind_after: timedelta) -> list[News]:
        """What a channel has not been told, in the order of a message."""
        told = self.told.get(channel, {})
        news = [
            News("over", key, f"{before.title} (told of at {moment(before.at)})")
            for key, before in sorted(told.items())
            if key not in self.standing and not before.silent
        ]
        for finding in self._found:
            since = self.standing[finding.key].since
            before = told.get(finding.key)
            kind: Kind
            if before is None:
                kind, due = "new", now - since >= finding.waits
            elif before.state != finding.state:
                kind, due = "changed", True
            else:
                kind, due = "as before", finding.reminds and now - before.at >= remind_after
            if due:
                news.append(News(kind, finding.key, line(finding, since), finding))
        return sorted(news, key=lambda one: KINDS.index(one.kind))

    def delivered(self, channel: str, news: Sequence[News], now: datetime) -> None:
        """A channel was told, as much as one message holds."""
        told = self.told.setdefault(channel, {})
        for one in news[:MOST_TOLD_AT_ONCE]:
            if one.finding is None:
                del told[one.key]
            else:
                finding = one.finding
                told[one.key] = Told(finding.subject, finding.state, now, finding.ends_silently)

    def only(self, channels: Iterable[str]) -> None:
        """Forget channels that are not there any more, and what needs no words at its end."""
        for channel in set(self.told) - set(channels):
            del self.told[channel]
        for told in self.told.values():
            for key in [key for key, entry in told.items() if entry.silent and key not in self.standing]:
                del told[key]


def add_mark(marks: list[Mark], mark: Mark, length: timedelta) -> list[Mark]:
    """Keep a mark, and of those before as few as will do to have one that is about ``length`` old.

    The marks are the oldest first.
    """
    kept = [*marks, mark] if not marks or mark.at - marks[-1].at >= length / 12 else list(marks)
    # The newest one that is old enough is all that is needed of the old ones.
    old = [m for m in kept if mark.at - m.at >= length]
    return kept[len(old) - 1 :] if old else kept
