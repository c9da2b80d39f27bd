"""Who may write evidence gets no further by it: each logs in as themselves, forges, and nothing is lost."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.migration.bookkeeping.evidence import VERIFICATION
from alphapulse_encryption.migration.gates.approvals import approve_drop, revoke
from alphapulse_encryption.migration.insight.status import read_status
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.migration.steps.drop import drop_plaintext
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.roles.conftest import Separated

USERS = walk.CATALOGUE.table("users")
SCHEMA = "alphapulse_encryption"
APPLICATION, VERIFIER, MIGRATOR, APPROVER, BACKUP = (
    *("shop", "vera_verifies", "mia_migrates", "ada_approves", "bob_backs_up"),
)
# What an attacker would have a superuser call.
EVIL = (
    "CREATE FUNCTION {schema}.evil(text) RETURNS text LANGUAGE plpgsql AS "
    "$$ BEGIN ALTER ROLE mia_migrates SUPERUSER; RETURN $1; END $$"
)


@pytest.fixture
def ready(separated: Separated, postgres: EmbeddedPostgres, tmp_path: Path) -> Separated:
    """`users` is switched, verified and backed up, each over the role for it."""
    walk.query(separated.url, "ALTER TABLE users ALTER first_name SET DEFAULT 'nobody'")
    walk.switch(separated.of("jack_of_all"), USERS)
    count_rows(walk.target(separated.of(VERIFIER)), USERS)
    walk.backup(separated.of(BACKUP), (USERS,), tmp_path, postgres.bin_dir())
    return separated


def approve(ready: Separated) -> int:
    target = walk.target(ready.of(APPROVER))
    words: dict[str, Any] = {"approver": "Ada", "reason": "it serves", "confirmation": USERS.key}
    return approve_drop(target, USERS, backups=walk.backup_directory(ready.url), **words).id


def drop(ready: Separated) -> None:
    backups = walk.backup_directory(ready.url)
    drop_plaintext(walk.target(ready.of(MIGRATOR)), USERS, backups=backups, operator="Grace")


def refused(reason: str, act: Callable[[], object], ready: Separated) -> None:
    """The act is refused for the reason, and every plaintext column is there."""
    with pytest.raises(RefusedError, match=reason):
        act()
    assert {column.name for column in USERS.columns} <= set(walk.columns_of(ready.url, "users"))


def superusers(ready: Separated) -> set[str]:
    return {name for (name,) in walk.query(ready.url, "SELECT rolname FROM pg_roles WHERE rolsuper")}


@pytest.fixture(autouse=True)
def _nobody_is_a_superuser(separated: Separated) -> Iterator[None]:
    yield
    assert superusers(separated) == {"postgres"}


def results(ready: Separated) -> list[dict[str, Any]]:
    query = f"SELECT to_jsonb(v) FROM {SCHEMA}.verifications v ORDER BY batch_range"
    return [row for (row,) in walk.query(ready.of(VERIFIER), query)]


def put_back(ready: Separated, rows: list[dict[str, Any]], *, names: list[str]) -> None:
    """These columns of results as they were, by the verifier's own UPDATE."""
    sets = ", ".join(f"{name} = r.{name}" for name in names)
    with psycopg.connect(ready.of(VERIFIER), autocommit=True) as connection:
        for row in rows:
            done = connection.execute(
                f"UPDATE {SCHEMA}.verifications v SET {sets} FROM jsonb_populate_record(NULL::{SCHEMA}.verifications, "
                "%s) r WHERE v.table_name = r.table_name AND v.batch_range = r.batch_range".encode(),
                [Jsonb(row)],
            )
            assert done.rowcount == 1


COUNTS = ["columns", "offenders", "row_count"]
EVERYTHING = [*VERIFICATION.said, "number", "mac"]


@pytest.mark.parametrize("forged", ["counts", "counts and number", "the older row", "its number as well"])
def test_a_verifier_who_hides_mismatches(ready: Separated, forged: str) -> None:
    approve(ready)
    clean = results(ready)
    walk.query(
        ready.of(APPLICATION),
        "UPDATE users u SET first_name = u.first_name, first_name_encrypted = o.first_name_encrypted FROM users o "
        "WHERE u.id IN (5, 6) AND o.id = 20",
    )
    assert not walk.verify(ready.of(VERIFIER), USERS).passed
    if forged == "its number as well":
        # A newer entry of the log, for the older row.
        for row in clean:
            ((row["number"],),) = walk.query(
                ready.of(VERIFIER),
                f"INSERT INTO {SCHEMA}.audit_log (actor, action, table_name, details) VALUES ('x', %s, 'users', %s) "
                "RETURNING id",
                *(VERIFICATION.action, Jsonb({"batch_range": row["batch_range"]})),
            )
    put_back(
        ready,
        clean,
        names={"counts": COUNTS, "counts and number": [*COUNTS, "number"]}.get(forged, EVERYTHING),
    )
    refused("verifications are not authenticated", lambda: approve(ready), ready)
    refused("verifications are not authenticated", lambda: drop(ready), ready)
    # Who has no key sees by the audit log that a row is not the newest.
    status = read_status(Database(ready.of("petra_plans")), walk.CATALOGUE, [USERS.key])
    (found,) = status.tables
    assert found.verification is not None
    assert found.verification.valid == (forged in ("counts", "its number as well"))


