"""Batch ranges: every table is cut once into the same number of parts by quantiles of its primary key."""

from __future__ import annotations

from psycopg.sql import SQL, Composable, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.ranges import (
    forget_ranges,
    plan_lock,
    plan_ranges,
    range_lock,
    read_ranges,
)
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database, answer
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table

# A sample of this many pages places the boundaries of a large table; a smaller table is read whole.
SAMPLED_PAGES = 2_000

_QUANTILES = """
SELECT {names} FROM generate_series(1, %s - 1) AS i
  JOIN (SELECT {key}, row_number() OVER (ORDER BY {order}) AS position, count(*) OVER () AS total
          FROM {table} t {sample}) s ({names}, position, total)
    ON s.position = greatest(1, s.total * i / %s)
 ORDER BY i
"""


def ensure_ranges(connection: Connection, definition: TableDefinition, count: int) -> int:
    """Plan the table's batch ranges where that was not done; once planned they stay. Returns how many there are.

    The first range is open below and the last one above, so that rows inserted later belong somewhere.
    A large table is not read whole: the boundaries come from a sample of its pages.

    Raises:
        ConfigurationError: ranges were planned with another number.
    """
    if not check_ranges(connection, definition.table, count):
        planned = cut(connection, definition, count)
        with connection.transaction():
            plan_ranges(connection, definition.table, planned)
    return count


def replan_ranges(database: Database, table: Table, actor: Actor, *, count: int) -> int:
    """Cut the table again, as its keys are spread now: explicitly, for a table that has grown out of its ranges.

    All ranges are pending afterwards. No progress is lost, because what is encrypted already is not read again
    where the pending index is there, and written in no case; what ranges were verified is, because those results
    speak of other rows. Other steps ask for as many ranges as ALPHAPULSE_BATCH_RANGES says.

    Raises:
        RefusedError: columns not added, the plaintext dropped or being restored, or somebody works on a range or relies
            on the boundaries now; nothing was changed.
        ConfigurationError: the table or its key is missing, or ``count`` is not a number of ranges.
        DatabaseFailure: the server refused.
    """
    if count < 1:
        raise ConfigurationError(f"A table cannot be cut into {count} batch ranges.")
    with database.session(f"plan the ranges of {table.key} anew") as connection:
        state = require_state(connection, table)
        if not state.state.has_both_sides:
            now = "dropped" if state.state is State.DROPPED else "being restored"
            raise RefusedError(
                f"The plaintext of {table.key} is {now}, so "
                "there is nothing to encrypt range by range; nothing was changed."
            )
        planned = cut(connection, read_table(connection, table), count)
        with connection.transaction():
            before = _take_ranges(connection, table, count)
            forget_ranges(connection, table)
            plan_ranges(connection, table, planned)
            audit(connection, actor, "replan_ranges", table, ranges=count, before=before)
    return count


def _take_ranges(connection: Connection, table: Table, count: int) -> int:
    """Keep everybody from the ranges until the end of the transaction; returns how many there are."""
    before = len(read_ranges(connection, table))
    names = [range_lock(table, number) for number in range(max(before, count))]
    for name in (plan_lock(table), *names):
        if not locks.try_hold(connection, name, transaction=True):
            raise RefusedError(
                f"The batch ranges of {table.key} are being worked on. Let the runs of the table end, or end them, "
                "and plan anew then; nothing was changed."
            )
    return before


def check_ranges(connection: Connection, table: Table, count: int) -> int:
    """How many ranges are planned, 0 before the first time; reads only.

    Raises:
        ConfigurationError: another number of them than this one.
    """
    planned = len(read_ranges(connection, table)) if bookkeeping_exists(connection) else 0
    if planned not in (0, count):
        raise ConfigurationError(
            f"Table {table.key} is cut into {planned} batch ranges, and ALPHAPULSE_BATCH_RANGES asks for "
            f"{count}. Set it to {planned}: ranges stay as they were planned, until they are planned anew."
        )
    return planned


def cut(
    connection: Connection, definition: TableDefinition, count: int
) -> list[tuple[list[str] | None, list[str] | None]]:
    """The ranges that a table would be cut into now: lower and upper key of each, None where it is open; reads only."""
    pages = answer(
        connection,
        "SELECT sum(pg_relation_size(relid)) / current_setting('block_size')::int "
        "FROM (SELECT relid FROM pg_partition_tree(%s) UNION SELECT %s::oid) AS parts",
        *(definition.oid, definition.oid),
    )
    sample: Composable = SQL("")
    if pages > SAMPLED_PAGES:
        percent = float(100 * SAMPLED_PAGES / pages)
        sample = SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (0)").format(Literal(percent))
    query = SQL(_QUANTILES).format(
        names=SQL(", ").join(Identifier(f"k{number}") for number in range(len(definition.key))),
        key=sql.key_text(definition),
        order=sql.key_list(definition),
        table=definition.identifier,
        sample=sample,
    )
    boundaries = [list(row) for row in connection.execute(query, [count, count])]
    if not boundaries:
        # Nothing to go by: the last range holds everything, those before it are empty for good.
        return [*(([], []) for _ in range(count - 1)), (None, None)]
    return list(zip([None, *boundaries], [*boundaries, None], strict=True))
