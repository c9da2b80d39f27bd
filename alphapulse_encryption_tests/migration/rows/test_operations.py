"""Every write to a user's row goes through the one engine: on the way back as on the way there.

Four ways back, each of which once had a loop of its own: they wait, resume, set rows aside and leave locked rows.
"""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.insight.status import read_status
from alphapulse_encryption.migration.postgres.database import SAFETY_SETTINGS, Database
from alphapulse_encryption.migration.rows import sessions
from alphapulse_encryption.migration.rows.engine import Progress
from alphapulse_encryption.migration.rows.repair import repair_mismatched
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import run

NOTES = support.table("notes", "body")
CATALOGUE = Catalogue(tables=(NOTES,))
ROWS = 240
ONE = 77


def target(url: str) -> Target:
    return walk.target(url, catalogue=CATALOGUE)


def make(url: str) -> None:
    run(url, "CREATE TABLE notes (id int PRIMARY KEY, body text)")
    run(url, f"INSERT INTO notes SELECT i, 'text ' || i FROM generate_series(1, {ROWS}) AS i")


def switched(url: str) -> None:
    make(url)
    walk.switch(url, NOTES)


def written_as_ciphertext_alone(url: str) -> None:
    """By the application: each row has its neighbour's ciphertext, and no plaintext any more."""
    run(
        url,
        "UPDATE notes n SET body_encrypted = m.body_encrypted FROM notes m "
        f"WHERE m.id = CASE WHEN n.id = {ROWS} THEN 1 ELSE n.id + 1 END",
    )


def to_revert(url: str, _bin_dir: Path, _directory: Path) -> None:
    switched(url)
    written_as_ciphertext_alone(url)


def to_restore(url: str, bin_dir: Path, directory: Path) -> None:
    switched(url)
    walk.backup(url, (NOTES,), directory, bin_dir)
    walk.approve(url, NOTES, CATALOGUE)
    walk.drop(url, NOTES, CATALOGUE)
    restore_plaintext(target(url), NOTES, hold=True)
    written_as_ciphertext_alone(url)


def to_try_again(url: str, _bin_dir: Path, _directory: Path) -> None:
    switched(url)
    revert_to_plaintext(target(url), NOTES)


def to_repair(url: str, _bin_dir: Path, _directory: Path) -> None:
    make(url)
    walk.encrypt(url, NOTES)
    with support.application(url) as connection:
        connection.execute(support.BEHIND)
        connection.execute("UPDATE notes SET body_encrypted = 'no envelope'")
    walk.verify(url, NOTES)


UNFILLED = "SELECT id FROM notes WHERE body IS NULL AND body_encrypted IS NOT NULL ORDER BY id"
UNCLEARED = "SELECT id FROM notes WHERE body_encrypted IS NOT NULL ORDER BY id"


@dataclass(frozen=True)
class Way:
    """One way back.

    Args:
        begin: brings a database to where there is work in every row.
        act: does it.
        left: asks for the rows that are still to do.
        again: what to type to go on.
    """

    begin: Callable[[str, Path, Path], None]
    act: Callable[..., object]
    left: str
    again: str

    def ids(self, url: str) -> list[int]:
        return [key for (key,) in run(url, self.left)]


WAYS = {
    "decrypt in a revert": Way(
        to_revert,
        lambda url, **more: revert_to_plaintext(target(url), NOTES, **more),
        UNFILLED,
        "--revert-to-plaintext --table notes",
    ),
    "decrypt in a restore": Way(
        to_restore,
        lambda url, **more: restore_plaintext(target(url), NOTES, **more),
        UNFILLED,
        "--restore-plaintext --table notes",
    ),
    "discard in a retry": Way(
        to_try_again,
        lambda url, **more: add_encrypted_columns(target(url), NOTES, batch_ranges=walk.RANGES, **more),
        UNCLEARED,
        "--add-columns --table notes",
    ),
    "repair": Way(
        to_repair,
        lambda url, **more: repair_mismatched(target(url), NOTES, **more),
        UNCLEARED,
        "--repair-mismatched --table notes",
    ),
}


