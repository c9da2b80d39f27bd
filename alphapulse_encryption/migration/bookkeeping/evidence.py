"""Evidence as it is kept: with a MAC over what a row says, and the number of the audit log's entry made with it.

To the audit log roles only add. So a row that was changed, or brought from another database, has a wrong MAC; an older
one that was put back has a right MAC and not the newest number. An entry that somebody adds can only make evidence
worth less.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString

from psycopg.sql import SQL, Identifier

from alphapulse_encryption.crypto import evidence
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.postgres.database import Actor, Connection, answer

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """A table of the bookkeeping whose rows are evidence.

    Args:
        said: the columns that the MAC is over, but for the number.
        key: where a row replaces an older one, the columns that both have.
    """

    table: LiteralString
    said: tuple[str, ...]
    key: tuple[str, ...] = ()

    @property
    def action(self) -> str:
        """Of the audit log's entries made with them."""
        return f"keep_{self.table}"

    @property
    def name(self) -> Identifier:
        return Identifier("alphapulse_encryption", self.table)


VERIFICATION = Evidence(
    "verifications",
    (
        *("table_name", "batch_range", "verified_at", "definition", "key_check", "row_count", "columns"),
        *("offenders", "run_id", "since"),
    ),
    ("table_name", "batch_range"),
)
ROW_COUNT = Evidence(
    "row_counts",
    ("table_name", "counted_at", "since", "row_count", "verified_count", "missing_count", "run_id"),
    ("table_name",),
)
SET_ASIDE = Evidence("tables", ("table_name", "authority", "stage", "set_aside"), ("table_name",))
DEFINITION = Evidence("definitions", ("table_name", "definition"))
BACKUP = Evidence(
    "backups",
    (
        *("taken_at", "location", "bytes", "sha256", "recipient", "listed_entries", "tables", "run_id"),
        "drill",
    ),
)
APPROVAL = Evidence(
    "approvals",
    (
        *("table_name", "approver", "database_role", "reason", "approved_at", "expires_at", "definition"),
        *("catalogue_entry", "key_check", "verified_at", "backup_id", "run_id"),
    ),
)
ALL = (VERIFICATION, ROW_COUNT, SET_ASIDE, DEFINITION, BACKUP, APPROVAL)


def keep(
    connection: Connection,
    keys: KeyRing,
    actor: Actor,
    kind: Evidence,
    values: Mapping[str, object],
    *,
    filled: Mapping[str, object] | None = None,
    also: object = None,
) -> int | None:
    """Keep a row with its MAC, in place of an older one of its key, in a transaction; its id, where such rows have one.

    Args:
        values: what the row says, by column.
        filled: what the server fills in by itself.
        also: what the MAC is over beyond the row.
    """
    number = _enter(connection, actor, kind, values)
    as_stored = SQL("SELECT to_jsonb(r) FROM jsonb_populate_record(NULL::{}, %s) AS r").format(kind.name)
    given = {**values, **(filled or {}), "number": number}
    row = answer(connection, as_stored, json.dumps(given, default=str))
    row["mac"] = _sign(connection, keys, kind, row, also)
    columns = [*values, "number", "mac"]
    statement = SQL(
        "INSERT INTO {} AS kept ({}) SELECT {} FROM jsonb_populate_record(NULL::{}, %s) AS r {} {}"
    ).format(
        kind.name,
        SQL(", ").join(map(Identifier, columns)),
        SQL(", ").join(Identifier("r", name) for name in columns),
        kind.name,
        # Of two that are kept at once the one with the newest number stays.
        SQL("ON CONFLICT ({}) DO UPDATE SET {} WHERE coalesce(kept.number, 0) < excluded.number").format(
            SQL(", ").join(map(Identifier, kind.key)),
            SQL(", ").join(
                SQL("{0} = excluded.{0}").format(Identifier(c)) for c in columns if c not in kind.key
            ),
        )
        if kind.key
        else SQL(""),
        SQL("" if kind.key else "RETURNING id"),
    )
    cursor = connection.execute(statement, [json.dumps(row)])
    return int(cursor.fetchall()[0][0]) if cursor.description else None


