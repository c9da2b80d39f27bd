"""Step 4, summed up per table: what later steps depend on."""

import dagster as dg
from dagster._core.definitions.metadata import RawMetadataValue

from alphapulse_encryption.assets.groups import TARGET_POOL, VERIFY
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.verify import TableVerification, verify_table
from alphapulse_encryption.resources.border import materialized, safely
from alphapulse_encryption.resources.partitions import Partitions
from alphapulse_encryption.resources.target import Target


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``verified_table``, per table."""

    @dg.asset(
        name="verified_table",
        deps=["verified_data"],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=VERIFY,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 4, per table.** Puts the results of all batch ranges together. Green only if every value "
        "of every range was decrypted and matches, nothing is pending, and neither the table's definition nor the "
        "key has changed since. Later steps look at the database again themselves.",
    )
    def asset(context: dg.AssetExecutionContext, target: Target) -> None:
        with safely():
            refused: list[str] = []
            for key in context.partition_keys:
                with target.database.session(f"sum up the verification of {key}") as connection:
                    result = verify_table(connection, target.catalogue.table(key), target.key_ring)
                if result.passed:
                    materialized(context, key, _metadata(result))
                else:
                    refused += [f"{key}: {reason}" for reason in result.reasons]
                    refused += [f"{key}.{offender}" for offender in result.offenders]
            if refused:
                raise RefusedError("Not verified:\n" + "\n".join(f"- {line}" for line in refused))

    return asset


def _metadata(result: TableVerification) -> dict[str, RawMetadataValue]:
    records = [
        dg.TableRecord({"column": name, "matching": counts.matching, "empty": counts.empty})
        for name, counts in result.columns.items()
    ]
    return {
        "outcome": f"{len(result.columns)} columns verified",
        "dagster/partition_row_count": result.rows,
        "columns": dg.MetadataValue.table(records=records),
        "oldest_result": result.verified_at.isoformat() if result.verified_at is not None else "none",
    }
