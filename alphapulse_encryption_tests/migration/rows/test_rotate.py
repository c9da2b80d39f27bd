"""Rotation of batch ranges: what is of an older key version is encrypted again, nothing else, and no write is lost."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.ranges import range_lock
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import batch_ranges
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress, RangeResult, RowsQuarantined, Stopped
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import TableVerification, verify_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import ACTOR, MASTER_KEY, Row, run, target
from alphapulse_encryption_tests.stress import interleaved
from alphapulse_encryption_tests.stress.interleaved import Interleaved

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
ROWS = 60
RANGES = 3
SECOND_KEY = bytes(range(1, 33))
KEYS = KeyRing({1: MASTER_KEY, 2: SECOND_KEY}, 2)
CIPHER = get_format("AES-256-GCM", KEYS)
Texts = dict[Row, str | None]


@pytest.fixture
def notes_url(database_url: str) -> str:
    """Encrypted under version 1; a tenth of `secret` is NULL. The key's second column is text."""
    run(
        database_url,
        'CREATE TABLE notes (tenant int, "100%" text, mail text UNIQUE, secret numeric, other int DEFAULT 0, '
        'PRIMARY KEY (tenant, "100%"))',
    )
    run(
        database_url,
        "INSERT INTO notes SELECT i % 2, 'k' || to_char(i, 'FM00'), 'm' || i, nullif(i % 10, 0) * 1.50 "
        f"FROM generate_series(1, {ROWS}) AS i",
    )
    support.encrypt(database_url, ENTRY, ranges=RANGES)
    build_search_indexes(Database(database_url), ENTRY, ACTOR)
    return database_url


@pytest.fixture
def begun_url(notes_url: str) -> str:
    """The same, its rotation begun."""
    begin_rotation(target(notes_url, keys=KEYS))
    return notes_url


def rotate(
    url: str,
    number: int,
    *,
    entry: Table = ENTRY,
    keys: KeyRing = KEYS,
    cipher: EnvelopeFormat | None = None,
    batch_size: int = 7,
    on_progress: Callable[[Progress], None] | None = None,
) -> RangeResult:
    """One batch range."""
    cipher = cipher or get_format("AES-256-GCM", keys)
    pace = Pace(batch_size)
    return rotate_range(
        target(url, keys=keys, cipher=cipher), entry, number, pace=pace, on_progress=on_progress
    )


def rotate_all(url: str, entry: Table = ENTRY, keys: KeyRing = KEYS, ranges: int = RANGES) -> int:
    """All ranges; how many rows were written."""
    return sum(rotate(url, number, entry=entry, keys=keys).rows for number in range(ranges))


def verified(url: str, entry: Table = ENTRY, keys: KeyRing = KEYS, ranges: int = RANGES) -> TableVerification:
    cipher = get_format("AES-256-GCM", keys)
    for number in range(ranges):
        verify_range(target(url, keys=keys, cipher=cipher), entry, number)
    return support.verification(url, entry, keys)


# Eyes that do not belong to the engine


@functools.cache
def derived(master_key: bytes, context: str, version: int) -> bytes:
    return independent.derive(master_key, context, version)


def seal(value: str, context: str, version: int, iv: bytes = bytes(12)) -> str:
    return independent.seal(derived(_MASTERS[version], context, version), iv, value, context, version)


def token(value: str, context: str, version: int) -> str:
    return independent.token(derived(_MASTERS[version], context, version), value)


_MASTERS = {1: MASTER_KEY, 2: SECOND_KEY}


def plaintexts(url: str, entry: Table = ENTRY) -> dict[str, Texts]:
    return {column.name: support.texts(url, entry, column.name) for column in entry.columns}


def versions(url: str, entry: Table = ENTRY) -> dict[Row, set[int]]:
    """By key, the versions that a row's envelopes name."""
    found: dict[Row, set[int]] = {}
    for column in entry.columns:
        for key, envelope in support.texts(url, entry, column.encrypted).items():
            found.setdefault(key, set()).update({json.loads(envelope)["key_version"]} if envelope else ())
    return found


