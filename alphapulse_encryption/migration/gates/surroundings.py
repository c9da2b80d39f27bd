"""What a migration causes outside the catalogued columns: triggers, functions, privileges, and subscribers.

Told before anything is written. What the server knows to depend on the plaintext is in ``schema.dependants``.
"""

from __future__ import annotations

from collections.abc import Iterator

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.migration.gates.findings import Checked
from alphapulse_encryption.migration.postgres.database import WRITER, WRITER_SETTING, Connection
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.schema.sql import GUARDS

# By the bits of tgtype (src/include/catalog/pg_trigger.h): for each row (1), on update (16). One that is for some
# columns fires for a statement that names one of them; ours name the encrypted columns and those of tokens.
_FIRING = """
SELECT DISTINCT t.tgname, p.oid::regproc::text
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = ANY(%(tables)s) AND NOT t.tgisinternal AND t.tgenabled IN ('O', 'A') AND t.tgname !~ %(guards)s
   AND t.tgtype & 17 = 17 AND (t.tgqual IS NULL OR pg_get_triggerdef(t.oid) !~ %(setting)s)
   AND (cardinality(t.tgattr::int2[]) = 0 OR EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = t.tgrelid AND a.attnum = ANY(t.tgattr::int2[])
           AND a.attname = ANY(%(columns)s)))
 ORDER BY 1
"""

_PUBLISHED = """
SELECT DISTINCT p.pubname FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE c.oid = ANY(%s) ORDER BY 1
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
SELECT a.attname, coalesce(r.rolname, 'PUBLIC'), string_agg(DISTINCT x.privilege_type, ', ')
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid CROSS JOIN aclexplode(a.attacl) x
  LEFT JOIN pg_roles r ON r.oid = x.grantee
 WHERE c.oid = %(table)s AND a.attname = ANY(%(columns)s) AND x.grantee <> c.relowner
   AND (x.grantee = 0 OR NOT has_table_privilege(x.grantee, c.oid, x.privilege_type))
 GROUP BY a.attnum, 1, 2 ORDER BY a.attnum, 2
"""

_UNREAD_SLOTS = """
SELECT slot_name FROM pg_replication_slots
 WHERE NOT active AND coalesce(wal_status, '') <> 'lost' AND coalesce(database, current_database()) = current_database()
 ORDER BY 1
"""


def around_table(connection: Connection, definition: TableDefinition) -> Iterator[Checked]:
    """What writes to the table set off: each trigger that fires for every row, and each publication."""
    table = definition.table
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    written = [name for column in table.columns for name in (column.encrypted, column.search)]
    values = {"tables": parts, "guards": GUARDS, "setting": WRITER_SETTING, "columns": written}
    for name, function in connection.execute(_FIRING, values):
        disable = SQL("ALTER TABLE {} DISABLE TRIGGER {}").format(definition.identifier, Identifier(name))
        yield Checked(
            "warning",
            table.key,
            f"the trigger {name} (function {function}) fires for every row that the backfill, a rotation or a repair "
            "writes: a last-modified column that it sets, a copy of the row that it keeps, plaintext included, or a "
            f"write that it skips happens for all of them. Disable it meanwhile ({disable.as_string(connection)}), or "
            f"let its WHEN pass over them: current_setting('{WRITER_SETTING}', true) IS DISTINCT FROM '{WRITER}'.",
        )
    asked = {"table": definition.oid, "columns": [column.name for column in definition.plaintext_columns]}
    for function, columns in connection.execute(_READING, asked):
        yield Checked(
            "warning",
            table.key,
            f"the function {function} names the table and {columns} in its text. Where it reads those columns, it "
            "misses what is written as ciphertext from the switch on, and fails after the drop: change it before.",
        )
    derived = {column.name: column.derived for column in table.columns}
    for column, role, privileges in connection.execute(_BY_COLUMN, asked):
        yield Checked(
            "warning",
            f"{table.key}.{column}",
            f"{role} has {privileges} on this column and not on the table: grant the same on "
            f"{' and '.join(derived[column])} after add_encrypted_columns, before an application that uses them.",
        )
    publications = [name for (name,) in connection.execute(_PUBLISHED, [parts])]
    if publications:
        yield Checked(
            "warning",
            table.key,
            f"is published by {', '.join(publications)}: a subscriber whose table lacks the new columns stops at the "
            "first row that is written. Add them to each subscriber first, without a guard (the ALTER TABLE … ADD "
            "COLUMN of --plan). The backfill sends every row once more.",
        )


def around_server(connection: Connection) -> Iterator[Checked]:
    """What keeps the write-ahead log of all our writes."""
    for (name,) in connection.execute(_UNREAD_SLOTS):
        yield Checked(
            "warning",
            "replicas",
            f"the replication slot {name} is read by nobody: the server keeps for it all that the migration writes to "
            "the write-ahead log. Let its reader go on, or drop it (SELECT pg_drop_replication_slot(…)).",
        )
