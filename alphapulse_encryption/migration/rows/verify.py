"""Verification: every ciphertext decrypted and compared with its plaintext, every token computed again.

Nothing here looks at a status column. A batch is one statement, so it speaks of one moment. A range's result is kept
with the moment it began, the table's definition and the key, and is worth nothing once these changed; and with
the oldest transaction that was under way then. Whatever was written since was written by that one or a later one, so
the rows changed since a verification are found by their ``xmin``, without decrypting the others
(:func:`verify_changed`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta
from typing import Any, Literal, get_args

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token, search_tokens_many
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.keys import check_key, retired_versions
from alphapulse_encryption.migration.bookkeeping.quarantine import read_quarantine
from alphapulse_encryption.migration.bookkeeping.ranges import Key, hold_plan, read_range
from alphapulse_encryption.migration.bookkeeping.tables import TableState, require_state
from alphapulse_encryption.migration.bookkeeping.verifications import (
    keep_row_count,
    keep_verification,
    kept_verifications,
    missing_rows,
)
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows.batches import (
    NotReadable,
    Row,
    as_many_as_can_be_read,
    fetch_batch,
    key_of,
    plan_by_key,
    read_batch,
)
from alphapulse_encryption.migration.rows.operation import open_each
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]
Problem = Literal["pending", "quarantined", "mismatched", "undecryptable", "token_mismatched", "retired_key"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)

ROWS_PER_BATCH = 5_000
# So many offenders are named per range and kind of problem and column; the counts are always exact.
NAMED_OFFENDERS = 10
# A result older than this has to be renewed before anything relies on it.
FRESH_FOR = timedelta(days=7)
# Transactions are told apart over a distance of 2^31 (PostgreSQL manual, 24.1.5); half of it leaves a margin.
MOST_TRANSACTIONS = 2**30
_XID_BITS = 32


class Stopped(MigrationError):
    """The caller wants no more batches; raised by it from ``on_progress``. No result is kept."""


@dataclass
class Counts:
    """Values of one column.

    Args:
        matching: decrypted and equal, or, where the ciphertext is right, decrypted.
        empty: NULL on both sides.
        pending: plaintext without ciphertext or token.
        quarantined: the same, in a row that the backfill had to set aside.
        mismatched: decrypted to something else, or there without its plaintext.
        undecryptable: not a readable envelope of this column.
        token_mismatched: the search token is not that of the value, under the key version of its ciphertext.
        retired_key: right, but of a key version that is retired, whose key may be gone tomorrow.
    """

    matching: int = 0
    empty: int = 0
    pending: int = 0
    quarantined: int = 0
    mismatched: int = 0
    undecryptable: int = 0
    token_mismatched: int = 0
    retired_key: int = 0

    @property
    def faults(self) -> int:
        """Values that stand in the way of calling the column migrated."""
        return sum(getattr(self, problem) for problem in PROBLEMS)

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
    """What :func:`verify_range` found, or :func:`verify_changed`."""

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
        rows: rows verified.
        columns: per catalogued column.
        offenders: the first of each range.
        verified_at: the oldest moment that any range's result speaks of; None where one is missing.
        since: number of a transaction; every row that no later one has written was verified. None as well.
        missing_rows: rows there are beyond those verified, by :func:`count_rows`; None where they were not counted
            since.
        fresh: whether every result is recent enough to be relied on.
        reasons: why the table is not verified; empty where it is.
    """

    table: str
    rows: int
    columns: Mapping[str, Counts]
    offenders: tuple[Offender, ...]
    verified_at: datetime | None
    since: int | None
    missing_rows: int | None
    fresh: bool
    reasons: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def column_passed(self, column: str) -> bool:
        """Whether this column is migrated, all ranges being verified."""
        return self.verified_at is not None and self.columns[column].faults == 0


@dataclass(frozen=True)
class RowCount:
    """What :func:`count_rows` found.

    Args:
        rows: in the table now.
        verified: by the ranges, together.
        missing: rows not changed since, beyond those verified.
    """

    rows: int
    verified: int
    missing: int


@dataclass
class _Tally:
    columns: dict[str, Counts]
    quarantined: Collection[Key] = ()
    rows: int = 0
    offenders: list[Offender] = field(default_factory=list)
    named: dict[tuple[str, Problem], int] = field(default_factory=dict)
    names_at_most: float = NAMED_OFFENDERS

    def fault(self, column: str, problem: Problem, key: Key) -> None:
        if problem == "pending" and key in self.quarantined:
            problem = "quarantined"
        counts = self.columns[column]
        setattr(counts, problem, getattr(counts, problem) + 1)
        seen = self.named.get((column, problem), 0)
        self.named[column, problem] = seen + 1
        if seen < self.names_at_most:
            self.offenders.append(Offender(column, problem, key))

    def result(self, started: float) -> RangeVerification:
        return RangeVerification(self.rows, self.columns, tuple(self.offenders), time.monotonic() - started)


