"""The drop: refused with nothing changed at the least doubt, exact and used up once when it is allowed."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.bookkeeping.limits import change_limits
from alphapulse_encryption.migration.gates.approvals import revoke
from alphapulse_encryption.migration.postgres import ddl
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.sql import any_pending
from alphapulse_encryption.migration.steps import drop as drop_module
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.conftest import Unchanged

USERS = walk.CATALOGUE.table("users")
TRADES = walk.CATALOGUE.table("trades")
PLAINTEXT = ("email", "phone_number", "first_name", "last_name", "address_data", "two_factor_secret")


def test_an_approved_drop_takes_the_columns_and_uses_the_approval_up(approved_url: str) -> None:
    result = walk.drop(approved_url, USERS)

    assert result.what is not None
    assert {column.name for column in result.what.columns} == set(PLAINTEXT)
    assert not set(walk.columns_of(approved_url, "users")) & set(PLAINTEXT)
    assert [constraint.name for constraint in result.what.constraints] == ["users_email_key"]
    assert {index.name for index in result.what.indexes} == {"users_last_name_idx", "users_phone_number_idx"}
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
    assert walk.query(approved_url, "SELECT consumed_by FROM alphapulse_encryption.approvals") == [("Grace",)]
    assert walk.query(approved_url, "SELECT authority, stage FROM alphapulse_encryption.tables") == [
        ("ciphertext", "dropped")
    ]
    details = walk.value(
        approved_url, "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'drop_plaintext'"
    )
    assert details["approver"] == "Ada" and set(details["columns"]) == set(PLAINTEXT)

    again = walk.drop(approved_url, USERS)
    assert not again.changed and again.what is None


def test_values_are_still_found_unique_and_readable_after_it(approved_url: str) -> None:
    email, key = walk.query(approved_url, "SELECT email, id FROM users WHERE id = 42")[0]
    token = walk.value(approved_url, "SELECT email_search FROM users WHERE id = 42")
    walk.drop(approved_url, USERS)
    found = walk.query(approved_url, "SELECT id, email_encrypted FROM users WHERE email_search = %s", token)
    assert [(row[0], walk.CIPHER.decrypt(row[1], "user_pii")) for row in found] == [(key, email)]
    with pytest.raises(psycopg.errors.UniqueViolation):
        walk.query(approved_url, "UPDATE users SET email_search = %s WHERE id = 43", token)


def test_refused_without_an_approval(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "DELETE FROM alphapulse_encryption.approvals")
    unchanged.refuses(r"There is no approval for dropping the plaintext of users\. A person has to")


def test_refused_with_an_expired_approval(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "UPDATE alphapulse_encryption.approvals SET expires_at = approved_at")
    unchanged.refuses("no approval for dropping the plaintext of users: the last one has expired")


def test_refused_with_a_revoked_approval(approved_url: str, unchanged: Unchanged) -> None:
    revoke(Database(approved_url), 1, walk.ACTOR)
    unchanged.refuses("no approval for dropping the plaintext of users: the last one was revoked")


def test_refused_with_a_used_approval(approved_url: str, unchanged: Unchanged) -> None:
    walk.drop(approved_url, USERS)
    restore_plaintext(walk.target(approved_url), USERS)
    unchanged.refuses("no approval for dropping the plaintext of users: the last one was used already")
    walk.rewrite(approved_url, "UPDATE alphapulse_encryption.tables SET authority = 'ciphertext'")
    unchanged.refuses("the last one was used already")


def test_refused_with_an_approval_of_another_table(
    approved_url: str, unchanged: Unchanged, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.switch(approved_url, TRADES)
    walk.backup(approved_url, (TRADES,), tmp_path / "trades", postgres.bin_dir())
    walk.query(approved_url, "DELETE FROM alphapulse_encryption.approvals")
    walk.approve(approved_url, TRADES)
    unchanged.refuses("There is no approval for dropping the plaintext of users")
    walk.rewrite(approved_url, "UPDATE alphapulse_encryption.approvals SET table_name = 'users'")
    unchanged.refuses("the table's definition and the catalogue's entry changed")


def test_refused_while_the_authority_is_plaintext(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "UPDATE alphapulse_encryption.tables SET authority = 'plaintext'")
    unchanged.refuses("The authority of users is still plaintext")


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE users ADD COLUMN nickname text",
        "ALTER TABLE users ALTER username SET DEFAULT 'nobody'",
        # What would be dropped is more than was approved.
        "CREATE INDEX users_first_name_idx ON users (first_name)",
        "ALTER TABLE users ADD CONSTRAINT named CHECK (first_name <> '') NOT VALID",
        "COMMENT ON COLUMN users.email IS 'asked for by the regulator'",
    ],
)
def test_refused_when_the_definition_changed(approved_url: str, unchanged: Unchanged, change: str) -> None:
    walk.query(approved_url, change)
    unchanged.refuses("was approved, the table's definition changed")


def test_refused_when_the_catalogue_changed(approved_url: str, unchanged: Unchanged) -> None:
    columns = (*USERS.columns[:-1], USERS.columns[-1].model_copy(update={"context": "another"}))
    entry = USERS.model_copy(update={"columns": columns})
    unchanged.refuses(
        "was approved, the catalogue's entry changed",
        lambda: walk.drop(approved_url, entry, Catalogue(tables=(entry,))),
    )


def test_refused_when_the_key_changed(approved_url: str, unchanged: Unchanged) -> None:
    newer = KeyRing({1: bytes(range(32)), 2: bytes(range(1, 33))}, 2)
    unchanged.refuses(
        "environment says 2, to which no rotation", lambda: walk.drop(approved_url, USERS, keys=newer)
    )
    other = KeyRing({1: bytes(range(1, 33))}, 1)
    unchanged.refuses(
        "is not the one this database was begun", lambda: walk.drop(approved_url, USERS, keys=other)
    )


BEHIND = support.BEHIND


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        ("UPDATE users SET first_name = 'Eve' WHERE id = 5", r"first_name mismatched at key \(5\)\. Encrypt"),
        (
            "UPDATE users SET email_search = reverse(email_search) WHERE id = 5",
            r"email token_mismatched at key \(5\)\. Encrypt",
        ),
        (
            "UPDATE users u SET last_name_encrypted = o.last_name_encrypted FROM users o "
            "WHERE (u.id, o.id) IN ((5, 6), (6, 5)) AND u.last_name <> o.last_name",
            r"last_name mismatched at key \(5\); last_name mismatched at key \(6\)\. Encrypt",
        ),
        (
            "UPDATE users SET two_factor_secret = NULL, two_factor_secret_encrypted = 'x' WHERE id = 5",
            r"two_factor_secret undecryptable at key \(5\)\. Encrypt",
        ),
        ("UPDATE users SET email_encrypted = NULL WHERE id = 5", r"email pending at key \(5\)\. Encrypt"),
    ],
)
def test_refused_when_a_row_was_damaged_behind_the_trigger(
    approved_url: str, unchanged: Unchanged, damage: str, named: str
) -> None:
    walk.query(approved_url, BEHIND + damage)
    unchanged.refuses(f"changed since the verification, values did not verify: {named}")


def test_refused_when_the_damage_was_under_way_during_the_verification(
    approved_url: str, unchanged: Unchanged
) -> None:
    """Its transaction is older than many that the verification has seen."""
    walk.query(approved_url, BEHIND)
    with psycopg.connect(approved_url) as behind:
        behind.execute("SET session_replication_role = replica")
        behind.execute("UPDATE users SET first_name = 'Eve' WHERE id = 5")
        for _ in range(3):
            walk.query(approved_url, "UPDATE users SET is_active = is_active WHERE id = 6")
        assert walk.verify(approved_url, USERS).passed
        behind.commit()
    unchanged.refuses(r"first_name mismatched at key \(5\)")


def test_refused_when_a_row_was_damaged_after_a_vacuum_froze_it(
    approved_url: str, unchanged: Unchanged
) -> None:
    walk.query(approved_url, BEHIND + "UPDATE users SET first_name = 'Eve' WHERE id = 5")
    walk.query(approved_url, "VACUUM (FREEZE) users")
    unchanged.refuses(r"first_name mismatched at key \(5\)")


def test_refused_when_a_guard_trigger_is_missing(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "DROP TRIGGER zzz_encryption_guard_insert ON users")
    unchanged.refuses("The guard of users is not what this program makes")


def test_refused_when_a_guard_trigger_is_disabled(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update")
    unchanged.refuses("The guard of users is not what this program makes")


def test_refused_when_the_pending_index_is_missing(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "DROP INDEX users_encryption_pending")
    unchanged.refuses("The index users_encryption_pending is missing or invalid")


def backup_of(url: str) -> Path:
    return Path(walk.value(url, "SELECT location FROM alphapulse_encryption.backups"))


def test_refused_when_the_backup_is_missing(approved_url: str, unchanged: Unchanged) -> None:
    backup_of(approved_url).unlink()
    unchanged.refuses("cannot be read")


def test_refused_when_the_backup_is_stale(approved_url: str, unchanged: Unchanged) -> None:
    walk.rewrite(approved_url, "UPDATE alphapulse_encryption.backups SET taken_at = now() - interval '25h'")
    unchanged.refuses("The backup of users is more than 24 hours old")


def test_refused_when_the_backup_is_damaged(approved_url: str, unchanged: Unchanged) -> None:
    file = backup_of(approved_url)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    unchanged.refuses("was altered")


def test_refused_when_a_row_is_pending_before_the_lock(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "UPDATE users SET last_name = 'Late' WHERE id = 11")
    unchanged.refuses(r"last_name pending at key \(11\)")


def test_refused_when_a_row_is_pending_under_the_lock(approved_url: str, postgres: EmbeddedPostgres) -> None:
    """An old instance of the application writes plaintext, and commits while the drop waits for the lock."""
    with psycopg.connect(approved_url) as application:
        application.execute("UPDATE users SET last_name = 'Late' WHERE id = 11")
        with support.Background(lambda: walk.drop(approved_url, USERS)) as dropping:
            support.until(
                lambda: support.engine_waits(approved_url, "LOCK TABLE%", behind=application),
                "the drop waits",
            )
            application.commit()
            before = Unchanged(approved_url, postgres.bin_dir()).fingerprint()
            with pytest.raises(RefusedError, match="Values of users are pending: they were written just now"):
                dropping.result()
    assert Unchanged(approved_url, postgres.bin_dir()).fingerprint() == before
    assert walk.query(approved_url, "SELECT last_name, last_name_encrypted FROM users WHERE id = 11") == [
        ("Late", None)
    ]


@pytest.mark.parametrize(
    "view",
    [
        "CREATE VIEW contacts AS SELECT id, email FROM users",
        "CREATE MATERIALIZED VIEW contacts AS SELECT count(*) FROM users WHERE first_name = 'Ann'",
    ],
)
def test_refused_when_somebody_elses_view_depends_on_it(
    approved_url: str, unchanged: Unchanged, view: str
) -> None:
    walk.query(approved_url, view)
    unchanged.refuses("depend on the plaintext columns of users: .*view public.contacts")


def test_refused_when_the_lock_cannot_be_had(
    approved_url: str, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"attempts": 2, "lock_timeout": "50ms"}
    monkeypatch.setattr(ddl.in_short_transaction, "__kwdefaults__", short)
    with psycopg.connect(approved_url) as reader:
        reader.execute("SELECT count(*) FROM users")
        unchanged.refuses("another session kept its lock through 2 tries")


def test_refused_when_the_verification_is_gone_or_failed_since(
    approved_url: str, unchanged: Unchanged
) -> None:
    walk.query(approved_url, BEHIND + "UPDATE users SET first_name = 'Eve' WHERE id = 5")
    assert not walk.verify(approved_url, USERS).passed
    unchanged.refuses("users is not verified: users.first_name: 1 values mismatched")
    walk.query(approved_url, "DELETE FROM alphapulse_encryption.verifications WHERE batch_range = 1")
    unchanged.refuses("users is not verified: 1 batch ranges were not verified yet")


@pytest.mark.parametrize(
    "age",
    [
        "verified_at = verified_at - interval '8 days'",
        # PostgreSQL tells transactions apart over 2^31 only.
        "since = (since::text::bigint + 4294967296 - 2147483648)::text::xid8",
        "since = '1152921504606846976'",
        "since = NULL",
    ],
)
def test_refused_when_the_verification_is_too_old(approved_url: str, unchanged: Unchanged, age: str) -> None:
    walk.rewrite(approved_url, f"UPDATE alphapulse_encryption.verifications SET {age} WHERE batch_range = 0")
    unchanged.refuses("users is not verified: 1 batch ranges were verified")


def test_refused_above_the_time_budget(approved_url: str, unchanged: Unchanged) -> None:
    walk.query(approved_url, "UPDATE users SET is_active = NOT is_active")
    change_limits(Database(approved_url), {"drop_verification_seconds": "0.001"}, walk.ACTOR)
    unchanged.refuses(
        r"took more than 0\.001 s: \d+ changed rows were verified by then\. Verify the table again "
        r"\(--verify --table users\)"
    )
    change_limits(Database(approved_url), {"drop_verification_seconds": "60"}, walk.ACTOR)
    assert walk.drop(approved_url, USERS).changed_rows == walk.value(
        approved_url, "SELECT count(*) FROM users"
    )


def test_refused_to_the_approver(approved_url: str, unchanged: Unchanged) -> None:
    for operator in ("Ada", " ada ", "\uff21\uff24\uff21"):
        unchanged.refuses(
            "two-person rule holds: Ada approved",
            lambda: walk.drop(approved_url, USERS, operator=operator),  # noqa: B023
        )
    unchanged.refuses("say who drops", lambda: walk.drop(approved_url, USERS, operator=" "))
    assert walk.drop(approved_url, USERS, operator="Grace Hopper").changed
    assert walk.query(approved_url, "SELECT approver, consumed_by FROM alphapulse_encryption.approvals") == [
        ("Ada", "Grace Hopper")
    ]
    details = walk.value(
        approved_url, "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'drop_plaintext'"
    )
    assert (details["operator"], details["two_person_rule"]) == ("Grace Hopper", "names")


def test_the_two_person_rule_can_be_turned_off_and_that_is_audited(approved_url: str) -> None:
    change_limits(Database(approved_url), {"two_person_rule": "off"}, Actor("Ada herself"))
    walk.drop(approved_url, USERS, operator="Ada")
    audit = "SELECT actor, details FROM alphapulse_encryption.audit_log WHERE action = %s"
    assert walk.query(approved_url, audit, "change_settings") == [
        ("Ada herself", {"settings": {"two_person_rule": "off"}})
    ]
    assert (
        walk.value(approved_url, audit.replace("actor, ", ""), "drop_plaintext")["two_person_rule"] == "off"
    )


def test_refused_over_the_approvers_database_role(approved_url: str, unchanged: Unchanged) -> None:
    change_limits(Database(approved_url), {"two_person_rule": "roles"}, walk.ACTOR)
    role = walk.value(approved_url, "SELECT session_user::text")
    unchanged.refuses(f"approved over the role {role}, and has to be carried out over another one")
    walk.rewrite(approved_url, "UPDATE alphapulse_encryption.approvals SET database_role = 'approver'")
    assert walk.drop(approved_url, USERS).changed


def test_the_rule_holds_unless_the_caller_says_that_it_is_the_sample(approved_url: str) -> None:
    assert walk.drop(approved_url, USERS, operator="", default_rule="off").changed
    assert walk.query(approved_url, "SELECT consumed_by FROM alphapulse_encryption.approvals") == [("tests",)]


def locked_part(url: str) -> None:
    """What runs under the lock, without what comes before it."""
    names = {"operator": "Grace", "two_person_rule": "names"}
    with Database(url).session("drop") as connection:
        approval = list_approvals(connection, USERS)[0]
        in_short_transaction(
            connection,
            "drop the plaintext of users",
            lambda: drop_module._drop(connection, walk.target(url), USERS, approval, names),
            attempts=1,
            lock_timeout="50ms",
        )


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("UPDATE users SET last_name = 'Late' WHERE id = 11", "pending"),
        ("ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update", "guard"),
        ("DROP INDEX users_encryption_pending", "users_encryption_pending"),
        ("ALTER TABLE users ALTER username TYPE text", "definition changed"),
        ("UPDATE alphapulse_encryption.approvals SET expires_at = approved_at", "expired"),
        ("UPDATE alphapulse_encryption.approvals SET revoked_at = now(), revoked_by = 'x'", "revoked"),
        ("UPDATE alphapulse_encryption.approvals SET consumed_at = now(), consumed_by = 'x'", "used already"),
        ("CREATE VIEW contacts AS SELECT id, email FROM users", "contacts"),
        ("UPDATE alphapulse_encryption.tables SET authority = 'plaintext'", "another run"),
        ("DELETE FROM alphapulse_encryption.verifications", "not verified"),
    ],
)
def test_what_changed_at_the_last_moment_is_seen_under_the_lock(
    approved_url: str, unchanged: Unchanged, statement: str, reason: str
) -> None:
    walk.query(approved_url, statement)
    unchanged.refuses(reason, lambda: locked_part(approved_url))


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
    assert result.changed and result.what is None and result.required == ("email_encrypted",)
    with pytest.raises(psycopg.errors.NotNullViolation):
        walk.query(approved_url, "UPDATE users SET email_encrypted = NULL WHERE id = 1")


def test_writes_between_approval_and_drop_do_not_stand_in_its_way(approved_url: str) -> None:
    envelope = walk.CIPHER.encrypt("Nakamura", "user_personal")
    walk.query(approved_url, "UPDATE users SET last_name_encrypted = %s WHERE id = 20", envelope)
    walk.query(approved_url, "DELETE FROM users WHERE id = 21")
    walk.drop(approved_url, USERS)
    assert walk.value(approved_url, "SELECT last_name_encrypted FROM users WHERE id = 20") == envelope


class Application:
    """Writes ciphertext again and again, and remembers what was committed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self._random = random.Random(7)
        self.expected = {
            key: None if envelope is None else opened(envelope)
            for key, envelope in walk.query(url, "SELECT id, last_name_encrypted FROM users")
        }
        self.writes = 0

    def run(self) -> None:
        with psycopg.connect(self._url, autocommit=True) as connection:
            while not self._stop.is_set():
                self._write(connection)
                self.writes += 1

    def stop(self) -> None:
        self._stop.set()

    def wait_for_writes(self, count: int) -> None:
        target = self.writes + count
        support.until(lambda: self.writes >= target, "the application writes")

    def _write(self, connection: psycopg.Connection[Any]) -> None:
        key = self._random.choice(list(self.expected))
        name = f"written {self.writes}"
        envelope = walk.CIPHER.encrypt(name, "user_personal")
        kind = self._random.randrange(4)
        if kind == 0:
            connection.execute("UPDATE users SET is_active = NOT is_active WHERE id = %s", [key])
        elif kind == 1:
            connection.execute("DELETE FROM users WHERE id = %s", [key])
            del self.expected[key]
        elif kind == 2:
            new = 1_000_000 + self.writes
            mail = f"{new}@example.org"
            connection.execute(
                "INSERT INTO users (id, username, password_hash, email_encrypted, email_search, last_name_encrypted) "
                "VALUES (%s, %s, 'x', %s, %s, %s)",
                [
                    new,
                    str(new),
                    walk.CIPHER.encrypt(mail, "user_pii"),
                    search_token(walk.KEYS, mail, "user_pii"),
                    envelope,
                ],
            )
            self.expected[new] = name
        else:
            connection.execute("UPDATE users SET last_name_encrypted = %s WHERE id = %s", [envelope, key])
            self.expected[key] = name


