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
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import partial

import psycopg
from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token, search_tokens_many
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.keys import check_key, retired_versions
from alphapulse_encryption.migration.bookkeeping.quarantine import read_quarantine
from alphapulse_encryption.migration.bookkeeping.ranges import Key, hold_plan, leave_no_gap, read_range
from alphapulse_encryption.migration.bookkeeping.tables import require_state
from alphapulse_encryption.migration.bookkeeping.verifications import (
    FRESH_FOR,
    MOST_TRANSACTIONS,
    keep_row_count,
    keep_verification,
    kept_verifications,
    missing_rows,
)
from alphapulse_encryption.migration.postgres import retry
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.rows.batches import (
    NotReadable,
    Texts,
    as_many_as_can_be_read,
    key_at,
    plan_by_key,
    read_texts,
    rows_within_bytes,
    sweep,
    texts,
)
from alphapulse_encryption.migration.rows.operation import open_each
from alphapulse_encryption.migration.rows.problems import PROBLEMS, Problem, advice
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import refuse_unguarded
from alphapulse_encryption.migration.target import Target

# Decrypted and equal, or, where the ciphertext is right, decrypted; and NULL on both sides.
KINDS = ("matching", "empty", *PROBLEMS)

ROWS_PER_BATCH = 5_000
# So many offenders are named per range and kind of problem and column; the counts are always exact.
NAMED_OFFENDERS = 10


class Counts(Counter[str]):
    """Values of one column, by kind."""

    @property
    def faults(self) -> int:
        """Values that keep the column from being called migrated."""
        return sum(self[problem] for problem in PROBLEMS)


@dataclass(frozen=True)
class Offender:
    """One value that did not verify, named by its key; never the value."""

    column: str
    problem: Problem
    key: Key

    def __str__(self) -> str:
        return f"{self.column} {self.problem} at key ({', '.join(self.key)})"


@dataclass
class RangeVerification:
    """What :func:`verify_range` found, or :func:`verify_changed`; counted while it is found."""

    columns: Mapping[str, Counts]
    rows: int = 0
    offenders: list[Offender] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def values(self) -> int:
        return sum(counts.total() for counts in self.columns.values())

    @property
    def passed(self) -> bool:
        return all(counts.faults == 0 for counts in self.columns.values())


@dataclass(frozen=True)
class TableVerification:
    """The ranges' results together.

    Args:
        offenders: the first of each range.
        verified_at: the oldest moment that any range's result speaks of; None where one is missing.
        since: number of a transaction; every row that no later one has written was verified. None as well.
        missing_rows: rows there are beyond those verified, by :func:`count_rows`; None where they were not counted
            since.
        fresh: whether every result is recent enough to be relied on.
        entries: of the audit log, made with the results.
        reasons: why the table is not verified; empty where it is.
        advice: what to do about that.
    """

    table: str
    rows: int
    columns: Mapping[str, Counts]
    offenders: tuple[Offender, ...]
    verified_at: datetime | None
    since: int | None
    missing_rows: int | None
    fresh: bool
    entries: tuple[int | None, ...]
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return not self.reasons

    def column_passed(self, column: str) -> bool:
        """Whether this column is migrated, all ranges being verified."""
        return self.verified_at is not None and self.columns[column].faults == 0


