"""The bookkeeping as a database administrator begins it, brings it up to date and gives it away: a script for psql."""

from __future__ import annotations

from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.migration.bookkeeping import install
from alphapulse_encryption.migration.bookkeeping.install import LAYOUT, SCHEMA
from alphapulse_encryption.migration.postgres.database import Connection

# A script that was printed for a database without the schema may run again, not over somebody else's schema.
_BEGIN = """\
SELECT NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {schema}) AS absent \\gset
\\if :absent
{texts}
\\else
DO $roles$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = {schema} AND pg_get_userbyid(nspowner) = {owner}) THEN
        RAISE EXCEPTION USING MESSAGE = 'schema alphapulse_encryption exists and is not ours: print the script again';
    END IF;
END $roles$;
\\endif
"""
_NEXT = """\
SELECT NOT EXISTS (SELECT FROM alphapulse_encryption.versions WHERE version = {number}) AS absent \\gset
\\if :absent
{text}
\\endif
"""

# Whatever default privileges, or a GRANT on all tables of a schema, have given away.
_TAKE_BACK = """\
DO $roles$ DECLARE taken record; BEGIN
    FOR taken IN
        SELECT c.oid::regclass AS relation,
               CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee
          FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace CROSS JOIN LATERAL (
               SELECT grantee FROM aclexplode(c.relacl)
                UNION SELECT e.grantee FROM pg_attribute a CROSS JOIN aclexplode(a.attacl) e WHERE a.attrelid = c.oid) x
         WHERE c.relkind IN ('r', 'v') AND x.grantee <> c.relowner
           AND (n.nspname = 'alphapulse_encryption' OR n.nspname = 'public' AND c.relname = ANY ({views}))
    LOOP
        EXECUTE format('REVOKE ALL ON %s FROM %s', taken.relation, taken.grantee);
    END LOOP;
END $roles$;
"""
# From now on whoever owns the settings alone can change that one.
_RULE = """\
INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('two_person_rule', '"roles"')
    ON CONFLICT (name) DO NOTHING;
"""


def begin_script(connection: Connection, owner: str) -> str:
    """Begins what is missing and gives all of it to a role; nothing but that role may do anything with it then.

    Raises:
        RefusedError: something of our names is there and is not ours.
    """
    replaced = install.refuse_for_script(connection)
    version = install.version_of(connection)
    texts = LAYOUT.missing(version)
    if version <= 0:
        begin = _BEGIN.replace("{schema}", Literal(SCHEMA).as_string(connection))
        begin = begin.replace("{owner}", Literal(owner).as_string(connection))
        parts = [begin.replace("{texts}", "\n".join(texts))]
    else:
        parts = [
            _NEXT.replace("{number}", str(number)).replace("{text}", text)
            for number, text in enumerate(texts, version + 1)
        ]
    parts += [f"{text}\n" for text in replaced]
    for kind, name in install.owned(LAYOUT):
        statement = SQL("ALTER {} {} OWNER TO {};\n").format(SQL(kind), name, Identifier(owner))
        parts.append(statement.as_string(connection))
    views = Literal([install.WATCHED, install.ASKED]).as_string(connection)
    parts += [_TAKE_BACK.replace("{views}", views), _RULE]
    return "".join(parts)
