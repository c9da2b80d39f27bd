"""Every action of every role, tried by itself on the server: done by those it is for, refused to all others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.migration.bookkeeping.install import BOOKKEEPING_TABLES, SCHEMA
from alphapulse_encryption.migration.gates.approvals import revoke
from alphapulse_encryption.migration.postgres.database import WRITER, WRITER_SETTING, Database
from alphapulse_encryption.migration.rows.verify import count_rows
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.conftest import fresh_database
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.roles.conftest import LOGINS, PREFIX, Separated

USERS, TRADES = walk.CATALOGUE.table("users"), walk.CATALOGUE.table("trades")
INSUFFICIENT_PRIVILEGE = "42501"

SHOP, PLANNER, VERIFIER, APPROVER = "shop", "petra_plans", "vera_verifies", "ada_approves"
MIGRATOR, BACKUP, ERASER, REHEARSER = "mia_migrates", "bob_backs_up", "eve_erases", "rita_rehearses"
ALL_IN_ONE, WRITER_LOGIN = "jack_of_all", "wes_writes"
MIGRATORS = {MIGRATOR, "max_migrates", ERASER, ALL_IN_ONE}
NOBODY: set[str] = set()
EVERYBODY = set(LOGINS)

_APPROVAL = (
    "INSERT INTO alphapulse_encryption.approvals (table_name, approver, reason, expires_at, "
    "definition, catalogue_entry, "
    "key_check, verified_at, backup_id{more}) SELECT 'users', 'Ada', 'why', now() + interval '1 hour', 'd', 'c', 'k', "
    "now(), max(id){values} FROM alphapulse_encryption.backups"
)
_AUDIT = "INSERT INTO alphapulse_encryption.audit_log (actor, action{more}) VALUES ('a', 'b'{values})"
_OPEN = "WHERE revoked_at IS NULL"


@dataclass(frozen=True)
class Action:
    """Something to do, and who may.

    Args:
        statement: SQL, by whose success alone it is told.
        allowed: the log-ins.
    """

    statement: str
    allowed: set[str]


def action(statement: str, allowed: set[str], **parts: str) -> Action:
    return Action(statement.format(**parts) if parts else statement, allowed)


ACTIONS = {
    # The data.
    "read data": action(
        "SELECT email FROM users LIMIT 1", {SHOP, VERIFIER, WRITER_LOGIN, BACKUP, REHEARSER, *MIGRATORS}
    ),
    "read a view": action(
        "SELECT email FROM v_users LIMIT 1", {SHOP, VERIFIER, WRITER_LOGIN, BACKUP, REHEARSER, *MIGRATORS}
    ),
    "read statistics' values": action("SELECT stavalues1 FROM pg_statistic LIMIT 1", NOBODY),
    "read passwords": action("SELECT rolpassword FROM pg_authid", NOBODY),
    "read another's log-in for another server": action("SELECT umoptions FROM pg_user_mapping", NOBODY),
    "write data": action("UPDATE trades SET fee = 1 WHERE id = 7", {SHOP, WRITER_LOGIN, *MIGRATORS}),
    "write a ciphertext": action(
        "UPDATE trades SET fee = fee, fee_encrypted = 'x' WHERE id = 7", {SHOP, WRITER_LOGIN, *MIGRATORS}
    ),
    "write another column": action("UPDATE trades SET executed_at = now() WHERE id = 7", {SHOP, *MIGRATORS}),
    "insert data": action(
        "INSERT INTO users (username, email, password_hash) VALUES ('new', 'n@example.org', 'x')",
        {SHOP, *MIGRATORS},
    ),
    "delete data": action("DELETE FROM trades WHERE id = 7", {SHOP, *MIGRATORS}),
    "lock data": action("SELECT FROM users WHERE id = 7 FOR UPDATE", {SHOP, WRITER_LOGIN, *MIGRATORS}),
    "truncate data": action("TRUNCATE api_keys", MIGRATORS),
    "add a column": action("ALTER TABLE users ADD COLUMN another int", MIGRATORS),
    "drop a plaintext column": action("ALTER TABLE users DROP COLUMN email CASCADE", MIGRATORS),
    "drop an encrypted column": action("ALTER TABLE trades DROP COLUMN fee_encrypted CASCADE", MIGRATORS),
    "build an index": action("CREATE INDEX another ON users (locale)", MIGRATORS),
    "disable the guard": action("ALTER TABLE users DISABLE TRIGGER zzz_encryption_guard_update", MIGRATORS),
    "drop the guard": action("DROP TRIGGER zzz_encryption_guard_update ON users", MIGRATORS),
    "drop the guard's function": action("DROP FUNCTION encryption_guard_users() CASCADE", MIGRATORS),
    "call the guard's function for a table of one's own": action(
        "CREATE TEMPORARY TABLE mine (v text); CREATE TRIGGER t BEFORE INSERT ON mine FOR EACH ROW "
        "EXECUTE FUNCTION encryption_guard_users('ciphertext', '')",
        MIGRATORS,
    ),
    "replace a view": action("DROP VIEW v_users", MIGRATORS),
    "take over a table": action("ALTER TABLE users OWNER TO CURRENT_USER", NOBODY | MIGRATORS),
    "give a table to the application": action("ALTER TABLE users OWNER TO shop", NOBODY),
    # Approvals.
    "read approvals": action(
        "SELECT * FROM alphapulse_encryption.approvals", EVERYBODY - {SHOP, WRITER_LOGIN}
    ),
    "approve": action(_APPROVAL, {APPROVER, ALL_IN_ONE}, more="", values=""),
    "approve over another's role": action(
        _APPROVAL, NOBODY, more=", database_role", values=", 'ada_approves'"
    ),
    "approve in the past": action(_APPROVAL, NOBODY, more=", approved_at", values=", now()"),
    "approve something used": action(_APPROVAL, NOBODY, more=", consumed_at", values=", NULL"),
    "prolong an approval": action(
        "UPDATE alphapulse_encryption.approvals SET expires_at = now() + '7 days'", NOBODY
    ),
    "approve another definition": action(
        "UPDATE alphapulse_encryption.approvals SET definition = 'x'", NOBODY
    ),
    "approve for another table": action(
        "UPDATE alphapulse_encryption.approvals SET table_name = 'trades'", NOBODY
    ),
    "use an approval": action(
        f"UPDATE alphapulse_encryption.approvals SET consumed_at = now(), consumed_by = 'x' {_OPEN}",
        MIGRATORS,
    ),
    "revoke an approval": action(
        f"UPDATE alphapulse_encryption.approvals SET revoked_at = now(), revoked_by = 'x' {_OPEN}",
        {APPROVER, *MIGRATORS},
    ),
    "open a revoked approval again": action(
        "UPDATE alphapulse_encryption.approvals SET revoked_at = NULL WHERE revoked_at IS NOT NULL", NOBODY
    ),
    "remove approvals": action("DELETE FROM alphapulse_encryption.approvals", NOBODY),
    "take the approvals' trigger away": action(
        "ALTER TABLE alphapulse_encryption.approvals DISABLE TRIGGER ALL", NOBODY
    ),
    "replace the approvals' trigger": action(
        "CREATE OR REPLACE FUNCTION alphapulse_encryption.approval_is_final() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN RETURN NEW; END'",
        NOBODY,
    ),
    # The audit log.
    "write to the audit log": action(
        _AUDIT, {APPROVER, BACKUP, VERIFIER, WRITER_LOGIN, *MIGRATORS}, more="", values=""
    ),
    "write to the audit log over another's role": action(
        _AUDIT, NOBODY, more=", database_role", values=", 'ada_approves'"
    ),
    "write to the audit log in the past": action(_AUDIT, NOBODY, more=", at", values=", now()"),
    "change the audit log": action("UPDATE alphapulse_encryption.audit_log SET actor = 'x'", NOBODY),
    "remove from the audit log": action("DELETE FROM alphapulse_encryption.audit_log", NOBODY),
    "empty the audit log": action("TRUNCATE alphapulse_encryption.audit_log", NOBODY),
    "let the audit log be changed": action(
        "ALTER TABLE alphapulse_encryption.audit_log DISABLE TRIGGER encryption_append_only", NOBODY
    ),
    "drop the audit log": action("DROP TABLE alphapulse_encryption.audit_log", NOBODY),
    # The rest of the bookkeeping.
    "keep a verification": action(
        "UPDATE alphapulse_encryption.verifications SET verified_at = now()", {VERIFIER, *MIGRATORS}
    ),
    "remove verifications": action("DELETE FROM alphapulse_encryption.verifications", MIGRATORS),
    "keep a count": action(
        "UPDATE alphapulse_encryption.row_counts SET missing_count = 0", {VERIFIER, *MIGRATORS}
    ),
    "move a range's progress": action(
        "UPDATE alphapulse_encryption.ranges SET position = NULL", {WRITER_LOGIN, *MIGRATORS}
    ),
    "move a range": action("UPDATE alphapulse_encryption.ranges SET upper_key = NULL", MIGRATORS),
    "forget a range": action("DELETE FROM alphapulse_encryption.ranges", MIGRATORS),
    "count a column's values": action(
        "UPDATE alphapulse_encryption.columns SET records_processed = 0", {WRITER_LOGIN, *MIGRATORS}
    ),
    "count a key's messages": action(
        "UPDATE alphapulse_encryption.key_usage SET messages = 0", {WRITER_LOGIN, *MIGRATORS}
    ),
    "set a row aside": action(
        "INSERT INTO alphapulse_encryption.quarantine (table_name, batch_range, key, reason) "
        "VALUES ('users', 0, '{1}', 'x')",
        {WRITER_LOGIN, *MIGRATORS},
    ),
    "switch a table in the bookkeeping": action(
        "UPDATE alphapulse_encryption.tables SET stage = 'columns'", MIGRATORS
    ),
    "remove a table from the bookkeeping": action("DELETE FROM alphapulse_encryption.tables", NOBODY),
    "record a backup": action(
        "INSERT INTO alphapulse_encryption.backups (taken_at, location, bytes, sha256, recipient, "
        "listed_entries, verified_at, "
        "tables) VALUES (now(), 'x', 1, 'x', 'x', 1, now(), '{users}')",
        {BACKUP, ALL_IN_ONE},
    ),
    "record another checksum": action("UPDATE alphapulse_encryption.backups SET sha256 = 'x'", NOBODY),
    "know a key": action(
        "INSERT INTO alphapulse_encryption.key_checks (key_version, check_value) VALUES (9, 'x')",
        {BACKUP, *MIGRATORS},
    ),
    "know another key": action("UPDATE alphapulse_encryption.key_checks SET check_value = 'x'", NOBODY),
    "forget a key": action("DELETE FROM alphapulse_encryption.key_checks", NOBODY),
    "change a saved definition": action(
        "UPDATE alphapulse_encryption.definitions SET definition = '{}'", NOBODY
    ),
    "pause the backfills": action(
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('paused', 'true')", MIGRATORS
    ),
    "change the two-person rule": action(
        "UPDATE alphapulse_encryption.settings SET value = '\"off\"' WHERE name = 'two_person_rule'", NOBODY
    ),
    "replace the two-person rule": action(
        "INSERT INTO alphapulse_encryption.settings (name, value) VALUES ('two_person_rule', '\"off\"') "
        "ON CONFLICT (name) DO UPDATE SET value = excluded.value",
        NOBODY,
    ),
    "remove the two-person rule": action("DELETE FROM alphapulse_encryption.settings", NOBODY),
    "count messages as an application": action(
        "SELECT encryption_report_key_usage('user_pii', 1, 1)", {SHOP}
    ),
    "add to the bookkeeping": action("ALTER TABLE alphapulse_encryption.tables ADD COLUMN mine int", NOBODY),
    "hang a trigger on the bookkeeping": action(
        "CREATE TRIGGER mine BEFORE UPDATE ON alphapulse_encryption.tables FOR EACH ROW "
        "EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        NOBODY,
    ),
    "drop the bookkeeping": action("DROP TABLE alphapulse_encryption.tables", NOBODY),
    # Other roles, and the server.
    "be the bookkeeper": action(f"SET ROLE {PREFIX}bookkeeper", NOBODY),
    "be an approver": action(f"SET ROLE {PREFIX}approver", {APPROVER, ALL_IN_ONE}),
    "be the owner": action(f"SET ROLE {PREFIX}owner", MIGRATORS),
    "be a superuser": action("SET SESSION AUTHORIZATION postgres", NOBODY),
    "admit somebody": action(f"GRANT {PREFIX}approver TO shop", NOBODY),
    "create a role": action("CREATE ROLE another", NOBODY),
    "create a table": action("CREATE TABLE public.another ()", MIGRATORS),
    "create a function": action(
        "CREATE FUNCTION public.left_behind() RETURNS int LANGUAGE sql SECURITY DEFINER RETURN 1", MIGRATORS
    ),
    "create a schema": action("CREATE SCHEMA another", NOBODY),
    "keep statements out of the log": action(
        "SET log_min_error_statement TO panic", EVERYBODY - {SHOP, PLANNER, APPROVER}
    ),
    "see the settings": action("SELECT current_setting('data_directory')", {PLANNER, VERIFIER, *MIGRATORS}),
    "look into the data files": action("SELECT pg_read_binary_file('PG_VERSION', 0, 1, true)", {ERASER}),
    "make a checkpoint": action("CHECKPOINT", {ERASER}),
    "turn triggers off": action("SET session_replication_role TO replica", {WRITER_LOGIN, *MIGRATORS}),
}


@pytest.fixture(scope="module")
def begun(
    postgres: EmbeddedPostgres, _roles_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Separated]:
    """`users` is approved, once in vain; `trades` has its guard, and its plaintext is right."""
    for url in fresh_database(postgres, _roles_template):
        found = Separated(url, postgres)
        walk.encrypt(found.of("max_migrates"), TRADES)
        walk.switch(found.of(ALL_IN_ONE), USERS)
        walk.create_views(found.of(MIGRATOR), USERS)
        walk.backup(found.of(BACKUP), (USERS,), tmp_path_factory.mktemp("backup"), postgres.bin_dir())
        count_rows(walk.target(found.of(VERIFIER)), USERS)
        first = walk.approve(found.of(APPROVER), USERS)
        revoke(Database(found.of(APPROVER)), first.id, walk.ACTOR)
        walk.approve(found.of(APPROVER), USERS)
        yield found


_SCHEMA = """
SELECT md5(string_agg(what, '|' ORDER BY what)) FROM (
    SELECT concat('c', oid, xmin, relname, relowner, relacl) AS what FROM pg_class WHERE oid >= 16384
    UNION ALL SELECT concat('a', attrelid, xmin, attname) FROM pg_attribute WHERE attrelid >= 16384
    UNION ALL SELECT concat('t', oid, xmin, tgname, tgenabled) FROM pg_trigger
    UNION ALL SELECT concat('p', oid, xmin, proname, proowner, proacl) FROM pg_proc WHERE oid >= 16384
    UNION ALL SELECT concat('r', oid, rolname) FROM pg_roles
    UNION ALL SELECT concat('m', roleid, member) FROM pg_auth_members) AS everything
