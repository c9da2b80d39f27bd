"""The live check: says what is so, names what is not, and leaves every row where it was."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.insight.live_check import (
    CLEARED,
    DECRYPTED,
    ENCRYPTED,
    FOUND,
    PENDING,
    REFUSED,
    ColumnCheck,
    live_check,
)
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")
TRIGGERS = "zzz_encryption_guard_update"


def check(url: str) -> dict[str, ColumnCheck]:
    """By column; whatever the findings, no row was changed and nothing was written elsewhere."""
    before = support.fingerprints(url, USERS), bookkeeping(url)
    found = live_check(walk.target(url), USERS)
    assert (support.fingerprints(url, USERS), bookkeeping(url)) == before
    return {one.column: one for one in found}


def bookkeeping(url: str) -> list[tuple[object, ...]]:
    return walk.query(url, "SELECT count(*), max(id) FROM alphapulse_encryption.audit_log")


def verdicts(found: ColumnCheck) -> dict[str, str]:
    return {look.what: look.verdict for look in found.looks}


def values(url: str) -> set[str]:
    """Whatever a report may not hold."""
    names = [name for name in walk.columns_of(url, "users") if name in {c.name for c in USERS.columns}]
    return {
        text
        for row in walk.contents(url, "users", names)
        for text in row
        if text is not None and len(text) > 4
    }


GUARDED = {ENCRYPTED: "yes", DECRYPTED: "yes", REFUSED: "yes", PENDING: "yes"}
SWITCHED = {ENCRYPTED: "yes", DECRYPTED: "yes", CLEARED: "yes", PENDING: "yes"}


def test_at_every_step(sample_url: str, after: After) -> None:
    with pytest.raises(RefusedError, match="--add-columns"):
        live_check(walk.target(sample_url), USERS)
    secrets = values(sample_url)

    found = check(after("encrypted"))
    assert {name: verdicts(one) for name, one in found.items()} == {
        column.name: GUARDED | ({FOUND: "yes"} if column.searchable else {}) for column in USERS.columns
    }
    assert not [secret for secret in secrets for one in found.values() if secret in str(one)]

    switched = after("switched")
    assert {name: verdicts(one) for name, one in check(switched).items()} == {
        column.name: SWITCHED | ({FOUND: "yes"} if column.searchable else {}) for column in USERS.columns
    }
    # Every plaintext of a table that is used was cleared sooner or later.
    walk.query(switched, "UPDATE users SET email_encrypted = email_encrypted || ' ' RETURNING id")
    assert walk.value(switched, "SELECT count(email) FROM users") == 0
    assert verdicts(check(switched)["email"]) == SWITCHED | {FOUND: "yes"}

    revert_to_plaintext(walk.target(switched), USERS)
    with pytest.raises(RefusedError, match="reverted"):
        live_check(walk.target(switched), USERS)


def test_after_the_drop(approved_url: str) -> None:
    walk.drop(approved_url, USERS)
    found = check(approved_url)
    whole = {ENCRYPTED: "yes", DECRYPTED: "yes"}
    assert {name: verdicts(one) for name, one in found.items()} == {
        column.name: whole | ({FOUND: "yes"} if column.searchable else {}) for column in USERS.columns
    }


def test_before_the_backfill_and_without_rows(sample_url: str) -> None:
    support.add_columns(sample_url, USERS, keys=walk.KEYS)
    found = check(sample_url)
    assert verdicts(found["email"]) == GUARDED | {FOUND: "not tried"}
    assert "--migrate-data" in str(found["email"])
    assert verdicts(found["last_name"]) == GUARDED
    walk.query(sample_url, "TRUNCATE users CASCADE")
    found = check(sample_url)
    assert [one.tried for one in found.values()] == [False] * len(USERS.columns)
    assert "no row" in str(found["email"])


def break_guard(url: str) -> None:
    walk.query(url, f"ALTER TABLE users DISABLE TRIGGER {TRIGGERS}")


def break_values(url: str) -> None:
    """The application's own trigger changes what is written."""
    walk.query(
        url,
        "CREATE FUNCTION trimmed() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.last_name := NEW.last_name || ''.''; RETURN NEW; END'",
    )
    walk.query(url, "CREATE TRIGGER a BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION trimmed()")


def break_ciphertext(url: str) -> None:
    """The application's own trigger cuts envelopes."""
    walk.query(
        url,
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.last_name_encrypted := left(NEW.last_name_encrypted, 40); RETURN NEW; END'",
    )
    walk.query(url, "CREATE TRIGGER a BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION cut()")


def break_writes(url: str) -> None:
    walk.query(
        url,
        "ALTER TABLE users ADD CONSTRAINT short CHECK (length(last_name_encrypted) < 50) NOT VALID",
    )


@pytest.mark.parametrize(
    ("damage", "column", "wrong"),
    [
        (break_guard, "last_name", {REFUSED, PENDING}),
        (break_guard, "email", {REFUSED, PENDING}),
        (break_values, "last_name", {ENCRYPTED}),
        (break_ciphertext, "last_name", {ENCRYPTED, DECRYPTED}),
        (break_writes, "last_name", {ENCRYPTED}),
    ],
)
def test_what_is_broken_is_named(
    after: After, damage: Callable[[str], None], column: str, wrong: set[str]
) -> None:
    url = after("encrypted")
    damage(url)
    found = check(url)[column]
    assert found.failed
    assert {what for what, verdict in verdicts(found).items() if verdict == "no"} >= wrong


def test_unreadable_ciphertext_is_named_after_the_switch(after: After) -> None:
    url = after("switched")
    assert not check(url)["last_name"].failed
    walk.query(url, "UPDATE users SET last_name_encrypted = 'garbage' RETURNING id")
    assert verdicts(check(url)["last_name"]) == {DECRYPTED: "no"}


def test_rows_that_are_held_are_left_alone(after: After) -> None:
    """Nobody waits for anybody: the application holds the newest row, and its write afterwards goes through."""
    url = after("encrypted")
    with psycopg.connect(url) as application:
        application.execute("UPDATE users SET locale = 'xx' WHERE id = (SELECT max(id) FROM users)")
        assert not any(one.failed or not one.tried for one in check(url).values())
        application.execute("SELECT FROM users FOR UPDATE")
        assert not any(one.tried for one in check(url).values())


def test_a_composite_value_with_a_field_that_is_null_is_tried(database_url: str) -> None:
    entry = support.table("places", "at")
    support.run(database_url, "CREATE TYPE place AS (street text, town text)")
    support.run(database_url, "CREATE TABLE places (id int PRIMARY KEY, at place)")
    support.add_columns(database_url, entry)
    support.run(database_url, "INSERT INTO places VALUES (1, ('a', NULL))")
    (found,) = live_check(support.target(database_url), entry)
    assert verdicts(found)[DECRYPTED] == "yes"
