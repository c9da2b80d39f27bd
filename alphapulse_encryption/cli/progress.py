"""A progress bar at the terminal, fed from the bookkeeping: it shows runs of the UI's just as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import psycopg
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

from alphapulse_encryption.beside import beside
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.bookkeeping.ranges import rows_done, waiting_for
from alphapulse_encryption.migration.bookkeeping.verifications import rows_verified
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.postgres.waits import build_waits_for, under_way

Connection = psycopg.Connection[Any]
# Rows done and rows in all, since the beginning of the bar.
Count = Callable[[Connection], tuple[int, int]]

_SECONDS_BETWEEN_LOOKS = 0.2

_ESTIMATE = """
SELECT coalesce(sum(greatest(c.reltuples, 0)), 0)::bigint
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN unnest(%s::text[], %s::text[]) AS t (schema, name) ON n.nspname = t.schema AND c.relname = t.name
"""


def backfilled(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows encrypted since now, of those that were not."""
    return _counting(
        tables, lambda connection, _: rows_done(connection, tables, backfilled=True), all_rows=False
    )


def worked_on(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows to which an operation other than the backfill was done since now."""
    return _counting(tables, lambda connection, _: rows_done(connection, tables, backfilled=False))


def verified(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows verified since now."""
    return _counting(tables, lambda connection, since: rows_verified(connection, tables, since))


def _counting(
    tables: Sequence[Table], done: Callable[[Connection, datetime], int], *, all_rows: bool = True
) -> Callable[[Connection], Count]:
    def begin(connection: Connection) -> Count:
        since = connection.execute("SELECT clock_timestamp()").fetchall()[0][0]
        before = done(connection, since)
        names = [[table.schema_name for table in tables], [table.name for table in tables]]
        estimate = int(connection.execute(_ESTIMATE, names).fetchall()[0][0])
        total = estimate if all_rows else max(estimate - before, 0)
        return lambda connection: (done(connection, since) - before, total)

    return begin


@contextmanager
def index_builds(
    database: Database,
    tables: Sequence[Table],
    console: Console | None = None,
    what: str = "building indexes",
) -> Iterator[None]:
    """Show how far index builds or ANALYZE are, and whom they wait for, while the block runs."""

    def look(connection: Connection, bar: Progress, done: threading.Event) -> None:
        task = bar.add_task(what, total=None)
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            doing = build_waits_for(connection, tables) or "".join(under_way(connection, tables) or ())
            bar.update(task, description=f"{what}: {doing}" if doing else what)

    with _watching(database, (TextColumn("{task.description}"), TimeElapsedColumn()), look, console):
        yield


@contextmanager
def progress_bar(
    what: str, database: Database, begin: Callable[[Connection], Count], console: Console | None = None
) -> Iterator[None]:
    """Show a bar with rate and time left while the block runs."""

    def look(connection: Connection, bar: Progress, done: threading.Event) -> None:
        count = begin(connection)
        task = bar.add_task(what, total=None)
        ended = False
        while not ended:
            ended = done.wait(_SECONDS_BETWEEN_LOOKS)
            rows, total = count(connection)
            label = f"{what}, holding back: {reason}" if (reason := waiting_for(connection)) else what
            bar.update(task, description=label, completed=rows, total=max(total, rows) or None)

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RowsPerSecond(),
        TimeRemainingColumn(),
    )
    with _watching(database, columns, look, console):
        yield


@contextmanager
def _watching(
    database: Database,
    columns: Sequence[ProgressColumn],
    look: Callable[[Connection, Progress, threading.Event], None],
    console: Console | None,
) -> Iterator[None]:
    """Look over a connection of its own, and show it on standard error; nothing where that is not a terminal."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    bar = Progress(*columns, console=console, transient=True)

    def watch(done: threading.Event) -> None:
        # A bar is a courtesy: that the step cannot be watched must not end the step.
        with suppress(MigrationError), database.session("watch the progress") as connection:
            look(connection, bar, done)

    with bar, beside(watch, name="progress"):
        yield


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} rows/s" if speed else "... rows/s")
