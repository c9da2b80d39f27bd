"""Begins the bookkeeping of a database, and brings it up to date: numbered SQL files, applied once each and in order.

What is ours is known by owner and definition, never by name: ``sql/definition.json`` says how every object looks once
the last file is applied. What is there instead is refused. A function or trigger of ours that differs is made again.

A change is the next file; what it makes goes into ``sql/definition.json``, which the test of that file prints.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import LiteralString, NamedTuple

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.contents import (
    Definition,
    Difference,
    differences,
    differing,
    read_objects,
)
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.postgres.replication import refuse_missing_standbys

SCHEMA = "alphapulse_encryption"
# Of ours in public: what operators watch, what instances of an application ask when they start, what they call.
WATCHED, ASKED, CALLED = "encryption_migrations", "encryption_tables", "encryption_report_key_usage"
_IN_PUBLIC = tuple(f"public.{name}" for name in (WATCHED, ASKED, CALLED))
_LOCK = "alphapulse_encryption bookkeeping"
# So long we wait for a program of an earlier version that holds a table of ours.
_LOCK_TIMEOUT = "5s"

# Where a database stands that has no schema of ours: nothing, or the layout before there was one.
_NOTHING, _BEFORE = 0, -1
# Kinds of objects that run where somebody writes, or decide what is seen.
_CODE = ("trigger", "rule", "policy", "function", "type", "operator", "default")
# A function or a trigger that a file makes.
_MADE = re.compile(
    r"^CREATE (?:OR REPLACE )?((FUNCTION|TRIGGER) ([^\s(]+)(?:[^;$]|\$(\w*)\$.*?\$\4\$)+;)",
    re.DOTALL | re.MULTILINE,
)


class Version(NamedTuple):
    """One of the numbered files; its name is without the suffix."""

    number: int
    name: str
    text: str


@dataclass(frozen=True)
class Layout:
    """The numbered files of a directory, and what they make.

    Args:
        directory: holds ``0001_….sql`` and so on, and ``definition.json``; ``before`` in it does the same for the
            layout before.
    """

    directory: Path

    @cached_property
    def versions(self) -> tuple[Version, ...]:
        files = sorted(self.directory.glob("[0-9]*_*.sql"))
        return tuple(Version(int(file.stem.partition("_")[0]), file.stem, file.read_text()) for file in files)

    @cached_property
    def definition(self) -> Definition:
        return _definition(self.directory)

    @cached_property
    def before(self) -> Definition:
        """Of the layout before, with all of it in public."""
        return _definition(self.directory / "before")

    @property
    def latest(self) -> int:
        return self.versions[-1].number

    @property
    def relations(self) -> tuple[str, ...]:
        """Names of the tables in the schema."""
        return _relations(self.definition, SCHEMA)

    def missing(self, version: int) -> tuple[str, ...]:
        """What brings a database up to date that stands at a version: the text of each file."""
        return tuple(
            f"{self._text(file, version)}\n"
            f"INSERT INTO {SCHEMA}.versions (version, name) VALUES ({file.number}, '{file.name}');"
            for file in self.versions
            if file.number > version
        )

    def _text(self, file: Version, version: int) -> str:
        if version != _BEFORE:
            return file.text.strip()
        of_before = (self.directory / "before").glob(f"{file.name[:4]}_*.sql")
        texts = {path.stem.rpartition("_")[2]: path.read_text() for path in of_before}
        return f"{texts.get('moved', file.text)}\n{texts.get('kept', '')}".strip()

    def names(self, name: str) -> bool:
        """Whether a file makes, or has made, an object of that kind and name, or can have made it."""
        kind, _, rest = name.partition(" ")
        own = re.split(r" on |\(", rest)[0].rpartition(".")[2]
        return kind not in _CODE or any(
            re.search(rf"\b{re.escape(own)}\b", file.text) for file in self.versions
        )

    def statement(self, name: str) -> str | None:
        """What makes a function or a trigger of ours as the last version has it; None for any other object."""
        kind_and_name = re.split(r" on |\(", name)[0]
        return self._statements.get(kind_and_name) if name in self.definition else None

    @cached_property
    def _statements(self) -> dict[str, str]:
        made = [match for file in self.versions for match in _MADE.finditer(file.text)]
        return {f"{match[2].lower()} {match[3]}": f"CREATE OR REPLACE {match[1]}" for match in made}


def _definition(directory: Path) -> Definition:
    found: Definition = json.loads((directory / "definition.json").read_text())
    return found


def _relations(definition: Definition, schema: str) -> tuple[str, ...]:
    prefix = f"relation {schema}."
    return tuple(name.removeprefix(prefix) for name in definition if name.startswith(prefix))


LAYOUT = Layout(Path(__file__).parent / "sql")
# Names of our tables, each in the schema.
BOOKKEEPING_TABLES = LAYOUT.relations

# Asks the catalog alone first: not everybody may look into the schema.
_STANDS = """
SELECT v.oid IS NOT NULL,
       coalesce(has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(v.oid, 'SELECT'), false),
       (SELECT count(*) FROM pg_class c JOIN pg_namespace p ON p.oid = c.relnamespace
         WHERE p.nspname = 'public' AND c.relkind = 'r' AND c.relname = ANY (%s))
  FROM (SELECT) AS one LEFT JOIN pg_namespace n ON n.nspname = 'alphapulse_encryption'
  LEFT JOIN pg_class v ON v.relnamespace = n.oid AND v.relname = 'versions' AND v.relkind = 'r'
   -- A policy's code runs as the one who looks.
   AND NOT v.relrowsecurity
