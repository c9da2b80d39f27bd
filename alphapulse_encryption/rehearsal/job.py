"""The job ``staging_rehearsal``: a step for each stage, its end told, its schedule, and the sensor for leftovers."""

import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import dagster as dg

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.defs.jobs.single_op import NEVER_AGAIN
from alphapulse_encryption.defs.resources.processes import this_process
from alphapulse_encryption.defs.resources.reporting import actor, safely
from alphapulse_encryption.defs.resources.running import NOT_ENDED
from alphapulse_encryption.defs.resources.schedules import cron
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.limits import change_limits, read_limits
from alphapulse_encryption.migration.bookkeeping.tables import states
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.postgres.identity import identity
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.rehearsal import measures
from alphapulse_encryption.rehearsal.clone import clone as clones
from alphapulse_encryption.rehearsal.clone import source
from alphapulse_encryption.rehearsal.clone.leftovers import remove_leftovers
from alphapulse_encryption.rehearsal.clone.sizes import count_rows, production_sizes, read_sizes
from alphapulse_encryption.rehearsal.clone.target import RehearsalTarget
from alphapulse_encryption.rehearsal.config import RehearsalConfig
from alphapulse_encryption.rehearsal.measures import Finding, Rehearsal, Sizes, Stage, StageMeasure
from alphapulse_encryption.rehearsal.report import history, report
from alphapulse_encryption.rehearsal.report.verdict import in_a_line
from alphapulse_encryption.rehearsal.stages import PLANS, Finds, Passed, Rehearsing, wal_position
from alphapulse_encryption.sample.postgres import embedded

JOB = "staging_rehearsal"
SCHEDULE = "staging_rehearsal_schedule"
SENSOR = "rehearsal_leftovers"
FIRST = Stage.CLONE.value
SECONDS_BETWEEN_LOOKS = 300


@dg.op(
    name=f"rehearse_{FIRST}",
    description="Clone the staging database, which is only read. Removes what earlier rehearsals left behind first.",
)
def clone(context: dg.OpExecutionContext, config: RehearsalConfig) -> dict[str, Any]:
    """The first stage: everything after it works on the clone."""
    opened = _Opened(context, config, f"{clones.PREFIX}{context.run_id[:8]}")
    try:
        with safely():
            return opened.clone().model_dump(mode="json")
    except dg.Failure as failure:
        opened.remove()
        if opened.begun:
            _report_failed(context, opened.so_far(), Stage.CLONE, failure, opened.findings)
        raise
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
        opened.remove()
        raise


