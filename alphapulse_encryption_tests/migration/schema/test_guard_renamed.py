"""The guard after what a database administrator does without asking: renames, moves, replication, another body."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.gates import preflight
from alphapulse_encryption.migration.insight.drift import look_for_drift
from alphapulse_encryption.migration.insight.status import read_status
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.schema.indexes import build_search_indexes
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.migration.steps.switch import switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.schema.test_guard import (
    ALL,
    BOTH,
    ENTRY,
    INSERTS_ALIKE,
    INSERTS_UNLIKE,
    UPDATES_ALIKE,
    UPDATES_UNLIKE,
    guarded_url,
    set_authority,
)
from alphapulse_encryption_tests.migration.support import Row, run

__all__ = ["guarded_url"]

# Every column, and every one alone.
COLUMNS = ALL.split(", ")
RENAMES = [COLUMNS, *([name] for name in COLUMNS)]


def renamed(text: str, names: list[str]) -> str:
    """A statement, in which these columns have other names."""
    for name in sorted(names, key=len, reverse=True):
        for before, after in (
            (f"{name} ", f"x_{name} "),
            (f"{name},", f"x_{name},"),
            (f"{name})", f"x_{name})"),
        ):
            for edge in (" ", "("):
                text = text.replace(edge + before, edge + after)
    return text


@BOTH
@pytest.mark.parametrize("names", RENAMES, ids="+".join)
def test_every_rule_holds_for_renamed_columns(guarded_url: str, authority: str, names: list[str]) -> None:
    set_authority(guarded_url, authority)  # type: ignore[arg-type]
    for name in names:
        run(guarded_url, f"ALTER TABLE notes RENAME COLUMN {name} TO x_{name}")
    select = renamed(f"SELECT {ALL} FROM notes WHERE id = %s", names)
    refused = authority == "plaintext"

    def outcome(statement: str, key: int) -> Row | None:
        with support.application(guarded_url, autocommit=False) as connection:
            try:
                connection.execute(renamed(statement, names).encode())
            except psycopg.errors.CheckViolation:
                return None
            found = support.ask(connection, select, key)[0]
            connection.rollback()
            return found

    for assignments, expected in UPDATES_ALIKE:
        assert outcome(f"UPDATE notes SET {assignments} WHERE id = 1", 1) == expected, assignments
    for assignments, _, expected in UPDATES_UNLIKE:
        wanted = None if refused else expected
        assert outcome(f"UPDATE notes SET {assignments} WHERE id = 1", 1) == wanted, assignments
    for columns, values, expected in INSERTS_ALIKE:
        statement = f"INSERT INTO notes (id, {columns} ) VALUES (9, {values})"
        assert outcome(statement, 9) == expected, (columns, values)
    for columns, values, _, expected in INSERTS_UNLIKE:
        statement = f"INSERT INTO notes (id, {columns} ) VALUES (9, {values})"
        assert outcome(statement, 9) == (None if refused else expected), (columns, values)


STEPS: dict[str, Callable[[str, Table], object]] = {
    "add": support.add_columns,
    "backfill": support.backfill,
    "verify": support.verify,
    "indexes": lambda url, entry: build_search_indexes(Database(url), entry, support.ACTOR),
    "views": lambda url, entry: create_views(Database(url), entry, support.ACTOR),
    "switch": lambda url, entry: switch_to_ciphertext(support.target(url), entry),
    "rotate": lambda url, entry: rotate_range(support.target(url), entry, 0),
}


@pytest.mark.parametrize("name", ["mail", "mail_encrypted", "mail_search"])
def test_every_step_names_a_renamed_column_and_the_way_back(guarded_url: str, name: str) -> None:
    run(guarded_url, f'ALTER TABLE notes RENAME COLUMN {name} TO "The New"')
    back = f'ALTER TABLE "public"."notes" RENAME COLUMN "The New" TO "{name}"'
    for step in STEPS.values():
        with pytest.raises(ConfigurationError, match=rf"notes\.{name} was renamed to The New") as caught:
            step(guarded_url, ENTRY)
        assert back in str(caught.value)
    report = preflight.check(Database(guarded_url), [ENTRY], None)
    assert any("The New" in found.message for found in report.blockers)
    run(guarded_url, back)
    assert not support.add_columns(guarded_url, ENTRY).guards_created


def test_new_names_in_the_catalogue(database_url: str) -> None:
    """The other way out of a rename: everything of the column has the new name."""
    old, new = support.table("notes", "mail"), support.table("notes", "post")
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text)")
    run(database_url, "INSERT INTO notes SELECT i, 'm' || i FROM generate_series(1, 9) AS i")
    support.encrypt(database_url, old)
    run(database_url, "ALTER TABLE notes RENAME mail TO post")
    run(database_url, "ALTER TABLE notes RENAME mail_encrypted TO post_encrypted")
    run(database_url, "UPDATE notes SET post = 'later' WHERE id = 1")
    support.add_columns(database_url, new)
    support.backfill(database_url, new)
    assert support.assert_encrypted(database_url, new) == 9
    assert support.verify(database_url, new).passed


@pytest.mark.parametrize(
    "move",
    [
        "ALTER TABLE notes RENAME TO papers",
        "CREATE SCHEMA other; ALTER TABLE notes SET SCHEMA other",
        'ALTER TABLE notes RENAME TO "Pa pers"',
    ],
)
def test_a_table_that_was_renamed_or_moved(guarded_url: str, move: str) -> None:
    run(guarded_url, move)
    [(where,)] = run(
        guarded_url,
        "SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "JOIN pg_attribute a ON a.attrelid = c.oid WHERE a.attname = 'mail_encrypted' AND c.relkind = 'r'",
    )
    run(guarded_url, f"UPDATE {where} SET mail = 'new' WHERE id = 1")
    assert run(guarded_url, f"SELECT mail_encrypted, mail_search FROM {where} WHERE id = 1") == [(None, None)]
    for step in STEPS.values():
        with pytest.raises(MigrationError, match="was renamed or moved") as caught:
            step(guarded_url, ENTRY)
        assert where in str(caught.value)


INERT = "CREATE OR REPLACE FUNCTION encryption_guard_notes() RETURNS trigger LANGUAGE plpgsql {} AS $$ {} $$"
REPLACED = (
    "CREATE OR REPLACE TRIGGER zzz_encryption_guard_update {} EXECUTE FUNCTION encryption_guard_notes({})"
)
STRANGE = "CREATE FUNCTION strange() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$; "
FUNCTION, UPDATE = "public.encryption_guard_notes", "zzz_encryption_guard_update of notes"
# What is done to it, and what has to be named beside the table.
CHANGES = [
    (INERT.format("SET search_path = pg_catalog", "BEGIN RETURN NEW; END"), FUNCTION),
    # What is written beside an object says nothing of it.
    (
        "DO $$ DECLARE t record; BEGIN FOR t IN SELECT tgname FROM pg_trigger WHERE tgrelid = 'notes'::regclass LOOP "
        "EXECUTE format('COMMENT ON TRIGGER %I ON notes IS NULL', t.tgname); END LOOP; END $$; "
        + INERT.format("SET search_path = pg_catalog", "BEGIN RETURN NEW; END"),
        FUNCTION,
    ),
    *(
        (f"ALTER FUNCTION encryption_guard_notes() {change}", FUNCTION)
        for change in ("SECURITY DEFINER", "RESET ALL", "SET role = none", "STABLE", "LEAKPROOF", "STRICT")
    ),
    ("CREATE ROLE guard_thief; ALTER FUNCTION encryption_guard_notes OWNER TO guard_thief", FUNCTION),
    (REPLACED.format("BEFORE UPDATE ON notes FOR EACH ROW WHEN (false)", "'plaintext', ''"), UPDATE),
    (REPLACED.format("BEFORE UPDATE ON notes FOR EACH ROW", "'plaintext', ''"), UPDATE),
    (REPLACED.format("BEFORE UPDATE OF mail ON notes FOR EACH ROW", "'plaintext', ''"), UPDATE),
    (
        "DO $$ DECLARE made text; BEGIN SELECT pg_get_triggerdef(oid) INTO made FROM pg_trigger "
        "WHERE tgname = 'zzz_encryption_guard_update'; "
        "EXECUTE regexp_replace(replace(made, 'plaintext', 'ciphertext'), 'CREATE', 'CREATE OR REPLACE'); END $$",
        UPDATE,
    ),
    (
        STRANGE + "DROP TRIGGER zzz_encryption_guard_update ON notes; CREATE CONSTRAINT TRIGGER "
        "zzz_encryption_guard_update AFTER UPDATE ON notes DEFERRABLE FOR EACH ROW EXECUTE FUNCTION strange()",
        UPDATE,
    ),
    (
        STRANGE + "CREATE TRIGGER zzz_encryption_guard_mention_0099 BEFORE UPDATE ON notes FOR EACH ROW "
        "EXECUTE FUNCTION strange()",
        "zzz_encryption_guard_mention_0099 of notes",
    ),
    ("ALTER TABLE notes DISABLE TRIGGER USER", UPDATE),
    ("DROP TRIGGER zzz_encryption_guard_columns ON notes", "zzz_encryption_guard_columns of notes"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
def test_every_step_sees_a_guard_that_was_changed(guarded_url: str, change: str, named: str) -> None:
    run(guarded_url, change)
    try:
        tables = Catalogue(tables=(ENTRY,))
        for name, step in STEPS.items():
            if name != "add":
                with pytest.raises(
                    RefusedError, match=r"--add-columns --verify --table notes|encryption_guard_"
                ) as caught:
                    step(guarded_url, ENTRY)
                assert named in str(caught.value)
        report = preflight.check(Database(guarded_url), [ENTRY], None)
        assert any(named in found.message for found in report.blockers)
        (alert,) = look_for_drift(Database(guarded_url), tables)
        assert alert.key == "guard:notes" and named in alert.message
        (status,) = read_status(Database(guarded_url), tables, ["notes"]).tables
        assert status.problem is not None and named in status.problem
        assert support.add_columns(guarded_url, ENTRY).guards_created
        support.backfill(guarded_url, ENTRY)
        assert not look_for_drift(Database(guarded_url), tables)
    finally:
        run(
            guarded_url,
            "DO $$ BEGIN IF to_regrole('guard_thief') IS NOT NULL THEN "
            "REASSIGN OWNED BY guard_thief TO CURRENT_USER; DROP ROLE guard_thief; END IF; END $$",
        )


def test_a_guard_that_leaves_replicated_rows_out(guarded_url: str) -> None:
    """As after somebody's DISABLE and ENABLE: what the application writes is guarded, so no step is refused."""
    run(guarded_url, "ALTER TABLE notes ENABLE TRIGGER zzz_encryption_guard_update")
    assert any(UPDATE in f.message for f in preflight.check(Database(guarded_url), [ENTRY], None).blockers)
    (alert,) = look_for_drift(Database(guarded_url), Catalogue(tables=(ENTRY,)))
    assert alert.key == "guard:notes" and UPDATE in alert.message
    support.verify(guarded_url, ENTRY)
    assert support.add_columns(guarded_url, ENTRY).guards_created
    assert not support.add_columns(guarded_url, ENTRY).guards_created


