"""What stands in the database under the bookkeeping's names, object by object, as text to be compared by."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from alphapulse_encryption.migration.postgres.database import Connection

# By kind and name of an object: its definition.
Definition = Mapping[str, str]
# What nobody but us makes on a table of ours, because it would run, or bind, where we write.
NEVER_MORE = ("trigger ", "rule ", "policy ", "column ", "constraint ")


class Object(NamedTuple):
    """One of them; of a part of a table, the owner is the table's."""

    definition: str
    owner: str


# Parts of it are worded by the server in another way from version to version: views name their columns' tables before
# PostgreSQL 16, and NOT NULL is a constraint since 18. The first is taken out below, the second told of the column.
_OBJECTS = """
WITH relation AS (
    SELECT c.*, n.nspname || '.' || c.relname AS name, pg_get_userbyid(c.relowner)::text AS owner
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f')
       AND (n.nspname = %(schema)s OR n.nspname || '.' || c.relname = ANY (%(names)s))),
function AS (
    SELECT p.*, n.nspname || '.' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')' AS name,
           pg_get_userbyid(p.proowner)::text AS owner
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE n.nspname = %(schema)s OR n.nspname || '.' || p.proname = ANY (%(names)s))
SELECT 'relation ' || name,
       concat_ws(' ', relkind, relpersistence, CASE WHEN relrowsecurity THEN 'row security' END,
                 CASE WHEN relhassubclass THEN 'inherited' END,
                 CASE WHEN EXISTS (SELECT FROM pg_inherits i WHERE i.inhrelid = relation.oid) THEN 'inherits' END,
                 CASE WHEN relkind = 'v' THEN pg_get_viewdef(oid) END), owner
  FROM relation
UNION ALL
SELECT format('column %%s.%%s', r.name, a.attname),
       concat_ws(' ', format_type(a.atttypid, a.atttypmod), CASE WHEN a.attnotnull THEN 'not null' END,
                 CASE WHEN a.attidentity <> '' THEN 'identity ' || a.attidentity::text END,
                 CASE WHEN a.attgenerated <> '' THEN 'generated' END,
                 'default ' || pg_get_expr(d.adbin, d.adrelid)), r.owner
  FROM relation r JOIN pg_attribute a ON a.attrelid = r.oid AND a.attnum > 0 AND NOT a.attisdropped
  LEFT JOIN pg_attrdef d ON d.adrelid = r.oid AND d.adnum = a.attnum WHERE r.relkind = 'r'
UNION ALL
SELECT format('constraint %%s on %%s', k.conname, r.name),
       pg_get_constraintdef(k.oid) || CASE WHEN k.convalidated THEN '' ELSE ' not valid' END, r.owner
  FROM relation r JOIN pg_constraint k ON k.conrelid = r.oid WHERE k.contype NOT IN ('n', 't')
UNION ALL
SELECT format('index %%s on %%s', i.relname, r.name), pg_get_indexdef(i.oid), r.owner
  FROM relation r JOIN pg_index x ON x.indrelid = r.oid JOIN pg_class i ON i.oid = x.indexrelid
 WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = i.oid)
UNION ALL
SELECT format('trigger %%s on %%s', t.tgname, r.name),
       pg_get_triggerdef(t.oid) || CASE WHEN t.tgenabled = 'O' THEN '' ELSE ' ' || t.tgenabled::text END, r.owner
  FROM relation r JOIN pg_trigger t ON t.tgrelid = r.oid AND NOT t.tgisinternal
UNION ALL
SELECT format('rule %%s on %%s', w.rulename, r.name), pg_get_ruledef(w.oid), r.owner
  FROM relation r JOIN pg_rewrite w ON w.ev_class = r.oid AND w.rulename <> '_RETURN'
UNION ALL
SELECT format('policy %%s on %%s', p.polname, r.name), '', r.owner
  FROM relation r JOIN pg_policy p ON p.polrelid = r.oid
UNION ALL
SELECT 'function ' || name,
       concat_ws(' ', pg_get_function_arguments(oid), 'returns ' || prorettype::regtype, prokind,
                 (SELECT lanname FROM pg_language l WHERE l.oid = prolang),
                 CASE WHEN prosecdef THEN 'security definer' END, array_to_string(proconfig, ' '), prosrc), owner
  FROM function
"""


def read_objects(connection: Connection, schema: str, names: Iterable[str]) -> dict[str, Object]:
    """Everything in a schema, and everything of some names elsewhere, by kind and name.

    Args:
        names: of relations and functions, each with its schema before it.
    """
    with connection.transaction(force_rollback=True):
        # The server names what is not in its search path with the schema; so nothing of ours is to be in it.
        connection.execute("SELECT set_config('search_path', 'pg_catalog', true)")
        rows = connection.execute(_OBJECTS, {"schema": schema, "names": list(names)}).fetchall()
    return {name: Object(_plain(name, text), owner) for name, text, owner in rows}


def _plain(name: str, text: str) -> str:
    if name.startswith("function "):
        return hashlib.sha256(text.encode()).hexdigest()
    if not name.startswith("relation "):
        return text
    return re.sub(r"\b(?<!\.)(columns|tables)\.", "", " ".join(text.split()))


def differences(found: Mapping[str, Object], wanted: Definition, owner: str) -> dict[str, str]:
    """What is not as it is wanted, and how: by object.

    An index, a relation or a function of another name is left to its owner.
    """
    wrong = {}
    gone = {name for name in wanted if name.startswith("relation ") and name not in found}
    for name in wanted:
        one = found.get(name)
        if one is None:
            if name in gone or f"relation {_table_of(name)}" not in gone:
                wrong[name] = "is missing"
        elif one.definition != wanted[name]:
            wrong[name] = "is another one than this program makes"
        elif one.owner != owner and name.startswith(("relation ", "function ")):
            wrong[name] = f"belongs to {one.owner} and not to {owner}"
    known = tuple(name.removeprefix("relation ") for name in wanted if name.startswith("relation "))
    for name in found:
        if name not in wanted and name.startswith(NEVER_MORE) and _table_of(name) in known:
            wrong[name] = "is not ours"
    return wrong


def _table_of(name: str) -> str:
    """Of a part of a table, the table's name."""
    kind, _, rest = name.partition(" ")
    return rest.rpartition(".")[0] if kind == "column" else rest.rpartition(" on ")[2]
