"""Proposes a catalogue for a database that nobody has catalogued: by names, types, and what sampled values look like.

Values are read in read-only transactions with a time limit, looked at in memory, and forgotten: what is told of them is
which form how many of them have. A proposal is a guess with its reasons, for a person to decide on; what is left out
although something speaks for it is named, too.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, LiteralString

import psycopg
import yaml
from psycopg.sql import SQL, Composed, Identifier
from psycopg.sql import Literal as SqlLiteral
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.bookkeeping.install import SCHEMA
from alphapulse_encryption.migration.discovery.value_patterns import look_at, look_into
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.gates.preflight import readable_size
from alphapulse_encryption.migration.postgres.database import Connection, Database, answer
from alphapulse_encryption.migration.schema.definition import NO_TABLES, OF_THE_APPLICATION
from alphapulse_encryption.migration.schema.names import short_name
from alphapulse_encryption.migration.schema.reachable_code import foreign_code
from alphapulse_encryption.migration.schema.sensitive_names import Category, kind_of, looks_sensitive

SAMPLED_ROWS = 1_000
LONGEST_SAMPLE = "10s"
# How long a table that somebody holds is waited for.
LONGEST_WAIT = "1s"
_BLOCK = 8192
# A longer value is looked at up to here.
LONGEST_VALUE = 4_096
# What is at least this likely is proposed; what is at least that likely is named.
PROPOSED_FROM, NAMED_FROM = 0.5, 0.25

_NAME_SCORES = {"likely": 0.8, "possible": 0.5}
# A document of whatever: some text in it may be anything.
_ANY_DOCUMENT = 0.5
# Values that are the same few again and again identify nobody.
_FEW_VALUES, _FEW_SCORE = 12, 0.3
# So many rows have to be there to tell that values repeat.
_ENOUGH_ROWS = 60
# What identifies one person or account at a time: of these, a handful of values is none.
_IDENTIFYING: frozenset[Category] = frozenset({"contact", "bank", "document", "free form"})
# At least this share of the rows has a value of its own where a lookup by it makes sense.
_DISTINCT_ENOUGH = 0.5

Kind = Literal["pii", "financial", "credentials"]
_KINDS: Mapping[Category, Kind] = {"credential": "credentials", "bank": "financial", "money": "financial"}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ColumnGuess(_Model):
    """A column that looks sensitive."""

    name: str
    type: str
    proposed: bool
    score: float = Field(description="0 to 1")
    category: str
    context: str | None
    search_index: str | None
    reasons: tuple[str, ...]


class TableGuess(_Model):
    """A table with such columns."""

    schema_name: str
    name: str
    rows: int = Field(description="the planner's estimate")
    bytes: int = Field(description="with indexes and TOAST")
    sampled_rows: int
    sampled: str = Field(description="how values were looked at, or why not")
    columns: tuple[ColumnGuess, ...]
    obstacles: tuple[str, ...] = Field(description="what stands in the way of encrypting it as it is")
    possible: bool = Field(description="whether it is in the proposed catalogue")


class Discovery(_Model):
    """What was looked at, and what is proposed."""

    version: Literal[1] = 1
    kind: Literal["discovery"] = "discovery"
    at: datetime
    schemas: tuple[str, ...]
    tables_looked_at: int
    columns_looked_at: int
    tables: tuple[TableGuess, ...]
    catalogue: dict[str, Any] | None = Field(
        description="as YAML would say it; null where nothing is proposed"
    )

    @property
    def proposed(self) -> tuple[tuple[TableGuess, ColumnGuess], ...]:
        """The columns of the proposed catalogue."""
        return tuple(
            (table, column)
            for table in self.tables
            if table.possible
            for column in table.columns
            if column.proposed
        )


_TABLES: LiteralString = """
SELECT c.oid, n.nspname, c.relname, c.relkind::text, greatest(c.reltuples, 0)::bigint,
       (SELECT coalesce(sum(greatest(l.relpages, 0)), greatest(c.relpages, 0)) FROM pg_partition_tree(c.oid) p
          JOIN pg_class l ON l.oid = p.relid)::bigint,
       (SELECT array_agg(a.attname::text ORDER BY a.attnum) FROM pg_index i
          JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = ANY (i.indkey::int2[])
         WHERE i.indrelid = c.oid AND i.indisprimary AND i.indisvalid)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE c.relkind IN ('r', 'p', 'f', 'm') AND (%(schemas)s::text[] IS NULL OR n.nspname = ANY (%(schemas)s))
   AND {of_the_application}
 ORDER BY n.nspname, c.relname
