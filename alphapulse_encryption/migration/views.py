"""Compatibility views: the original column names over the encrypted columns.

``v_<table>`` has every column of the table under its original name, the sensitive ones as envelopes, and the
search columns; ``v_<table>_safe`` leaves the sensitive ones out. Neither reads a plaintext column, so both go on
working after the drop.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration import tracking
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.ddl import in_short_transaction
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]
# Source column and name in the view.
Columns = list[tuple[str, str]]

_COMMENT = "alphapulse_encryption: compatibility view"
_LONGEST_NAME = 63  # bytes: NAMEDATALEN - 1 (PostgreSQL manual, 4.1.1)
_SECURITY_INVOKER_SINCE = 150000


@dataclass(frozen=True)
class ViewsResult:
    """What :func:`create_views` did.

    Args:
        created: the views created or renewed now.
        existing: the views found as they are to be.
        seconds: duration.
    """

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
    if any(len(name.encode()) > _LONGEST_NAME for name in names):
        raise ConfigurationError(
            f"The name of table {table.key} is too long for the compatibility views: v_<table>_safe has to fit "
            f"into {_LONGEST_NAME} bytes."
        )
    return names


def create_views(database: Database, table: Table, actor: Actor) -> ViewsResult:
    """Create the table's two compatibility views, or renew them where the table has changed.

    They run with the rights of whoever reads them (from PostgreSQL 15 on), so that row-level security and
    privileges of the table hold; the roles that may read the table may read the views.

    Args:
        database: the target.
        table: the catalogue's entry.
        actor: who does it.

    Raises:
        RefusedError: columns not added, or somebody else's object depends on a view that has to change.
        ConfigurationError: a relation of that name is there and is not ours.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with database.session(f"create the compatibility views of {table.key}") as connection:
        tracking.require_state(connection, table)
        definition = read_table(connection, table, plaintext=False)
        created: list[str] = []
        existing: list[str] = []
        full, safe = view_names(table)
        for name, columns in ((full, _full(definition)), (safe, _safe(definition))):
            if _current(connection, definition, name, columns):
                existing.append(name)
                continue

            def renew(name: str = name, columns: Columns = columns) -> None:
                _renew(connection, definition, name, columns, actor)

            in_short_transaction(connection, f"create the view {name}", renew)
            created.append(name)
    return ViewsResult(tuple(created), tuple(existing), time.monotonic() - started)


def _full(definition: TableDefinition) -> Columns:
    sensitive = {column.name: column for column in definition.table.columns}
    added = {name for column in definition.table.columns for name in column.derived}
    columns = [
        (sensitive[name].encrypted if name in sensitive else name, name)
        for name in definition.columns
        if name not in added
    ]
    # After a drop the plaintext columns are gone from the table, not from the view.
    columns += [(c.encrypted, c.name) for c in definition.table.columns if c.name not in definition.columns]
    columns += [(c.search, c.search) for c in definition.table.columns if c.searchable]
    return columns


def _safe(definition: TableDefinition) -> Columns:
    hidden = {name for column in definition.table.columns for name in (column.name, *column.derived)}
    return [(name, name) for name in definition.columns if name not in hidden]


def _mark(columns: Columns) -> str:
    # Order of columns aside: dropping and restoring plaintext moves them, and the view need not follow.
    canonical = json.dumps(sorted(columns))
    return f"{_COMMENT} {hashlib.sha256(canonical.encode()).hexdigest()}"


def _query(definition: TableDefinition, columns: Columns) -> Composed:
    return SQL("SELECT {} FROM {} t").format(
        SQL(", ").join(
            SQL("t.{} AS {}").format(Identifier(source), Identifier(name)) for source, name in columns
        ),
        definition.identifier,
    )


def _current(connection: Connection, definition: TableDefinition, name: str, columns: Columns) -> bool:
    row = connection.execute(
        "SELECT c.relkind = 'v', obj_description(c.oid, 'pg_class') FROM pg_class c "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [definition.table.schema_name, name],
    ).fetchone()
    if row is None:
        return False
    is_view, comment = row
    if not is_view or not (comment or "").startswith(_COMMENT):
        raise ConfigurationError(
            f"{definition.table.schema_name}.{name} exists and is not a compatibility view of ours. Rename it; "
            "nothing was changed."
        )
    return bool(comment == _mark(columns))


def _renew(
    connection: Connection, definition: TableDefinition, name: str, columns: Columns, actor: Actor
) -> None:
    view = Identifier(definition.table.schema_name, name)
    options = SQL("security_barrier = true")
    if connection.info.server_version >= _SECURITY_INVOKER_SINCE:
        options = SQL("security_barrier = true, security_invoker = true")
    try:
        connection.execute(SQL("DROP VIEW IF EXISTS {}").format(view))
    except psycopg.errors.DependentObjectsStillExist:
        raise RefusedError(
            f"The view {name} has to be renewed because {definition.table.key} has changed, and other objects "
            "depend on it. Drop those first; nothing was changed."
        ) from None
    connection.execute(
        SQL("CREATE VIEW {} WITH ({}) AS {}").format(view, options, _query(definition, columns))
    )
    connection.execute(SQL("COMMENT ON VIEW {} IS {}").format(view, Literal(_mark(columns))))
    for grantee, grantable in _readers(connection, definition):
        connection.execute(
            SQL("GRANT SELECT ON {} TO {} {}").format(
                view,
                SQL("PUBLIC") if grantee is None else Identifier(grantee),
                SQL("WITH GRANT OPTION" if grantable else ""),
            )
        )
    tracking.audit(connection, actor, "create_view", definition.table, view=name)


def _readers(connection: Connection, definition: TableDefinition) -> list[tuple[str | None, bool]]:
    rows = connection.execute(
        "SELECT r.rolname, a.is_grantable FROM pg_class c CROSS JOIN aclexplode(c.relacl) a "
        "LEFT JOIN pg_roles r ON r.oid = a.grantee "
        "WHERE c.oid = %s AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner",
        [definition.oid],
    )
    return [(name, grantable) for name, grantable in rows]
