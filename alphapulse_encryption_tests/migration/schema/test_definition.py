"""What the engine sees of a table, and what it says where the catalogue and the database do not agree."""

from __future__ import annotations

from pathlib import Path

import pytest

from alphapulse_encryption.catalogue import Catalogue, Table, load_catalogue
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import TableDefinition, check_catalogue, read_table
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run

ENTRY = support.table("notes", "secret")


def read(url: str, entry: Table = ENTRY) -> TableDefinition:
    with Database(url).session("read the definition") as connection:
        return read_table(connection, entry)


def test_key_columns_in_the_order_of_the_index(database_url: str) -> None:
    run(
        database_url,
        "CREATE TABLE notes (a int, b varchar(5), secret numeric(9, 2) NOT NULL DEFAULT 1.5, "
        "c timestamptz, d int, PRIMARY KEY (c, b, a) INCLUDE (d))",
    )
    found = read(database_url)
    assert [(key.name, key.type) for key in found.key] == [
        ("c", "timestamp with time zone"),
        ("b", "character varying(5)"),
        ("a", "integer"),
    ]
    assert found.key_operators == "pg_catalog"
    secret = found.columns["secret"]
    assert (secret.type, secret.not_null, secret.default) == ("numeric(9,2)", True, "1.5")
    assert list(found.columns) == ["a", "b", "secret", "c", "d"]


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("SELECT 1", "public.notes is in the catalogue but not in the database"),
        ('CREATE TABLE "Notes" (id int PRIMARY KEY, secret text)', "not in the database.*case-sensitive"),
        ("CREATE VIEW notes AS SELECT 1 AS id, '' AS secret", "no table: it is a view"),
        ("CREATE TABLE notes (id int PRIMARY KEY)", "notes has no column secret"),
        ('CREATE TABLE notes (id int PRIMARY KEY, "Secret" text)', "notes has no column secret"),
        ("CREATE TABLE notes (id int, secret text)", "no primary key.*ADD COLUMN id"),
        ("CREATE TABLE notes (id int UNIQUE NOT NULL, secret text)", "no primary key"),
        ("CREATE TABLE notes (secret text PRIMARY KEY)", r"notes\.secret is part of the primary key"),
        ("CREATE TABLE notes (id int, secret text, PRIMARY KEY (id, secret))", "is part of the primary key"),
        (
            "CREATE TABLE notes (id int PRIMARY KEY, secret text GENERATED ALWAYS AS (id::text) STORED)",
            r"notes\.secret is a generated or identity column",
        ),
        (
            "CREATE TABLE notes (id int PRIMARY KEY, secret bigint GENERATED ALWAYS AS IDENTITY)",
            r"notes\.secret is a generated or identity column",
        ),
    ],
)
def test_catalogue_and_database_disagree(database_url: str, statement: str, message: str) -> None:
    run(database_url, statement)
    for look in (
        lambda: read(database_url),
        lambda: support.add_columns(database_url, ENTRY),
    ):
        with pytest.raises(ConfigurationError, match=message) as caught:
            look()
        assert caught.value.exit_status == 2
    assert run(database_url, "SELECT 1 FROM pg_attribute WHERE attname LIKE '%_encrypted'") == []
    assert run(database_url, "SELECT 1 FROM pg_namespace WHERE nspname = 'alphapulse_encryption'") == []


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE notes ALTER secret TYPE varchar(99)",
        "ALTER TABLE notes ALTER secret SET NOT NULL",
        "ALTER TABLE notes ALTER secret SET DEFAULT 'x'",
        "ALTER TABLE notes ADD COLUMN more int",
        "ALTER TABLE notes DROP COLUMN other",
        "ALTER TABLE notes RENAME COLUMN other TO another",
        "ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD PRIMARY KEY (id, other)",
        "DROP TABLE notes; CREATE TABLE notes (id int PRIMARY KEY, secret text, other int)",
    ],
)
def test_fingerprint_changes_with_the_definition(database_url: str, change: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, secret text, other int)")
    before = read(database_url).fingerprint()
    run(database_url, "INSERT INTO notes VALUES (1, 'x', 2)")
    run(database_url, "VACUUM FULL ANALYZE notes")
    run(database_url, "CREATE INDEX ON notes (other)")
    assert read(database_url).fingerprint() == before
    run(database_url, change)
    assert read(database_url).fingerprint() != before


def test_dropped_plaintext_is_not_missing(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, secret_encrypted text)")
    catalogue = Catalogue(tables=(ENTRY,))
    with Database(database_url).session("check") as connection:
        check_catalogue(connection, catalogue)
        connection.execute("ALTER TABLE public.notes DROP COLUMN secret_encrypted")
        with pytest.raises(ConfigurationError, match="no column secret"):
            check_catalogue(connection, catalogue)


def test_all_that_is_missing_is_told_at_once(database_url: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "tables: [{name: notes, columns: [{name: a, context: x}, {name: b, context: x}]},"
        " {name: gone, columns: [{name: a, context: x}]}, {name: there, columns: [{name: a, context: x}], hide: [c]}]"
    )
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY); CREATE TABLE there (id int PRIMARY KEY, a text)",
    )
    with Database(database_url).session("check") as connection:
        told = ["notes has no column a, b", "public.gone", "there has no column c", str(path)]
        with pytest.raises(ConfigurationError, match=f"(?s){'.*'.join(told)}") as caught:
            check_catalogue(connection, load_catalogue(path))
        assert "ALPHAPULSE_ENCRYPTION_CATALOGUE" not in str(caught.value)
        with pytest.raises(ConfigurationError, match="ALPHAPULSE_ENCRYPTION_CATALOGUE") as caught:
            check_catalogue(connection, load_catalogue())
        assert all(f"public.{table}" in str(caught.value) for table in load_catalogue().keys)
    for catalogue, said in (
        (load_catalogue(path), str(path)),
        (load_catalogue(), "ALPHAPULSE_ENCRYPTION_CATALOGUE"),
    ):
        blockers = check(
            Database(database_url), catalogue.tables, support.KEYS, source=catalogue.source
        ).blockers
        assert [finding for finding in blockers if said in finding.message and finding.subject == "catalogue"]