@dataclass
class _Comparison:
    """Compares rows, and counts what it finds."""

    definition: TableDefinition
    target: Target
    # With the ciphertext as the source of truth, plaintext may be missing.
    authority: str = "plaintext"
    retired: Collection[int] = ()
    quarantined: Collection[Key] = ()
    names_at_most: float = NAMED_OFFENDERS
    started: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self.found = RangeVerification({column.name: Counts() for column in self.definition.table.columns})

    def compare(self, read: Texts) -> None:
        """Compare rows with every column."""
        self.found.rows += len(read[0])
        for column, sides in sides_read(read, self.definition, self.definition.table.columns):
            self.compare_column(column, read, sides)

    def compare_column(self, column: Column, read: Texts, sides: Texts) -> None:
        plaintexts, envelopes, tokens = sides
        cipher, keys, counts = self.target.cipher, self.target.keys, self.found.columns[column.name]
        values, unreadable = open_each(cipher, column, envelopes)
        current = keys.current_version
        expected = search_tokens_many(keys, values, column.context) if column.searchable else None
        ending = cipher.ending(column.context, current)
        for i, (plaintext, envelope, token, value) in enumerate(
            zip(plaintexts, envelopes, tokens, values, strict=True)
        ):
            problem: Problem | None = None
            if envelope is None and plaintext is not None:
                problem = "pending"
            elif envelope is None:
                problem = None if token is None else "token_mismatched"
            elif i in unreadable:
                problem = "undecryptable"
            elif plaintext != value and not (plaintext is None and self.authority == "ciphertext"):
                problem = "mismatched"
            else:
                # Of most envelopes the version is told by their ending; looking into one takes as long as opening it.
                ours = envelope.endswith(ending)
                version = current if ours else cipher.key_version(envelope, column.context)
                if expected is not None and token != self._token(column, value, version, expected[i]):
                    problem = "pending" if token is None and plaintext is not None else "token_mismatched"
                elif version in self.retired:
                    problem = "retired_key"
            if problem is not None:
                self.fault(column, problem, key_at(read, len(self.definition.key), i))
            else:
                counts["matching" if envelope is not None else "empty"] += 1

    def fault(self, column: Column, problem: Problem, key: Key) -> None:
        if problem == "pending" and key in self.quarantined:
            problem = "quarantined"
        counts = self.found.columns[column.name]
        if counts[problem] < self.names_at_most:
            self.found.offenders.append(Offender(column.name, problem, key))
        counts[problem] += 1

    def result(self) -> RangeVerification:
        self.found.seconds = time.monotonic() - self.started
        return self.found

    def _token(self, column: Column, value: str | None, version: int, current: str | None) -> str | None:
        """The token that belongs to an envelope: of its own version, for a lookup asks for those of either."""
        if value is None or version == self.target.keys.current_version:
            return current
        return search_token(self.target.keys, value, column.context, version)


