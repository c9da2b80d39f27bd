"""What the steps would do to a database, told without doing it: statements, ranges, sizes, locks, obstacles.

Everything is read in sessions that cannot write. The statements come from the functions that the steps execute them
by; what depends on a later state of the table (its encrypted columns, its defaults after the switch) is taken from the
table as it will be then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
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
from alphapulse_encryption.migration.bookkeeping.tables import SetAside, table_state
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.gates.findings import Checked, Finding, Level
from alphapulse_encryption.migration.insight.spans import NOTHING, Span
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows import plan, verify
from alphapulse_encryption.migration.schema import guard, indexes, saved, views
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.schema.dependants import stops_of_the_drop
from alphapulse_encryption.migration.schema.partitions import read_parts, refuse_partition
from alphapulse_encryption.migration.steps import columns, drop, switch

Connection = psycopg.Connection[Any]

# Finding the boundaries reads a sample of each table; nobody waits longer for a plan.
LONGEST_STATEMENT = "60s"

# Table locks (PostgreSQL manual, 13.3.1), weakest first.
LockMode = Literal[
    "ACCESS SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE ROW EXCLUSIVE", "ACCESS EXCLUSIVE"
]
# How long a lock is held: for a moment, whatever the table's size; for a batch; or while all rows are read.
Length = Literal["moment", "batch", "table"]

# A table without statistics: empty up to so many bytes, and as many rows as fit, of so many bytes.
_EMPTY, _USUAL_ROW = 16_384, 150

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

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)


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
        """What has to be dealt with first."""
        return tuple(finding for finding in self.findings if finding.level == "blocker")


@dataclass(frozen=True)
class Work:
    """What a step's duration depends on.

    Args:
        key: of the table.
        rows: by the planner's estimate.
        heap: bytes of the table, TOAST included.
        index_bytes: of all its indexes.
        indexes: how many it has.
        values: columns to encrypt.
        tokens: of those, the searchable ones.
    """

    key: str
    rows: int
    heap: int
    index_bytes: int
    indexes: int
    values: int
    tokens: int


@dataclass(frozen=True)
class Durations:
    """Expected seconds.

    Args:
        steps: by table and step.
        source: what they are based on, in a sentence.
    """

    steps: Mapping[tuple[str, str], Span]
    source: str


Estimate = Callable[[Sequence[Work]], Durations]

# Seconds on two cores with a disk of their own, PostgreSQL 18, one worker; rounded up.
_PER_VALUE = 3e-6
_PER_ROW_AND_INDEX = 4e-6
_VERIFIED_VALUE = 4e-6
_INDEXED_ROW = 2e-6
_READ_BYTE = 1 / 500e6
_STATEMENTS = 0.2
# How far another machine may be off.
_FASTER, _SLOWER = 0.4, 4.0


def usual_durations(work: Sequence[Work]) -> Durations:
    """Durations as they were on a machine of two cores, with a wide range: no rehearsal has told better."""
    found: dict[tuple[str, str], Span] = {}
    for one in work:
        seconds: dict[str, float] = {
            "columns": _STATEMENTS,
            "data": _STATEMENTS
            + one.rows * (one.values * _PER_VALUE + (1 + one.indexes) * _PER_ROW_AND_INDEX),
            "indexes": _STATEMENTS + (1 + one.tokens) * (one.rows * _INDEXED_ROW + one.heap * _READ_BYTE),
            "verification": _STATEMENTS + one.rows * one.values * _VERIFIED_VALUE,
            "views": _STATEMENTS,
            "switch": _STATEMENTS + one.heap * _READ_BYTE,
            "drop": _STATEMENTS + one.heap * _READ_BYTE,
        }
        for name, likely in seconds.items():
            found[one.key, name] = Span(_FASTER, 1.0, _SLOWER).times(likely)
    return Durations(
        found,
        "what two cores with a disk of their own took, one worker, with a wide range: no rehearsal has measured this "
        "database yet (--rehearse)",
    )


def make_plan(
    database: Database,
    tables: Sequence[Table],
    keys: KeyRing | None,
    *,
    batch_ranges: int,
    estimate: Estimate = usual_durations,
) -> Plan:
    """Say what the steps would do.

    Args:
        database: the target; nothing is written to it.
        keys: the key ring; None where there is none, and the key is not looked at.
        batch_ranges: number of ranges to cut a table into.
        estimate: how long it will take.

    Raises:
        ConfigurationError: an unknown table, or the database cannot be reached.
        DatabaseFailure: the server refused a question.
    """
    reading = replace(database, read_only=True)
    checked = preflight.check(reading, tables, keys, once=True)
    findings = [_told(finding) for finding in checked.findings]
    plans: list[TablePlan] = []
    works: list[Work] = []
    with reading.session("plan the migration") as connection:
        connection.execute("SELECT set_config('statement_timeout', %s, false)", [LONGEST_STATEMENT])
        for entry in tables:
            try:
                found, work, more = _table(connection, entry, batch_ranges)
            except MigrationError as error:
                told = Checked("blocker", entry.key, error.args[0])  # as the checklist tells it
                findings += [] if told in findings else [told]
                continue
            plans.append(found)
            works.append(work)
            findings += more
        about = connection.execute(
            "SELECT current_setting('server_version'), current_user::text, "
            "CASE WHEN has_database_privilege(current_database(), 'CONNECT') "
            "THEN pg_database_size(current_database()) END"
        ).fetchall()[0]
        bookkeeping = missing_bookkeeping(connection)
    durations = estimate(works)
    timed = [_timed(table, durations) for table in plans]
    seconds = [step.seconds for table in timed for step in table.steps if step.seconds is not None]
    grown = [table.growth for table in timed if table.growth is not None]
    return Plan(
        at=datetime.now(UTC),
        server=str(about[0]),
        role=about[1],
        tables=tuple(timed),
        bookkeeping=bookkeeping,
        findings=tuple(findings),
        seconds=sum(seconds, NOTHING),
        seconds_from=durations.source,
        growth=sum(grown, Growth(table=NOTHING, indexes=NOTHING, wal=NOTHING)),
        database_bytes=about[2],
        free_bytes=checked.free_bytes,
    )


def _told(finding: Checked) -> Finding:
    if finding.of_role and finding.level == "blocker":
        # Who plans need not be the one who migrates.
        message = f"the role that asked could not do it: {finding.message}"
        return Finding("warning", finding.subject, message)
    return finding


def _timed(table: TablePlan, durations: Durations) -> TablePlan:
    with_rows = [one for one in table.ranges if not one.empty]
    share = sum(one.status != "completed" for one in with_rows) / len(with_rows) if with_rows else 1.0

    def expected(name: str) -> Span | None:
        span = durations.steps.get((table.table, name))
        if span is None or name != "data":
            return span
        # Of what is done already, only the look whether it is.
        return span.times(share)

    steps = [
        step if step.done else step.model_copy(update={"seconds": expected(step.name)})
        for step in table.steps
    ]
    return table.model_copy(update={"steps": tuple(steps)})


_SIZES = """
SELECT sum(pg_table_size(p))::bigint, sum(pg_indexes_size(p))::bigint,
       (SELECT count(*) FROM pg_index WHERE indrelid = %s)
  FROM unnest(%s::oid[]) AS p
