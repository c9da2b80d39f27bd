"""Each kind of drift is found, named by table and column, and gone when it is mended."""

from __future__ import annotations

import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight.drift import look_for_drift
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")
# The sample's one column that looks sensitive and is not in the catalogue.
USERNAME = "uncatalogued:users"
CANARY = "canary-9d31@example.com"


@pytest.fixture
def verified(after: After) -> str:
    """A database whose table users is encrypted and verified."""
    return after("verified")


def drift(url: str, catalogue: Catalogue = walk.CATALOGUE) -> dict[str, Alert]:
    found = {finding.key: finding for finding in look_for_drift(Database(url), catalogue)}
    for finding in found.values():
        assert CANARY not in f"{finding}"
        assert finding.message.endswith(".") and finding.remedy.endswith(".") and finding.subject
    return found


def test_nothing_is_wrong(sample_url: str, verified: str) -> None:
    before = drift(sample_url)
    assert set(before) == {USERNAME}
    assert before[USERNAME].message == (
        "Column username (person, possible) of users is not in the catalogue and looks sensitive by name and type."
    )
    assert drift(verified) == before


def test_plaintext_without_ciphertext(verified: str) -> None:
    first = walk.value(verified, "SELECT min(id) FROM users")
    walk.query(verified, "UPDATE users SET email = %s WHERE id = %s", CANARY, first)
    found = drift(verified)["pending:users"]
    assert "without ciphertext after it was done, in batch range 00." in found.message
    assert found.remedy.startswith("Encrypt it: --migrate-data --table users;")
    walk.query(verified, "UPDATE users SET first_name = 'x'")
    assert "in batch ranges 00, 01." in drift(verified)["pending:users"].message
    walk.backfill(verified, USERS)
    assert set(drift(verified)) == {USERNAME}


def test_after_the_switch_it_is_an_old_instance(approved_url: str) -> None:
    assert set(drift(approved_url)) == {USERNAME}
    walk.query(approved_url, "UPDATE users SET phone_number = '1'")
    assert drift(approved_url)["pending:users"].remedy.startswith(
        "An instance of the application still writes plaintext"
    )


def test_a_table_that_is_being_backfilled_has_not_drifted(sample_url: str) -> None:
    add_encrypted_columns(walk.target(sample_url), USERS, batch_ranges=2)
    assert set(drift(sample_url)) == {USERNAME}


@pytest.mark.parametrize(
    "tampering",
    [
        "DROP TRIGGER zzz_encryption_guard_insert ON users",
        "DROP TRIGGER zzz_encryption_guard_mention_0000 ON users",
        "ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update",
        "ALTER TABLE users DISABLE TRIGGER ALL",
        "ALTER TABLE users ENABLE REPLICA TRIGGER zzz_encryption_guard_update",
        "DROP FUNCTION encryption_guard_users CASCADE",
    ],
)
def test_a_guard_that_does_not_stand(verified: str, tampering: str) -> None:
    walk.query(verified, tampering)
    found = drift(verified)
    assert set(found) == {USERNAME, "guard:users"}
    assert "The guard of users is not what this program makes" in found["guard:users"].message
    walk.encrypt(verified, USERS)
    assert set(drift(verified)) == {USERNAME}


def test_columns_that_are_gone(verified: str) -> None:
    walk.query(verified, "ALTER TABLE users DROP COLUMN last_name_encrypted CASCADE")
    walk.query(verified, "ALTER TABLE users RENAME COLUMN email_search TO other")
    found = drift(verified)
    assert found["gone:users"].message.startswith(
        "Columns email_search, last_name_encrypted of users are gone"
    )
    before = found["gone:users"].state
    walk.query(verified, "ALTER TABLE users DROP COLUMN last_name CASCADE")
    found = drift(verified)
    assert "last_name_encrypted, last_name of users are gone" in found["gone:users"].message
    assert found["gone:users"].state != before
    assert {"gone:users", "definition:users"} <= set(found)


def test_types_that_were_changed(verified: str) -> None:
    walk.query(verified, "DROP FUNCTION encryption_guard_users CASCADE")
    walk.query(verified, "DROP INDEX users_encryption_pending")
    walk.query(verified, "ALTER TABLE users ALTER address_data_encrypted TYPE bytea USING NULL")
    walk.query(verified, "ALTER TABLE users ALTER last_name TYPE varchar(2000)")
    found = drift(verified)
    assert set(found) == {USERNAME, "guard:users", "index:users", "type:users", "definition:users"}
    assert found["type:users"].message.startswith("Column address_data_encrypted of users is of another type")
    assert "are not those that were verified at 20" in found["definition:users"].message


