"""The data path's own log-in: which columns of a table it may write. Everything else of its rights is in ``roles``."""

from __future__ import annotations

from psycopg.sql import SQL, Composed, Identifier

from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.schema.definition import TableDefinition

# A migrator may write ranges, the data path's role some of their columns alone: by that it is known, whatever its name.
_LACKING = """
SELECT r.rolname, array_agg(t.attname::text ORDER BY t.attnum)
  FROM pg_attribute a CROSS JOIN aclexplode(a.attacl) x JOIN pg_roles r ON r.oid = x.grantee
  JOIN pg_attribute t ON t.attrelid = %s AND t.attname = ANY (%s)
 WHERE a.attrelid = to_regclass('alphapulse_encryption.ranges') AND a.attname = 'position'
   AND x.privilege_type = 'UPDATE' AND NOT has_column_privilege(r.oid, t.attrelid, t.attnum, 'UPDATE')
 GROUP BY 1 ORDER BY 1
"""


def written_columns(definition: TableDefinition) -> list[str]:
    """The columns that the data path writes: plaintext, ciphertexts and tokens, as far as they are there."""
    names = [name for column in definition.table.columns for name in (column.name, *column.derived)]
    return [name for name in names if name in definition.columns]


def let_write(connection: Connection, definition: TableDefinition) -> None:
    """Give the data path's role what it lacks on columns of the table that were added."""
    for statement in grants(connection, definition):
        connection.execute(statement)


def grants(connection: Connection, definition: TableDefinition) -> list[Composed]:
    """The statements for that."""
    lacking = connection.execute(_LACKING, [definition.oid, written_columns(definition)])
    return [
        SQL("GRANT UPDATE ({}) ON {} TO {}").format(
            SQL(", ").join(map(Identifier, names)), definition.identifier, Identifier(role)
        )
        for role, names in lacking
    ]
