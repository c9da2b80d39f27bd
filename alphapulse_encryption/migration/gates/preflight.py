"""The checklist before the migration: what would block it, what would surprise, how much it takes.

Reads only. Each finding names a thing, says what is wrong and what to do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path

import psycopg
from psycopg import sql

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.envelope import AES_256_GCM, EnvelopeFormat, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.usage import MOST_MESSAGES
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.backups import latest_backup
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists, refuse_planted
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.limits import Limits
from alphapulse_encryption.migration.bookkeeping.tables import TableState, table_state
from alphapulse_encryption.migration.bookkeeping.usage import read_usage
from alphapulse_encryption.migration.gates import roles
from alphapulse_encryption.migration.gates.backup import NOT_OLDER_THAN_HOURS, is_recent
from alphapulse_encryption.migration.gates.beginning import before_columns
from alphapulse_encryption.migration.gates.data_path import as_data_path, may_write
from alphapulse_encryption.migration.gates.findings import Checked, Level
from alphapulse_encryption.migration.gates.surroundings import around_server, around_table
from alphapulse_encryption.migration.postgres import known_faults
from alphapulse_encryption.migration.postgres.database import (
    LOG_SETTINGS,
    SET_PRIVILEGES,
    Connection,
    Database,
    answer,
)
from alphapulse_encryption.migration.postgres.programs import choose
from alphapulse_encryption.migration.rows.throttle import NotAvailable, ReplicationLag, free_bytes
from alphapulse_encryption.migration.schema.definition import TableDefinition, check_hidden, read_table
from alphapulse_encryption.migration.schema.dependants import dependants, stops_of_the_switch
from alphapulse_encryption.migration.schema.guard import guard_faults, late_triggers
from alphapulse_encryption.migration.schema.indexes import invalid_indexes
from alphapulse_encryption.migration.schema.partitions import read_parts, refuse_relatives
from alphapulse_encryption.migration.schema.reachable_code import foreign_code
from alphapulse_encryption.migration.schema.sensitive_names import looks_secret
from alphapulse_encryption.migration.schema.views import refuse_hidden_rows, shown_by_safe_view, view_names

OLDEST_SERVER = 140000  # CREATE OR REPLACE TRIGGER (PostgreSQL 14)
LONG_TRANSACTION = timedelta(minutes=5)

# Bytes around a value: IV, tag, the JSON members and the row's own share of an item.
_ENVELOPE_BYTES = 28
_JSON_BYTES = 84
_TOKEN_BYTES = 45
_DEFAULT_WIDTH = 32  # of a column that was never analysed
# Rows per second of one worker on two cores, rows of five values, rounded down; staging rehearsals measure it.
ASSUMED_ROWS_PER_SECOND = 20_000


@dataclass(frozen=True)
class PreflightReport:
    """What :func:`check` found.

    Args:
        tables: that were looked at, as the catalogue calls them.
        rows: of all tables, by the planner's estimate.
        current_bytes: size of the tables with indexes.
        growth_bytes: estimated; until vacuum reclaims them, the old row versions count.
        free_bytes: on the disk of the server's data; None where that cannot be seen from here.
        estimated_seconds: of one worker, for the backfill.
    """

    findings: tuple[Checked, ...]
    tables: tuple[str, ...]
    rows: int
    current_bytes: int
    growth_bytes: int
    free_bytes: int | None
    estimated_seconds: float
    seconds: float

    @property
    def blockers(self) -> tuple[Checked, ...]:
        return self._of("blocker")

    @property
    def passed(self) -> tuple[Checked, ...]:
        return self._of("ok")

    @property
    def warnings(self) -> tuple[Checked, ...]:
        return self._of("warning")

    @property
    def lines(self) -> list[str]:
        """All of it for a person: table by table, the worst first; then how much of what, and what to type next."""
        of_all = "The server and the whole catalogue"
        groups: dict[str, list[Checked]] = {key: [] for key in (of_all, *self.tables)}
        for finding in sorted(self.findings, key=lambda one: _WORST_FIRST.index(one.level)):
            # The longest: a table public.a may have a column b, beside a table b of the schema a.
            of = max(
                (k for k in self.tables if f"{finding.subject}.".startswith(f"{k}.")), key=len, default=of_all
            )
            groups[of].append(finding)
        lines = []
        for key, those in groups.items():
            lines += [f"{key}: {_counted(those)}", *(f"  {finding}" for finding in those)] if those else []
        return [*lines, f"In all: {_counted(self.findings)}.", f"Next: {self.next}"]

    @property
    def next(self) -> str:
        """The next command."""
        if self.blockers:
            return (
                "correct what blocks the migration, or take it out of the catalogue; then --preflight again."
            )
        told = "decide about the warnings; then " if self.warnings else ""
        missing = any(finding.subject == "backup" for finding in self.warnings)
        return f"{told}--plan shows every statement, and {'--backup' if missing else '--add-columns'} is the next step."

    def _of(self, level: Level) -> tuple[Checked, ...]:
        return tuple(finding for finding in self.findings if finding.level == level)


def check(
    database: Database,
    tables: Sequence[Table],
    keys: KeyRing | None,
    *,
    envelope: str = AES_256_GCM,
    source: str = "",
    once: bool = False,
    bin_dirs: Sequence[Path] | None = None,
    data_path: Database | None = None,
) -> PreflightReport:
    """Go through the checklist for every table of the catalogue.

    Args:
        keys: the key ring; held against the key the database was begun with. None leaves the key out.
        envelope: the catalogue's format.
        source: where the catalogue was read from, in a sentence.
        once: look at a table that somebody holds without another try; for a report that somebody waits for.
        bin_dirs: where a backup looks for client programs; None leaves them out.
        data_path: as whom rows are read and written; None where that does not matter, as in the sample.

    Raises:
        ConfigurationError: the database cannot be reached.
    """
    started = time.monotonic()
    findings: list[Checked] = []
    rows = current = growth = 0
    cipher = None if keys is None else get_format(envelope, keys)
    not_as_catalogued = False
    with database.session("run the preflight") as connection, ExitStack() as stack:
        writes = as_data_path(connection, data_path, tables, findings, stack)
        findings += _server(connection)
        findings += _privileges(connection, tables)
        if keys is not None:
            findings += _keys(connection, tables, keys)
        begun = bookkeeping_exists(connection)
        try:
            refuse_planted(connection)
        except RefusedError as error:
            findings.append(Checked("blocker", "bookkeeping", error.args[0]))
        for table in tables:
            try:
                state = table_state(connection, table) if begun else None
                both = state is None or state.state.has_both_sides
                definition = read_table(connection, table, plaintext=both, once=once, look=True)
            except MigrationError as error:
                findings.append(Checked("blocker", table.key, error.args[0]))
                not_as_catalogued |= isinstance(error, ConfigurationError)
                continue
            about = [*_before_steps(connection, definition, state, keys, cipher, writes)]
            if not any(finding.level == "blocker" for finding in about):
                told = (
                    f"about {definition.estimated_rows:,} rows, {len(table.columns)} columns to encrypt, "
                    f"key ({', '.join(key.name for key in definition.key)})"
                )
                findings.append(Checked("ok", table.key, told))
            findings += about
            rows += definition.estimated_rows
            current += definition.total_bytes
            # Every row is written once more: the old version stays until vacuum reclaims it.
            growth += encrypted_bytes(connection, definition) + definition.total_bytes
        if not_as_catalogued and source:
            findings.append(
                Checked(
                    "blocker",
                    "catalogue",
                    f"is not that of this database. {source} Correct the catalogue as its tables' findings say.",
                )
            )
        findings += _backups(connection, tables)
        if bin_dirs is not None:
            findings += _programs(connection, bin_dirs)
        findings += _logging(connection)
        findings += long_transactions(connection)
        findings += _replicas(connection)
        findings += around_server(connection)
        free = _free_disk(connection)
        database_bytes = answer(connection, "SELECT pg_database_size(current_database())")
    findings.append(_disk(database_bytes, growth, free))
    return PreflightReport(
        findings=tuple(findings),
        tables=tuple(table.key for table in tables),
        rows=rows,
        current_bytes=current,
        growth_bytes=growth,
        free_bytes=free,
        estimated_seconds=rows / ASSUMED_ROWS_PER_SECOND,
        seconds=time.monotonic() - started,
    )


def _before_steps(
    connection: Connection,
    definition: TableDefinition,
    state: TableState | None,
    keys: KeyRing | None,
    cipher: EnvelopeFormat | None,
    writes: Connection,
) -> Iterator[Checked]:
    """What speaks against a table's next step."""
    table = definition.table
    foreign = foreign_code(connection, definition.oid)
    for code in foreign:
        yield Checked("blocker", table.key, f"has code of another role run with our rights: {code}")
    yield from _table(connection, definition, writes)
    # Columns that came into the catalogue since are none of the guard's yet.
    entry = table.model_copy(update={"columns": definition.encrypted_columns})
    if (
        state is not None
        and state.state.is_guarded
        and (faults := guard_faults(connection, replace(definition, table=entry), state.authority))
    ):
        yield Checked(
            "blocker",
            table.key,
            f"its guard is not what this program makes ({'; '.join(faults)}). Ciphertext may be older than its "
            "plaintext: renew the guard and look for such values (--add-columns --verify --table "
            f"{table.key}).",
            of_entry=True,
        )
    # That reads rows.
    if state is None and not foreign:
        yield from before_columns(connection, definition, keys, cipher)


