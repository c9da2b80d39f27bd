"""Reading a part of a table in key order, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import psycopg
from psycopg.abc import Query
from psycopg.types.string import ByteaBinaryLoader

from alphapulse_encryption.migration.definition import TableDefinition

Connection = psycopg.Connection[Any]
Key = tuple[str, ...]
Row = tuple[str | None, ...]
Utf8Row = tuple[bytes | None, ...]

# However large single values are, a batch stops growing here; a few batches are in memory at a time.
BATCH_BYTES = 8 * 1024 * 1024
_FIRST_CHUNK = 50

_SETTINGS = {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}


def plan_by_key(connection: Connection) -> None:
    """Have this session's queries follow the primary key.

    On a table without statistics the planner would read and sort all of it for each batch.
    """
    connection.execute(
        "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s (name, value)",
        [list(_SETTINGS), list(_SETTINGS.values())],
    )


def key_of(definition: TableDefinition, row: Row) -> Key:
    """The key at the head of a row; the columns of a primary key are never NULL."""
    return tuple(part or "" for part in row[: len(definition.key)])


def read_batch(connection: Connection, query: Query, parameters: Sequence[str], limit: int) -> list[Row]:
    """The first rows of a query: at most ``limit``, fewer where they are large.

    Args:
        connection: in autocommit mode.
        query: ends in ``LIMIT %s``; its columns are text.
        parameters: those before the limit.
        limit: rows.
    """
    rows: list[Row] = _read(connection, query, parameters, limit, utf8=False)
    return rows


def read_batch_utf8(
    connection: Connection, query: Query, parameters: Sequence[str], limit: int
) -> list[Utf8Row]:
    """As :func:`read_batch`, the values as the UTF-8 bytes that came over the wire.

    Raises:
        UnicodeDecodeError: a value is not UTF-8; a database whose encoding is SQL_ASCII may hold such.
    """
    rows: list[Utf8Row] = _read(connection, query, parameters, limit, utf8=True)
    return rows


def _read(
    connection: Connection, query: Query, parameters: Sequence[str], limit: int, *, utf8: bool
) -> list[Any]:
    rows: list[Any] = []
    size = 0
    chunk = min(limit, _FIRST_CHUNK)
    with connection.transaction(), connection.cursor(name="encryption_batch") as cursor:
        if utf8:
            # The binary form of text is the text.
            cursor.adapters.register_loader("text", ByteaBinaryLoader)
        cursor.execute(query, [*parameters, limit], binary=utf8)
        while len(rows) < limit and size < BATCH_BYTES:
            part = cursor.fetchmany(chunk)
            if not part:
                break
            rows += part
            size += _utf8_size(part) if utf8 else _size(part)
            affordable = (BATCH_BYTES - size) // max(1, size // len(rows))
            chunk = max(1, min(limit - len(rows), affordable))
    return rows


def _size(rows: Sequence[Row]) -> int:
    return sum(map(len, filter(None, chain.from_iterable(rows))))


def _utf8_size(rows: Sequence[Utf8Row]) -> int:
    # Between texts stands a byte that no text holds, so that no two halves of a character meet.
    texts = b"\0".join(filter(None, chain.from_iterable(rows)))
    texts.decode()
    return len(texts)
