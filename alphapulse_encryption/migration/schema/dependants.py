"""What depends on a table's plaintext columns: what goes with them, what stops their drop, what stops the switch.

The database keeps no dependency on what a trigger is told by name, or reads of a row by name: of the table's own
triggers we look ourselves. What other functions hold as text is not known to us either.
"""

from __future__ import annotations

from dataclasses import dataclass

from alphapulse_encryption.migration.bookkeeping.tables import SetAside
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.contents import refuse_ciphertext_alone
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.indexes import unique_indexes
from alphapulse_encryption.migration.schema.partitions import read_parts
from alphapulse_encryption.migration.schema.sql import GUARDS


@dataclass(frozen=True)
class Dependant:
    """An object of somebody else's that needs a plaintext column.

    Args:
        name: the object, as PostgreSQL describes it.
        stops_the_drop: PostgreSQL would refuse the drop, or the object could not be put back exactly. Others, such as
            indexes and constraints of the table itself, go with the column and come back with it.
        remove: the statement that takes it away; empty where there is no single one.
    """

    column: str
    name: str
    stops_the_drop: bool
    remove: str


_DEPENDANTS = """
SELECT attname, name, stops, remove FROM (
SELECT a.attname,
       CASE WHEN r.rulename = '_RETURN' THEN pg_describe_object('pg_class'::regclass, r.ev_class, 0)
            WHEN f.oid IS NOT NULL
            THEN 'generated ' || pg_describe_object('pg_class'::regclass, f.adrelid, f.adnum)
            ELSE pg_describe_object(d.classid, d.objid, d.objsubid) END AS name,
       -- A foreign key from the table to itself keeps the column that it refers to.
       coalesce(bool_or(f.oid IS NOT NULL OR d.deptype = 'n' AND d.classid <> 'pg_statistic_ext'::regclass
         AND i.indrelid IS DISTINCT FROM d.refobjid
         AND (c.conrelid IS DISTINCT FROM d.refobjid OR c.contype = 'f' AND c.confrelid = d.refobjid
              AND a.attnum = ANY(c.confkey))
         -- What a restore would have no right to make again as it was.
         OR NOT superuser AND (NOT pg_has_role(t.relowner, s.stxowner, 'MEMBER')
              OR NOT has_schema_privilege(t.relowner, s.stxnamespace, 'CREATE')
              OR NOT has_schema_privilege(s.stxowner, s.stxnamespace, 'CREATE')
              OR NOT has_tablespace_privilege(t.relowner, nullif(k.reltablespace, 0), 'CREATE'))
         -- A key of other columns, which only includes this one, would be lost with it.
         OR u.indisunique AND NOT a.attnum = ANY((u.indkey::int2[])[:u.indnkeyatts - 1])), false) AS stops,
       bool_or(d.refobjid = %(table)s) AS of_table,
       max(CASE WHEN c.oid IS NOT NULL
                THEN format('ALTER TABLE %%s DROP CONSTRAINT %%I', c.conrelid::regclass, c.conname)
                WHEN f.oid IS NOT NULL
                THEN (SELECT format('ALTER TABLE %%s DROP COLUMN %%I', b.attrelid::regclass, b.attname)
                        FROM pg_attribute b WHERE b.attrelid = f.adrelid AND b.attnum = f.adnum)
                WHEN m.oid IS NOT NULL
                THEN format('ALTER PUBLICATION %%I DROP TABLE %%s', l.pubname, m.prrelid::regclass)
                ELSE (SELECT format('DROP %%s %%s', upper(o.type), o.identity)
                        FROM (SELECT r.rulename IS NOT DISTINCT FROM '_RETURN') AS v (of_view)
                       CROSS JOIN pg_identify_object(CASE WHEN of_view THEN 'pg_class'::regclass ELSE d.classid END,
                                                     CASE WHEN of_view THEN r.ev_class ELSE d.objid END, 0) AS o)
           END) AS remove
  FROM pg_depend d
  LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
  LEFT JOIN pg_constraint c ON d.classid = 'pg_constraint'::regclass AND c.oid = d.objid
  -- Before PostgreSQL 15, a generated column depends by itself, and would go without a word.
  LEFT JOIN pg_attrdef f ON CASE WHEN d.classid = 'pg_attrdef'::regclass THEN f.oid = d.objid
       ELSE d.classid = 'pg_class'::regclass AND f.adrelid = d.objid AND f.adnum = d.objsubid END
  LEFT JOIN pg_trigger g ON d.classid = 'pg_trigger'::regclass AND g.oid = d.objid
  LEFT JOIN pg_publication_rel m ON d.classid = 'pg_publication_rel'::regclass AND m.oid = d.objid
  LEFT JOIN pg_publication l ON l.oid = m.prpubid
  LEFT JOIN pg_index i ON d.classid = 'pg_class'::regclass AND i.indexrelid = d.objid
  LEFT JOIN pg_class k ON k.oid = coalesce(i.indexrelid, CASE WHEN c.contype IN ('p', 'u') THEN c.conindid END)
  LEFT JOIN pg_statistic_ext s ON d.classid = 'pg_statistic_ext'::regclass AND s.oid = d.objid
  JOIN pg_class t ON t.oid = d.refobjid
  JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
  JOIN (SELECT rolsuper AS superuser FROM pg_roles WHERE rolname = current_user) AS we ON true
  LEFT JOIN pg_index u ON u.indrelid = d.refobjid AND a.attnum = ANY(u.indkey::int2[])
        AND u.indexrelid = k.oid
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = ANY(%(parts)s) AND d.deptype IN ('n', 'a')
   AND a.attname = ANY(%(columns)s)
   -- The column's own default and NOT NULL; and what is ours.
   AND (f.oid IS NULL OR f.adrelid <> d.refobjid OR f.adnum <> d.refobjsubid)
   AND c.contype IS DISTINCT FROM 'n'
   -- Of partitions, what the partitioned table's own has made there.
   AND (d.refobjid = %(table)s OR coalesce(c.conparentid, 0) = 0 AND coalesce(g.tgparentid, 0) = 0)
   AND (g.tgname IS NULL OR g.tgname !~ %(guards)s)
   AND (c.conrelid IS DISTINCT FROM d.refobjid OR c.conname <> ALL(%(ours)s))
   AND (i.indrelid IS DISTINCT FROM d.refobjid OR k.relname <> ALL(%(ours)s))
 GROUP BY 1, 2) AS found
 WHERE of_table OR stops
UNION
SELECT a.attname, 'replica identity of ' || i.relname, true,
       format('ALTER TABLE %%s REPLICA IDENTITY DEFAULT', x.indrelid::regclass)
  FROM pg_index x JOIN pg_class i ON i.oid = x.indexrelid
  JOIN pg_attribute a ON a.attrelid = x.indrelid AND a.attnum = ANY(x.indkey::int2[])
 WHERE x.indrelid = ANY(%(parts)s) AND x.indisreplident AND a.attname = ANY(%(columns)s)
UNION
SELECT a.attname, pg_describe_object('pg_trigger'::regclass, t.oid, 0), true,
       'DROP TRIGGER ' || (SELECT identity FROM pg_identify_object('pg_trigger'::regclass, t.oid, 0))
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_attribute a ON a.attrelid = t.tgrelid
 WHERE t.tgrelid = ANY(%(parts)s) AND (t.tgrelid = %(table)s OR t.tgparentid = 0)
   AND NOT t.tgisinternal AND t.tgname !~ %(guards)s AND a.attname = ANY(%(columns)s)
   AND (encode(convert_to(a.attname, getdatabaseencoding()), 'escape')
          = ANY(string_to_array(encode(t.tgargs, 'escape'), '\\000'))
        OR p.prosrc ~* ('\\m(new|old)\\s*[.]\\s*"?' || regexp_replace(a.attname, '(\\W)', '\\\\\\1', 'g') || '\\M'))
UNION
SELECT a.attname, format('security label of %%I by %%s', a.attname, l.provider), true,
       format('SECURITY LABEL FOR %%I ON COLUMN %%s.%%I IS NULL', l.provider, a.attrelid::regclass, a.attname)
  FROM pg_seclabel l JOIN pg_attribute a ON a.attrelid = l.objoid AND a.attnum = l.objsubid
 WHERE l.classoid = 'pg_class'::regclass AND l.objoid = ANY(%(parts)s) AND a.attname = ANY(%(columns)s)
UNION
SELECT a.attname, format('privilege %%s (%%I) granted by %%I, who is not the owner', x.privilege_type, a.attname,
       r.rolname), true,
       format('SET ROLE %%I; REVOKE %%s (%%I) ON %%s FROM %%s', r.rolname, x.privilege_type, a.attname, c.oid::regclass,
              CASE WHEN x.grantee = 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END)
  FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid CROSS JOIN aclexplode(a.attacl) x
  JOIN pg_roles r ON r.oid = x.grantor
 WHERE c.oid = %(table)s AND x.grantor <> c.relowner AND a.attname = ANY(%(columns)s)
 ORDER BY 1, 2
"""

