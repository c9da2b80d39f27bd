"""The stages of a rehearsal: what each does on the clone, with the functions that the assets and jobs call.

What a stage worked on, and for how long, it tells its :class:`Rehearsing`. The table of all of them is at the end.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial

import dagster as dg
from pydantic import BaseModel, ConfigDict

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.assets import verified_data, verified_table
from alphapulse_encryption.defs.jobs.erase_dropped import report_lines
from alphapulse_encryption.defs.resources.environment import client_programs
from alphapulse_encryption.defs.resources.partitions import TablePart
from alphapulse_encryption.defs.resources.reporting import actor
from alphapulse_encryption.defs.resources.workers import parts_of, work_through
from alphapulse_encryption.errors import MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping import limits, quarantine
from alphapulse_encryption.migration.gates import approvals, backup
from alphapulse_encryption.migration.gates import preflight as checklist
from alphapulse_encryption.migration.postgres.database import Actor, Database, answer
from alphapulse_encryption.migration.postgres.identity import identity
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.catch_up import pending_ranges
from alphapulse_encryption.migration.rows.engine import Pace, RangeResult
from alphapulse_encryption.migration.schema import indexes, views
from alphapulse_encryption.migration.steps import columns, drop, erase, restore, switch
from alphapulse_encryption.rehearsal import measures
from alphapulse_encryption.rehearsal.clone import clone as clones
from alphapulse_encryption.rehearsal.clone import source
from alphapulse_encryption.rehearsal.clone.sizes import read_sizes
from alphapulse_encryption.rehearsal.clone.target import RehearsalTarget
from alphapulse_encryption.rehearsal.config import RehearsalConfig
from alphapulse_encryption.rehearsal.faults.faults import Faults
from alphapulse_encryption.rehearsal.measures import Finding, Rehearsal, Stage, StageMeasure, TableWork
from alphapulse_encryption.rehearsal.traffic.samples import put_together
from alphapulse_encryption.rehearsal.traffic.traffic import traffic
from alphapulse_encryption.sample.postgres import embedded

# How long both phases of a rolling deployment are watched, at most.
ROLLING_SECONDS = 2.0
REASON = "staging rehearsal"
# Seeds of one rehearsal's traffic are apart from those of the next one's.
_MOST_DEPLOYMENTS, _MOST_SALTS = 10, 1_000_000


class Passed(BaseModel):
    """What a stage hands on to the next: small, and as JSON, so that a step can be run again by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Name of the database that this run made.
    clone: str
    config: RehearsalConfig
    # Checksums of the staging database before, by table; empty where they are not compared.
    source: dict[str, str] = {}
    so_far: Rehearsal

    def after(self, measure: StageMeasure) -> Passed:
        """With one more stage, in the place of an earlier attempt."""
        kept = tuple(stage for stage in self.so_far.stages if stage.stage is not measure.stage)
        return self.model_copy(update={"so_far": self.so_far.model_copy(update={"stages": (*kept, measure)})})


@dataclass
class Finds:
    """Work that finds something."""

    context: dg.OpExecutionContext
    findings: list[Finding] = field(default_factory=list, kw_only=True)

    def find(self, level: str, subject: str, what: str, advice: str = "") -> None:
        """Add a finding, and say it."""
        self.findings.append(
            Finding.model_validate({"level": level, "subject": subject, "what": what, "advice": advice})
        )
        self.context.log.info(f"{subject}: {what}")