def test_a_verifier_who_hides_rows_that_were_not_reached(ready: Separated) -> None:
    walk.query(ready.of(VERIFIER), f"UPDATE {SCHEMA}.row_counts SET missing_count = 0, verified_count = 10^9")
    refused("Nobody has counted the rows of users", lambda: approve(ready), ready)
    count_rows(walk.target(ready.of(VERIFIER)), USERS)
    approve(ready)


def test_a_migrator_who_verifies_half_of_the_table(ready: Separated) -> None:
    """The ranges are the migrator's: of fewer, or of others, a verification is none of the table."""
    with psycopg.connect(ready.of(MIGRATOR), autocommit=True) as connection:
        connection.execute(
            f"DELETE FROM {SCHEMA}.ranges WHERE table_name = 'users' AND batch_range = 1".encode()
        )
    refused("leave rows between them", lambda: approve(ready), ready)
    with psycopg.connect(ready.of(MIGRATOR), autocommit=True) as connection:
        connection.execute(f"UPDATE {SCHEMA}.ranges SET upper_key = NULL WHERE table_name = 'users'".encode())
    refused("not authenticated", lambda: approve(ready), ready)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero", "{backups}/plain.dump.age"])
def test_a_backup_role_that_records_something_else(ready: Separated, path: str) -> None:
    approve(ready)
    location = path.format(backups=walk.backup_directory(ready.url))
    if not path.startswith("/dev"):
        Path(location).write_bytes(b"")
    record = (
        f"INSERT INTO {SCHEMA}.backups (taken_at, location, bytes, sha256, recipient, listed_entries, verified_at, "
        "tables, number, mac) SELECT clock_timestamp(), %s, 0, %s, 'age1', 9, clock_timestamp(), '{users}', %s, mac "
        f"FROM {SCHEMA}.backups ORDER BY id LIMIT 1 RETURNING id"
    )
    nothing = hashlib.sha256().hexdigest()
    ((number,),) = walk.query(ready.of(BACKUP), record, location, nothing, None)
    refused(f"record of backup {number} of users.*not authenticated", lambda: approve(ready), ready)
    with pytest.raises(psycopg.errors.UniqueViolation):
        first = walk.value(ready.url, f"SELECT min(number) FROM {SCHEMA}.backups")
        walk.query(ready.of(BACKUP), record, location, nothing, first)


def test_an_approver_who_copies_a_used_approval(ready: Separated) -> None:
    number = approve(ready)
    drop(ready)
    restore_plaintext(walk.target(ready.of("jack_of_all")), USERS)
    walk.hand_over(ready.of("jack_of_all"), USERS)
    count_rows(walk.target(ready.of(VERIFIER)), USERS)
    copy = (
        f"INSERT INTO {SCHEMA}.approvals (table_name, approver, reason, expires_at, definition, catalogue_entry, "
        "key_check, verified_at, backup_id, run_id, number, mac) SELECT table_name, approver, reason, expires_at, "
        f"definition, catalogue_entry, key_check, verified_at, backup_id, run_id, {{}}, mac FROM {SCHEMA}.approvals "
        "WHERE id = %s RETURNING id"
    )
    with pytest.raises(psycopg.errors.UniqueViolation):
        walk.query(ready.of(APPROVER), copy.format("number"), number)
    for other in ("NULL", "number + 1"):
        ((forged,),) = walk.query(ready.of(APPROVER), copy.format(other), number)
        refused(rf"Approval {forged} of users, recorded over the role {APPROVER}", lambda: drop(ready), ready)
        revoke(Database(ready.of(APPROVER)), forged, walk.ACTOR)
    # Nor where even its owner opens the used one again.
    walk.query(
        ready.url,
        f"UPDATE {SCHEMA}.approvals SET consumed_at = NULL, consumed_by = NULL WHERE id = %s",
        number,
    )
    refused(f"Approval {number} of users.*not authenticated", lambda: drop(ready), ready)


