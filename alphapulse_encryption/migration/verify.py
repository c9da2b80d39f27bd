"""Verification: every ciphertext decrypted and compared with its plaintext, every token computed again.

Nothing here looks at a status column. A batch is one statement, so it speaks of one moment; its result is kept
with that moment, the table's definition and the key it was made with, and is worth nothing once they changed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from typing import Any, Literal

import psycopg

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token, search_tokens_many
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.migration import sql, tracking
from alphapulse_encryption.migration.batches import Key, Row, key_of, plan_by_key, read_batch
from alphapulse_encryption.migration.database import Actor, Database
from alphapulse_encryption.migration.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]
Problem = Literal["pending", "mismatched", "undecryptable", "token_mismatched"]

ROWS_PER_BATCH = 5_000
# So many offenders are named per range and kind of problem and column; the counts are always exact.
NAMED_OFFENDERS = 10


@dataclass
class Counts:
    """Values of one column.

    Args:
        matching: decrypted and equal, or, where the ciphertext is right, decrypted.
        empty: NULL on both sides.
        pending: plaintext without ciphertext or token.
        mismatched: decrypted to something else, or there without its plaintext.
        undecryptable: not a readable envelope of this column.
        token_mismatched: the search token is not that of the value.
    """

    matching: int = 0
    empty: int = 0
    pending: int = 0
    mismatched: int = 0
    undecryptable: int = 0
    token_mismatched: int = 0

    @property
    def faults(self) -> int:
        """Values that stand in the way of calling the column migrated."""
        return self.pending + self.mismatched + self.undecryptable + self.token_mismatched

    def __add__(self, other: Counts) -> Counts:
        return Counts(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)})


@dataclass(frozen=True)
class Offender:
    """One value that did not verify, named by its key; never the value."""

    column: str
    problem: Problem
    key: Key

    def __str__(self) -> str:
        return f"{self.column} {self.problem} at key ({', '.join(self.key)})"


@dataclass(frozen=True)
class RangeVerification:
    """What :func:`verify_range` found."""

    rows: int
    columns: Mapping[str, Counts]
    offenders: tuple[Offender, ...]
    seconds: float

    @property
    def values(self) -> int:
        return sum(sum(asdict(counts).values()) for counts in self.columns.values())

    @property
    def passed(self) -> bool:
        return all(counts.faults == 0 for counts in self.columns.values())


@dataclass(frozen=True)
class TableVerification:
    """The ranges' results together.

    Args:
        table: the table's key.
        rows: rows verified.
        columns: per catalogued column.
        offenders: the first of each range.
        verified_at: the oldest moment that any range's result speaks of; None where one is missing.
        reasons: why the table is not verified; empty where it is.
    """

    table: str
    rows: int
    columns: Mapping[str, Counts]
    offenders: tuple[Offender, ...]
    verified_at: datetime | None
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def column_passed(self, column: str) -> bool:
        """Whether this column is migrated, all ranges being verified."""
        return self.verified_at is not None and self.columns[column].faults == 0


@dataclass
class _Tally:
    columns: dict[str, Counts]
    rows: int = 0
    offenders: list[Offender] = field(default_factory=list)
    named: dict[tuple[str, Problem], int] = field(default_factory=dict)
    names_at_most: float = NAMED_OFFENDERS

    def fault(self, column: str, problem: Problem, key: Key) -> None:
        counts = self.columns[column]
        setattr(counts, problem, getattr(counts, problem) + 1)
        seen = self.named.get((column, problem), 0)
        self.named[column, problem] = seen + 1
        if seen < self.names_at_most:
            self.offenders.append(Offender(column, problem, key))


def verify_range(
    database: Database,
    table: Table,
    number: int,
    cipher: EnvelopeFormat,
    keys: KeyRing,
    actor: Actor,
    *,
    on_progress: Callable[[int, float], None] | None = None,
) -> RangeVerification:
    """Verify one batch range against the rows as they are now, and keep the result.

    Args:
        database: the target.
        table: the catalogue's entry.
        number: the batch range.
        cipher: the catalogue's envelope format.
        keys: for the tokens.
        actor: who asks.
        on_progress: called after each batch with rows so far and seconds.

    Raises:
        RefusedError: wrong key, or the range was never planned.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with database.session(f"verify range {number:02d} of {table.key}") as connection:
        plan_by_key(connection)
        state = tracking.require_state(connection, table)
        tracking.check_key(connection, keys)
        tracking.hold_plan(connection, table)
        batch_range = tracking.read_range(connection, table, number)
        definition = read_table(connection, table, plaintext=state.stage == "columns")
        tally = _Tally({column.name: Counts() for column in table.columns})
        (verified_at,) = connection.execute("SELECT clock_timestamp()").fetchall()[0]
        position = batch_range.lower
        while not batch_range.is_empty:
            condition, parameters = sql.within(definition, position, batch_range.upper)
            query = sql.select_for_verification(definition, condition)
            rows = read_batch(connection, query, parameters, ROWS_PER_BATCH)
            if not rows:
                break
            _compare(
                rows, definition, cipher, keys, tally, ciphertext_is_right=state.authority == "ciphertext"
            )
            position = key_of(definition, rows[-1])
            if on_progress is not None:
                on_progress(tally.rows, time.monotonic() - started)
        _keep(connection, table, number, definition, keys, tally, verified_at, actor)
    return RangeVerification(
        rows=tally.rows,
        columns=tally.columns,
        offenders=tuple(tally.offenders),
        seconds=time.monotonic() - started,
    )


