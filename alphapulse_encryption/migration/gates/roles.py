"""Least privilege: what each role may do, as SQL that a database administrator runs, and as questions to the server.

The bookkeeping belongs to nobody who takes part: an approval that the one who migrates could write would be none. The
tables of the application belong to a role that nobody logs in with; whoever migrates is a member of it, because
PostgreSQL lets only a table's owner change it, and the application is not, so that it cannot take its guard away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping import install
from alphapulse_encryption.migration.bookkeeping.install import (
    BOOKKEEPING_TABLES,
    SCHEMA,
    bookkeeping_exists,
    owns_bookkeeping,
)
from alphapulse_encryption.migration.bookkeeping.script import begin_script
from alphapulse_encryption.migration.postgres.database import LOG_SETTINGS
from alphapulse_encryption.migration.schema.saved import verbatim

Connection = psycopg.Connection[Any]

DEFAULT_PREFIX = "alphapulse_"
# With the longest name behind it, a prefix has to leave an identifier of at most 63 bytes.
_PREFIX = re.compile(r"[a-z_][a-z0-9_]{0,39}")

# What the members of each group are for; in the order of their creation.
GROUPS: Mapping[str, str] = {
    "owner": "owns the catalogued tables; nobody logs in with it",
    "bookkeeper": "owns the bookkeeping; nobody logs in with it, and nobody is a member",
    "planner": "looks at the schema and the bookkeeping, not at the data",
    "verifier": "reads the data and keeps the results of verifications",
    "migrator": "changes the catalogued tables; approves nothing",
    "approver": "approves drops; does not see the data",
    "backup": "reads the whole database for pg_dump",
    "eraser": "a migrator who also rewrites statistics and looks into data files, in a maintenance window",
    "rehearser": "reads the staging database to clone it",
    "application": "reads and writes the catalogued tables, and nothing of the bookkeeping",
}
_READERS = ("planner", "verifier", "migrator", "approver", "backup")


@dataclass(frozen=True)
class Grant:
    """A privilege on a table of the bookkeeping, or on some of its columns."""

    table: str
    privilege: Literal["SELECT", "INSERT", "UPDATE", "DELETE"]
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        columns = f" ({', '.join(self.columns)})" if self.columns else ""
        return f"{self.privilege}{columns} on {SCHEMA}.{self.table}"


def _grants(table: str, *privileges: Literal["INSERT", "UPDATE", "DELETE"]) -> tuple[Grant, ...]:
    return tuple(Grant(table, privilege) for privilege in privileges)


# Without the columns that the server fills in by itself: when it was, and over which database role.
_AUDIT = Grant("audit_log", "INSERT", ("actor", "run_id", "table_name", "action", "details"))
_APPROVE = Grant(
    "approvals",
    "INSERT",
    (
        *("table_name", "approver", "reason", "expires_at", "definition", "catalogue_entry", "key_check"),
        *("verified_at", "backup_id", "run_id"),
    ),
)
_REVOKE = Grant("approvals", "UPDATE", ("revoked_at", "revoked_by"))
_CONSUME = Grant("approvals", "UPDATE", ("consumed_at", "consumed_by"))
# The first step of all begins the bookkeeping with the key.
_BEGIN = (
    Grant("key_checks", "INSERT", ("key_version", "check_value")),
    Grant("key_versions", "INSERT", ("key_version", "state", "changed_by", "run_id")),
)
_VERIFICATION = (
    *_grants("verifications", "INSERT", "UPDATE"),
    *_grants("row_counts", "INSERT", "UPDATE"),
)
_SETTINGS = (
    Grant("settings", "INSERT", ("name", "value")),
    Grant("settings", "UPDATE", ("value", "changed_at", "changed_by")),
)
_BACKUP = (
    *_BEGIN,
    Grant(
        "backups",
        "INSERT",
        (
            *(
                "taken_at",
                "location",
                "bytes",
                "sha256",
                "recipient",
                "listed_entries",
                "verified_at",
                "tables",
            ),
            *("run_id", "drilled_at", "drill"),
        ),
    ),
    Grant("backups", "UPDATE", ("uploaded_at", "uploaded_to")),
    _AUDIT,
)
_MIGRATION = (
    *_BEGIN,
    *_VERIFICATION,
    *_SETTINGS,
    *_grants("columns", "INSERT", "UPDATE"),
    *_grants("tables", "INSERT", "UPDATE"),
    *_grants("ranges", "INSERT", "UPDATE", "DELETE"),
    *_grants("verifications", "DELETE"),
    *_grants("key_usage", "INSERT", "UPDATE"),
    *_grants("key_versions", "UPDATE"),
    *_grants("operations", "INSERT", "UPDATE", "DELETE"),
    *_grants("quarantine", "INSERT", "UPDATE", "DELETE"),
    *_grants("tuning", "INSERT", "DELETE"),
    *_grants("tuning_holders", "INSERT", "DELETE"),
    Grant("definitions", "INSERT", ("table_name", "definition")),
    Grant("definitions", "UPDATE", ("restored_at",)),
    _CONSUME,
    _REVOKE,
    _AUDIT,
)
RIGHTS: Mapping[guide.Right, tuple[Grant, ...]] = {
    "audit": (_AUDIT,),
    "migration": _MIGRATION,
    "verification": _VERIFICATION,
    "backup": _BACKUP,
    "approval": (_APPROVE,),
    "revocation": (_REVOKE,),
}


def _writes(step: guide.Step) -> tuple[Grant, ...]:
    return tuple(dict.fromkeys(grant for right in step.needs.rights for grant in RIGHTS[right]))


def writes() -> dict[str, tuple[Grant, ...]]:
    """What each role may write in the bookkeeping: what its steps have to."""
    found: dict[str, dict[Grant, None]] = {}
    for step in guide.STEPS:
        found.setdefault(step.needs.role, {}).update(dict.fromkeys(_writes(step)))
    return {role: tuple(grants) for role, grants in found.items()}


# Questions


def missing_privileges(connection: Connection, step: guide.Step, tables: Iterable[Table]) -> tuple[str, ...]:
    """What the role of a session may not do, and the step has to, in words; empty where it may be run.

    Args:
        tables: the tables it is for; those that are not there are left out.
    """
    missing = _missing_on_data(connection, step, tables)
    needed = _writes(step)
    if bookkeeping_exists(connection):
        reads = tuple(Grant(table, "SELECT") for table in BOOKKEEPING_TABLES)
        missing += [str(grant) for grant in _not_granted(connection, (*reads, *needed))]
    elif needed and not may_begin(connection):
        missing.append(
            "CREATE on the database and on the schema public, or the bookkeeping made by what --roles-sql prints"
        )
    return tuple(missing)


def refuse_unless_allowed(connection: Connection, name: str, tables: Iterable[Table]) -> None:
    """Refuse a step to a role that lacks a privilege for it, before anything is begun.

    Raises:
        RefusedError: names the privileges, and the role that has them.
    """
    step = guide.step(name)
    missing = missing_privileges(connection, step, tables)
    if missing:
        raise RefusedError(
            f"{step.flag} is not for the database role {current_role(connection)}, which lacks "
            f"{shortened(missing)}. Connect (ALPHAPULSE_DATABASE_URL) as a member of the group role for it, "
            f"{DEFAULT_PREFIX}{step.needs.role} as --roles-sql creates it; nothing was changed."
        )


_NAMED = 6


def shortened(privileges: Sequence[str]) -> str:
    """Privileges for a message: the first of them, and how many more there are."""
    named = "; ".join(privileges[:_NAMED])
    return named if len(privileges) <= _NAMED else f"{named}; and {len(privileges) - _NAMED} more"


def current_role(connection: Connection) -> str:
    """The role whose privileges count in a session."""
    return str(connection.execute("SELECT current_user").fetchall()[0][0])


def is_superuser(connection: Connection) -> bool:
    """Whether no privilege is asked of the role of a session."""
    return bool(
        connection.execute("SELECT rolsuper FROM pg_roles WHERE rolname = current_user").fetchall()[0][0]
    )


def may_write_bookkeeping(connection: Connection) -> bool:
    """Whether the role of a session takes part in a migration that was begun, and does not only look."""
    return not bookkeeping_exists(connection) or not _not_granted(connection, _grants("tables", "INSERT"))


def too_much(connection: Connection) -> tuple[str, ...]:
    """What a role that is no superuser's has, and defeats the separation of duties, in words."""
    if not bookkeeping_exists(connection):
        return ()
    if owns_bookkeeping(connection):
        return (
            "it owns the bookkeeping, so that it could write, change and remove approvals; --roles-sql gives that to a "
            "role of nobody's",
        )
    opposed = (guide.step("approve_drop"), guide.step("drop_unencrypted"))
    both = not any(_not_granted(connection, _writes(step)) for step in opposed)
    return ("it may approve a drop as well as carry it out",) if both else ()


