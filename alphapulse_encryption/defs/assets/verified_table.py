"""Step 4, summed up per table: what later steps depend on."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL, VERIFY
from alphapulse_encryption.defs.checks import verification
from alphapulse_encryption.defs.resources.border import MetadataEntry, actor, as_table, materialized, safely
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows.verify import TableVerification, count_rows, verify_table

Yielded = dg.AssetCheckResult | dg.MaterializeResult[Any]


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``verified_table``, per table, with its checks."""

    @dg.asset(
        name="verified_table",
        deps=[over_ranges("verified_data")],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=verification.specs(),
        group_name=VERIFY,
        kinds={"postgres"},
        pool=TARGET_POOL,
        description="**Step 4, per table.** Puts the results of all batch ranges together. Green only if every value "
        "of every range was decrypted and matches, nothing is pending, and neither the table's definition nor the "
        "key has changed since. Later steps look at the database again themselves.",
    )
    def asset(context: dg.AssetExecutionContext, target: TargetResource) -> Iterator[Yielded]:
        with safely():
            target.refuse_another_key()
            results = verified_tables(actor(context), target)
            for key in context.partition_keys:
                if key in results and results[key].passed:
                    materialized(context, key, _metadata(results[key]))
            yield from verification.evaluate(results)
            # Raised, not returned as a failed check: the asset would have been materialized by then.
            refuse_unverified(results, context.partition_keys)
            yield dg.MaterializeResult()

    return asset


def refuse_unverified(results: Mapping[str, TableVerification], keys: Iterable[str]) -> None:
    """Refuse where one of the tables did not pass.

    Raises:
        RefusedError: says of each which values, and why.
    """
    refused: list[str] = []
    for key in keys:
        result = results.get(key)
        if result is None:
            refused.append(f"{key}: its encrypted columns were never added")
        elif not result.passed:
            refused += [f"{key}: {reason}" for reason in result.reasons]
            refused += [f"{key}.{offender}" for offender in result.offenders]
    if refused:
        raise RefusedError("Not verified:\n" + "\n".join(f"- {line}" for line in refused))


def verified_tables(who: Actor, target: TargetResource) -> dict[str, TableVerification]:
    """Of every table that was begun; rows are counted where they were not since the last verification."""
    results: dict[str, TableVerification] = {}
    with target.database.session("sum up the verification") as connection:
        if not bookkeeping_exists(connection):
            return results
        for table in target.catalogue.tables:
            if table_state(connection, table) is None:
                continue
            result = verify_table(connection, table, target.key_ring)
            if result.since is not None and result.missing_rows is None:
                count_rows(target.by(who), table)
                result = verify_table(connection, table, target.key_ring)
            results[table.key] = result
    return results


def _metadata(result: TableVerification) -> dict[str, MetadataEntry]:
    columns = [
        {"column": name, "matching": counts.matching, "empty": counts.empty}
        for name, counts in result.columns.items()
    ]
    return {
        "outcome": f"{len(result.columns)} columns verified",
        "dagster/partition_row_count": result.rows,
        "columns": as_table(columns),
        "oldest_result": result.verified_at.isoformat() if result.verified_at is not None else "none",
    }
