"""Step 6: the original names over the encrypted columns, and nothing sensitive where it is promised."""

from __future__ import annotations

import re
from collections.abc import Iterator

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.views import ViewsResult, create_views, view_statements
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

ENTRY = support.table("notes", support.searchable("mail", "idx_mail"), "secret")
BOTH = ("v_notes", "v_notes_safe")


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, other text, secret int)")
    run(database_url, "INSERT INTO notes VALUES (1, 'plain mail', 'open', 42), (2, NULL, 'open', NULL)")
    support.encrypt(database_url, ENTRY)
    return database_url


@pytest.fixture
def reader(notes_url: str) -> Iterator[str]:
    """A role that may read the table; roles belong to the whole server."""
    run(notes_url, "CREATE ROLE views_reader")
    yield "views_reader"
    run(notes_url, "DROP OWNED BY views_reader")
    run(notes_url, "DROP ROLE views_reader")


def create(url: str, entry: Table = ENTRY) -> ViewsResult:
    return create_views(Database(url), entry, ACTOR)


def columns(url: str, view: str) -> list[str]:
    with support.application(url) as connection:
        cursor = connection.execute(f"SELECT * FROM {view} LIMIT 0".encode())
        return [column.name for column in cursor.description or ()]


def test_columns(notes_url: str) -> None:
    assert create(notes_url).created == BOTH
    assert columns(notes_url, "v_notes") == ["id", "mail", "other", "secret", "mail_search"]
    assert columns(notes_url, "v_notes_safe") == ["id", "other"]
    rows = run(notes_url, "SELECT id, mail, secret, mail_search, other FROM v_notes ORDER BY id")
    assert support.opened(rows[0][1], "test_search") == "plain mail"
    assert support.opened(rows[0][2], "test_context") == "42"
    assert rows[0][3] == support.token("plain mail", "test_search")
    assert rows[1] == (2, None, None, None, "open")
    assert run(notes_url, "SELECT * FROM v_notes_safe ORDER BY id") == [(1, "open"), (2, "open")]


def test_no_view_reads_a_plaintext_column(notes_url: str) -> None:
    """So the drop goes through without touching them."""
    create(notes_url)
    used = run(
        notes_url,
        "SELECT DISTINCT a.attname FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid "
        "JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid "
        "WHERE d.classid = 'pg_rewrite'::regclass AND d.refobjid = 'notes'::regclass AND d.refobjsubid > 0",
    )
    assert {name for (name,) in used} == {"id", "other", "mail_encrypted", "mail_search", "secret_encrypted"}
    run(notes_url, "ALTER TABLE notes DISABLE TRIGGER ALL")
    run(notes_url, "DROP FUNCTION encryption_guard_notes CASCADE")
    run(notes_url, "ALTER TABLE notes DROP COLUMN mail, DROP COLUMN secret")
    assert columns(notes_url, "v_notes") == ["id", "mail", "other", "secret", "mail_search"]
    with pytest.raises(RefusedError, match="guard"):
        create(notes_url)


def test_second_run_changes_nothing(notes_url: str) -> None:
    create(notes_url)
    before = run(notes_url, "SELECT oid, xmin::text, relname FROM pg_class WHERE relkind = 'v' ORDER BY oid")
    result = create(notes_url)
    assert (result.created, result.existing, result.changed) == ((), BOTH, False)
    assert (
        run(notes_url, "SELECT oid, xmin::text, relname FROM pg_class WHERE relkind = 'v' ORDER BY oid")
        == before
    )


def test_renewed_when_the_table_changes(notes_url: str) -> None:
    create(notes_url)
    run(notes_url, "ALTER TABLE notes ADD COLUMN more int DEFAULT 7")
    assert create(notes_url).created == BOTH
    assert columns(notes_url, "v_notes") == ["id", "mail", "other", "secret", "mail_search", "more"]
    assert columns(notes_url, "v_notes_safe") == ["id", "other", "more"]
    assert run(notes_url, "SELECT DISTINCT more FROM v_notes_safe") == [(7,)]
    run(notes_url, "ALTER TABLE notes RENAME COLUMN more TO rest")
    assert create(notes_url).created == BOTH
    assert columns(notes_url, "v_notes_safe") == ["id", "other", "rest"]