"""


def everything(url: str) -> list[tuple[Any, ...]]:
    """Who wrote each row of the bookkeeping and the tables last, and who may do what with them."""
    tables = [*(f"{SCHEMA}.{name}" for name in BOOKKEEPING_TABLES), *walk.CATALOGUE.keys]
    rows = ", ".join(f"(SELECT sum(hashtext(concat(ctid, '/', xmin))) FROM {name})" for name in tables)
    return [*walk.query(url, f"SELECT {rows}"), *walk.query(url, _SCHEMA)]


@pytest.fixture(scope="module")
def before(begun: Separated) -> list[tuple[Any, ...]]:
    return everything(begun.url)


@pytest.fixture(scope="module")
def sessions(begun: Separated) -> Iterator[Mapping[str, psycopg.Connection[Any]]]:
    with contextlib.ExitStack() as stack:
        yield {login: stack.enter_context(psycopg.connect(begun.of(login))) for login in LOGINS}


def outcome(session: psycopg.Connection[Any], statement: str) -> str:
    """How a statement ended, which is taken back then: "done", or the server's code for why not."""
    try:
        # An UPDATE of nothing would prove nothing.
        return "done" if session.execute(statement.encode()).rowcount != 0 else "nothing done"
    except psycopg.Error as error:
        return str(error.sqlstate)
    finally:
        session.rollback()