# What a restore could not bring back exactly: what a single partition has of its own, and constraints whose scan of all
# partitions the application would have to wait for.
_OF_PARTITIONS = """
WITH part AS (
    SELECT c.oid, c.relname, a.attnum, a.attname, a.attacl, a.attoptions, a.attcompression,
           a.attstorage <> w.attstorage OR a.attstattarget IS DISTINCT FROM w.attstattarget AS other
      FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid
      JOIN pg_attribute w ON w.attrelid = %(table)s AND w.attname = a.attname
     WHERE c.oid = ANY(%(parts)s) AND c.oid <> %(table)s AND a.attname = ANY(%(columns)s))
SELECT attname, format('settings of its own of %%I in the partition %%I', attname, relname), true, '' FROM part
 WHERE other OR attacl IS NOT NULL OR attoptions IS NOT NULL OR attcompression <> ''
    OR col_description(oid, attnum) IS NOT NULL
UNION
SELECT p.attname, CASE WHEN c.coninhcount = 0 AND c.conparentid = 0
       THEN format('constraint %%I of the partition %%I alone', c.conname, p.relname)
       ELSE format('comment on the constraint %%I of the partition %%I', c.conname, p.relname) END, true,
       CASE WHEN c.coninhcount = 0 AND c.conparentid = 0
            THEN format('ALTER TABLE %%s DROP CONSTRAINT %%I', c.conrelid::regclass, c.conname)
            ELSE format('COMMENT ON CONSTRAINT %%I ON %%s IS NULL', c.conname, c.conrelid::regclass) END
  FROM part p JOIN pg_constraint c ON c.conrelid = p.oid
 WHERE c.contype IN ('c', 'f', 'u', 'x') AND p.attnum = ANY(c.conkey) AND c.conname <> ALL(%(ours)s)
   AND (c.coninhcount = 0 AND c.conparentid = 0 OR obj_description(c.oid, 'pg_constraint') IS NOT NULL)
UNION
SELECT p.attname, format('statistics %%I of the partition %%I', s.stxname, p.relname), true,
       format('DROP STATISTICS %%I.%%I', s.stxnamespace::regnamespace, s.stxname)
  FROM part p JOIN pg_statistic_ext s ON s.stxrelid = p.oid
 WHERE EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_statistic_ext'::regclass AND d.objid = s.oid
                  AND d.refclassid = 'pg_class'::regclass AND d.refobjid = p.oid AND d.refobjsubid = p.attnum)
UNION
SELECT a.attname, pg_describe_object('pg_constraint'::regclass, c.oid, 0), true,
       format('ALTER TABLE %%s DROP CONSTRAINT %%I', c.conrelid::regclass, c.conname)
  FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = ANY(c.conkey)
 WHERE c.conrelid = %(table)s AND c.contype IN ('f', 'x') AND a.attname = ANY(%(columns)s)
 ORDER BY 1, 2
"""


