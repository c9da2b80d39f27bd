"""The guard: triggers that keep every write to a table with encrypted columns consistent.

Two ``BEFORE`` triggers per table act on the rules of authority, column by column (see :func:`guard_function`), and
one per column tells them in the one case where values do not: an UPDATE that names a plaintext column and writes what
is there already, beside a fresh envelope of it. ``UPDATE OF`` is PostgreSQL's only way to know what a statement names.
Their conditions go by a column's number and survive a rename; so does the function, by a way that is slower
(:data:`_GUARD_RENAMED`). They fire for replicated rows as well: a subscriber's plaintext is guarded, too.

They compare binary images (as ``*<>`` does, PostgreSQL manual 9.25.6): ``=`` calls ``1.50`` and ``1.5``, or ``'a'`` and
``'A'`` under a case-insensitive collation, the same value, and a ciphertext of the old one would be kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import LiteralString

from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import Authority, State
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.ranges import MAY_WRITE, MAY_WRITE_BY_NAME
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.postgres.database import (
    WRITER,
    WRITER_SETTING,
    Actor,
    Connection,
    answer,
)
from alphapulse_encryption.migration.postgres.ddl import give_to_owner
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.names import GUARD_COLUMNS, guard_name
from alphapulse_encryption.migration.schema.partitions import (
    Part,
    lock_partitions,
    read_parts,
    refuse_relatives,
)
from alphapulse_encryption.migration.schema.sql import (
    GUARD_INSERT,
    GUARD_MENTION,
    GUARD_UPDATE,
    GUARDS,
    verbatim,
)


def ensure_guard(connection: Connection, definition: TableDefinition, actor: Actor) -> bool:
    """Create or renew the guard where it is not what this program makes for these columns and this authority.

    To be called in a transaction. The lock it takes (SHARE ROW EXCLUSIVE) waits for writers under way and
    keeps new ones out until the commit, so no statement runs under two authorities.

    Returns:
        Whether anything was changed.

    Raises:
        RefusedError: as :func:`refuse_foreign_function`.
    """
    table = definition.table
    state = require_state(connection, table, lock=True)
    if not guard_faults(connection, definition, state.authority):
        return False
    refuse_foreign_function(connection, definition)
    obsolete = _obsolete_triggers(connection, definition)
    # Taking a trigger away needs the stronger lock, and it is better asked for at once than in addition.
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE" if obsolete else "SHARE ROW EXCLUSIVE")
    for statement in guard_statements(connection, definition, state.authority):
        connection.execute(statement)
    audit(connection, actor, "guard", table, authority=state.authority)
    return True


def guard_statements(
    connection: Connection, definition: TableDefinition, authority: Authority
) -> list[Composed]:
    """What creates or renews the guard: the function, its triggers, and away with those of other columns."""
    triggers = _triggers(definition)
    function = _function(definition)
    statements = _drop_triggers(_obsolete_triggers(connection, definition))
    if _foreign(connection, definition):
        statements.append(_drop_function(definition))
    statements.append(
        SQL(
            "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql "
            "SET search_path = pg_catalog AS {}"
        ).format(function, Literal(_body(definition)))
    )
    # A writer needs no right on it. The owner does, who makes the partitions of the table.
    owner, given = give_to_owner(connection, SQL("FUNCTION {}()").format(function), definition.oid)
    statements += given
    statements.append(SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(function))
    statements.append(SQL("GRANT EXECUTE ON FUNCTION {}() TO {}").format(function, Identifier(owner)))
    for trigger in triggers:
        arguments = map(Literal, trigger.arguments_for(authority))
        made = trigger.definition(definition.identifier, function, arguments)
        statements.append(SQL("CREATE OR REPLACE {}").format(made))
    # One that was disabled on a single partition, too: before PostgreSQL 15 this does not reach partitions.
    for part in read_parts(connection, definition.oid):
        here = [t for t in triggers if t.is_on(part)]
        enabled = SQL(", ").join(SQL("ENABLE ALWAYS TRIGGER {}").format(Identifier(t.name)) for t in here)
        statements.append(SQL("ALTER TABLE {} {}").format(part.identifier, enabled))
    return statements


def _function(definition: TableDefinition) -> Identifier:
    return Identifier("public", guard_name(definition.table))


def _named(definition: TableDefinition) -> str:
    return f"public.{guard_name(definition.table)}"


def _body(definition: TableDefinition) -> str:
    return guard_function(_columns(definition), definition.table.key)


def _columns(definition: TableDefinition) -> list[Column]:
    """In the order of the table, which stays when somebody sorts the catalogue."""
    place = {name: number for number, name in enumerate(definition.columns)}
    return sorted(definition.plaintext_columns, key=lambda column: place[column.name])


# The owner of a function can change it at any time, and a right that was given on it stays when it is replaced.
_FOREIGN = """
SELECT pg_get_userbyid(p.proowner)::text,
       p.prokind = 'f' AND pg_has_role(p.proowner, 'USAGE')
         AND NOT EXISTS (SELECT FROM pg_trigger t WHERE t.tgfoid = p.oid AND t.tgrelid <> ALL (%(parts)s))
  FROM pg_proc p
 WHERE p.proname = %(function)s AND p.pronamespace = to_regnamespace('public') AND p.pronargs = 0
   AND NOT (p.prorettype = 'trigger'::regtype AND p.prokind = 'f'
            AND pg_has_role(p.proowner, (SELECT relowner FROM pg_class WHERE oid = %(table)s), 'MEMBER'))
