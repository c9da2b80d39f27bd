"""The undo of a drop: the plaintext columns again, from the ciphertext as it is now.

The columns come back empty and unbound, so that the application goes on writing ciphertext; they are filled
range by range, then their indexes and constraints are built beside the application, and one short transaction
lets the plaintext be right. What a killed call had done is found in the database, and the next call goes on
from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import progress
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.quarantine import NAMED
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import advance, mark_restored, require_state
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction, outside_transaction
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.decrypt import Decrypt, Filling
from alphapulse_encryption.migration.rows.engine import Progress, RangeResult
from alphapulse_encryption.migration.schema import guard, indexes, saved
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.saved import SavedColumn, SavedConstraint, SavedIndex, SavedTable
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]


@dataclass(frozen=True)
class RestoreResult:
    """What :func:`restore_plaintext` did.

    Args:
        changed: False where nothing was dropped.
        columns: the columns that are back.
        rows: rows filled by this call.
        values: values filled by this call.
        reencrypted: of those, values that the column shows in another text form than the ciphertext had, and
            whose ciphertext was renewed for that.
        indexes: names of indexes built by this call, those of constraints included.
        constraints: names of constraints added by this call.
        lost_grants: privileges on columns that could not be given back because their role is gone.
        held: whether it stopped before the plaintext became right.
    """

    changed: bool
    columns: tuple[str, ...] = ()
    rows: int = 0
    values: int = 0
    reencrypted: int = 0
    indexes: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    lost_grants: tuple[str, ...] = ()
    held: bool = False
    seconds: float = 0.0


def restore_plaintext(
    target: Target,
    table: Table,
    *,
    hold: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> RestoreResult:
    """Rebuild the dropped plaintext columns: types, values, indexes, constraints, comments and privileges.

    Online, and resumable at any point; the values come back in the batch ranges of the backfill, and are verified
    at the end as in step 4. Afterwards the plaintext is right, as before the switch; the columns are the table's last
    ones now.

    Args:
        hold: stop when all is back but the ciphertext still right. Writers of ciphertext alone go on until then, and
            are refused afterwards: this is where they are exchanged for such as write both sides. The next call,
            without it, ends the restore.
        on_progress: called after each batch that was filled, and while it holds back.

    Raises:
        RowsLeft: rows cannot be filled, or are locked; the others are, and the ciphertext stays the source of truth.
        RefusedError: nothing saved to restore from, or, when all is back, values that
            do not match.
        ConfigurationError: the table or its key is missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    doing = f"restore the plaintext of {table.key}"
    with target.database.session(doing) as connection:
        plan_by_key(connection)
        state = require_state(connection, table)
        check_key(connection, target.keys)
        if state.state.has_both_sides:
            return RestoreResult(changed=False, seconds=time.monotonic() - started)
        what = saved.latest(connection, table)
        if what is None:
            raise RefusedError(
                f"No definition of the dropped columns of {table.key} is kept in alphapulse_encryption.definitions. "
                "Restore them from the backup instead; nothing was changed."
            )
        lost: tuple[str, ...] = ()
        if state.state is State.DROPPED:
            lost = in_short_transaction(
                connection, doing, lambda: _begin(connection, table, what, target.actor)
            )
        definition = read_table(connection, table)
        filling = Filling(Decrypt(target, table), f"--restore-plaintext --table {table.key}", on_progress)
        built: tuple[str, ...] = ()
        added: tuple[str, ...] = ()
        if require_state(connection, table).authority == "ciphertext":
            filling.fill()
            built = _build_indexes(connection, definition, what)
            added = _add_constraints(connection, definition, what)
            _add_statistics(connection, definition, what)
            if hold:
                return _result(started, what, filling.done, built, added, lost, held=True)
            switch.hand_back(connection, definition, filling)
        switch.put_back_not_null(connection, definition)
        in_short_transaction(connection, doing, lambda: _finish(connection, definition, target.actor))
        connection.execute(SQL("ANALYZE {}").format(definition.identifier))
    # The drop took the pending index with it.
    indexes.build_search_indexes(target.database, table, target.actor)
    _verify(target, table)
    return _result(started, what, filling.done, built, added, lost)


def _result(
    started: float,
    what: SavedTable,
    filled: RangeResult,
    built: tuple[str, ...],
    added: tuple[str, ...],
    lost: tuple[str, ...],
    *,
    held: bool = False,
) -> RestoreResult:
    return RestoreResult(
        changed=True,
        columns=tuple(column.name for column in what.columns),
        rows=filled.rows,
        values=filled.values,
        reencrypted=filled.renewed,
        indexes=built,
        constraints=added,
        lost_grants=lost,
        held=held,
        seconds=time.monotonic() - started,
    )


