"""Key versions in the database: which one is written, how many values each still has, and when one is retired.

A version is *current* from the beginning of its rotation on, *readable* while values of it may be there, and *retired*
once a look at all catalogued tables found none. Retiring destroys nothing: the key stays where it is, and a version of
which values turn up again is readable again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from psycopg.sql import SQL, Composed, Identifier, Literal

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.errors import DecryptionError, RefusedError
from alphapulse_encryption.migration.bookkeeping import evidence, keys
from alphapulse_encryption.migration.bookkeeping.approvals import revoke
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.columns import uncatalogued_columns
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.postgres.database import Actor, Connection, Database
from alphapulse_encryption.migration.rows.batches import sweep, texts
from alphapulse_encryption.migration.schema.definition import TableDefinition, read_table
from alphapulse_encryption.migration.target import Target

ROWS_PER_BATCH = 5_000


@dataclass(frozen=True)
class Begun:
    """The current version now, and before (None where the database has none); and approvals that this has voided."""

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
    """
    new = target.keys.current_version
    with target.database.session("begin a key rotation") as connection:
        keys.check_key_values(connection, target.keys)
        if not keys.key_versions(connection):
            return Begun(new, None)
        ensure_bookkeeping(connection)
        with connection.transaction():
            keys.hold_key_versions(connection)
            versions = keys.key_versions(connection)
            current = next(version.number for version in versions if version.state == "current")
            if new < current:
                keys.check_key(connection, target.keys)
            keys.check_readable(versions, target.keys)
            if new == current:
                return Begun(new, new)
            keys.remember_key(connection, target.keys)
            # Once more, now that this one is among them: somebody may have stored another key for it before.
            keys.check_key_values(connection, target.keys)
            keys.set_key_state(connection, current, "readable", target.actor)
            keys.set_key_state(connection, new, "current", target.actor)
            evidence.renew(connection, target.keys, target.actor)
            revoked = revoke(connection, f"{target.actor.name}: key rotation")
            approvals = tuple(approval.id for approval in revoked)
            audit(
                connection,
                target.actor,
                "begin_key_rotation",
                from_version=current,
                to_version=new,
                revoked_approvals=list(approvals),
            )
    return Begun(new, current, approvals)


@dataclass
class Found:
    """What is of one key version in one table: values, and the rows that have one."""

    rows: int = 0
    values: int = 0

    def __str__(self) -> str:
        values = f"{self.values:,} value{'' if self.values == 1 else 's'}"
        return f"{values} in {self.rows:,} row{'' if self.rows == 1 else 's'}"


@dataclass
class TableVersions:
    """What a table's ciphertexts name as their key versions."""

    table: str
    versions: dict[int, Found] = field(default_factory=dict)
    # Values that are no envelopes of their column, so that they name none.
    unreadable: int = 0

    def __str__(self) -> str:
        parts = [f"version {version}: {found}" for version, found in self.versions.items()]
        parts += [f"no envelopes: {self.unreadable:,} values"] if self.unreadable else []
        return "; ".join(parts) or "nothing is encrypted"

    def add(self, version: int, rows: int, values: int) -> None:
        """Count more of a version."""
        found = self.versions.setdefault(version, Found())
        found.rows += rows
        found.values += values


def count_versions(
    database: Database, tables: Iterable[Table], cipher: EnvelopeFormat
) -> tuple[TableVersions, ...]:
    """Count what each table has of every key version, all of them at one moment; reads every row, and opens none.

    Tables without encrypted columns are left out.

    Raises:
        ConfigurationError: a table is missing.
    """
    with database.session("count the values of each key version") as connection, connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        known = [version.number for version in keys.key_versions(connection)]
        definitions = [read_table(connection, table, plaintext=False) for table in tables]
        return tuple(
            _count(connection, definition, cipher, known)
            for definition in definitions
            if definition.encrypted_columns
        )


