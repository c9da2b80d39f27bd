"""``--plan``: what would be done, with durations from the rehearsals where there were any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from alphapulse_encryption import guide, settings
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.cli.reports.terminal import grid, seconds, span_of_bytes, span_of_seconds
from alphapulse_encryption.defs.resources.environment import key_environment, target_database
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.keysources import load_key_ring
from alphapulse_encryption.migration.gates.findings import Finding
from alphapulse_encryption.migration.gates.preflight import readable_size
from alphapulse_encryption.migration.insight.plan import USUAL, Durations, Plan, Step, TablePlan, make_plan
from alphapulse_encryption.sample.postgres import embedded

if TYPE_CHECKING:
    from alphapulse_encryption.rehearsal.measures import Rehearsal

_HELD = {"moment": "for a moment", "batch": "for a batch", "table": "while rows are read"}


def read_plan(catalogue: Catalogue, tables: Sequence[str]) -> Plan:
    """The plan for the database that the environment names.

    Raises:
        ConfigurationError: the database cannot be reached, or the environment says something wrong.
        DatabaseFailure: the server refused a question.
    """
    unreadable: list[Finding] = []
    keys = None
    try:
        keys = load_key_ring(key_environment())
    except MigrationError as error:
        unreadable.append(Finding("blocker", "key", error.args[0]))
    made = make_plan(
        target_database(),
        [catalogue.table(key) for key in tables],
        keys,
        batch_ranges=settings.TargetVariables().batch_ranges,
        source=catalogue.source,
        estimate=expected_durations,
    )
    return made.model_copy(update={"findings": (*unreadable, *made.findings)})


def expected_durations(tables: Sequence[TablePlan]) -> Durations:
    """By the newest rehearsal that went all the way, where this instance remembers one; else the usual ones."""
    rehearsals = _rehearsals()
    newest = next((found for found in reversed(rehearsals) if found.failed_stage is None), None)
    if newest is None or not any(one.table in newest.before.tables for one in tables):
        return USUAL
    return by_rehearsal(newest, rehearsals, tables)


# What the plan calls stages of a rehearsal that have another name there.
_PLANNED = {"backfill": "data", "verify": "verification"}


def by_rehearsal(
    newest: Rehearsal, rehearsals: Sequence[Rehearsal], tables: Sequence[TablePlan]
) -> Durations:
    """What a rehearsal predicts for these sizes; nothing of tables that it did not know."""
    from alphapulse_encryption.rehearsal.measures import Sizes, TableSize
    from alphapulse_encryption.rehearsal.report.prediction import accuracy, predict

    known = [one for one in tables if one.table in newest.before.tables]
    sizes = Sizes(
        database=sum(one.table_bytes + one.index_bytes for one in known),
        tables={
            one.table: TableSize(rows=one.rows, heap=one.table_bytes, indexes=one.index_bytes)
            for one in known
        },
    )
    earlier = [one for one in rehearsals if one.started < newest.started]
    prediction = predict([*earlier, newest], sizes, accuracy(rehearsals))
    steps = {}
    planned = guide.planned()
    for stage in prediction.stages:
        name = _PLANNED.get(stage.stage.value, stage.stage.value)
        if name not in planned:
            continue
        # What a stage takes beside its tables is shared out among them.
        weights = {key: span.likely for key, span in stage.tables.items()}
        if not sum(weights.values()):
            weights = {one.table: one.rows for one in known}
        for one in known:
            share = weights.get(one.table, 0.0) / (sum(weights.values()) or 1.0)
            steps[one.table, name] = stage.seconds.times(share)
    workers = newest.circumstances.workers
    how = "one batch range after the other as there" if workers == 1 else f"with {workers} workers"
    source = f"the rehearsal of {newest.started:%Y-%m-%d %H:%M}, {how}"
    if left_out := [one.table for one in tables if one not in known]:
        source += f"; it knew nothing of {', '.join(left_out)}"
    return Durations(steps, source)


def _rehearsals() -> tuple[Rehearsal, ...]:
    """Those that Dagster remembers; none where it was never used here: nothing is made for a plan."""
    if not (settings.dagster_home() / "dagster.yaml").exists():
        return ()
    if settings.Dagster().postgres_url is None and not embedded().exists():
        return ()
    from alphapulse_encryption.defs.resources.instance import open_instance
    from alphapulse_encryption.rehearsal.report import history

    try:
        with open_instance() as instance:
            return history.read(instance)
    except Exception:
        # Whatever is wrong with Dagster's storage: the plan does not depend on it.
        return ()


def show_plan(plan: Plan, out: Console) -> None:
    """Print it for a person: the summary, what blocks it, then each table with every statement."""
    _summary(plan, out)
    told = sorted((one for one in plan.findings if one.level != "ok"), key=lambda one: one.level)
    if told:
        out.print()
    for finding in told:
        out.print(str(finding))
    if plan.tables:
        out.print()
        _overview(plan, out)
    for table in plan.tables:
        _table(table, out)
    if plan.bookkeeping:
        out.print()
        out.rule("Bookkeeping, made before the first of these", align="left")
    for text in plan.bookkeeping:
        _verbatim(text, out)


def _summary(plan: Plan, out: Console) -> None:
    columns = sum(len(table.columns) for table in plan.tables)
    rows = sum(table.rows for table in plan.tables)
    size = sum(table.table_bytes + table.index_bytes for table in plan.tables)
    out.print(
        f"Plan for {len(plan.tables)} tables, {columns} columns: about {rows:,} rows, {readable_size(size)} with "
        f"indexes. Nothing was changed."
    )
    left = [step for table in plan.tables for step in table.steps if not step.done]
    statements = sum(len(step.statements) for step in left) + len(plan.bookkeeping)
    growth, free = plan.growth, plan.free_bytes
    warnings = sum(finding.level == "warning" for finding in plan.findings)
    facts = grid("", "")
    facts.show_header = False
    for name, text in {
        "to do": f"{len(left)} steps of {sum(len(t.steps) for t in plan.tables)}, {statements} statements",
        "duration": f"{span_of_seconds(plan.seconds)}, by {plan.seconds_from}",
        "growth": f"tables {span_of_bytes(growth.table)}, indexes {span_of_bytes(growth.indexes)}",
        "write-ahead log": span_of_bytes(growth.wal),
        "free disk": "cannot be seen from here" if free is None else readable_size(free),
        "blockers": str(len(plan.blockers) or "none"),
        "warnings": str(warnings or "none"),
    }.items():
        facts.add_row(f"  {name}", text)
    out.print(facts)


def _overview(plan: Plan, out: Console) -> None:
    shown = grid("table", ">rows", ">size", "stage", ">ranges", ">columns", ">seconds left", "done already")
    for table in plan.tables:
        shown.add_row(
            table.table,
            f"{table.rows:,}",
            readable_size(table.table_bytes + table.index_bytes),
            table.stage,
            str(len(table.ranges)) if table.ranges else "?",
            str(len(table.columns)),
            seconds(sum(step.seconds.likely for step in table.steps if step.seconds is not None)),
            ", ".join(step.name for step in table.steps if step.done) or "-",
        )
    out.print(shown)


def _table(table: TablePlan, out: Console) -> None:
    out.print()
    out.rule(table.table, align="left")
    ranges = f"{len(table.ranges)} batch ranges" if table.ranges else "Batch ranges"
    out.print(f"{ranges}, {table.ranges_note}; key ({', '.join(table.key)}), authority {table.authority}")
    if with_rows := [one for one in table.ranges if not one.empty]:
        out.print(f"about {table.rows // len(with_rows):,} rows each; they end at the keys")
        ends = [f"({', '.join(one.upper)})" for one in with_rows if one.upper is not None]
        out.print("  " + ", ".join([*ends, "and the last one is open"]))
    if table.growth is not None:
        out.print(
            f"Growth: table {span_of_bytes(table.growth.table)}, indexes {span_of_bytes(table.growth.indexes)}, "
            f"write-ahead log {span_of_bytes(table.growth.wal)}"
        )
    for step in table.steps:
        out.print()
        _step(step, out)


def _step(step: Step, out: Console) -> None:
    what = "done" if step.done else span_of_seconds(step.seconds)
    out.print(f"{'✓' if step.done else '•'} {guide.planned()[step.name][0]} ({step.command}): {what}")
    if step.note:
        out.print(f"  {step.note}")
    for lock in step.locks:
        if not step.done:
            out.print(f"  lock {lock.mode}, {_HELD[lock.held]}")
    for statement in step.statements:
        _verbatim(statement.sql, out)


def _verbatim(text: str, out: Console) -> None:
    # As it will be executed, so that it can be copied: never folded.
    out.print(f"{text.strip().removesuffix(';')};", soft_wrap=True)
