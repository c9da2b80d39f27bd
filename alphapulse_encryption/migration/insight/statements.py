"""What a statement of somebody else's says, from its text: which tables and columns, and the text without any value.

``pg_stat_statements`` replaces constants by ``$1``, but not always: utility statements keep theirs, and so does a
statement whose entry was evicted between its planning and its end (PostgreSQL manual, F.30). Comments and aliases are
kept as the application wrote them. What cannot be vouched for is not shown.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import sqlglot
from sqlglot import Token, TokenType, exp
from sqlglot.errors import SqlglotError

# It quotes what it does not understand.
logging.getLogger("sqlglot").disabled = True

LONGEST_TEXT = 100_000

_DIALECT = "postgres"
# What begins something whose inside is no SQL (PostgreSQL manual, 4.1): a quoted name, a comment, or a string, of which
# only the server knows where it ends, because that depends on standard_conforming_strings.
_BEGINNING = re.compile(
    r"""(?P<name>"(?:[^"]|"")*")|(?P<line>--[^\r\n]*)|(?P<block>/\*)|'|"|\$(?:[^\W\d]\w*)?\$"""
)
_BLOCK_EDGE = re.compile(r"/\*|\*/")
_WORD = re.compile(r"[^\W\d][\w$]*(?: [^\W\d][\w$]*)*")
_SIGNS = re.compile(r"[^\w\s'\"]+")
# Made by programs, as in t0, u, col1.
_ALIAS = re.compile(r"[A-Za-z]{1,3}[0-9]{0,3}")
_MASK = "?"
_READ_OR_WRITE = frozenset({"select", "insert", "update", "delete", "merge", "with", "values", "("})
_BEFORE_A_TABLE = frozenset({"from", "join", "update", "into", "only", ",", "using"})

How = Literal["equality", "pattern", "range", "order"]


@dataclass(frozen=True)
class TableName:
    """A relation that a statement may name.

    Args:
        schema: its schema.
        name: its name, exactly.
    """

    schema: str
    name: str


@dataclass(frozen=True)
class Use:
    """A column that decides which rows there are, or in which order.

    Args:
        table: of the column.
        column: its name.
        how: by what.
    """

    table: TableName
    column: str
    how: How


@dataclass(frozen=True)
class Statement:
    """What a statement says.

    Args:
        text: as it is kept, without comments, values, and quoted names that are not the database's; None where it
            holds constants that were not taken out.
        tables: those of the relations asked for that it names.
        columns: names of columns, as far as it is certain whose they are.
        uses: of columns in conditions and orders.
        only_conditions: the columns of its only table, where its conditions are nothing but equalities joined by AND;
            empty where there is anything else.
    """

    text: str | None
    tables: frozenset[TableName]
    columns: frozenset[tuple[TableName, str]] = frozenset()
    uses: frozenset[Use] = frozenset()
    only_conditions: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reader:
    """Reads statements.

    Args:
        tables: the relations to look for.
        names: every name in the database that may be shown.
    """

    tables: Collection[TableName]
    names: Collection[str]
    _by_name: Mapping[str, tuple[TableName, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        by_name: dict[str, list[TableName]] = {}
        for table in self.tables:
            by_name.setdefault(table.name, []).append(table)
        object.__setattr__(self, "_by_name", {name: tuple(found) for name, found in by_name.items()})

    def read(self, text: str) -> Statement | None:
        """Read one; None for what is no reading or writing of rows, names none of the tables, or makes no sense."""
        if len(text) > LONGEST_TEXT:
            return None
        plain = without_comments(text)
        text = text if plain is None else plain
        try:
            tokens = sqlglot.tokenize(text, read=_DIALECT)
        except (SqlglotError, RecursionError):
            return None
        if not tokens or tokens[0].text.lower() not in _READ_OR_WRITE:
            return None
        shown = None if plain is None else self._shown(plain, tokens)
        try:
            tree = sqlglot.parse_one(text, read=_DIALECT)
        except (SqlglotError, RecursionError):
            tables = frozenset(self._tables_among(tokens))
            return Statement(shown, tables) if tables else None
        if not isinstance(tree, exp.Query | exp.DML | exp.Merge):
            return None
        return self._understood(shown, tree)

    def _shown(self, text: str, tokens: list[Token]) -> str | None:
        """The text from its tokens: what is no word, name, sign or ``$1`` is masked, and comments are in none."""
        parts: list[str] = []
        end = -1
        masked_until: int | None = None
        for number, token in enumerate(tokens):
            piece = text[token.start : token.end + 1]
            beside = token.start == end + 1
            gap = "" if beside or not parts else " "
            end = token.end
            if masked_until is not None and beside and re.match(r"[\w.]", piece):
                # The rest of a number such as 1_000, which the library takes for a name of its own.
                masked_until = end
                continue
            masked_until = None
            parameter = (
                token.token_type is TokenType.NUMBER
                and beside
                and number > 0
                and tokens[number - 1].token_type is TokenType.PARAMETER
                and piece.isdecimal()
            )
            if parameter:
                parts.append(piece)
            elif token.token_type is TokenType.IDENTIFIER:
                known = token.text in self.names or _ALIAS.fullmatch(token.text)
                parts.append(gap + (piece if known else f'"{_MASK}"'))
            elif token.token_type not in _CONSTANTS and (
                _WORD.fullmatch(" ".join(piece.split())) or _SIGNS.fullmatch(piece)
            ):
                parts.append(gap + " ".join(piece.split()))
            else:
                parts.append(gap + _MASK)
                masked_until = end
        return "".join(parts)

    def _tables_among(self, tokens: list[Token]) -> Iterator[TableName]:
        """Where the grammar is not understood: names at places where tables are named."""
        for number, token in enumerate(tokens[1:], 1):
            before = tokens[number - 1].text.lower()
            if before == "." and number > 2:
                schema, before = tokens[number - 2].text, tokens[number - 3].text.lower()
                if before in _BEFORE_A_TABLE:
                    yield from self._named(_folded(token), schema)
            elif before in _BEFORE_A_TABLE:
                yield from self._named(_folded(token), None)

    def _named(self, name: str, schema: str | None) -> tuple[TableName, ...]:
        found = self._by_name.get(name, ())
        # Without a schema it depends on the session's search_path, which is not told.
        return tuple(table for table in found if schema in {None, table.schema})

    def _understood(self, shown: str | None, tree: exp.Expr) -> Statement | None:
        own = {_name(cte.args["alias"].this) for cte in tree.find_all(exp.CTE) if cte.args.get("alias")}
        scopes: dict[str, set[TableName | None]] = {}
        tables: set[TableName] = set()
        relations = 0
        for node in tree.find_all(exp.Table):
            relations += 1
            name = _name(node.this) if isinstance(node.this, exp.Identifier) else ""
            schema = _name(node.args["db"]) if node.args.get("db") else None
            found = () if schema is None and name in own else self._named(name, schema)
            tables.update(found)
            alias = node.args.get("alias")
            called = _name(alias.this) if alias is not None and alias.this is not None else name
            scopes.setdefault(called, set()).add(found[0] if len(found) == 1 else None)
        if not tables:
            return None
        alone = next(iter(tables)) if relations == 1 and len(tables) == 1 else None

        def whose(column: exp.Column) -> TableName | None:
            qualifier = column.args.get("table")
            if qualifier is None:
                return alone
            found = scopes.get(_name(qualifier), {None})
            return next(iter(found)) if len(found) == 1 else None

        columns = {
            (table, _name(column.this))
            for column in tree.find_all(exp.Column)
            if isinstance(column.this, exp.Identifier) and (table := whose(column)) is not None
        }
        uses = {
            Use(table, _name(column.this), how)
            for column, how in _decisive(tree)
            if isinstance(column.this, exp.Identifier) and (table := whose(column)) is not None
        }
        conditions = frozenset() if alone is None else _only_equalities(tree)
        return Statement(shown, frozenset(tables), frozenset(columns), frozenset(uses), conditions)


_CONSTANTS = frozenset(
    kind for kind in TokenType if kind.name.endswith("STRING") or kind in {TokenType.NUMBER, TokenType.HINT}
)


def without_comments(text: str) -> str | None:
    """A statement without its comments; None where it holds a string, or does not end properly."""
    kept: list[str] = []
    position = 0
    while found := _BEGINNING.search(text, position):
        kept.append(text[position : found.start()])
        position = found.end()
        if found["name"] == '""':
            # The server knows no empty name: this is none of its statements, and nobody knows what the rest is.
            return None
        if found["name"]:
            kept.append(found["name"])
        elif found["block"]:
            depth = 1
            while depth:
                edge = _BLOCK_EDGE.search(text, position)
                if edge is None:
                    return None
                position = edge.end()
                depth += 1 if edge[0] == "/*" else -1
            kept.append(" ")
        elif found["line"] is not None:
            kept.append(" ")
        else:
            return None
    return "".join(kept) + text[position:]


def _folded(token: Token) -> str:
    return token.text if token.token_type is TokenType.IDENTIFIER else token.text.lower()


def _name(identifier: exp.Expr) -> str:
    """A name as the server has it: folded to lower case unless quoted."""
    text = str(identifier.this) if isinstance(identifier, exp.Identifier) else str(identifier.name)
    return text if identifier.args.get("quoted") else text.lower()


_RANGES = (exp.LT, exp.LTE, exp.GT, exp.GTE, exp.Between)
_PATTERNS = (exp.Like, exp.ILike, exp.SimilarTo, exp.RegexpLike, exp.RegexpILike)


def _decisive(tree: exp.Expr) -> Iterator[tuple[exp.Column, How]]:
    """Columns that are compared with something from outside, or sorted by; not those in SET or RETURNING."""
    for where in tree.find_all(exp.Where, exp.Having):
        for node in where.find_all(exp.EQ, exp.In, *_RANGES, *_PATTERNS):
            how: How = "equality"
            if isinstance(node, _RANGES):
                how = "range"
            elif isinstance(node, _PATTERNS):
                how = "pattern"
            for column, other in _sides(node):
                if isinstance(column, exp.Column) and not isinstance(other, exp.Column):
                    yield column, how
    for order in tree.find_all(exp.Order):
        for term in order.expressions:
            sorted_by = _bare(term.this)
            if isinstance(sorted_by, exp.Column):
                yield sorted_by, "order"


def _sides(node: exp.Expr) -> Iterator[tuple[exp.Expr, exp.Expr | None]]:
    left, right = _bare(node.this), _bare(node.args.get("expression"))
    if left is not None:
        yield left, right
    if right is not None and left is not None:
        yield right, left


def _bare(node: exp.Expr | None) -> exp.Expr | None:
    found: exp.Expr | None = node
    while isinstance(found, exp.Paren | exp.Cast):
        found = found.this
    return found


def _only_equalities(tree: exp.Expr) -> frozenset[str]:
    where = tree.args.get("where")
    if where is None or tree.find(exp.Subquery, exp.CTE, exp.SetOperation):
        return frozenset()
    found: set[str] = set()
    parts = [where.this]
    while parts:
        part = _bare(parts.pop())
        if isinstance(part, exp.And):
            parts += [part.this, part.expression]
            continue
        column = _bare(part.this) if isinstance(part, exp.EQ | exp.In) else None
        if not isinstance(column, exp.Column):
            return frozenset()
        found.add(_name(column.this))
    return frozenset(found)