def test_a_function_of_the_guards_name_that_is_somebody_elses(database_url: str) -> None:
    """Its owner would change it later; with a trigger of theirs on it, nobody can take it away unasked."""
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text)")
    run(database_url, "CREATE ROLE guard_thief; GRANT CREATE ON SCHEMA public TO guard_thief")
    try:
        run(
            database_url,
            "SET ROLE guard_thief; CREATE TABLE theirs (id int); "
            + INERT.format("SECURITY DEFINER", "BEGIN RETURN NEW; END")
            + "; CREATE TRIGGER planted BEFORE INSERT ON theirs FOR EACH ROW EXECUTE FUNCTION encryption_guard_notes()",
        )
        report = preflight.check(Database(database_url), [ENTRY], None)
        assert any(FUNCTION in found.message and "guard_thief" in found.message for found in report.blockers)
        with pytest.raises(MigrationError, match=rf"{FUNCTION}.*guard_thief"):
            support.add_columns(database_url, ENTRY)
        assert run(database_url, "SELECT FROM pg_attribute WHERE attname = 'mail_encrypted'") == []
        run(database_url, "DROP FUNCTION encryption_guard_notes() CASCADE")
        support.encrypt(database_url, ENTRY)
    finally:
        run(database_url, "DROP OWNED BY guard_thief; DROP ROLE guard_thief")


