"""What has to be so before a table's encrypted columns are added: the preflight tells it, and the step refuses it.

Belongs here: what of a table's definition and rows would make the first step do harm, or fail in its middle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import psycopg
from psycopg.sql import SQL, Composable, Identifier

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import ConfigurationError, DecryptionError, RefusedError
from alphapulse_encryption.migration.gates.findings import Checked
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.schema.contents import SAMPLE, of_others, sampled
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.guard import refuse_foreign_function
from alphapulse_encryption.migration.schema.partitions import read_parts

# Larger envelopes are left to the verification, so that a sample fits into memory.
_MOST_BYTES = 65_536


def before_columns(
    connection: Connection, definition: TableDefinition, keys: KeyRing | None, cipher: EnvelopeFormat | None
) -> Iterator[Checked]:
    """What speaks against a table's first step, or would surprise after it.

    Args:
        keys: None, with the cipher, leaves out what only keys can tell.
    """
    yield from (Checked("blocker", definition.table.key, told) for told in of_others(connection, definition))
    try:
        refuse_foreign_function(connection, definition)
    except RefusedError as error:
        yield Checked("blocker", definition.table.key, error.args[0])
    yield from _room(connection, definition)
    for column in definition.table.columns:
        if column.adopt and keys is not None and cipher is not None:
            yield from _adopted(connection, definition, column, keys, cipher)


def refuse_beginning(
    connection: Connection, definition: TableDefinition, keys: KeyRing, cipher: EnvelopeFormat
) -> None:
    """Refuse the first step where something speaks against it.

    Raises:
        ConfigurationError: names all of it, and what to do.
    """
    found = before_columns(connection, definition, keys, cipher)
    if blockers := [finding.message for finding in found if finding.level == "blocker"]:
        raise ConfigurationError("\n".join((*blockers, "Nothing was changed.")))


# PostgreSQL manual, appendix K: columns of a table, and what a row of one page may have. A value that is as far out of
# line as can be takes a pointer in the row.
_MOST_COLUMNS, _ROW_BYTES, _POINTER = 1_600, 8_160, 18
_ROOM = """
SELECT max(attnum), coalesce(sum(CASE WHEN attlen > 0 THEN attlen ELSE %s END)
                             FILTER (WHERE attrelid = %s AND NOT attisdropped), 0)
  FROM pg_attribute WHERE attrelid = ANY (%s) AND attnum > 0
"""


def refuse_without_room_to_return(connection: Connection, definition: TableDefinition) -> None:
    """A column that is dropped keeps its number: where a restore could add none, nothing may be dropped.

    Raises:
        RefusedError: says how many columns there are, and what to do.
    """
    columns, _ = _taken(connection, definition)
    back = len(definition.plaintext_columns)
    if columns + back > _MOST_COLUMNS:
        raise RefusedError(
            f"Table {definition.table.key} has {columns:,} columns, dropped ones included, and a restore adds {back}: "
            f"PostgreSQL takes {_MOST_COLUMNS:,}. Copy it into a new table, which forgets those that were dropped, or "
            "keep the plaintext; nothing was changed."
        )


def _taken(connection: Connection, definition: TableDefinition) -> tuple[int, int]:
    """Numbers of columns that are used up, in the partition that has most; and bytes of a row that is full."""
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    columns, used = connection.execute(_ROOM, [_POINTER, definition.oid, parts]).fetchall()[0]
    return int(columns), int(used)


def _room(connection: Connection, definition: TableDefinition) -> Iterator[Checked]:
    """Whether the columns to come have a place, and the rows with them."""
    table = definition.table
    new = sum(name not in definition.columns for column in table.columns for name in column.derived)
    columns, used = _taken(connection, definition)
    if new and columns + new > _MOST_COLUMNS:
        yield Checked(
            "blocker",
            table.key,
            f"has {columns:,} columns, dropped ones included, and {new} come to them: PostgreSQL takes "
            f"{_MOST_COLUMNS:,}. Copy it into a new table, which forgets those that were dropped, or encrypt fewer.",
        )
    elif new and columns + new + len(definition.plaintext_columns) > _MOST_COLUMNS:
        yield Checked(
            "warning",
            table.key,
            f"has {columns:,} columns, dropped ones included: its plaintext could not be dropped, because a restore "
            f"would have no place for it ({_MOST_COLUMNS:,} columns). Copy it into a new table, or encrypt fewer.",
        )
    # The header, and a bit for each column.
    needed = used + new * _POINTER + 24 + (columns + new) // 8
    if new and needed > _ROW_BYTES:
        yield Checked(
            "warning",
            table.key,
            f"has so many columns that a row with all of them filled needs {needed:,} bytes, and a page takes "
            f"{_ROW_BYTES:,}: such rows cannot be encrypted, and are set aside. Encrypt fewer columns, or move some to "
            "a table of their own.",
        )


def _adopted(
    connection: Connection,
    definition: TableDefinition,
    column: Column,
    keys: KeyRing,
    cipher: EnvelopeFormat,
) -> Iterator[Checked]:
    """What a sample of the application's own envelopes and tokens is, opened with our key."""
    if column.encrypted not in definition.columns:
        return
    names = (column.name, column.encrypted, column.search)
    texts: list[Composable] = [
        SQL("{0}::text AS {0}" if name in definition.columns else "NULL::text AS {0}").format(
            Identifier(name)
        )
        for name in names
    ]
    query = SQL("SELECT * FROM ({}) AS s WHERE octet_length({}) <= {} LIMIT {}").format(
        sampled(definition, texts), Identifier(column.encrypted), SQL(str(_MOST_BYTES)), SQL(str(SAMPLE))
    )
    try:
        rows = connection.execute(query).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        return  # The steps say so.
    found: Counter[str] = Counter()
    reason = ""
    for plaintext, envelope, token in rows:
        try:
            value, version = (
                cipher.decrypt(envelope, column.context),
                cipher.key_version(envelope, column.context),
            )
        except DecryptionError as error:
            found["unreadable"] += 1
            reason = error.args[0]
            continue
        found["alone"] += plaintext is None
        found["other value"] += plaintext not in (None, value)
        if column.searchable and token is not None:
            found["other token"] += token != search_token(keys, value, column.context, version)
    of, most = f"{definition.table.key}.{column.name}", f"of {len(rows):,} sampled values"
    if found["unreadable"]:
        yield Checked(
            "blocker",
            of,
            f"is to be adopted, and {found['unreadable']:,} {most} of {of}_encrypted do not open with this key "
            f"({reason}). Configure the application's key and context, or set such values to NULL, which the backfill "
            "encrypts.",
        )
    if found["alone"]:
        yield Checked(
            "blocker",
            of,
            f"is to be adopted, and {found['alone']:,} {most} of {of}_encrypted have no plaintext beside them, which "
            "is the source of truth until the switch. Have the application write it first.",
        )
    if found["other value"]:
        yield Checked(
            "warning",
            of,
            f"is to be adopted, and {found['other value']:,} {most} of {of}_encrypted hold another value than the "
            "plaintext: --verify names them, and says what to do.",
        )
    if found["other token"]:
        yield Checked(
            "warning",
            of,
            f"is to be adopted, and {found['other token']:,} {most} of {column.search} are not the tokens of their "
            "values under this key. They are kept, and --verify will fail until they are corrected.",
        )
