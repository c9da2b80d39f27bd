"""Plaintext from ciphertext: the backfill the other way round, for a revert and for a restore.

A value is *unfilled* when its ciphertext is there and its plaintext is not. Batches go by the primary key,
each a short transaction of its own, and leave rows alone that another transaction changed since they were
read. A value takes the way it would have taken had the application written it: a cast to the column's type,
then the assignment to the column with its length and precision. Where the column then shows it in another
text form (``1.5`` as ``1.5000``), it is encrypted again in that form; where it would have lost something, it
is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import DecryptionError, RefusedError
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.postgres.database import TextArray, mark_as_engine
from alphapulse_encryption.migration.rows.batches import Row, key_of, read_batch
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition
from alphapulse_encryption.migration.schema.saved import verbatim

Connection = psycopg.Connection[Any]

ROWS_PER_BATCH = 2_000
TRIES = 6
# Rows that change again and again while we look are left to the next look after this many passes.
PASSES = 5
NAMED_OFFENDERS = 10

# SQLSTATEs (PostgreSQL manual, appendix A) after which the same batch may simply be tried again.
_RETRYABLE = frozenset(
    {
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "55P03",  # lock_not_available
    }
)
# Classes of SQLSTATEs that mean a value: data exceptions, and violated constraints.
_ABOUT_A_VALUE = ("22", "23")


@dataclass(frozen=True)
class FillProgress:
    """What a fill reports after each batch: totals of this call.

    Args:
        table: the table's key.
        batch_range: the range being filled, None for what was left over.
        rows: rows written.
        values: values decrypted and written.
        seconds: since the fill began.
    """

    table: str
    batch_range: int | None
    rows: int
    values: int
    seconds: float


@dataclass
class Filler:
    """Fills the unfilled values of one table.

    Args:
        connection: an open session; each batch is a transaction of its own, or a savepoint in the caller's.
        definition: the table, with its plaintext columns.
        cipher: the catalogue's envelope format, which counts what it encrypts.
        keys: for search tokens.
        on_progress: called after each batch.
    """

    connection: Connection
    definition: TableDefinition
    cipher: MeteredCipher
    keys: KeyRing
    on_progress: Callable[[FillProgress], None] | None = None
    rows: int = 0
    values: int = 0
    reencrypted: int = 0
    offenders: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    _base_types: dict[str, str] = field(default_factory=dict)

    def fill(self, lower: Key | None, upper: Key | None, *, batch_range: int | None = None) -> None:
        """Fill the rows with ``lower < key <= upper``; None leaves that side open.

        Raises:
            RefusedError: values that cannot be read or do not fit the column; the others are filled.
        """
        for _ in range(PASSES):
            if not self._pass(lower, upper, batch_range):
                break
        self._refuse_offenders()

    def count(self, limit: int) -> int:
        """How many rows are unfilled, counting up to ``limit``."""
        row = self.connection.execute(
            SQL("SELECT count(*) FROM (SELECT FROM {} t WHERE {} LIMIT {}) AS s").format(
                self.definition.identifier, row_unfilled(self.definition), SQL("%s")
            ),
            [limit],
        ).fetchone()
        return int(row[0]) if row is not None else 0

    def _pass(self, lower: Key | None, upper: Key | None, batch_range: int | None) -> int:
        """One way through the range; returns how many rows changed under our hands."""
        changed = 0
        position = lower
        while True:
            condition, parameters = sql.within(self.definition, position, upper)
            rows = read_batch(
                self.connection, _select_unfilled(self.definition, condition), parameters, ROWS_PER_BATCH
            )
            if not rows:
                return changed
            position = key_of(self.definition, rows[-1])
            changed += self._write(self._decrypt(rows))
            if self.on_progress is not None:
                seconds = time.monotonic() - self.started
                self.on_progress(
                    FillProgress(self.definition.table.key, batch_range, self.rows, self.values, seconds)
                )

    def _decrypt(self, rows: list[Row]) -> list[Row]:
        """The same rows with values in place of envelopes; what cannot be read stays NULL and is noted."""
        head = len(self.definition.key) + 1
        columns: list[Sequence[str | None]] = list(zip(*rows, strict=True))
        for number, column in enumerate(self.definition.plaintext_columns, start=head):
            try:
                columns[number] = self.cipher.decrypt_many(columns[number], column.context)
            except DecryptionError:
                columns[number] = [
                    self._decrypt_one(envelope, column, row)
                    for envelope, row in zip(columns[number], rows, strict=True)
                ]
        return [row for row in zip(*columns, strict=True) if any(value is not None for value in row[head:])]

    def _decrypt_one(self, envelope: str | None, column: Column, row: Row) -> str | None:
        if envelope is None:
            return None
        try:
            return self.cipher.decrypt(envelope, column.context)
        except DecryptionError as error:
            self._note(column.name, row, str(error))
            return None

    def _note(self, column: str, row: Row, why: str) -> None:
        offender = f"{column} at key ({', '.join(key_of(self.definition, row))}): {why}"
        if offender not in self.offenders:
            self.offenders.append(offender)

    def _refuse_offenders(self) -> None:
        if not self.offenders:
            return
        named = "; ".join(self.offenders[:NAMED_OFFENDERS])
        more = len(self.offenders) - NAMED_OFFENDERS
        raise RefusedError(
            f"{len(self.offenders)} values of {self.definition.table.key} cannot be put back: {named}"
            f"{f'; and {more} more' if more > 0 else ''}. The others are in place. Correct these "
            "ciphertexts, and run the step again."
        )

    def _write(self, rows: list[Row]) -> int:
        """Write a batch; where a value stands in the way, halve it until that row is alone."""
        if not rows:
            return 0
        retrying = Retrying(
            retry=retry_if_exception(lambda e: isinstance(e, psycopg.Error) and e.sqlstate in _RETRYABLE),
            stop=stop_after_attempt(TRIES),
            wait=wait_random_exponential(multiplier=0.1, min=0.05, max=5),
            reraise=True,
        )
        try:
            return retrying(self._write_once, rows)
        except _LosesSomethingError as error:
            for column, row in error.losses:
                self._note(column, row, "its value does not fit the column's type")
            unfit = {key_of(self.definition, row) for _, row in error.losses}
            return self._write([row for row in rows if key_of(self.definition, row) not in unfit])
        except psycopg.Error as error:
            if error.sqlstate is None or not error.sqlstate.startswith(_ABOUT_A_VALUE):
                raise
            if len(rows) == 1:
                self._note("a value", rows[0], f"the database refuses it ({type(error).__name__})")
                return 0
        middle = len(rows) // 2
        return self._write(rows[:middle]) + self._write(rows[middle:])

    def _write_once(self, rows: list[Row]) -> int:
        head = len(self.definition.key) + 1
        parameters: list[object] = [TextArray(column) for column in zip(*rows, strict=True)]
        parameters += [*key_of(self.definition, rows[0]), *key_of(self.definition, rows[-1])]
        with self.connection.transaction():
            mark_as_engine(self.connection)
            written = self.connection.execute(self._update(), parameters).fetchall()
            reencrypted = self._keep_in_step(rows, written)
        done = {key_of(self.definition, row) for row in written}
        values = sum(
            value is not None for row in rows if key_of(self.definition, row) in done for value in row[head:]
        )
        self.rows += len(written)
        self.values += values
        self.reencrypted += reencrypted
        return len(rows) - len(written)

    def _keep_in_step(self, rows: list[Row], written: list[Row]) -> int:
        """Encrypt again what the column shows in another text form; raises where it lost something."""
        width = len(self.definition.key)
        losses: list[tuple[str, Row]] = []
        renewed: list[tuple[Column, Key, str]] = []
        for row in written:
            for number, column in enumerate(self.definition.plaintext_columns):
                shown, unconstrained = row[width + 2 * number : width + 2 * number + 2]
                if shown is None:
                    continue
                if not _same(shown, unconstrained, self._base_type(column)):
                    losses.append((column.name, row))
                renewed.append((column, key_of(self.definition, row), shown))
        if losses:
            raise _LosesSomethingError(losses)
        for column, key, value in renewed:
            assignments: list[Composable] = [SQL("{} = %s").format(Identifier(column.encrypted))]
            parameters: list[object] = [self.cipher.encrypt(value, column.context)]
            if column.searchable:
                assignments.append(SQL("{} = %s").format(Identifier(column.search)))
                parameters.append(search_token(self.keys, value, column.context))
            self.connection.execute(
                SQL("UPDATE {} t SET {} WHERE {}").format(
                    self.definition.identifier,
                    SQL(", ").join(assignments),
                    sql.compare_key(self.definition, "="),
                ),
                [*parameters, *key],
            )
        return len(renewed)

    def _update(self) -> Composed:
        """One UPDATE per row; returns keys and, per value shown in another form, that form and the free one.

        Casts are made value by value, because an array of a type that is an array itself does not exist, and
        without length and precision: an explicit cast to ``varchar(3)`` cuts silently, the assignment
        refuses.
        """
        columns = self.definition.plaintext_columns
        arrays: list[Composable] = []
        names: list[Composable] = []
        for number in range(len(self.definition.key)):
            arrays.append(SQL("%s::text[]"))
            names.append(Identifier(f"k{number}"))
        arrays.append(SQL("%s::text[]::xid[]"))
        names.append(Identifier("x"))
        assignments: list[Composable] = []
        returning: list[Composable] = []
        for number, column in enumerate(columns):
            value = Identifier("d", f"c{number}")
            free = SQL("{}::{}").format(value, verbatim(self._base_type(column)))
            shown = SQL("{}::text").format(Identifier("t", column.name))
            # "C" compares bytes, and settles which of two columns' collations is meant.
            differs = SQL('{} COLLATE "C" IS DISTINCT FROM ({}) COLLATE "C" AND {} IS NOT NULL').format(
                value, shown, value
            )
            arrays.append(SQL("%s::text[]"))
            names.append(Identifier(f"c{number}"))
            assignments.append(
                SQL("{} = CASE WHEN {} IS NULL THEN {} ELSE {} END").format(
                    Identifier(column.name), value, Identifier("t", column.name), free
                )
            )
            returning.append(SQL("CASE WHEN {} THEN {} END").format(differs, shown))
            returning.append(SQL("CASE WHEN {} THEN ({})::text END").format(differs, free))
        return SQL(
            "UPDATE {table} t SET {assignments} FROM unnest({arrays}) AS d ({names}) "
            "WHERE {first} AND {last} AND {keys} AND t.xmin = d.x RETURNING {key}, {returning}"
        ).format(
            table=self.definition.identifier,
            assignments=SQL(", ").join(assignments),
            arrays=SQL(", ").join(arrays),
            names=SQL(", ").join(names),
            first=sql.compare_key(self.definition, ">="),
            last=sql.compare_key(self.definition, "<="),
            keys=sql.same_key(self.definition),
            key=sql.key_text(self.definition),
            returning=SQL(", ").join(returning),
        )

    def _base_type(self, column: Column) -> str:
        """The column's type without length and precision."""
        if not self._base_types:
            # A modifier of -1 and not NULL: as a type, plain ``character`` means one character.
            rows = self.connection.execute(
                "SELECT attname, format_type(atttypid, -1) FROM pg_attribute WHERE attrelid = %s AND attnum "
                "> 0 AND NOT attisdropped",
                [self.definition.oid],
            )
            self._base_types.update({name: type_ for name, type_ in rows})
        return self._base_types[column.name]


