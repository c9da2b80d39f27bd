"""What a verification found beside a plaintext that is right: cleared, so that the backfill encrypts it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from psycopg.sql import Composed

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.keys import check_key
from alphapulse_encryption.migration.bookkeeping.ranges import Key, hold_plan
from alphapulse_encryption.migration.bookkeeping.tables import TableState, require_state
from alphapulse_encryption.migration.bookkeeping.usage import MeteredCipher
from alphapulse_encryption.migration.bookkeeping.verifications import forget_verifications, kept_verifications
from alphapulse_encryption.migration.postgres.database import Connection
from alphapulse_encryption.migration.rows.batches import Columns, key_at, texts
from alphapulse_encryption.migration.rows.discard import Discard
from alphapulse_encryption.migration.rows.engine import Progress, RangeResult, work_on_table
from alphapulse_encryption.migration.rows.operation import Faults, Item, Written
from alphapulse_encryption.migration.rows.problems import Problem, cleared, is_repairable
from alphapulse_encryption.migration.rows.verify import Offender, faults, sides_read
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target


@dataclass(frozen=True)
class Repair(Discard):
    """Clears what a verification found wrong in a range, where it is wrong still.

    Args:
        number: the range.
        found: by column the rows that the verification named; None where there were more than it names.
    """

    step = "repair"

    number: int
    found: Mapping[str, frozenset[Key] | None]

    def admit(self, connection: Connection, *, lock: bool = False) -> bool:
        _require_plaintext(require_state(connection, self.table, lock=lock), self.table)
        return True

    def wanted(self, definition: TableDefinition) -> Composed:
        # Only who decrypts it knows.
        return sql.EVERYTHING

    def select(self, definition: TableDefinition, condition: Composed) -> Composed:
        return sql.select_for_verification(definition, condition, with_version=True)

    def make(self, definition: TableDefinition, columns: Columns, cipher: MeteredCipher) -> list[Item]:
        width = len(definition.key)
        read = texts([*columns[:width], *columns[width + 1 :]], errors="replace")
        keys = [key_at(read, width, row) for row in range(len(read[0]))]
        # Of the application's own, what is in no other place.
        alone = {
            (key, column.name)
            for column, (plaintexts, _, _) in sides_read(read, definition, self.table.columns)
            if column.adopt
            for key, plaintext in zip(keys, plaintexts, strict=True)
            if plaintext is None
        }
        wrong = {
            (offender.key, offender.column): offender.problem.encode()
            for offender in faults(read, definition, self.target)
            if self._was_found(offender) and (offender.key, offender.column) not in alone
        }
        flags = [[wrong.get((key, column.name)) for key in keys] for column in definition.encrypted_columns]
        arrays = [*columns[: width + 1], *flags]
        return Faults().items(columns, arrays, width, list(range(width + 1, len(arrays))))

    def _was_found(self, offender: Offender) -> bool:
        if offender.column not in self.found or offender.problem not in self._cleared[offender.column]:
            return False
        named = self.found[offender.column]
        return named is None or offender.key in named

    @cached_property
    def _cleared(self) -> dict[str, tuple[Problem, ...]]:
        return {column.name: cleared(column) for column in self.table.columns}

    def after(self, connection: Connection, done: Written) -> int:
        cleared = [
            {"column": column.name, "problem": problem.decode(), "key": done.batch.key(row)}
            for column, at in zip(done.definition.encrypted_columns, done.batch.counted, strict=True)
            for row in done.rows
            if isinstance(problem := done.batch.arrays[at].items[row], bytes)
        ]
        if cleared:
            told = {"batch_range": self.number, "cleared": cleared}
            audit(connection, self.target.actor, "repair_mismatched", self.table, **told)
        return 0


def repair_mismatched(
    target: Target, table: Table, *, on_progress: Callable[[Progress], None] | None = None
) -> RangeResult:
    """Clear ciphertext and token of the values that the table's last verification found wrong.

    Each is decrypted and compared once more, and cleared only if it is wrong still. Nothing else is touched: of a
    range and column with more such rows than a verification names, every one that is wrong now. The plaintext is
    right and stays; what only the ciphertext held is gone. The ranges' results are discarded, because they speak of
    other rows now.

    Args:
        on_progress: called after each batch, and while it holds back.

    Raises:
        RowsLeft: rows cannot be cleared, or are locked; the others are.
        RefusedError: columns not added, wrong key, the ciphertext is the right side, or the verification is outdated.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    with target.database.session(f"repair {table.key}") as connection:
        check_key(connection, target.keys)
        _require_plaintext(require_state(connection, table), table)
        hold_plan(connection, table)
        operations = _repairs(connection, read_table(connection, table), target)
        again = f"--repair-mismatched --table {table.key}"
        result = work_on_table(target, table, operations, again=again, on_progress=on_progress)
        forget_verifications(connection, table, list(operations))
    return result


def _require_plaintext(state: TableState, table: Table) -> None:
    if not is_repairable(state.state):
        raise RefusedError(
            f"The ciphertext of {table.key} is the right side: what it holds is in no other place, so none of it is "
            f"cleared. What helps with each value is told by --verify --table {table.key}; nothing was changed."
        )


def _repairs(connection: Connection, definition: TableDefinition, target: Target) -> dict[int, Repair]:
    """By range, what is to be cleared of what the last verification found."""
    table, key_check = definition.table, target.keys.check_value(target.keys.current_version)
    repairs = {}
    for kept in kept_verifications(connection, table, definition.shape(), key_check, target.keys):
        found: dict[str, frozenset[Key] | None] = {}
        for column in definition.plaintext_columns:
            kinds = cleared(column)
            count = sum(kept.columns.get(column.name, {}).get(kind, 0) for kind in kinds)
            named = [
                tuple(o["key"])
                for o in kept.offenders
                if o["column"] == column.name and o["problem"] in kinds
            ]
            if count:
                found[column.name] = frozenset(named) if len(named) == count else None
        if found and not (kept.same and kept.genuine):
            raise RefusedError(
                f"Batch range {kept.number:02d} of {table.key} was verified before the table's columns or the key "
                f"changed, or its result is not authenticated. Verify it again (--verify --table {table.key}); "
                "nothing was changed."
            )
        if found:
            repairs[kept.number] = Repair(target, table, kept.number, found)
    return repairs
