"""After the switch: what the statements on encrypted tables cost, as ``pg_stat_statements`` has counted it.

PostgreSQL manual, F.30 "pg_stat_statements"; of its columns only those that versions 14 to 18 have in common.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, LiteralString

import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.insight.statements import LONGEST_TEXT, Reader, Statement, TableName
from alphapulse_encryption.migration.postgres.database import OF_THIS_TOOL, Connection, Database, answer
from alphapulse_encryption.migration.schema.views import view_names

EXTENSION = "pg_stat_statements"
DEFAULT_LIMIT = 20
# Reading a statement takes about a millisecond; more than this many on a handful of tables are generated ones.
MOST_STATEMENTS = 2_000
LONGEST_SHOWN = 2_000
# A smaller table is read as a whole whatever indexes there are.
ROWS_WORTH_AN_INDEX = 10_000
# What is compared with an earlier look has to have happened often enough, and to differ by more than chance.
CALLS_TO_COMPARE = 10
WORSE_BY_FACTOR = 1.5
WORSE_BY_MILLISECONDS = 0.5


class NotCounted(ConfigurationError):
    """The server counts no statements: the extension is not installed, or not loaded."""


@dataclass(frozen=True)
class SlowQuery:
    """A statement, over all its calls.

    Args:
        query_id: a 64-bit number; text, because JSON's numbers are shorter.
        text: as the server normalised it; None where it may hold a value.
        tables: keys of the catalogue's tables that it names, by themselves or by their views.
        columns: the encrypted, search and plaintext columns that it names, as ``table.column``.
        own: whether it is of this tool.
        rows: returned or changed, by all calls together.
    """

    query_id: str
    text: str | None
    roles: tuple[str, ...]
    tables: tuple[str, ...]
    columns: tuple[str, ...]
    own: bool
    calls: int
    total_ms: float
    mean_ms: float
    max_ms: float
    rows: int
    hints: tuple[str, ...] = ()
    kind: str = "SELECT"

    @property
    def shown(self) -> str:
        if self.text is None:
            return f"{self.kind} on {', '.join(self.tables)} (text not shown: it may hold a value)"
        return self.text if len(self.text) <= LONGEST_SHOWN else self.text[:LONGEST_SHOWN] + " …"


@dataclass(frozen=True)
class SlowQueries:
    """What :func:`slow_queries` found: the application's statements and this tool's own, the longest mean time first.

    Args:
        since: what was counted since then; None where that is not known.
        hidden: how many statements of other roles this one may not read.
        left_out: how many statements were not looked at, because there are too many.
    """

    since: datetime | None
    queries: tuple[SlowQuery, ...]
    own: tuple[SlowQuery, ...]
    hidden: int
    left_out: int

    @property
    def worst_mean_ms(self) -> float:
        return self.queries[0].mean_ms if self.queries else 0.0

    def total_ms(self, table: str) -> float:
        return sum(query.total_ms for query in self.queries if table in query.tables)

    @property
    def remarks(self) -> tuple[str, ...]:
        told = []
        if self.hidden:
            told.append(
                f"{self.hidden} statements of other roles cannot be seen: GRANT pg_read_all_stats TO this role."
            )
        if self.left_out:
            told.append(
                f"{self.left_out} statements were not looked at: only the {MOST_STATEMENTS} that took longest were."
            )
        return tuple(told)


def slow_queries(database: Database, tables: Sequence[Table]) -> SlowQueries:
    """Read what the statements on these tables cost. Changes nothing.

    Raises:
        NotCounted: ``pg_stat_statements`` is not installed, or not loaded.
        RefusedError: the role may not read it.
    """
    with database.session("read pg_stat_statements") as connection:
        schema = _installed_in(connection)
        known = _relations(tables)
        reader = Reader(list(known), _names(connection))
        facts = {table.key: _facts(connection, table) for table in tables}
        rows, hidden = _statements(connection, schema, [relation.name for relation in known])
        found: list[SlowQuery] = []
        for query_id, text, roles, calls, total, longest, count in rows[:MOST_STATEMENTS]:
            if (statement := reader.read(text)) is None:
                continue
            own = OF_THIS_TOOL in text
            found.append(
                SlowQuery(
                    query_id=query_id,
                    text=statement.text,
                    kind=statement.kind,
                    roles=tuple(roles),
                    tables=tuple(sorted({known[name].key for name in statement.tables})),
                    columns=_columns(statement, known),
                    own=own,
                    calls=calls,
                    total_ms=total,
                    mean_ms=total / calls if calls else 0.0,
                    max_ms=longest,
                    rows=count,
                    hints=() if own else tuple(_hints(statement, known, facts)),
                )
            )
        since = _since(connection, schema)
    found.sort(key=lambda query: (-query.mean_ms, query.query_id))
    return SlowQueries(
        since=since,
        queries=tuple(query for query in found if not query.own),
        own=tuple(query for query in found if query.own),
        hidden=hidden,
        left_out=max(len(rows) - MOST_STATEMENTS, 0),
    )


def _installed_in(connection: Connection) -> str:
    row = connection.execute(
        "SELECT n.nspname, current_setting('pg_stat_statements.max', true) IS NOT NULL "
        "FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = %s",
        [EXTENSION],
    ).fetchone()
    if row is not None and row[1]:
        return str(row[0])
    loading = (
        f"set shared_preload_libraries = '{EXTENSION}' (after a comma, where there is something already) in "
        "postgresql.conf and restart the server; managed services have it in their parameter groups"
    )
    if row is not None:
        raise NotCounted(
            f"The extension {EXTENSION} is there, and the server has not loaded its library: {loading}."
        )
    raise NotCounted(
        f"The extension {EXTENSION} is not installed in this database: {loading}. Then run CREATE EXTENSION "
        f"{EXTENSION} there, as a superuser or the database's owner, and GRANT pg_read_all_stats to this role, so "
        "that it sees the statements of others."
    )


# What a role may not read has neither text nor number.
_STATEMENTS: LiteralString = """
SELECT s.queryid::text, min(s.query), array_agg(DISTINCT coalesce(r.rolname, '')), sum(s.calls)::bigint,
       sum(s.total_exec_time)::float8, max(s.max_exec_time)::float8, sum(s.rows)::bigint
  FROM {view} s JOIN pg_database d ON d.oid = s.dbid LEFT JOIN pg_roles r ON r.oid = s.userid
 WHERE d.datname = current_database() AND s.queryid IS NOT NULL AND length(s.query) <= %s
   AND EXISTS (SELECT FROM unnest(%s::text[]) AS t (name) WHERE strpos(lower(s.query), lower(t.name)) > 0)
 GROUP BY s.queryid ORDER BY 5 DESC, 1
