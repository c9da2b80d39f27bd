"""The bookkeeping's tables: made once, brought up to date, and never made over what is somebody else's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping import install
from alphapulse_encryption.migration.bookkeeping.approvals import list_approvals
from alphapulse_encryption.migration.bookkeeping.contents import read_objects
from alphapulse_encryption.migration.bookkeeping.install import (
    LAYOUT,
    SCHEMA,
    Layout,
    bookkeeping_exists,
    ensure_bookkeeping,
    missing_bookkeeping,
)
from alphapulse_encryption.migration.bookkeeping.limits import read_limits
from alphapulse_encryption.migration.gates import preflight, saved
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.verify import verify_range, verify_table
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.steps.restore import restore_plaintext
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import KEYS, run, value

PACKAGE = Path(install.__file__).parents[2]
OIDS = (
    "SELECT c.oid::regclass::text, c.oid, c.xmin::text FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
    "WHERE n.nspname = 'alphapulse_encryption' OR c.relname LIKE 'encryption\\_%' ORDER BY 1"
)
# Dumped from a database that the program of the time before the schema had worked on, one table for each stage.
BEGUN_BEFORE = Path(__file__).with_name("begun_before.sql")
STAGES = {
    name: support.table(name, support.searchable("secret", f"idx_{name}_secret"), "other")
    for name in ("begun", "half", "switched", "dropped")
}
CATALOGUE = Catalogue(tables=tuple(STAGES.values()))


def ensure(url: str, layout: Layout = LAYOUT) -> None:
    with Database(url).session("begin") as connection:
        ensure_bookkeeping(connection, layout)


def objects(url: str) -> dict[str, str]:
    """Every object of ours, and its definition; from the catalog, by the package's own query alone."""
    public = [f"public.{name}" for name in (install.WATCHED, install.ASKED, install.CALLED)]
    with Database(url).session("look") as connection:
        found = read_objects(connection, SCHEMA, public)
    return {name: one.definition for name, one in sorted(found.items())}


@pytest.fixture
def before_url(database_url: str) -> str:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(BEGUN_BEFORE.read_bytes())
    return database_url


def test_made_once(database_url: str) -> None:
    ensure(database_url)
    before = run(database_url, OIDS)
    names = {name for name, *_ in before}
    assert {
        "alphapulse_encryption.ranges",
        "alphapulse_encryption.audit_log",
        "encryption_migrations",
    } <= names
    ensure(database_url)
    assert run(database_url, OIDS) == before
    versions = run(
        database_url, "SELECT version, name, applied_by FROM alphapulse_encryption.versions ORDER BY 1"
    )
    assert versions == [(file.number, file.name, "postgres") for file in LAYOUT.versions]


def test_made_by_many_at_once(database_url: str) -> None:
    with (
        support.Background(lambda: ensure(database_url)) as first,
        support.Background(lambda: ensure(database_url)) as second,
        support.Background(lambda: ensure(database_url)) as third,
    ):
        for one in (first, second, third):
            one.result()
    assert value(database_url, "SELECT count(*) FROM alphapulse_encryption.versions") == len(LAYOUT.versions)


