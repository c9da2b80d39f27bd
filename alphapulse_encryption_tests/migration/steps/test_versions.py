"""Key versions in the database: who may write which, what is left of each, and when one is retired."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.keys import ensure_key
from alphapulse_encryption.migration.bookkeeping.tables import authentic_state
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.migration.steps.versions import (
    Found,
    Retirement,
    TableVersions,
    begin_rotation,
    count_versions,
    reinstate_version,
    retire_versions,
)
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After
from alphapulse_encryption_tests.migration.rows.test_rotate import (
    CIPHER,
    ENTRY,
    KEYS,
    SECOND_KEY,
    begun_url,
    behind,
    notes_url,
    rotate_all,
    seal,
    token,
    verified,
)
from alphapulse_encryption_tests.migration.support import ACTOR, MASTER_KEY, run, target

__all__ = ["begun_url", "notes_url"]

OLD = KeyRing({1: MASTER_KEY, 2: SECOND_KEY}, 1)
CATALOGUE = Catalogue(tables=(ENTRY,))
ROWS, SECRETS = 60, 54

Step = Callable[[str, KeyRing], object]


def states(url: str) -> list[tuple[int, str]]:
    return [
        (version, state)
        for version, state in run(
            url, "SELECT key_version, state FROM alphapulse_encryption.key_versions ORDER BY 1"
        )
    ]


def backfill(url: str, keys: KeyRing) -> object:
    return backfill_range(target(url, keys=keys), ENTRY, 0)


def verify(url: str, keys: KeyRing) -> object:
    return verify_range(target(url, keys=keys), ENTRY, 0)


def rotate(url: str, keys: KeyRing) -> object:
    return rotate_range(target(url, keys=keys), ENTRY, 0)


def count(url: str) -> TableVersions:
    (found,) = count_versions(Database(url), [ENTRY], CIPHER)
    return found


def retire(url: str, catalogue: Catalogue = CATALOGUE) -> Retirement:
    return retire_versions(target(url, catalogue=catalogue))


def actions(url: str) -> list[str]:
    found = run(
        url, "SELECT action FROM alphapulse_encryption.audit_log WHERE action LIKE '%key%' ORDER BY id"
    )
    return [action for (action,) in found]


# Who may write


def test_the_first_version(notes_url: str) -> None:
    assert states(notes_url) == [(1, "current")]


@pytest.mark.parametrize("step", [backfill, verify, rotate])
def test_a_version_that_was_not_begun_is_refused(notes_url: str, step: Step) -> None:
    run(notes_url, "UPDATE notes SET secret = 5")
    with pytest.raises(RefusedError, match=r"is 1, and the environment says 2, .*Run --rotate-keys first"):
        step(notes_url, KEYS)
    assert states(notes_url) == [(1, "current")]
    assert run(notes_url, "SELECT 1 FROM notes WHERE secret_encrypted IS NOT NULL") == []
    assert run(notes_url, "SELECT key_version FROM alphapulse_encryption.key_checks") == [(1,)]


@pytest.mark.parametrize("step", [backfill, verify, rotate])
def test_an_older_version_is_refused_once_another_has_begun(begun_url: str, step: Step) -> None:
    run(begun_url, "UPDATE notes SET secret = 5")
    with pytest.raises(
        RefusedError, match=r"is 2, since .* says 1: .*Set ALPHAPULSE_ENCRYPTION_KEY_VERSION=2"
    ):
        step(begun_url, OLD)
    assert run(begun_url, "SELECT 1 FROM notes WHERE secret_encrypted IS NOT NULL") == []
    step(begun_url, KEYS)


@pytest.mark.parametrize("step", [backfill, verify, rotate])
def test_a_key_that_is_still_needed_is_missed(begun_url: str, step: Step) -> None:
    with pytest.raises(
        RefusedError, match="There is no key of version 1, and this database may hold values of it"
    ):
        step(begun_url, KeyRing({2: SECOND_KEY}, 2))
    rotate_all(begun_url)
    retire(begun_url)
    step(begun_url, KeyRing({2: SECOND_KEY}, 2))


# The beginning


def test_a_rotation_begins_once(notes_url: str) -> None:
    begun = begin_rotation(target(notes_url, keys=KEYS))
    assert (begun.version, begun.before, begun.changed, begun.revoked) == (2, 1, True, ())
    assert states(notes_url) == [(1, "readable"), (2, "current")]
    checks = run(
        notes_url, "SELECT key_version, check_value FROM alphapulse_encryption.key_checks ORDER BY 1"
    )
    assert checks == [(1, KEYS.check_value(1)), (2, KEYS.check_value(2))]
    assert actions(notes_url) == ["begin_key_rotation"]
    details = support.value(
        notes_url, "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'begin_key_rotation'"
    )
    assert details == {"from_version": 1, "to_version": 2, "revoked_approvals": []}
    assert not begin_rotation(target(notes_url, keys=KEYS)).changed
    assert actions(notes_url) == ["begin_key_rotation"]


REFUSED = {
    "an older version": (OLD, "current key version is 2"),
    "without the old key": (KeyRing({3: bytes(32)}, 3), "no key of version 1, 2"),
    "another old key": (KeyRing({1: bytes(32), 2: SECOND_KEY, 3: bytes(32)}, 3), "master key of version 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_beginning_that_is_refused_changes_nothing(begun_url: str, case: str) -> None:
    keys, why = REFUSED[case]
    before = run(begun_url, "SELECT * FROM alphapulse_encryption.key_versions ORDER BY 1")
    with pytest.raises(RefusedError, match=why):
        begin_rotation(target(begun_url, keys=keys))
    assert run(begun_url, "SELECT * FROM alphapulse_encryption.key_versions ORDER BY 1") == before
    assert run(begun_url, "SELECT max(key_version) FROM alphapulse_encryption.key_checks") == [(2,)]


def test_a_database_that_was_never_begun(database_url: str) -> None:
    begun = begin_rotation(target(database_url, keys=KEYS))
    assert (begun.before, begun.changed) == (None, False)
    assert run(database_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'alphapulse_encryption'") == []


def test_two_processes_begin_with_different_versions(database_url: str) -> None:
    """The first use of a database by two, one of which has another current version: the later one is refused."""
    with Database(database_url).session("begin") as connection:
        ensure_key(connection, support.KEYS)
        with pytest.raises(RefusedError, match="environment says 2"):
            ensure_key(connection, KEYS)
    assert states(database_url) == [(1, "current")]


def test_verifications_and_approvals_end_with_it(approved_url: str) -> None:
    users = walk.CATALOGUE.table("users")
    keys = KeyRing({1: bytes(range(32)), 2: SECOND_KEY}, 2)
    begun = begin_rotation(target(approved_url, keys=keys))
    approvals = run(
        approved_url,
        "SELECT id, revoked_by FROM alphapulse_encryption.approvals WHERE revoked_at IS NOT NULL",
    )
    assert [(number, "tests: key rotation") for number in begun.revoked] == approvals
    assert len(approvals) == 1
    assert not support.verification(approved_url, users, keys).passed
    with pytest.raises(RefusedError, match=r"no approval .*the last one was revoked"):
        walk.drop(approved_url, users, keys=keys)
    with pytest.raises(RefusedError, match="current key version is 2"):
        walk.drop(approved_url, users)
    assert "email" in walk.columns_of(approved_url, "users")


# What is left


def test_values_are_counted_by_version(begun_url: str) -> None:
    assert count(begun_url) == TableVersions("notes", {1: Found(ROWS, ROWS + SECRETS)})
    rotate(begun_url, KEYS)
    half = support.value(
        begun_url, "SELECT count(*) FROM notes WHERE mail_encrypted LIKE '%\"key_version\": 2%'"
    )
    found = count(begun_url).versions
    assert (found[1].rows, found[2].rows) == (ROWS - half, half)
    rotate_all(begun_url)
    assert count(begun_url) == TableVersions("notes", {2: Found(ROWS, ROWS + SECRETS)})

    def respelt(value: str, version: int) -> str:
        return json.dumps(dict(reversed(json.loads(seal(value, "test_context", version)).items())), indent=2)

    with behind(begun_url) as connection:
        # Spelt otherwise, of a version nobody has begun, and no envelope at all.
        for key, envelope in {"k01": respelt("1.5", 1), "k02": respelt("3", 2), "k03": "canary"}.items():
            connection.execute('UPDATE notes SET secret_encrypted = %s WHERE "100%%" = %s', [envelope, key])
        connection.execute(
            "UPDATE notes SET secret_encrypted = replace(secret_encrypted, '\"key_version\": 2', '\"key_version\": 9') "
            "WHERE \"100%\" = 'k04'"
        )
    left = ROWS + SECRETS - 3
    assert count(begun_url) == TableVersions(
        "notes", {1: Found(1, 1), 2: Found(ROWS, left), 9: Found(1, 1)}, unreadable=1
    )


def test_a_version_is_retired_when_nothing_is_left_of_it(begun_url: str) -> None:
    first = retire(begun_url)
    assert (first.retired, first.remaining) == ((), {1: {"notes": Found(ROWS, ROWS + SECRETS)}})
    assert first.describe() == {"notes": "Key version 1 is not retired: notes 114 values in 60 rows"}
    assert states(begun_url) == [(1, "readable"), (2, "current")]
    kept = support.value(
        begun_url, "SELECT found FROM alphapulse_encryption.key_versions WHERE key_version = 1"
    )
    assert kept == {"notes": {"rows": ROWS, "values": ROWS + SECRETS}}
    rotate_all(begun_url)
    assert retire(begun_url).retired == (1,)
    assert states(begun_url) == [(1, "retired"), (2, "current")]
    assert retire(begun_url).retired == ()
    assert actions(begun_url) == ["begin_key_rotation", "retire_key_version"]


def test_what_is_written_late_is_found(begun_url: str) -> None:
    """By an instance that nobody stopped: a verification names it, and a rotation catches it up."""
    rotate_all(begun_url)
    retire(begun_url)
    assert verified(begun_url).passed
    run(
        begun_url,
        "UPDATE notes SET mail = 'late', mail_encrypted = %s, mail_search = %s WHERE \"100%%\" = 'k05'",
        *(seal("late", "test_search", 1), token("late", "test_search", 1)),
    )
    found = verified(begun_url)
    assert [str(offender) for offender in found.offenders] == ["mail retired_key at key (1, k05)"]
    assert not found.passed
    late = retire(begun_url)
    assert (late.reinstated, late.retired) == ((1,), ())
    assert states(begun_url) == [(1, "readable"), (2, "current")]
    rotate_all(begun_url)
    assert retire(begun_url).retired == (1,)
    assert verified(begun_url).passed


def test_a_retired_version_is_reinstated_by_hand(begun_url: str) -> None:
    rotate_all(begun_url)
    retire(begun_url)
    assert reinstate_version(Database(begun_url), 1, ACTOR)
    assert states(begun_url) == [(1, "readable"), (2, "current")]
    assert not reinstate_version(Database(begun_url), 1, ACTOR)
    with pytest.raises(RefusedError, match="knows no key version 7"):
        reinstate_version(Database(begun_url), 7, ACTOR)


def test_what_the_catalogue_does_not_name_is_no_reason_to_retire(begun_url: str) -> None:
    rotate_all(begun_url)
    smaller = Catalogue(tables=(support.table("notes", support.searchable("mail", "idx_notes_mail")),))
    with pytest.raises(
        RefusedError, match=r"notes\.secret has an encrypted column that the catalogue does not name"
    ):
        retire(begun_url, smaller)
    assert states(begun_url) == [(1, "readable"), (2, "current")]
    run(begun_url, "ALTER TABLE notes DROP COLUMN secret_encrypted CASCADE")
    assert retire(begun_url, smaller).retired == (1,)


def test_what_is_saved_for_a_way_back_is_signed_with_the_new_key(after: After) -> None:
    """So nobody has to keep the old one for it."""
    url = after("switched")
    keys = KeyRing({1: bytes(range(32)), 2: bytes(range(1, 33))}, 2)
    mac = "SELECT mac FROM alphapulse_encryption.tables WHERE table_name = 'users'"
    assert walk.value(url, mac).startswith("1:")
    assert begin_rotation(walk.target(url, keys=keys)).changed
    assert walk.value(url, mac).startswith("2:")
    with Database(url).session("look") as connection:
        only_the_new_one = KeyRing({2: bytes(range(1, 33))}, 2)
        assert (
            authentic_state(connection, walk.CATALOGUE.table("users"), only_the_new_one).authority
            == "ciphertext"
        )
