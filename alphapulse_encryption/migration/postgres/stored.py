"""SQL that was kept in a row and is executed later: one expression, clause or statement, with nothing behind it.

It was the server's own text (``pg_get_expr`` and its kin), which quotes with ``'`` and ``"`` alone, doubles them, and
has no comments (src/backend/utils/adt/ruleutils.c). Whether it still is, a MAC tells; here no text gets out of its
place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

from psycopg.sql import SQL, Composed
from pydantic import AfterValidator

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Connection, answer

# A literal, a quoted name, or a stretch of neither. Sessions have standard_conforming_strings on.
_PIECE = re.compile(r"""(?P<quoted>'(?:[^']|'')*'|"(?:[^"]|"")*")|[^'"]+|['"]""")
# What would end the statement, or hide what follows.
_FOREIGN = re.compile(r"[;$\\\x00'\"]|--|/\*")
# What begins a literal or a name that is read by other rules (4.1.2.2 "String Constants With C-Style Escapes").
_OF_OTHER_RULES = re.compile(r"(?:^|\W)(?:e|u&)$", re.IGNORECASE)
_LOOK = "Look at it (--sign-saved show), and find out who wrote it (the audit log); nothing was executed."
_CLOSED_BY = {"(": ")", "[": "]"}


def _is_one(text: str, *, commas: bool) -> bool:
    """Whether a text is closed in itself: between parentheses it would be all that is between them."""
    waiting: list[str] = []
    for piece in _PIECE.finditer(text):
        if piece["quoted"]:
            continue
        if _FOREIGN.search(piece[0]) or (piece.end() < len(text) and _OF_OTHER_RULES.search(piece[0])):
            return False
        for character in piece[0]:
            if character in _CLOSED_BY:
                waiting.append(_CLOSED_BY[character])
            elif character in _CLOSED_BY.values():
                if not waiting or waiting.pop() != character:
                    return False
            elif character == "," and not waiting and not commas:
                return False
    return bool(text.strip()) and not waiting


def _expression(text: str) -> str:
    if not _is_one(text, commas=False):
        raise RefusedError(
            f"An expression that was saved is not one expression as the server prints it. {_LOOK}"
        )
    return text


def _clause(text: str) -> str:
    if not _is_one(text, commas=False) or not text.startswith(_CONSTRAINTS):
        raise RefusedError(
            f"A constraint that was saved is not one constraint as the server prints it. {_LOOK}"
        )
    return text


def _statement(text: str) -> str:
    if not _is_one(text, commas=True) or not text.startswith(_STATEMENTS):
        raise RefusedError(
            "What was saved to build an index or statistics is not one statement that does that."
        )
    return text


_CONSTRAINTS = ("CHECK (", "FOREIGN KEY (", "UNIQUE ", "EXCLUDE ", "NOT NULL ")
_STATEMENTS = ("CREATE INDEX ", "CREATE UNIQUE INDEX ", "CREATE STATISTICS ")

# A default, or a type; what follows ADD CONSTRAINT and a name; what builds an index or statistics.
Expression = Annotated[str, AfterValidator(_expression)]
Constraint = Annotated[str, AfterValidator(_clause)]
Statement = Annotated[str, AfterValidator(_statement)]


def refuse_no_type(connection: Connection, text: str) -> None:
    """Have the server read a text as the name of a type, which nothing else is.

    Raises:
        DatabaseFailure: as the enclosing session has it; it is no such name.
        RefusedError: there is no such type.
    """
    if answer(connection, "SELECT to_regtype(%s)", text) is None:
        raise RefusedError(
            "The type of a column that was saved is none of this database; nothing was changed."
        )


def in_parentheses(text: str) -> Composed:
    """An expression in the place of one."""
    return SQL("({})").format(Composed([SQL(_expression(text))]))


def execute_one(connection: Connection, statement: SQL | Composed) -> None:
    """Execute a statement that has stored text in it, by the extended protocol, which takes one and no more."""
    connection.execute(statement, binary=True)


@contextmanager
def as_owner(connection: Connection, relation: int) -> Iterator[None]:
    """In a transaction, have a superuser execute what is in the block as the relation's owner: it may call functions.

    Indexes need no such thing: what they call, the server calls as the owner.
    """
    owner = answer(
        connection,
        "SELECT pg_get_userbyid(relowner) FROM pg_class WHERE oid = %s AND relowner <> current_user::regrole "
        "AND current_setting('is_superuser') = 'on'",
        relation,
    )
    if owner is None:
        yield
        return
    before = answer(connection, "SELECT current_setting('role')")
    take = "SELECT set_config('role', %s, true)"
    connection.execute(take, [owner])
    yield
    # An error ends the transaction, and with it this.
    connection.execute(take, [before])