"""

# Who owns a table can put code on it at any time, which then runs as the one who writes to it. So the owner has to be
# nobody, or one who gains nothing by it: a superuser, or the role in use; or a group that it is a member of itself.
_TRUSTED = SQL("""(r.rolsuper OR r.rolname = current_user OR NOT r.rolcanlogin AND (
    NOT EXISTS (SELECT FROM pg_auth_members m JOIN pg_roles o ON o.oid = m.member
                 WHERE m.roleid = r.oid AND NOT o.rolsuper AND coalesce((to_jsonb(m) ->> 'set_option')::boolean
                    OR (to_jsonb(m) ->> 'inherit_option')::boolean, true))
    OR pg_has_role(r.oid, 'MEMBER') AND NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)))""")
_STRANGERS = SQL("""
SELECT o.what, r.rolname::text AS owner FROM (
    SELECT 1 AS place, 'schema ' || nspname AS what, nspowner AS owner
      FROM pg_namespace WHERE nspname = {schema}
     UNION ALL
    SELECT 2, format('relation %s.%s', n.nspname, c.relname), c.relowner
      FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.relkind NOT IN ('i', 'I')
       AND (n.nspname = {schema} OR n.nspname || '.' || c.relname = ANY ({names}))
     UNION ALL
    SELECT 3, format('function %s.%s', n.nspname, p.proname), p.proowner
      FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE n.nspname = {schema} OR n.nspname || '.' || p.proname = ANY ({names})
     UNION ALL
    -- It runs as the one who makes or changes anything.
    SELECT 4, format('the function of the event trigger %s', e.evtname), p.proowner
      FROM pg_event_trigger e JOIN pg_proc p ON p.oid = e.evtfoid WHERE {changes} AND e.evtenabled <> 'D') AS o
  JOIN pg_roles r ON r.oid = o.owner WHERE NOT {trusted} ORDER BY o.place, o.what
