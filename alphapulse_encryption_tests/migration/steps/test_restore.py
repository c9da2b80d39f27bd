"""The undo of a drop: the same schema and values as before, or newer values, and never a write lost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import DatabaseFailure, RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.postgres.ddl import in_short_transaction
from alphapulse_encryption.migration.rows.decrypt import Decrypt
from alphapulse_encryption.migration.rows.engine import Progress, work_on_table
from alphapulse_encryption.migration.schema import saved_ddl
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.steps import restore as restore_module
from alphapulse_encryption.migration.steps import switch
from alphapulse_encryption.migration.steps.restore import RestoreResult, restore_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import dumps, support, walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")


def dropped(url: str, table: Table, bin_dir: Path, directory: Path, catalogue: Catalogue) -> None:
    walk.switch(url, table)
    walk.backup(url, (table,), directory, bin_dir)
    walk.approve(url, table, catalogue)
    walk.drop(url, table, catalogue)


def restored(url: str, table: Table) -> RestoreResult:
    result = restore_plaintext(walk.target(url), table)
    assert result is not None
    return result


def lost_grants(url: str) -> list[str]:
    """The privileges that the restore could not give back, as the audit log tells them."""
    told = (
        "SELECT details -> 'lost_grants' FROM alphapulse_encryption.audit_log WHERE action = 'begin_restore'"
    )
    lost: list[str] = walk.value(url, told)
    return lost


RICH = """
CREATE SCHEMA "Sales";
CREATE DOMAIN "Sales".grade AS text CHECK (VALUE ~ '^[A-F]$');
CREATE TYPE "Sales"."Mood" AS ENUM ('so so', 'glad');
CREATE TABLE "Sales".other (code text PRIMARY KEY);
INSERT INTO "Sales".other VALUES ('a'), ('b');
CREATE TABLE "Sales"."Deals" (
    region uuid, "No" int,
    "Note" varchar(40) COLLATE "C" DEFAULT 'it''s, "x"' NOT NULL,
    code text CONSTRAINT known REFERENCES "Sales".other DEFERRABLE INITIALLY DEFERRED,
    amounts numeric(8, 2)[],
    day date, at timestamptz(3), span interval, raw bytea, flag boolean, label char(5),
    mood "Sales"."Mood" DEFAULT 'glad', grade "Sales".grade, serial serial,
    plain int,
    PRIMARY KEY (region, "No"),
    CONSTRAINT one_label UNIQUE (label) INCLUDE (plain),
    CONSTRAINT "sensible day" CHECK (day > '1900-01-01' AND (plain > 0 OR flag)));
ALTER TABLE "Sales"."Deals" ADD CONSTRAINT old_note CHECK ("Note" <> 'legacy') NOT VALID;
COMMENT ON CONSTRAINT "sensible day" ON "Sales"."Deals" IS 'no ''ancient'' ones';
COMMENT ON COLUMN "Sales"."Deals"."Note" IS 'E''s "note"';
ALTER TABLE "Sales"."Deals" ALTER "Note" SET STATISTICS 250, ALTER raw SET STORAGE EXTERNAL,
    ALTER code SET (n_distinct = -0.5, n_distinct_inherited = 3), ALTER "Note" SET COMPRESSION pglz;
