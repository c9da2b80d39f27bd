"""What has waited too long: pending rows, rows set aside, backfills that stand still, keys, approvals."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.lifecycle import State
from alphapulse_encryption.migration.bookkeeping.approvals import Approval, list_approvals
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import key_versions
from alphapulse_encryption.migration.bookkeeping.quarantine import quarantined_for
from alphapulse_encryption.migration.bookkeeping.ranges import backfill_progress
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.bookkeeping.usage import read_usage
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer
from alphapulse_encryption.migration.rows.batches import plan_by_key
from alphapulse_encryption.migration.rows.catch_up import has_pending_index
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import read_table

# Beyond it nobody needs to know how many rows exactly.
COUNTED = 10_000
# An approval that ends soon is told of once more, in time to use it.
EXPIRES_SOON = timedelta(hours=2)
# An approval that ended unused is told of for so long.
EXPIRED_RECENTLY = timedelta(hours=24)


@dataclass(frozen=True)
class Mark:
    """A moment in the database's own reckoning."""

    at: datetime
    # The oldest one under way then; a row of an older number was written before, and not since.
    transaction: int


def current_mark(database: Database) -> Mark:
    with database.session("look at the clock") as connection:
        at, transaction = connection.execute(
            "SELECT clock_timestamp(), pg_snapshot_xmin(pg_current_snapshot())::text"
        ).fetchall()[0]
        return Mark(at, int(transaction))


def old_pending_rows(
    database: Database, tables: Iterable[Table], mark: Mark | None, limit: timedelta
) -> list[Alert]:
    """Rows that have waited for their ciphertext for longer than a limit.

    How old a pending row is, the bookkeeping does not know: it is pending from the application's write on. So its last
    write counts, told by the transaction's number against a mark that was taken that long ago. A row that is written
    again and again without ever being encrypted looks younger than it is.

    Args:
        mark: one of at least ``limit`` ago; None where there is none yet, and pending rows are not looked for.

    Raises:
        RefusedError: another session holds a table exclusively.
    """
    with database.session("look for old pending rows") as connection:
        if not bookkeeping_exists(connection):
            return []
        plan_by_key(connection)
        found: list[Alert] = []
        for table in tables:
            state = table_state(connection, table)
            if state is None or state.state is State.REVERTED or not state.state.has_both_sides:
                continue
            backfill = backfill_progress(connection, table, limit)
            under_way = backfill.completed < backfill.ranges and backfill.waiting < backfill.ranges
            if under_way and backfill.still:
                found.append(
                    Alert(
                        f"{table.key}: backfill that stands still",
                        f"The backfill of {table.key} has not moved for longer than {_span(limit)}: "
                        f"{backfill.completed} of {backfill.ranges} batch ranges are done"
                        f"{f'; it holds back: {backfill.reason}' if backfill.reason else ''}.",
                        key=f"unfinished:{table.key}",
                        remedy=f"Go on with --migrate-data --table {table.key}; --settings shows whether it is paused.",
                        since=backfill.moved,
                    )
                )
            elif mark is not None and not under_way:
                found += _unchanged(connection, table, mark, limit)
            found += _set_aside(connection, table, limit)
        return found


def _unchanged(connection: Connection, table: Table, mark: Mark, limit: timedelta) -> Iterator[Alert]:
    try:
        definition = read_table(connection, table, look=True)
    except ConfigurationError:
        # Missing, or not as catalogued: that is drift, and told of as such.
        return
    if not has_pending_index(connection, definition):
        return
    since = str(mark.transaction)
    rows = answer(connection, sql.count_pending_unchanged(definition), since, COUNTED + 1)
    if not rows:
        return
    how_many = f"more than {COUNTED:,} rows" if rows > COUNTED else f"{rows:,} row{'s' if rows > 1 else ''}"
    yield Alert(
        f"{table.key}: rows that wait for their ciphertext",
        f"{how_many} of {table.key} wait{'' if rows > 1 else 's'} for ciphertext, for longer than {_span(limit)}.",
        key=f"old:{table.key}",
        remedy=f"Run --migrate-data --table {table.key}; the sensor pending_rows, once started, does so by itself.",
        since=mark.at,
    )


