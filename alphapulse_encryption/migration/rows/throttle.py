"""When to hold back: indicators of the server's health, each with a reason, and the wait until all are well again.

A look costs a few small queries, so it is taken once a second and not before each batch. Indicators know the server
only through a connection of their own; ``sleep`` and ``clock`` are arguments, so that pacing is tested without
waiting.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import psycopg

from alphapulse_encryption.background import in_background
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.bookkeeping.limits import Limits, read_limits
from alphapulse_encryption.migration.postgres import replication
from alphapulse_encryption.migration.postgres.database import (
    Connection,
    Database,
    DatabaseUnreachable,
    answer,
    connection_was_lost,
)

SECONDS_BETWEEN_LOOKS = 1.0
# So many looks are remembered, an hour's: longer than a backfill should go on beside a replica that is stuck.
MOST_MOMENTS = 3_600
_MEBIBYTE = 1024 * 1024


@dataclass(frozen=True)
class Stop:
    """Hold back; the reason is in words for the operator.

    Args:
        remedy: what a person has to do, where it does not go away by itself; a step then ends in the end.
    """

    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class NotAvailable:
    """This server, or this role, does not tell, for a reason."""

    reason: str


# None: nothing to hold back for.
Signal = Stop | NotAvailable | None
# Looks at one sign of distress, over a connection that others use as well.
Indicator = Callable[[Connection, Limits], Signal]


def paused(connection: Connection, limits: Limits) -> Signal:
    """An operator asked for a pause."""
    return Stop("paused by an operator (setting paused)") if limits.paused else None


# A replica that is being copied, or reports no replay (pg_receivewal), is not behind in anything. Of a role that may
# not see them, the server tells that there are replicas, and nothing of them (PostgreSQL manual, 27.2.4).
_REPLICAS = """
SELECT application_name, state IS NULL, pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8,
       pg_wal_lsn_diff(replay_lsn, '0/0')::float8, extract(epoch FROM replay_lag)::float8
  FROM pg_stat_replication WHERE state IS NULL OR replay_lsn IS NOT NULL
