"""There and back again: approve, drop and restore all five tables, and nothing has changed but for what was added.

What the restored database has to look like is not computed: a twin of the sample, which no engine ever touched, takes
the same writes as plaintext.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.sample import difficult
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import dumps, support, walk

TABLES = walk.CATALOGUE.tables
ADDED = dumps.added_columns(*TABLES)
# More than the longest of the pools has.
WRITTEN = 1 + max(len(pool) for pool in difficult.POOLS.values())


@pytest.fixture
def twin_url(postgres: EmbeddedPostgres, _sample_template: str) -> Iterator[str]:
    """The sample once more, for an application that never heard of encryption."""
    yield from fresh_database(postgres, _sample_template)


def drop_all(url: str, bin_dir: Path, directory: Path) -> None:
    """Everything up to the drop, of all tables."""
    for table in TABLES:
        walk.switch(url, table)
        create_views(Database(url), table, walk.ACTOR)
    walk.backup(url, TABLES, directory, bin_dir)
    for table in TABLES:
        walk.approve(url, table)
        walk.drop(url, table)


def restore_all(url: str) -> None:
    for table in TABLES:
        assert restore_plaintext(walk.target(url), table) is not None
        assert walk.verify(url, table).passed


def revert_all(url: str) -> None:
    for table in TABLES:
        assert revert_to_plaintext(walk.target(url), table) is not None


def write_to_twin(url: str) -> None:
    """New values for the first rows of every table, each of every difficult value; new rows, and some fewer."""
    with psycopg.connect(url) as connection:
        for table in TABLES:
            name = sql.Identifier(table.name)
            for column in table.columns:
                target = sql.Identifier(column.name)
                if column.searchable:  # unique, too
                    statement = (
                        "UPDATE {t} SET {c} = 'né ' || {c} "
                        "WHERE id IN (SELECT id FROM {t} ORDER BY id LIMIT {n})"
                    )
                else:
                    statement = (
                        "UPDATE {t} SET {c} = n.v FROM (SELECT id, lead({c}) OVER (ORDER BY id) AS v, "
                        "row_number() OVER (ORDER BY id) AS n FROM {t}) AS n WHERE {t}.id = n.id AND n.n <= {n}"
                    )
                connection.execute(sql.SQL(statement).format(t=name, c=target, n=sql.Literal(WRITTEN)))
        connection.execute(NEW_ROWS)
        connection.execute(FEWER_ROWS)


# Those who come while the plaintext is dropped; one table after the other, for they refer to each other.
NEW_ROWS = """
INSERT INTO users (username, email, phone_number, address_data, password_hash, created_at, updated_at)
    VALUES ('newcomer', 'New@x.example', '', '{"b": 1, "a": "ä"}', 'x', '2024-01-01Z', '2024-01-01Z');
INSERT INTO trading_accounts (user_id, exchange, account_number, balance, available_balance, opened_at, created_at,
                              updated_at)
    SELECT id, 'kraken', '000 new', 1.50, 'NaN', '2024-01-01Z', '2024-01-01Z', '2024-01-01Z' FROM users
     WHERE username = 'newcomer'
