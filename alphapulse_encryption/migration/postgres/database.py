"""Connections to the target database: how a session of ours is set up, and what of an error may be told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, LiteralString, NoReturn, Self

import psycopg
from psycopg import sql
from psycopg.abc import AdaptContext, Buffer, Params
from psycopg.rows import scalar_row
from psycopg.types.datetime import TimestamptzLoader

from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure
from alphapulse_encryption.migration.postgres.unreachable import unreachable

Connection = psycopg.Connection[Any]

# The plaintext of an envelope is a value's text form under exactly these settings (PostgreSQL manual,
# 19.11 "Client Connection Defaults"), so that it does not depend on the session that took it.
TEXT_FORM_SETTINGS = {
    "TimeZone": "UTC",
    "DateStyle": "ISO",
    "IntervalStyle": "postgres",
    "bytea_output": "hex",
    "extra_float_digits": "1",
    # The form of money: $1,234.56, whatever the database's own currency is.
    "lc_monetary": "C",
    "client_encoding": "UTF8",
    # How that text is read again: {NULL} as an array of the text NULL, or a fragment of XML refused, is another value.
    "array_nulls": "on",
    "xmloption": "content",
}

SAFETY_SETTINGS = {
    # Whoever waits for us, or makes us wait, does so for this long at most; then we retry.
    "lock_timeout": "5s",
    "standard_conforming_strings": "on",
    # Definitions that the server writes are compared with ours, word for word.
    "quote_all_identifiers": "off",
    # The optimistic checks and the counting of finished ranges rely on each statement seeing what is committed.
    "default_transaction_isolation": "read committed",
    # A row that row-level security hides would silently stay plaintext; with this it is an error.
    "row_security": "off",
}

# What an administrator allows the application's statements would end ours in the middle: an index build that waits for
# a report would leave an invalid index. A step bounds what it must not hold for long by itself.
LIMITS = {
    "statement_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "idle_session_timeout": "0",
    "transaction_timeout": "0",  # from PostgreSQL 17 on
    "default_transaction_read_only": "off",
}

# A machine that is lost says no good-bye: after a minute of silence the server ends its sessions, and gives up the
# locks they hold, so that another machine can go on (19.3.2 "TCP Settings"). Without effect on Unix-domain sockets.
DEAD_PEER_SETTINGS = {
    "tcp_keepalives_idle": "30",
    "tcp_keepalives_interval": "10",
    "tcp_keepalives_count": "3",
    "tcp_user_timeout": "60s",
}

# Keep values out of the server's log (19.8 "Error Reporting and Logging"). Our statements hold none, their parameters
# and what the server says of them may; so statements may still be logged, for whoever audits them. A module's settings
# are set where it is loaded.
LOG_SETTINGS_FOR_ALL = {
    "log_parameter_max_length_on_error": "0",
    # Plans show parameters as constants.
    "debug_print_parse": "off",
    "debug_print_rewritten": "off",
    "debug_print_plan": "off",
}
# These take a superuser, or from PostgreSQL 15 on the privilege SET; what a role may not set, preflight tells.
LOG_SETTINGS = {
    "log_parameter_max_length": "0",
    # What a cast or a trigger of the application refuses, it quotes; we tell of the error without its text. Of what
    # is less than LOG nothing is written then, of connections and checkpoints everything.
    "log_min_messages": "log",
    "log_error_verbosity": "terse",
    "log_min_error_statement": "panic",
    "auto_explain.log_min_duration": "-1",
    "auto_explain.log_parameter_max_length": "0",
    "pgaudit.log_parameter": "off",
}

WRITER_SETTING = "alphapulse_encryption.writer"
WRITER = "engine"


class Verbatim(sql.Composable):
    """Text that the server printed, quoted and qualified already: a percent sign in it is no placeholder."""

    def as_bytes(self, context: AdaptContext | None = None) -> bytes:
        return str(self._obj).encode()


def flat(query: sql.Composable) -> Iterator[sql.Composable]:
    """The parts of a statement that have none themselves, in their order."""
    if isinstance(query, sql.Composed):
        for part in query:
            yield from flat(part)
    else:
        yield query


# At the end of our statements on rows: pg_stat_statements keeps it, and tells them from the application's by nothing
# else. Statements on definitions are executed word for word as a plan shows them.
OF_THIS_TOOL: LiteralString = "/* alphapulse_encryption */"
_OF_ROWS = (b"select", b"insert", b"update", b"delete", b"with", b"merge")


class _Moment(TimestamptzLoader):
    """A moment that Python has none for is the last, or the first, that it has: one such row ends no report."""

    def load(self, data: Buffer) -> datetime:
        try:
            return super().load(data)
        except psycopg.DataError:
            past = bytes(data).startswith(b"-") or bytes(data).endswith(b"BC")
            return (datetime.min if past else datetime.max).replace(tzinfo=UTC)


class _Cursor(psycopg.Cursor[tuple[Any, ...]]):
    def execute(self, query: Any, params: Params | None = None, **options: Any) -> Self:
        text = query.encode() if isinstance(query, str) else query
        if isinstance(query, sql.Composable):
            parts = [(part, part.as_bytes(self)) for part in flat(query)]
            # Of a statement with parameters, psycopg looks for placeholders in names, too.
            named = sql.Identifier | sql.Literal | Verbatim if params is not None else ()
            text = b"".join(t.replace(b"%", b"%%") if isinstance(part, named) else t for part, t in parts)
        if text.lstrip()[:6].lower().startswith(_OF_ROWS):
            text += b" " + OF_THIS_TOOL.encode()
        return super().execute(text, params, **options)


class DatabaseUnreachable(ConfigurationError):
    """Nobody answers at the address, or not to us; a server that is being restarted does not answer either."""


class Pooled(ConfigurationError):
    """A connection pooler answers at the address, and hands what is set for a session to others, or may."""


@dataclass(frozen=True)
class Actor:
    """Who changes the database: a person or program, and the Dagster run, as the audit log is to show them."""

    name: str
    run_id: str | None = None


@dataclass(frozen=True)
class Database:
    """The target database.

    Args:
        conninfo: a PostgreSQL URL or connection string; never shown.
        application_name: what ``pg_stat_activity`` shows for our sessions.
        variable: the environment variable that its address comes from, for messages.
        read_only: whether its sessions refuse to write, whatever they run.
        session_pooler: whether the address may be that of a connection pooler in session mode.
    """

    conninfo: str = field(repr=False)
    application_name: str = "alphapulse_encryption"
    variable: str = "ALPHAPULSE_DATABASE_URL"
    read_only: bool = False
    session_pooler: bool = False

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a Database holds an address with a password, and cannot be pickled or copied")

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a session with the settings above, in autocommit mode.

        Raises:
            DatabaseUnreachable: the message has no DSN in it.
            Pooled: a pooler answers, and is not one in session mode that was allowed; nothing was set there.
        """
        connection = self._open()
        try:
            self._refuse_pooler(connection)
        except BaseException:
            connection.close()
            raise
        settings = TEXT_FORM_SETTINGS | SAFETY_SETTINGS | LIMITS | DEAD_PEER_SETTINGS
        if self.read_only:
            settings["default_transaction_read_only"] = "on"
        try:
            connection.execute(_KEEP_SEARCH_PATH)
            configure(connection, settings)
            keep_values_out_of_the_log(connection)
        except psycopg.Error as error:
            connection.close()
            raise failure("set up the session", error) from None
        connection.cursor_factory = _Cursor
        connection.adapters.register_loader("timestamptz", _Moment)
        return connection

    def _open(self) -> psycopg.Connection[tuple[Any, ...]]:
        try:
            return psycopg.connect(
                self.conninfo, autocommit=True, application_name=self.application_name, connect_timeout=10
            )
        except psycopg.Error as error:
            raise DatabaseUnreachable(unreachable(self.conninfo, str(error), self.variable)) from None

    def _refuse_pooler(self, connection: psycopg.Connection[tuple[Any, ...]]) -> None:
        """Refuse a session that others share: settings left in it would be an outage of the application.

        The process of the server that answers is not the one that a pooler told of when it was connected to
        (`PQbackendPID`).
        """
        serving = _serving(connection)
        if serving == connection.info.backend_pid:
            return
        if not self.session_pooler:
            raise Pooled(
                f"{self.variable} leads to a connection pooler (PgBouncer, Odyssey, pgcat, RDS Proxy or the like), not "
                "to PostgreSQL itself. Settings and locks of a session do not hold there, or reach the application's "
                "sessions. Give the server's own address; where only a pooler in session mode leads there, set "
                "ALPHAPULSE_DATABASE_POOLER=session. Nothing was set or changed."
            )
        # While the first session is open, one in session mode serves a second one by another process.
        with self._open() as other:
            shared = _serving(other) == serving
        if shared or _serving(connection) != serving:
            raise Pooled(
                f"The connection pooler behind {self.variable} is not in session mode, as ALPHAPULSE_DATABASE_POOLER "
                "says: two sessions were served by one process of the server. Nothing was set or changed."
            )

    @contextmanager
    def session(self, doing: str) -> Iterator[psycopg.Connection[tuple[Any, ...]]]:
        """A connection for a ``with`` block, errors made safe; they name what was ``doing``: "add columns to users"."""
        with safe_errors(doing), self.connect() as connection:
            yield connection


