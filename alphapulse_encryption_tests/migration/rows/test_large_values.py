"""Values of any size: what is read at once is bounded by its bytes, before it is read, and nothing is left out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from psycopg.sql import SQL, Composed

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import backfill, batches
from alphapulse_encryption.migration.rows.backfill import Backfill
from alphapulse_encryption.migration.rows.batches import BATCH_BYTES, rows_within_bytes, sweep
from alphapulse_encryption.migration.rows.engine import NotFinished, RowsQuarantined, finish_under_lock
from alphapulse_encryption.migration.rows.reader import Reader
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.rows.verify import verify_changed, verify_range
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run, target

ENTRY = support.table("scans", "body", "note")
SMALL, LARGE = 300, 12
# Compressed they take a hundredth of it, and out of line they are all the same.
MEGABYTES = 3


@pytest.fixture
def scans_url(database_url: str) -> str:
    """Small rows, then large ones: what the first rows are like says nothing of the next."""
    run(database_url, "CREATE TABLE scans (id int PRIMARY KEY, body text, note jsonb)")
    run(
        database_url,
        "INSERT INTO scans SELECT i, repeat(md5(i::text), CASE WHEN i > %s THEN %s * 32768 ELSE 1 END), "
        "to_jsonb(repeat('n', CASE WHEN i > %s THEN 1500000 ELSE 3 END)) FROM generate_series(1, %s) i",
        *(SMALL, MEGABYTES, SMALL + LARGE // 2, SMALL + LARGE),
    )
    return database_url


def within(rows: int, taken: int) -> bool:
    # A row that is larger than a batch comes alone. What is small is estimated, by how it is stored.
    return rows == 1 or taken <= BATCH_BYTES * 1.1


def test_a_batch_that_is_read_has_no_more_bytes_than_allowed(scans_url: str) -> None:
    support.add_columns(scans_url, ENTRY)
    operation = Backfill(target(scans_url), ENTRY)
    taken: list[tuple[int, int]] = []
    with Sessions(operation.target) as sessions:
        sessions.open()
        reader = Reader(
            sessions, operation, operation.read_table(sessions.writer), None, None, at_leisure=True
        )
        # Its threads are not begun.
        while (columns := reader._next()) is not None:
            assert isinstance(columns, list)
            taken.append((len(columns[0]), batches.size(columns)))
    assert sum(rows for rows, _ in taken) == SMALL + LARGE
    assert all(within(*one) for one in taken)
    assert max(rows for rows, _ in taken) >= SMALL


def test_large_values_are_written_and_verified_in_whole(scans_url: str) -> None:
    support.encrypt(scans_url, ENTRY)
    assert support.assert_encrypted(scans_url, ENTRY) == 2 * (SMALL + LARGE)
    progress: list[int] = []
    found = verify_range(target(scans_url), ENTRY, 0, on_progress=lambda rows, _: progress.append(rows))
    assert found.passed and found.rows == SMALL + LARGE
    steps = [after - before for before, after in zip([0, *progress], progress, strict=False)]
    # Plaintext and ciphertext of a large row are more than a batch may have.
    assert steps[-LARGE:] == [1] * LARGE


def test_of_a_sweep_no_row_is_missing_and_none_comes_twice(scans_url: str) -> None:
    with Database(scans_url).session("sweep") as connection:
        definition = read_table(connection, ENTRY)

        def keys() -> Iterator[tuple[int, list[int]]]:
            def select(condition: Composed) -> Composed:
                rows = SQL("SELECT t.id::text, t.body, t.note::text FROM {} t WHERE {}")
                return rows.format(definition.identifier, condition)

            for columns in sweep(connection, definition, select, rows=5_000):
                yield batches.size(columns), [int(key or 0) for key in columns[0]]

        found = list(keys())
    assert sorted(key for _, some in found for key in some) == list(range(1, SMALL + LARGE + 1))
    assert all(within(len(some), taken) for taken, some in found)


def test_large_values_changed_since_a_verification_are_looked_at(scans_url: str) -> None:
    support.encrypt(scans_url, ENTRY)
    since = support.verify(scans_url, ENTRY).since
    assert since is not None
    # Two ciphertexts in each other's row, one of them large: each opens, and is of another value.
    run(scans_url, "ALTER TABLE scans DISABLE TRIGGER USER")
    run(
        scans_url,
        "UPDATE scans a SET body_encrypted = b.body_encrypted FROM scans b WHERE (a.id, b.id) IN ((1, %s), (%s, 1))",
        *(SMALL + LARGE, SMALL + LARGE),
    )
    found = verify_changed(target(scans_url), ENTRY, since, seconds=60)
    assert [(offender.problem, offender.key) for offender in found.offenders] == [
        ("mismatched", ("1",)),
        ("mismatched", (str(SMALL + LARGE),)),
    ]


def test_the_last_rows_under_a_lock_are_bounded_as_well(scans_url: str) -> None:
    support.add_columns(scans_url, ENTRY)
    operation = Backfill(target(scans_url), ENTRY)
    with Database(scans_url).session("finish") as connection, connection.transaction():
        definition = operation.read_table(connection)
        done = finish_under_lock(operation, connection, definition, most=SMALL + LARGE)
    assert done.rows == SMALL + LARGE
    assert done.batches >= LARGE
    assert support.assert_encrypted(scans_url, ENTRY) == 2 * (SMALL + LARGE)


def test_a_row_too_large_to_be_sent_and_read_back_is_set_aside(
    scans_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the server's limit of 1 GB lowered: told before it is encrypted, and all others are."""
    monkeypatch.setattr(backfill, "LARGEST_ROW", 4_000_000)
    support.add_columns(scans_url, ENTRY)
    with pytest.raises(RowsQuarantined, match="body"):
        support.backfill_all(scans_url, ENTRY)
    too_large = [str(i) for i in range(SMALL + LARGE // 2 + 1, SMALL + LARGE + 1)]
    aside = run(scans_url, "SELECT key, reason FROM alphapulse_encryption.quarantine ORDER BY key")
    assert [key for key, _ in aside] == [[key] for key in too_large]
    assert all("body" in reason for _, reason in aside)
    left = "SELECT array_agg(id::text ORDER BY id) FROM scans WHERE body_encrypted IS NULL"
    assert support.value(scans_url, left) == too_large
    found = support.verify(scans_url, ENTRY)
    assert [
        (found.columns[name]["matching"], found.columns[name]["quarantined"]) for name in ("body", "note")
    ] == [(SMALL + LARGE // 2, LARGE // 2)] * 2
    # In a transaction of the caller's as well.
    operation = Backfill(target(scans_url), ENTRY)
    with Database(scans_url).session("finish") as connection, connection.transaction():
        definition = operation.read_table(connection)
        with pytest.raises(NotFinished):
            finish_under_lock(operation, connection, definition, most=SMALL + LARGE)
    # Without the value that is too large, the row goes through.
    run(scans_url, "UPDATE scans SET body = 'short'")
    support.backfill_all(scans_url, ENTRY)
    assert support.verify(scans_url, ENTRY).passed


def test_a_value_that_the_server_refuses_to_show_is_named_by_the_verification(database_url: str) -> None:
    """As one whose plaintext and ciphertext together are too large for it to send: no DataError, but of one row."""
    run(database_url, "CREATE TYPE card AS (number int)")
    shown = (
        "CREATE OR REPLACE FUNCTION shown(card) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$ BEGIN {} "
        "RETURN ($1).number; END $$"
    )
    run(database_url, shown.format(""))
    run(database_url, "CREATE CAST (card AS text) WITH FUNCTION shown(card)")
    run(database_url, "CREATE TABLE scans (id int PRIMARY KEY, body card, note jsonb)")
    run(database_url, "INSERT INTO scans SELECT i, ROW(i)::card, '1' FROM generate_series(1, 10) i")
    support.encrypt(database_url, ENTRY)
    since = support.verify(database_url, ENTRY).since
    assert since is not None
    refuses = "IF ($1).number = 7 THEN RAISE EXCEPTION USING ERRCODE = '54000'; END IF;"
    run(database_url, shown.format(refuses))
    found = support.verify(database_url, ENTRY)
    assert [str(offender) for offender in found.offenders] == ["body mismatched at key (7)"]
    assert found.columns["body"]["matching"] == 9
    assert found.columns["note"]["matching"] == 10
    run(database_url, "UPDATE scans SET id = id")
    with pytest.raises(RefusedError, match="values that cannot be read"):
        verify_changed(target(database_url), ENTRY, since, seconds=60)


def test_a_table_without_large_values_is_not_asked_for_their_sizes(database_url: str) -> None:
    run(database_url, "CREATE TABLE scans (id int PRIMARY KEY, body text, note jsonb)")
    run(database_url, "INSERT INTO scans SELECT i, 'b', '1' FROM generate_series(1, 10) i")
    support.add_columns(database_url, ENTRY)
    with Database(database_url).session("look") as connection:
        definition = read_table(connection, ENTRY)
        assert not definition.toasted
        assert rows_within_bytes(connection, definition, sql.EVERYTHING, [], 5_000) == 5_000
