"""A run while this process executes it: others can see that it lives, and can stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import dagster as dg
from sqlalchemy.exc import SQLAlchemyError

from alphapulse_encryption.beside import beside
from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.leases import run_lease

# What lists of runs show: the worker that executes, or last executed, a run.
WORKER_TAG = "worker"

# Has the daemon run a run again whose worker is gone, three times at most; not one of which a step failed.
RUN_AGAIN = {tags.MAX_RETRIES: "3"}
# Jobs and assets that go on where a killed one was, and destroy nothing: these alone are run again by themselves.
_SAFE_JOBS = frozenset({"migrate_data", "verify_data"})
_SAFE_ASSETS = frozenset({"encrypted_data", "verified_data"})

NOT_ENDED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)

_SECONDS_BETWEEN_LOOKS = 3.0
# Somebody has taken it for dead, and another run may go on with its work.
_ENDED = frozenset({dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE})


def safe_to_repeat(run: dg.DagsterRun) -> bool:
    """Whether a run of which it is not known how far it came may be run again by itself."""
    if run.asset_selection is not None:
        return {key.to_user_string() for key in run.asset_selection} <= _SAFE_ASSETS
    return run.job_name in _SAFE_JOBS


@contextlib.contextmanager
def executing(instance: dg.DagsterInstance, run_id: str) -> Iterator[bool]:
    """Hold the run's lease, and have the UI's "Terminate" reach this process as SIGINT; see :func:`run_lease`."""
    with run_lease(instance, run_id) as ours:
        if not ours:
            yield False
            return

        def watch(ended: threading.Event) -> None:
            looks = 0
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                try:
                    run = instance.get_run_by_id(run_id)
                except SQLAlchemyError:
                    continue
                status = None if run is None else run.status
                # One that has failed by itself is about to leave the block, and is not here at the next look.
                looks = looks + 1 if status in _ENDED else 0
                if status is dg.DagsterRunStatus.CANCELING or looks > 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        # In the end it may be asking a server that does not answer any more; the run does not depend on it.
        with beside(watch, name="stopped from elsewhere", patience=_SECONDS_BETWEEN_LOOKS):
            yield True
