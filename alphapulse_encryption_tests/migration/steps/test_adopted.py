"""Envelopes and tokens that the application has written before: kept, verified by value, and never overwritten."""

from __future__ import annotations

import re

import pytest

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.repair import repair_mismatched
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run

MAIL = Column(name="mail", context="test_search", search_index="idx_mail", adopt=True)
ENTRY = support.table("notes", MAIL, "secret")
KEPT = "SELECT id, mail_encrypted, mail_search FROM notes WHERE id <= 30 ORDER BY id"


@pytest.fixture
def notes_url(database_url: str) -> str:
    """Thirty rows of a hundred are the application's own already; ten more have their token alone."""
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text, mail_encrypted text, "
        "mail_search varchar(255))",
    )
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, 's' || i FROM generate_series(1, 100) AS i")
    for i in range(1, 41):
        envelope = support.seal(f"m{i}", "test_search") if i <= 30 else None
        write(database_url, i, envelope, support.token(f"m{i}", "test_search"))
    return database_url


def write(url: str, row: int, envelope: str | None, token: str | None) -> None:
    """As the application does that keeps both sides."""
    statement = "UPDATE notes SET mail = mail, mail_encrypted = %s, mail_search = %s WHERE id = %s"
    run(url, statement, envelope, token, row)


def blockers(url: str) -> list[str]:
    return [str(finding) for finding in check(Database(url), [ENTRY], support.KEYS).blockers]


def warnings(url: str) -> list[str]:
    return [str(finding) for finding in check(Database(url), [ENTRY], support.KEYS).warnings]


def test_only_what_is_missing_is_encrypted(notes_url: str) -> None:
    assert blockers(notes_url) == []
    before, rows = run(notes_url, KEPT), support.fingerprints(notes_url, ENTRY)
    tokens = run(notes_url, "SELECT id, mail_search FROM notes WHERE id <= 40 ORDER BY id")
    result = support.add_columns(notes_url, ENTRY)
    assert (result.added, result.existing) == (("secret_encrypted",), ("mail_encrypted", "mail_search"))
    assert support.fingerprints(notes_url, ENTRY) == rows
    support.backfill_all(notes_url, ENTRY)
    assert run(notes_url, KEPT) == before
    assert run(notes_url, "SELECT id, mail_search FROM notes WHERE id <= 40 ORDER BY id") == tokens
    assert support.assert_encrypted(notes_url, ENTRY) == 200
    assert support.verify(notes_url, ENTRY).passed


def test_an_envelope_without_its_token_is_kept(notes_url: str) -> None:
    run(notes_url, "UPDATE notes SET mail_search = NULL WHERE id <= 30")
    before = run(notes_url, "SELECT id, mail_encrypted FROM notes WHERE id <= 30 ORDER BY id")
    support.encrypt(notes_url, ENTRY)
    assert run(notes_url, "SELECT id, mail_encrypted FROM notes WHERE id <= 30 ORDER BY id") == before
    assert support.assert_encrypted(notes_url, ENTRY) == 200


@pytest.mark.parametrize(
    ("envelope", "named"),
    [
        ("no envelope", "do not open"),
        ("of another context", "do not open"),
        ("of another key", "do not open"),
        ("without plaintext", "no plaintext"),
    ],
)
def test_what_does_not_open_is_not_adopted(notes_url: str, envelope: str, named: str) -> None:
    if envelope == "of another context":
        envelope = support.seal("m7", "another_context")
    if envelope == "of another key":
        envelope = independent.seal(bytes(32), bytes(12), "m7", "test_search", 1)
    if envelope == "without plaintext":
        run(notes_url, "UPDATE notes SET mail = NULL WHERE id = 7")
    else:
        write(notes_url, 7, envelope, support.token("m7", "test_search"))
    before = run(notes_url, "SELECT * FROM notes ORDER BY id")
    with pytest.raises(ConfigurationError, match=rf"(?s)notes.*mail_encrypted {named}|{named}.*Nothing was"):
        support.add_columns(notes_url, ENTRY)
    assert run(notes_url, "SELECT * FROM notes ORDER BY id") == before
    assert support.value(notes_url, "SELECT to_regnamespace('alphapulse_encryption')") is None
    (told,) = blockers(notes_url)
    assert "notes.mail" in told
    assert named in told


