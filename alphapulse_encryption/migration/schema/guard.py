"""The guard: triggers that keep every write to a table with encrypted columns consistent.

Two ``BEFORE`` triggers per table act on the rules of authority, column by column (see :func:`guard_function`), and
one per column tells them in the one case where values do not: an UPDATE that names a plaintext column and writes what
is there already, beside a fresh envelope of it. ``UPDATE OF`` is PostgreSQL's only way to know what a statement names.
They compare binary images (as ``*<>`` does, PostgreSQL manual 9.25.6): ``=`` calls ``1.50`` and ``1.5``, or ``'a'`` and
``'A'`` under a case-insensitive collation, the same value, and a ciphertext of the old one would be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.lifecycle import Authority
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
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.partitions import lock_partitions, read_parts
from alphapulse_encryption.migration.schema.sql import GUARD_INSERT, GUARD_MENTION, GUARD_UPDATE, GUARDS


def guard_name(table: Table) -> str:
    """The name of the table's guard function; long names are cut and made unique by a hash."""
    return short_name(f"encryption_guard_{table.key}", prefix="encryption_guard_")


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
    """Whether the guard is in place, and made for these columns and this authority."""
    comment = _guard_comment(connection, definition, authority)
    made = set(_guard_triggers(connection, definition).values())
    return made == {comment} and guard_in_place(connection, definition)


def guard_statements(
    connection: Connection, definition: TableDefinition, authority: Authority
) -> list[Composed]:
    """What creates or renews the guard: the function, its triggers, and away with those of other columns."""
    body = guard_function(definition.plaintext_columns, definition.table.key)
    comment = _guard_comment(connection, definition, authority)
    triggers = _triggers(definition)
    function = SQL("public.{}").format(Identifier(guard_name(definition.table)))
    statements = _drop_triggers(definition, _obsolete_triggers(connection, definition))
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
        statements.append(
            SQL(
                "CREATE OR REPLACE TRIGGER {} BEFORE {} ON {} FOR EACH ROW WHEN ({}) EXECUTE FUNCTION {}({}, {})"
            ).format(
                *(Identifier(trigger.name), trigger.event, definition.identifier, trigger.condition),
                *(function, Literal(authority), Literal(trigger.argument)),
            )
        )
        statements.append(
            SQL("COMMENT ON TRIGGER {} ON {} IS {}").format(
                Identifier(trigger.name), definition.identifier, Literal(comment)
            )
        )
    # One that was disabled on a single partition, too: before PostgreSQL 15 this does not reach partitions.
    for part in read_parts(connection, definition.oid):
        enabled = SQL(", ").join(SQL("ENABLE TRIGGER {}").format(Identifier(t.name)) for t in triggers)
        statements.append(SQL("ALTER TABLE {} {}").format(part.identifier, enabled))
    return statements


def _guard_comment(connection: Connection, definition: TableDefinition, authority: Authority) -> str:
    body = guard_function(definition.plaintext_columns, definition.table.key)
    made_of = [body, authority, repr(definition.plaintext_columns)]
    made_of += [trigger.condition.as_string(connection) for trigger in _triggers(definition)]
    return "alphapulse_encryption " + hashlib.sha256("".join(made_of).encode()).hexdigest()


def _obsolete_triggers(connection: Connection, definition: TableDefinition) -> set[str]:
    return _guard_triggers(connection, definition).keys() - {t.name for t in _triggers(definition)}


def guard_in_place(connection: Connection, definition: TableDefinition) -> bool:
    """Whether every guard trigger is there, enabled and bound to the guard function, in every partition too."""
    oids = [part.oid for part in read_parts(connection, definition.oid)]
    names = [trigger.name for trigger in _triggers(definition)]
    found = answer(
        connection,
        "SELECT count(*) FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid "
        "WHERE t.tgrelid = ANY(%s) AND t.tgname = ANY(%s) AND t.tgenabled IN ('O', 'A') AND p.proname = %s "
        "AND p.pronamespace = 'public'::regnamespace",
        *(oids, names, guard_name(definition.table)),
    )
    return bool(found == len(names) * len(oids))


def refuse_unguarded(connection: Connection, definition: TableDefinition) -> None:
    """Refuse a table whose guard is gone: it was made again by a copy and a rename, or the triggers were disabled.

    What the bookkeeping knows of it was true of another table.

    Raises:
        RefusedError: says how to renew the guard, and what to look at then.
    """
    if not guard_in_place(connection, definition):
        key = definition.table.key
        raise RefusedError(
            f"The guard triggers of {key} are missing or disabled: the table was recreated, or somebody took them "
            f"away, and ciphertext may be older than its plaintext. Renew them and look for such values (--add-columns "
            f"--verify --table {key}), then clear and encrypt them again (--repair-mismatched --migrate-data --verify "
            f"--table {key}); nothing was changed."
        )


def _guard_triggers(connection: Connection, definition: TableDefinition) -> dict[str, str | None]:
    """The triggers of a guard that are there, with their comments."""
    rows = connection.execute(
        "SELECT tgname, obj_description(oid, 'pg_trigger') FROM pg_trigger WHERE tgrelid = %s AND tgname ~ %s",
        [definition.oid, GUARDS],
    )
    return dict(rows.fetchall())


def drop_guard(connection: Connection, definition: TableDefinition) -> None:
    """Take the guard away, in the caller's transaction."""
    lock_partitions(connection, definition, "ACCESS EXCLUSIVE")
    for statement in drop_guard_statements(definition, _guard_triggers(connection, definition)):
        connection.execute(statement)


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