def assert_under(
    url: str,
    version: int,
    expected: dict[str, Texts],
    entry: Table = ENTRY,
    masters: dict[int, bytes] = _MASTERS,
) -> None:
    """Every envelope is of that version and holds its value; every token is that of its value and version."""
    for column in entry.columns:
        key = derived(masters[version], column.context, version)
        envelopes = support.texts(url, entry, column.encrypted)
        assert all(e is None or json.loads(e)["key_version"] == version for e in envelopes.values())
        opened = {k: None if e is None else independent.open_envelope(key, e) for k, e in envelopes.items()}
        assert opened == expected[column.name], column.name
        if column.searchable:
            tokens = {k: None if v is None else independent.token(key, v) for k, v in opened.items()}
            assert support.texts(url, entry, column.search) == tokens


# What a rotation does


@pytest.mark.parametrize("second", [SECOND_KEY, MASTER_KEY], ids=["its own master key", "one master key"])
def test_everything_is_under_the_new_version(notes_url: str, second: bytes) -> None:
    keys = KeyRing({1: MASTER_KEY, 2: second}, 2)
    expected = plaintexts(notes_url)
    before = {c.name: support.texts(notes_url, ENTRY, c.encrypted) for c in ENTRY.columns}
    done = run(notes_url, "SELECT * FROM alphapulse_encryption.ranges ORDER BY batch_range")
    migrations = run(notes_url, "SELECT * FROM encryption_migrations ORDER BY column_name")
    begin_rotation(target(notes_url, keys=keys))
    assert rotate_all(notes_url, keys=keys) == ROWS
    assert plaintexts(notes_url) == expected
    assert_under(notes_url, 2, expected, masters={2: second})
    for column in ENTRY.columns:
        after = support.texts(notes_url, ENTRY, column.encrypted)
        assert all(
            envelope is None
            or json.loads(envelope)["ciphertext"][:16] != json.loads(after[key] or "")["ciphertext"][:16]
            for key, envelope in before[column.name].items()
        ), "the IV is a new one"
    # The backfill is as done as it was.
    assert run(notes_url, "SELECT * FROM alphapulse_encryption.ranges ORDER BY batch_range") == done
    assert run(notes_url, "SELECT * FROM encryption_migrations ORDER BY column_name") == migrations
    progress = run(
        notes_url,
        "SELECT goal, status, sum(rows_processed) FROM alphapulse_encryption.operations GROUP BY 1, 2",
    )
    assert progress == [(2, "completed", ROWS)]

    # Again: nothing is written.
    places = support.fingerprints(notes_url, ENTRY)
    audited = support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
    assert not any(rotate(notes_url, number, keys=keys).changed for number in range(RANGES))
    assert support.fingerprints(notes_url, ENTRY) == places
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == audited
    assert verified(notes_url, keys=keys).passed


def test_rows_that_are_current_are_not_written(begun_url: str) -> None:
    assert rotate(begun_url, 1).rows > 0
    current = {key for key, found in versions(begun_url).items() if found == {2}}
    before = support.fingerprints(begun_url, ENTRY)
    # Also not where the progress of the range is lost.
    run(begun_url, "DELETE FROM alphapulse_encryption.operations")
    rotate_all(begun_url)
    after = support.fingerprints(begun_url, ENTRY)
    assert 0 < len(current) < ROWS
    assert {key for key in after if after[key] == before[key]} == current


def test_a_value_alone(begun_url: str) -> None:
    """Of a row of two versions, only the old value is encrypted again."""
    rotate_all(begun_url)
    key = ("1", "k05")
    secret = support.texts(begun_url, ENTRY, "secret")[key]
    assert secret is not None
    with behind(begun_url) as connection:
        connection.execute(
            "UPDATE notes SET secret_encrypted = %s WHERE \"100%%\" = 'k05'",
            [seal(secret, "test_context", 1)],
        )
    mail = support.texts(begun_url, ENTRY, "mail_encrypted")[key]
    result = [rotate(begun_url, number) for number in range(RANGES)]
    assert (sum(r.rows for r in result), sum(r.values for r in result)) == (1, 1)
    assert support.texts(begun_url, ENTRY, "mail_encrypted")[key] == mail
    assert_under(begun_url, 2, plaintexts(begun_url))


