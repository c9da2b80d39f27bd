"""What the steps would do to a database, told without doing it: statements, ranges, sizes, locks, obstacles.

Everything is read in sessions that cannot write. The statements come from the functions that the steps execute them
by; what depends on a later state of the table (its encrypted columns, its defaults after the switch) is taken from the
table as it will be then.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, Literal

import psycopg
from psycopg.sql import Composed
from pydantic import BaseModel, ConfigDict, Field

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.lifecycle import Authority, Stage, State
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists, missing_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import current_key_check
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.bookkeeping.tables import TableState, table_state
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.gates.findings import Checked, Finding, Level
from alphapulse_encryption.migration.insight.estimates import NOTHING, Span
from alphapulse_encryption.migration.postgres.database import Connection, Database
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.batch_ranges import cut as cut_ranges
from alphapulse_encryption.migration.schema import guard, indexes, saved_ddl, views
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.dependants import stops_of_the_drop, stops_of_the_switch
from alphapulse_encryption.migration.schema.partitions import read_parts, refuse_relatives
from alphapulse_encryption.migration.schema.reachable_code import foreign_code
from alphapulse_encryption.migration.steps import columns, drop, switch

# Finding the boundaries reads a sample of each table; nobody waits longer for a plan.
LONGEST_STATEMENT = "60s"

# Table locks (PostgreSQL manual, 13.3.1), weakest first.
LockMode = Literal[
    "ACCESS SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"
]
# How long a lock is held: for a moment, whatever the table's size; for a batch; or while all rows are read.
Length = Literal["moment", "batch", "table"]

# Bytes of a token's entry in a B-tree: 8 + 45, aligned, its pointer, and a page nine tenths full.
_INDEX_ENTRY = 67
_ROW_OVERHEAD = 60  # bytes of write-ahead log around a new version of a row


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lock(_Model):
    """A lock on the table, the strongest of its statement."""

    mode: LockMode
    held: Length


class Statement(_Model):
    """One statement that changes the schema, word for word."""

    sql: str
    lock: Lock | None = Field(description="on the catalogued table; null where none is taken")


class Step(_Model):
    """One step for one table. Its locks are those of the statements, or of the work that has none."""

    # Its schema lists the names there are.
    name: str = Field(json_schema_extra=lambda schema: schema.update(enum=list(guide.planned())))
    command: str
    done: bool = Field(description="whether nothing of it is left to do")
    statements: tuple[Statement, ...] = ()
    locks: tuple[Lock, ...] = ()
    seconds: Span | None = Field(default=None, description="expected duration; null where nothing is to do")
    note: str = ""


class Range(_Model):
    """A batch range: the rows with lower < key <= upper, key values in text form; null leaves that side open."""

    number: int
    lower: tuple[str, ...] | None
    upper: tuple[str, ...] | None
    empty: bool
    status: str = Field(description="of the backfill; planned where the range is not there yet")


class Growth(_Model):
    """Bytes that come on top, during the migration."""

    table: Span
    indexes: Span
    wal: Span

    def __add__(self, other: Growth) -> Growth:
        return Growth(
            table=self.table + other.table, indexes=self.indexes + other.indexes, wal=self.wal + other.wal
        )


_NO_GROWTH = Growth(table=NOTHING, indexes=NOTHING, wal=NOTHING)


class PlannedColumn(_Model):
    """A column of the catalogue."""

    name: str
    type: str | None = Field(description="null where the plaintext is not there any more")
    context: str
    encrypted: str
    search: str | None
    search_index: str | None


class TablePlan(_Model):
    """One table."""

    table: str
    stage: Stage
    authority: Authority
    rows: int = Field(description="the planner's estimate")
    table_bytes: int = Field(description="with TOAST")
    index_bytes: int
    partitioned: bool
    key: tuple[str, ...]
    columns: tuple[PlannedColumn, ...]
    ranges: tuple[Range, ...] = Field(description="empty where they cannot be told")
    ranges_note: str
    steps: tuple[Step, ...]
    growth: Growth | None = Field(description="null where no data is left to encrypt")


class Plan(_Model):
    """What would be done."""

    version: Literal[1] = 1
    kind: Literal["plan"] = "plan"
    at: datetime
    server: str = Field(description="PostgreSQL's version")
    role: str = Field(description="who asked; its lack of privileges blocks nobody else")
    tables: tuple[TablePlan, ...]
    bookkeeping: tuple[str, ...] = Field(
        description="statements that make the bookkeeping, where it is missing"
    )
    findings: tuple[Finding, ...]
    seconds: Span
    seconds_from: str = Field(description="what the durations are based on")
    growth: Growth
    database_bytes: int | None
    free_bytes: int | None = Field(description="null where the server's disk cannot be seen")

    @property
    def blockers(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.level == "blocker")


@dataclass(frozen=True)
class Durations:
    """Expected seconds by table and step, where they are known better than usual, and what that is based on."""

    steps: Mapping[tuple[str, str], Span]
    source: str


USUAL = Durations(
    {},
    "what two cores with a disk of their own took, one worker, with a wide range: no rehearsal has measured this "
    "database yet (--rehearse)",
)

# Seconds on two cores with a disk of their own, PostgreSQL 18, one worker; rounded up.
_PER_VALUE = 3e-6
_PER_ROW_AND_INDEX = 4e-6
_VERIFIED_VALUE = 4e-6
_INDEXED_ROW = 2e-6
_READ_BYTE = 1 / 500e6
_STATEMENTS = 0.2
# How far another machine may be off.
_FASTER, _SLOWER = 0.4, 4.0


def usual_durations(entry: Table, rows: int, heap: int, indexes: int) -> dict[str, Span]:
    """Seconds of each step as they were on a machine of two cores, with a wide range; ``heap`` is bytes, with TOAST."""
    values, tokens = len(entry.columns), sum(column.searchable for column in entry.columns)
    reading = heap * _READ_BYTE
    work = {
        "columns": 0.0,
        "data": rows * (values * _PER_VALUE + (1 + indexes) * _PER_ROW_AND_INDEX),
        "indexes": (1 + tokens) * (rows * _INDEXED_ROW + reading),
        "verification": rows * values * _VERIFIED_VALUE,
        "views": 0.0,
        "switch": reading,
        "drop": reading,
    }
    return {name: Span(_FASTER, 1.0, _SLOWER).times(_STATEMENTS + seconds) for name, seconds in work.items()}


def make_plan(
    database: Database,
    tables: Sequence[Table],
    keys: KeyRing | None,
    *,
    batch_ranges: int,
    source: str = "",
    estimate: Callable[[Sequence[TablePlan]], Durations] = lambda _: USUAL,
) -> Plan:
    """Say what the steps would do; nothing is written.

    Args:
        keys: None where there is no key ring, and the key is not looked at.
        source: where the catalogue was read from, in a sentence.
        estimate: what is known better than the usual durations.

    Raises:
        ConfigurationError: an unknown table, or the database cannot be reached.
        DatabaseFailure: the server refused a question.
    """
    reading = replace(database, read_only=True)
    checked = preflight.check(reading, tables, keys, source=source, once=True)
    findings = [_told(finding) for finding in checked.findings]
    plans: list[TablePlan] = []
    seconds: dict[tuple[str, str], Span] = {}
    with reading.session("plan the migration") as connection:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", [LONGEST_STATEMENT])
        for entry in tables:
            try:
                found, usual, more = _table(connection, entry, batch_ranges)
            except MigrationError as error:
                told = Checked("blocker", entry.key, error.args[0])  # as the checklist tells it
                findings += [] if told in findings else [told]
                continue
            plans.append(found)
            seconds |= {(entry.key, step): span for step, span in usual.items()}
            findings += more
        about = connection.execute(
            "SELECT current_setting('server_version'), current_user::text, "
            "CASE WHEN has_database_privilege(current_database(), 'CONNECT') "
            "THEN pg_database_size(current_database()) END"
        ).fetchall()[0]
        bookkeeping = missing_bookkeeping(connection)
    durations = estimate(plans)
    timed = [_timed(table, {**seconds, **durations.steps}) for table in plans]
    return Plan(
        at=datetime.now(UTC),
        server=str(about[0]),
        role=about[1],
        tables=tuple(timed),
        bookkeeping=bookkeeping,
        findings=tuple(findings),
        seconds=sum((step.seconds for table in timed for step in table.steps if step.seconds), NOTHING),
        seconds_from=durations.source,
        growth=sum((table.growth for table in timed if table.growth), _NO_GROWTH),
        database_bytes=about[2],
        free_bytes=checked.free_bytes,
    )


def _told(finding: Checked) -> Finding:
    # Who plans need not be the one who migrates.
    if not finding.of_role or finding.level != "blocker":
        return finding
    return Finding("warning", finding.subject, f"the role that asked could not do it: {finding.message}")


def _timed(table: TablePlan, seconds: Mapping[tuple[str, str], Span]) -> TablePlan:
    with_rows = [one for one in table.ranges if not one.empty]
    left = sum(one.status != "completed" for one in with_rows) / len(with_rows) if with_rows else 1.0
    steps = []
    for step in table.steps:
        span = None if step.done else seconds.get((table.table, step.name))
        if span is not None and step.name == "data":
            # Of what is done already, only the look whether it is.
            span = span.times(left)
        steps.append(step.model_copy(update={"seconds": span}))
    return table.model_copy(update={"steps": tuple(steps)})


_SIZES = """
SELECT sum(pg_table_size(p))::bigint, sum(pg_indexes_size(p))::bigint,
       (SELECT count(*) FROM pg_index WHERE indrelid = %s)
  FROM unnest(%s::oid[]) AS p
