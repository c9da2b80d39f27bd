"""Names of processes that no other process ever has, so that somebody can tell later whether one is gone."""

from __future__ import annotations

import platform

import psutil

# Marks the runs that a command executes itself. Tags of this prefix are not shown in lists of runs.
PROCESS_TAG = ".dagster/alphapulse_encryption_process"

# Runs that this process has launched as a command and executes: a tag could be set by anybody who launches a run.
OWN_RUNS: set[str] = set()


def this_process() -> str:
    """The name of this process: machine, number and start."""
    return process_name(psutil.Process())


def is_running(name: str) -> bool | None:
    """Whether a process is; None for one of another machine, which cannot be looked for."""
    host, _, rest = name.partition("/")
    if host != platform.node():
        return None
    try:
        process = psutil.Process(int(rest.partition("/")[0]))
        # One that was killed keeps its number until its parent asks for it, which in a container may be never.
        return process.status() != psutil.STATUS_ZOMBIE and process_name(process) == name
    except (psutil.NoSuchProcess, ValueError):
        return False


def process_name(process: psutil.Process) -> str:
    """The name of a process."""
    # A number is used again by another process, and so is the name of a machine: its start tells them apart.
    return f"{platform.node()}/{process.pid}/{process.create_time():.2f}"