class _LosesSomethingError(Exception):
    """Columns with the rows whose value the column cannot hold; has no text, so that it can quote nothing."""

    def __init__(self, losses: list[tuple[str, Row]]) -> None:
        super().__init__()
        self.losses = losses


def _same(shown: str, unconstrained: str | None, base_type: str) -> bool:
    if shown == unconstrained:
        return True
    if base_type != "numeric" or unconstrained is None:
        return False
    try:
        return Decimal(shown) == Decimal(unconstrained)
    except InvalidOperation:
        return False


def row_unfilled(definition: TableDefinition, alias: str = "t") -> Composed:
    """A row is unfilled when one of its ciphertexts has no plaintext beside it."""
    parts: list[Composable] = [
        SQL("({} IS NULL AND {} IS NOT NULL)").format(
            Identifier(alias, column.name), Identifier(alias, column.encrypted)
        )
        for column in definition.plaintext_columns
    ]
    return SQL("({})").format(SQL(" OR ").join(parts or [SQL("false")]))


def _select_unfilled(definition: TableDefinition, condition: Composed) -> Composed:
    return SQL(
        "SELECT {key}, t.xmin::text, {values} FROM {table} t WHERE {condition} AND {unfilled} "
        "ORDER BY {order} LIMIT %s"
    ).format(
        key=sql.key_text(definition),
        values=SQL(", ").join(
            SQL("CASE WHEN {} IS NULL THEN {} END").format(
                Identifier("t", column.name), Identifier("t", column.encrypted)
            )
            for column in definition.plaintext_columns
        ),
        table=definition.identifier,
        condition=condition,
        unfilled=row_unfilled(definition),
        order=sql.key_list(definition),
    )
