"""Whose code runs when we touch a table: what is reached from it, and belongs to a role that is trusted less than it.

Triggers, casts, domains, checks, defaults and index expressions run with the rights of the session that reads or
writes. So each of them has to belong to a superuser or to a member of the table's owner, who may change the table
anyway; and so has each type, because its owner can give it another check or cast at any time. A function of an
extension is trusted as its owner is. ``SET ROLE`` is no border: such code can ``RESET ROLE``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import LiteralString

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Connection

# So many are named in a refusal.
_NAMED = 5
_DROP = "DROP FUNCTION "


@dataclass(frozen=True)
class Foreign:
    """Code that runs with our rights, or a privilege to have some run, and whose it is.

    Args:
        owner: the role that has it.
        reached: what it is reached from.
        remedy: the statement that ends it.
        table: schema and name of a partition, or of a table that is written to; None of anything else.
    """

    what: str
    owner: str
    reached: str
    remedy: str
    table: tuple[str, str] | None = None

    @property
    def is_guard(self) -> bool:
        """Whether it is a function with the name of a guard's, which --add-columns makes again."""
        return self.remedy.startswith(_DROP)

    def __str__(self) -> str:
        whose = f"{self.what} belongs to {self.owner}, and is reached from {self.reached}"
        return f"{whose}. Read it, then type: {self.remedy}"


# From a table to what is on it, against the direction of the server's dependencies.
_ON_A_TABLE: tuple[tuple[LiteralString, LiteralString], ...] = (
    ("pg_trigger", "tgrelid = r.oid AND NOT tgisinternal AND tgenabled <> 'D'"),
    ("pg_constraint", "conrelid = r.oid"),
    ("pg_attrdef", "adrelid = r.oid"),
    ("pg_policy", "polrelid = r.oid"),
    ("pg_rewrite", "ev_class = r.oid AND ev_enabled <> 'D'"),
    ("pg_statistic_ext", "stxrelid = r.oid"),
)
_BRANCH: LiteralString = """
        SELECT '{0}'::regclass::oid AS class, oid, NULL AS origin FROM {0}
         WHERE r.class = 'pg_class'::regclass AND {1}
         UNION ALL"""

