"""A progress bar at the terminal, fed from the bookkeeping: it shows runs of the UI's just as well."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
_BACKFILLED = (
    "SELECT coalesce(sum(rows_processed), 0)::bigint FROM public.encryption_ranges WHERE table_name = ANY(%s)"
)
_ROTATED = (
    "SELECT coalesce(sum(rows_processed), 0)::bigint FROM public.encryption_rotation_ranges "
    "WHERE table_name = ANY(%s)"
)
_VERIFIED = (
    "SELECT coalesce(sum(row_count), 0)::bigint FROM public.encryption_verifications "
    "WHERE table_name = ANY(%s) AND verified_at >= %s"
)


def backfilled(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows encrypted since now."""

    def begin(connection: Connection) -> Count:
        before = _number(connection, _BACKFILLED, [[table.key for table in tables]])
        total = max(_estimate(connection, tables) - before, 0)

        def count(connection: Connection) -> tuple[int, int]:
            return _number(connection, _BACKFILLED, [[table.key for table in tables]]) - before, total

        return count

    return begin


def rotated(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows encrypted again since now."""
    keys = [table.key for table in tables]

    def begin(connection: Connection) -> Count:
        before = _number(connection, _ROTATED, [keys])
        total = _estimate(connection, tables)

        def count(connection: Connection) -> tuple[int, int]:
            return _number(connection, _ROTATED, [keys]) - before, total

        return count

    return begin


def verified(tables: Sequence[Table]) -> Callable[[Connection], Count]:
    """Counts rows verified since now."""

    def begin(connection: Connection) -> Count:
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        started = row[0] if row is not None else None
        total = _estimate(connection, tables)

        def count(connection: Connection) -> tuple[int, int]:
            return _number(connection, _VERIFIED, [[table.key for table in tables], started]), total

        return count

    return begin


@contextmanager
def index_builds(
    database: Database,
    tables: Sequence[Table],
    console: Console | None = None,
    what: str = "building indexes",
) -> Iterator[None]:
    """Show how far index builds or ANALYZE are, and whom they wait for, while the block runs.

    Nothing is shown where the output is not a terminal.

    Args:
        database: asked over a connection of its own.
        tables: whose indexes are built.
        console: where to show it; standard error where None.
        what: for the label.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    bar = Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
    done = threading.Event()
    watcher = threading.Thread(target=_watch_builds, args=(what, database, tables, bar, done), daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _watch_builds(
    what: str, database: Database, tables: Sequence[Table], bar: Progress, done: threading.Event
) -> None:
    task = bar.add_task(what, total=None)
    try:
        with database.session("watch the index builds") as connection:
            while not done.wait(_SECONDS_BETWEEN_LOOKS):
                doing = build_waits_for(connection, tables) or under_way(connection, tables)
                bar.update(task, description=what if doing is None else f"{what}: {doing}")
    except MigrationError:
        return


def _reason(connection: Connection) -> str | None:
    row = connection.execute(
        "SELECT string_agg(DISTINCT waiting_for, '; ') FROM (SELECT waiting_for FROM public.encryption_ranges "
        "UNION ALL SELECT waiting_for FROM public.encryption_rotation_ranges) AS ranges WHERE waiting_for IS NOT NULL"
    ).fetchone()
    return row[0] if row is not None else None


def _estimate(connection: Connection, tables: Sequence[Table]) -> int:
    return _number(connection, _ESTIMATE, [[t.schema_name for t in tables], [t.name for t in tables]])


def _number(connection: Connection, query: str, parameters: list[Any]) -> int:
    row = connection.execute(query.encode(), parameters).fetchone()
    return int(row[0]) if row is not None else 0


class _RowsPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f} rows/s" if speed else "... rows/s")


@contextmanager
def progress_bar(
    what: str, database: Database, begin: Callable[[Connection], Count], console: Console | None = None
) -> Iterator[None]:
    """Show a bar with rate and time left while the block runs; nothing where the output is not a terminal.

    Args:
        what: for the label.
        database: asked for the progress, over a connection of its own.
        begin: what to count.
        console: where to show it; standard error where None.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RowsPerSecond(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(what, database, begin, bar, done), daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()


def _watch(
    what: str, database: Database, begin: Callable[[Connection], Count], bar: Progress, done: threading.Event
) -> None:
    # A bar is a courtesy: that the step cannot be watched must not end the step.
    try:
        with database.session("watch the progress") as connection:
            count = begin(connection)
            task = bar.add_task(what, total=None)
            while True:
                ended = done.wait(_SECONDS_BETWEEN_LOOKS)
                rows, total = count(connection)
                label = f"{what}, holding back: {reason}" if (reason := _reason(connection)) else what
                bar.update(task, description=label, completed=rows, total=max(total, rows) or None)
                if ended:
                    return
    except MigrationError:
        return
