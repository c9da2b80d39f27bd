"""The cost of a batch is that of its rows, however large the table is: blocks counted by the server itself.

The server's own `auto_explain` reports every statement that the engine runs, with the blocks it touched (PostgreSQL
manual, F.3), so that no statement of the hot path is forgotten here.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run, target

SMALL, LARGE = 20_000, 200_000
BATCH = 250
BATCHES = 4
# An index of ten times the size is a level higher, and each row may be looked up in it one by one, or the batch be
# read in a row; a scan of the table would cost ten times as much.
RATIO = 2
A_FEW = 24
PENDING = 10

ENTRY = support.table("large", support.searchable("mail", "idx_large_mail"), "secret")
LITTLE = support.table("little", support.searchable("mail", "idx_little_mail"), "secret")
KINDS_OF_KEYS = {
    "single": ("id bigint", "id", "i"),
    "composite": ("a int, b text", "a, b", "i / 100, 'k' || lpad((i % 100)::text, 3, '0')"),
}

EXPLAINING = {
    "auto_explain.log_min_duration": "0",
    "auto_explain.log_analyze": "on",
    "auto_explain.log_buffers": "on",
    "auto_explain.log_timing": "off",
    "auto_explain.log_format": "json",
    "auto_explain.log_level": "notice",
}


@dataclass(frozen=True)
class Explained(Database):
    """A database whose sessions tell what each of their statements cost.

    Args:
        costs: blocks that were touched, found in the cache or not, per statement and execution.
    """

    costs: list[tuple[str, int]] = field(default_factory=list)

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        connection = super().connect()
        connection.execute("LOAD 'auto_explain'")
        for name, value in EXPLAINING.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, value])
        connection.add_notice_handler(self._note)
        return connection

    def _note(self, notice: psycopg.errors.Diagnostic) -> None:
        text = notice.message_primary or ""
        if "plan:" not in text:
            return
        said = json.loads(text.partition("plan:")[2])
        plan = said["Plan"]
        blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        self.costs.append((" ".join(said["Query Text"].split()), blocks))

    def about(self, word: str) -> list[int]:
        """The costs of the statements that hold a word, in the order of their execution."""
        return [blocks for text, blocks in self.costs if word in text]


class Enough(Exception):
    """Ends a step after some batches."""


def after(batches: int) -> Callable[..., None]:
    seen: list[int] = []

    def report(*_: object) -> None:
        seen.append(1)
        if len(seen) == batches:
            raise Enough

    return report


def make(url: str, key: str, rows: int, entry: Table = ENTRY) -> None:
    columns, names, values = KINDS_OF_KEYS[key]
    run(
        url,
        f"CREATE TABLE {entry.name} ({columns}, mail text, secret numeric, mail_encrypted text, "
        f"mail_search varchar(64), secret_encrypted text, PRIMARY KEY ({names})) WITH (autovacuum_enabled = off)",
    )
    run(
        url,
        f"INSERT INTO {entry.name} SELECT {values}, 'mail ' || i, i FROM generate_series(1, {rows}) AS i",
    )
    support.add_columns(url, entry, ranges=2)


def costs_of_batches(url: str, entry: Table) -> dict[str, list[int]]:
    """Blocks per statement of some batches in the middle of the table: backfill, then verification."""
    database = Explained(url)
    with pytest.raises(Enough):
        backfill_range(target(database), entry, 1, pace=Pace(BATCH), on_progress=after(BATCHES))
    with pytest.raises(Enough):
        verify_range(target(database), entry, 1, on_progress=after(1))
    costs = defaultdict(list)
    for text, blocks in database.costs:
        if text.startswith("SET LOCAL"):
            # A script that ends a batch: the plan is of what gives the search path back, and reads nothing.
            continue
        if "p.prosrc" in text:
            # The look at the guard, of the catalogue alone: it holds the names and numbers of its table.
            continue
        # Its name stands in statements, and as a value in those that keep progress.
        named = text.replace(f'"{entry.name}"', '"the table"').replace(f"'{entry.name}'", "'the table'")
        costs[named].append(blocks)
    return costs


@pytest.mark.parametrize("analysed", [False, True], ids=["without statistics", "with statistics"])
@pytest.mark.parametrize("key", list(KINDS_OF_KEYS))
def test_a_batch_costs_the_same_in_a_table_ten_times_as_large(
    database_url: str, key: str, analysed: bool
) -> None:
    found = []
    for entry, rows in ((LITTLE, SMALL), (ENTRY, LARGE)):
        make(database_url, key, rows, entry)
        if analysed:
            run(database_url, f"ANALYZE {entry.name}")
        found.append(costs_of_batches(database_url, entry))
    small, large = found

    # What was looked at is the hot path: the statements that the data takes its way through, each batch anew.
    for word, times in (
        ("t.xmin::text", BATCHES),
        ('UPDATE "public"."the table"', BATCHES),
        ("UPDATE alphapulse_encryption.ranges SET position", BATCHES),
        ("UPDATE alphapulse_encryption.columns m SET records_processed", BATCHES),
        ('"t"."mail_search"::text', 1),
    ):
        assert sum(len(blocks) for text, blocks in large.items() if word in text) >= times, word
    for text, blocks in large.items():
        if "key_usage" in text:
            # What was reserved and is left over is given back: whether anything is depends on how far the reader was.
            continue
        assert text in small, f"only in the large table: {text}"
        # The reader is ahead of the writer by one batch or two.
        both = min(len(blocks), len(small[text]))
        for few, many in zip(sorted(small[text])[:both], sorted(blocks)[:both], strict=True):
            assert many <= RATIO * few + A_FEW, f"{few} blocks, then {many}: {text}"


def test_keys_written_by_a_batch_are_found_within_it(database_url: str) -> None:
    """Where rows changed meanwhile, the batch asks which ones it has written: within its own bounds."""
    make(database_url, "single", LARGE)
    middle = LARGE // 2 + 50
    database = Explained(database_url)
    with support.application(database_url, autocommit=False) as application:
        application.execute(f"UPDATE large SET secret = -1 WHERE id = {middle}")

        def one_batch() -> None:
            with pytest.raises(Enough):
                backfill_range(target(database), ENTRY, 1, pace=Pace(BATCH), on_progress=after(1))

        with support.Background(one_batch) as filling:
            support.until(
                lambda: support.engine_waits(database_url, "UPDATE%", behind=application),
                "the engine waits for the row",
            )
            application.commit()
            filling.result()
    (asked,) = database.about("pg_current_xact_id()")
    assert 0 < asked <= 4 * BATCH
    written = "SELECT count(*) FROM large WHERE mail_encrypted IS NOT NULL AND secret_encrypted IS NOT NULL"
    assert support.value(database_url, written) == BATCH - 1


@pytest.mark.parametrize("key", list(KINDS_OF_KEYS))
def test_catching_up_costs_what_is_pending(database_url: str, key: str) -> None:
    """Ten rows of two hundred thousand became pending: the partial index finds them."""
    make(database_url, key, LARGE)
    # As after a backfill; who wrote the ciphertexts does not matter here.
    with support.application(database_url) as connection:
        connection.execute(support.BEHIND)
        connection.execute(
            "UPDATE large SET mail_encrypted = 'x', mail_search = mail, secret_encrypted = 'x'"
        )
    support.backfill_all(database_url, ENTRY)
    build_search_indexes(Database(database_url), ENTRY, ACTOR)
    run(database_url, f"UPDATE large SET secret = -7 WHERE secret % {LARGE // PENDING} = 3")
    count = "SELECT count(*) FROM large WHERE secret_encrypted IS NULL"
    assert support.value(database_url, count) == PENDING

    database = Explained(database_url)
    rows = sum(backfill_range(target(database), ENTRY, n).rows for n in (0, 1))
    assert rows == PENDING
    assert support.value(database_url, count) == 0
    on_the_table = [(text, blocks) for text, blocks in database.costs if '"large"' in text]
    assert len(on_the_table) >= 4
    # Of some four thousand blocks of rows: those of the pending ones, and the way there through the indexes.
    for text, blocks in on_the_table:
        assert blocks <= 40 * PENDING, (text, blocks)
    for text, blocks in on_the_table:
        if text.startswith(("SELECT", "DECLARE")):
            assert blocks <= 4 * PENDING, (text, blocks)
