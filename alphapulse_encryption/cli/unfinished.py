"""Runs that have not ended: those of killed commands are ended, and all of them are stopped when somebody asks."""

from __future__ import annotations

import time

import dagster as dg

from alphapulse_encryption.cli.outcomes import in_words
from alphapulse_encryption.defs.resources.instance import open_instance
from alphapulse_encryption.defs.resources.processes import PROCESS_TAG, is_running
from alphapulse_encryption.defs.resources.running import NOT_ENDED, SECONDS_TO_COME_BACK, held_leases
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.logfiles import note

_UNDER_WAY = [status for status in NOT_ENDED if status is not dg.DagsterRunStatus.QUEUED]


def end_abandoned_runs(instance: dg.DagsterInstance) -> None:
    """Runs of a command that was killed would otherwise look under way for ever.

    Those that Dagster's launchers have started are its daemon's to look after.
    """
    runs = {
        run.run_id: run
        for run in instance.get_runs(dg.RunsFilter(statuses=_UNDER_WAY))
        if PROCESS_TAG in run.tags
    }
    running = {one: is_running(runs[one].tags[PROCESS_TAG]) for one in _without_lease(instance, [*runs])}
    gone = [run_id for run_id, answer in running.items() if answer is False]
    # On another machine a process cannot be looked for, but its lease can: twice, in case the server was restarted.
    unknown = [run_id for run_id, answer in running.items() if answer is None]
    if unknown and held_leases(instance, unknown) is not None:
        time.sleep(SECONDS_TO_COME_BACK)
        gone += _without_lease(instance, unknown)
    for run_id in gone:
        # Nobody else gives back its place in the pool: without a daemon, later commands would wait for ever.
        instance.event_log_storage.free_concurrency_slots_for_run(run_id)
        why = "The command that ran it was killed. Run the same step again."
        instance.report_run_failed(runs[run_id], why)
        note("run_failed", level="error", message=why, run_id=run_id, job=runs[run_id].job_name)


def _without_lease(instance: dg.DagsterInstance, run_ids: list[str]) -> list[str]:
    held = (held_leases(instance, run_ids) if run_ids else None) or frozenset()
    return [run_id for run_id in run_ids if run_id not in held]


def stop_runs() -> tuple[str, ...]:
    """Stop every run of the instance that is queued or under way, wherever it is executed.

    A queued one is taken from the queue; one that is under way ends after the batch it is at, and what is done stays.
    What is returned says of each what becomes of it.

    Raises:
        ConfigurationError: the instance cannot be opened.
        RefusedError: one could not be asked to stop; the others were.
    """
    told, failed = [], []
    with open_instance() as instance:
        for run in instance.get_runs(dg.RunsFilter(statuses=NOT_ENDED)):
            try:
                queued = run.status is dg.DagsterRunStatus.QUEUED
                if not instance.run_coordinator.cancel_run(run.run_id):
                    # Executed by a command of ours, which looks for this.
                    instance.report_run_canceling(run)
                told.append(f"{'Taken from the queue' if queued else 'Asked to stop'}: {in_words(run)}")
            except Exception as error:
                failed.append(f"{in_words(run)}: {type(error).__name__}")
    if failed:
        raise RefusedError("Some runs could not be asked to stop: " + "; ".join(failed))
    return tuple(told)