"""
_HIDDEN: LiteralString = """
SELECT count(*) FROM {view} s JOIN pg_database d ON d.oid = s.dbid
 WHERE d.datname = current_database() AND s.queryid IS NULL
"""


def _statements(connection: Connection, schema: str, names: list[str]) -> tuple[list[tuple[Any, ...]], int]:
    view = Identifier(schema, EXTENSION)
    try:
        rows = connection.execute(SQL(_STATEMENTS).format(view=view), [LONGEST_TEXT, names]).fetchall()
        [(hidden,)] = connection.execute(SQL(_HIDDEN).format(view=view)).fetchall()
    except psycopg.errors.InsufficientPrivilege:
        raise RefusedError(
            f"This role may not read {schema}.{EXTENSION}. Let its owner run: GRANT USAGE ON SCHEMA {schema} and "
            f"GRANT SELECT ON {schema}.{EXTENSION}, and GRANT pg_read_all_stats, to this role."
        ) from None
    return rows, hidden


def _since(connection: Connection, schema: str) -> datetime | None:
    """When the counting began; a statement that came later, or was evicted meanwhile, is counted since then."""
    try:
        reset: datetime | None = answer(
            connection, SQL("SELECT stats_reset FROM {}").format(Identifier(schema, f"{EXTENSION}_info"))
        )
    except (psycopg.errors.UndefinedTable, psycopg.errors.InsufficientPrivilege):
        return None  # an extension that was not updated with its server
    return reset


def _relations(tables: Sequence[Table]) -> dict[TableName, Table]:
    """The tables and their compatibility views."""
    known = {}
    for table in tables:
        known[TableName(table.schema_name, table.name)] = table
        try:
            views = view_names(table)
        except ConfigurationError:
            continue  # too long a name has no views
        known |= {TableName(table.schema_name, view): table for view in views}
    return known


def _names(connection: Connection) -> set[str]:
    """Names of the database, which a statement may be shown with."""
    rows = connection.execute(
        "SELECT nspname::text FROM pg_namespace UNION SELECT relname FROM pg_class "
        "UNION SELECT attname FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped "
        "UNION SELECT proname FROM pg_proc UNION SELECT typname FROM pg_type UNION SELECT collname FROM pg_collation"
    )
    return {name for (name,) in rows}


@dataclass(frozen=True)
class _Facts:
    """What the hints depend on."""

    rows: float
    columns: frozenset[str]
    # First columns of valid indexes; None among them for an expression.
    leading: frozenset[str | None]
    switched: bool


_FACTS: LiteralString = """
SELECT CASE WHEN c.relkind = 'p' THEN coalesce((SELECT sum(greatest(l.reltuples, 0)) FROM pg_partition_tree(c.oid) p
                                                  JOIN pg_class l ON l.oid = p.relid WHERE p.isleaf), 0)
            ELSE greatest(c.reltuples, 0) END::float8,
       ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped),
       ARRAY(SELECT a.attname::text FROM pg_index x LEFT JOIN pg_attribute a ON a.attrelid = x.indrelid
                AND a.attnum = x.indkey[0] AND a.attnum > 0 WHERE x.indrelid = c.oid AND x.indisvalid)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s