@dataclass
class _Opened(Finds):
    """The first stage at work: there is no clone yet."""

    config: RehearsalConfig
    name: str
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    server: Database | None = None
    # From then on it is a rehearsal: what is refused before, never began.
    begun: bool = False
    source: str = "unknown"
    cloned_by: str = "not cloned"
    server_version: str = "unknown"

    def so_far(self, **measured: Any) -> Rehearsal:
        """What is known, also where nothing was measured."""
        circumstances = measures.Circumstances(
            source=self.source,
            cloned_by=self.cloned_by,
            server_version=self.server_version,
            cores=os.cpu_count() or 1,
            workers=self.config.workers,
            batch_ranges=settings.TargetVariables().batch_ranges,
            rate=self.config.traffic.rate,
            version=version("alphapulse-encryption"),
            rest_ratio=self.config.rest_ratio,
        )
        return Rehearsal(
            run_id=self.context.run_id,
            started=self.started,
            ended=datetime.now(UTC),
            circumstances=circumstances,
            **{"before": Sizes(database=0, tables={}), "stages": (), **measured},
        )

    def clone(self) -> Passed:
        """Look at the source, clone it, and measure it."""
        target = RehearsalTarget(clone=self.name, tables=self.config.tables)
        tables = target.catalogue.tables
        catalogue = load_catalogue(settings.TargetVariables().catalogue_path)
        for key in (*self.config.production_rows, *self.config.production_bytes):
            catalogue.table(key)
        staging = source.source_database()
        found, production = source.refuse_production(staging, declared=self.config.source_is_not_production)
        self.source = found.name
        with staging.session("look at the staging database") as connection:
            self.findings += source.refuse_unrehearsable(connection, tables)
        # What the day needs is needed now: keys that cannot be read are known before a long copy.
        target.cipher  # noqa: B018
        self.server = target.server
        with self.server.session("look at the server for the clone") as connection:
            there = identity(connection)
            self.server_version = connection.info.parameter_status("server_version") or "unknown"
        if production is not None and there.same_server(production):
            self.find(
                "warning",
                "clone",
                f"it is made on the server of {source.PRODUCTION_VARIABLE}, which it slows down.",
                f"Name another server with {clones.SERVER_VARIABLE}.",
            )
        for told in remove_leftovers(self.context.instance, self.server, at_once=True).values():
            self.find("note", "clone", told)
        before = source.checksums(staging, tables) if self.config.compare_source else {}
        self.begun = True
        position = wal_position(self.server)
        mark = clones.Mark(
            run=self.context.run_id,
            process=this_process(),
            at=datetime.now(UTC),
            keep_failed_hours=self.config.keep_failed_hours,
            attempts={Stage.CLONE: 1},
        )
        cloning = datetime.now(UTC)
        findings = clones.make(staging, self.server, self.name, mark, tables)
        self.cloned_by = "dump and restore"
        seconds = (datetime.now(UTC) - cloning).total_seconds()
        self.findings += findings
        self._set_back(target)
        with target.database.session("measure the clone") as connection:
            sizes = read_sizes(connection, tables, rows=count_rows(connection, tables))
        known, more = production_sizes(
            tables, self.config.production_rows, self.config.production_bytes, sizes
        )
        self.findings += more
        self.context.log.info(f"Cloned {found.name} as {self.name} in {seconds:.1f} s")
        measure = StageMeasure(
            stage=Stage.CLONE,
            started=self.started,
            ended=datetime.now(UTC),
            seconds=seconds,
            wal=max(wal_position(self.server) - position, 0),
            sizes=sizes,
            findings=tuple(self.findings),
        )
        return Passed(
            clone=self.name,
            config=self.config,
            source=before,
            so_far=self.so_far(before=sizes, production=known, stages=(measure,)),
        )

    def _set_back(self, target: RehearsalTarget) -> None:
        """Bring a clone of a migration that was begun to where a rehearsal begins."""
        database = target.database
        who = actor(self.context)
        with database.session("look how far the migration is") as connection:
            paused = bookkeeping_exists(connection) and read_limits(connection).paused
            stands = states(connection)
        if paused:
            change_limits(database, {"paused": "false"}, who)
            self.find("note", "paused", "backfills are paused on the staging database; not so on its clone.")
        for table in target.catalogue.tables:
            state = stands.get(table.key)
            if state is not None and state.authority == "ciphertext":
                revert_to_plaintext(target.by(who), table)
                self.find(
                    "note", table.key, "is switched on the staging database; its clone was reverted first."
                )

    def remove(self) -> None:
        """Nobody can go on with it: run again, the op makes another clone."""
        if self.server is not None:
            clones.remove_quietly(self.server, self.name)


def _stage(stage: Stage) -> dg.OpDefinition:
    """The op of a stage on the clone."""

    @dg.op(name=f"rehearse_{stage}", description=PLANS[stage].description)
    def op(context: dg.OpExecutionContext, passed: dict[str, Any]) -> dict[str, Any]:
        with safely():
            at = Rehearsing(context, stage, Passed.model_validate(passed))
        gone = False
        try:
            with safely():
                try:
                    after = at.passed.after(at.perform())
                except clones.CloneIsGone:
                    gone = True
                    raise
                if stage is Stage.REMOVAL:
                    _conclude(context, after.so_far, source_unchanged=_unchanged(after))
                return after.model_dump(mode="json")
        except dg.Failure as failure:
            if not gone:
                _report_failed(context, at.passed.so_far, stage, failure, at.findings)
            raise
        except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt):
            clones.remove_quietly(at.target.server, at.passed.clone)
            raise

    return op