"""


def _foreign(connection: Connection, definition: TableDefinition) -> tuple[str, bool] | None:
    """Who owns a function of the guard's name that cannot be replaced, and whether it can be dropped."""
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    named = {"function": guard_name(definition.table), "table": definition.oid, "parts": parts}
    return connection.execute(_FOREIGN, named).fetchone()


def refuse_foreign_function(connection: Connection, definition: TableDefinition) -> None:
    """Refuse to make the guard where its function is somebody else's, and the role in use may not drop that.

    Raises:
        RefusedError: names the function and its owner.
    """
    owner, may_drop = _foreign(connection, definition) or ("", True)
    if not may_drop:
        raise RefusedError(
            f"The function {_named(definition)}, whose name the guard of {definition.table.key} needs, belongs to "
            f"{owner}. Find out who made it, and have {owner} or a superuser drop it, with the triggers that use it "
            f"({_drop_function(definition).as_string(connection)} CASCADE)."
        )


# Triggers of a guard's names, but those that a partition has from the whole.
_OWN_TRIGGERS = """
SELECT t.tgrelid, t.tgname, p.proname = %(function)s AND p.pronamespace = to_regnamespace('public')
   AND t.tgconstraint = 0 AND t.tgrelid = %(table)s
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = ANY(%(parts)s) AND t.tgname ~ %(guards)s AND t.tgparentid = 0 ORDER BY 1, 2
"""


def _obsolete_triggers(connection: Connection, definition: TableDefinition) -> list[tuple[Identifier, str]]:
    """Triggers of a guard's names that cannot stay: of other columns, of another function, or of a partition."""
    wanted = set() if _foreign(connection, definition) else {t.name for t in _triggers(definition)}
    parts = {part.oid: part.identifier for part in read_parts(connection, definition.oid)}
    asked = {"function": guard_name(definition.table), "table": definition.oid}
    found = connection.execute(_OWN_TRIGGERS, {**asked, "parts": list(parts), "guards": GUARDS})
    return [(parts[oid], name) for oid, name, ours in found if not (ours and name in wanted)]


# For a transaction in which the server words what is there: every name quoted, and but for pg_catalog with its schema.
AS_WORDED = (
    "SELECT set_config('search_path', 'pg_catalog', true), set_config('quote_all_identifiers', 'on', true), "
    "set_config('standard_conforming_strings', 'on', true)"
)
# A function p, attributes included, that is what this program makes.
_AS_MADE = SQL("""(p.prosrc = {} AND p.prokind = 'f' AND p.prorettype = 'trigger'::regtype AND NOT p.prosecdef
   AND p.prolang = (SELECT oid FROM pg_language WHERE lanname = 'plpgsql')
   AND p.proconfig IS NOT DISTINCT FROM ARRAY['search_path=pg_catalog'] AND p.provolatile = 'v'
   AND NOT p.proleakproof AND NOT p.proisstrict AND p.proparallel = 'u' AND p.prosupport = 0)""")
