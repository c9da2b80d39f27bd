"""A run while this process executes it: others can see that it lives, and can stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import dagster as dg

from alphapulse_encryption.resources.leases import run_lease

# What lists of runs show: the worker that executes, or last executed, a run.
WORKER_TAG = "worker"

_SECONDS_BETWEEN_LOOKS = 3.0
# Somebody has asked for its end; or has taken it for dead, and another run may go on with its work.
_ENDED_ELSEWHERE = frozenset(
    {dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE}
)


@contextlib.contextmanager
def executing(instance: dg.DagsterInstance, run_id: str) -> Iterator[bool]:
    """Hold the run's lease, and have the UI's "Terminate" reach this process as SIGINT.

    Returns:
        Whether the run may be executed here; see :func:`run_lease`.
    """
    with run_lease(instance, run_id) as ours:
        if not ours:
            yield False
            return
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_SECONDS_BETWEEN_LOOKS):
                run = instance.get_run_by_id(run_id)
                if run is not None and run.status in _ENDED_ELSEWHERE:
                    os.kill(os.getpid(), signal.SIGINT)
                    return

        thread = threading.Thread(target=watch, name="stopped from elsewhere", daemon=True)
        thread.start()
        try:
            yield True
        finally:
            ended.set()
            # It may be asking a server that does not answer any more; the run does not depend on it.
            thread.join(_SECONDS_BETWEEN_LOOKS)
