"""The primary dies under a step, and a standby without its last transactions takes over: nothing is lost or stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress, Stopped
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.versions import begin_rotation
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.rows import test_rotate
from alphapulse_encryption_tests.migration.standbys import Pair, caught_up, standby_of
from alphapulse_encryption_tests.migration.support import ACTOR, run, target, value

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
ROWS, BATCH = 400, 10
# By its batches: from here on the standby hears nothing, and here the primary dies.
CUT_OFF, FAIL_OVER = 5, 12


@pytest.fixture
def pair(server_dir: Path) -> Iterator[Pair]:
    settings = {**UNSAFE_SETTINGS, "synchronous_commit": "local"}
    with EmbeddedPostgres(server_dir, settings) as primary:
        primary.ensure_database("target")
        with standby_of(primary, server_dir.parent / "standby", settings) as standby:
            yield Pair(primary, standby)


@pytest.fixture
def url(pair: Pair) -> str:
    """The address of both; the table has its columns, its guard, and one range."""
    url = pair.url("target")
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric)")
    run(url, f"INSERT INTO notes SELECT i, 'm' || i, i * 0.10 FROM generate_series(1, {ROWS}) AS i")
    support.add_columns(url, ENTRY)
    return url


def at_the_batches(
    pair: Pair, done: list[int], then: Callable[[], None] = lambda: None
) -> Callable[[Progress], None]:
    """Cuts the standby off, and later kills the primary; the rows that the primary had written then go to ``done``."""
    batches = 0

    def on_progress(progress: Progress) -> None:
        nonlocal batches
        batches += progress.waiting_for is None
        if progress.waiting_for is None and batches == CUT_OFF:
            caught_up(pair.primary)
            pair.cut_off()
        if progress.waiting_for is None and batches == FAIL_OVER:
            done.append(progress.rows)
            pair.fail_over()
            then()

    return on_progress


def written(url: str) -> tuple[int, int]:
    """Rows that are encrypted, and rows that the progress speaks of."""
    rows = value(url, "SELECT count(*) FROM notes WHERE mail_encrypted IS NOT NULL")
    return int(rows), int(value(url, "SELECT rows_processed FROM alphapulse_encryption.ranges"))


def all_is_there(url: str) -> None:
    assert value(url, "SELECT count(*) FROM notes") == ROWS
    assert support.assert_encrypted(url, ENTRY) == 2 * ROWS
    found = support.verify(url, ENTRY)
    assert (found.passed, found.rows) == (True, ROWS), found.reasons
    used = "SELECT context, messages FROM alphapulse_encryption.key_usage"
    assert all(messages >= ROWS for _, messages in run(url, used))


def test_a_backfill_goes_on_at_the_new_primary(pair: Pair, url: str) -> None:
    done: list[int] = []
    seen: list[tuple[int, int]] = []

    def application_writes() -> None:
        seen.append(written(url))
        # Of a row whose ciphertext is there, and of one whose ciphertext was lost with the primary.
        run(url, "UPDATE notes SET mail = mail || '.' WHERE id IN (3, 95)")

    result = backfill_range(
        target(url), ENTRY, 0, pace=Pace(BATCH), on_progress=at_the_batches(pair, done, application_writes)
    )
    assert done == [FAIL_OVER * BATCH]
    assert seen == [(CUT_OFF * BATCH, CUT_OFF * BATCH)], "progress went back with the data"
    # What was lost is encrypted twice, and the row that changed.
    assert result.rows == ROWS + (FAIL_OVER - CUT_OFF) * BATCH + 1
    assert value(url, "SELECT status FROM alphapulse_encryption.ranges") == "completed"
    all_is_there(url)


def test_a_backfill_is_run_again_at_another_address(pair: Pair, url: str) -> None:
    done: list[int] = []

    def stop() -> None:
        raise Stopped("by a person")

    with pytest.raises(Stopped):
        backfill_range(
            target(pair.primary.url("target")),
            *(ENTRY, 0),
            pace=Pace(BATCH),
            on_progress=at_the_batches(pair, done, stop),
        )
    address = pair.standby.url("target")
    assert written(address) == (CUT_OFF * BATCH, CUT_OFF * BATCH)
    assert support.add_columns(address, ENTRY).added == ()
    result = support.backfill(address, ENTRY)
    assert (result.resumed, result.rows) == (True, ROWS - CUT_OFF * BATCH)
    all_is_there(address)


def test_a_rotation_goes_on_at_the_new_primary(pair: Pair, url: str) -> None:
    support.backfill_all(url, ENTRY)
    keys, cipher = test_rotate.KEYS, test_rotate.CIPHER
    begin_rotation(target(url, keys=keys))
    done: list[int] = []
    progress = at_the_batches(pair, done)
    of = target(url, keys=keys, cipher=cipher)
    rotate_range(of, ENTRY, 0, pace=Pace(BATCH), on_progress=progress)
    assert done == [FAIL_OVER * BATCH]
    key = independent.derive(test_rotate.SECOND_KEY, "test_search", 2)
    plain, envelopes = (support.texts(url, ENTRY, name) for name in ("mail", "mail_encrypted"))
    tokens = support.texts(url, ENTRY, "mail_search")
    assert len(plain) == ROWS
    assert {k: independent.open_envelope(key, str(envelope)) for k, envelope in envelopes.items()} == plain
    assert tokens == {k: independent.token(key, str(text)) for k, text in plain.items()}


def test_an_index_that_was_being_built_is_built_again(pair: Pair, url: str) -> None:
    support.backfill_all(url, ENTRY)
    invalid = "SELECT count(*) FROM pg_index WHERE indrelid = 'notes'::regclass AND NOT indisvalid"
    standby = pair.standby.url("target")
    with closing(psycopg.connect(pair.primary.url("target"))) as reader:
        # An old snapshot, which an index has to wait for.
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM pg_class")
        build = support.Background(lambda: build_search_indexes(Database(url), ENTRY, ACTOR))
        with build:
            support.until(lambda: value(standby, invalid) > 0, "the standby has the invalid index")
            pair.fail_over()
            with pytest.raises(MigrationError, match="connection"):
                build.result()
    assert value(url, invalid) > 0
    build_search_indexes(Database(url), ENTRY, ACTOR)
    assert value(url, invalid) == 0
    assert value(url, "SELECT to_regclass('idx_notes_mail') IS NOT NULL")
    all_is_there(url)
