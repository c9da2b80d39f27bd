"""Key versions in the database: which one is written, how many values each still has, and when one is retired.

A version is *current* from the beginning of its rotation on, *readable* while values of it may be there, and *retired*
once a look at all catalogued tables found none. Retiring destroys nothing: the key stays where it is, and a version of
which values turn up again is readable again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.errors import DecryptionError, RefusedError
from alphapulse_encryption.migration.bookkeeping.approvals import revoke
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.columns import uncatalogued_columns
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import (
    KeyState,
    KeyVersion,
    check_key,
    check_key_values,
    check_readable,
    hold_key_versions,
    keep_key_count,
    key_versions,
    remember_key,
    set_key_state,
)
from alphapulse_encryption.migration.postgres import wire
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.batches import reading, texts
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

Connection = psycopg.Connection[Any]

ROWS_PER_BATCH = 5_000


@dataclass(frozen=True)
class Begun:
    """What :func:`begin_rotation` did.

    Args:
        version: the current version now.
        before: the current version before; the same where nothing was begun. None where the database never was.
        revoked: approvals of a drop that this has voided.
    """

    version: int
    before: int | None
    revoked: tuple[int, ...] = ()

    @property
    def changed(self) -> bool:
        return self.before is not None and self.before != self.version


def begin_rotation(target: Target) -> Begun:
    """Make the key ring's current version the database's: from now on the engine writes no other.

    What is of other versions stays as it is, and readable. Approvals of a drop are revoked, and verifications count no
    more: both were given for values under the version before.

    Raises:
        RefusedError: the database's current version is a later one, a key is not the one the database was begun with,
            or there is no key of a version that values may have; nothing was changed.
        DatabaseFailure: the server refused.
    """
    new = target.keys.current_version
    with target.database.session("begin a key rotation") as connection:
        check_key_values(connection, target.keys)
        if not key_versions(connection):
            return Begun(new, None)
        ensure_bookkeeping(connection)
        with connection.transaction():
            hold_key_versions(connection)
            versions = key_versions(connection)
            current = next(version for version in versions if version.state == "current")
            if current.number == new:
                check_readable(versions, target.keys)
                return Begun(new, new)
            if new < current.number:
                check_key(connection, target.keys)
            check_readable(versions, target.keys)
            remember_key(connection, target.keys)
            # Once more, now that this one is among them: somebody may have stored another key for it before.
            check_key_values(connection, target.keys)
            set_key_state(connection, current.number, "readable", target.actor)
            set_key_state(connection, new, "current", target.actor)
            revoked = revoke(connection, f"{target.actor.name}: key rotation")
            approvals = tuple(approval.id for approval in revoked)
            audit(
                connection,
                target.actor,
                "begin_key_rotation",
                from_version=current.number,
                to_version=new,
                revoked_approvals=list(approvals),
            )
    return Begun(new, current.number, approvals)


@dataclass
class Found:
    """What is of one key version in one table.

    Args:
        rows: rows with a value of it.
        values: values.
    """

    rows: int = 0
    values: int = 0

    def __str__(self) -> str:
        values = f"{self.values:,} value{'' if self.values == 1 else 's'}"
        return f"{values} in {self.rows:,} row{'' if self.rows == 1 else 's'}"


@dataclass(frozen=True)
class TableVersions:
    """What a table's ciphertexts name as their key versions.

    Args:
        versions: by version.
        unreadable: values that are no envelopes of their column, so that they name none.
    """

    table: str
    versions: Mapping[int, Found]
    unreadable: int = 0

    def __str__(self) -> str:
        parts = [f"version {version}: {found}" for version, found in self.versions.items()]
        parts += [f"no envelopes: {self.unreadable:,} values"] if self.unreadable else []
        return "; ".join(parts) or "nothing is encrypted"

    def of(self, version: int) -> Found:
        """What is of a version."""
        return self.versions.get(version, Found())


@dataclass
class _Count:
    versions: dict[int, Found] = field(default_factory=dict)
    unreadable: int = 0

    def add(self, version: int, rows: int, values: int) -> None:
        found = self.versions.setdefault(version, Found())
        found.rows += rows
        found.values += values


def count_versions(
    database: Database, tables: Iterable[Table], cipher: EnvelopeFormat
) -> tuple[TableVersions, ...]:
    """Count what each table has of every key version, all of them at one moment; reads every row, and opens none.

    Args:
        tables: the catalogue's entries; those without encrypted columns are left out.

    Raises:
        ConfigurationError: a table is missing.
        DatabaseFailure: the server refused.
    """
    with database.session("count the values of each key version") as connection, connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return tuple(_counted(connection, tables, cipher))


def _counted(
    connection: Connection, tables: Iterable[Table], cipher: EnvelopeFormat
) -> Iterable[TableVersions]:
    known = [version.number for version in key_versions(connection)]
    for table in tables:
        definition = read_table(connection, table, plaintext=False)
        if definition.encrypted_columns:
            yield _count(connection, definition, cipher, known)


def _count(
    connection: Connection, definition: TableDefinition, cipher: EnvelopeFormat, versions: Sequence[int]
) -> TableVersions:
    """Those that end as ours do are counted by the server, rows with any other are looked at here."""
    count = _Count()
    # Two numbers for each version, in one row.
    numbers = connection.execute(_count_ours(definition, cipher, versions)).fetchall()[0]
    for i, version in enumerate(versions):
        if numbers[2 * i]:
            count.add(version, numbers[2 * i], numbers[2 * i + 1])
    others = wire.numbered(connection, _select_others(definition, cipher, versions))
    with reading(connection, others) as fetch:
        while (columns := texts(fetch(ROWS_PER_BATCH)))[0]:
            for row in zip(*columns, strict=True):
                _look(definition, cipher, row, count)
    return TableVersions(definition.table.key, dict(sorted(count.versions.items())), count.unreadable)


def _look(
    definition: TableDefinition, cipher: EnvelopeFormat, row: Sequence[str | None], count: _Count
) -> None:
    found: Counter[int] = Counter()
    for column, envelope in zip(definition.encrypted_columns, row, strict=True):
        if envelope is None:
            continue
        try:
            found[cipher.key_version(envelope, column.context)] += 1
        except DecryptionError:
            count.unreadable += 1
    for version, values in found.items():
        count.add(version, 1, values)


def _count_ours(definition: TableDefinition, cipher: EnvelopeFormat, versions: Sequence[int]) -> Composed:
    counts: list[Composed] = []
    for version in versions:
        values = [
            _ends(column.encrypted, cipher.ending(column.context, version))
            for column in definition.encrypted_columns
        ]
        counts.append(SQL("count(*) FILTER (WHERE {})").format(SQL(" OR ").join(values)))
        counts.append(
            SQL("coalesce(sum({}), 0)::bigint").format(
                SQL(" + ").join(SQL("coalesce({}, false)::int").format(value) for value in values)
            )
        )
    return SQL("SELECT {} FROM {} t WHERE NOT {}").format(
        SQL(", ").join(counts), definition.identifier, _has_others(definition, cipher, versions)
    )


def _select_others(definition: TableDefinition, cipher: EnvelopeFormat, versions: Sequence[int]) -> Composed:
    columns = [SQL("{}::text").format(Identifier("t", c.encrypted)) for c in definition.encrypted_columns]
    return SQL("SELECT {} FROM {} t WHERE {}").format(
        SQL(", ").join(columns), definition.identifier, _has_others(definition, cipher, versions)
    )


def _has_others(definition: TableDefinition, cipher: EnvelopeFormat, versions: Sequence[int]) -> Composed:
    """The condition that a row has an envelope which ends in no way that we know."""
    others = [
        SQL("NOT coalesce({}, true)").format(
            SQL(" OR ").join(
                _ends(column.encrypted, cipher.ending(column.context, version)) for version in versions
            )
        )
        for column in definition.encrypted_columns
    ]
    return SQL("({})").format(SQL(" OR ").join(others))


def _ends(column: str, ending: str) -> Composed:
    return SQL('(right({}, {}) COLLATE "C" = {})').format(
        Identifier("t", column), Literal(len(ending)), Literal(ending)
    )


@dataclass(frozen=True)
class Retirement:
    """What :func:`retire_versions` found.

    Args:
        retired: versions retired now.
        reinstated: retired versions of which values turned up again, and which are readable again.
        remaining: of versions that are neither current nor retired, what tables still have of them.
        counts: everything that was counted.
    """

    retired: tuple[int, ...]
    reinstated: tuple[int, ...]
    remaining: Mapping[int, Mapping[str, Found]]
    counts: tuple[TableVersions, ...]

    def describe(self) -> tuple[str, ...]:
        """One line for each version that could not be retired."""
        return tuple(
            f"Key version {version} is not retired: {', '.join(f'{table} {count}' for table, count in found.items())}"
            for version, found in self.remaining.items()
        )


def retire_versions(target: Target) -> Retirement:
    """Retire every old version of which no catalogued table has a value at this moment, and say what others have.

    Whatever writes an old version afterwards is found by the next verification, and by the next rotation, which makes
    the version readable again.

    Raises:
        RefusedError: there are encrypted columns that the catalogue no longer names, so that nobody can say what they
            hold; nothing was changed.
        ConfigurationError: a table is missing.
        DatabaseFailure: the server refused.
    """
    with target.database.session("look for uncatalogued encrypted columns") as connection:
        if not key_versions(connection):
            return Retirement((), (), {}, ())
        _refuse_uncatalogued(connection, target.catalogue)
    counts = count_versions(target.database, target.catalogue.tables, target.cipher)
    retired: list[int] = []
    reinstated: list[int] = []
    remaining: dict[int, Mapping[str, Found]] = {}
    with target.database.session("retire key versions") as connection, connection.transaction():
        hold_key_versions(connection)
        for version in key_versions(connection):
            found = {
                count.table: count.of(version.number) for count in counts if count.of(version.number).values
            }
            keep_key_count(connection, version.number, {table: vars(count) for table, count in found.items()})
            if version.state == "current":
                continue
            if found:
                remaining[version.number] = found
                if version.state == "retired":
                    reinstated.append(version.number)
                    _change(connection, version, "readable", "reinstate_key_version", target.actor)
            elif version.state == "readable":
                retired.append(version.number)
                _change(connection, version, "retired", "retire_key_version", target.actor)
    return Retirement(tuple(retired), tuple(reinstated), remaining, counts)


def reinstate_version(database: Database, version: int, actor: Actor) -> bool:
    """Make a retired version readable again: who lacks its key is refused from then on.

    Returns:
        Whether it was retired.

    Raises:
        RefusedError: this database does not know the version.
        DatabaseFailure: the server refused.
    """
    with database.session("reinstate a key version") as connection, connection.transaction():
        known = {found.number: found for found in key_versions(connection)}
        if version not in known:
            raise RefusedError(f"This database knows no key version {version}; nothing was changed.")
        if known[version].state != "retired":
            return False
        _change(connection, known[version], "readable", "reinstate_key_version", actor)
    return True


def _change(connection: Connection, version: KeyVersion, state: KeyState, action: str, actor: Actor) -> None:
    set_key_state(connection, version.number, state, actor)
    audit(connection, actor, action, key_version=version.number)


def _refuse_uncatalogued(connection: Connection, catalogue: Catalogue) -> None:
    rows = uncatalogued_columns(connection, catalogue.tables)
    if rows:
        raise RefusedError(
            f"No key version is retired: {', '.join(f'{t}.{c}' for t, c in rows)} has an encrypted column that the "
            "catalogue does not name, so what it holds is not looked at. Put it back into the catalogue, or drop that "
            "column."
        )
