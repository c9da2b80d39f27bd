"""Looks for values that were dropped where they may still lie: in the data files, and in what else the server keeps.

The values are opened from ciphertext and never leave this process: files are brought to them, in whole, free space
included. A value can hide from such a look: compressed in TOAST or in the write-ahead log, or of a type whose form on
disk is too short to be told from chance. So what is not found is only said to be not found.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any
from typing import Literal as OneOf
from uuid import UUID

import psycopg
from ahocorasick_rs import BytesAhoCorasick
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.migration.bookkeeping.backups import backups_known
from alphapulse_encryption.migration.bookkeeping.install import SCHEMA
from alphapulse_encryption.migration.postgres.database import Connection, answer
from alphapulse_encryption.migration.schema.definition import TableDefinition

Finding = OneOf["found", "not found", "cannot be seen"]

VALUES_PER_COLUMN = 6
# Of so many sampled rows, the values that are told best from chance.
_SAMPLED_ROWS = 400
# Shorter than this, bytes occur by chance, or in many places for good reasons.
_SHORTEST, _LONGEST = 6, 200
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class KnownValues:
    """Values to look for, as they lie on disk and as text; and columns of which none could be told from chance."""

    patterns: tuple[bytes, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    unsearchable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Place:
    """Where was looked, and what was found; no value.

    Args:
        values: how many of the known values are there.
        before: how many of them were before an erasure; None where that is not known.
        bytes: how much was read.
        remark: what an operator has to know of it.
        erasable: whether an erasure is to leave nothing there.
    """

    name: str
    finding: Finding
    values: int = 0
    before: int | None = None
    bytes: int = 0
    remark: str = ""
    erasable: bool = False


# On-disk forms


def disk_form(text: str, type_: str, encoding: str) -> list[tuple[bytes, str]]:
    """What a value's bytes on disk contain for certain, if it is not compressed.

    Args:
        type_: as ``format_type`` prints it.
        encoding: of the database, as Python calls it.

    Returns:
        Bytes with the text that they are of: one, several (the strings of a jsonb document), or none where nothing
        distinctive is known.
    """
    base = re.sub(r"\(.*?\)", "", type_).strip().rpartition(".")[2].strip('"')
    found: list[tuple[bytes, str]] = []
    # A value that is none of its type, or cannot be encoded, cannot have come from the column as it was.
    with contextlib.suppress(ValueError, ArithmeticError, UnicodeError):
        match base:
            case "text" | "character varying" | "character" | "json" | "citext":
                found = [_beginning(text.rstrip(" "), encoding)]
            case "jsonb":
                found = [_beginning(leaf, encoding) for leaf in _strings(json.loads(text))]
            case "numeric":
                found = [(pattern, text) for pattern in _numeric(Decimal(text))]
            case "uuid":
                found = [(UUID(text).bytes, text)]
            case "bytea":
                found = [(bytes.fromhex(text[2 : 2 + 2 * _LONGEST]), text[: 2 + 2 * _LONGEST])]
    return [form for form in found if len(form[0]) >= _SHORTEST]


def _beginning(text: str, encoding: str) -> tuple[bytes, str]:
    pattern = text.encode(encoding)[:_LONGEST]
    return pattern, pattern.decode(encoding, "ignore")


def _strings(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, list | dict):
        for item in document.values() if isinstance(document, dict) else document:
            yield from _strings(item)


def _numeric(value: Decimal) -> list[bytes]:
    """A numeric's digits to the base of 10,000 behind its short header (src/backend/utils/adt/numeric.c).

    Fewer than three such digits are too common to be looked for.
    """
    sign, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return []  # NaN and the infinities
    scale = max(-exponent, 0)
    of_fraction = -(-scale // 4)
    number = int("".join(map(str, digits))) * 10 ** (exponent + 4 * of_fraction)
    groups: list[int] = []
    while number:
        number, group = divmod(number, 10_000)
        groups.insert(0, group)
    weight = len(groups) - 1 - of_fraction
    while groups and groups[-1] == 0:
        groups.pop()
    if len(groups) < 3 or scale > 63 or not -64 <= weight <= 63:
        return []
    header = 0x8000 | (0x2000 if sign else 0) | scale << 7 | (weight & 0x7F)
    order = "<" if sys.byteorder == "little" else ">"
    return [struct.pack(f"{order}H{len(groups)}h", header, *groups)]


def sample_values(
    connection: Connection, definition: TableDefinition, types: Mapping[str, str], cipher: EnvelopeFormat
) -> KnownValues:
    """Open some values of every dropped column, by the types they had, from their ciphertext.

    Raises:
        DecryptionError: a ciphertext cannot be opened.
    """
    encoding = _python_encoding(connection)
    patterns: dict[bytes, str] = {}
    unsearchable: list[str] = []
    columns = [column for column in definition.table.columns if column.name in types]
    sampled = {column: _sampled(connection, definition, column) for column in columns}
    # What every envelope says in the clear: the format's own words, and the contexts.
    said = b"".join(envelopes[0].encode() for envelopes in sampled.values() if envelopes)
    for column, envelopes in sampled.items():
        texts = sorted({text for text in cipher.decrypt_many(envelopes, column.context) if text})
        forms = (form for text in texts for form in disk_form(text, types[column.name], encoding))
        every = [form for form in forms if form[0] not in said]
        # The smallest and the largest are the likeliest in a histogram, the longest are told best from chance,
        # and the others are any.
        longest = sorted(every, key=lambda form: -len(form[0]))[: VALUES_PER_COLUMN // 3]
        any_other = sorted(every, key=lambda form: form[0][::-1])
        wanted = dict.fromkeys([*every[:1], *every[-1:], *longest, *any_other])
        chosen = dict(list(wanted)[:VALUES_PER_COLUMN])
        patterns |= chosen
        unsearchable += [] if chosen else [column.name]
    return KnownValues(tuple(patterns), tuple(patterns.values()), tuple(unsearchable))


def _sampled(connection: Connection, definition: TableDefinition, column: Column) -> list[str]:
    # A sample of pages; where there are few rows, or the pages chosen have none, all of them.
    share = 100.0 * 20 * _SAMPLED_ROWS / max(definition.estimated_rows, 1)
    pages = SQL("TABLESAMPLE SYSTEM ({})").format(Literal(share))
    for sample in (SQL(""),) if share >= 100.0 else (pages, SQL("")):
        rows = connection.execute(
            SQL("SELECT {0} FROM {1} {2} WHERE {0} IS NOT NULL LIMIT {3}").format(
                Identifier(column.encrypted), definition.identifier, sample, Literal(_SAMPLED_ROWS)
            )
        ).fetchall()
        if rows:
            return [envelope for (envelope,) in rows]
    return []


def _python_encoding(connection: Connection) -> str:
    """What Python calls the database's encoding: text lies on disk in it."""
    name = answer(
        connection, "SELECT set_config('client_encoding', current_setting('server_encoding'), false)"
    )
    try:
        return "utf-8" if name == "SQL_ASCII" else connection.info.encoding
    finally:
        connection.execute("SELECT set_config('client_encoding', 'UTF8', false)")


