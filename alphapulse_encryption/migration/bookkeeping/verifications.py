"""Results of verifications, by batch range, and of counting a table's rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Connection, answer

# A result older than this has to be renewed before anything relies on it.
FRESH_FOR = timedelta(days=7)
# Transactions are told apart over a distance of 2^31 (PostgreSQL manual, 24.1.5); half of it leaves a margin.
MOST_TRANSACTIONS = 2**30


def keep_verification(
    connection: Connection,
    table: Table,
    number: int,
    *,
    verified_at: datetime,
    since: str,
    definition: str,
    key_check: str,
    rows: int,
    columns: Mapping[str, Mapping[str, Any]],
    offenders: Sequence[Mapping[str, Any]],
    run_id: str | None,
) -> None:
    """Keep what the verification of a range found, in place of what an earlier one did; never a value.

    Args:
        since: the oldest transaction under way when it began.
        definition: fingerprint of the table's definition.
    """
    connection.execute(
        "INSERT INTO alphapulse_encryption.verifications "
        "(table_name, batch_range, verified_at, definition, key_check, row_count, columns, offenders, run_id, since) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s) "
        "ON CONFLICT (table_name, batch_range) DO UPDATE SET verified_at = excluded.verified_at, "
        "definition = excluded.definition, key_check = excluded.key_check, row_count = excluded.row_count, "
        "columns = excluded.columns, offenders = excluded.offenders, run_id = excluded.run_id, "
        "since = excluded.since",
        [
            *(table.key, number, verified_at, definition, key_check, rows),
            *(json.dumps(columns), json.dumps(offenders), run_id, since),
        ],
    )


@dataclass(frozen=True)
class KeptVerification:
    """What is kept of one planned range.

    Args:
        verified_at: None where it was never verified; nothing else is told then.
        same: whether definition and key are the ones asked for.
        current: and it is known since which transaction rows may have changed.
        since: the oldest transaction under way when it began.
        fresh: whether it is recent enough, in time and in transactions.
    """

    number: int
    verified_at: datetime | None
    rows: int
    columns: Mapping[str, Mapping[str, Any]]
    offenders: Sequence[Mapping[str, Any]]
    same: bool
    current: bool
    since: int
    fresh: bool


_KEPT = """
SELECT batch_range, v.verified_at, v.row_count, coalesce(v.columns, '{}'), coalesce(v.offenders, '[]'), held.same,
       held.same AND v.since IS NOT NULL, v.since::text::bigint,
       v.verified_at > clock_timestamp() - %(fresh_for)s
         AND pg_snapshot_xmax(pg_current_snapshot())::text::bigint - v.since::text::bigint
             BETWEEN 0 AND %(most_transactions)s
  FROM alphapulse_encryption.ranges r LEFT JOIN alphapulse_encryption.verifications v USING (table_name, batch_range)
 CROSS JOIN LATERAL (SELECT v.definition = %(definition)s AND v.key_check = %(key_check)s AS same) AS held
 WHERE table_name = %(table)s ORDER BY batch_range
"""


def kept_verifications(
    connection: Connection, table: Table, definition: str, key_check: str
) -> list[KeptVerification]:
    """What is kept of each planned range, held against a definition and a key."""
    parameters = {
        "definition": definition,
        "key_check": key_check,
        "fresh_for": FRESH_FOR,
        "most_transactions": MOST_TRANSACTIONS,
        "table": table.key,
    }
    return [KeptVerification(*row) for row in connection.execute(_KEPT, parameters)]


def forget_verifications(connection: Connection, table: Table, numbers: Sequence[int] | None = None) -> None:
    """The table, or these of its ranges, count as not verified from now on."""
    connection.execute(
        "DELETE FROM alphapulse_encryption.verifications "
        "WHERE table_name = %s AND (%s::int[] IS NULL OR batch_range = ANY (%s))",
        [table.key, numbers, numbers],
    )


def verified_ranges(connection: Connection, table: Table) -> tuple[int, datetime | None]:
    """How many ranges have a result, and when the oldest was verified."""
    ((ranges, oldest),) = connection.execute(
        "SELECT count(*), min(verified_at) FROM alphapulse_encryption.verifications WHERE table_name = %s",
        [table.key],
    )
    return ranges, oldest


def verified_otherwise(connection: Connection, table: Table, definition: str) -> datetime | None:
    """When a range was last verified under another definition of the table; None where none was."""
    verified_at: datetime | None = answer(
        connection,
        "SELECT max(verified_at) FROM alphapulse_encryption.verifications WHERE table_name = %s AND definition <> %s",
        *(table.key, definition),
    )
    return verified_at


def rows_verified(connection: Connection, tables: Sequence[Table], since: datetime) -> int:
    """Rows of the ranges that were verified since a moment."""
    query = (
        "SELECT coalesce(sum(row_count), 0)::bigint FROM alphapulse_encryption.verifications "
        "WHERE table_name = ANY(%s) AND verified_at >= %s"
    )
    return int(answer(connection, query, [table.key for table in tables], since))


def keep_row_count(
    connection: Connection,
    table: Table,
    *,
    counted_at: datetime,
    since: int,
    rows: int,
    verified: int,
    missing: int,
    run_id: str | None,
) -> None:
    """Keep how many rows a table has, beside those that were verified since a transaction."""
    connection.execute(
        "INSERT INTO alphapulse_encryption.row_counts "
        "(table_name, counted_at, since, row_count, verified_count, missing_count, run_id) "
        "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (table_name) DO UPDATE "
        "SET counted_at = excluded.counted_at, since = excluded.since, row_count = excluded.row_count, "
        "verified_count = excluded.verified_count, missing_count = excluded.missing_count, run_id = excluded.run_id",
        [table.key, counted_at, str(since), rows, verified, missing, run_id],
    )


def missing_rows(connection: Connection, table: Table, since: int) -> int | None:
    """How many rows the verification of that transaction did not reach; None where nobody counted."""
    missing: int | None = answer(
        connection,
        "SELECT missing_count FROM alphapulse_encryption.row_counts WHERE table_name = %s AND since = %s::xid8",
        *(table.key, str(since)),
    )
    return missing
