"""Reading a part of a table in key order, a bounded batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import TypeVar

import psycopg
from psycopg.sql import SQL, Composed, Literal

from alphapulse_encryption.migration.bookkeeping.ranges import Key
from alphapulse_encryption.migration.postgres import retry, wire
from alphapulse_encryption.migration.postgres.database import (
    AS_APPLICATION,
    AS_OURSELVES,
    Connection,
    answer,
    configure,
    without_values,
)
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition

# What was read: column by column, in the UTF-8 form that came over the wire.
Columns = list[list[bytes | None]]
Texts = list[list[str | None]]
T = TypeVar("T")

# A batch has no more bytes than these, or a single row; a few batches are in memory at a time.
BATCH_BYTES = 4 * 1024 * 1024
# Rows that are larger are read one at a time where they come in no order.
_LARGE_ROW = 16 * 1024
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
    found = read_columns(connection, wire.numbered(connection, query), parameters, limit)
    # Each column gives way to its text, so that large values are not there twice.
    return [texts([found.pop(0)])[0] for _ in range(len(found))]


def read_columns(connection: Connection, statement: bytes, parameters: Sequence[str], limit: int) -> Columns:
    """The first rows of a query whose columns are text: at most ``limit``, fewer where they are large.

    Args:
        connection: in autocommit mode.
        statement: made by :func:`wire.numbered`; ends in ``LIMIT %s``.
        parameters: those before the limit.

    Raises:
        psycopg.DataError: a value cannot be converted to UTF-8; an encoding of SQL_ASCII lets such in.
    """
    with _cursor(connection, statement, [*parameters, limit]) as fetch:
        return fetch(limit)


def rows_within_bytes(
    connection: Connection,
    definition: TableDefinition,
    condition: Composed,
    parameters: Sequence[str],
    limit: int,
    wanted: Composed = sql.EVERYTHING,
) -> int:
    """How many rows of a batch in key order may be read at once: at most ``limit``, and one at the least."""
    if not definition.toasted:
        return limit
    wire.give_back_large_blocks()
    statement = sql.count_within(definition, condition, wanted)
    with wire.transaction(connection, AS_APPLICATION) as last:
        last.append(AS_OURSELVES)
        return max(1, int(answer(connection, statement, *parameters, limit, BATCH_BYTES)))


def sweep(
    connection: Connection,
    definition: TableDefinition,
    select: Callable[[Composed], Composed],
    parameters: Sequence[wire.Parameter] = (),
    *,
    rows: int,
) -> Iterator[Columns]:
    """Batches of at most so many rows, in no order.

    Args:
        select: the query, of the rows that meet a condition.
    """
    parts = [(sql.EVERYTHING, rows)]
    if definition.toasted:
        total, large = sql.row_bytes(definition), Literal(_LARGE_ROW)
        small = (SQL("{} <= {}").format(total, large), BATCH_BYTES // _LARGE_ROW)
        parts = [small, (SQL("{} > {}").format(total, large), 1)]
    for condition, most in parts:
        with _cursor(connection, wire.numbered(connection, select(condition)), parameters) as fetch:
            while (batch := fetch(min(rows, most)))[0]:
                yield batch


@contextmanager
def _cursor(
    connection: Connection, statement: bytes, parameters: Sequence[wire.Parameter] = ()
) -> Iterator[Callable[[int], Columns]]:
    """Fetches a query's next rows: at most so many, fewer where they are large, none at the end.

    The application's casts to text find what they name.
    """
    with wire.transaction(connection, AS_APPLICATION) as last:
        # Within a transaction of the caller's it would stay open, and keep the table from being altered.
        last += [b"CLOSE encryption_batch", AS_OURSELVES]
        wire.execute(connection, b"DECLARE encryption_batch NO SCROLL CURSOR FOR " + statement, parameters)
        yield partial(_fetch, connection)


def _fetch(connection: Connection, limit: int) -> Columns:
    found: Columns = []
    rows = taken = 0
    chunk = min(limit, _FIRST_CHUNK)
    while rows < limit and taken < BATCH_BYTES:
        statement = b"FETCH FORWARD %d FROM encryption_batch" % chunk
        part = wire.columns(wire.execute(connection, statement, binary=True))
        for known, new in zip(found, part, strict=True) if found else ():
            known.extend(new)
        found = found or part
        rows += len(part[0])
        taken += size(part)
        if len(part[0]) < chunk:
            break
        affordable = (BATCH_BYTES - taken) // max(1, taken // rows)
        chunk = max(1, min(limit - rows, affordable))
    return found


def size(columns: Columns) -> int:
    """The bytes of what was read."""
    return sum(map(len, filter(None, chain.from_iterable(columns))))


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
