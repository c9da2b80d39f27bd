"""The application writes at one exact moment: between the reading of a batch and its writing.

The engine takes its cipher as an argument. This one is the real one, and lets the application commit something while a
batch is being encrypted: rows have been read, and are not written yet. Nothing in the package knows of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from psycopg import Rollback, errors
from psycopg.sql import SQL, Composable, Composed, Identifier

from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace
from alphapulse_encryption.migration.rows.verify import verify_range
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, CIPHER, target
from alphapulse_encryption_tests.stress import application
from alphapulse_encryption_tests.stress.application import SHAPES, Event, Mode, Oracle, Shape, faults_named

Meanwhile = Callable[[], None]


class Interleaved:
    """The real cipher; before each batch and column it calls a function once.

    Args:
        moments: called one after the other, each at one batch and column.
        cipher: the real one.
    """

    def __init__(self, moments: Sequence[Meanwhile], cipher: EnvelopeFormat = CIPHER) -> None:
        self._moments = list(moments)
        self._cipher = cipher

    @property
    def left(self) -> Sequence[Meanwhile]:
        """Moments that did not come."""
        return self._moments

    def _meanwhile(self) -> None:
        if self._moments:
            self._moments.pop(0)()

    def encrypt(self, value: str, context: str) -> str:
        return self._cipher.encrypt(value, context)

    def encrypt_many(self, values: Sequence[str | None], context: str) -> list[str | None]:
        self._meanwhile()
        return self._cipher.encrypt_many(values, context)

    def encrypt_many_utf8(self, values: Sequence[bytes | None], context: str) -> list[bytes | None]:
        self._meanwhile()
        return self._cipher.encrypt_many_utf8(values, context)

    def decrypt(self, envelope: str, context: str) -> str:
        return self._cipher.decrypt(envelope, context)

    def decrypt_many(self, envelopes: Sequence[str | None], context: str) -> list[str | None]:
        self._meanwhile()
        return self._cipher.decrypt_many(envelopes, context)

    def key_version(self, envelope: str, context: str) -> int:
        return self._cipher.key_version(envelope, context)

    def ending(self, context: str, version: int) -> str:
        return self._cipher.ending(context, version)


def backfill(
    url: str, shape: Shape, number: int, batch_size: int, moments: Sequence[Meanwhile] = ()
) -> Sequence[Meanwhile]:
    """Backfill a range, the application writing between the reading and the writing of its batches.

    Returns:
        Moments that did not come.
    """
    cipher = Interleaved(moments)
    backfill_range(target(url, cipher=cipher), shape.entry, number, pace=Pace(batch_size=batch_size))
    return cipher.left


# Without one of the two protections


def without_guard(url: str, shape: Shape) -> None:
    """Disable the triggers, as a careless administrator might."""
    statement = SQL("ALTER TABLE {} DISABLE TRIGGER USER").format(Identifier(shape.schema, shape.name))
    support.run(url, statement)


_CHECK = " AND t.xmin = d.x"


def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the steps go on where the guard is gone, to see what that would do."""
    for module in ("rows.operation", "rows.verify", "schema.guard", "schema.indexes"):
        monkeypatch.setattr(
            f"alphapulse_encryption.migration.{module}.refuse_unguarded", lambda *_, **__: None
        )


def without_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the comparison of xmin out of the engine's UPDATE, for one test: everything else of it is as it is."""
    complete = sql.update_rows

    def incomplete(*arguments: object, **options: object) -> Composed:
        statement = complete(*arguments, **options)  # type: ignore[arg-type]
        text, removed = _without(statement, _CHECK)
        if removed != 1:
            raise LookupError("The comparison of xmin is written in another way: adapt this test.")
        return text

    monkeypatch.setattr(sql, "update_rows", incomplete)


def _without(statement: Composed, words: str) -> tuple[Composed, int]:
    parts: list[Composable] = []
    removed = 0
    for part in statement:
        if isinstance(part, Composed):
            inner, count = _without(part, words)
            parts.append(inner)
            removed += count
        elif isinstance(part, SQL) and words in part.as_string(None):
            parts.append(SQL(part.as_string(None).replace(words, "")))
            removed += 1
        else:
            parts.append(part)
    return Composed(parts), removed


# Any sequence of steps and transactions