_TABLE = """
SELECT c.relname, pg_has_role(c.relowner, 'USAGE'), has_table_privilege(c.oid, 'SELECT')
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')
"""


def _missing_on_data(connection: Connection, step: guide.Step, tables: Iterable[Table]) -> list[str]:
    if step.needs.data == "nothing":
        return []
    tables = tuple(tables)
    lacking = []
    for table in tables:
        for _, owns, reads in connection.execute(_TABLE, [table.schema_name, table.name]):
            if not (owns if step.needs.data == "own" else reads):
                lacking.append(table.key)
    missing = []
    if lacking:
        what = "ownership, or membership in the owner, of" if step.needs.data == "own" else "SELECT on"
        missing.append(f"{what} {', '.join(lacking)}")
    if step.needs.creates:
        schemas = dict.fromkeys(("public", *(table.schema_name for table in tables)))
        missing += [f"CREATE on the schema {name}" for name in schemas if not _may_create(connection, name)]
    return missing


def may_begin(connection: Connection) -> bool:
    """Whether the role of a session may make the bookkeeping: a schema, and what others use of it in public."""
    row = connection.execute("SELECT has_database_privilege(current_database(), 'CREATE')").fetchone()
    return bool(row and row[0]) and _may_create(connection, "public")


def _may_create(connection: Connection, schema: str) -> bool:
    # Of a list of privileges, any one would do.
    row = connection.execute(
        "SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') FROM pg_namespace "
        "WHERE nspname = %s",
        [schema],
    ).fetchone()
    return row is None or bool(row[0])


