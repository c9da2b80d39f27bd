"""What our writes to a table cause outside its catalogued columns: the application's triggers, and subscribers.

Told before anything is written. What depends on the plaintext being there is in ``schema.dependants``.
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
