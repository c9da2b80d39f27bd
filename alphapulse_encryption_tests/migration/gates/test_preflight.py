"""The checklist: each thing that can be wrong is provoked once, and found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table, load_catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, MigrationError, RefusedError
from alphapulse_encryption.migration.gates.backup import take_backup
from alphapulse_encryption.migration.gates.findings import Finding
from alphapulse_encryption.migration.gates.preflight import PreflightReport, check, refuse_blockers
from alphapulse_encryption.migration.insight.live_check import live_check
from alphapulse_encryption.migration.insight.query_benchmark import benchmark_queries
from alphapulse_encryption.migration.postgres.database import LOG_SETTINGS, Database
from alphapulse_encryption.migration.rows.engine import RowsQuarantined
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.dependants import stops_of_the_drop
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import KEYS, OTHER_KEYS, run

ENTRY = support.table("notes", support.searchable("mail", "idx_mail"), "secret")
ROLE = "preflight_tester"


def report(url: str, *entries: Table, keys: KeyRing = KEYS) -> PreflightReport:
    return check(Database(url), entries or (ENTRY,), keys)


def found(of: PreflightReport, level: str, subject: str) -> list[str]:
    return [f.message for f in of.findings if (f.level, f.subject) == (level, subject)]


def to_type(message: str, begin: str = "") -> str:
    """What a message has in brackets, to be typed; it begins so."""
    text = message[message.index(f"({begin or 'ALTER'}" if begin or "(ALTER" in message else "(DROP") + 1 :]
    depth = 1
    for end, sign in enumerate(text):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth == 0:
            return text[:end]
    raise AssertionError(message)


def state(url: str) -> list[support.Row]:
    """Everything that the server has in its catalogue of relations, columns and triggers."""
    return [
        *run(url, "SELECT oid, xmin::text, relname FROM pg_class WHERE oid >= 16384 ORDER BY oid"),
        *run(
            url,
            "SELECT attrelid, xmin::text, attname FROM pg_attribute WHERE attrelid >= 16384 ORDER BY 1, attnum",
        ),
        *run(url, "SELECT oid, xmin::text, tgname FROM pg_trigger ORDER BY oid"),
    ]


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret numeric, other text)")
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i, i, 'x' FROM generate_series(1, 100) AS i")
    run(database_url, "ANALYZE notes")
    return database_url


def may_begin(url: str) -> tuple[str, str]:
    """What lets the role make the bookkeeping."""
    database = support.value(url, "SELECT quote_ident(current_database())")
    return f"GRANT CREATE ON DATABASE {database} TO {ROLE}", f"GRANT CREATE ON SCHEMA public TO {ROLE}"


@contextlib.contextmanager
def role(url: str, *grants: str) -> Iterator[str]:
    """The address for a role that owns nothing; roles belong to the whole server."""
    with support.application(url) as connection:
        connection.execute(f"CREATE ROLE {ROLE} LOGIN".encode())
        try:
            for grant in grants:
                connection.execute(grant.encode())
            yield url.replace(f"//{urlsplit(url).username or 'postgres'}@", f"//{ROLE}@", 1)
        finally:
            connection.execute(f"REASSIGN OWNED BY {ROLE} TO postgres".encode())
            connection.execute(f"DROP OWNED BY {ROLE}".encode())
            connection.execute(f"DROP ROLE {ROLE}".encode())


def test_nothing_is_wrong_and_nothing_is_changed(notes_url: str) -> None:
    before = state(notes_url)
    result = report(notes_url)
    assert result.blockers == ()
    assert {finding.subject for finding in result.warnings} <= {"privileges", "backup", "disk", "server"}
    assert found(result, "ok", "notes") == ["about 100 rows, 2 columns to encrypt, key (id)"]
    assert found(result, "ok", "key")
    assert found(result, "ok", "server")[0].startswith("PostgreSQL 18")
    assert state(notes_url) == before


def test_the_sample_has_no_blocker(sample_url: str) -> None:
    result = check(Database(sample_url), load_catalogue().tables, KEYS)
    assert result.blockers == ()
    assert result.rows == 3_000
    sizes = support.value(
        sample_url,
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname = ANY(%s) AND relkind = 'r'",
        list(load_catalogue().keys),
    )
    assert result.current_bytes == int(sizes)
    before = int(sizes)
    for table in load_catalogue().tables:
        support.encrypt(sample_url, table)
    grown = support.value(
        sample_url,
        "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relname = ANY(%s) AND relkind = 'r'",
        list(load_catalogue().keys),
    )
    assert 0.5 < result.growth_bytes / (int(grown) - before) < 4


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("DROP TABLE notes", "not in the database"),
        ('ALTER TABLE notes RENAME TO "Notes"', "not in the database"),
        ("ALTER TABLE notes DROP COLUMN secret", "has no column secret"),
        ("ALTER TABLE notes DROP CONSTRAINT notes_pkey", "has no primary key"),
        (
            "ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD PRIMARY KEY (id, mail)",
            "part of the primary key",
        ),
        (
            "ALTER TABLE notes DROP secret; ALTER TABLE notes ADD secret int GENERATED ALWAYS AS (id * 2) STORED",
            "generated or identity column",
        ),
    ],
)
def test_catalogue_and_database_disagree(notes_url: str, statement: str, message: str) -> None:
    run(notes_url, "CREATE TABLE fine (id int PRIMARY KEY, v text)")
    run(notes_url, statement)
    result = report(notes_url, ENTRY, support.table("fine", "v"))
    assert len(result.blockers) == 1
    assert message in found(result, "blocker", "notes")[0]
    assert found(result, "ok", "fine")  # the others are looked at all the same


def test_columns_that_an_insert_fills_by_itself(notes_url: str) -> None:
    run(notes_url, "CREATE DOMAIN nothing AS text DEFAULT ''")
    run(
        notes_url,
        "ALTER TABLE notes ALTER secret SET DEFAULT 0, ALTER mail TYPE nothing, ALTER other SET DEFAULT 1",
    )
    [message] = found(report(notes_url), "warning", "notes")
    assert message.startswith("mail, secret have a default.")
    assert "inserts the ciphertext alone" in message
    run(notes_url, "ALTER TABLE notes ALTER secret DROP DEFAULT, ALTER mail TYPE text")
    assert found(report(notes_url), "warning", "notes") == []


@pytest.mark.parametrize(
    ("type_", "default", "warned"),
    [
        ("varchar(40)", "NULL::character varying", False),
        ("numeric(10,2)", "NULL::numeric", False),
        ("text[]", "NULL::text[]", False),
        ("nothing", "NULL::nothing", False),
        ("nothing", None, True),
        ("text", "NULL::text || current_user", True),
        ("text", "coalesce(NULL::text, 'x')", True),
        ("boolean", "NULL::text IS NULL", True),
    ],
)
def test_a_default_that_is_null_is_none(
    notes_url: str, type_: str, default: str | None, warned: bool
) -> None:
    run(notes_url, "CREATE DOMAIN nothing AS text DEFAULT ''")
    given = "" if default is None else f"DEFAULT ({default})"
    run(notes_url, f"ALTER TABLE notes DROP mail; ALTER TABLE notes ADD mail {type_} {given}")
    told = found(report(notes_url), "warning", "notes")
    assert [message.startswith("mail has a default.") for message in told] == [True] * warned


def test_money_is_encrypted_in_one_form_and_warned_of(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret money)")
    run(database_url, "INSERT INTO notes VALUES (1, 'm', 1234.56), (2, 'm', -0.5)")
    (warning,) = found(report(database_url), "warning", "notes.secret")
    assert "is of the type money" in warning
    support.encrypt(database_url, ENTRY)
    envelopes = support.texts(database_url, ENTRY, "secret_encrypted")
    values = {key: support.opened(str(envelope), "test_context") for key, envelope in envelopes.items()}
    assert values == {("1",): "$1,234.56", ("2",): "-$0.50"}
    assert support.verify(database_url, ENTRY).passed


def test_partitioned_table(database_url: str) -> None:
    run(
        database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret int) PARTITION BY RANGE (id)"
    )
    run(database_url, "CREATE TABLE notes_1 PARTITION OF notes FOR VALUES FROM (1) TO (100)")
    assert report(database_url).blockers == ()
    assert found(report(database_url), "ok", "notes")
    assert found(report(database_url), "warning", "notes") == []


def test_columns_and_rows_without_room(database_url: str) -> None:
    wide = support.table("wide", *(f"c{i}" for i in range(250)))
    columns = ", ".join(f"c{i} text" for i in range(250))
    run(database_url, f"CREATE TABLE wide (id int PRIMARY KEY, {columns})")
    (message,) = [
        m for m in found(report(database_url, wide), "warning", "wide") if "all of them filled" in m
    ]
    assert "8,160" in message
    # It is true: such a row is set aside, and the others are not.
    values = ", ".join("repeat(md5(random()::text), 200)" for _ in range(250))
    run(database_url, f"INSERT INTO wide VALUES (1, {values})")
    run(database_url, "INSERT INTO wide (id, c0) VALUES (2, 'x')")
    with pytest.raises(RowsQuarantined, match=r"key \(1\)"):
        support.encrypt(database_url, wide)
    assert run(database_url, "SELECT id FROM wide WHERE c0_encrypted IS NOT NULL") == [(2,)]

    narrow = support.table("narrow", "c0")
    run(database_url, "CREATE TABLE narrow (id int PRIMARY KEY, c0 text)")
    for batch in range(8):
        names = [f"d{batch}_{i}" for i in range(200 if batch < 7 else 198)]
        for word in ("ADD COLUMN {} int", "DROP COLUMN {}"):
            run(database_url, "ALTER TABLE narrow " + ", ".join(word.format(name) for name in names))
    (blocker,) = found(report(database_url, narrow), "blocker", "narrow")
    assert "1,600" in blocker
    with pytest.raises(ConfigurationError, match="1,600 columns, dropped ones included"):
        support.add_columns(database_url, narrow)


def test_another_key(notes_url: str) -> None:
    support.add_columns(notes_url, ENTRY)
    assert report(notes_url).blockers == ()
    [blocker] = report(notes_url, keys=OTHER_KEYS).blockers
    assert blocker.subject == "key"
    assert "not the one this database was begun with" in blocker.message


def test_role_that_does_not_own_the_table(notes_url: str) -> None:
    with role(notes_url, f"GRANT SELECT, UPDATE ON notes TO {ROLE}", *may_begin(notes_url)) as url:
        [message] = found(report(url), "blocker", "notes")
        assert "by the table's owner only" in message
        # What it says is what helps.
        run(notes_url, to_type(message, "GRANT"))
        assert report(url).blockers == ()
        run(notes_url, f"REVOKE postgres FROM {ROLE}")
        run(notes_url, f"ALTER TABLE notes OWNER TO {ROLE}")
        assert report(url).blockers == ()


def test_role_that_may_not_create_the_bookkeeping(notes_url: str) -> None:
    with role(notes_url, f"ALTER TABLE notes OWNER TO {ROLE}") as url:
        (message,) = found(report(url), "blocker", "privileges")
        run(notes_url, message[message.index("GRANT") : message.index(", or what")])
        assert found(report(url), "blocker", "privileges") == []


def test_row_level_security(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes ENABLE ROW LEVEL SECURITY")
    with role(notes_url, f"GRANT ALL ON notes TO {ROLE}", *may_begin(notes_url)) as url:

        def hidden() -> bool:
            return any("row-level security" in message for message in found(report(url), "blocker", "notes"))

        assert hidden()
        run(notes_url, f"ALTER TABLE notes OWNER TO {ROLE}")
        assert not hidden()  # the owner sees all rows,
        run(notes_url, "ALTER TABLE notes FORCE ROW LEVEL SECURITY")
        assert hidden()  # unless even he is subject to it
        (message,) = [m for m in found(report(url), "blocker", "notes") if "row-level security" in m]
        run(notes_url, to_type(message, "ALTER ROLE"))
        assert not hidden()
    assert report(notes_url).blockers == ()  # a superuser


DEPENDANTS = [
    ("CREATE VIEW names AS SELECT id, mail FROM notes", "mail", "view public.names"),
    (
        "CREATE MATERIALIZED VIEW sums AS SELECT sum(secret) FROM notes",
        "secret",
        "materialized view public.sums",
    ),
    ("CREATE INDEX by_secret ON notes (secret)", "secret", "index public.by_secret"),
    ("CREATE INDEX by_lower ON notes (lower(mail))", "mail", "index public.by_lower"),
    ("CREATE INDEX certain ON notes (id) WHERE secret > 5", "secret", "index public.certain"),
    (
        "ALTER TABLE notes ADD CONSTRAINT positive CHECK (secret > 0)",
        "secret",
        "constraint positive on table public.notes",
    ),
    (
        "ALTER TABLE notes ADD CONSTRAINT one_mail UNIQUE (mail)",
        "mail",
        "constraint one_mail on table public.notes",
    ),
    (
        "ALTER TABLE notes ADD UNIQUE (mail); CREATE TABLE likes (mail text REFERENCES notes (mail))",
        "mail",
        "constraint likes_mail_fkey on table public.likes",
    ),
    (
        "CREATE TABLE mails (m text PRIMARY KEY); "
        "ALTER TABLE notes ADD CONSTRAINT known FOREIGN KEY (mail) REFERENCES mails NOT VALID",
        "mail",
        "constraint known on table public.notes",
    ),
    (
        "ALTER TABLE notes ADD half numeric GENERATED ALWAYS AS (secret / 2) STORED",
        "secret",
        "generated column half of table public.notes",
    ),
    ("CREATE POLICY mine ON notes USING (mail = current_user)", "mail", "policy mine on table public.notes"),
    (
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER watch AFTER UPDATE OF secret ON notes FOR EACH ROW EXECUTE FUNCTION f()",
        "secret",
        "trigger watch on table public.notes",
    ),
    (
        "CREATE STATISTICS both_columns ON mail, secret FROM notes",
        "mail",
        "statistics object public.both_columns",
    ),
]


@pytest.mark.parametrize(("statement", "column", "what"), DEPENDANTS, ids=[what for _, _, what in DEPENDANTS])
def test_dependants(notes_url: str, statement: str, column: str, what: str) -> None:
    for part in statement.split("; ") if "BEGIN" not in statement else [statement]:
        run(notes_url, part)
    messages = found(report(notes_url), "warning", f"notes.{column}")
    (message,) = [text for text in messages if what in text]
    # PostgreSQL says which of them it would give up with the column.
    try:
        run(notes_url, f"ALTER TABLE notes DROP COLUMN {column}")
    except psycopg.errors.DependentObjectsStillExist:
        assert message.startswith(f"{what} depends on the plaintext column and stops its drop")
        # What it says is what helps.
        run(notes_url, to_type(message))
        assert not any(what in text for text in found(report(notes_url), "warning", f"notes.{column}"))
    else:
        assert message.startswith("goes at the drop with ") and "--restore-plaintext" in message


def test_what_is_ours_is_no_dependant(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes ALTER mail SET DEFAULT 'x', ALTER mail SET NOT NULL")
    run(notes_url, "CREATE INDEX by_other ON notes (other)")
    support.encrypt(notes_url, ENTRY)
    result = report(notes_url)
    assert [finding for finding in result.findings if finding.subject.startswith("notes.")] == []
    # Nor is what the switch puts in the place of NOT NULL.
    build_search_indexes(Database(notes_url), ENTRY, support.ACTOR)
    assert support.verify(notes_url, ENTRY).passed
    switch_to_ciphertext(support.target(notes_url), ENTRY)
    result = report(notes_url)
    assert [finding for finding in result.findings if finding.subject.startswith("notes.")] == []


def test_a_backup_counts_for_the_tables_that_it_holds(
    notes_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    run(notes_url, "CREATE TABLE others (id int PRIMARY KEY, body text)")
    other = support.table("others", "body")
    support.encrypt(notes_url, ENTRY)
    take_backup(support.target(notes_url), (ENTRY,), directory=tmp_path, bin_dirs=[postgres.bin_dir()])
    assert not found(report(notes_url, ENTRY), "warning", "backup")
    (warning,) = found(report(notes_url, ENTRY, other), "warning", "backup")
    assert "others" in warning and "notes" not in warning


def test_uniqueness_that_cannot_be_carried(notes_url: str) -> None:
    run(notes_url, "CREATE UNIQUE INDEX one_secret ON notes (secret)")
    run(notes_url, "CREATE UNIQUE INDEX one_mail ON notes (mail)")
    messages = [m for m in found(report(notes_url), "warning", "notes") if "carried over" in m]
    assert len(messages) == 1
    assert "one_secret" in messages[0]


@pytest.mark.parametrize(
    ("settings", "parameter", "says"),
    [
        (
            {"log_min_duration_statement": "0", "log_parameter_max_length": "-1"},
            "log_parameter_max_length",
            "logs statements with their parameters",
        ),
        (
            {"log_statement": "mod", "log_parameter_max_length": "8"},
            "log_parameter_max_length",
            "logs statements with their parameters",
        ),
        ({"log_min_messages": "warning"}, "log_min_messages", "logs its errors"),
        (
            {"auto_explain.log_min_duration": "0"},
            "auto_explain.log_min_duration",
            "auto_explain logs plans",
        ),
        (
            {"pgaudit.log": "write", "pgaudit.log_parameter": "on"},
            "pgaudit.log_parameter",
            "pgaudit logs the parameters",
        ),
    ],
)
def test_logging_that_this_role_cannot_turn_off(
    notes_url: str, settings: dict[str, str], parameter: str, says: str
) -> None:
    support.with_settings(notes_url, settings)
    assert found(report(notes_url), "ok", "logging")  # a superuser's sessions leave no values
    with role(notes_url, *may_begin(notes_url), f"ALTER TABLE notes OWNER TO {ROLE}") as url:
        (warning,) = found(report(url), "warning", "logging")
        assert says in warning
        for remedy in (
            f'GRANT SET ON PARAMETER {parameter} TO "{ROLE}"',
            f'ALTER ROLE "{ROLE}" SET {parameter} = ',
        ):
            assert remedy in warning
            # What it says is what helps.
            run(notes_url, remedy + (LOG_SETTINGS[parameter] if remedy.endswith("= ") else ""))
            assert found(report(url), "ok", "logging")
            run(
                notes_url,
                f"REVOKE SET ON PARAMETER {parameter} FROM {ROLE}"
                if remedy.startswith("GRANT")
                else f"ALTER ROLE {ROLE} RESET {parameter}",
            )
            assert found(report(url), "ok", "logging") == []


def test_long_transaction(notes_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alphapulse_encryption.migration.gates.preflight.LONG_TRANSACTION", timedelta(0))
    with support.application(notes_url, autocommit=False) as connection:
        connection.execute("SELECT 1 FROM notes")
        messages = found(report(notes_url), "warning", "long transaction")
        (message,) = [text for text in messages if f"process {connection.info.backend_pid} " in text]
        run(notes_url, to_type(message, "SELECT"))
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert found(report(notes_url), "warning", "long transaction") == []


def test_backup(notes_url: str) -> None:
    assert "no verified backup" in found(report(notes_url), "warning", "backup")[0]
    support.add_columns(notes_url, ENTRY)
    insert = (
        "INSERT INTO alphapulse_encryption.backups (taken_at, location, bytes, sha256, recipient, listed_entries, "
        "verified_at, tables) VALUES (now() - %s * interval '1 hour', 'x', 1, 'x', 'x', 1, now(), '{notes}')"
    )
    run(notes_url, insert, 25)
    assert "no verified backup" in found(report(notes_url), "warning", "backup")[0]
    run(notes_url, insert, 23)
    assert found(report(notes_url), "ok", "backup")[0].startswith("verified")


def test_how_a_finding_is_shown() -> None:
    shown = [str(Finding(level, "notes", "is so")) for level in ("ok", "warning", "blocker")]
    assert shown == ["✓ notes: is so", "! notes: is so", "✗ notes: is so"]


TOUCH = """
CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.other := 1; RETURN NEW; END';
CREATE TRIGGER "a touch" BEFORE UPDATE ON notes FOR EACH ROW {} EXECUTE FUNCTION touch()
"""


@pytest.mark.parametrize(
    ("when", "always", "told"),
    [
        ("", True, True),
        ("WHEN (OLD.id > 0)", True, True),
        (
            "WHEN (current_setting('alphapulse_encryption.writer', true) IS DISTINCT FROM 'engine')",
            True,
            False,
        ),
        ("", False, False),
    ],
)
def test_triggers_that_our_writes_fire(notes_url: str, when: str, always: bool, told: bool) -> None:
    run(notes_url, TOUCH.format(when))
    if always:
        run(notes_url, 'ALTER TABLE notes ENABLE ALWAYS TRIGGER "a touch"')
    # For these columns alone, or disabled: they do not.
    run(notes_url, "CREATE TRIGGER b BEFORE UPDATE OF mail ON notes FOR EACH ROW EXECUTE FUNCTION touch()")
    run(notes_url, "CREATE TRIGGER c BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION touch()")
    run(notes_url, "ALTER TABLE notes DISABLE TRIGGER c")
    messages = [m for m in found(report(notes_url), "warning", "notes") if "fires for every row that" in m]
    assert [m.split(" (function")[0] for m in messages] == (["the trigger a touch"] if told else [])
    assert all('DISABLE TRIGGER "a touch"' in message for message in messages)
    support.encrypt(notes_url, ENTRY)
    assert run(notes_url, "SELECT DISTINCT other FROM notes") == [("1" if told else "x",)]


READS = {
    "by_name": ("sql", "SELECT mail FROM notes WHERE id = 1"),
    "by_another": ("plpgsql", 'BEGIN RETURN (SELECT n."SECRET" FROM public.Notes n LIMIT 1); END'),
    "of_the_rest": ("plpgsql", "BEGIN RETURN (SELECT other FROM notes LIMIT 1); END"),
    "of_a_longer_name": ("plpgsql", "BEGIN RETURN (SELECT mailing FROM notes_2 LIMIT 1); END"),
}


def test_functions_that_name_a_column_in_their_text(notes_url: str) -> None:
    for name, (language, body) in READS.items():
        run(notes_url, f"CREATE FUNCTION {name}() RETURNS text LANGUAGE {language} AS $$ {body} $$")
    messages = [m for m in found(report(notes_url), "warning", "notes") if "in its text" in m]
    assert [m.split(" in its text")[0] for m in messages] == [
        "the function public.by_another() names the table and secret",
        "the function public.by_name() names the table and mail",
    ]
    support.add_columns(notes_url, ENTRY)
    again = [m for m in found(report(notes_url), "warning", "notes") if "in its text" in m]
    assert again == messages  # none of ours


@pytest.mark.parametrize(
    ("constraint", "told"),
    [
        ("CHECK (other <> 'x') NOT VALID", True),
        ("CHECK (mail <> 'm3') NOT VALID", True),
        ("CHECK (other <> 'x') NOT VALID NO INHERIT", True),
        ("NOT NULL mail NOT VALID", True),
        ("CHECK (mail <> 'm3') NOT ENFORCED", False),
        ("CHECK (mail <> 'never')", False),
    ],
)
def test_a_constraint_that_rows_may_break_is_told(notes_url: str, constraint: str, told: bool) -> None:
    run(notes_url, "UPDATE notes SET mail = NULL WHERE id = 5")
    run(notes_url, f"ALTER TABLE notes ADD CONSTRAINT strict {constraint}")
    messages = [m for m in found(report(notes_url), "warning", "notes") if "is NOT VALID: a row" in m]
    assert [m.split(" is NOT VALID")[0] for m in messages] == ["the constraint strict"] * told
    support.add_columns(notes_url, ENTRY)
    if told:
        with pytest.raises(RowsQuarantined, match=r"strict|column mail"):
            support.backfill(notes_url, ENTRY)
    else:
        support.backfill(notes_url, ENTRY)


def test_privileges_on_single_columns(notes_url: str) -> None:
    with role(notes_url, f"GRANT SELECT (id, mail), UPDATE (mail) ON notes TO {ROLE}"):
        run(notes_url, "GRANT INSERT (secret) ON notes TO PUBLIC")
        (mail,) = found(report(notes_url), "warning", "notes.mail")
        assert f"{ROLE} has SELECT, UPDATE on this column" in mail
        (secret,) = found(report(notes_url), "warning", "notes.secret")
        assert "PUBLIC has INSERT on this column" in secret
        support.add_columns(notes_url, ENTRY)
        for message in (mail, secret):
            run(notes_url, to_type(message, "GRANT"))
        ((granted,),) = run(
            notes_url,
            "SELECT has_column_privilege(%s, 'notes', 'mail_search', 'SELECT') "
            "AND has_column_privilege(%s, 'notes', 'mail_encrypted', 'UPDATE') "
            "AND has_column_privilege(%s, 'notes', 'secret_encrypted', 'INSERT')",
            *[ROLE] * 3,
        )
        assert granted
        # Whoever may do so with the whole table may with the columns to come.
        run(notes_url, f"GRANT SELECT, UPDATE ON notes TO {ROLE}")
        assert found(report(notes_url), "warning", "notes.mail") == []


def test_triggers_that_a_role_may_not_pass_over(notes_url: str) -> None:
    run(notes_url, TOUCH.format(""))
    run(notes_url, "CREATE RULE kept AS ON UPDATE TO notes DO INSTEAD NOTHING")
    with role(notes_url, *may_begin(notes_url), f"ALTER TABLE notes OWNER TO {ROLE}") as url:
        (message,) = [m for m in found(report(url), "warning", "notes") if "fires for every row that" in m]
        assert "the trigger a touch" in message
        grant = f'GRANT SET ON PARAMETER session_replication_role TO "{ROLE}"'
        assert grant in message
        (blocker,) = found(report(url), "blocker", "notes")
        assert "the rule kept" in blocker and "DISABLE RULE" in blocker
        # What it says is what helps.
        run(notes_url, grant)
        kept, touch = sorted(found(report(url), "warning", "notes"))
        assert "the rule kept" in kept and "the trigger a touch" in touch
        assert all("a restore" in message for message in (kept, touch))
        assert found(report(url), "blocker", "notes") == []
        support.encrypt(url, ENTRY)
        assert run(notes_url, "SELECT DISTINCT other FROM notes") == [("x",)]
        assert support.assert_encrypted(notes_url, ENTRY)


@pytest.mark.parametrize("tables", ["TABLE notes", "TABLE notes (id, other)", "ALL TABLES"])
def test_what_is_published(notes_url: str, tables: str) -> None:
    assert found(report(notes_url), "warning", "notes") == []
    run(notes_url, f"CREATE PUBLICATION feed FOR {tables}")
    (message,) = found(report(notes_url), "warning", "notes")
    assert "published by feed" in message and "subscriber" in message


def test_the_columns_to_come_are_added_to_a_publication_s_list(notes_url: str) -> None:
    run(notes_url, 'CREATE TABLE "Others" (id int PRIMARY KEY, body text)')
    run(notes_url, 'CREATE PUBLICATION "Two" FOR TABLE notes (id, mail) WHERE (id > 5), TABLE "Others"')
    messages = found(report(notes_url), "warning", "notes")
    (message,) = [text for text in messages if "with a list of columns" in text]
    support.add_columns(notes_url, ENTRY)
    run(notes_url, message[message.index("BEGIN;") : message.index("COMMIT")] + "COMMIT")
    query = "SELECT tablename, attnames::text[], rowfilter FROM pg_publication_tables ORDER BY 1"
    columns = ["id", "mail", "mail_encrypted", "mail_search", "secret_encrypted"]
    assert [(name, sorted(names), rows) for name, names, rows in run(notes_url, query)] == [
        ("Others", ["body", "id"], None),
        ("notes", columns, "(id > 5)"),
    ]


def test_a_foreign_key_that_a_null_passes(notes_url: str) -> None:
    run(notes_url, "CREATE TABLE mails (m text PRIMARY KEY); INSERT INTO mails SELECT mail FROM notes")
    run(notes_url, 'ALTER TABLE notes ADD CONSTRAINT "To mails" FOREIGN KEY (mail) REFERENCES mails')
    (message,) = found(report(notes_url), "warning", "notes")
    assert "foreign key To mails" in message and "whose mail is NULL" in message and "public.mails" in message
    run(notes_url, 'ALTER TABLE notes DROP CONSTRAINT "To mails"')
    run(notes_url, "ALTER TABLE notes ADD FOREIGN KEY (other) REFERENCES mails NOT VALID")
    assert found(report(notes_url), "warning", "notes") == []


def test_indexes_that_an_interrupted_build_left(notes_url: str) -> None:
    run(notes_url, "CREATE INDEX by_other ON notes (other)")
    run(notes_url, 'CREATE INDEX "By mail" ON notes (mail); CREATE INDEX by_other_ccnew ON notes (other)')
    assert not [m for m in found(report(notes_url), "warning", "notes") if "invalid" in m]
    run(
        notes_url,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid IN ('\"By mail\"'::regclass, "
        "'by_other_ccnew'::regclass)",
    )
    messages = [m for m in found(report(notes_url), "warning", "notes") if "invalid" in m]
    assert len(messages) == 2
    for message in messages:
        run(notes_url, message[message.index("Type ") + len("Type ") :].rstrip("."))
    assert not [m for m in found(report(notes_url), "warning", "notes") if "invalid" in m]
    left = run(
        notes_url,
        "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'notes'::regclass ORDER BY 1",
    )
    assert left == [('"By mail"',), ("by_other",), ("notes_pkey",)]


def test_autovacuum_that_is_off(notes_url: str) -> None:
    def told() -> list[str]:
        return [m for m in found(report(notes_url), "warning", "notes") if "autovacuum is off" in m]

    assert told() == []
    run(notes_url, "ALTER TABLE notes SET (autovacuum_enabled = off)")
    (message,) = told()
    run(notes_url, to_type(message))
    assert told() == []


@pytest.mark.parametrize(
    ("made", "says"),
    [
        ("CREATE VIEW shown AS SELECT * FROM notes", "it is a view"),
        ("CREATE MATERIALIZED VIEW shown AS SELECT * FROM notes", "it is a materialized view"),
        ("CREATE SEQUENCE shown", "put one in its place"),
        ("CREATE TYPE shown AS (id int, body text)", "put one in its place"),
    ],
)
def test_what_is_no_table(notes_url: str, made: str, says: str) -> None:
    run(notes_url, made)
    (message,) = found(report(notes_url, ENTRY, support.table("shown", "body")), "blocker", "shown")
    assert "public.shown" in message and "no table" in message and says in message


def test_a_blocker_hides_no_warning_and_the_worst_come_first(notes_url: str) -> None:
    run(notes_url, "CREATE INDEX by_secret ON notes (secret)")
    run(notes_url, "CREATE TABLE letters (stamp text) INHERITS (notes)")
    result = report(notes_url, ENTRY, support.table("absent", "body"))
    with pytest.raises(RefusedError) as refused:
        refuse_blockers(result)
    for finding in result.findings:
        assert str(finding) in refused.value.args[0]
    lines = result.lines
    of_notes = lines[lines.index("notes: 1 blocker, 1 warning") + 1 :]
    assert [line[2] for line in of_notes[:2]] == ["✗", "!"]
    assert lines[-1] == f"Next: {result.next}" and "--preflight" in result.next


def test_an_event_trigger_that_names_things_without_a_schema(notes_url: str) -> None:
    """It fires in our sessions, which find nothing of the application's by its name alone."""
    run(
        notes_url,
        "CREATE TABLE changes (what text); CREATE FUNCTION seen() RETURNS event_trigger LANGUAGE plpgsql AS "
        "$$BEGIN INSERT INTO changes VALUES (tg_tag); END$$",
    )
    run(notes_url, "CREATE EVENT TRIGGER look ON ddl_command_end EXECUTE FUNCTION seen()")
    (message,) = found(report(notes_url), "warning", "event triggers")
    assert "look" in message
    with pytest.raises(DatabaseFailure):
        support.add_columns(notes_url, ENTRY)
    # What it says is what helps.
    run(notes_url, message[message.index("ALTER FUNCTION") : message.rindex(")")])
    assert found(report(notes_url), "warning", "event triggers") == []
    support.encrypt(notes_url, ENTRY)
    assert run(notes_url, "SELECT count(*) > 0 FROM changes WHERE what = 'ALTER TABLE'") == [(True,)]


