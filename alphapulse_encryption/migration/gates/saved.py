"""What is saved for a way back and not authenticated: shown to a person, and signed where they say so.

So it is of what an older program saved, of a database that was restored or copied, and of what somebody changed: the
server cannot tell these apart, and a person can.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.evidence import canonical
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping import evidence
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.evidence import DEFINITION, SET_ASIDE, Evidence, Row
from alphapulse_encryption.migration.bookkeeping.install import bookkeeping_exists
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.tables import unsigned_definition, unsigned_state
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.target import Target


@dataclass(frozen=True)
class Unsigned:
    """A row that a revert or a restore would execute SQL of."""

    kind: Evidence
    row: Row

    @property
    def said(self) -> Row:
        return {name: self.row[name] for name in self.kind.said}

    def __str__(self) -> str:
        """All of it, with what a terminal would not show as it is escaped."""
        return f"alphapulse_encryption.{self.kind.table}: {json.dumps(self.said, indent=2)}"


@dataclass(frozen=True)
class Saved:
    """What is not authenticated, and what tells it from anything else; None where all of it is."""

    rows: tuple[Unsigned, ...]
    digest: str | None


def unsigned(target: Target, tables: Iterable[Table]) -> Saved:
    """What is saved of these tables and not authenticated; reads only.

    Raises:
        RefusedError: another key than the one this database was begun with.
    """
    with target.database.session("look for what is not authenticated") as connection:
        check_key(connection, target.keys)
        return _look(connection, target, tables)


def sign(target: Target, tables: Iterable[Table], digest: str) -> Saved:
    """Sign what :func:`unsigned` has shown, and nothing else.

    Raises:
        RefusedError: it is not the same any more; nothing was signed.
    """
    with target.database.session("sign what is saved") as connection, connection.transaction():
        check_key(connection, target.keys)
        found = _look(connection, target, tables)
        if found.digest != digest:
            raise RefusedError(
                "What is saved is not what was shown with that digest. Look at it again (--sign-saved show); nothing "
                "was signed."
            )
        for each in found.rows:
            evidence.sign_again(connection, target.keys, each.kind, each.row, target.actor)
            audit(connection, target.actor, "sign_saved", each.row["table_name"], kept_in=each.kind.table)
    return found


def _look(connection: Connection, target: Target, tables: Iterable[Table]) -> Saved:
    if not bookkeeping_exists(connection):
        return Saved((), None)
    rows = tuple(each for table in tables for each in _of_table(connection, target, table))
    if not rows:
        return Saved((), None)
    shown = [evidence.identity(connection), *([each.kind.table, each.said] for each in rows)]
    return Saved(rows, hashlib.sha256(canonical(shown)).hexdigest())


def _of_table(connection: Connection, target: Target, table: Table) -> Iterator[Unsigned]:
    if (row := unsigned_state(connection, table, target.keys)) is not None:
        yield Unsigned(SET_ASIDE, row)
    if (row := unsigned_definition(connection, table, target.keys)) is not None:
        yield Unsigned(DEFINITION, row)
