"""Compatibility views: the original column names over the encrypted columns.

``v_<table>`` has every column of the table under its original name, the sensitive ones as envelopes, and the
search columns; ``v_<table>_safe`` leaves the sensitive ones out, and what the catalogue hides. Neither reads a
plaintext column, so both go on working after the drop.

Both are made with ``security_invoker`` (PostgreSQL manual, CREATE VIEW; from version 15 on): a view that runs with its
owner's rights would show all rows to who may read the view, whatever row-level security says, because policies do
not hold for owners. Neither is made with ``security_barrier``: that keeps conditions with side effects from seeing
rows that a view's own WHERE leaves out (manual, 39.5 "Rules and Privileges"), and these views have no WHERE. It would
only keep conditions such as LIKE from the table's indexes. Those of row-level security are kept apart without it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import psycopg
from psycopg.rows import kwargs_row
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database, answer
from alphapulse_encryption.migration.postgres.ddl import give_to_owner, in_short_transaction
from alphapulse_encryption.migration.schema.definition import TableDefinition, check_hidden, read_table
from alphapulse_encryption.migration.schema.guard import AS_WORDED, refuse_unguarded
from alphapulse_encryption.migration.schema.names import LONGEST_NAME
from alphapulse_encryption.migration.schema.saved_ddl import Grant

# Source column and name in the view.
Columns = list[tuple[str, str]]

_COMMENT = "alphapulse_encryption: compatibility view"
_SECURITY_INVOKER_SINCE = 150000


@dataclass(frozen=True)
class ViewsResult:
    """What :func:`create_views` did; those that were renewed count as created."""

    created: tuple[str, ...]
    existing: tuple[str, ...]
    seconds: float

    @property
    def changed(self) -> bool:
        return bool(self.created)


def view_names(table: Table) -> tuple[str, str]:
    """``v_<table>`` and ``v_<table>_safe``.

    Raises:
        ConfigurationError: the table's name leaves no room for them.
    """
    names = (f"v_{table.name}", f"v_{table.name}_safe")
    if any(len(name.encode()) > LONGEST_NAME for name in names):
        raise ConfigurationError(
            f"The name of table {table.key} is too long for the compatibility views: v_<table>_safe has to fit "
            f"into {LONGEST_NAME} bytes."
        )
    return names


def create_views(database: Database, table: Table, actor: Actor) -> ViewsResult:
    """Create the table's two compatibility views, or renew them where the table has changed.

    They run with the rights of who reads them (from PostgreSQL 15 on), so that row-level security and privileges of
    the table hold. Who may read the table, or by single columns all that a view reads of it, may read the view.
    What was granted on a view besides stays when it is renewed, and so does what others built on it, as long as the
    view only gains columns.

    Raises:
        RefusedError: columns not added, or somebody else's object depends on a view that has to lose a column; before
            PostgreSQL 15, row-level security on the table.
        ConfigurationError: a relation of that name is there and is not ours; a column to hide is not there.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with database.session(f"create the compatibility views of {table.key}") as connection:
        require_guarded_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        refuse_unguarded(connection, definition)
        check_hidden(definition)
        refuse_hidden_rows(connection, definition)
        names = view_names(table)
        for name in names:
            _find(connection, definition, name)  # a foreign one is told before the other one is made
        created = tuple(
            name
            for name in names
            if in_short_transaction(
                connection, f"create the view {name}", partial(_renew, connection, definition, name, actor)
            )
        )
    existing = tuple(name for name in names if name not in created)
    return ViewsResult(created, existing, time.monotonic() - started)


def refuse_hidden_rows(connection: Connection, definition: TableDefinition) -> None:
    """Refuse views that would show rows to who may not see them in the table.

    Raises:
        RefusedError: row-level security on the table, before PostgreSQL 15.
    """
    hides = "SELECT relrowsecurity FROM pg_class WHERE oid = %s"
    if not _runs_as_reader(connection) and answer(connection, hides, definition.oid):
        raise RefusedError(
            f"Table {definition.table.key} has row-level security, and before PostgreSQL 15 a view shows all that its "
            "owner may see. Its compatibility views would show hidden rows, so they are not created."
        )