_FUNCTION_THERE = SQL("""
SELECT {made}, pg_get_userbyid(p.proowner)::text, pg_has_role(p.proowner, c.relowner, 'MEMBER')
  FROM pg_proc p CROSS JOIN pg_class c
 WHERE p.proname = {name} AND p.pronamespace = to_regnamespace('public') AND p.pronargs = 0 AND c.oid = {table}
""")
_TRIGGERS_THERE = """
SELECT tgrelid, tgname, pg_get_triggerdef(oid), tgenabled::text FROM pg_trigger
 WHERE tgrelid = ANY(%s) AND tgname ~ %s
"""
_NAMED = 12


def _function_there(connection: Connection, definition: TableDefinition) -> tuple[bool, str, bool] | None:
    """Whether the function is what this program makes, whose it is, and whether they may change the table anyway."""
    made, name = _AS_MADE.format(Literal(_body(definition))), Literal(guard_name(definition.table))
    query = _FUNCTION_THERE.format(made=made, name=name, table=Literal(definition.oid))
    return connection.execute(query).fetchone()


# Of who may be trusted with any code under that name: a role that has the rights already, or all rights.
_MADE_BY = SQL(
    "(SELECT r.rolsuper OR r.rolname = {owner} FROM pg_proc p JOIN pg_roles r ON r.oid = p.proowner "
    "WHERE p.oid = to_regprocedure({signature}))"
)
_TAKE_OVER = SQL("""DECLARE trusted boolean := {made_by}; BEGIN
    ALTER FUNCTION {function}() OWNER TO {role};
    IF NOT (trusted OR (SELECT {made} FROM pg_proc p WHERE p.oid = {signature}::regprocedure)) THEN
        RAISE EXCEPTION USING MESSAGE = {message}, HINT = {hint};
    END IF;
END""")


def take_over(connection: Connection, definition: TableDefinition, owner: str) -> Composed | None:
    """What gives the function to a role, for a script: only as this program makes it, in the moment that it is run.

    Returns:
        None where there is none, or the table has no guard any more.

    Raises:
        RefusedError: it is another one, whose code would run with that role's rights.
    """
    found = _function_there(connection, definition) if definition.plaintext_columns else None
    if found is None:
        return None
    function, key = _function(definition), definition.table.key
    signature = Literal(f"{function.as_string(connection)}()")
    made_by = _MADE_BY.format(owner=Literal(owner), signature=signature)
    message = (
        f"function {_named(definition)} is not what this program makes, and would get the rights of {owner}"
    )
    hint = (
        f"If an earlier version of the program made it, renew it first (--add-columns --table {key}). Otherwise find "
        f"out who made it, and drop it ({_drop_function(definition).as_string(connection)} CASCADE)."
    )
    if not (found[0] or answer(connection, SQL("SELECT {}").format(made_by))):
        raise RefusedError(
            f"The function {_named(definition)} is not what this program makes, and would get the rights of {owner}. "
            f"{hint}"
        )
    text = _TAKE_OVER.format(
        made_by=made_by,
        function=function,
        role=Identifier(owner),
        made=_AS_MADE.format(Literal(_body(definition))),
        signature=signature,
        message=Literal(message),
        hint=Literal(hint),
    )
    return SQL("DO {}").format(Literal(text.as_string(connection)))