_WORST_FIRST: tuple[Level, ...] = ("blocker", "warning", "ok")


def _counted(findings: Sequence[Checked]) -> str:
    counts = Counter(finding.level for finding in findings)
    words = {level: f"{level}{'s' if counts[level] > 1 else ''}" for level in _WORST_FIRST} | {
        "ok": "in order"
    }
    return ", ".join(f"{counts[level]} {words[level]}" for level in _WORST_FIRST if counts[level])


def refuse_blockers(report: PreflightReport) -> None:
    """Refuse where the checklist has something that blocks the migration; all that it found is told with it."""
    if report.blockers:
        raise RefusedError("The preflight found what blocks the migration:\n" + "\n".join(report.lines))


def _server(connection: Connection) -> Iterator[Checked]:
    version = connection.info.server_version
    if version < OLDEST_SERVER:
        yield Checked(
            "blocker", "server", f"PostgreSQL {version // 10000} is too old; 14 or newer is needed."
        )
    else:
        yield Checked("ok", "server", f"PostgreSQL {version // 10000}.{version % 10000}")
    if faults := known_faults.told(known_faults.OF_SERVERS, known_faults.split(version)):
        yield Checked(
            "warning",
            "server",
            f"PostgreSQL {version // 10000}.{version % 10000} has known faults, which the code of a dump can use in a "
            f"restore drill or a rehearsal: {faults}. Update the server; SELECT version() tells that it is.",
        )
    if answer(connection, "SELECT pg_is_in_recovery()"):
        yield Checked("blocker", "server", "is a read-only replica. Connect to the primary.")
    elif (
        answer(connection, "SELECT reset_val FROM pg_settings WHERE name = 'default_transaction_read_only'")
        == "on"
    ):
        yield Checked(
            "warning",
            "server",
            "sessions of this role are read-only by default (default_transaction_read_only), and ours will write all "
            "the same. Find out why that was set before you go on; ALTER ROLE or ALTER DATABASE … RESET takes it back.",
        )
    if not bookkeeping_exists(connection) and not roles.may_begin(connection):
        grant = "GRANT CREATE ON DATABASE {} TO {role}; GRANT CREATE ON SCHEMA public TO {role}"
        role = sql.Identifier(roles.current_role(connection))
        text = sql.SQL(grant).format(sql.Identifier(connection.info.dbname), role=role).as_string(connection)
        yield Checked(
            "blocker",
            "privileges",
            f"the bookkeeping needs CREATE on the database and on the schema public. Have an administrator run {text}, "
            "or what --roles-sql prints.",
            of_role=True,
        )


