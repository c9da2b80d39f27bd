"""What the text of a statement in ``pg_stat_statements`` says: which tables and columns, and whether it may be shown.

The server puts ``$1`` for the constants of statements on rows, and not always (PostgreSQL manual, F.30). Utility
statements keep theirs in versions 14 and 15, and in part later. So does a statement whose entry was evicted between its
planning and its end. Quoted names stay as the application wrote them. Nothing is masked here: a text is shown without
its comments if no part of it can be a value, and else not at all.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import sqlglot
from sqlglot import exp
from sqlglot.errors import SqlglotError

# It quotes what it does not understand.
logging.getLogger("sqlglot").disabled = True

LONGEST_TEXT = 100_000

_NORMALISED = frozenset({"select", "insert", "update", "delete", "merge", "with", "values"})
_WITH_A_QUERY = frozenset({"copy", "create", "declare", "explain", "prepare"})

# As the server's lexer has them (PostgreSQL manual, 4.1); a word with a dollar sign in it is none here.
_WORD = r"[A-Za-z_\x80-\U0010ffff][\w\x80-\U0010ffff]*"
_COMMENT = r"--[^\r\n]*|/\*(?:(?!/\*|\*/).)*\*/"
_FIRST_WORD = re.compile(rf"(?:[\s(]|{_COMMENT})*+([A-Za-z]+)", re.ASCII | re.DOTALL)
# What can be no value. No number and no string is among it; a nested comment or an open one is none.
_HARMLESS = re.compile(
    rf'(?P<comment>{_COMMENT})|"(?P<name>[^"]+)"|{_WORD}|\$\d+(?!\w)|(?!--|/\*)[-+*/<>=~!@#%^&|?:;,.()\[\]]|\s+',
    re.ASCII | re.DOTALL,
)
# Made by programs, as in t0, u, col1.
_ALIAS = re.compile(r"[A-Za-z]{1,3}[0-9]{0,3}")
_RELATION = rf'(?:(?P<schema>{_WORD}|"[^"]+")\s*\.\s*)?(?P<name>{_WORD}|"[^"]+")'
_TABLES = re.compile(
    rf"(?:\b(?:from|join|update|into|only|using|copy)\b|,)\s*{_RELATION}", re.ASCII | re.IGNORECASE
)

How = Literal["equality", "pattern", "range", "order"]


class TableName(NamedTuple):
    """A relation that a statement may name, exactly as the database has it."""

    schema: str
    name: str


class Use(NamedTuple):
    """A column that decides which rows there are, or in which order, and by what."""

    table: TableName
    column: str
    how: How


@dataclass(frozen=True)
class Statement:
    """What a statement says.

    Args:
        text: as the server normalised it, without comments; None where it may hold a value.
        columns: as far as it is certain whose they are.
        only_conditions: the columns of its only table, where its conditions are nothing but equalities joined by AND;
            empty where there is anything else.
    """

    kind: str
    text: str | None
    tables: frozenset[TableName]
    columns: frozenset[tuple[TableName, str]] = frozenset()
    uses: frozenset[Use] = frozenset()
    only_conditions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reader:
    """Reads statements."""

    tables: Collection[TableName]
    # Every name in the database: a text that quotes another one is not shown.
    names: Collection[str]

    def read(self, text: str) -> Statement | None:
        """Read one; None for what neither reads nor writes rows, or names none of the tables."""
        found = _FIRST_WORD.match(text)
        kind = found[1].lower() if found is not None and len(text) <= LONGEST_TEXT else ""
        if kind not in _NORMALISED | _WITH_A_QUERY:
            return None
        tree: exp.Expr | None = None
        if kind in _NORMALISED:
            with contextlib.suppress(SqlglotError, RecursionError):
                tree = sqlglot.parse_one(text, read="postgres")
        shown = self._shown(text) if kind in _NORMALISED else None
        if isinstance(tree, exp.Query | exp.DML | exp.Merge):
            statement = self._understood(kind.upper(), shown, tree)
        else:
            found_tables = [
                table
                for named in _TABLES.finditer(text)
                for table in self._named(_folded(named["name"]), _folded(named["schema"]))
            ]
            statement = Statement(kind.upper(), shown, frozenset(found_tables))
        return statement if statement.tables else None

    def _shown(self, text: str) -> str | None:
        kept, end = [], 0
        for part in _HARMLESS.finditer(text):
            name = part["name"]
            if part.start() != end or not (name is None or name in self.names or _ALIAS.fullmatch(name)):
                return None
            end = part.end()
            kept.append(" " if part["comment"] is not None else part[0])
        return " ".join("".join(kept).split()) if end == len(text) else None

    def _named(self, name: str, schema: str) -> list[TableName]:
        # Without a schema it depends on the session's search_path, which is not told.
        return [table for table in self.tables if table.name == name and schema in {"", table.schema}]

    def _understood(self, kind: str, shown: str | None, tree: exp.Expr) -> Statement:
        own = {_name(cte.args["alias"].this) for cte in tree.find_all(exp.CTE) if cte.args.get("alias")}
        scopes: dict[str, set[TableName | None]] = {}
        tables: set[TableName] = set()
        relations = list(tree.find_all(exp.Table))
        for node in relations:
            name, schema = _name(node.this), _name(node.args.get("db"))
            found = [] if not schema and name in own else self._named(name, schema)
            tables.update(found)
            alias = node.args.get("alias")
            called = _name(alias.this) if alias is not None and alias.this is not None else name
            scopes.setdefault(called, set()).add(found[0] if len(found) == 1 else None)
        alone = next(iter(tables)) if len(relations) == len(tables) == 1 else None

        def whose(column: exp.Column) -> TableName | None:
            qualifier = column.args.get("table")
            found = {alone} if qualifier is None else scopes.get(_name(qualifier), {None})
            return next(iter(found)) if len(found) == 1 and isinstance(column.this, exp.Identifier) else None

        named = frozenset((t, _name(c.this)) for c in tree.find_all(exp.Column) if (t := whose(c)))
        uses = frozenset(Use(t, _name(c.this), how) for c, how in _decisive(tree) if (t := whose(c)))
        only = frozenset() if alone is None else _only_equalities(tree)
        return Statement(kind, shown, frozenset(tables), named, uses, only)


def _folded(name: str | None) -> str:
    return "" if name is None else name[1:-1] if name.startswith('"') else name.lower()


def _name(identifier: exp.Expr | None) -> str:
    """A name as the server has it: folded to lower case unless quoted; "" for what is no name."""
    if not isinstance(identifier, exp.Identifier):
        return ""
    return str(identifier.this) if identifier.args.get("quoted") else str(identifier.this).lower()


_HOW: dict[type[exp.Expr], How] = {
    **dict.fromkeys((exp.EQ, exp.In), "equality"),
    **dict.fromkeys((exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Between), "range"),
    **dict.fromkeys((exp.Like, exp.ILike, exp.SimilarTo, exp.RegexpLike, exp.RegexpILike), "pattern"),
}


def _decisive(tree: exp.Expr) -> Iterator[tuple[exp.Column, How]]:
    """Columns that are compared with something from outside, or sorted by; not those in SET or RETURNING."""
    for where in tree.find_all(exp.Where, exp.Having):
        for node in where.find_all(*_HOW):
            sides = [_bare(node.this), _bare(node.args.get("expression"))]
            columns = [side for side in sides if isinstance(side, exp.Column)]
            if len(columns) == 1:
                yield columns[0], _HOW[type(node)]
    for order in tree.find_all(exp.Order):
        for term in order.expressions:
            if isinstance(by := _bare(term.this), exp.Column):
                yield by, "order"


def _bare(node: exp.Expr | None) -> exp.Expr | None:
    while isinstance(node, exp.Paren | exp.Cast):
        node = node.this
    return node


def _only_equalities(tree: exp.Expr) -> frozenset[str]:
    where = tree.args.get("where")
    if where is None or tree.find(exp.Subquery, exp.CTE, exp.SetOperation):
        return frozenset()
    condition = _bare(where.this)
    parts = list(condition.flatten()) if isinstance(condition, exp.And) else [condition]
    columns = [_bare(part.this) if isinstance(part, exp.EQ | exp.In) else None for part in map(_bare, parts)]
    named = [_name(column.this) for column in columns if isinstance(column, exp.Column)]
    return frozenset(named) if len(named) == len(columns) else frozenset()