def faults(
    rows: Sequence[Row], definition: TableDefinition, cipher: EnvelopeFormat, keys: KeyRing
) -> tuple[Offender, ...]:
    """Every fault of some rows while their plaintext is right, in the order of the columns.

    Args:
        rows: as :func:`sql.select_for_verification` reads them.
        definition: their table.
        cipher: the catalogue's envelope format.
        keys: for the tokens.
    """
    tally = _Tally({column.name: Counts() for column in definition.table.columns}, names_at_most=math.inf)
    _compare(rows, definition, cipher, keys, tally, ciphertext_is_right=False)
    return tuple(tally.offenders)


def _compare(
    rows: Sequence[Row],
    definition: TableDefinition,
    cipher: EnvelopeFormat,
    keys: KeyRing,
    tally: _Tally,
    *,
    ciphertext_is_right: bool,
) -> None:
    width = len(definition.key)
    columns = list(zip(*rows, strict=True))
    tally.rows += len(rows)
    for number, column in enumerate(definition.table.columns):
        plaintexts, envelopes, tokens = columns[width + 3 * number : width + 3 * number + 3]
        values, unreadable = _decrypt(envelopes, cipher, column)
        expected = search_tokens_many(keys, values, column.context) if column.searchable else None
        counts = tally.columns[column.name]
        for i, (plaintext, envelope, token, value) in enumerate(
            zip(plaintexts, envelopes, tokens, values, strict=True)
        ):
            problem: Problem | None
            if envelope is None:
                problem = _problem_without_ciphertext(plaintext, token)
            elif i in unreadable:
                problem = "undecryptable"
            elif plaintext != value and not (plaintext is None and ciphertext_is_right):
                problem = "mismatched"
            elif expected is not None and token != expected[i]:
                problem = _problem_with_token(keys, column, plaintext, value, token)
            else:
                problem = None
            if problem is not None:
                tally.fault(column.name, problem, key_of(definition, rows[i]))
            elif envelope is None:
                counts.empty += 1
            else:
                counts.matching += 1


def _problem_without_ciphertext(plaintext: str | None, token: str | None) -> Problem | None:
    if plaintext is not None:
        return "pending"
    return None if token is None else "token_mismatched"


