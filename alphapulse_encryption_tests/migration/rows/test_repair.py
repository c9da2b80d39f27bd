"""What a verification names as wrong: cleared on demand, exactly those values, and encrypted again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.tables import advance
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.engine import RangeResult
from alphapulse_encryption.migration.rows.repair import repair_mismatched
from alphapulse_encryption.migration.rows.verify import NAMED_OFFENDERS
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import KEYS, run, target

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
ROWS = 60


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(
        database_url,
        'CREATE TABLE notes (tenant int, "100%" text, mail text, secret numeric, PRIMARY KEY (tenant, "100%"))',
    )
    run(
        database_url,
        f"INSERT INTO notes SELECT i % 2, 'k' || i, 'm' || i, i * 1.50 FROM generate_series(1, {ROWS}) AS i",
    )
    support.encrypt(database_url, ENTRY, ranges=3)
    return database_url


@pytest.fixture
def behind(notes_url: str) -> Iterator[support.Connection]:
    """A session whose writes no trigger sees."""
    with support.application(notes_url) as connection:
        connection.execute(support.BEHIND)
        yield connection


def repaired(url: str, entry: Table = ENTRY, keys: KeyRing = KEYS) -> RangeResult:
    return repair_mismatched(target(url, keys=keys), entry)


def cleared(url: str) -> set[tuple[str, str]]:
    """Column and second key column of every value that has its plaintext and neither ciphertext nor token."""
    return {
        *run(
            url,
            "SELECT 'mail', \"100%\" FROM notes "
            "WHERE mail IS NOT NULL AND mail_encrypted IS NULL AND mail_search IS NULL",
        ),
        *run(
            url, "SELECT 'secret', \"100%\" FROM notes WHERE secret IS NOT NULL AND secret_encrypted IS NULL"
        ),
    }


def audited(url: str) -> set[tuple[str, str, str]]:
    return set(
        run(
            url,
            "SELECT c ->> 'column', c ->> 'problem', c -> 'key' ->> 1 FROM alphapulse_encryption.audit_log, "
            "jsonb_array_elements(details -> 'cleared') AS c WHERE action = 'repair_mismatched'",
        )
    )


DAMAGE = """
UPDATE notes SET secret_encrypted = (SELECT secret_encrypted FROM notes WHERE "100%" = 'k9') WHERE "100%" = 'k3';
UPDATE notes SET mail_encrypted = 'no envelope' WHERE "100%" = 'k4';
UPDATE notes SET mail_search = 'T' WHERE "100%" = 'k5';
UPDATE notes SET mail = 'M51' WHERE "100%" = 'k51';
"""
WRONG = {
    ("secret", "mismatched", "k3"),
    ("mail", "undecryptable", "k4"),
    ("mail", "token_mismatched", "k5"),
    ("mail", "mismatched", "k51"),
}


def test_exactly_what_is_wrong_is_cleared_and_encrypted_again(
    notes_url: str, behind: support.Connection
) -> None:
    behind.execute(DAMAGE)
    assert len(support.verify(notes_url, ENTRY).offenders) == len(WRONG)
    plaintexts = run(notes_url, 'SELECT tenant, "100%", mail, secret::text FROM notes ORDER BY 1, 2')
    versions = support.fingerprints(notes_url, ENTRY)
    result = repaired(notes_url)
    assert (result.by_column, result.changed_meanwhile) == ({"mail": 3, "secret": 1}, 0)
    assert cleared(notes_url) == {(column, key) for column, _, key in WRONG}
    assert audited(notes_url) == WRONG
    now = support.fingerprints(notes_url, ENTRY)
    assert {key[1] for key in now if now[key] != versions[key]} == {key for _, _, key in WRONG}
    # Its results speak of rows that are others now.
    assert not support.verification(notes_url, ENTRY).passed

    support.backfill_all(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 2 * ROWS
    assert run(notes_url, 'SELECT tenant, "100%", mail, secret::text FROM notes ORDER BY 1, 2') == plaintexts
    assert support.verify(notes_url, ENTRY).passed
    before = support.fingerprints(notes_url, ENTRY)
    assert not repaired(notes_url).changed
    assert support.fingerprints(notes_url, ENTRY) == before


def test_more_than_a_verification_names(notes_url: str, behind: support.Connection) -> None:
    behind.execute("UPDATE notes SET secret_encrypted = 'x'")
    found = support.verify(notes_url, ENTRY)
    assert len(found.offenders) == 3 * NAMED_OFFENDERS < ROWS
    assert repaired(notes_url).by_column == {"secret": ROWS}
    assert len(cleared(notes_url)) == len(audited(notes_url)) == ROWS
    support.backfill_all(notes_url, ENTRY)
    support.assert_encrypted(notes_url, ENTRY)


def test_only_what_was_named(notes_url: str, behind: support.Connection) -> None:
    """What became wrong since has not been looked at by anybody; what was put right since is left alone."""
    behind.execute(DAMAGE)
    support.verify(notes_url, ENTRY)
    behind.execute("UPDATE notes SET mail_encrypted = 'x' WHERE \"100%\" = 'k6'")
    behind.execute("UPDATE notes SET mail = 'm51' WHERE \"100%\" = 'k51'")
    assert repaired(notes_url).by_column == {"mail": 2, "secret": 1}
    assert cleared(notes_url) == {("secret", "k3"), ("mail", "k4"), ("mail", "k5")}


def test_a_ciphertext_without_its_plaintext(notes_url: str, behind: support.Connection) -> None:
    behind.execute("UPDATE notes SET mail = NULL WHERE \"100%\" = 'k7'")
    support.verify(notes_url, ENTRY)
    assert repaired(notes_url).by_column == {"mail": 1}
    assert run(notes_url, "SELECT mail, mail_encrypted, mail_search FROM notes WHERE \"100%\" = 'k7'") == [
        (None, None, None)
    ]
    assert audited(notes_url) == {("mail", "mismatched", "k7")}


def test_a_row_that_is_written_meanwhile(notes_url: str, behind: support.Connection) -> None:
    behind.execute(DAMAGE.partition(";")[0].encode())
    support.verify(notes_url, ENTRY)
    right = support.seal("4.50", "test_context")
    behind.execute("BEGIN")
    behind.execute("UPDATE notes SET secret_encrypted = %s WHERE \"100%%\" = 'k3'", [right])
    with support.Background(lambda: repaired(notes_url)) as repairing:
        support.until(
            lambda: support.engine_waits(notes_url, "UPDATE%", behind=behind), "it waits for the row"
        )
        behind.execute("COMMIT")
        result = repairing.result()
    assert (result.by_column, result.changed_meanwhile) == ({}, 1)
    assert run(notes_url, "SELECT secret_encrypted FROM notes WHERE \"100%\" = 'k3'") == [(right,)]
    assert audited(notes_url) == set()


def test_the_switch_does_not_come_between(notes_url: str, behind: support.Connection) -> None:
    behind.execute(DAMAGE)
    support.verify(notes_url, ENTRY)
    with support.application(notes_url, autocommit=False) as switching:
        switching.execute("UPDATE alphapulse_encryption.tables SET authority = 'ciphertext'")
        with support.Background(lambda: repaired(notes_url)) as repairing:
            support.until(
                lambda: support.engine_waits(notes_url, behind=switching), "the repair waits for the switch"
            )
            switching.commit()
            with pytest.raises(RefusedError, match="ciphertext of notes is the right side"):
                repairing.result()
    assert cleared(notes_url) == set()
    assert audited(notes_url) == set()


def test_refusals(notes_url: str, behind: support.Connection) -> None:
    behind.execute(DAMAGE)
    assert not repaired(notes_url).changed  # nothing was verified yet
    support.verify(notes_url, ENTRY)
    with pytest.raises(RefusedError, match="not the one this database was begun with"):
        repaired(notes_url, keys=support.OTHER_KEYS)
    newer = KeyRing({1: support.MASTER_KEY, 2: bytes(32)}, 2)
    with pytest.raises(RefusedError, match="to which no rotation was begun"):
        repaired(notes_url, keys=newer)
    begin_rotation(target(notes_url, keys=newer))
    with pytest.raises(RefusedError, match="verified before the table's columns or the key changed"):
        repaired(notes_url, keys=newer)
    assert cleared(notes_url) == set()


def test_refusals_once_switched(notes_url: str, behind: support.Connection) -> None:
    behind.execute(DAMAGE)
    support.verify(notes_url, ENTRY)
    with Database(notes_url).session("switch") as connection:
        advance(connection, support.KEYS, support.ACTOR, ENTRY, State.SWITCHED)
    with pytest.raises(RefusedError, match="ciphertext of notes is the right side"):
        repaired(notes_url)
    assert cleared(notes_url) == set()
