"""A progress bar at the terminal, fed from the bookkeeping: it shows runs of the UI's just as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
_BACKFILLED = """
SELECT coalesce(sum(rows_processed), 0)::bigint FROM public.encryption_ranges WHERE table_name = ANY(%(tables)s)
"""
_WORKED_ON = """
SELECT coalesce(sum(rows_processed), 0)::bigint FROM public.encryption_operations
 WHERE table_name = ANY(%(tables)s)
"""
_VERIFIED = """
SELECT coalesce(sum(row_count), 0)::bigint FROM public.encryption_verifications
 WHERE table_name = ANY(%(tables)s) AND verified_at >= %(since)s
"""


def backfilled(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows encrypted since now, of those that were not."""
    return _counting(tables, _BACKFILLED, all_rows=False)


def worked_on(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows to which an operation other than the backfill was done since now."""
    return _counting(tables, _WORKED_ON)


def verified(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows verified since now."""
    return _counting(tables, _VERIFIED)


def _counting(tables: Sequence[Table], query: str, *, all_rows: bool = True) -> Callable[[Connection], Count]:
    def begin(connection: Connection) -> Count:
        since = connection.execute("SELECT clock_timestamp()").fetchall()[0][0]
        asked = {"tables": [table.key for table in tables], "since": since}
        before = _number(connection, query, asked)
        names = [[table.schema_name for table in tables], [table.name for table in tables]]
        estimate = _number(connection, _ESTIMATE, names)
        total = estimate if all_rows else max(estimate - before, 0)
        return lambda connection: (_number(connection, query, asked) - before, total)

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
            doing = build_waits_for(connection, tables) or under_way(connection, tables)
            bar.update(task, description=what if doing is None else f"{what}: {doing}")

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
            label = f"{what}, holding back: {reason}" if (reason := _reason(connection)) else what
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


def _reason(connection: Connection) -> str | None:
    row = connection.execute(
        "SELECT string_agg(DISTINCT waiting_for, '; ') FROM (SELECT waiting_for FROM public.encryption_ranges "
        "UNION ALL SELECT waiting_for FROM public.encryption_operations) AS ranges WHERE waiting_for IS NOT NULL"
    ).fetchone()
    return row[0] if row is not None else None


def _number(connection: Connection, query: str, parameters: Mapping[str, object] | Sequence[object]) -> int:
    row = connection.execute(query.encode(), parameters).fetchone()
    return int(row[0]) if row is not None else 0


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} rows/s" if speed else "... rows/s")