def _verify(target: Target, table: Table) -> None:
    """The comparison of step 4, of what was restored: every value against its ciphertext, every token anew."""
    with target.database.session(f"verify what was restored of {table.key}") as connection:
        ranges = read_ranges(connection, table)
    for batch_range in ranges:
        found = verify.verify_range(target, table, batch_range.number)
        # The application may write plaintext again: that is pending, as it was before the drop.
        wrong = [offender for offender in found.offenders if offender.problem != "pending"]
        if wrong:
            named = "; ".join(str(offender) for offender in wrong[:NAMED])
            raise RefusedError(
                f"The plaintext of {table.key} is back, and {len(wrong)} values or more do not match their ciphertext: "
                f"{named}. Look at these rows; --verify --table {table.key} names them again."
            )


def _begin(connection: Connection, table: Table, what: SavedTable, actor: Actor) -> tuple[str, ...]:
    """The columns are there again, empty; the ciphertext is right, as after a switch."""
    state = require_state(connection, table, lock=True)
    if state.state is not State.DROPPED:
        return ()
    definition = read_table(connection, table, plaintext=False)
    by_name = {column.name: column for column in table.columns}
    _refuse_other_catalogue(definition, what)
    actions: list[Composable] = []
    for column in what.columns:
        encrypted = by_name[column.name].encrypted
        actions.append(_add_column(column))
        if column.not_null is not None:
            either = SQL("{} IS NOT NULL OR {} IS NOT NULL").format(
                Identifier(column.name), Identifier(encrypted)
            )
            actions.append(saved.add_check(saved.presence_check(by_name[column.name]), either))
            if not column.encrypted_was_required:
                actions.append(
                    SQL("DROP CONSTRAINT IF EXISTS {}").format(Identifier(saved.required_check(encrypted)))
                )
                actions.append(SQL("ALTER COLUMN {} DROP NOT NULL").format(Identifier(encrypted)))
    connection.execute(saved.alter(definition, actions))
    lost: list[str] = []
    for column in what.columns:
        lost += _dress_column(connection, definition, column)
    advance(connection, table, State.RESTORING, what.set_aside)
    guard.ensure_guard(connection, read_table(connection, table), actor)
    audit(connection, actor, "begin_restore", table, columns=[c.name for c in what.columns], lost_grants=lost)
    return tuple(lost)


def _refuse_other_catalogue(definition: TableDefinition, what: SavedTable) -> None:
    table = definition.table
    catalogued = {column.name for column in table.columns}
    dropped = {column.name for column in what.columns}
    if catalogued != dropped:
        raise RefusedError(
            f"The catalogue names other columns of {table.key} than were dropped "
            f"({', '.join(sorted(catalogued ^ dropped))}). Put the catalogue back as it was at the drop; "
            "nothing was changed."
        )
    present = sorted(dropped & set(definition.columns))
    if present:
        raise RefusedError(
            f"Columns named {', '.join(present)} were added to {table.key} since the drop. Rename them; "
            "nothing was changed."
        )


def _add_column(column: SavedColumn) -> Composed:
    return SQL("ADD COLUMN {} {} {}").format(
        Identifier(column.name),
        saved.verbatim(column.type),
        SQL("COLLATE {}").format(Identifier(*column.collation)) if column.collation else SQL(""),
    )


_STORAGE = {"p": SQL("PLAIN"), "e": SQL("EXTERNAL"), "m": SQL("MAIN"), "x": SQL("EXTENDED")}
_COMPRESSION = {"p": SQL("pglz"), "l": SQL("lz4")}


def _dress_column(connection: Connection, definition: TableDefinition, column: SavedColumn) -> list[str]:
    """Everything about a column that is not its type; returns the privileges that could not be given back."""
    name = Identifier(column.name)
    actions: list[Composable] = []
    if column.statistics is not None:
        actions.append(SQL("ALTER COLUMN {} SET STATISTICS {}").format(name, Literal(column.statistics)))
    if column.storage is not None:
        actions.append(SQL("ALTER COLUMN {} SET STORAGE {}").format(name, _STORAGE[column.storage]))
    if column.compression is not None:
        actions.append(
            SQL("ALTER COLUMN {} SET COMPRESSION {}").format(name, _COMPRESSION[column.compression])
        )
    for option in column.options:
        key, _, value = option.partition("=")
        actions.append(
            SQL("ALTER COLUMN {} SET ({} = {})").format(name, Identifier(key), saved.verbatim(value))
        )
    if actions:
        connection.execute(saved.alter(definition, actions))
    full_name = Identifier(definition.table.schema_name, definition.table.name, column.name)
    if column.comment is not None:
        connection.execute(saved.comment_on("COLUMN", full_name, column.comment))
    for schema, sequence in column.sequences:
        connection.execute(
            SQL("ALTER SEQUENCE IF EXISTS {} OWNED BY {}").format(Identifier(schema, sequence), full_name)
        )
    roles = {role for (role,) in connection.execute("SELECT rolname FROM pg_roles")}
    lost = []
    for grant in column.grants:
        if grant.grantee is not None and grant.grantee not in roles:
            lost.append(f"{grant.privilege} ({column.name}) to {grant.grantee}")
            continue
        connection.execute(grant.statement(definition.identifier, column.name))
    return lost


