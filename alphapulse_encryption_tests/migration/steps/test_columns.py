"""Step 2: columns beside the plaintext, added under the application's feet."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.postgres import ddl
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
ADDED = (
    "SELECT attname, format_type(atttypid, atttypmod), attnotnull, atthasdef FROM pg_attribute "
    "WHERE attrelid = 'notes'::regclass AND attnum > 3 AND NOT attisdropped ORDER BY attnum"
)
EXPECTED = [
    ("mail_encrypted", "text", False, False),
    ("mail_search", "character varying(64)", False, False),
    ("secret_encrypted", "text", False, False),
]
CATALOGUE = "SELECT xmin::text, * FROM pg_class WHERE relname = 'notes'"


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text NOT NULL, secret jsonb)")
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, to_jsonb(i) FROM generate_series(1, 50) AS i")
    return database_url


def test_columns_are_added_without_rewriting_the_table(notes_url: str) -> None:
    before = support.fingerprints(notes_url, ENTRY)
    file = support.value(notes_url, "SELECT pg_relation_filenode('notes')")
    result = support.add_columns(notes_url, ENTRY, ranges=4)
    assert run(notes_url, ADDED) == EXPECTED
    assert result.added == ("mail_encrypted", "mail_search", "secret_encrypted")
    assert (result.existing, result.guards_created, result.ranges) == ((), True, 4)
    assert support.value(notes_url, "SELECT pg_relation_filenode('notes')") == file
    assert support.fingerprints(notes_url, ENTRY) == before
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.ranges") == 4


def test_second_run_changes_nothing_and_says_so(notes_url: str) -> None:
    support.add_columns(notes_url, ENTRY, ranges=4)
    looks = (
        ADDED,
        CATALOGUE,
        "SELECT * FROM alphapulse_encryption.audit_log",
        "SELECT xmin::text, * FROM alphapulse_encryption.ranges ORDER BY batch_range",
        "SELECT xmin::text, oid, tgname, tgenabled FROM pg_trigger ORDER BY oid",
        "SELECT xmin::text, oid FROM pg_proc WHERE proname LIKE 'encryption%' ORDER BY oid",
    )
    before = [run(notes_url, look) for look in looks]
    result = support.add_columns(notes_url, ENTRY, ranges=4)
    assert [run(notes_url, look) for look in looks] == before
    assert (result.added, result.guards_created) == ((), False)
    assert result.existing == ("mail_encrypted", "mail_search", "secret_encrypted")


def test_columns_that_are_there_are_adopted(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes ADD mail_encrypted varchar, ADD mail_search text")
    result = support.add_columns(notes_url, ENTRY)
    assert result.added == ("secret_encrypted",)
    assert result.existing == ("mail_encrypted", "mail_search")
    support.backfill_all(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 100


@pytest.mark.parametrize(
    "definition",
    [
        "secret_encrypted bytea",
        "mail_encrypted varchar(100)",
        "mail_search varchar(43)",
        "secret_encrypted text GENERATED ALWAYS AS ('x') STORED",
    ],
)
def test_columns_of_another_type_are_refused(notes_url: str, definition: str) -> None:
    run(notes_url, f"ALTER TABLE notes ADD {definition}")
    before = run(notes_url, ADDED)
    name = definition.split(" ", maxsplit=1)[0]
    with pytest.raises(ConfigurationError, match=rf"notes\.{name} exists with the type"):
        support.add_columns(notes_url, ENTRY)
    assert run(notes_url, ADDED) == before
    assert run(notes_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'alphapulse_encryption'") == []


def test_another_number_of_ranges_is_refused(notes_url: str) -> None:
    support.add_columns(notes_url, ENTRY, ranges=4)
    with pytest.raises(ConfigurationError, match=r"cut into 4 batch ranges.*asks for 5"):
        support.add_columns(notes_url, ENTRY, ranges=5)
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.ranges") == 4


def test_waits_for_the_lock_in_short_turns(notes_url: str) -> None:
    """A reader's transaction holds us up; those who come behind us are not held up for long."""
    with support.application(notes_url, autocommit=False) as reader:
        reader.execute("SELECT * FROM notes")
        with support.Background(lambda: support.add_columns(notes_url, ENTRY)) as adding:
            support.until(
                lambda: support.engine_waits(notes_url, "ALTER TABLE%", behind=reader),
                "it waits for the reader",
            )
            assert run(notes_url, "SELECT id FROM notes WHERE id = 1") == [(1,)]  # served between two turns
            assert adding.running
            reader.commit()
            assert adding.result().added
    assert run(notes_url, ADDED) == EXPECTED


def test_gives_up_when_the_lock_is_never_free(notes_url: str) -> None:
    with (
        support.application(notes_url, autocommit=False) as reader,
        Database(notes_url).session("try") as connection,
    ):
        reader.execute("SELECT * FROM notes")

        def change() -> None:
            connection.execute("ALTER TABLE public.notes ADD COLUMN more int")

        with pytest.raises(RefusedError, match=r"Could not add more: another session.*2 tries.*Nothing was"):
            ddl.in_short_transaction(connection, "add more", change, attempts=2, lock_timeout="20ms")
        assert run(notes_url, ADDED) == []
        reader.rollback()
        ddl.in_short_transaction(connection, "add more", change, attempts=2, lock_timeout="20ms")
    assert [name for name, *_ in run(notes_url, ADDED)] == ["more"]


def test_other_errors_are_not_tried_again(notes_url: str) -> None:
    calls: list[int] = []
    with Database(notes_url).connect() as connection:

        def change() -> None:
            calls.append(1)
            connection.execute("ALTER TABLE public.notes ADD COLUMN id int")

        with pytest.raises(psycopg.errors.DuplicateColumn):
            ddl.in_short_transaction(connection, "add id", change)
    assert len(calls) == 1


def test_writers_go_on_meanwhile(notes_url: str) -> None:
    """Rows written before, during and after, none is lost or left inconsistent."""
    number = 1_000
    with (
        support.application(notes_url) as connection,
        support.Background(lambda: support.encrypt(notes_url, ENTRY, ranges=3)) as encrypting,
    ):
        while encrypting.running:
            number += 1
            connection.execute("INSERT INTO notes VALUES (%s, 'new', NULL)", [number])
            connection.execute("UPDATE notes SET mail = 'changed ' || id WHERE id = %s", [number % 50])
        encrypting.result()
    assert number > 1_001
    support.backfill_all(notes_url, ENTRY)
    support.assert_encrypted(notes_url, ENTRY)
    assert support.value(notes_url, "SELECT count(*) FROM notes") == 50 + number - 1_000