def _given(columns: Sequence[Column]) -> Composed:
    return SQL(" OR ").join(
        SQL("NEW.{} IS NOT NULL").format(Identifier(name)) for column in columns for name in column.derived
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


def _triggers(definition: TableDefinition) -> list[_Trigger]:
    columns = definition.plaintext_columns
    inserted = SQL("NOT ({}) AND ({})").format(_BY_ENGINE, _given(columns))
    # The engine's own writes pass, unless a trigger of the application changed the plaintext on their way.
    updated = SQL("CASE WHEN {} THEN {} ELSE {} END").format(
        _BY_ENGINE,
        _images_differ([column.name for column in columns]),
        _images_differ([name for column in columns for name in (column.name, *column.derived)]),
    )
    return [
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


def _images_differ(names: Sequence[str]) -> Composed:
    return _compare_images(names, "record_image_ne")


def _compare_images(names: Sequence[str], function: LiteralString) -> Composed:
    # The function behind *<> or *=, not the operator: of that, a dump of the trigger loses the casts to record, without
    # which the parser compares field by field, and the trigger could not be restored.
    return SQL("pg_catalog.{}(ROW({}), ROW({}))").format(
        SQL(function),
        SQL(", ").join(SQL("OLD.{}").format(Identifier(name)) for name in names),
        SQL(", ").join(SQL("NEW.{}").format(Identifier(name)) for name in names),
    )


_GUARD_BODY = """
DECLARE
    ciphertext_is_right constant boolean := TG_ARGV[0] = 'ciphertext';
    by_engine boolean := {said};
    mentions boolean := false;
BEGIN
    IF by_engine THEN
        by_engine := {may_write};
    END IF;
    IF TG_ARGV[1] <> '' THEN
        IF NOT by_engine THEN
            PERFORM set_config({setting}, concat(current_setting({setting}, true), TG_ARGV[1]), true);
        END IF;
    ELSIF TG_OP = 'INSERT' THEN
        {inserts}
    ELSE
        {updates}
        IF mentions THEN
            PERFORM set_config({setting}, '', true);
        END IF;
    END IF;
    RETURN NEW;
END
"""

_GUARD_INSERT = """
        IF NEW.{plaintext} IS NULL AND {ciphertext_given} AND NOT ciphertext_is_right THEN
            {refuse}
        ELSIF NEW.{plaintext} IS NOT NULL AND {token_missing} THEN
            {clear}
        END IF;
"""

_GUARD_UPDATE = """
        IF by_engine THEN
            IF OLD.{plaintext} IS NOT NULL AND {plaintext_changed} THEN
                {clear}
            END IF;
        ELSIF {plaintext_changed} THEN
            IF NEW.{encrypted} IS NULL OR NOT ({encrypted_changed}) OR {token_stale} THEN
                {clear}
            ELSIF NEW.{plaintext} IS NULL AND NOT ciphertext_is_right THEN
                {refuse}
            END IF;
        ELSIF {ciphertext_changed} THEN
            IF {mentioned} THEN
                mentions := true;
                IF NEW.{encrypted} IS NULL OR {token_left_out} THEN
                    {clear}
                ELSIF NEW.{plaintext} IS NULL AND NOT ciphertext_is_right THEN
                    {refuse}
                END IF;
            ELSIF NOT ciphertext_is_right THEN
                {refuse}
            ELSIF {encrypted_changed} THEN
                NEW.{plaintext} := NULL;
            END IF;
        END IF;
"""

# Of a searchable column; never so of others.
_GUARD_TOKEN: dict[str, LiteralString] = {
    "token_missing": "(NEW.{encrypted} IS NULL) <> (NEW.{search} IS NULL)",
    "token_left_out": "(NEW.{plaintext} IS NOT NULL AND NEW.{search} IS NULL)",
    "token_stale": "(NEW.{plaintext} IS NOT NULL AND (NEW.{search} IS NULL OR NEW.{search} = OLD.{search}))",
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
    inserts: list[Composed] = []
    updates: list[Composed] = []
    for number, column in enumerate(columns):
        plaintext, encrypted = Identifier(column.name), Identifier(column.encrypted)
        names = {"plaintext": plaintext, "encrypted": encrypted}
        clear = SQL("NEW.{} := NULL;").format(encrypted)
        tokens: dict[str, Composable] = dict.fromkeys(_GUARD_TOKEN, SQL("false"))
        if column.searchable:
            names["search"] = Identifier(column.search)
            clear = SQL("NEW.{} := NULL; NEW.{} := NULL;").format(encrypted, names["search"])
            tokens = {name: SQL(text).format(**names) for name, text in _GUARD_TOKEN.items()}
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
            "plaintext": plaintext,
            "encrypted": encrypted,
            "plaintext_changed": _images_differ([column.name]),
            "encrypted_changed": _images_differ([column.encrypted]),
            "ciphertext_changed": _images_differ(column.derived),
            "ciphertext_given": SQL("({})").format(_given([column])),
            **tokens,
            "mentioned": SQL("strpos(coalesce(current_setting({}, true), ''), {}) > 0").format(
                _MENTIONED, Literal(_mention(number))
            ),
            "clear": clear,
            "refuse": refuse,
        }
        inserts.append(SQL(_GUARD_INSERT).format(**parts))
        updates.append(SQL(_GUARD_UPDATE).format(**parts))
    return (
        SQL(_GUARD_BODY)
        .format(
            said=_SAID,
            may_write=MAY_WRITE_BY_NAME,
            setting=_MENTIONED,
            inserts=SQL("").join(inserts),
            updates=SQL("").join(updates),
        )
        .as_string(None)
    )