_GRANTED = """
SELECT w.number::int
  FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS w (name, privilege, columns, number)
  JOIN pg_class c ON c.relnamespace = 'alphapulse_encryption'::regnamespace AND c.relname = w.name
 WHERE CASE WHEN w.columns = '' THEN has_table_privilege(c.oid, w.privilege)
       ELSE (SELECT bool_and(has_column_privilege(c.oid, a.attnum, w.privilege)) FROM pg_attribute a
              WHERE a.attrelid = c.oid AND a.attname = ANY (string_to_array(w.columns, ','))) END
"""


def _not_granted(connection: Connection, grants: Sequence[Grant]) -> list[Grant]:
    granted = connection.execute(
        _GRANTED,
        [[g.table for g in grants], [g.privilege for g in grants], [",".join(g.columns) for g in grants]],
    )
    numbers = {number for (number,) in granted}
    return [grant for number, grant in enumerate(grants, 1) if number not in numbers]


# The SQL


def roles_sql(connection: Connection, catalogue: Catalogue, prefix: str = DEFAULT_PREFIX) -> str:
    """A script for psql that creates the group roles for a catalogue's tables, and all that they need.

    Reads the database's catalogue only. What the script does it does in one transaction, and may do again.

    Args:
        connection: an open session with the database; any role will do.
        catalogue: what is to be encrypted.
        prefix: what the roles' names begin with.

    Raises:
        ConfigurationError: the prefix cannot begin such a name, or a table is missing.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            "--role-prefix has to begin with a letter, and hold nothing but lower-case letters, digits and "
            "underscores, at most 40 of them."
        )
    script = _Script(connection, prefix, connection.info.server_version, _read(connection, catalogue))
    return script.text()


@dataclass(frozen=True)
class _Relation:
    schema: str
    name: str
    owner: str
    owner_superuser: bool
    owner_logs_in: bool

    @property
    def identifier(self) -> Identifier:
        return Identifier(self.schema, self.name)

    @property
    def keeps_owner(self) -> bool:
        """Whether its owner is a role for owning already; one of PostgreSQL's own takes no members."""
        return not (self.owner_superuser or self.owner_logs_in or self.owner.startswith("pg_"))


