"""What pg_dump says of a database, in a form that two dumps can be compared in.

A dump is taken apart into its statements, because values and function bodies go over several lines. The order of
statements, of a table's columns and of a row's values is put aside; nothing else is.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.schema.names import guard_name
from alphapulse_encryption.migration.schema.views import view_names
from alphapulse_encryption_tests.migration import walk

# Strings without escapes (standard_conforming_strings), names, dollar-quoted bodies, comments, the rest.
_TOKEN = re.compile(
    r"""'(?:[^']|'')*' | "(?:[^"]|"")*" | (\$\w*\$).*?\1 | --[^\n]*\n? | ; | [^'"$;-]+ | .""",
    re.DOTALL | re.VERBOSE,
)
_WORD = r'(?:"(?:[^"]|"")*"|\w+)'
_NAME = re.compile(_WORD)
_INSERT = re.compile(
    rf"INSERT INTO (?P<table>{_WORD}\.{_WORD}) \((?P<columns>.*?)\) (?:OVERRIDING SYSTEM VALUE )?"
    r"VALUES \((?P<values>.*)\)",
    re.DOTALL,
)
_TABLE = re.compile(
    rf"(?P<head>CREATE (?:UNLOGGED )?TABLE {_WORD}\.{_WORD}) \((?P<body>.*)\n\)(?P<tail>.*)", re.DOTALL
)
_STATISTICS = re.compile(r"(?P<head>CREATE STATISTICS .* ON )(?P<columns>.*)(?P<tail> FROM .*)")
_VALUE = re.compile(r"(?:\s*B)?'(?:[^']|'')*'|[^',]+")
_OF_THE_BOOKKEEPING = ("encryption_report_key_usage",)


def dump(url: str, bin_dir: Path, leave_out: Collection[str] = ()) -> Counter[str]:
    """The statements of ``pg_dump --column-inserts``, schema and data, without the engine's bookkeeping.

    Args:
        url: the database.
        bin_dir: where pg_dump is.
        leave_out: columns that are not to be looked at.
    """
    text = walk.dump(
        url,
        bin_dir,
        "--column-inserts",
        "--exclude-schema",
        "alphapulse_encryption",
        "--exclude-table",
        "public.encryption_*",
    )
    # pg_dump's own key for psql's \restrict is another one each time.
    text = re.sub(r"^\\(un)?restrict .*\n", "", text, flags=re.MULTILINE)
    return Counter(
        _canonical(statement, set(leave_out))
        for statement in _statements(text)
        if not any(function in statement for function in _OF_THE_BOOKKEEPING)
    )


def _statements(text: str) -> Iterator[str]:
    parts: list[str] = []
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token.startswith("--"):
            continue
        if token != ";":
            parts.append(token)
            continue
        yield "".join(parts).strip()
        parts.clear()
    assert not "".join(parts).strip()


def _canonical(statement: str, leave_out: set[str]) -> str:
    if insert := _INSERT.fullmatch(statement):
        names = _NAME.findall(insert["columns"])
        values = [value.strip() for value in _VALUE.findall(insert["values"]) if value.strip()]
        pairs = sorted(
            (name, value) for name, value in zip(names, values, strict=True) if _bare(name) not in leave_out
        )
        return f"INSERT INTO {insert['table']} " + ", ".join(f"{name} = {value}" for name, value in pairs)
    if table := _TABLE.fullmatch(statement):
        lines = [line.strip().removesuffix(",") for line in table["body"].strip().splitlines()]
        kept = sorted(line for line in lines if _bare(_NAME.findall(line)[0]) not in leave_out)
        return f"{table['head']} ({', '.join(kept)}){table['tail']}"
    if statistics := _STATISTICS.fullmatch(statement):
        # The server keeps its columns in the order of the table's.
        return statistics["head"] + ", ".join(sorted(statistics["columns"].split(", "))) + statistics["tail"]
    return statement


def _bare(name: str) -> str:
    return name.removeprefix('"').removesuffix('"').replace('""', '"')


def added_columns(*tables: Table) -> set[str]:
    """The encrypted and search columns."""
    return {name for table in tables for column in table.columns for name in column.derived}


def indexes_of_added_columns(*tables: Table) -> set[str]:
    """The indexes on the search columns."""
    return {c.search_index for table in tables for c in table.columns if c.search_index is not None}


def is_index(statement: str, names: Collection[str]) -> bool:
    """Whether a statement makes one of these indexes, or comments on it."""
    found = re.match(rf"(?:CREATE (?:UNIQUE )?INDEX|COMMENT ON INDEX {_WORD}\.)\s*({_WORD}) ", statement)
    return found is not None and found[1].strip('"') in names


def is_guard(statement: str, *tables: Table) -> bool:
    """Whether a statement is of the guard: its function, who may use that, its triggers, or a comment on one."""
    if re.match(
        r"(CREATE|COMMENT ON|ALTER TABLE .* ENABLE ALWAYS) TRIGGER zzz_encryption_guard_\w+( |$)", statement
    ):
        return True
    found = re.match(rf"(?:CREATE|ALTER|REVOKE ALL ON) FUNCTION public\.({_WORD})\(\)", statement)
    return found is not None and found[1].strip('"') in {guard_name(table) for table in tables}


def is_view(statement: str, *tables: Table) -> bool:
    """Whether a statement is of a compatibility view: the view, its owner or its comment."""
    found = re.match(
        rf"(?:CREATE VIEW|COMMENT ON VIEW|ALTER VIEW|ALTER TABLE) {_WORD}\.({_WORD}) ", statement
    )
    return found is not None and found[1].strip('"') in {
        name for table in tables for name in view_names(table)
    }