def test_the_recorded_definition_is_what_the_files_make(database_url: str, tmp_path: Path) -> None:
    """What is written to the test's directory then belongs into the package: it is read before it is copied there."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        for file in LAYOUT.versions:
            connection.execute(file.text.encode())
    found = objects(database_url)
    (tmp_path / "definition.json").write_text(json.dumps(found, indent=1) + "\n")
    assert found == LAYOUT.definition, f"see {tmp_path}/definition.json"


def test_nothing_is_made_if_not_exists_or_over_something_else() -> None:
    for file in LAYOUT.versions:
        assert "IF NOT EXISTS" not in file.text
        assert "OR REPLACE" not in file.text or file.number > 3


_SQL_ON_OURS = re.compile(
    r"\b(FROM|INTO|UPDATE|JOIN|ONLY|TABLE|TRUNCATE)\s+(ONLY\s+)?alphapulse_encryption\.\w|\bpublic\.encryption_|"
    r"\bencryption_(" + "|".join(name for name in LAYOUT.relations if name != "columns") + r")\b"
)
# The library that applications import names the view that is made for it.
_ELSEWHERE = {"orm/phases.py"}


def test_only_the_bookkeeping_has_sql_on_its_tables() -> None:
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.parent.name != "bookkeeping" and str(path.relative_to(PACKAGE)) not in _ELSEWHERE
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if _SQL_ON_OURS.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ("CREATE TABLE encryption_migrations (version int)", "relation public.encryption_migrations exists"),
        ("CREATE VIEW encryption_tables AS SELECT 1 AS one", "relation public.encryption_tables exists"),
        (
            "CREATE FUNCTION encryption_report_key_usage(text) RETURNS bigint LANGUAGE sql AS 'SELECT 1::bigint'",
            "function public.encryption_report_key_usage",
        ),
        ("CREATE SCHEMA alphapulse_encryption", "schema alphapulse_encryption exists"),
        (
            "CREATE SCHEMA alphapulse_encryption CREATE TABLE alphapulse_encryption.ranges (x int)",
            "schema alphapulse_encryption exists",
        ),
    ],
)
def test_what_is_somebody_elses_is_refused_by_name(database_url: str, made: str, named: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, secret text)")
    run(database_url, made)
    before = run(database_url, OIDS)
    entry = support.table("notes", "secret")
    report = preflight.check(Database(database_url), [entry], None)
    assert any(re.search(named, found.message) for found in report.blockers)
    with pytest.raises(RefusedError, match=f"{named}.*nothing was changed"):
        support.add_columns(database_url, entry)
    assert run(database_url, OIDS) == before
    assert run(database_url, "SELECT 1 FROM pg_attribute WHERE attname = 'secret_encrypted'") == []


@pytest.mark.parametrize(
    ("done", "named"),
    [
        (
            "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
            "CREATE TRIGGER aaa BEFORE INSERT ON alphapulse_encryption.audit_log FOR EACH ROW EXECUTE FUNCTION f()",
            "trigger aaa on alphapulse_encryption.audit_log is not ours",
        ),
        (
            "CREATE RULE r AS ON INSERT TO alphapulse_encryption.audit_log DO INSTEAD NOTHING",
            "rule r on alphapulse_encryption.audit_log is not ours",
        ),
        (
            "CREATE POLICY p ON alphapulse_encryption.approvals",
            "policy p on alphapulse_encryption.approvals is not ours",
        ),
        (
            "ALTER TABLE alphapulse_encryption.approvals ALTER COLUMN database_role SET DEFAULT 'nobody'",
            "column alphapulse_encryption.approvals.database_role is another one",
        ),
        (
            "DROP TABLE alphapulse_encryption.verifications",
            "relation alphapulse_encryption.verifications is missing",
        ),
        (
            "DROP VIEW encryption_tables; CREATE TABLE encryption_tables (table_name text)",
            "relation public.encryption_tables is another one",
        ),
        (
            "CREATE ROLE stranger; ALTER TABLE alphapulse_encryption.approvals OWNER TO stranger",
            "relation alphapulse_encryption.approvals belongs to stranger and not to postgres",
        ),
        (
            "CREATE ROLE stranger LOGIN; ALTER TABLE alphapulse_encryption.approvals OWNER TO stranger",
            "relation alphapulse_encryption.approvals belongs to stranger, who could",
        ),
        (
            "CREATE FUNCTION alphapulse_encryption.f(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1'; "
            "CREATE INDEX i ON alphapulse_encryption.settings (alphapulse_encryption.f(name))",
            r"function alphapulse_encryption.f\(text\) is not ours; index i on alphapulse_encryption.settings is not",
        ),
        (
            "CREATE STATISTICS public.s ON (lower(name)), changed_by FROM alphapulse_encryption.settings",
            "statistics s on alphapulse_encryption.settings is not ours",
        ),
        (
            "ALTER TABLE alphapulse_encryption.settings ADD CHECK (name <> 'x') NOT VALID",
            "constraint settings_name_check on alphapulse_encryption.settings is not ours",
        ),
        (
            "CREATE TABLE public.more () INHERITS (alphapulse_encryption.approvals)",
            "relation alphapulse_encryption.approvals is another one",
        ),
        (
            "CREATE VIEW alphapulse_encryption.more AS SELECT 1 AS one",
            "relation alphapulse_encryption.more is not ours",
        ),
        (
            "CREATE SEQUENCE alphapulse_encryption.more",
            "relation alphapulse_encryption.more is not ours",
        ),
        (
            "CREATE DOMAIN alphapulse_encryption.more AS text CHECK (VALUE <> '')",
            "type alphapulse_encryption.more is not ours",
        ),
        (
            "CREATE OPERATOR alphapulse_encryption.=== (LEFTARG = text, RIGHTARG = text, FUNCTION = texteq)",
            r"operator alphapulse_encryption.===\(.*\) is not ours",
        ),
        (
            "ALTER DEFAULT PRIVILEGES IN SCHEMA alphapulse_encryption GRANT ALL ON TABLES TO PUBLIC",
            "default acl .* is not ours",
        ),
        (
            'ALTER TABLE alphapulse_encryption.settings ALTER changed_by TYPE text COLLATE "POSIX"',
            "column alphapulse_encryption.settings.changed_by is another one",
        ),
        (
            "ALTER TABLE alphapulse_encryption.approvals ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            "relation alphapulse_encryption.approvals is another one",
        ),
        (
            "ALTER VIEW encryption_tables SET (security_invoker = true)",
            "relation public.encryption_tables is another one",
        ),
    ],
)
def test_what_was_put_in_place_of_ours_is_refused_by_name(database_url: str, done: str, named: str) -> None:
    ensure(database_url)
    try:
        run(database_url, done)
        before = objects(database_url)
        with pytest.raises(RefusedError, match=f"{named}"):
            ensure(database_url)
        assert objects(database_url) == before
    finally:
        if "stranger" in done:
            run(database_url, "REASSIGN OWNED BY stranger TO postgres; DROP ROLE stranger")


@pytest.mark.parametrize(
    "done",
    [
        "CREATE OR REPLACE FUNCTION alphapulse_encryption.approval_is_final() RETURNS trigger LANGUAGE plpgsql "
        "AS 'BEGIN RETURN NEW; END'",
        "ALTER TABLE alphapulse_encryption.audit_log DISABLE TRIGGER append_only",
        "DROP TRIGGER approval_is_final ON alphapulse_encryption.approvals",
        "CREATE OR REPLACE TRIGGER setting_is_allowed BEFORE INSERT ON alphapulse_encryption.settings FOR EACH ROW "
        "EXECUTE FUNCTION alphapulse_encryption.setting_is_allowed()",
        "ALTER FUNCTION encryption_report_key_usage SECURITY INVOKER",
        "ALTER FUNCTION encryption_report_key_usage STRICT",
        "ALTER FUNCTION alphapulse_encryption.approval_is_final() STABLE",
    ],
)
def test_a_function_or_trigger_of_ours_that_differs_is_made_again(database_url: str, done: str) -> None:
    ensure(database_url)
    run(database_url, done)
    assert objects(database_url) != LAYOUT.definition
    ensure(database_url)
    assert objects(database_url) == LAYOUT.definition
    ((details,),) = run(database_url, "SELECT details FROM alphapulse_encryption.audit_log")
    assert len(details["objects"]) == 1


@pytest.fixture
def next_layout(database_url: str, tmp_path: Path) -> Layout:
    """As a later version of the program might be: one more column, and another body of a function."""
    directory = tmp_path / "sql"
    shutil.copytree(LAYOUT.directory, directory)
    (directory / f"{LAYOUT.latest + 1:04d}_next.sql").write_text(
        "ALTER TABLE alphapulse_encryption.settings ADD COLUMN why text;\n"
        "CREATE OR REPLACE FUNCTION alphapulse_encryption.audit_is_append_only() RETURNS trigger\n"
        "    LANGUAGE plpgsql SET search_path = pg_catalog AS $$\n"
        "BEGIN\n    RAISE EXCEPTION 'the audit log is only added to';\nEND $$;\n"
    )
    return Layout(directory)


def test_approvals_without_bounds_are_brought_within_them(database_url: str, tmp_path: Path) -> None:
    shutil.copytree(LAYOUT.directory, tmp_path / "sql")
    for file in (tmp_path / "sql").glob("000[5-9]_*.sql"):
        file.unlink()
    earlier = Layout(tmp_path / "sql")
    with psycopg.connect(database_url, autocommit=True) as connection:
        for text in earlier.missing(0):
            connection.execute(text.encode())
        connection.execute(
            "INSERT INTO alphapulse_encryption.backups (taken_at, location, bytes, sha256, recipient, listed_entries, "
            "verified_at, tables) VALUES (now(), '', 0, '', '', 0, now(), '{}')"
        )
        for approver, expires, verified in (
            ("Ada", "infinity", "infinity"),
            ("\x1b[2J", "2999-01-01", "-infinity"),
            ("Eva", "-infinity", "2001-01-01"),
            ("Bob", "tomorrow", "yesterday"),
        ):
            connection.execute(
                "INSERT INTO alphapulse_encryption.approvals (table_name, approver, reason, expires_at, definition, "
                "catalogue_entry, key_check, verified_at, backup_id) VALUES ('t', %s, 'why', %s, '', '', '', %s, 1)",
                [approver, expires, verified],
            )
    ensure(database_url)
    with Database(database_url).session("look") as connection:
        found = [(one.approver, one.state) for one in list_approvals(connection)]
    assert found == [("Bob", "open"), ("Eva", "revoked"), ("[2J", "revoked"), ("Ada", "revoked")]


def test_a_later_version_arrives(database_url: str, next_layout: Layout) -> None:
    ensure(database_url)
    run(database_url, "INSERT INTO alphapulse_encryption.audit_log (actor, action) VALUES ('tests', 'try')")
    with Database(database_url).session("look") as connection:
        (text,) = missing_bookkeeping(connection, next_layout)
        assert "ADD COLUMN why" in text
        # Nobody has recorded yet what it makes.
        with pytest.raises(RefusedError, match=r"column alphapulse_encryption.settings.why is not ours"):
            ensure_bookkeeping(connection, next_layout)
    assert value(database_url, "SELECT max(version) FROM alphapulse_encryption.versions") == LAYOUT.latest
    with psycopg.connect(database_url) as connection:
        connection.execute(next_layout.versions[-1].text.encode())
        connection.commit()
    made = objects(database_url)
    run(database_url, "ALTER TABLE alphapulse_encryption.settings DROP COLUMN why")
    (next_layout.directory / "definition.json").write_text(json.dumps(made))
    later = Layout(next_layout.directory)
    ensure(database_url, later)
    assert objects(database_url) == made
    with pytest.raises(psycopg.errors.RaiseException, match="only added to"):
        run(database_url, "DELETE FROM alphapulse_encryption.audit_log")
    with pytest.raises(RefusedError, match=r"is of version \d+, and this program knows \d+"):
        ensure(database_url)


def test_a_session_that_may_not_write_is_told_what_does(before_url: str) -> None:
    with Database(before_url, read_only=True).session("look") as connection:
        texts = missing_bookkeeping(connection)
        assert len(texts) == len(LAYOUT.versions)
        assert "ALTER TABLE public.%I SET SCHEMA" in texts[1]
        with pytest.raises(RefusedError, match=r"of an earlier version.*--roles-sql"):
            bookkeeping_exists(connection)


def _kept(url: str, names: dict[str, str]) -> dict[str, list[tuple[object, ...]]]:
    return {new: run(url, f"SELECT * FROM {old} ORDER BY 1, 2") for new, old in names.items()}


def test_the_layout_before_is_brought_up_to_date(before_url: str) -> None:
    new = ("columns", "versions", "operations")
    names = {name: f"public.encryption_{name}" for name in LAYOUT.relations if name not in new}
    kept = _kept(before_url, names | {"columns": "public.encryption_migrations"})
    assert all(
        kept[name] for name in ("audit_log", "approvals", "definitions", "quarantine", "key_usage", "columns")
    )
    run(
        before_url, "CREATE ROLE watcher; GRANT SELECT ON encryption_tables, encryption_migrations TO watcher"
    )
    run(before_url, "GRANT EXECUTE ON FUNCTION encryption_report_key_usage TO watcher")
    try:
        ensure(before_url)
        assert objects(before_url) == LAYOUT.definition
        now = _kept(before_url, {name: f"alphapulse_encryption.{name}" for name in kept})
        # Evidence has more columns, which are empty.
        assert {
            name: [row[: len(old)] for old, row in zip(kept[name], rows, strict=True)]
            for name, rows in now.items()
        } == kept
        assert not any(
            any(row[len(old) :])
            for name, rows in now.items()
            for old, row in zip(kept[name], rows, strict=True)
        )
        left = run(before_url, "SELECT relname FROM pg_class WHERE relname LIKE 'encryption\\_%' ORDER BY 1")
        assert left == [("encryption_migrations",), ("encryption_tables",)]
        functions = "SELECT proname FROM pg_proc WHERE proname LIKE 'encryption\\_%' AND proname !~ 'guard'"
        assert run(before_url, functions) == [("encryption_report_key_usage",)]
        run(
            before_url,
            "SET ROLE watcher; SELECT count(*) FROM public.encryption_tables, public.encryption_migrations",
        )
        called = "SET ROLE watcher; SELECT public.encryption_report_key_usage('test_context', 1, 3)"
        run(before_url, called)
        used = "SELECT messages FROM alphapulse_encryption.key_usage WHERE source = 'application'"
        assert value(before_url, used) == 80
        # The numbers of new rows go on.
        run(before_url, "INSERT INTO alphapulse_encryption.audit_log (actor, action) VALUES ('tests', 'try')")
        assert (
            value(before_url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
            == len(kept["audit_log"]) + 1
        )
    finally:
        run(before_url, "DROP OWNED BY watcher; DROP ROLE watcher")


def test_it_keeps_its_owner_whoever_brings_it_up_to_date(before_url: str) -> None:
    run(before_url, 'CREATE ROLE "The Keeper"; GRANT CREATE ON SCHEMA public TO "The Keeper"')
    try:
        run(
            before_url,
            """DO $$ DECLARE name text; BEGIN
            FOR name IN SELECT oid::regclass::text FROM pg_class WHERE relname LIKE 'encryption\\_%' AND relkind = 'r'
            LOOP EXECUTE format('ALTER TABLE %s OWNER TO "The Keeper"', name); END LOOP;
            FOR name IN SELECT oid::regprocedure::text FROM pg_proc
                WHERE proname LIKE 'encryption\\_%' AND proname !~ 'guard'
            LOOP EXECUTE format('ALTER FUNCTION %s OWNER TO "The Keeper"', name); END LOOP; END $$""",
        )
        ensure(before_url)
        owners = (
            "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class c WHERE relkind IN ('r', 'v') AND "
            "(relnamespace = 'alphapulse_encryption'::regnamespace OR relname IN ('encryption_migrations', "
            "'encryption_tables')) UNION SELECT pg_get_userbyid(proowner) FROM pg_proc "
            "WHERE proname IN ('encryption_report_key_usage', 'approval_is_final')"
        )
        assert run(before_url, owners) == [("The Keeper",)]
    finally:
        run(before_url, 'REASSIGN OWNED BY "The Keeper" TO postgres')
        run(before_url, 'DROP OWNED BY "The Keeper"; DROP ROLE "The Keeper"')


def test_every_stage_of_the_layout_before_goes_on(before_url: str) -> None:
    target = support.target(before_url, catalogue=CATALOGUE)
    # The guards of that time keep the application's writes in step; the steps ask for those of now.
    for name in ("half", "switched"):
        with pytest.raises(RefusedError, match=f"guard of {name}"):
            (backfill_range if name == "half" else verify_range)(target, STAGES[name], 1)
        add_encrypted_columns(target, STAGES[name], batch_ranges=2)
    backfill_range(target, STAGES["half"], 1)
    assert support.assert_encrypted(before_url, STAGES["half"]) == 16
    add_encrypted_columns(target, STAGES["begun"], batch_ranges=2)
    for number in range(2):
        backfill_range(target, STAGES["begun"], number)
    assert support.assert_encrypted(before_url, STAGES["begun"]) == 16
    run(before_url, "UPDATE half SET secret = 'changed' WHERE id = 1")
    assert value(before_url, "SELECT secret_encrypted IS NULL FROM half WHERE id = 1")
    backfill_range(target, STAGES["half"], 0)
    assert support.assert_encrypted(before_url, STAGES["half"]) == 16
    with Database(before_url).session("look") as connection:
        assert read_limits(connection).batch_size == 500
        assert [a.is_open for a in list_approvals(connection)] == [False, False]
    for number in range(2):
        verify_range(target, STAGES["switched"], number)
    with Database(before_url).session("look") as connection:
        assert verify_table(connection, STAGES["switched"], KEYS).passed
    # What was saved before there were MACs is shown to somebody, who signs it.
    with pytest.raises(RefusedError, match=r"saved at a drop of dropped.*not authenticated"):
        restore_plaintext(target, STAGES["dropped"], hold=False)
    with pytest.raises(RefusedError, match=r"set aside of switched.*not authenticated"):
        revert_to_plaintext(target, STAGES["switched"])
    found = saved.unsigned(target, STAGES.values())
    assert {(each.kind.table, each.row["table_name"]) for each in found.rows} == {
        ("tables", "switched"),
        ("tables", "dropped"),
        ("definitions", "dropped"),
    }
    assert '"other": "1"' in "".join(map(str, found.rows))
    assert found.digest is not None
    saved.sign(target, STAGES.values(), found.digest)
    assert saved.unsigned(target, STAGES.values()).rows == ()
    revert_to_plaintext(target, STAGES["switched"])
    restore_plaintext(target, STAGES["dropped"], hold=False)
    assert run(before_url, "SELECT id, secret FROM dropped ORDER BY 1") == [
        (i, f"dropped {i}") for i in range(1, 9)
    ]


def test_a_planted_layout_before_is_refused(before_url: str) -> None:
    run(
        before_url,
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER aaa BEFORE INSERT ON encryption_settings FOR EACH ROW EXECUTE FUNCTION f()",
    )
    before = run(before_url, OIDS)
    with pytest.raises(RefusedError, match=r"trigger aaa on public\.encryption_settings is not ours"):
        ensure(before_url)
    assert run(before_url, OIDS) == before