def answer(connection: Connection, query: LiteralString | sql.SQL | sql.Composed, *parameters: object) -> Any:
    """The first value of a query's first row; None where there is no row."""
    return connection.cursor(row_factory=scalar_row).execute(query, parameters or None).fetchone()


def _serving(connection: psycopg.Connection[tuple[Any, ...]]) -> int:
    """The process of the server that answers."""
    try:
        return int(answer(connection, "SELECT pg_catalog.pg_backend_pid()"))
    except psycopg.Error as error:
        raise failure("ask which process serves the session", error) from None


def configure(connection: psycopg.Connection[Any], settings: Mapping[str, str]) -> None:
    """Set what a session is to have until its end, as far as the server knows it."""
    connection.execute(
        "SELECT set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s (name, value) "
        "WHERE current_setting(name, true) IS NOT NULL",
        [list(settings), list(settings.values())],
    )


# GRANT SET ON PARAMETER.
SET_PRIVILEGES = 150_000


def _may_set(connection: psycopg.Connection[Any]) -> sql.SQL:
    """Whether the role may set a superuser's setting, whose name is in a query's column ``name``."""
    if connection.info.parameter_status("is_superuser") == "on":
        return sql.SQL("true")
    has: LiteralString = "has_parameter_privilege(name, 'SET')"
    return sql.SQL(has if connection.info.server_version >= SET_PRIVILEGES else "false")


