"""A process that migrates a table by the engine's functions, and tells each step as it takes it.

Run as ``python -m alphapulse_encryption_tests.stress.worker URL TABLE``, and killed at any of them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.rows.tuning import tuned
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, target

ROWS = 6_000
RANGES = 2
BATCH = 40
STEPS = ("columns", "backfill", "indexes", "verify", "switch")
CATALOGUE = """\
tables:
  - name: {name}
    columns:
      - {{name: mail, context: test_search, search_index: idx_{name}_mail}}
      - {{name: secret, context: test_context}}
"""


def table(name: str) -> Table:
    """The catalogue's entry, as in :data:`CATALOGUE`."""
    return support.table(name, support.searchable("mail", f"idx_{name}_mail"), "secret")


def create(url: str, name: str, rows: int = ROWS) -> None:
    """The table, plaintext."""
    support.run(
        url,
        f"CREATE TABLE {name} (id bigint PRIMARY KEY, mail text NOT NULL UNIQUE, secret numeric) "
        "WITH (autovacuum_vacuum_scale_factor = 0.3)",
    )
    support.run(
        url,
        f"INSERT INTO {name} SELECT i, 'mail ' || i, CASE WHEN i % 10 <> 3 THEN i * 0.10 END "
        f"FROM generate_series(1, {rows}) AS i",
    )


def say(*words: object) -> None:
    """One line for who is watching, in one piece: two threads may tell something at once."""
    os.write(1, f"{' '.join(map(str, words))}\n".encode())


def migrate(url: str, name: str, tell: Callable[..., None] = say) -> None:
    """Columns, backfill of all ranges at once without autovacuum, indexes, verification, switch.

    Args:
        url: the database.
        name: of the table.
        tell: called with each step as it begins, and in a backfill with "batch", the range, and how many rows of it
            were written so far.
    """
    database, entry = Database(url), table(name)
    tell("columns")
    add_encrypted_columns(target(database), entry, batch_ranges=RANGES)
    tell("backfill")

    with (
        tuned(database, entry, ACTOR, work_mem="16MB", autovacuum_off=True),
        ThreadPoolExecutor(RANGES) as pool,
    ):

        def fill(number: int) -> None:
            with Sessions(target(database), "16MB") as sessions:
                backfill_range(
                    sessions.target,
                    entry,
                    number,
                    pace=Pace(batch_size=BATCH),
                    sessions=sessions,
                    on_progress=lambda progress: tell("batch", number, progress.rows),
                )

        list(pool.map(fill, range(RANGES)))
    tell("indexes")
    build_search_indexes(database, entry, ACTOR)
    tell("verify")
    for number in range(RANGES):
        verify_range(target(database), entry, number)
    tell("switch")
    switch_to_ciphertext(target(database), entry)
    tell("done")


if __name__ == "__main__":
    try:
        migrate(sys.argv[1], sys.argv[2])
    except MigrationError as error:
        say(error)
        sys.exit(error.exit_status)