"""


@dataclass
class ReplicationLag:
    """A replica that is behind would be further behind, and serve older data.

    The server's own ``replay_lag`` is measured when a replica has replayed something: of one that is stuck it stays as
    it was, or is NULL. So the indicator remembers what was written when, and measures for itself how old the first
    change is that a replica has not replayed yet, as far back as it has looked itself. Either is as exact as replicas
    report: at the latest every ``wal_receiver_status_interval``, which a limit should not be below.
    """

    clock: Callable[[], float] = time.monotonic
    # When the server had written how many bytes, oldest first.
    _written: deque[tuple[float, float]] = field(
        default_factory=lambda: deque(maxlen=MOST_MOMENTS), init=False
    )

    def __call__(self, connection: Connection, limits: Limits) -> Signal:
        """Stop while the slowest replica replays later, or has more left to replay, than the limits."""
        seconds, mib = limits.max_replication_lag_seconds, limits.max_replication_lag_mib
        if not seconds and not mib:
            return None
        replicas = connection.execute(_REPLICAS).fetchall()
        if any(hidden for _, hidden, *_ in replicas):
            return NotAvailable("this role may not see how far replicas are (GRANT pg_monitor lets it)")
        if not replicas:
            return None
        now, written = self.clock(), max(row[2] for row in replicas)
        self._written.append((now, written))
        behind = [
            (max(self._age(now, replayed), reported or 0.0), (written - replayed) / _MEBIBYTE, name)
            for name, _, _, replayed, reported in replicas
            if replayed < written
        ]
        late, _, name = max(behind, default=(0.0, 0.0, ""))
        if seconds and late > seconds:
            return Stop(f"replica {name} is {late:.0f} s behind (limit {seconds:g} s)")
        left, name = max(((left, name) for _, left, name in behind), default=(0.0, ""))
        if mib and left > mib:
            return Stop(f"replica {name} has {left:.0f} MiB left to replay (limit {mib})")
        return None

    def _age(self, now: float, replayed: float) -> float:
        """For how long, at least, there has been something that a replica has not replayed."""
        return next((now - moment for moment, written in self._written if written > replayed), 0.0)


def missing_standbys(connection: Connection, limits: Limits) -> Signal:
    """A synchronous standby is away, for which commits wait; ours do not for long, or nobody could say why."""
    why = replication.missing_standbys(connection)
    if why is None:
        return None
    replication.give_up_waiting(connection)
    return Stop(why, replication.START_STANDBYS)


def kept_wal(connection: Connection, limits: Limits) -> Signal:
    """The server keeps write-ahead log that nobody reads: it fills the disk, or a subscriber is lost."""
    most = limits.max_kept_wal_mib * _MEBIBYTE or None
    for slot in replication.slots(connection):
        if slot.active:
            remedy = f"See to what reads the slot {slot.name}, or allow more (--set max_kept_wal_mib=…)."
        else:
            remedy = (
                f"Nobody reads the slot {slot.name}: start its reader, or drop it "
                f"(SELECT pg_drop_replication_slot('{slot.name}'))."
            )
        kept = slot.kept // _MEBIBYTE
        if most is not None and slot.kept > most:
            return Stop(
                f"the server keeps {kept} MiB of WAL for the replication slot {slot.name} "
                f"(limit {limits.max_kept_wal_mib})",
                remedy,
            )
        # A quarter is left for what others write.
        if slot.left is not None and slot.left < slot.kept / 3:
            return Stop(
                f"the replication slot {slot.name} has {kept} MiB of WAL left to read, and is lost after "
                f"{max(0, slot.left) // _MEBIBYTE} more (max_slot_wal_keep_size)",
                remedy,
            )
    failing, waiting = replication.waiting_for_the_archive(connection)
    if most is None or waiting <= most:
        return None
    return Stop(
        f"{waiting // _MEBIBYTE} MiB of WAL wait to be archived (limit {limits.max_kept_wal_mib})",
        f"See to archive_command or archive_library{', which fails' if failing else ''} (pg_stat_archiver).",
    )


def blocked_sessions(ours: Sequence[int], connection: Connection, limits: Limits) -> Signal:
    """More of the application's sessions than the limit says wait for a lock of ours, told by process numbers."""
    waiting = answer(
        connection,
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
        "AND NOT pid = ANY (%s::int[]) AND pg_blocking_pids(pid) && %s::int[]",
        *(ours, ours),
    )
    if waiting <= limits.max_blocked_sessions:
        return None
    return Stop(f"{waiting} sessions wait for a lock of ours (limit {limits.max_blocked_sessions})")


@dataclass
class WalRate:
    """Write-ahead log fills disks, archives and the line to the replicas."""

    clock: Callable[[], float] = time.monotonic
    _last: tuple[float, int] | None = field(default=None, init=False)

    def __call__(self, connection: Connection, limits: Limits) -> Signal:
        """Stop while more was written since the last look than the limit says."""
        limit = limits.max_wal_mib_per_second
        written = answer(connection, "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint")
        now = (self.clock(), written)
        last, self._last = self._last, now
        if not limit or last is None or now[0] <= last[0]:
            return None
        rate = (now[1] - last[1]) / _MEBIBYTE / (now[0] - last[0])
        if rate <= limit:
            return None
        return Stop(f"the server writes {rate:.0f} MiB of WAL a second (limit {limit:g})")


def free_disk(
    connection: Connection, limits: Limits, *, free: Callable[[Path], int | None] | None = None
) -> Signal:
    """Less disk is free than the limit says; a full one stops the server."""
    if not limits.min_free_disk_mib:
        return None
    if not (connection.info.host or "").startswith("/"):
        return NotAvailable("the server is on another machine")
    try:
        directory = answer(connection, "SELECT current_setting('data_directory')")
    except psycopg.errors.InsufficientPrivilege:
        return NotAvailable("this role may not see where the server keeps its data")
    found = (free or free_bytes)(Path(directory))
    if found is None:
        return NotAvailable("the server's data directory cannot be seen from here")
    if found >= limits.min_free_disk_mib * _MEBIBYTE:
        return None
    return Stop(f"{found // _MEBIBYTE} MiB of disk are free (limit {limits.min_free_disk_mib})")


def free_bytes(directory: Path) -> int | None:
    """Bytes free where a directory is; None where that cannot be seen."""
    try:
        # The server's directory is closed to others; what holds it is on the same disk.
        status = os.statvfs(directory if os.access(directory, os.R_OK) else directory.parent)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def indicators(ours: Sequence[int]) -> tuple[Indicator, ...]:
    """All of them, the most deliberate first; ``ours`` are process numbers of our sessions."""
    replicas = (missing_standbys, ReplicationLag(), kept_wal)
    return (paused, *replicas, partial(blocked_sessions, ours), WalRate(), free_disk)


class HeldBack(MigrationError):
    """The server's distress does not end by itself; the range stays as it is."""


@dataclass
class Throttle:
    """Holds a worker back while an indicator says so.

    Looks are taken in a thread of their own, because a session that waits for a lock of ours waits while our
    statement runs, not between two of them; and over a connection of their own, opened again where it was lost.

    Args:
        on_wait: told the reason again and again, and None when the wait is over; ends the wait by raising.
    """

    database: Database
    indicators: Sequence[Indicator]
    on_wait: Callable[[str | None], None]
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    # What the latest look has shown: the settings, and why to hold back, where anything speaks against going on.
    limits: Limits = field(default_factory=Limits, init=False)
    reason: str | None = field(default=None, init=False)
    remedy: str = field(default="", init=False)
    waited: float = field(default=0.0, init=False)
    rested: float = field(default=0.0, init=False)
    _error: psycopg.Error | None = field(default=None, init=False)
    _connection: Connection | None = field(default=None, init=False)

    def wait(self) -> Limits:
        """Return when nothing speaks against the next batch, with the settings as they are then.

        Raises:
            psycopg.Error: an indicator could not be asked.
            HeldBack: for longer than the setting says, by something that a person has to end.
        """
        if self._error is not None:
            raise self._error
        reason = self.reason
        if reason is None:
            return self.limits
        began = self.clock()
        while reason is not None:
            self.on_wait(reason)
            most = self.limits.max_wait_minutes
            if self.remedy and most and self.clock() - began > most * 60:
                raise HeldBack(
                    f"Held back for {most:g} minutes (setting max_wait_minutes), because {reason}. {self.remedy} What "
                    "was done is kept: run the step again then."
                )
            self.sleep(SECONDS_BETWEEN_LOOKS / 2)
            reason = self.reason
        self.waited += self.clock() - began
        self.on_wait(None)
        return self.limits

    def rest(self, seconds: float, on_rest: Callable[[], None]) -> None:
        """Leave the machine to others for a while; ``on_rest`` is called now and then, and ends it by raising."""
        until = self.clock() + seconds
        while (left := until - self.clock()) > 0:
            self.sleep(min(left, SECONDS_BETWEEN_LOOKS / 2))
            if left > SECONDS_BETWEEN_LOOKS / 2:
                on_rest()
        self.rested += seconds

    def take_look(self) -> None:
        """Ask the indicators now."""
        try:
            stop = self._look()
        except ConfigurationError as error:
            # A setting that means nothing was meant to mean something: until it is put right, nobody goes on. That
            # the server is away is not for us to say: the worker itself notices, and knows what to do.
            stop = None if isinstance(error, DatabaseUnreachable) else Stop(str(error.args[0]))
        except psycopg.Error as error:
            if not connection_was_lost(error):
                self._error = error
            return
        self.reason, self.remedy = (stop.reason, stop.remedy) if stop else (None, "")

    def _look(self) -> Stop | None:
        if self._connection is None or self._connection.closed:
            self._connection = self.database.connect()
        self.limits = read_limits(self._connection)
        signals = [look(self._connection, self.limits) for look in self.indicators]
        return next((signal for signal in signals if isinstance(signal, Stop)), None)

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Look again and again while the block runs; once before it begins."""

        def look_on(ended: threading.Event) -> None:
            while not ended.wait(SECONDS_BETWEEN_LOOKS):
                self.take_look()

        self.take_look()
        try:
            with in_background(look_on, name="throttle"):
                yield
        finally:
            if self._connection is not None:
                self._connection.close()