def _report_failed(
    context: dg.OpExecutionContext, so_far: Rehearsal, stage: Stage, why: dg.Failure, findings: list[Finding]
) -> None:
    """Report it, whatever comes of that: the run tells why the rehearsal failed, not why its report did."""
    try:
        _conclude(context, so_far, failed_stage=stage, failure=str(why.description), findings=tuple(findings))
    except Exception as error:
        context.log.warning(f"The failed rehearsal could not be reported ({type(error).__name__}).")


def _conclude(context: dg.OpExecutionContext, so_far: Rehearsal, **end: object) -> None:
    """The end, a good one or not: told in the run's log, in the history, and in a report."""
    # Re-executed from failure, it is this run's.
    rehearsal = so_far.model_copy(update={"run_id": context.run_id, "ended": datetime.now(UTC), **end})
    context.log.info(in_a_line(rehearsal))
    past = history.read(context.instance)
    page = None
    # What was measured is kept without the pages, too.
    try:
        page = report.write(rehearsal, past, clones.directory(rehearsal.run_id))
        report.write_history([*past, rehearsal], clones.directory(report.HISTORY).parent)
        context.log.info(f"Report: {page}")
    except OSError as error:
        context.log.warning(f"The report could not be written: {error.strerror}")
    history.keep(context, rehearsal, past, page)


def _unchanged(passed: Passed) -> bool | None:
    """Whether the source's tables have the checksums they had before."""
    if not passed.source:
        return None
    target = RehearsalTarget(clone=passed.clone, tables=passed.config.tables)
    return source.checksums(source.source_database(), target.catalogue.tables) == passed.source


def build_job() -> dg.JobDefinition:
    """The job ``staging_rehearsal``."""
    stages = {stage: _stage(stage) for stage in PLANS}

    @dg.job(
        name=JOB,
        tags=NEVER_AGAIN,
        executor_def=dg.in_process_executor,
        description="**Test in staging.** Clones the staging database (`ALPHAPULSE_STAGING_DATABASE_URL`, which is "
        "only read), goes the whole way there and back on the clone, the drop included, measures it, removes the "
        "clone, and reports: asset `staging_rehearsal`. The target database is not touched. A failed step can be "
        "re-executed from failure as long as the clone is kept (`keep_failed_hours`).",
    )
    def rehearsal() -> None:
        # Names of definitions have to differ over all jobs; those of a job's own nodes need not.
        passed = clone.alias(FIRST)()
        for stage, op in stages.items():
            passed = op.alias(stage.value)(passed)

    return rehearsal


def build_schedule() -> dg.ScheduleDefinition:
    """The schedule ``staging_rehearsal_schedule``, stopped until somebody starts it."""

    @dg.schedule(
        name=SCHEDULE,
        job_name=JOB,
        cron_schedule=cron("rehearsal"),
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Rehearses the migration on a clone of the staging database (ALPHAPULSE_REHEARSAL_SCHEDULE says "
        "when). Leaves a turn out while a rehearsal is under way.",
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        with safely():
            if context.instance.get_runs(dg.RunsFilter(job_name=JOB, statuses=NOT_ENDED), limit=1):
                return dg.SkipReason("A rehearsal is under way.")
            return dg.RunRequest()

    return schedule


def build_sensor() -> dg.SensorDefinition:
    """The sensor ``rehearsal_leftovers``, running: it touches marked clones only."""

    @dg.sensor(
        name=SENSOR,
        minimum_interval_seconds=SECONDS_BETWEEN_LOOKS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Removes the clones of rehearsals that were cancelled or crashed, and of those that failed once "
        "they were kept for their time. Only databases that a rehearsal made and marked.",
    )
    def sensor(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        with safely():
            named = settings.Rehearsals().server_url or settings.Rehearsals().staging_database_url
            # The embedded server is not made, or started, for a look.
            if named is None and not embedded().is_running():
                return dg.SkipReason("Nothing was ever rehearsed here.")
            try:
                removed = remove_leftovers(context.instance, clones.server())
            except ConfigurationError as error:
                return dg.SkipReason(error.args[0])
            return dg.SkipReason("; ".join(removed.values()) or "There is nothing left over.")

    return sensor
