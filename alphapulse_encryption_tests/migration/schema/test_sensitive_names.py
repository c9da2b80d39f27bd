"""What looks sensitive by name and type: AlphaPulse's own catalogue is found, what stands beside it is not."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.migration.schema.sensitive_names import (
    kind_of,
    looks_secret,
    looks_sensitive,
    split_words,
)
from alphapulse_encryption_tests.migration import walk

COLUMNS = """
SELECT c.relname, a.attname, format_type(a.atttypid, a.atttypmod) FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
 WHERE c.relkind = 'r' AND c.relnamespace = 'public'::regnamespace
"""


def test_the_sample(sample_url: str) -> None:
    with psycopg.connect(sample_url) as connection:
        rows = connection.execute(COLUMNS).fetchall()
    found = {(table, column) for table, column, type_ in rows if looks_sensitive(table, column, type_)}
    catalogued = {(table.name, column.name) for table in walk.CATALOGUE.tables for column in table.columns}
    assert len(rows) > 60 and len(catalogued) == 23
    # A login name identifies somebody; that AlphaPulse shows it to everybody is not in its name.
    assert found == catalogued | {("users", "username")}


@pytest.mark.parametrize(
    ("table", "column", "type_name", "category"),
    [
        ("x", "E-Mail", "text", "contact"),
        ("x", "emails", "text[]", "contact"),
        ("x", "phone1", "character varying(20)", "contact"),
        ("x", "customerPhoneNumber", "bigint", "contact"),
        ("Kunde", "geburts Tag", "date", "birth"),
        ("x", "dateOfBirth", "date", "birth"),
        ("people", "age", "smallint", "birth"),
        ("x", "Straße", "text", "address"),
        ("x", "address_line2", "text", "address"),
        ("x", "home_location", "geometry(Point,4326)", None),
        ("x", "gps_location", "public.geometry(Point,4326)", "address"),
        ("x", "prénom", "citext", "person"),
        ("customers", "name", "text", "person"),
        ("x", "national_id", "bigint", "document"),
        ("x", "SSN", "character(11)", "document"),
        ("x", "card_numbers", "text", "bank"),
        ("x", "session_id", "uuid", "credential"),
        ("x", "HTTPAuthToken", "text", "credential"),
        ("x", "GENDER", "gender_enum", "origin"),
        ("x", "last_ip", "inet", "network"),
        ("employees", "monthly_salary", "numeric(10,2)", "money"),
        ("orders", "price", "numeric", "money"),
        ("events", "payload", "jsonb", "free form"),
        ("patients", "notes", "text", "free form"),
    ],
)
def test_what_is_found(table: str, column: str, type_name: str, category: str | None) -> None:
    found = looks_sensitive(table, column, type_name)
    assert (found and found.category) == category
    assert found is None or found.reason


@pytest.mark.parametrize(
    ("table", "column", "type_name"),
    [
        ("files", "filename", "text"),
        ("x", "two_factor_enabled", "boolean"),
        ("x", "email_verified_at", "timestamp with time zone"),
        ("x", "emailVerified", "text"),
        ("x", "email_id", "bigint"),
        ("x", "wallet_id", "uuid"),
        ("x", "password_hash", "text"),
        ("x", "email_encrypted", "text"),
        ("x", "email_search", "character varying(64)"),
        ("x", "token_count", "bigint"),
        ("x", "token_type", "text"),
        ("x", "shipping_method", "text"),
        ("x", "spinning", "text"),
        ("products", "name", "text"),
        ("products", "price", "numeric"),
        ("products", "notes", "text"),
        ("x", "business_status", "text"),
        ("x", "settings", "hstore"),
        ("x", "12", "text"),
    ],
)
def test_what_is_not(table: str, column: str, type_name: str) -> None:
    found = looks_sensitive(table, column, type_name)
    assert found is None or (column == "settings" and found.confidence == "possible")


def test_why() -> None:
    found = looks_sensitive("clients", "Legal Name", "text")
    assert found is not None
    assert (found.confidence, found.reason) == ("likely", "its name says legal name")
    found = looks_sensitive("clients", "name", "text")
    assert found is not None
    assert (found.confidence, found.reason) == ("possible", "its name says name in a table of client")
    found = looks_sensitive("x", "extra", "jsonb")
    assert found is not None
    assert found.reason == "jsonb may hold anything"


def test_words_and_kinds() -> None:
    assert split_words("twoFactorSecret") == split_words("two_factor-SECRET") == ["two", "factor", "secret"]
    assert split_words("HTTPAuthToken2") == ["http", "auth", "token"]
    assert split_words("Größe_漢字_x") == ["grosse", "x"]
    kinds = (
        "character varying(3)",
        "text[]",
        "double precision",
        "timestamp(3) without time zone",
        "other.t",
    )
    assert [kind_of(name) for name in kinds] == ["text", "text", "number", "moment", "other"]


@pytest.mark.parametrize("name", ["", " ", "漢字", "_", "-" * 63, "a" * 63, "\u0130", "ﬁ", "x\u0301"])
def test_any_name_is_taken(name: str) -> None:
    assert looks_sensitive(name, name, name) is None


@pytest.mark.parametrize(
    ("column", "type_name", "secret"),
    [
        *(
            (name, "text", True)
            for name in ("password_hash", "pwd_digest", "passwordHash", "api_token", "Salt")
        ),
        *((name, "text", False) for name in ("commit_hash", "token_count", "email", "checksum", "hash_tags")),
        ("password_salt", "bytea", True),
        ("password_changed", "timestamp with time zone", False),
        ("secret", "boolean", False),
    ],
)
def test_what_people_log_in_by(column: str, type_name: str, secret: bool) -> None:
    assert looks_secret("users", column, type_name) is secret
