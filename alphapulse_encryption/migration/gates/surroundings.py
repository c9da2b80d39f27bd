"""What a migration causes outside the catalogued columns: triggers, functions, privileges, and subscribers.

Told before anything is written. What the server knows to depend on the plaintext is in ``schema.dependants``.
"""

from __future__ import annotations

from collections.abc import Iterator

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.migration.gates import roles
from alphapulse_encryption.migration.gates.findings import Checked
from alphapulse_encryption.migration.postgres.database import (
    SET_PRIVILEGES,
    WRITER,
    WRITER_SETTING,
    Connection,
    may_pass_over_triggers,
)
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.schema.triggers import set_off

# A list of columns is known to a publication of its own table from PostgreSQL 15 on. A statement that adds to it there
# is not: the table is taken out and put in again.
_PUBLISHED = """
SELECT DISTINCT p.pubname, (
       SELECT format('BEGIN; ALTER PUBLICATION %%1$I DROP TABLE %%2$s; ALTER PUBLICATION %%1$I ADD TABLE %%2$s (%%3$s)'
                     '%%4$s; COMMIT', p.pubname, c.oid::regclass,
                     (SELECT string_agg(format('%%I', name), ', ') FROM (
                             SELECT attname FROM pg_attribute WHERE attrelid = c.oid
                                AND to_jsonb(r) -> 'prattrs' @> to_jsonb(attnum)
                              UNION ALL SELECT unnest(%(new)s::name[])) AS a (name)),
                     ' WHERE (' || (to_jsonb(p) ->> 'rowfilter') || ')')
         FROM pg_publication l JOIN pg_publication_rel r ON r.prpubid = l.oid
        WHERE l.pubname = p.pubname AND r.prrelid = c.oid AND to_jsonb(r) ->> 'prattrs' IS NOT NULL)
  FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE c.oid = ANY(%(parts)s) ORDER BY 1
"""

_RECEIVED = """
SELECT DISTINCT s.subname FROM pg_subscription_rel r JOIN pg_subscription s ON s.oid = r.srsubid
 WHERE r.srrelid = ANY(%s) ORDER BY 1
"""

# No dependency says what a function reads that is kept as text: one that has both names in it may read the column.
_READING = """
SELECT p.oid::regprocedure::text, string_agg(DISTINCT a.attname, ', ')
  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace JOIN pg_language l ON l.oid = p.prolang
  JOIN pg_class c ON c.oid = %(table)s JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = ANY(%(columns)s)
 WHERE l.lanname NOT IN ('internal', 'c') AND p.prosqlbody IS NULL
   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'alphapulse_encryption')
   AND p.proname !~ '^encryption_(guard|report)_'
   AND NOT EXISTS (SELECT FROM pg_depend d
                    WHERE d.classid = 'pg_proc'::regclass AND d.objid = p.oid AND d.deptype = 'e')
   AND NOT EXISTS (SELECT FROM unnest(ARRAY[c.relname, a.attname]) AS w (word)
                    WHERE p.prosrc !~ ('(?i)(?<!\\w)' || regexp_replace(w.word, '(\\W)', '\\\\\\1', 'g') || '(?!\\w)'))
 GROUP BY 1 ORDER BY 1
"""

# Of a role that has none of this on the table, an instance that uses the encrypted columns is refused.
_BY_COLUMN = """
SELECT a.attname, coalesce(quote_ident(r.rolname), 'PUBLIC'), array_agg(DISTINCT x.privilege_type)
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid CROSS JOIN aclexplode(a.attacl) x
  LEFT JOIN pg_roles r ON r.oid = x.grantee
 WHERE c.oid = %(table)s AND a.attname = ANY(%(columns)s) AND x.grantee <> c.relowner
   AND NOT EXISTS (SELECT FROM pg_attribute w CROSS JOIN aclexplode(w.attacl) y WHERE y.grantee = x.grantee
                      AND w.attrelid = to_regclass('alphapulse_encryption.ranges') AND y.privilege_type = 'UPDATE')
   AND (x.grantee = 0 OR NOT has_table_privilege(x.grantee, c.oid, x.privilege_type))
 GROUP BY a.attnum, 1, 2 ORDER BY a.attnum, 2
"""

# A key that the server does not check for NULL.
_REFERRING = """
SELECT c.conname, c.confrelid::regclass::text, string_agg(a.attname, ', ' ORDER BY a.attnum)
  FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)
 WHERE c.conrelid = ANY(%(parts)s) AND c.conparentid = 0 AND c.contype = 'f' AND a.attname = ANY(%(columns)s)
 GROUP BY c.oid ORDER BY 1
"""

