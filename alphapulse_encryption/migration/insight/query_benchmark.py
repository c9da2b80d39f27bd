"""The guide's "Performance Comparison": the same questions asked of the ciphertext and of the plaintext.

Times are those of a client: a round trip, and on the encrypted side decryption and the search token as well. Both sides
are asked in turn, about the same rows, so that what else goes on in the server falls on both.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from typing import Literal as OneOf

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_tokens_of_every_version
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]
Side = OneOf["plaintext", "encrypted"]

DEFAULT_REPETITIONS = 200
# Rows of one read, as in the guide.
READ_ROWS = 1_000
# So long one question is asked at most: without an index a single answer can take seconds.
SECONDS_PER_QUESTION = 10.0
# Asked before it counts: plans, caches and derived keys are made at the first times.
WARM_UP = 5


@dataclass(frozen=True)
class Timings:
    """How long one question took.

    Args:
        seconds: ascending, one for each time it was asked.
    """

    table: str
    question: str
    side: Side
    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """The smallest time that so many percent of the times do not exceed (nearest rank), in seconds."""
        return self.seconds[max(1, math.ceil(percent / 100 * len(self.seconds))) - 1]


@dataclass(frozen=True)
class QueryBenchmark:
    """What :func:`benchmark_queries` measured.

    Args:
        timings: by question, encrypted and plaintext in turn; the latter only where it was measured.
        remarks: what was not measured, and why.
    """

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
        questions = _Questions(connection, definition, target.cipher, target.keys)
        timings: list[Timings] = []
        sides: tuple[Side, ...] = ("encrypted", "plaintext") if has_plaintext else ("encrypted",)
        for question, ask in questions.all():
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


@dataclass(frozen=True)
class _Questions:
    connection: Connection
    definition: TableDefinition
    cipher: EnvelopeFormat
    keys: KeyRing

    def all(self) -> list[tuple[str, _Ask]]:
        """The questions in words, and how each is asked."""
        this_row = sql.compare_key(self.definition, "=")
        from_this_row = SQL("{} ORDER BY {} LIMIT {}").format(
            sql.compare_key(self.definition, ">="), sql.key_list(self.definition), Literal(READ_ROWS)
        )
        searchable = [column for column in self.definition.encrypted_columns if column.searchable]
        return [
            ("one row by key", self._on_both(this_row)),
            (f"{READ_ROWS:,} rows in key order", self._on_both(from_this_row)),
            *((f"one row by {column.name}", self._by_value(column)) for column in searchable),
        ]

    def _columns(self, side: Side) -> Composed:
        columns = self.definition.encrypted_columns
        names = [column.encrypted if side == "encrypted" else column.name for column in columns]
        return SQL(", ").join(Identifier("t", name) for name in names)

    def _ask(self, side: Side, statement: Composed, parameters: Sequence[str | None]) -> None:
        rows = self.connection.execute(statement, parameters, prepare=True).fetchall()
        if side == "encrypted":
            for number, column in enumerate(self.definition.encrypted_columns):
                self.cipher.decrypt_many([row[number] for row in rows], column.context)

    def _select(self, side: Side, condition: Composed) -> Composed:
        return SQL("SELECT {} FROM {} t WHERE {}").format(
            self._columns(side), self.definition.identifier, condition
        )

    def _on_both(self, condition: Composed) -> _Ask:
        """A question that is put in the same words to both sides."""
        sides: tuple[Side, ...] = ("encrypted", "plaintext")
        statements = {side: self._select(side, condition) for side in sides}
        return lambda side, row: self._ask(side, statements[side], row.key)

    def _by_value(self, column: Column) -> _Ask:
        # One for each key version that a row may have.
        is_token = SQL("{} = %s").format(Identifier("t", column.search))
        by_token = self._select("encrypted", SQL(" OR ").join([is_token] * len(self.keys.versions)))
        live = self.definition.columns.get(column.name)
        type_ = SQL(live.type if live else "text")
        by_value = self._select("plaintext", SQL("{} = %s::{}").format(Identifier("t", column.name), type_))

        def ask(side: Side, row: _Sampled) -> None:
            value = row.values[column.name]
            if side == "plaintext":
                self._ask(side, by_value, [value])
            else:
                # An application computes them for every lookup.
                tokens = search_tokens_of_every_version(self.keys, value, column.context)
                self._ask(side, by_token, tokens)

        return ask


def _sample(connection: Connection, definition: TableDefinition, cipher: EnvelopeFormat) -> list[_Sampled]:
    """Rows from the beginning of each batch range, whole on every side that is there."""
    ranges = [found for found in read_ranges(connection, definition.table) if not found.is_empty]
    columns = definition.encrypted_columns
    whole = [
        SQL("({} IS NOT NULL) = ({} IS NOT NULL)").format(
            Identifier("t", column.name), Identifier("t", column.encrypted)
        )
        for column in definition.plaintext_columns
    ]
    # A value to look for.
    whole += [SQL("{} IS NOT NULL").format(Identifier("t", c.search)) for c in columns if c.searchable]
    sampled = []
    for batch_range in ranges:
        condition, parameters = sql.within(definition, batch_range.lower, batch_range.upper)
        rows = connection.execute(
            SQL(
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
            ),
            parameters,
        )
        for row in rows:
            key, envelopes = row[: len(definition.key)], row[len(definition.key) :]
            searchable = [(c, e) for c, e in zip(columns, envelopes, strict=True) if c.searchable and e]
            sampled.append(_Sampled(key, {c.name: cipher.decrypt(e, c.context) for c, e in searchable}))
    return sampled
