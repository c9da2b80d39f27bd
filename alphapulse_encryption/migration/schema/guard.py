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

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from alphapulse_encryption.migration.schema.partitions import lock_partitions, read_parts, refuse_relatives
from alphapulse_encryption.migration.schema.sql import GUARD_INSERT, GUARD_MENTION, GUARD_UPDATE, GUARDS


def ensure_guard(connection: Connection, definition: TableDefinition, actor: Actor) -> bool:
    """Create or renew the guard where it is missing, disabled or made for other columns or authority.

    To be called in a transaction. The lock it takes (SHARE ROW EXCLUSIVE) waits for writers under way and
    keeps new ones out until the commit, so no statement runs under two authorities.

    Returns:
        Whether anything was changed.
    """
    table = definition.table
    state = require_state(connection, table, lock=True)
    if guard_is_current(connection, definition, state.authority):
        return False
    obsolete = _obsolete_triggers(connection, definition)
    # Taking a trigger away needs the stronger lock, and it is better asked for at once than in addition.
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE" if obsolete else "SHARE ROW EXCLUSIVE")
    for statement in guard_statements(connection, definition, state.authority):
        connection.execute(statement)
    audit(connection, actor, "guard", table, authority=state.authority)
    return True


def guard_is_current(connection: Connection, definition: TableDefinition, authority: Authority) -> bool:
    """Whether the guard is in place, and as this program makes it for these columns and this authority."""
    made = guard_mark(connection, definition, authority)
    found = {(one.mark, one.enabled) for one in _look(connection, definition)}
    return found == {(made, "A")} and not guard_faults(connection, definition)


def guard_statements(
    connection: Connection, definition: TableDefinition, authority: Authority
) -> list[Composed]:
    """What creates or renews the guard: the function, its triggers, and away with those of other columns."""
    body = guard_function(definition.plaintext_columns, definition.table.key)
    mark = guard_mark(connection, definition, authority)
    triggers = _triggers(definition)
    function = SQL("public.{}").format(Identifier(guard_name(definition.table)))
    if all(found.ours for found in _look(connection, definition)):
        statements = _drop_triggers(definition, _obsolete_triggers(connection, definition))
    else:
        # Whoever owns a function can change it at any time: it is made again, and not only what it says.
        statements = drop_guard_statements(definition, _guard_triggers(connection, definition))
    statements.append(
        SQL(
            "CREATE OR REPLACE FUNCTION {}() RETURNS trigger LANGUAGE plpgsql "
            "SET search_path = pg_catalog AS {}"
        ).format(function, Literal(body))
    )
    # A writer needs no right on it. The owner does, who makes the partitions of the table.
    owner, given = give_to_owner(connection, SQL("FUNCTION {}()").format(function), definition.oid)
    statements += given
    statements.append(SQL("REVOKE ALL ON FUNCTION {}() FROM PUBLIC").format(function))
    statements.append(SQL("GRANT EXECUTE ON FUNCTION {}() TO {}").format(function, Identifier(owner)))
    for trigger in triggers:
        arguments = [Literal(argument) for argument in trigger.arguments or (authority, trigger.argument)]
        statements.append(
            SQL(
                "CREATE OR REPLACE TRIGGER {} BEFORE {} ON {} FOR EACH {} WHEN ({}) EXECUTE FUNCTION {}({})"
            ).format(
                *(Identifier(trigger.name), trigger.event, definition.identifier),
                *(SQL("STATEMENT" if trigger.arguments else "ROW"), trigger.condition),
                *(function, SQL(", ").join(arguments)),
            )
        )
    # One that was disabled on a single partition, too: before PostgreSQL 15 this does not reach partitions.
    for part in read_parts(connection, definition.oid):
        here = [t for t in triggers if part.parent is None or not t.arguments]
        enabled = SQL(", ").join(SQL("ENABLE ALWAYS TRIGGER {}").format(Identifier(t.name)) for t in here)
        statements.append(SQL("ALTER TABLE {} {}").format(part.identifier, enabled))
    regclass = Literal(definition.identifier.as_string(connection))
    statements.append(
        SQL(_SIGN).format(table=regclass, guards=Literal(GUARDS), mark=Literal(mark), made=SQL(_MADE))
    )
    return statements