@dataclass(frozen=True)
class _Facts:
    tables: tuple[_Relation, ...]
    views: tuple[_Relation, ...]
    guards: tuple[tuple[str, str, str], ...]
    sequences: tuple[tuple[str, str], ...]
    log_settings: tuple[str, ...]

    @property
    def schemas(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("public", *(table.schema for table in self.tables))))


_PARTS = """
SELECT n.nspname, c.relname, r.rolname, r.rolsuper, r.rolcanlogin
  FROM pg_class t JOIN pg_namespace tn ON tn.oid = t.relnamespace
 CROSS JOIN LATERAL (SELECT t.oid AS relid UNION SELECT relid FROM pg_partition_tree(t.oid)) AS p
  JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_roles r ON r.oid = c.relowner
 WHERE tn.nspname = %s AND t.relname = %s AND t.relkind IN ('r', 'p') AND c.relkind IN ('r', 'p')
 ORDER BY c.oid <> t.oid, 1, 2
"""
_VIEWS = """
SELECT n.nspname, c.relname, r.rolname, r.rolsuper, r.rolcanlogin
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
 WHERE c.relkind = 'v' AND n.nspname = %s AND c.relname = ANY (%s)
   AND starts_with(obj_description(c.oid, 'pg_class'), 'alphapulse_encryption')
 ORDER BY 1, 2
"""
_GUARD_FUNCTIONS = """
SELECT DISTINCT pn.nspname, p.proname
  FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid JOIN pg_namespace pn ON pn.oid = p.pronamespace
  JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND starts_with(p.proname, 'encryption_guard_')
"""
_SEQUENCES = """
SELECT DISTINCT n.nspname, s.relname
  FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace n ON n.oid = s.relnamespace
  JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace cn ON cn.oid = c.relnamespace
 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'
   AND cn.nspname = %s AND c.relname = %s
 ORDER BY 1, 2
"""


def _read(connection: Connection, catalogue: Catalogue) -> _Facts:
    tables: list[_Relation] = []
    views: list[_Relation] = []
    guards: list[tuple[str, str, str]] = []
    sequences: list[tuple[str, str]] = []
    for table in catalogue.tables:
        parts = [
            _Relation(*row) for row in connection.execute(_PARTS, [table.schema_name, table.name]).fetchall()
        ]
        if not parts:
            raise ConfigurationError(
                f"Table {table.schema_name}.{table.name} is in the catalogue but not in the database. "
                "Names are exact and case-sensitive: correct the catalogue, or create the table."
            )
        tables += parts
        names = [f"v_{table.name}", f"v_{table.name}_safe"]
        views += [_Relation(*row) for row in connection.execute(_VIEWS, [table.schema_name, names])]
        owner = parts[0].owner if parts[0].keeps_owner else ""
        for schema, name in connection.execute(_GUARD_FUNCTIONS, [table.schema_name, table.name]):
            guards.append((schema, name, owner))
        for part in parts:
            sequences += connection.execute(_SEQUENCES, [part.schema, part.name]).fetchall()
    settings = connection.execute(
        "SELECT name FROM pg_settings WHERE name = ANY (%s) AND context = 'superuser' ORDER BY 1",
        [list(LOG_SETTINGS)],
    )
    return _Facts(
        tuple(tables),
        tuple(views),
        tuple(guards),
        tuple(dict.fromkeys(sequences)),
        tuple(name for (name,) in settings),
    )


_HEAD = """\
-- Least privilege for alphapulse_encryption. Read it, then run it as a superuser, connected to the database that is to
-- be encrypted: psql -X -f FILE. It is one transaction, and may be run again: after the catalogue has changed, and
-- after the program was renewed. It creates group roles without passwords that nobody can log in with; give them to
-- people and programs afterwards, as in: GRANT alphapulse_migrator TO a_role_that_logs_in;
\\set ON_ERROR_STOP on
BEGIN;
SET LOCAL search_path TO pg_catalog;
SET LOCAL client_min_messages TO warning;
SET LOCAL lock_timeout TO '5s';
"""

# A role of that name that was there before, and is more than a group, is somebody else's.
_CREATE_ROLE = """\
DO $roles$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {name}) THEN
        CREATE ROLE {role} NOLOGIN;
    ELSIF EXISTS (SELECT FROM pg_roles WHERE rolname = {name} AND (rolcanlogin OR rolsuper OR rolcreaterole
            OR rolcreatedb OR rolreplication OR rolbypassrls)) THEN
        RAISE EXCEPTION USING MESSAGE = {message};
    END IF;
END $roles$"""

