"""Reading a part of a table in key order, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TypeVar

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.migration.bookkeeping.ranges import Key
from alphapulse_encryption.migration.postgres import retry, wire
from alphapulse_encryption.migration.postgres.database import Connection, configure, without_values

# What was read: column by column, in the UTF-8 form that came over the wire.
Columns = list[list[bytes | None]]
Texts = list[list[str | None]]
T = TypeVar("T")

# However large single values are, a batch stops growing here; a few batches are in memory at a time.
BATCH_BYTES = 4 * 1024 * 1024
_FIRST_CHUNK = 50


def plan_by_key(connection: Connection) -> None:
    """Have this session's queries follow the primary key.

    On a table without statistics the planner would read and sort all of it for each batch.
    """
    configure(connection, {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"})


def key_at(columns: Sequence[Sequence[str | bytes | None]], width: int, row: int) -> Key:
    """The primary key of a row that was read; its columns are never NULL."""
    parts = [column[row] for column in columns[:width]]
    return tuple(part.decode() if isinstance(part, bytes) else part or "" for part in parts)


def texts(columns: Columns, errors: str = "strict") -> Texts:
    """What was read as text; raises UnicodeDecodeError, unless ``errors`` says otherwise, as in ``bytes.decode``."""
    return [[None if v is None else v.decode(errors=errors) for v in column] for column in columns]


def read_texts(connection: Connection, query: Composed, parameters: Sequence[str], limit: int) -> Texts:
    """As :func:`read_columns`, of a query and as text; raises UnicodeDecodeError as well."""
    return texts(read_columns(connection, wire.numbered(connection, query), parameters, limit))


def read_columns(connection: Connection, statement: bytes, parameters: Sequence[str], limit: int) -> Columns:
    """The first rows of a query whose columns are text: at most ``limit``, fewer where they are large.

    Args:
        connection: in autocommit mode.
        statement: made by :func:`wire.numbered`; ends in ``LIMIT %s``.
        parameters: those before the limit.

    Raises:
        psycopg.DataError: a value cannot be converted to UTF-8; an encoding of SQL_ASCII lets such in.
    """
    with reading(connection, statement, [*parameters, limit]) as fetch:
        return fetch(limit)


@contextmanager
def reading(
    connection: Connection, statement: bytes, parameters: Sequence[wire.Parameter] = ()
) -> Iterator[Callable[[int], Columns]]:
    """Fetches a query's next rows: at most so many, fewer where they are large, none at the end."""
    with wire.transaction(connection) as last:
        # Within a transaction of the caller's it would stay open, and keep the table from being altered.
        last.append(b"CLOSE encryption_batch")
        wire.execute(connection, b"DECLARE encryption_batch NO SCROLL CURSOR FOR " + statement, parameters)
        yield partial(_fetch, connection)


def _fetch(connection: Connection, limit: int) -> Columns:
    found: Columns = []
    rows = size = 0
    chunk = min(limit, _FIRST_CHUNK)
    while rows < limit and size < BATCH_BYTES:
        statement = b"FETCH FORWARD %d FROM encryption_batch" % chunk
        part = wire.columns(wire.execute(connection, statement, binary=True))
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
    """The server or the driver cannot hand over the values of the very first row; says why, without values."""


def as_many_as_can_be_read(read: Callable[[int], T], limit: int) -> T:
    """A batch of so many rows; where one value in it cannot be read, the rows before it, found by halving.

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
