"""Whether the data path logs in as a role of its own, which may do what it has to, and no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.gates import roles
from alphapulse_encryption.migration.gates.findings import Checked
from alphapulse_encryption.migration.postgres.database import Connection, Database
from alphapulse_encryption.migration.postgres.identity import elsewhere, identity
from alphapulse_encryption.migration.schema.data_path import written_columns
from alphapulse_encryption.migration.schema.definition import TableDefinition

_SUBJECT = "data path"


def as_data_path(
    connection: Connection,
    data_path: Database | None,
    tables: Sequence[Table],
    findings: list[Checked],
    stack: ExitStack,
) -> Connection:
    """A session of the role that writes rows; the given one where there is no other, or it does not matter.

    Args:
        findings: to which is added what is to be said of the role.
        stack: closes the session.
    """
    if data_path is None:
        return connection
    if data_path.variable == Database.variable:
        name = roles.current_role(connection)
        findings.append(
            Checked(
                "warning",
                _SUBJECT,
                f"ALPHAPULSE_WRITER_DATABASE_URL is not set: rows are read and written as {name}, and triggers, casts "
                "and checks of the tables run with all rights of that role. Give the data path a log-in of its own, a "
                "member of the group role writer that --roles-sql prints.",
            )
        )
        return connection
    try:
        writes = stack.enter_context(data_path.session("look at the data path's log-in"))
        if not identity(connection).same_database(identity(writes)):
            raise ConfigurationError(elsewhere(data_path))
    except MigrationError as error:
        findings.append(Checked("blocker", _SUBJECT, error.args[0]))
        return connection
    findings += _rights(writes, tables)
    return writes


# Rights of a role beyond what it reads and writes.
_TOO_MUCH = """
SELECT 'it is a superuser' FROM pg_roles WHERE rolname = current_user AND rolsuper
 UNION ALL
SELECT format('it is a member of %%s, which owns %%s', pg_get_userbyid(c.relowner), c.oid::regclass)
  FROM pg_class c WHERE c.oid = ANY (%(tables)s::regclass[]) AND pg_has_role(c.relowner, 'MEMBER')
 UNION ALL
SELECT format('it may create something in the schema %%I (REVOKE CREATE ON SCHEMA %%I FROM %%s)', nspname, nspname,
              CASE WHEN has_schema_privilege('public', oid, 'CREATE') THEN 'PUBLIC' ELSE quote_ident(current_user) END)
  FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp_' AND has_schema_privilege(oid, 'CREATE')
 UNION ALL
SELECT 'it may create schemas' WHERE has_database_privilege(current_database(), 'CREATE')
"""


def _rights(writes: Connection, tables: Sequence[Table]) -> Iterator[Checked]:
    name = roles.current_role(writes)
    named = [Identifier(table.schema_name, table.name).as_string(writes) for table in tables]
    there = writes.execute(
        "SELECT to_regclass(name)::text FROM unnest(%s::text[]) AS name WHERE to_regclass(name) IS NOT NULL",
        [named],
    )
    more = [what for (what,) in writes.execute(_TOO_MUCH, {"tables": [text for (text,) in there]})]
    if any(what == "it is a superuser" for what in more):
        more = more[:1]
    if more:
        yield Checked(
            "warning",
            _SUBJECT,
            f"the role {name}, which reads and writes rows, has more than it needs: {'; '.join(more)}. Code that runs "
            "in its sessions has it, too.",
        )
    missing = roles.missing_of_writer(writes) if bookkeeping_exists(writes) else ()
    if missing:
        yield Checked(
            "blocker",
            _SUBJECT,
            f"the role {name}, which reads and writes rows, lacks {roles.shortened(missing)}. Make it a member of the "
            "group role writer that --roles-sql prints.",
        )
    elif not more:
        yield Checked("ok", _SUBJECT, f"rows are read and written as {name}, which may do nothing else")


def may_write(writes: Connection, definition: TableDefinition) -> Iterator[Checked]:
    """What the role that writes rows lacks on a table."""
    name, table = roles.current_role(writes), definition.identifier.as_string(writes)
    ((reads, lacking, hidden),) = writes.execute(
        "SELECT has_table_privilege(c.oid, 'SELECT'), ARRAY(SELECT a.attname::text FROM pg_attribute a "
        " WHERE a.attrelid = c.oid AND a.attname = ANY (%s) AND NOT has_column_privilege(c.oid, a.attnum, 'UPDATE')), "
        "c.relrowsecurity AND NOT (SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user) "
        "  AND (c.relforcerowsecurity OR NOT pg_has_role(c.relowner, 'USAGE')) FROM pg_class c WHERE c.oid = %s",
        [written_columns(definition), definition.oid],
    ).fetchall()
    grants = [] if reads else ["SELECT"]
    grants += [f"UPDATE ({SQL(', ').join(map(Identifier, lacking)).as_string(writes)})"] if lacking else []
    if grants:
        to = Identifier(name).as_string(writes)
        yield Checked(
            "blocker",
            definition.table.key,
            f"the role {name}, which reads and writes rows, lacks {' and '.join(grants)}. Run again what --roles-sql "
            f"prints, or type: GRANT {', '.join(grants)} ON {table} TO {to};",
        )
    if hidden:
        yield Checked(
            "blocker",
            definition.table.key,
            f"row-level security would hide rows from {name}, which reads and writes them. As a superuser: ALTER ROLE "
            f"{Identifier(name).as_string(writes)} BYPASSRLS.",
        )
