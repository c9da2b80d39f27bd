"""Clones of rehearsals that were cancelled, crashed, or failed long ago: found by name and mark, and removed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import dagster as dg

from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.processes import is_running
from alphapulse_encryption.migration.postgres import locks, scratch
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.rehearsal.clone.clone import PREFIX, Mark, drop, read_clones

# A run whose process is on another machine counts as crashed after this long without a stage at work.
SILENCE = timedelta(minutes=15)

_TO_BEGIN = (dg.DagsterRunStatus.QUEUED, dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)


def remove_leftovers(instance: dg.DagsterInstance, on: Database, *, at_once: bool = False) -> dict[str, str]:
    """Remove the clones that nobody will go on with; those of failed rehearsals at once, or after a while.

    Returns:
        What was done and why, by the clone's name.

    Raises:
        ConfigurationError: the server cannot be reached.
        DatabaseFailure: it refused.
    """
    removed = {}
    with on.session("look for leftover clones") as connection:
        for name in read_clones(connection):
            if not locks.try_hold(connection, name):
                continue
            try:
                # Nobody works on it, and nobody begins to: it is as it is now.
                clones = read_clones(connection)
                why = _why_left_over(instance, clones[name], at_once=at_once) if name in clones else None
                if why is not None:
                    mark = clones[name]
                    drop(connection, name, mark)
                    run = mark.run if mark is not None else "that began it"
                    removed[name] = f"removed the clone {name} of the rehearsal {run}: {why}"
            finally:
                if not connection.broken:
                    locks.release(connection, name)
        scratch.drop_abandoned_owners(connection, PREFIX)
    return removed


def _why_left_over(instance: dg.DagsterInstance, mark: Mark | None, *, at_once: bool) -> str | None:
    """Why nobody goes on with a clone that no stage is at work on; None where somebody may."""
    if mark is None:
        return "its making was interrupted"
    if mark.keep:
        return None
    now = datetime.now(UTC)
    kept_until = timedelta(hours=mark.keep_failed_hours)
    runs = _runs(instance, mark.run)
    if not runs:
        # Another instance's, or a run whose history was deleted.
        return "nobody knows its run any more" if now - mark.at > max(kept_until, SILENCE) else None
    unfinished = [run.dagster_run for run in runs if not run.dagster_run.is_finished]
    if unfinished:
        # None for one on another machine, which cannot be looked for.
        alive = is_running(mark.process)
        # A re-execution that has not begun yet finds the mark of the run before it.
        if any(run.status in _TO_BEGIN for run in unfinished) or alive:
            return None
        return "its process is gone" if alive is False or now - mark.at > SILENCE else None
    last = max(runs, key=lambda run: run.end_time or 0)
    if last.dagster_run.status is dg.DagsterRunStatus.CANCELED:
        return "it was cancelled"
    if last.dagster_run.status is dg.DagsterRunStatus.SUCCESS:
        return "it ended"
    ended = datetime.fromtimestamp(last.end_time, UTC) if last.end_time is not None else mark.at
    if at_once or now - ended > kept_until:
        return "it failed"
    return None


def _runs(instance: dg.DagsterInstance, run_id: str) -> list[dg.RunRecord]:
    """The run that made a clone, and those that went on with it: they have one root."""
    found = instance.get_run_records(dg.RunsFilter(run_ids=[run_id]))
    if not found:
        return []
    root = found[0].dagster_run.tags.get(tags.ROOT_RUN, run_id)
    others = instance.get_run_records(dg.RunsFilter(tags={tags.ROOT_RUN: root}))
    return [*found, *(record for record in others if record.dagster_run.run_id != run_id)]
