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
\\endif
"""
_NEXT = """\
SELECT NOT EXISTS (SELECT FROM alphapulse_encryption.versions WHERE version = {number}) AS absent \\gset
\\if :absent
{text}
\\endif
"""

# Days may lie between the printing of a script and its run: what is there is looked at in the transaction that takes it
# over, and nothing of it is written to before.
_WHOSE = SQL("""\
DO $roles$ DECLARE found record; BEGIN
    FOR found IN {strangers} LOOP
        CONTINUE WHEN found.owner = current_setting('alphapulse_encryption.bookkeeping_of', true)
                  AND found.what NOT LIKE 'the function of%';
        RAISE EXCEPTION USING
            MESSAGE = format('%s belongs to %s, who may have put code there', found.what, found.owner),
            HINT = format({hint}, found.owner);
    END LOOP;
END $roles$;
""")
_VOUCH = (
    "If the migration was run as %1$s, run the script with psql -v bookkeeping_of=%1$s. Otherwise find out who made "
    "it, and rename or drop it."
)
# Of a role that is vouched for, everything has to be as the last version has it: an update would write to it.
_UPDATE = (
    "If the migration was run as %1$s, have that role bring the bookkeeping up to date (--add-columns), and print the "
    "script again. Otherwise find out who made it, and rename or drop it."
)
# Said it is on psql's command line alone: the owner of a database can set as much for its sessions.
_OF_A_ROLE = """\
\\if :{?bookkeeping_of}
\\else
\\set bookkeeping_of ''
\\endif
SELECT set_config('alphapulse_encryption.bookkeeping_of', :'bookkeeping_of', true) \\g /dev/null
"""
_OF_NO_ROLE = "SET LOCAL alphapulse_encryption.bookkeeping_of TO '';\n"
_AS_OURS = SQL("""\
DO $roles$ DECLARE wrong text; BEGIN
    SELECT string_agg(concat_ws(' ', name, how), '; ') INTO wrong FROM ({differing}) AS differing;
    IF wrong IS NOT NULL THEN
        RAISE EXCEPTION USING MESSAGE = format('what stands where the bookkeeping belongs is not ours: %s', wrong),
            HINT = 'Find out who made it, rename or drop it, and print the script again.';
    END IF;
END $roles$;
""")
# From now on whoever owns the settings alone can change that one.
_RULE = """\
INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('two_person_rule', '"roles"')
    ON CONFLICT (name) DO NOTHING;
"""


def begin_script(connection: Connection, owner: str) -> str:
    """Begins what is missing and gives all of it to a role; nothing but that role may do anything with it then.

    In the database it ends at what belongs to a role that may not own it, or is not what this program makes.

    Raises:
        RefusedError: something of our names is there and is not ours.
    """
    replaced = install.refuse_for_script(connection)
    version = install.version_of(connection)
    texts = LAYOUT.missing(version)
    strange = install.strangers(names=install.names(LAYOUT, version))
    whose = _WHOSE.format(strangers=strange, hint=Literal(_UPDATE if texts else _VOUCH))
    parts = [_OF_NO_ROLE if texts else _OF_A_ROLE, whose.as_string(connection)]
    if version <= 0:
        begin = _BEGIN.replace("{schema}", Literal(SCHEMA).as_string(connection))
        parts.append(begin.replace("{texts}", "\n".join(texts)))
    else:
        parts += [
            _NEXT.replace("{number}", str(number)).replace("{text}", text)
            for number, text in enumerate(texts, version + 1)
        ]
    parts += [f"{text}\n" for text in replaced]
    for kind, name in install.owned(LAYOUT):
        statement = SQL("ALTER {} {} OWNER TO {};\n").format(SQL(kind), name, Identifier(owner))
        parts.append(statement.as_string(connection))
    differing = install.differing_from(LAYOUT, Literal(owner))
    parts.append(_AS_OURS.format(differing=differing).as_string(connection))
    parts += [f"{install.take_back(reading=False).as_string(connection)};\n", _RULE]
    return "".join(parts)