"""


def _facts(connection: Connection, table: Table) -> _Facts:
    row = connection.execute(_FACTS, [table.schema_name, table.name]).fetchone()
    rows, columns, leading = row or (0.0, [], [])
    try:
        state = table_state(connection, table) if bookkeeping_exists(connection) else None
    except psycopg.errors.InsufficientPrivilege:
        state = None  # one who only watches: the hints are worded as before the switch
    switched = state is not None and state.authority == "ciphertext"
    return _Facts(rows, frozenset(columns), frozenset(leading), switched)


def _columns(statement: Statement, known: Mapping[TableName, Table]) -> tuple[str, ...]:
    named = {
        f"{known[name].key}.{column}" for name, column in statement.columns if column in _ours(known[name])
    }
    return tuple(sorted(named))


def _ours(table: Table) -> set[str]:
    return {name for column in table.columns for name in (column.name, column.encrypted, column.search)}


def _hints(statement: Statement, known: Mapping[TableName, Table], facts: Mapping[str, _Facts]) -> list[str]:
    """What can be said for certain. A view shows envelopes under the plaintext's name, so nothing is said of views."""
    hints: list[str | None] = []
    for use in sorted(statement.uses, key=lambda use: (use.column, use.how)):
        table = known[use.table]
        for column in table.columns if use.table.name == table.name else ():
            if use.column == column.encrypted:
                hints.append(_of_ciphertext(table, column, use.how))
            elif use.column == column.name and (use.table, column.search) not in statement.columns:
                hints.append(_of_plaintext(table, column, use.how, facts[table.key]))
    for name in statement.tables if statement.only_conditions else ():
        if name.name == known[name].name:
            hints.append(_of_index(known[name], statement.only_conditions, facts[known[name].key]))
    return [hint for hint in dict.fromkeys(hints) if hint is not None]


def _of_ciphertext(table: Table, column: Column, how: str) -> str:
    if how != "equality":
        return f"sorts or filters by the ciphertext of {table.key}.{column.encrypted}, which says nothing of its value"
    search = f"give {column.name} a search_index in the catalogue"
    return (
        f"compares {table.key}.{column.encrypted}, which is another text each time a value is encrypted and so "
        f"equals nothing: {f'ask {column.search} for its token' if column.searchable else search}"
    )


def _of_plaintext(table: Table, column: Column, how: str, facts: _Facts) -> str | None:
    if column.name not in facts.columns:
        return None
    when = f"which {'may be missing since' if facts.switched else 'it will not find after'} the switch"
    what = f"{table.key}.{column.name}"
    if how != "equality":
        return f"sorts or filters by {what}, the plaintext, {when}"
    if column.searchable:
        return f"reads {what} by equality and not {column.search}: the plaintext, {when}"
    return (
        f"reads {what} by equality, the plaintext, {when}; it is not searchable: give it a search_index in the "
        "catalogue"
    )


def _of_index(table: Table, conditions: frozenset[str], facts: _Facts) -> str | None:
    """Equalities on nothing but columns of the catalogue, none of which any index begins with."""
    beside_it = not conditions <= _ours(table) & facts.columns or facts.rows < ROWS_WORTH_AN_INDEX
    if beside_it or conditions & facts.leading or None in facts.leading:
        return None
    return (
        f"sequential scan expected: no index of {table.key} begins with {' or '.join(sorted(conditions))}, and it has "
        f"about {facts.rows:,.0f} rows"
    )


# Calls and total time in milliseconds by statement, to compare the next look with.
Snapshot = Mapping[str, tuple[int, float]]


def snapshot(found: SlowQueries) -> dict[str, tuple[int, float]]:
    return {query.query_id: (query.calls, query.total_ms) for query in found.queries}


@dataclass(frozen=True)
class Worse:
    """A statement that takes longer than before: mean times up to the last look and since, and the calls since."""

    query: SlowQuery
    before_ms: float
    now_ms: float
    calls: int

    def __str__(self) -> str:
        return (
            f"worse than last time: {self.now_ms:.1f} ms in {self.calls:,} calls since, {self.before_ms:.1f} ms "
            f"before: {self.query.shown}"
        )


def worse_than(found: SlowQueries, before: Snapshot) -> tuple[Worse, ...]:
    """The statements whose mean time since an earlier look is longer than it was up to it."""
    worse = []
    for query in found.queries:
        calls, total = before.get(query.query_id, (0, 0.0))
        if calls < CALLS_TO_COMPARE:
            continue
        was = total / calls
        # The counters only grow; where one is smaller, it was reset, and all of it is since then.
        if query.calls < calls or query.total_ms < total:
            calls, total = 0, 0.0
        since = query.calls - calls
        now = (query.total_ms - total) / max(since, 1)
        if since >= CALLS_TO_COMPARE and now > was * WORSE_BY_FACTOR and now - was > WORSE_BY_MILLISECONDS:
            worse.append(Worse(query, was, now, since))
    return tuple(sorted(worse, key=lambda w: w.before_ms - w.now_ms))