"""
FEWER_ROWS = "DELETE FROM trades WHERE id IN (SELECT id FROM trades ORDER BY id LIMIT 5 OFFSET 10)"


@functools.cache
def derived(context: str) -> bytes:
    return independent.derive(bytes(range(32)), context, 1)


def envelope(text: str | None, context: str) -> str | None:
    if text is None:
        return None
    key = derived(context)
    iv = independent.token(key, "iv of " + text).encode()[:12]
    return independent.seal(key, iv, text, context, 1)


def search_token(text: str | None, context: str) -> str | None:
    return None if text is None else independent.token(derived(context), text)


def contents(url: str) -> dict[str, dict[str, dict[str, str | None]]]:
    """By table and id, each row's values in the design's text form."""
    found = {}
    with support.application(url) as connection:
        for name, text in support.DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, text])
        for table in TABLES:
            names = walk.columns_of(url, table.name)
            rows = connection.execute(
                sql.SQL("SELECT {} FROM {}").format(
                    sql.SQL(", ").join(sql.SQL("{}::text").format(sql.Identifier(name)) for name in names),
                    sql.Identifier(table.name),
                )
            ).fetchall()
            found[table.name] = {row[names.index("id")]: dict(zip(names, row, strict=True)) for row in rows}
    return found


def write_ciphertext(
    url: str,
    was: dict[str, dict[str, dict[str, str | None]]],
    now: dict[str, dict[str, dict[str, str | None]]],
) -> int:
    """What made ``now`` of ``was``, as an application does it that knows the encrypted columns only.

    Returns:
        How many values were written.
    """
    written = 0
    with psycopg.connect(url) as connection:
        # The accounts of a new user refer to it.
        for table in sorted(TABLES, key=lambda table: table.name != "users"):
            sensitive = {column.name: column for column in table.columns}
            name = sql.Identifier(table.name)
            for key in was[table.name].keys() - now[table.name].keys():
                connection.execute(sql.SQL("DELETE FROM {} WHERE id = %s").format(name), [key])
            for key, row in now[table.name].items():
                before = was[table.name].get(key, {})
                values: dict[str, str | None] = {}
                for column, text in row.items():
                    if before and before[column] == text:
                        continue
                    if column not in sensitive:
                        values[column] = text
                        continue
                    written += 1
                    values[sensitive[column].encrypted] = envelope(text, sensitive[column].context)
                    if sensitive[column].searchable:
                        values[sensitive[column].search] = search_token(text, sensitive[column].context)
                if not values:
                    continue
                columns = [sql.Identifier(column) for column in values]
                if before:
                    statement = sql.SQL("UPDATE {} SET ({}) = ROW({}) WHERE id = %s")
                else:
                    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})")
                connection.execute(
                    statement.format(
                        name,
                        sql.SQL(", ").join(columns),
                        sql.SQL(", ").join(sql.Placeholder() for _ in columns),
                    ),
                    [*values.values(), *([key] if before else [])],
                )
    return written


def take_over_sequences(url: str, twin_url: str) -> None:
    """The id that the next row would get; ids were written, not drawn."""
    for name, number in walk.query(twin_url, "SELECT sequencename, last_value FROM pg_sequences"):
        walk.query(url, "SELECT setval(%s, %s)", name, number)


def test_the_dump_is_the_same_and_all_of_it_can_be_done_again(
    sample_url: str, twin_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    bin_dir = postgres.bin_dir()
    before = dumps.dump(sample_url, bin_dir)
    indexes = dumps.indexes_of_added_columns(*TABLES)
    drop_all(sample_url, bin_dir, tmp_path)
    for table in TABLES:
        assert not {column.name for column in table.columns} & set(walk.columns_of(sample_url, table.name))

    restore_all(sample_url)
    after = dumps.dump(sample_url, bin_dir, ADDED)
    assert before - after == {}
    # Guarded still, so that what is encrypted stays right for another try.
    others = {s for s in after - before if not dumps.is_guard(s, *TABLES) and not dumps.is_view(s, *TABLES)}
    assert others and all(
        dumps.is_index(s, indexes | {f"{table.name}_encryption_pending" for table in TABLES}) for s in others
    )

    revert_all(sample_url)
    after = dumps.dump(sample_url, bin_dir, ADDED)
    assert before - after == {}
    assert len(after - before) == len(indexes)
    assert all(dumps.is_index(s, indexes) for s in after - before)

    # Once more, and now the application goes on writing after the drop.
    drop_all(sample_url, bin_dir, tmp_path)
    was = contents(twin_url)
    write_to_twin(twin_url)
    assert write_ciphertext(sample_url, was, contents(twin_url)) > len(TABLES) * WRITTEN
    take_over_sequences(sample_url, twin_url)
    restore_all(sample_url)
    revert_all(sample_url)
    wanted = dumps.dump(twin_url, bin_dir)
    after = dumps.dump(sample_url, bin_dir, ADDED)
    assert wanted - after == {}
    assert all(dumps.is_index(s, indexes) for s in after - wanted)
    assert (wanted - before).total() > len(TABLES) * (WRITTEN - 1)