def dependants(connection: Connection, definition: TableDefinition) -> tuple[Dependant, ...]:
    """Somebody else's objects that need a plaintext column, by column and name."""
    parameters = {
        "table": definition.oid,
        "parts": [part.oid for part in read_parts(connection, definition.oid)],
        "columns": [column.name for column in definition.plaintext_columns],
        "guards": GUARDS,
        "ours": saved_ddl.our_names(definition.table),
    }
    found = [Dependant(*row) for row in connection.execute(_DEPENDANTS, parameters)]
    if definition.partitioned:
        of_parts = [Dependant(*row) for row in connection.execute(_OF_PARTITIONS, parameters)]
        stopping = {(one.column, one.name) for one in of_parts}
        found = [*(one for one in found if (one.column, one.name) not in stopping), *of_parts]
    return tuple(found)


def stops_of_the_drop(connection: Connection, definition: TableDefinition) -> tuple[str, ...]:
    """The names of those that stop a drop of the plaintext columns."""
    return tuple(dict.fromkeys(d.name for d in dependants(connection, definition) if d.stops_the_drop))


_DOMAINS = """
WITH RECURSIVE t (column_name, oid) AS (
    SELECT a.attname, a.atttypid FROM pg_attribute a WHERE a.attrelid = %s AND a.attname = ANY(%s)
    UNION ALL
    SELECT t.column_name, d.typbasetype FROM t JOIN pg_type d ON d.oid = t.oid WHERE d.typtype = 'd')
SELECT t.column_name, format('ALTER DOMAIN %%s DROP NOT NULL', d.oid::regtype)
  FROM t JOIN pg_type d ON d.oid = t.oid WHERE d.typnotnull ORDER BY 1
"""

