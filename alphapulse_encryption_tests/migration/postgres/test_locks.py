"""Schema changes beside sessions that hold locks: ours give up and try again, and nobody queues behind them for long.

How long an application's query was held up is told by the server: it runs with a `lock_timeout` of its own, a little
above ours and below twice ours, and would fail if it had to wait longer, as behind a transaction that waits for one
lock and, holding it, for another. Where our patience is shortened, it is by the keyword defaults of
`in_short_transaction`, which hold for every step.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, LiteralString

import psycopg
import pytest
from rich.console import Console

from alphapulse_encryption.cli.progress import built, progress_bar
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres import database, ddl
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After, State

USERS = walk.CATALOGUE.table("users")

READER: LiteralString = "SELECT count(*) FROM users"
WRITER: LiteralString = "UPDATE users SET is_active = is_active WHERE id = 3"
OWNER: LiteralString = "LOCK TABLE users IN ACCESS EXCLUSIVE MODE"
READER_OF_VIEW: LiteralString = "SELECT count(*) FROM v_users"

APPLICATION: tuple[LiteralString, ...] = (
    "SELECT id FROM users WHERE id = 7",
    "UPDATE users SET is_active = is_active WHERE id = 7",
    "INSERT INTO users (id, username, email, password_hash) VALUES (900001, 'ann', 'ann@example.org', 'x')",
    "DELETE FROM users WHERE id = 900001",
)


@dataclass(frozen=True)
class Step:
    """A step with a schema change in it.

    Args:
        after: what the table has been through when it is the step's turn; None for a database as it was.
        act: the step.
        prepare: does what else comes before it.
        holders: statements of a transaction that is in its way and left open.
        queries: what the application asks meanwhile.
    """

    after: State | None
    act: Callable[[str], Any]
    holders: tuple[LiteralString, ...]
    queries: tuple[LiteralString, ...] = APPLICATION
    prepare: Callable[[str], object] = lambda url: None


def add_columns(url: str) -> Any:
    return add_encrypted_columns(walk.target(url), USERS, batch_ranges=walk.RANGES)


def without_guard(url: str) -> None:
    add_columns(url)
    walk.query(url, "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update")


def restore(url: str) -> Any:
    return restore_plaintext(walk.target(url), USERS)


def with_old_view(url: str) -> None:
    add_columns(url)
    create_views(Database(url), USERS, walk.ACTOR)
    walk.query(url, "ALTER TABLE users ADD COLUMN more text")


STEPS = {
    "columns": Step(None, add_columns, (READER, WRITER, OWNER)),
    "guard": Step(None, add_columns, (WRITER, OWNER), prepare=without_guard),
    "switch": Step(
        "verified", lambda url: switch_to_ciphertext(walk.target(url), USERS), (READER, WRITER, OWNER)
    ),
    # Before it needs the lock, a revert builds an index, and waits for writers while the application goes on.
    "revert": Step("switched", lambda url: revert_to_plaintext(walk.target(url), USERS), (READER, OWNER)),
    "restore": Step("dropped", restore, (READER, WRITER, OWNER), APPLICATION[:2]),
    "drop": Step("approved", lambda url: walk.drop(url, USERS), (READER, WRITER, OWNER), APPLICATION[:2]),
    "views": Step(
        None,
        lambda url: create_views(Database(url), USERS, walk.ACTOR),
        (READER_OF_VIEW, OWNER),
        (*APPLICATION, "SELECT id FROM v_users WHERE id = 7"),
        with_old_view,
    ),
}


@contextmanager
def held(url: str, statement: LiteralString) -> Iterator[support.Connection]:
    """A transaction that is left open."""
    with support.application(url, autocommit=False) as connection:
        connection.execute(statement)
        yield connection
        connection.rollback()


# What a busy machine may add to a timeout.
SLACK = "300 milliseconds"


@contextmanager
def asking(url: str, lock_timeout: str = "0") -> Iterator[support.Connection]:
    """A session of the application that waits for a lock as long as ours, and fails if it would have to wait longer.

    Args:
        url: the database.
        lock_timeout: ours, in PostgreSQL's notation.
    """
    with support.application(url) as connection:
        connection.execute(
            "SELECT set_config('lock_timeout', (1000 * extract(epoch FROM %s::interval + %s::interval))::int::text, "
            "false)",
            [lock_timeout, SLACK],
        )
        yield connection


def shape(url: str) -> list[Any]:
    """All that a step that gave up has to leave as it was."""
    looks: tuple[LiteralString, ...] = (
        "SELECT attname, attnotnull, atthasdef, atttypid FROM pg_attribute WHERE attrelid = 'users'::regclass "
        "AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        "SELECT conname, convalidated FROM pg_constraint WHERE conrelid = 'users'::regclass ORDER BY 1",
        "SELECT oid, tgname, tgenabled FROM pg_trigger WHERE tgrelid = 'users'::regclass ORDER BY 2",
        "SELECT oid, relname FROM pg_class WHERE relkind = 'v' AND relname LIKE 'v\\_%' ORDER BY 2",
        "SELECT md5(string_agg(t::text, ',' ORDER BY id)) FROM users t",
    )
    bookkeeping: tuple[LiteralString, ...] = (
        "SELECT table_name, authority, stage, set_aside FROM alphapulse_encryption.tables ORDER BY 1",
        "SELECT id, consumed_at FROM alphapulse_encryption.approvals ORDER BY 1",
        "SELECT id, restored_at FROM alphapulse_encryption.definitions ORDER BY 1",
        "SELECT id, action FROM alphapulse_encryption.audit_log ORDER BY 1",
    )
    if walk.value(url, "SELECT to_regclass('alphapulse_encryption.audit_log') IS NOT NULL"):
        looks += bookkeeping
    return [walk.query(url, look) for look in looks]


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ours wait for less than half a second, twice."""
    defaults = ddl.in_short_transaction.__kwdefaults__
    assert defaults is not None
    assert {"attempts", "lock_timeout"} <= set(defaults)
    monkeypatch.setitem(defaults, "attempts", 2)
    monkeypatch.setitem(defaults, "lock_timeout", "400ms")
    return defaults