def verify_range(
    target: Target, table: Table, number: int, *, on_progress: Callable[[int, float], None] | None = None
) -> RangeVerification:
    """Verify one batch range against the rows as they are now, and keep the result.

    Args:
        on_progress: called after each batch with rows so far and seconds; may raise :class:`.engine.Stopped`: no
            result is kept then.

    Raises:
        RefusedError: wrong key, or the range was never planned.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    with target.database.session(f"verify range {number:02d} of {table.key}") as connection:
        plan_by_key(connection)
        state = require_state(connection, table)
        check_key(connection, target.keys)
        hold_plan(connection, table)
        batch_range = read_range(connection, table, number)
        definition = read_table(connection, table, plaintext=state.state.has_both_sides)
        refuse_unguarded(connection, definition)
        comparison = _Comparison(definition, target, state.authority, retired_versions(connection))
        comparison.quarantined = {row.key for row in read_quarantine(connection, table, number)}
        verified_at, since = connection.execute(
            "SELECT clock_timestamp(), pg_snapshot_xmin(pg_current_snapshot())::text"
        ).fetchall()[0]
        position = batch_range.lower
        while not batch_range.is_empty:
            condition, parameters = sql.within(definition, position, batch_range.upper)
            read_rows = partial(_read_rows, connection, definition, condition, parameters)
            try:
                read = as_many_as_can_be_read(read_rows, ROWS_PER_BATCH)
            except NotReadable:
                position = _compare_alone(connection, comparison, condition, parameters) or position
            else:
                if not read[0]:
                    break
                comparison.compare(read)
                position = key_at(read, len(definition.key), -1)
            if on_progress is not None:
                on_progress(comparison.found.rows, time.monotonic() - comparison.started)
        keep_verification(
            *(connection, target.keys, target.actor, table, batch_range),
            verified_at=verified_at,
            since=since,
            definition=definition.shape(),
            rows=comparison.found.rows,
            columns={
                name: {kind: counts[kind] for kind in KINDS}
                for name, counts in comparison.found.columns.items()
            },
            offenders=[asdict(offender) for offender in comparison.found.offenders],
        )
    return comparison.result()


def _read_rows(
    connection: Connection,
    definition: TableDefinition,
    condition: Composed,
    parameters: list[str],
    limit: int,
) -> Texts:
    limit = rows_within_bytes(connection, definition, condition, parameters, limit)
    return read_texts(connection, sql.select_for_verification(definition, condition), parameters, limit)


def _compare_alone(
    connection: Connection, comparison: _Comparison, condition: Composed, parameters: Sequence[str]
) -> Key | None:
    """Compare the first row column by column; returns its key, None where it was deleted meanwhile."""
    definition, width = comparison.definition, len(comparison.definition.key)
    found = read_texts(connection, sql.select_for_verification(definition, condition, ()), parameters, 1)
    if not found[0]:
        return None
    key = key_at(found, width, 0)
    comparison.found.rows += 1
    for column in definition.table.columns:
        query = sql.select_for_verification(definition, condition, (column,))
        try:
            read = read_texts(connection, query, parameters, 1)
            if read[0] and key_at(read, width, 0) == key:
                ((_, sides),) = sides_read(read, definition, (column,))
                comparison.compare_column(column, read, sides)
        except (psycopg.Error, UnicodeDecodeError) as error:
            if isinstance(error, psycopg.Error) and not retry.about_a_row(error):
                raise
            # Such a value cannot have been encrypted by us, and the backfill has set it aside.
            comparison.fault(column, "pending" if key in comparison.quarantined else "mismatched", key)
    return key


def sides_read(
    read: Texts, definition: TableDefinition, columns: Sequence[Column]
) -> Iterator[tuple[Column, Texts]]:
    """Plaintexts, ciphertexts and tokens of each column that rows were read by :func:`sql.select_for_verification`."""
    following = iter(read[len(definition.key) :])
    nothing: list[str | None] = [None] * len(read[0])
    for column in columns:
        there = sql.sides(definition, column)
        yield column, [nothing if name is None else next(following) for name in there]


def faults(read: Texts, definition: TableDefinition, target: Target) -> list[Offender]:
    """Every fault of rows read by :func:`sql.select_for_verification` while plaintext is the source of truth."""
    comparison = _Comparison(definition, target, names_at_most=math.inf)
    comparison.compare(read)
    return comparison.found.offenders


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
    until = time.monotonic() + seconds
    with target.database.session(
        f"verify the rows of {table.key} changed since the verification"
    ) as connection:
        state = require_state(connection, table)
        definition = read_table(connection, table, plaintext=state.state.has_both_sides)
        comparison = _Comparison(definition, target, state.authority, retired_versions(connection))

        def allow_what_is_left() -> None:
            milliseconds = int((until - time.monotonic()) * 1000)
            if milliseconds <= 0:
                raise psycopg.errors.QueryCanceled
            connection.execute("SELECT set_config('statement_timeout', %s, true)", [f"{milliseconds}ms"])

        try:
            with connection.transaction():
                # One moment for all statements: a row that changes between two of them is seen by the first.
                connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                allow_what_is_left()
                changed = partial(sql.select_changed, definition)
                for read in sweep(connection, definition, changed, [str(since)], rows=ROWS_PER_BATCH):
                    comparison.compare(texts(read))
                    allow_what_is_left()
        except psycopg.errors.QueryCanceled:
            rows = comparison.found.rows
            # By somebody else, where there was time left: less than a millisecond is none.
            if until - time.monotonic() > 0.001:
                raise
            raise RefusedError(
                f"Looking for what changed in {table.key} since its verification took more than {seconds:g} s: "
                f"{rows:,} changed rows were verified by then. Verify the table again (--verify --table "
                f"{table.key}), so that fewer are left, or allow more time (setting drop_verification_seconds); "
                "nothing was changed."
            ) from None
        except (psycopg.Error, UnicodeDecodeError) as error:
            if isinstance(error, psycopg.Error) and not retry.about_a_row(error):
                raise
            raise RefusedError(
                f"Among the rows of {table.key} changed since its verification are values that cannot be read. Verify "
                f"the table again (--verify --table {table.key}), which names them; nothing was changed."
            ) from None
    comparison.found.offenders.sort(key=str)
    return comparison.result()


def count_rows(target: Target, table: Table) -> None:
    """Count the rows past the primary key's index, by which they were verified, and keep how many it left out.

    Rows come and go while a verification runs; but each that was not written since it began has been verified, so
    there cannot be more of those than were. Does nothing where the ranges were not all verified.

    Raises:
        RefusedError: the table's encrypted columns were never added.
        ConfigurationError: the table is missing.
        DatabaseFailure: the server refused.
    """
    with target.database.session(f"count the rows of {table.key}") as connection:
        found = verify_table(connection, table, target.keys)
        if found.since is None:
            return
        definition = read_table(connection, table, plaintext=False)
        statement = sql.count_unchanged(definition)
        counted_at, *_ = connection.execute("SELECT clock_timestamp()").fetchall()[0]
        rows, unchanged = connection.execute(statement, [str(found.since)]).fetchall()[0]
        keep_row_count(
            *(connection, target.keys, target.actor, table),
            counted_at=counted_at,
            since=found.since,
            rows=rows,
            verified=found.rows,
            missing=max(0, unchanged - found.rows),
            entries=found.entries,
        )


def verify_table(connection: Connection, table: Table, keys: KeyRing) -> TableVerification:
    """Put the results of the table's ranges together; reads the bookkeeping only.

    Results of another definition or another key count as missing.

    Raises:
        RefusedError: the table's encrypted columns were never added.
        ConfigurationError: the table is missing.
    """
    return sum_up(connection, table, keys.check_value(keys.current_version), keys)


def sum_up(
    connection: Connection, table: Table, key_check: str, keys: KeyRing | None = None
) -> TableVerification:
    """As :func:`verify_table`, for who has no key: the current one is told by its key-check value.

    Without the keys no MAC is checked, so that a result that was forged is not told from one of ours.
    """
    state = require_state(connection, table).state
    definition = read_table(connection, table, plaintext=False)
    kept = kept_verifications(connection, table, definition.shape(), key_check, keys)
    there = [found for found in kept if found.verified_at is not None]
    current = [found for found in there if found.current and found.genuine]
    missing = len(kept) - len(there)
    forged = [f"{found.number:02d}" for found in there if not found.genuine]
    outdated = len(there) - len(forged) - len(current)
    stale = sum(not found.fresh for found in current)
    columns = {column.name: Counts() for column in table.columns}
    for found in current:
        for name, counts in columns.items():
            counts.update(found.columns.get(name, {}))
    complete = bool(current) and len(current) == len(kept)
    since = min(found.since for found in current) if complete else None
    entries = tuple(found.entry for found in current)
    unreached = None if since is None else missing_rows(connection, table, since, entries, keys)
    reasons = []
    if missing or not kept:
        reasons.append(f"{missing or 'all'} batch ranges were not verified yet")
    if forged:
        reasons.append(
            f"the results of the batch ranges {', '.join(forged)} in alphapulse_encryption.verifications are not "
            "authenticated: changed, older than the audit log knows, of other boundaries, of another database, or kept "
            "by an older program"
        )
    if kept and not leave_no_gap((found.lower, found.upper) for found in kept):
        reasons.append("the batch ranges leave rows between them (--replan cuts the table again)")
    if outdated:
        reasons.append(f"{outdated} batch ranges were verified before the table's columns or the key changed")
    if stale:
        reasons.append(
            f"{stale} batch ranges were verified more than {FRESH_FOR.days} days or {MOST_TRANSACTIONS:,} "
            "transactions ago"
        )
    for name, counts in columns.items():
        reasons += [f"{table.key}.{name}: {counts[kind]} values {kind}" for kind in PROBLEMS if counts[kind]]
    if unreached:
        reasons.append(
            f"{unreached} rows were not reached in the order of the primary key, whose index may be damaged: "
            "rebuild it (REINDEX), and verify again"
        )
    return TableVerification(
        table=table.key,
        rows=sum(found.rows for found in current),
        columns=columns,
        offenders=tuple(
            Offender(o["column"], o["problem"], tuple(o["key"])) for found in current for o in found.offenders
        ),
        verified_at=min(found.verified_at for found in current if found.verified_at) if complete else None,
        since=since,
        missing_rows=unreached,
        fresh=complete and not stale,
        entries=entries,
        reasons=tuple(reasons),
        advice=tuple(advice(table, state, columns)) if reasons else (),
    )
