"""Reading a part of a table in key order, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.migration.definition import TableDefinition

Connection = psycopg.Connection[Any]
Key = tuple[str, ...]
Row = tuple[str | None, ...]

# However large single values are, a batch stops growing here; a few batches are in memory at a time.
BATCH_BYTES = 8 * 1024 * 1024
_FIRST_CHUNK = 50

_SETTINGS = {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}


def plan_by_key(connection: Connection) -> None:
    """Have this session's queries follow the primary key.

    On a table without statistics the planner would read and sort all of it for each batch.
    """
    for name, value in _SETTINGS.items():
        connection.execute("SELECT set_config(%s, %s, false)", [name, value])


def key_of(definition: TableDefinition, row: Row) -> Key:
    """The key at the head of a row; the columns of a primary key are never NULL."""
    return tuple(part or "" for part in row[: len(definition.key)])


def read_batch(connection: Connection, query: Composed, parameters: Sequence[str], limit: int) -> list[Row]:
    """The first rows of a query: at most ``limit``, fewer where they are large.

    Args:
        connection: in autocommit mode.
        query: ends in ``LIMIT %s``.
        parameters: those before the limit.
        limit: rows.
    """
    rows: list[Row] = []
    size = 0
    chunk = min(limit, _FIRST_CHUNK)
    with connection.transaction(), connection.cursor(name="encryption_batch") as cursor:
        cursor.execute(query, [*parameters, limit])
        while len(rows) < limit and size < BATCH_BYTES:
            part = cursor.fetchmany(chunk)
            if not part:
                break
            rows += part
            size += sum(map(len, filter(None, chain.from_iterable(part))))
            affordable = (BATCH_BYTES - size) // max(1, size // len(rows))
            chunk = max(1, min(limit - len(rows), affordable))
    return rows
