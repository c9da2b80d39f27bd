"""What a verification advises is typed as it stands, and helps."""

from __future__ import annotations

import re

import pytest

from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place

TABLE = "crm.Kunde"
NEW = {"ALPHAPULSE_ENCRYPTION_KEY_VERSION": "2"}
ROW = ' WHERE "KundenNr" = 7'


def behind(url: str, assignments: str, *values: object) -> None:
    with support.application(url) as connection:
        connection.execute(support.BEHIND)
        connection.execute(f'UPDATE crm."Kunde" SET {assignments}{ROW}'.encode(), [*values])


def advised(theirs: Place) -> list[list[str]]:
    """The commands in what is printed by a verification that fails."""
    text = theirs.fails(1, "--verify", "--table", TABLE, **NEW).stdout
    commands = [found.split() for found in re.findall(r"\((--[^()]* --table \S+)\)", text)]
    assert commands, text
    return commands


@pytest.fixture
def rotated(theirs: Place) -> Place:
    """Under version 2; version 1 is retired."""
    theirs.succeeds("--add-columns", "--migrate-data", "--table", TABLE)
    theirs.succeeds("--rotate-keys", **NEW)
    return theirs


def test_each_is_typed(rotated: Place) -> None:
    old = independent.derive(another.MASTER_KEY, "customer_mail", 1)
    retired = independent.seal(old, bytes(12), "kunde7@example.org", "customer_mail", 1)
    unknown = independent.seal(old, bytes(12), "kunde7@example.org", "customer_mail", 9)
    mail, token = '"E-Mail_encrypted" = %s', '"E-Mail_search" = %s'
    for assignments, values in (
        (f"{mail}, {token}", (retired, independent.token(old, "kunde7@example.org"))),
        (mail, (unknown,)),
        (token, ("another",)),
        (mail, (None,)),
    ):
        behind(rotated.url, assignments, *values)
        for command in advised(rotated):
            rotated.succeeds(*command, **NEW)
        rotated.succeeds("--verify", "--table", TABLE, **NEW)
        assert another.decrypted(rotated.url, TABLE, 2) == another.plaintexts(rotated.url, TABLE)


def test_nothing_is_repaired_after_the_switch(rotated: Place) -> None:
    rotated.succeeds("--verify", "--switch-to-encrypted", "--table", TABLE, **NEW)
    behind(rotated.url, '"E-Mail_encrypted" = %s', "no envelope")
    assert not any("--repair-mismatched" in command for command in advised(rotated))
    # What it refuses tells where to look.
    refused = rotated.fails(1, "--repair-mismatched", "--table", TABLE, **NEW).stdout
    assert f"--verify --table {TABLE}" in refused
