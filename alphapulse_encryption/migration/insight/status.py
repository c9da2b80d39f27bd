"""Where the migration stands, from the bookkeeping and the system's own catalogues: reads only, and no large table.

What a role may not see is named and left out, so that a monitoring role needs SELECT on the bookkeeping and no more.
Who works is told by the advisory locks that workers hold, not by a status column: that of a killed worker stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Literal

import psycopg
from psycopg.sql import SQL, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral
from pydantic import BaseModel, ConfigDict, Field

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.lifecycle import Authority, Stage, State
from alphapulse_encryption.migration.bookkeeping.approvals import Approval, list_approvals
from alphapulse_encryption.migration.bookkeeping.backups import latest_backup
from alphapulse_encryption.migration.bookkeeping.columns import Status as Kept
from alphapulse_encryption.migration.bookkeeping.columns import column_progress
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import KeyState, current_key_check, key_versions
from alphapulse_encryption.migration.bookkeeping.limits import read_limits
from alphapulse_encryption.migration.bookkeeping.quarantine import quarantined
from alphapulse_encryption.migration.bookkeeping.ranges import (
    Progress,
    RangeStatus,
    backfill_progress,
    range_lock,
    ranges_under_way,
    read_ranges,
)
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.bookkeeping.usage import read_usage
from alphapulse_encryption.migration.bookkeeping.verifications import verified_ranges
from alphapulse_encryption.migration.gates import approvals
from alphapulse_encryption.migration.gates.backup import is_recent
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Connection, Database
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.catch_up import has_pending_index
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.guard import refuse_unguarded
from alphapulse_encryption.migration.schema.indexes import invalid_indexes

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
    status: Kept | Literal["not begun"]
    records_processed: int
    pending: int | None = Field(description="values, where they were counted")
    verified: bool
    started_at: datetime | None
    completed_at: datetime | None
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
    invalid_indexes: tuple[str, ...] = Field(description="left by an interrupted build, with what to type")
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
    """Look where the migration of these tables stands; nothing is written.

    Raises:
        ConfigurationError: an unknown table, or the database cannot be reached.
        DatabaseFailure: the server refused a question, for example because this role may not read the bookkeeping.
    """
    entries = [catalogue.table(key) for key in tables]
    known = {entry.key: entry for entry in entries}
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
            approvals=tuple(
                look.approval(known[approval.table], approval)
                for approval in list_approvals(connection)
                if approval.table in known
            ),
            key_versions=tuple(map(KeyVersionStatus.model_validate, key_versions(connection))),
            key_usage=tuple(map(KeyUsageStatus.model_validate, read_usage(connection))),
            workers=workers,
            not_visible=tuple(dict.fromkeys(look.hidden)),
        )


_WORKERS = """
SELECT pid, usename::text, backend_start FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = %s AND pid <> pg_backend_pid()
"""


_NOT_BEGUN: dict[str, Any] = {
    "status": "not begun",
    "records_processed": 0,
    **dict.fromkeys(("started_at", "completed_at", "error_message")),
}


@dataclass
class _Look:
    """One look, over one connection."""

    connection: Connection
    catalogue: Catalogue
    now: datetime
    begun: bool
    # What the role may not see.
    hidden: list[str] = field(default_factory=list)

    @cached_property
    def _key_check(self) -> str | None:
        return current_key_check(self.connection)

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
        known = table_state(self.connection, entry) if self.begun else None
        state = State.UNTOUCHED if known is None else known.state
        definition: TableDefinition | None = None
        problem = None
        try:
            definition = read_table(self.connection, entry, plaintext=False, once=True, look=True)
            if known is not None:
                refuse_unguarded(self.connection, definition)
        except MigrationError as error:
            problem = error.args[0]
        invalid = () if definition is None else invalid_indexes(self.connection, definition)
        rows = definition.estimated_rows if definition is not None else 0
        progress, active = Progress(), []
        if known is not None:
            progress = backfill_progress(self.connection, entry, RECENT, rows=rows)
            working = [w.range for w in workers if w.table == entry.key and w.range is not None]
            active = ranges_under_way(self.connection, entry, working)
        versions = key_versions(self.connection) if any(one.step == "rotation" for one in active) else ()
        doing = Counter(one.status for one in active if one.step == "backfill")
        pending, by_column = self._pending(definition, state, progress.rows_left)
        left = progress.rows_left if state.has_both_sides else None
        ranges, first = verified_ranges(self.connection, entry) if known is not None else (0, None)
        verified: verify.TableVerification | None = None
        if ranges and definition is not None and self._key_check is not None:
            with suppress(RefusedError):
                verified = verify.sum_up(self.connection, entry, self._key_check)
        return TableStatus(
            table=entry.key,
            stage=state.stage if definition is not None else "unknown",
            authority=state.authority if known is not None else None,
            rows=rows,
            bytes=definition.total_bytes if definition is not None else 0,
            columns=self._columns(entry, by_column, verified),
            pending=pending,
            ranges=Ranges(
                total=progress.ranges,
                completed=progress.completed,
                running=doing["running"] + doing["holding back"],
                interrupted=doing["interrupted"],
                failed=doing["failed"],
                waiting=progress.waiting,
            ),
            active=tuple(active),
            rows_done=progress.rows + sum(one.rows for one in active if one.step != "backfill"),
            rows_left=left,
            rows_per_second=progress.rows_per_second,
            seconds_left=left / progress.rows_per_second if left and progress.rows_per_second else None,
            waiting_for=tuple(dict.fromkeys(one.waiting_for for one in active if one.waiting_for)),
            rotating_to=next((v.number for v in versions if v.state == "current"), None),
            quarantined=quarantined(self.connection, entry) if known is not None else 0,
            verification=None
            if verified is None
            else Verification(
                valid=verified.passed,
                verified_at=verified.verified_at or first,
                ranges_verified=ranges,
                faults=sum(counts.faults for counts in verified.columns.values()),
                reasons=verified.reasons,
            ),
            backup=self._backup(entry) if self.begun else None,
            invalid_indexes=tuple(f"{name}: {statement}" for name, statement in invalid),
            problem=problem,
        )

    def _pending(
        self, definition: TableDefinition | None, state: State, rows_left: int
    ) -> tuple[Pending, Mapping[str, int]]:
        """Pending rows, and of those how many by column where they were counted."""
        if definition is None or not (state is State.UNTOUCHED or state.has_both_sides):
            return Pending(rows=None, how="nothing to encrypt"), {}
        added = len(definition.encrypted_columns) == len(definition.table.columns)
        if state in (State.UNTOUCHED, State.REVERTED) or not added:
            return Pending(rows=definition.estimated_rows, how="estimated"), {}
        estimate = Pending(rows=rows_left, how="estimated")
        if definition.total_bytes > SMALL_TABLE and not has_pending_index(self.connection, definition):
            return estimate, {}
        try:
            rows, *by_column = self.connection.execute(_count_pending(definition)).fetchall()[0]
        except psycopg.errors.InsufficientPrivilege:
            self.hidden.append(f"pending rows of {definition.table.key} (SELECT on the table)")
            return Pending(rows=None, how="not visible to this role"), {}
        except psycopg.errors.QueryCanceled:
            return estimate, {}
        if rows > COUNTED:
            return Pending(rows=COUNTED, how="at least"), {}
        names = [column.name for column in definition.plaintext_columns]
        return Pending(rows=rows, how="counted"), dict(zip(names, by_column, strict=True))

    def _columns(
        self, entry: Table, pending: Mapping[str, int], verified: verify.TableVerification | None
    ) -> tuple[ColumnStatus, ...]:
        kept = column_progress(self.connection, entry) if self.begun else {}
        return tuple(
            ColumnStatus(
                name=column.name,
                pending=pending.get(column.name),
                verified=verified is not None and verified.column_passed(column.name),
                **kept.get(column.name, _NOT_BEGUN),
            )
            for column in entry.columns
        )

    def _backup(self, entry: Table) -> BackupStatus | None:
        backup = latest_backup(self.connection, entry)
        if backup is None:
            return None
        return BackupStatus(
            id=backup.id,
            taken_at=backup.taken_at,
            age_seconds=(self.now - backup.taken_at).total_seconds(),
            fresh=is_recent(self.connection, backup),
        )

    def approval(self, entry: Table, approval: Approval) -> ApprovalStatus:
        """An approval, and whether what it binds is still as it was."""
        changed = self._changed(entry, approval) if approval.is_open else []
        return ApprovalStatus(
            id=approval.id,
            table=approval.table,
            state="void" if changed else approval.state,
            approver=approval.approver,
            database_role=approval.database_role,
            approved_at=approval.approved_at,
            expires_at=approval.expires_at,
            changed=tuple(changed),
        )

    def _changed(self, entry: Table, approval: Approval) -> list[str]:
        try:
            definition = read_table(self.connection, entry, plaintext=False, once=True, look=True)
            return approvals.changed_since(
                self.connection, self.catalogue, definition, self._key_check or "", approval
            )
        except MigrationError:
            return ["the table's definition"]


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
