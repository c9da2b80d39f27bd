"""Step 4, summed up per table: what later steps depend on."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import dagster as dg

from alphapulse_encryption.defs.assets.groups import TARGET_POOL, VERIFY
from alphapulse_encryption.defs.resources.partitions import Partitions, over_ranges
from alphapulse_encryption.defs.resources.reporting import (
    MetadataEntry,
    actor,
    as_table,
    materialized,
    safely,
)
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.bookkeeping.verifications import FRESH_FOR, MOST_TRANSACTIONS
from alphapulse_encryption.migration.postgres.database import Actor
from alphapulse_encryption.migration.rows import verify
from alphapulse_encryption.migration.rows.problems import Problem
from alphapulse_encryption.migration.rows.verify import TableVerification

NAME = "verified_table"
Yielded = dg.AssetCheckResult | dg.MaterializeResult[Any]


class _Check(NamedTuple):
    name: str
    description: str
    kinds: tuple[Problem, ...] = ()
    passes: Callable[[TableVerification], bool] = lambda _: True


# Dagster keeps one evaluation per check and asset, whatever partitions a run had. So each is evaluated over all tables
# that were begun, not over those of the run: the last run does not hide what another one found.
_CHECKS = (
    _Check(
        "every_range_verified",
        "Every batch range was verified, with this definition and this key.",
        passes=lambda result: result.verified_at is not None,
    ),
    _Check(
        "nothing_pending",
        "No plaintext waits for its ciphertext or token, or was set aside.",
        ("pending", "quarantined"),
    ),
    _Check(
        "every_value_matches",
        "Every ciphertext decrypts to its plaintext, with a key that is not retired.",
        ("mismatched", "undecryptable", "retired_key"),
    ),
    _Check("every_token_matches", "Every search token is that of its value.", ("token_mismatched",)),
    _Check(
        "row_counts_match",
        "Counted past the primary key's index, there are no more rows than were verified, but for those changed since.",
        passes=lambda result: result.missing_rows == 0,
    ),
    _Check(
        "fresh",
        f"Every result is at most {FRESH_FOR.days} days and {MOST_TRANSACTIONS:,} transactions old.",
        passes=lambda result: result.fresh,
    ),
)


def build(partitions: Partitions) -> dg.AssetsDefinition:
    """The asset ``verified_table``, per table, with its checks."""
    specs = [
        dg.AssetCheckSpec(
            check.name,
            asset=NAME,
            description=f"{check.description} Evaluated by each run of {NAME}, over all tables.",
            blocking=True,
        )
        for check in _CHECKS
    ]

    @dg.asset(
        name=NAME,
        deps=[over_ranges("verified_data")],
        partitions_def=partitions.by_table,
        backfill_policy=dg.BackfillPolicy.single_run(),
        check_specs=specs,
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
            yield from _evaluate(results)
            # Raised, not returned as a failed check: the asset would have been materialized by then.
            refuse_unverified(results, context.partition_keys)
            yield dg.MaterializeResult()

    return asset


def _evaluate(results: Mapping[str, TableVerification]) -> Iterator[dg.AssetCheckResult]:
    for check in _CHECKS:
        failing = {
            table: sum(counts[kind] for counts in result.columns.values() for kind in check.kinds)
            for table, result in results.items()
        }
        bad = [table for table, result in results.items() if failing[table] or not check.passes(result)]
        yield dg.AssetCheckResult(
            check_name=check.name,
            asset_key=NAME,
            passed=not bad,
            metadata={
                "tables_failing": ", ".join(bad) or "none",
                "tables_looked_at": ", ".join(results) or "none",
                "values_failing": sum(failing.values()),
            },
        )


def refuse_unverified(results: Mapping[str, TableVerification], keys: Iterable[str]) -> None:
    """Refuse where one of the tables did not pass; says of each which values, and why."""
    refused: list[str] = []
    for key in keys:
        result = results.get(key)
        if result is None:
            refused.append(f"{key}: its encrypted columns were never added")
        elif not result.passed:
            refused += [f"{key}: {reason}" for reason in result.reasons]
            refused += [f"{key}.{offender}" for offender in result.offenders]
            refused += result.advice
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
            result = verify.verify_table(connection, table, target.key_ring)
            if result.since is not None and result.missing_rows is None:
                verify.count_rows(target.by(who), table)
                result = verify.verify_table(connection, table, target.key_ring)
            results[table.key] = result
    return results


def _metadata(result: TableVerification) -> dict[str, MetadataEntry]:
    columns = [
        {"column": name, "matching": counts["matching"], "empty": counts["empty"]}
        for name, counts in result.columns.items()
    ]
    return {
        "outcome": f"{len(result.columns)} columns verified",
        "dagster/partition_row_count": result.rows,
        "columns": as_table(columns),
        "oldest_result": result.verified_at.isoformat() if result.verified_at is not None else "none",
    }