"""

_COLUMNS = """
SELECT a.attname, format_type(a.atttypid, a.atttypmod), format_type(b.oid, NULL),
       a.attgenerated <> '' OR a.attidentity <> '', has_column_privilege(a.attrelid, a.attnum, 'SELECT'),
       s.n_distinct, coalesce(s.null_frac, 0)::float8,
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum AND i.indisunique
                  AND i.indnkeyatts = 1 AND i.indpred IS NULL),
       EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum),
       EXISTS (SELECT FROM pg_constraint f WHERE f.conrelid = a.attrelid AND f.contype = 'f'
                  AND a.attnum = ANY (f.conkey))
  FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
  JOIN pg_type t ON t.oid = a.atttypid
  -- Of a domain, what it is made of.
  CROSS JOIN LATERAL (
      WITH RECURSIVE base (oid, next) AS (
          SELECT t.oid, t.typbasetype UNION ALL
          SELECT d.oid, d.typbasetype FROM base JOIN pg_type d ON d.oid = base.next WHERE base.next <> 0)
      SELECT oid FROM base WHERE next = 0) AS b
  LEFT JOIN pg_stats s ON s.schemaname = n.nspname AND s.tablename = c.relname AND s.attname = a.attname
   AND s.inherited = (c.relkind = 'p')
 WHERE a.attrelid = %s AND a.attnum > 0 AND NOT a.attisdropped
 ORDER BY a.attnum
