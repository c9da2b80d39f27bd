"""The whole sample, every row and every column, against the envelope as the design writes it down."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import psycopg
import pytest

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, DESIGN_SETTINGS

# One walk for all of them.
pytestmark = pytest.mark.xdist_group("the whole sample")

TABLES = load_catalogue().tables
RANGES = 3

# What has to occur among the plaintexts for this to be worth anything: table, column, text form.
DIFFICULT = [
    *[("users", "last_name", text) for text in ("", " ", "tab\there", "two\nlines", "carriage\r\nreturn")],
    *[("users", "last_name", text) for text in ("0012345", "1e5", "true", "null", "NaN", "\\N", "O'Brien")],
    *[
        ("users", "last_name", text)
        for text in ('say "hi"', "C:\\temp\\new", "back\\slash\\", "\x01\x1f\x7f")
    ],
    *[("users", "last_name", text) for text in ("caf\u00e9", "cafe\u0301", "\U0001f600\U0001f680")],
    *[
        ("users", "last_name", text)
        for text in ("\uffff\ufffe\U0010ffff", "100%s %(name)s {brace} $1 :name ?")
    ],
    *[("users", "email", text) for text in ("A@x.example", "a@x.example")],
    *[("trades", "quantity", text) for text in ("999999999999999999.9999999999", "0.0000000000", "NaN")],
    *[("trades", "price", text) for text in ("1.1", "1.10", "1.1000000000", "0.00", "NaN", "-Infinity")],
    *[("positions", "unrealized_pnl", text) for text in ("-0", "0", "NaN", "5e-324", "0.30000000000000004")],
    *[("trades", "execution_details", text) for text in ('{"a":1,"b":2}', '{"b":2,"a":1}', "null", "0.10")],
    ("trades", "execution_details", '{"repeated": 1, "repeated": 2}'),
    ("positions", "metadata", '{"a": 2, "b": 1, "aa": 3}'),
]


def everything(url: str) -> dict[str, list[tuple[object, ...]]]:
    """All rows of the plain columns, as text, so that nothing beside the new columns may have changed."""
    found = {}
    with support.application(url) as connection:
        for name, text in DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [name, text])
        for table in TABLES:
            rows = support.ask(
                connection,
                "SELECT string_agg(quote_ident(column_name) || '::text', ', ' ORDER BY ordinal_position) "
                "FROM information_schema.columns WHERE table_name = %s "
                "AND column_name NOT LIKE '%%\\_encrypted' AND column_name NOT LIKE '%%\\_search'",
                table.name,
            )
            found[table.name] = support.ask(connection, f"SELECT {rows[0][0]} FROM {table.name} ORDER BY id")
    return found


@pytest.fixture(scope="module")
def _encrypted_template(postgres: EmbeddedPostgres, _sample_template: str) -> Iterator[str]:
    for url in fresh_database(postgres, _sample_template):
        encrypt_all(url)
        yield psycopg.conninfo.conninfo_to_dict(url)["dbname"]  # type: ignore[misc]


@pytest.fixture
def encrypted_url(postgres: EmbeddedPostgres, _encrypted_template: str) -> Iterator[str]:
    """The sample after the backfill of all tables, once walked for all tests."""
    yield from fresh_database(postgres, _encrypted_template)


def encrypt_all(url: str) -> None:
    for table in TABLES:
        support.encrypt(url, table, ranges=RANGES)
        build_search_indexes(Database(url), table, ACTOR)


def test_every_value_decrypts_and_every_token_is_right(encrypted_url: str) -> None:
    values = {table.key: support.assert_encrypted(encrypted_url, table) for table in TABLES}
    assert sum(len(table.columns) for table in TABLES) == 23
    assert all(values.values())

    plain = {
        (table.name, column.name): set(support.texts(encrypted_url, table, column.name).values())
        for table in TABLES
        for column in table.columns
    }
    for table, column, text in DIFFICULT:
        assert text in plain[table, column], (table, column, text)
    assert None in plain["users", "last_name"]
    for place in (("users", "address_data"), ("positions", "metadata"), ("trades", "execution_details")):
        assert max(len(text) for text in plain[place] if text) > 100_000, place

    done = support.run(
        encrypted_url, "SELECT table_name, column_name, status, records_processed FROM encryption_migrations"
    )
    assert {(table, column): (status, records) for table, column, status, records in done} == {
        (table.key, column.name): (
            "completed",
            sum(v is not None for v in support.texts(encrypted_url, table, column.name).values()),
        )
        for table in TABLES
        for column in table.columns
    }

    ivs = [
        base64.b64decode(json.loads(envelope)["ciphertext"])[:12]
        for table in TABLES
        for column in table.columns
        for envelope in support.texts(encrypted_url, table, column.encrypted).values()
        if envelope is not None
    ]
    assert len(ivs) == sum(values.values())
    assert len(set(ivs)) == len(ivs), "an IV is used twice"


def test_plain_data_stays_and_a_second_run_changes_nothing(sample_url: str, encrypted_url: str) -> None:
    assert everything(encrypted_url) == everything(sample_url)
    written = {table.key: support.fingerprints(encrypted_url, table) for table in TABLES}
    audited = support.value(encrypted_url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
    for table in TABLES:
        assert not support.add_columns(encrypted_url, table, ranges=RANGES).guards_created
        assert not any(result.changed for result in support.backfill_all(encrypted_url, table))
        assert not build_search_indexes(Database(encrypted_url), table, ACTOR).changed
    assert {table.key: support.fingerprints(encrypted_url, table) for table in TABLES} == written
    assert support.value(encrypted_url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == audited


def test_nothing_in_the_bookkeeping_holds_a_value(encrypted_url: str) -> None:
    for table in TABLES:
        assert support.verify(encrypted_url, table).passed
    secrets = {
        text
        for table in TABLES
        for column in table.columns
        for text in support.texts(encrypted_url, table, column.name).values()
        if text is not None and len(text) > 8
    }
    for (name,) in support.run(
        encrypted_url,
        "SELECT schemaname || '.' || tablename FROM pg_tables WHERE schemaname = 'alphapulse_encryption'",
    ):
        for (line,) in support.run(encrypted_url, f"SELECT t::text FROM {name} t"):
            assert not [secret for secret in secrets if secret in line], name
