"""Step 4, ``--verify``: decrypt and compare every value, per table and batch range."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL, VERIFY
from alphapulse_encryption.defs.resources.partitions import Partitions, TablePart, over_ranges, parts_by_table
from alphapulse_encryption.defs.resources.pools import in_table_pools
from alphapulse_encryption.defs.resources.reporting import MetadataEntry, actor, materialized, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import WorkersConfig, in_workers
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.logfiles import note
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows.engine import Stopped
from alphapulse_encryption.migration.rows.verify import KINDS, RangeVerification, verify_range

NAME = "verified_data"


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``verified_data``, per table and batch range."""

    @dg.asset(
        name=NAME,
        deps=["encrypted_data", over_ranges("search_indexes")],
        partitions_def=partitions.by_table_and_range,
        backfill_policy=partitions.one_run_per_table,
        group_name=VERIFY,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 4.** Decrypts every ciphertext of a batch range and compares it with its plaintext, and "
        "computes every search token again, against the rows as they are now. Names the primary keys of the first "
        "offenders, never a value. Materializing it says that the range was looked at; whether a table passed is "
        "`verified_table`. Shown as unsynced once the range was backfilled again: verify it again then.",
    )
    def asset(context: dg.AssetExecutionContext, config: WorkersConfig, target: TargetResource) -> None:
        parts = parts_by_table(context.partition_keys)
        with safely(), in_table_pools(context, [part.table for part in parts]):
            failed: list[str] = []
            for part, outcome in verified_parts(actor(context), config.workers, target, parts):
                if isinstance(outcome, MigrationError):
                    context.log.error(f"{part.partition}: {outcome.args[0]}")
                    failed.append(f"{part.partition}: {outcome.args[0]}")
                    continue
                for offender in outcome.offenders:
                    context.log.warning(f"{part.table}.{offender}")
                materialized(context, part.partition, describe(outcome))
            if failed:
                raise MigrationError(
                    f"{len(failed)} batch ranges could not be verified:\n"
                    + "\n".join(f"- {line}" for line in failed)
                )

    return asset


def verified_parts(
    who: Actor, workers: int, target: TargetResource, parts: Sequence[TablePart]
) -> Iterator[tuple[TablePart, RangeVerification | MigrationError]]:
    """Verify batch ranges, several at once; each with its result, in the order in which they end."""
    working = target.by(who)

    def work(
        _: None, part: TablePart, _following: TablePart | None, stopped: threading.Event
    ) -> RangeVerification:
        def on_progress(_rows: int, _seconds: float) -> None:
            if stopped.is_set():
                raise Stopped("Stopped. Run the partition again.")

        note("range_started", run_id=who.run_id, asset=NAME, partition=part.partition)
        table = working.catalogue.table(part.table)
        return verify_range(working, table, part.batch_range, on_progress=on_progress)

    return in_workers(parts, workers, nullcontext, work)


def describe(result: RangeVerification) -> dict[str, MetadataEntry]:
    """The metadata of a range's partition."""
    totals = {kind: sum(counts[kind] for counts in result.columns.values()) for kind in KINDS}
    return {
        "outcome": "every value matches" if result.passed else "there are values that do not match",
        "dagster/partition_row_count": result.rows,
        "values": result.values,
        **totals,
        "first_offenders": [str(offender) for offender in result.offenders],
        "seconds": round(result.seconds, 3),
        "rows_per_second": round(result.rows / result.seconds) if result.seconds else 0,
    }
