"""Step 4: whatever is wrong is named, by key, column and kind, and nothing else is."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest

from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.tables import advance
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.engine import RowsQuarantined, Stopped
from alphapulse_encryption.migration.rows.verify import (
    NAMED_OFFENDERS,
    RangeVerification,
    TableVerification,
    count_rows,
    verify_changed,
    verify_range,
)
from alphapulse_encryption.migration.schema import guard
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import MASTER_KEY, OTHER_KEYS, run, target

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret", "bare")
KINDS = ("pending", "quarantined", "mismatched", "undecryptable", "token_mismatched", "retired_key")
ROWS = 40
SECOND_KEY = bytes(range(1, 33))
NEWER = KeyRing({1: MASTER_KEY, 2: SECOND_KEY}, 2)
COUNTED = "SELECT row_count, verified_count, missing_count FROM alphapulse_encryption.row_counts"


@pytest.fixture
def notes_url(database_url: str) -> str:
    """Encrypted; a tenth of `secret` is NULL, `bare` is all NULL."""
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, bare text, tenant int DEFAULT 1)",
    )
    run(
        database_url,
        f"INSERT INTO notes SELECT i, 'm' || i, nullif(i % 10, 0) * 1.50 FROM generate_series(1, {ROWS}) AS i",
    )
    support.encrypt(database_url, ENTRY, ranges=3)
    return database_url


@contextmanager
def application_behind(url: str) -> Iterator[support.Connection]:
    with support.application(url) as connection:
        connection.execute(support.BEHIND)
        yield connection


@pytest.fixture
def behind(notes_url: str) -> Iterator[support.Connection]:
    """A session whose writes no trigger sees."""
    with application_behind(notes_url) as connection:
        yield connection


def named(found: TableVerification) -> set[tuple[str, ...]]:
    return {(offender.column, offender.problem, *offender.key) for offender in found.offenders}


def counted(found: TableVerification) -> dict[tuple[str, str], int]:
    return {
        (column, kind): counts[kind]
        for column, counts in found.columns.items()
        for kind in KINDS
        if counts[kind]
    }


def flipped(envelope: str, position: int) -> str:
    """The envelope with one bit of its payload turned over."""
    members = json.loads(envelope)
    payload = bytearray(base64.b64decode(members["ciphertext"]))
    payload[position] ^= 1
    return json.dumps({**members, "ciphertext": base64.b64encode(payload).decode()})


def envelope(url: str, column: str, key: int) -> str:
    return str(support.value(url, f"SELECT {column}_encrypted FROM notes WHERE id = %s", key))


def test_everything_matches(notes_url: str) -> None:
    found = support.verify(notes_url, ENTRY)
    assert found.passed
    assert (found.rows, found.offenders, found.reasons) == (ROWS, (), ())
    tallies = {
        name: (counts["matching"], counts["empty"], counts.faults) for name, counts in found.columns.items()
    }
    assert tallies == {"mail": (40, 0, 0), "secret": (36, 4, 0), "bare": (0, 40, 0)}
    assert found.verified_at is not None
    assert all(found.column_passed(column.name) for column in ENTRY.columns)


@pytest.mark.parametrize("position", [0, 12, 27, -1], ids=["IV", "tag", "end of tag", "ciphertext"])
def test_a_single_bit(notes_url: str, behind: support.Connection, position: int) -> None:
    before = envelope(notes_url, "secret", 7)
    behind.execute("UPDATE notes SET secret_encrypted = %s WHERE id = 7", [flipped(before, position)])
    found = support.verify(notes_url, ENTRY)
    assert not found.passed
    assert named(found) == {("secret", "undecryptable", "7")}
    assert counted(found) == {("secret", "undecryptable"): 1}
    assert found.reasons == ("notes.secret: 1 values undecryptable",)
    assert found.column_passed("mail")
    assert not found.column_passed("secret")
    behind.execute("UPDATE notes SET secret_encrypted = %s WHERE id = 7", [before])
    assert support.verify(notes_url, ENTRY).passed


DAMAGES = [
    # what is done to the rows, and who is named for it
    (
        "UPDATE notes n SET secret_encrypted = o.secret_encrypted FROM notes o "
        "WHERE (n.id, o.id) IN ((3, 35), (35, 3))",
        {("secret", "mismatched", "3"), ("secret", "mismatched", "35")},
    ),
    (
        "UPDATE notes n SET mail_encrypted = o.mail_encrypted, mail_search = o.mail_search FROM notes o "
        "WHERE (n.id, o.id) IN ((3, 35), (35, 3))",
        {("mail", "mismatched", "3"), ("mail", "mismatched", "35")},
    ),
    (
        "UPDATE notes n SET mail_search = o.mail_search FROM notes o WHERE n.id = 3 AND o.id = 35",
        {("mail", "token_mismatched", "3")},
    ),
    ("UPDATE notes SET mail_search = lower(mail_search) WHERE id = 9", {("mail", "token_mismatched", "9")}),
    ("UPDATE notes SET mail_search = NULL WHERE id = 9", {("mail", "pending", "9")}),
    ("UPDATE notes SET mail = NULL, mail_encrypted = NULL WHERE id = 9", {("mail", "token_mismatched", "9")}),
    ("UPDATE notes SET secret_encrypted = NULL WHERE id = 11", {("secret", "pending", "11")}),
    ("UPDATE notes SET mail_encrypted = NULL WHERE id = 11", {("mail", "pending", "11")}),
    # other digits of an equal number
    ("UPDATE notes SET secret = 1.5 WHERE id = 1", {("secret", "mismatched", "1")}),
    ("UPDATE notes SET mail = 'M8' WHERE id = 8", {("mail", "mismatched", "8")}),
    ("UPDATE notes SET mail = 'm8 ' WHERE id = 8", {("mail", "mismatched", "8")}),
    ("UPDATE notes SET secret = NULL WHERE id = 8", {("secret", "mismatched", "8")}),
    ("UPDATE notes SET secret = 0 WHERE id = 10", {("secret", "pending", "10")}),
    ("UPDATE notes SET bare = '' WHERE id = 10", {("bare", "pending", "10")}),
    # not an envelope, another column's, of an unknown version or algorithm
    (
        "UPDATE notes SET bare_encrypted = 'plain', bare = 'plain' WHERE id = 2",
        {("bare", "undecryptable", "2")},
    ),
    ("UPDATE notes SET secret_encrypted = '' WHERE id = 2", {("secret", "undecryptable", "2")}),
    (
        "UPDATE notes SET secret_encrypted = mail_encrypted, secret = 2 WHERE id = 2",
        {("secret", "undecryptable", "2")},
    ),
    (
        "UPDATE notes SET secret_encrypted = replace(secret_encrypted, 'version\": 1', 'version\": 2') WHERE id = 2",
        {("secret", "undecryptable", "2")},
    ),
    (
        "UPDATE notes SET secret_encrypted = replace(secret_encrypted, 'AES-256', 'AES-128') WHERE id = 2",
        {("secret", "undecryptable", "2")},
    ),
    # several at once
    (
        "UPDATE notes SET secret = 0.0, mail_search = 'x' WHERE id IN (1, 39)",
        {
            (c, k, key)
            for key in ("1", "39")
            for c, k in (("secret", "mismatched"), ("mail", "token_mismatched"))
        },
    ),
]


def test_damage_is_named(notes_url: str, behind: support.Connection) -> None:
    kept = behind.execute("CREATE TEMP TABLE kept AS SELECT * FROM notes")
    assert kept.rowcount == ROWS
    for damage, expected in DAMAGES:
        behind.execute(damage.encode())
        found = support.verify(notes_url, ENTRY)
        assert named(found) == expected, damage
        assert sum(counted(found).values()) == len(expected), damage
        assert not found.passed
        behind.execute("TRUNCATE notes")
        behind.execute("INSERT INTO notes SELECT * FROM kept")
    assert support.verify(notes_url, ENTRY).passed


def test_status_columns_are_not_believed(notes_url: str, behind: support.Connection) -> None:
    behind.execute("UPDATE notes SET secret = 99 WHERE id = 4")
    statuses = run(notes_url, "SELECT DISTINCT status FROM encryption_migrations")
    assert statuses == [("completed",)]
    assert named(support.verify(notes_url, ENTRY)) == {("secret", "mismatched", "4")}


def test_a_cleared_plaintext_is_right_once_the_ciphertext_is(
    notes_url: str, behind: support.Connection
) -> None:
    behind.execute("UPDATE notes SET secret = NULL WHERE id = 4")
    assert named(support.verify(notes_url, ENTRY)) == {("secret", "mismatched", "4")}
    with Database(notes_url).session("switch") as connection:
        advance(connection, support.KEYS, support.ACTOR, ENTRY, State.SWITCHED)
        guard.ensure_guard(connection, read_table(connection, ENTRY), support.ACTOR)
    behind.execute(support.BEHIND)
    assert support.verify(notes_url, ENTRY).passed
    # A plaintext that is there has to be the same all the same.
    behind.execute("UPDATE notes SET secret = 99 WHERE id = 4")
    assert named(support.verify(notes_url, ENTRY)) == {("secret", "mismatched", "4")}


def test_counts_are_exact_where_names_end(notes_url: str, behind: support.Connection) -> None:
    behind.execute("UPDATE notes SET secret_encrypted = 'x' WHERE secret IS NOT NULL")
    found = support.verify(notes_url, ENTRY)
    assert counted(found) == {("secret", "undecryptable"): 36}
    by_range = [range(1, 14), range(14, 27), range(27, 41)]
    named_keys = [[k for k in keys if k % 10][:NAMED_OFFENDERS] for keys in by_range]
    assert named(found) == {("secret", "undecryptable", str(key)) for keys in named_keys for key in keys}


def test_rows_written_since_are_seen_by_the_next_run(notes_url: str) -> None:
    assert support.verify(notes_url, ENTRY).passed
    run(notes_url, "UPDATE notes SET mail = 'new' WHERE id = 20")
    run(notes_url, "INSERT INTO notes VALUES (0, 'first', 1), (1000, 'last', 2)")
    found = support.verify(notes_url, ENTRY)
    assert named(found) == {
        ("mail", "pending", "20"),
        *((column, "pending", key) for column in ("mail", "secret") for key in ("0", "1000")),
    }
    support.backfill_all(notes_url, ENTRY)
    found = support.verify(notes_url, ENTRY)
    assert found.passed
    assert found.rows == ROWS + 2


def test_results_are_worth_nothing_after_a_change(notes_url: str) -> None:
    assert "3 batch ranges were not verified yet" in support.verification(notes_url, ENTRY).reasons[0]
    for number in (0, 2):
        verify_range(support.target(notes_url), ENTRY, number)
    partly = support.verification(notes_url, ENTRY)
    assert (partly.passed, partly.verified_at) == (False, None)
    assert "1 batch ranges were not verified yet" in partly.reasons[0]
    assert not partly.column_passed("mail")
    verify_range(support.target(notes_url), ENTRY, 1)
    assert support.verification(notes_url, ENTRY).passed

    with pytest.raises(psycopg.errors.FeatureNotSupported, match="zzz_encryption_guard"):
        run(notes_url, "ALTER TABLE notes ALTER bare TYPE varchar(99)")
    with Database(notes_url).session("drop the guard") as connection:
        guard.drop_guard(connection, read_table(connection, ENTRY))
    for change, back in (
        ("ALTER bare TYPE varchar(99)", "ALTER bare TYPE text"),
        (
            "DROP CONSTRAINT notes_pkey, ADD PRIMARY KEY (id, tenant)",
            "DROP CONSTRAINT notes_pkey, ADD PRIMARY KEY (id)",
        ),
    ):
        run(notes_url, f"ALTER TABLE notes {change}")
        changed = support.verification(notes_url, ENTRY)
        assert (changed.passed, changed.verified_at, changed.rows) == (False, None, 0), change
        assert "3 batch ranges were verified before the table's columns or the key changed" in changed.reasons
        run(notes_url, f"ALTER TABLE notes {back}")
        assert support.verification(notes_url, ENTRY).passed

    newer = KeyRing({1: MASTER_KEY, 2: bytes(32)}, 2)
    assert not support.verification(notes_url, ENTRY, newer).passed
    assert support.verification(notes_url, ENTRY).passed


def test_each_version_with_its_own_tokens(notes_url: str, behind: support.Connection) -> None:
    """A token belongs to the key version of its ciphertext: after a rotation has begun, and before all is rotated."""
    begin_rotation(target(notes_url, keys=NEWER))
    cipher = get_format("AES-256-GCM", NEWER)

    def verified() -> TableVerification:
        for number in range(3):
            verify_range(target(notes_url, keys=NEWER, cipher=cipher), ENTRY, number)
        return support.verification(notes_url, ENTRY, NEWER)

    assert verified().passed
    texts = support.texts(notes_url, ENTRY, "mail")
    for key, (version, token_version) in {"3": (2, 2), "4": (2, 1), "5": (1, 2)}.items():
        value = texts[(key,)]
        assert value is not None
        master_keys = {1: MASTER_KEY, 2: SECOND_KEY}
        envelope, token = (
            independent.derive(master_keys[v], "test_search", v) for v in (version, token_version)
        )
        behind.execute(
            "UPDATE notes SET mail_encrypted = %s, mail_search = %s WHERE id = %s",
            [
                independent.seal(envelope, bytes(12), value, "test_search", version),
                independent.token(token, value),
                key,
            ],
        )
    found = verified()
    assert named(found) == {("mail", "token_mismatched", "4"), ("mail", "token_mismatched", "5")}


def test_values_of_a_retired_version(notes_url: str, behind: support.Connection) -> None:
    """Right, and readable here; but whoever was told that the version is retired may have removed its key."""
    behind.execute("UPDATE notes SET secret_encrypted = NULL, secret = NULL")
    begin_rotation(target(notes_url, keys=NEWER))
    behind.execute("UPDATE alphapulse_encryption.key_versions SET state = 'retired' WHERE key_version = 1")
    verify_range(target(notes_url, keys=NEWER), ENTRY, 0)
    rows = support.value(
        notes_url, "SELECT row_count FROM alphapulse_encryption.verifications WHERE batch_range = 0"
    )
    counts = support.value(
        notes_url, "SELECT columns -> 'mail' FROM alphapulse_encryption.verifications WHERE batch_range = 0"
    )
    assert rows > 0
    assert (counts["retired_key"], counts["matching"]) == (rows, 0)


def test_wrong_key_is_refused(notes_url: str) -> None:
    with pytest.raises(RefusedError, match="master key of version 1, from the key source, is not the one"):
        verify_range(target(notes_url, keys=OTHER_KEYS), ENTRY, 0)
    assert run(notes_url, "SELECT 1 FROM alphapulse_encryption.verifications") == []


def test_before_its_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, bare text)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        verify_range(support.target(database_url), ENTRY, 0)
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        support.verification(database_url, ENTRY)


def test_no_value_is_kept_or_told(notes_url: str, behind: support.Connection) -> None:
    behind.execute(
        "UPDATE notes SET mail = 'canary-7f3a', secret_encrypted = 'canary-7f3a', bare = 'canary-7f3a'"
    )
    found = support.verify(notes_url, ENTRY)
    assert counted(found) == {
        ("mail", "mismatched"): ROWS,
        ("secret", "undecryptable"): ROWS,
        ("bare", "pending"): ROWS,
    }
    kept = run(notes_url, "SELECT v::text FROM alphapulse_encryption.verifications v")
    assert len(kept) == 3
    assert "canary" not in str(kept)
    assert "canary" not in str(found)


def test_progress(notes_url: str) -> None:
    seen: list[int] = []
    verify_range(support.target(notes_url), ENTRY, 1, on_progress=lambda rows, _: seen.append(rows))
    assert seen == [13]


def test_stopped_between_two_batches_it_keeps_no_result(notes_url: str) -> None:
    def stop(*_: object) -> None:
        raise Stopped("enough")

    with pytest.raises(Stopped):
        verify_range(support.target(notes_url), ENTRY, 1, on_progress=stop)
    assert run(notes_url, "SELECT 1 FROM alphapulse_encryption.verifications") == []


def changed(url: str, since: int) -> RangeVerification:
    return verify_changed(support.target(url), ENTRY, since, seconds=60)


def test_rows_set_aside_are_counted_apart(notes_url: str, behind: support.Connection) -> None:
    behind.execute("UPDATE notes SET secret_encrypted = NULL WHERE id IN (1, 2)")
    behind.execute(
        "INSERT INTO alphapulse_encryption.quarantine (table_name, batch_range, key, reason) VALUES "
        "('notes', 0, '{2}', 'x')"
    )
    found = support.verify(notes_url, ENTRY)
    assert named(found) == {("secret", "pending", "1"), ("secret", "quarantined", "2")}
    assert found.reasons == ("notes.secret: 1 values pending", "notes.secret: 1 values quarantined")


def test_only_what_changed_since_is_verified_again(notes_url: str, behind: support.Connection) -> None:
    # Damaged before the verification, and not looked at again: what it found is in its result.
    behind.execute("UPDATE notes SET secret = 99 WHERE id = 3")
    since = support.verify(notes_url, ENTRY).since
    assert since is not None
    assert (changed(notes_url, since).rows, changed(notes_url, since).passed) == (0, True)

    run(notes_url, "UPDATE notes SET tenant = 2 WHERE id IN (7, 8)")
    run(notes_url, "INSERT INTO notes (id) VALUES (1000)")
    run(notes_url, "DELETE FROM notes WHERE id = 9")
    assert (changed(notes_url, since).rows, changed(notes_url, since).passed) == (3, True)

    behind.execute("UPDATE notes SET mail_search = 'x' WHERE id = 8")
    behind.execute("UPDATE notes SET secret = 1 WHERE id = 31")
    found = changed(notes_url, since)
    assert (found.rows, found.passed) == (4, False)
    assert [str(offender) for offender in found.offenders] == [
        "mail token_mismatched at key (8)",
        "secret mismatched at key (31)",
    ]
    # A row keeps the number of its transaction when vacuum freezes it or when the table is written anew.
    for rewrite in ("VACUUM (FREEZE) notes", "VACUUM FULL notes", "CLUSTER notes USING notes_pkey"):
        behind.execute(rewrite.encode())
        assert changed(notes_url, since).rows == 4, rewrite
    # It has kept nothing.
    assert named(support.verification(notes_url, ENTRY)) == {("secret", "mismatched", "3")}


def test_changes_are_told_apart_across_the_end_of_transaction_numbers(notes_url: str) -> None:
    """The server compares them modulo 2^32: what was, as it were, an epoch ago is found by the same 32 bits."""
    since = support.verify(notes_url, ENTRY).since
    assert since is not None
    run(notes_url, "UPDATE notes SET tenant = 2 WHERE id = 7")
    for epoch in range(3):
        assert changed(notes_url, since + epoch * 2**32).rows == 1


def test_changes_in_partitions_are_found(database_url: str) -> None:
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, bare text) PARTITION BY RANGE (id)",
    )
    for number in range(2):
        run(
            database_url,
            f"CREATE TABLE part{number} PARTITION OF notes FOR VALUES FROM ({number * 20}) TO ({number * 20 + 20})",
        )
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, i FROM generate_series(0, 39) AS i")
    support.encrypt(database_url, ENTRY)
    since = support.verify(database_url, ENTRY).since
    assert since is not None
    for key in (3, 33):
        run(
            database_url,
            f"{support.BEHIND} UPDATE notes SET secret = 0 WHERE id = {key}",
        )
    assert [str(offender) for offender in changed(database_url, since).offenders] == [
        "secret mismatched at key (3)",
        "secret mismatched at key (33)",
    ]
    count_rows(support.target(database_url), ENTRY)
    assert run(database_url, COUNTED) == [(40, 40, 0)]


def test_rows_that_the_key_does_not_lead_to_are_missed(notes_url: str, behind: support.Connection) -> None:
    """As after a change of a collation's order: rows are verified by the key's index, and counted without it."""
    database = Database(notes_url)
    count_rows(support.target(database), ENTRY)
    assert run(notes_url, COUNTED) == []
    support.verify(notes_url, ENTRY)
    assert support.verification(notes_url, ENTRY).missing_rows is None
    run(notes_url, "DELETE FROM notes WHERE id = 1")
    run(notes_url, "INSERT INTO notes (id) VALUES (1000), (1001)")
    count_rows(support.target(database), ENTRY)
    assert run(notes_url, COUNTED) == [(41, 40, 0)]
    assert support.verification(notes_url, ENTRY).missing_rows == 0

    ready = "UPDATE pg_index SET indisready = {} WHERE indexrelid = 'notes_pkey'::regclass"
    behind.execute(ready.format("false").encode())
    behind.execute("INSERT INTO notes (id, secret) VALUES (500, 1), (501, 1)")
    behind.execute(ready.format("true").encode())
    found = support.verify(notes_url, ENTRY)
    assert (found.rows, found.passed) == (41, True)
    count_rows(support.target(database), ENTRY)
    assert run(notes_url, COUNTED) == [(43, 41, 2)]
    found = support.verification(notes_url, ENTRY)
    assert (found.missing_rows, found.passed) == (2, False)
    assert found.reasons[0].startswith("2 rows were not reached in the order of the primary key")
    behind.execute("REINDEX TABLE notes")
    found = support.verify(notes_url, ENTRY)
    assert named(found) == {("secret", "pending", "500"), ("secret", "pending", "501")}
    assert found.missing_rows is None


def test_values_that_cannot_be_read_do_not_keep_the_others_from_being_verified(
    postgres: EmbeddedPostgres,
) -> None:
    """In a database without an encoding a text may be no text at all."""
    run(
        postgres.url("postgres"),
        "CREATE DATABASE no_encoding TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'",
    )
    url = postgres.url("no_encoding")
    try:
        run(url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, bare text)")
        run(url, "INSERT INTO notes SELECT i, 'm' || i, i, 'b' FROM generate_series(1, 30) AS i")
        run(url, "UPDATE notes SET mail = convert_from('\\xff', 'SQL_ASCII') WHERE id = 13")
        support.add_columns(url, ENTRY)
        with pytest.raises(RowsQuarantined):
            support.backfill(url, ENTRY)
        since = support.verify(url, ENTRY).since
        found = support.verify(url, ENTRY)
        assert named(found) == {(column, "quarantined", "13") for column in ("mail", "secret", "bare")}
        assert (found.rows, found.columns["mail"]["matching"]) == (30, 29)
        assert since is not None
        with application_behind(url) as behind:
            behind.execute("UPDATE notes SET bare = convert_from('\\xff', 'SQL_ASCII') WHERE id = 20")
        with pytest.raises(RefusedError, match="values that cannot be read"):
            changed(url, since)
        assert ("bare", "mismatched", "20") in named(support.verify(url, ENTRY))
    finally:
        run(postgres.url("postgres"), "DROP DATABASE no_encoding WITH (FORCE)")
