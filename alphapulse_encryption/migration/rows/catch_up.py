"""Which ranges have pending rows again: asked of the pending index, in time proportional to the answer."""

from __future__ import annotations

from collections.abc import Iterable

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.indexes import is_usable, pending_index


def pending_ranges(database: Database, tables: Iterable[Table]) -> list[tuple[str, int]]:
    """Keys of tables, and numbers of their completed ranges in which a row is pending.

    Ranges that were not done yet are nobody's surprise. Tables without the pending index are left out: a look would
    read all of them.

    Raises:
        ConfigurationError: a table or column is missing.
        DatabaseFailure: the server refused.
    """
    with database.session("look for pending rows") as connection:
        plan_by_key(connection)
        return [(table.key, number) for table in tables for number in pending_in(connection, table)]


def pending_in(connection: Connection, table: Table) -> list[int]:
    """Those ranges of one table; the session follows the primary key (:func:`.batches.plan_by_key`)."""
    state = table_state(connection, table) if bookkeeping_exists(connection) else None
    if state is None or not state.state.has_both_sides:
        return []
    definition = read_table(connection, table)
    if not has_pending_index(connection, definition):
        return []
    found = []
    for batch_range in read_ranges(connection, table):
        if batch_range.status != "completed" or batch_range.is_empty:
            continue
        condition, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        if answer(connection, sql.any_pending(definition, condition), *parameters):
            found.append(batch_range.number)
    return found


def has_pending_index(connection: Connection, definition: TableDefinition) -> bool:
    """Whether the pending index is there and can be used."""
    return bool(is_usable(connection, definition, pending_index(definition.table)))