def behind(url: str) -> support.Connection:
    """A session whose writes no trigger sees."""
    connection: support.Connection = psycopg.connect(url, autocommit=True)
    connection.execute(support.BEHIND)
    return connection


def test_other_spellings(begun_url: str) -> None:
    """What another program wrote is understood: rotated where it is old, left alone where it is current."""
    expected = plaintexts(begun_url)

    def spelt(key: Row, version: int) -> str:
        value = expected["secret"][key]
        assert value is not None
        members = json.loads(seal(value, "test_context", version))
        return json.dumps({"search_token": "x", **dict(reversed(members.items()))}, indent=1)

    old, current = ("1", "k05"), ("0", "k08")
    theirs = {old: spelt(old, 1), current: spelt(current, 2)}
    with behind(begun_url) as connection:
        for key, envelope in theirs.items():
            connection.execute(
                'UPDATE notes SET secret_encrypted = %s WHERE (tenant::text, "100%%") = (%s, %s)',
                [envelope, *key],
            )
    rotate_all(begun_url)
    assert_under(begun_url, 2, expected)
    assert support.texts(begun_url, ENTRY, "secret_encrypted")[current] == theirs[current]
    before = support.fingerprints(begun_url, ENTRY)
    assert rotate_all(begun_url) == 0
    assert support.fingerprints(begun_url, ENTRY) == before


def test_pending_values_are_the_backfills(begun_url: str) -> None:
    run(begun_url, "UPDATE notes SET secret = 99 WHERE \"100%\" IN ('k03', 'k04')")
    with behind(begun_url) as connection:
        # Not searchable yet: the ciphertext alone does not make it less pending.
        connection.execute("UPDATE notes SET mail_search = NULL WHERE \"100%\" = 'k06'")
    rotate_all(begun_url)
    assert versions_of(begun_url, "mail")["0", "k06"] == 1
    found = support.texts(begun_url, ENTRY, "secret_encrypted")
    assert {key for key, envelope in found.items() if envelope is None} >= {("1", "k03"), ("0", "k04")}
    for number in range(RANGES):
        backfill_range(target(begun_url, keys=KEYS), ENTRY, number)
    assert_under(begun_url, 2, plaintexts(begun_url))


def test_after_the_switch_and_on_the_way_back(begun_url: str) -> None:
    """Where the ciphertext is right, some plaintext is gone; a revert reads the versions of a half-rotated table."""
    expected = plaintexts(begun_url)
    assert verified(begun_url).passed
    switch_to_ciphertext(target(begun_url, keys=KEYS), ENTRY)
    mail = "new@example.org"
    for number, version in ((5, 1), (6, 2), (41, 1), (42, 2)):
        key = (str(number % 2), f"k{number:02d}")
        text = f"{number}.{mail}"
        run(
            begun_url,
            'UPDATE notes SET mail_encrypted = %s, mail_search = %s WHERE (tenant::text, "100%%") = (%s, %s)',
            *(seal(text, "test_search", version), token(text, "test_search", version), *key),
        )
        expected["mail"][key] = text
    assert rotate(begun_url, 0).rows > 0
    assert {frozenset(found) for found in versions(begun_url).values()} == {
        frozenset({1}),
        frozenset({2}),
        frozenset({1, 2}),
    }
    revert_to_plaintext(target(begun_url, keys=KEYS), ENTRY)
    assert plaintexts(begun_url) == expected
    # What a revert leaves behind needs no guard to be rotated.
    rotate_all(begun_url)
    assert_under(begun_url, 2, expected)


def test_after_the_drop_and_back(approved_url: str) -> None:
    """A half-rotated table is restored, and then rotated to its end."""
    users = walk.CATALOGUE.table("users")
    names = [column.name for column in users.columns]
    before = walk.contents(approved_url, "users", ["id", *names])
    walk.drop(approved_url, users)
    keys = KeyRing({1: bytes(range(32)), 2: SECOND_KEY}, 2)
    begin_rotation(target(approved_url, keys=keys))
    half = rotate(approved_url, 0, entry=users, keys=keys, batch_size=500)
    assert 0 < half.rows < len(before)
    assert verified(approved_url, users, keys, walk.RANGES).passed
    restore_plaintext(target(approved_url, keys=keys), users)
    assert walk.contents(approved_url, "users", ["id", *names]) == before
    assert rotate_all(approved_url, users, keys, walk.RANGES) == len(before) - half.rows
    assert_under(approved_url, 2, plaintexts(approved_url, users), users)


