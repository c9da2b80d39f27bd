"""An approval needs a person, a verified table, a recent backup, and nobody else in the way."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.approvals import (
    approve_drop,
    describe,
    list_approvals,
    revoke,
)
from alphapulse_encryption.migration.database import Database
from alphapulse_encryption.migration.definition import read_table
from alphapulse_encryption.migration.switch import switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk

USERS = walk.CATALOGUE.table("users")


def count(url: str) -> int:
    return int(walk.value(url, "SELECT count(*) FROM encryption_approvals"))


@pytest.fixture
def ready_url(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> str:
    """A database in which `users` may be approved."""
    walk.switch(sample_url, USERS)
    walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir())
    return sample_url


def test_it_binds_the_state_it_was_given_for(ready_url: str) -> None:
    approval = walk.approve(ready_url, USERS)
    with Database(ready_url).session("read") as connection:
        assert approval.definition == read_table(connection, USERS).fingerprint()
        assert list_approvals(connection) == list_approvals(connection, USERS) == (approval,)
    assert approval.catalogue_entry == walk.CATALOGUE.fingerprint("users")
    assert approval.key_check == walk.KEYS.check_value(1)
    assert approval.backup_id == walk.value(ready_url, "SELECT max(id) FROM encryption_backups")
    assert approval.database_role == walk.value(ready_url, "SELECT session_user::text")
    assert approval.expires_at - approval.approved_at == timedelta(hours=24)
    assert approval.is_open


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"confirmation": "user"}, "confirmation"),
        ({"confirmation": "users "}, "confirmation"),
        ({"approver": "  "}, "name of the person"),
        ({"reason": ""}, "reason"),
        ({"valid_for": timedelta()}, "valid"),
        ({"valid_for": timedelta(days=8)}, "valid"),
    ],
)
def test_words_that_are_missing_or_wrong_are_refused(
    ready_url: str, words: dict[str, object], reason: str
) -> None:
    given: dict[str, Any] = {"approver": "Ada", "reason": "done", "confirmation": "users", **words}
    with pytest.raises(RefusedError, match=reason):
        approve_drop(Database(ready_url), walk.CATALOGUE, USERS, walk.KEYS, walk.ACTOR, **given)
    assert count(ready_url) == 0


def test_the_ciphertext_has_to_be_right_and_verified_since(sample_url: str) -> None:
    walk.encrypt(sample_url, USERS)
    walk.verify(sample_url, USERS)
    with pytest.raises(RefusedError, match="authority"):
        walk.approve(sample_url, USERS)
    switch_to_ciphertext(Database(sample_url), USERS, walk.KEYS, walk.ACTOR)
    walk.query(sample_url, "DELETE FROM encryption_verifications WHERE batch_range = 0")
    with pytest.raises(RefusedError, match="not verified"):
        walk.approve(sample_url, USERS)
    walk.verify(sample_url, USERS)
    with pytest.raises(RefusedError, match="no backup"):
        walk.approve(sample_url, USERS)
    assert count(sample_url) == 0


def test_the_backup_has_to_be_of_this_table_recent_and_whole(
    ready_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(ready_url, "UPDATE encryption_backups SET tables = '{trades}'")
    with pytest.raises(RefusedError, match="no backup"):
        walk.approve(ready_url, USERS)
    walk.query(
        ready_url, "UPDATE encryption_backups SET tables = '{users}', taken_at = now() - interval '25h'"
    )
    with pytest.raises(RefusedError, match="24 hours"):
        walk.approve(ready_url, USERS)
    taken = walk.backup(ready_url, (USERS,), tmp_path / "second", postgres.bin_dir())
    with Path(taken.backup.location).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(RefusedError, match="altered"):
        walk.approve(ready_url, USERS)
    assert count(ready_url) == 0


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("CREATE VIEW contacts AS SELECT id, email FROM users", "view public.contacts"),
        ("CREATE MATERIALIZED VIEW contacts AS SELECT lower(email) AS e FROM users", "public.contacts"),
        (
            "UPDATE users SET email = email || id; CREATE TABLE invitations (email varchar(320) "
            "CONSTRAINT invited REFERENCES users (email))",
            "constraint invited on table public.invitations",
        ),
        (
            "CREATE FUNCTION mail_of(bigint) RETURNS text BEGIN ATOMIC SELECT email FROM users WHERE id = "
            "$1; END",
            "function public.mail_of(bigint)",
        ),
        ("CREATE POLICY own ON users USING (email = current_user)", "policy own on table public.users"),
        ("CREATE PUBLICATION out FOR TABLE users (id, email)", "publication out"),
        (
            "ALTER TABLE users ADD domain text GENERATED ALWAYS AS (split_part(email, '@', 2)) STORED",
            "column domain of table public.users",
        ),
        (
            "ALTER TABLE users REPLICA IDENTITY USING INDEX users_email_key",
            "replica identity of users_email_key",
        ),
    ],
)
def test_objects_of_others_are_named_and_stand_in_the_way(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, statement: str, named: str
) -> None:
    walk.switch(sample_url, USERS)
    if "REPLICA" in statement:
        walk.query(sample_url, "ALTER TABLE users ALTER email SET NOT NULL")
    with_view = statement.replace("UPDATE users SET email = email || id; ", "")
    walk.query(sample_url, with_view)
    walk.verify(sample_url, USERS)
    walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir())
    with pytest.raises(RefusedError) as caught:
        walk.approve(sample_url, USERS)
    assert named in str(caught.value)
    assert count(sample_url) == 0


def test_our_own_objects_do_not_stand_in_the_way(ready_url: str) -> None:
    walk.query(ready_url, "CREATE STATISTICS s ON email, is_active FROM users")
    walk.query(ready_url, "ALTER TABLE users ADD CONSTRAINT short CHECK (length(email || first_name) < 9999)")
    walk.query(ready_url, "CREATE INDEX by_lower ON users (lower(email)) WHERE phone_number IS NOT NULL")
    assert walk.approve(ready_url, USERS).is_open


def test_a_partitioned_table_is_refused(ready_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    walk.query(ready_url, "CREATE TABLE more_users () INHERITS (users)")
    with pytest.raises(RefusedError, match="inheritance"):
        walk.approve(ready_url, USERS)


def test_an_approval_can_be_revoked_once(ready_url: str) -> None:
    approval = walk.approve(ready_url, USERS)
    database = Database(ready_url)
    revoke(database, approval.id, walk.ACTOR)
    with database.session("read") as connection:
        assert not list_approvals(connection)[0].is_open
    with pytest.raises(RefusedError, match="could be revoked"):
        revoke(database, approval.id, walk.ACTOR)
    actions = walk.query(ready_url, "SELECT action FROM encryption_audit_log ORDER BY id DESC LIMIT 2")
    assert actions == [("revoke_approval",), ("approve_drop",)]


def test_it_says_what_will_go_what_stays_and_how_it_is_undone(ready_url: str) -> None:
    with Database(ready_url).session("describe") as connection:
        text = describe(connection, read_table(connection, USERS))
    for part in (
        "column email (character varying(320))",
        "constraint users_email_key: UNIQUE (email)",
        "index users_last_name_idx",
        "NOT NULL on email_encrypted",
        "uniqueness by the index idx_user_email_search",
        "restore_plaintext",
    ):
        assert part in text
    assert "encryption_pending" not in text
