"""Where the migration stands, from the bookkeeping and the system's own catalogues: reads only, and no large table.

What a role may not see is named and left out, so that a monitoring role needs SELECT on the bookkeeping and no more.
Who works is told by the advisory locks that workers hold, not by a status column: that of a killed worker stays.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

import psycopg
from psycopg.sql import SQL, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral
from pydantic import BaseModel, ConfigDict, Field

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.usage import MOST_MESSAGES
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.lifecycle import Authority, Stage, State
from alphapulse_encryption.migration.bookkeeping.approvals import Approval, list_approvals
from alphapulse_encryption.migration.bookkeeping.backups import latest_backup
from alphapulse_encryption.migration.bookkeeping.columns import Status as Progress
from alphapulse_encryption.migration.bookkeeping.columns import column_progress
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import KeyState, current_key_check, key_versions
from alphapulse_encryption.migration.bookkeeping.limits import read_limits
from alphapulse_encryption.migration.bookkeeping.quarantine import quarantined
from alphapulse_encryption.migration.bookkeeping.ranges import (
    BatchRange,
    operations_under_way,
    range_lock,
    read_ranges,
)
from alphapulse_encryption.migration.bookkeeping.tables import TableState, table_state
from alphapulse_encryption.migration.bookkeeping.usage import read_usage
from alphapulse_encryption.migration.bookkeeping.verifications import verified_ranges
from alphapulse_encryption.migration.gates import approvals
from alphapulse_encryption.migration.gates.backup import is_recent
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.catch_up import has_pending_index
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table

Connection = psycopg.Connection[Any]

# Beyond it nobody needs to know how many rows are pending exactly.
COUNTED = 10_000
# A table of this many bytes is counted even without the index on pending rows.
SMALL_TABLE = 8 * 2**20
LONGEST_STATEMENT = "30s"
# Ranges that were worked on longer ago than this say nothing of today's rate.
RECENT = timedelta(hours=1)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", from_attributes=True)


class Pending(_Model):
    """Rows that wait for a ciphertext."""

    rows: int | None = Field(description="null where this role cannot see it, or nothing is to be told")
    how: Literal["counted", "at least", "estimated", "not visible to this role", "nothing to encrypt"]


class ColumnStatus(_Model):
    """A column of the catalogue."""

    name: str
    status: Progress | Literal["not begun"]
    records_processed: int
    pending: int | None = Field(description="values, where they were counted")
    verified: bool
    started_at: datetime | None
    completed_at: datetime | None
    error_message: str | None


class RangeStatus(_Model):
    """A batch range that is worked on, holds back, failed, or was left in the middle."""

    number: int
    step: Literal["backfill", "rotation", "decrypt", "discard", "repair"]
    status: Literal["running", "holding back", "interrupted", "failed"]
    rows: int
    updated_at: datetime | None
    waiting_for: str | None
    error_message: str | None


class Ranges(_Model):
    """How many batch ranges are where; empty ones among the completed."""

    total: int = 0
    completed: int = 0
    running: int = 0
    interrupted: int = 0
    failed: int = 0
    waiting: int = 0


class Verification(_Model):
    """What the last verification is worth now."""

    valid: bool
    verified_at: datetime | None = Field(description="the oldest moment that a range's result speaks of")
    ranges_verified: int
    faults: int
    reasons: tuple[str, ...] = Field(description="why it is not valid")


class BackupStatus(_Model):
    """The newest backup that holds the table."""

    id: int
    taken_at: datetime
    age_seconds: float
    fresh: bool = Field(description="recent enough for an approval")


class TableStatus(_Model):
    """One table."""

    table: str
    stage: Literal[Stage, "unknown"]
    authority: Authority | None
    rows: int = Field(description="the planner's estimate")
    bytes: int = Field(description="with indexes and TOAST")
    columns: tuple[ColumnStatus, ...]
    pending: Pending
    ranges: Ranges
    active: tuple[RangeStatus, ...]
    rows_done: int
    rows_left: int | None = Field(description="of the backfill; an estimate")
    rows_per_second: float | None
    seconds_left: float | None
    waiting_for: tuple[str, ...]
    rotating_to: int | None = Field(description="key version, while ranges are still of an older one")
    quarantined: int
    verification: Verification | None
    backup: BackupStatus | None
    problem: str | None = Field(description="why less is told of this table")


class ApprovalStatus(_Model):
    """An approval."""

    id: int
    table: str
    state: Literal["open", "void", "used", "revoked", "expired"]
    approver: str
    database_role: str
    approved_at: datetime
    expires_at: datetime
    changed: tuple[str, ...] = Field(description="of an open one: what changed since, so that it is void")


class KeyVersionStatus(_Model):
    """A key version that the database knows."""

    number: int
    state: KeyState
    since: datetime


class KeyUsageStatus(_Model):
    """How often a derived key was used."""

    context: str
    key_version: int
    messages: int
    share: float = Field(description="of those it may encrypt")


class Worker(_Model):
    """A session of this program on the server."""

    pid: int
    role: str | None
    table: str | None
    range: int | None
    since: datetime | None = Field(description="null where this role may not see it")


class Status(_Model):
    """Where the migration stands."""

    version: Literal[1] = 1
    kind: Literal["status"] = "status"
    at: datetime = Field(description="by the server's clock")
    begun: bool
    role: str
    paused: bool | None
    tables: tuple[TableStatus, ...]
    approvals: tuple[ApprovalStatus, ...]
    key_versions: tuple[KeyVersionStatus, ...]
    key_usage: tuple[KeyUsageStatus, ...]
    workers: tuple[Worker, ...]
    not_visible: tuple[str, ...] = Field(description="what this role may not see")

    def with_rates_since(self, before: Status) -> Status:
        """The same, with the rates between two looks in place of those of the bookkeeping."""
        seconds = (self.at - before.at).total_seconds()
        rows = {table.table: table.rows_done for table in before.tables}
        if seconds <= 0:
            return self
        tables = []
        for table in self.tables:
            rate = (table.rows_done - rows.get(table.table, table.rows_done)) / seconds
            left = table.rows_left / rate if table.rows_left is not None and rate > 0 else None
            changes = {"rows_per_second": rate, "seconds_left": left} if rate > 0 else {}
            tables.append(table.model_copy(update=changes))
        return self.model_copy(update={"tables": tuple(tables)})


def read_status(database: Database, catalogue: Catalogue, tables: Sequence[str]) -> Status:
    """Look where the migration stands.

    Args:
        database: the target; nothing is written to it.
        tables: keys of the tables to tell of.

    Raises:
        ConfigurationError: an unknown table, or the database cannot be reached.
        DatabaseFailure: the server refused a question, for example because this role may not read the bookkeeping.
    """
    entries = [catalogue.table(key) for key in tables]
    with replace(database, read_only=True).session("read the status") as connection:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", [LONGEST_STATEMENT])
        plan_by_key(connection)
        now, role = connection.execute("SELECT clock_timestamp(), current_user::text").fetchall()[0]
        look = _Look(connection, catalogue, now, bookkeeping_exists(connection))
        workers = look.workers(entries)
        found = tuple(look.table(entry, workers) for entry in entries)
        return Status(
            at=now,
            begun=look.begun,
            role=role,
            paused=read_limits(connection).paused if look.begun else None,
            tables=found,
            approvals=tuple(look.approved(entries)),
            key_versions=tuple(map(KeyVersionStatus.model_validate, key_versions(connection))),
            key_usage=tuple(
                KeyUsageStatus(
                    context=usage.context,
                    key_version=usage.key_version,
                    messages=usage.messages,
                    share=usage.messages / MOST_MESSAGES,
                )
                for usage in read_usage(connection)
            ),
            workers=workers,
            not_visible=tuple(dict.fromkeys(look.hidden)),
        )


_WORKERS = """
SELECT pid, usename::text, backend_start FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = %s AND pid <> pg_backend_pid()
"""


class _Look:
    """One look, over one connection."""

    def __init__(self, connection: Connection, catalogue: Catalogue, now: datetime, begun: bool) -> None:
        self.connection = connection
        self.catalogue = catalogue
        self.now = now
        self.begun = begun
        self.hidden: list[str] = []
        self._key_check = current_key_check(connection)

    def workers(self, entries: Sequence[Table]) -> tuple[Worker, ...]:
        """Our sessions, with what they work on."""
        ranges = {
            range_lock(entry, r.number): (entry.key, r.number)
            for entry in (entries if self.begun else ())
            for r in read_ranges(self.connection, entry)
        }
        at_work = {
            pid: ranges[name]
            for name, pids in locks.holders(self.connection, list(ranges)).items()
            for pid in pids
        }
        found = []
        for pid, role, since in self.connection.execute(_WORKERS, [Database.application_name]):
            table, number = at_work.get(pid, (None, None))
            found.append(Worker(pid=pid, role=role, table=table, range=number, since=since))
        return tuple(sorted(found, key=lambda w: (w.table is None, w.table or "", w.range or 0, w.pid)))

    def table(self, entry: Table, workers: Sequence[Worker]) -> TableStatus:
        """One table."""
        state = table_state(self.connection, entry) if self.begun else None
        definition: TableDefinition | None = None
        problem = None
        try:
            definition = read_table(self.connection, entry, plaintext=False, once=True)
        except MigrationError as error:
            problem = error.args[0]
        ranges = read_ranges(self.connection, entry) if state is not None else ()
        working = {w.range for w in workers if w.table == entry.key and w.range is not None}
        counts = self._pending(definition, state, ranges)
        rows = definition.estimated_rows if definition is not None else 0
        left = _rows_left(ranges, rows) if state is not None and state.state.has_both_sides else None
        rate = _rate(ranges, self.now)
        operations = operations_under_way(self.connection, entry) if state is not None else ()
        # Who has a range may be the backfill; the one that wrote last is it.
        written = {r.number: r.updated_at for r in ranges}
        elsewhere = {
            one.number
            for one in operations
            if one.number in working and _not_before(one.updated_at, written.get(one.number))
        }
        active = [
            *(_told(one, working - elsewhere) for one in ranges if one.status in ("in_progress", "failed")),
            *(_told(one, elsewhere) for one in operations),
        ]
        verification = self._verification(entry, state, definition)
        return TableStatus(
            table=entry.key,
            stage=(State.UNTOUCHED if state is None else state.state).stage
            if definition is not None
            else "unknown",
            authority=state.authority if state is not None else None,
            rows=rows,
            bytes=definition.total_bytes if definition is not None else 0,
            columns=self._columns(entry, counts, verification),
            pending=counts.pending,
            ranges=_count(ranges, active),
            active=tuple(active),
            rows_done=sum(r.rows_processed for r in ranges) + sum(one.rows_processed for one in operations),
            rows_left=left,
            rows_per_second=rate,
            seconds_left=left / rate if left and rate else None,
            waiting_for=tuple(dict.fromkeys(one.waiting_for for one in active if one.waiting_for)),
            rotating_to=next((one.goal for one in operations if one.operation == "rotate"), None),
            quarantined=quarantined(self.connection, entry) if state is not None else 0,
            verification=verification[0] if verification is not None else None,
            backup=self._backup(entry) if self.begun else None,
            problem=problem,
        )

    def _pending(
        self, definition: TableDefinition | None, state: TableState | None, ranges: Sequence[BatchRange]
    ) -> _Counts:
        if definition is None or (state is not None and not state.state.has_both_sides):
            return _Counts(Pending(rows=None, how="nothing to encrypt"), {})
        estimate = Pending(rows=definition.estimated_rows, how="estimated")
        if state is None or not all(c.encrypted in definition.columns for c in definition.table.columns):
            return _Counts(estimate, {})
        if state.state is State.REVERTED:
            return _Counts(estimate, {})
        indexed = has_pending_index(self.connection, definition)
        if not indexed and definition.total_bytes > SMALL_TABLE:
            left = _rows_left(ranges, definition.estimated_rows)
            return _Counts(Pending(rows=left, how="estimated"), {})
        try:
            row = self.connection.execute(_count_pending(definition)).fetchall()[0]
        except psycopg.errors.InsufficientPrivilege:
            self.hidden.append(f"pending rows of {definition.table.key} (SELECT on the table)")
            return _Counts(Pending(rows=None, how="not visible to this role"), {})
        except psycopg.errors.QueryCanceled:
            return _Counts(Pending(rows=_rows_left(ranges, definition.estimated_rows), how="estimated"), {})
        if row[0] > COUNTED:
            return _Counts(Pending(rows=COUNTED, how="at least"), {})
        by_column = zip((c.name for c in definition.plaintext_columns), row[1:], strict=True)
        return _Counts(Pending(rows=row[0], how="counted"), dict(by_column))

    def _columns(
        self,
        entry: Table,
        counts: _Counts,
        verification: tuple[Verification, Mapping[str, bool]] | None,
    ) -> tuple[ColumnStatus, ...]:
        kept = column_progress(self.connection, entry) if self.begun else {}
        found = []
        for column in entry.columns:
            one = kept.get(column.name)
            found.append(
                ColumnStatus(
                    name=column.name,
                    status=one.status if one else "not begun",
                    records_processed=one.records_processed if one else 0,
                    pending=counts.columns.get(column.name),
                    verified=verification is not None and verification[1].get(column.name, False),
                    started_at=one.started_at if one else None,
                    completed_at=one.completed_at if one else None,
                    error_message=one.error_message if one else None,
                )
            )
        return tuple(found)

    def _verification(
        self, entry: Table, state: TableState | None, definition: TableDefinition | None
    ) -> tuple[Verification, Mapping[str, bool]] | None:
        if state is None or definition is None or self._key_check is None:
            return None
        ranges, first = verified_ranges(self.connection, entry)
        if not ranges:
            return None
        try:
            result = verify.sum_up(self.connection, entry, self._key_check)
        except RefusedError:
            return None
        return (
            Verification(
                valid=result.passed,
                verified_at=result.verified_at or first,
                ranges_verified=ranges,
                faults=sum(counts.faults for counts in result.columns.values()),
                reasons=result.reasons,
            ),
            {column.name: result.column_passed(column.name) for column in entry.columns},
        )

    def _backup(self, entry: Table) -> BackupStatus | None:
        backup = latest_backup(self.connection, entry)
        if backup is None:
            return None
        age = self.now - backup.taken_at
        return BackupStatus(
            id=backup.id,
            taken_at=backup.taken_at,
            age_seconds=age.total_seconds(),
            fresh=is_recent(self.connection, backup),
        )

    def approved(self, entries: Sequence[Table]) -> list[ApprovalStatus]:
        """Those of the tables, the newest first."""
        keys = {entry.key: entry for entry in entries}
        found = []
        for approval in list_approvals(self.connection):
            if approval.table not in keys:
                continue
            changed: list[str] = []
            if approval.is_open:
                changed = self._changed(keys[approval.table], approval)
            found.append(
                ApprovalStatus(
                    id=approval.id,
                    table=approval.table,
                    state=_state_of(approval, changed),
                    approver=approval.approver,
                    database_role=approval.database_role,
                    approved_at=approval.approved_at,
                    expires_at=approval.expires_at,
                    changed=tuple(changed),
                )
            )
        return found

    def _changed(self, entry: Table, approval: Approval) -> list[str]:
        try:
            definition = read_table(self.connection, entry, plaintext=False, once=True)
            return approvals.changed_since(
                self.connection, self.catalogue, definition, self._key_check or "", approval
            )
        except MigrationError:
            return ["the table's definition"]


@dataclass(frozen=True)
class _Counts:
    pending: Pending
    columns: Mapping[str, int]


def _count_pending(definition: TableDefinition) -> Composed:
    """Pending rows up to a limit, and of those how many by column; the index on pending rows answers it."""
    flags = [sql.column_pending(column) for column in definition.plaintext_columns]
    names = [Identifier(f"c{number}") for number in range(len(flags))]
    return SQL("SELECT count(*), {} FROM (SELECT {} FROM {} t WHERE {} LIMIT {}) AS pending").format(
        SQL(", ").join(SQL("count(*) FILTER (WHERE {})").format(name) for name in names),
        SQL(", ").join(SQL("{} AS {}").format(flag, name) for flag, name in zip(flags, names, strict=True)),
        definition.identifier,
        sql.row_pending(definition),
        SqlLiteral(COUNTED + 1),
    )


def _state_of(
    approval: Approval, changed: Sequence[str]
) -> Literal["open", "void", "used", "revoked", "expired"]:
    if approval.consumed_at is not None:
        return "used"
    if approval.revoked_at is not None:
        return "revoked"
    if approval.expired:
        return "expired"
    return "void" if changed else "open"


def _not_before(moment: datetime | None, other: datetime | None) -> bool:
    return other is None or (moment is not None and moment >= other)


def _told(one: BatchRange, working: Collection[int]) -> RangeStatus:
    """What is told of a range that is worked on, or ended otherwise than done.

    Args:
        working: numbers of the ranges that somebody works on.
    """
    works = one.number in working
    status: Literal["running", "holding back", "interrupted", "failed"]
    if works:
        status = "holding back" if one.waiting_for else "running"
    else:
        status = "failed" if one.status == "failed" else "interrupted"
    return RangeStatus(
        number=one.number,
        step="rotation" if one.operation == "rotate" else one.operation,
        status=status,
        rows=one.rows_processed,
        updated_at=one.updated_at,
        waiting_for=one.waiting_for if works else None,
        error_message=one.error_message,
    )


def _count(ranges: Sequence[BatchRange], active: Sequence[RangeStatus]) -> Ranges:
    doing = [one.status for one in active if one.step == "backfill"]
    return Ranges(
        total=len(ranges),
        completed=sum(one.status == "completed" for one in ranges),
        running=sum(one in ("running", "holding back") for one in doing),
        interrupted=doing.count("interrupted"),
        failed=doing.count("failed"),
        waiting=sum(one.status == "pending" for one in ranges),
    )


def _rows_left(ranges: Sequence[BatchRange], rows: int) -> int:
    """Rows of the ranges that are not done, if all of them are as large."""
    with_rows = [one for one in ranges if not one.is_empty]
    if not with_rows:
        return rows
    share = rows / len(with_rows)
    return round(sum(max(0.0, share - one.rows_processed) for one in with_rows if one.status != "completed"))


def _rate(ranges: Sequence[BatchRange], now: datetime) -> float | None:
    """Rows per second of the ranges that were worked on lately, while any of them was; None where nobody works."""
    if not any(one.status == "in_progress" for one in ranges):
        return None
    spans: list[tuple[datetime, datetime]] = []
    rows = 0
    for one in ranges:
        end = one.completed_at or one.updated_at
        if one.started_at is None or end is None or now - end > RECENT or end <= one.started_at:
            continue
        spans.append((one.started_at, end))
        rows += one.rows_processed
    seconds = 0.0
    covered: datetime | None = None
    for start, end in sorted(spans):
        begin = start if covered is None else max(start, covered)
        seconds += max(0.0, (end - begin).total_seconds())
        covered = end if covered is None else max(covered, end)
    return rows / seconds if rows and seconds > 0 else None