def are_genuine(
    connection: Connection, keys: KeyRing, kind: Evidence, rows: Iterable[Sequence[Any]]
) -> list[bool]:
    """Whether rows say what was kept with a key of this key ring in this database.

    Args:
        rows: as :func:`read` gives them, with what else their MAC is over.
    """
    here = identity(connection)

    def is_genuine(row: Row, also: object = None) -> bool:
        return evidence.is_signed(keys, row["mac"], kind.table, here, *_signed(kind, row, also))

    return [is_genuine(*row) for row in rows]


def read(connection: Connection, kind: Evidence, condition: LiteralString, *parameters: object) -> list[Row]:
    """Rows as JSON documents, the newest last where they have an id."""
    order = SQL("" if kind.key else "ORDER BY id")
    query = SQL("SELECT to_jsonb(kept) FROM {} AS kept WHERE {} {}").format(kind.name, SQL(condition), order)
    found = connection.execute(query, parameters)
    return [row for (row,) in found]


def newest(connection: Connection, kind: Evidence, subject: str) -> int | None:
    """The number of the newest entry of the audit log made with such a row about a table; None where there is none."""
    query = "SELECT max(id) FROM alphapulse_encryption.audit_log WHERE table_name = %s AND action = %s"
    number: int | None = answer(connection, query, subject, kind.action)
    return number


def sign_again(
    connection: Connection, keys: KeyRing, kind: Evidence, row: Row, actor: Actor, *, also: object = None
) -> None:
    """Give a row that is believed, for whatever reason, a MAC by the current key and a new number."""
    number = _enter(connection, actor, kind, row, signed_again=row["number"])
    which = kind.key or ("id",)
    statement = SQL("UPDATE {} SET number = %s, mac = %s WHERE {}").format(
        kind.name, SQL(" AND ").join(SQL("{} = %s").format(Identifier(name)) for name in which)
    )
    mac = _sign(connection, keys, kind, {**row, "number": number}, also)
    connection.execute(statement, [number, mac, *(row[name] for name in which)])


def renew(connection: Connection, keys: KeyRing, actor: Actor) -> None:
    """Sign what is saved for a way back with the current key, so that nobody has to keep an older one for it."""
    for kind in (SET_ASIDE, DEFINITION):
        for row in read(connection, kind, "number IS NOT NULL"):
            is_newest = row["number"] == newest(connection, kind, row["table_name"])
            if is_newest and all(are_genuine(connection, keys, kind, [(row,)])):
                sign_again(connection, keys, kind, row, actor)


def identity(connection: Connection) -> str:
    """Tells this database from every other one: a copy, a clone, and what is restored from a dump are others."""
    query = (
        "SELECT system_identifier || '/' || (SELECT oid FROM pg_database WHERE datname = current_database()) "
        "FROM pg_control_system()"
    )
    return str(answer(connection, query))


def _enter(connection: Connection, actor: Actor, kind: Evidence, row: Row, **more: object) -> int:
    """The audit log's entry, which names the table and what else the row is about."""
    about = {name: row[name] for name in kind.key if name != "table_name"}
    return audit(connection, actor, kind.action, _subject(row) or None, **about, **more)


def _sign(connection: Connection, keys: KeyRing, kind: Evidence, row: Row, also: object) -> str:
    return evidence.sign(keys, kind.table, identity(connection), *_signed(kind, row, also))


def _signed(kind: Evidence, row: Row, also: object) -> tuple[str, object]:
    """What the row speaks of, and all that its MAC is over."""
    return _subject(row), [{name: row[name] for name in (*kind.said, "number")}, also]


def _subject(row: Row) -> str:
    return str(row.get("table_name", ""))
