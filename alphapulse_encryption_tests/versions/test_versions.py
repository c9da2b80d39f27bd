"""The whole way at the command line on each version of PostgreSQL, each step by the role it is for, and read back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import build_search_indexes, reindex
from alphapulse_encryption.migration.steps.analyze import analyze
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.cli.test_command_line import summary
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.everything.look import preflight_tells_all
from alphapulse_encryption_tests.everything.things import everything_at
from alphapulse_encryption_tests.migration import dumps, support, walk
from alphapulse_encryption_tests.place import Place
from alphapulse_encryption_tests.products import test_any_schema
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated
from alphapulse_encryption_tests.versions import unusual
from alphapulse_encryption_tests.versions.conftest import DATABASE, KEY
from alphapulse_encryption_tests.versions.servers import Server

pytestmark = pytest.mark.versions

TABLES = unusual.TABLES
COLUMNS = sum(len(table.columns) for table in TABLES)
Values = Mapping[str, Mapping[Any, str | None]]


def texts(url: str, table: Table, names: Iterable[str]) -> dict[str, dict[Any, str | None]]:
    """Columns' values in the design's text form, by the rows' keys."""
    columns = list(names)
    with psycopg.connect(url) as connection:
        for setting, text in support.DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [setting, text])
        keys = support.key_columns(connection, table)
        rows = connection.execute(
            SQL("SELECT {} FROM {}").format(
                SQL(", ").join(SQL("{}::text").format(Identifier(name)) for name in (*keys, *columns)),
                Identifier(table.name),
            )
        ).fetchall()
    return {
        name: {row[: len(keys)]: row[len(keys) + number] for row in rows}
        for number, name in enumerate(columns)
    }


def plaintexts(url: str) -> Values:
    return {
        f"{table.key}.{name}": values
        for table in TABLES
        for name, values in texts(url, table, [column.name for column in table.columns]).items()
    }


def decrypted(url: str, version: int = 1) -> Values:
    """What the envelopes hold, by eyes that do not belong to the package; tokens are held against that."""
    found = {}
    for table in TABLES:
        written = texts(url, table, [name for column in table.columns for name in column.derived])
        for column in table.columns:
            key = independent.derive(KEY, column.context, version)
            values: dict[Any, str | None] = dict.fromkeys(written[column.encrypted])
            for row, envelope in written[column.encrypted].items():
                if envelope is not None:
                    members = json.loads(envelope)
                    assert (members["key_version"], members["context"]) == (version, column.context)
                    values[row] = independent.open_envelope(key, envelope)
            if column.searchable:
                tokens = {r: None if v is None else independent.token(key, v) for r, v in values.items()}
                assert written[column.search] == tokens
            found[f"{table.key}.{column.name}"] = values
    return found


def test_the_whole_way_and_back(theirs: Place, separated: Separated, server: Server) -> None:
    url, bin_dir = theirs.url, server.bin_dir()

    def by(login: str, *arguments: str, **changes: str) -> list[str]:
        return theirs.succeeds(*arguments, ALPHAPULSE_DATABASE_URL=separated.of(login), **changes)

    theirs.extra["ALPHAPULSE_WRITER_DATABASE_URL"] = separated.of("wes_writes")

    def application(statement: str) -> None:
        walk.query(separated.of("shop"), statement)

    schema, before = dumps.dump(url, bin_dir), plaintexts(url)
    assert sum(value is not None for values in before.values() for value in values.values()) > 10_000
    checklist = by("petra_plans", "--preflight")
    assert not any(line.startswith("✗") for line in checklist)
    assert any("all_unusual" in line for line in checklist)
    by("petra_plans", "--plan")
    by("mia_migrates", "--discover")
    by("bob_backs_up", "--backup")

    by("mia_migrates", "--add-columns")
    application("UPDATE unusual SET note = note, nick = 'written meanwhile' WHERE part = 3")
    by("mia_migrates", "--migrate-data", "--workers", "2", "--autovacuum-off", "--reindex")
    before = plaintexts(url)
    assert decrypted(url) == before
    assert by("vera_verifies", "--verify") == summary(len(TABLES), COLUMNS)
    by("max_migrates", "--live-check", "--create-views")
    application("UPDATE users SET last_name = 'Neumann' WHERE id % 2 = 0")
    by("max_migrates", "--migrate-data")
    before = plaintexts(url)
    by("vera_verifies", "--verify")
    by("mia_migrates", "--switch-to-encrypted")
    assert decrypted(url) == before
    # What an old instance still writes becomes pending, and what a new one does clears the plaintext.
    application("UPDATE unusual SET amount = 1.10 WHERE part = 4")
    by("mia_migrates", "--migrate-data")
    before = plaintexts(url)
    assert decrypted(url) == before
    assert by("vera_verifies", "--verify") == summary(len(TABLES), COLUMNS)
    by("vera_verifies", "--benchmark-queries", "--table", "users")
    by("petra_plans", "--status")
    by("mia_migrates", "--slow-queries")

    answers = ("--approver", "Ada", "--reason", "it has served")
    for table in TABLES:
        by(
            "ada_approves",
            *("--approve-drop", "--table", table.key, *answers, "--confirmation", table.key),
        )
    by("mia_migrates", "--drop-unencrypted", "--confirm", "--operator", "Grace")
    for table in TABLES:
        assert not {column.name for column in table.columns} & set(walk.columns_of(url, table.key))
    assert decrypted(url) == before
    erase = ("--erase-dropped", "--table", "users", "--confirmation", "users")
    if server.version < 17:
        # No eraser may rewrite the planner's statistics there (docs/roles.md). Whether values are left in them is
        # up to autovacuum.
        done = theirs.run(*erase, ALPHAPULSE_DATABASE_URL=separated.of("eve_erases"))
        left = done.stdout + done.stderr
        command = "VACUUM (FULL) pg_catalog.pg_statistic, pg_catalog.pg_statistic_ext_data"
        assert command in left and "long transaction" not in left
        walk.query(url, command)
    by("eve_erases", *erase)
    by("mia_migrates", "--rotate-keys", ALPHAPULSE_ENCRYPTION_KEY_VERSION="2")
    theirs.extra["ALPHAPULSE_ENCRYPTION_KEY_VERSION"] = "2"
    by("mia_migrates", "--rebuild-indexes", "encrypted", "--analyze")
    assert decrypted(url, 2) == before

    by("max_migrates", "--restore-plaintext")
    assert plaintexts(url) == before
    by("vera_verifies", "--verify")
    by("mia_migrates", "--revert-to-plaintext")
    assert plaintexts(url) == before
    wrote = walk.query(
        url,
        "SELECT DISTINCT database_role FROM alphapulse_encryption.audit_log "
        "WHERE action IN ('backfill', 'rotate', 'decrypt')",
    )
    assert wrote == [("wes_writes",)]
    after = dumps.dump(url, bin_dir, dumps.added_columns(*TABLES))
    lost = {statement for statement in schema - after if not statement.startswith("INSERT INTO ")}
    assert not lost
    indexes = dumps.indexes_of_added_columns(*TABLES)
    more = {statement for statement in after - schema if not statement.startswith("INSERT INTO ")}
    # What the data path writes.
    written = {
        s for s in more if s.startswith("GRANT UPDATE(") and s.rstrip(";").endswith(f" TO {PREFIX}writer")
    }
    assert written
    assert all(dumps.is_index(statement, indexes) for statement in more - written), more - written


