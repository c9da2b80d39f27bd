"""Least privilege: what each role may do, as SQL that a database administrator runs, and as questions to the server.

The bookkeeping belongs to nobody who takes part: an approval that the one who migrates could write would be none. The
application's tables belong to a role that nobody logs in with: who migrates is a member, because PostgreSQL lets only
a table's owner change it, and the application is not, so that it cannot take its guard away.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, LiteralString

from psycopg.sql import SQL, Composable, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping import install
from alphapulse_encryption.migration.bookkeeping.script import begin_script
from alphapulse_encryption.migration.postgres.database import LOG_SETTINGS, SET_PRIVILEGES, Connection, answer
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.guard import take_over
from alphapulse_encryption.migration.schema.names import guard_name
from alphapulse_encryption.migration.schema.reachable_code import Foreign, foreign_code
from alphapulse_encryption.migration.schema.sql import verbatim

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
    "writer": "the data path's own log-in: reads the catalogued tables, writes their catalogued columns",
    "approver": "approves drops; does not see the data",
    "backup": "reads the whole database for pg_dump",
    "eraser": "a migrator who also rewrites statistics and looks into data files, in a maintenance window",
    "rehearser": "reads the staging database to clone it",
    "application": "reads and writes the catalogued tables, and nothing of the bookkeeping",
}
_READERS = ("planner", "verifier", "migrator", "approver", "backup")


@dataclass(frozen=True)
class Grant:
    """A privilege on a table of the bookkeeping, or on some of its columns, which have commas between them."""

    table: str
    privilege: Literal["SELECT", "INSERT", "UPDATE", "DELETE"]
    columns: str = ""

    def __str__(self) -> str:
        columns = f" ({self.columns})" if self.columns else ""
        return f"{self.privilege}{columns} on {install.SCHEMA}.{self.table}"


def _grants(table: str, *privileges: Literal["INSERT", "UPDATE", "DELETE"]) -> tuple[Grant, ...]:
    return tuple(Grant(table, privilege) for privilege in privileges)


# Without the columns that the server fills in by itself: when it was, and over which database role.
_AUDIT = Grant("audit_log", "INSERT", "actor, run_id, table_name, action, details")
_APPROVE = Grant(
    "approvals",
    "INSERT",
    "table_name, approver, reason, expires_at, definition, catalogue_entry, key_check, verified_at, backup_id, run_id, "
    "number, mac",
)
_REVOKE = Grant("approvals", "UPDATE", "revoked_at, revoked_by")
_CONSUME = Grant("approvals", "UPDATE", "consumed_at, consumed_by")
# Of an operation on rows, how far it is.
_PROGRESS = (
    "status, position, rows_processed, values_processed, started_at, updated_at, completed_at, waiting_for, "
    "error_message"
)
# What the data path writes, and nothing else; one column of a table's state, so that it may hold that.
WRITER = (
    Grant("ranges", "UPDATE", _PROGRESS),
    Grant("operations", "INSERT", "table_name, batch_range, operation, goal"),
    Grant("operations", "UPDATE", _PROGRESS),
    Grant("columns", "UPDATE", "status, started_at, completed_at, records_processed, error_message"),
    Grant("quarantine", "INSERT", "table_name, batch_range, key, step, reason, run_id"),
    Grant("quarantine", "UPDATE", "batch_range, reason, since, run_id"),
    Grant("quarantine", "DELETE"),
    Grant("key_usage", "INSERT", "context, key_version, source, messages"),
    Grant("key_usage", "UPDATE", "messages, updated_at"),
    Grant("tables", "UPDATE", "changed_at"),
    _AUDIT,
    # The number of its own entry.
    Grant("audit_log", "SELECT", "id"),
)
_READ_BY_WRITER = tuple(
    dict.fromkeys(
        (*(g.table for g in WRITER if g.table != "audit_log"), "versions", "key_checks", "key_versions")
    )
)
# The first step of all begins the bookkeeping with the key.
_BEGIN = (
    Grant("key_checks", "INSERT", "key_version, check_value"),
    Grant("key_versions", "INSERT", "key_version, state, changed_by, run_id"),
)
_VERIFICATION = (
    *_grants("verifications", "INSERT", "UPDATE"),
    *_grants("row_counts", "INSERT", "UPDATE"),
    # What is kept is numbered by the entry that is made with it.
    _AUDIT,
)
_SETTINGS = (
    Grant("settings", "INSERT", "name, value"),
    Grant("settings", "UPDATE", "value, changed_at, changed_by"),
)
_BACKUP = (
    *_BEGIN,
    Grant(
        "backups",
        "INSERT",
        "taken_at, location, bytes, sha256, recipient, listed_entries, verified_at, tables, run_id, drilled_at, drill, "
        "number, mac",
    ),
    Grant("backups", "UPDATE", "uploaded_at, uploaded_to"),
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
    Grant("definitions", "INSERT", "table_name, definition, number, mac"),
    Grant("definitions", "UPDATE", "restored_at, number, mac"),
    _CONSUME,
    _REVOKE,
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


# Questions


def missing_privileges(connection: Connection, step: guide.Step, tables: Iterable[Table]) -> tuple[str, ...]:
    """What a step does with these tables and the role of a session may not, in words; empty where it may be run."""
    missing = _missing_on_data(connection, step, tables)
    needed = _writes(step)
    if install.bookkeeping_exists(connection):
        reads = tuple(Grant(table, "SELECT") for table in install.BOOKKEEPING_TABLES)
        missing += map(str, _not_granted(connection, (*reads, *needed)))
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


def missing_of_writer(connection: Connection) -> tuple[str, ...]:
    """What the role of a session lacks in the bookkeeping to be the data path's, in words."""
    reads = tuple(Grant(table, "SELECT") for table in _READ_BY_WRITER)
    return tuple(map(str, _not_granted(connection, (*reads, *WRITER))))


