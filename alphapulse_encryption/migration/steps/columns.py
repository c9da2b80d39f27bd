"""Encrypted columns beside the plaintext ones, and the guard on the table from then on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import progress, tables
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import check_key, ensure_key
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.usage import know_contexts
from alphapulse_encryption.migration.gates.beginning import refuse_beginning
from alphapulse_encryption.migration.postgres.database import Actor, Connection
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows.batch_ranges import ensure_ranges
from alphapulse_encryption.migration.rows.discard import Discard
from alphapulse_encryption.migration.rows.engine import Progress, work_on_table
from alphapulse_encryption.migration.schema.contents import unsuitable_columns, wanted_columns
from alphapulse_encryption.migration.schema.data_path import let_write
from alphapulse_encryption.migration.schema.definition import LiveColumn, TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import ensure_guard, refuse_unguarded
from alphapulse_encryption.migration.schema.partitions import lock_partitions, refuse_relatives
from alphapulse_encryption.migration.schema.reachable_code import refuse_foreign_code
from alphapulse_encryption.migration.schema.saved_ddl import alter
from alphapulse_encryption.migration.schema.sql import verbatim
from alphapulse_encryption.migration.target import Target


@dataclass(frozen=True)
class ColumnsResult:
    """What :func:`add_encrypted_columns` did.

    Args:
        added: the columns added now.
        existing: the columns found and adopted.
        guards_created: whether the guard triggers were created or renewed.
        cleared: rows whose ciphertext was taken away, because a revert had left it without a guard.
        ranges: how many batch ranges the table has.
    """

    added: tuple[str, ...]
    existing: tuple[str, ...]
    guards_created: bool
    cleared: int
    ranges: int
    seconds: float


def add_encrypted_columns(
    target: Target,
    table: Table,
    *,
    batch_ranges: int,
    on_progress: Callable[[Progress], None] | None = None,
) -> ColumnsResult:
    """Add the table's encrypted and search columns and its guard triggers, and plan its batch ranges.

    Online: adding a nullable column without a default rewrites nothing, and each statement waits for its
    lock briefly and then retries. What is there already is kept.

    Args:
        batch_ranges: number of ranges to cut the table into, at first.
        on_progress: called after each batch of ciphertext that a revert had left and is cleared, and while that holds
            back.

    Raises:
        RowsLeft: rows of such ciphertext cannot be cleared, or are locked; the others are.
        ConfigurationError: table, column or key missing, or an existing column of another type.
        RefusedError: another key than the one this database was begun with, or the lock could not be had.
    """
    started = time.monotonic()
    doing = f"add encrypted columns to {table.key}"
    with target.database.session(doing) as connection:
        check_key(connection, target.keys)
        state = tables.table_state(connection, table) if bookkeeping_exists(connection) else None
        if state is not None and not state.state.has_both_sides:
            existing, ranges = tuple(wanted_columns(table)), len(read_ranges(connection, table))
            return ColumnsResult((), existing, False, 0, ranges, time.monotonic() - started)
        definition = read_table(connection, table, look=True)
        refuse_foreign_code(connection, table.key, definition.oid, renewing=True)
        refuse_relatives(connection, definition)
        if state is None:
            refuse_beginning(connection, definition, target.keys, target.cipher)
        elif names := unsuitable_columns(definition):
            raise ConfigurationError(
                f"Columns of {table.key} are not of the type that they were added with: {', '.join(names)}. Give them "
                "back text, or varchar(64) where they are searched by; nothing was changed."
            )
        ensure_key(connection, target.keys)
        know_contexts(connection, table, target.keys.current_version)
        add = partial(_add_missing, connection, table, target.actor)
        added = in_short_transaction(connection, doing, add)
        definition = read_table(connection, table, look=True)
        guard = partial(ensure_guard, connection, definition, target.actor)
        guarded = in_short_transaction(connection, f"create the guard of {table.key}", guard)
        refuse_unguarded(connection, definition, reverted=True)
        ranges = ensure_ranges(connection, definition, batch_ranges)
        cleared = 0
        if tables.require_state(connection, table).state is State.REVERTED:
            cleared = _discard(connection, target, table, on_progress)
    return ColumnsResult(
        added=added,
        existing=tuple(name for name in wanted_columns(table) if name not in added),
        guards_created=guarded,
        cleared=cleared,
        ranges=ranges,
        seconds=time.monotonic() - started,
    )


def _discard(
    connection: Connection, target: Target, table: Table, on_progress: Callable[[Progress], None] | None
) -> int:
    """Clear what a revert had left; the state remembers that there is something to clear until all of it is."""
    again = f"--add-columns --table {table.key}"
    operation = Discard(target, table)
    result = work_on_table(target, table, operation, again=again, on_progress=on_progress)

    def finish() -> None:
        tables.advance(connection, target.keys, target.actor, table, State.GUARDED)
        progress.forget(connection, table, operation.step)
        audit(connection, target.actor, "clear_ciphertext", table, rows=result.rows)

    in_short_transaction(connection, f"clear old ciphertext of {table.key}", finish)
    return result.rows


def _add_missing(connection: Connection, table: Table, actor: Actor) -> tuple[str, ...]:
    definition = read_table(connection, table, look=True)
    refuse_foreign_code(connection, table.key, definition.oid, renewing=True)
    tables.register_table(connection, table)
    names = missing_columns(definition)
    if names:
        lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
        connection.execute(add_columns_statement(definition, names))
        audit(connection, actor, "add_columns", table, columns=list(names))
    let_write(connection, with_columns(definition))
    return names


def missing_columns(definition: TableDefinition) -> tuple[str, ...]:
    """Encrypted and search columns that are not there yet."""
    return tuple(name for name in wanted_columns(definition.table) if name not in definition.columns)


def add_columns_statement(definition: TableDefinition, names: Sequence[str]) -> Composed:
    """Adds encrypted and search columns: nullable and without a default, so that nothing is rewritten."""
    types, add = wanted_columns(definition.table), SQL("ADD COLUMN {} {}")
    actions: list[Composable] = [add.format(Identifier(name), verbatim(types[name])) for name in names]
    return alter(definition, actions)


def with_columns(definition: TableDefinition) -> TableDefinition:
    """The table as it is once its encrypted columns are added."""
    types = wanted_columns(definition.table)
    added = {name: LiveColumn(name, types[name], False, None, False) for name in missing_columns(definition)}
    return replace(definition, columns={**definition.columns, **added})
