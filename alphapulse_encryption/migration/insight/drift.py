"""What has drifted since the migration: columns, guards and rows that are no longer as the steps left them.

Reads the system catalogues and the bookkeeping; of the tables themselves it asks the small index on pending rows only.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import LiteralString

from psycopg.sql import SQL

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.install import SCHEMA, bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import TableState, table_state
from alphapulse_encryption.migration.bookkeeping.verifications import verified_otherwise, verified_ranges
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.postgres.database import Connection, Database
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.catch_up import has_pending_index, pending_in
from alphapulse_encryption.migration.schema.contents import unsuitable_columns
from alphapulse_encryption.migration.schema.definition import OF_THE_APPLICATION, TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import guard_faults, late_triggers
from alphapulse_encryption.migration.schema.indexes import invalid_indexes
from alphapulse_encryption.migration.schema.sensitive_names import Suspicion, looks_sensitive

# An old instance writes, the backfill follows: while that goes on it is told of once.
PENDING_SETTLES = timedelta(minutes=15)
# So many of one table are named in a message.
NAMED = 12


def look_for_drift(database: Database, catalogue: Catalogue) -> list[Alert]:
    """Hold the database against the catalogue and the bookkeeping.

    Looked for: plaintext written without ciphertext in ranges that were done; guards that differ; columns gone,
    of another type, or back after their drop; and columns that look sensitive and are not catalogued.

    Raises:
        RefusedError: another session holds a table exclusively.
    """
    with database.session("look for drift") as connection:
        plan_by_key(connection)
        found: list[Alert] = []
        if bookkeeping_exists(connection):
            for table in catalogue.tables:
                found += _of_table(connection, table)
        return [*found, *uncatalogued(connection, catalogue)]


def _of_table(connection: Connection, table: Table) -> Iterator[Alert]:
    state = table_state(connection, table)
    if state is None or state.state is State.REVERTED:
        return
    try:
        definition = read_table(connection, table, plaintext=False, look=True)
    except ConfigurationError as error:
        yield Alert(
            f"{table.key}: not as catalogued",
            str(error),
            key=f"table:{table.key}",
            remedy="Its encrypted values cannot be looked after until then.",
        )
        return
    missing = [column.name for column in table.columns if column.name not in definition.columns]
    yield from _columns(definition, state.state, missing)
    if invalid := invalid_indexes(connection, definition):
        yield Alert(
            f"{table.key}: invalid indexes",
            f"{_listed([name for name, _ in invalid])} of {table.key}: the build of an index was interrupted, and no "
            "query uses what it left.",
            key=f"invalid:{table.key}",
            remedy=f"Type {'; '.join(statement for _, statement in invalid)}.",
            state=_state([name for name, _ in invalid]),
        )
    if not state.state.has_both_sides:
        return
    if not missing:
        yield from _pairs(connection, definition, state)
    verified_at = verified_otherwise(connection, table, definition.shape())
    if verified_at is not None:
        yield Alert(
            f"{table.key}: definition",
            f"The catalogued columns of {table.key}, their types or its primary key are not those that were verified "
            f"at {verified_at:%F %R} UTC.",
            key=f"definition:{table.key}",
            remedy=f"If that was on purpose, verify again (--verify --table {table.key}); approvals given before are "
            "void.",
        )


def _columns(definition: TableDefinition, state: State, missing: Sequence[str]) -> Iterator[Alert]:
    key = definition.table.key
    derived = [name for column in definition.table.columns for name in column.derived]
    gone = [name for name in derived if name not in definition.columns]
    gone += missing if state.has_both_sides else ()
    back = [c.name for c in definition.plaintext_columns] if state is State.DROPPED else []
    unsuitable = unsuitable_columns(definition)
    if gone:
        yield Alert(
            f"{key}: columns gone",
            f"{_columns_of(key, gone)} gone, and not by a step of this migration.",
            key=f"gone:{key}",
            remedy="Find out who dropped or renamed them before anything else is done: if ciphertext is gone whose "
            "plaintext was dropped, stop writers and restore from the latest backup. A new encrypted column is "
            f"added by --add-columns --table {key}.",
            state=_state(gone),
        )
    if unsuitable:
        yield Alert(
            f"{key}: types of encrypted columns",
            f"{_columns_of(key, unsuitable)} of another type than the migration made.",
            key=f"type:{key}",
            remedy="Find out who changed it, give it its type back (text; varchar(64) for a search column), and "
            f"verify: --verify --table {key}.",
            state=_state(unsuitable),
        )
    if back:
        yield Alert(
            f"{key}: plaintext columns after their drop",
            f"{_columns_of(key, back)} there again, although the plaintext of {key} was dropped; nothing encrypts "
            "what is written to it.",
            key=f"back:{key}",
            remedy="Find out which program or migration added it, and drop it; --restore-plaintext is the way to "
            "bring plaintext back.",
            state=_state(back),
        )


def _pairs(connection: Connection, definition: TableDefinition, state: TableState) -> Iterator[Alert]:
    """What keeps plaintext and ciphertext of a row in step, and where it did not."""
    table, key = definition.table, definition.table.key
    if faults := guard_faults(connection, definition, state.authority):
        yield Alert(
            f"{key}: guard",
            f"The guard of {key} is not what this program makes ({'; '.join(faults)}): an old ciphertext may stay "
            "beside a new plaintext.",
            key=f"guard:{key}",
            remedy=f"Renew it at once (--add-columns --table {key}), find out who changed it, and verify what "
            f"was written meanwhile (--migrate-data --verify --table {key}).",
        )
    for name, rename in late_triggers(connection, definition):
        yield Alert(
            f"{key}: trigger after the guard",
            f"The trigger {name} of {key} runs after the guard, which does not see what it makes of a row.",
            key=f"late:{key}:{name}",
            remedy=f"Rename it ({rename}) to what sorts before zzz_encryption_guard, and verify what "
            f"was written meanwhile (--verify --table {key}).",
        )
    if has_pending_index(connection, definition):
        if ranges := pending_in(connection, table):
            yield _pending(key, ranges, state)
    # It is built before the verification.
    elif verified_ranges(connection, table)[0]:
        yield Alert(
            f"{key}: index on pending rows",
            f"The small index on pending rows of {key} is missing or invalid, so that nobody would see plaintext "
            "that is written without ciphertext.",
            key=f"index:{key}",
            remedy=f"Build it again: --migrate-data --table {key}.",
        )


def _pending(key: str, ranges: Sequence[int], state: TableState) -> Alert:
    plural = "s" if len(ranges) > 1 else ""
    encrypt = (
        "An instance of the application still writes plaintext after the switch. Find and restart it in the phase "
        "encrypted, then encrypt"
        if state.authority == "ciphertext"
        else "Encrypt"
    )
    return Alert(
        f"{key}: plaintext without ciphertext",
        f"Plaintext was written to {key} without ciphertext after it was done, in batch range{plural} "
        f"{_listed([f'{number:02d}' for number in ranges])}.",
        key=f"pending:{key}",
        remedy=f"{encrypt} it: --migrate-data --table {key}; the sensor pending_rows, once started, does so by itself.",
        settles=PENDING_SETTLES,
    )


_UNCATALOGUED: LiteralString = """
SELECT n.nspname, c.relname, a.attname, format_type(a.atttypid, a.atttypmod)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE c.relkind IN ('r', 'p') AND {of_the_application}
 ORDER BY n.nspname, c.relname, a.attnum