def test_a_backup_is_restored_for_comparison(theirs: Place, separated: Separated) -> None:
    theirs.succeeds("--add-columns", "--migrate-data", ALPHAPULSE_DATABASE_URL=separated.of("mia_migrates"))
    lines = theirs.succeeds(
        *("--backup", "--restore-drill"),
        ALPHAPULSE_DATABASE_URL=separated.of("bob_backs_up"),
        ALPHAPULSE_RESTORE_DRILL_URL=theirs.url,
    )
    said = dict(line.strip().partition(": ")[::2] for line in lines)
    assert int(said["tables restored and equal"].replace(",", "")) > len(TABLES)


def test_a_rehearsal_goes_all_the_way(theirs: Place, separated: Separated) -> None:
    rehearsed = theirs.succeeds(
        *("--rehearse", "--rate", "5", "--table", "users", "--table", unusual.TABLE),
        ALPHAPULSE_DATABASE_URL=None,
        ALPHAPULSE_STAGING_DATABASE_URL=theirs.url,
    )
    assert any("went all the way there and back" in line for line in rehearsed)


def test_views_of_a_table_with_row_level_security(
    theirs: Place, separated: Separated, server: Server
) -> None:
    """Before PostgreSQL 15 they would show hidden rows: it is told before anything begins, and then refused."""
    walk.query(theirs.url, "CREATE POLICY own ON users USING (id < 10)")
    walk.query(theirs.url, "ALTER TABLE users ENABLE ROW LEVEL SECURITY")
    by = {"ALPHAPULSE_DATABASE_URL": separated.of("mia_migrates")}
    lines = theirs.succeeds("--preflight", "--add-columns", "--table", "users", **by)
    told = [line for line in lines if "users" in line and "compatibility views" in line]
    if server.version >= 15:
        assert not told
        theirs.succeeds("--create-views", "--table", "users", **by)
    else:
        assert told and "PostgreSQL 15" in told[0]
        refused = theirs.fails(1, "--create-views", "--table", "users", **by)
        assert "PostgreSQL 15" in refused.stdout + refused.stderr


def test_functions_of_indexes_find_what_they_name(server: Server) -> None:
    """From PostgreSQL 17 on the server itself gives them a search path, and refuses such an index."""
    if server.version >= 17:
        pytest.skip("the server refuses such an index")
    server.ensure_database(DATABASE)
    url = server.url(DATABASE)
    for statement in (
        # Given before PostgreSQL 15: anybody could put a function in the way of what the text names.
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        "CREATE SCHEMA app",
        "CREATE FUNCTION app.loud(text) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT upper($1)'",
        "CREATE FUNCTION app.norm(text) RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN loud($1); END'",
        f"ALTER DATABASE {DATABASE} SET search_path TO public, app",
    ):
        support.run(url, statement)
    support.run(url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, other text)")
    support.run(url, "INSERT INTO notes SELECT i, 'm' || i, 'o' || i FROM generate_series(1, 50) AS i")
    support.run(url, "CREATE INDEX by_other ON notes (norm(other))")
    entry = support.table("notes", support.searchable("mail", "idx_mail"))
    support.encrypt(url, entry)
    database = Database(url)
    assert "idx_mail" in build_search_indexes(database, entry, support.ACTOR).created
    assert analyze(database, entry, support.ACTOR) == 50
    assert "by_other" in reindex(database, entry, support.ACTOR).reindexed
    assert support.assert_encrypted(url, entry) == 50


def test_preflight_of_everything(server: Server, postgres: EmbeddedPostgres, server_dir: Path) -> None:
    server.ensure_database(DATABASE)
    with everything_at(postgres, server.url(DATABASE), server_dir.parent) as there:
        preflight_tells_all(replace(there, postgres=server))


def test_tables_composed_at_random(server: Server, tmp_path: Path) -> None:
    for seed in range(300, 330):
        directory = tmp_path / str(seed)
        directory.mkdir()
        test_any_schema.go(seed, server, directory)
