"""Rows that speak against a step: values encrypted by somebody else, and checks that need the plaintext."""

from __future__ import annotations

from dataclasses import replace

import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.contents import of_others, refuse_ciphertext_alone
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run

ENTRY = support.table("notes", support.searchable("mail", "idx_mail"), "secret")


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text, kind text NOT NULL)")
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, '{}', 'mine' FROM generate_series(1, 100) AS i")
    return database_url


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE notes SET mail = %s WHERE id > 50", "mail holds envelopes"),
        (
            "ALTER TABLE notes ADD mail_search text; UPDATE notes SET mail_search = 't'",
            "mail_search holds values",
        ),
        ("ALTER TABLE notes ADD secret_encrypted text DEFAULT 'x'", "secret_encrypted holds values"),
    ],
)
def test_encrypted_by_somebody_else(notes_url: str, statement: str, named: str) -> None:
    run(notes_url, statement, *[support.seal("m", "test_search")] * statement.count("%s"))
    before = run(notes_url, "SELECT * FROM notes ORDER BY id")
    with pytest.raises(ConfigurationError, match=named):
        support.add_columns(notes_url, ENTRY)
    assert run(notes_url, "SELECT * FROM notes ORDER BY id") == before
    blockers = [f.message for f in check(Database(notes_url), [ENTRY], support.KEYS).blockers]
    assert any(named in message for message in blockers)


@pytest.mark.parametrize("columns", ["mail, secret", "mail_encrypted, mail"])
def test_a_look_reads_no_more_of_a_large_table(notes_url: str, columns: str) -> None:
    """A column that is empty but for the newest rows; of a table so large, no page but by chance is read besides."""
    run(notes_url, "ALTER TABLE notes ADD mail_encrypted text; UPDATE notes SET mail = NULL, secret = NULL")
    first, _ = columns.split(", ")
    run(notes_url, f"UPDATE notes SET {first} = %s WHERE id > 90", support.seal("m", "test_search"))
    with Database(notes_url).session("look") as connection:
        definition = replace(read_table(connection, ENTRY), total_bytes=10**15)
        (told,) = of_others(connection, definition)
        assert f"notes.{first} holds" in told
        run(notes_url, "INSERT INTO notes SELECT i, NULL, NULL, '' FROM generate_series(200, 2000) AS i")
        assert list(of_others(connection, definition)) == []


def test_columns_of_ours_are_no_stranger_s(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    support.add_columns(notes_url, ENTRY)
    assert check(Database(notes_url), [ENTRY], support.KEYS).blockers == ()


@pytest.mark.parametrize(
    ("definition", "named"),
    [
        ("CONSTRAINT either CHECK (num_nonnulls(mail, secret) >= 1)", "constraint either"),
        ("CONSTRAINT given CHECK (mail IS NOT NULL OR kind = 'guest')", "constraint given"),
        ("CONSTRAINT short CHECK (length(mail) < 100)", None),
        ("CONSTRAINT other CHECK (kind <> '')", None),
        ("CONSTRAINT keyed CHECK (num_nonnulls(mail, id) >= 1)", None),
        (
            "domain text NOT NULL GENERATED ALWAYS AS (split_part(mail, '@', 2)) STORED",
            "generated column domain",
        ),
        ("CONSTRAINT whole FOREIGN KEY (mail, kind) REFERENCES known MATCH FULL", "foreign key whole"),
        ("CONSTRAINT whole FOREIGN KEY (mail, secret) REFERENCES numbers MATCH FULL", None),
        ("CONSTRAINT whole FOREIGN KEY (mail, kind) REFERENCES known", None),
        ("loud text GENERATED ALWAYS AS (upper(mail)) STORED", None),
        ("said text NOT NULL GENERATED ALWAYS AS (coalesce(mail, 'nobody')) STORED", None),
        ("whole place NOT NULL GENERATED ALWAYS AS (ROW(mail, secret)::place) STORED", None),
    ],
)
def test_what_needs_the_plaintext(notes_url: str, definition: str, named: str | None) -> None:
    run(notes_url, "CREATE TYPE place AS (street text, town text)")
    for other, column in (("known", "kind text"), ("numbers", "secret text")):
        run(notes_url, f"CREATE TABLE {other} (mail text, {column}, PRIMARY KEY (mail, {column.split()[0]}))")
    run(notes_url, "INSERT INTO known SELECT mail, kind FROM notes")
    run(notes_url, "INSERT INTO numbers SELECT mail, secret FROM notes")
    run(notes_url, f"ALTER TABLE notes ADD {definition}")
    with Database(notes_url).session("look") as connection:
        found = refuse_ciphertext_alone(connection, read_table(connection, ENTRY))
    assert [name for name, _ in found] == ([] if named is None else [named])
    for _, remedy in found:
        # What it says is what helps.
        run(notes_url, remedy[remedy.index("ALTER TABLE") : remedy.rindex(")")])
    with Database(notes_url).session("look") as connection:
        assert not refuse_ciphertext_alone(connection, read_table(connection, ENTRY))


def test_the_switch_refuses(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes ADD CONSTRAINT either CHECK (num_nonnulls(mail, secret) >= 1)")
    warnings = [f.message for f in check(Database(notes_url), [ENTRY], support.KEYS).warnings]
    assert any("constraint either" in message for message in warnings)
    target = support.target(notes_url)
    support.encrypt(notes_url, ENTRY)
    build_search_indexes(target.database, ENTRY, target.actor)
    assert support.verify(notes_url, ENTRY).passed
    with pytest.raises(RefusedError, match="constraint either refuses a row"):
        switch_to_ciphertext(target, ENTRY)
    # As the message says.
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT either")
    run(
        notes_url,
        "ALTER TABLE notes ADD CHECK (num_nonnulls(mail, mail_encrypted, secret, secret_encrypted) >= 1)",
    )
    assert switch_to_ciphertext(target, ENTRY) is not None
    run(
        notes_url,
        "INSERT INTO notes (id, mail_encrypted, mail_search, kind) VALUES (1000, %s, %s, '')",
        support.seal("m", "test_search"),
        support.token("m", "test_search"),
    )