"""


def _table(
    connection: Connection, entry: Table, batch_ranges: int
) -> tuple[TablePlan, dict[str, Span], list[Finding]]:
    known = table_state(connection, entry) if bookkeeping_exists(connection) else None
    definition = read_table(
        connection, entry, plaintext=known is None or known.state.has_both_sides, once=True, look=True
    )
    refuse_relatives(connection, definition)
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    ((heap, index_bytes, count),) = connection.execute(_SIZES, [definition.oid, parts])
    findings: list[Finding] = []
    rows = definition.estimated_rows
    look = _Look(connection, definition, known, findings)
    ranges, note = look.ranges(batch_ranges)
    steps = look.steps(ranges)
    growth = look.growth(heap, index_bytes, count)
    found = TablePlan(
        table=entry.key,
        stage=look.state.stage,
        authority=look.state.authority,
        rows=rows,
        table_bytes=heap,
        index_bytes=index_bytes,
        partitioned=definition.partitioned,
        key=tuple(key.name for key in definition.key),
        columns=tuple(
            PlannedColumn(
                name=column.name,
                type=definition.columns[column.name].type if column.name in definition.columns else None,
                context=column.context,
                encrypted=column.encrypted,
                search=column.search if column.searchable else None,
                search_index=column.search_index,
            )
            for column in entry.columns
        ),
        ranges=ranges,
        ranges_note=note,
        steps=steps,
        growth=None if any(step.done for step in steps if step.name == "data") else growth,
    )
    return found, usual_durations(entry, rows, heap, count), findings


_MOMENT_ALONE = Lock(mode="ACCESS EXCLUSIVE", held="moment")
_MOMENT_BESIDE_READERS = Lock(mode="SHARE ROW EXCLUSIVE", held="moment")
_BESIDE_ALL = Lock(mode="SHARE UPDATE EXCLUSIVE", held="table")
_READING = Lock(mode="ACCESS SHARE", held="moment")
_BATCH = Lock(mode="ROW EXCLUSIVE", held="batch")
_BATCH_READ = Lock(mode="ACCESS SHARE", held="batch")
# The checklist, or a finding of the plan, says why.
_REFUSED = "will be refused, see the warnings"


@dataclass
class _Look:
    """A look at one table; what its steps will refuse is put among the findings."""

    connection: Connection
    definition: TableDefinition
    known: TableState | None
    findings: list[Finding]

    @property
    def state(self) -> State:
        return State.UNTOUCHED if self.known is None else self.known.state

    @cached_property
    def _added(self) -> TableDefinition:
        """As it will be once step 2 is done."""
        return columns.with_columns(self.definition)

    def ranges(self, count: int) -> tuple[tuple[Range, ...], str]:
        """The batch ranges as they are or would be, and a word on that."""
        planned = read_ranges(self.connection, self.definition.table) if self.known is not None else ()
        pieces: list[tuple[Sequence[str] | None, Sequence[str] | None, str]]
        pieces, note = [(one.lower, one.upper, one.status) for one in planned], "as they were cut"
        if not planned and foreign_code(self.connection, self.definition.oid):
            return (), f"{count}; code of other roles would run where they are cut, which --preflight names"
        if not planned:
            try:
                cut = cut_ranges(self.connection, self.definition, count)
            except psycopg.errors.InsufficientPrivilege:
                return (), f"{count}; this role may not read the key, so where they would be cut is not known"
            except psycopg.errors.QueryCanceled:
                return (), f"{count}; where they would be cut takes too long to find now"
            pieces, note = [(lower, upper, "planned") for lower, upper in cut], "as they would be cut now"
        ranges = [
            Range(
                number=number,
                lower=tuple(lower) if lower is not None else None,
                upper=tuple(upper) if upper is not None else None,
                empty=lower is not None and lower == upper,
                status=status,
            )
            for number, (lower, upper, status) in enumerate(pieces)
        ]
        return tuple(ranges), note

    def growth(self, heap: int, index_bytes: int, indexes: int) -> Growth:
        added = preflight.encrypted_bytes(self.connection, self.definition)
        rows = self.definition.estimated_rows
        tokens = rows * _INDEX_ENTRY * sum(column.searchable for column in self.definition.table.columns)
        # Every row is written once more: its old version, and its entries in all indexes, stay until vacuum comes.
        written = heap + added + rows * _ROW_OVERHEAD * (1 + indexes)
        return Growth(
            table=Span(added, added + heap, added + 1.5 * heap),
            indexes=Span(tokens, tokens + index_bytes / 2, tokens + 1.5 * index_bytes),
            # After each checkpoint the first change of a page logs all of it.
            wal=Span(
                low=0.7 * written,
                likely=written + heap + index_bytes,
                high=2 * written + 4 * (heap + index_bytes) + tokens,
            ),
        )

    def steps(self, ranges: Sequence[Range]) -> tuple[Step, ...]:
        """All steps, in their order."""
        if self.state is not State.UNTOUCHED and not self.state.has_both_sides:
            dropped = self.state is State.DROPPED
            note = "the plaintext is dropped" if dropped else "the plaintext is being restored"
            return tuple(_step(name, done=True, note=note) for name in guide.planned())
        encrypted = bool(ranges) and all(one.status == "completed" for one in ranges)
        steps = {
            "columns": self._columns(),
            "data": _step(
                "data",
                done=encrypted and self.state not in (State.UNTOUCHED, State.REVERTED),
                locks=(_BATCH,),
                note="rows that the application changes meanwhile are left to it, and read again",
            ),
            "indexes": self._indexes(),
            "verification": self._verification(),
            "views": self._views(),
            "switch": self._switch(),
            "drop": self._drop(),
        }
        # Of a step that nothing is known of beforehand, the plan says that there is one.
        return tuple(steps.get(name) or _step(name) for name in guide.planned())

    def _changing(self, name: str, statements: Sequence[Composed], note: str = "") -> Step:
        """A step that is these statements."""
        texts = [statement.as_string(self.connection) for statement in statements]
        made = tuple(Statement(sql=text, lock=_lock_of(text)) for text in texts)
        locks = tuple(dict.fromkeys(one.lock for one in made if one.lock is not None))
        return _step(name, done=not made, statements=made, locks=locks, note=note)

    def _tell(self, level: Level, message: str) -> None:
        self.findings.append(Finding(level, self._added.table.key, message))

    def _columns(self) -> Step:
        statements: list[Composed] = []
        if names := columns.missing_columns(self.definition):
            statements.append(columns.add_columns_statement(self.definition, names))
        if guard.guard_faults(self.connection, self._added, self.state.authority):
            statements += guard.guard_statements(self.connection, self._added, self.state.authority)
        return self._changing("columns", statements)

    def _indexes(self) -> Step:
        statements: list[Composed] = []
        for index in indexes.wanted_indexes(self.connection, self._added):
            try:
                statements += indexes.index_statements(self.connection, self._added, index)
            except ConfigurationError as error:
                self._tell("blocker", error.args[0])
        note = "a build waits for transactions that are open; then ANALYZE" if statements else ""
        return self._changing("indexes", statements, note)

    def _verification(self) -> Step:
        passed = False
        current = current_key_check(self.connection)
        if current is not None and bookkeeping_exists(self.connection):
            with suppress(RefusedError):
                passed = verify.sum_up(self.connection, self.definition.table, current).passed
        return _step("verification", done=passed, locks=(_BATCH_READ,))

    def _views(self) -> Step:
        try:
            statements = views.view_statements(self.connection, self._added)
        except MigrationError as error:
            self._tell("warning", error.args[0])
            return _step("views", note=_REFUSED)
        return self._changing("views", statements, "optional")

    def _switch(self) -> Step:
        if self.state.authority == "ciphertext":
            return _step("switch", done=True, note="the ciphertext is right")
        stops = stops_of_the_switch(self.connection, self._added)
        note = _REFUSED if stops else "needs a verified table"
        return self._changing("switch", switch.switch_statements(self.connection, self._added), note)

    def _drop(self) -> Step:
        if self.known is not None and self.state.authority == "ciphertext":
            taken = self.known.set_aside
        else:
            taken = switch.what_is_set_aside(self.connection, self._added)
        what = saved_ddl.read_saved(self.connection, self._added, taken)
        stops = stops_of_the_drop(self.connection, self._added)
        needs = "needs the switch, a verification, a backup and a person's approval"
        note = _REFUSED if stops else needs
        return self._changing("drop", drop.drop_statements(self._added, what), note)


def _step(name: str, *, done: bool = False, **rest: Any) -> Step:
    return Step(name=name, command=guide.planned()[name][1], done=done, **rest)


# By how a statement of ours begins, the lock that it takes on the table (PostgreSQL manual, ALTER TABLE, …). The index
# of a partitioned table is made without its partitions' rows.
_LOCKS = (
    (r"ALTER TABLE .*VALIDATE CONSTRAINT", _BESIDE_ALL),
    (r"ALTER TABLE .*ENABLE (ALWAYS )?TRIGGER", _MOMENT_BESIDE_READERS),
    (r"(CREATE|DROP) (UNIQUE )?INDEX CONCURRENTLY", _BESIDE_ALL),
    (r"ALTER TABLE|DROP TRIGGER|DROP INDEX", _MOMENT_ALONE),
    (r"CREATE (OR REPLACE )?TRIGGER|(CREATE|ALTER) (UNIQUE )?INDEX", _MOMENT_BESIDE_READERS),
    (r"CREATE (OR REPLACE )?VIEW|COMMENT ON TRIGGER|DO ", _READING),
)


def _lock_of(text: str) -> Lock | None:
    return next((lock for form, lock in _LOCKS if re.match(form, text.lstrip(), re.DOTALL)), None)
