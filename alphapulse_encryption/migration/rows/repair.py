"""What a verification found beside a plaintext that is right: cleared, so that the backfill encrypts it again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import psycopg

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping import tracking
from alphapulse_encryption.migration.bookkeeping.tracking import Key
from alphapulse_encryption.migration.postgres.database import Actor, mark_as_engine
from alphapulse_encryption.migration.rows.batches import Row, key_of, plan_by_key, read_batch
from alphapulse_encryption.migration.rows.verify import Offender, faults
from alphapulse_encryption.migration.schema import sql
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]

ROWS_PER_BATCH = 1_000
# A pending value needs no repair: the backfill finds it.
_CLEARED = ("mismatched", "undecryptable", "token_mismatched")


@dataclass(frozen=True)
class RepairResult:
    """What :func:`repair_mismatched` did.

    Args:
        values: how many values were cleared, by column.
        changed_meanwhile: rows left alone because another transaction changed them just then.
        seconds: duration.
    """

    values: Mapping[str, int]
    changed_meanwhile: int
    seconds: float

    @property
    def changed(self) -> bool:
        return bool(self.values)


@dataclass(frozen=True)
class _Found:
    """What the last verification found in a range.

    Args:
        number: the range.
        keys: by column the rows it named; None where there were more than it names.
    """

    number: int
    keys: Mapping[str, frozenset[Key] | None]

    def names(self, offender: Offender) -> bool:
        if offender.problem not in _CLEARED or offender.column not in self.keys:
            return False
        named = self.keys[offender.column]
        return named is None or offender.key in named


@dataclass
class _Counters:
    values: Counter[str] = field(default_factory=Counter)
    changed_meanwhile: int = 0


def repair_mismatched(target: Target, table: Table) -> RepairResult:
    """Clear ciphertext and token of the values that the table's last verification found wrong.

    Each is decrypted and compared once more, and cleared only if it is wrong still. Nothing else is touched: of a
    range and column with more such rows than a verification names, every one that is wrong now. The plaintext is
    right and stays; what only the ciphertext held is gone. The ranges' results are discarded, because they speak of
    other rows now.

    Args:
        table: the catalogue's entry.

    Raises:
        RefusedError: columns not added, wrong key, the ciphertext is the right side, or the verification is outdated.
        ConfigurationError: table or column missing.
        DatabaseFailure: the server refused.
    """
    started = time.monotonic()
    counters = _Counters()
    with target.database.session(f"repair {table.key}") as connection:
        plan_by_key(connection)
        tracking.check_key(connection, target.keys)
        _require_plaintext(tracking.require_state(connection, table), table)
        tracking.hold_plan(connection, table)
        definition = read_table(connection, table)
        for found in _last_verification(connection, definition, target.keys):
            _repair_range(connection, definition, found, target, counters)
    return RepairResult(dict(counters.values), counters.changed_meanwhile, time.monotonic() - started)


def _require_plaintext(state: tracking.TableState, table: Table) -> None:
    if not state.state.has_both_sides or state.authority != "plaintext":
        raise RefusedError(
            f"The ciphertext of {table.key} is the right side: what it holds is in no other place, so none of it is "
            "cleared. Nothing was changed."
        )


def _last_verification(
    connection: Connection, definition: TableDefinition, keys: KeyRing
) -> tuple[_Found, ...]:
    table = definition.table
    rows = connection.execute(
        "SELECT batch_range, columns, offenders, definition = %s AND key_check = %s "
        "FROM public.encryption_verifications WHERE table_name = %s ORDER BY batch_range",
        [definition.shape(), keys.check_value(keys.current_version), table.key],
    ).fetchall()
    found = []
    for number, counts, offenders, current in rows:
        wanted: dict[str, frozenset[Key] | None] = {}
        for column in definition.plaintext_columns:
            count = sum(counts.get(column.name, {}).get(kind, 0) for kind in _CLEARED)
            named = [
                tuple(o["key"]) for o in offenders if o["column"] == column.name and o["problem"] in _CLEARED
            ]
            if count:
                wanted[column.name] = frozenset(named) if len(named) == count else None
        if not wanted:
            continue
        if not current:
            raise RefusedError(
                f"Batch range {number:02d} of {table.key} was verified before the table's columns or the key changed. "
                f"Verify it again (--verify --table {table.key}); nothing was changed."
            )
        found.append(_Found(number, wanted))
    return tuple(found)


def _repair_range(
    connection: Connection, definition: TableDefinition, found: _Found, target: Target, counters: _Counters
) -> None:
    table = definition.table
    batch_range = tracking.read_range(connection, table, found.number)
    position = batch_range.lower
    while not batch_range.is_empty:
        condition, parameters = sql.within(definition, position, batch_range.upper)
        query = sql.select_for_verification(definition, condition, with_version=True)
        rows = read_batch(connection, query, parameters, ROWS_PER_BATCH)
        if not rows:
            break
        wrong = [
            offender
            for offender in faults(rows, definition, target.cipher, target.keys)
            if found.names(offender)
        ]
        if wrong:
            _clear(connection, definition, found.number, rows, wrong, target.actor, counters)
        position = key_of(definition, rows[-1])
    connection.execute(
        "DELETE FROM public.encryption_verifications WHERE table_name = %s AND batch_range = %s",
        [table.key, found.number],
    )


def _clear(
    connection: Connection,
    definition: TableDefinition,
    number: int,
    rows: Sequence[Row],
    wrong: Sequence[Offender],
    actor: Actor,
    counters: _Counters,
) -> None:
    table = definition.table
    columns: dict[Key, set[str]] = {}
    for offender in wrong:
        columns.setdefault(offender.key, set()).add(offender.column)
    versions = {key_of(definition, row): row[-1] for row in rows}
    keys = [key for key in versions if key in columns]
    arrays: list[Sequence[object]] = [list(part) for part in zip(*keys, strict=True)]
    arrays.append([versions[key] for key in keys])
    arrays += [[column.name in columns[key] for key in keys] for column in definition.plaintext_columns]
    with connection.transaction():
        # Held until the commit, so that no switch makes the ciphertext right meanwhile.
        _require_plaintext(tracking.require_state(connection, table, lock=True), table)
        mark_as_engine(connection)
        written = connection.execute(sql.clear_values(definition), [*arrays, *keys[0], *keys[-1]]).fetchall()
        cleared = [offender for offender in wrong if offender.key in set(written)]
        if cleared:
            tracking.audit(
                connection,
                actor,
                "repair_mismatched",
                table,
                batch_range=number,
                cleared=[asdict(offender) for offender in cleared],
            )
    counters.values.update(offender.column for offender in cleared)
    counters.changed_meanwhile += len(keys) - len(written)