def _count(
    connection: Connection, definition: TableDefinition, cipher: EnvelopeFormat, known: list[int]
) -> TableVersions:
    """Those that end as ours do are counted by the server, rows with any other are looked at here."""
    count = TableVersions(definition.table.key)
    columns = definition.encrypted_columns
    # Whether a column's envelope ends as those of a version do: by version, then by column.
    ends = [[_ends(c.encrypted, cipher.ending(c.context, version)) for c in columns] for version in known]
    others = SQL(" OR ").join(
        SQL("NOT coalesce({}, true)").format(SQL(" OR ").join(of_column))
        for of_column in zip(*ends, strict=True)
    )
    rows = [SQL("count(*) FILTER (WHERE {})").format(SQL(" OR ").join(of_version)) for of_version in ends]
    values = [
        SQL("coalesce(sum({}), 0)::bigint").format(
            SQL(" + ").join(SQL("coalesce({}, false)::int").format(one) for one in of_version)
        )
        for of_version in ends
    ]
    select = SQL("SELECT {} FROM {} t WHERE {}")
    ours = select.format(
        SQL(", ").join([*rows, *values]), definition.identifier, SQL("NOT ({})").format(others)
    )
    numbers = connection.execute(ours).fetchall()[0]
    for version, with_it, of_it in zip(known, numbers[: len(known)], numbers[len(known) :], strict=True):
        if with_it:
            count.add(version, with_it, of_it)
    envelopes = SQL(", ").join(SQL("{}::text").format(Identifier("t", c.encrypted)) for c in columns)

    def spelt_otherwise(condition: Composed) -> Composed:
        return select.format(envelopes, definition.identifier, SQL("{} AND {}").format(others, condition))

    for batch in sweep(connection, definition, spelt_otherwise, rows=ROWS_PER_BATCH):
        for row in zip(*texts(batch), strict=True):
            _look(count, cipher, columns, row)
    count.versions = dict(sorted(count.versions.items()))
    return count


def _look(
    count: TableVersions, cipher: EnvelopeFormat, columns: Iterable[Column], row: Iterable[str | None]
) -> None:
    seen: Counter[int] = Counter()
    for column, envelope in zip(columns, row, strict=True):
        try:
            if envelope is not None:
                seen[cipher.key_version(envelope, column.context)] += 1
        except DecryptionError:
            count.unreadable += 1
    for version, values in seen.items():
        count.add(version, 1, values)


def _ends(column: str, ending: str) -> Composed:
    return SQL('(pg_catalog.right({}, {}) COLLATE "C" = {})').format(
        Identifier("t", column), Literal(len(ending)), Literal(ending)
    )


@dataclass(frozen=True)
class Retirement:
    """What :func:`retire_versions` found.

    Args:
        retired: versions retired now.
        reinstated: retired versions of which values turned up again, and which are readable again.
        remaining: of versions that are neither current nor retired, what tables still have of them.
    """

    retired: tuple[int, ...]
    reinstated: tuple[int, ...]
    remaining: Mapping[int, Mapping[str, Found]]
    counts: tuple[TableVersions, ...]

    def describe(self) -> dict[str, str]:
        """By table, what it has of versions that could not be retired."""
        return {
            count.table: "; ".join(
                f"Key version {version} is not retired: {count.table} {found[count.table]}"
                for version, found in self.remaining.items()
                if count.table in found
            )
            for count in self.counts
            if any(count.table in found for found in self.remaining.values())
        }


def retire_versions(target: Target) -> Retirement:
    """Retire every old version of which no catalogued table has a value at this moment, and say what others have.

    Whatever writes an old version afterwards is found by the next verification, and by the next rotation, which makes
    the version readable again.

    Raises:
        RefusedError: there are encrypted columns that the catalogue no longer names, so that nobody can say what they
            hold; nothing was changed.
        ConfigurationError: a table is missing.
    """
    with target.database.session("look for uncatalogued encrypted columns") as connection:
        if not keys.key_versions(connection):
            return Retirement((), (), {}, ())
        if rows := uncatalogued_columns(connection, target.catalogue.tables):
            raise RefusedError(
                f"No key version is retired: {', '.join(f'{t}.{c}' for t, c in rows)} has an encrypted column that the "
                "catalogue does not name, so what it holds is not looked at. Put it back into the catalogue, or drop "
                "that column."
            )
    counts = count_versions(target.database, target.catalogue.tables, target.cipher)
    retired: list[int] = []
    reinstated: list[int] = []
    remaining: dict[int, Mapping[str, Found]] = {}
    with target.database.session("retire key versions") as connection, connection.transaction():
        keys.hold_key_versions(connection)
        for version in keys.key_versions(connection):
            found = {c.table: c.versions[version.number] for c in counts if version.number in c.versions}
            keys.keep_key_count(
                connection, version.number, {table: vars(count) for table, count in found.items()}
            )
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
    """Make a retired version readable again, if it was retired: who lacks its key is refused from then on.

    Raises:
        RefusedError: this database does not know the version.
    """
    with database.session("reinstate a key version") as connection, connection.transaction():
        known = {found.number: found for found in keys.key_versions(connection)}
        if version not in known:
            raise RefusedError(f"This database knows no key version {version}; nothing was changed.")
        if known[version].state != "retired":
            return False
        _change(connection, known[version], "readable", "reinstate_key_version", actor)
    return True


def _change(
    connection: Connection, version: keys.KeyVersion, state: keys.KeyState, action: str, actor: Actor
) -> None:
    keys.set_key_state(connection, version.number, state, actor)
    audit(connection, actor, action, key_version=version.number)
