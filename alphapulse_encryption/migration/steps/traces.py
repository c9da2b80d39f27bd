"""Looks for values that were dropped where they may still lie: in the data files, and in what else the server keeps.

The values are opened from ciphertext, kept in memory only, and never leave this process: files are brought to them, not
they to the files. They are looked for in the form in which PostgreSQL writes them to disk, whole files over, free space
included. A value can hide from such a look: compressed in TOAST or in the write-ahead log, or of a type whose form on
disk is too short to be told from chance. So what is not found is only said to be not found.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import UUID

import psycopg
from ahocorasick_rs import BytesAhoCorasick
from psycopg.sql import SQL, Composed, Identifier

from alphapulse_encryption.catalogue import Column
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.migration.bookkeeping.tracking import BOOKKEEPING_TABLES
from alphapulse_encryption.migration.schema.definition import TableDefinition

Connection = psycopg.Connection[Any]
Finding = Literal["found", "not found", "cannot be seen"]

VALUES_PER_COLUMN = 6
# Of so many sampled rows, the values that are told best from chance.
_SAMPLED_ROWS = 400
# Shorter than this, bytes occur by chance, or in many places for good reasons.
_SHORTEST, _LONGEST = 6, 200
_CHUNK = 8 * 1024 * 1024


@dataclass(frozen=True)
class KnownValues:
    """Values to look for; their bytes are shown nowhere.

    Args:
        patterns: as they lie on disk.
        texts: the same as text.
        columns: how many of them are of each column.
    """

    patterns: tuple[bytes, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    columns: Mapping[str, int]

    @property
    def unsearchable(self) -> tuple[str, ...]:
        """The columns of which no value could be told from chance."""
        return tuple(name for name, count in self.columns.items() if not count)


@dataclass(frozen=True)
class Place:
    """Where was looked, and what was found; no value.

    Args:
        name: in words.
        finding: whether any of the known values is there.
        values: how many of them are.
        before: how many of them were before an erasure; None where that is not known.
        bytes: how much was read.
        remark: what an operator has to know of it; "" where nothing.
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
        text: the value's text form.
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
        if base in {"text", "character varying", "character", "json", "citext"}:
            found = [_beginning(text.rstrip(" "), encoding)]
        elif base == "jsonb":
            found = [_beginning(leaf, encoding) for leaf in _strings(json.loads(text))]
        elif base == "numeric":
            found = [(pattern, text) for pattern in _numeric(Decimal(text))]
        elif base == "uuid":
            found = [(UUID(text).bytes, text)]
        elif base == "bytea":
            found = [(bytes.fromhex(text[2 : 2 + 2 * _LONGEST]), text[: 2 + 2 * _LONGEST])]
    return [form for form in found if len(form[0]) >= _SHORTEST]


def _beginning(text: str, encoding: str) -> tuple[bytes, str]:
    pattern = text.encode(encoding)[:_LONGEST]
    return pattern, pattern.decode(encoding, "ignore")


def _strings(document: Any) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, list):
        for item in document:
            yield from _strings(item)
    elif isinstance(document, dict):
        for item in document.values():
            yield from _strings(item)