def guard_faults(
    connection: Connection, definition: TableDefinition, authority: Authority, *, replicated: bool = True
) -> list[str]:
    """How the guard differs from what this program makes for these columns and this authority, in words.

    Compared are definitions: of the function its body, attributes and owner, of each trigger, on the table and its
    partitions, all that it was created with and whether it is enabled. Empty where nothing differs. One that an earlier
    version of this program made may differ.

    Args:
        replicated: whether a trigger that leaves replicated rows out counts as disabled. What the application writes
            is guarded by it as before, as after a DISABLE TRIGGER and ENABLE TRIGGER of somebody's.
    """
    parts = {part.oid: part for part in read_parts(connection, definition.oid)}
    with connection.transaction(force_rollback=True):
        connection.execute(AS_WORDED)
        function = _function_there(connection, definition)
        found = connection.execute(_TRIGGERS_THERE, [list(parts), GUARDS]).fetchall()
    named, faults = f"function {_named(definition)}", []
    if function is None:
        faults.append(f"{named}: missing")
    else:
        made, owner, trusted = function
        if not made:
            faults.append(f"{named}: another one")
        if not trusted:
            faults.append(f"{named}: belongs to {owner}")
    wanted = {
        (oid, trigger.name): trigger.printed(part.identifier, _function(definition), authority)
        for oid, part in parts.items()
        for trigger in _triggers(definition)
        if trigger.is_on(part)
    }
    enabled = {
        (oid, name): text for oid, name, text, state in found if state in ("A" if replicated else "AO")
    }
    for what, keys in (
        ("missing, disabled or not ENABLE ALWAYS", wanted.keys() - enabled.keys()),
        ("another one", {k for k, text in enabled.items() if wanted.get(k, text) != text}),
        ("none of it", {(oid, name) for oid, name, *_ in found} - wanted.keys()),
    ):
        if triggers := sorted(f"{name} of {parts[oid].key}" for oid, name in keys):
            more = f" and {len(triggers) - _NAMED} more" if len(triggers) > _NAMED else ""
            faults.append(f"{', '.join(triggers[:_NAMED])}{more}: {what}")
    return faults


# By the bits of tgtype (src/include/catalog/pg_trigger.h): for each row (1), before (2), on insert (4) or update (16).
_LATE_TRIGGERS = """
SELECT tgname, format('ALTER TRIGGER %%I ON %%s RENAME TO %%I', tgname, tgrelid::regclass, 'a_' || left(tgname, 40))
  FROM pg_trigger WHERE tgrelid = ANY (%s) AND NOT tgisinternal AND tgenabled <> 'D' AND tgparentid = 0
   AND tgname COLLATE "C" > %s AND tgname !~ %s AND tgtype & 3 = 3 AND tgtype & 20 <> 0 ORDER BY 1
"""


def late_triggers(connection: Connection, definition: TableDefinition) -> list[tuple[str, str]]:
    """Triggers of the application that run after the guard, which would not see what they make of a row.

    Each with the statement that lets it run before.
    """
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    # The insert's is the first of the guards for each row.
    return connection.execute(_LATE_TRIGGERS, [parts, GUARD_INSERT, GUARDS]).fetchall()


def refuse_unguarded(connection: Connection, definition: TableDefinition, *, reverted: bool = False) -> None:
    """Refuse a table whose guard is not as it was made: somebody copied and renamed the table, or changed the guard.

    What the bookkeeping knows of it was true of another table. Called by every step that relies on the guard; a table
    that has none, because it was dropped or reverted, passes.

    Args:
        reverted: whether a reverted table has its guard again.

    Raises:
        RefusedError: says how to renew the guard, and what to look at then; or names a trigger that runs after it.
        ConfigurationError: other tables' rows belong to it (:func:`refuse_relatives`).
    """
    known, key = require_state(connection, definition.table), definition.table.key
    state = known.state
    if not (state.is_guarded or (reverted and state is State.REVERTED)):
        return
    if faults := guard_faults(connection, definition, known.authority, replicated=False):
        raise RefusedError(
            f"The guard of {key} is not what this program makes ({'; '.join(faults)}). The table was recreated, "
            "somebody changed the guard, or an earlier version of the program made it, and ciphertext may be older "
            f"than its plaintext. Renew it and look for such values (--add-columns --verify --table {key}), which says "
            "what to do about each; nothing was changed."
        )
    refuse_relatives(connection, definition)
    for name, rename in late_triggers(connection, definition):
        raise RefusedError(
            f"The trigger {name} of {key} runs after the guard, which would not see what it makes of a row: triggers "
            f"run in the order of their names. Rename it ({rename}), and verify what was written meanwhile (--verify "
            f"--table {key}); nothing was changed."
        )


