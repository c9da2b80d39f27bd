"""Results of verifications, by batch range, and of counting a table's rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.bookkeeping.evidence import ROW_COUNT, VERIFICATION
from alphapulse_encryption.migration.bookkeeping.ranges import BatchRange
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer

# A result older than this has to be renewed before anything relies on it.
FRESH_FOR = timedelta(days=7)
# Transactions are told apart over a distance of 2^31 (PostgreSQL manual, 24.1.5); half of it leaves a margin.
MOST_TRANSACTIONS = 2**30


def keep_verification(
    connection: Connection,
    keys: KeyRing,
    actor: Actor,
    table: Table,
    batch_range: BatchRange,
    *,
    verified_at: datetime,
    since: str,
    definition: str,
    rows: int,
    columns: Mapping[str, Mapping[str, Any]],
    offenders: Sequence[Mapping[str, Any]],
) -> None:
    """Keep what the verification of a range found, in place of what an earlier one did; never a value.

    Args:
        since: the oldest transaction under way when it began.
        definition: fingerprint of the table's definition.
    """
    number = batch_range.number
    with connection.transaction():
        evidence.keep(
            *(connection, keys, actor, VERIFICATION),
            {
                **{
                    "table_name": table.key,
                    "batch_range": number,
                    "verified_at": verified_at,
                    "since": since,
                },
                **{"definition": definition, "key_check": keys.check_value(keys.current_version)},
                **{"row_count": rows, "columns": columns, "offenders": offenders, "run_id": actor.run_id},
            },
            also=[batch_range.lower, batch_range.upper],
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
        genuine: whether it is the newest that the audit log knows, with a MAC of this range as it is planned.
        entry: number of that entry.
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
    genuine: bool
    entry: int | None
    lower: Sequence[str] | None
    upper: Sequence[str] | None


_KEPT = """
SELECT batch_range, v.verified_at, v.row_count, coalesce(v.columns, '{}'), coalesce(v.offenders, '[]'), held.same,
       held.same AND v.since IS NOT NULL, v.since::text::bigint,
       v.verified_at > clock_timestamp() - %(fresh_for)s
         AND pg_snapshot_xmax(pg_current_snapshot())::text::bigint - v.since::text::bigint
             BETWEEN 0 AND %(most_transactions)s,
       coalesce(v.number = log.newest AND v.mac IS NOT NULL, false), v.number, r.lower_key, r.upper_key, to_jsonb(v)
  FROM alphapulse_encryption.ranges r LEFT JOIN alphapulse_encryption.verifications v USING (table_name, batch_range)
 CROSS JOIN LATERAL (SELECT v.definition = %(definition)s AND v.key_check = %(key_check)s AS same) AS held
  LEFT JOIN (SELECT details ->> 'batch_range' AS about, max(id) AS newest FROM alphapulse_encryption.audit_log
              WHERE table_name = %(table)s AND action = %(action)s GROUP BY 1) AS log ON about = batch_range::text
 WHERE table_name = %(table)s ORDER BY batch_range
"""


def kept_verifications(
    connection: Connection, table: Table, definition: str, key_check: str, keys: KeyRing | None
) -> list[KeptVerification]:
    """What is kept of each planned range, held against a definition and a key.

    Args:
        keys: None for a look by who has no key: the MACs are not checked then.
    """
    parameters = {
        "definition": definition,
        "key_check": key_check,
        "fresh_for": FRESH_FOR,
        "most_transactions": MOST_TRANSACTIONS,
        "table": table.key,
        "action": VERIFICATION.action,
    }
    found = connection.execute(_KEPT, parameters).fetchall()
    kept = [KeptVerification(*row) for *row, _ in found]
    if keys is None:
        return kept
    there = [
        (one.number, row[-1], [one.lower, one.upper])
        for one, row in zip(kept, found, strict=True)
        if one.genuine
    ]
    signed = evidence.are_genuine(connection, keys, VERIFICATION, [rest for _, *rest in there])
    genuine = {number for (number, *_), yes in zip(there, signed, strict=True) if yes}
    return [replace(one, genuine=one.number in genuine) for one in kept]


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
    keys: KeyRing,
    actor: Actor,
    table: Table,
    *,
    counted_at: datetime,
    since: int,
    rows: int,
    verified: int,
    missing: int,
    entries: Sequence[int | None],
) -> None:
    """Keep how many rows a table has, beside those that were verified since a transaction.

    Args:
        entries: of the audit log, of the verifications that they are held against.
    """
    with connection.transaction():
        evidence.keep(
            *(connection, keys, actor, ROW_COUNT),
            {
                **{"table_name": table.key, "counted_at": counted_at, "since": str(since), "row_count": rows},
                **{"verified_count": verified, "missing_count": missing, "run_id": actor.run_id},
            },
            also=entries,
        )


def missing_rows(
    connection: Connection, table: Table, since: int, entries: Sequence[int | None], keys: KeyRing | None
) -> int | None:
    """How many rows these verifications did not reach; None where nobody counted.

    Args:
        keys: as :func:`kept_verifications` has it.
    """
    of_since = "table_name = %s AND since = %s::xid8"
    for row in evidence.read(connection, ROW_COUNT, of_since, table.key, str(since)):
        if row["number"] != evidence.newest(connection, ROW_COUNT, table.key):
            return None
        if keys is None or all(evidence.are_genuine(connection, keys, ROW_COUNT, [(row, entries)])):
            return int(row["missing_count"])
    return None