def test_a_trigger_that_runs_after_the_guard(guarded_url: str) -> None:
    run(
        guarded_url,
        "CREATE FUNCTION low() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN NEW.mail := lower(NEW.mail); RETURN NEW; END'",
    )
    run(guarded_url, "CREATE TRIGGER zzzz_low BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION low()")
    for step in STEPS.values():
        with pytest.raises(RefusedError, match="zzzz_low of notes runs after the guard"):
            step(guarded_url, ENTRY)
    run(guarded_url, "ALTER TRIGGER zzzz_low ON notes RENAME TO a_low")
    support.backfill(guarded_url, ENTRY)


@BOTH
def test_replicated_rows(guarded_url: str, authority: str) -> None:
    """Plaintext alone becomes pending; what was guarded where it was written passes, and is never refused."""
    set_authority(guarded_url, authority)  # type: ignore[arg-type]
    with support.application(guarded_url) as connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("UPDATE notes SET mail = 'new' WHERE id = 1")
        connection.execute("UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 2")
        connection.execute("UPDATE notes SET secret = 'new', secret_encrypted = 'S-new' WHERE id = 3")
        connection.execute("INSERT INTO notes (id, secret_encrypted) VALUES (4, 'S-new')")
    assert run(guarded_url, f"SELECT {ALL} FROM notes ORDER BY id") == [
        ("new", None, None, "old", "S-old"),
        ("old", "E-old", "T-old", "old", "S-new"),
        ("old", "E-old", "T-old", "new", "S-new"),
        (None, None, None, None, "S-new"),
    ]


