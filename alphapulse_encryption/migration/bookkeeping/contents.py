"""What stands in the database under the bookkeeping's names, object by object, as text to be compared by.

The comparison is one query, so that a script for psql asks the same in the moment that it is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from psycopg.sql import SQL, Composable, Composed, Literal

from alphapulse_encryption.migration.postgres.database import Connection

# By kind and name of an object: its definition.
Definition = Mapping[str, str]


class Object(NamedTuple):
    """One of them; of a part of a table, the owner is the table's."""

    definition: str
    owner: str


# Parts of it are worded by the server in another way from version to version: views name their columns' tables before
# PostgreSQL 16, and NOT NULL is a constraint since 18. The first is taken out below, the second told of the column.
# What is told only where it is not as usual leaves the text of all others as it is.
_OBJECTS = SQL(r"""
WITH relation AS (
    SELECT c.*, n.nspname || '.' || c.relname AS name, pg_get_userbyid(c.relowner)::text AS owner
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE (c.relkind IN ('r', 'p', 'v', 'm', 'f', 'c') OR c.relkind = 'S' AND NOT EXISTS (
            SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'i'))
       AND (n.nspname = {schema} OR n.nspname || '.' || c.relname = ANY ({names}))),
function AS (
    SELECT p.*, n.nspname || '.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS name,
           pg_get_userbyid(p.proowner)::text AS owner
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE n.nspname = {schema} OR n.nspname || '.' || p.proname = ANY ({names}))
SELECT 'relation ' || name AS name, regexp_replace(btrim(regexp_replace(
       concat_ws(' ', relkind, relpersistence, CASE WHEN relrowsecurity THEN 'row security' END,
                 CASE WHEN relforcerowsecurity THEN 'forced' END,
                 CASE WHEN relhassubclass THEN 'inherited' END,
                 CASE WHEN EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = relation.oid) THEN 'inherits' END,
                 'of ' || nullif(reloftype, 0)::regtype,
                 CASE WHEN relkind = 'v' THEN 'with ' || array_to_string(reloptions, ' ') END,
                 CASE WHEN relkind = 'v' THEN pg_get_viewdef(oid) END),
       '\s+', ' ', 'g')), '(?<!\.)\m(columns|tables)\.', '', 'g') AS definition, owner
  FROM relation
UNION ALL
SELECT format('column %s.%s', r.name, a.attname),
       concat_ws(' ', format_type(a.atttypid, a.atttypmod),
                 'collate ' || nullif(a.attcollation, t.typcollation)::regcollation,
                 CASE WHEN a.attnotnull THEN 'not null' END,
                 CASE WHEN a.attidentity <> '' THEN 'identity ' || a.attidentity::text END,
                 CASE WHEN a.attgenerated <> '' THEN 'generated' END,
                 'default ' || pg_get_expr(d.adbin, d.adrelid)), r.owner
  FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
  JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = r.oid AND d.adnum = a.attnum WHERE r.relkind = 'r'
UNION ALL
SELECT format('constraint %s on %s', k.conname, r.name),
       pg_get_constraintdef(k.oid) || CASE WHEN k.convalidated THEN '' ELSE ' not valid' END, r.owner
  FROM relation r JOIN pg_constraint k ON k.conrelid = r.oid WHERE k.contype NOT IN ('n', 't')
UNION ALL
SELECT format('index %s on %s', i.relname, r.name), pg_get_indexdef(i.oid), r.owner
  FROM relation r JOIN pg_index x ON x.indrelid = r.oid JOIN pg_class i ON i.oid = x.indexrelid
 WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.oid)
UNION ALL
SELECT format('statistics %s on %s', s.stxname, r.name), '', r.owner
  FROM relation r JOIN pg_statistic_ext s ON s.stxrelid = r.oid
UNION ALL
SELECT format('trigger %s on %s', t.tgname, r.name),
       pg_get_triggerdef(t.oid) || CASE WHEN t.tgenabled = 'O' THEN '' ELSE ' ' || t.tgenabled::text END, r.owner
  FROM relation r JOIN pg_trigger t ON t.tgrelid = r.oid AND NOT t.tgisinternal
UNION ALL
SELECT format('rule %s on %s', w.rulename, r.name), pg_get_ruledef(w.oid), r.owner
  FROM relation r JOIN pg_rewrite w ON w.ev_class = r.oid AND w.rulename <> '_RETURN'
UNION ALL
SELECT format('policy %s on %s', p.polname, r.name), '', r.owner
  FROM relation r JOIN pg_policy p ON p.polrelid = r.oid
UNION ALL
SELECT 'function ' || name, encode(sha256(convert_to(
       concat_ws(' ', pg_get_function_arguments(oid), 'returns ' || prorettype::regtype, prokind,
                 (SELECT lanname FROM pg_language l WHERE l.oid = prolang),
                 CASE WHEN prosecdef THEN 'security definer' END,
                 CASE WHEN proleakproof THEN 'leakproof' END,
                 CASE WHEN proisstrict THEN 'strict' END,
                 CASE WHEN provolatile <> 'v' THEN 'volatility ' || provolatile::text END,
                 CASE WHEN proparallel <> 'u' THEN 'parallel ' || proparallel::text END,
                 array_to_string(proconfig, ' '), prosrc), 'UTF8')), 'hex'), owner
  FROM function
UNION ALL
SELECT format('%s %s', o.type, o.identity), '', {owner}
  FROM pg_namespace n JOIN pg_depend d ON d.refclassid = 'pg_namespace'::regclass AND d.refobjid = n.oid
 CROSS JOIN LATERAL pg_identify_object(d.classid, d.objid, 0) o
 WHERE n.nspname = {schema} AND d.classid NOT IN ('pg_class'::regclass, 'pg_proc'::regclass)
""")