_STILL_USED = """
SELECT EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE p.proname = %s AND p.pronamespace = to_regnamespace('public'))
"""


def drop_guard(connection: Connection, definition: TableDefinition) -> None:
    """Take the guard away, in the caller's transaction."""
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    query = "SELECT tgname FROM pg_trigger WHERE tgrelid = %s AND tgname ~ %s ORDER BY 1"
    found = connection.execute(query, [definition.oid, GUARDS]).fetchall()
    for statement in _drop_triggers((definition.identifier, name) for (name,) in found):
        connection.execute(statement)
    # A table that was copied and set aside keeps its triggers.
    if not answer(connection, _STILL_USED, guard_name(definition.table)):
        connection.execute(_drop_function(definition))


def drop_guard_statements(definition: TableDefinition) -> list[Composed]:
    """What takes the guard away: all its triggers, and its function."""
    names = sorted(trigger.name for trigger in _triggers(definition))
    return [*_drop_triggers((definition.identifier, name) for name in names), _drop_function(definition)]


def _drop_function(definition: TableDefinition) -> Composed:
    return SQL("DROP FUNCTION IF EXISTS {}()").format(_function(definition))


def _drop_triggers(triggers: Iterable[tuple[Identifier, str]]) -> list[Composed]:
    return [SQL("DROP TRIGGER {} ON {}").format(Identifier(name), table) for table, name in triggers]


# Anybody can set the setting; only who may write the engine's bookkeeping is believed. Of the two, the application's
# writes pay for the first alone.
#
# Conditions are written as the server words them (pg_get_triggerdef): a guard is compared with this text.
_SAID = SQL(
    '(NOT ("pg_catalog"."current_setting"({}::"pg_catalog"."text", true) IS DISTINCT FROM '
    '{}::"pg_catalog"."text"))'
).format(Literal(WRITER_SETTING), Literal(WRITER))
_BY_ENGINE = SQL("({} AND {})").format(_SAID, MAY_WRITE)


def _given(columns: Sequence[Column], new: LiteralString = '"new"') -> Composed:
    given = [
        SQL("({}.{} IS NOT NULL)").format(SQL(new), Identifier(name))
        for column in columns
        for name in column.derived
    ]
    return SQL("({})" if len(given) > 1 else "{}").format(SQL(" OR ").join(given))


# Where the triggers of single columns leave their numbers for the guard, which runs next for the same row.
_MENTIONED = Literal("alphapulse_encryption.mentioned")


@dataclass(frozen=True)
class _Trigger:
    name: str
    event: Composable
    condition: Composed
    # What the function is told beside the authority: the number of a column that is named, or nothing.
    argument: str = ""
    # In place of both, of the one that never fires: the names of its columns.
    arguments: tuple[str, ...] = ()

    def is_on(self, part: Part) -> bool:
        """Whether this part of a table has it: partitions have those that are for each row."""
        return part.parent is None or not self.arguments

    def arguments_for(self, authority: Authority) -> tuple[str, ...]:
        return self.arguments or (authority, self.argument)

    def definition(
        self, table: Identifier, function: Identifier, arguments: Iterable[Composable]
    ) -> Composed:
        """What comes behind CREATE."""
        return SQL("TRIGGER {} BEFORE {} ON {} FOR EACH {} WHEN ({}) EXECUTE FUNCTION {}({})").format(
            *(Identifier(self.name), self.event, table, SQL("STATEMENT" if self.arguments else "ROW")),
            *(self.condition, function, SQL(", ").join(arguments)),
        )

    def printed(self, table: Identifier, function: Identifier, authority: Authority) -> str:
        """The same as the server words it."""
        condition = verbatim(self.condition.as_string(None).replace('"pg_catalog".', ""))
        arguments = [verbatim("'" + text.replace("'", "''") + "'") for text in self.arguments_for(authority)]
        made = replace(self, condition=condition).definition(table, function, arguments)
        return f"CREATE {made.as_string(None)}"


