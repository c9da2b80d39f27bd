"""Which side is right: over to the ciphertext, and back to the plaintext before it is dropped.

Both directions are online. What needs a look at every row (a check, a fill) is done beforehand or afterwards; the
change of authority itself is one short transaction that alters the catalogue of the database and no row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping import progress, tables
from alphapulse_encryption.migration.bookkeeping.approvals import revoke
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.quarantine import release
from alphapulse_encryption.migration.bookkeeping.ranges import restart_ranges
from alphapulse_encryption.migration.bookkeeping.verifications import forget_verifications
from alphapulse_encryption.migration.postgres.database import AS_APPLICATION, Actor, Connection, answer
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.postgres.stored import as_owner, execute_one, in_parentheses
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.decrypt import Decrypt, Filling
from alphapulse_encryption.migration.rows.engine import NotFinished, Progress, RangeResult, finish_under_lock
from alphapulse_encryption.migration.schema import dependants, guard, indexes, saved_ddl, sql, views
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.partitions import Part, lock_partitions, lock_parts, read_parts
from alphapulse_encryption.migration.target import Target

# So many rows that the application cleared at the last moment are filled under the lock itself; where there
# are more, it is given up and they are filled without it first.
FILLED_UNDER_LOCK = 500
LOOKS = 20


def switch_to_ciphertext(target: Target, table: Table) -> tables.SetAside | None:
    """Let the ciphertext be the source of truth: the application reads and writes the encrypted columns.

    NOT NULL on a plaintext column becomes a check that one of both sides is there, its default is set aside, and its
    uniqueness has to be carried by the search column already. Returned is what was taken off the plaintext columns;
    None where the ciphertext was the source of truth already.

    Raises:
        RefusedError: not verified, values pending, or a guarantee that cannot be carried; nothing was changed.
        ConfigurationError: table or column missing.
    """
    doing = f"switch {table.key} to ciphertext"
    with target.database.session(doing) as connection:
        state = tables.require_guarded_state(connection, table)
        check_key(connection, target.keys)
        if state.authority == "ciphertext":
            return None
        if state.state is not State.GUARDED:
            raise RefusedError(
                f"Table {table.key} is on its way back to plaintext. Let "
                f"{'revert_to_plaintext' if state.state is State.REVERTING else 'restore_plaintext'} end first."
            )
        definition = read_table(connection, table)
        _refuse_unless_ready(connection, definition, target.keys)
        for column in _required(definition):
            _require_either(connection, definition, column, target.actor)
        return in_short_transaction(connection, doing, lambda: _switch(connection, target, table))


def _required(definition: TableDefinition) -> list[Column]:
    return [column for column in definition.plaintext_columns if definition.columns[column.name].not_null]


def _refuse_unless_ready(connection: Connection, definition: TableDefinition, keys: KeyRing) -> None:
    table = definition.table
    guard.refuse_unguarded(connection, definition)
    verification = verify.verify_table(connection, table, keys)
    if not verification.passed:
        raise RefusedError(
            f"Table {table.key} is not verified: {'; '.join(verification.reasons)}. "
            f"{' '.join(verification.advice)} Nothing was changed."
        )
    if answer(connection, sql.any_pending(definition)):
        raise RefusedError(
            f"Values of {table.key} are pending: they were written since the backfill. Run it again "
            f"(--migrate-data --verify --table {table.key}); nothing was changed."
        )
    if stops := dependants.stops_of_the_switch(connection, definition):
        raise RefusedError(
            f"The ciphertext of {table.key} cannot take over from the plaintext: {' '.join(stops)} Nothing was changed."
        )
    for want in indexes.wanted_indexes(connection, definition):
        needed = want.name != indexes.pending_index(table)
        if needed and not indexes.is_built(connection, definition, want):
            raise RefusedError(
                f"The {'unique ' if want.unique else ''}index {want.name} of {table.key} is missing or "
                f"invalid. Build it first (asset search_indexes); nothing was changed."
            )


def _require_either(
    connection: Connection, definition: TableDefinition, column: Column, actor: Actor
) -> None:
    """The check that takes over from NOT NULL, validated while writers go on."""
    name = saved_ddl.presence_check(column)

    def add() -> None:
        if saved_ddl.constraint_state(connection, definition, name) is None:
            lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
            connection.execute(saved_ddl.alter(definition, [present(column)]))
            audit(connection, actor, "add_check", definition.table, constraint=name)

    in_short_transaction(connection, f"add the check {name}", add)
    validate(connection, definition, name)


def present(column: Column) -> Composed:
    """Adds the check that one of a column's two sides is there."""
    either = SQL("{} OR {} IS NOT NULL").format(
        sql.has_value(Identifier(column.name)), Identifier(column.encrypted)
    )
    return saved_ddl.add_check(saved_ddl.presence_check(column), either)