@pytest.mark.parametrize(
    "change",
    ["ALTER TABLE notes ADD COLUMN more int", "ALTER TABLE notes RENAME COLUMN other TO another"],
)
def test_what_was_granted_on_a_view_survives_its_renewal(notes_url: str, reader: str, change: str) -> None:
    create(notes_url)
    run(notes_url, f"GRANT SELECT, DELETE ON v_notes TO {reader} WITH GRANT OPTION")
    run(notes_url, f"GRANT UPDATE (id), SELECT (id) ON v_notes_safe TO {reader}")
    run(notes_url, "GRANT SELECT ON v_notes_safe TO PUBLIC")
    granted = "SELECT relname, relacl::text FROM pg_class WHERE relname LIKE 'v_notes%' ORDER BY 1"
    of_columns = (
        "SELECT attacl::text FROM pg_attribute WHERE attrelid = 'v_notes_safe'::regclass AND attacl <> '{}'"
    )
    before = run(notes_url, granted) + run(notes_url, of_columns)
    run(notes_url, change)
    assert create(notes_url).created == BOTH
    assert run(notes_url, granted) + run(notes_url, of_columns) == before


def test_who_may_read_all_that_a_view_reads_may_read_the_view(notes_url: str, reader: str) -> None:
    """So that the safe view can be given to those who are to see no more than it shows."""
    run(notes_url, f"GRANT SELECT (id, other) ON notes TO {reader}")
    create(notes_url)
    with support.application(notes_url) as connection:
        connection.execute(f"SET ROLE {reader}".encode())
        assert support.ask(connection, "SELECT * FROM v_notes_safe ORDER BY id") == [(1, "open"), (2, "open")]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            connection.execute("SELECT id FROM v_notes")
    assert not create(notes_url).changed


HIDING = ENTRY.model_copy(update={"hide": ("other",)})


def test_what_the_catalogue_hides(notes_url: str, reader: str) -> None:
    """Of a view that shows it already, too, whose privileges stay."""
    create(notes_url)
    run(notes_url, f"GRANT SELECT ON v_notes_safe TO {reader} WITH GRANT OPTION")
    granted = "SELECT relacl::text FROM pg_class WHERE relname = 'v_notes_safe'"
    before = run(notes_url, granted)
    assert create(notes_url, HIDING).created == ("v_notes_safe",)
    assert columns(notes_url, "v_notes_safe") == ["id"]
    assert columns(notes_url, "v_notes") == ["id", "mail", "other", "secret", "mail_search"]
    assert run(notes_url, granted) == before
    assert not create(notes_url, HIDING).changed
    assert create(notes_url).created == ("v_notes_safe",)
    assert columns(notes_url, "v_notes_safe") == ["id", "other"]


def test_what_others_built_on_what_is_hidden_now_is_named(notes_url: str) -> None:
    create(notes_url)
    run(notes_url, "CREATE VIEW report AS SELECT other FROM v_notes_safe")
    run(notes_url, "CREATE MATERIALIZED VIEW kept AS SELECT other FROM v_notes_safe")
    with pytest.raises(
        RefusedError, match=r"v_notes_safe.*depend on it: view public.kept, view public.report"
    ):
        create(notes_url, HIDING)
    assert run(notes_url, "SELECT * FROM report") == [("open",), ("open",)]


def test_a_column_to_hide_that_is_not_there(notes_url: str) -> None:
    entry = ENTRY.model_copy(update={"hide": ("other", "Salt", "hash")})
    with pytest.raises(ConfigurationError, match=r"notes has no column Salt, hash, which .* under hide"):
        create(notes_url, entry)
    assert run(notes_url, "SELECT to_regclass('v_notes')") == [(None,)]
    assert any("Salt, hash" in f.message for f in check(Database(notes_url), [entry], support.KEYS).blockers)