def drop_views(connection: Connection, definition: TableDefinition) -> tuple[str, ...]:
    """Drop those of the table's two views that are ours, in the caller's transaction.

    Returns:
        Their names.

    Raises:
        RefusedError: somebody else's object depends on one.
    """
    dropped = []
    for name in view_names(definition.table):
        view = _look(connection, definition, name)
        if view is not None and view.ours:
            with _refusing_dependants(connection, view.oid, name, "has to go"):
                connection.execute(_drop_statement(definition, name))
            dropped.append(name)
    return tuple(dropped)


def _runs_as_reader(connection: Connection) -> bool:
    return connection.info.server_version >= _SECURITY_INVOKER_SINCE


def shown_by_safe_view(definition: TableDefinition) -> list[str]:
    """The columns that ``v_<table>_safe`` shows to who may see nothing sensitive."""
    table = definition.table
    left_out = {name for column in table.columns for name in (column.name, column.encrypted, column.search)}
    return [name for name in definition.columns if name not in {*left_out, *table.hide}]


def _columns(definition: TableDefinition, *, safe: bool) -> Columns:
    sensitive = {column.name: column for column in definition.table.columns}
    added = {name for column in definition.table.columns for name in column.derived}
    others = [name for name in definition.columns if name not in added]
    if safe:
        return [(name, name) for name in shown_by_safe_view(definition)]
    columns = [(sensitive[name].encrypted if name in sensitive else name, name) for name in others]
    # After a drop the plaintext columns are gone from the table, not from the view.
    columns += [(c.encrypted, c.name) for c in definition.table.columns if c.name not in definition.columns]
    columns += [(c.search, c.search) for c in definition.table.columns if c.searchable]
    return columns


@dataclass(frozen=True)
class _View:
    """A relation under a view's name.

    Args:
        ours: whether it says so, and nobody owns it who may not change the table as well.
        columns: their names.
        text: its query, as the server words it.
    """

    oid: int
    ours: bool
    owner: str
    invoker: bool
    barrier: bool
    columns: list[str]
    text: str

    def shows(self, definition: TableDefinition, columns: Columns, version: int) -> bool:
        """Whether its query is that of these columns; their order may be another, after a drop or a restore."""
        sources = {name: source for source, name in columns}
        if sorted(self.columns) != sorted(sources):
            return False
        table = SQL("" if version >= _SHORT_SINCE else '"t".')
        each = (
            SQL("{}{}" if name == sources[name] else "{}{} AS {}").format(
                table, *map(Identifier, dict.fromkeys((sources[name], name)))
            )
            for name in self.columns
        )
        query = SQL('SELECT {} FROM {} "t";').format(SQL(", ").join(each), definition.identifier)
        return self.text.split() == query.as_string(None).split()


# From then on the server leaves out which table a column is of, where there is one.
_SHORT_SINCE = 160000
_LOOK = """
SELECT v.oid, v.relkind = 'v' AND coalesce(starts_with(obj_description(v.oid, 'pg_class'), %s), false)
         AND pg_has_role(v.relowner, t.relowner, 'MEMBER'),
       pg_get_userbyid(v.relowner)::text,
       coalesce(v.reloptions && ARRAY['security_invoker=true'], false),
       coalesce(v.reloptions && ARRAY['security_barrier=true'], false),
       ARRAY(SELECT attname::text FROM pg_attribute
              WHERE attrelid = v.oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum),
       CASE v.relkind WHEN 'v' THEN pg_get_viewdef(v.oid) ELSE '' END
  FROM pg_class v JOIN pg_class t ON t.oid = %s AND t.relnamespace = v.relnamespace WHERE v.relname = %s
"""


