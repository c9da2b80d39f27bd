"""Which runs are being executed somewhere: known to every machine, by what PostgreSQL knows of its sessions.

A process number means nothing on another machine. Whoever executes a run therefore holds a lease: an advisory lock in
Dagster's storage, which the server gives up with the session, whatever became of the process or its machine. Nobody
else can take the lease of a run meanwhile, so that no run is executed twice at once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator
from typing import Any

import dagster as dg
import psycopg
from sqlalchemy.engine import make_url

from alphapulse_encryption.beside import beside
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.postgres import locks
from alphapulse_encryption.migration.postgres.database import Database

# How often a holder looks whether the server still knows its session, in seconds.
SECONDS_BETWEEN_LOOKS = 4.0
# After a restart of the storage's server, its holder is back within this many seconds.
SECONDS_TO_COME_BACK = 15.0


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
    with beside(lease.keep, name="run lease", patience=SECONDS_BETWEEN_LOOKS):
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
    return Database(address, "alphapulse_encryption run lease", "DAGSTER_POSTGRES_URL")