def test_another_token_is_told_and_stays(notes_url: str) -> None:
    """Neither backfill nor repair replaces what the application looks up by."""
    write(notes_url, 7, support.seal("m7", "test_search"), "the application's own")
    write(notes_url, 35, None, "as well")
    assert any("1 of 30" in told and "mail_search" in told for told in warnings(notes_url))
    before = run(notes_url, KEPT)
    support.encrypt(notes_url, ENTRY)
    found = support.verify(notes_url, ENTRY)
    assert [str(o) for o in found.offenders] == [f"mail token_mismatched at key ({key})" for key in (7, 35)]
    assert not repair_mismatched(support.target(notes_url), ENTRY).changed
    support.backfill_all(notes_url, ENTRY)
    assert run(notes_url, KEPT) == before
    assert support.value(notes_url, "SELECT mail_search FROM notes WHERE id = 35") == "as well"
    # What a repair does not touch is not said to be repaired; and what is said helps.
    (advised,) = found.advice
    assert "--repair-mismatched" not in advised
    (statement,) = re.findall(r"\((UPDATE .*?)…\)", advised)
    for row in (7, 35):
        run(notes_url, f"{statement}id = {row}")
    support.backfill_all(notes_url, ENTRY)
    assert support.verify(notes_url, ENTRY).passed


@pytest.mark.parametrize(
    "second", [bytes(32), support.MASTER_KEY], ids=["its own master key", "one master key"]
)
def test_a_rotation_keeps_another_token(notes_url: str, second: bytes) -> None:
    """It encrypts the value again, and replaces the tokens that are ours, of whatever version."""
    write(notes_url, 7, support.seal("m7", "test_search"), "the application's own")
    of_next = independent.token(independent.derive(second, "test_search", 2), "m8")
    write(notes_url, 8, support.seal("m8", "test_search"), of_next)
    support.encrypt(notes_url, ENTRY)
    write(notes_url, 9, support.seal("m9", "test_search"), None)
    keys = KeyRing({1: support.MASTER_KEY, 2: second}, 2)
    begin_rotation(support.target(notes_url, keys=keys))
    rotating = support.target(notes_url, keys=keys)
    assert rotate_range(rotating, ENTRY, 0).rows == 100
    # What is pending, because it has no token, is the backfill's.
    rows = run(notes_url, "SELECT id, mail_encrypted, mail_search FROM notes WHERE id <> 9 ORDER BY id")
    key = independent.derive(second, "test_search", 2)
    assert [independent.open_envelope(key, envelope) for _, envelope, _ in rows] == [
        f"m{i}" for i, *_ in rows
    ]
    tokens = {i: token for i, _, token in rows}
    assert tokens.pop(7) == "the application's own"
    assert tokens == {i: independent.token(key, f"m{i}") for i in tokens}
    # Found after as before, and left alone again.
    found = verify_range(rotating, ENTRY, 0).offenders
    assert [(o.problem, o.key) for o in found] == [("token_mismatched", ("7",)), ("pending", ("9",))]
    assert not repair_mismatched(rotating, ENTRY).changed
    assert not rotate_range(rotating, ENTRY, 0).changed


def test_a_repair_clears_another_value_and_keeps_its_token(notes_url: str) -> None:
    write(notes_url, 7, support.seal("before", "test_search"), support.token("m7", "test_search"))
    support.encrypt(notes_url, ENTRY)
    # Envelopes alone, which only an application that passes the guard can write.
    run(notes_url, "ALTER TABLE notes DISABLE TRIGGER ALL; UPDATE notes SET mail = NULL WHERE id = 8")
    run(notes_url, "ALTER TABLE notes ENABLE TRIGGER ALL")
    alone = support.value(notes_url, "SELECT mail_encrypted FROM notes WHERE id = 8")
    assert [(o.problem, o.key) for o in support.verify(notes_url, ENTRY).offenders] == [
        ("mismatched", ("7",)),
        ("mismatched", ("8",)),
    ]
    assert repair_mismatched(support.target(notes_url), ENTRY).rows == 1
    assert run(notes_url, "SELECT mail_encrypted, mail_search FROM notes WHERE id = 7") == [
        (None, support.token("m7", "test_search"))
    ]
    assert support.value(notes_url, "SELECT mail_encrypted FROM notes WHERE id = 8") == alone
    support.backfill_all(notes_url, ENTRY)
    assert [o.key for o in support.verify(notes_url, ENTRY).offenders] == [("8",)]


def test_a_new_try_after_a_revert_keeps_the_application_s_own(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    before = run(notes_url, "SELECT id, mail_encrypted, mail_search FROM notes ORDER BY id")
    revert_to_plaintext(support.target(notes_url), ENTRY)
    result = support.add_columns(notes_url, ENTRY)
    assert result.cleared == 100
    assert run(notes_url, "SELECT id, mail_encrypted, mail_search FROM notes ORDER BY id") == before
    assert support.value(notes_url, "SELECT count(secret_encrypted) FROM notes") == 0
    support.backfill_all(notes_url, ENTRY)
    assert support.verify(notes_url, ENTRY).passed


def test_what_the_guard_could_not_clear(notes_url: str) -> None:
    run(notes_url, "UPDATE notes SET mail_encrypted = '' WHERE mail_encrypted IS NULL")
    run(notes_url, "ALTER TABLE notes ALTER mail_encrypted SET NOT NULL")
    with pytest.raises(ConfigurationError, match="mail_encrypted is NOT NULL"):
        support.add_columns(notes_url, ENTRY)