# From PostgreSQL 18 on.
_UNPROVEN_NOT_NULL = """
SELECT c.conname FROM pg_constraint c JOIN pg_attribute a ON a.attrelid = c.conrelid AND a.attnum = c.conkey[1]
 WHERE c.contype = 'n' AND NOT c.convalidated AND c.conrelid = %s AND a.attname = ANY(%s) ORDER BY 1
"""

# What a partition has of its own: it would go on asking for the plaintext of its rows.
_PARTITION_RULES = """
SELECT c.relname, format('NOT NULL on %%I', a.attname),
       format('ALTER TABLE %%s ALTER %%I DROP NOT NULL', c.oid::regclass, a.attname)
  FROM pg_partition_tree(%(table)s) p JOIN pg_class c ON c.oid = p.relid
  JOIN pg_attribute a ON a.attrelid = p.relid
  JOIN pg_attribute whole ON whole.attrelid = %(table)s AND whole.attname = a.attname
 WHERE p.level > 0 AND a.attname = ANY(%(columns)s) AND a.attnotnull AND NOT whole.attnotnull
 UNION ALL
SELECT c.relname, format('the exclusion constraint %%I', x.conname),
       format('ALTER TABLE %%s DROP CONSTRAINT %%I', c.oid::regclass, x.conname)
  FROM pg_partition_tree(%(table)s) p JOIN pg_class c ON c.oid = p.relid
  JOIN pg_constraint x ON x.conrelid = p.relid AND x.contype = 'x' AND x.conparentid = 0
  JOIN pg_attribute a ON a.attrelid = p.relid AND a.attname = ANY(%(columns)s)
 WHERE p.level > 0 AND (a.attnum = ANY(x.conkey) OR EXISTS (
       SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = x.conindid
          AND d.refclassid = 'pg_class'::regclass AND d.refobjid = x.conrelid AND d.refobjsubid = a.attnum))
 ORDER BY 1, 2
"""


def stops_of_the_switch(connection: Connection, definition: TableDefinition) -> tuple[str, ...]:
    """What no step of ours could carry over to the ciphertext, each as a sentence that says what to do."""
    key = definition.table.key
    names = [column.name for column in definition.plaintext_columns]
    reasons = [
        f"The unique index {index.name} cannot be carried over to ciphertext: {index.obstacle}."
        for index in unique_indexes(connection, definition)
        if index.obstacle is not None
    ]
    reasons += [
        f"The exclusion constraint {constraint.name} cannot be carried over to ciphertext, which cannot be compared. "
        f"Drop it ({definition.alter('DROP CONSTRAINT {}', constraint.name)}), or take its columns out of the "
        "catalogue."
        for constraint in saved_ddl.read_saved(connection, definition, SetAside()).constraints
        if constraint.kind == "x"
    ]
    reasons += [
        f"The {name} refuses a row whose plaintext is NULL, so every write of ciphertext alone would fail. {way}."
        for name, way in refuse_ciphertext_alone(connection, definition)
    ]
    reasons += [
        f"The constraint {name} is NOT VALID: rows without a value may be there, and the check that takes over would "
        f"not let them pass. Validate it ({definition.alter('VALIDATE CONSTRAINT {}', name)}), or drop it "
        f"({definition.alter('DROP CONSTRAINT {}', name)})."
        for (name,) in connection.execute(_UNPROVEN_NOT_NULL, [definition.oid, names])
    ]
    reasons += [
        f"The partition {partition} has a rule of its own, {rule}, which the ciphertext cannot take over. Make it one "
        f"of the partitioned table, or drop it ({remove})."
        for partition, rule, remove in connection.execute(
            _PARTITION_RULES, {"table": definition.oid, "columns": names}
        )
    ]
    reasons += [
        f"The type of {key}.{name} is a domain that forbids NULL, so the plaintext could not be cleared when the "
        f"ciphertext is written. Make NOT NULL a constraint of the column instead ({loosen})."
        for name, loosen in connection.execute(_DOMAINS, [definition.oid, names])
    ]
    return tuple(reasons)
