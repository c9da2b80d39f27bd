"""The sample: the same every time, all tables and columns there, the difficult values in it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.sample import difficult
from alphapulse_encryption.sample.database import MINIMUM_ROWS, TABLES, load_sample, main
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database

# The catalogue of AlphaPulse.
SENSITIVE = {
    "trading_accounts": ("account_number", "balance", "available_balance", "api_key_reference"),
    "positions": ("size", "entry_price", "current_price", "unrealized_pnl", "realized_pnl", "metadata"),
    "trades": ("quantity", "price", "fee", "order_id", "execution_details"),
    "users": ("email", "phone_number", "first_name", "last_name", "address_data", "two_factor_secret"),
    "api_keys": ("permissions", "usage_stats"),
}
# Column: the difficult values it holds.
DIFFICULT = {
    ("users", "email"): difficult.EMAILS,
    ("users", "phone_number"): difficult.SHORT_TEXTS,
    ("users", "first_name"): difficult.TEXTS,
    ("users", "last_name"): difficult.TEXTS,
    ("users", "two_factor_secret"): difficult.TEXTS,
    ("users", "address_data"): difficult.DOCUMENTS,
    ("trading_accounts", "account_number"): difficult.TEXTS,
    ("trading_accounts", "api_key_reference"): difficult.LONG_TEXTS,
    ("trading_accounts", "balance"): difficult.AMOUNTS,
    ("trading_accounts", "available_balance"): difficult.AMOUNTS,
    ("positions", "size"): difficult.AMOUNTS,
    ("positions", "entry_price"): difficult.NUMERICS,
    ("positions", "current_price"): difficult.NUMERICS,
    ("positions", "unrealized_pnl"): difficult.FLOATS,
    ("positions", "realized_pnl"): difficult.FLOATS,
    ("positions", "metadata"): difficult.DOCUMENTS,
    ("trades", "quantity"): difficult.AMOUNTS,
    ("trades", "price"): difficult.NUMERICS,
    ("trades", "fee"): difficult.AMOUNTS,
    ("trades", "order_id"): difficult.TEXTS,
    ("trades", "execution_details"): difficult.REPORTS,
    ("api_keys", "permissions"): difficult.DOCUMENTS,
    ("api_keys", "usage_stats"): difficult.DOCUMENTS,
}


@pytest.fixture(scope="module")
def connection(postgres: EmbeddedPostgres, _sample_template: str) -> Iterator[psycopg.Connection]:
    """To a sample that all tests read and none changes."""
    for url in fresh_database(postgres, _sample_template):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.read_only = True
            yield connection


def checksums(url: str) -> dict[str, str]:
    found = {}
    with psycopg.connect(url) as connection:
        for table in TABLES:
            row = connection.execute(
                sql.SQL("SELECT md5(string_agg(row::text, chr(10) ORDER BY id)) FROM {} AS row").format(
                    sql.Identifier(table)
                )
            ).fetchone()
            assert row is not None
            found[table] = row[0]
    return found


def texts(connection: psycopg.Connection, table: str, column: str) -> list[str | None]:
    """A column's values as PostgreSQL writes them, in the order of the rows."""
    rows = connection.execute(
        sql.SQL("SELECT {}::text FROM {} ORDER BY created_at, id").format(
            sql.Identifier(column), sql.Identifier(table)
        )
    )
    return [value for (value,) in rows]


def test_same_size_and_seed_give_the_same_data(postgres: EmbeddedPostgres, database_url: str) -> None:
    postgres.ensure_database("sample_twin")
    twin = postgres.url("sample_twin")
    counts = load_sample(database_url, rows=MINIMUM_ROWS)
    assert counts == load_sample(twin, rows=MINIMUM_ROWS)
    assert counts.total == MINIMUM_ROWS
    assert checksums(database_url) == checksums(twin)


def test_another_seed_gives_other_data(database_url: str, sample_url: str) -> None:
    load_sample(database_url, rows=3_000, seed=7)
    ours, others = checksums(database_url), checksums(sample_url)
    assert all(ours[table] != others[table] for table in TABLES)


def test_every_sensitive_column_is_there_and_nothing_is_missing(connection: psycopg.Connection) -> None:
    for table, columns in SENSITIVE.items():
        for column in columns:
            values = texts(connection, table, column)
            assert len(set(values)) > 10, (table, column)
    nullable = connection.execute(
        "SELECT table_name, column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' AND is_nullable = 'YES' AND table_name = ANY (%s)",
        [list(TABLES)],
    ).fetchall()
    for table, column in nullable:
        assert None in texts(connection, table, column), (table, column)


@pytest.mark.parametrize(("table", "column"), list(DIFFICULT))
def test_difficult_values_are_there(connection: psycopg.Connection, table: str, column: str) -> None:
    found = set(texts(connection, table, column))
    type_row = connection.execute(
        "SELECT format_type(atttypid, atttypmod) FROM pg_attribute "
        "WHERE attrelid = %s::regclass AND attname = %s",
        [table, column],
    ).fetchone()
    assert type_row is not None
    for value in DIFFICULT[table, column]:
        # As the column's type reads and writes it, which for text and json is the value itself.
        stored = connection.execute(
            sql.SQL("SELECT %s::text::{}::text").format(sql.SQL(type_row[0])), [value]
        ).fetchone()
        assert stored is not None
        assert stored[0] in found, value[:80]
        if type_row[0] in ("text", "json") or type_row[0].startswith("character varying"):
            assert stored[0] == value