def verify_range(
    target: Target, table: Table, number: int, *, on_progress: Callable[[int, float], None] | None = None
) -> RangeVerification:
    """Verify one batch range against the rows as they are now, and keep the result.

    Args:
        on_progress: called after each batch with rows so far and seconds; may raise :class:`Stopped`.

    Raises:
        RefusedError: wrong key, or the range was never planned.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    with target.database.session(f"verify range {number:02d} of {table.key}") as connection:
        plan_by_key(connection)
        state = require_state(connection, table)
        check_key(connection, target.keys)
        hold_plan(connection, table)
        batch_range = read_range(connection, table, number)
        definition = read_table(connection, table, plaintext=state.state.has_both_sides)
        aside = {row.key for row in read_quarantine(connection, table, number)}
        tally = _Tally({column.name: Counts() for column in table.columns}, aside)
        comparison = _comparison(connection, target, definition, state, tally)
        verified_at, since = connection.execute(
            "SELECT clock_timestamp(), pg_snapshot_xmin(pg_current_snapshot())::text"
        ).fetchall()[0]
        position = batch_range.lower
        while not batch_range.is_empty:
            condition, parameters = sql.within(definition, position, batch_range.upper)
            rows = _read(connection, definition, condition, parameters)
            if rows is None:
                position = _compare_alone(connection, comparison, condition, parameters) or position
            elif rows:
                comparison.compare(rows)
                position = key_of(definition, rows[-1])
            else:
                break
            if on_progress is not None:
                on_progress(tally.rows, time.monotonic() - started)
        _keep(connection, table, number, definition, target.keys, tally, verified_at, since, target.actor)
    return tally.result(started)


def faults(
    rows: Sequence[Row], definition: TableDefinition, cipher: EnvelopeFormat, keys: KeyRing
) -> tuple[Offender, ...]:
    """Every fault of some rows while their plaintext is right, in the order of the columns.

    Args:
        rows: as :func:`sql.select_for_verification` reads them.
        definition: their table.
        keys: for the tokens.
    """
    tally = _Tally({column.name: Counts() for column in definition.table.columns}, names_at_most=math.inf)
    _Comparison(definition, cipher, keys, tally, ciphertext_is_right=False).compare(rows)
    return tuple(tally.offenders)


def _read(
    connection: Connection, definition: TableDefinition, condition: Composed, parameters: Sequence[str]
) -> list[Row] | None:
    """The next batch; None where the server or the driver cannot hand over the values of its very first row."""
    query = sql.select_for_verification(definition, condition)
    try:
        return as_many_as_can_be_read(
            lambda limit: read_batch(connection, query, parameters, limit), ROWS_PER_BATCH
        )
    except NotReadable:
        return None


def _compare_alone(
    connection: Connection, comparison: _Comparison, condition: Composed, parameters: Sequence[str]
) -> Key | None:
    """Compare the first row column by column, because one of them cannot be read.

    Returns:
        Its key; None where it was deleted meanwhile.
    """
    definition = comparison.definition
    found = read_batch(connection, sql.select_for_verification(definition, condition, ()), parameters, 1)
    if not found:
        return None
    key = key_of(definition, found[0])
    comparison.tally.rows += 1
    for column in definition.table.columns:
        query = sql.select_for_verification(definition, condition, (column,))
        try:
            rows = read_batch(connection, query, parameters, 1)
            if rows and key_of(definition, rows[0]) == key:
                comparison.compare_column(column, rows, list(zip(*rows, strict=True))[-3:])
        except (psycopg.DataError, UnicodeDecodeError):
            # Such a value cannot have been encrypted by us, and the backfill has set it aside.
            problem: Problem = "pending" if key in comparison.tally.quarantined else "mismatched"
            comparison.tally.fault(column.name, problem, key)
    return key


@dataclass(frozen=True)
class _Comparison:
    definition: TableDefinition
    cipher: EnvelopeFormat
    keys: KeyRing
    tally: _Tally
    ciphertext_is_right: bool
    retired: Collection[int] = ()

    def compare(self, rows: Sequence[Row]) -> None:
        """Compare rows that have every column."""
        self.tally.rows += len(rows)
        columns = list(zip(*rows, strict=True))[len(self.definition.key) :]
        for number, column in enumerate(self.definition.table.columns):
            self.compare_column(column, rows, columns[3 * number : 3 * number + 3])

    def compare_column(
        self, column: Column, rows: Sequence[Row], sides: Sequence[Sequence[str | None]]
    ) -> None:
        """Compare one column: of rows with their keys at the head, its plaintexts, ciphertexts and tokens."""
        plaintexts, envelopes, tokens = sides
        values, unreadable = open_each(self.cipher, column, envelopes)
        current = self.keys.current_version
        expected = search_tokens_many(self.keys, values, column.context) if column.searchable else None
        ending = self.cipher.ending(column.context, current)
        counts = self.tally.columns[column.name]
        for i, (plaintext, envelope, token, value) in enumerate(
            zip(plaintexts, envelopes, tokens, values, strict=True)
        ):
            problem: Problem | None = None
            if envelope is None:
                problem = _problem_without_ciphertext(plaintext, token)
            elif i in unreadable:
                problem = "undecryptable"
            elif plaintext != value and not (plaintext is None and self.ciphertext_is_right):
                problem = "mismatched"
            else:
                # Of most envelopes the version is told by their ending; looking into one takes as long as opening it.
                ours = envelope.endswith(ending)
                version = current if ours else self.cipher.key_version(envelope, column.context)
                if expected is not None and token != self._token(column, value, version, expected[i]):
                    problem = "pending" if token is None and plaintext is not None else "token_mismatched"
                elif version in self.retired:
                    problem = "retired_key"
            if problem is not None:
                self.tally.fault(column.name, problem, key_of(self.definition, rows[i]))
            elif envelope is None:
                counts.empty += 1
            else:
                counts.matching += 1

    def _token(self, column: Column, value: str | None, version: int, current: str | None) -> str | None:
        """The token that belongs to an envelope: of its own version, for a lookup asks for those of either."""
        if value is None or version == self.keys.current_version:
            return current
        return search_token(self.keys, value, column.context, version)


def _comparison(
    connection: Connection, target: Target, definition: TableDefinition, state: TableState, tally: _Tally
) -> _Comparison:
    right = state.authority == "ciphertext"
    retired = retired_versions(connection)
    return _Comparison(definition, target.cipher, target.keys, tally, right, retired)


def _problem_without_ciphertext(plaintext: str | None, token: str | None) -> Problem | None:
    if plaintext is not None:
        return "pending"
    return None if token is None else "token_mismatched"


def _keep(
    connection: Connection,
    table: Table,
    number: int,
    definition: TableDefinition,
    keys: KeyRing,
    tally: _Tally,
    verified_at: datetime,
    since: str,
    actor: Actor,
) -> None:
    keep_verification(
        connection,
        table,
        number,
        verified_at=verified_at,
        since=since,
        definition=definition.shape(),
        key_check=keys.check_value(keys.current_version),
        rows=tally.rows,
        columns={name: asdict(counts) for name, counts in tally.columns.items()},
        offenders=[asdict(offender) for offender in tally.offenders],
        run_id=actor.run_id,
    )


def verify_changed(target: Target, table: Table, since: int, *, seconds: float) -> RangeVerification:
    """Verify the rows changed since a verification, partitions included, as they are at one moment.

    One scan of the table that decrypts what it finds; it takes no lock that a writer would notice, and keeps nothing.
    What is changed on the disk past PostgreSQL keeps its ``xmin``: only a verification of all rows sees that.

    Args:
        since: as :class:`TableVerification` has it.
        seconds: how long it may take.

    Raises:
        RefusedError: it would take longer, or too many transactions ago.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - started)

    with target.database.session(
        f"verify the rows of {table.key} changed since the verification"
    ) as connection:
        state = require_state(connection, table)
        definition = read_table(connection, table, plaintext=state.state.has_both_sides)
        tally = _Tally({column.name: Counts() for column in table.columns})
        comparison = _comparison(connection, target, definition, state, tally)
        try:
            with connection.transaction(), connection.cursor(name="encryption_changed") as cursor:
                _allow(connection, left())
                cursor.execute(sql.select_changed(definition), [_as_xid(since)])
                while rows := fetch_batch(cursor, ROWS_PER_BATCH):
                    comparison.compare(rows)
                    _allow(connection, left())
        except psycopg.errors.QueryCanceled:
            # By nobody else: the time that each statement has left is what the budget has left.
            if left() > 0:
                raise
            raise _over_budget(table, tally.rows, seconds) from None
        except _OverBudget:
            raise _over_budget(table, tally.rows, seconds) from None
        except (psycopg.DataError, UnicodeDecodeError):
            raise RefusedError(
                f"Among the rows of {table.key} changed since its verification are values that cannot be read. Verify "
                f"the table again (--verify --table {table.key}), which names them; nothing was changed."
            ) from None
    tally.offenders.sort(key=str)
    return tally.result(started)


