"""A process that migrates a table by the engine's functions, and tells each step as it takes it.

Run as ``python -m alphapulse_encryption_tests.stress.worker URL TABLE``, and killed at any of them.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.backfill import Pace, backfill_range
from alphapulse_encryption.migration.columns import add_encrypted_columns
from alphapulse_encryption.migration.database import Database
from alphapulse_encryption.migration.indexes import build_search_indexes
from alphapulse_encryption.migration.tuning import tuned
from alphapulse_encryption.migration.verify import verify_range
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, CIPHER, KEYS

ROWS = 20_000
RANGES = 2
BATCH = 200
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


def tell(*_: object, step: str = "batch") -> None:
    """One line for who is watching."""
    print(step, flush=True)


def migrate(url: str, name: str) -> None:
    """Columns, backfill of all ranges at once without autovacuum, indexes, verification."""
    database, entry = Database(url), table(name)
    tell(step="columns")
    add_encrypted_columns(database, entry, KEYS, ACTOR, batch_ranges=RANGES)
    tell(step="backfill")

    with (
        tuned(database, entry, ACTOR, work_mem="16MB", autovacuum_off=True) as tuning,
        ThreadPoolExecutor(RANGES) as pool,
    ):

        def fill(number: int) -> None:
            pace = Pace(batch_size=BATCH, session=tuning)
            backfill_range(database, entry, number, CIPHER, KEYS, ACTOR, pace=pace, on_progress=tell)

        list(pool.map(fill, range(RANGES)))
    tell(step="indexes")
    build_search_indexes(database, entry, ACTOR)
    for number in range(RANGES):
        tell(step="verify")
        verify_range(database, entry, number, CIPHER, KEYS, ACTOR, on_progress=tell)
    tell(step="done")


if __name__ == "__main__":
    try:
        migrate(*sys.argv[1:3])
    except MigrationError as error:
        print(error, flush=True)
        sys.exit(error.exit_status)