@pytest.mark.parametrize("name", list(STEPS))
def test_gives_up_and_changes_nothing_then_succeeds(
    sample_url: str, after: After, name: str, patience: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = STEPS[name]
    url = sample_url if step.after is None else after(step.after)
    step.prepare(url)
    if name == "columns":
        # The bookkeeping, which is made first, is no change of the table.
        add_encrypted_columns(walk.target(url), walk.CATALOGUE.table("trades"), batch_ranges=2)
    before = shape(url)
    for holder in step.holders:
        with held(url, holder):
            if holder == OWNER:
                _gives_up_looking(step, url, monkeypatch)
            else:
                _gives_up_waiting(step, url, patience["lock_timeout"])
        assert shape(url) == before, holder

    with held(url, step.holders[0]) as holding:
        patience["attempts"] = ddl.ATTEMPTS
        with support.Background(lambda: step.act(url)) as acting:
            support.until(lambda: support.engine_waits(url, behind=holding), "it waits for the holder")
            holding.rollback()
            acting.result()
    assert shape(url) != before


def _gives_up_waiting(step: Step, url: str, lock_timeout: str) -> None:
    served = 0
    with support.Background(lambda: step.act(url)) as acting, asking(url, lock_timeout) as application:
        while acting.running:
            if support.engine_waits(url):
                for query in step.queries:
                    application.execute(query)
                    served += 1
        with pytest.raises(RefusedError, match=r"another session kept its lock through 2 tries"):
            acting.result()
    assert served >= len(step.queries)


def _gives_up_looking(step: Step, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a look at the table waits for this holder; and the application waits for it, not for us."""
    with monkeypatch.context() as shorter:
        shorter.setitem(database.SAFETY_SETTINGS, "lock_timeout", "200ms")
        with pytest.raises(RefusedError, match=r"another session kept its lock through 2 tries"):
            step.act(url)


def test_a_look_at_a_table_tries_again(sample_url: str, patience: dict[str, Any]) -> None:
    patience["attempts"] = ddl.ATTEMPTS
    with (
        held(sample_url, OWNER) as owner,
        Database(sample_url).session("look") as connection,
        support.Background(lambda: read_table(connection, USERS)) as looking,
    ):
        for _ in range(2):
            support.until(lambda: support.engine_waits(sample_url, behind=owner), "it waits for the owner")
            support.until(lambda: not support.engine_waits(sample_url), "it gives up for now")
        owner.rollback()
        assert looking.result().table == USERS


def test_tries_are_apart(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where chance has it that the pause is the shortest."""
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda low, high: low)
    moments: list[float] = []

    def change() -> None:
        moments.append(time.monotonic())
        raise psycopg.errors.LockNotAvailable

    with Database(database_url).session("try") as connection, pytest.raises(RefusedError):
        ddl.in_short_transaction(connection, "try", change, attempts=4)
    assert len(moments) == 4
    assert (
        min(after - before for before, after in itertools.pairwise(moments)) >= ddl.SHORTEST_PAUSE_SECONDS > 0
    )


def test_as_it_is_delivered_nobody_waits_longer_than_that(sample_url: str) -> None:
    """The patience is the package's own; without it the session's would apply, five seconds."""
    with (
        held(sample_url, READER) as reader,
        asking(sample_url, ddl.LOCK_TIMEOUT) as application,
        support.Background(lambda: add_columns(sample_url)) as adding,
    ):
        for query in APPLICATION[:2]:
            support.until(
                lambda: support.engine_waits(sample_url, "ALTER TABLE%", behind=reader),
                "it waits for the reader",
            )
            application.execute(query)
        assert adding.running
        reader.rollback()
        assert adding.result().added


def test_an_index_is_built_beside_readers_and_writers(sample_url: str) -> None:
    """It waits for them for as long as they take; the application goes on."""
    add_columns(sample_url)
    valid = (
        "SELECT count(*) FROM pg_index WHERE indrelid = 'users'::regclass AND indisvalid "
        "AND indexrelid IN (to_regclass('idx_user_email_search'), to_regclass('users_encryption_pending'))"
    )
    for holder in (READER, WRITER):
        with support.application(sample_url, autocommit=False) as holding:
            # An old snapshot, which an index has to wait for.
            holding.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holding.execute("SET application_name TO 'nightly report'")
            holding.execute(holder)
            told: list[str] = []
            terminal = io.StringIO()
            console = Console(file=terminal, force_terminal=True, width=200)
            who = f"waits for session {holding.info.backend_pid} (nightly report, role postgres, in a transaction for "
            with (
                progress_bar("building indexes", Database(sample_url), [USERS], built, console),
                support.Background(
                    lambda: build_search_indexes(
                        Database(sample_url),
                        USERS,
                        walk.ACTOR,
                        on_wait=told.append,  # noqa: B023
                    )
                ) as building,
            ):
                support.until(
                    lambda: support.engine_waits(sample_url, "CREATE%INDEX CONCURRENTLY%", behind=holding),
                    "the build waits for the transaction",
                )
                with asking(sample_url) as application:
                    for query in APPLICATION:
                        application.execute(query)
                assert walk.value(sample_url, valid) == 0
                assert support.engine_waits(sample_url, "CREATE%INDEX CONCURRENTLY%", behind=holding)
                support.until(lambda: bool(told), "it is told for whom it waits")  # noqa: B023
                support.until(lambda: who in terminal.getvalue(), "it is shown")  # noqa: B023
                holding.rollback()
                assert building.result().changed
            assert len(told) == 1
            assert told[0].startswith(f"idx_user_email_search {who}")
            # Whose queries are nobody's business.
            assert "users" not in told[0]
            assert holder not in terminal.getvalue()
        assert walk.value(sample_url, valid) == 2
        walk.query(sample_url, "DROP INDEX idx_user_email_search, users_encryption_pending")


def test_a_revert_waits_for_a_writer_without_holding_up_others(after: After) -> None:
    url = after("switched")
    with held(url, WRITER) as writer:
        revert = STEPS["revert"].act
        with support.Background(lambda: revert(url)) as reverting:
            support.until(
                lambda: support.engine_waits(url, "CREATE%INDEX CONCURRENTLY%", behind=writer),
                "the build waits for the writer",
            )
            with asking(url) as application:
                for query in APPLICATION[:2]:
                    application.execute(query)
            assert reverting.running
            writer.rollback()
            assert reverting.result() is not None
    assert walk.value(url, "SELECT authority FROM alphapulse_encryption.tables") == "plaintext"


def test_a_constraint_is_validated_beside_readers_and_writers(after: After) -> None:
    """Halfway through the rows, the application reads and writes; and a long reader is not in the way."""
    url = after("encrypted")
    (column,) = [c for c in USERS.columns if c.name == "email"]
    name = saved_ddl.presence_check(column)
    # The check takes as long as we like, for the engine's session alone.
    walk.query(
        url,
        "CREATE FUNCTION slowly(id bigint) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
        "IF id = 100 AND current_setting('application_name') = 'alphapulse_encryption' THEN "
        "PERFORM pg_advisory_xact_lock_shared(4711); END IF; RETURN true; END $$",
    )
    walk.query(url, f'ALTER TABLE users ADD CONSTRAINT "{name}" CHECK (slowly(id)) NOT VALID')
    validated = "SELECT convalidated FROM pg_constraint WHERE conrelid = 'users'::regclass AND conname = %s"
    with (
        held(url, READER),
        held(url, WRITER),
        support.application(url) as gate,
        Database(url).session("validate") as connection,
    ):
        gate.execute("SELECT pg_advisory_lock(4711)")
        definition = read_table(connection, USERS)
        with support.Background(lambda: switch.validate(connection, definition, name)) as validating:
            with asking(url) as application:
                for query in APPLICATION:
                    support.until(
                        lambda: support.engine_waits(url, "ALTER TABLE%VALIDATE%", behind=gate),
                        "the validation is halfway",
                    )
                    application.execute(query)
            assert walk.value(url, validated, name) is False
            gate.execute("SELECT pg_advisory_unlock(4711)")
            validating.result()
        # Both transactions are still open.
        assert walk.value(url, validated, name) is True
