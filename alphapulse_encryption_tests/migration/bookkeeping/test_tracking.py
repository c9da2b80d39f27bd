"""The bookkeeping: made once, told the truth, and not to be written over."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import check_key, ensure_key
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, KEYS, MASTER_KEY, OTHER_KEYS, run

ENTRY = support.table("notes", "secret", "other")


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, secret text, other text)")
    run(database_url, "INSERT INTO notes SELECT i, 'secret ' || i, NULL FROM generate_series(1, 20) AS i")
    return database_url


def ensure(url: str) -> None:
    with Database(url).session("begin") as connection:
        ensure_bookkeeping(connection)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE alphapulse_encryption.audit_log SET actor = 'nobody'",
        "DELETE FROM alphapulse_encryption.audit_log",
        "TRUNCATE alphapulse_encryption.audit_log",
    ],
)
def test_audit_log_is_append_only(notes_url: str, statement: str) -> None:
    support.encrypt(notes_url, ENTRY)
    before = run(notes_url, "SELECT * FROM alphapulse_encryption.audit_log ORDER BY id")
    with pytest.raises(psycopg.errors.RaiseException, match="append-only"):
        run(notes_url, statement)
    assert run(notes_url, "SELECT * FROM alphapulse_encryption.audit_log ORDER BY id") == before


def test_audit_log_tells_who_did_what(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    log = run(
        notes_url,
        "SELECT action, actor, run_id, table_name, database_role, details FROM "
        "alphapulse_encryption.audit_log ORDER BY id",
    )
    assert [entry[0] for entry in log] == ["add_columns", "guard", "backfill"]
    assert {entry[1:5] for entry in log} == {("tests", "run-7", "notes", "postgres")}
    assert log[0][5] == {"columns": ["secret_encrypted", "other_encrypted"]}
    assert log[2][5] == {"batch_range": 0, "rows": 20, "values": 20, "quarantined": 0}


def test_audit_is_undone_with_what_it_tells_of(notes_url: str) -> None:
    ensure(notes_url)
    with (
        Database(notes_url).session("try") as connection,
        pytest.raises(RuntimeError),
        connection.transaction(),
    ):
        audit(connection, ACTOR, "try", ENTRY)
        raise RuntimeError
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == 0


def test_another_key_is_refused(notes_url: str) -> None:
    support.add_columns(notes_url, ENTRY)
    stored = run(notes_url, "SELECT key_version, check_value FROM alphapulse_encryption.key_checks")
    assert stored == [(1, KEYS.check_value(1))]
    with Database(notes_url).session("check") as connection:
        check_key(connection, KEYS)
        for check in (check_key, ensure_key):
            with pytest.raises(
                RefusedError, match="master key of version 1, from the key source, is not the one"
            ) as caught:
                check(connection, OTHER_KEYS)
            assert OTHER_KEYS.check_value(1) not in str(caught.value)
        # A later version beside the same old key is welcome to be read, with a changed old key it is not.
        ensure_key(connection, KeyRing({1: MASTER_KEY, 2: bytes(32)}, 1))
        with pytest.raises(RefusedError, match="version 1"):
            ensure_key(connection, KeyRing({1: bytes(32), 2: bytes(32)}, 1))
    with pytest.raises(RefusedError, match="version 1"):
        support.add_columns(notes_url, ENTRY, keys=OTHER_KEYS)
    assert run(notes_url, "SELECT key_version FROM alphapulse_encryption.key_checks ORDER BY 1") == [(1,)]


def test_steps_before_their_time(notes_url: str) -> None:
    with pytest.raises(RefusedError, match=r"notes has no encrypted columns yet.*--add-columns"):
        support.backfill(notes_url, ENTRY)
    assert run(notes_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'alphapulse_encryption'") == []
    support.add_columns(notes_url, ENTRY, ranges=2)
    with pytest.raises(RefusedError, match="range 02 of notes is not planned"):
        support.backfill(notes_url, ENTRY, 2)


def test_status_goes_from_pending_to_completed(notes_url: str) -> None:
    def status() -> set[tuple[object, ...]]:
        return set(
            run(notes_url, "SELECT column_name, status, completed_at IS NOT NULL FROM encryption_migrations")
        )

    support.add_columns(notes_url, ENTRY, ranges=2)
    assert status() == {("secret", "pending", False), ("other", "pending", False)}
    support.backfill(notes_url, ENTRY, 0)
    assert status() == {("secret", "in_progress", False), ("other", "in_progress", False)}
    support.backfill(notes_url, ENTRY, 1)
    assert status() == {("secret", "completed", True), ("other", "completed", True)}
    run(notes_url, "UPDATE notes SET secret = 'new'")
    support.backfill(notes_url, ENTRY, 1)
    assert status() == {("secret", "completed", True), ("other", "completed", True)}
    assert run(
        notes_url, "SELECT batch_range, rows_processed FROM alphapulse_encryption.ranges ORDER BY 1"
    ) == [
        (0, 10),
        (1, 20),
    ]
