"""The checks that ``verified_table`` carries.

Dagster keeps one evaluation per check and asset, whatever partitions a run had. So each is evaluated over all
tables that were begun, not over those of the run: the last run does not hide what another one found.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import dagster as dg

from alphapulse_encryption.migration.rows.verify import (
    FRESH_FOR,
    MOST_TRANSACTIONS,
    Problem,
    TableVerification,
)

ASSET = "verified_table"


@dataclass(frozen=True)
class _Check:
    name: str
    description: str
    kinds: tuple[Problem, ...] = ()
    passes: Callable[[TableVerification], bool] | None = None


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


def specs() -> list[dg.AssetCheckSpec]:
    """The checks' specifications."""
    return [
        dg.AssetCheckSpec(
            check.name,
            asset=ASSET,
            description=f"{check.description} Evaluated by each run of {ASSET}, over all tables.",
            blocking=True,
        )
        for check in _CHECKS
    ]


def evaluate(results: Mapping[str, TableVerification]) -> Iterator[dg.AssetCheckResult]:
    """Evaluate every check over the tables' results, by table."""
    for check in _CHECKS:
        bad = [table for table, result in results.items() if not _passes(check, result)]
        yield dg.AssetCheckResult(
            check_name=check.name,
            asset_key=ASSET,
            passed=not bad,
            metadata={
                "tables_failing": ", ".join(bad) or "none",
                "tables_looked_at": ", ".join(results) or "none",
                "values_failing": sum(_failing(check, result) for result in results.values()),
            },
        )


def _passes(check: _Check, result: TableVerification) -> bool:
    return check.passes(result) if check.passes is not None else _failing(check, result) == 0


def _failing(check: _Check, result: TableVerification) -> int:
    return sum(getattr(counts, kind) for counts in result.columns.values() for kind in check.kinds)