def _look(connection: Connection, definition: TableDefinition, name: str) -> _View | None:
    """What relation there is under that name."""
    with connection.transaction(force_rollback=True):
        connection.execute(AS_WORDED)
        row = connection.execute(_LOOK, [_COMMENT, definition.oid, name]).fetchone()
    return None if row is None else _View(*row)


def _find(connection: Connection, definition: TableDefinition, name: str) -> _View | None:
    """Our view of that name, if it is there; what is there and is not ours is refused."""
    view = _look(connection, definition, name)
    if view is not None and not view.ours:
        raise ConfigurationError(
            f"{definition.table.schema_name}.{name} exists and is not a compatibility view of ours. Rename it; "
            "nothing was changed."
        )
    return view


def _renew(connection: Connection, definition: TableDefinition, name: str, actor: Actor) -> bool:
    """Bring a view and its privileges up to what they are to be; returns whether anything had to be done."""
    statements, granted = _renewal(connection, definition, name)
    view = _look(connection, definition, name)
    why = f"has to be made again because {definition.table.key} or its catalogue entry has changed"
    with _refusing_dependants(connection, 0 if view is None else view.oid, name, why):
        for statement in statements:
            connection.execute(statement)
    if statements:
        audit(connection, actor, "create_view", definition.table, view=name, granted=granted)
    return bool(statements)


def view_statements(connection: Connection, definition: TableDefinition) -> list[Composed]:
    """What :func:`create_views` would execute; executes nothing.

    Raises:
        ConfigurationError: a name is taken, or too long.
        RefusedError: a view has to be made again, and has triggers; before PostgreSQL 15, row-level security.
    """
    refuse_hidden_rows(connection, definition)
    names = view_names(definition.table)
    return [one for name in names for one in _renewal(connection, definition, name)[0]]


def _renewal(
    connection: Connection, definition: TableDefinition, name: str
) -> tuple[list[Composed], list[str]]:
    """What makes a view as it is to be, and to whom that grants something."""
    view = _find(connection, definition, name)
    identifier = Identifier(definition.table.schema_name, name)
    invoker = _runs_as_reader(connection)
    columns = _columns(definition, safe=name == view_names(definition.table)[1])
    statements: list[Composed] = []
    wanted: list[_Granted] = []
    present = _grants_of(connection, view.oid) if view is not None else []
    owner = view.owner if view is not None else ""
    version = connection.info.server_version
    shown = view is not None and view.shows(definition, columns, version)
    if view is None or not shown or view.invoker != invoker or view.barrier:
        gained = None if view is None else _extended(connection, definition, view, columns)
        if view is not None and gained is None:
            _refuse_triggers(connection, view, name)
            statements.append(_drop_statement(definition, name))
            names = {name for _, name in columns}
            wanted = [grant for grant in present if grant.column is None or grant.column in names]
            present = []
        columns = gained or columns
        owner, given = give_to_owner(connection, SQL("VIEW {}").format(identifier), definition.oid)
        statements += [
            SQL("CREATE OR REPLACE VIEW {}{} AS SELECT {} FROM {} t").format(
                identifier,
                SQL(" WITH (security_invoker = true)" if invoker else ""),
                SQL(", ").join(SQL("t.{} AS {}").format(*map(Identifier, column)) for column in columns),
                definition.identifier,
            ),
            SQL("COMMENT ON VIEW {} IS {}").format(identifier, Literal(_COMMENT)),
            *given,
        ]
    wanted += _readers(connection, definition, columns)
    missing = [
        grant
        for grant in dict.fromkeys(wanted)
        if grant.grantee != owner
        and grant not in present
        and grant.model_copy(update={"grantable": True}) not in present
    ]
    statements += [grant.statement(identifier, grant.column) for grant in missing]
    return statements, sorted({grant.grantee or "PUBLIC" for grant in missing})


def _drop_statement(definition: TableDefinition, name: str) -> Composed:
    return SQL("DROP VIEW {}").format(Identifier(definition.table.schema_name, name))