@pytest.mark.parametrize("name", ACTIONS)
def test_an_action_is_done_by_whom_it_is_for_and_refused_to_others(
    begun: Separated,
    sessions: Mapping[str, psycopg.Connection[Any]],
    before: list[tuple[Any, ...]],
    name: str,
) -> None:
    tried = ACTIONS[name]
    expected = {login: "done" if login in tried.allowed else INSUFFICIENT_PRIVILEGE for login in LOGINS}
    found = {login: outcome(session, tried.statement) for login, session in sessions.items()}
    assert found == expected
    assert everything(begun.url) == before


def test_nobody_gives_away_what_they_have(begun: Separated) -> None:
    """Of a table that one has some privilege on, the server does not refuse a GRANT, but only warns."""
    privileges = (
        "SELECT relname, relacl::text, (SELECT array_agg(attacl::text) FROM pg_attribute WHERE attrelid = c.oid) "
        "FROM pg_class c WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
    )
    before = walk.query(begun.url, privileges)
    for login in LOGINS:
        for grant in (
            "INSERT ON alphapulse_encryption.approvals",
            "UPDATE (reason) ON alphapulse_encryption.approvals",
        ):
            with psycopg.connect(begun.of(login), autocommit=True) as connection:
                try:
                    connection.execute(f"GRANT {grant} TO PUBLIC".encode())
                except psycopg.errors.InsufficientPrivilege:
                    continue
    assert walk.query(begun.url, privileges) == before


