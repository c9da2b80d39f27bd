"""The runbook has an entry for whatever the package may tell an operator, and none for what it does not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import pytest

from alphapulse_encryption_tests.docs import messages
from alphapulse_encryption_tests.docs.messages import VARIES, Message
from alphapulse_encryption_tests.docs.pages import Page, page, pages

# A phrase of fewer letters would be found by chance.
SHORTEST = 12

# Errors that carry another one's text, or what a library calls its own.
ELSEWHERE = {
    "defs/alerts/delivery.py",
    "defs/assets/by_table.py",
    "defs/jobs/single_op.py",
    "defs/jobs/validation.py",
    "migration/gates/beginning.py",
    "migration/schema/definition.py",
    "orm/types.py",
    "settings.py",
}

# Looked for when a test asks: every process that collects the tests loads this module, and seconds go into it.
modules = functools.cache(messages.parsed)


@functools.cache
def errors() -> tuple[Message, ...]:
    return tuple(messages.errors(modules()))


def refusals() -> list[Message]:
    return [
        *errors(),
        *messages.findings(modules(), "migration/gates/beginning.py"),
        *messages.findings(modules(), "migration/gates/data_path.py"),
        *messages.findings(modules(), "migration/gates/preflight.py"),
        *messages.findings(modules(), "migration/gates/surroundings.py"),
        *messages.reasons(modules(), "migration/rows/verify.py"),
        *messages.reasons(modules(), "migration/schema/dependants.py"),
        *messages.yielded(modules(), "migration/rows/problems.py"),
        *messages.yielded(modules(), "migration/schema/contents.py"),
        *messages.carried_by("Refusal", modules(), 1),
        *(m for m in messages.returned(modules(), "crypto/keys.py") if not m.text.startswith("KeyRing")),
    ]


def alerts() -> list[Message]:
    return [
        *messages.findings(modules(), "migration/insight/drift.py"),
        *messages.findings(modules(), "migration/insight/overdue.py"),
        *messages.findings(modules(), "defs/alerts/"),
        # Why a backfill holds back.
        *messages.carried_by("Stop", modules()),
        *messages.returned(modules(), "crypto/usage.py"),
    ]


def phrases(of: Page) -> set[str]:
    """What the first cells of its tables have in backquotes."""
    found = set()
    for first, *_ in of.rows():
        found |= {messages.plain(text) for text in first.split("`")[1::2]}
    return found - {""}


def sentences(of: Page) -> set[str]:
    """Of those, what is long enough to be part of a message and nothing else."""
    return {phrase for phrase in phrases(of) if " " in phrase and letters(phrase) >= SHORTEST}


def has_entry(message: Message, among: Iterable[str]) -> bool:
    return any(phrase in message.text for phrase in among)


def letters(phrase: str) -> int:
    return len(phrase.replace(VARIES, "").strip())


@pytest.mark.parametrize(
    ("name", "ask"), [("docs/messages.md", refusals), ("docs/alerts.md", alerts)], ids=["messages", "alerts"]
)
def test_every_message_has_its_entry_and_every_entry_its_message(
    name: str, ask: Callable[[], list[Message]]
) -> None:
    of = page(name)
    told = ask()
    known = phrases(of)
    texts = {message.text for message in told}
    # A page of its own may say what its messages mean.
    everywhere = known.union(*(sentences(other) for other in pages()))
    without = [f"{m.place} {m.kind}: {m.text}" for m in told if m.text and not has_entry(m, everywhere)]
    assert not without, f"no table of {name}, or of a page of its own, has a row for:\n" + "\n".join(without)
    # The problems of single values, and what is met elsewhere, are tables of their own.
    stale = {p for p in known if not any(p in text for text in texts)} - _of_other_tables(of)
    assert not stale, f"{name} has entries for what is not said any more: {sorted(stale)}"
    short = {p for p in known - _of_other_tables(of) if letters(p) < SHORTEST and p not in texts}
    assert not short, f"{name}: too short to tell messages apart: {sorted(short)}"


def _of_other_tables(of: Page) -> set[str]:
    return {cell for first, *_ in of.rows() for cell in first.split("`")[1::2] if " " not in cell}


def test_no_message_is_overlooked() -> None:
    found = errors()
    # Every class is seen in use, and of nearly every use the text is known.
    assert {"RefusedError", "ConfigurationError", "MigrationError", "KeyExhausted", "DatabaseFailure"} <= {
        message.kind for message in found
    }
    assert len(found) > 250
    unknown = [message.place for message in found if not message.text]
    assert {place.partition(":")[0] for place in unknown} <= ELSEWHERE, unknown
    assert len(alerts()) > 15


def test_a_message_that_is_new_is_missed() -> None:
    source = 'class NewError(RefusedError): ...\nraise NewError(f"The moon is {phase} tonight.")'
    known = messages.with_module({"errors.py": modules()["errors.py"]}, "new.py", source)
    (message,) = messages.errors(known)
    assert message.text == "The moon is … tonight."
    assert not has_entry(message, phrases(page("docs/messages.md")))