# Beside an application that writes


def changed(url: str, number: int) -> Callable[[], None]:
    """A write of an instance that still has the old version: both sides in one statement."""

    def change() -> None:
        text = f"changed {number}"
        run(
            url,
            'UPDATE notes SET mail = %s, mail_encrypted = %s, mail_search = %s WHERE "100%%" = %s',
            *(text, seal(text, "test_search", 1), token(text, "test_search", 1), f"k{number:02d}"),
        )

    return change


def written_meanwhile(url: str) -> None:
    """A rotation, and writes between the reading and the writing of its batches."""
    rows = [int(key[1][1:]) for key in sorted(support.texts(url, ENTRY, "mail"))]
    # A batch of 7 is read when its first column is decrypted.
    meanwhile: Sequence[Callable[[], None]] = [changed(url, number) for number in (rows[1], rows[2], rows[8])]
    cipher = Interleaved(meanwhile, CIPHER)
    rotate(url, 0, cipher=cipher)
    assert not cipher.left


def test_a_write_meanwhile_is_kept(begun_url: str) -> None:
    written_meanwhile(begun_url)
    rotate_all(begun_url)
    assert_under(begun_url, 2, plaintexts(begun_url))


def test_without_the_optimistic_check_it_is_lost(begun_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interleaved.without_check(monkeypatch)
    written_meanwhile(begun_url)
    monkeypatch.undo()
    rotate_all(begun_url)
    with pytest.raises(AssertionError, match="mail"):
        assert_under(begun_url, 2, plaintexts(begun_url))


def test_stopped_and_resumed(begun_url: str) -> None:
    def stop(progress: Progress) -> None:
        if progress.rows:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        rotate(begun_url, 0, on_progress=stop)
    half = versions(begun_url)
    assert sum(found == {2} for found in half.values()) == 7
    result = rotate(begun_url, 0)
    assert result.resumed
    assert result.rows > 7
    rotate_all(begun_url)
    assert_under(begun_url, 2, plaintexts(begun_url))


# What cannot be rotated


def test_what_does_not_open_is_set_aside(begun_url: str) -> None:
    broken, foreign = ("1", "k05"), ("0", "k08")
    with behind(begun_url) as connection:
        whole = support.texts(begun_url, ENTRY, "secret_encrypted")
        connection.execute("UPDATE notes SET secret_encrypted = 'canary' WHERE \"100%\" = 'k05'")
        connection.execute(
            "UPDATE notes SET secret_encrypted = replace(secret_encrypted, '\"key_version\": 1', '\"key_version\": 7') "
            "WHERE \"100%\" = 'k08'"
        )
    said = "".join(failed_ranges(begun_url))
    assert said.count("that could not be encrypted: 1; all others are") == 2
    assert "key (1, k05): secret_encrypted cannot be read (malformed envelope" in said
    assert "key (0, k08): secret_encrypted cannot be read (the envelope's key version is unknown" in said
    assert "canary" not in said
    kept = run(begun_url, "SELECT key, step FROM alphapulse_encryption.quarantine ORDER BY key")
    assert kept == [(["0", "k08"], "rotate"), (["1", "k05"], "rotate")]
    status = "SELECT status FROM alphapulse_encryption.operations ORDER BY batch_range"
    assert sorted(run(begun_url, status)) == [("completed",), ("failed",), ("failed",)]
    # The other value of those rows is done, and so is every other row.
    found = versions_of(begun_url, "mail")
    assert set(found.values()) == {2}
    # A backfill has its own: it neither forgets these rows nor counts them.
    run(begun_url, "UPDATE notes SET secret = 7 WHERE \"100%\" IN ('k03', 'k04', 'k06', 'k07')")
    for number in range(RANGES):
        backfill_range(target(begun_url, keys=KEYS), ENTRY, number)
    assert run(begun_url, "SELECT key, step FROM alphapulse_encryption.quarantine ORDER BY key") == kept

    with behind(begun_url) as connection:
        for key in (broken, foreign):
            connection.execute(
                'UPDATE notes SET secret_encrypted = %s WHERE (tenant::text, "100%%") = (%s, %s)',
                [whole[key], *key],
            )
    assert rotate_all(begun_url) == 2
    assert run(begun_url, "SELECT key FROM alphapulse_encryption.quarantine") == []
    assert_under(begun_url, 2, plaintexts(begun_url))


def versions_of(url: str, column: str) -> dict[Row, int]:
    envelopes = support.texts(url, ENTRY, f"{column}_encrypted")
    return {key: json.loads(e)["key_version"] for key, e in envelopes.items() if e is not None}


def failed_ranges(url: str) -> list[str]:
    """Rotate all ranges; what those said that set rows aside."""
    failures: list[str] = []
    for number in range(RANGES):
        try:
            rotate(url, number)
        except RowsQuarantined as error:
            failures.append(str(error))
    return failures


def test_one_value_under_two_versions(begun_url: str) -> None:
    """A unique index sees tokens, and those of two versions differ: both rows are named, all others go on."""
    assert verified(begun_url).passed
    switch_to_ciphertext(target(begun_url, keys=KEYS), ENTRY)
    run(
        begun_url,
        "INSERT INTO notes (tenant, \"100%%\", mail_encrypted, mail_search) VALUES (7, 'late', %s, %s)",
        *(seal("m5", "test_search", 2), token("m5", "test_search", 2)),
    )
    failures = failed_ranges(begun_url)
    assert len(failures) == 1
    assert (
        "key (1, k05): the same value is in another row already, written under the current key version: "
        "mail with key (7, late)" in failures[0]
    )
    found = versions_of(begun_url, "mail")
    assert {key for key, version in found.items() if version == 1} == {("1", "k05")}
    # The person who decides has decided.
    run(begun_url, "DELETE FROM notes WHERE tenant = 7")
    assert rotate_all(begun_url) == 1
    assert set(versions_of(begun_url, "mail").values()) == {2}


# Ranges


def test_ranges_planned_anew_are_rotated_anew(begun_url: str) -> None:
    """The boundaries have moved, so what was noted of the ranges is not of these."""
    assert rotate(begun_url, 0).rows > 0
    batch_ranges.replan_ranges(Database(begun_url), ENTRY, ACTOR, count=2)
    assert run(begun_url, "SELECT 1 FROM alphapulse_encryption.operations") == []
    rotate_all(begun_url, ranges=2)
    assert_under(begun_url, 2, plaintexts(begun_url))


def test_before_its_time(database_url: str) -> None:
    run(database_url, 'CREATE TABLE notes (tenant int, "100%" text PRIMARY KEY, mail text, secret numeric)')
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        rotate(database_url, 0)


def test_a_backfill_that_waited_for_the_range_writes_no_old_version(notes_url: str) -> None:
    """It was admitted under the old version, and gets the range when the rotation has begun."""
    run(notes_url, "UPDATE notes SET secret = 5")
    with support.application(notes_url) as other:
        other.execute("SELECT pg_advisory_lock(hashtextextended(%s, 0))", [range_lock(ENTRY, 0)])
        asked = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE query LIKE '%pg_try_advisory_lock%' AND pid <> pg_backend_pid()"
        )
        with support.Background(lambda: support.backfill(notes_url, ENTRY, 0)) as backfill:
            support.until(lambda: support.value(notes_url, asked) > 0, "it asks for the range")
            begin_rotation(target(notes_url, keys=KEYS))
            other.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [range_lock(ENTRY, 0)])
            with pytest.raises(
                RefusedError, match=r"current key version is 2, since .*the environment says 1"
            ):
                backfill.result()
    assert support.value(notes_url, "SELECT count(*) FROM notes WHERE secret_encrypted IS NOT NULL") == 0