def _privileges(connection: Connection, tables: Sequence[Table]) -> Iterator[Checked]:
    """Which steps are for the role in use, what it lacks for the others, and what it could do beyond them."""
    name = roles.current_role(connection)
    if answer(connection, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user"):
        yield Checked(
            "warning",
            "privileges",
            f"the role {name} is a superuser: nothing is refused to it, not even a drop without an approval, nor to "
            "the code of the tables' owners that runs in its sessions. "
            "--roles-sql prints SQL for roles that have what they need and no more.",
        )
        return
    steps_lacking: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    allowed = []
    for step in guide.STEPS:
        missing = roles.missing_privileges(connection, step, tables)
        if missing:
            steps_lacking.setdefault((step.needs.role, missing), []).append(step.flag)
        else:
            allowed.append(step.flag)
    if allowed:
        yield Checked("ok", "privileges", f"the role {name} may run {', '.join(allowed)}")
    yield from (
        Checked(
            "warning",
            "privileges",
            f"the role {name} may not run {', '.join(flags)}, which {'are' if len(flags) > 1 else 'is'} for a member "
            f"of {roles.DEFAULT_PREFIX}{role}: it lacks {roles.shortened(missing)}. --roles-sql prints what grants it.",
        )
        for (role, missing), flags in steps_lacking.items()
    )
    yield from (
        Checked("warning", "privileges", f"the role {name} has more than it needs: {what}.")
        for what in roles.too_much(connection)
    )


def _keys(connection: Connection, tables: Sequence[Table], keys: KeyRing) -> Iterator[Checked]:
    try:
        check_key(connection, keys)
    except MigrationError as error:
        yield Checked("blocker", "key", error.args[0])
    else:
        yield Checked("ok", "key", f"version {keys.current_version} is readable and 32 bytes long")
    for version in keys.versions:
        if spelling := keys.spelling(version):
            yield Checked("warning", "key", f"{spelling}.")
    contexts = {column.context for table in tables for column in table.columns}
    ours = [
        usage
        for usage in read_usage(connection)
        if usage.key_version == keys.current_version and usage.context in contexts
    ]
    warned = [(usage, warning) for usage in ours if (warning := usage.warning()) is not None]
    for usage, warning in warned:
        yield Checked("blocker" if usage.used_up else "warning", "key usage", warning)
    if ours and not warned:
        most = max(usage.messages for usage in ours)
        yield Checked("ok", "key usage", f"at most {most:,} of {MOST_MESSAGES:,} values under one key")


# The columns that an INSERT fills without naming them, by their own default or their domain's. The server prints one
# that is NULL as NULL with casts, whose types are in lower case but for quoted ones.
_DEFAULTED = r"""
SELECT a.attname FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid
  LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
 WHERE a.attrelid = %s AND a.attname = ANY (%s)
   AND coalesce(pg_get_expr(d.adbin, d.adrelid), t.typdefault) !~ '^\(*NULL(::[a-z0-9_ .]+(\([0-9,]+\))?(\[\])?\)*)*$'
 ORDER BY a.attnum
"""


_NOT_VACUUMED = """
SELECT c.oid::regclass::text, CASE WHEN o.off THEN format('ALTER TABLE %%s RESET (autovacuum_enabled)', c.oid::regclass)
                                   ELSE 'ALTER SYSTEM SET autovacuum = on' END
  FROM pg_class c CROSS JOIN LATERAL (
       SELECT coalesce(bool_or(option_name = 'autovacuum_enabled' AND NOT option_value::boolean), false) AS off
         FROM pg_options_to_table(c.reloptions)) o
 WHERE c.oid = ANY(%s) AND c.relkind = 'r' AND (o.off OR NOT current_setting('autovacuum')::boolean) ORDER BY 1
"""


def _table(connection: Connection, definition: TableDefinition, writes: Connection) -> Iterator[Checked]:
    table = definition.table
    ((owns, owner, role, secured, bypasses, forced),) = connection.execute(
        "SELECT pg_has_role(relowner, 'USAGE'), relowner::regrole::text, current_user::regrole::text, relrowsecurity, "
        "  (SELECT rolbypassrls OR rolsuper FROM pg_roles WHERE rolname = current_user), relforcerowsecurity "
        "FROM pg_class WHERE oid = %s",
        [definition.oid],
    )
    # Of a role that only looks, it is told with the privileges.
    takes_part = roles.may_write_bookkeeping(connection)
    if not owns and takes_part:
        yield Checked(
            "blocker",
            table.key,
            f"columns and triggers can be added by the table's owner only, which is {owner}. Connect as {owner}, or "
            f"as a member of it (GRANT {owner} TO {role}).",
            of_role=True,
        )
    if takes_part and secured and not bypasses and (forced or not owns):
        yield Checked(
            "blocker",
            table.key,
            f"row-level security would hide rows from this role. Use a role with BYPASSRLS (ALTER ROLE {role} "
            "BYPASSRLS).",
            of_role=True,
        )
    try:
        refuse_relatives(connection, definition)
    except ConfigurationError as error:
        yield Checked("blocker", table.key, error.args[0])
    yield from _triggers(connection, definition)
    yield from _views(connection, definition)
    if definition.guessed:
        yield Checked(
            "warning",
            table.key,
            "was never analysed: its rows, and with them durations and growth, are guessed from its size. Type "
            f"ANALYZE {definition.identifier.as_string(connection)}, and ask again.",
        )
    yield from (
        Checked(
            "warning",
            table.key,
            f"the index {name} is invalid, since its build was interrupted: no query uses it, and every write has to "
            f"keep it. Type {statement}.",
        )
        for name, statement in invalid_indexes(connection, definition)
    )
    for name, alter in connection.execute(
        _NOT_VACUUMED, [[p.oid for p in read_parts(connection, definition.oid)]]
    ):
        yield Checked(
            "warning",
            table.key,
            f"autovacuum is off for {name}: the row versions that the backfill replaces stay, and the table grows by "
            f"its own size. Switch it on ({alter}), or VACUUM the table after each step.",
        )
    plaintext = [column.name for column in definition.plaintext_columns]
    if names := [name for (name,) in connection.execute(_DEFAULTED, [definition.oid, plaintext])]:
        yield Checked(
            "warning",
            table.key,
            f"{', '.join(names)} {'has' if len(names) == 1 else 'have'} a default. Until the switch, the guard refuses "
            "ciphertext without its plaintext, but cannot tell an INSERT that leaves such a column out from one that "
            "writes the default itself: it keeps both sides, and --verify names the row as mismatched. See that no "
            "part of the application inserts the ciphertext alone before the switch.",
        )
    yield from (
        Checked(
            "warning",
            f"{table.key}.{column.name}",
            "is of the type money, whose text depends on the database's currency: it is encrypted in the form "
            "$1,234.56, whatever the currency is. numeric does not have that problem "
            f"({definition.alter('ALTER {} TYPE numeric', column.name)}).",
        )
        for column in definition.plaintext_columns
        if definition.columns[column.name].type.removesuffix("[]") == "money"
    )
    yield from (
        Checked("warning", table.key, f"switch_to_ciphertext will refuse: {reason}")
        for reason in stops_of_the_switch(connection, definition)
    )
    found = dependants(connection, definition)
    yield from (
        Checked(
            "warning",
            f"{table.key}.{one.column}",
            f"{one.name} depends on the plaintext column and stops its drop. Move it to the encrypted column or the "
            f"compatibility view, make it without the column, or drop it{one.remove and f' ({one.remove})'}, before "
            "the approval.",
        )
        for one in found
        if one.stops_the_drop
    )
    yield from (
        Checked(
            "warning",
            f"{table.key}.{column}",
            f"goes at the drop with {', '.join(one.name for one in those)}, which --restore-plaintext puts back.",
        )
        for column, those in groupby((one for one in found if not one.stops_the_drop), lambda one: one.column)
    )
    if writes is not connection:
        yield from may_write(writes, definition)
    yield from around_table(connection, definition, writes)


def _triggers(connection: Connection, definition: TableDefinition) -> Iterator[Checked]:
    for name, rename in late_triggers(connection, definition):
        yield Checked(
            "blocker",
            definition.table.key,
            f"the trigger {name} runs after the guard, which would not see what it makes of a row: triggers run in "
            f"the order of their names. Rename it ({rename}).",
        )


def _views(connection: Connection, definition: TableDefinition) -> Iterator[Checked]:
    """What the compatibility views would show or lack."""
    table = definition.table
    try:
        check_hidden(definition)
    except ConfigurationError as error:
        yield Checked("blocker", table.key, error.args[0])
    try:
        view_names(table)
        refuse_hidden_rows(connection, definition)
    except (ConfigurationError, RefusedError) as error:
        yield Checked("warning", table.key, error.args[0])
    secrets = [
        name
        for name in shown_by_safe_view(definition)
        if looks_secret(table.name, name, definition.columns[name].base_type)
    ]
    if secrets:
        yield Checked(
            "warning",
            table.key,
            f"the safe view v_{table.name}_safe would show {', '.join(secrets)}, which look like secrets by their "
            "names. Catalogue them, or name them under hide in the catalogue.",
        )


def _widths(connection: Connection, definition: TableDefinition) -> dict[str, float]:
    """Bytes of each column's values, NULLs counted as nothing, where the table was analysed."""
    # Of a table that it may not read, a role that plans sees the widths all the same: in the catalogue itself.
    if answer(connection, "SELECT has_column_privilege('pg_catalog.pg_statistic', 'stawidth', 'SELECT')"):
        query = (
            "SELECT a.attname, max(s.stawidth * (1 - s.stanullfrac))::float8 FROM pg_statistic s "
            "JOIN pg_attribute a ON a.attrelid = s.starelid AND a.attnum = s.staattnum "
            "WHERE s.starelid = %(oid)s GROUP BY 1"
        )
    else:
        query = (
            "SELECT attname, (avg_width * (1 - null_frac))::float8 FROM pg_stats "
            "WHERE schemaname = %(schema)s AND tablename = %(name)s"
        )
    of = {"oid": definition.oid, "schema": definition.table.schema_name, "name": definition.table.name}
    return dict(connection.execute(query.encode(), of).fetchall())


def encrypted_bytes(connection: Connection, definition: TableDefinition) -> int:
    """Bytes that the table's encrypted and search columns take, by the planner's statistics of the plaintext's width.

    Where this role may not see those, or there are none, a usual width is taken.
    """
    widths = _widths(connection, definition)
    per_row = 0.0
    for column in definition.table.columns:
        if column.name not in definition.columns:
            continue
        width = float(widths.get(column.name, _DEFAULT_WIDTH))
        per_row += (width + _ENVELOPE_BYTES) * 4 / 3 + _JSON_BYTES + len(column.context)
        per_row += _TOKEN_BYTES if column.searchable else 0
    return int(definition.estimated_rows * per_row)


def _backups(connection: Connection, tables: Sequence[Table]) -> list[Checked]:
    begun = bookkeeping_exists(connection)
    newest = {table.key: latest_backup(connection, table) if begun else None for table in tables}
    without = [key for key, backup in newest.items() if backup is None or not is_recent(connection, backup)]
    if not without:
        taken = min(backup.taken_at for backup in newest.values() if backup is not None)
        return [Checked("ok", "backup", f"verified, of every table, since {taken:%Y-%m-%d %H:%M} UTC")]
    return [
        Checked(
            "warning",
            "backup",
            f"there is no verified backup of the last {NOT_OLDER_THAN_HOURS} hours that holds "
            f"{'any table' if len(without) == len(tables) > 1 else ', '.join(without)}. "
            "Materialize backup (--backup); the drop insists on one.",
        )
    ]


def _programs(connection: Connection, bin_dirs: Sequence[Path]) -> Iterator[Checked]:
    version = connection.info.server_version // 10000
    driver = known_faults.told(known_faults.OF_CLIENTS, known_faults.split(psycopg.pq.version()))
    if driver:
        yield Checked(
            "warning",
            "client programs",
            f"the libpq of the driver has known faults: {driver}. Update the package psycopg-binary, or the system's "
            "libpq where psycopg uses that.",
        )
    try:
        pair = choose(bin_dirs, version, tls=bool(connection.pgconn.ssl_in_use))
    except ConfigurationError as error:
        yield Checked("warning", "backup", f"cannot be taken from here. {error.args[0]}")
        return
    yield Checked("ok", "backup", f"pg_dump and pg_restore of {pair} fit the server of version {version}")
    if faults := known_faults.told(known_faults.OF_CLIENTS, (pair.major, pair.minor)):
        yield Checked(
            "warning",
            "client programs",
            f"pg_dump and pg_restore of {pair} have known faults: {faults}. Update the package (apt install "
            f"postgresql-client-{pair.major}, dnf upgrade postgresql{pair.major}, brew upgrade "
            f"postgresql@{pair.major}).",
        )


# What makes the server keep values of our sessions, by the setting that prevents it.
_RECORDED = {
    "log_parameter_max_length": "the server logs statements with their parameters",
    "log_min_messages": "the server logs its errors, which quote the values that a cast or a trigger refuses",
    "auto_explain.log_min_duration": "auto_explain logs plans, which show parameters",
    "pgaudit.log_parameter": "pgaudit logs the parameters of statements",
}
# Settings by which statements get into the log, and their values by which none with parameters does.
_STATEMENTS_LOGGED = {
    "log_statement": ("none", "ddl"),
    "log_min_duration_statement": ("-1",),
    "log_min_duration_sample": ("-1",),
    "log_transaction_sample_rate": ("0",),
}


def _logging(connection: Connection) -> Iterator[Checked]:
    rows = connection.execute(
        "SELECT name, current_setting(name, true) FROM unnest(%s::text[]) AS s (name)",
        [[*_STATEMENTS_LOGGED, *LOG_SETTINGS, "pgaudit.log"]],
    )
    settings = {name: value for name, value in rows if value is not None}
    statements = any(settings.get(name, off[0]) not in off for name, off in _STATEMENTS_LOGGED.items())
    recorded = {
        "log_parameter_max_length": statements and settings.get("log_parameter_max_length") != "0",
        "log_min_messages": settings.get("log_min_messages") not in {"log", "fatal", "panic"},
        "auto_explain.log_min_duration": settings.get("auto_explain.log_min_duration", "-1") != "-1",
        "pgaudit.log_parameter": settings.get("pgaudit.log_parameter", "off") == "on"
        and settings.get("pgaudit.log", "none") != "none",
    }
    for name in [name for name, is_so in recorded.items() if is_so]:
        yield Checked(
            "warning",
            "logging",
            f"{_RECORDED[name]}, and this role may not turn that off for its sessions: values can end up in the "
            "server's log when plaintext is put back (revert, restore), in a live check, and where a value is refused. "
            + _remedy(connection, name),
        )
    if not any(recorded.values()):
        yield Checked("ok", "logging", "our sessions leave no values in the server's log")


def _remedy(connection: Connection, name: str) -> str:
    names = {
        "role": sql.Identifier(connection.info.user),
        "name": sql.SQL(name),
        "value": sql.Literal(LOG_SETTINGS[name]),
    }
    alter = sql.SQL("ALTER ROLE {role} SET {name} = {value}").format(**names).as_string(connection)
    if connection.info.server_version < SET_PRIVILEGES:
        return f"Let a superuser run: {alter}"
    grant = sql.SQL("GRANT SET ON PARAMETER {name} TO {role}").format(**names).as_string(connection)
    return f"Let a superuser run: {grant} (or {alter})"


def long_transactions(connection: Connection) -> list[Checked]:
    """Transactions of others in this database that have been open for long."""
    rows = connection.execute(
        "SELECT pid, coalesce(application_name, ''), now() - xact_start FROM pg_stat_activity "
        "WHERE datname = current_database() AND xact_start < now() - %s AND pid <> pg_backend_pid()",
        [LONG_TRANSACTION],
    ).fetchall()
    return [
        Checked(
            "warning",
            "long transaction",
            f"process {pid} ({name}) has been in a transaction for {str(age).split('.')[0]}: schema changes and "
            f"concurrent index builds wait for it. Let it end, or end it (SELECT pg_terminate_backend({pid})).",
        )
        for pid, name, age in rows
    ]


def _replicas(connection: Connection) -> list[Checked]:
    seen = ReplicationLag()(connection, Limits())
    if not isinstance(seen, NotAvailable):
        return []
    return [Checked("warning", "replicas", f"the backfill will not hold back for them: {seen.reason}.")]


def _free_disk(connection: Connection) -> int | None:
    # Only a server on this machine can be asked this way, and only if it tells where its data is.
    if not (connection.info.host or "").startswith("/"):
        return None
    try:
        return free_bytes(Path(answer(connection, "SELECT current_setting('data_directory')")))
    except psycopg.errors.InsufficientPrivilege:
        return None


def _disk(database_bytes: int, growth: int, free: int | None) -> Checked:
    need = max(database_bytes, growth)
    told = (
        f"about {readable_size(growth)} growth is expected; keep {readable_size(need)} free (2x the database)"
    )
    if free is None:
        return Checked(
            "warning", "disk", f"{told}. The server's free space cannot be seen from here: check it."
        )
    if free < growth:
        return Checked(
            "blocker",
            "disk",
            f"{told}; only {readable_size(free)} are. Make room, or migrate table by table.",
        )
    if free < need:
        return Checked("warning", "disk", f"{told}; {readable_size(free)} are.")
    return Checked("ok", "disk", f"{told}; {readable_size(free)} are")


def readable_size(size: int) -> str:
    """Bytes as a person reads them: ``12 MB``."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TB"