_CONNECT = """\
DO $roles$ BEGIN
    EXECUTE format({statement}, current_database());
END $roles$"""

_STATISTICS_WITHOUT_VALUES = ("starelid", "staattnum", "stainherit", "stanullfrac", "stawidth")
_FILE_FUNCTIONS = (
    "pg_read_binary_file(text, bigint, bigint, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_ls_dir(text, boolean, boolean)",
)
_SET_ON_PARAMETER_SINCE = 150000
_CHECKPOINT_SINCE = 150000
_MAINTAIN_SINCE = 170000


@dataclass(frozen=True)
class _Script:
    connection: Connection
    prefix: str
    version: int
    facts: _Facts

    def text(self) -> str:
        """The whole of it."""
        parts = [_HEAD]
        for title, statements in (
            (f"The group roles\n{self._steps()}", self._roles()),
            ("Who owns the catalogued tables, and what was made for them", self._owners()),
            ("The bookkeeping", self._bookkeeping()),
            ("What everybody takes part in", self._common()),
            ("Reading the bookkeeping, and writing to it", self._privileges()),
            ("The data", self._data()),
            ("What PostgreSQL's own roles and objects are needed for", self._server()),
        ):
            texts = [statement.as_string(self.connection) for statement in statements]
            parts.append(f"\n-- {title}\n" + "".join(f"{text};\n" for text in texts))
        parts.append("\nCOMMIT;\n")
        return "".join(parts)

    def _role(self, name: str) -> Identifier:
        return Identifier(self.prefix + name)

    def _all(self, names: Iterable[str]) -> Composed:
        return SQL(", ").join(self._role(name) for name in names)

    def _steps(self) -> str:
        """A comment that says which steps each role runs."""
        runs: dict[str, list[str]] = {}
        for step in guide.STEPS:
            runs.setdefault(step.needs.role, []).append(step.flag)
        return "\n".join(f"-- {self.prefix}{role} runs {', '.join(flags)}" for role, flags in runs.items())

    def _roles(self) -> Iterator[Composable]:
        for name, purpose in GROUPS.items():
            message = (
                f"{self.prefix + name} exists and is more than a group role: choose another --role-prefix"
            )
            yield SQL(_CREATE_ROLE).format(
                name=SqlLiteral(self.prefix + name), role=self._role(name), message=SqlLiteral(message)
            )
            yield SQL("COMMENT ON ROLE {} IS {}").format(
                self._role(name), SqlLiteral(f"alphapulse_encryption: {purpose}")
            )
        yield SQL("GRANT {} TO {}").format(self._role("migrator"), self._role("eraser"))

    def _owners(self) -> Iterator[Composable]:
        yield SQL("GRANT {} TO {}").format(self._role("owner"), self._role("migrator"))
        # Objects change hands under the rules for whoever takes them: they may create there.
        for schema in self.facts.schemas:
            yield SQL("GRANT USAGE, CREATE ON SCHEMA {} TO {}").format(
                Identifier(schema), self._role("owner")
            )
        kept = dict.fromkeys(table.owner for table in self.facts.tables if table.keeps_owner)
        for owner in kept:
            if owner != self.prefix + "owner":
                yield SQL("GRANT {} TO {}").format(Identifier(owner), self._role("migrator"))
                for schema in self.facts.schemas:
                    yield SQL("GRANT USAGE, CREATE ON SCHEMA {} TO {}").format(
                        Identifier(schema), Identifier(owner)
                    )
        for table in self.facts.tables:
            if not table.keeps_owner:
                yield SQL("ALTER TABLE {} OWNER TO {}").format(table.identifier, self._role("owner"))
        applications = dict.fromkeys(
            table.owner for table in self.facts.tables if table.owner_logs_in and not table.owner_superuser
        )
        for name in applications:
            yield SQL("GRANT {} TO {}").format(self._role("application"), Identifier(name))
        for view in self.facts.views:
            if not view.keeps_owner:
                yield SQL("ALTER VIEW {} OWNER TO {}").format(view.identifier, self._role("owner"))
        for schema, name, owner in self.facts.guards:
            new = Identifier(owner) if owner else self._role("owner")
            yield SQL("ALTER FUNCTION {}() OWNER TO {}").format(Identifier(schema, name), new)

    def _bookkeeping(self) -> Iterator[Composable]:
        yield SQL("GRANT USAGE ON SCHEMA public TO {}").format(self._role("bookkeeper"))
        yield verbatim(begin_script(self.connection, self.prefix + "bookkeeper").strip().removesuffix(";"))

    def _common(self) -> Iterator[Composable]:
        groups = [name for name in GROUPS if name not in ("owner", "bookkeeper")]
        statement = SQL("GRANT CONNECT ON DATABASE %I TO {}").format(self._all(groups))
        yield SQL(_CONNECT).format(statement=SqlLiteral(statement.as_string(self.connection)))
        for schema in self.facts.schemas:
            yield SQL("GRANT USAGE ON SCHEMA {} TO {}").format(Identifier(schema), self._all(groups))

    def _privileges(self) -> Iterator[Composable]:
        yield SQL("GRANT USAGE ON SCHEMA {} TO {}").format(Identifier(SCHEMA), self._all(_READERS))
        names = [Identifier(SCHEMA, name) for name in BOOKKEEPING_TABLES]
        names += [Identifier("public", name) for name in (install.WATCHED, install.ASKED)]
        yield SQL("GRANT SELECT ON {} TO {}").format(SQL(", ").join(names), self._all(_READERS))
        for role, grants in writes().items():
            for grant in grants:
                columns = SQL(", ").join(map(Identifier, grant.columns))
                yield SQL("GRANT {}{} ON {} TO {}").format(
                    SQL(grant.privilege),
                    SQL(" ({})").format(columns) if grant.columns else SQL(""),
                    Identifier(SCHEMA, grant.table),
                    self._role(role),
                )
        yield SQL("GRANT SELECT ON {} TO {}").format(
            Identifier("public", install.ASKED), self._role("application")
        )
        yield SQL("GRANT EXECUTE ON FUNCTION {}(text, int, bigint) TO {}").format(
            Identifier("public", install.CALLED), self._role("application")
        )

    def _data(self) -> Iterator[Composable]:
        for table in self.facts.tables:
            yield SQL("GRANT SELECT ON {} TO {}").format(table.identifier, self._role("verifier"))
            yield SQL("GRANT SELECT, INSERT, UPDATE, DELETE ON {} TO {}").format(
                table.identifier, self._role("application")
            )
        for schema, name in self.facts.sequences:
            yield SQL("GRANT USAGE, SELECT ON SEQUENCE {} TO {}").format(
                Identifier(schema, name), self._role("application")
            )

    def _server(self) -> Iterator[Composable]:
        # pg_dump reads all of the database, sequences included.
        yield SQL("GRANT pg_read_all_data TO {}").format(self._all(("backup", "rehearser")))
        # Replicas, other sessions, the settings, and the statistics of statements.
        yield SQL("GRANT pg_monitor TO {}").format(self._role("migrator"))
        yield SQL("GRANT pg_read_all_settings TO {}").format(self._all(("planner", "verifier")))
        # How wide values are on average; the values that the statistics hold are not among these columns.
        yield SQL("GRANT SELECT ({}) ON pg_catalog.pg_statistic TO {}").format(
            SQL(", ").join(map(Identifier, _STATISTICS_WITHOUT_VALUES)), self._role("planner")
        )
        if self.version >= _SET_ON_PARAMETER_SINCE:
            # So that their sessions keep values out of the server's log.
            for name in self.facts.log_settings:
                yield SQL("GRANT SET ON PARAMETER {} TO {}").format(
                    Identifier(name), self._all(("verifier", "migrator", "backup", "rehearser"))
                )
        if self.version >= _CHECKPOINT_SINCE:
            yield SQL("GRANT pg_checkpoint TO {}").format(self._role("eraser"))
        if self.version >= _MAINTAIN_SINCE:
            yield SQL(
                "GRANT MAINTAIN ON pg_catalog.pg_statistic, pg_catalog.pg_statistic_ext_data TO {}"
            ).format(self._role("eraser"))
        for function in _FILE_FUNCTIONS:
            yield SQL("GRANT EXECUTE ON FUNCTION pg_catalog.{} TO {}").format(
                verbatim(function), self._role("eraser")
            )
