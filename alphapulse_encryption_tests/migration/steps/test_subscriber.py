"""A subscriber is attached from the first step to the restore, and follows where it did what preflight says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import UNSAFE_SETTINGS
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import run, value

NOTES = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
CATALOGUE = Catalogue(tables=(NOTES,))
ROWS = 120
TABLE = "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric)"
SIDES = "id, mail, secret, mail_encrypted, mail_search, secret_encrypted"


@pytest.fixture
def server(server_dir: Path) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(server_dir, {**UNSAFE_SETTINGS, "wal_level": "logical"}) as server:
        for name in ("target", "elsewhere"):
            server.ensure_database(name)
            run(server.url(name), TABLE)
        yield server


@pytest.fixture
def url(server: EmbeddedPostgres) -> str:
    url = server.url("target")
    run(url, f"INSERT INTO notes SELECT i, 'm' || i, i * 0.10 FROM generate_series(1, {ROWS}) AS i")
    run(url, "CREATE PUBLICATION feed FOR TABLE notes")
    return url


@pytest.fixture
def there(server: EmbeddedPostgres, url: str) -> str:
    """The subscriber's database; what it has of the table, as it was at first, is copied."""
    there = server.url("elsewhere")
    # In one server the slot has to be there first, or the subscription waits for itself.
    run(url, "SELECT pg_create_logical_replication_slot('feed', 'pgoutput')")
    run(
        there,
        f"CREATE SUBSCRIPTION feed CONNECTION 'host={server.url('target').split('host=')[1].split('&')[0]} "
        "dbname=target user=postgres' PUBLICATION feed WITH (create_slot = false, slot_name = 'feed')",
    )
    support.until(lambda: value(there, "SELECT count(*) FROM notes") == ROWS, "the first copy is there")
    return there


def told(url: str) -> str:
    report = check(Database(url), (NOTES,), None)
    (message,) = [
        f.message for f in report.warnings if f.subject == "notes" and "published by feed" in f.message
    ]
    return message


def follows(url: str, there: str, columns: str = SIDES) -> None:
    rows = f"SELECT {columns} FROM notes ORDER BY id"
    support.until(lambda: run(there, rows) == run(url, rows), "the subscriber has all of it")


def test_the_whole_way(server: EmbeddedPostgres, url: str, there: str, tmp_path: Path) -> None:
    statement = told(url).partition("Type there first: ")[2].partition(";")[0]
    assert statement.startswith('ALTER TABLE "public"."notes"')
    run(there, statement)
    walk.encrypt(url, NOTES)
    follows(url, there)
    assert "Type there first" not in told(url)
    assert walk.verify(url, NOTES).passed
    run(url, "UPDATE notes SET mail = 'other' WHERE id = 3")
    follows(url, there)
    walk.backfill(url, NOTES)
    assert walk.verify(url, NOTES).passed
    walk.hand_over(url, NOTES)
    key = independent.derive(bytes(range(32)), "test_search", 1)
    mail, token = independent.seal(key, bytes(12), "new", "test_search", 1), independent.token(key, "new")
    run(
        url,
        "UPDATE notes SET mail_encrypted = %s, mail_search = %s WHERE id = 4",
        mail,
        token,
    )
    follows(url, there)
    assert run(there, "SELECT mail, mail_encrypted FROM notes WHERE id = 4") == [(None, mail)]
    take_backup(
        walk.target(url, catalogue=CATALOGUE), (NOTES,), directory=tmp_path, bin_dirs=[server.bin_dir()]
    )
    assert walk.verify(url, NOTES).passed
    walk.approve(url, NOTES, CATALOGUE)
    walk.drop(url, NOTES, CATALOGUE)
    run(url, "INSERT INTO notes (id, mail_encrypted, mail_search) VALUES (500, %s, %s)", mail, token)
    follows(url, there, "id, mail_encrypted, mail_search, secret_encrypted")
    # As it is told: what was dropped here is there still.
    assert run(there, "SELECT mail FROM notes WHERE id = 5") == [("m5",)]
    restore_plaintext(walk.target(url, catalogue=CATALOGUE), NOTES)
    assert run(url, "SELECT mail FROM notes WHERE id IN (4, 500)") == [("new",), ("new",)]
    follows(url, there)


def test_without_the_columns_it_stops_and_goes_on_once_it_has_them(url: str, there: str) -> None:
    statement = told(url).partition("Type there first: ")[2].partition(";")[0]
    walk.encrypt(url, NOTES)
    assert run(there, "SELECT count(*) FROM information_schema.columns WHERE table_name = 'notes'") == [(3,)]
    run(there, statement)
    follows(url, there)


def test_what_is_received_is_guarded(server: EmbeddedPostgres, url: str, there: str) -> None:
    """The subscriber is the one that is encrypted."""
    support.encrypt(there, NOTES)
    (message,) = [
        f.message for f in check(Database(there), (NOTES,), None).warnings if "subscription feed" in f.message
    ]
    assert 'ALTER SUBSCRIPTION "feed" DISABLE' in message
    run(url, "UPDATE notes SET mail = 'later' WHERE id = 7")
    run(url, "INSERT INTO notes VALUES (900, 'late', 1)")
    support.until(lambda: value(there, "SELECT count(*) FROM notes WHERE id = 900") == 1, "it has arrived")
    assert run(there, "SELECT id, mail, mail_encrypted FROM notes WHERE id IN (7, 900) ORDER BY id") == [
        (7, "later", None),
        (900, "late", None),
    ]
    support.backfill(there, NOTES)
    assert support.assert_encrypted(there, NOTES) == 2 * (ROWS + 1)