def opened(envelope: str) -> str:
    key = independent.derive(bytes(range(32)), "user_personal", 1)
    return independent.open_envelope(key, envelope)


def test_ordinary_writes_that_go_on_do_not_stand_in_its_way_and_none_is_lost(ready_url: str) -> None:
    application = Application(ready_url)
    with support.Background(application.run) as writing:
        application.wait_for_writes(20)
        assert walk.verify(ready_url, USERS).passed
        application.wait_for_writes(20)
        walk.approve(ready_url, USERS)
        application.wait_for_writes(20)
        result = walk.drop(ready_url, USERS)
        application.wait_for_writes(20)
        application.stop()
        writing.result()
    assert result.changed and result.changed_rows > 20
    assert not set(walk.columns_of(ready_url, "users")) & set(PLAINTEXT)
    found = walk.query(ready_url, "SELECT id, last_name_encrypted FROM users")
    assert {
        key: None if envelope is None else opened(envelope) for key, envelope in found
    } == application.expected


def test_a_table_that_it_refers_to_is_waited_for_before_its_own_is_locked(ready_url: str) -> None:
    for number, column in enumerate(("phone_number", "two_factor_secret")):
        walk.query(ready_url, f"CREATE TABLE other{number} (code text PRIMARY KEY)")
        walk.query(
            ready_url,
            f"ALTER TABLE users ADD CONSTRAINT refers{number} FOREIGN KEY ({column}) "
            f"REFERENCES other{number} NOT VALID",
        )
    walk.approve(ready_url, USERS)
    with psycopg.connect(ready_url) as holder, psycopg.connect(ready_url, autocommit=True) as application:
        holder.execute("SELECT count(*) FROM other1")
        application.execute("SET lock_timeout TO '200ms'")
        with support.Background(lambda: walk.drop(ready_url, USERS)) as dropping:
            support.until(
                lambda: support.engine_waits(ready_url, "LOCK TABLE%", behind=holder), "the drop waits"
            )
            for _ in range(20):
                application.execute("SELECT id FROM users WHERE id = 7")
                application.execute("UPDATE users SET is_active = is_active WHERE id = 7")
            holder.rollback()
            result = dropping.result()
    assert result.what is not None
    assert {"refers0", "refers1"} <= {constraint.name for constraint in result.what.constraints}