CREATE INDEX "by Note" ON "Sales"."Deals" (lower("Note"), plain DESC) WHERE flag;
COMMENT ON INDEX "Sales"."by Note" IS 'for the report';
CREATE INDEX by_plain ON "Sales"."Deals" (plain);
CREATE INDEX by_day ON "Sales"."Deals" USING btree (day, plain) WITH (fillfactor = 70);
ALTER TABLE "Sales"."Deals" CLUSTER ON by_day;
CREATE STATISTICS "Sales".day_and_plain ON day, plain FROM "Sales"."Deals";
COMMENT ON STATISTICS "Sales".day_and_plain IS 'planner''s';
ALTER STATISTICS "Sales".day_and_plain SET STATISTICS 321;
ALTER STATISTICS "Sales".day_and_plain OWNER TO pg_monitor;
ALTER INDEX "Sales"."by Note" ALTER COLUMN 1 SET STATISTICS 77;
COMMENT ON CONSTRAINT "Deals_Note_not_null" ON "Sales"."Deals" IS 'the writer''s duty';
ALTER TABLE "Sales"."Deals" REPLICA IDENTITY FULL;
ALTER TABLE "Sales"."Deals" ADD CONSTRAINT hoped CHECK (length(code) < 9) NOT ENFORCED;
CREATE POLICY plain_only ON "Sales"."Deals" USING (plain > 0);
CREATE PUBLICATION all_of_it FOR TABLE "Sales"."Deals";
CREATE FUNCTION "Sales".note_it() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER noted AFTER UPDATE ON "Sales"."Deals" FOR EACH ROW WHEN (OLD.* IS DISTINCT FROM NEW.*)
    EXECUTE FUNCTION "Sales".note_it();
CREATE VIEW "Sales".plain AS SELECT region, plain FROM "Sales"."Deals";
GRANT SELECT ("Note"), UPDATE ("Note", plain) ON "Sales"."Deals" TO pg_monitor WITH GRANT OPTION;
GRANT SELECT (day) ON "Sales"."Deals" TO PUBLIC;
INSERT INTO "Sales"."Deals" (region, "No", "Note", code, amounts, day, at, span, raw, flag, label, mood,
                             grade, plain)
SELECT gen_random_uuid(), i, 'n ' || i, CASE WHEN i % 3 = 0 THEN 'a' END, ARRAY[i, NULL, 1.5],
       date '2024-02-29' - i, timestamptz '2024-01-01 12:00+05' + i * interval '1.0015 s',
       i * interval '1 mon 2 s', decode(md5(i::text), 'hex'), i % 2 = 0, 'l' || i,
       CASE WHEN i % 2 = 0 THEN 'so so' ELSE 'glad' END::"Sales"."Mood",
       CASE WHEN i > 3 THEN 'B' END, i
  FROM generate_series(1, 40) AS i;
