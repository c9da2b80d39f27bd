"""The application's triggers and rules that an UPDATE of ours sets off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import LiteralString

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.migration.postgres.database import WRITER_SETTING, Connection, answer
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.schema.sql import GUARDS


@dataclass(frozen=True)
class SetOff:
    """A trigger or rule.

    Args:
        kind: ``trigger`` or ``rule``.
        table: that it is on, a partition's included.
        enabled: in which sessions: ``O`` in the usual ones, ``R`` in those that fire no triggers, ``A`` in all.
        runs: its function or its command, and when, for a message.
        refuses: whether it may keep a row from being written as it was to be.
        protects: whether its text keeps rows from being written, as those of archives and closed accounts.
        replaces: whether the UPDATE itself is not executed.
    """

    kind: str
    name: str
    table: Identifier
    enabled: str
    runs: str
    refuses: bool
    protects: bool
    replaces: bool

    @property
    def fires_anyway(self) -> bool:
        """Whether no write of ours passes over it: it fires in every session, or only a person may lift it."""
        return self.enabled in "AR" or self.protects

    @property
    def named(self) -> str:
        return f"the {self.kind} {self.name}"

    def disable(self, connection: Connection) -> str:
        """The command that passes over it, the application's writes included."""
        words = SQL("DISABLE TRIGGER" if self.kind == "trigger" else "DISABLE RULE")
        return (
            SQL("ALTER TABLE {} {} {}").format(self.table, words, Identifier(self.name)).as_string(connection)
        )


# By the bits of tgtype (src/include/catalog/pg_trigger.h): for each row (1), before (2), on update (16). One that is
# for some columns fires for a statement that names one of them; one for statements fires on the table that is named.
_SET_OFF = r"""
SELECT DISTINCT ON (kind, name, runs, enabled)
       kind, name, nspname, relname, enabled, runs, refuses, protects, replaces FROM (
SELECT 'trigger' AS kind, t.tgname AS name, t.tgrelid AS relid, t.tgenabled AS enabled,
       format('function %%s, %%s UPDATE%%s for each %%s%%s', p.oid::regproc,
              CASE WHEN t.tgtype & 2 = 2 THEN 'before an' ELSE 'after an' END,
              CASE WHEN cardinality(t.tgattr::int2[]) > 0 THEN ' of some columns' ELSE '' END,
              CASE WHEN t.tgtype & 1 = 1 THEN 'row' ELSE 'statement' END,
              CASE WHEN t.tgqual IS NOT NULL THEN ' that its WHEN lets through' ELSE '' END) AS runs,
       t.tgtype & 3 = 3 AS refuses, t.tgtype & 3 = 3 AND p.prosrc ~* '\mRETURN\s+NULL\M' AS protects, false AS replaces
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid
 WHERE t.tgrelid = ANY(%(tables)s) AND NOT t.tgisinternal AND t.tgname !~ %(guards)s
   AND t.tgtype & 16 = 16 AND (t.tgtype & 1 = 1 OR t.tgrelid = %(table)s)
   AND (t.tgqual IS NULL OR pg_get_triggerdef(t.oid) !~ %(setting)s)
   AND (cardinality(t.tgattr::int2[]) = 0 OR EXISTS (
        SELECT FROM pg_attribute a WHERE a.attrelid = t.tgrelid AND a.attnum = ANY(t.tgattr::int2[])
           AND a.attname = ANY(%(columns)s)))
 UNION ALL
SELECT 'rule', r.rulename, r.ev_class, r.ev_enabled,
       CASE WHEN r.is_instead THEN 'in place of an UPDATE' ELSE 'with each UPDATE' END,
       r.is_instead, false, r.is_instead
  FROM pg_rewrite r WHERE r.ev_class = %(table)s AND r.ev_type = '2') AS found
  JOIN pg_class c ON c.oid = found.relid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE enabled <> 'D'
 ORDER BY kind, name, runs, enabled, array_position(%(tables)s, found.relid)
"""


# A tenth of a millisecond for each batch. The UPDATE itself looks, so that nobody can make one in between. The
# application's search path may be set.
_VERSION: LiteralString = """
(SELECT coalesce(pg_catalog.sum(version), 0)
   FROM (SELECT xmin::text::bigint + oid::bigint FROM pg_catalog.pg_trigger WHERE tgrelid = ANY ({tables})
          UNION ALL
         SELECT xmin::text::bigint + oid::bigint FROM pg_catalog.pg_rewrite WHERE ev_class = ANY ({tables}))
         AS s (version))
"""


@dataclass(frozen=True)
class Version:
    """The triggers and rules of a table and its partitions as they were at one moment.

    Args:
        tables: their oids, as an array's text.
        number: another one once a trigger or rule is made, changed or dropped.
    """

    tables: str
    number: str

    # Takes :attr:`parameters`.
    is_so = SQL("({} = %s::numeric)").format(SQL(_VERSION).format(tables=SQL("%s::oid[]")))

    @property
    def parameters(self) -> tuple[str, str, str]:
        return self.tables, self.tables, self.number

    def still(self, connection: Connection) -> bool:
        """Whether they are what they were."""
        return bool(answer(connection, SQL("SELECT {}").format(self.is_so), *self.parameters))


def version(connection: Connection, definition: TableDefinition) -> Version:
    """To be asked for before :func:`set_off`, so that nothing comes in between."""
    tables = f"{{{','.join(str(part.oid) for part in read_parts(connection, definition.oid))}}}"
    query = SQL("SELECT {}::text").format(SQL(_VERSION).format(tables=SQL("%s::oid[]")))
    return Version(tables, answer(connection, query, tables, tables))


def set_off(
    connection: Connection, definition: TableDefinition, columns: Sequence[str]
) -> tuple[SetOff, ...]:
    """What an UPDATE of these columns may set off on the table and its partitions, whatever the session is."""
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    values = {
        "tables": parts,
        "table": definition.oid,
        "guards": GUARDS,
        "setting": WRITER_SETTING,
        "columns": list(columns),
    }
    found = connection.execute(_SET_OFF, values)
    return tuple(
        SetOff(kind, name, Identifier(schema, table), *rest) for kind, name, schema, table, *rest in found
    )


def fire_anyway(found: Sequence[SetOff]) -> bool:
    """Whether some fire all the same, so that the session has to be a usual one.

    What one that is ENABLE ALWAYS does to the plaintext, nobody would see in a session without the others.
    """
    return any(one.fires_anyway for one in found)
