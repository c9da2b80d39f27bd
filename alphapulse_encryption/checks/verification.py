"""The checks that ``verified_table`` carries.

Dagster keeps one evaluation per check and asset, whatever partitions a run had. So each is evaluated over all
tables that were begun, not over those of the run: the last run does not hide what another one found.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import dagster as dg

from alphapulse_encryption.migration.verify import TableVerification

ASSET = "verified_table"


@dataclass(frozen=True)
class _Check:
    name: str
    description: str
    kinds: tuple[str, ...] = ()


_CHECKS = (
    _Check("every_range_verified", "Every batch range was verified, with this definition and this key."),
    _Check("nothing_pending", "No plaintext waits for its ciphertext or token.", ("pending",)),
    _Check(
        "every_value_matches",
        "Every ciphertext decrypts to its plaintext.",
        ("mismatched", "undecryptable"),
    ),
    _Check("every_token_matches", "Every search token is that of its value.", ("token_mismatched",)),
)


def specs() -> list[dg.AssetCheckSpec]:
    """The checks' specifications."""
    return [dg.AssetCheckSpec(check.name, asset=ASSET, description=check.description) for check in _CHECKS]


def evaluate(results: Mapping[str, TableVerification]) -> Iterator[dg.AssetCheckResult]:
    """Evaluate every check over the tables' results, by table."""
    for check in _CHECKS:
        bad = [table for table, result in results.items() if not _passes(check, result)]
        yield dg.AssetCheckResult(
            check_name=check.name,
            asset_key=ASSET,
            passed=not bad,
            metadata={"tables_failing": bad, "tables_looked_at": list(results)},
        )


def _passes(check: _Check, result: TableVerification) -> bool:
    if not check.kinds:
        return result.verified_at is not None
    return all(getattr(counts, kind) == 0 for counts in result.columns.values() for kind in check.kinds)