"""

DEALS = Table.model_validate(
    {
        "name": "Deals",
        "schema": "Sales",
        "columns": [
            {"name": name, "context": f"deal_{name}"}
            for name in (
                "Note",
                "code",
                "amounts",
                "day",
                "at",
                "span",
                "raw",
                "flag",
                "mood",
                "grade",
                "serial",
            )
        ]
        + [{"name": "label", "context": "deal_label", "search_index": "deals_label_search"}],
    }
)


def test_every_kind_of_definition_comes_back(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(database_url, RICH)
    catalogue = Catalogue(tables=(DEALS,))
    key = '"Sales"."Deals"'
    before = dumps.dump(database_url, postgres.bin_dir())
    sequence = walk.value(database_url, 'SELECT last_value FROM "Sales"."Deals_serial_seq"')
    dropped(database_url, DEALS, postgres.bin_dir(), tmp_path, catalogue)
    assert "day" not in walk.columns_of(database_url, key)

    restored(database_url, DEALS)

    after = dumps.dump(database_url, postgres.bin_dir(), dumps.added_columns(DEALS))
    assert before - after == {}
    names = {"deals_label_search", "Deals_encryption_pending"}
    assert all(dumps.is_guard(s, DEALS) or dumps.is_index(s, names) for s in after - before)
    assert walk.value(database_url, 'SELECT last_value FROM "Sales"."Deals_serial_seq"') == sequence
    assert lost_grants(database_url) == []
    assert walk.verify(database_url, DEALS).passed


def test_what_the_application_made_finds_what_it_names(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """A domain's check, a default and an extended type's cast look for a table of another schema without naming it."""
    entry = support.table("codes", "code", "number")
    for statement in (
        "CREATE SCHEMA app",
        "CREATE TABLE app.allowed (code text)",
        "INSERT INTO app.allowed SELECT 'c' || i FROM generate_series(1, 30) AS i",
        "CREATE FUNCTION app.fits(text) RETURNS boolean LANGUAGE plpgsql STABLE AS "
        "$$BEGIN RETURN $1 IS NULL OR EXISTS (SELECT FROM allowed WHERE code = $1); END$$",
        "CREATE FUNCTION app.next() RETURNS int LANGUAGE plpgsql AS "
        "$$BEGIN RETURN (SELECT count(*) FROM allowed); END$$",
        "CREATE DOMAIN app.code AS text CHECK (app.fits(VALUE))",
        "CREATE TABLE codes (id int PRIMARY KEY, code app.code, number int DEFAULT app.next())",
    ):
        walk.query(database_url, statement)
    with support.application(database_url) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path TO public, app".encode())
    walk.query(
        database_url, "INSERT INTO codes (id, code) SELECT i, 'c' || i FROM generate_series(1, 20) AS i"
    )
    catalogue = Catalogue(tables=(entry,))
    before = walk.contents(database_url, "codes", ["id", "code", "number"])
    dropped(database_url, entry, postgres.bin_dir(), tmp_path, catalogue)
    restore_plaintext(walk.target(database_url, catalogue=catalogue), entry)
    assert walk.contents(database_url, "codes", ["id", "code", "number"]) == before
    walk.query(database_url, "INSERT INTO codes (id, code) VALUES (21, 'c21')")
    assert walk.value(database_url, "SELECT number FROM codes WHERE id = 21") == 30


@pytest.mark.parametrize(
    ("kind", "partitioned"),
    [("told", True), ("told DEFAULT NULL", False), ("told_again DEFAULT 'own' NOT NULL", True)],
)
def test_the_default_of_a_domain_stands_beside_no_ciphertext(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path, kind: str, partitioned: bool
) -> None:
    """Neither in a row that is inserted after the switch nor in one whose plaintext comes back."""
    table = support.table("notes", "body", "code", context="test_context")
    catalogue = Catalogue(tables=(table,))
    walk.query(database_url, "CREATE DOMAIN told AS text DEFAULT 'told' CHECK (VALUE <> 'never')")
    walk.query(database_url, "CREATE DOMAIN told_again AS told")
    by = " PARTITION BY RANGE (id)" if partitioned else ""
    walk.query(database_url, f"CREATE TABLE notes (id int PRIMARY KEY, body {kind}, code char(3)){by}")
    if partitioned:
        walk.query(database_url, "CREATE TABLE part PARTITION OF notes DEFAULT")
        walk.query(database_url, "ALTER TABLE part ALTER body SET DEFAULT 'of the part'")
    walk.query(database_url, "INSERT INTO notes SELECT i, 'n' || i FROM generate_series(1, 9) i")
    before = dumps.dump(database_url, postgres.bin_dir())

    def write(number: int) -> None:
        for relation in ("notes", "part")[: 1 + partitioned]:
            walk.query(
                database_url,
                f"INSERT INTO {relation} (id, body_encrypted) SELECT {number}, body_encrypted FROM notes "
                "WHERE id = 1",
            )
            number += 1
        assert walk.verify(database_url, table).passed

    def revert() -> None:
        assert switch.revert_to_plaintext(walk.target(database_url), table) is not None
        written = walk.query(database_url, "DELETE FROM notes WHERE id NOT BETWEEN 1 AND 9 RETURNING body")
        assert set(written) == {("n1",)}
        assert before - dumps.dump(database_url, postgres.bin_dir(), dumps.added_columns(table)) == {}

    walk.switch(database_url, table)
    write(100)
    revert()
    dropped(database_url, table, postgres.bin_dir(), tmp_path, catalogue)
    write(200)
    restored(database_url, table)
    revert()


@contextlib.contextmanager
def somebody_reading(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A transaction that has seen the table as it is: an index built from now on waits for its end."""
    with support.application(url, autocommit=False) as connection:
        connection.execute("SET deadlock_timeout TO '10min'")  # so that it is the engine that notices
        connection.commit()
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1")
        yield connection