# Files: the server's data directory. Paths are relative to it; what has gone meanwhile is empty.


@dataclass(frozen=True)
class LocalFiles:
    """A data directory on this machine."""

    root: Path

    def entries(self, directory: str) -> list[tuple[str, bool]]:
        """Names in a directory, and whether each is a directory."""
        with contextlib.suppress(FileNotFoundError):
            found = (self.root / directory).iterdir()
            return [(entry.name, entry.is_dir()) for entry in found if entry.is_dir() or entry.is_file()]
        return []

    def chunks(self, path: str) -> Iterator[bytes]:
        with contextlib.suppress(FileNotFoundError), (self.root / path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


@dataclass(frozen=True)
class ServerFiles:
    """A data directory read through the server, by a role that may (``pg_read_server_files``), in autocommit mode."""

    connection: Connection

    def entries(self, directory: str) -> list[tuple[str, bool]]:
        return self.connection.execute(
            "SELECT name, s.isdir FROM pg_ls_dir(%(directory)s, true, false) AS name CROSS JOIN LATERAL "
            "pg_stat_file(%(directory)s || '/' || name, true) AS s WHERE s.isdir IS NOT NULL ORDER BY 1",
            {"directory": directory or "."},
        ).fetchall()

    def chunks(self, path: str) -> Iterator[bytes]:
        offset = 0
        query = "SELECT pg_read_binary_file(%s, %s, %s, true)"
        while chunk := self.connection.execute(query, [path, offset, _CHUNK], binary=True).fetchall()[0][0]:
            yield bytes(chunk)
            offset += len(chunk)


DataFiles = LocalFiles | ServerFiles


def open_data_files(connection: Connection) -> DataFiles | None:
    """The data directory of this very server; None where it can be read neither from here nor through the server."""
    try:
        row = connection.execute(
            "SELECT current_setting('data_directory'), system_identifier FROM pg_control_system()"
        ).fetchone()
        if row is not None and _is_of(Path(row[0]), int(row[1])):
            return LocalFiles(Path(row[0]))
    except psycopg.errors.InsufficientPrivilege:
        pass
    try:
        connection.execute(
            "SELECT pg_read_binary_file('PG_VERSION', 0, 1, true), isdir FROM pg_stat_file('PG_VERSION', true) "
            "WHERE EXISTS (SELECT FROM pg_ls_dir('base', true, false))"
        )
    except psycopg.Error:
        return None
    return ServerFiles(connection)


def _is_of(directory: Path, system: int) -> bool:
    # A directory of that name may be another server's: the control file begins with the cluster's identifier
    # (src/include/catalog/pg_control.h).
    try:
        with (directory / "global" / "pg_control").open("rb") as file:
            identifier = file.read(8)
        next((directory / "base").iterdir(), None)
    except OSError:
        return False
    # pg_control_system() shows the unsigned number as a signed one.
    return len(identifier) == 8 and struct.unpack("=q", identifier)[0] == system


def look_through(patterns: Sequence[bytes], chunks: Iterable[bytes]) -> tuple[set[int], int]:
    """Which of the patterns occur in a stream, by their position, and how many bytes it has.

    Looking takes little longer for thirty than for one.
    """
    found: set[int] = set()
    overlap = max(map(len, patterns), default=1) - 1
    size, tail, missing = 0, b"", BytesAhoCorasick(patterns) if patterns else None
    for chunk in chunks:
        size += len(chunk)
        window = tail + chunk
        # Matches of one pattern may hide those of another within them: they only tell where a closer look is due.
        if missing is not None and missing.find_matches_as_indexes(window):
            found |= {n for n, one in enumerate(patterns) if n not in found and one in window}
            # What was found is looked for no more: a value that is in every row would be matched a million times.
            rest = [one for n, one in enumerate(patterns) if n not in found]
            missing = BytesAhoCorasick(rest) if rest else None
        tail = window[-overlap:] if overlap else b""
    return found, size


# Places

# Every relation that has files, with the table it belongs to: an index's table, a TOAST table's owner.
_RELATIONS = """
SELECT pg_relation_filepath(c.oid), coalesce(tn.nspname, ixn.nspname, n.nspname),
       coalesce(owner.relname, ix.relname, c.relname), coalesce(owner.oid, ix.oid, c.oid)::bigint,
       CASE WHEN c.relkind IN ('i', 'I') AND toast.oid IS NULL THEN 'index ' || c.relname
            WHEN toast.oid IS NOT NULL OR c.relkind = 't' THEN 'TOAST' ELSE 'heap' END
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
  LEFT JOIN pg_index x ON x.indexrelid = c.oid
  LEFT JOIN pg_class ix ON ix.oid = x.indrelid AND ix.relkind <> 't'
  LEFT JOIN pg_namespace ixn ON ixn.oid = ix.relnamespace
  LEFT JOIN pg_class toast ON toast.oid = x.indrelid AND toast.relkind = 't'
  LEFT JOIN pg_class owner ON owner.reltoastrelid = coalesce(toast.oid, c.oid) AND (toast.oid IS NOT NULL
                                                                               OR c.relkind = 't')
  LEFT JOIN pg_namespace tn ON tn.oid = owner.relnamespace
 WHERE pg_relation_filepath(c.oid) IS NOT NULL
"""

STATISTICS = "planner statistics (pg_statistic, pg_statistic_ext_data)"
WAL = "write-ahead log (pg_wal)"
_TEMPORARY = "temporary files"
_NOBODYS = "files of no table"
_BOOKKEEPING = "bookkeeping (schema alphapulse_encryption)"
_OTHER_TABLES = "all other tables and indexes of the database"
OTHER_FILES = "other files of the data directory (settings, the server's log, pg_stat_statements)"
_REMARKS = {
    _BOOKKEEPING: "this should not be: please report it",
    _NOBODYS: "a crash left them; a dump and restore gets rid of them",
    _TEMPORARY: "they go with the sessions that use them, or at the server's next start",
    WAL: "old segments are recycled and overwritten in time; until then they keep what was written before",
    OTHER_FILES: "look at what logs statements, and rotate or remove it",
}
_REMAINS = (
    "old versions, kept for a long transaction, a prepared one or a replication slot: end it, and run again"
)
_ELSEWHERE = "the same value occurs there: it may be a copy, or a value of its own"
_UNREADABLE = "the data directory can be read neither from here nor through the server (pg_read_server_files)"


# A database's directory; in a table space it is below one that is named by the version.
_OF_A_DATABASE = re.compile(r"(base|pg_tblspc/\d+/[^/]+)/\d+")


def _relations(connection: Connection, tables: Sequence[int]) -> tuple[dict[str, str], list[str]]:
    """The places of the database's relations, by the path of their first file; and which of them are to be clean."""
    found: dict[str, str] = {}
    own = set()
    for path, schema, table, oid, part in connection.execute(_RELATIONS).fetchall():
        found[path] = f"{schema}.{table}"
        if oid in tables:
            found[path] += f": {part}"
            own.add(found[path])
        elif schema == "pg_catalog" and table in ("pg_statistic", "pg_statistic_ext_data"):
            found[path] = STATISTICS
        elif schema == SCHEMA:
            found[path] = _BOOKKEEPING
    return found, [*sorted(own), STATISTICS]


def _files(files: DataFiles, relations: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Every file with its place, but for those of other databases."""
    databases = {path.rpartition("/")[0] for path in relations}
    directories = [""]
    while directories:
        directory = directories.pop()
        if _OF_A_DATABASE.fullmatch(directory) and directory not in databases:
            continue
        for name, is_directory in files.entries(directory):
            path = f"{directory}/{name}" if directory else name
            if is_directory:
                directories.append(path)
            elif (place := _place(relations, directory, name)) is not None:
                yield path, place


def _place(relations: Mapping[str, str], directory: str, name: str) -> str | None:
    if "/pgsql_tmp" in directory:
        return _TEMPORARY
    if _OF_A_DATABASE.fullmatch(directory):
        # Segments, forks and temporary tables: 16384, 16384.1, 16384_fsm, t3_16384.
        number = re.match(r"(t\d+_)?\d+", name)
        return None if number is None else relations.get(f"{directory}/{number[0]}", _NOBODYS)
    if directory.startswith("pg_wal"):
        return WAL
    return None if directory.startswith(("base", "pg_tblspc")) else OTHER_FILES


@dataclass
class _Look:
    """What was found so far, by place, in the order in which the places were met."""

    files: DataFiles
    patterns: Sequence[bytes]
    found: dict[str, set[int]] = field(default_factory=dict)
    bytes: Counter[str] = field(default_factory=Counter)
    unreadable: set[str] = field(default_factory=set)

    def into(self, place: str, path: str) -> None:
        """Look through a file that belongs to a place."""
        found, size = set[int](), 0
        try:
            found, size = look_through(self.patterns, self.files.chunks(path))
        except (OSError, psycopg.Error):
            self.unreadable.add(place)
        self.found.setdefault(place, set()).update(found)
        self.bytes[place] += size

    def place(self, name: str, remark: str, *, erasable: bool = False) -> Place:
        """What came of it."""
        if values := len(self.found.get(name, ())):
            return Place(name, "found", values, bytes=self.bytes[name], remark=remark, erasable=erasable)
        if name in self.unreadable:
            return Place(name, "cannot be seen", remark="a file cannot be read", erasable=erasable)
        return Place(name, "not found", bytes=self.bytes[name], erasable=erasable)


def look_into_table(
    connection: Connection, files: DataFiles | None, tables: Sequence[int], values: KnownValues
) -> tuple[dict[str, int], int]:
    """How many values are in what an erasure is to clean: the files of the table, and the planner's statistics.

    Args:
        files: None where they cannot be read.
        tables: object identifiers of the table and its partitions.

    Returns:
        Numbers by the name of the place, and how many bytes were read.
    """
    if files is None:
        return {}, 0
    relations, own = _relations(connection, tables)
    look = _Look(files, values.patterns)
    for path, place in _files(files, relations):
        if place in own:
            look.into(place, path)
    return {name: len(found) for name, found in look.found.items()}, look.bytes.total()


def look_everywhere(
    connection: Connection,
    files: DataFiles | None,
    definition: TableDefinition,
    tables: Sequence[int],
    values: KnownValues,
    *,
    statistics_left: str = "",
) -> list[Place]:
    """Look through every file of the database, and what else the server keeps in its data directory.

    Args:
        statistics_left: why the planner's statistics were not rewritten, if so.
    """
    relations, own = _relations(connection, tables)
    if files is None:
        return [
            *(Place(name, "cannot be seen", remark=_UNREADABLE, erasable=True) for name in own),
            *(Place(name, "cannot be seen", remark=_UNREADABLE) for name in (_OTHER_TABLES, *_REMARKS)),
            *_out_of_sight(connection),
        ]
    look = _Look(files, values.patterns)
    for path, place in _files(files, relations):
        look.into(place, path)
    others = sorted(look.found.keys() - {*own, *_REMARKS})
    quiet = [name for name in others if not look.found[name] and name not in look.unreadable]
    return [
        *(
            _without_live(
                connection, definition, look, name, values, statistics_left if name == STATISTICS else ""
            )
            for name in own
        ),
        *(look.place(name, _ELSEWHERE) for name in others if name not in quiet),
        Place(_OTHER_TABLES, "not found", bytes=sum(look.bytes[name] for name in quiet)),
        *(look.place(name, remark) for name, remark in _REMARKS.items()),
        *_out_of_sight(connection),
    ]


_LIVE_STATISTICS = SQL("""
SELECT concat_ws(E'\\n', array_to_string(most_common_vals::text::text[], E'\\n'),
                 array_to_string(histogram_bounds::text::text[], E'\\n'),
                 array_to_string(most_common_elems::text::text[], E'\\n'))
  FROM pg_stats
""")


def _without_live(
    connection: Connection,
    definition: TableDefinition,
    look: _Look,
    name: str,
    values: KnownValues,
    left: str,
) -> Place:
    """A place to be clean; a value that another column shows, or has in its statistics, is no remnant."""
    if found := look.found.get(name):
        query: SQL | Composed = _LIVE_STATISTICS
        if name != STATISTICS:
            derived = {name for column in definition.table.columns for name in column.derived}
            others = map(Identifier, [column for column in definition.columns if column not in derived])
            query = SQL("SELECT concat_ws(E'\\n', {}) FROM {}").format(
                SQL(", ").join(others), definition.identifier
            )
        live = _seen(connection, query, [values.texts[number] for number in found])
        look.found[name] = {number for number in found if values.texts[number] not in live}
    return look.place(name, left or _REMAINS, erasable=True)


def _seen(connection: Connection, query: SQL | Composed, texts: Sequence[str]) -> set[str]:
    """Which of the texts occur in the rows, which are brought here for it."""
    # In a jsonb document a text may be shown with escapes.
    forms = {text: (text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts}
    seen: set[str] = set()
    with connection.transaction(), connection.cursor(name="live values") as cursor:
        cursor.itersize = 5_000
        for (row,) in cursor.execute(query):
            seen |= {text for text in forms.keys() - seen if any(form in row for form in forms[text])}
    return seen


def _out_of_sight(connection: Connection) -> list[Place]:
    """What no look from here can reach, as far as the server knows of it."""
    streaming, slots, archiving, others = connection.execute(
        "SELECT (SELECT count(*) FROM pg_stat_replication), "
        "(SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical'), "
        "current_setting('archive_mode') <> 'off', "
        "(SELECT count(*) FROM pg_database WHERE datname <> current_database() AND NOT datistemplate)"
    ).fetchall()[0]
    backups, _ = backups_known(connection)
    places = {
        f"replicas ({max(streaming, slots)} known to this server)": "a physical replica follows the rewrite; what it "
        "kept of its own, and a logical one, do not",
        "archived write-ahead log": archiving and "it keeps everything written before",
        f"backups ({backups} of ours)": backups
        and "encrypted, and with the plaintext in those from before the drop: remove them in your time",
        f"{others} other databases of this server": others and "not looked into",
        "disk blocks of deleted files, and snapshots of the disk": "below the database",
    }
    return [Place(name, "cannot be seen", remark=remark) for name, remark in places.items() if remark]