ROWS = range(1, 9)
_TEXTS = ("", "a", "b", "c", None)
Kind = Literal["insert", "upsert", "update", "delete", "move"]
Operation = tuple[Kind, int, int, Mode, tuple[str | None, ...], bool]
Ending = Literal["commit", "rollback", "savepoint"]
Transaction = tuple[list[Operation], Ending]

operations = st.tuples(
    st.sampled_from(("update", "update", "update", "insert", "upsert", "delete", "move")),
    st.sampled_from(ROWS),
    st.sampled_from(ROWS),
    st.sampled_from(("plaintext", "both", "ciphertext")),
    st.tuples(st.sampled_from(_TEXTS), st.sampled_from(_TEXTS)),
    st.booleans(),
)
transactions: st.SearchStrategy[Transaction] = st.tuples(
    st.lists(operations, min_size=1, max_size=3),
    st.sampled_from(("commit", "commit", "commit", "commit", "rollback", "savepoint")),
)


class WritesAreLost(AssertionError):
    """The table does not hold what was committed."""


class Migration(RuleBasedStateMachine):
    """One table, one connection of the application, and the engine's steps in any order.

    A subclass gives it a database and a kind of table.
    """

    url: str
    kind: str
    tables = 0
    ranges: int = 0
    authority: str | None = None

    @initialize(present=st.sets(st.sampled_from(ROWS), min_size=4), ranges=st.sampled_from((0, 1, 1, 2, 3)))
    def create(self, present: set[int], ranges: int) -> None:
        type(self).tables += 1
        self.shape = SHAPES[self.kind].named(f"{SHAPES[self.kind].name}_{self.tables}")
        self.oracle = Oracle(application.create(self.url, self.shape, sorted(present)))
        self.opened = support.application(self.url)
        self.connection = self.opened.__enter__()
        self.connection.execute("SET lock_timeout TO '5s'")
        if ranges:
            self.add_columns(ranges)

    # The application

    def write(self, transaction: Transaction) -> None:
        wanted, ending = transaction
        committed = ending != "rollback"
        staged = Oracle({key: dict(row) for key, row in self.oracle.rows.items()})
        try:
            with self.connection.transaction() as whole:
                for number, operation in enumerate(wanted):
                    if ending == "savepoint" and number == len(wanted) - 1:
                        self._undone(operation, staged)
                    else:
                        self._apply(operation, staged)
                if not committed:
                    raise Rollback(whole)
        except errors.UniqueViolation:
            return
        except (errors.CheckViolation, errors.NotNullViolation):
            assert any(mode != "plaintext" for _, _, _, mode, _, _ in wanted)
            return
        if committed:
            self.oracle = staged

    def _undone(self, operation: Operation, staged: Oracle) -> None:
        with self.connection.transaction() as part:
            self._apply(operation, Oracle({key: dict(row) for key, row in staged.rows.items()}))
            raise Rollback(part)

    def _apply(self, operation: Operation, staged: Oracle) -> None:
        kind, number, other, mode, texts, both_columns = operation
        shape, connection = self.shape, self.connection
        key, new = shape.key_of(number), shape.key_of(other)
        if self.authority is None:
            mode = "plaintext"
        present = key in staged.rows
        if kind == "delete" or (kind == "move" and present and new in staged.rows):
            assert application.delete(connection, shape, key) == present
            staged.record([Event(1, key, None)] if present else [])
            return
        if kind == "move":
            assert application.move(connection, shape, key, new) == present
            staged.record([Event(1, new, None, moved_from=key)] if present else [])
            return
        whole = kind in {"insert", "upsert"} or not present
        values = self._values(key, mode, texts, whole=whole or both_columns)
        if not whole:
            assert application.update(connection, shape, key, values, mode) == 1
        else:
            assert application.insert(connection, shape, key, values, mode, upsert=kind == "upsert") == 1
        staged.record([Event(1, key, values, whole=whole)])

    def _values(
        self, key: application.Key, mode: Mode, texts: tuple[str | None, ...], *, whole: bool
    ) -> dict[str, str | None]:
        values: dict[str, str | None] = {}
        for column, drawn in zip(self.shape.columns, texts, strict=True):
            # A NULL on one side says nothing where that side is NULL already, as it is after the switch.
            says_nothing = mode == "ciphertext" or (mode == "plaintext" and self.authority == "ciphertext")
            never = column.name in self.shape.required or says_nothing
            text = "d" if drawn is None and never else drawn
            # Values collide between rows, but where nobody could have told the writer: tokens are unique, and the
            # plaintext of some rows is gone already.
            number = 0
            if column.searchable and mode == "plaintext" and self.authority == "ciphertext":
                number = sum(key[0].encode())
            values[column.name] = None if text is None else self.shape.value(column.name, number, text)
            if not whole:
                break
        return values

    @rule(wanted=st.lists(transactions, min_size=1, max_size=3))
    def writes(self, wanted: list[Transaction]) -> None:
        for transaction in wanted:
            self.write(transaction)

    # The engine

    @precondition(lambda self: not self.ranges)
    @rule(ranges=st.integers(1, 3))
    def add_columns(self, ranges: int) -> None:
        support.add_columns(self.url, self.shape.entry, ranges=ranges)
        self.ranges, self.authority = ranges, "plaintext"
        self.protect()

    def protect(self) -> None:
        """Called once the guard is in place."""

    @precondition(lambda self: self.ranges)
    @rule(
        which=st.sampled_from((None, None, 0, 1, 2)),
        batch_size=st.integers(1, 4),
        changed=st.sets(st.sampled_from(ROWS), min_size=2),
        wanted=st.lists(transactions, min_size=1, max_size=6),
    )
    def backfills(
        self, which: int | None, batch_size: int, changed: set[int], wanted: list[Transaction]
    ) -> None:
        # Something has to be pending, or there is no moment between its reading and its writing.
        for number in changed:
            if self.shape.key_of(number) in self.oracle.rows:
                self.write(([("update", number, number, "plaintext", ("e", "e"), True)], "commit"))
        moments: Sequence[Meanwhile] = [self._moment(transaction) for transaction in wanted]
        for number in range(self.ranges) if which is None else (which % self.ranges,):
            moments = backfill(self.url, self.shape, number, batch_size, moments)

    def _moment(self, transaction: Transaction) -> Meanwhile:
        return lambda: self.write(transaction)

    @precondition(lambda self: self.ranges)
    @rule()
    def builds_indexes(self) -> None:
        build_search_indexes(Database(self.url), self.shape.entry, ACTOR)

    @precondition(lambda self: self.ranges)
    @rule(wanted=st.lists(transactions, max_size=2))
    def verifies(self, wanted: list[Transaction]) -> None:
        cipher = Interleaved([self._moment(transaction) for transaction in wanted])
        for number in range(self.ranges):
            verify_range(target(self.url, cipher=cipher), self.shape.entry, number)

    @precondition(lambda self: self.authority == "plaintext")
    @rule(prepared=st.booleans())
    def switches(self, prepared: bool) -> None:
        if prepared:
            self.catch_up()
            self.builds_indexes()
            self._nothing_is_lost()
        try:
            switch_to_ciphertext(target(self.url), self.shape.entry)
            self.authority = "ciphertext"
        except RefusedError:
            assert not prepared

    @precondition(lambda self: self.authority == "ciphertext")
    @rule()
    def reverts(self) -> None:
        revert_to_plaintext(target(self.url), self.shape.entry)
        # Nothing is promised of the ciphertext until the guard is back.
        support.add_columns(self.url, self.shape.entry, ranges=self.ranges)
        self.authority = "plaintext"

    def catch_up(self) -> None:
        support.backfill_all(self.url, self.shape.entry)

    # What has to be so

    @invariant()
    def nothing_is_out_of_date(self) -> None:
        if self.ranges:
            self._nothing_is_lost(pending_too=False)

    def _nothing_is_lost(self, *, pending_too: bool = True) -> None:
        faults = application.lost(self.url, self.shape, self.oracle, pending_too=pending_too)
        if faults:
            raise WritesAreLost(faults_named(faults))
        # The engine's own verification is of the same opinion.
        assert not pending_too or support.verify(self.url, self.shape.entry).passed

    def teardown(self) -> None:
        if not hasattr(self, "opened"):
            return
        try:
            if self.ranges:
                self.catch_up()
                self._nothing_is_lost()
        finally:
            self.opened.__exit__(None, None, None)
            support.run(self.url, SQL("DROP TABLE {}").format(Identifier(self.shape.schema, self.shape.name)))
