"""What is told when: at the beginning, at a change, once in a while, and at the end; by channel."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from alphapulse_encryption.defs.alerts.ledger import Ledger, add_mark
from alphapulse_encryption.defs.alerts.wording import MOST_TOLD_AT_ONCE, News, written
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight.overdue import Mark

START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MINUTE = timedelta(minutes=1)


def finding(key: str, state: str = "", **more: Any) -> Alert:
    return Alert(f"{key}, in short", f"{key} is wrong.", key=key, remedy=f"Mend {key}.", state=state, **more)


class Sensor:
    """Ticks as Dagster has them: the cursor is all that is kept from one to the next."""

    def __init__(self, *channels: str) -> None:
        self.channels = channels or ("webhook",)
        self.cursor: str | None = None
        self.now = START

    def tick(
        self,
        *found: Alert,
        fails: tuple[str, ...] = (),
        after: timedelta = MINUTE,
        blind: Alert | None = None,
    ) -> dict[str, str]:
        """By channel, what it was told: new, changed, as before and over, by their keys."""
        self.now += after
        ledger = Ledger.load(self.cursor)
        ledger.only(self.channels)
        ledger.looked(found, self.now, blind=blind)
        told = {}
        for channel in self.channels:
            news = ledger.news(channel, self.now, DAY)
            if news:
                told[channel] = said(news)
            if channel not in fails:
                ledger.delivered(channel, news, self.now)
        self.cursor = ledger.dump()
        return told


def said(news: Sequence[News]) -> str:
    told = news[:MOST_TOLD_AT_ONCE]
    words = [f"{one.kind} {one.key}" for one in told if one.finding is not None]
    return ", ".join([*words, *(f"over {one.text.partition(' (')[0]}" for one in told if one.kind == "over")])


def test_once_again_and_over() -> None:
    sensor = Sensor()
    assert sensor.tick() == {}
    assert sensor.tick(finding("a")) == {"webhook": "new a"}
    assert sensor.tick(finding("a")) == {}
    assert sensor.tick(finding("a"), finding("b")) == {"webhook": "new b"}
    assert sensor.tick(finding("a", "worse"), finding("b")) == {"webhook": "changed a"}
    assert sensor.tick(finding("a", "worse"), finding("b"), after=DAY - 2 * MINUTE) == {}
    assert sensor.tick(finding("a", "worse"), finding("b")) == {"webhook": "as before b"}
    assert sensor.tick(finding("a", "worse"), finding("b")) == {"webhook": "as before a"}
    assert sensor.tick(finding("b")) == {"webhook": "over a, in short"}
    assert sensor.tick(finding("b")) == {}
    assert sensor.tick(finding("a"), finding("b")) == {"webhook": "new a"}
    assert sensor.tick() == {"webhook": "over a, in short, over b, in short"}
    assert sensor.tick() == {}


def test_who_was_not_reached_is_told_the_next_time_and_nobody_twice() -> None:
    sensor = Sensor("webhook", "e-mail")
    both = {"webhook": "new a", "e-mail": "new a"}
    assert sensor.tick(finding("a"), fails=("webhook", "e-mail")) == both
    assert sensor.tick(finding("a"), fails=("e-mail",)) == both
    assert sensor.tick(finding("a"), fails=("e-mail",)) == {"e-mail": "new a"}
    assert sensor.tick(finding("a")) == {"e-mail": "new a"}
    # Over before it was ever told of: nobody needs to know.
    assert sensor.tick(finding("a"), finding("b"), fails=("e-mail",)) == {
        "webhook": "new b",
        "e-mail": "new b",
    }
    assert sensor.tick(finding("a")) == {"webhook": "over b, in short"}
    # A channel that comes later is told what stands.
    sensor.channels = ("webhook", "e-mail", "pager")
    assert sensor.tick(finding("a")) == {"pager": "new a"}
    sensor.channels = ("webhook",)
    sensor.tick(finding("a"))
    sensor.channels = ("webhook", "pager")
    assert sensor.tick(finding("a")) == {"pager": "new a"}


def test_what_comes_and_goes_is_told_of_once() -> None:
    flickering = finding("a", settles=15 * MINUTE)
    sensor = Sensor()
    assert sensor.tick(flickering) == {"webhook": "new a"}
    for _ in range(5):
        assert sensor.tick(after=10 * MINUTE) == {}
        assert sensor.tick(flickering) == {}
    assert sensor.tick() == {}
    assert sensor.tick(after=14 * MINUTE) == {}
    assert sensor.tick(after=MINUTE) == {"webhook": "over a, in short"}


def test_what_may_pass_by_itself_is_told_when_it_has_not() -> None:
    patient = finding("a", waits=10 * MINUTE)
    sensor = Sensor()
    assert sensor.tick(patient) == {}
    assert sensor.tick() == {}
    assert sensor.tick(patient) == {}
    assert sensor.tick(patient, after=9 * MINUTE) == {}
    assert sensor.tick(patient) == {"webhook": "new a"}
    assert sensor.tick() == {"webhook": "over a, in short"}


def test_nothing_is_over_while_nobody_can_look() -> None:
    sensor = Sensor()
    sensor.tick(finding("a"))
    assert sensor.tick(blind=finding("look")) == {"webhook": "new look"}
    assert sensor.tick(blind=finding("look")) == {}
    assert sensor.tick(finding("a")) == {"webhook": "over look, in short"}
    assert sensor.tick(blind=finding("look")) == {"webhook": "new look"}
    assert sensor.tick() == {"webhook": "over a, in short, over look, in short"}


def test_what_is_told_once_only() -> None:
    sensor = Sensor()
    once = finding("a", reminds=False, ends_silently=True)
    assert sensor.tick(once) == {"webhook": "new a"}
    assert sensor.tick(once, after=3 * DAY) == {}
    assert sensor.tick() == {}
    assert sensor.tick(once) == {"webhook": "new a"}


def test_many_at_once_come_in_parts() -> None:
    sensor = Sensor()
    every = [finding(f"f{number:03d}") for number in range(MOST_TOLD_AT_ONCE + 5)]
    assert sensor.tick(*every)["webhook"].count("new") == MOST_TOLD_AT_ONCE
    assert sensor.tick(*every)["webhook"].count("new") == 5
    assert sensor.tick(*every) == {}


@pytest.mark.parametrize(
    "cursor",
    [None, "", "nonsense", "[]", "3", "{}", '{"version": 99}', '{"version": 2, "standing": {"a": 1}}'],
)
def test_a_cursor_that_is_not_ours(cursor: str | None) -> None:
    sensor = Sensor()
    sensor.cursor = cursor
    assert sensor.tick(finding("a")) == {"webhook": "new a"}
    assert sensor.tick(finding("a")) == {}


def test_the_words() -> None:
    ledger = Ledger()
    known = finding("a", since=START - DAY)
    ledger.looked([known, finding("b")], START)
    message = written(ledger.news("webhook", START, DAY), "production", "drift", "http://ui/automation")
    assert message.subject == "AlphaPulse encryption (production), drift: 2 new"
    assert message.text.splitlines() == [
        "New:",
        "- A is wrong. Since 2025-12-31 00:00 UTC. To do: Mend a.",
        "- B is wrong. First seen at 2026-01-01 00:00 UTC. To do: Mend b.",
        "Options are those of: python -m alphapulse_encryption",
        "http://ui/automation",
    ]
    ledger.delivered("webhook", ledger.news("webhook", START, DAY), START)
    ledger.looked([], START + DAY)
    message = written(ledger.news("webhook", START + DAY, DAY), None, "drift", None)
    assert message.subject == "AlphaPulse encryption, drift: 2 over"
    assert message.text.splitlines()[:2] == ["Over:", "- a, in short (told of at 2026-01-01 00:00 UTC)"]


def test_a_name_that_would_be_a_line_of_its_own() -> None:
    ledger = Ledger()
    ledger.looked([finding("a\n- b\u2028\x1b[1m c")], START)
    message = written(ledger.news("webhook", START, DAY), None, "drift", None)
    assert message.text.splitlines()[1].startswith("- A - b [1m c is wrong. First seen")
    assert len(message.text.splitlines()) == 3


def test_marks_are_few_and_one_is_old_enough() -> None:
    marks: list[Mark] = []
    for minute in range(300):
        now = START + minute * MINUTE
        marks = add_mark(marks, Mark(now, minute), timedelta(hours=1))
        assert len(marks) <= 14
        # The oldest is never much older than asked for, once there is one that old.
        age = now - marks[0].at
        assert age <= timedelta(minutes=66)
        assert minute < 60 or age >= timedelta(hours=1)
    ledger = Ledger(marks=marks)
    assert Ledger.load(ledger.dump()).marks == marks