# What could not be done, and what does it again.
_STEPS = {
    "backfill": ("backfill", "encrypt", "--migrate-data"),
    "rotate": ("rotation", "encrypt", "--rotate-keys"),
    "decrypt": ("way back", "decrypt", "--revert-to-plaintext, or --restore-plaintext,"),
    "discard": ("new try", "clear", "--add-columns"),
    "repair": ("repair", "clear", "--repair-mismatched"),
}


def _set_aside(connection: Connection, table: Table, limit: timedelta) -> Iterator[Alert]:
    for step, count, since in quarantined_for(connection, table, limit):
        what, does, again = _STEPS[step]
        rows, them = ("rows of {} were", "them") if count > 1 else ("row of {} was", "it")
        yield Alert(
            f"{table.key}: rows set aside",
            f"{count:,} {rows.format(table.key)} set aside: the {what} could not {does} {them}.",
            key=f"aside:{table.key}:{step}",
            remedy="alphapulse_encryption.quarantine names them by key and reason. Correct them, and run "
            f"{again} --table {table.key} again.",
            since=since,
        )


def keys_due(database: Database, rotate_after: timedelta) -> list[Alert]:
    """Derived keys near the number of messages that they may encrypt, and a current version that is old."""
    with database.session("look at the keys") as connection:
        usages = read_usage(connection)
        versions = key_versions(connection)
        now = answer(connection, "SELECT clock_timestamp()")
    retired = {version.number for version in versions if version.state == "retired"}
    rotate = "Rotate to a new key version (--rotate-keys; the README says in which order)."
    used = [
        Alert(
            f"key of {usage.context}, version {usage.key_version}: how often it was used",
            warning,
            key=f"usage:{usage.context}:{usage.key_version}",
            remedy=rotate,
            state="used up" if usage.used_up else "near",
        )
        for usage in usages
        if usage.key_version not in retired and (warning := usage.warning()) is not None
    ]
    old = [
        Alert(
            f"key version {version.number}: age",
            f"Key version {version.number} has been the current one for longer than {_span(rotate_after)}.",
            key=f"age:{version.number}",
            remedy=rotate,
            since=version.since,
        )
        for version in versions
        if version.state == "current" and now - version.since > rotate_after
    ]
    return [*used, *old]


def approvals_waiting(database: Database) -> list[Alert]:
    """Approvals of a drop that were not used: open, about to end, or just ended with no later one of the table."""
    with database.session("look at the approvals") as connection:
        approvals = list_approvals(connection)
        now = answer(connection, "SELECT clock_timestamp()")
    found: list[Alert] = []
    later: set[str] = set()
    for approval in approvals:
        ended = approval.state == "expired" and now - approval.expires_at < EXPIRED_RECENTLY
        if approval.is_open or (ended and approval.table not in later):
            found.append(_waiting(approval, now))
        later.add(approval.table)
    return found


def _waiting(approval: Approval, now: datetime) -> Alert:
    until = f"{approval.expires_at:%F %R} UTC"
    if approval.expired:
        state = "ended"
        message = f"Approval {approval.id} of the drop of {approval.table} has ended at {until}, unused."
        remedy = (
            f"If it is to go: verify, back up and approve again (--approve-drop --table {approval.table})."
        )
    else:
        soon = approval.expires_at - now < EXPIRES_SOON
        state = "ends soon" if soon else "open"
        message = (
            f"Approval {approval.id} of the drop of {approval.table} waits to be used"
            f"{', and ends soon, at' if soon else '; it ends at'} {until}."
        )
        remedy = (
            f"Use it (--drop-unencrypted --confirm --table {approval.table}), or take it back "
            f"(--revoke-approval {approval.id})."
        )
    return Alert(
        f"approval {approval.id} of the drop of {approval.table}",
        message,
        key=f"approval:{approval.id}",
        remedy=remedy,
        state=state,
        since=approval.approved_at,
        reminds=not approval.expired,
        ends_silently=approval.expired,
    )


def _span(length: timedelta) -> str:
    days, hours = divmod(length / timedelta(hours=1), 24)
    if days and not hours:
        return f"{int(days)} day{'s' if days > 1 else ''}"
    hours += 24 * days
    return f"{hours:g} hour{'' if hours == 1 else 's'}"