class _OverBudget(Exception):
    pass


def _allow(connection: Connection, seconds: float) -> None:
    """Let a statement of this transaction take so long at most."""
    if seconds <= 0:
        raise _OverBudget
    milliseconds = max(1, int(seconds * 1000))
    connection.execute("SELECT set_config('statement_timeout', %s, true)", [f"{milliseconds}ms"])


def _over_budget(table: Table, rows: int, seconds: float) -> RefusedError:
    return RefusedError(
        f"Looking for what changed in {table.key} since its verification took more than {seconds:g} s: {rows:,} "
        f"changed rows were verified by then. Verify the table again (--verify --table {table.key}), so that fewer "
        "are left, or allow more time (setting drop_verification_seconds); nothing was changed."
    )


def _as_xid(transaction: int) -> str:
    return str(transaction % 2**_XID_BITS)


def count_rows(target: Target, table: Table) -> RowCount | None:
    """Count the rows past the primary key's index, by which they were verified, and keep how many it left out.

    Rows come and go while a verification runs; but each that was not written since it began has been verified, so
    there cannot be more of those than were.

    Returns:
        None where the ranges were not all verified.

    Raises:
        RefusedError: the table's encrypted columns were never added.
        ConfigurationError: the table is missing.
        DatabaseFailure: the server refused.
    """
    with target.database.session(f"count the rows of {table.key}") as connection:
        found = verify_table(connection, table, target.keys)
        if found.since is None:
            return None
        definition = read_table(connection, table, plaintext=False)
        statement = sql.count_unchanged(definition)
        counted_at, *_ = connection.execute("SELECT clock_timestamp()").fetchall()[0]
        rows, unchanged = connection.execute(statement, [_as_xid(found.since)]).fetchall()[0]
        counted = RowCount(rows, found.rows, max(0, unchanged - found.rows))
        keep_row_count(
            connection,
            table,
            counted_at=counted_at,
            since=found.since,
            rows=counted.rows,
            verified=counted.verified,
            missing=counted.missing,
            run_id=target.actor.run_id,
        )
    return counted