def keep_values_out_of_the_log(connection: psycopg.Connection[Any]) -> dict[str, str]:
    """Have the server log nothing of this session that could quote a value, as far as the role may; what was set."""
    wanted = LOG_SETTINGS_FOR_ALL | LOG_SETTINGS
    query = sql.SQL(
        "SELECT name, set_config(name, value, false) FROM unnest(%s::text[], %s::text[]) AS s (name, value) "
        "WHERE current_setting(name, true) IS NOT NULL AND (name = ANY(%s) OR {})"
    ).format(_may_set(connection))
    values = [list(wanted), list(wanted.values()), list(LOG_SETTINGS_FOR_ALL)]
    return dict(connection.execute(query, values).fetchall())


# Each for the rest of a transaction. Tells the guard triggers that the writes are the engine's own.
MARK_AS_ENGINE = f"SELECT set_config('{WRITER_SETTING}', '{WRITER}', true)".encode()
# Fires no trigger and no rule of the application, but those that are ENABLE ALWAYS or REPLICA.
FIRE_NO_TRIGGERS = b"SET LOCAL session_replication_role TO replica"
FIRE_TRIGGERS = b"SET LOCAL session_replication_role TO DEFAULT"
# The application's code (triggers, casts, checks) finds what it names without a schema, as in its own sessions. Between
# the two, a statement of ours may call no function without its schema that takes arguments of any type.
AS_APPLICATION = (
    b"SELECT set_config('search_path', current_setting('alphapulse_encryption.search_path'), true)"
)
AS_OURSELVES = b"SET LOCAL search_path TO pg_catalog"

# The first statement of a session: nothing that somebody put into a schema of the search path may be called by mistake.
# Where that names pg_catalog, it is taken out, so that the server looks there first.
_KEEP_SEARCH_PATH: LiteralString = """
SELECT pg_catalog.set_config('alphapulse_encryption.search_path', pg_catalog.ltrim(pg_catalog.regexp_replace(
           pg_catalog.current_setting('search_path'),
           '(^|,)[[:space:]]*"?pg_catalog"?[[:space:]]*(?=,|$)', '', 'gi'), ', '), false),
       pg_catalog.set_config('search_path', 'pg_catalog', false)
"""


def may_pass_over_triggers(connection: psycopg.Connection[Any]) -> bool:
    """Whether the role of a session may write without firing triggers and rules."""
    query = sql.SQL("SELECT {} FROM (SELECT 'session_replication_role' AS name) AS s")
    return bool(answer(connection, query.format(_may_set(connection))))