_NAMED = 6


def shortened(privileges: Sequence[str]) -> str:
    """Privileges for a message: the first of them, and how many more there are."""
    named = "; ".join(privileges[:_NAMED])
    return named if len(privileges) <= _NAMED else f"{named}; and {len(privileges) - _NAMED} more"


def current_role(connection: Connection) -> str:
    """The role whose privileges count in a session."""
    return str(answer(connection, "SELECT current_user::text"))


def may_write_bookkeeping(connection: Connection) -> bool:
    """Whether the role of a session takes part in a migration that was begun, and does not only look."""
    return not install.bookkeeping_exists(connection) or not _not_granted(
        connection, _grants("tables", "INSERT")
    )


def too_much(connection: Connection) -> tuple[str, ...]:
    """What a role that is no superuser's has, and defeats the separation of duties, in words."""
    if not install.bookkeeping_exists(connection):
        return ()
    if install.owns_bookkeeping(connection):
        return (
            "it owns the bookkeeping, so that it could write, change and remove approvals; --roles-sql gives that to a "
            "role of nobody's",
        )
    opposed = (guide.step("approve_drop"), guide.step("drop_unencrypted"))
    both = not any(_not_granted(connection, _writes(step)) for step in opposed)
    return ("it may approve a drop as well as carry it out",) if both else ()


# By the data that a step needs: of which tables the role may not so much.
_LACKING = """
SELECT CASE %s WHEN 'own' THEN NOT pg_has_role(c.relowner, 'USAGE') ELSE NOT has_table_privilege(c.oid, 'SELECT') END
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname = %s AND c.relname = %s AND c.relkind IN ('r', 'p')
"""