def test_secrets_that_a_view_would_show_are_told(notes_url: str) -> None:
    run(
        notes_url,
        "ALTER TABLE notes ADD password_hash text, ADD pw_salt bytea, ADD password_changed timestamptz",
    )
    for hidden, told in (((), ["password_hash, pw_salt"]), (("pw_salt",), ["password_hash"])):
        entry = ENTRY.model_copy(update={"hide": hidden})
        warnings = [f.message for f in check(Database(notes_url), [entry], support.KEYS).warnings]
        found = [re.search(r"would show (.*), which look", message) for message in warnings]
        assert [one[1] for one in found if one] == told


def test_a_view_with_triggers_is_not_made_again(notes_url: str) -> None:
    create(notes_url)
    run(
        notes_url,
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER theirs INSTEAD OF INSERT ON v_notes_safe FOR EACH ROW EXECUTE FUNCTION f()",
    )
    run(notes_url, "ALTER TABLE notes ADD COLUMN more int")
    create(notes_url)
    assert run(notes_url, "SELECT tgname FROM pg_trigger WHERE tgrelid = 'v_notes_safe'::regclass") == [
        ("theirs",)
    ]
    run(notes_url, "ALTER TABLE notes RENAME COLUMN more TO rest")
    told = r"v_notes_safe .* triggers \(theirs\)"
    with pytest.raises(RefusedError, match=told):
        create(notes_url)
    assert columns(notes_url, "v_notes_safe") == ["id", "other", "more"]
    with Database(notes_url).session("plan the views") as connection, pytest.raises(RefusedError, match=told):
        view_statements(connection, read_table(connection, ENTRY))


def test_conditions_reach_the_indexes_of_the_table(notes_url: str) -> None:
    """Also those with operators that might tell what they saw, such as LIKE."""
    run(notes_url, "CREATE INDEX by_other ON notes (other text_pattern_ops)")
    create(notes_url)
    with support.application(notes_url) as connection:
        connection.execute("SET enable_seqscan = off")
        plan = support.ask(connection, "EXPLAIN SELECT * FROM v_notes WHERE other LIKE 'op%'")
    assert any("by_other" in line for (line,) in plan)


def test_those_who_may_read_the_table_may_read_the_views(notes_url: str, reader: str) -> None:
    def allowed(relation: str, privilege: str = "SELECT") -> bool:
        return bool(
            support.value(notes_url, "SELECT has_table_privilege(%s, %s, %s)", reader, relation, privilege)
        )

    create(notes_url)
    assert not any(allowed(view) for view in BOTH)
    run(notes_url, f"GRANT SELECT, INSERT ON notes TO {reader}")
    run(notes_url, "DROP VIEW v_notes, v_notes_safe")
    create(notes_url)
    assert all(allowed(view) for view in BOTH)
    assert not any(allowed(view, "INSERT") for view in BOTH)
    run(notes_url, f"REVOKE ALL ON notes FROM {reader}")
    run(notes_url, "GRANT SELECT ON notes TO PUBLIC")
    run(notes_url, "ALTER TABLE notes ADD COLUMN more int")
    create(notes_url)
    assert all(allowed(view) for view in BOTH)
    with support.application(notes_url) as connection:
        connection.execute(f"SET ROLE {reader}".encode())
        assert support.ask(connection, "SELECT id FROM v_notes_safe ORDER BY 1") == [(1,), (2,)]


