"""Step 4, ``--verify``: decrypt and compare every value, per table and batch range."""

import dagster as dg
from dagster._core.definitions.metadata import RawMetadataValue

from alphapulse_encryption.assets.groups import TARGET_POOL, VERIFY
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.verify import RangeVerification, verify_range
from alphapulse_encryption.resources.border import actor, materialized, safely
from alphapulse_encryption.resources.partitions import Partitions, over_ranges, parts_by_table
from alphapulse_encryption.resources.target import Target


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``verified_data``, per table and batch range."""

    @dg.asset(
        name="verified_data",
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
    def asset(context: dg.AssetExecutionContext, target: Target) -> None:
        with safely():
            failed: list[str] = []
            for part in parts_by_table(context.partition_keys):
                table = target.catalogue.table(part.table)
                try:
                    result = verify_range(
                        target.database,
                        table,
                        part.batch_range,
                        target.cipher,
                        target.key_ring,
                        actor(context),
                    )
                except MigrationError as error:
                    context.log.error(f"{part.partition}: {error.args[0]}")
                    failed.append(f"{part.partition}: {error.args[0]}")
                    continue
                for offender in result.offenders:
                    context.log.warning(f"{part.table}.{offender}")
                materialized(context, part.partition, _metadata(result))
            if failed:
                raise MigrationError(
                    f"{len(failed)} batch ranges could not be verified:\n"
                    + "\n".join(f"- {line}" for line in failed)
                )

    return asset


def _metadata(result: RangeVerification) -> dict[str, RawMetadataValue]:
    totals = {
        kind: sum(getattr(counts, kind) for counts in result.columns.values())
        for kind in ("matching", "empty", "pending", "mismatched", "undecryptable", "token_mismatched")
    }
    return {
        "outcome": "every value matches" if result.passed else "there are values that do not match",
        "dagster/partition_row_count": result.rows,
        "values": result.values,
        **totals,
        "first_offenders": [str(offender) for offender in result.offenders],
        "seconds": round(result.seconds, 3),
        "rows_per_second": round(result.rows / result.seconds) if result.seconds else 0,
    }