EXPRESSIONS = (
    "evil.evil('x')",
    "'x'; ALTER ROLE mia_migrates SUPERUSER",
    "'x', OWNER TO mia_migrates",
    "'x'), OWNER TO mia_migrates, ALTER COLUMN first_name SET DEFAULT ('x'",
)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_migrator_who_has_a_superuser_revert_for_them(ready: Separated, expression: str) -> None:
    walk.query(ready.url, "CREATE SCHEMA evil; GRANT ALL ON SCHEMA evil TO mia_migrates")
    walk.query(ready.of(MIGRATOR), EVIL.format(schema="evil"))
    edit = f"UPDATE {SCHEMA}.tables SET set_aside = jsonb_set(set_aside, '{{defaults,first_name}}', to_jsonb(%s::text))"
    walk.query(ready.of(MIGRATOR), edit, expression)
    reason = "not authenticated|not one expression"
    refused(reason, lambda: revert_to_plaintext(walk.target(ready.url), USERS), ready)
    assert (
        walk.value(ready.url, "SELECT tableowner::text FROM pg_tables WHERE tablename = 'users'") != MIGRATOR
    )
    # The drop would save it for a restore.
    refused(reason, lambda: approve(ready), ready)


@pytest.mark.parametrize(
    "number", ["NULL", "(SELECT max(number) FROM alphapulse_encryption.definitions) + 1"]
)
def test_a_migrator_who_has_a_superuser_restore_for_them(ready: Separated, number: str) -> None:
    walk.query(ready.url, "CREATE SCHEMA evil; GRANT ALL ON SCHEMA evil TO mia_migrates")
    walk.query(ready.of(MIGRATOR), EVIL.format(schema="evil"))
    approve(ready)
    drop(ready)
    check = Jsonb([{"kind": "c", "name": "c", "definition": "CHECK ((evil.evil(first_name) IS NOT NULL))"}])
    walk.query(
        ready.of(MIGRATOR),
        f"INSERT INTO {SCHEMA}.definitions (table_name, definition, number, mac) SELECT table_name, "
        f"definition || jsonb_build_object('constraints', %s::jsonb), {number}, mac FROM {SCHEMA}.definitions",
        check,
    )
    with pytest.raises(RefusedError, match=r"saved at a drop of users.*not authenticated"):
        restore_plaintext(walk.target(ready.url), USERS)
    assert "first_name" not in walk.columns_of(ready.url, "users")
    # Restored or not is for people to see; what is marked so is restored all the same.
    walk.query(ready.of(MIGRATOR), f"UPDATE {SCHEMA}.definitions SET restored_at = now()")
    walk.query(ready.url, f"DELETE FROM {SCHEMA}.definitions WHERE number IS NULL OR id > 1")
    restore_plaintext(walk.target(ready.url), USERS)
    assert "first_name" in walk.columns_of(ready.url, "users")


def test_what_somebody_signs_runs_as_the_tables_owner(ready: Separated) -> None:
    """The MAC is the border; behind it a superuser lends their rights to no function all the same."""
    walk.query(ready.url, "CREATE SCHEMA evil; GRANT ALL ON SCHEMA evil TO mia_migrates")
    walk.query(ready.of(MIGRATOR), EVIL.format(schema="evil"))
    walk.query(ready.url, "GRANT USAGE ON SCHEMA evil TO PUBLIC")
    approve(ready)
    drop(ready)
    check = Jsonb([{"kind": "c", "name": "c", "definition": "CHECK ((evil.evil('x'::text) IS NOT NULL))"}])
    walk.rewrite(
        ready.url,
        f"UPDATE {SCHEMA}.definitions SET definition = definition || jsonb_build_object('constraints', %s::jsonb)",
        check,
    )
    with pytest.raises(DatabaseFailure, match="InsufficientPrivilege"):
        restore_plaintext(walk.target(ready.url), USERS)
    assert superusers(ready) == {"postgres"}


def test_an_approval_of_another_database_is_none_here(ready: Separated, postgres: EmbeddedPostgres) -> None:
    """Staging is a copy of production, with its backup, its verification and its key."""
    staging = "staging_of_users"
    postgres.ensure_running()
    name = ready.url.partition("?")[0].rpartition("/")[2]
    walk.query(postgres.url("postgres"), f"CREATE DATABASE {staging} TEMPLATE {name}")
    try:
        there = Separated(postgres.url(staging), postgres)
        with pytest.raises(RefusedError, match="not authenticated"):
            approve(there)
        support.sign_here(there.url, walk.KEYS)
        approve(there)
        ((row,),) = walk.query(there.url, f"SELECT to_jsonb(a) FROM {SCHEMA}.approvals a")
        walk.query(
            ready.url,
            f"INSERT INTO {SCHEMA}.approvals OVERRIDING SYSTEM VALUE "
            f"SELECT * FROM jsonb_populate_record(NULL::{SCHEMA}.approvals, %s)",
            Jsonb(row),
        )
        refused("Approval .* of users.*not authenticated", lambda: drop(ready), ready)
    finally:
        walk.query(postgres.url("postgres"), f"DROP DATABASE {staging} WITH (FORCE)")