def required(name: str) -> Composed:
    """Adds the check that stands for a column's NOT NULL until it is validated."""
    return saved_ddl.add_check(saved_ddl.required_check(name), sql.has_value(Identifier(name)))


def validate(connection: Connection, definition: TableDefinition, name: str) -> None:
    """Validate a constraint of the table where that is still to be done; writers go on meanwhile."""
    if saved_ddl.constraint_state(connection, definition, name) is False:
        statement = saved_ddl.validate_check(definition, name)

        def check() -> None:
            # For every row it calls what functions of the application it has.
            connection.execute(AS_APPLICATION)
            with as_owner(connection, definition.oid):
                connection.execute(statement)

        in_short_transaction(connection, f"validate the constraint {name}", check)


def switch_statements(connection: Connection, definition: TableDefinition) -> list[Composed]:
    """What a switch of the table, with its encrypted columns, would execute as it is now; executes nothing."""
    statements: list[Composed] = []
    for column in _required(definition):
        name = saved_ddl.presence_check(column)
        state = saved_ddl.constraint_state(connection, definition, name)
        if state is None:
            statements.append(saved_ddl.alter(definition, [present(column)]))
        if not state:
            statements.append(saved_ddl.validate_check(definition, name))
    statements += _relax(definition, what_is_set_aside(connection, definition))
    return statements + guard.guard_statements(connection, definition, "ciphertext")


def what_is_set_aside(connection: Connection, definition: TableDefinition) -> tables.SetAside:
    """What a switch takes off the plaintext columns."""
    return tables.SetAside(
        defaults={
            column.name: live.default
            for column in definition.plaintext_columns
            if (live := definition.columns[column.name]).default is not None
        },
        not_null=saved_ddl.read_not_null(connection, definition),
        partitions=saved_ddl.read_of_partitions(connection, definition),
    )


def _relax(definition: TableDefinition, taken: tables.SetAside) -> list[Composed]:
    """What takes it off, the table first: what a partition has of its own can go only then."""

    def relaxed(relation: Identifier, not_null: Iterable[str], defaults: Iterable[str]) -> Iterator[Composed]:
        actions = [SQL("ALTER COLUMN {} DROP NOT NULL").format(Identifier(name)) for name in not_null]
        for name in defaults:
            # Without one of the column's own, the default of a domain would stand beside each new ciphertext.
            change = SQL("SET DEFAULT NULL" if definition.columns[name].type_default else "DROP DEFAULT")
            actions.append(SQL("ALTER COLUMN {} {}").format(Identifier(name), change))
        if actions:
            yield SQL("ALTER TABLE {} {}").format(relation, SQL(", ").join(actions))

    filled = [c.name for c in definition.plaintext_columns if definition.columns[c.name].type_default]
    statements = [
        *relaxed(definition.identifier, taken.not_null, {**taken.defaults, **dict.fromkeys(filled)})
    ]
    for part in taken.partitions:
        defaults = [name for name, default in part.defaults.items() if default is not None]
        statements += relaxed(Identifier(part.schema_name, part.name), part.not_null, defaults)
    return statements


def _still_there(
    connection: Connection, definition: TableDefinition, taken: tables.SetAside
) -> list[tuple[Part, tables.OfPartition]]:
    """Of the partitions that had something of their own, those that the table still has, upper ones first."""
    own = {(part.schema_name, part.name): part for part in taken.partitions}
    parts = read_parts(connection, definition.oid)[1:] if own else ()
    return [
        (part, own[part.schema_name, part.name]) for part in parts if (part.schema_name, part.name) in own
    ]


def _switch(connection: Connection, target: Target, table: Table) -> tables.SetAside | None:
    state = tables.require_state(connection, table, lock=True)
    if state.authority == "ciphertext":
        return None
    definition = read_table(connection, table)
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    taken = what_is_set_aside(connection, definition)
    for column in definition.plaintext_columns:
        if column.name in taken.not_null and not saved_ddl.constraint_state(
            connection, definition, saved_ddl.presence_check(column)
        ):
            raise RefusedError(
                f"{table.key}.{column.name} became NOT NULL meanwhile. Run the step again; nothing was "
                "changed."
            )
    for statement in _relax(definition, taken):
        connection.execute(statement)
    tables.advance(connection, target.keys, target.actor, table, State.SWITCHED, taken)
    guard.ensure_guard(connection, definition, target.actor)
    details = {"not_null": list(taken.not_null), "defaults": taken.defaults}
    audit(connection, target.actor, "switch_to_ciphertext", table, **details)
    return taken


