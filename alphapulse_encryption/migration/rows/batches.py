"""Reading a part of a table in key order, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeVar

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.migration.bookkeeping.ranges import Key
from alphapulse_encryption.migration.postgres import retry, wire
from alphapulse_encryption.migration.postgres.database import without_values
from alphapulse_encryption.migration.schema.definition import TableDefinition

Connection = psycopg.Connection[Any]
Row = tuple[str | None, ...]
T = TypeVar("T")

# However large single values are, a batch stops growing here; a few batches are in memory at a time.
BATCH_BYTES = 4 * 1024 * 1024
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


def read_batch(connection: Connection, query: Composed, parameters: Sequence[str], limit: int) -> list[Row]:
    """The first rows of a query: at most ``limit``, fewer where they are large.

    Args:
        connection: in autocommit mode.
        query: ends in ``LIMIT %s``; its columns are text.
        parameters: those before the limit.
        limit: rows.
    """
    columns = read_columns(connection, wire.numbered(connection, query), parameters, limit)
    return list(
        zip(*([None if v is None else v.decode() for v in column] for column in columns), strict=True)
    )


def read_columns(
    connection: Connection, statement: bytes, parameters: Sequence[str], limit: int
) -> list[list[bytes | None]]:
    """As :func:`read_batch`, column by column, in the UTF-8 form that came over the wire.

    Args:
        connection: in autocommit mode.
        statement: made by :func:`wire.numbered`.
        parameters: those before the limit.
        limit: rows.

    Raises:
        psycopg.DataError: a value cannot be converted to UTF-8; an encoding of SQL_ASCII lets such in.
    """
    found: list[list[bytes | None]] = []
    rows = size = 0
    chunk = min(limit, _FIRST_CHUNK)
    with wire.transaction(connection) as last:
        # Within a transaction of the caller's it would stay open, and keep the table from being altered.
        last.append(b"CLOSE encryption_batch")
        wire.execute(
            connection, b"DECLARE encryption_batch NO SCROLL CURSOR FOR " + statement, [*parameters, limit]
        )
        while rows < limit and size < BATCH_BYTES:
            fetch = b"FETCH FORWARD %d FROM encryption_batch" % chunk
            part = wire.columns(wire.execute(connection, fetch, binary=True))
            for known, new in zip(found, part, strict=True) if found else ():
                known.extend(new)
            found = found or part
            rows += len(part[0])
            size += sum(map(len, filter(None, chain.from_iterable(part))))
            if len(part[0]) < chunk:
                break
            affordable = (BATCH_BYTES - size) // max(1, size // rows)
            chunk = max(1, min(limit - rows, affordable))
    return found


class NotReadable(Exception):
    """The server or the driver cannot hand over the values of the very first row.

    Args:
        reason: why, without values.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def as_many_as_can_be_read(read: Callable[[int], T], limit: int) -> T:
    """A batch; where one value in it cannot be read, the rows before it, found by halving.

    Args:
        read: takes the number of rows.
        limit: how many to begin with.

    Raises:
        NotReadable: already the first row cannot be read.
    """
    while True:
        try:
            return read(limit)
        except UnicodeDecodeError:
            reason = "it is not UTF-8"
        except psycopg.Error as error:
            if not retry.about_a_row(error):
                raise
            reason = without_values(error)
        if limit == 1:
            raise NotReadable(reason)
        limit //= 2


def fetch_batch(cursor: psycopg.ServerCursor[Any], limit: int) -> list[Row]:
    """The next rows of an open cursor, of text: at most ``limit``, fewer where they are large, none at the end."""
    rows: list[Row] = []
    size = 0
    chunk = min(limit, _FIRST_CHUNK)
    while len(rows) < limit and size < BATCH_BYTES:
        part = cursor.fetchmany(chunk)
        if not part:
            break
        rows += part
        size += sum(map(len, filter(None, chain.from_iterable(part))))
        affordable = (BATCH_BYTES - size) // max(1, size // len(rows))
        chunk = max(1, min(limit - len(rows), affordable))
    return rows