@pytest.fixture(params=list(WAYS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def way(name: str, database_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> Way:
    WAYS[name].begin(database_url, postgres.bin_dir(), tmp_path)
    assert len(WAYS[name].ids(database_url)) == ROWS
    return WAYS[name]


def setting(url: str, name: str, text: str) -> None:
    run(
        url,
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES (%s, %s) "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        name,
        text,
    )


def waits_for(url: str) -> list[str]:
    rows = run(url, "SELECT waiting_for FROM alphapulse_encryption.operations WHERE waiting_for IS NOT NULL")
    return [reason for (reason,) in rows]


@pytest.mark.parametrize(
    ("name_of_setting", "holding", "reason"),
    [
        ("paused", "true", "paused by an operator"),
        ("min_free_disk_mib", "1000000000", "MiB of disk are free"),
    ],
    ids=["pause", "throttle"],
)
def test_it_waits_and_goes_on(
    database_url: str, way: Way, name_of_setting: str, holding: str, reason: str
) -> None:
    setting(database_url, name_of_setting, holding)
    with support.Background(lambda: way.act(database_url)) as acting:
        support.until(
            lambda: bool(waits_for(database_url)) or not acting.running, "the bookkeeping says what for"
        )
        assert acting.running
        assert reason in waits_for(database_url)[0]
        assert len(way.ids(database_url)) == ROWS
        (told,) = read_status(Database(database_url), CATALOGUE, ["notes"]).tables
        assert reason in told.waiting_for[0]
        setting(database_url, name_of_setting, {"true": "false"}.get(holding, "0"))
        acting.result()
    assert way.ids(database_url) == []
    assert waits_for(database_url) == []


KILLED = """
import sys
from alphapulse_encryption_tests.migration.rows import test_operations
test_operations.WAYS[sys.argv[1]].act(sys.argv[2])
"""


def test_killed_in_the_middle_it_goes_on(database_url: str, name: str, way: Way) -> None:
    counted = "SELECT coalesce(sum(rows_processed), 0) FROM alphapulse_encryption.operations"
    before = support.value(database_url, counted)
    setting(database_url, "batch_size", "10")
    setting(database_url, "rest_ratio", "50")
    process = subprocess.Popen([sys.executable, "-c", KILLED, name, database_url])
    try:
        support.until(lambda: len(way.ids(database_url)) <= ROWS - 20, "the first batches are committed")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    open_ones = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
        "AND application_name = 'alphapulse_encryption'"
    )
    support.until(lambda: support.value(database_url, open_ones) == 0, "its sessions have ended")
    done = ROWS - len(way.ids(database_url))
    assert 0 < done < ROWS
    # Counts were committed with the data they speak of.
    assert support.value(database_url, counted) - before == done
    finished = support.fingerprints(database_url, NOTES)
    left = {(str(key),) for key in way.ids(database_url)}
    run(database_url, "DELETE FROM alphapulse_encryption.settings")

    way.act(database_url)

    assert way.ids(database_url) == []
    after = support.fingerprints(database_url, NOTES)
    assert {key for key, place in finished.items() if after[key] != place} == left


def test_a_refused_row_is_set_aside_and_the_others_are_done(database_url: str, way: Way) -> None:
    run(
        database_url,
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE EXCEPTION 'text 77 is in the archive'; END$$",
    )
    run(
        database_url,
        f"CREATE TRIGGER keep BEFORE UPDATE ON notes FOR EACH ROW WHEN (OLD.id = {ONE}) EXECUTE FUNCTION keep(); "
        "ALTER TABLE notes ENABLE ALWAYS TRIGGER keep",
    )
    with pytest.raises(RefusedError, match=rf"key \({ONE}\): the database refused it") as caught:
        way.act(database_url)
    assert way.again in str(caught.value)
    assert "archive" not in str(caught.value)
    assert way.ids(database_url) == [ONE]
    aside = run(database_url, "SELECT table_name, key, reason FROM alphapulse_encryption.quarantine")
    assert [(table, key) for table, key, _ in aside] == [("notes", [str(ONE)])]
    assert "P0001" in aside[0][2] and "archive" not in aside[0][2]

    run(database_url, "DROP TRIGGER keep ON notes")
    way.act(database_url)
    assert way.ids(database_url) == []
    assert run(database_url, "SELECT * FROM alphapulse_encryption.quarantine") == []


def test_a_locked_row_is_left_for_later_and_named(
    database_url: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SAFETY_SETTINGS, "lock_timeout", "100ms")
    with support.application(database_url, autocommit=False) as application:
        application.execute(f"SELECT FROM notes WHERE id = {ONE} FOR UPDATE")
        with pytest.raises(RefusedError, match=rf"locked.*key \({ONE}\)") as caught:
            way.act(database_url)
        assert re.search(rf"Run it again.*{way.again}", str(caught.value))
        assert way.ids(database_url) == [ONE]
        application.rollback()
    way.act(database_url)
    assert way.ids(database_url) == []


@pytest.mark.parametrize("instead", ["NULL", "OLD"])
def test_a_row_that_a_trigger_keeps_is_named(database_url: str, way: Way, instead: str) -> None:
    """It says nothing, and the row stays as it is, or is written as it was."""
    run(
        database_url,
        f"CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RETURN {instead}; END$$; "
        f"CREATE TRIGGER keep BEFORE UPDATE ON notes FOR EACH ROW WHEN (OLD.id = {ONE}) EXECUTE FUNCTION keep(); "
        "ALTER TABLE notes ENABLE ALWAYS TRIGGER keep",
    )
    for _ in range(2):
        with pytest.raises(RefusedError, match=rf": 1: key \({ONE}\): .*DISABLE TRIGGER .keep"):
            way.act(database_url)
        assert way.ids(database_url) == [ONE]
    run(database_url, "ALTER TABLE notes DISABLE TRIGGER keep")
    way.act(database_url)
    assert way.ids(database_url) == []


def test_another_run_that_changes_the_table_ends_it(
    database_url: str, name: str, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was cleared or missing for one reason is cleared or missing for another one then."""
    monkeypatch.setattr(sessions, "FIRST_BATCH", 10)
    setting(database_url, "batch_size", "10")
    other = "plaintext" if name.startswith("decrypt") else "ciphertext"

    def change(progress: Progress) -> None:
        run(database_url, "UPDATE alphapulse_encryption.tables SET authority = %s, set_aside = '{}'", other)

    with pytest.raises(RefusedError):
        way.act(database_url, on_progress=change)
    assert len(way.ids(database_url)) == ROWS - 10


def test_the_way_back_loses_no_write_of_the_application(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """It writes ciphertext alone until that is refused: what it wrote last is in the plaintext."""
    to_restore(database_url, postgres.bin_dir(), tmp_path)
    setting(database_url, "batch_size", "20")
    wanted: dict[int, str] = {}

    def write(share: int) -> int:
        with support.application(database_url) as connection:
            for number in range(1_000_000):
                key = random.randrange(ROWS // 2) * 2 + share + 1
                text = f"written {share}.{number}"
                try:
                    connection.execute(
                        "UPDATE notes SET body_encrypted = %s WHERE id = %s",
                        [walk.CIPHER.encrypt(text, NOTES.columns[0].context), key],
                    )
                except psycopg.errors.CheckViolation:
                    return number
                wanted[key] = text
        raise AssertionError("it was never refused")

    with support.Background(lambda: write(0)) as one, support.Background(lambda: write(1)) as other:
        support.until(lambda: len(wanted) > 20, "the application writes")
        assert restore_plaintext(target(database_url), NOTES) is not None
        assert min(one.result(), other.result()) > 0
    found: dict[int, str] = dict(run(database_url, "SELECT id, body FROM notes"))
    assert {key: found[key] for key in wanted} == wanted
    assert None not in found.values()
