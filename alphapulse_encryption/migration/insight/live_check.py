"""Whether encryption works, tried on the live tables: write a value, read it, look at the raw column, leave nothing.

For each column, one recent row is given its own value again under a fresh envelope, by the statements an application
sends, so that its triggers and the guard run as they do. The transaction is always rolled back: what is left is
a dead row version, which holds nothing that was not there before, until the next vacuum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal as OneOf
from typing import LiteralString

import psycopg
from psycopg.sql import SQL, Composable, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import DecryptionError
from alphapulse_encryption.lifecycle import Authority
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.tables import require_guarded_state
from alphapulse_encryption.migration.postgres.database import (
    AS_APPLICATION,
    Connection,
    answer,
    without_values,
)
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Verdict = OneOf["yes", "no", "not tried"]

# The last rows by key are looked at for one that has a value and that nobody holds at the moment.
RECENT_ROWS = 100

ENCRYPTED = "data is encrypted"
DECRYPTED = "decrypted correctly"
FOUND = "found by its search token"
PENDING = "plaintext alone becomes pending"
REFUSED = "ciphertext alone is refused"
CLEARED = "the stale plaintext is cleared"

# Classes of SQLSTATE (PostgreSQL manual, appendix A) that say that a value does not fit.
_DATA_EXCEPTION, _INTEGRITY = "22", "23"
_CHECK_VIOLATION = "23514"


@dataclass(frozen=True)
class Look:
    """One thing that was looked at; the remark says why it is not, or was not tried, and is never a value."""

    what: str
    verdict: Verdict
    remark: str = ""

    def __str__(self) -> str:
        remark = f" ({self.remark})" if self.remark else ""
        return f"{self.what}{remark}" if self.verdict == "yes" else f"{self.what}: {self.verdict}{remark}"


@dataclass(frozen=True)
class ColumnCheck:
    """What was found out about a column: nothing where no row has a value to try with."""

    table: str
    column: str
    looks: tuple[Look, ...]

    @property
    def failed(self) -> bool:
        return any(look.verdict == "no" for look in self.looks)

    @property
    def tried(self) -> bool:
        return bool(self.looks)

    def __str__(self) -> str:
        what = "; ".join(map(str, self.looks)) or "no row with a value to try it on"
        return f"{self.table}.{self.column}: {what}"


def live_check(target: Target, table: Table) -> tuple[ColumnCheck, ...]:
    """Try every encrypted column of a table as an application would; nothing remains.

    Raises:
        RefusedError: the table has no encrypted columns, or was reverted, or the key is another one.
        ConfigurationError: the table or its key is missing.
        DatabaseFailure: the server refused something else than a write.
    """
    with target.database.session(f"check the encryption of {table.key}") as connection:
        state = require_guarded_state(connection, table)
        check_key(connection, target.keys)
        definition = read_table(connection, table, plaintext=False)
        checks = []
        for column in definition.encrypted_columns:
            trial = _Trial(connection, definition, column, state.authority, target)
            with connection.transaction(force_rollback=True):
                connection.execute(AS_APPLICATION)
                checks.append(ColumnCheck(table.key, column.name, tuple(trial.looks())))
    return tuple(checks)


@dataclass(frozen=True)
class _Row:
    key: Sequence[str]
    plaintext: str | None
    encrypted: str | None
    search: str | None


@dataclass(frozen=True)
class _Trial:
    """A column tried out, in a transaction that will be rolled back."""

    connection: Connection
    definition: TableDefinition
    column: Column
    authority: Authority
    target: Target

    @property
    def _has_plaintext(self) -> bool:
        return self.column.name in self.definition.columns

    def looks(self) -> Iterator[Look]:
        recent = self._recent_row()
        if recent is None:
            return
        try:
            value = recent.plaintext
            if value is None:
                value = self._decrypted(recent.encrypted or "")
        except DecryptionError:
            yield Look(DECRYPTED, "no", "what a row holds already cannot be read")
            return
        context = self.column.context
        envelope = self.target.cipher.encrypt(value, context)
        token = search_token(self.target.keys, value, context) if self.column.searchable else None
        both = self._has_plaintext and self.authority == "plaintext"
        try:
            self._write(recent, envelope, token, keep_plaintext=both)
        except psycopg.Error as error:
            yield Look(ENCRYPTED, "no", f"the database refused the write: {without_values(error)}")
            return
        yield from self._written(recent, value, envelope, token)
        if self._has_plaintext:
            yield from self._guarded(recent, value, token)

    def _written(self, recent: _Row, value: str, envelope: str, token: str | None) -> Iterator[Look]:
        found = self._read(recent)
        raw = found.encrypted
        if raw is None:
            yield Look(ENCRYPTED, "no", "what was written is gone again: a trigger changed it")
            return
        if found.plaintext not in (None, value):
            yield Look(ENCRYPTED, "no", "a trigger changed the plaintext beside it: they do not match")
            return
        yield _look(ENCRYPTED, raw == envelope and raw != value)
        try:
            yield _look(DECRYPTED, self._decrypted(raw) == value)
        except DecryptionError:
            yield Look(DECRYPTED, "no", "the raw column holds no envelope of this column")
        if token is not None:
            yield self._found(recent, token)
        if self._has_plaintext and self.authority == "ciphertext":
            yield _look(CLEARED, found.plaintext is None)

    def _found(self, recent: _Row, token: str) -> Look:
        has_index: LiteralString = (
            "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid "
            "AND a.attnum = i.indkey[0] WHERE i.indrelid = %s AND i.indisvalid AND a.attname = %s)"
        )
        if not answer(self.connection, has_index, self.definition.oid, self.column.search):
            return Look(FOUND, "not tried", "its index is not built yet: --migrate-data")
        rows = self.connection.execute(
            # Of two types alike: a comparison of the application's own would be called for others.
            SQL("SELECT FROM {} t WHERE {}::text = %s::text AND {}").format(
                self.definition.identifier, Identifier("t", self.column.search), self._this_row
            ),
            [token, *recent.key],
        )
        return _look(FOUND, rows.rowcount == 1)

    def _guarded(self, recent: _Row, value: str, token: str | None) -> Iterator[Look]:
        if self.authority == "plaintext":
            another = self.target.cipher.encrypt(value, self.column.context)
            after = self._attempt(recent, lambda: self._write(recent, another, token, keep_plaintext=False))
            yield _look(REFUSED, after == _CHECK_VIOLATION)
        # After the switch the plaintext is cleared by now, so that its own value is a change.
        others = [value] if self.authority == "ciphertext" else self._others(recent, value)
        for other in others:
            after = self._attempt(recent, partial(self._write_plaintext, recent, other))
            if isinstance(after, _Row):
                yield _look(PENDING, after.encrypted is None and after.search is None)
                return
            if after[:2] not in (_DATA_EXCEPTION, _INTEGRITY):
                yield Look(PENDING, "not tried", f"SQLSTATE {after}")
                return
        yield Look(PENDING, "not tried", "no other value fits the row's constraints")

    def _others(self, recent: _Row, value: str) -> list[str | None]:
        """Values to change the plaintext to for a moment, the likeliest to be accepted first."""
        rows = self.connection.execute(
            SQL("SELECT {}::text FROM ({}) t").format(Identifier("t", self.column.name), self._recent())
        )
        another = [text for (text,) in rows if text not in (None, value)][:1]
        nothing = [] if self.definition.columns[self.column.name].not_null else [None]
        # The last one is for what has to be unique; a type that is no text refuses it.
        return [*nothing, *another, f"{value}~"]

    def _attempt(self, row: _Row, write: Callable[[], None]) -> _Row | str:
        """Make a write and take it back: the row as it was then, or the SQLSTATE of the refusal."""
        try:
            with self.connection.transaction(force_rollback=True):
                write()
                return self._read(row)
        except psycopg.Error as error:
            if error.sqlstate is None:
                raise
            return error.sqlstate

    @property
    def _this_row(self) -> Composed:
        return sql.compare_key(self.definition, "=")

    def _recent(self) -> Composed:
        # No more columns than are needed: rows can be wide.
        names = [self.column.name] if self._has_plaintext else []
        names.append(self.column.encrypted)
        return SQL("SELECT {}, {} FROM {} t ORDER BY {} LIMIT {}").format(
            sql.key_list(self.definition),
            SQL(", ").join(Identifier("t", name) for name in names),
            self.definition.identifier,
            SQL(", ").join(SQL("{} DESC").format(Identifier("t", key.name)) for key in self.definition.key),
            Literal(RECENT_ROWS),
        )

    def _recent_row(self) -> _Row | None:
        """A recent row that has a value, locked, so that it stays as it is for the moment this takes."""
        names = [self.column.encrypted, *([self.column.name] if self._has_plaintext else [])]
        has_value = SQL(" OR ").join(sql.has_value(Identifier("t", name)) for name in names)
        return self._row(
            SQL("({key}) IN (SELECT {key} FROM ({recent}) t) AND ({has_value}) LIMIT 1 {lock}").format(
                key=sql.key_list(self.definition),
                recent=self._recent(),
                has_value=has_value,
                lock=SQL("FOR NO KEY UPDATE OF t SKIP LOCKED"),
            ),
            [],
        )

    def _read(self, row: _Row) -> _Row:
        found = self._row(self._this_row, row.key)
        # Locked by us: nobody else takes it away.
        assert found is not None  # noqa: S101
        return found

    def _row(self, which: Composed, parameters: Sequence[str]) -> _Row | None:
        names = [self.column.name if self._has_plaintext else None, self.column.encrypted]
        names.append(self.column.search if self.column.searchable else None)
        values = [SQL("{}::text").format(Identifier("t", name)) if name else SQL("NULL") for name in names]
        found = self.connection.execute(
            SQL("SELECT {}, {} FROM {} t WHERE {}").format(
                sql.key_text(self.definition), SQL(", ").join(values), self.definition.identifier, which
            ),
            parameters,
        ).fetchone()
        return None if found is None else _Row(found[:-3], *found[-3:])

    def _decrypted(self, envelope: str) -> str:
        return self.target.cipher.decrypt(envelope, self.column.context)

    def _write(self, row: _Row, envelope: str, token: str | None, *, keep_plaintext: bool) -> None:
        """As an application does: ciphertext and token, and the plaintext named beside them or not."""
        values = {self.column.encrypted: envelope}
        values |= {self.column.search: token} if token is not None else {}
        kept = SQL("{0} = {0}").format(Identifier(self.column.name))
        given = [SQL("{} = %s").format(Identifier(name)) for name in values]
        self._update(row, [*given, kept] if keep_plaintext else given, [*values.values()])

    def _write_plaintext(self, row: _Row, value: str | None) -> None:
        # The text form is read back as the column's own type.
        type_ = sql.verbatim(self.definition.columns[self.column.name].type)
        self._update(row, [SQL("{} = %s::{}").format(Identifier(self.column.name), type_)], [value])

    def _update(self, row: _Row, assignments: Sequence[Composable], values: Sequence[str | None]) -> None:
        self.connection.execute(
            SQL("UPDATE {} t SET {} WHERE {}").format(
                self.definition.identifier, SQL(", ").join(assignments), self._this_row
            ),
            [*values, *row.key],
        )


def _look(what: str, so: bool) -> Look:
    return Look(what, "yes" if so else "no")