def revert_to_plaintext(
    target: Target, table: Table, *, on_progress: Callable[[Progress], None] | None = None
) -> RangeResult | None:
    """Let the plaintext be the source of truth again, before it was dropped, and leave the table to itself.

    Values that were written as ciphertext only are put into the plaintext columns first. Then the guard, the
    compatibility views, the index on pending rows and the unique indexes that carry more than a column's own uniqueness
    are removed. The encrypted columns and the catalogue's search indexes stay for a retry, which begins with
    ``add_encrypted_columns``: without the guard nobody sees which ciphertext becomes older than its plaintext, so all
    of it is made again then. Returned is what was filled from the ciphertext; None where that was done already.

    Args:
        on_progress: called after each batch that was filled, and while it holds back.

    Raises:
        RowsLeft: rows cannot be filled, or are locked; the others are, and the ciphertext stays the source of truth.
        RefusedError: the plaintext was dropped (``restore_plaintext`` then), or somebody else's object depends on a
            compatibility view (the plaintext is right already then).
        ConfigurationError: table or column missing.
    """
    doing = f"revert {table.key} to plaintext"
    with target.database.session(doing) as connection:
        plan_by_key(connection)
        state = tables.require_state(connection, table)
        check_key(connection, target.keys)
        if not state.state.has_both_sides:
            raise RefusedError(
                f"The plaintext of {table.key} was dropped. Use restore_plaintext, which rebuilds it from "
                "the ciphertext; nothing was changed."
            )
        if state.state is State.REVERTED:
            return None
        # Before hours of filling.
        tables.authentic_state(connection, table, target.keys)
        definition = read_table(connection, table)
        filling = Filling(Decrypt(target, table), f"--revert-to-plaintext --table {table.key}", on_progress)
        if state.authority == "ciphertext":
            filling.fill()
            hand_back(connection, definition, filling)
        if state.state in (State.SWITCHED, State.REVERTING):
            put_back_not_null(connection, definition)
            finish = partial(finish_return, connection, definition, target, "revert_to_plaintext")
            in_short_transaction(connection, doing, finish)
        withdraw = partial(_withdraw, connection, target, table)
        in_short_transaction(connection, f"take the guard and the views of {table.key} away", withdraw)
    return filling.done


def _withdraw(connection: Connection, target: Target, table: Table) -> None:
    """Leave nothing with the table but its encrypted columns and their indexes."""
    state = tables.require_state(connection, table, lock=True)
    if state.state is not State.GUARDED:
        raise RefusedError(f"Table {table.key} was changed by another run meanwhile. Run the step again.")
    definition = read_table(connection, table)
    removed = views.drop_views(connection, definition)
    guard.drop_guard(connection, definition)
    # A token may be older than its plaintext from now on: a guarantee that other columns take part in would refuse rows
    # that the plaintext's own allows.
    uniques = indexes.unique_indexes(connection, definition)
    carrying = [index.name for index in indexes.carrying_indexes(table, uniques)]
    # Nor is what an interrupted build left of use to anybody.
    unfinished = [
        index.name
        for index in indexes.wanted_indexes(connection, definition)
        if indexes.is_usable(connection, definition, index.name) is False
    ]
    for name in (indexes.pending_index(table), *carrying, *unfinished):
        connection.execute(SQL("DROP INDEX IF EXISTS {}").format(Identifier(table.schema_name, name)))
    # What a retry makes again, and approvals given for what is no more.
    forget_verifications(connection, table)
    release(connection, table)
    restart_ranges(connection, table)
    revoke(connection, target.actor.name, table=table)
    progress.forget(connection, table, "decrypt")
    tables.advance(connection, target.keys, target.actor, table, State.REVERTED)
    audit(connection, target.actor, "withdraw", table, views=list(removed))


def hand_back(connection: Connection, definition: TableDefinition, filling: Filling) -> None:
    """Fill what is left and let the plaintext be the source of truth: defaults are back, NOT NULL as a check for now.

    What is left is told by a partial index, so that the look under the lock costs what it finds. The state
    remembers NOT NULL until :func:`finish_return`.
    """
    table, name = definition.table, saved_ddl.unfilled_index(definition.table)
    if not indexes.is_usable(connection, definition, name):
        wanted = indexes.WantedIndex(
            name,
            tuple(key.name for key in definition.key),
            unique=False,
            condition=sql.wanted(sql.unfilled_cells(definition)),
        )
        indexes.build_index(connection, definition, wanted)
    change = partial(_hand_back, connection, definition, filling)
    for _ in range(LOOKS):
        if filling.operation.is_wanted(connection, definition):
            filling.fill()
        try:
            in_short_transaction(connection, f"hand {table.key} back to plaintext", change)
            return
        except NotFinished:
            # Written in the moment between; what cannot be filled at all, the next fill names.
            continue
    raise RefusedError(
        f"The application goes on writing ciphertext to {table.key} faster than it can be put back as "
        "plaintext. Switch the application to the plaintext columns, and run the step again."
    )