""")


# Default privileges give others rights on what is made. On what is there for others in public, they are of use as far
# as they read and call.
_TAKE_BACK = SQL("""
DO $roles$ DECLARE taken record; BEGIN
    FOR taken IN
        SELECT o.kind, o.name, CASE x.grantee WHEN 0 THEN 'PUBLIC' ELSE x.grantee::regrole::text END AS grantee,
               CASE WHEN {reading} AND o.place = 'public' THEN max(x.privilege_type) FILTER (
                   WHERE x.privilege_type IN ('SELECT', 'EXECUTE')) END AS kept
          FROM (SELECT 'SCHEMA' AS kind, nspname AS place, quote_ident(nspname) AS name, nspowner AS owner,
                       nspacl AS acl, NULL::oid AS relation FROM pg_namespace WHERE nspname = {schema}
                 UNION ALL
                SELECT CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, n.nspname, c.oid::regclass::text,
                       c.relowner, c.relacl, c.oid
                  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
                 WHERE c.relkind IN ('r', 'v', 'S')
                   AND (n.nspname = {schema} OR n.nspname || '.' || c.relname = ANY ({names}))
                 UNION ALL
                SELECT 'FUNCTION', n.nspname, p.oid::regprocedure::text, p.proowner, p.proacl, NULL
                  FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
                 WHERE n.nspname = {schema} OR n.nspname || '.' || p.proname = ANY ({names})) o
         CROSS JOIN LATERAL (
               SELECT grantee, privilege_type FROM aclexplode(o.acl)
                UNION ALL SELECT e.grantee, 'a column''s' FROM pg_attribute a CROSS JOIN aclexplode(a.attacl) e
                           WHERE a.attrelid = o.relation) x
         WHERE x.grantee <> o.owner GROUP BY o.kind, o.place, o.name, x.grantee
    LOOP
        EXECUTE format('REVOKE ALL ON %s %s FROM %s CASCADE', taken.kind, taken.name, taken.grantee);
        IF taken.kept IS NOT NULL THEN
            EXECUTE format('GRANT %s ON %s %s TO %s', taken.kept, taken.kind, taken.name, taken.grantee);
        END IF;
    END LOOP;