def _missing_on_data(connection: Connection, step: guide.Step, tables: Iterable[Table]) -> list[str]:
    needed = step.needs.data
    if needed == "nothing":
        return []
    tables = tuple(tables)
    lacking = [t.key for t in tables if answer(connection, _LACKING, needed, t.schema_name, t.name)]
    missing = []
    if lacking:
        what = "ownership, or membership in the owner, of" if needed == "own" else "SELECT on"
        missing.append(f"{what} {', '.join(lacking)}")
    if step.needs.creates:
        schemas = dict.fromkeys(("public", *(table.schema_name for table in tables)))
        missing += [f"CREATE on the schema {name}" for name in schemas if not _may_create(connection, name)]
    return missing


def may_begin(connection: Connection) -> bool:
    """Whether the role of a session may make the bookkeeping: a schema, and what others use of it in public."""
    on_database = answer(connection, "SELECT has_database_privilege(current_database(), 'CREATE')")
    return on_database and _may_create(connection, "public")


def _may_create(connection: Connection, schema: str) -> bool:
    # Of a list of privileges, any one would do.
    query: LiteralString = (
        "SELECT has_schema_privilege(oid, 'CREATE') AND has_schema_privilege(oid, 'USAGE') FROM pg_namespace "
        "WHERE nspname = %s"
    )
    return answer(connection, query, schema) is not False


_NOT_GRANTED = """
SELECT w.number::int
  FROM unnest(%s::text[], %s::text[], %s::text[]) WITH ORDINALITY AS w (name, privilege, columns, number)
  LEFT JOIN pg_class c ON c.relnamespace = 'alphapulse_encryption'::regnamespace AND c.relname = w.name
 WHERE (CASE WHEN w.columns = '' THEN has_table_privilege(c.oid, w.privilege)
       ELSE (SELECT bool_and(has_column_privilege(c.oid, a.attnum, w.privilege)) FROM pg_attribute a
              WHERE a.attrelid = c.oid AND a.attname = ANY (string_to_array(w.columns, ', '))) END) IS NOT TRUE
 ORDER BY 1
"""


def _not_granted(connection: Connection, grants: Sequence[Grant]) -> list[Grant]:
    missing = connection.execute(
        _NOT_GRANTED,
        [[g.table for g in grants], [g.privilege for g in grants], [g.columns for g in grants]],
    )
    return [grants[number - 1] for (number,) in missing]


# The SQL


def roles_sql(connection: Connection, catalogue: Catalogue, prefix: str = DEFAULT_PREFIX) -> str:
    """A script for psql that creates the group roles for a catalogue's tables, and all that they need.

    Reads the database's catalogue only; any role will do. What the script does it does in one transaction, and may do
    again.

    Args:
        prefix: what the roles' names begin with.

    Raises:
        ConfigurationError: the prefix cannot begin such a name, or a table is missing.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            "--role-prefix has to begin with a letter, and hold nothing but lower-case letters, digits and "
            "underscores, at most 40 of them."
        )
    script = _Script(connection, prefix, connection.info.server_version)
    script.read(catalogue)
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


_PARTS = """
SELECT n.nspname, c.relname, r.rolname, r.rolsuper, r.rolcanlogin
  FROM pg_class t JOIN pg_namespace tn ON tn.oid = t.relnamespace
 CROSS JOIN LATERAL (SELECT t.oid AS relid UNION SELECT relid FROM pg_partition_tree(t.oid)) AS p
  JOIN pg_class c ON c.oid = p.relid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_roles r ON r.oid = c.relowner
 WHERE tn.nspname = %s AND t.relname = %s AND t.relkind IN ('r', 'p') AND c.relkind IN ('r', 'p')
 ORDER BY c.oid <> t.oid, 1, 2
"""
_COLUMNS = """
SELECT %(table)s::regclass::oid, array_agg(attname::text ORDER BY attnum) FROM pg_attribute
 WHERE attrelid = %(table)s::regclass AND attname = ANY (%(names)s)
"""
# What somebody else owns holds what they like, whatever its name and its comment: it is never taken over.
_VIEWS = """
SELECT n.nspname, c.relname, r.rolname, r.rolsuper, r.rolcanlogin
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
 WHERE c.relkind = 'v' AND n.nspname = %s AND c.relname = ANY (%s)
   AND starts_with(obj_description(c.oid, 'pg_class'), 'alphapulse_encryption')
 ORDER BY 1, 2
