"""A run while a process executes it: every machine can see that it lives, and can stop it.

A process number means nothing on another machine. Whoever executes a run therefore holds a lease: an advisory lock in
Dagster's storage, which the server gives up with the session, whatever became of the process or its machine. Nobody
else can take the lease of a run meanwhile, so that no run is executed twice at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Collection, Iterator
from typing import Any

import dagster as dg
import psycopg
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from alphapulse_encryption.background import in_background
from alphapulse_encryption.defs.resources import tags
from alphapulse_encryption.defs.resources.environment import database_at
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Database

# How often a process looks whether its run is to stop, and whether the server still knows its lease, in seconds.
SECONDS_BETWEEN_LOOKS = 4.0
# After a restart of the storage's server, its holder is back within this many seconds.
SECONDS_TO_COME_BACK = 15.0

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

# Somebody has taken it for dead, and another run may go on with its work.
_ENDED = frozenset({dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE})


def _lock(run_id: str) -> str:
    return f"alphapulse_encryption run {run_id}"


def held_leases(instance: dg.DagsterInstance, run_ids: Collection[str]) -> frozenset[str] | None:
    """Those of the runs that somebody is executing, on whatever machine; None where the storage cannot say so."""
    storage = _storage(instance)
    if storage is None:
        return None
    try:
        with storage.session("look for leases") as connection:
            held = locks.holders(connection, [_lock(run_id) for run_id in run_ids])
    except MigrationError:
        return None
    return frozenset(run_id for run_id in run_ids if _lock(run_id) in held)


@contextlib.contextmanager
def run_lease(instance: dg.DagsterInstance, run_id: str) -> Iterator[bool]:
    """Hold the lease of a run, which need not be created yet, for the length of the block.

    Returns:
        Whether it could be had; no, where somebody else executes the run. Where the storage is no PostgreSQL, or is
        away for a moment, it is taken for had: a lease tells others, and is not what keeps data safe.
    """
    storage = _storage(instance)
    if storage is None:
        yield True
        return
    lease = _Lease(storage, run_id)
    if not lease.take():
        yield False
        return
    # In the end it may be asking a server that does not answer any more.
    with in_background(lease.keep, name="run lease", patience=SECONDS_BETWEEN_LOOKS):
        yield True


class _Lease:
    def __init__(self, storage: Database, run_id: str) -> None:
        self._storage = storage
        self._lock = _lock(run_id)
        self._connection: psycopg.Connection[Any] | None = None

    def take(self) -> bool:
        """Take it; False where another session has it."""
        try:
            with contextlib.ExitStack() as stack:
                connection = stack.enter_context(contextlib.closing(self._storage.connect()))
                taken = locks.try_hold(connection, self._lock)
                if taken:
                    stack.pop_all()
                    self._connection = connection
                return taken
        except (MigrationError, psycopg.Error):
            return True

    def keep(self, ended: threading.Event) -> None:
        """Keep it until the end; take it again where the server ended the session."""
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            try:
                if self._connection is not None:
                    self._connection.execute("SELECT 1")
                    continue
            except psycopg.Error:
                self._let_go()
            # The server may still hold the session that we have lost: then it is ours all the same.
            self.take()
        self._let_go()

    def _let_go(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None


def _storage(instance: dg.DagsterInstance) -> Database | None:
    # Of Dagster's storages, those in PostgreSQL have it.
    url = getattr(instance.run_storage, "postgres_url", None)
    if url is None:
        return None
    address = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return database_at(address, "alphapulse_encryption run lease", "DAGSTER_POSTGRES_URL")


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
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
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
        with in_background(watch, name="stopped from elsewhere", patience=SECONDS_BETWEEN_LOOKS):
            yield True