# How a trigger t and its function p are, as the server words it; the names of the table and its schema may change.
_MADE: LiteralString = (
    "pg_catalog.md5(pg_catalog.concat_ws(' ', pg_catalog.regexp_replace(pg_catalog.pg_get_triggerdef(t.oid), "
    "' ON .*? FOR EACH ', ' '), p.prosrc, p.prolang, p.prosecdef, p.proconfig, p.provolatile))"
)
# Keeps with each trigger how it came out, so that a change of it or of the function shows.
_SIGN: LiteralString = """DO $sign$
DECLARE
    made record;
BEGIN
    FOR made IN
        SELECT t.tgname, {mark} || ' ' || {made} AS text FROM pg_catalog.pg_trigger t
          JOIN pg_catalog.pg_proc p ON p.oid = t.tgfoid
         WHERE t.tgrelid = {table}::pg_catalog.regclass AND t.tgname ~ {guards}
    LOOP
        EXECUTE pg_catalog.format('COMMENT ON TRIGGER %I ON %s IS %L', made.tgname, {table}, made.text);
    END LOOP;
END $sign$"""


def guard_mark(connection: Connection, definition: TableDefinition, authority: Authority) -> str:
    """Begins the comments on the triggers of a guard that this program makes for these columns and this authority."""
    body = guard_function(definition.plaintext_columns, definition.table.key)
    made_of = [body, authority, repr(definition.plaintext_columns)]
    made_of += [trigger.condition.as_string(connection) for trigger in _triggers(definition)]
    return "alphapulse_encryption " + hashlib.sha256("".join(made_of).encode()).hexdigest()


def _obsolete_triggers(connection: Connection, definition: TableDefinition) -> set[str]:
    return _guard_triggers(connection, definition) - {t.name for t in _triggers(definition)}


@dataclass(frozen=True)
class _Found:
    """A trigger of a guard, on the table or a partition.

    Args:
        ours: whether its function is the table's guard function, which nobody may change who may not change the table.
        made: how it is now; ``signed`` how it came out when it was made, None of one by an earlier version.
    """

    oid: int
    name: str
    enabled: str
    ours: bool
    made: str
    mark: str
    signed: str | None


_LOOK = """
SELECT t.tgrelid, t.tgname, t.tgenabled::text,
       p.proname = %(function)s AND p.pronamespace = to_regnamespace('public')
         AND pg_has_role(p.proowner, c.relowner, 'MEMBER'),
       {made}, concat_ws(' ', split_part(s.text, ' ', 1), split_part(s.text, ' ', 2)),
       nullif(split_part(s.text, ' ', 3), '')
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_class c ON c.oid = t.tgrelid
  LEFT JOIN pg_trigger w ON w.tgrelid = %(table)s AND w.tgname = t.tgname
 CROSS JOIN LATERAL (SELECT coalesce(obj_description(w.oid, 'pg_trigger'), '') AS text) s
 WHERE t.tgrelid = ANY(%(parts)s) AND t.tgname ~ %(guards)s
"""


def _look(connection: Connection, definition: TableDefinition) -> list[_Found]:
    parameters = {
        "table": definition.oid,
        "parts": [part.oid for part in read_parts(connection, definition.oid)],
        "function": guard_name(definition.table),
        "guards": GUARDS,
    }
    return [_Found(*row) for row in connection.execute(SQL(_LOOK).format(made=SQL(_MADE)), parameters)]


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


def guard_faults(connection: Connection, definition: TableDefinition) -> list[str]:
    """What keeps the guard from doing what it was made for, in words; empty where it does it.

    Looked at is the guard itself, of every partition too: triggers, function, and who owns that. One that an earlier
    version of this program made does its work, until a step makes it again.
    """
    found = _look(connection, definition)
    earlier = bool(found) and all(one.signed is None for one in found)
    there = {(one.oid, one.name) for one in found if one.enabled in ("A", "O") and one.ours}
    missing = {
        trigger.name
        for part in read_parts(connection, definition.oid)
        for trigger in _triggers(definition)
        if (part.oid, trigger.name) not in there
        and not (trigger.arguments and (earlier or part.parent is not None))
    }
    changed = set() if earlier else {one.name for one in found if one.made != one.signed} - missing
    faults = []
    if missing:
        faults.append(f"missing or disabled: {', '.join(sorted(missing))}")
    if changed:
        faults.append(f"changed, or their function was: {', '.join(sorted(changed))}")
    return faults