def test_an_event_trigger_that_refuses_is_named(notes_url: str) -> None:
    run(
        notes_url,
        "CREATE FUNCTION no_change() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN RAISE 'not today'; END$$",
    )
    run(notes_url, "CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION no_change()")
    with pytest.raises(DatabaseFailure, match=r"no_change\(\)") as caught:
        support.add_columns(notes_url, ENTRY)
    assert "today" not in str(caught.value)


def test_a_slot_that_nobody_reads(notes_url: str) -> None:
    run(notes_url, "SELECT pg_create_physical_replication_slot('forgotten', true)")
    try:
        (message,) = [m for m in found(report(notes_url), "warning", "replicas") if "slot forgotten" in m]
        run(notes_url, to_type(message, "SELECT"))
    finally:
        gone = run(notes_url, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'forgotten'")
        if gone != [(0,)]:
            run(notes_url, "SELECT pg_drop_replication_slot('forgotten')")
    assert gone == [(0,)]


def test_tables_that_inherit(notes_url: str) -> None:
    run(notes_url, "CREATE TABLE letters (stamp text) INHERITS (notes)")
    (message,) = found(report(notes_url), "blocker", "notes")
    assert "inherit" in message and "letters" in message
    run(notes_url, to_type(message))
    assert found(report(notes_url), "blocker", "notes") == []


def test_the_client_programs_of_a_backup_are_named_or_what_to_install(
    database_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    def told(place: Path) -> tuple[str, str]:
        report = check(Database(database_url), support.CATALOGUE.tables, None, bin_dirs=[place])
        (level, message), *_ = ((f.level, f.message) for f in report.findings if "pg_dump" in f.message)
        return level, message

    with psycopg.connect(database_url) as connection:
        version = connection.info.server_version // 10_000
    level, message = told(postgres.bin_dir())
    assert level == "ok" and str(postgres.bin_dir()) in message and f"version {version}" in message
    level, message = told(tmp_path)
    assert level == "warning" and f"postgresql-client-{version}" in message


def test_row_level_security_that_is_switched_on_between_two_steps(notes_url: str) -> None:
    """No step takes the rows that it sees for all rows."""
    with role(notes_url, *may_begin(notes_url), f"ALTER TABLE notes OWNER TO {ROLE}") as url:
        support.encrypt(url, ENTRY)
        assert support.verify(url, ENTRY).passed
        run(notes_url, "CREATE POLICY few ON notes USING (id < 10)")
        run(notes_url, "ALTER TABLE notes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
        run(notes_url, "UPDATE notes SET mail = 'pending' WHERE id = 50")
        for step_of_rows in (support.verify, support.backfill):
            with pytest.raises(MigrationError, match=r'"notes"(.|\n)*BYPASSRLS'):
                step_of_rows(url, ENTRY)
        for step in (switch_to_ciphertext, live_check, benchmark_queries):
            with pytest.raises(MigrationError, match=r'"notes"(.|\n)*BYPASSRLS'):
                step(support.target(url), ENTRY)
        assert found(report(url), "blocker", "notes")
        assert run(notes_url, "SELECT mail_encrypted FROM notes WHERE id = 50") == [(None,)]


def test_what_the_owner_could_not_make_again_stops_the_drop(notes_url: str) -> None:
    """A restore would end at it, after the drop; who is a superuser can make all of it again."""
    with support.application(notes_url) as connection:
        connection.execute("SET allow_in_place_tablespaces TO on")
        connection.execute("CREATE TABLESPACE of_somebody LOCATION ''")
    run(
        notes_url,
        "CREATE ROLE notes_owner LOGIN; ALTER TABLE notes OWNER TO notes_owner; CREATE SCHEMA closed; "
        "GRANT USAGE ON SCHEMA closed TO notes_owner; CREATE STATISTICS mine ON mail, secret FROM notes; "
        "GRANT CREATE ON SCHEMA public TO notes_owner; ALTER STATISTICS mine OWNER TO notes_owner; "
        "CREATE STATISTICS others ON mail, secret FROM notes; CREATE STATISTICS closed.kept ON mail, secret FROM notes;"
        "ALTER STATISTICS closed.kept OWNER TO notes_owner; "
        "CREATE INDEX elsewhere ON notes (secret) TABLESPACE of_somebody; CREATE INDEX here ON notes (secret)",
    )

    def stops(url: str) -> set[str]:
        with Database(url).session("look") as connection:
            return set(stops_of_the_drop(connection, read_table(connection, ENTRY)))

    before = stops(notes_url)
    own = stops(notes_url.replace("//postgres@", "//notes_owner@", 1))
    assert own - before == {
        "statistics object public.others",
        "statistics object closed.kept",
        "index public.elsewhere",
    }
    # A standby, which other tests make, cannot follow such a tablespace.
    run(notes_url, "DROP INDEX elsewhere")
    run(notes_url, "DROP TABLESPACE of_somebody")