"""

# Waits for whoever holds the table; the pages as vacuum last counted them do not.
_BYTES = """
SELECT coalesce(sum(pg_total_relation_size(relid)), pg_total_relation_size(%s))::bigint FROM pg_partition_tree(%s)
"""


@dataclass(frozen=True)
class _Column:
    name: str
    type: str
    base_type: str
    generated: bool
    readable: bool
    n_distinct: float | None
    null_share: float
    unique: bool
    indexed: bool
    refers: bool

    @property
    def kind(self) -> str:
        return kind_of(self.base_type)


@dataclass(frozen=True)
class _Table:
    oid: int
    schema_name: str
    name: str
    relkind: str
    rows: int
    bytes: int
    pages: int
    key: tuple[str, ...]
    columns: tuple[_Column, ...]

    @property
    def label(self) -> str:
        return self.name if self.schema_name == "public" else f"{self.schema_name}.{self.name}"


@dataclass
class _Sample:
    """Values of a table, those of each column that are not NULL; they go no further than the functions below."""

    rows: int = 0
    note: str = ""
    values: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def repeats(self, column: _Column) -> tuple[int, int]:
        """How many values a column has in the sample, and how many different ones."""
        values = self.values.get(column.name, ())
        return len(values), len(set(values))


def discover(database: Database, *, schemas: Sequence[str] = (), sample: int = SAMPLED_ROWS) -> Discovery:
    """Look through a database, and propose what to encrypt.

    Args:
        schemas: which ones to look at; all of the application's where none is named.
        sample: rows of each table whose values are looked at, at most; 0 looks at no value.

    Raises:
        ConfigurationError: there is no schema of a name, or the database cannot be reached.
        DatabaseFailure: the server refused a question about its catalogues.
    """
    reading = replace(database, read_only=True)
    with reading.session("look for sensitive columns") as connection:
        connection.execute("SELECT set_config('lock_timeout', %s, false)", [LONGEST_WAIT])
        tables = _read_tables(connection, schemas)
        taken = connection.execute(
            "SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
        ).fetchall()
        names = _Names(set(taken), {})
        looked_at = [_look(connection, table, names, sample) for table in tables]
    guesses = _checked(reading, [guess for guess in looked_at if guess is not None])
    entries = _entries(guesses)
    return Discovery(
        at=datetime.now(UTC),
        schemas=tuple(dict.fromkeys(table.schema_name for table in tables)),
        tables_looked_at=len(tables),
        columns_looked_at=sum(len(table.columns) for table in tables),
        tables=tuple(guesses),
        catalogue={"tables": entries} if entries else None,
    )


def _read_tables(connection: Connection, schemas: Sequence[str]) -> list[_Table]:
    known = {name for (name,) in connection.execute("SELECT nspname FROM pg_namespace")}
    if missing := [name for name in schemas if name not in known]:
        raise ConfigurationError(
            f"There is no schema {', '.join(missing)} in the database. Names are exact and case-sensitive."
        )
    rows = connection.execute(
        SQL(_TABLES).format(of_the_application=SQL(OF_THE_APPLICATION)),
        {"schemas": list(schemas) or None, "ours": SCHEMA},
    ).fetchall()
    return [
        _Table(
            *(oid, schema, name, relkind, estimate, _bytes(connection, oid, pages), pages, tuple(key or ())),
            tuple(_Column(*column) for column in connection.execute(_COLUMNS, [oid])),
        )
        for oid, schema, name, relkind, estimate, pages, key in rows
    ]


def _bytes(connection: Connection, oid: int, pages: int) -> int:
    try:
        return int(answer(connection, _BYTES, oid, oid))
    except psycopg.errors.LockNotAvailable:
        return pages * _BLOCK


def _look(connection: Connection, table: _Table, names: _Names, sample: int) -> TableGuess | None:
    values = _sample(connection, table, sample)
    guesses, unfit = [], []
    # What already belongs to a migration of ours.
    ours = {f"{column.name}_{what}" for column in table.columns for what in ("encrypted", "search")}
    for column in table.columns:
        guess = None if column.name in ours else _guess(table, column, values, names)
        if guess is None:
            continue
        if guess.proposed and (why := _unfit(table, column, guess)):
            unfit.append(why)
            guess = guess.model_copy(update={"proposed": False})
        guesses.append(guess)
    if not guesses:
        return None
    obstacle = NO_TABLES.get(table.relkind) or (None if table.key else _NO_KEY)
    return TableGuess(
        schema_name=table.schema_name,
        name=table.name,
        rows=table.rows,
        bytes=table.bytes,
        sampled_rows=values.rows,
        sampled=values.note,
        columns=tuple(guesses),
        obstacles=(*([obstacle] if obstacle else []), *unfit),
        possible=obstacle is None and any(guess.proposed for guess in guesses),
    )


_SAMPLED_KINDS = frozenset({"text", "number", "json", "network", "other"})


def _sample(connection: Connection, table: _Table, rows: int) -> _Sample:
    """Values of some rows, never of more than a time limit allows."""
    wanted = [column for column in table.columns if column.kind in _SAMPLED_KINDS]
    readable = [column for column in wanted if column.readable]
    if not rows or not wanted:
        return _Sample(note="values were not looked at")
    if not readable:
        return _Sample(note="values were not looked at: this role may not read them")
    if foreign_code(connection, table.oid):
        return _Sample(
            note="values were not looked at: code of other roles would run with the rights of this one"
        )
    try:
        with connection.transaction():
            connection.execute("SELECT set_config('statement_timeout', %s, true)", [LONGEST_SAMPLE])
            picked = connection.execute(_select(table, readable, rows)).fetchall()
    except psycopg.errors.QueryCanceled:
        return _Sample(note=f"values were not looked at: reading a sample took longer than {LONGEST_SAMPLE}")
    except psycopg.errors.LockNotAvailable:
        return _Sample(note="values were not looked at: another session holds the table")
    except psycopg.Error:
        # Row-level security, a foreign server, a damaged page: the names still tell something.
        return _Sample(note="values were not looked at: the server refused")
    note = f"values of {len(picked):,} rows were looked at"
    if len(readable) < len(wanted):
        note += f", of {len(readable)} of {len(wanted)} columns: the others this role may not read"
    columns = zip(*picked, strict=True) if picked else [()] * len(readable)
    found = {
        column.name: [value for value in values if value is not None]
        for column, values in zip(readable, columns, strict=True)
    }
    return _Sample(len(picked), note, found)


def _select(table: _Table, columns: Sequence[_Column], rows: int) -> Composed:
    shown = SQL(", ").join(
        SQL("left({}::text, {})").format(Identifier(column.name), SqlLiteral(LONGEST_VALUE))
        for column in columns
    )
    sample: Composed | SQL = SQL("")
    # A few times as many as are wanted, because pages are chosen and not rows.
    if table.relkind in ("r", "p") and table.rows > 10 * rows and table.pages > 1_000:
        percent = min(100.0, max(1e-4, 400.0 * rows / table.rows))
        sample = SQL("TABLESAMPLE SYSTEM ({})").format(SqlLiteral(percent))
    return SQL("SELECT {} FROM {} {} LIMIT {}").format(
        shown, Identifier(table.schema_name, table.name), sample, SqlLiteral(rows)
    )


def _guess(table: _Table, column: _Column, sample: _Sample, names: _Names) -> ColumnGuess | None:
    if column.kind in ("flag", "technical"):
        return None
    score, category, reasons = 0.0, None, []
    if suspicion := looks_sensitive(table.name, column.name, column.base_type):
        any_document = column.kind == "json" and suspicion.category == "free form"
        score = _ANY_DOCUMENT if any_document else _NAME_SCORES[suspicion.confidence]
        category, reasons = suspicion.category, [suspicion.reason]
    values = list(dict.fromkeys(sample.values.get(column.name, ())))
    if column.kind == "json":
        evidence = look_into(table.name, values)
    else:
        evidence = look_at(values, numbers=column.kind == "number")
    present, different = sample.repeats(column)
    if evidence is not None:
        verb = "contain" if evidence.inside else "are"
        reasons.append(f"{evidence.share:.0%} of {evidence.looked_at} values {verb}: {evidence.pattern}")
        if evidence.score > score:
            category = evidence.category
        score = 1 - (1 - score) * (1 - evidence.score)
    elif category in _IDENTIFYING and present >= _ENOUGH_ROWS and different <= _FEW_VALUES:
        # It may hold something else than its name says.
        reasons.append(f"only {different} different values in {present} rows")
        score *= _FEW_SCORE
    if category is None or score < NAMED_FROM:
        return None
    score = round(score, 2)
    proposed = score >= PROPOSED_FROM
    searched = _searched(column, sample) if proposed else None
    return ColumnGuess(
        name=column.name,
        type=column.type,
        proposed=proposed,
        score=score,
        category=category,
        context=names.context(table, _KINDS.get(category, "pii")) if proposed else None,
        search_index=names.index(table, column) if searched else None,
        reasons=(*reasons, *([searched] if searched else [])),
    )


def _searched(column: _Column, sample: _Sample) -> str | None:
    """Why rows are probably looked up by it."""
    # Two equal numbers or documents can be written in two ways, and have two tokens.
    if column.kind not in ("text", "uuid") or not (column.unique or column.indexed):
        return None
    if column.unique:
        return "searchable: it is unique"
    present, different = sample.repeats(column)
    share = 0.0
    if column.n_distinct is not None and column.n_distinct < 0:
        share = -column.n_distinct / max(1e-9, 1 - column.null_share)
    elif present >= _ENOUGH_ROWS:
        share = different / present
    return "searchable: it has an index, and most values are different" if share >= _DISTINCT_ENOUGH else None


@dataclass
class _Names:
    """Names of contexts and indexes: the same at every look, whatever else is in the database."""

    taken: set[tuple[Any, ...]]
    contexts: dict[str, _Table]

    def context(self, table: _Table, kind: Kind) -> str:
        """``users_pii``: one derived key for each table and kind."""
        name = f"{_plain(table.label)}_{kind}"
        # Two tables whose names differ in signs only.
        if self.contexts.setdefault(name, table) is not table:
            name += "_" + hashlib.sha256(f"{table.schema_name}\0{table.name}".encode()).hexdigest()[:8]
        return name

    def index(self, table: _Table, column: _Column) -> str:
        """``idx_users_email_search``."""
        name = short_name(f"idx_{table.name}_{column.name}_search", prefix="idx_")
        if (table.schema_name, name) in self.taken:
            name = short_name(f"idx_{table.name}_{column.name}_search_token", prefix="idx_token_")
        self.taken.add((table.schema_name, name))
        return name


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name).strip("_").lower() or "table"


_NO_KEY = (
    "it has no primary key, which batches and resumption go by: add one (ALTER TABLE … ADD COLUMN … bigint GENERATED "
    "ALWAYS AS IDENTITY PRIMARY KEY)"
)


def _unfit(table: _Table, column: _Column, guess: ColumnGuess) -> str | None:
    """Why a column cannot be in a catalogue."""
    if column.generated:
        return f"column {column.name} is generated or an identity: encrypt what it is made of"
    if column.name in table.key:
        return f"column {column.name} is part of the primary key, which is kept in text form: give the table another"
    if column.refers:
        return f"column {column.name} is a foreign key, which ciphertext cannot be"
    if column.kind == "other" and column.type.startswith("record"):
        return f"column {column.name} is of the type {column.type}, which the runtime library cannot read"
    try:
        Table.model_validate(_entry_of(table.schema_name, table.name, [guess]))
    except ValidationError as error:
        return f"column {column.name} cannot be named in a catalogue: {error.errors()[0]['msg']}"
    return None


def _entry_of(schema: str, name: str, columns: Iterable[ColumnGuess]) -> dict[str, Any]:
    of_schema = {} if schema == "public" else {"schema": schema}
    return {"name": name, **of_schema, "columns": [_column_entry(c) for c in columns if c.proposed]}


def _column_entry(column: ColumnGuess) -> dict[str, Any]:
    return column.model_dump(include={"name", "context", "search_index"}, exclude_none=True)


def _entries(guesses: Iterable[TableGuess]) -> list[dict[str, Any]]:
    return [_entry_of(guess.schema_name, guess.name, guess.columns) for guess in guesses if guess.possible]


def _checked(database: Database, guesses: Sequence[TableGuess]) -> list[TableGuess]:
    """With what the preflight says of the proposal; it knows more than is looked for here."""
    proposed = _entries(guesses)
    if not proposed:
        return list(guesses)
    catalogue = Catalogue.model_validate({"tables": proposed})
    report = preflight.check(database, catalogue.tables, None, once=True)
    findings = [f for f in (*report.blockers, *report.warnings) if not (f.of_role or f.of_entry)]
    keys = {(table.schema_name, table.name): table.key for table in catalogue.tables}
    found: list[TableGuess] = []
    for guess in guesses:
        key = keys.get((guess.schema_name, guess.name), "")
        about = [f for f in findings if key and (f.subject == key or f.subject.startswith(f"{key}."))]
        told = [
            f"{f.subject.removeprefix(key).removeprefix('.')}: {f.message}".removeprefix(": ") for f in about
        ]
        possible = guess.possible and not any(f.level == "blocker" for f in about)
        found.append(guess.model_copy(update={"obstacles": (*guess.obstacles, *told), "possible": possible}))
    return found


def as_yaml(discovery: Discovery) -> str:
    """The proposed catalogue with its reasons as comments; comments alone where nothing is proposed."""
    tables = len({(table.schema_name, table.name) for table, _ in discovery.proposed})
    lines = [
        *_comment(
            "A proposed catalogue: a guess by names, types and the form of sampled values, for a person to decide on. "
            f"Looked at: {discovery.tables_looked_at} tables with {discovery.columns_looked_at} columns in the schemas "
            f"{', '.join(discovery.schemas) or '-'}. Proposed: {len(discovery.proposed)} columns of {tables} tables. "
            "Beside each column: how sure that is, from 0 to 1, and why.",
        ),
        *_comment("A context names the derived key of a column, and must not change once data is encrypted."),
    ]
    if discovery.catalogue is not None:
        lines.append("tables:")
    for table in discovery.tables:
        lines += _table_lines(table) if table.possible else []
    others = [table for table in discovery.tables if not table.possible]
    if others:
        lines += ["", *_comment("Not possible as they are:")]
    for table in others:
        name = f"{table.schema_name}.{table.name}"
        lines += _comment(f"{name}: {_size(table)}; {'; '.join(table.obstacles)}", indent="#   ")
        for column in table.columns:
            lines += _comment(f"{column.name}: {_why(column)}", indent="#     ")
    return "\n".join(lines) + "\n"


def _table_lines(table: TableGuess) -> list[str]:
    lines = ["", *_comment(f"{_size(table)}; {table.sampled}", indent="  # ")]
    for obstacle in table.obstacles:
        lines += _comment(f"Note: {obstacle}", indent="  # ")
    entry = _entry_of(table.schema_name, table.name, ())
    del entry["columns"]
    lines += [*_item(entry, indent="  "), "    columns:"]
    for column in sorted(table.columns, key=lambda column: not column.proposed):
        if column.proposed:
            lines += _comment(_why(column), indent="      # ")
            lines += _item(_column_entry(column), indent="      ")
        else:
            lines += _comment(f"left out: {column.name} ({_why(column)})", indent="      # ")
    return lines


def _size(table: TableGuess) -> str:
    # More than two pages hold rows; without statistics nobody has counted them.
    rows = (
        f"about {table.rows:,} rows"
        if table.rows or table.bytes <= 65_536
        else "rows never counted (ANALYZE)"
    )
    return f"{rows}, {readable_size(table.bytes)}"


def _why(column: ColumnGuess) -> str:
    return f"{column.score:.2f} {column.category}, {column.type}: {'; '.join(column.reasons)}"


def _item(entry: dict[str, Any], indent: str) -> list[str]:
    text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True, width=10_000)
    return [indent + line for line in text.rstrip("\n").split("\n")]


def _comment(text: str, indent: str = "# ") -> list[str]:
    """A comment, folded; a name in it cannot end it."""
    plain = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", "?", text)
    return textwrap.wrap(
        plain,
        110,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )
