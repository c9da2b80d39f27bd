"""Works on many batch ranges in one run: by several workers, seen partition by partition, none failing for another."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing
from typing import Protocol, TypeVar, Unpack

import dagster as dg
from pydantic import Field

from alphapulse_encryption import bounds
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.resources.partitions import TablePart, range_name
from alphapulse_encryption.defs.resources.reporting import Context, MetadataEntry, actor, counted
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.logfiles import note
from alphapulse_encryption.migration.bookkeeping.ranges import read_ranges
from alphapulse_encryption.migration.rows.engine import How, Pace, Progress, RangeResult, Stopped
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.rows.tuning import restore_abandoned, tuned
from alphapulse_encryption.migration.target import Target

# Each observation is a row in Dagster's storage; more often than this nobody looks.
SECONDS_BETWEEN_OBSERVATIONS = 5.0


Own = TypeVar("Own")
Result = TypeVar("Result")


class Work(Protocol):
    """What to do to a range: :func:`backfill.backfill_range` or :func:`rotate.rotate_range`."""

    def __call__(self, target: Target, table: Table, number: int, **how: Unpack[How]) -> RangeResult: ...


class WorkersConfig(dg.Config):
    """How many workers go through a table range by range."""

    workers: int = Field(
        default=1, ge=1, le=bounds.MOST_WORKERS, description="How many batch ranges are worked on at once."
    )


class PacingConfig(WorkersConfig):
    """Pace of what goes through a table range by range."""

    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=bounds.LARGEST_BATCH_SIZE,
        description="Rows per batch. Unset: as the settings in the database say, which adapt it.",
    )
    target_seconds: float | None = Field(
        default=None,
        gt=0,
        le=bounds.LONGEST_BATCH_SECONDS,
        description="How long one batch's transaction is to take, in seconds. Unset: as the settings say.",
    )
    rest_ratio: float | None = Field(
        default=None,
        ge=0,
        le=bounds.HIGHEST_REST_RATIO,
        description="Seconds of rest for each second of work. Unset: as the settings say, which is none at first.",
    )


class PaceConfig(PacingConfig):
    """Pace, and what is tuned meanwhile."""

    work_mem: str | None = Field(
        default=None, description="Memory of one sort or hash in our sessions, for example 256MB."
    )
    autovacuum_off: bool = Field(
        default=False, description="Turn autovacuum off for the tables while the run lasts; always put back."
    )


def parts_of(target: TargetResource, keys: Sequence[str]) -> list[TablePart]:
    """The batch ranges of these tables, as they were planned."""
    with target.database.session("read the batch ranges") as connection:
        return [
            TablePart(key, found.number)
            for key in keys
            for found in read_ranges(connection, target.catalogue.table(key))
        ]


def work_through(
    context: Context,
    config: PaceConfig,
    target: TargetResource,
    asset: str | None,
    parts: Sequence[TablePart],
    work: Work,
    done: Callable[[TablePart, RangeResult], None],
) -> None:
    """Work on batch ranges, several at once.

    Args:
        asset: name of the asset whose partitions they are, where their progress is seen; None where they are of
            another database than the assets tell of.
        done: called with each that is done, in the order in which they end.

    Raises:
        MigrationError: some failed; names them, and the others are done.
    """
    working = target.by(actor(context))
    database, catalogue = working.database, working.catalogue
    # Each range looks again; here it is known before anything is tuned.
    target.refuse_another_key()
    restore_abandoned(database, working.actor)

    def work_on(
        sessions: Sessions, part: TablePart, following: TablePart | None, stopped: threading.Event
    ) -> RangeResult:
        observe = told(context, asset)
        note("range_started", run_id=context.run.run_id, job=context.run.job_name, partition=part.partition)

        def on_progress(progress: Progress) -> None:
            observe(progress)
            if stopped.is_set():
                raise Stopped("Stopped; what is done stays done. Run the partition again to go on.")

        return work(
            working,
            catalogue.table(part.table),
            part.batch_range,
            pace=Pace(config.batch_size, config.target_seconds, config.rest_ratio),
            on_progress=on_progress,
            sessions=sessions,
            following=following.batch_range if following and following.table == part.table else None,
        )

    failed: list[str] = []
    with ExitStack() as stack:
        for key in dict.fromkeys(part.table for part in parts):
            stack.enter_context(
                tuned(
                    database,
                    catalogue.table(key),
                    working.actor,
                    work_mem=config.work_mem,
                    autovacuum_off=config.autovacuum_off,
                )
            )
        outcomes = in_workers(parts, config.workers, lambda: Sessions(working, config.work_mem), work_on)
        with closing(outcomes):
            for part, outcome in outcomes:
                if isinstance(outcome, MigrationError):
                    # The other ranges do not depend on this one.
                    failed.append(f"{part.partition}: {outcome.args[0]}")
                    context.log.error(failed[-1])
                    continue
                for warning in filter(None, (usage.warning() for usage in outcome.key_usage)):
                    context.log.warning(warning)
                done(part, outcome)
    if failed:
        raise MigrationError(
            f"{len(failed)} of {len(parts)} batch ranges failed:\n"
            + "\n".join(f"- {line}" for line in failed)
        )


def in_workers(
    parts: Sequence[TablePart],
    workers: int,
    own: Callable[[], AbstractContextManager[Own]],
    work: Callable[[Own, TablePart, TablePart | None, threading.Event], Result],
) -> Generator[tuple[TablePart, Result | MigrationError], None, None]:
    """Do work to batch ranges in threads; each with what came of it, in the order in which they end.

    Args:
        own: what each worker has for all its work.
        work: is given the part, the one that the same worker does next, and an event: once that is set, nobody waits
            for a result any more.
    """
    ahead = iter(parts)
    ended = queue.SimpleQueue[tuple[TablePart, Result | BaseException]]()
    stopped = threading.Event()

    def worker() -> None:
        part = parts[0]
        try:
            with own() as mine:
                following = next(ahead, None)
                while following is not None and not stopped.is_set():
                    # Taken before it is begun, so that its first rows are read while the last ones of this are written.
                    part, following = following, next(ahead, None)
                    try:
                        ended.put((part, work(mine, part, following, stopped)))
                    except MigrationError as error:
                        ended.put((part, error))
        except BaseException as error:
            # Nobody else would tell the one who waits for results.
            ended.put((part, error))

    with ThreadPoolExecutor(workers, thread_name_prefix="range worker") as pool:
        try:
            for _ in range(min(workers, len(parts))):
                pool.submit(worker)
            for _ in parts:
                part, outcome = ended.get()
                if isinstance(outcome, BaseException) and not isinstance(outcome, MigrationError):
                    raise outcome
                yield part, outcome
        finally:
            # Interrupted: nothing new begins, and what runs ends after its batch.
            stopped.set()


def told(context: Context, asset: str | None = None) -> Callable[[Progress], None]:
    """Tells the run's log where a range holds back, and an asset's partition from time to time how far it is.

    Without an asset, whose partitions tell, the log is told of the first batch of each range as well.
    """
    before: tuple[TablePart, str | None] | None = None
    observed = time.monotonic()

    def tell(progress: Progress) -> None:
        nonlocal before, observed
        part, waiting_for = TablePart(progress.table, progress.batch_range), progress.waiting_for
        news = before != (part, waiting_for)
        changed = waiting_for != (before[1] if before is not None else None)
        before = part, waiting_for
        where = f"{part.table}, batch range {range_name(part.batch_range)}"
        if news and waiting_for is not None:
            context.log.warning(f"{where} holds back: {waiting_for}")
        elif news and asset is None:
            rows = counted(progress.rows, "row")
            context.log.info(f"{where}: {rows} in {progress.seconds:.1f} s so far")
        if asset is None or not (changed or time.monotonic() - observed >= SECONDS_BETWEEN_OBSERVATIONS):
            return
        observed = time.monotonic()
        metadata: dict[str, MetadataEntry] = {
            "rows": progress.rows,
            "values": progress.values,
            "rows_per_second": round(progress.rows / progress.seconds) if progress.seconds else 0,
            "batch_size": progress.batch_size,
            "holds_back_because": waiting_for or "it does not",
        }
        context.log_event(dg.AssetObservation(asset, partition=part.partition, metadata=metadata))

    return tell
