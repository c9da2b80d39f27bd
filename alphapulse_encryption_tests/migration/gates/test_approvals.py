"""An approval needs a person, a verified table, a recent backup, and nobody else in the way."""

from __future__ import annotations

import base64
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.gates.approvals import approve_drop, describe, revoke
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.conftest import Unchanged
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")


def count(url: str) -> int:
    return int(walk.value(url, "SELECT count(*) FROM alphapulse_encryption.approvals"))


def test_it_binds_the_state_it_was_given_for(ready_url: str) -> None:
    approval = walk.approve(ready_url, USERS)
    with Database(ready_url).session("read") as connection:
        assert list_approvals(connection) == list_approvals(connection, USERS) == (approval,)
    assert approval.catalogue_entry == walk.CATALOGUE.fingerprint("users")
    assert approval.key_check == walk.KEYS.check_value(1)
    assert approval.backup_id == walk.value(ready_url, "SELECT max(id) FROM alphapulse_encryption.backups")
    assert approval.database_role == walk.value(ready_url, "SELECT session_user::text")
    assert approval.expires_at - approval.approved_at == timedelta(hours=24)
    assert approval.is_open


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ({"confirmation": "user"}, "confirmation"),
        ({"confirmation": "users "}, "confirmation"),
        ({"approver": "  "}, "name of the person"),
        ({"approver": "Ada\x1b[2J"}, "name of the person"),
        ({"approver": "A" * 201}, "name of the person"),
        ({"reason": ""}, "reason"),
        ({"reason": "so\n✓ users: verified"}, "reason"),
        ({"valid_for": timedelta()}, "valid"),
        ({"valid_for": timedelta(days=8)}, "valid"),
    ],
)
def test_words_that_are_missing_or_wrong_are_refused(
    ready_url: str, words: dict[str, object], reason: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {
        **{"approver": "Ada", "reason": "done", "confirmation": "users", "backups": tmp_path},
        **words,
    }
    with pytest.raises(RefusedError, match=reason):
        approve_drop(walk.target(ready_url), USERS, **given)
    assert count(ready_url) == 0


def test_the_ciphertext_has_to_be_right_and_verified_since(after: After) -> None:
    url = after("verified")
    with pytest.raises(RefusedError, match="authority"):
        walk.approve(url, USERS)
    switch_to_ciphertext(walk.target(url), USERS)
    walk.query(url, "DELETE FROM alphapulse_encryption.verifications WHERE batch_range = 0")
    with pytest.raises(RefusedError, match="not verified"):
        walk.approve(url, USERS)
    walk.verify(url, USERS)
    with pytest.raises(RefusedError, match="no backup"):
        walk.approve(url, USERS)
    assert count(url) == 0


def test_the_backup_has_to_be_of_this_table_recent_and_whole(
    ready_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.rewrite(ready_url, "UPDATE alphapulse_encryption.backups SET tables = '{trades}'")
    with pytest.raises(RefusedError, match="no backup"):
        walk.approve(ready_url, USERS)
    walk.rewrite(
        ready_url,
        "UPDATE alphapulse_encryption.backups SET tables = '{users}', taken_at = now() - interval '25h'",
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
    after: After, postgres: EmbeddedPostgres, tmp_path: Path, statement: str, named: str
) -> None:
    url = after("switched")
    if "REPLICA" in statement:
        walk.query(url, "ALTER TABLE users ALTER email SET NOT NULL")
    with_view = statement.replace("UPDATE users SET email = email || id; ", "")
    walk.query(url, with_view)
    walk.verify(url, USERS)
    walk.backup(url, (USERS,), tmp_path, postgres.bin_dir())
    with pytest.raises(RefusedError) as caught:
        walk.approve(url, USERS)
    assert named in str(caught.value)
    assert count(url) == 0


def test_our_own_objects_do_not_stand_in_the_way(ready_url: str) -> None:
    walk.query(ready_url, "CREATE STATISTICS s ON email, is_active FROM users")
    walk.query(ready_url, "ALTER TABLE users ADD CONSTRAINT short CHECK (length(email || first_name) < 9999)")
    walk.query(ready_url, "CREATE INDEX by_lower ON users (lower(email)) WHERE phone_number IS NOT NULL")
    assert walk.approve(ready_url, USERS).is_open


def test_a_partitioned_table_is_refused(ready_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    walk.query(ready_url, "CREATE TABLE more_users () INHERITS (users)")
    with pytest.raises(ConfigurationError, match="more_users"):
        walk.approve(ready_url, USERS)


def test_an_approval_can_be_revoked_once(ready_url: str) -> None:
    approval = walk.approve(ready_url, USERS)
    database = Database(ready_url)
    revoked = revoke(database, approval.id, walk.ACTOR, operator="Grace", reason="too early")
    assert "revoked by Grace at " in str(revoked)
    details = walk.value(
        ready_url, "SELECT details FROM alphapulse_encryption.audit_log ORDER BY id DESC LIMIT 1"
    )
    assert (details["operator"], details["reason"], details["of_table"]) == ("Grace", "too early", "users")
    with database.session("read") as connection:
        assert not list_approvals(connection)[0].is_open
    with pytest.raises(RefusedError, match="could be revoked"):
        revoke(database, approval.id, walk.ACTOR)
    actions = walk.query(
        ready_url, "SELECT action FROM alphapulse_encryption.audit_log ORDER BY id DESC LIMIT 2"
    )
    assert actions == [("revoke_approval",), ("approve_drop",)]


def flipped(url: str, column: str, key: int, at: int) -> str:
    """A column's envelope with one bit of its payload turned over."""
    members = json.loads(walk.value(url, f"SELECT {column}_encrypted FROM users WHERE id = %s", key))
    payload = bytearray(base64.b64decode(members["ciphertext"]))
    payload[at] ^= 1
    return json.dumps({**members, "ciphertext": base64.b64encode(payload).decode()})


DAMAGES = {
    "a bit of a ciphertext": (
        "UPDATE users SET first_name_encrypted = %(flipped)s WHERE id = 7",
        {("first_name", "undecryptable", "7")},
    ),
    "two rows' ciphertexts": (
        "UPDATE users u SET phone_number_encrypted = o.phone_number_encrypted FROM users o "
        "WHERE (u.id, o.id) IN ((7, 3), (3, 7))",
        {("phone_number", "mismatched", "3"), ("phone_number", "mismatched", "7")},
    ),
    "a token": (
        "UPDATE users SET email_search = translate(email_search, 'abcdef', 'bcdefa') WHERE id = 7",
        {("email", "token_mismatched", "7")},
    ),
    "a ciphertext that is gone": (
        "UPDATE users SET address_data_encrypted = NULL WHERE id = 7",
        {("address_data", "pending", "7")},
    ),
    "a plaintext behind the trigger": (
        "UPDATE users SET two_factor_secret = 'x' || two_factor_secret WHERE id = 7",
        {("two_factor_secret", "mismatched", "7")},
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_and_cannot_be_approved(ready_url: str, unchanged: Unchanged, damage: str) -> None:
    statement, expected = DAMAGES[damage]
    complete = (
        "SELECT count(*) FROM users WHERE id IN (3, 7) "
        "AND num_nulls(first_name, phone_number, email, address_data, two_factor_secret) = 0"
    )
    assert walk.value(ready_url, complete) == 2
    with psycopg.connect(ready_url, autocommit=True) as behind:
        behind.execute(support.BEHIND)
        behind.execute("CREATE TEMP TABLE kept AS SELECT * FROM users WHERE id IN (3, 7)")
        written = behind.execute(statement.encode(), {"flipped": flipped(ready_url, "first_name", 7, -1)})
        assert written.rowcount == len(expected)

        found = walk.verify(ready_url, USERS)

        assert {(o.column, o.problem, *o.key) for o in found.offenders} == expected
        column, problem, _ = next(iter(expected))
        assert found.reasons == (f"users.{column}: {len(expected)} values {problem}",)
        assert found.rows == walk.value(ready_url, "SELECT count(*) FROM users")
        unchanged.refuses(
            f"users is not verified: users.{column}: {len(expected)} values {problem}",
            lambda: walk.approve(ready_url, USERS),
        )

        behind.execute("DELETE FROM users WHERE id IN (3, 7)")
        behind.execute("INSERT INTO users SELECT * FROM kept")
    assert walk.verify(ready_url, USERS).passed
    assert walk.approve(ready_url, USERS).is_open


def test_rows_that_the_verification_left_out_stand_in_the_way(ready_url: str) -> None:
    ready = "UPDATE pg_index SET indisready = {} WHERE indexrelid = 'users_pkey'::regclass"
    walk.query(ready_url, ready.format("false"))
    walk.query(
        ready_url,
        "SET session_replication_role = replica; INSERT INTO users (id, username, email, password_hash) "
        "VALUES (900001, 'ann', 'ann@example.org', 'x')",
    )
    walk.query(ready_url, ready.format("true"))
    assert walk.verify(ready_url, USERS).passed
    with pytest.raises(RefusedError, match="1 rows were not reached in the order of the primary key"):
        walk.approve(ready_url, USERS)
    assert count(ready_url) == 0


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
    assert "Nothing takes the place of" not in text


def test_it_says_what_guarantee_nothing_will_take_over(ready_url: str) -> None:
    walk.query(ready_url, "CREATE TABLE dialled (number text PRIMARY KEY)")
    walk.query(
        ready_url,
        "ALTER TABLE users ADD CONSTRAINT named CHECK (last_name <> '') NOT VALID, "
        "ADD CONSTRAINT known FOREIGN KEY (phone_number) REFERENCES dialled NOT VALID",
    )
    with Database(ready_url).session("describe") as connection:
        text = describe(connection, read_table(connection, USERS))
    assert "Nothing takes the place of known, named: the database cannot look into ciphertext." in text
