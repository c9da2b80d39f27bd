"""One table's fault is its own: of a step over several, each of the others is done, and it is told which was not."""

from __future__ import annotations

from collections.abc import Iterable

import dagster as dg
import pytest

from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place

# Between the others, so that one comes before it and one after.
REFUSED = "crm.order_lines"
OTHERS = ("sessions", "crm.Kunde")
NEW = {"ALPHAPULSE_ENCRYPTION_KEY_VERSION": "2"}
DAMAGED = "UPDATE crm.order_lines SET note_encrypted = {} WHERE (order_id, line) = (5, 3)"
ANOTHER_ROWS = "(SELECT note_encrypted FROM crm.order_lines WHERE (order_id, line) = (6, 3))"


def behind(url: str, statement: str) -> None:
    """Past the guard, as a careless superuser would."""
    with support.application(url) as connection:
        connection.execute(support.BEHIND)
        connection.execute(statement.encode())


def refused(theirs: Place, *arguments: str, **changes: str | None) -> str:
    """A step that tells of each table what became of it."""
    text = theirs.fails(1, *arguments, **changes).stdout
    lines = text.partition("Of each table:")[2].splitlines()
    assert {line.split()[1].rstrip(":") for line in lines if line.strip().startswith("✓")} == {*OTHERS}, text
    assert [line.split()[1] for line in lines if line.strip().startswith("✗")] == [f"{REFUSED}:"], text
    assert any(f"{arguments[0]} --table {REFUSED}" in line for line in lines), text
    return text


def assert_holds_its_values(url: str, tables: Iterable[str] = OTHERS, version: int = 1) -> None:
    for table in tables:
        assert another.decrypted(url, table, version) == another.plaintexts(url, table), table


def key_versions(url: str) -> list[tuple[object, ...]]:
    query = "SELECT key_version, state FROM alphapulse_encryption.key_versions ORDER BY 1"
    return [tuple(row) for row in support.run(url, query)]


def test_columns_data_and_verification(theirs: Place) -> None:
    support.run(theirs.url, "ALTER TABLE crm.order_lines ADD note_encrypted integer")
    refused(theirs, "--add-columns")
    added = {table for (table,) in support.run(theirs.url, "SELECT table_name FROM encryption_migrations")}
    assert added == {*OTHERS}
    support.run(theirs.url, "ALTER TABLE crm.order_lines DROP note_encrypted")
    theirs.succeeds("--add-columns")

    support.run(theirs.url, "ALTER TABLE crm.order_lines ADD CONSTRAINT no5 CHECK (order_id <> 5) NOT VALID")
    refused(theirs, "--migrate-data")
    assert_holds_its_values(theirs.url)
    left = "SELECT DISTINCT order_id FROM crm.order_lines WHERE price_encrypted IS NULL"
    assert support.run(theirs.url, left) == [(5,)]
    support.run(theirs.url, "ALTER TABLE crm.order_lines DROP CONSTRAINT no5")
    theirs.succeeds("--migrate-data")

    behind(theirs.url, DAMAGED.format("'no envelope'"))
    refused(theirs, "--verify")
    with theirs.instance() as instance:
        assert instance.get_materialized_partitions(dg.AssetKey("verified_table")) == {*OTHERS}


@pytest.mark.parametrize("damage", ["'no envelope'", ANOTHER_ROWS], ids=["unreadable", "another row's"])
def test_rotation(theirs: Place, damage: str) -> None:
    """Whether it cannot be encrypted again or does not verify afterwards."""
    theirs.succeeds("--add-columns", "--migrate-data")
    behind(theirs.url, DAMAGED.format(damage))
    text = refused(theirs, "--rotate-keys", **NEW)
    assert "(5, 3)" in text
    assert_holds_its_values(theirs.url, version=2)
    # What is verified can be relied on at once.
    assert theirs.succeeds("--verify", *(f"--table={table}" for table in OTHERS), **NEW)
    assert key_versions(theirs.url) == [(1, "readable"), (2, "current")]

    theirs.fails(1, "--verify", "--table", REFUSED, **NEW)
    theirs.succeeds("--repair-mismatched", "--migrate-data", "--table", REFUSED, **NEW)
    theirs.succeeds("--rotate-keys", "--table", REFUSED, **NEW)
    assert_holds_its_values(theirs.url, another.TABLES, version=2)
    assert key_versions(theirs.url) == [(1, "retired"), (2, "current")]


def test_what_is_left_of_an_old_version_is_of_its_table(theirs: Place) -> None:
    """An instance writes the old version after the others' rotation."""
    theirs.succeeds("--add-columns", "--migrate-data")
    support.run(
        theirs.url,
        "CREATE FUNCTION as_before() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN NEW.note_encrypted = OLD.note_encrypted; RETURN NEW; END $$; "
        "CREATE TRIGGER as_before BEFORE UPDATE ON crm.order_lines FOR EACH ROW "
        "WHEN (OLD.order_id = 5) EXECUTE FUNCTION as_before(); "
        "ALTER TABLE crm.order_lines ENABLE ALWAYS TRIGGER as_before",
    )
    refused(theirs, "--rotate-keys", **NEW)
    assert_holds_its_values(theirs.url, version=2)


def test_validation(theirs: Place) -> None:
    theirs.succeeds("--add-columns", "--migrate-data", *(f"--table={table}" for table in OTHERS))
    for step in ("--live-check", "--benchmark-queries"):
        text = refused(theirs, step)
        for column in ("sessions", "crm.Kunde"):
            assert column in text.partition("Of each table:")[0]