"""
# Before PostgreSQL 15 it is so of public: code that runs as the data path's role could leave a function there.
_FOR_ALL = """
SELECT 'every log-in, that of the data path included', quote_ident(nspname) FROM pg_namespace
 WHERE has_schema_privilege('public', oid, 'CREATE') AND nspname !~ '^pg_' ORDER BY 2
"""
_SEQUENCES = """
SELECT DISTINCT n.nspname, s.relname
  FROM pg_depend d JOIN pg_class s ON s.oid = d.objid AND s.relkind = 'S' JOIN pg_namespace n ON n.oid = s.relnamespace
  JOIN pg_class c ON c.oid = d.refobjid JOIN pg_namespace cn ON cn.oid = c.relnamespace
 WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass AND d.deptype = 'a'
   AND cn.nspname = %s AND c.relname = %s
 ORDER BY 1, 2
"""
# They stay their maker's when a table changes hands, and are made again when a plaintext column is.
_STATISTICS = """
SELECT n.nspname, s.stxname FROM pg_statistic_ext s JOIN pg_namespace n ON n.oid = s.stxnamespace
  JOIN pg_class c ON c.oid = s.stxrelid JOIN pg_namespace cn ON cn.oid = c.relnamespace
 WHERE cn.nspname = %s AND c.relname = %s
 ORDER BY 1, 2
"""


_DUMPED = """
SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1
"""
_CREATORS = """
SELECT DISTINCT r.rolname
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_roles r ON r.oid = c.relowner
 WHERE c.relkind IN ('r', 'p', 'S', 'm', 'v') AND r.rolname !~ '^pg_' AND n.nspname !~ '^(pg_|information_schema$)'
 ORDER BY 1
"""

_HEAD = """\
-- Least privilege for alphapulse_encryption. Read it, then run it as a superuser, connected to the database that is to
-- be encrypted: psql -X -f FILE. It is one transaction, and may be run again: after the catalogue has changed, and
-- after the program was renewed. It creates group roles without passwords that nobody can log in with; give them to
-- people and programs afterwards, as in: GRANT alphapulse_migrator TO a_role_that_logs_in;
\\set ON_ERROR_STOP on
-- The owner of a database chooses how its sessions begin, and with that how this text is read.
\\encoding UTF8
SET standard_conforming_strings TO on;
BEGIN;
SET LOCAL search_path TO pg_catalog, pg_temp;
SET LOCAL client_min_messages TO warning;
SET LOCAL lock_timeout TO '5s';
"""

# A role of that name that was there before, and is more than a group, is somebody else's. So is one that somebody has
# the say of: who may make roles has it of those that they made, and could become whatever the script makes of them.
_CREATE_ROLE = """\
DO $roles$ DECLARE had record; BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = {name}) THEN
        CREATE ROLE {role} NOLOGIN;
    ELSIF EXISTS (SELECT FROM pg_roles WHERE rolname = {name} AND (rolcanlogin OR rolsuper OR rolcreaterole
            OR rolcreatedb OR rolreplication OR rolbypassrls)) THEN
        RAISE EXCEPTION USING MESSAGE = {message};
    END IF;
    FOR had IN
        SELECT o.rolname, m.admin_option FROM pg_auth_members m JOIN pg_roles o ON o.oid = m.member
          JOIN pg_roles r ON r.oid = m.roleid
         WHERE r.rolname = {name} AND NOT o.rolsuper AND (m.admin_option OR {nobodys}
            OR NOT coalesce(starts_with(shobj_description(r.oid, 'pg_authid'), 'alphapulse_encryption: '), false))
    LOOP
        RAISE EXCEPTION USING MESSAGE = format({member}, had.rolname),
            HINT = format('If nobody else needs the role: REVOKE %s FROM %I; or choose another --role-prefix.',
                {quoted}, had.rolname);
    END LOOP;
    COMMENT ON ROLE {role} IS {comment};
