"""The undo of a drop: the plaintext columns again, from the ciphertext as it is now.

The columns come back empty, so that the application goes on writing ciphertext; they are filled range by range, their
indexes and constraints are built beside the application, and one short transaction makes them the source of truth.
What a killed call had done is found in the database, and the next call goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from psycopg.errors import InsufficientPrivilege, UndefinedObject
from psycopg.sql import SQL, Composable, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import progress
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.quarantine import NAMED
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import advance, mark_restored, require_state
from alphapulse_encryption.migration.postgres.database import (
    AS_APPLICATION,
    AS_OURSELVES,
    Actor,
    Connection,
    answer,
)
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction, maintain
from alphapulse_encryption.migration.postgres.stored import as_owner, execute_one, refuse_no_type
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.decrypt import Decrypt, Filling
from alphapulse_encryption.migration.rows.engine import Progress, RangeResult
from alphapulse_encryption.migration.schema import guard, indexes, saved_ddl, sql
from alphapulse_encryption.migration.schema.data_path import let_write
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.partitions import lock_partitions, read_parts
from alphapulse_encryption.migration.schema.saved_ddl import (
    SavedColumn,
    SavedConstraint,
    SavedTable,
)
from alphapulse_encryption.migration.schema.saved_indexes import put_back
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.target import Target


@dataclass(frozen=True)
class RestoreResult:
    """Which columns are back, what this call has filled of them, and whether it stopped before they became right."""

    columns: tuple[str, ...]
    filled: RangeResult
    held: bool


def restore_plaintext(
    target: Target,
    table: Table,
    *,
    hold: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> RestoreResult | None:
    """Rebuild the dropped plaintext columns: types, values, indexes, constraints, comments and privileges.

    Online, and resumable at any point; the values come back in the batch ranges of the backfill, and are verified
    at the end as in step 4. Afterwards the plaintext is the source of truth, as before the switch; the columns are the
    table's last ones now. None is returned where nothing is dropped.

    Args:
        hold: stop when all is back but the ciphertext is the source of truth still. Writers of ciphertext alone are
            refused afterwards: here they are exchanged for such as write both sides. The next call, without it, ends
            the restore.
        on_progress: called after each batch that was filled, and while it holds back.

    Raises:
        RowsLeft: rows cannot be filled, or are locked; the others are, and the ciphertext stays the source of truth.
        RefusedError: nothing saved to restore from, or, when all is back, values that do not match.
        ConfigurationError: the table or its key is missing.
    """
    doing = f"restore the plaintext of {table.key}"
    with target.database.session(doing) as connection:
        plan_by_key(connection)
        state = require_state(connection, table).state
        check_key(connection, target.keys)
        if state.has_both_sides:
            return None
        what = saved_ddl.latest(connection, table, target.keys)
        if what is None:
            raise RefusedError(
                f"No definition of the dropped columns of {table.key} is kept in alphapulse_encryption.definitions. "
                "Restore them from the backup instead; nothing was changed."
            )
        columns = tuple(column.name for column in what.columns)
        if state is State.DROPPED:
            in_short_transaction(connection, doing, partial(_begin, connection, target, table, what))
        definition = read_table(connection, table)
        filling = Filling(Decrypt(target, table), f"--restore-plaintext --table {table.key}", on_progress)
        if require_state(connection, table).authority == "ciphertext":
            filling.fill()
            _build_indexes(connection, definition, what, target.actor)
            _add_constraints(connection, definition, what)
            _add_statistics(connection, definition, what, target.actor)
            if hold:
                return RestoreResult(columns, filling.done, held=True)
            switch.hand_back(connection, definition, filling)
        switch.put_back_not_null(connection, definition)

        def finish() -> None:
            switch.finish_return(connection, definition, target, "restore_plaintext")
            progress.forget(connection, table, "decrypt")
            mark_restored(connection, table)

        in_short_transaction(connection, doing, finish)
        maintain(connection, SQL("ANALYZE {}").format(definition.identifier))
        ranges = read_ranges(connection, table)
    # The drop took the pending index with it.
    indexes.build_search_indexes(target.database, table, target.actor)
    for batch_range in ranges:
        _verify(target, table, batch_range.number)
    return RestoreResult(columns, filling.done, held=False)


def _verify(target: Target, table: Table, number: int) -> None:
    """The comparison of step 4, of what was restored: each value against its ciphertext, each token computed again."""
    found = verify.verify_range(target, table, number)
    # The application may write plaintext again: that is pending, as it was before the drop.
    wrong = [offender for offender in found.offenders if offender.problem != "pending"]
    if wrong:
        named = "; ".join(str(offender) for offender in wrong[:NAMED])
        raise RefusedError(
            f"The plaintext of {table.key} is back, and {len(wrong)} values or more do not match their ciphertext: "
            f"{named}. Look at these rows; --verify --table {table.key} names them again."
        )


def _begin(connection: Connection, target: Target, table: Table, what: SavedTable) -> None:
    """The columns are there again, empty; the ciphertext is right, as after a switch."""
    if require_state(connection, table, lock=True).state is not State.DROPPED:
        return
    definition = read_table(connection, table, plaintext=False)
    by_name = {column.name: column for column in table.columns}
    _refuse_other_catalogue(definition, what)
    actions: list[Composable] = []
    for column in what.columns:
        refuse_no_type(connection, column.type)
        collation = SQL("COLLATE {}").format(Identifier(*column.collation)) if column.collation else SQL("")
        # That of a domain would be taken for the value of every row.
        filled = answer(
            connection, "SELECT typdefault IS NOT NULL FROM pg_type WHERE oid = to_regtype(%s)", column.type
        )
        default = SQL("DEFAULT NULL" if filled else "")
        add = SQL("ADD COLUMN {} {} {} {}")
        actions.append(add.format(Identifier(column.name), sql.verbatim(column.type), collation, default))
        if column.not_null is not None:
            encrypted = by_name[column.name].encrypted
            actions.append(switch.present(by_name[column.name]))
            if not column.encrypted_was_required:
                check = Identifier(saved_ddl.required_check(encrypted))
                actions.append(SQL("DROP CONSTRAINT IF EXISTS {}").format(check))
                actions.append(SQL("ALTER COLUMN {} DROP NOT NULL").format(Identifier(encrypted)))
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    # A domain's check is asked whether it allows NULL.
    connection.execute(AS_APPLICATION)
    with as_owner(connection, definition.oid):
        execute_one(connection, saved_ddl.alter(definition, actions))
    connection.execute(AS_OURSELVES)
    lost: list[str] = []
    for column in what.columns:
        lost += _dress_column(connection, definition, column)
    advance(connection, target.keys, target.actor, table, State.RESTORING, what.set_aside)
    definition = read_table(connection, table)
    let_write(connection, definition)
    guard.ensure_guard(connection, definition, target.actor)
    audit(
        connection,
        target.actor,
        "begin_restore",
        table,
        columns=[c.name for c in what.columns],
        lost_grants=lost,
    )


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


_STORAGE = {"p": SQL("PLAIN"), "e": SQL("EXTERNAL"), "m": SQL("MAIN"), "x": SQL("EXTENDED")}
_COMPRESSION = {"p": SQL("pglz"), "l": SQL("lz4")}


def _dress_column(connection: Connection, definition: TableDefinition, column: SavedColumn) -> list[str]:
    """Everything about a column that is not its type; returns the privileges that could not be given back."""
    name = Identifier(column.name)
    settings: list[Composable] = []
    if column.statistics is not None:
        settings.append(SQL("STATISTICS {}").format(Literal(column.statistics)))
    if column.storage is not None:
        settings.append(SQL("STORAGE {}").format(_STORAGE[column.storage]))
    if column.compression is not None:
        settings.append(SQL("COMPRESSION {}").format(_COMPRESSION[column.compression]))
    for option in column.options:
        key, _, value = option.partition("=")
        settings.append(SQL("({} = {})").format(Identifier(key), Literal(value)))
    alter = SQL("ALTER COLUMN {} SET {}")
    if settings:
        connection.execute(saved_ddl.alter(definition, [alter.format(name, setting) for setting in settings]))
    full_name = Identifier(definition.table.schema_name, definition.table.name, column.name)
    if column.comment is not None:
        connection.execute(saved_ddl.comment_on("COLUMN", full_name, column.comment))
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


def _build_indexes(
    connection: Connection, definition: TableDefinition, what: SavedTable, actor: Actor
) -> None:
    for index in what.indexes:
        put_back(connection, definition, index)
    for constraint in what.constraints:
        if constraint.kind == "u" and constraint.index is not None:
            put_back(connection, definition, constraint.index, constraint)
    there = {(part.schema_name, part.name) for part in read_parts(connection, definition.oid)}
    for partition, index in what.of_partitions:
        if partition in there:
            put_back(connection, definition, index, partition=partition)
    # Of a partition that was detached, dropped or renamed since the drop.
    if lost := {
        f"{'.'.join(of)}: {index.name}": index.definition
        for of, index in what.of_partitions
        if of not in there
    }:
        audit(connection, actor, "lost_indexes", definition.table, indexes=lost)


def _add_constraints(connection: Connection, definition: TableDefinition, what: SavedTable) -> None:
    for constraint in what.constraints:
        add = partial(_add_constraint, connection, definition, constraint)
        in_short_transaction(connection, f"add the constraint {constraint.name}", add)
        if constraint.validated:
            switch.validate(connection, definition, constraint.name)


def _add_constraint(connection: Connection, definition: TableDefinition, constraint: SavedConstraint) -> None:
    name = Identifier(constraint.name)
    # A unique one of a partitioned table is there with its index already.
    if saved_ddl.constraint_state(connection, definition, constraint.name) is None:
        lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
        if constraint.kind == "u" and constraint.index is not None:
            action = SQL("ADD CONSTRAINT {} UNIQUE USING INDEX {} {} {}").format(
                name,
                Identifier(constraint.index.name),
                SQL("DEFERRABLE" if constraint.deferrable else "NOT DEFERRABLE"),
                SQL("INITIALLY DEFERRED" if constraint.deferred else "INITIALLY IMMEDIATE"),
            )
        else:
            # Checks and foreign keys bind new rows at once and are validated afterwards; exclusion has no such way.
            later = SQL("NOT VALID" if constraint.kind in ("c", "f") and constraint.validated else "")
            action = SQL("ADD CONSTRAINT {} {} {}").format(name, sql.verbatim(constraint.definition), later)
        # One that comes with an index needs what its owner may lack: to create something in the schema.
        by_owner = as_owner(connection, definition.oid) if constraint.kind in ("c", "f") else nullcontext()
        with by_owner:
            execute_one(connection, saved_ddl.alter(definition, [action]))
    if constraint.comment is not None:
        on = SQL("{} ON {}").format(name, definition.identifier)
        connection.execute(saved_ddl.comment_on("CONSTRAINT", on, constraint.comment))


def _add_statistics(
    connection: Connection, definition: TableDefinition, what: SavedTable, actor: Actor
) -> None:
    for statistics in what.statistics:
        if answer(
            connection,
            "SELECT true FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace "
            "WHERE n.nspname = %s AND s.stxname = %s",
            *(statistics.schema_name, statistics.name),
        ):
            continue
        with connection.transaction():
            name = Identifier(statistics.schema_name, statistics.name)
            execute_one(connection, sql.verbatim(statistics.definition))
            if statistics.target is not None:
                connection.execute(
                    SQL("ALTER STATISTICS {} SET STATISTICS {}").format(name, Literal(statistics.target))
                )
            if statistics.comment is not None:
                connection.execute(saved_ddl.comment_on("STATISTICS", name, statistics.comment))
            try:
                with connection.transaction():
                    owner = Identifier(statistics.owner)
                    connection.execute(SQL("ALTER STATISTICS {} OWNER TO {}").format(name, owner))
            # A role that is gone since the drop, or that we may not act for, must not end the restore.
            except (InsufficientPrivilege, UndefinedObject):
                found = f"{statistics.schema_name}.{statistics.name}"
                audit(
                    *(connection, actor, "lost_owner", definition.table),
                    statistics=found,
                    owner=statistics.owner,
                )