# A row that one of them refuses is refused with every write to it, whatever that changes. One that is not enforced
# (from PostgreSQL 18 on) refuses none.
_NOT_VALID = """
SELECT c.conname, c.conrelid::regclass::text, quote_ident(c.conname) FROM pg_constraint c
 WHERE c.conrelid = ANY(%(parts)s) AND c.coninhcount = 0 AND c.contype IN ('c', 'n') AND NOT c.convalidated
   AND c.conname <> ALL(%(ours)s) AND to_jsonb(c) ->> 'conenforced' IS DISTINCT FROM 'false' ORDER BY 1, 2
"""

_UNREAD_SLOTS = """
SELECT slot_name, quote_literal(slot_name) FROM pg_replication_slots
 WHERE NOT active AND coalesce(wal_status, '') <> 'lost' AND coalesce(database, current_database()) = current_database()
 ORDER BY 1
"""


def around_table(
    connection: Connection, definition: TableDefinition, writes: Connection
) -> Iterator[Checked]:
    """What writes to the table set off: each trigger that fires for every row, and each publication.

    Args:
        writes: a session of the role that writes rows.
    """
    table = definition.table
    yield from _set_off(connection, definition, writes)
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    plaintext = [column.name for column in definition.plaintext_columns]
    asked = {"table": definition.oid, "parts": parts, "columns": plaintext}
    for function, columns in connection.execute(_READING, asked):
        yield Checked(
            "warning",
            table.key,
            f"the function {function} names the table and {columns} in its text. Where it reads those columns, it "
            "misses what is written as ciphertext from the switch on, and fails after the drop: change it before "
            f"(SELECT pg_get_functiondef('{function}'::regprocedure) shows it).",
        )
    checks = {"parts": parts, "ours": saved_ddl.our_names(table)}
    for name, relation, quoted in connection.execute(_NOT_VALID, checks):
        yield Checked(
            "warning",
            table.key,
            f"the constraint {name} is NOT VALID: a row that it refuses cannot be written at all, so the backfill sets "
            f"it aside, and the table is not verified. Correct such rows and type ALTER TABLE {relation} "
            f"VALIDATE CONSTRAINT {quoted}, or drop it.",
        )
    derived = {column.name: column.derived for column in table.columns}
    for column, role, privileges in connection.execute(_BY_COLUMN, asked):
        new = SQL(", ").join(map(Identifier, derived[column])).as_string(connection)
        grant = ", ".join(f"{privilege} ({new})" for privilege in privileges)
        yield Checked(
            "warning",
            f"{table.key}.{column}",
            f"{role} has {', '.join(privileges)} on this column and not on the table: grant the same after "
            "--add-columns, before an application that uses them "
            f"(GRANT {grant} ON {definition.identifier.as_string(connection)} TO {role}).",
        )
    for name, other, columns in connection.execute(_REFERRING, asked):
        yield Checked(
            "warning",
            table.key,
            f"the foreign key {name} passes every row whose {columns} is NULL: what is written as ciphertext alone "
            f"from the switch on is not checked, and nothing keeps the row of {other} that it means. Let the "
            f"application look there, or take {columns} out of the catalogue.",
        )
    yield from _replicated(connection, definition, parts)


def _replicated(connection: Connection, definition: TableDefinition, parts: list[int]) -> Iterator[Checked]:
    """What the columns to come, and every row written once more, mean to subscribers, and to this one."""
    table = definition.table
    derived = [name for column in table.columns for name in column.derived]
    names = [name for name in derived if name not in definition.columns]
    published = connection.execute(_PUBLISHED, {"parts": parts, "new": names}).fetchall()
    columns = SQL(", ").join(SQL("ADD COLUMN {} text").format(Identifier(name)) for name in names)
    add = SQL("ALTER TABLE {} {};").format(definition.identifier, columns).as_string(connection)
    if whole := [name for name, renew in published if renew is None]:
        first = f" Type there first: {add}" if names else ""
        yield Checked(
            "warning",
            table.key,
            f"is published by {', '.join(whole)}: a subscriber whose table lacks the new columns stops at the first "
            f"row that is written.{first} The backfill sends every row once more, about "
            f"{definition.total_bytes // 2**20:,} MiB and the ciphertext. What was dropped here stays at the "
            "subscriber: drop its plaintext columns after the drop, too.",
        )
    for name, renew in published:
        if renew is not None:
            yield Checked(
                "warning",
                table.key,
                f"is published by {name} with a list of columns: subscribers get no ciphertext, and NULL for what is "
                "written as ciphertext alone from the switch on. Add the columns at each subscriber, and to the list "
                f"after --add-columns ({renew}). A plaintext column in the list stops its drop.",
            )
    for (name,) in connection.execute(_RECEIVED, [parts]):
        subscription = Identifier(name).as_string(connection)
        yield Checked(
            "warning",
            table.key,
            f"receives rows by the subscription {name}: what it writes is pending until the backfill has encrypted it, "
            "and from the switch on its plaintext stays beside no ciphertext. It stops at the first row after a drop. "
            f"Encrypt at the publisher, or end it before the switch (ALTER SUBSCRIPTION {subscription} DISABLE).",
        )