def _triggers(definition: TableDefinition) -> list[_Trigger]:
    columns = _columns(definition)
    names = tuple(name for column in columns for name in (column.name, *column.derived))
    inserted = SQL("((NOT {}) AND {})").format(_BY_ENGINE, _given(columns))
    # The engine's own writes pass, unless a trigger of the application changed the plaintext on their way.
    updated = SQL("\n        CASE\n            WHEN {} THEN {}\n            ELSE {}\n        END").format(
        _BY_ENGINE,
        _images_differ([column.name for column in columns]),
        _images_differ(names),
    )
    return [
        _Trigger(
            GUARD_COLUMNS,
            SQL("UPDATE OF {}").format(SQL(", ").join(map(Identifier, names))),
            SQL("{}").format(SQL("false")),
            arguments=names,
        ),
        _Trigger(GUARD_INSERT, SQL("INSERT"), inserted),
        _Trigger(GUARD_UPDATE, SQL("UPDATE"), updated),
        *(
            _Trigger(
                f"{GUARD_MENTION}{number:04d}",
                SQL("UPDATE OF {}").format(Identifier(column.name)),
                # As little as will do: a statement that names the column pays for it once, and each of its rows. An
                # envelope has no two forms, so here the operator of its own type is enough.
                SQL("(({old} IS DISTINCT FROM {new}) AND {same})").format(
                    old=_text(definition, '"old"', column.encrypted),
                    new=_text(definition, '"new"', column.encrypted),
                    same=_compare_images([column.name], "record_image_eq"),
                ),
                _mention(number),
            )
            for number, column in enumerate(columns)
        ),
    ]


def _text(definition: TableDefinition, row: LiteralString, name: str) -> Composed:
    """A column that may be a varchar, which has no operators of its own."""
    found = definition.columns.get(name)
    template = '({}.{})::"pg_catalog"."text"' if found is not None and found.type != "text" else "{}.{}"
    return SQL(template).format(SQL(row), Identifier(name))


def _mention(number: int) -> str:
    return f"<{number}>"


def _images_differ(
    names: Sequence[str], old: LiteralString = '"old"', new: LiteralString = '"new"'
) -> Composed:
    return _compare_images(names, "record_image_ne", old, new)


def _compare_images(
    names: Sequence[str], function: LiteralString, old: LiteralString = '"old"', new: LiteralString = '"new"'
) -> Composed:
    # The function behind *<> or *=, not the operator: of that, a dump of the trigger loses the casts to record, without
    # which the parser compares field by field, and the trigger could not be restored.
    return SQL('"pg_catalog".{}(ROW({}), ROW({}))').format(
        Identifier(function),
        *(
            SQL(", ").join(SQL("{}.{}").format(SQL(row), Identifier(name)) for name in names)
            for row in (old, new)
        ),
    )


_GUARD_BODY = """
DECLARE
    -- What a publisher sends was guarded there: of what it sends alone, ciphertext is right.
    replicated constant boolean := current_setting('session_replication_role') = 'replica';
    refuses constant boolean := TG_ARGV[0] = 'plaintext' AND NOT replicated;
    by_engine boolean := {said};
    mentions boolean := false;
    cleared text[] := '{{}}';
    named text;
    row_before record;
    row_after record;
BEGIN
    IF by_engine THEN
        by_engine := {may_write};
    END IF;
    IF TG_ARGV[1] <> '' THEN
        IF NOT by_engine THEN
            PERFORM set_config({setting}, concat(current_setting({setting}, true), TG_ARGV[1]), true);
        END IF;
        RETURN NEW;
    END IF;
    BEGIN
        {rules}
    EXCEPTION WHEN undefined_column THEN
        {renamed}
    END;
    IF mentions THEN
        PERFORM set_config({setting}, '', true);
    END IF;
    RETURN NEW;
END
"""

