"""The whole migration of the sample at the command line, each step by a log-in that may do it and not much else."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.cli.test_command_line import summary
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.roles.conftest import PREFIX, Separated

TABLES = walk.CATALOGUE.tables
KEY = bytes(range(32))
SUMMARY = summary(5, 23)


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, separated: Separated, server_dir: Any) -> Iterator[Place]:
    key = base64.b64encode(KEY).decode()
    with place(postgres, separated.url, server_dir.parent, key) as found:
        yield found


def values(url: str, table: Table, column: Column, name: str) -> Mapping[Any, str | None]:
    """A column's values in the design's text form, by the rows' keys."""
    with psycopg.connect(url) as connection:
        for setting, text in support.DESIGN_SETTINGS.items():
            connection.execute("SELECT set_config(%s, %s, false)", [setting, text])
        rows = connection.execute(
            SQL("SELECT id, {}::text FROM {}").format(Identifier(name), Identifier(table.name))
        )
        return dict(rows.fetchall())


def plaintexts(url: str) -> dict[str, Mapping[Any, str | None]]:
    return {f"{t.key}.{c.name}": values(url, t, c, c.name) for t in TABLES for c in t.columns}


def decrypted(url: str, version: int = 1) -> dict[str, Mapping[Any, str | None]]:
    """What the envelopes hold, all of one key version, by eyes that do not belong to the package."""
    found: dict[str, Mapping[Any, str | None]] = {}
    for table in TABLES:
        for column in table.columns:
            key = independent.derive(KEY, column.context, version)
            envelopes = values(url, table, column, column.encrypted)
            assert {json.loads(e)["key_version"] for e in envelopes.values() if e} <= {version}
            found[f"{table.key}.{column.name}"] = {
                k: None if e is None else independent.open_envelope(key, e) for k, e in envelopes.items()
            }
    return found


@pytest.mark.long
def test_every_step_is_done_by_the_role_it_is_for(theirs: Place, separated: Separated) -> None:
    before = plaintexts(theirs.url)

    def by(login: str, *arguments: str, **changes: str) -> list[str]:
        return theirs.succeeds(*arguments, ALPHAPULSE_DATABASE_URL=separated.of(login), **changes)

    theirs.extra["ALPHAPULSE_WRITER_DATABASE_URL"] = separated.of("wes_writes")

    checklist = by("petra_plans", "--preflight")
    assert not any(line.startswith("✗") for line in checklist)
    assert any("the role petra_plans may not run --add-columns" in line for line in checklist)
    by("bob_backs_up", "--backup")
    by("mia_migrates", "--add-columns", "--migrate-data", "--autovacuum-off")
    assert decrypted(theirs.url) == before
    assert by("vera_verifies", "--verify") == SUMMARY
    # A colleague goes on with what another has made.
    by("max_migrates", "--live-check", "--create-views", "--switch-to-encrypted")
    owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relname LIKE 'v\\_%' OR relname = 'users'"
    assert walk.query(theirs.url, owners) == [(f"{PREFIX}owner",)]
    assert by("vera_verifies", "--verify") == SUMMARY
    by("vera_verifies", "--benchmark-queries", "--table", "api_keys")

    answers = ("--approver", "Ada", "--reason", "it has served")
    by("ada_approves", "--approve-drop", "--table", "users", *answers, "--confirmation", "users")
    for table in TABLES:
        if table.key != "users":
            walk.approve(separated.of("ada_approves"), table)
    by("mia_migrates", "--drop-unencrypted", "--confirm", "--operator", "Grace")
    assert decrypted(theirs.url) == before
    assert not {c.name for t in TABLES for c in t.columns} & {
        n for t in TABLES for n in walk.columns_of(theirs.url, t.key)
    }
    used = walk.query(
        theirs.url, "SELECT DISTINCT database_role, consumed_by FROM alphapulse_encryption.approvals"
    )
    assert used == [("ada_approves", "Grace")]
    erased = by("eve_erases", "--erase-dropped", "--table", "users", "--confirmation", "users")
    assert erased[1].startswith("✓ Erased what was dropped: users rewritten in ")

    by("max_migrates", "--restore-plaintext")
    assert plaintexts(theirs.url) == before
    by("mia_migrates", "--rotate-keys", ALPHAPULSE_ENCRYPTION_KEY_VERSION="2")
    theirs.extra["ALPHAPULSE_ENCRYPTION_KEY_VERSION"] = "2"
    assert decrypted(theirs.url, 2) == before

    # The application's old instances write plaintext; somebody damages what is encrypted.
    with psycopg.connect(separated.of("shop")) as connection:
        connection.execute("UPDATE users SET last_name = 'Neumann' WHERE id % 2 = 0")
        connection.execute(
            "INSERT INTO users (username, email, password_hash) VALUES ('new', 'n@example.org', 'x')"
        )
        connection.execute(
            "UPDATE users u SET first_name = u.first_name, first_name_encrypted = o.first_name_encrypted "
            "FROM users o WHERE u.id = 31 AND o.id = 33"
        )
    changed = plaintexts(theirs.url)
    assert changed != before
    verify_users = ("--verify", "--table", "users")
    failed = theirs.fails(1, *verify_users, ALPHAPULSE_DATABASE_URL=separated.of("vera_verifies"))
    assert "users.first_name: 1 values mismatched" in failed.stdout
    by("max_migrates", "--repair-mismatched", "--migrate-data", "--table", "users")
    assert decrypted(theirs.url, 2) == changed
    assert by("vera_verifies", *verify_users) == summary(1, 6)
    by("mia_migrates", "--revert-to-plaintext")
    assert plaintexts(theirs.url) == changed

    roles = walk.query(
        theirs.url, "SELECT DISTINCT action, database_role FROM alphapulse_encryption.audit_log ORDER BY 1, 2"
    )
    assert {role for action, role in roles if action == "approve_drop"} == {"ada_approves"}
    assert {role for action, role in roles if action == "drop_plaintext"} == {"mia_migrates"}
    assert {role for action, role in roles if action == "erase_dropped"} == {"eve_erases"}
    assert {role for action, role in roles} == {
        *(
            "ada_approves",
            "bob_backs_up",
            "eve_erases",
            "max_migrates",
            "mia_migrates",
            "vera_verifies",
            "wes_writes",
        ),
    }
    # Whatever was done to rows.
    done = {"backfill", "rotate", "decrypt", "repair"}
    assert {role for action, role in roles if action in done} == {"wes_writes"}
    assert done <= {action for action, _ in roles}