def _set_off(connection: Connection, definition: TableDefinition, writes: Connection) -> Iterator[Checked]:
    """The triggers and rules that writes of ciphertext alone set off, where those cannot pass over them."""
    table = definition.table
    found = set_off(connection, definition, [name for column in table.columns for name in column.derived])
    may, always = may_pass_over_triggers(writes), [one for one in found if one.fires_anyway]
    if may and not always:
        for one in set_off(connection, definition, [column.name for column in definition.plaintext_columns]):
            yield Checked(
                "warning",
                table.key,
                f"{one.named} ({one.runs}) fires for every row whose plaintext a revert or a restore brings back: a "
                "last-modified column that it sets, or a copy of the row that it keeps, plaintext included, is written "
                f"for all of them. Disable it then ({one.disable(connection)}). Other steps pass over it.",
            )
        return
    # Who only looks is told what the one who migrates needs.
    takes_part = writes is not connection or roles.may_write_bookkeeping(connection)
    migrator = roles.current_role(writes) if takes_part else f"{roles.DEFAULT_PREFIX}migrator"
    grant = SQL("GRANT SET ON PARAMETER session_replication_role TO {}").format(Identifier(migrator))
    way = "Disable"
    if always:
        names = ", ".join(one.name for one in always)
        way = (
            f"Because {names} is ENABLE ALWAYS or REPLICA, or keeps rows from being written (RETURN NULL), our writes "
            "pass over no trigger of the table. Disable"
        )
    elif connection.info.server_version >= SET_PRIVILEGES:
        way = f"Let our writes pass over it ({grant.as_string(connection)}), or disable"
    for one in found:
        if one.enabled == "R":
            continue
        what = (
            "a last-modified column that it sets, a copy of the row that it keeps, plaintext included, or a write that "
            "it skips happens for all of them"
        )
        disable = one.disable(connection)
        if one.kind == "trigger":
            disable += (
                "), or let its WHEN pass over them (current_setting("
                f"'{WRITER_SETTING}', true) IS DISTINCT FROM '{WRITER}'"
            )
        yield Checked(
            "blocker" if one.replaces else "warning",
            table.key,
            f"{one.named} ({one.runs}) fires for every row that the backfill, a rotation or a repair writes: "
            f"{'nothing is written' if one.replaces else what}. {way} it meanwhile ({disable}).",
        )


# Of those that are no extension's, and whose function sets no search path of its own.
_EVENT_TRIGGERS = """
SELECT e.evtname, p.oid::regprocedure::text, current_setting('alphapulse_encryption.search_path')
  FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid
 WHERE e.evtenabled IN ('O', 'A') AND coalesce(p.proconfig::text, '') !~ 'search_path='
   AND NOT EXISTS (SELECT FROM pg_depend d
                    WHERE d.classid = 'pg_event_trigger'::regclass AND d.objid = e.oid AND d.deptype = 'e')
 ORDER BY 1
"""


def around_server(connection: Connection) -> Iterator[Checked]:
    """What definitions that we change set off, and what keeps the write-ahead log of all our writes."""
    for name, function, path in connection.execute(_EVENT_TRIGGERS):
        yield Checked(
            "warning",
            "event triggers",
            f"the event trigger {name} fires when a step changes a definition, with pg_catalog alone as its search "
            "path: what it refuses, or does not find, ends the step. Where its function names anything without a "
            f"schema, give it a search path of its own (ALTER FUNCTION {function} SET search_path = {path}).",
        )
    for name, quoted in connection.execute(_UNREAD_SLOTS):
        yield Checked(
            "warning",
            "replicas",
            f"the replication slot {name} is read by nobody: the server keeps for it all that the migration writes to "
            f"the write-ahead log. Let its reader go on, or drop it (SELECT pg_drop_replication_slot({quoted})).",
        )
