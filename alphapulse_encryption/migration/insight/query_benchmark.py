"""The guide's "Performance Comparison": the same questions asked of the ciphertext and of the plaintext.

Times are those of a client: a round trip, and on the encrypted side decryption and the search token as well. Both sides
are asked in turn, about the same rows, so that what else goes on in the server falls on both.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal as OneOf

from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.tokens import search_tokens_of_every_version
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Side = OneOf["plaintext", "encrypted"]
SIDES: tuple[Side, ...] = ("encrypted", "plaintext")

DEFAULT_REPETITIONS = 200
# Rows of one read, as in the guide.
READ_ROWS = 1_000
# So long one question is asked at most: without an index a single answer can take seconds.
SECONDS_PER_QUESTION = 10.0
# Asked before it counts: plans, caches and derived keys are made at the first times.
WARM_UP = 5


@dataclass(frozen=True)
class Timings:
    """How long one question took."""

    table: str
    question: str
    side: Side
    # Ascending, one for each time it was asked.
    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """The smallest time that so many percent of the times do not exceed (nearest rank), in seconds."""
        return self.seconds[max(1, math.ceil(percent / 100 * len(self.seconds))) - 1]


@dataclass(frozen=True)
class QueryBenchmark:
    """What :func:`benchmark_queries` measured, by question: encrypted and plaintext in turn, where it was measured."""

    table: str
    timings: tuple[Timings, ...]
    remarks: tuple[str, ...]

    def pairs(self) -> list[tuple[Timings, Timings | None]]:
        """Every question's encrypted side with its plaintext side, where that was measured."""
        plain = {found.question: found for found in self.timings if found.side == "plaintext"}
        return [(t, plain.get(t.question)) for t in self.timings if t.side == "encrypted"]


def benchmark_queries(
    target: Target,
    table: Table,
    *,
    repetitions: int = DEFAULT_REPETITIONS,
    seconds: float = SECONDS_PER_QUESTION,
) -> QueryBenchmark:
    """Ask for rows by key, for many rows and, where columns are searchable, for rows by value; on both sides.

    Reads only. Rows are those that have all their values on the encrypted side and, while it is there, the plaintext
    side; they are drawn at random from a part of each batch range.

    Raises:
        RefusedError: the table has no encrypted columns, or the key is another one.
        ConfigurationError: the table or its key is missing.
        DecryptionError: a value cannot be read.
    """
    with target.database.session(f"measure queries on {table.key}") as connection:
        require_guarded_state(connection, table)
        check_key(connection, target.keys)
        definition = read_table(connection, table, plaintext=False)
        has_plaintext = len(definition.plaintext_columns) == len(table.columns)
        sample = _sample(connection, definition, target.cipher)
        remarks = [] if has_plaintext else ["the plaintext was dropped: there is nothing to compare with"]
        if not sample:
            where = "no row that is whole on both sides" if has_plaintext else "no encrypted row"
            return QueryBenchmark(table.key, (), (*remarks, f"nothing to measure: {where} was found"))
        timings: list[Timings] = []
        sides = SIDES if has_plaintext else SIDES[:1]
        for question, ask in _questions(connection, definition, target):
            asked = _in_turn(ask, sample, sides, repetitions, seconds)
            timings += [Timings(table.key, question, side, tuple(sorted(asked[side]))) for side in sides]
    return QueryBenchmark(table.key, tuple(timings), tuple(remarks))


@dataclass(frozen=True)
class _Sampled:
    """A row that is asked for. Its values stay in memory."""

    key: tuple[str, ...]
    values: Mapping[str, str]


# Asks one side about a row.
_Ask = Callable[[Side, _Sampled], None]


def _in_turn(
    ask: _Ask, sample: Sequence[_Sampled], sides: Sequence[Side], repetitions: int, seconds: float
) -> dict[Side, list[float]]:
    asked: dict[Side, list[float]] = {side: [] for side in sides}
    ends = time.perf_counter() + seconds
    for number in range(-WARM_UP, repetitions):
        counts = number >= 0 or time.perf_counter() > ends
        row = random.choice(sample)  # noqa: S311
        # Whoever comes second finds the pages in memory: each side does so every other time.
        for side in sides if number % 2 else reversed(sides):
            began = time.perf_counter()
            ask(side, row)
            if counts:
                asked[side].append(time.perf_counter() - began)
        if counts and time.perf_counter() > ends:
            break
    return asked