@dataclass
class Rehearsing(Finds):
    """One stage at work."""

    stage: Stage
    passed: Passed
    # What was done to each table, by its key.
    work: defaultdict[str, TableWork] = field(default_factory=lambda: defaultdict(TableWork), init=False)
    faults: list[measures.Fault] = field(default_factory=list, init=False)
    seconds: float = field(default=0.0, init=False)

    @property
    def config(self) -> RehearsalConfig:
        return self.passed.config

    @cached_property
    def target(self) -> RehearsalTarget:
        return RehearsalTarget(clone=self.passed.clone, tables=self.config.tables)

    @property
    def tables(self) -> tuple[Table, ...]:
        return self.target.catalogue.tables

    @property
    def who(self) -> Actor:
        return actor(self.context)

    @contextmanager
    def working(self, table: Table | None = None) -> Iterator[None]:
        """The migration's own work: its seconds count."""
        began = time.monotonic()
        try:
            yield
        finally:
            seconds = time.monotonic() - began
            self.seconds += seconds
            if table is not None:
                self.work[table.key] += TableWork(seconds=seconds)

    def by_table(self) -> Iterator[Table]:
        """Each table, with the migration's own work on it as the body of a loop."""
        for table in self.tables:
            with self.working(table):
                yield table

    @contextmanager
    def ranged(self) -> Iterator[Callable[[str, float, TableWork], None]]:
        """The migration's own work, range by range; yields what is called with the table's key at the end of each.

        A table takes from its first range's begin to its last one's end, by however many workers.
        """
        spans: dict[str, tuple[float, float]] = {}

        def ended(key: str, seconds: float, work: TableWork) -> None:
            now = time.monotonic()
            begin, _ = spans.get(key, (now, now))
            spans[key] = (min(begin, now - seconds), now)
            self.work[key] += work

        try:
            with self.working():
                yield ended
        finally:
            for key, (begin, end) in spans.items():
                self.work[key] += TableWork(seconds=end - begin)

    def watch(self, longest: float = math.inf) -> None:
        """Let the application run by itself for a while, where there is one."""
        if self.config.traffic.rate > 0:
            time.sleep(min(self.config.observe_seconds, longest))

    def perform(self) -> StageMeasure:
        """Do what the stage does, and measure it.

        Raises:
            MigrationError: as the functions of the migration do; or the clone is gone.
        """
        server = self.target.server
        with clones.held(server, self.passed.clone, self.stage) as mark:
            # Another one for each attempt at each stage: by the same choices, a later one would insert values that an
            # earlier one has inserted already.
            salt = mark.attempts[self.stage] * len(Stage) + list(Stage).index(self.stage)
            seed = self.config.traffic.seed * _MOST_SALTS + salt * _MOST_DEPLOYMENTS
            load: list[measures.Traffic] = []
            started = datetime.now(UTC)
            position = wal_position(server)
            for number, (phases, part) in enumerate(PLANS[self.stage].parts):
                requests = self.config.traffic.model_copy(update={"seed": seed + number})
                target = self.target
                with traffic(
                    target.database.conninfo, target.catalogue, phases.split(), requests, target.environment
                ) as running:
                    part(self)
                load += [running.measured] if running.measured is not None else []
            written = wal_position(server) - position
            sizes = None
            if self.stage is not Stage.REMOVAL:
                with self.target.database.session("read the size of the clone") as connection:
                    rows = {key: size.rows for key, size in self.passed.so_far.before.tables.items()}
                    sizes = read_sizes(connection, self.tables, rows=rows)
        return StageMeasure(
            stage=self.stage,
            started=started,
            ended=datetime.now(UTC),
            seconds=self.seconds,
            tables=self.work,
            wal=max(written, 0),
            sizes=sizes,
            traffic=put_together(load),
            faults=tuple(self.faults),
            findings=tuple(self.findings),
            attempts=mark.attempts[self.stage],
        )


