"""What has to be so of what preflight prints of a database with one of everything, on whatever server that is."""

from __future__ import annotations

import json
import re
from collections import Counter

import psycopg

from alphapulse_encryption_tests.docs.messages import plain
from alphapulse_encryption_tests.docs.pages import page
from alphapulse_encryption_tests.docs.test_messages import phrases
from alphapulse_encryption_tests.everything.things import Thing, known
from alphapulse_encryption_tests.place import Place

SIGNS = {"✗": "blocker", "!": "warning", "✓": "ok"}
# A statement, an option, or a setting of the catalogue: something that a person can type.
TO_TYPE = re.compile(
    r"\b(ALTER|ANALYZE|CREATE|DROP|GRANT|REINDEX|SELECT|VACUUM) [A-Z\"a-z]|--[a-z]+"
    r"|\b(hide|adopt|search_index)\b|the catalogue"
)
Found = tuple[str, str, str]


def printed(text: str) -> list[Found]:
    """The findings of what is printed for a person."""
    lines = re.findall(r"^  ([✗!✓]) (.+?): (.*)$", text, re.MULTILINE)
    return [(SIGNS[sign], subject, message) for sign, subject, message in lines]


def preflight_tells_all(there: Place) -> None:
    """All of it at once, by name, with what to type, in text and as JSON."""
    with psycopg.connect(there.url) as connection:
        things = known(connection.info.server_version)
    ended = there.fails(1, "--preflight")
    assert ended.stderr == ""
    found = printed(ended.stdout)
    _told_by_name_and_with_what_to_type(things, found)
    _in_groups(ended.stdout, found)
    _explained(found)
    document = json.loads(there.fails(1, "--preflight", "--json").stdout)
    told = [(one["level"], one["subject"], one["message"]) for one in document["report"]["findings"]]
    # How long ago and how much change from one look to the next.
    assert Counter(one[:2] for one in told) == Counter(one[:2] for one in found)
    _told_by_name_and_with_what_to_type(things, told)
    assert ended.stdout.rstrip().endswith(f"Next: {document['next']}")


def _told_by_name_and_with_what_to_type(things: list[Thing], found: list[Found]) -> None:
    silent = [
        thing.name
        for thing in things
        if not any(
            (level, subject) == (thing.level, thing.subject) and all(word in message for word in thing.words)
            for level, subject, message in found
        )
    ]
    assert not silent, "\n".join([f"{silent}", *(" ".join(one) for one in found if one[0] != "ok")])
    vague = [
        f"{subject}: {message}"
        for level, subject, message in found
        if level != "ok" and not TO_TYPE.search(message)
    ]
    assert not vague, "\n".join(vague)


def _in_groups(text: str, found: list[Found]) -> None:
    """Each table's findings are together under its name, the worst first, and counted; then it says what comes next."""
    *lines, total, following = text[text.index("The server") :].rstrip().splitlines()
    heading, ranks = "", list(SIGNS)
    seen: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("  "):
            seen[heading].append(line[2])
            subject = line[4:].partition(": ")[0]
            assert heading.startswith("The server") or f"{subject}.".startswith(f"{heading}."), line
        else:
            heading, _, counts = line.rpartition(": ")
            assert heading not in seen
            seen[heading] = []
            expected = counts
    for heading, signs in seen.items():
        assert signs == sorted(signs, key=ranks.index), heading
    assert expected
    of_all = Counter(level for level, *_ in found)
    assert f"{of_all['blocker']} blockers, {of_all['warning']} warnings" in total
    assert following.startswith("Next: ") and "--preflight" in following


def _explained(found: list[Found]) -> None:
    known = [plain(phrase).split("…") for phrase in phrases(page("docs/messages.md"))]
    unexplained = [
        f"{subject}: {message}"
        for level, subject, message in found
        if level != "ok" and not any(all(part in message for part in parts) for parts in known)
    ]
    assert not unexplained, "\n".join(unexplained)