def _build_indexes(connection: Connection, definition: TableDefinition, what: SavedTable) -> tuple[str, ...]:
    built = []
    wanted = [*what.indexes, *(c.index for c in what.constraints if c.kind == "u" and c.index is not None)]
    for index in wanted:
        if _build_index(connection, definition, index):
            built.append(index.name)
    return tuple(built)


def _build_index(connection: Connection, definition: TableDefinition, index: SavedIndex) -> bool:
    """Build an index beside the application; one that an interrupted build left invalid is built anew."""
    name = Identifier(definition.table.schema_name, index.name)
    doing = f"build the index {index.name}"
    statement = saved.verbatim(index.definition.replace(" INDEX ", " INDEX CONCURRENTLY ", 1))

    def build() -> None:
        # What an interrupted build left, or the try before this one.
        if indexes.is_usable(connection, definition, index.name) is False:
            connection.execute(SQL("DROP INDEX CONCURRENTLY {}").format(name))
        connection.execute(statement)

    missing = not indexes.is_usable(connection, definition, index.name)
    if missing:
        connection.execute("SELECT set_config('default_tablespace', %s, false)", [index.tablespace or ""])
        try:
            outside_transaction(connection, doing, build)
        finally:
            if not connection.broken:
                connection.execute("SELECT set_config('default_tablespace', '', false)")
    if index.comment is not None:
        connection.execute(saved.comment_on("INDEX", name, index.comment))
    for number, target in index.statistics.items():
        connection.execute(
            SQL("ALTER INDEX {} ALTER COLUMN {} SET STATISTICS {}").format(
                name, Literal(number), Literal(target)
            )
        )
    if index.clustered:
        cluster = saved.alter(definition, [SQL("CLUSTER ON {}").format(Identifier(index.name))])
        in_short_transaction(connection, doing, lambda: connection.execute(cluster))
    return missing


def _add_constraints(
    connection: Connection, definition: TableDefinition, what: SavedTable
) -> tuple[str, ...]:
    added = []
    for constraint in what.constraints:

        def add(constraint: SavedConstraint = constraint) -> bool:
            if saved.constraint_state(connection, definition, constraint.name) is not None:
                return False
            connection.execute(saved.alter(definition, [_constraint(constraint)]))
            if constraint.comment is not None:
                name = SQL("{} ON {}").format(Identifier(constraint.name), definition.identifier)
                connection.execute(saved.comment_on("CONSTRAINT", name, constraint.comment))
            return True

        if in_short_transaction(connection, f"add the constraint {constraint.name}", add):
            added.append(constraint.name)
        if constraint.validated:
            switch.validate(connection, definition, constraint.name)
    return tuple(added)


def _constraint(constraint: SavedConstraint) -> Composed:
    name = Identifier(constraint.name)
    if constraint.kind == "u" and constraint.index is not None:
        return SQL("ADD CONSTRAINT {} UNIQUE USING INDEX {} {} {}").format(
            name,
            Identifier(constraint.index.name),
            SQL("DEFERRABLE" if constraint.deferrable else "NOT DEFERRABLE"),
            SQL("INITIALLY DEFERRED" if constraint.deferred else "INITIALLY IMMEDIATE"),
        )
    # Checks and foreign keys bind new rows at once and are validated afterwards; exclusion has no such way.
    later = constraint.kind in ("c", "f") and constraint.validated
    return SQL("ADD CONSTRAINT {} {} {}").format(
        name, saved.verbatim(constraint.definition), SQL("NOT VALID" if later else "")
    )


def _add_statistics(connection: Connection, definition: TableDefinition, what: SavedTable) -> None:
    for statistics in what.statistics:
        row = connection.execute(
            "SELECT FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace "
            "WHERE n.nspname = %s AND s.stxname = %s",
            [statistics.schema_name, statistics.name],
        ).fetchone()
        if row is not None:
            continue
        with connection.transaction():
            name = Identifier(statistics.schema_name, statistics.name)
            connection.execute(saved.verbatim(statistics.definition))
            if statistics.target is not None:
                connection.execute(
                    SQL("ALTER STATISTICS {} SET STATISTICS {}").format(name, Literal(statistics.target))
                )
            if statistics.comment is not None:
                connection.execute(saved.comment_on("STATISTICS", name, statistics.comment))
            # The last one: it may be somebody's who cannot be acted for.
            connection.execute(
                SQL("ALTER STATISTICS {} OWNER TO {}").format(name, Identifier(statistics.owner))
            )


def _finish(connection: Connection, definition: TableDefinition, actor: Actor) -> None:
    switch.finish_return(connection, definition, actor, "restore_plaintext")
    progress.forget(connection, definition.table, "decrypt")
    mark_restored(connection, definition.table)
