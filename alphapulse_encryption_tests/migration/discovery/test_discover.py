"""Discovery: what is found and what is not, measured on two databases; and that no value is ever told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from alphapulse_encryption.catalogue import Catalogue, load_catalogue
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.discovery import discover as module
from alphapulse_encryption.migration.discovery.discover import Discovery, as_yaml, discover
from alphapulse_encryption.migration.discovery.value_patterns import look_at, look_into
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.migration import club, support, walk
from alphapulse_encryption_tests.migration.support import run

Place = tuple[str, str, str]


@pytest.fixture
def club_url(database_url: str) -> str:
    club.load(database_url)
    return database_url


def named(found: Discovery) -> set[Place]:
    """Every column that is called sensitive, in tables that cannot be encrypted as they are as well."""
    return {
        (table.schema_name, table.name, column.name)
        for table in found.tables
        for column in table.columns
        if column.score >= module.PROPOSED_FROM
    }


def loaded(found: Discovery, directory: Path) -> Catalogue:
    """The proposal as the next command would read it."""
    path = directory / "catalogue.yaml"
    path.write_text(as_yaml(found), encoding="utf-8")
    return load_catalogue(path)


def quality(found: set[Place], wanted: set[Place]) -> tuple[float, float]:
    """Recall and precision, printed."""
    right = len(found & wanted)
    recall, precision = right / len(wanted), right / len(found)
    print(
        f"recall {recall:.1%} ({right} of {len(wanted)}), precision {precision:.1%} ({right} of {len(found)}); "
        f"missed {sorted(wanted - found)}, too much {sorted(found - wanted)}"
    )
    return recall, precision


def test_alphapulse(sample_url: str, tmp_path: Path) -> None:
    found = discover(Database(sample_url))
    wanted = {
        ("public", table.name, column.name) for table in walk.CATALOGUE.tables for column in table.columns
    }
    recall, precision = quality(named(found), wanted)
    assert (len(wanted), recall) == (23, 1.0)
    # A login name identifies somebody; that AlphaPulse shows it to everybody is not in its name.
    assert named(found) - wanted == {("public", "users", "username")}
    assert precision == 23 / 24
    proposed = loaded(found, tmp_path)
    assert set(proposed.keys) == set(walk.CATALOGUE.keys)
    searchable = {(t.name, c.name) for t in proposed.tables for c in t.columns if c.searchable}
    assert {("users", "email"), ("trading_accounts", "account_number")} <= searchable
    contexts = {c.name: c.context for c in proposed.table("users").columns}
    assert contexts["email"] == contexts["last_name"] == "users_pii"
    assert contexts["two_factor_secret"] == "users_credentials"
    assert {c.context for c in proposed.table("positions").columns if c.name != "metadata"} == {
        "positions_financial"
    }
    # The same at the next look, and when the migration has begun: nothing of ours is taken for theirs.
    walk.encrypt(sample_url, walk.CATALOGUE.table("users"))
    again = discover(Database(sample_url))
    assert again.catalogue == found.catalogue


def test_the_proposal_can_be_migrated(club_url: str, tmp_path: Path) -> None:
    proposed = loaded(discover(Database(club_url)), tmp_path)
    assert len(proposed.tables) == 4
    for entry in proposed.tables:
        walk.encrypt(club_url, entry)
        assert walk.verify(club_url, entry).passed


def test_another_schema_with_decoys(club_url: str, tmp_path: Path) -> None:
    found = discover(Database(club_url))
    quality(named(found), club.SENSITIVE)
    assert club.SENSITIVE - named(found) == club.MISSED
    assert named(found) - club.SENSITIVE == set()
    proposed = loaded(found, tmp_path)
    assert proposed.keys == ("bookings", "integrations", "verein.Mitglied", "verein.beitrag")
    (visits,) = [table for table in found.tables if not table.possible]
    assert (visits.name, "no primary key" in visits.obstacles[0]) == ("visits", True)
    only = discover(Database(club_url), schemas=["verein"])
    assert only.schemas == ("verein",) and only.tables_looked_at == 2
    with pytest.raises(ConfigurationError, match="There is no schema Verein in the database"):
        discover(Database(club_url), schemas=["Verein"])
    # Without values, their form says nothing, and nothing that has no name of its own is found.
    blind = named(discover(Database(club_url), sample=0))
    assert ("verein", "Mitglied", "Mail") in blind
    assert not blind & {("public", "bookings", "c1"), ("public", "integrations", "auth")}


def test_no_value_is_told(club_url: str) -> None:
    found = discover(Database(club_url))
    told = as_yaml(found) + found.model_dump_json() + repr(found)
    held = [
        text
        for table in ('verein."Mitglied"', "verein.beitrag", "bookings", "integrations", "visits")
        for (text,) in run(
            club_url,
            f"SELECT DISTINCT value FROM {table} AS t, jsonb_each_text(to_jsonb(t)) WHERE length(value) > 5",
        )
    ]
    assert len(held) > 1_000
    assert [text for text in held if text in told] == []
    assert not any(canary in told for canary in club.CANARIES)


def test_nothing_is_changed_and_little_is_needed(club_url: str) -> None:
    def catalogue() -> list[support.Row]:
        return run(club_url, "SELECT oid, xmin::text, relname FROM pg_class WHERE oid >= 16384 ORDER BY oid")

    role, before = sql.Identifier("discover_reader"), catalogue()
    rows = run(club_url, 'SELECT xmin::text, * FROM verein."Mitglied" ORDER BY 2')
    discover(Database(club_url))
    assert catalogue() == before
    with support.application(club_url) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        try:
            theirs = club_url.replace("//postgres@", "//discover_reader@", 1)
            by_names = discover(Database(theirs))
            assert {table.sampled for table in by_names.tables} == {
                "values were not looked at: this role may not read them"
            }
            assert ("verein", "Mitglied", "Mail") in named(by_names)
            connection.execute(sql.SQL("GRANT USAGE ON SCHEMA verein TO {}").format(role))
            connection.execute(
                sql.SQL('GRANT SELECT ("Mail", "PLZ") ON verein."Mitglied" TO {}').format(role)
            )
            (members,) = [t for t in discover(Database(theirs)).tables if t.name == "Mitglied"]
            assert "of 2 of 9 columns" in members.sampled
        finally:
            connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))
    assert run(club_url, 'SELECT xmin::text, * FROM verein."Mitglied" ORDER BY 2') == rows


@pytest.fixture
def odd_url(database_url: str) -> Iterator[str]:
    run(database_url, 'CREATE TABLE "a, b" (id int PRIMARY KEY, email text)')
    run(
        database_url,
        'CREATE TABLE "x: # ""y" (id int PRIMARY KEY, "e-mail\'s" text, "yes" text, passwort text)',
    )
    run(database_url, f"CREATE TABLE long (id int PRIMARY KEY, {'n' * 49}_password text, email text)")
    run(database_url, "CREATE TABLE kin (email text PRIMARY KEY, first_name text)")
    run(
        database_url,
        "CREATE TABLE made (id int PRIMARY KEY, raw text, email text GENERATED ALWAYS AS (raw) STORED)",
    )
    run(database_url, "CREATE MATERIALIZED VIEW copies AS SELECT 1 AS id, 'x'::text AS email")
    run(
        database_url,
        "CREATE TABLE parts (id int, day date, email text, PRIMARY KEY (id, day)) PARTITION BY RANGE (day)",
    )
    run(
        database_url,
        "CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM ('2024-01-01') TO ('2025-01-01')",
    )
    run(database_url, "CREATE TABLE mother (id int PRIMARY KEY, email text)")
    run(database_url, "CREATE TABLE child () INHERITS (mother)")
    run(database_url, "CREATE DOMAIN mail_address AS text")
    run(database_url, "CREATE TABLE domains (id int PRIMARY KEY, contact mail_address)")
    run(
        database_url,
        "INSERT INTO domains SELECT n, 'a' || n || '@example.com' FROM generate_series(1, 50) AS n",
    )
    yield database_url


def test_what_cannot_be(odd_url: str, tmp_path: Path) -> None:
    found = discover(Database(odd_url))
    proposed = loaded(found, tmp_path)
    assert set(proposed.keys) == {'x: # "y', "long", "kin", "domains", "parts"}
    assert [c.name for c in proposed.table('x: # "y').columns] == ["e-mail's", "passwort"]
    assert [c.name for c in proposed.table("long").columns] == ["email"]
    assert [c.name for c in proposed.table("kin").columns] == ["first_name"]
    told = {table.name: " ".join(table.obstacles) for table in found.tables}
    assert "must not contain ','" in told["a, b"]
    assert f"{'n' * 49}_password cannot be named in a catalogue" in told["long"]
    assert "email is part of the primary key" in told["kin"]
    assert "email is generated or an identity" in told["made"]
    assert "a materialized view" in told["copies"]
    assert told["parts"] == ""
    assert "other tables inherit from it" in told["mother"]
    assert "parts_1" not in told


def test_a_table_that_somebody_holds_is_not_waited_for(
    club_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_WAIT", "50ms")
    with psycopg.connect(club_url) as holder:
        holder.execute('LOCK TABLE verein."Mitglied" IN ACCESS EXCLUSIVE MODE')
        found = discover(Database(club_url), schemas=["verein"])
    notes = {table.name: (table.sampled, table.bytes > 0) for table in found.tables}
    assert notes["Mitglied"] == ("values were not looked at: another session holds the table", True)
    assert notes["beitrag"] == ("values of 120 rows were looked at", True)
    (held,) = [table for table in found.tables if table.name == "Mitglied"]
    assert not held.possible
    assert any("another session kept its lock for longer than" in obstacle for obstacle in held.obstacles)


@pytest.mark.parametrize(
    ("pattern", "values"),
    [
        (
            "e-mail address",
            ["a@example.com", "b.c@example.org", "d+e@mail.example", "f@x.io", "g@example.net"],
        ),
        (
            "telephone number",
            ["+44 7700 900123", "+49 30 901820", "0044 20 7946 0018", "+1 202-555-0143", "+33140205050"],
        ),
        ("IBAN", [club.iban(n) for n in range(6)]),
        ("payment card number", [str(club.card(n * 37)) for n in range(25)]),
        ("US social security number", [f"219-09-{9000 + n}" for n in range(6)]),
        ("IP address", [f"192.0.2.{n}" for n in range(1, 9)]),
        ("AWS key", [f"AKIA{'ABCDEFGHIJKLMNOP'[n:] + 'ABCDEFGHIJKLMNOP'[:n]}" for n in range(6)]),
        ("private key", [f"-----BEGIN RSA PRIVATE KEY-----\nMII{n}" for n in range(6)]),
        ("address with a password", [f"postgresql://app:s3cr3t{n}@db/x" for n in range(6)]),
    ],
)
def test_forms(pattern: str, values: list[str]) -> None:
    found = look_at(values)
    assert found is not None and found.pattern == pattern
    # A few of them among other things say less, or nothing.
    assert look_at([*values, *(f"word {n}" for n in range(len(values) * 40))]) is None
    assert look_at(values[:4]) is None


@pytest.mark.parametrize(
    "values",
    [
        [str(n) for n in range(1_000, 1_300)],
        [str(4_111_110_000_000_000 + n) for n in range(300)],
        [str(20_240_000_000 + 7 * n) for n in range(300)],
        [str(4_006_381_333_000 + n) for n in range(300)],
        [f"2024-01-{1 + n % 28:02d}" for n in range(300)],
        [f"1.{n}.3.0-rc" for n in range(100)],
        [f"00000000-0000-4000-8000-{n:012d}" for n in range(100)],
        [f"{n:064x}" for n in range(100)],
        [f"Q-2024-{n:05d}" for n in range(100)],
        [f"user{n}" for n in range(100)],
        ["", " ", "\x00", "@", "@@", "+", "{" * 999],
    ],
)
def test_harmless_forms(values: list[str]) -> None:
    assert look_at(values) is None
    assert look_at(values, numbers=True) is None


def test_documents() -> None:
    assert look_into("t", ['{"theme": "dark", "size": 3}'] * 9) is None
    assert look_into("t", ["[" * 5_000] * 9) is None
    assert look_into("t", ["not json"] * 9) is None
    found = look_into("t", ['{"a": [{"dateOfBirth": "x"}]}'] * 9)
    assert found is not None and (found.category, found.inside) == ("birth", True)
    found = look_into("t", [f'{{"k": "k{n}@example.com"}}' for n in range(9)])
    assert found is not None and (found.category, found.inside) == ("contact", True)
