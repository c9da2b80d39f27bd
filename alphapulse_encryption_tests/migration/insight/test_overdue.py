"""What waits too long is found by its age, which is the database's reckoning and no guess."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg

from alphapulse_encryption.crypto.usage import MOST_MESSAGES, WARNING_FROM
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight.overdue import (
    Mark,
    approvals_waiting,
    current_mark,
    keys_due,
    old_pending_rows,
)
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")
HOUR = timedelta(hours=1)
YEAR = timedelta(days=365)


def old(url: str, mark: Mark | None, limit: timedelta = HOUR) -> dict[str, Alert]:
    return {f.key: f for f in old_pending_rows(Database(url), walk.CATALOGUE.tables, mark, limit)}


def mark_of(url: str) -> Mark:
    return current_mark(Database(url))


def test_pending_rows_by_their_last_write(sample_url: str) -> None:
    assert old(sample_url, mark_of(sample_url)) == {}
    walk.encrypt(sample_url, USERS)
    before = mark_of(sample_url)
    assert old(sample_url, before) == {}
    walk.query(sample_url, "UPDATE users SET first_name = 'x' WHERE id <= 5 AND first_name IS NOT NULL")
    pending = walk.value(sample_url, "SELECT count(*) FROM users WHERE first_name = 'x'")
    assert pending >= 2
    # Written after the mark: not as old as that.
    assert old(sample_url, before) == {}
    after = mark_of(sample_url)
    walk.query(sample_url, "UPDATE users SET last_name = 'y' WHERE id = (SELECT max(id) FROM users)")
    found = old(sample_url, after)
    assert set(found) == {"old:users"}
    assert found["old:users"].message == (
        f"{pending} rows of users wait for ciphertext, for longer than 1 hour."
    )
    assert found["old:users"].since == after.at
    assert old(sample_url, None) == {}
    # Frozen rows keep their number.
    walk.query(sample_url, "VACUUM (FREEZE) users")
    assert set(old(sample_url, after)) == {"old:users"}
    assert old(sample_url, before) == {}
    walk.backfill(sample_url, USERS)
    assert old(sample_url, mark_of(sample_url)) == {}


def test_a_transaction_that_was_open_at_the_mark_is_younger(after: After) -> None:
    url = after("encrypted")
    with psycopg.connect(url) as application:
        application.execute("UPDATE users SET first_name = 'x' WHERE id = (SELECT min(id) FROM users)")
        during = mark_of(url)
    assert old(url, during) == {}
    assert set(old(url, mark_of(url))) == {"old:users"}


def test_without_the_small_index_no_table_is_read(after: After) -> None:
    url = after("encrypted")
    walk.query(url, "UPDATE users SET first_name = 'x'")
    mark = mark_of(url)
    assert set(old(url, mark)) == {"old:users"}
    scans = "SELECT coalesce(sum(seq_scan), 0) FROM pg_stat_user_tables WHERE relname = 'users'"
    with psycopg.connect(url, autocommit=True) as watching:
        before = watching.execute(scans).fetchone()
        old(url, mark)
        watching.execute("SELECT pg_stat_force_next_flush()")
        assert watching.execute(scans).fetchone() == before
    walk.query(url, "DROP INDEX users_encryption_pending")
    assert old(url, mark) == {}


def test_a_backfill_that_stands_still(after: After) -> None:
    url = after("encrypted")
    walk.query(
        url,
        "UPDATE alphapulse_encryption.ranges SET status = 'in_progress', waiting_for = 'paused by the setting' "
        "WHERE batch_range = 1",
    )
    assert old(url, None) == {}
    walk.query(url, "UPDATE alphapulse_encryption.ranges SET updated_at = updated_at - interval '2 hours'")
    (found,) = old(url, mark_of(url)).values()
    assert found.message == (
        "The backfill of users has not moved for longer than 1 hour: 1 of 2 batch ranges are done; it holds back: "
        "paused by the setting."
    )
    assert found.since == walk.value(url, "SELECT max(updated_at) FROM alphapulse_encryption.ranges")
    assert old(url, None, 3 * HOUR) == {}


def test_rows_that_were_set_aside(after: After) -> None:
    url = after("encrypted")
    walk.query(
        url,
        "INSERT INTO alphapulse_encryption.quarantine (table_name, batch_range, key, reason, since, step) VALUES "
        "('users', 0, '{canary}', 'a reason', now() - interval '2 hours', 'backfill'), "
        "('users', 1, '{9}', 'a reason', now(), 'backfill'), "
        "('users', 1, '{8}', 'a reason', now(), 'rotate')",
    )
    (found,) = old(url, None).values()
    assert found.message == "2 rows of users were set aside: the backfill could not encrypt them."
    assert found.since == walk.value(url, "SELECT min(since) FROM alphapulse_encryption.quarantine")
    assert "canary" not in str(found)


def keys(url: str, rotate_after: timedelta = YEAR) -> dict[str, Alert]:
    return {finding.key: finding for finding in keys_due(Database(url), rotate_after)}


def test_keys_near_their_limit_and_due_for_rotation(sample_url: str) -> None:
    assert keys(sample_url) == {}
    walk.encrypt(sample_url, USERS)
    assert keys(sample_url) == {}
    near = "UPDATE alphapulse_encryption.key_usage SET messages = %s WHERE context = 'user_pii'"
    walk.query(sample_url, near, WARNING_FROM - 1)
    assert keys(sample_url) == {}
    walk.query(sample_url, near, WARNING_FROM)
    (found,) = keys(sample_url).values()
    assert (found.key, found.state) == ("usage:user_pii:1", "near")
    assert "has encrypted 2,147,483,648 of the 4,294,967,296 messages that it may" in found.message
    walk.query(sample_url, near, MOST_MESSAGES)
    (found,) = keys(sample_url).values()
    assert (found.key, found.state) == ("usage:user_pii:1", "used up")
    assert "may not encrypt more" in found.message
    walk.query(
        sample_url, "UPDATE alphapulse_encryption.key_versions SET since = now() - interval '366 days'"
    )
    found = keys(sample_url)["age:1"]
    assert found.message == "Key version 1 has been the current one for longer than 365 days."
    assert found.since is not None and found.since < datetime.now(UTC) - YEAR
    assert set(keys(sample_url, 2 * YEAR)) == {"usage:user_pii:1"}
    walk.query(sample_url, "UPDATE alphapulse_encryption.key_versions SET state = 'retired'")
    assert keys(sample_url) == {}


def waiting(url: str) -> dict[str, Alert]:
    return {finding.key: finding for finding in approvals_waiting(Database(url))}


def test_approvals(approved_url: str) -> None:
    ((number, until),) = walk.query(
        approved_url, "SELECT id, expires_at FROM alphapulse_encryption.approvals"
    )
    (found,) = waiting(approved_url).values()
    assert (found.key, found.state) == (f"approval:{number}", "open")
    assert f"waits to be used; it ends at {until:%F %R} UTC." in found.message
    assert f"--revoke-approval {number}" in found.remedy
    # The approver's words are theirs.
    assert "Ada" not in str(found) and "month" not in str(found)
    walk.let_approvals_end(approved_url, HOUR)
    (found,) = waiting(approved_url).values()
    assert (found.state, "ends soon, at" in found.message) == ("ends soon", True)
    walk.let_approvals_end(approved_url, -HOUR)
    (found,) = waiting(approved_url).values()
    assert (found.state, found.reminds, found.ends_silently) == ("ended", False, True)
    assert "has ended at" in found.message
    later = walk.approve(approved_url, USERS)
    assert set(waiting(approved_url)) == {f"approval:{later.id}"}
    walk.drop(approved_url, USERS)
    assert waiting(approved_url) == {}


def test_approvals_that_ended_long_ago_or_were_taken_back(approved_url: str, sample_url: str) -> None:
    assert waiting(sample_url) == {}
    walk.let_approvals_end(approved_url, -25 * HOUR)
    assert waiting(approved_url) == {}
    walk.query(
        approved_url,
        "UPDATE alphapulse_encryption.approvals SET expires_at = now() + interval '1 day', "
        "revoked_at = now(), revoked_by = 'x'",
    )
    assert waiting(approved_url) == {}