_GUARD_RULES = """
        IF TG_OP = 'INSERT' THEN
            {inserts}
        ELSE
            {updates}
        END IF;
"""

# Names in a function's text do not follow a rename: the row is looked at once more, under the names of then.
_GUARD_RENAMED = """
        SELECT 'SELECT ' || string_agg(format('($1).%I AS %I', c.now, c.before), ', ') INTO named FROM {columns} AS c;
        IF named IS NULL THEN
            RAISE EXCEPTION USING ERRCODE = 'undefined_column', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                MESSAGE = {message}, HINT = {hint};
        END IF;
        EXECUTE named INTO row_after USING NEW;
        IF TG_OP = 'UPDATE' THEN
            EXECUTE named INTO row_before USING OLD;
        END IF;
        {rules}
        IF cleared <> '{{}}' THEN
            NEW := jsonb_populate_record(
                NEW, (SELECT jsonb_object_agg(c.now, NULL) FROM {columns} AS c WHERE c.before = ANY (cleared)));
        END IF;
"""
# The columns of a guard: what they were called when it was made, and what they are called now.
_GUARD_COLUMNS = """(
            SELECT t.before, a.attname AS now FROM (
                SELECT g.tgrelid, unnest(g.tgattr::int2[]) AS number,
                       unnest({names}::text[]) AS before
                  FROM pg_trigger g WHERE g.tgrelid = coalesce(pg_partition_root(TG_RELID), TG_RELID)
                   AND g.tgname = {trigger} AND cardinality(g.tgattr::int2[]) = cardinality({names}::text[])) AS t
              JOIN pg_attribute a ON a.attrelid = t.tgrelid AND a.attnum = t.number)"""

_GUARD_INSERT = """
        IF {new}.{plaintext} IS NOT DISTINCT FROM NULL AND {ciphertext_given} AND refuses THEN
            {refuse}
        ELSIF {new}.{plaintext} IS DISTINCT FROM NULL AND {token_missing} THEN
            {clear}
        END IF;
"""

_GUARD_UPDATE = """
        IF by_engine THEN
            IF {old}.{plaintext} IS DISTINCT FROM NULL AND {plaintext_changed} THEN
                {clear}
            END IF;
        ELSIF {plaintext_changed} THEN
            IF {new}.{encrypted} IS NULL OR NOT ({encrypted_changed}) OR {token_stale} THEN
                {clear}
            ELSIF {new}.{plaintext} IS NOT DISTINCT FROM NULL AND refuses THEN
                {refuse}
            END IF;
        ELSIF {ciphertext_changed} AND NOT replicated THEN
            IF {mentioned} THEN
                mentions := true;
                IF {new}.{encrypted} IS NULL OR {token_left_out} THEN
                    {clear}
                ELSIF {new}.{plaintext} IS NOT DISTINCT FROM NULL AND refuses THEN
                    {refuse}
                END IF;
            ELSIF refuses THEN
                {refuse}
            ELSIF {encrypted_changed} THEN
                {clear_plaintext}
            END IF;
        END IF;
"""

# Of a searchable column; never so of others.
_GUARD_TOKEN: dict[str, LiteralString] = {
    "token_missing": "({new}.{encrypted} IS NULL) <> ({new}.{search} IS NULL)",
    "token_left_out": "({new}.{plaintext} IS DISTINCT FROM NULL AND {new}.{search} IS NULL)",
    "token_stale": (
        "({new}.{plaintext} IS DISTINCT FROM NULL AND ({new}.{search} IS NULL OR {new}.{search} = {old}.{search}))"
    ),
}

_GUARD_REFUSE = """RAISE EXCEPTION USING ERRCODE = 'check_violation', TABLE = TG_TABLE_NAME, SCHEMA = TG_TABLE_SCHEMA,
                COLUMN = {encrypted_name}, MESSAGE = {message}, HINT = {hint};"""