def wal_position(server: Database) -> int:
    """How many bytes of WAL the server has written (PostgreSQL manual, 9.28.3)."""
    with server.session("read the position in the write-ahead log") as connection:
        return int(answer(connection, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"))


def _preflight(at: Rehearsing) -> None:
    """The pre-migration checklist, on the clone; and what only the staging database itself shows."""
    with at.working():
        report = checklist.check(at.target.database, at.tables, at.target.key_ring)
    for found in (*report.blockers, *report.warnings):
        # The rehearsal takes its own.
        if found.subject != "backup":
            at.find(found.level, found.subject, found.message)
    with source.source_database().session("look at the staging database") as connection:
        at.findings += source.circumstances_there(connection, at.tables)
    checklist.refuse_blockers(report)
    _look_at_production(at, report)


def _look_at_production(at: Rehearsing, report: checklist.PreflightReport) -> None:
    """What the checklist finds there and not on the clone: other privileges, dependants, settings."""
    production = source.production_database()
    if production is None:
        return
    known = {(found.subject, found.message) for found in report.findings}
    try:
        there = checklist.check(production, at.tables, at.target.key_ring)
        with production.session("look at production") as connection:
            at.findings += source.circumstances_there(connection, at.tables, "production")
    except MigrationError as error:
        at.find("note", "production", f"could not be looked at: {error.args[0]}")
        return
    # How long a transaction is changes from one look to the next.
    left_out = ("backup", "long transaction")
    for found in (*there.blockers, *there.warnings):
        if (found.subject, found.message) not in known and found.subject not in left_out:
            at.find(found.level, found.subject, f"on production: {found.message}")


def _columns(at: Rehearsing) -> None:
    """Step 2."""
    for table in at.by_table():
        result = columns.add_encrypted_columns(
            at.target.by(at.who), table, batch_ranges=at.target.batch_ranges
        )
        at.context.log.info(f"{table.key}: columns added: {len(result.added)}")


def _backfill(at: Rehearsing) -> None:
    """Step 3, through all the faults that were asked for."""
    parts = parts_of(at.target, [table.key for table in at.tables])
    try:
        if at.config.faults.kinds:
            _encrypt_through_faults(at, parts)
        else:
            _encrypt(at, parts)
    finally:
        _find_quarantined(at)


def _encrypt(at: Rehearsing, parts: list[TablePart]) -> None:
    with at.ranged() as ended:
        work_through(
            *(at.context, at.config.pace, at.target, None, parts, backfill_range),
            lambda part, result: ended(part.table, result.seconds, _encrypted(result)),
        )


def _encrypt_through_faults(at: Rehearsing, parts: list[TablePart]) -> None:
    pace = at.config.pace
    server = at.target.server
    with server.session("look at the server for the clone") as connection:
        here = identity(connection)
    faults = Faults(
        *(at.config.faults, at.target.database, at.target.catalogue, at.target.environment, at.who),
        pace=Pace(pace.batch_size, pace.target_seconds, pace.rest_ratio),
        workers=pace.workers,
        restart=_restart_embedded if clones.is_embedded(server) else None,
        shared_with=source.also_on(here) if at.config.faults.server_restarted else "",
        tell=at.context.log.warning,
    )
    with at.ranged() as ended:
        faults.encrypt(
            [(part.table, part.batch_range) for part in parts],
            lambda part, result: ended(part[0], result.seconds, _encrypted(result)),
        )
    at.faults += faults.found


def _restart_embedded() -> None:
    embedded().stop()
    embedded().ensure_running()


def _encrypted(result: RangeResult) -> TableWork:
    return TableWork(
        rows=result.rows,
        values=result.values,
        seconds_held_back=result.seconds_held_back,
        changed_meanwhile=result.changed_meanwhile,
    )


def _find_quarantined(at: Rehearsing) -> None:
    with at.target.database.session("look for rows that were set aside") as connection:
        for table in at.tables:
            aside = quarantine.read_quarantine(connection, table)
            if aside:
                at.work[table.key] += TableWork(quarantined=len(aside))
                at.find(
                    "blocker",
                    table.key,
                    f"{len(aside):,} rows could not be encrypted and were set aside; the first at {aside[0]}",
                    "Correct these rows: the table alphapulse_encryption.quarantine shows their keys on the day.",
                )


def _indexes(at: Rehearsing) -> None:
    """Step 3, after the data; then what old instances had left pending."""
    for table in at.by_table():
        indexes.build_search_indexes(at.target.database, table, at.who, on_wait=at.context.log.info)
    pending = pending_ranges(at.target.database, at.tables)
    if pending:
        every = parts_of(at.target, [table.key for table in at.tables])
        _encrypt(at, [part for part in every if (part.table, part.batch_range) in set(pending)])


def _verify(at: Rehearsing) -> None:
    """Step 4."""
    failed: list[str] = []
    parts = parts_of(at.target, [table.key for table in at.tables])
    with at.ranged() as ended:
        for part, outcome in verified_data.verified_parts(at.who, at.config.workers, at.target, parts):
            if isinstance(outcome, MigrationError):
                failed.append(f"{part.partition}: {outcome.args[0]}")
            else:
                work = TableWork(rows=outcome.rows, values=outcome.values)
                ended(part.table, outcome.seconds, work)
        if failed:
            raise MigrationError(
                f"{len(failed)} batch ranges could not be verified:\n"
                + "\n".join(f"- {line}" for line in failed)
            )
        results = verified_table.verified_tables(at.who, at.target)
        verified_table.refuse_unverified(results, at.target.catalogue.keys)


def _views(at: Rehearsing) -> None:
    """Step 6."""
    for table in at.by_table():
        views.create_views(at.target.database, table, at.who)


def _backup(at: Rehearsing) -> None:
    """A backup of the clone and its restore drill, in a directory of the rehearsal's own."""
    with at.working():
        backup.take_backup(
            at.target.by(at.who),
            at.tables,
            directory=clones.backup_directory(at.passed.so_far.run_id),
            bin_dirs=client_programs(),
            recipients=settings.Backups().recipients,
            drill_server=at.target.server,
        )


def _switch(at: Rehearsing) -> None:
    """Step 7."""
    for table in at.by_table():
        switch.switch_to_ciphertext(at.target.by(at.who), table)


def _approval(at: Rehearsing) -> None:
    """Step 8, first half: in the name of the person whom the configuration names."""
    database = at.target.database
    with database.session("read the two-person rule") as connection:
        rule = approvals.two_person_rule(connection, "names" if source.is_sample() else "roles")
    if rule == "roles":
        limits.change_limits(database, {"two_person_rule": "names"}, at.who)
        at.find(
            "note",
            "two-person rule",
            "the drop was rehearsed over one database role; on the day it takes two (two_person_rule=roles).",
        )
    for table in at.by_table():
        approvals.approve_drop(
            at.target.by(at.who),
            table,
            approver=at.config.approver,
            reason=REASON,
            confirmation=table.key,
            backups=clones.backup_directory(at.passed.so_far.run_id),
        )


def _drop(at: Rehearsing) -> None:
    """Step 8, second half."""
    for table in at.by_table():
        result = drop.drop_plaintext(
            at.target.by(at.who),
            table,
            backups=clones.backup_directory(at.passed.so_far.run_id),
            operator=f"{at.config.approver}, second person",
            default_rule="names",
        )
        at.work[table.key] += TableWork(rows=result.changed_rows)


def _erasure(at: Rehearsing) -> None:
    """After step 8."""
    for table in at.by_table():
        result = erase.erase_dropped(at.target.by(at.who), table, confirmation=table.key)
        at.work[table.key] += TableWork(
            locked_seconds=result.locked_seconds,
            looking=result.look.seconds,
            looked_database=result.look.database,
            looked_wal=result.look.wal,
            looked_other=result.look.other,
            most_wal=result.look.most_wal,
        )
        for line in report_lines(result):
            at.context.log.info(line)
        for place in result.remaining:
            at.find("warning", table.key, f"after the erasure, dropped values remain: {place.name}.")
        if any(place.finding == "cannot be seen" for place in result.places):
            at.find(
                "note",
                table.key,
                "the server's files were not searched for dropped values: the owner of a clone may not read them. On "
                "the day, an eraser does.",
            )
        if result.statistics_left:
            at.find(
                "note",
                table.key,
                f"the planner's statistics, which keep single values, were left: {result.statistics_left}.",
            )


def _restore(at: Rehearsing, *, hold: bool) -> None:
    """The way back: held before its end while the application writes ciphertext alone, then to it."""
    for table in at.by_table():
        result = restore.restore_plaintext(at.target.by(at.who), table, hold=hold)
        filled = result.filled if result is not None else RangeResult()
        at.work[table.key] += TableWork(rows=filled.rows, values=filled.values)


def _revert(at: Rehearsing) -> None:
    """Guards and views go; afterwards nothing of the migration is in the application's way."""
    for table in at.by_table():
        result = switch.revert_to_plaintext(at.target.by(at.who), table) or RangeResult()
        at.work[table.key] += TableWork(rows=result.rows, values=result.values)


def _removal(at: Rehearsing) -> None:
    """The clone goes, and its backup with it."""
    if at.config.keep_clone:
        clones.keep(at.target.server, at.passed.clone)
        at.find(
            "note",
            "clone",
            f"kept, as the configuration asks: the database {at.passed.clone}.",
            f'DROP DATABASE "{at.passed.clone}"',
        )
        return
    if not clones.remove(at.target.server, at.passed.clone):
        raise RefusedError(f"The clone {at.passed.clone} is gone already.")


class Plan:
    """What a stage does: parts one after another, each beside these phases of the application."""

    def __init__(self, description: str, *parts: tuple[str, Callable[[Rehearsing], None]]) -> None:
        self.description = description
        self.parts = parts


# Deployments are those of docs/application.md ("The order of deployments and steps"). Old instances, which know nothing
# of the encrypted columns, are in the phase off, and plain SQL belongs to them; two phases run side by side while a
# deployment is rolling. There is none where there is no clone to talk to.
PLANS: Mapping[Stage, Plan] = {
    Stage.BASELINE: Plan(
        "Watch the application on the clone, before anything is done to it.", ("off", Rehearsing.watch)
    ),
    Stage.PREFLIGHT: Plan(
        "Pre-migration checklist, on the clone; ends the rehearsal if anything would block the migration.",
        ("off", _preflight),
    ),
    # The columns are not there yet.
    Stage.COLUMNS: Plan("Step 2: encrypted columns and guards.", ("off", _columns)),
    # What the old instances write is pending, and encrypted behind them.
    Stage.BACKFILL: Plan(
        "Step 3: encrypt every value, while old instances of the application still write plaintext.",
        ("off plaintext", _backfill),
    ),
    # The last old instance is gone: from here on nothing becomes pending.
    Stage.INDEXES: Plan(
        "Step 3, after the data: indexes and statistics, then what the old instances left pending.",
        ("plaintext", _indexes),
    ),
    Stage.VERIFY: Plan("Step 4: decrypt and compare every value.", ("plaintext", _verify)),
    Stage.VIEWS: Plan("Step 6: compatibility views.", ("plaintext dual", _views)),
    Stage.BACKUP: Plan(
        "A backup of the clone, restored and compared; in a directory of the rehearsal's own.",
        ("dual", _backup),
    ),
    # Ciphertext alone is refused before the switch. That changes the table's definition, which the approval wants
    # verified as it is then.
    Stage.SWITCH: Plan(
        "Step 7: the encrypted columns become the right side; verified again.",
        *(("dual", _switch), ("dual encrypted", _verify)),
    ),
    Stage.APPROVAL: Plan(
        "Step 8, first half: approve the drop of every table's plaintext, on the clone.",
        ("encrypted", _approval),
    ),
    Stage.DROP: Plan("Step 8: drop the plaintext columns of the clone.", ("encrypted", _drop)),
    Stage.ERASURE: Plan(
        "After step 8: rewrite the clone's tables, and look for what remains.", ("encrypted", _erasure)
    ),
    # Held before its end, until nobody writes ciphertext alone any more.
    Stage.RESTORE: Plan(
        "Rollback after the drop: rebuild the plaintext columns from the ciphertext.",
        ("encrypted", partial(_restore, hold=True)),
        ("encrypted dual", lambda at: at.watch(ROLLING_SECONDS)),
        ("dual", partial(_restore, hold=False)),
    ),
    Stage.VERIFY_AGAIN: Plan("Verify what was restored.", ("dual", _verify)),
    Stage.AFTERWARDS: Plan(
        "Rollback to its end: revert to plaintext, then watch the application again.",
        *(("dual", _revert), ("plaintext", Rehearsing.watch)),
    ),
    Stage.REMOVAL: Plan(
        "Remove the clone and its backup, hold the staging database against its checksums, and report.",
        ("", _removal),
    ),
}