"""


def _table(connection: Connection, entry: Table, batch_ranges: int) -> tuple[TablePlan, Work, list[Finding]]:
    begun = bookkeeping_exists(connection)
    state = table_state(connection, entry) if begun else None
    definition = read_table(
        connection, entry, plaintext=state is None or state.state.has_both_sides, once=True
    )
    refuse_partition(connection, definition)
    parts = [part.oid for part in read_parts(connection, definition.oid)]
    ((heap, index_bytes, count),) = connection.execute(_SIZES, [definition.oid, parts])
    findings: list[Finding] = []
    if not definition.estimated_rows and heap > _EMPTY:
        definition = replace(definition, estimated_rows=heap // _USUAL_ROW)
        findings.append(_never_analysed(entry))
    work = Work(
        key=entry.key,
        rows=definition.estimated_rows,
        heap=heap,
        index_bytes=index_bytes,
        indexes=count,
        values=len(entry.columns),
        tokens=sum(column.searchable for column in entry.columns),
    )
    ranges, note = _ranges(connection, definition, batch_ranges, begun=begun)
    stands = State.UNTOUCHED if state is None else state.state
    steps = _Steps(connection, definition, stands, findings)
    taken = state.set_aside if state is not None and stands.authority == "ciphertext" else None
    found = TablePlan(
        table=entry.key,
        stage=stands.stage,
        authority=stands.authority,
        rows=definition.estimated_rows,
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
        steps=tuple(steps.every(ranges, taken)),
        growth=_growth(connection, definition, work),
    )
    if found.step("data").done:
        found = found.model_copy(update={"growth": None})
    return found, work, findings


def _never_analysed(entry: Table) -> Finding:
    return Finding(
        level="warning",
        subject=entry.key,
        message="was never analysed: its rows, and with them durations and growth, are guessed from its size. "
        f"ANALYZE {entry.schema_name}.{entry.name}, and ask again.",
    )


def _ranges(
    connection: Connection, definition: TableDefinition, count: int, *, begun: bool
) -> tuple[tuple[Range, ...], str]:
    """The batch ranges as they are or would be, and a word on that."""
    planned = read_ranges(connection, definition.table) if begun else ()
    if planned:
        return (
            tuple(
                Range(number=r.number, lower=r.lower, upper=r.upper, empty=r.is_empty, status=r.status)
                for r in planned
            ),
            "as they were cut",
        )
    try:
        pieces = plan.cut(connection, definition, count)
    except psycopg.errors.InsufficientPrivilege:
        return (), f"{count}; this role may not read the key, so where they would be cut is not known"
    except psycopg.errors.QueryCanceled:
        return (), f"{count}; where they would be cut takes too long to find now"
    return (
        tuple(
            Range(
                number=number,
                lower=tuple(lower) if lower is not None else None,
                upper=tuple(upper) if upper is not None else None,
                empty=lower is not None and lower == upper,
                status="planned",
            )
            for number, (lower, upper) in enumerate(pieces)
        ),
        "as they would be cut now",
    )


_MOMENT_ALONE = Lock(mode="ACCESS EXCLUSIVE", held="moment")
_MOMENT_BESIDE_READERS = Lock(mode="SHARE ROW EXCLUSIVE", held="moment")
_BESIDE_ALL = Lock(mode="SHARE UPDATE EXCLUSIVE", held="table")
_READING = Lock(mode="ACCESS SHARE", held="moment")
_BATCH = Lock(mode="ROW EXCLUSIVE", held="batch")
_BATCH_READ = Lock(mode="ACCESS SHARE", held="batch")


class _Steps:
    """What each step would do to one table, and beside it what it will refuse.

    Args:
        state: how the table stands.
        findings: what will be refused is put there.
    """

    def __init__(
        self, connection: Connection, definition: TableDefinition, state: State, findings: list[Finding]
    ) -> None:
        self._connection = connection
        self._definition = definition
        self._state = state
        self._findings = findings
        # As it will be once step 2 is done.
        self._added = columns.with_columns(definition)

    def every(self, ranges: Sequence[Range], taken: SetAside | None) -> list[Step]:
        """All steps, in their order.

        Args:
            ranges: the batch ranges, as far as they are known.
            taken: what the switch has set aside; None before it.
        """
        if self._state is not State.UNTOUCHED and not self._state.has_both_sides:
            dropped = self._state is State.DROPPED
            note = "the plaintext is dropped" if dropped else "the plaintext is being restored"
            return [_step(name, done=True, note=note) for name in guide.planned()]
        data = _step(
            "data",
            done=_all_done(ranges) and self._state not in (State.UNTOUCHED, State.REVERTED),
            locks=(_BATCH,),
            note="rows that the application changes meanwhile are left to it, and read again",
        )
        looks: dict[str, Callable[[], Step]] = {
            "columns": self._columns,
            "data": lambda: data,
            "indexes": self._indexes,
            "verification": self._verification,
            "views": self._views,
            "switch": self._switch,
            "drop": lambda: self._drop(taken),
        }
        # Of a step that nothing is known of beforehand, the plan says that there is one.
        return [looks[name]() if name in looks else _step(name) for name in guide.planned()]

    def _changing(
        self,
        name: str,
        statements: Sequence[Composed],
        note: str = "",
        lock: Callable[[str], Lock | None] | None = None,
    ) -> Step:
        """A step that is these statements."""
        texts = [statement.as_string(self._connection) for statement in statements]
        made = tuple(Statement(sql=text, lock=(lock or _lock_of)(text)) for text in texts)
        locks = tuple(dict.fromkeys(one.lock for one in made if one.lock is not None))
        return _step(name, done=not made, statements=made, locks=locks, note=note)

    def _tell(self, level: Level, message: str) -> None:
        self._findings.append(Finding(level, self._added.table.key, message))

    def _columns(self) -> Step:
        statements: list[Composed] = []
        if names := columns.missing_columns(self._definition):
            statements.append(columns.add_columns_statement(self._definition, names))
        if not guard.guard_is_current(self._connection, self._added, self._state.authority):
            statements += guard.guard_statements(self._connection, self._added, self._state.authority)
        return self._changing("columns", statements)

    def _indexes(self) -> Step:
        statements: list[Composed] = []
        for index in indexes.wanted_indexes(self._connection, self._added):
            try:
                statements += indexes.index_statements(self._connection, self._added, index)
            except ConfigurationError as error:
                self._tell("blocker", error.args[0])
        note = "a build waits for transactions that are open; then ANALYZE" if statements else ""
        return self._changing("indexes", statements, note, _index_lock)

    def _verification(self) -> Step:
        passed = False
        current = current_key_check(self._connection)
        if current is not None and bookkeeping_exists(self._connection):
            with suppress(RefusedError):
                passed = verify.sum_up(self._connection, self._definition.table, current).passed
        return _step("verification", done=passed, locks=(_BATCH_READ,))

    def _views(self) -> Step:
        try:
            statements = views.view_statements(self._connection, self._added)
        except MigrationError as error:
            self._tell("warning", error.args[0])
            return _step("views", note="will be refused, see the warnings")
        return self._changing("views", statements, "optional")

    def _switch(self) -> Step:
        if self._state.authority == "ciphertext":
            return _step("switch", done=True, note="the ciphertext is right")
        note = "needs a verified table"
        try:
            switch.refuse_uncarriable(self._connection, self._added)
        except RefusedError as error:
            reason = error.args[0].removesuffix("; nothing was changed.")
            self._tell("warning", f"the switch will be refused: {reason}.")
            note = "will be refused, see the warnings"
        return self._changing("switch", switch.switch_statements(self._connection, self._added), note)

    def _drop(self, taken: SetAside | None) -> Step:
        if saved.has_children(self._connection, self._added):
            note = "will be refused: the table is partitioned, or takes part in inheritance"
            return _step("drop", note=note)
        if depending := "; ".join(stops_of_the_drop(self._connection, self._added)):
            self._tell(
                "warning",
                f"the drop will be refused: other objects depend on the plaintext columns: {depending}.",
            )
        if taken is None:
            taken = switch.what_is_set_aside(self._connection, self._added)
        what = saved.read_saved(self._connection, self._added, taken)
        note = "needs the switch, a verification, a backup and a person's approval"
        return self._changing("drop", drop.drop_statements(self._added, what), note)


def _step(name: str, *, done: bool = False, **rest: Any) -> Step:
    return Step(name=name, command=guide.planned()[name][1], done=done, **rest)


def _all_done(ranges: Sequence[Range]) -> bool:
    return bool(ranges) and all(one.status == "completed" for one in ranges)


def _lock_of(text: str) -> Lock | None:
    """The lock that a statement of ours takes on the table (PostgreSQL manual, ALTER TABLE, CREATE TRIGGER, …)."""
    words = text.split(None, 2)
    match (words[0], words[1]):
        case ("ALTER", "TABLE") if "VALIDATE CONSTRAINT" in text:
            return _BESIDE_ALL
        case ("ALTER", "TABLE") if "ENABLE TRIGGER" in text:
            return _MOMENT_BESIDE_READERS
        case ("ALTER", "TABLE") | ("DROP", "TRIGGER"):
            return _MOMENT_ALONE
        case ("CREATE", _) if " TRIGGER " in text[:32]:
            return _MOMENT_BESIDE_READERS
        case ("COMMENT", _) if text.startswith("COMMENT ON TRIGGER"):
            return _READING
        case ("CREATE", _) if " VIEW " in text[:32]:
            return _READING
        case _:
            return None


def _index_lock(text: str) -> Lock | None:
    if "CONCURRENTLY" in text:
        return _BESIDE_ALL
    if text.startswith("DROP INDEX"):
        return _MOMENT_ALONE
    # The index of a partitioned table is made without its partitions' rows.
    return None if text.startswith("COMMENT") else _MOMENT_BESIDE_READERS


def _growth(connection: Connection, definition: TableDefinition, work: Work) -> Growth:
    added = preflight.encrypted_bytes(connection, definition)
    tokens = work.rows * work.tokens * _INDEX_ENTRY
    # Every row is written once more: its old version, and the entries of it in all indexes, stay until vacuum comes.
    written = work.heap + added + work.rows * _ROW_OVERHEAD * (1 + work.indexes)
    return Growth(
        table=Span(added, added + work.heap, added + 1.5 * work.heap),
        indexes=Span(tokens, tokens + work.index_bytes / 2, tokens + 1.5 * work.index_bytes),
        # After each checkpoint the first change of a page logs all of it.
        wal=Span(
            low=0.7 * written,
            likely=written + work.heap + work.index_bytes,
            high=2 * written + 4 * (work.heap + work.index_bytes) + tokens,
        ),
    )
