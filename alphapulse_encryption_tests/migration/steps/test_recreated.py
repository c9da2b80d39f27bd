"""A table that somebody made again, or gave children: what relies on the guard looks at the guard itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.rows.repair import repair_mismatched
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import run

ENTRY = support.table("notes", support.searchable("mail", "idx_mail"), "secret")

AGAIN = """
CREATE TABLE notes_new (LIKE notes INCLUDING ALL);
INSERT INTO notes_new SELECT * FROM notes;
DROP TABLE notes;
ALTER TABLE notes_new RENAME TO notes;
UPDATE notes SET mail = 'later' WHERE id <= 5
"""


@pytest.fixture
def verified_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text)")
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, 's' || i FROM generate_series(1, 50) AS i")
    support.encrypt(database_url, ENTRY)
    assert support.verify(database_url, ENTRY).passed
    return database_url


def test_recreated_between_two_steps(verified_url: str) -> None:
    url = verified_url
    target = support.target(url)
    build_search_indexes(target.database, ENTRY, target.actor)
    run(url, AGAIN)
    steps: tuple[Callable[[], object], ...] = (
        lambda: support.backfill(url, ENTRY),
        lambda: switch_to_ciphertext(target, ENTRY),
    )
    for step in steps:
        with pytest.raises(RefusedError, match=r"guard of notes .* recreated"):
            step()
    # As the message says.
    support.add_columns(url, ENTRY)
    assert not support.verify(url, ENTRY).passed
    repair_mismatched(target, ENTRY)
    support.backfill(url, ENTRY)
    support.assert_encrypted(url, ENTRY)


def test_children(verified_url: str, database_url: str) -> None:
    run(database_url, "CREATE TABLE letters () INHERITS (notes)")
    for step in (support.add_columns, support.backfill):
        with pytest.raises(ConfigurationError, match=r"inherit from it.*public\.letters"):
            step(database_url, ENTRY)


def test_a_copy_that_was_swapped_and_kept(verified_url: str) -> None:
    """The table that was set aside keeps its triggers, and with them the function; the new one reverts."""
    run(verified_url, AGAIN.replace("DROP TABLE notes", "ALTER TABLE notes RENAME TO notes_before"))
    with pytest.raises(RefusedError, match=r"guard of notes"):
        support.backfill(verified_url, ENTRY)
    support.add_columns(verified_url, ENTRY)
    run(
        verified_url,
        "UPDATE notes SET mail = 'last' WHERE id = 50; UPDATE notes_before SET mail = 'x' WHERE id = 1",
    )
    assert support.value(verified_url, "SELECT mail_encrypted IS NULL FROM notes WHERE id = 50")
    revert_to_plaintext(support.target(verified_url), ENTRY)
    run(verified_url, "UPDATE notes_before SET mail = 'y' WHERE id = 2")
    assert support.value(verified_url, "SELECT mail_encrypted IS NULL FROM notes_before WHERE id = 2")
