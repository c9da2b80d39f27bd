"""Begins the bookkeeping of a database, and brings it up to date: numbered SQL files, applied once each and in order.

What is ours is known by owner and definition, never by name: ``sql/definition.json`` says how every object looks once
the last file is applied. What is there instead is refused. A function or trigger of ours that differs is made again.

A change is the next file; what it makes goes into ``sql/definition.json``, which the test of that file prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import LiteralString, NamedTuple

import psycopg
from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.contents import (
    Definition,
    differences,
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
"""


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


def bookkeeping_exists(connection: Connection) -> bool:
    """Whether the bookkeeping was begun; an earlier version of it is brought up to date.

    Raises:
        RefusedError: it is of an earlier version and this session may not change that, or of a later one.
    """
    version = version_of(connection)
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


def _bring_up_to_date(connection: Connection, layout: Layout) -> None:
    version = version_of(connection, layout)
    _refuse_foreign(connection, layout)
    owner = _owner(connection, version)
    texts = layout.missing(version)
    for text in texts:
        connection.execute(text.encode())
    if texts and version != _NOTHING:
        # Who brings it up to date may be a superuser, or a member of the role that keeps it.
        for kind, what in owned(layout):
            connection.execute(SQL("ALTER {} {} OWNER TO {}").format(SQL(kind), what, Identifier(owner)))
    again = _made_again(connection, layout, _wrong_objects(connection, layout))
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
        found = read_objects(connection, SCHEMA, _IN_PUBLIC)
        wrong = {
            name: "exists and is not ours" for name in found if name.startswith(("relation", "function"))
        }
        if answer(connection, "SELECT to_regnamespace(%s) IS NOT NULL", SCHEMA):
            wrong = {f"schema {SCHEMA}": "exists and is not ours"}
        _refuse(wrong)
    elif version == _BEFORE:
        names = [
            name.split(" ", 1)[1].partition("(")[0]
            for name in layout.before
            if name.startswith(("relation", "function"))
        ]
        found = read_objects(connection, SCHEMA, names)
        _refuse(differences(found, layout.before, _owner(connection, version)))
    else:
        # Of an earlier version definitions differ, and are looked at once it is brought up to date; owners do not. What
        # can be made again is no reason to refuse.
        mine = version < layout.latest
        _refuse(
            {
                name: how
                for name, how in _wrong_objects(connection, layout).items()
                if how.startswith("belongs") or not (mine or layout.statement(name))
            }
        )


def refuse_for_script(connection: Connection) -> tuple[str, ...]:
    """Refuse what is not ours before a script gives everything to its owner; what makes functions again.

    Raises:
        RefusedError: names what is there and is not ours.
    """
    if version_of(connection) != LAYOUT.latest:
        _refuse_foreign(connection, LAYOUT)
        return ()
    wrong = {
        name: how for name, how in _wrong_objects(connection, LAYOUT).items() if not how.startswith("belongs")
    }
    again = _made_again(connection, LAYOUT, wrong)
    _refuse({name: how for name, how in wrong.items() if name not in again})
    return tuple(again.values())


def owns_bookkeeping(connection: Connection) -> bool:
    """Whether the role of a session, or one that it is a member of, owns the approvals: it could write its own."""
    query = (
        "SELECT pg_has_role(c.relowner, 'USAGE') FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname = %s AND c.relname = 'approvals'"
    )
    return bool(answer(connection, query, SCHEMA))


def _wrong_objects(connection: Connection, layout: Layout) -> dict[str, str]:
    """What of the bookkeeping is missing, is not ours or differs, and how: by kind and name; reads only."""
    found = read_objects(connection, SCHEMA, _IN_PUBLIC)
    return differences(found, layout.definition, _owner(connection))


def _owner(connection: Connection, version: int = 1) -> str:
    """The role that keeps the bookkeeping."""
    query: LiteralString = (
        "SELECT tableowner::text FROM pg_tables WHERE schemaname = 'public' AND tablename = 'encryption_audit_log'"
        if version == _BEFORE
        else "SELECT pg_get_userbyid(nspowner)::text FROM pg_namespace WHERE nspname = 'alphapulse_encryption'"
    )
    return str(answer(connection, query) or "")


def _made_again(connection: Connection, layout: Layout, wrong: Mapping[str, str]) -> dict[str, str]:
    """What makes those functions and triggers again that are missing or the owner's, by their names."""
    found, owner = read_objects(connection, SCHEMA, _IN_PUBLIC), _owner(connection)
    texts = {
        name: layout.statement(name) for name in wrong if name not in found or found[name].owner == owner
    }
    return {name: text for name, text in texts.items() if text is not None}


def _refuse(wrong: Mapping[str, str]) -> None:
    if wrong:
        named = "; ".join(f"{name} {how}" for name, how in sorted(wrong.items())[:_NAMED])
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise RefusedError(
            f"What stands where the bookkeeping belongs is not ours, or was changed: {named}{more}. Find out who made "
            "it, and rename or drop it, or restore it from a backup; nothing was changed."
        )


_NAMED = 6