END $roles$""")


def take_back(*, reading: bool) -> Composed:
    """What takes away every right that others have on the bookkeeping.

    Args:
        reading: whether they keep, of what is in public, what it is there for.
    """
    return _TAKE_BACK.format(
        schema=Literal(SCHEMA), names=Literal(list(_IN_PUBLIC)), reading=Literal(reading)
    )


def strangers(*, names: Iterable[str] = (), changes: bool = True) -> Composed:
    """A query for what is in the schema and belongs to a role that may not own it: its kind and name, and the role.

    Args:
        names: of relations and functions elsewhere that are looked at as well.
        changes: whether to look at event triggers, too, which run where anything is made or changed.
    """
    return _STRANGERS.format(
        schema=Literal(SCHEMA), names=Literal(list(names)), changes=Literal(changes), trusted=_TRUSTED
    )


def _refuse_strangers(connection: Connection, *, names: Iterable[str] = (), changes: bool) -> None:
    found = connection.execute(strangers(names=names, changes=changes)).fetchone()
    if found is not None:
        what, owner = found
        raise RefusedError(
            f"{what} belongs to {owner}, who could let code of theirs run with the rights of this role. If the "
            f"migration was run as {owner}, go on so, or have an administrator give the bookkeeping to a role that "
            f"nobody logs in with (--roles-sql > FILE; psql -X -v bookkeeping_of={owner} -f FILE). Otherwise find out "
            "who made it, and rename or drop it; nothing was changed."
        )


def version_of(connection: Connection, layout: Layout = LAYOUT) -> int:
    """The last version applied; 0 before the first, and -1 in the layout before there was a schema."""
    before = _relations(layout.before, "public")
    there, readable, old = connection.execute(_STANDS, [list(before)]).fetchall()[0]
    if not there:
        return _BEFORE if old == len(before) else _NOTHING
    if not readable:
        return layout.latest
    version = int(answer(connection, "SELECT coalesce(max(version), 0) FROM alphapulse_encryption.versions"))
    if version > layout.latest:
        raise RefusedError(
            f"The bookkeeping of this database is of version {version}, and this program knows {layout.latest}: a "
            "newer one has worked here. Install that one; nothing was changed."
        )
    return version


_LOOKED_AT: weakref.WeakSet[Connection] = weakref.WeakSet()


def bookkeeping_exists(connection: Connection) -> bool:
    """Whether the bookkeeping was begun; an earlier version of it is brought up to date.

    Raises:
        RefusedError: it is of an earlier version and this session may not change that, or of a later one; or it
            belongs to somebody whose code the role in use is not to run.
    """
    version = version_of(connection)
    # Once a session: who could give it away in between owns it already, or is a superuser.
    if version > _NOTHING and connection not in _LOOKED_AT:
        _refuse_strangers(connection, changes=False)
        _LOOKED_AT.add(connection)
    if version not in (LAYOUT.latest, _NOTHING):
        ensure_bookkeeping(connection)
    return version != _NOTHING


def missing_bookkeeping(connection: Connection, layout: Layout = LAYOUT) -> tuple[str, ...]:
    """The texts that :func:`ensure_bookkeeping` would execute; empty where there is nothing to do."""
    return layout.missing(version_of(connection, layout))


def ensure_bookkeeping(connection: Connection, layout: Layout = LAYOUT) -> None:
    """Begin the bookkeeping, or bring it up to date; nothing happens where it is as it should be.

    Raises:
        RefusedError: something of our names is there and is not ours, or the role in use may not do it; names what.
            Or nothing can be committed. Nothing was changed.
    """
    refuse_missing_standbys(connection)
    if version_of(connection, layout) == layout.latest and not _wrong_objects(connection, layout):
        return
    if answer(connection, "SELECT current_setting('transaction_read_only')") == "on":
        raise RefusedError(
            "The bookkeeping of this database is missing or of an earlier version of this program. The next step "
            "brings it up to date (--add-columns; --plan shows the SQL), or what --roles-sql prints; nothing was "
            "changed."
        )
    try:
        with connection.transaction():
            connection.execute(
                "SELECT set_config('client_min_messages', 'warning', true), set_config('lock_timeout', %s, true)",
                [_LOCK_TIMEOUT],
            )
            locks.hold(connection, _LOCK, transaction=True)
            _bring_up_to_date(connection, layout)
    except psycopg.errors.InsufficientPrivilege:
        raise RefusedError(
            "The bookkeeping (the schema alphapulse_encryption) is missing or older than this program, and the role in "
            "use may not create or change it. Have a database administrator run what --roles-sql prints: it does so, "
            "and may be run again at any time. Nothing was changed."
        ) from None


def refuse_planted(connection: Connection, layout: Layout = LAYOUT) -> None:
    """Refuse what stands where the bookkeeping belongs and is not ours; reads only.

    Raises:
        RefusedError: names what it is, and whose.
    """
    _refuse_strangers(connection, names=names(layout, version_of(connection, layout)), changes=True)
    _refuse_foreign(connection, layout)


def _bring_up_to_date(connection: Connection, layout: Layout) -> None:
    version = version_of(connection, layout)
    refuse_planted(connection, layout)
    owner = _owner(connection, version)
    texts = layout.missing(version)
    for text in texts:
        connection.execute(text.encode())
    if texts and version != _NOTHING:
        # Who brings it up to date may be a superuser, or a member of the role that keeps it.
        for kind, what in owned(layout):
            connection.execute(SQL("ALTER {} {} OWNER TO {}").format(SQL(kind), what, Identifier(owner)))
    if version == _NOTHING:
        connection.execute(take_back(reading=True))
    again = _made_again(layout, _wrong_objects(connection, layout))
    for text in again.values():
        connection.execute(text.encode())
    _refuse(_wrong_objects(connection, layout))
    if again:
        connection.execute(
            "INSERT INTO alphapulse_encryption.audit_log (actor, action, details) "
            "VALUES ('alphapulse_encryption', 'replace_definitions', %s)",
            [json.dumps({"objects": list(again)})],
        )


def owned(layout: Layout) -> Iterator[tuple[LiteralString, Composable]]:
    """What has an owner of its own: the word of ``ALTER`` for it, and its name."""
    yield "SCHEMA", Identifier(SCHEMA)
    for name in layout.definition:
        kind, _, rest = name.partition(" ")
        if kind == "relation":
            schema, _, relation = rest.partition(".")
            yield ("VIEW" if schema == "public" else "TABLE"), Identifier(schema, relation)
        elif kind == "function":
            schema, _, function = rest.partition("(")[0].partition(".")
            yield "FUNCTION", Identifier(schema, function)


def _refuse_foreign(connection: Connection, layout: Layout) -> None:
    """Refuse what has a name of ours and is not ours, before anything is executed; reads only."""
    version = version_of(connection, layout)
    if version == _NOTHING:
        found = [
            name
            for name in read_objects(connection, SCHEMA, _IN_PUBLIC)
            if name.startswith(("relation", "function"))
        ]
        if answer(connection, "SELECT to_regnamespace(%s) IS NOT NULL", SCHEMA):
            found = [f"schema {SCHEMA}"]
        _refuse(Difference(name, "exists and is not ours", False) for name in found)
    elif version == _BEFORE:
        _refuse(
            differences(connection, SCHEMA, _named(layout.before), layout.before, _owner(connection, version))
        )
    else:
        # Of an earlier version definitions differ, and are looked at once it is brought up to date; owners do not. Nor
        # is there code that no file has made. What can be made again is no reason to refuse.
        mine = version < layout.latest
        _refuse(
            one
            for one in _wrong_objects(connection, layout)
            if one.how.startswith("belongs")
            or (not layout.names(one.name) if mine else layout.statement(one.name) is None)
        )


def names(layout: Layout, version: int) -> tuple[str, ...]:
    """Relations and functions outside of the schema that a database of a version has; each with its schema."""
    # What stands there where nothing was begun is somebody else's, and is refused, any owner's.
    return () if version == _NOTHING else _named(layout.before) if version == _BEFORE else _IN_PUBLIC


def differing_from(layout: Layout, owner: Composable) -> Composed:
    """A query for what of the bookkeeping is not as the last version has it, and an owner's."""
    return differing(SCHEMA, _IN_PUBLIC, layout.definition, owner)