def test_values_that_casts_would_lose(connection: psycopg.Connection) -> None:
    floats = texts(connection, "positions", "unrealized_pnl")
    assert {"-0", "0", "NaN", "Infinity", "-Infinity", "1e-300", "5e-324"} <= set(floats)
    assert {"1.1", "1.10", "1.1000000000", "0.0000000000", "NaN"} <= set(texts(connection, "trades", "price"))
    assert {"0.0000000001", "0.0000000000"} <= set(texts(connection, "trades", "quantity"))
    reports = set(texts(connection, "trades", "execution_details"))
    assert {'{"a":1,"b":2}', '{"b":2,"a":1}'} <= reports
    assert max(len(value) for value in reports if value) > 100_000
    assert {"A@x.example", "a@x.example"} <= set(texts(connection, "users", "email"))


def test_smallest_sample_has_the_difficult_values_and_ordinary_ones(database_url: str) -> None:
    load_sample(database_url, rows=MINIMUM_ROWS)
    with psycopg.connect(database_url) as connection:
        for (table, column), values in DIFFICULT.items():
            assert len(texts(connection, table, column)) > len(values), (table, column)


def test_trades_belong_to_the_account_of_their_position(connection: psycopg.Connection) -> None:
    row = connection.execute(
        "SELECT count(*), count(*) FILTER (WHERE trades.account_id <> positions.account_id "
        "OR trades.symbol <> positions.symbol) FROM trades JOIN positions ON positions.id = position_id"
    ).fetchone()
    assert row is not None
    assert row[0] > 0
    assert row[1] == 0


def test_a_user_needs_three_values_only(connection: psycopg.Connection) -> None:
    row = connection.execute(
        "INSERT INTO users (username, email, password_hash) VALUES ('new', 'new@x.example', 'x') RETURNING id"
    ).fetchone()
    count = connection.execute("SELECT count(*) FROM users").fetchone()
    assert row == count  # the sequence goes on after the loaded rows


def test_second_load_does_nothing(sample_url: str) -> None:
    with psycopg.connect(sample_url) as connection:
        connection.execute("DELETE FROM api_keys")
    before = checksums(sample_url)
    counts = load_sample(sample_url, rows=3_000)
    assert not counts.loaded
    assert checksums(sample_url) == before


def test_another_sample_is_not_overwritten(sample_url: str) -> None:
    before = checksums(sample_url)
    with pytest.raises(RefusedError, match="another sample"):
        load_sample(sample_url, rows=4_000)
    with pytest.raises(RefusedError, match="seed 20240501"):
        load_sample(sample_url, rows=3_000, seed=1)
    assert checksums(sample_url) == before


def test_tables_of_others_are_not_overwritten(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE users AS SELECT 1 AS mine")
    with pytest.raises(RefusedError, match=r"\(users\)"):
        load_sample(database_url, rows=MINIMUM_ROWS)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT mine FROM users").fetchall() == [(1,)]
        assert connection.execute("SELECT to_regclass('trades')").fetchone() == (None,)


def test_killed_half_way_nothing_remains(database_url: str) -> None:
    loader = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "alphapulse_encryption.sample.database",
            "--rows",
            "500000",
            "--url",
            database_url,
        ],
        stdout=subprocess.DEVNULL,
    )
    with psycopg.connect(database_url, autocommit=True) as connection:
        under_way = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
        while connection.execute(under_way).fetchone() == (0,):
            assert loader.poll() is None
        loader.kill()
        loader.wait()
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE "
            "datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
        assert connection.execute("SELECT to_regclass('users')").fetchone() == (None,)
    assert load_sample(database_url, rows=MINIMUM_ROWS).loaded


def test_any_search_path_will_do(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA other")
    load_sample(f"{database_url}&options=-csearch_path%3Dother", rows=MINIMUM_ROWS)
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM public.trades").fetchone() == (550,)


def test_bad_wishes(database_url: str) -> None:
    with pytest.raises(ConfigurationError, match="at least 1000 rows"):
        load_sample(database_url, rows=999)
    with pytest.raises(ConfigurationError, match="seed"):
        load_sample(database_url, seed=-1)
    with pytest.raises(ConfigurationError, match="cannot be reached") as caught:
        load_sample("postgresql://nobody:secret@localhost:1/nothing")
    assert "secret" not in str(caught.value)


def test_command_line(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rows", "1000", "--url", database_url]
    assert main(arguments) == 0
    assert "trades" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["--rows", "2000", "--url", database_url]) == 1
    assert "another sample" in capsys.readouterr().err
    assert main(["--rows", "10", "--url", database_url]) == 2
    assert os.path.basename(database_url) not in capsys.readouterr().err