END $roles$"""

# What a view shows, its owner has to be allowed to see: one that shows more than its table, or that somebody made who
# may not change the table, would show it by the rights of its new owner.
_TAKE_VIEW = SQL("""BEGIN
    IF NOT (SELECT pg_has_role(v.relowner, t.relowner, 'MEMBER') FROM pg_class v, pg_class t
             WHERE v.oid = {name}::regclass AND t.oid = {table}::regclass) THEN
        RAISE EXCEPTION USING MESSAGE = format('view %s belongs to somebody who may not change %s', {name}, {table}),
            HINT = 'Find out who made it, and drop it; --create-views makes it.';
    END IF;
    ALTER VIEW {view} OWNER TO {owner};
    IF EXISTS (SELECT FROM pg_rewrite w LEFT JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = w.oid
                WHERE w.ev_class = {name}::regclass AND (w.rulename <> '_RETURN'
                   OR d.refclassid <> 'pg_class'::regclass
                   OR d.refobjid NOT IN ({name}::regclass, {table}::regclass))
               HAVING count(*) > 0 OR NOT EXISTS (SELECT FROM pg_depend d JOIN pg_rewrite w ON d.objid = w.oid
                WHERE d.classid = 'pg_rewrite'::regclass AND w.ev_class = {name}::regclass
                  AND d.refclassid = 'pg_class'::regclass AND d.refobjid = {table}::regclass)) THEN
        RAISE EXCEPTION USING
            MESSAGE = format('view %s is not what this program makes: it shows other things than %s', {name}, {table}),
            HINT = 'Find out who made it, and drop it; --create-views makes it.';
    END IF;
END""")

# Earlier scripts gave it.
_TAKE_BACK = """\
DO $roles$ BEGIN
    IF EXISTS (SELECT FROM pg_auth_members
                WHERE roleid = 'pg_read_all_data'::regrole AND member = to_regrole({})) THEN
        REVOKE pg_read_all_data FROM {};
    END IF;
END $roles$"""
_READ_LARGE_OBJECTS = """\
DO $roles$ DECLARE object oid; BEGIN
    FOR object IN SELECT oid FROM pg_largeobject_metadata LOOP
        EXECUTE format('GRANT SELECT ON LARGE OBJECT %s TO {}', object);
    END LOOP;
END $roles$"""

_FOREIGN = """
-- Code of other roles, which would run with the rights of who migrates: the steps refuse until it is its table owner's,
-- or gone. It is not taken over as it is. Read it, and take the comment off the statements that you agree with.
"""


def _in_comments(one: Foreign) -> str:
    """What is said of code in the script. No name ends the comment: it would go on as a statement of a superuser's."""
    lines = (f"{one.what}: belongs to {one.owner}, reached from {one.reached}", one.remedy)
    return "".join(f"-- {''.join(c if c.isprintable() else '?' for c in line)}\n" for line in lines)


_STATISTICS_WITHOUT_VALUES = ("starelid", "staattnum", "stainherit", "stanullfrac", "stawidth")
_FILE_FUNCTIONS = (
    "pg_read_binary_file(text, bigint, bigint, boolean)",
    "pg_stat_file(text, boolean)",
    "pg_ls_dir(text, boolean, boolean)",
)
_CHECKPOINT_SINCE = 150000
_MAINTAIN_SINCE = 170000


