"""Rows that an operation could not do: set aside by key and reason, never by value, so that all others go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.bookkeeping.ranges import Key, Step
from alphapulse_encryption.migration.postgres.database import Connection, answer

# So many are named in a message; all of them are in the table.
NAMED = 10


@dataclass(frozen=True)
class Quarantined:
    """A row that could not be done; the reason is what the server or the cipher said, without values."""

    key: Key
    reason: str
    since: datetime

    def __str__(self) -> str:
        return f"key ({', '.join(self.key)}): {self.reason}"


def quarantine(
    connection: Connection,
    table: Table,
    number: int,
    key: Key,
    reason: str,
    run_id: str | None,
    step: Step = "backfill",
) -> None:
    """Set a row aside."""
    connection.execute(
        "INSERT INTO alphapulse_encryption.quarantine (table_name, batch_range, key, step, reason, run_id) "
        "VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (table_name, key, step) DO UPDATE "
        "SET batch_range = excluded.batch_range, reason = excluded.reason, since = excluded.since, "
        "run_id = excluded.run_id",
        [table.key, number, list(key), step, reason, run_id],
    )


def release(
    connection: Connection, table: Table, number: int | None = None, step: Step | None = None
) -> None:
    """Forget what was set aside of a table, or by a step of a range: it is tried again from now on."""
    connection.execute(
        "DELETE FROM alphapulse_encryption.quarantine WHERE table_name = %s "
        "AND (%s::int IS NULL OR batch_range = %s) AND (%s::text IS NULL OR step = %s)",
        [table.key, number, number, step, step],
    )


def read_quarantine(
    connection: Connection, table: Table, number: int | None = None, *, step: Step = "backfill"
) -> tuple[Quarantined, ...]:
    """What a step has set aside of a table, or of one of its ranges."""
    rows = connection.execute(
        "SELECT key, reason, since FROM alphapulse_encryption.quarantine "
        "WHERE table_name = %s AND (%s::int IS NULL OR batch_range = %s::int) AND step = %s ORDER BY since, key",
        [table.key, number, number, step],
    ).fetchall()
    return tuple(Quarantined(tuple(key), reason, since) for key, reason, since in rows)


def quarantined(connection: Connection, table: Table) -> int:
    """How often rows of a table are set aside now."""
    query = "SELECT count(*) FROM alphapulse_encryption.quarantine WHERE table_name = %s"
    return int(answer(connection, query, table.key))


def quarantined_for(
    connection: Connection, table: Table, limit: timedelta
) -> list[tuple[str, int, datetime]]:
    """Step, number of rows and the oldest moment, where a step has set rows aside for longer than a time."""
    return connection.execute(
        "SELECT step, count(*), min(since) FROM alphapulse_encryption.quarantine WHERE table_name = %s "
        "GROUP BY step HAVING min(since) < clock_timestamp() - %s ORDER BY step",
        [table.key, limit],
    ).fetchall()


def named(rows: Sequence[object]) -> str:
    """The first of them, for a message."""
    text = "; ".join(str(row) for row in rows[:NAMED])
    return f"{text}; and {len(rows) - NAMED} more" if len(rows) > NAMED else text