@contextmanager
def safe_errors(doing: str) -> Iterator[None]:
    """Turn psycopg's errors, whose text can quote rows, into :class:`DatabaseFailure`."""
    try:
        yield
    except psycopg.Error as error:
        raise failure(doing, error) from None


def failure(doing: str, error: psycopg.Error) -> DatabaseFailure:
    """What may be told of a server's error: SQLSTATE, its name, and the objects concerned.

    The server's own message is repeated only for the classes whose messages name objects and never rows.
    """
    state = error.sqlstate
    if state is None:
        lost = isinstance(error, psycopg.OperationalError)
        why = "the connection to the database was lost" if lost else f"{type(error).__name__} in the driver"
        return DatabaseFailure(f"Could not {doing}: {why}.", None)
    text = f"Could not {doing}: the database refused ({without_values(error)})."
    if state in _VALUE_FREE and error.diag.message_primary and not _said_by_a_function(error):
        text += f" It says: {error.diag.message_primary}."
    if error.diag.source_function == _ROW_SECURITY:
        text += " It would hide rows from this role: ALTER ROLE … BYPASSRLS, or connect as one that has it."
    elif isinstance(error, psycopg.errors.InsufficientPrivilege):
        text += " Which role a step takes is in docs/roles.md; --roles-sql prints what each is given."
    if isinstance(error, psycopg.errors.ReadOnlySqlTransaction):
        text += " A standby takes no writes: where one answers, give the address of the primary."
    return DatabaseFailure(text, state)


# SQLSTATEs (PostgreSQL manual, appendix A) after which a new connection is needed.
_CONNECTION_LOST = frozenset(
    {
        "57P01",  # admin_shutdown
        "57P02",  # crash_shutdown
        "57P03",  # cannot_connect_now
        "08000",  # connection_exception
        "08003",  # connection_does_not_exist
        "08006",  # connection_failure
    }
)


def connection_was_lost(error: BaseException) -> bool:
    """Whether the error is about the connection and not about what was asked."""
    return isinstance(error, psycopg.Error) and (
        error.sqlstate in _CONNECTION_LOST
        or (error.sqlstate is None and isinstance(error, psycopg.OperationalError))
    )


def without_values(error: psycopg.Error) -> str:
    """An error's kind, SQLSTATE and the objects it concerns."""
    parts = [f"{type(error).__name__}, SQLSTATE {error.sqlstate}"]
    diagnostics = error.diag
    if diagnostics.source_function == _RAISE:
        # Whoever wrote RAISE chose what it calls the table or the constraint.
        # The server's own words for where it was; those further out quote statements.
        where = _FUNCTION.match(diagnostics.context or "")
        return f"{parts[0]}, raised by a function{f' ({where[1]})' if where else ''}"
    for label, value in (
        ("schema", diagnostics.schema_name),
        ("table", diagnostics.table_name),
        ("column", diagnostics.column_name),
        ("constraint", diagnostics.constraint_name),
    ):
        if value:
            parts.append(f"{label} {value}")
    return ", ".join(parts)


# Of PL/pgSQL (src/pl/plpgsql/src/pl_exec.c).
_RAISE = "exec_stmt_raise"
_FUNCTION = re.compile(r"PL/pgSQL function (.+) line \d+ at RAISE$", re.MULTILINE)
# Of src/backend/utils/misc/rls.c: row_security is off, and rows would be hidden. The server translates its words.
_ROW_SECURITY = "check_enable_rls"


def _said_by_a_function(error: psycopg.Error) -> bool:
    """Whether the words may be those of a trigger or function, which quote what they like under any SQLSTATE.

    The server's own context of a message begins with "while", as in "while locking tuple (0,1)".
    """
    lines = (error.diag.context or "").splitlines()
    return error.diag.source_function == _RAISE or any(not line.startswith("while ") for line in lines)


# SQLSTATEs (PostgreSQL manual, appendix A) whose primary message names objects, roles or settings only.
_VALUE_FREE = frozenset(
    {
        "2BP01",  # dependent_objects_still_exist
        "42501",  # insufficient_privilege
        "42703",  # undefined_column
        "42883",  # undefined_function
        "42P01",  # undefined_table
        "42P07",  # duplicate_table
        "53100",  # disk_full
        "53200",  # out_of_memory
        "53300",  # too_many_connections
        "55P03",  # lock_not_available
        "57014",  # query_canceled
        "57P01",  # admin_shutdown
        "57P03",  # cannot_connect_now
        "40001",  # serialization_failure
        "40P01",  # deadlock_detected
        "25006",  # read_only_sql_transaction
    }
)