def _numeric(value: Decimal) -> list[bytes]:
    """A numeric's digits to the base of 10,000 behind its short header (src/backend/utils/adt/numeric.c).

    Fewer than three such digits are too common to be looked for.
    """
    sign, _, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        return []  # NaN and the infinities
    scale = max(-exponent, 0)
    whole, _, fraction = f"{abs(value):f}".partition(".")
    whole = whole.zfill(-(-len(whole) // 4) * 4)
    fraction = fraction.ljust(-(-len(fraction) // 4) * 4, "0")
    groups = [int((whole + fraction)[at : at + 4]) for at in range(0, len(whole + fraction), 4)]
    weight = len(whole) // 4 - 1
    while groups and groups[0] == 0:
        groups, weight = groups[1:], weight - 1
    while groups and groups[-1] == 0:
        groups = groups[:-1]
    if len(groups) < 3 or scale > 63 or not -64 <= weight <= 63:
        return []
    header = 0x8000 | (0x2000 if sign else 0) | scale << 7 | (weight & 0x7F)
    order = "<" if sys.byteorder == "little" else ">"
    return [struct.pack(f"{order}H{len(groups)}h", header, *groups)]


def sample_values(
    connection: Connection,
    definition: TableDefinition,
    types: Mapping[str, str],
    cipher: EnvelopeFormat,
) -> KnownValues:
    """Open some values of every dropped column from their ciphertext.

    Args:
        connection: to the target.
        definition: the table without its plaintext.
        types: the types that the dropped columns had.
        cipher: opens the ciphertext.

    Raises:
        DecryptionError: a ciphertext cannot be opened.
    """
    encoding = _python_encoding(connection)
    patterns: dict[bytes, str] = {}
    counts: dict[str, int] = {}
    sampled = {
        column: _sampled(connection, definition, column)
        for column in definition.table.columns
        if column.name in types
    }
    # What every envelope says in the clear: the format's own words, and the contexts.
    said = b"".join(envelopes[0].encode() for envelopes in sampled.values() if envelopes)
    for column, envelopes in sampled.items():
        texts = [text for text in cipher.decrypt_many(envelopes, column.context) if text]
        # The smallest and the largest are the likeliest in a histogram, the longest are told best from chance,
        # and the others are any.
        forms = {text: disk_form(text, types[column.name], encoding) for text in sorted(texts)}
        every = [form for found in forms.values() for form in found if form[0] not in said]
        longest = sorted(every, key=lambda form: -len(form[0]))[: VALUES_PER_COLUMN // 3]
        any_other = sorted(every, key=lambda form: form[0][::-1])
        wanted = dict.fromkeys([*every[:1], *every[-1:], *longest, *any_other])
        chosen = dict(list(wanted)[:VALUES_PER_COLUMN])
        patterns |= chosen
        counts[column.name] = len(chosen)
    return KnownValues(tuple(patterns), tuple(patterns.values()), counts)


def _sampled(connection: Connection, definition: TableDefinition, column: Column) -> list[str]:
    # A sample of pages; where there are few rows, all of them.
    share = min(100.0, 100.0 * 20 * _SAMPLED_ROWS / max(definition.estimated_rows, 1))
    if share < 100.0:
        rows = connection.execute(
            SQL("SELECT {0} FROM {1} TABLESAMPLE SYSTEM (%s) WHERE {0} IS NOT NULL LIMIT %s").format(
                Identifier(column.encrypted), definition.identifier
            ),
            [share, _SAMPLED_ROWS],
        ).fetchall()
        if rows:
            return [envelope for (envelope,) in rows]
    rows = connection.execute(
        SQL("SELECT {0} FROM {1} WHERE {0} IS NOT NULL LIMIT %s").format(
            Identifier(column.encrypted), definition.identifier
        ),
        [_SAMPLED_ROWS],
    ).fetchall()
    return [envelope for (envelope,) in rows]


def _python_encoding(connection: Connection) -> str:
    """What Python calls the database's encoding: text lies on disk in it."""
    row = connection.execute(
        "SELECT set_config('client_encoding', current_setting('server_encoding'), false)"
    ).fetchone()
    try:
        name = connection.info.encoding
        return "utf-8" if row is None or row[0] == "SQL_ASCII" else name
    finally:
        connection.execute("SELECT set_config('client_encoding', 'UTF8', false)")


# Files


class DataFiles(Protocol):
    """The server's data directory, read from here or through the server. Paths are relative to it."""

    def directories(self, directory: str) -> list[str]:
        """Names of the directories in a directory; none where it is not there."""

    def files(self, directory: str) -> list[str]:
        """Names of the files in a directory; none where it is not there."""

    def chunks(self, path: str) -> Iterator[bytes]:
        """A file's content; a file that has gone meanwhile is empty."""


class LocalFiles:
    """A data directory on this machine.

    Args:
        root: the directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def directories(self, directory: str) -> list[str]:
        """See :class:`DataFiles`."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in (self._root / directory).iterdir() if entry.is_dir())
        return []

    def files(self, directory: str) -> list[str]:
        """See :class:`DataFiles`."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in (self._root / directory).iterdir() if entry.is_file())
        return []

    def chunks(self, path: str) -> Iterator[bytes]:
        """See :class:`DataFiles`."""
        with contextlib.suppress(FileNotFoundError), (self._root / path).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


class ServerFiles:
    """A data directory read through the server, by a role that may (``pg_read_server_files``).

    Args:
        connection: in autocommit mode.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def directories(self, directory: str) -> list[str]:
        """See :class:`DataFiles`."""
        return self._entries(directory, True)

    def files(self, directory: str) -> list[str]:
        """See :class:`DataFiles`."""
        return self._entries(directory, False)

    def _entries(self, directory: str, directories: bool) -> list[str]:
        rows = self._connection.execute(
            "SELECT name FROM pg_ls_dir(%(directory)s, true, false) AS name CROSS JOIN LATERAL "
            "pg_stat_file(%(directory)s || '/' || name, true) AS s WHERE s.isdir = %(directories)s ORDER BY 1",
            {"directory": directory or ".", "directories": directories},
        )
        return [name for (name,) in rows]

    def chunks(self, path: str) -> Iterator[bytes]:
        """See :class:`DataFiles`."""
        offset = 0
        while True:
            row = self._connection.execute(
                "SELECT pg_read_binary_file(%s, %s, %s, true)", [path, offset, _CHUNK], binary=True
            ).fetchone()
            chunk = row[0] if row is not None else None
            if not chunk:
                return
            yield bytes(chunk)
            offset += len(chunk)


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


class ManyPatterns:
    """Many byte strings, looked for at once, so that looking takes little longer for thirty than for one.

    Args:
        patterns: what to look for.
    """

    def __init__(self, patterns: Sequence[bytes]) -> None:
        self._patterns = tuple(patterns)
        self._overlap = max(map(len, patterns), default=1) - 1

    def look_through(self, chunks: Iterator[bytes]) -> tuple[set[int], int]:
        """Which of the patterns occur in a stream, and how long it is.

        Returns:
            Positions in the patterns, and bytes read.
        """
        found: set[int] = set()
        size = 0
        missing = self._missing(found)
        tail = b""
        for chunk in chunks:
            size += len(chunk)
            window = tail + chunk
            # Matches of one pattern may hide those of another within them: they only tell where a closer look is due.
            if missing is not None and missing.find_matches_as_indexes(window):
                found |= {
                    n for n, pattern in enumerate(self._patterns) if n not in found and pattern in window
                }
                missing = self._missing(found)
            tail = window[-self._overlap :] if self._overlap else b""
        return found, size

    def _missing(self, found: set[int]) -> BytesAhoCorasick | None:
        # What was found once is looked for no more: a value that is in every row would be matched a million times.
        rest = [pattern for n, pattern in enumerate(self._patterns) if n not in found]
        if len(rest) == len(self._patterns):
            return self._all
        return BytesAhoCorasick(rest) if rest else None

    @cached_property
    def _all(self) -> BytesAhoCorasick | None:
        return BytesAhoCorasick(self._patterns) if self._patterns else None


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


@dataclass
class _Look:
    """What was found so far, by place, in the order in which the places were met."""

    files: DataFiles
    patterns: ManyPatterns
    found: dict[str, set[int]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    unreadable: set[str] = field(default_factory=set)

    def into(self, place: str, path: str) -> None:
        """Look through a file that belongs to a place."""
        found, size = set[int](), 0
        try:
            found, size = self.patterns.look_through(self.files.chunks(path))
        except (OSError, psycopg.Error):
            self.unreadable.add(place)
        self.found.setdefault(place, set()).update(found)
        self.bytes[place] = self.bytes.get(place, 0) + size

    def place(self, name: str, remark: str, *, erasable: bool = False) -> Place:
        """What came of it."""
        values = len(self.found.get(name, ()))
        if values:
            return Place(name, "found", values, bytes=self.bytes[name], remark=remark, erasable=erasable)
        if name in self.unreadable:
            return Place(name, "cannot be seen", remark="a file cannot be read", erasable=erasable)
        return Place(name, "not found", bytes=self.bytes.get(name, 0), erasable=erasable)


def look_into_table(
    connection: Connection, files: DataFiles, tables: Sequence[int], values: KnownValues
) -> tuple[dict[str, int], int]:
    """How many values are in what an erasure is to clean: the files of the table, and the planner's statistics.

    Args:
        connection: to the target.
        files: the data directory.
        tables: object identifiers of the table and its partitions.
        values: what to look for.

    Returns:
        Numbers by the name of the place, and how many bytes were looked through.
    """
    relations = _relations(connection, tables)
    look = _Look(files, ManyPatterns(values.patterns))
    for path, relation in _relation_files(files, relations):
        if relation is not None and relation.erasable:
            look.into(relation.place, path)
    return {name: len(found) for name, found in look.found.items()}, sum(look.bytes.values())


def look_everywhere(
    connection: Connection,
    files: DataFiles | None,
    definition: TableDefinition,
    tables: Sequence[int],
    values: KnownValues,
) -> list[Place]:
    """Look through every file of the database, and what else the server keeps in its data directory.

    Args:
        connection: to the target.
        files: the data directory; None where it cannot be read.
        definition: the table.
        tables: object identifiers of the table and its partitions.
        values: what to look for.
    """
    relations = _relations(connection, tables)
    own = list(dict.fromkeys(relation.place for relation in relations.values() if relation.erasable))
    if files is None:
        unseen = [Place(name, "cannot be seen", remark=_UNREADABLE, erasable=True) for name in own]
        unseen += [Place(name, "cannot be seen", remark=_UNREADABLE) for name in (_OTHER_TABLES, *_REMARKS)]
        return [*unseen, *_out_of_sight(connection)]
    look = _Look(files, ManyPatterns(values.patterns))
    for path, relation in _relation_files(files, relations):
        look.into(relation.place if relation is not None else _NOBODYS, path)
    for directory in _pgsql_tmp(files):
        for path in _tree(files, directory):
            look.into(_TEMPORARY, path)
    for path in _tree(files, "pg_wal"):
        look.into(WAL, path)
    for path in _tree(files, "", leave_out=("base", "pg_wal", "pg_tblspc")):
        look.into(OTHER_FILES, path)
    others = [name for name in look.found if name not in own and name not in _REMARKS]
    quiet = [name for name in others if not look.found[name] and name not in look.unreadable]
    places = [_without_live(connection, definition, look, name, values) for name in own]
    places += [look.place(name, _ELSEWHERE) for name in others if name not in quiet]
    places.append(Place(_OTHER_TABLES, "not found", bytes=sum(look.bytes[name] for name in quiet)))
    places += [look.place(name, remark) for name, remark in _REMARKS.items()]
    return [*places, *_out_of_sight(connection)]


def _without_live(
    connection: Connection, definition: TableDefinition, look: _Look, name: str, values: KnownValues
) -> Place:
    """A place to be clean; a value that another column shows, or has in its statistics, is no remnant."""
    found = look.found.get(name)
    if not found:
        return look.place(name, "", erasable=True)
    texts = [values.texts[number] for number in found]
    if name == STATISTICS:
        live = _seen(connection, SQL(_LIVE_STATISTICS), texts)
    else:
        others = [column for column in definition.columns if column not in _derived(definition)]
        row = SQL("concat_ws(E'\\n', {})").format(SQL(", ").join(Identifier(column) for column in others))
        live = _seen(connection, SQL("SELECT {} FROM {}").format(row, definition.identifier), texts)
    look.found[name] = {number for number in found if values.texts[number] not in live}
    return look.place(name, _REMAINS, erasable=True)


_LIVE_STATISTICS = """
SELECT concat_ws(E'\\n', array_to_string(most_common_vals::text::text[], E'\\n'),
                 array_to_string(histogram_bounds::text::text[], E'\\n'),
                 array_to_string(most_common_elems::text::text[], E'\\n'))
  FROM pg_stats
"""


def _derived(definition: TableDefinition) -> set[str]:
    return {name for column in definition.table.columns for name in column.derived}


def _seen(connection: Connection, query: SQL | Composed, texts: Sequence[str]) -> set[str]:
    """Which of the texts occur in the rows, which are brought here for it."""
    seen: set[str] = set()
    with connection.transaction(), connection.cursor(name="live values") as cursor:
        cursor.itersize = 5_000
        for (text,) in cursor.execute(query):
            if text is not None:
                # In a jsonb document it may be shown with escapes.
                seen |= {
                    each
                    for each in texts
                    if each not in seen
                    and (each in text or json.dumps(each, ensure_ascii=False)[1:-1] in text)
                }
    return seen


WAL = "write-ahead log (pg_wal)"
_TEMPORARY = "temporary files"
_NOBODYS = "files of no table"
_BOOKKEEPING = "bookkeeping (encryption_*)"
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


@dataclass(frozen=True)
class _Relation:
    place: str
    erasable: bool


def _relations(connection: Connection, tables: Sequence[int]) -> dict[str, _Relation]:
    """Every relation of the database by the path of its file; the table first, its heap before its indexes."""
    found = {}
    for path, schema, table, oid, part in connection.execute(_RELATIONS).fetchall():
        if oid in tables:
            found[path] = _Relation(f"{schema}.{table}: {part}", True)
        elif schema == "pg_catalog" and table in ("pg_statistic", "pg_statistic_ext_data"):
            found[path] = _Relation(STATISTICS, True)
        elif schema == "public" and table in BOOKKEEPING_TABLES:
            found[path] = _Relation(_BOOKKEEPING, False)
        else:
            found[path] = _Relation(f"{schema}.{table}", False)
    ordered = sorted(found.items(), key=lambda item: (item[1].place == STATISTICS, item[1].place))
    return dict(ordered)


def _relation_files(
    files: DataFiles, relations: Mapping[str, _Relation]
) -> Iterator[tuple[str, _Relation | None]]:
    """Every file in the directories of the database, with the relation it is of."""
    directories = {path.rpartition("/")[0] for path in relations} - {"global"}
    for directory in sorted(directories):
        for file in files.files(directory):
            # Segments, forks and temporary tables: 16384, 16384.1, 16384_fsm, t3_16384.
            number = re.match(r"(t\d+_)?\d+", file)
            if number is not None:
                yield f"{directory}/{file}", relations.get(f"{directory}/{number[0]}")


def _pgsql_tmp(files: DataFiles) -> list[str]:
    spaces = [f"pg_tblspc/{space}" for space in files.directories("pg_tblspc")]
    versions = [f"{space}/{version}" for space in spaces for version in files.directories(space)]
    return [f"{directory}/pgsql_tmp" for directory in ("base", *versions)]


def _tree(files: DataFiles, directory: str, *, leave_out: Sequence[str] = ()) -> Iterator[str]:
    prefix = f"{directory}/" if directory else ""
    for name in files.files(directory):
        yield prefix + name
    for name in files.directories(directory):
        if name not in leave_out:
            yield from _tree(files, prefix + name)


def _out_of_sight(connection: Connection) -> list[Place]:
    """What no look from here can reach, as far as the server knows of it."""
    row = connection.execute(
        "SELECT (SELECT count(*) FROM pg_stat_replication), "
        "(SELECT count(*) FROM pg_replication_slots WHERE slot_type = 'physical'), "
        "current_setting('archive_mode'), (SELECT count(*) FROM public.encryption_backups), "
        "(SELECT count(*) FROM pg_database WHERE datname <> current_database() AND NOT datistemplate)"
    ).fetchone()
    streaming, slots, archiving, backups, others = row if row is not None else (0, 0, "off", 0, 0)
    unseen: Finding = "cannot be seen"
    places = [
        Place(
            f"replicas ({max(streaming, slots)} known to this server)",
            unseen,
            remark="a physical replica follows the rewrite; what it kept of its own, and a logical one, do not",
        )
    ]
    if archiving != "off":
        places.append(Place("archived write-ahead log", unseen, remark="it keeps everything written before"))
    if backups:
        places.append(
            Place(
                f"backups ({backups} of ours)",
                unseen,
                remark="encrypted, and with the plaintext in those from before the drop: remove them in your time",
            )
        )
    if others:
        places.append(Place(f"{others} other databases of this server", unseen, remark="not looked into"))
    places.append(
        Place("disk blocks of deleted files, and snapshots of the disk", unseen, remark="below the database")
    )
    return places