def test_views_give_nobody_more_than_the_table(notes_url: str, reader: str) -> None:
    """Rights and row-level security are those of whoever reads."""
    create(notes_url)
    run(notes_url, f"GRANT SELECT ON v_notes, v_notes_safe TO {reader}")
    with support.application(notes_url) as connection:
        connection.execute(f"SET ROLE {reader}".encode())
        for view in BOTH:
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="table notes"):
                connection.execute(f"SELECT * FROM {view}".encode())
    run(notes_url, f"GRANT SELECT ON notes TO {reader}")
    run(notes_url, "ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    run(notes_url, "CREATE POLICY second ON notes USING (id = 2)")
    with support.application(notes_url) as connection:
        connection.execute(f"SET ROLE {reader}".encode())
        for view in BOTH:
            assert support.ask(connection, f"SELECT id FROM {view}") == [(2,)]


@pytest.mark.parametrize(
    "foreign",
    [
        "CREATE VIEW v_notes AS SELECT 1 AS mine",
        "CREATE TABLE v_notes AS SELECT 1 AS mine",
        "CREATE MATERIALIZED VIEW v_notes AS SELECT 1 AS mine",
    ],
)
def test_foreign_relations_of_these_names_are_left_alone(notes_url: str, foreign: str) -> None:
    run(notes_url, foreign)
    with pytest.raises(ConfigurationError, match=r"public\.v_notes exists and is not a compatibility view"):
        create(notes_url)
    assert run(notes_url, "SELECT mine FROM v_notes") == [(1,)]
    assert run(notes_url, "SELECT to_regclass('v_notes_safe')") == [(None,)]


MARKED = "COMMENT ON VIEW v_notes_safe IS 'alphapulse_encryption: compatibility view'"


@pytest.mark.parametrize("query", ["SELECT * FROM notes", "SELECT t.id FROM notes t WHERE id = 1"])
def test_a_view_is_ours_by_what_it_shows(notes_url: str, query: str) -> None:
    """Not by its comment: one that shows plaintext, or not all rows, is made again."""
    create(notes_url)
    before = run(notes_url, "SELECT pg_get_viewdef('v_notes_safe'::regclass)")
    run(notes_url, f"DROP VIEW v_notes_safe; CREATE VIEW v_notes_safe AS {query}; {MARKED}")
    assert create(notes_url).created == ("v_notes_safe",)
    assert run(notes_url, "SELECT pg_get_viewdef('v_notes_safe'::regclass)") == before
    assert not create(notes_url).changed


def test_a_view_of_somebody_who_may_not_change_the_table(notes_url: str, reader: str) -> None:
    run(notes_url, f"CREATE VIEW v_notes_safe AS SELECT id FROM notes; {MARKED}")
    run(notes_url, f"ALTER VIEW v_notes_safe OWNER TO {reader}")
    try:
        with pytest.raises(MigrationError, match=r"public\.v_notes_safe"):
            create(notes_url)
    finally:
        run(notes_url, "DROP VIEW v_notes_safe")


def test_what_others_built_on_a_view_is_not_destroyed(notes_url: str) -> None:
    create(notes_url)
    run(notes_url, "CREATE VIEW report AS SELECT count(*) AS n FROM v_notes")
    assert not create(notes_url).changed
    run(notes_url, "ALTER TABLE notes ADD COLUMN more int")
    assert create(notes_url).changed
    assert run(notes_url, "SELECT n FROM report") == [(2,)]
    run(notes_url, "ALTER TABLE notes RENAME COLUMN more TO rest")
    with pytest.raises(RefusedError, match=r"v_notes has to be made again.*depend on it: view public.report"):
        create(notes_url)
    assert run(notes_url, "SELECT n FROM report") == [(2,)]


def test_before_its_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, other text, secret int)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        create(database_url)


def test_odd_names(database_url: str) -> None:
    entry = support.table('My "Table" %s', 'The "Column" 100%', schema="Other Schema")
    run(database_url, 'CREATE SCHEMA "Other Schema"')
    run(
        database_url,
        'CREATE TABLE "Other Schema"."My ""Table"" %s" ("Id %" int PRIMARY KEY, "The ""Column"" 100%" int)',
    )
    run(database_url, 'INSERT INTO "Other Schema"."My ""Table"" %s" VALUES (1, 42)')
    support.encrypt(database_url, entry)
    assert create_views(Database(database_url), entry, ACTOR).created == (
        'v_My "Table" %s',
        'v_My "Table" %s_safe',
    )
    rows = run(database_url, 'SELECT "Id %", "The ""Column"" 100%" FROM "Other Schema"."v_My ""Table"" %s"')
    assert rows[0][0] == 1
    assert support.opened(rows[0][1], "test_context") == "42"
    assert not create_views(Database(database_url), entry, ACTOR).changed


def test_a_name_too_long_for_its_views(database_url: str) -> None:
    entry = support.table("t" * 60, "v")
    run(database_url, f"CREATE TABLE {'t' * 60} (id int PRIMARY KEY, v text)")
    support.encrypt(database_url, entry)
    with pytest.raises(ConfigurationError, match="too long for the compatibility views"):
        create_views(Database(database_url), entry, ACTOR)