def test_indexes_that_an_interrupted_build_left(verified: str) -> None:
    for name in ("by_name", "by_name_ccold", "Half"):
        walk.query(verified, f'CREATE INDEX "{name}" ON users (last_name)')
    walk.query(
        verified,
        "UPDATE pg_index SET indisvalid = false FROM pg_class c "
        "WHERE c.oid = indexrelid AND c.relname IN ('by_name_ccold', 'Half')",
    )
    found = drift(verified)
    assert set(found) == {USERNAME, "invalid:users"}
    assert "by_name_ccold" in found["invalid:users"].message and "Half" in found["invalid:users"].message
    # What it says is what helps.
    for statement in found["invalid:users"].remedy.removeprefix("Type ").removesuffix(".").split("; "):
        walk.query(verified, statement)
    assert set(drift(verified)) == {USERNAME}
    names = {name for (name,) in walk.query(verified, "SELECT indexrelid::regclass::text FROM pg_index")}
    assert {"by_name", '"Half"'} <= names and "by_name_ccold" not in names


def test_a_table_that_is_gone(verified: str) -> None:
    walk.query(verified, "ALTER TABLE users RENAME TO people")
    found = drift(verified)
    assert "Table public.users is in the catalogue but not in the database" in found["table:users"].message
    # Under its new name nothing of it is catalogued any more.
    assert "email (contact, likely)" in found["uncatalogued:people"].message


def test_plaintext_that_came_back(approved_url: str) -> None:
    walk.drop(approved_url, USERS)
    assert set(drift(approved_url)) == {USERNAME}
    walk.query(approved_url, "ALTER TABLE users ADD COLUMN email text")
    found = drift(approved_url)
    assert set(found) == {USERNAME, "back:users"}
    assert found["back:users"].message.startswith("Column email of users is there again")


def test_a_reverted_table_is_nobodys_concern(verified: str) -> None:
    revert_to_plaintext(walk.target(verified), USERS)
    assert set(drift(verified)) == {USERNAME}


def test_new_columns_and_tables_that_look_sensitive(verified: str) -> None:
    before = drift(verified)[USERNAME]
    assert (before.reminds, before.ends_silently) == (False, False)
    for statement in (
        "ALTER TABLE users ADD COLUMN date_of_birth date, ADD COLUMN birthdays_enabled boolean",
        'CREATE SCHEMA "C R M"',
        'CREATE TABLE "C R M".leads (id int, "E-Mail" text, phone text, campaign text)',
        "CREATE TABLE parted (id int, iban text) PARTITION BY RANGE (id)",
        "CREATE TABLE part PARTITION OF parted FOR VALUES FROM (1) TO (2)",
        "CREATE VIEW shown AS SELECT email FROM users",
        "CREATE TEMPORARY TABLE passing (email text)",
        f"INSERT INTO \"C R M\".leads VALUES (1, '{CANARY}')",
    ):
        walk.query(verified, statement)
    found = drift(verified)
    assert set(found) == {USERNAME, "uncatalogued:C R M.leads", "uncatalogued:parted"}
    assert found[USERNAME].state != before.state
    assert (
        "Columns username (person, possible), date_of_birth (birth, likely) of users are not"
        in found[USERNAME].message
    )
    assert "Columns E-Mail (contact, likely), phone (contact, likely) of C R M.leads" in (
        found["uncatalogued:C R M.leads"].message
    )
    entry = {"name": "parted", "columns": [{"name": "iban", "context": "x"}]}
    more = Catalogue.model_validate(
        {"tables": [*(t.model_dump(by_alias=True) for t in walk.CATALOGUE.tables), entry]}
    )
    assert "uncatalogued:parted" not in drift(verified, more)


def test_many_columns_are_cut_short(database_url: str) -> None:
    walk.query(database_url, f"CREATE TABLE t ({', '.join(f'email_{n:02d}x_email text' for n in range(30))})")
    (found,) = drift(database_url).values()
    assert found.message.count("(contact") == 12
    assert " and 18 more of t are not in the catalogue" in found.message