# Also asked in PL/pgSQL, which has a variable "found".
_DIFFERENCES = SQL("""
WITH present AS ({objects}),
wanted AS (SELECT key AS name, value AS definition FROM json_each_text({wanted})),
both_sides AS (
    SELECT coalesce(p.name, w.name) AS name, p.owner, p.definition AS made, w.definition AS to_be
      FROM present p FULL JOIN wanted w ON w.name = p.name),
parts AS (
    SELECT *, CASE WHEN name LIKE 'column %' THEN regexp_replace(substr(name, 8), '[.][^.]*$', '')
                   ELSE substring(name FROM ' on ([^ ]+)$') END AS part_of FROM both_sides)
SELECT name,
       CASE WHEN made IS NULL THEN 'is missing'
            WHEN to_be IS NULL THEN 'is not ours'
            WHEN made <> to_be THEN 'is another one than this program makes'
            ELSE format('belongs to %s and not to %s', owner, {owner}) END AS how,
       made IS NULL OR owner = {owner} AS mine
  FROM parts
 WHERE (made IS DISTINCT FROM to_be OR name ~ '^(relation|function) ' AND owner <> {owner})
   AND NOT (made IS NULL AND EXISTS (
        SELECT FROM both_sides t WHERE t.name = 'relation ' || parts.part_of AND t.made IS NULL))
 ORDER BY name
""")

# The server names what is not in its search path with the schema; so nothing of ours is to be in it.
_ALONE = "SELECT set_config('search_path', 'pg_catalog', true)"


class Difference(NamedTuple):
    """How an object differs from what it is to be.

    Args:
        mine: whether it belongs to the owner that was asked for, or is missing.
    """

    name: str
    how: str
    mine: bool


def _objects(schema: str, names: Iterable[str], owner: Composable) -> Composed:
    return _OBJECTS.format(schema=Literal(schema), names=Literal(list(names)), owner=owner)


def differing(schema: str, names: Iterable[str], wanted: Definition, owner: Composable) -> Composed:
    """A query for everything that is not as it is wanted: name, how it differs, whether it is the owner's.

    To be asked with nothing but ``pg_catalog`` in the search path.

    Args:
        names: of relations and functions outside of the schema, each with its schema before it.
        owner: of all of it, as an expression.
    """
    objects = _objects(schema, names, owner)
    return _DIFFERENCES.format(objects=objects, wanted=Literal(json.dumps(wanted)), owner=owner)


def differences(
    connection: Connection, schema: str, names: Iterable[str], wanted: Definition, owner: str
) -> tuple[Difference, ...]:
    """What is not as it is wanted, and how."""
    with connection.transaction(force_rollback=True):
        connection.execute(_ALONE)
        found = connection.execute(differing(schema, names, wanted, Literal(owner)))
        return tuple(Difference(*row) for row in found)


def read_objects(connection: Connection, schema: str, names: Iterable[str]) -> dict[str, Object]:
    """Everything in a schema, and everything of some names elsewhere, by kind and name.

    Args:
        names: as for :func:`differing`.
    """
    with connection.transaction(force_rollback=True):
        connection.execute(_ALONE)
        rows = connection.execute(_objects(schema, names, Literal(""))).fetchall()
    return {name: Object(definition, owner) for name, definition, owner in rows}
