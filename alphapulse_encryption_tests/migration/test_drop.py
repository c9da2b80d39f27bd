"""The drop: refused with nothing changed at the least doubt, exact and used up once when it is allowed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration import drop as drop_module
from alphapulse_encryption.migration.approvals import list_approvals, revoke
from alphapulse_encryption.migration.batches import plan_by_key
from alphapulse_encryption.migration.database import Database
from alphapulse_encryption.migration.ddl import in_short_transaction
from alphapulse_encryption.migration.definition import read_table
from alphapulse_encryption.migration.drop import drop_plaintext
from alphapulse_encryption.migration.restore import restore_plaintext
from alphapulse_encryption.migration.sql import any_pending
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk

USERS = walk.CATALOGUE.table("users")
PLAINTEXT = ("email", "phone_number", "first_name", "last_name", "address_data", "two_factor_secret")


@pytest.fixture
def approved_url(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> str:
    """A database in which the drop of `users` is approved."""
    walk.switch(sample_url, USERS)
    walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir())
    walk.approve(sample_url, USERS)
    return sample_url


def state(url: str) -> tuple[object, ...]:
    """What a refused drop has to leave as it is."""
    return (
        walk.columns_of(url, "users"),
        walk.query(url, "SELECT authority, stage, set_aside FROM encryption_tables ORDER BY table_name"),
        walk.query(url, "SELECT id, consumed_at, revoked_at FROM encryption_approvals ORDER BY id"),
    )


def refused(url: str, reason: str, act: Callable[[], object] | None = None) -> None:
    before = state(url)
    with pytest.raises(RefusedError, match=reason):
        (act or (lambda: walk.drop(url, USERS)))()
    assert state(url) == before
    assert walk.value(url, "SELECT count(*) FROM encryption_definitions") == 0


def test_an_approved_drop_takes_the_columns_and_uses_the_approval_up(approved_url: str) -> None:
    result = walk.drop(approved_url, USERS)

    assert set(result.columns) == set(PLAINTEXT)
    assert not set(walk.columns_of(approved_url, "users")) & set(PLAINTEXT)
    assert result.constraints == ("users_email_key",)
    assert set(result.indexes) == {"users_last_name_idx", "users_phone_number_idx"}
    assert result.required == ("email_encrypted",)
    required = (
        "SELECT attnotnull FROM pg_attribute "
        "WHERE attrelid = 'users'::regclass AND attname = 'email_encrypted'"
    )
    assert walk.value(approved_url, required) is True
    leftovers = (
        "SELECT count(*) FROM pg_constraint WHERE conrelid = 'users'::regclass "
        "AND conname LIKE '%_encryption_%'"
    )
    assert walk.value(approved_url, leftovers) == 0
    assert walk.value(approved_url, "SELECT count(*) FROM pg_trigger WHERE tgname LIKE 'zzz%'") == 0
    assert walk.query(approved_url, "SELECT consumed_by FROM encryption_approvals") == [("tests",)]
    assert walk.query(approved_url, "SELECT authority, stage FROM encryption_tables") == [
        ("ciphertext", "dropped")
    ]
    details = walk.value(
        approved_url, "SELECT details FROM encryption_audit_log WHERE action = 'drop_plaintext'"
    )
    assert details["approver"] == "Ada" and set(details["columns"]) == set(PLAINTEXT)

    again = walk.drop(approved_url, USERS)
    assert not again.changed and again.columns == ()


def test_values_are_still_found_unique_and_readable_after_it(approved_url: str) -> None:
    email, key = walk.query(approved_url, "SELECT email, id FROM users WHERE id = 42")[0]
    token = walk.value(approved_url, "SELECT email_search FROM users WHERE id = 42")
    walk.drop(approved_url, USERS)
    found = walk.query(approved_url, "SELECT id, email_encrypted FROM users WHERE email_search = %s", token)
    assert [(row[0], walk.CIPHER.decrypt(row[1], "user_pii")) for row in found] == [(key, email)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        walk.query(approved_url, "UPDATE users SET email_search = %s WHERE id = 43", token)


def test_without_an_approval(sample_url: str) -> None:
    walk.switch(sample_url, USERS)
    refused(sample_url, "no approval")


def test_with_an_approval_of_another_table(
    approved_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(approved_url, "UPDATE encryption_approvals SET table_name = 'trades'")
    refused(approved_url, "no approval")


def test_with_an_expired_approval(approved_url: str) -> None:
    walk.query(approved_url, "UPDATE encryption_approvals SET expires_at = now() - interval '1s'")
    refused(approved_url, "expired")


def test_with_a_revoked_approval(approved_url: str) -> None:
    revoke(Database(approved_url), 1, walk.ACTOR)
    refused(approved_url, "revoked")


def test_with_a_used_approval(approved_url: str) -> None:
    walk.query(approved_url, "UPDATE encryption_approvals SET consumed_at = now(), consumed_by = 'x'")
    refused(approved_url, "used already")


def test_an_approval_used_for_a_drop_does_not_serve_for_the_next(approved_url: str) -> None:
    walk.drop(approved_url, USERS)
    restore_plaintext(Database(approved_url), USERS, walk.CIPHER, walk.KEYS, walk.ACTOR)
    with pytest.raises(RefusedError, match="used already"):
        walk.drop(approved_url, USERS)
    assert set(PLAINTEXT) <= set(walk.columns_of(approved_url, "users"))


def test_when_the_authority_went_back(approved_url: str) -> None:
    walk.query(approved_url, "UPDATE encryption_tables SET authority = 'plaintext'")
    refused(approved_url, "authority")


def test_when_the_definition_changed(approved_url: str) -> None:
    walk.query(approved_url, "ALTER TABLE users ADD COLUMN nickname text")
    walk.verify(approved_url, USERS)
    refused(approved_url, "definition changed")


def test_when_the_catalogue_changed(approved_url: str) -> None:
    entry = USERS.model_copy(update={"columns": USERS.columns[:-1]})
    refused(
        approved_url,
        "catalogue's entry changed",
        lambda: walk.drop(approved_url, entry, Catalogue(tables=(entry,))),
    )


def test_when_the_key_changed(approved_url: str) -> None:
    keys = KeyRing({1: bytes(range(32)), 2: bytes(range(1, 33))}, 2)
    refused(
        approved_url,
        "master key changed",
        lambda: drop_plaintext(
            Database(approved_url), walk.CATALOGUE, USERS, get_format("AES-256-GCM", keys), keys, walk.ACTOR
        ),
    )


def test_when_a_row_was_damaged_behind_the_trigger(approved_url: str) -> None:
    walk.query(
        approved_url,
        "SET session_replication_role = replica; UPDATE users SET last_name_encrypted = NULL, last_name = "
        "NULL WHERE id = 4; UPDATE users SET first_name = 'Eve' WHERE id = 5",
    )
    refused(approved_url, r"first_name mismatched at key \(5\)")


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update",
        "DROP TRIGGER zzz_encryption_guard_insert ON users",
    ],
)
def test_when_the_guard_is_missing_or_disabled(approved_url: str, statement: str) -> None:
    walk.query(approved_url, statement)
    refused(approved_url, "guard")


def test_when_the_pending_index_is_missing(approved_url: str) -> None:
    walk.query(approved_url, "DROP INDEX users_encryption_pending")
    refused(approved_url, "users_encryption_pending")


def test_when_the_backup_is_gone_or_damaged(approved_url: str, tmp_path: Path) -> None:
    (file,) = tmp_path.glob("*.dump.age")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(approved_url, "altered")
    file.unlink()
    refused(approved_url, "cannot be read")


def test_when_somebody_elses_view_came_to_depend_on_it(approved_url: str) -> None:
    walk.query(approved_url, "CREATE VIEW contacts AS SELECT id, email FROM users")
    refused(approved_url, "contacts")


def test_when_a_row_is_pending_before_the_lock(approved_url: str) -> None:
    walk.query(approved_url, "UPDATE users SET last_name = 'Late' WHERE id = 11")
    refused(approved_url, r"last_name pending at key \(11\)")


def locked_part(url: str) -> None:
    """What runs under the lock, without what comes before it."""
    with Database(url).session("drop") as connection:
        approval = list_approvals(connection, USERS)[0]
        in_short_transaction(
            connection,
            "drop the plaintext of users",
            lambda: drop_module._drop(connection, walk.CATALOGUE, USERS, walk.KEYS, walk.ACTOR, approval),
            attempts=1,
            lock_timeout="50ms",
        )


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE users SET last_name = 'Late' WHERE id = 11", "pending"),
        ("ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update", "guard"),
        ("ALTER TABLE users ALTER username TYPE text", "definition changed"),
        ("UPDATE encryption_approvals SET expires_at = now() - interval '1s'", "expired"),
        ("CREATE VIEW contacts AS SELECT id, email FROM users", "contacts"),
        ("UPDATE encryption_tables SET authority = 'plaintext'", "another run"),
    ],
)
def test_what_changed_at_the_last_moment_is_seen_under_the_lock(
    approved_url: str, statement: str, reason: str
) -> None:
    walk.query(approved_url, statement)
    refused(approved_url, reason, lambda: locked_part(approved_url))


def test_when_the_lock_cannot_be_had(approved_url: str) -> None:
    with psycopg.connect(approved_url) as reader:
        reader.execute("SELECT count(*) FROM users")
        refused(approved_url, "kept its lock", lambda: locked_part(approved_url))


def test_the_look_under_the_lock_does_not_grow_with_the_table(approved_url: str) -> None:
    with Database(approved_url).session("explain") as connection:
        plan_by_key(connection)
        definition = read_table(connection, USERS)
        everything = SQL("{}").format(SQL("true"))
        plan = connection.execute(SQL("EXPLAIN {}").format(any_pending(definition, everything))).fetchall()
    scans = [line for (line,) in plan if "Scan" in line]
    assert len(scans) == 1 and "users_encryption_pending" in scans[0]


def test_a_drop_killed_before_not_null_is_continued(approved_url: str) -> None:
    locked_part(approved_url)
    with pytest.raises(psycopg.errors.CheckViolation):
        walk.query(approved_url, "UPDATE users SET email_encrypted = NULL WHERE id = 1")
    result = walk.drop(approved_url, USERS)
    assert result.changed and result.columns == () and result.required == ("email_encrypted",)
    with pytest.raises(psycopg.errors.NotNullViolation):
        walk.query(approved_url, "UPDATE users SET email_encrypted = NULL WHERE id = 1")


def test_writes_between_approval_and_drop_do_not_stand_in_its_way(approved_url: str) -> None:
    envelope = walk.CIPHER.encrypt("Nakamura", "user_personal")
    walk.query(approved_url, "UPDATE users SET last_name_encrypted = %s WHERE id = 20", envelope)
    walk.query(approved_url, "DELETE FROM users WHERE id = 21")
    walk.drop(approved_url, USERS)
    assert walk.value(approved_url, "SELECT last_name_encrypted FROM users WHERE id = 20") == envelope