def _questions(
    connection: Connection, definition: TableDefinition, target: Target
) -> Iterator[tuple[str, _Ask]]:
    """The questions in words, and how each is asked."""
    columns = definition.encrypted_columns

    def select(side: Side, condition: Composed) -> Composed:
        names = [column.encrypted if side == "encrypted" else column.name for column in columns]
        return SQL("SELECT {} FROM {} t WHERE {}").format(
            SQL(", ").join(Identifier("t", name) for name in names), definition.identifier, condition
        )

    def read(side: Side, statement: Composed, parameters: Sequence[str | None]) -> None:
        rows = connection.execute(statement, parameters, prepare=True).fetchall()
        if side == "encrypted":
            for number, column in enumerate(columns):
                target.cipher.decrypt_many([row[number] for row in rows], column.context)

    def by_key(condition: Composed) -> _Ask:
        statements = {side: select(side, condition) for side in SIDES}
        return lambda side, row: read(side, statements[side], row.key)

    def by_value(column: Column) -> _Ask:
        # One for each key version that a row may have.
        is_token = SQL("{} = %s").format(Identifier("t", column.search))
        by_token = select("encrypted", SQL(" OR ").join([is_token] * len(target.keys.versions)))
        live = definition.columns.get(column.name)
        is_value = SQL("{} = %s::{}").format(Identifier("t", column.name), SQL(live.type if live else "text"))
        by_plaintext = select("plaintext", is_value)

        def ask(side: Side, row: _Sampled) -> None:
            value = row.values[column.name]
            if side == "plaintext":
                read(side, by_plaintext, [value])
            else:
                # An application computes them for every lookup.
                read(side, by_token, search_tokens_of_every_version(target.keys, value, column.context))

        return ask

    yield "one row by key", by_key(sql.compare_key(definition, "="))
    from_this_row = SQL("{} ORDER BY {} LIMIT {}").format(
        sql.compare_key(definition, ">="), sql.key_list(definition), Literal(READ_ROWS)
    )
    yield f"{READ_ROWS:,} rows in key order", by_key(from_this_row)
    for column in columns:
        if column.searchable:
            yield f"one row by {column.name}", by_value(column)


def _sample(connection: Connection, definition: TableDefinition, cipher: EnvelopeFormat) -> list[_Sampled]:
    """Rows from the beginning of each batch range, whole on every side that is there."""
    ranges = [found for found in read_ranges(connection, definition.table) if not found.is_empty]
    columns = definition.encrypted_columns
    whole = [
        SQL("({}) = ({} IS NOT NULL)").format(
            sql.has_value(Identifier("t", column.name)), Identifier("t", column.encrypted)
        )
        for column in definition.plaintext_columns
    ]
    # A value to look for.
    whole += [SQL("{} IS NOT NULL").format(Identifier("t", c.search)) for c in columns if c.searchable]
    sampled = []
    for batch_range in ranges:
        condition, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        query = SQL(
            "SELECT {key}, {values} FROM "
            "(SELECT * FROM {table} t WHERE {condition} ORDER BY {order} LIMIT {few}) t WHERE {whole}"
        ).format(
            key=sql.key_text(definition),
            values=SQL(", ").join(Identifier("t", c.encrypted) for c in columns),
            table=definition.identifier,
            condition=condition,
            order=sql.key_list(definition),
            few=Literal(max(1, READ_ROWS // len(ranges))),
            whole=SQL(" AND ").join([SQL("true"), *whole]),
        )
        for row in connection.execute(query, parameters):
            key, envelopes = row[: len(definition.key)], row[len(definition.key) :]
            values = {
                column.name: cipher.decrypt(envelope, column.context)
                for column, envelope in zip(columns, envelopes, strict=True)
                if column.searchable and envelope
            }
            sampled.append(_Sampled(key, values))
    return sampled
