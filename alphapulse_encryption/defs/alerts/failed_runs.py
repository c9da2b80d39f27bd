"""The alert on failed runs: of every job and asset of ours, whoever launched them.

Not Dagster's own run-failure sensor: that one moves on past a run of which nobody could be told, and sends a message
for each run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence, Set

import dagster as dg

from alphapulse_encryption import guide, settings
from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.defs.alerts.delivery import Channel, Message, deliver
from alphapulse_encryption.defs.alerts.wording import COMMAND, MOST_TOLD_AT_ONCE, outcome, plain, subject
from alphapulse_encryption.defs.resources.reporting import counted
from alphapulse_encryption.defs.resources.target import TargetResource

LONGEST_PROBLEM = 500


def tick(
    context: dg.SensorEvaluationContext, channels: Sequence[Channel], target: TargetResource
) -> dg.SensorResult:
    """Tell each channel of the runs that failed since it was told last."""
    instance, catalogue = context.instance, target.catalogue
    before = _load(context.cursor)
    newest = instance.fetch_run_status_changes(dg.DagsterEventType.RUN_FAILURE, limit=1).records
    latest = newest[0].storage_id if newest else 0
    # A channel that is new here is told of what fails from now on.
    after = {channel.name: before.get(channel.name, latest) for channel in channels}
    wanted = dg.RunStatusChangeRecordsFilter(
        dg.DagsterEventType.RUN_FAILURE, after_storage_id=min(after.values())
    )
    records = instance.fetch_run_status_changes(wanted, limit=10 * MOST_TOLD_AT_ONCE, ascending=True).records
    repository = context.repository_def
    ours = {job.name for job in repository.get_all_jobs()} if repository is not None else set()
    described: dict[str, str] = {}
    sent, reached = {}, dict(after)
    for channel in channels:
        lines: list[str] = []
        for record in records:
            if record.storage_id <= after[channel.name] or len(lines) == MOST_TOLD_AT_ONCE:
                continue
            run_id = record.run_id
            if run_id not in described:
                described[run_id] = _describe(instance, run_id, ours, catalogue)
            if described[run_id]:
                lines.append(described[run_id])
            reached[channel.name] = record.storage_id
        if lines:
            text = "\n".join(f"- {plain(line)}" for line in lines)
            about = subject(settings.Alerts().label, "runs", counted(len(lines), "failed run"))
            sent[channel] = Message(about, text)
    results = deliver(list(sent.items()))
    after |= {name: number for name, number in reached.items() if results.get(name) is None}
    failed = sum(bool(text) for text in described.values())
    stands = f"{counted(failed, 'run')} failed" if failed else "no run has failed since the last look"
    return dg.SensorResult(skip_reason=outcome(results, stands), cursor=json.dumps({"after": after}))


def _load(cursor: str | None) -> dict[str, int]:
    try:
        return {str(name): int(number) for name, number in json.loads(cursor or "{}")["after"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _describe(instance: dg.DagsterInstance, run_id: str, ours: Set[str], catalogue: Catalogue) -> str:
    """What to tell of a run; nothing where it is of another code location, or removed meanwhile."""
    run = instance.get_run_by_id(run_id)
    if run is None or run.job_name not in ours:
        return ""
    steps = [*_failed_steps(instance, run_id)]
    tables = _tables(run, catalogue)
    # Runs of partitions from the UI are of a job without a name of its own.
    hidden = run.job_name.startswith("__")
    job = f"materialization of {steps[0][0]}" if hidden and steps else run.job_name.strip("_")
    of_tables = f" of {', '.join(tables)}" if tables else ""
    parts = [f"{job}{of_tables}, run {run_id}:"]
    parts += [f"step {step}: {problem}" for step, problem in steps[:3]] or [
        "ended outside of its steps; its page in Dagster's UI says how."
    ]
    parts.append(f"To do: {_remedy(run.job_name, steps, tables)}")
    base = settings.Ui().url
    if base is not None:
        parts.append(f"{base}/runs/{run_id}")
    return " ".join(parts)


def _failed_steps(instance: dg.DagsterInstance, run_id: str) -> Iterator[tuple[str, str]]:
    for record in instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.STEP_FAILURE).records:
        event = record.event_log_entry.dagster_event
        if event is None:
            continue
        said = event.step_failure_data.user_failure_data
        # A failure's own description passed our border. Of any other error the text is not ours, and not told.
        text = said.description if said is not None else None
        yield (
            event.step_key or "?",
            _scrubbed(text) if text else "an unexpected error; the run's page says where.",
        )


# What our messages have no reason to hold: addresses with or without a password, mail addresses, long secrets.
_FOREIGN = re.compile(r"[a-z][a-z0-9+.-]*://\S+|\S+@\S+|[A-Za-z0-9+/_-]{40,}={0,2}", re.IGNORECASE)


def _scrubbed(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # What announces a list says little without the first of it.
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    line = _FOREIGN.sub("…", line)
    line = line if len(line) <= LONGEST_PROBLEM else line[: LONGEST_PROBLEM - 1] + "…"
    return line if line.endswith((".", "…", "!", "?")) else f"{line}."


def _tables(run: dg.DagsterRun, catalogue: Catalogue) -> list[str]:
    """The tables that a run was for, as far as its tags and its configuration name some of the catalogue's."""
    of_tables = ("dagster/partition", "dagster/asset_partition_range")
    named = {v.rpartition("|")[2] for n, v in run.tags.items() if n == "table" or n.startswith(of_tables)}
    ops = run.run_config.get("ops")
    for op in ops.values() if isinstance(ops, Mapping) else ():
        config = op.get("config") if isinstance(op, Mapping) else None
        if isinstance(config, Mapping):
            tables = config.get("tables")
            named |= {
                str(table) for table in (*(tables if isinstance(tables, list) else ()), config.get("table"))
            }
    return [key for key in catalogue.keys if key in named]


def _remedy(job: str, steps: Sequence[tuple[str, str]], tables: Sequence[str]) -> str:
    # Partitions that are run again in the UI are of no job of ours; their step has the asset's name.
    asset = steps[0][0] if job.startswith("__") and steps else ""
    job = "rotate_keys" if asset == "rotated_data" else job
    for step in guide.STEPS:
        for stage in step.stages:
            if stage.over not in ("one", "none") and (stage.job == job or stage.works == asset):
                chosen = "" if stage.over == "database" else "".join(f" --table {table}" for table in tables)
                again = f"{COMMAND} {step.command}{chosen}"
                return f"correct what it says, and run it again; it goes on where it was ({again})."
    return "correct what it says, and run it again."