def test_a_build_that_a_deadlock_ended_is_begun_anew(after: After) -> None:
    """The server ends a build to dissolve a deadlock, and leaves an invalid index."""
    url = after("dropped")
    with (
        somebody_reading(url) as other,
        support.Background(lambda: restored(url, USERS)) as restoring,
    ):
        support.until(lambda: support.engine_waits(url, "CREATE%", behind=other), "it waits for the other")
        # … which now waits for the lock that the build keeps, and gets it when the server has ended the build.
        other.execute("LOCK TABLE users IN SHARE UPDATE EXCLUSIVE MODE")
        other.rollback()
        restoring.result()
    names = ["users_last_name_idx", "users_phone_number_idx", "users_email_key"]
    assert walk.value(url, "SELECT count(*) FROM pg_class WHERE relname = ANY(%s)", names) == 3
    assert walk.value(url, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 0


def restore_until_killed(url: str, batches: int) -> None:
    """In a process of its own: killed by itself after so many batches, or by somebody else."""
    seen = 0

    def on_progress(_: Progress) -> None:
        nonlocal seen
        seen += 1
        if seen == batches:
            os.kill(os.getpid(), signal.SIGKILL)

    restore_plaintext(walk.target(url), USERS, on_progress=on_progress)


def test_kill_9_in_the_middle(sample_url: str, after: After, postgres: EmbeddedPostgres) -> None:
    before = dumps.dump(sample_url, postgres.bin_dir())
    url = after("dropped")
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'alphapulse_encryption'"
    filled = "SELECT count(*) FILTER (WHERE email IS NOT NULL), count(*) FROM users"

    first = multiprocessing.get_context("spawn").Process(target=restore_until_killed, args=(url, 1))
    first.start()
    first.join()
    assert first.exitcode == -signal.SIGKILL
    ((values, rows),) = walk.query(url, filled)
    assert 0 < values < rows

    second = multiprocessing.get_context("spawn").Process(target=restore_until_killed, args=(url, 0))
    with somebody_reading(url) as reader:
        second.start()
        support.until(lambda: support.engine_waits(url, "CREATE%", behind=reader), "an index is being built")
        second.kill()
        second.join()
        walk.query(
            url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'alphapulse_encryption'",
        )
        support.until(lambda: walk.value(url, sessions) == 0, "its session has ended")
    assert walk.value(url, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == 1
    assert walk.query(url, "SELECT authority, stage FROM alphapulse_encryption.tables") == [
        ("ciphertext", "restoring")
    ]

    assert restored(url, USERS).filled.rows == 0
    now = dumps.dump(url, postgres.bin_dir(), dumps.added_columns(USERS))
    assert before - now == {}
    names = {"idx_user_email_search", "users_encryption_pending"}
    assert all(dumps.is_guard(s, USERS) or dumps.is_index(s, names) for s in now - before)


def test_newer_ciphertext_is_what_comes_back(after: After) -> None:
    url = after("dropped")
    walk.query(
        url,
        "UPDATE users SET address_data_encrypted = %s, last_name_encrypted = NULL WHERE id = 9",
        walk.CIPHER.encrypt('{"b":1,  "a": "\u00e4"}', "user_address"),
    )
    walk.query(url, "DELETE FROM users WHERE id = 10")

    result = restored(url, USERS)

    assert result.filled.renewed == 1
    row = walk.query(url, "SELECT address_data::text, last_name FROM users WHERE id = 9")
    assert row == [('{"a": "\u00e4", "b": 1}', None)]
    assert walk.value(url, "SELECT count(*) FROM users WHERE id = 10") == 0
    assert walk.verify(url, USERS).passed


def begin(url: str) -> None:
    with Database(url).session("begin") as connection:
        what = saved_ddl.latest(connection, USERS, walk.KEYS)
        assert what is not None
        in_short_transaction(
            connection, "begin", lambda: restore_module._begin(connection, walk.target(url), USERS, what)
        )


def test_killed_in_the_middle_it_goes_on_and_loses_no_write(
    sample_url: str, after: After, postgres: EmbeddedPostgres
) -> None:
    columns = walk.columns_of(sample_url, "users")
    schema = walk.schema(sample_url, postgres.bin_dir(), USERS)
    contents = walk.contents(sample_url, "users", [name for name in columns if name != "last_name"])
    url = after("dropped")
    begin(url)
    with Database(url).session("fill") as connection:
        definition = read_table(connection, USERS)
        one_range = {0: Decrypt(walk.target(url), USERS)}
        assert work_on_table(walk.target(url), USERS, one_range, again="the step").rows > 50
        found = saved_ddl.latest(connection, USERS, walk.KEYS)
        assert found is not None
        restore_module._build_indexes(connection, definition, found, walk.ACTOR)
    # The application, meanwhile: over a filled value, and over one that is not filled yet.
    for key in (50, 200):
        walk.query(
            url,
            "UPDATE users SET last_name_encrypted = %s WHERE id = %s",
            walk.CIPHER.encrypt("Meanwhile", "user_personal"),
            key,
        )
    with pytest.raises(RefusedError, match="being restored"):
        walk.approve(url, USERS)
    with pytest.raises(RefusedError, match="restore_plaintext"):
        switch.revert_to_plaintext(walk.target(url), USERS)

    result = restored(url, USERS)

    assert 0 < result.filled.rows < len(contents)
    assert walk.schema(url, postgres.bin_dir(), USERS) == schema
    kept = walk.contents(url, "users", [name for name in columns if name != "last_name"])
    assert kept == contents
    names = walk.query(url, "SELECT last_name FROM users WHERE id IN (50, 200)")
    assert names == [("Meanwhile",), ("Meanwhile",)]
    assert walk.verify(url, USERS).passed


def test_an_interrupted_index_build_is_done_again(
    sample_url: str, after: After, postgres: EmbeddedPostgres
) -> None:
    schema = walk.schema(sample_url, postgres.bin_dir(), USERS)
    url = after("dropped")
    begin(url)
    walk.query(url, "CREATE INDEX users_last_name_idx ON users (last_name)")
    walk.query(
        url,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'users_last_name_idx'::regclass",
    )
    restored(url, USERS)
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    assert walk.value(url, invalid) == 0
    assert walk.schema(url, postgres.bin_dir(), USERS) == schema


def test_a_value_that_cannot_be_read_is_named_and_the_ciphertext_stays_right(after: After) -> None:
    url = after("dropped")
    walk.query(url, "UPDATE users SET first_name_encrypted = 'x' WHERE id = 12")
    with pytest.raises(RefusedError, match=r"key \(12\): first_name_encrypted"):
        restored(url, USERS)
    assert walk.query(url, "SELECT authority, stage FROM alphapulse_encryption.tables") == [
        ("ciphertext", "restoring")
    ]
    walk.query(
        url,
        "UPDATE users SET first_name_encrypted = %s WHERE id = 12",
        walk.CIPHER.encrypt("Corrected", "user_personal"),
    )
    restored(url, USERS)
    assert walk.value(url, "SELECT first_name FROM users WHERE id = 12") == "Corrected"


def test_a_privilege_of_a_role_that_is_gone_is_told(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(sample_url, "CREATE ROLE short_lived; GRANT SELECT (email) ON users TO short_lived")
    dropped(sample_url, USERS, postgres.bin_dir(), tmp_path, walk.CATALOGUE)
    walk.query(sample_url, "DROP ROLE short_lived")
    restored(sample_url, USERS)
    assert lost_grants(sample_url) == ["SELECT (email) to short_lived"]


def test_statistics_come_back_where_their_owner_is_gone(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(
        sample_url,
        "CREATE ROLE keeper_of_once; GRANT CREATE ON SCHEMA public TO keeper_of_once; "
        "CREATE STATISTICS of_both ON email, is_active FROM users; ALTER STATISTICS of_both OWNER TO keeper_of_once",
    )
    dropped(sample_url, USERS, postgres.bin_dir(), tmp_path, walk.CATALOGUE)
    walk.query(sample_url, "DROP OWNED BY keeper_of_once; DROP ROLE keeper_of_once")
    restored(sample_url, USERS)
    assert walk.query(sample_url, "SELECT stxname, stxowner::regrole::text FROM pg_statistic_ext") == [
        ("of_both", "postgres")
    ]
    assert walk.query(
        sample_url,
        "SELECT details ->> 'statistics', details ->> 'owner' FROM alphapulse_encryption.audit_log "
        "WHERE action = 'lost_owner'",
    ) == [("public.of_both", "keeper_of_once")]


def test_an_index_comes_back_where_its_tablespace_is_gone(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with support.application(sample_url) as connection:
        connection.execute("SET allow_in_place_tablespaces TO on")
        connection.execute("CREATE TABLESPACE fast_of_once LOCATION ''")
    walk.query(sample_url, "CREATE INDEX on_fast ON users (phone_number) TABLESPACE fast_of_once")
    dropped(sample_url, USERS, postgres.bin_dir(), tmp_path, walk.CATALOGUE)
    walk.query(sample_url, "DROP TABLESPACE fast_of_once")
    restored(sample_url, USERS)
    assert walk.query(sample_url, "SELECT tablespace FROM pg_indexes WHERE indexname = 'on_fast'") == [
        (None,)
    ]


def test_columns_of_the_same_name_or_another_catalogue_are_refused(after: After) -> None:
    url = after("dropped")
    with pytest.raises(RefusedError, match="two_factor_secret"):
        restored(url, USERS.model_copy(update={"columns": USERS.columns[:-1]}))
    walk.query(url, "ALTER TABLE users ADD email text")
    with pytest.raises(RefusedError, match="email"):
        restored(url, USERS)
    assert walk.value(url, "SELECT stage FROM alphapulse_encryption.tables") == "dropped"


def test_progress_is_reported(after: After) -> None:
    url = after("dropped")
    seen: list[Progress] = []
    result = restore_plaintext(walk.target(url), USERS, on_progress=seen.append)
    assert {progress.batch_range for progress in seen} == set(range(walk.RANGES))
    assert result is not None
    assert (seen[-1].rows, seen[-1].values) == (result.filled.rows, result.filled.values)


def test_held_until_nobody_writes_ciphertext_alone(approved_url: str) -> None:
    """The application's instances are exchanged while both kinds of write are accepted."""
    before = dict(walk.query(approved_url, "SELECT id, email FROM users"))
    walk.drop(approved_url, USERS)

    def hold() -> RestoreResult:
        result = restore_plaintext(walk.target(approved_url), USERS, hold=True)
        assert result is not None
        return result

    def write(email: str, number: int, *more: str) -> None:
        """Ciphertext and token, and what else is named."""
        walk.query(
            approved_url,
            f"UPDATE users SET email_encrypted = %s, email_search = %s{''.join(more)} WHERE id = %s RETURNING id",
            walk.CIPHER.encrypt(email, "user_pii"),
            search_token(walk.KEYS, email, "user_pii"),
            number,
        )

    first = hold()
    assert (first.held, first.filled.rows) == (True, len(before))
    assert dict(walk.query(approved_url, "SELECT id, email FROM users")) == before
    write("alone@x.example", 100)
    write("both@x.example", 101, ", email = 'both@x.example'")
    assert walk.query(approved_url, "SELECT id, email FROM users WHERE id IN (100, 101) ORDER BY id") == [
        (100, None),
        (101, "both@x.example"),
    ]
    again = hold()
    assert (again.held, again.filled.rows) == (True, 1)

    write("later@x.example", 102)
    assert not restored(approved_url, USERS).held
    assert dict(walk.query(approved_url, "SELECT id, email FROM users")) == before | {
        100: "alone@x.example",
        101: "both@x.example",
        102: "later@x.example",
    }
    with pytest.raises(psycopg.errors.CheckViolation):
        write("refused@x.example", 103)
    assert walk.verify(approved_url, USERS).passed


def test_an_index_that_cannot_be_built_is_not_left_invalid(after: After) -> None:
    """Two rows hold one value under different tokens."""
    url = after("dropped")
    walk.query(
        url,
        "UPDATE users SET email_encrypted = (SELECT min(email_encrypted) FROM users) "
        "WHERE id IN (SELECT id FROM users ORDER BY email_encrypted LIMIT 2)",
    )
    with pytest.raises(DatabaseFailure, match="23505"):
        restore_plaintext(walk.target(url), USERS)
    assert walk.query(url, "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid") == []