def guard_function(columns: Sequence[Column], table_key: str) -> str:
    """The body of the guard function: the rules of authority, written out for each column.

    =====================  ===================================  =======================================
    one statement changes  authority ``plaintext``              authority ``ciphertext``
    =====================  ===================================  =======================================
    plaintext only         ciphertext and token cleared         the same
    both                   kept                                 kept
    ciphertext only        refused                              kept, the stale plaintext is cleared
    =====================  ===================================  =======================================

    An UPDATE that names a plaintext column and writes what is there already beside another ciphertext writes both.

    A searchable value that comes with both sides but without a token of its own is cleared to pending
    as well: it could not be found. An INSERT that leaves a plaintext column with a default out looks like one that
    writes the default itself: it is kept, as both. The engine's own writes are kept, but for a ciphertext whose
    plaintext a trigger of the application changed on its way: it is that of the old value. A token alone is never the
    new value: it does not save an old ciphertext from being cleared, nor does it clear a plaintext.
    """
    names = [name for column in columns for name in (column.name, *column.derived)]
    these = SQL(_GUARD_COLUMNS).format(names=Literal(names), trigger=Literal(GUARD_COLUMNS))
    renamed = SQL(_GUARD_RENAMED).format(
        columns=these,
        rules=_rules(columns, table_key, "row_before", "row_after"),
        message=Literal(
            f"A column of {table_key} that its guard keeps in step was renamed, and the guard was changed"
        ),
        hint=Literal(f"Renew the guard: --add-columns --table {table_key}."),
    )
    return (
        SQL(_GUARD_BODY)
        .format(
            said=_SAID,
            may_write=MAY_WRITE_BY_NAME,
            setting=_MENTIONED,
            rules=_rules(columns, table_key, "OLD", "NEW"),
            renamed=renamed,
        )
        .as_string(None)
    )


def _rules(columns: Sequence[Column], table_key: str, old: LiteralString, new: LiteralString) -> Composed:
    """The rules, for rows in these variables; where they are copies, what is cleared is noted."""
    inserts: list[Composed] = []
    updates: list[Composed] = []

    def clear(*names: str) -> Composed:
        note: LiteralString = "" if new == "NEW" else " cleared := cleared || {}::text;"
        each = [
            SQL("{}.{} := NULL;" + note).format(
                *(SQL(new), Identifier(name)), *([Literal(name)] if note else [])
            )
            for name in names
        ]
        return SQL(" ").join(each)

    for number, column in enumerate(columns):
        rows = {"old": SQL(old), "new": SQL(new)}
        names = {"plaintext": Identifier(column.name), "encrypted": Identifier(column.encrypted)}
        tokens: dict[str, Composable] = dict.fromkeys(_GUARD_TOKEN, SQL("false"))
        if column.searchable:
            names["search"] = Identifier(column.search)
            tokens = {name: SQL(text).format(**names, **rows) for name, text in _GUARD_TOKEN.items()}
        refuse = SQL(_GUARD_REFUSE).format(
            encrypted_name=Literal(column.encrypted),
            message=Literal(
                f"{table_key}.{column.encrypted} was written without {table_key}.{column.name}, "
                "which is still what readers use"
            ),
            hint=Literal(
                "Write both columns in one statement, or write the plaintext alone and let the backfill "
                f"encrypt it. Ciphertext alone is accepted after switch_to_ciphertext of {table_key}."
            ),
        )
        parts = {
            **names,
            **rows,
            "plaintext_changed": _images_differ([column.name], old, new),
            "encrypted_changed": _images_differ([column.encrypted], old, new),
            "ciphertext_changed": _images_differ(column.derived, old, new),
            "ciphertext_given": _given([column], new),
            **tokens,
            "mentioned": SQL("strpos(coalesce(current_setting({}, true), ''), {}) > 0").format(
                _MENTIONED, Literal(_mention(number))
            ),
            "clear": clear(*column.derived),
            "clear_plaintext": clear(column.name),
            "refuse": refuse,
        }
        inserts.append(SQL(_GUARD_INSERT).format(**parts))
        updates.append(SQL(_GUARD_UPDATE).format(**parts))
    return SQL(_GUARD_RULES).format(inserts=SQL("").join(inserts), updates=SQL("").join(updates))
