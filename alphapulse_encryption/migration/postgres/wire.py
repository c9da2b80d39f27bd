"""Executing the statements of the hot path, whose data is large, beside threads that encrypt.

psycopg waits for the socket piece by piece and takes the interpreter back for each piece, in the midst of other
threads' work: a batch of a few megabytes costs dozens of such changes. libpq's own blocking calls, which psycopg
offers as :mod:`psycopg.pq`, give the interpreter away once for each statement. Values pass as bytes.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from typing import Any

import psycopg
from psycopg import sql
from psycopg.errors import error_from_result
from psycopg.pq import ConnStatus, DiagnosticField, ExecStatus, Format, TransactionStatus
from psycopg.pq.abc import PGresult

from alphapulse_encryption.migration.postgres.database import OF_THIS_TOOL, Connection, flat

# mallopt(3): from this many bytes on, a block is mapped for itself.
_M_MMAP_THRESHOLD, _OWN_MAP = -3, 1024 * 1024

_TEXT_OID = 25
_TEXT_ARRAY_OID = 1009


class TextArray:
    """A ``text[]`` parameter, made ready for the wire where it is created.

    The backfill's reader thread creates it, so that the thread that writes only has to send it; psycopg's list
    adaptation costs a third more.
    """

    __slots__ = ("data", "items")

    def __init__(self, items: Sequence[str | bytes | None]) -> None:
        self.items = items
        self.data = _text_array(items)


# Lengths of elements in network order, of those that are common.
_LENGTHS = tuple(struct.pack("!i", length) for length in range(1024))
_NULL = struct.pack("!i", -1)


def _text_array(items: Sequence[str | bytes | None]) -> bytes:
    # Binary form of an array: number of dimensions, whether there are NULLs, element type, then length and
    # lower bound of each dimension, then each element with its length (src/backend/utils/adt/arrayfuncs.c).
    if not items:
        return struct.pack("!iiI", 0, 0, _TEXT_OID)
    head = struct.pack("!iiIii", 1, int(None in items), _TEXT_OID, len(items), 1)
    try:
        # Short bytes, which the backfill's are nearly always: half the time of appending.
        parts: list[Any] = [head, *items, *items]
        parts[1::2] = [_LENGTHS[len(item)] for item in items]  # type: ignore[arg-type]
        parts[2::2] = items
        return b"".join(parts)
    except (TypeError, IndexError):
        return b"".join(_any_elements(head, items))


def _any_elements(head: bytes, items: Sequence[str | bytes | None]) -> Iterator[bytes]:
    yield head
    for item in items:
        if item is None:
            yield _NULL
            continue
        element = item.encode() if isinstance(item, str) else item
        yield struct.pack("!i", len(element))
        yield element


@cache
def give_back_large_blocks() -> None:
    """Have memory of large values go back to the system where it is freed.

    By itself glibc maps blocks only above the largest one that was freed so far, up to 32 MB, and each thread keeps
    twice as much for the next one: a hundred megabytes for values of ten.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_MAP)


Parameter = TextArray | str | int


def numbered(connection: Connection, query: sql.Composed) -> bytes:
    """A statement for :func:`execute`, put together once for many executions: ``%s`` becomes ``$1``, ``$2``, …"""
    numbers = count(1)
    statement = ""
    for part in flat(query):
        text = part.as_string(connection)
        if isinstance(part, sql.SQL):
            # Only here a percent sign means something: names are quoted apart from the text around them.
            text, *pieces = text.split("%s")
            text += "".join(f"${next(numbers)}{piece}" for piece in pieces)
        statement += text
    return f"{statement} {OF_THIS_TOOL}".encode()


def execute(
    connection: Connection, statement: bytes, parameters: Sequence[Parameter] = (), *, binary: bool = False
) -> PGresult:
    """Execute one statement, over a connection that nobody else uses meanwhile; raises as psycopg's own cursors would.

    Args:
        statement: with ``$1``, ``$2``, … for its parameters, which text and numbers need a cast for where the type
            does not follow from the statement.
        binary: the form of the result's values; that of text is the text itself.
    """
    result = connection.pgconn.exec_params(
        statement,
        [p.data if isinstance(p, TextArray) else str(p).encode() for p in parameters],
        [_TEXT_ARRAY_OID if isinstance(p, TextArray) else 0 for p in parameters],
        [Format.BINARY if isinstance(p, TextArray) else Format.TEXT for p in parameters],
        Format.BINARY if binary else Format.TEXT,
    )
    return _checked(connection, result)


def script(connection: Connection, *statements: bytes) -> None:
    """Execute statements without parameters in one exchange; one that fails ends it, and raises."""
    _checked(connection, connection.pgconn.exec_(b"; ".join(statements)))


def _checked(connection: Connection, result: PGresult) -> PGresult:
    if result.status not in (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK):
        if connection.pgconn.status == ConnStatus.BAD and not result.error_field(DiagnosticField.SQLSTATE):
            raise psycopg.OperationalError("the connection is lost")
        raise error_from_result(result)
    return result


@contextmanager
def transaction(connection: Connection, *first: bytes) -> Iterator[list[bytes]]:
    """A transaction for the length of a ``with`` block, or a part of the one that the connection is in.

    Each exchange with the server makes this thread wait for the interpreter, which others encrypt with meanwhile.

    Args:
        first: statements to send along with BEGIN.

    Yields:
        A list for statements to send along with COMMIT.
    """
    last: list[bytes] = []
    if connection.pgconn.transaction_status == TransactionStatus.INTRANS:
        if first:
            script(connection, *first)
        yield last
        if last:
            script(connection, *last)
        return
    try:
        script(connection, b"BEGIN", *first)
        yield last
        # In one exchange with what fails, COMMIT is not reached.
        script(connection, *last, b"COMMIT")
    except BaseException:
        # What went wrong is the news; a connection that is lost has nothing to roll back.
        with suppress(psycopg.Error):
            script(connection, b"ROLLBACK")
        raise


def columns(result: PGresult) -> list[list[bytes | None]]:
    """The values of a result, column by column."""
    value, rows = result.get_value, range(result.ntuples)
    return [[value(row, column) for row in rows] for column in range(result.nfields)]