# By class and OID, what may run for a SELECT or UPDATE of ours, or for a change of a definition. What is below 16384 is
# the server's own, of which it keeps no dependencies.
_REACHED: LiteralString = """
WITH RECURSIVE part (oid) AS (
    SELECT %(table)s::oid UNION SELECT relid FROM pg_partition_tree(%(table)s)),
reached (class, oid, origin) AS (
    SELECT 'pg_class'::regclass::oid, oid, NULL FROM part
     UNION
    SELECT 'pg_class'::regclass, v.oid, NULL FROM pg_class t JOIN pg_class v ON v.relnamespace = t.relnamespace
       AND v.relkind = 'v' AND v.relname IN ('v_' || t.relname, 'v_' || t.relname || '_safe')
     WHERE t.oid = %(table)s
     UNION
    SELECT 'pg_event_trigger'::regclass, oid, pg_describe_object('pg_event_trigger'::regclass, oid, 0)
      FROM pg_event_trigger WHERE evtenabled <> 'D'
     UNION
    SELECT next.class, next.oid, coalesce(r.origin, next.origin, pg_describe_object(next.class, next.oid, 0))
      FROM reached r CROSS JOIN LATERAL (
        {on_a_table}
        SELECT 'pg_class'::regclass, indexrelid, NULL FROM pg_index
         WHERE r.class = 'pg_class'::regclass AND indrelid = r.oid
         UNION ALL
        SELECT 'pg_type'::regclass, a.atttypid, pg_describe_object('pg_class'::regclass, a.attrelid, a.attnum)
          FROM pg_attribute a
         WHERE a.attrelid = CASE r.class WHEN 'pg_class'::regclass THEN r.oid WHEN 'pg_type'::regclass THEN
                   (SELECT typrelid FROM pg_type t WHERE t.oid = r.oid) END
           AND a.attnum > 0 AND NOT a.attisdropped
           -- A partition has the whole table's.
           AND a.attrelid NOT IN (SELECT p.oid FROM part p WHERE p.oid <> %(table)s)
         UNION ALL
        SELECT 'pg_type'::regclass, typbasetype, NULL FROM pg_type
         WHERE r.class = 'pg_type'::regclass AND oid = r.oid AND typbasetype <> 0
         UNION ALL
        SELECT 'pg_constraint'::regclass, oid, NULL FROM pg_constraint
         WHERE r.class = 'pg_type'::regclass AND contypid = r.oid
         UNION ALL
        SELECT 'pg_cast'::regclass, oid, NULL FROM pg_cast
         WHERE r.class = 'pg_type'::regclass
           AND ((castsource = r.oid AND casttarget IN (castsource, 'text'::regtype, 'varchar'::regtype))
             OR (casttarget = r.oid AND castsource IN ('text'::regtype, 'varchar'::regtype)))
         UNION ALL
        SELECT 'pg_proc'::regclass, f.amproc, NULL FROM pg_amproc f JOIN pg_opclass o ON o.opcfamily = f.amprocfamily
         WHERE r.class = 'pg_opclass'::regclass AND o.oid = r.oid
         UNION ALL
        SELECT 'pg_operator'::regclass, a.amopopr, NULL FROM pg_amop a JOIN pg_opclass o ON o.opcfamily = a.amopfamily
         WHERE r.class = 'pg_opclass'::regclass AND o.oid = r.oid
         UNION ALL
        SELECT refclassid, refobjid, NULL FROM pg_depend d
         WHERE d.classid = r.class AND d.objid = r.oid AND d.refobjid >= 16384
           AND d.refclassid IN ('pg_proc'::regclass, 'pg_type'::regclass, 'pg_operator'::regclass,
                                'pg_opclass'::regclass, 'pg_language'::regclass)
         UNION ALL
        -- What a rule or a function writes to has triggers of its own; a table that a view reads has none for us.
        SELECT refclassid, refobjid, NULL FROM pg_depend d JOIN pg_class c ON c.oid = d.refobjid
         WHERE d.classid = r.class AND d.objid = r.oid AND d.refclassid = 'pg_class'::regclass
           AND r.class IN ('pg_rewrite'::regclass, 'pg_proc'::regclass) AND c.relkind IN ('r', 'p', 'v')
           AND (c.relkind = 'v' OR NOT EXISTS (SELECT FROM pg_rewrite v WHERE v.oid = r.oid AND v.ev_type = '1'))
      ) AS next),
kept (name) AS (
    SELECT coalesce(%(owner)s::text, (SELECT relowner::regrole::text FROM pg_class WHERE oid = %(table)s))),
trusted (oid) AS (
    SELECT r.oid FROM pg_roles r
     WHERE r.rolsuper OR (SELECT pg_has_role(r.oid, to_regrole(name), 'MEMBER') FROM kept)),
-- A group may do what it likes where everybody who logs in as it is trusted.
harmless (oid) AS (
    SELECT g.oid FROM pg_roles g WHERE NOT EXISTS (
        SELECT FROM pg_roles l WHERE l.rolcanlogin AND pg_has_role(l.oid, g.oid, 'MEMBER')
           AND l.oid NOT IN (SELECT oid FROM trusted))),
-- Of functions whose text is read when it runs, the schemas in which the server looks for what that names.
searched (function, schema) AS (
    SELECT p.oid, CASE WHEN name = '"$user"' THEN current_user WHEN left(name, 1) = '"' THEN btrim(name, '"')
                       ELSE lower(name) END
      FROM reached r JOIN pg_proc p ON p.oid = r.oid JOIN pg_language l ON l.oid = p.prolang
     CROSS JOIN LATERAL regexp_split_to_table(coalesce(
           (SELECT substr(s, 13) FROM unnest(p.proconfig) AS s WHERE starts_with(s, 'search_path=')),
           current_setting('alphapulse_encryption.search_path')), '\\s*,\\s*') AS name
     WHERE r.class = 'pg_proc'::regclass AND l.lanname NOT IN ('internal', 'c') AND p.prosqlbody IS NULL
       AND p.oid >= 16384),
creating (kind, name, owner, function) AS (
    SELECT CASE WHEN x.grantee = n.nspowner THEN 'SCHEMA' ELSE 'CREATE' END, quote_ident(n.nspname), x.grantee, function
      FROM searched JOIN pg_namespace n ON n.nspname = schema
     CROSS JOIN aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) x WHERE x.privilege_type = 'CREATE'
     UNION
    -- A schema that is missing is made by who may.
    SELECT CASE WHEN x.grantee = d.datdba THEN 'DATABASE' ELSE 'CREATE IN' END, quote_ident(d.datname), x.grantee,
           function
      FROM searched JOIN pg_database d ON d.datname = current_database()
     CROSS JOIN aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x
     WHERE x.privilege_type = 'CREATE' AND schema NOT IN (SELECT nspname FROM pg_namespace) AND schema <> 'pg_temp')
SELECT DISTINCT ON (kind, found.name, owner) kind, found.name,
       CASE owner WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(owner) END, origin, (SELECT name FROM kept),
       CASE kind WHEN 'TABLE' THEN (SELECT ARRAY[n.nspname, c.relname] FROM pg_class c JOIN pg_namespace n
                                     ON n.oid = c.relnamespace WHERE c.oid = to_regclass(found.name)) END
  FROM (
    SELECT CASE WHEN p.proname ~ '^encryption_guard_' THEN 'GUARD' WHEN p.prokind IN ('f', 'w') THEN 'FUNCTION'
                ELSE 'ROUTINE' END AS kind, p.oid::regprocedure::text AS name, p.proowner AS owner, origin
      FROM reached r JOIN pg_proc p ON p.oid = r.oid
     WHERE class = 'pg_proc'::regclass AND p.proowner NOT IN (SELECT oid FROM trusted)
     UNION ALL
    SELECT CASE t.typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, t.oid::regtype::text, t.typowner, origin
      FROM reached r JOIN pg_type t ON t.oid = r.oid LEFT JOIN pg_class c ON c.oid = t.typrelid
     WHERE class = 'pg_type'::regclass AND t.typowner NOT IN (SELECT oid FROM trusted)
       AND coalesce(c.relkind, 'c') = 'c' AND NOT EXISTS (SELECT FROM pg_type e WHERE e.typarray = t.oid)
     UNION ALL
    SELECT CASE c.relkind WHEN 'v' THEN 'VIEW' ELSE 'TABLE' END, c.oid::regclass::text, c.relowner,
           coalesce(origin, 'the table')
      FROM reached r JOIN pg_class c ON c.oid = r.oid
     WHERE class = 'pg_class'::regclass AND c.relkind IN ('r', 'p', 'v') AND c.oid <> %(table)s
       AND c.relowner NOT IN (SELECT oid FROM trusted)
     UNION ALL
    SELECT 'TRIGGER', c.oid::regclass::text, x.grantee, 'each trigger that this role may make'
      FROM part JOIN pg_class c USING (oid) CROSS JOIN aclexplode(c.relacl) x
     WHERE x.privilege_type = 'TRIGGER' AND x.grantee <> c.relowner AND x.grantee NOT IN (SELECT oid FROM harmless)
     UNION ALL
    SELECT kind, name, o.owner, format('the text of the function %%s', function::regprocedure)
      FROM creating CROSS JOIN LATERAL (
           -- An implicit member: the owner of the database.
           SELECT CASE WHEN creating.owner <> 'pg_database_owner'::regrole THEN creating.owner
                  ELSE (SELECT datdba FROM pg_database WHERE datname = current_database()) END) AS o (owner)
     WHERE o.owner NOT IN (SELECT oid FROM harmless)) AS found
 ORDER BY kind, found.name, owner, origin
"""
_QUERY = SQL(_REACHED).format(on_a_table=SQL("".join(_BRANCH.format(*one) for one in _ON_A_TABLE)))