NAMES = ["new", "old", "tg_op", "row_after", "cleared", "Mixed Case", 'a"b', "it's", "NEW", "100%s", "émail"]


@pytest.mark.parametrize("rename", [False, True])
def test_odd_names_types_and_many_columns(database_url: str, rename: bool) -> None:
    """Names that PL/pgSQL or a format knows, types that have no equality, and more than sixty columns."""
    types = ["json", "path", "point", "int[]", "mood", "pair", "positive", "jsonb", "tsvector", "box"]
    values = ['{"a": 1}', "((1,1),(2,2))", "(1,2)", "{1}", "sad", "(1,x)", "7", "null", "a b", "(1,1),(0,0)"]
    later = ['{"a":1}', "((1,1),(3,3))", "(1,3)", "{2}", "glad", "(2,x)", "8", "{}", "b", "(2,2),(0,0)"]
    run(
        database_url,
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (a int, b text); "
        'CREATE DOMAIN positive AS int CHECK (VALUE > 0); CREATE SCHEMA "My Schema"',
    )
    odd = {name: "text" for name in NAMES} | {f"c{n}": t for n, t in enumerate(types)}
    odd |= {f"more{n}": "text" for n in range(45)}
    table = '"My Schema"."My Table"'
    quoted = {name: '"' + name.replace('"', '""') + '"' for name in odd}
    columns = ", ".join(f"{quoted[name]} {type_}" for name, type_ in odd.items())
    run(database_url, f"CREATE TABLE {table} (id int PRIMARY KEY, {columns})")
    entry = support.table("My Table", *odd, schema="My Schema")
    support.add_columns(database_url, entry)
    run(database_url, f"INSERT INTO {table} (id) VALUES (1), (2)")
    firsts = dict(zip((f"c{n}" for n in range(len(types))), zip(values, later, strict=True), strict=True))
    with psycopg.connect(database_url, autocommit=True) as connection:
        for name, type_ in odd.items():
            first, second = firsts.get(name, ("one", "two"))
            encrypted = '"' + (name + "_encrypted").replace('"', '""') + '"'
            column = quoted[name]
            write = f"UPDATE {table} SET {column} = '{first}'::{type_}, {encrypted} = 'E' WHERE id = 1"
            connection.execute(write.encode())
            if rename:
                connection.execute(
                    f"ALTER TABLE {table} RENAME COLUMN {encrypted} TO now_{len(name)}".encode()
                )
                encrypted = f"now_{len(name)}"
            connection.execute(f"UPDATE {table} SET {column} = {column}".encode())
            ask = f"SELECT {encrypted} FROM {table} WHERE id = 1".encode()
            assert connection.execute(ask).fetchall() == [("E",)], name
            connection.execute(f"UPDATE {table} SET {column} = '{second}'::{type_} WHERE id = 1".encode())
            assert connection.execute(ask).fetchall() == [(None,)], name
            if rename:
                back = '"' + (name + "_encrypted").replace('"', '""') + '"'
                connection.execute(f"ALTER TABLE {table} RENAME COLUMN {encrypted} TO {back}".encode())