def test_nothing_under_the_lock_may_take_long(
    approved_url: str, unchanged: Unchanged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop_module, "LONGEST_STATEMENT_UNDER_LOCK", "100ms")
    walk.query(
        approved_url,
        "CREATE FUNCTION dawdle() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(60); END $$; "
        "CREATE EVENT TRIGGER dawdle ON ddl_command_start WHEN TAG IN ('ALTER TABLE') EXECUTE FUNCTION dawdle()",
    )
    schema = walk.schema(approved_url, unchanged.bin_dir, USERS)
    with pytest.raises(DatabaseFailure, match="57014"):
        walk.drop(approved_url, USERS)
    assert walk.schema(approved_url, unchanged.bin_dir, USERS) == schema
    assert walk.query(approved_url, "SELECT consumed_at FROM alphapulse_encryption.approvals") == [(None,)]
    walk.query(approved_url, "DROP EVENT TRIGGER dawdle")
    assert walk.drop(approved_url, USERS).changed


def test_an_approver_needs_no_more_than_to_read_the_bookkeeping(ready_url: str, unchanged: Unchanged) -> None:
    """With a database role of their own, whom the server vouches for."""
    count_rows(walk.target(ready_url), USERS)
    walk.query(
        ready_url,
        "DO $$ BEGIN CREATE ROLE plain_approver LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$; "
        "GRANT USAGE ON SCHEMA alphapulse_encryption TO plain_approver; "
        "GRANT SELECT ON ALL TABLES IN SCHEMA alphapulse_encryption TO plain_approver; "
        "GRANT INSERT ON alphapulse_encryption.approvals, alphapulse_encryption.audit_log TO plain_approver",
    )
    change_limits(Database(ready_url), {"two_person_rule": "roles"}, walk.ACTOR)
    theirs = make_conninfo(ready_url, user="plain_approver")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        walk.query(theirs, "SELECT email FROM users")
    approval = walk.approve(theirs, USERS)
    assert (approval.approver, approval.database_role) == ("Ada", "plain_approver")
    audit = "SELECT database_role FROM alphapulse_encryption.audit_log WHERE action = 'approve_drop' ORDER BY id DESC"
    assert walk.query(ready_url, audit)[:1] == [("plain_approver",)]
    with pytest.raises(
        RefusedError, match="approved over the role plain_approver, and has to be carried out over"
    ):
        walk.drop(theirs, USERS)
    assert walk.drop(ready_url, USERS).changed