"""


def uncatalogued(connection: Connection, catalogue: Catalogue) -> Iterator[Alert]:
    """Columns that look sensitive by name and type and that the catalogue does not name, by table."""
    known = {
        (table.schema_name, table.name, name)
        for table in catalogue.tables
        for column in table.columns
        for name in (column.name, column.encrypted, column.search)
    }
    suspicious: dict[str, list[tuple[str, Suspicion]]] = defaultdict(list)
    for schema, table, column, type_ in connection.execute(
        SQL(_UNCATALOGUED).format(of_the_application=SQL(OF_THE_APPLICATION)),
        {"ours": SCHEMA},
    ):
        suspicion = looks_sensitive(table, column, type_)
        if suspicion is not None and (schema, table, column) not in known:
            suspicious[table if schema == "public" else f"{schema}.{table}"].append((column, suspicion))
    for key, columns in suspicious.items():
        shown = [f"{name} ({why.category}, {why.confidence})" for name, why in columns]
        yield Alert(
            f"{key}: columns that look sensitive",
            f"{_columns_of(key, shown)} not in the catalogue and look{'' if len(columns) > 1 else 's'} sensitive by "
            "name and type.",
            key=f"uncatalogued:{key}",
            remedy="Add what is sensitive to the catalogue and migrate it (--preflight --add-columns --migrate-data "
            "--verify); leave what is not, it is told of once.",
            state=_state([name for name, _ in columns]),
            reminds=False,
        )


def _columns_of(key: str, names: Sequence[str]) -> str:
    return (
        f"Column{'s' if len(names) > 1 else ''} {_listed(names)} of {key} {'are' if len(names) > 1 else 'is'}"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return shown if len(names) <= NAMED else f"{shown} and {len(names) - NAMED} more"


def _state(names: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(sorted(names)).encode()).hexdigest()[:16]