_DEPENDANTS = """
SELECT string_agg(
         DISTINCT coalesce('view ' || r.ev_class::regclass, pg_describe_object(d.classid, d.objid, d.objsubid)), ', ')
  FROM pg_depend d LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
 WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = %s AND d.deptype = 'n'
   AND r.ev_class IS DISTINCT FROM d.refobjid
"""


@contextmanager
def _refusing_dependants(connection: Connection, view: int, name: str, why: str) -> Iterator[None]:
    # Of a transaction that has failed nothing can be asked.
    others = answer(connection, _DEPENDANTS, view)
    try:
        yield
    except psycopg.errors.DependentObjectsStillExist:
        raise RefusedError(
            f"The view {name} {why}, and others depend on it: {others or 'objects that were made just now'}. Drop "
            "those first, run the step again, and make them again then; the view was not changed."
        ) from None


def _refuse_triggers(connection: Connection, view: _View, name: str) -> None:
    triggers = answer(
        connection,
        "SELECT string_agg(tgname, ', ' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = %s",
        view.oid,
    )
    if triggers:
        raise RefusedError(
            f"The view {name} has to be made again, and its triggers ({triggers}) would go "
            "with it. Drop them first, and create them again afterwards; the view was not changed."
        )


_TYPES = """
SELECT attname, atttypid, atttypmod, attcollation FROM pg_attribute
 WHERE attrelid = %s AND attnum > 0 AND NOT attisdropped ORDER BY attnum
"""


def _extended(
    connection: Connection, definition: TableDefinition, view: _View, columns: Columns
) -> Columns | None:
    """The wanted columns with those of the view first, as CREATE OR REPLACE VIEW needs them; None where one is lost."""
    of_table, of_view = (
        {name: tuple(type_) for name, *type_ in connection.execute(_TYPES, [oid])}
        for oid in (definition.oid, view.oid)
    )
    sources = {name: source for source, name in columns}
    if any(name not in sources or of_table.get(sources[name]) != type_ for name, type_ in of_view.items()):
        return None
    return [(sources[name], name) for name in of_view] + [
        column for column in columns if column[1] not in of_view
    ]


class _Granted(Grant):
    """A privilege on a relation, or on one column of it."""

    column: str | None


_GRANTS = """
SELECT r.rolname AS grantee, x.privilege_type AS privilege, o.attname AS column, x.is_grantable AS grantable
  FROM pg_class c CROSS JOIN LATERAL (
       SELECT NULL::name AS attname, c.relacl AS acl
        UNION ALL SELECT attname, attacl FROM pg_attribute WHERE attrelid = c.oid AND NOT attisdropped) o
 CROSS JOIN aclexplode(o.acl) x LEFT JOIN pg_roles r ON r.oid = x.grantee
 WHERE c.oid = %s AND x.grantee <> c.relowner AND (x.grantee = 0 OR r.oid IS NOT NULL)
 ORDER BY 3 NULLS FIRST, 1 NULLS FIRST, 2
"""


def _grants_of(connection: Connection, oid: int) -> list[_Granted]:
    return connection.cursor(row_factory=kwargs_row(_Granted)).execute(_GRANTS, [oid]).fetchall()


def _readers(connection: Connection, definition: TableDefinition, columns: Columns) -> list[_Granted]:
    """SELECT on a view to who may read all of the table that the view reads: it reads with their rights."""
    grants = [grant for grant in _grants_of(connection, definition.oid) if grant.privilege == "SELECT"]
    by_column: dict[str | None, set[str]] = {}
    for grant in grants:
        if grant.column is not None:
            by_column.setdefault(grant.grantee, set()).add(grant.column)
    read = {source for source, _ in columns}
    return [
        *(grant for grant in grants if grant.column is None),
        *(
            _Granted(grantee=grantee, privilege="SELECT", grantable=False, column=None)
            for grantee, names in by_column.items()
            if read <= names
        ),
    ]