def foreign_code(connection: Connection, table: int, owner: str | None = None) -> tuple[Foreign, ...]:
    """What runs with our rights when we touch a table, and is not its owner's, a superuser's or an extension's.

    Args:
        table: its oid.
        owner: the role that is going to own it, where that is another one than now.
    """
    return tuple(_foreign(*row) for row in connection.execute(_QUERY, {"table": table, "owner": owner}))


def _foreign(kind: str, name: str, owner: str, origin: str, kept: str, table: list[str] | None) -> Foreign:
    by = "PUBLIC" if owner == "PUBLIC" else Identifier(owner).as_string(None)
    match kind:
        case "GUARD":
            what, remedy = f"the function {name}", f"{_DROP}{name} CASCADE"
        case "TRIGGER":
            what, remedy = f"the privilege TRIGGER on {name}", f"REVOKE TRIGGER ON {name} FROM {by}"
        case "CREATE":
            what, remedy = (
                f"the privilege CREATE on the schema {name}",
                f"REVOKE CREATE ON SCHEMA {name} FROM {by}",
            )
        case "CREATE IN":
            what = f"the privilege CREATE on the database {name}"
            remedy = f"REVOKE CREATE ON DATABASE {name} FROM {by}"
        case _:
            what, remedy = f"the {kind.lower()} {name}", f"ALTER {kind} {name} OWNER TO {kept}"
    return Foreign(what, owner, origin, f"{remedy};", (table[0], table[1]) if table else None)


def refuse_foreign_code(connection: Connection, key: str, table: int, *, renewing: bool = False) -> None:
    """Refuse to touch a table that has code of a less trusted role run with the rights of the session.

    Args:
        renewing: whether the guard is made again before a row is written, and its function may be somebody else's.

    Raises:
        RefusedError: names the first of what is reached, and the statements to type.
    """
    found = [one for one in foreign_code(connection, table) if not (renewing and one.is_guard)]
    if found:
        more = f"; and {len(found) - _NAMED} more, which --preflight names" if len(found) > _NAMED else ""
        raise RefusedError(
            f"Code of other roles would run with our rights on {key}; nothing was changed: "
            f"{'; '.join(map(str, found[:_NAMED]))}{more}"
        )
