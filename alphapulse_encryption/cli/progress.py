"""A progress bar at the terminal, fed from the bookkeeping: it shows runs of the UI's just as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from alphapulse_encryption.background import in_background
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.cli.console import Terminal
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.bookkeeping.ranges import rows_done, waiting_for
from alphapulse_encryption.migration.bookkeeping.verifications import rows_verified
from alphapulse_encryption.migration.postgres.build_progress import build_waits_for, under_way
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer

# What the bar shows now, by the names of rich's ``Progress.update``.
Look = Callable[[Connection], dict[str, Any]]
# Begins to look, at some tables.
Begin = Callable[[Connection, Sequence[Table]], Look]

_SECONDS_BETWEEN_LOOKS = 0.2

_ESTIMATE = """
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN unnest(%s::text[], %s::text[]) AS t (schema, name) ON n.nspname = t.schema AND c.relname = t.name
"""


def backfilled(connection: Connection, tables: Sequence[Table]) -> Look:
    """Counts rows encrypted since now, of those that were not."""
    before = rows_done(connection, tables, backfilled=True)
    return _counting(
        lambda now: rows_done(now, tables, backfilled=True) - before, _rows(connection, tables) - before
    )


def worked_on(connection: Connection, tables: Sequence[Table]) -> Look:
    """Counts rows to which an operation other than the backfill was done since now."""
    before = rows_done(connection, tables, backfilled=False)
    return _counting(lambda now: rows_done(now, tables, backfilled=False) - before, _rows(connection, tables))


def verified(connection: Connection, tables: Sequence[Table]) -> Look:
    """Counts rows verified since now."""
    since = answer(connection, "SELECT clock_timestamp()")
    return _counting(lambda now: rows_verified(now, tables, since), _rows(connection, tables))


def _counting(done: Callable[[Connection], int], total: int) -> Look:
    def look(connection: Connection) -> dict[str, Any]:
        rows, reason = done(connection), waiting_for(connection)
        how = f", holding back: {reason}" if reason else ""
        return {"how": how, "completed": rows, "total": max(total, rows) or None}

    return look


def _rows(connection: Connection, tables: Sequence[Table]) -> int:
    names = [[table.schema_name for table in tables], [table.name for table in tables]]
    return int(answer(connection, _ESTIMATE, *names))


def built(_: Connection, tables: Sequence[Table]) -> Look:
    """Tells how far index builds or ANALYZE are, and whom they wait for."""

    def look(connection: Connection) -> dict[str, Any]:
        doing = build_waits_for(connection, tables) or "".join(under_way(connection, tables) or ())
        return {"how": f": {doing}" if doing else ""}

    return look


@contextmanager
def progress_bar(
    what: str, database: Database, tables: Sequence[Table], begin: Begin, console: Console | None = None
) -> Iterator[None]:
    """Show on standard error how far something is while the block runs; nothing where that is not a terminal.

    It is looked at over a connection of its own.
    """
    console = console or Terminal(stderr=True)
    if not console.is_terminal:
        yield
        return
    figures = (BarColumn(), MofNCompleteColumn(), _RowsPerSecond(), TimeRemainingColumn())
    columns = (TimeElapsedColumn(),) if begin is built else figures
    text = TextColumn("{task.description}{task.fields[how]}")
    bar = Progress(text, *columns, console=console, transient=True)

    def watch(done: threading.Event) -> None:
        # A bar is a courtesy: that the step cannot be watched must not end the step.
        with suppress(MigrationError), database.session("watch the progress") as connection:
            look = begin(connection, tables)
            task = bar.add_task(what, total=None, how="")
            ended = False
            while not ended:
                ended = done.wait(_SECONDS_BETWEEN_LOOKS)
                bar.update(task, **look(connection))

    with bar, in_background(watch, name="progress"):
        yield


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} rows/s" if speed else "... rows/s")