@BOTH
@pytest.mark.parametrize("rename", [False, True])
def test_rows_that_move_between_partitions(database_url: str, authority: str, rename: bool) -> None:
    """Also into one whose columns are in another order, and by names that the guard was not made for."""
    entry = support.table("notes", "secret")
    run(
        database_url,
        "CREATE TABLE notes (id int, part int, secret text, PRIMARY KEY (id, part)) PARTITION BY LIST (part); "
        "CREATE TABLE one PARTITION OF notes FOR VALUES IN (1); "
        "CREATE TABLE two (gone int, secret text, part int NOT NULL, id int NOT NULL); "
        "ALTER TABLE two DROP gone; ALTER TABLE notes ATTACH PARTITION two FOR VALUES IN (2)",
    )
    support.add_columns(database_url, entry)
    set_authority(database_url, authority, entry)  # type: ignore[arg-type]
    run(database_url, "INSERT INTO notes SELECT i, 1 + i % 2, 'old', 'E' FROM generate_series(1, 6) i")
    secret, encrypted = "secret", "secret_encrypted"
    if rename:
        run(database_url, "ALTER TABLE notes RENAME secret TO s")
        run(database_url, "ALTER TABLE notes RENAME secret_encrypted TO e")
        secret, encrypted = "s", "e"
    run(database_url, f"UPDATE notes SET part = 3 - part, {secret} = 'new' WHERE id <= 2")
    run(database_url, "UPDATE notes SET part = 3 - part WHERE id = 3")
    run(
        database_url,
        f"UPDATE notes n SET {secret} = v.s FROM (VALUES (4, 'new'), (5, 'old')) v (id, s) WHERE n.id = v.id",
    )
    assert run(database_url, f"SELECT id, {secret}, {encrypted} FROM notes ORDER BY id") == [
        (1, "new", None),
        (2, "new", None),
        (3, "old", "E"),
        (4, "new", None),
        (5, "old", "E"),
        (6, "old", "E"),
    ]
