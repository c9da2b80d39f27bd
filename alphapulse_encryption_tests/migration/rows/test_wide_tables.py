"""A table with hundreds of encrypted columns: what names each of them stays within the server's limits."""

from __future__ import annotations

import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.gates.beginning import refuse_without_room_to_return
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.batches import read_texts
from alphapulse_encryption.migration.rows.verify import faults
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import KEYS, run, target, value


def make(url: str, columns: int) -> Table:
    names = [f"c{number}" for number in range(columns)]
    run(url, f"CREATE TABLE wide (id int PRIMARY KEY, {', '.join(f'{name} text' for name in names)})")
    run(
        url,
        "INSERT INTO wide (id, c0, c1, c6) VALUES (1, 'a', 'b', 'c'), (2, NULL, 'd', 'e'), (3, 'f', 'g', NULL)",
    )
    run(url, f"UPDATE wide SET {names[-1]} = 'last' WHERE id = 2")
    return support.table("wide", *names)


def test_verification_reads_what_is_there_alone(database_url: str) -> None:
    """A statement has 1,664 entries at most: three for each of 700 columns were too many."""
    entry = make(database_url, 700)
    names = [name for column in entry.columns for name in column.derived]
    run(database_url, f"ALTER TABLE wide {', '.join(f'ADD COLUMN {name} text' for name in names)}")
    for name in ("c0", "c1", "c6", "c699"):
        for row, text in run(database_url, f"SELECT id, {name} FROM wide WHERE {name} IS NOT NULL"):
            sealed = support.seal("another" if (name, row) == ("c1", 2) else str(text), "test_context")
            run(database_url, f"UPDATE wide SET {name}_encrypted = %s WHERE id = %s", sealed, row)
    with Database(database_url).session("read") as connection:
        definition = read_table(connection, entry)
        query = sql.select_for_verification(definition, sql.EVERYTHING)
        read = read_texts(connection, query, [], 10)
        found = faults(read, definition, target(database_url))
        assert [(o.column, o.problem, o.key) for o in found] == [("c1", "mismatched", ("2",))]
        # As a repair reads it, and a drop.
        for same in (sql.select_for_verification(definition, sql.EVERYTHING, with_version=True),):
            assert connection.execute(same, [10]).rowcount == 3
        since = value(database_url, "SELECT pg_snapshot_xmin(pg_current_snapshot())::text")
        assert connection.execute(sql.select_changed(definition, sql.EVERYTHING), [since]).rowcount == 0


def test_what_a_restore_would_have_no_place_for_is_not_dropped(database_url: str) -> None:
    """Columns that are dropped keep their numbers: 1 + 600 + 600, and 600 more would come back."""
    entry = make(database_url, 600)
    (told,) = [
        f.message
        for f in check(Database(database_url), (entry,), KEYS).warnings
        if f.subject == "wide" and "restore" in f.message
    ]
    assert "601 columns" in told
    names = [name for column in entry.columns for name in column.derived]
    run(database_url, f"ALTER TABLE wide {', '.join(f'ADD COLUMN {name} text' for name in names)}")
    with (
        Database(database_url).session("look") as connection,
        pytest.raises(RefusedError, match=r"wide has 1,201 columns.* a restore adds 600"),
    ):
        refuse_without_room_to_return(connection, read_table(connection, entry))


def test_an_approval_asks_for_the_room(ready_url: str) -> None:
    """Columns of once use the numbers up."""
    there = value(ready_url, "SELECT max(attnum) FROM pg_attribute WHERE attrelid = 'users'::regclass")
    gone = [f"gone{number}" for number in range(1_598 - there)]
    run(ready_url, f"ALTER TABLE users {', '.join(f'ADD COLUMN {name} int' for name in gone)}")
    run(ready_url, f"ALTER TABLE users {', '.join(f'DROP COLUMN {name}' for name in gone)}")
    with pytest.raises(RefusedError, match=r"users has 1,598 columns.* a restore adds"):
        walk.approve(ready_url, walk.CATALOGUE.table("users"))