@dataclass(frozen=True)
class _Script:
    """What the script is made from, and the statements of its parts."""

    connection: Connection
    prefix: str
    version: int
    tables: list[_Relation] = field(default_factory=list)
    # Each with its table.
    views: list[tuple[_Relation, _Relation]] = field(default_factory=list)
    # The columns of each table that the data path writes.
    written: list[tuple[Identifier, list[str]]] = field(default_factory=list)
    # What gives each guard function to the role that keeps its table.
    guards: list[Composed] = field(default_factory=list)
    # What code of others would run with the rights of who migrates, by the statement that ends it.
    foreign: dict[str, Foreign] = field(default_factory=dict)
    sequences: dict[tuple[str, str], None] = field(default_factory=dict)
    statistics: list[tuple[str, str]] = field(default_factory=list)
    log_settings: list[str] = field(default_factory=list)
    # The schemas of which a dump holds something, and who owns tables and sequences there.
    dumped: list[str] = field(default_factory=list)
    creators: list[str] = field(default_factory=list)

    def read(self, catalogue: Catalogue) -> None:
        """Look at what there is in the database."""
        ask = self.connection.execute
        for table in catalogue.tables:
            named = [table.schema_name, table.name]
            parts = [_Relation(*row) for row in ask(_PARTS, named)]
            if not parts:
                raise ConfigurationError(
                    f"Table {table.schema_name}.{table.name} is in the catalogue but not in the database. "
                    "Names are exact and case-sensitive: correct the catalogue, or create the table."
                )
            self.tables.extend(parts)
            views = [f"v_{table.name}", f"v_{table.name}_safe"]
            found = ask(_VIEWS, [table.schema_name, views])
            self.views.extend((_Relation(*row), parts[0]) for row in found)
            owner = parts[0].owner if parts[0].keeps_owner else self.prefix + "owner"
            guard = ask("SELECT FROM pg_proc WHERE proname = %s", [guard_name(table)]).fetchone()
            if guard is not None:
                definition = read_table(self.connection, table, plaintext=False, look=True)
                change = take_over(self.connection, definition, owner)
                self.guards.extend([] if change is None else [change])
            whole = parts[0].identifier.as_string(self.connection)
            names = [name for column in table.columns for name in (column.name, *column.derived)]
            oid, columns = ask(_COLUMNS, {"table": whole, "names": names}).fetchall()[0]
            self.written.append((parts[0].identifier, columns))
            # Partitions change hands by the script itself.
            taken = {(part.schema, part.name) for part in parts if not part.keeps_owner}
            for one in foreign_code(self.connection, oid, Identifier(owner).as_string(self.connection)):
                if one.table not in taken:
                    self.foreign.setdefault(one.remedy, one)
            for part in parts:
                if not part.keeps_owner:
                    self.statistics.extend(ask(_STATISTICS, [part.schema, part.name]).fetchall())
                self.sequences.update(dict.fromkeys(ask(_SEQUENCES, [part.schema, part.name])))
        for name, schema in ask(_FOR_ALL):
            remedy = f"REVOKE CREATE ON SCHEMA {schema} FROM PUBLIC;"
            what = Foreign(f"the privilege CREATE on the schema {schema}", "PUBLIC", name, remedy)
            self.foreign.setdefault(remedy, what)
        settings = ask(
            "SELECT name FROM pg_settings WHERE name = ANY (%s) AND context = 'superuser' ORDER BY 1",
            [list(LOG_SETTINGS)],
        )
        self.log_settings.extend(name for (name,) in settings)
        self.dumped.extend(name for (name,) in ask(_DUMPED))
        self.creators.extend(name for (name,) in ask(_CREATORS))

    @property
    def _schemas(self) -> list[Identifier]:
        return [*map(Identifier, dict.fromkeys(("public", *(table.schema for table in self.tables))))]

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
        if self.foreign:
            parts.append(_FOREIGN + "".join(map(_in_comments, self.foreign.values())))
        parts.append("\nCOMMIT;\n")
        return "".join(parts)

    def _role(self, name: str) -> Identifier:
        return Identifier(self.prefix + name)

    def _grant(self, what: LiteralString, *objects: Composable, to: Iterable[str | Identifier]) -> Composed:
        """Grants something to groups by their names, or to other roles."""
        roles = [self._role(role) if isinstance(role, str) else role for role in to]
        return SQL("GRANT {} TO {}").format(SQL(what).format(*objects), SQL(", ").join(roles))

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
                name=SqlLiteral(self.prefix + name),
                role=self._role(name),
                message=SqlLiteral(message),
                nobodys=SqlLiteral(name == "bookkeeper"),
                comment=SqlLiteral(f"alphapulse_encryption: {purpose}"),
                member=SqlLiteral(
                    f"{self.prefix + name} exists, and %s is a member of it or may make members"
                ),
                quoted=SqlLiteral(self._role(name).as_string(self.connection)),
            )
        yield self._grant("{}", self._role("migrator"), to=["eraser"])

    def _owners(self) -> Iterator[Composable]:
        ours = self._role("owner")
        owners = {table.owner: Identifier(table.owner) for table in self.tables if table.keeps_owner}
        for owner in {self.prefix + "owner": ours, **owners}.values():
            yield self._grant("{}", owner, to=["migrator"])
            # Objects change hands under the rules for who takes them: they may create there.
            for schema in self._schemas:
                yield self._grant("USAGE, CREATE ON SCHEMA {}", schema, to=[owner])
        # Before their tables, whose owners made them.
        for view, table in self.views:
            if not view.keeps_owner:
                text = _TAKE_VIEW.format(
                    view=view.identifier,
                    owner=ours,
                    name=SqlLiteral(view.identifier.as_string(self.connection)),
                    table=SqlLiteral(table.identifier.as_string(self.connection)),
                )
                yield SQL("DO {}").format(SqlLiteral(text.as_string(self.connection)))
        for table in self.tables:
            if not table.keeps_owner:
                yield SQL("ALTER TABLE {} OWNER TO {}").format(table.identifier, ours)
        for statistics in self.statistics:
            yield SQL("ALTER STATISTICS {} OWNER TO {}").format(Identifier(*statistics), ours)
        applications = [t.owner for t in self.tables if t.owner_logs_in and not t.owner_superuser]
        for name in dict.fromkeys(applications):
            yield self._grant("{}", self._role("application"), to=[Identifier(name)])
        yield from self.guards

    def _bookkeeping(self) -> Iterator[Composable]:
        yield self._grant("USAGE ON SCHEMA public", to=["bookkeeper"])
        yield verbatim(begin_script(self.connection, self.prefix + "bookkeeper").strip().removesuffix(";"))

    def _common(self) -> Iterator[Composable]:
        groups = [name for name in GROUPS if name not in ("owner", "bookkeeper")]
        # The database that psql is connected to.
        yield self._grant('CONNECT ON DATABASE :"DBNAME"', to=groups)
        for schema in self._schemas:
            yield self._grant("USAGE ON SCHEMA {}", schema, to=groups)

    def _privileges(self) -> Iterator[Composable]:
        yield self._grant("USAGE ON SCHEMA {}", Identifier(install.SCHEMA), to=_READERS)
        names = [Identifier(install.SCHEMA, name) for name in install.BOOKKEEPING_TABLES]
        names += [Identifier("public", name) for name in (install.WATCHED, install.ASKED)]
        yield self._grant("SELECT ON {}", SQL(", ").join(names), to=_READERS)
        yield self._grant("USAGE ON SCHEMA {}", Identifier(install.SCHEMA), to=["writer"])
        names = [Identifier(install.SCHEMA, name) for name in _READ_BY_WRITER]
        yield self._grant("SELECT ON {}", SQL(", ").join(names), to=["writer"])
        # What each role's steps have to write.
        writes: dict[str, dict[Grant, None]] = {"writer": dict.fromkeys(WRITER)}
        for step in guide.STEPS:
            writes.setdefault(step.needs.role, {}).update(dict.fromkeys(_writes(step)))
        for role, grants in writes.items():
            for grant in grants:
                names = [Identifier(name) for name in grant.columns.split(", ") if name]
                columns = SQL(" ({})").format(SQL(", ").join(names)) if names else SQL("")
                table = Identifier(install.SCHEMA, grant.table)
                yield self._grant("{}{} ON {}", SQL(grant.privilege), columns, table, to=[role])
        yield self._grant("SELECT ON {}", Identifier("public", install.ASKED), to=["application"])
        called = Identifier("public", install.CALLED)
        yield self._grant("EXECUTE ON FUNCTION {}(text, int, bigint)", called, to=["application"])

    def _data(self) -> Iterator[Composable]:
        for table in self.tables:
            yield self._grant("SELECT ON {}", table.identifier, to=["verifier", "writer"])
            yield self._grant("SELECT, INSERT, UPDATE, DELETE ON {}", table.identifier, to=["application"])
        # Those that --add-columns adds, it gives by itself.
        for table_name, columns in self.written:
            listed = SQL(", ").join(map(Identifier, columns))
            yield self._grant("UPDATE ({}) ON {}", listed, table_name, to=["writer"])
        for name in self.sequences:
            yield self._grant("USAGE, SELECT ON SEQUENCE {}", Identifier(*name), to=["application"])

    def _server(self) -> Iterator[Composable]:
        yield from self._reading_everything(["backup", "rehearser"])
        # Replicas, other sessions, the settings, and the statistics of statements.
        yield self._grant("pg_monitor", to=["migrator"])
        yield self._grant("pg_read_all_settings", to=["planner", "verifier"])
        # How wide values are on average; the values that the statistics hold are not among these columns.
        columns = SQL(", ").join(map(Identifier, _STATISTICS_WITHOUT_VALUES))
        yield self._grant("SELECT ({}) ON pg_catalog.pg_statistic", columns, to=["planner"])
        if self.version >= SET_PRIVILEGES:
            # So that their sessions keep values out of the server's log.
            sessions = ["verifier", "migrator", "writer", "backup", "rehearser"]
            for name in self.log_settings:
                yield self._grant("SET ON PARAMETER {}", Identifier(name), to=sessions)
            # So that writes of ciphertext alone fire no triggers of the application.
            yield self._grant("SET ON PARAMETER session_replication_role", to=["migrator", "writer"])
        if self.version >= _CHECKPOINT_SINCE:
            yield self._grant("pg_checkpoint", to=["eraser"])
        if self.version >= _MAINTAIN_SINCE:
            yield self._grant(
                "MAINTAIN ON pg_catalog.pg_statistic, pg_catalog.pg_statistic_ext_data", to=["eraser"]
            )
        for function in _FILE_FUNCTIONS:
            yield self._grant("EXECUTE ON FUNCTION pg_catalog.{}", verbatim(function), to=["eraser"])

    def _reading_everything(self, groups: list[str]) -> Iterator[Composable]:
        """What pg_dump reads. Members of pg_read_all_data read the roles' passwords in pg_authid as well."""
        roles = SQL(", ").join(map(self._role, groups))
        for group in groups:
            yield SQL(_TAKE_BACK).format(SqlLiteral(self.prefix + group), self._role(group))
        # The bookkeeping's is made by now.
        for schema in map(Identifier, dict.fromkeys((install.SCHEMA, *self.dumped))):
            yield self._grant("USAGE ON SCHEMA {}", schema, to=groups)
            yield self._grant("SELECT ON ALL TABLES IN SCHEMA {}", schema, to=groups)
            yield self._grant("SELECT ON ALL SEQUENCES IN SCHEMA {}", schema, to=groups)
        # What these create later; for what others do, the script is run again.
        owners = dict.fromkeys((self.prefix + "owner", self.prefix + "bookkeeper", *self.creators))
        for owner in map(Identifier, owners):
            for privilege in ("USAGE ON SCHEMAS", "SELECT ON TABLES", "SELECT ON SEQUENCES"):
                yield SQL("ALTER DEFAULT PRIVILEGES FOR ROLE {} GRANT {} TO {}").format(
                    owner, SQL(privilege), roles
                )
        if answer(self.connection, "SELECT true FROM pg_largeobject_metadata LIMIT 1"):
            yield SQL(_READ_LARGE_OBJECTS).format(roles)