def _named(definition: Definition) -> tuple[str, ...]:
    """Names of the relations and functions, each with its schema."""
    return tuple(
        name.split(" ", 1)[1].partition("(")[0]
        for name in definition
        if name.startswith(("relation", "function"))
    )


def refuse_for_script(connection: Connection) -> tuple[str, ...]:
    """Refuse what is not ours before a script gives everything to its owner; what makes functions again.

    Whose it is the script itself looks at, when it is run.

    Raises:
        RefusedError: names what is there and is not ours.
    """
    if version_of(connection) != LAYOUT.latest:
        _refuse_foreign(connection, LAYOUT)
        return ()
    wrong = [one for one in _wrong_objects(connection, LAYOUT) if not one.how.startswith("belongs")]
    again = _made_again(LAYOUT, wrong)
    _refuse(one for one in wrong if one.name not in again)
    return tuple(again.values())


def owns_bookkeeping(connection: Connection) -> bool:
    """Whether the role of a session, or one that it is a member of, owns the approvals: it could write its own."""
    query = (
        "SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s AND c.relname = 'approvals'"
    )
    return bool(answer(connection, query, SCHEMA))


def _wrong_objects(connection: Connection, layout: Layout) -> tuple[Difference, ...]:
    """What of the bookkeeping is missing, is not ours or differs, and how; reads only."""
    return differences(connection, SCHEMA, _IN_PUBLIC, layout.definition, _owner(connection))


def _owner(connection: Connection, version: int = 1) -> str:
    """The role that keeps the bookkeeping."""
    query: LiteralString = (
        "SELECT tableowner::text FROM pg_tables WHERE schemaname = 'public' AND tablename = 'encryption_audit_log'"
        if version == _BEFORE
        else "SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = 'alphapulse_encryption'"
    )
    return str(answer(connection, query) or "")


def _made_again(layout: Layout, wrong: Iterable[Difference]) -> dict[str, str]:
    """What makes those functions and triggers again that are missing or the owner's, by their names."""
    texts = {one.name: layout.statement(one.name) for one in wrong if one.mine}
    return {name: text for name, text in texts.items() if text is not None}


def _refuse(wrong: Iterable[Difference]) -> None:
    if found := [f"{one.name} {one.how}" for one in wrong]:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise RefusedError(
            f"What stands where the bookkeeping belongs is not ours, or was changed: {'; '.join(found[:_NAMED])}{more}"
            ". Find out who made it, and rename or drop it, or restore it from a backup; nothing was changed."
        )


_NAMED = 6
