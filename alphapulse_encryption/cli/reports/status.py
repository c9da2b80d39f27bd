"""``--status``: where the migration stands, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.cli.reports.terminal import grid, moment, seconds
from alphapulse_encryption.migration.insight.status import Pending, Status, TableStatus, read_status
from alphapulse_encryption.migration.postgres.database import Database

SECONDS_BETWEEN_LOOKS = 2.0
SHOWN_APPROVALS = 10


def watch(
    database: Database,
    catalogue: Catalogue,
    tables: Sequence[str],
    out: Console,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the status again and again, until somebody presses Ctrl-C.

    Raises:
        MigrationError: the first look failed, or a later one.
    """
    now = before = read_status(database, catalogue, tables)
    # One picture in the place of the other at a terminal, and one below the other elsewhere.
    live = Live(console=out, auto_refresh=False, screen=True) if out.is_terminal else None
    try:
        with live or nullcontext():
            while True:
                shown = _pictured(now.with_rates_since(before))
                if live is not None:
                    live.update(shown, refresh=True)
                else:
                    out.print(shown)
                    out.file.flush()
                before = now
                sleep(SECONDS_BETWEEN_LOOKS)
                now = read_status(database, catalogue, tables)
    except KeyboardInterrupt:
        return


def show_status(status: Status, out: Console) -> None:
    """Print it for a person."""
    out.print(_pictured(status))


def _pictured(status: Status) -> RenderableType:
    parts: list[RenderableType] = [
        *(_headline(status), "", _tables(status)),
        *(line for table in status.tables for line in _remarks(table)),
        *(("", _columns(status)) if status.begun else ()),
        *_others(status),
    ]
    return Group(*(Text(part) if isinstance(part, str) else part for part in parts))


def _headline(status: Status) -> str:
    done = sum(table.verification is not None and table.verification.valid for table in status.tables)
    words = [f"{moment(status.at)}: {done} of {len(status.tables)} tables verified"]
    if not status.begun:
        words.append("nothing was begun in this database")
    if status.paused:
        words.append("PAUSED (--resume lets backfills go on)")
    working = [worker for worker in status.workers if worker.table is not None]
    words.append(f"{len(working)} batch ranges are worked on" if working else "nobody works on a batch range")
    return "; ".join(words)


def _tables(status: Status) -> RenderableType:
    shown = grid(
        "table", "right side", ">rows", ">pending", ">ranges", ">rows/s", ">left", "verified", "backup"
    )
    for table in status.tables:
        shown.add_row(
            table.table,
            f"{table.authority} is right" if table.stage == "columns" else table.stage,
            f"{table.rows:,}",
            _pending(table.pending),
            f"{table.ranges.completed}/{table.ranges.total}" if table.ranges.total else "-",
            f"{table.rows_per_second:,.0f}" if table.rows_per_second else "-",
            seconds(table.seconds_left) if table.seconds_left is not None else "-",
            _verified(table),
            seconds(table.backup.age_seconds) + " old" if table.backup is not None else "none",
        )
    return shown


def _pending(pending: Pending) -> str:
    if pending.how == "not visible to this role":
        return "not visible"
    if pending.rows is None:
        return "-"
    sign = {"counted": "", "at least": "> ", "estimated": "~"}[pending.how]
    return f"{sign}{pending.rows:,}"


def _verified(table: TableStatus) -> str:
    if table.verification is None:
        return "no"
    return moment(table.verification.verified_at) if table.verification.valid else "no longer"


def _remarks(table: TableStatus) -> list[str]:
    lines = [f"! {table.table}: invalid index {told}" for told in table.invalid_indexes]
    if table.problem:
        lines.append(f"✗ {table.problem}")
    if table.pending.how == "not visible to this role":
        lines.append(f"! {table.table}: pending rows are not visible to this role")
    for one in table.active:
        sign = "•" if one.status in ("running", "holding back") else "!"
        told = f"{sign} {table.table}, range {one.number:02d}: {one.status}, {one.rows:,} rows"
        told += f"; waits for: {one.waiting_for}" if one.waiting_for else ""
        lines.append(
            told + (f"; {one.error_message}" if one.error_message and one.status == "failed" else "")
        )
    if table.rotating_to is not None:
        lines.append(f"• {table.table}: being encrypted again under key version {table.rotating_to}")
    if table.quarantined:
        lines.append(
            f"! {table.table}: {table.quarantined:,} rows are set aside (alphapulse_encryption.quarantine)"
        )
    if table.verification is not None and not table.verification.valid:
        lines += [f"! {table.table}: {reason}" for reason in table.verification.reasons]
    return lines


def _columns(status: Status) -> RenderableType:
    shown = grid("column", "status", ">values encrypted", ">pending", "verified", "completed")
    for table in status.tables:
        for column in table.columns:
            shown.add_row(
                f"{table.table}.{column.name}",
                column.status,
                f"{column.records_processed:,}",
                "-" if column.pending is None else f"{column.pending:,}",
                "yes" if column.verified else "no",
                moment(column.completed_at),
            )
    return shown


def _others(status: Status) -> list[str]:
    lines = [
        f"approval {one.id} of {one.table}: {one.state}, given by {one.approver} ({one.database_role}), until "
        f"{moment(one.expires_at)}" + (f"; changed since: {', '.join(one.changed)}" if one.changed else "")
        for one in status.approvals[:SHOWN_APPROVALS]
    ]
    if len(status.approvals) > SHOWN_APPROVALS:
        lines.append(f"and {len(status.approvals) - SHOWN_APPROVALS} approvals more (--approvals)")
    lines += [
        f"key version {one.number}: {one.state}, since {moment(one.since)}" for one in status.key_versions
    ]
    if status.key_usage:
        most = max(status.key_usage, key=lambda usage: usage.messages)
        lines.append(
            f"key usage: at most {most.messages:,} values under one key ({most.context}, version "
            f"{most.key_version}; {most.share:.4%} of 2^32)"
        )
    lines += [
        f"session {one.pid} ({one.role}) "
        + (f"works on {one.table}, range {one.range:02d}" if one.table is not None else "is connected")
        + (
            f", in a transaction begun {seconds(max(0.0, (status.at - one.since).total_seconds()))} ago"
            if one.since is not None
            else ""
        )
        for one in status.workers
    ]
    lines += [f"not visible to the role {status.role}: {what}" for what in status.not_visible]
    return ["", *lines] if lines else []