def guard_in_place(connection: Connection, definition: TableDefinition) -> bool:
    """Whether the guard does what it was made for."""
    return not guard_faults(connection, definition)


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
    state, key = require_state(connection, definition.table).state, definition.table.key
    if not (state.is_guarded or (reverted and state is State.REVERTED)):
        return
    if faults := guard_faults(connection, definition):
        raise RefusedError(
            f"The guard triggers of {key} are {'; '.join(faults)}. The table was recreated, or somebody changed them, "
            f"and ciphertext may be older than its plaintext. Renew them and look for such values (--add-columns "
            f"--verify --table {key}), which says what to do about each; nothing was changed."
        )
    refuse_relatives(connection, definition)
    for name, rename in late_triggers(connection, definition):
        raise RefusedError(
            f"The trigger {name} of {key} runs after the guard, which would not see what it makes of a row: triggers "
            f"run in the order of their names. Rename it ({rename}), and verify what was written meanwhile (--verify "
            f"--table {key}); nothing was changed."
        )


def _guard_triggers(connection: Connection, definition: TableDefinition) -> set[str]:
    """The names of the triggers of a guard that are there."""
    query = "SELECT tgname FROM pg_trigger WHERE tgrelid = %s AND tgname ~ %s"
    return {name for (name,) in connection.execute(query, [definition.oid, GUARDS])}


_STILL_USED = """
SELECT EXISTS (SELECT FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
                WHERE p.proname = %s AND p.pronamespace = to_regnamespace('public'))
"""


def drop_guard(connection: Connection, definition: TableDefinition) -> None:
    """Take the guard away, in the caller's transaction."""
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    *triggers, function = drop_guard_statements(definition, _guard_triggers(connection, definition))
    for statement in triggers:
        connection.execute(statement)
    # A table that was copied and set aside keeps its triggers.
    if not answer(connection, _STILL_USED, guard_name(definition.table)):
        connection.execute(function)


def drop_guard_statements(
    definition: TableDefinition, triggers: Iterable[str] | None = None
) -> list[Composed]:
    """What takes the guard away: its function, and these triggers, or all that a guard has."""
    names = {trigger.name for trigger in _triggers(definition)} if triggers is None else triggers
    function = SQL("DROP FUNCTION IF EXISTS public.{}()").format(Identifier(guard_name(definition.table)))
    return [*_drop_triggers(definition, names), function]


def _drop_triggers(definition: TableDefinition, names: Iterable[str]) -> list[Composed]:
    return [
        SQL("DROP TRIGGER {} ON {}").format(Identifier(name), definition.identifier) for name in sorted(names)
    ]


# Anybody can set the setting; only who may write the engine's bookkeeping is believed. Of the two, the application's
# writes pay for the first alone.
_SAID = SQL("current_setting({}, true) IS NOT DISTINCT FROM {}").format(
    Literal(WRITER_SETTING), Literal(WRITER)
)
_BY_ENGINE = SQL("({} AND {})").format(_SAID, MAY_WRITE)


def _given(columns: Sequence[Column], new: LiteralString = "NEW") -> Composed:
    return SQL(" OR ").join(
        SQL("{}.{} IS NOT NULL").format(SQL(new), Identifier(name))
        for column in columns
        for name in column.derived
    )


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


def _triggers(definition: TableDefinition) -> list[_Trigger]:
    columns = definition.plaintext_columns
    names = tuple(name for column in columns for name in (column.name, *column.derived))
    inserted = SQL("NOT ({}) AND ({})").format(_BY_ENGINE, _given(columns))
    # The engine's own writes pass, unless a trigger of the application changed the plaintext on their way.
    updated = SQL("CASE WHEN {} THEN {} ELSE {} END").format(
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
                SQL("OLD.{encrypted} IS DISTINCT FROM NEW.{encrypted} AND {same}").format(
                    encrypted=Identifier(column.encrypted),
                    same=_compare_images([column.name], "record_image_eq"),
                ),
                _mention(number),
            )
            for number, column in enumerate(columns)
        ),
    ]


def _mention(number: int) -> str:
    return f"<{number}>"


def _images_differ(names: Sequence[str], old: LiteralString = "OLD", new: LiteralString = "NEW") -> Composed:
    return _compare_images(names, "record_image_ne", old, new)


def _compare_images(
    names: Sequence[str], function: LiteralString, old: LiteralString = "OLD", new: LiteralString = "NEW"
) -> Composed:
    # The function behind *<> or *=, not the operator: of that, a dump of the trigger loses the casts to record, without
    # which the parser compares field by field, and the trigger could not be restored.
    return SQL("pg_catalog.{}(ROW({}), ROW({}))").format(
        SQL(function),
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
            "ciphertext_given": SQL("({})").format(_given([column], new)),
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
