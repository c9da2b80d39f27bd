"""Where it stands: told as it is at every stage, to a role that may see little, and without reading large tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from psycopg import sql

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import DatabaseFailure
from alphapulse_encryption.migration.bookkeeping.limits import change_limits
from alphapulse_encryption.migration.insight import status
from alphapulse_encryption.migration.insight.status import Status, TableStatus, read_status
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After
from alphapulse_encryption_tests.migration.support import run

USERS = walk.CATALOGUE.table("users")
ROLE = "status_reader"


def look(url: str, catalogue: Catalogue = walk.CATALOGUE) -> Status:
    return read_status(Database(url), catalogue, catalogue.keys)


def of(found: Status, table: str = "users") -> TableStatus:
    return next(one for one in found.tables if one.table == table)


@contextlib.contextmanager
def monitor(url: str) -> Iterator[str]:
    """The address for a role with SELECT on the bookkeeping and nothing else."""
    role = sql.Identifier(ROLE)
    with support.application(url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        try:
            yield url.replace(f"//{urlsplit(url).username or 'postgres'}@", f"//{ROLE}@", 1)
        finally:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))


def test_stage_by_stage(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    nothing = look(sample_url)
    assert (nothing.begun, nothing.paused, nothing.approvals, nothing.workers) == (False, None, (), ())
    assert of(nothing).stage == "not begun"
    assert of(nothing).pending.how == "estimated"
    assert (
        of(nothing).pending.rows == of(nothing).rows == walk.value(sample_url, "SELECT count(*) FROM users")
    )

    walk.encrypt(sample_url, USERS)
    done = of(look(sample_url))
    assert (done.stage, done.authority, done.pending.rows, done.pending.how) == (
        "columns",
        "plaintext",
        0,
        "counted",
    )
    assert (done.ranges.total, done.ranges.completed, done.active, done.rows_left) == (
        walk.RANGES,
        walk.RANGES,
        (),
        0,
    )
    assert done.verification is None and done.backup is None
    assert {column.status for column in done.columns} == {"completed"}
    encrypted = walk.value(sample_url, "SELECT count(last_name_encrypted) FROM users")
    assert next(c.records_processed for c in done.columns if c.name == "last_name") == encrypted > 0

    # An old instance writes: three values of two rows.
    run(sample_url, "UPDATE users SET email = 'a@example.com', first_name = 'A' WHERE id = 1")
    run(sample_url, "UPDATE users SET email = 'b@example.com' WHERE id = 2")
    late = of(look(sample_url))
    assert (late.pending.rows, late.pending.how) == (2, "counted")
    by_column = {column.name: column.pending for column in late.columns}
    assert (by_column["email"], by_column["first_name"], by_column["last_name"]) == (2, 1, 0)
    walk.backfill(sample_url, USERS)

    assert walk.verify(sample_url, USERS).passed
    verified = of(look(sample_url)).verification
    assert verified is not None and verified.valid and verified.faults == 0 and verified.reasons == ()
    assert all(column.verified for column in of(look(sample_url)).columns)

    walk.switch(sample_url, USERS)
    walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir())
    given = walk.approve(sample_url, USERS)
    open_ = look(sample_url)
    assert [(a.id, a.state, a.approver, a.changed) for a in open_.approvals] == [
        (given.id, "open", "Ada", ())
    ]
    backup = of(open_).backup
    assert backup is not None and backup.fresh and 0 <= backup.age_seconds < 3600
    assert of(open_).authority == "ciphertext"
    assert [(v.number, v.state) for v in open_.key_versions] == [(1, "current")]
    used = {(usage.context, usage.key_version): usage.messages for usage in open_.key_usage}
    assert used["user_security", 1] == walk.value(
        sample_url, "SELECT count(two_factor_secret_encrypted) FROM users"
    )

    # Whatever an approval binds changes: it is open by its dates, and worth nothing.
    run(sample_url, "ALTER TABLE users ALTER COLUMN phone_number SET DEFAULT ''")
    void = look(sample_url)
    assert [(a.state, a.changed) for a in void.approvals] == [("void", ("the table's definition",))]
    run(sample_url, "ALTER TABLE users ALTER COLUMN phone_number DROP DEFAULT")
    assert [a.state for a in look(sample_url).approvals] == ["open"]
    walk.drop(sample_url, USERS)
    gone = look(sample_url)
    assert (of(gone).stage, of(gone).pending.how) == ("dropped", "nothing to encrypt")
    assert [a.state for a in gone.approvals] == ["used"]
    assert of(gone, "trades").stage == "not begun"


def test_a_verification_ends_with_the_definition(after: After) -> None:
    url = after("verified")
    run(url, "UPDATE alphapulse_encryption.verifications SET definition = 'another'")
    found = of(look(url)).verification
    assert found is not None and not found.valid
    assert found.reasons == ("2 batch ranges were verified before the table's columns or the key changed",)
    assert not any(column.verified for column in of(look(url)).columns)


def test_indexes_that_an_interrupted_build_left(sample_url: str) -> None:
    assert of(look(sample_url)).invalid_indexes == ()
    run(sample_url, "CREATE INDEX by_name_ccnew ON users (last_name)")
    run(sample_url, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'by_name_ccnew'::regclass")
    (told,) = of(look(sample_url)).invalid_indexes
    assert told == 'by_name_ccnew: DROP INDEX CONCURRENTLY "public"."by_name_ccnew"'
    assert of(look(sample_url), "trades").invalid_indexes == ()
    run(sample_url, told.partition(": ")[2])
    assert of(look(sample_url)).invalid_indexes == ()


def test_a_table_that_somebody_holds_is_named_and_the_others_are_told_of(sample_url: str) -> None:
    with support.application(sample_url, autocommit=False) as holder:
        holder.execute("LOCK TABLE users IN ACCESS EXCLUSIVE MODE")
        found = look(sample_url)
    held = of(found)
    assert held.stage == "unknown"
    assert "table users: another session kept its lock for longer than" in (held.problem or "")
    assert of(found, "trades").stage == "not begun"


def test_who_works_and_why_it_waits(sample_url: str) -> None:
    support_keys = walk.KEYS
    add_encrypted_columns(walk.target(sample_url, keys=support_keys), USERS, batch_ranges=walk.RANGES)
    change_limits(Database(sample_url), {"paused": "true"}, walk.ACTOR)
    with support.Background(lambda: walk.backfill(sample_url, USERS)) as working:
        support.until(lambda: bool(of(look(sample_url)).waiting_for), "it holds back")
        held = look(sample_url)
        assert held.paused
        (one,) = of(held).active
        assert (one.number, one.status) == (0, "holding back")
        assert one.waiting_for is not None and "pause" in one.waiting_for
        assert of(held).waiting_for == (one.waiting_for,)
        assert {(w.table, w.range) for w in held.workers if w.table} == {("users", 0)}
        assert of(held).ranges.running == 1
        change_limits(Database(sample_url), {"paused": "false"}, walk.ACTOR)
        working.result()
    ended = look(sample_url)
    assert ended.workers == () and of(ended).active == ()

    # A killed worker leaves its status behind, and no lock.
    run(
        sample_url,
        "UPDATE alphapulse_encryption.ranges SET status = 'in_progress', completed_at = NULL WHERE batch_range = 1",
    )
    (left,) = of(look(sample_url)).active
    assert (left.number, left.status, left.waiting_for) == (1, "interrupted", None)
    run(
        sample_url,
        "UPDATE alphapulse_encryption.ranges SET status = 'failed', error_message = 'two rows were set aside' "
        "WHERE batch_range = 1",
    )
    run(
        sample_url,
        "INSERT INTO alphapulse_encryption.quarantine (table_name, batch_range, key, reason) VALUES "
        "('users', 1, '{7}', 'x')",
    )
    failed = of(look(sample_url))
    assert [(r.status, r.error_message) for r in failed.active] == [("failed", "two rows were set aside")]
    assert (failed.quarantined, failed.ranges.failed, failed.ranges.completed) == (1, 1, 1)


def test_rate_and_time_left(after: After) -> None:
    url = after("encrypted")
    # The first range took 10 s; the second one has gone on for 5 s beside it, and for 5 s after it.
    run(
        url,
        "UPDATE alphapulse_encryption.ranges SET rows_processed = 100, started_at = now() - interval '15 s', "
        "completed_at = now() - interval '5 s', status = 'completed' WHERE batch_range = 0",
    )
    run(
        url,
        "UPDATE alphapulse_encryption.ranges SET rows_processed = 50, started_at = now() - interval '10 s', "
        "updated_at = now(), completed_at = NULL, status = 'in_progress' WHERE batch_range = 1",
    )
    before = look(url)
    found = of(before)
    left = found.rows / 2 - 50
    assert found.rows_left == round(left)
    assert found.rows_per_second == pytest.approx(10, rel=0.01)
    assert found.seconds_left == pytest.approx(left / 10, rel=0.02)
    # Two looks know better.
    run(url, "UPDATE alphapulse_encryption.ranges SET rows_processed = 60 WHERE batch_range = 1")
    later = look(url)
    seconds = (later.at - before.at).total_seconds()
    assert of(later.with_rates_since(before)).rows_per_second == pytest.approx(10 / seconds)
    assert of(before.with_rates_since(before)).rows_per_second == found.rows_per_second


def test_a_role_that_may_read_the_bookkeeping_alone(sample_url: str) -> None:
    with monitor(sample_url) as url:
        # Before anything is begun there is nothing to be allowed.
        assert of(look(url)).stage == "not begun"
        walk.encrypt(sample_url, USERS)
        walk.verify(sample_url, USERS)
        with pytest.raises(DatabaseFailure, match=r"permission denied for schema alphapulse_encryption"):
            look(url)
        support.grant_bookkeeping(sample_url, ROLE)
        theirs, ours = look(url), look(sample_url)
        assert (of(theirs).pending.rows, of(theirs).pending.how) == (None, "not visible to this role")
        assert theirs.not_visible == ("pending rows of users (SELECT on the table)",)
        assert (theirs.role, of(theirs).verification) == (ROLE, of(ours).verification)
        hidden = {"pending": of(ours).pending, "columns": of(ours).columns}
        assert of(theirs).model_copy(update=hidden) == of(ours)


def test_large_tables_are_not_read(sample_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reads() -> tuple[int, int]:
        run(sample_url, "SELECT pg_stat_force_next_flush()")
        return (
            walk.value(sample_url, "SELECT seq_tup_read FROM pg_stat_user_tables WHERE relname = 'users'"),
            walk.value(
                sample_url,
                "SELECT coalesce(sum(idx_tup_read), 0)::int FROM pg_stat_user_indexes WHERE relname = 'users'",
            ),
        )

    monkeypatch.setattr(status, "SMALL_TABLE", 0)
    entry: Table = USERS
    add_encrypted_columns(walk.target(sample_url), entry, batch_ranges=2)
    before = reads()
    estimated = of(look(sample_url))
    assert (estimated.pending.how, estimated.pending.rows) == ("estimated", estimated.rows)
    assert reads() == before
    walk.backfill(sample_url, entry)
    build_search_indexes(Database(sample_url), entry, walk.ACTOR)
    run(sample_url, "UPDATE users SET email = 'a@example.com' WHERE id = 1")
    before = reads()
    counted = of(look(sample_url))
    assert (counted.pending.how, counted.pending.rows) == ("counted", 1)
    read = reads()
    assert read[0] == before[0] and read[1] - before[1] <= 2
    monkeypatch.setattr(status, "COUNTED", 0)
    more = of(look(sample_url)).pending
    assert (more.how, more.rows) == ("at least", 0)