def _problem_with_token(
    keys: KeyRing, column: Column, plaintext: str | None, value: str | None, token: str | None
) -> Problem | None:
    """Of a token that is not the one of the current key version."""
    if token is None:
        return "token_mismatched" if plaintext is None else "pending"
    # While keys are rotated, rows carry tokens of either version.
    older = (version for version in keys.versions if version != keys.current_version)
    if value is not None and any(search_token(keys, value, column.context, v) == token for v in older):
        return None
    return "token_mismatched"


def _decrypt(
    envelopes: Sequence[str | None], cipher: EnvelopeFormat, column: Column
) -> tuple[list[str | None], set[int]]:
    try:
        return cipher.decrypt_many(envelopes, column.context), set()
    except DecryptionError:
        pass
    # One of them does not open: find out which, one by one.
    values: list[str | None] = []
    unreadable: set[int] = set()
    for i, envelope in enumerate(envelopes):
        try:
            values.append(None if envelope is None else cipher.decrypt(envelope, column.context))
        except DecryptionError:
            values.append(None)
            unreadable.add(i)
    return values, unreadable


def _keep(
    connection: Connection,
    table: Table,
    number: int,
    definition: TableDefinition,
    keys: KeyRing,
    tally: _Tally,
    verified_at: datetime,
    actor: Actor,
) -> None:
    connection.execute(
        "INSERT INTO public.encryption_verifications "
        "(table_name, batch_range, verified_at, definition, key_check, row_count, columns, offenders, run_id) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (table_name, batch_range) DO UPDATE SET verified_at = excluded.verified_at, "
        "definition = excluded.definition, key_check = excluded.key_check, row_count = excluded.row_count, "
        "columns = excluded.columns, offenders = excluded.offenders, run_id = excluded.run_id",
        [
            table.key,
            number,
            verified_at,
            definition.shape(),
            keys.check_value(keys.current_version),
            tally.rows,
            json.dumps({name: asdict(counts) for name, counts in tally.columns.items()}),
            json.dumps([asdict(offender) for offender in tally.offenders]),
            actor.run_id,
        ],
    )


def verify_table(connection: Connection, table: Table, keys: KeyRing) -> TableVerification:
    """Put the results of the table's ranges together; reads the bookkeeping only.

    Results of another definition or another key count as missing.

    Raises:
        RefusedError: the table's encrypted columns were never added.
        ConfigurationError: the table is missing.
    """
    tracking.require_state(connection, table)
    definition = read_table(connection, table, plaintext=False)
    rows = connection.execute(
        "SELECT v.verified_at, v.row_count, v.columns, v.offenders, "
        "  v.definition = %s AND v.key_check = %s "
        "FROM public.encryption_ranges r LEFT JOIN public.encryption_verifications v USING (table_name, batch_range) "
        "WHERE r.table_name = %s ORDER BY r.batch_range",
        [definition.shape(), keys.check_value(keys.current_version), table.key],
    ).fetchall()
    columns = {column.name: Counts() for column in table.columns}
    offenders: list[Offender] = []
    moments: list[datetime] = []
    missing = outdated = total = 0
    for verified_at, row_count, found, named, current in rows:
        if verified_at is None:
            missing += 1
            continue
        if not current:
            outdated += 1
            continue
        moments.append(verified_at)
        total += row_count
        for name in columns:
            columns[name] += Counts(**found.get(name, {}))
        offenders += [Offender(o["column"], o["problem"], tuple(o["key"])) for o in named]
    reasons = []
    if missing or not rows:
        reasons.append(f"{missing or 'all'} batch ranges were not verified yet")
    if outdated:
        reasons.append(f"{outdated} batch ranges were verified before the table's columns or the key changed")
    for name, counts in columns.items():
        for kind in ("pending", "mismatched", "undecryptable", "token_mismatched"):
            if getattr(counts, kind):
                reasons.append(f"{table.key}.{name}: {getattr(counts, kind)} values {kind}")
    return TableVerification(
        table=table.key,
        rows=total,
        columns=columns,
        offenders=tuple(offenders),
        verified_at=min(moments) if moments and not missing and not outdated else None,
        reasons=tuple(reasons),
    )