def test_the_application_cannot_pass_for_the_engine(begun: Separated) -> None:
    """By the setting alone; whoever may write the engine's bookkeeping is believed."""
    write = "UPDATE trades SET fee_encrypted = 'forged' WHERE id = (SELECT min(id) FROM trades WHERE fee IS NOT NULL)"
    for login, refused in ((SHOP, True), (MIGRATOR, False)):
        with psycopg.connect(begun.of(login)) as connection:
            connection.execute("SELECT set_config(%s, %s, false)", [WRITER_SETTING, WRITER])
            if refused:
                with pytest.raises(psycopg.errors.CheckViolation):
                    connection.execute(write.encode())
            else:
                assert connection.execute(write.encode()).rowcount == 1
            connection.rollback()


def test_what_the_application_does_is_guarded_as_before(begun: Separated) -> None:
    with psycopg.connect(begun.of(SHOP)) as connection:
        (key,) = connection.execute("SELECT min(id) FROM trades WHERE fee IS NOT NULL").fetchall()[0]
        assert connection.execute(
            "UPDATE trades SET fee = fee + 1 WHERE id = %s RETURNING fee_encrypted", [key]
        ).fetchall() == [(None,)]
        connection.rollback()


def test_an_approval_is_used_once_and_not_by_the_role_that_gave_it(begun: Separated) -> None:
    approve = ACTIONS["approve"].statement
    use = (
        "UPDATE alphapulse_encryption.approvals SET consumed_at = '2001-01-01', consumed_by = 'x' WHERE id = %s "
        "RETURNING consumed_at > now() - interval '1 hour'"
    )
    with psycopg.connect(begun.of(ALL_IN_ONE)) as connection:
        (number,) = connection.execute(f"{approve} RETURNING id".encode()).fetchall()[0]
        with pytest.raises(
            psycopg.errors.InsufficientPrivilege, match="given over the role that wants to use it"
        ):
            connection.execute(use.encode(), [number])
        connection.rollback()
        (open_one,) = connection.execute(
            f"SELECT id FROM alphapulse_encryption.approvals {_OPEN}".encode()
        ).fetchall()[0]
        # Of when, the server decides.
        assert connection.execute(use.encode(), [open_one]).fetchall() == [(True,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="used or revoked before"):
            connection.execute(
                "UPDATE alphapulse_encryption.approvals SET consumed_at = NULL WHERE id = %s", [open_one]
            )
        connection.rollback()


@pytest.mark.parametrize(
    ("column", "written"),
    [
        ("expires_at", "'infinity'"),
        ("expires_at", "'-infinity'"),
        ("expires_at", "now() + interval '8 days'"),
        ("expires_at", "now() - interval '1 second'"),
        ("verified_at", "'infinity'"),
        ("verified_at", "'-infinity'"),
        ("verified_at", "now() + interval '1 hour'"),
        ("approver", "''"),
        ("approver", "E' \\u00a0\\t'"),
        ("approver", "E'Ada\\x1b[2J'"),
        ("approver", "repeat('A', 201)"),
        ("reason", "E'\\n'"),
        ("reason", "E'so\\n\\u2713 users: verified'"),
        ("reason", "repeat('why ', 501)"),
    ],
)
def test_an_approval_has_bounds_that_no_approver_can_leave(
    begun: Separated, column: str, written: str
) -> None:
    """One that never ends would be used by anybody, later; one that no program can read would block the table."""
    before = everything(begun.url)
    values = {
        **{"approver": "'Ada'", "reason": "'why'"},
        **{"expires_at": "now() + interval '1 hour'", "verified_at": "now()"},
        column: written,
    }
    names, given = ", ".join(values), ", ".join(values.values())
    with psycopg.connect(begun.of(APPROVER)) as connection:
        connection.execute("SET search_path TO pg_catalog")
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute(
                f"INSERT INTO alphapulse_encryption.approvals (table_name, definition, catalogue_entry, key_check, "
                f"backup_id, {names}) SELECT 'users', 'd', 'c', 'k', max(id), {given} "
                "FROM alphapulse_encryption.backups".encode()
            )
    assert everything(begun.url) == before


def test_an_application_that_lies_about_its_use_of_a_key_stops_nobody(separated: Separated) -> None:
    walk.encrypt(separated.of(MIGRATOR), TRADES)
    with psycopg.connect(separated.of(SHOP), autocommit=True) as connection:
        for context in ("trade_execution", "trade_order", "trade_details"):
            connection.execute("SELECT encryption_report_key_usage(%s, 1, 4294967296)", [context])
        with pytest.raises(psycopg.errors.InvalidParameterValue):
            connection.execute("SELECT encryption_report_key_usage(E'\\x1b[2J', 1, 1)")
    walk.query(separated.url, "UPDATE trades SET fee = 3 WHERE id = 7")
    walk.encrypt(separated.of(MIGRATOR), TRADES)
    assert (
        walk.value(
            separated.url, "SELECT count(*) FROM trades WHERE fee IS NOT NULL AND fee_encrypted IS NULL"
        )
        == 0
    )
    reported = "SELECT sum(messages) FROM alphapulse_encryption.key_usage WHERE source = 'application'"
    assert walk.value(separated.url, reported) >= 2**32