def verify_table(connection: Connection, table: Table, keys: KeyRing) -> TableVerification:
    """Put the results of the table's ranges together; reads the bookkeeping only.

    Results of another definition or another key count as missing.

    Raises:
        RefusedError: the table's encrypted columns were never added.
        ConfigurationError: the table is missing.
    """
    return sum_up(connection, table, keys.check_value(keys.current_version))


def sum_up(connection: Connection, table: Table, key_check: str) -> TableVerification:
    """As :func:`verify_table`, for who has no key: the current one is told by its key-check value."""
    require_state(connection, table)
    definition = read_table(connection, table, plaintext=False)
    kept = kept_verifications(
        connection,
        table,
        definition=definition.shape(),
        key_check=key_check,
        fresh_for=FRESH_FOR,
        most_transactions=MOST_TRANSACTIONS,
    )
    columns = {column.name: Counts() for column in table.columns}
    offenders: list[Offender] = []
    moments: list[datetime] = []
    transactions: list[int] = []
    missing = outdated = stale = total = 0
    for found in kept:
        if found.verified_at is None:
            missing += 1
            continue
        if not found.current:
            outdated += 1
            continue
        stale += not found.fresh
        moments.append(found.verified_at)
        transactions.append(found.since)
        total += found.rows
        for name in columns:
            columns[name] += Counts(**found.columns.get(name, {}))
        offenders += [Offender(o["column"], o["problem"], tuple(o["key"])) for o in found.offenders]
    complete = bool(moments) and not missing and not outdated
    unreached = missing_rows(connection, table, min(transactions)) if complete else None
    reasons = []
    if missing or not kept:
        reasons.append(f"{missing or 'all'} batch ranges were not verified yet")
    if outdated:
        reasons.append(f"{outdated} batch ranges were verified before the table's columns or the key changed")
    if stale:
        reasons.append(
            f"{stale} batch ranges were verified more than {FRESH_FOR.days} days or {MOST_TRANSACTIONS:,} "
            "transactions ago"
        )
    for name, counts in columns.items():
        reasons += [
            f"{table.key}.{name}: {getattr(counts, kind)} values {kind}"
            for kind in PROBLEMS
            if getattr(counts, kind)
        ]
    if unreached:
        reasons.append(
            f"{unreached} rows were not reached in the order of the primary key, whose index may be damaged: "
            "rebuild it (REINDEX), and verify again"
        )
    return TableVerification(
        table=table.key,
        rows=total,
        columns=columns,
        offenders=tuple(offenders),
        verified_at=min(moments) if complete else None,
        since=min(transactions) if complete else None,
        missing_rows=unreached,
        fresh=complete and not stale,
        reasons=tuple(reasons),
    )