def _hand_back(connection: Connection, definition: TableDefinition, filling: Filling) -> None:
    table, target = definition.table, filling.operation.target
    state = tables.authentic_state(connection, table, target.keys, lock=True)
    if state.authority == "plaintext":
        return
    lock_parts(connection, read_parts(connection, definition.oid), "ACCESS EXCLUSIVE")
    last = finish_under_lock(filling.operation, connection, definition, most=FILLED_UNDER_LOCK)
    taken = state.set_aside
    actions: list[Composable] = [
        SQL("ALTER COLUMN {} SET DEFAULT {}").format(Identifier(name), in_parentheses(text))
        for name, text in taken.defaults.items()
    ]
    for column in definition.plaintext_columns:
        if definition.columns[column.name].type_default and column.name not in taken.defaults:
            actions.append(SQL("ALTER COLUMN {} DROP DEFAULT").format(Identifier(column.name)))
        if saved_ddl.constraint_state(connection, definition, saved_ddl.presence_check(column)) is not None:
            actions.append(SQL("DROP CONSTRAINT {}").format(Identifier(saved_ddl.presence_check(column))))
    actions += map(required, taken.not_null)
    if actions:
        with as_owner(connection, definition.oid):
            execute_one(connection, saved_ddl.alter(definition, actions))
    for part, own in _still_there(connection, definition, taken):
        for name, default in own.defaults.items():
            change = SQL("DROP DEFAULT") if default is None else SQL("SET DEFAULT ") + in_parentheses(default)
            alter = SQL("ALTER TABLE ONLY {} ALTER COLUMN {} {}")
            with as_owner(connection, part.oid):
                execute_one(connection, alter.format(part.identifier, Identifier(name), change))
    connection.execute(
        SQL("DROP INDEX IF EXISTS {}").format(Identifier(table.schema_name, saved_ddl.unfilled_index(table)))
    )
    # Where nothing is set aside, all that is left is to take the guard and the views away.
    back = State.RESTORED if state.state is State.RESTORING else State.REVERTING
    left = taken.model_copy(update={"defaults": {}})
    tables.advance(connection, target.keys, target.actor, table, back, left)
    guard.ensure_guard(connection, definition, target.actor)
    done = filling.done + last
    audit(connection, target.actor, "hand_back", table, rows=done.rows, values=done.values)
    filling.done = done


def put_back_not_null(connection: Connection, definition: TableDefinition) -> None:
    """Validate the checks that stand for NOT NULL, so that setting it needs no look at the rows."""
    for column in definition.plaintext_columns:
        validate(connection, definition, saved_ddl.required_check(column.name))


def finish_return(connection: Connection, definition: TableDefinition, target: Target, action: str) -> None:
    """NOT NULL proper in place of the checks; the table stands where step 2 had left it. In a transaction."""
    table = definition.table
    state = tables.authentic_state(connection, table, target.keys, lock=True)
    if state.authority != "plaintext":
        raise RefusedError(f"Table {table.key} was switched to ciphertext meanwhile. Run the step again.")
    taken = state.set_aside
    current = read_table(connection, table)
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    parts = [(p.oid, p.identifier, own.not_null) for p, own in _still_there(connection, definition, taken)]
    # The lower ones first: a partition keeps the constraint that it has, and gets that of the table otherwise.
    whole = (definition.oid, definition.identifier, taken.not_null)
    for oid, relation, required_there in (*reversed(parts), whole):
        for name, not_null in required_there.items():
            if name in current.columns and not current.columns[name].not_null:
                with as_owner(connection, oid):
                    _set_not_null(connection, relation, name, not_null)
    drop = SQL("DROP CONSTRAINT IF EXISTS {}")
    if checks := [drop.format(Identifier(saved_ddl.required_check(name))) for name in taken.not_null]:
        connection.execute(saved_ddl.alter(definition, [*checks]))
    if state.state is not State.GUARDED:
        tables.advance(connection, target.keys, target.actor, table, State.GUARDED)
    audit(connection, target.actor, action, table)


def _set_not_null(connection: Connection, relation: Identifier, name: str, not_null: tables.NotNull) -> None:
    """By itself: it is by the checks that PostgreSQL knows it need not look at the rows."""
    constraint, text = not_null.name, not_null.definition
    if constraint is None or text is None:
        again = SQL("ALTER COLUMN {} SET NOT NULL").format(Identifier(name))
    else:
        again = SQL("ADD CONSTRAINT {} {}").format(Identifier(constraint), sql.verbatim(text))
    execute_one(connection, SQL("ALTER TABLE {} {}").format(relation, again))
    if constraint is not None and not_null.comment is not None:
        on = SQL("{} ON {}").format(Identifier(constraint), relation)
        connection.execute(saved_ddl.comment_on("CONSTRAINT", on, not_null.comment))
