"""Triggers, rules and checks of the application, in sessions of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alphapulse_encryption.catalogue import Catalogue
from alphapulse_encryption.crypto.envelope import get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.insight.live_check import live_check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress, RowsQuarantined
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import verify_changed
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, validate
from alphapulse_encryption.migration.steps.versions import begin_rotation, count_versions
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.support import run

ENTRY = support.table("notes", "mail", "text")
OWNER = "triggers_tester"


@pytest.fixture
def notes_url(database_url: str) -> str:
    """With a trigger that keeps a log, and whatever it names without its schema."""
    for statement in (
        "CREATE SCHEMA app",
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, text text, touched int NOT NULL DEFAULT 0)",
        "INSERT INTO notes SELECT i, 'm' || i, 't' || i FROM generate_series(1, 60) AS i",
        "CREATE TABLE app.log (id int, path text)",
    ):
        run(database_url, statement)
    search_path(database_url, "app, public")
    return database_url


def search_path(url: str, path: str) -> None:
    with support.application(url) as connection:
        connection.execute(f"ALTER DATABASE {connection.info.dbname} SET search_path TO {path}".encode())


@pytest.fixture
def owner_url(notes_url: str) -> Iterator[str]:
    """The address for a role that owns all of it, and may not pass over triggers."""
    with support.application(notes_url) as connection:
        database = connection.info.dbname
        connection.execute(f"CREATE ROLE {OWNER} LOGIN".encode())
        grants = (
            f"GRANT CREATE ON DATABASE {database} TO {OWNER}",
            f"GRANT CREATE, USAGE ON SCHEMA public, app TO {OWNER}",
            f"ALTER TABLE notes OWNER TO {OWNER}",
            f"ALTER TABLE app.log OWNER TO {OWNER}",
        )
        try:
            for grant in grants:
                connection.execute(grant.encode())
            yield notes_url.replace("//postgres@", f"//{OWNER}@", 1)
        finally:
            connection.execute(f"REASSIGN OWNED BY {OWNER} TO postgres".encode())
            connection.execute(f"DROP OWNED BY {OWNER}".encode())
            connection.execute(f"DROP ROLE {OWNER}".encode())


def trigger(url: str, when: str, body: str, *, row: bool = True, kind: str = "TRIGGER") -> None:
    run(url, f"CREATE FUNCTION react() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$")
    each = "ROW" if row else "STATEMENT"
    run(url, f"CREATE {kind} react {when} FOR EACH {each} EXECUTE FUNCTION react()")


LOGS = "INSERT INTO log VALUES (NEW.id, current_setting('search_path')); RETURN NEW;"
ONCE = "INSERT INTO log VALUES (0, current_setting('search_path')); RETURN NULL;"


@pytest.mark.parametrize(
    ("when", "body", "row", "kind"),
    [
        ("BEFORE UPDATE ON notes", LOGS, True, "TRIGGER"),
        ("AFTER UPDATE ON notes", LOGS, True, "TRIGGER"),
        ("AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED", LOGS, True, "CONSTRAINT TRIGGER"),
        ("BEFORE UPDATE ON notes", ONCE, False, "TRIGGER"),
        (
            "AFTER UPDATE ON notes REFERENCING NEW TABLE AS written",
            "INSERT INTO log SELECT id, current_setting('search_path') FROM written; RETURN NULL;",
            False,
            "TRIGGER",
        ),
    ],
)
def test_what_fires_finds_the_search_path_that_it_knows(
    owner_url: str, when: str, body: str, row: bool, kind: str
) -> None:
    trigger(owner_url, when, body, row=row, kind=kind)
    support.encrypt(owner_url, ENTRY)
    assert support.assert_encrypted(owner_url, ENTRY) == 120
    assert run(owner_url, "SELECT DISTINCT path FROM log") == [("app, public",)]
    run(owner_url, "UPDATE notes SET mail = 'new' WHERE id = 1")


@pytest.mark.parametrize(
    ("when", "body", "row"),
    [
        ("BEFORE UPDATE ON notes", "NEW.touched := 1; RETURN NEW;", True),
        ("AFTER UPDATE ON notes", LOGS, True),
        ("AFTER UPDATE ON notes", ONCE, False),
        ("BEFORE UPDATE ON notes", "RETURN OLD;", True),
    ],
)
def test_ciphertext_alone_fires_nothing_where_the_role_may(
    notes_url: str, when: str, body: str, row: bool
) -> None:
    trigger(notes_url, when, body, row=row)
    run(
        notes_url,
        "CREATE RULE kept AS ON UPDATE TO notes DO ALSO INSERT INTO app.log VALUES (NEW.id, 'rule')",
    )
    support.encrypt(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 120
    assert run(notes_url, "SELECT DISTINCT touched FROM notes") == [(0,)]
    assert run(notes_url, "SELECT * FROM app.log") == []
    # The application's own writes fire it.
    support.run(notes_url, "ALTER TABLE notes DISABLE RULE kept")
    run(notes_url, "UPDATE notes SET mail = 'new' WHERE id = 1")
    fired = run(notes_url, "SELECT touched FROM notes WHERE id = 1") == [(1,)]
    fired = fired or run(notes_url, "SELECT count(*) FROM app.log") == [(1,)]
    assert fired or run(notes_url, "SELECT mail FROM notes WHERE id = 1") == [("m1",)]


def test_a_trigger_that_protects_rows_is_lifted_by_a_person_alone(notes_url: str) -> None:
    trigger(notes_url, "BEFORE UPDATE ON notes", "IF OLD.id % 10 = 0 THEN\nRETURN  null; END IF; RETURN NEW;")
    with pytest.raises(RowsQuarantined) as refused:
        support.encrypt(notes_url, ENTRY)
    assert "key (10)" in str(refused.value)
    disable = 'ALTER TABLE "public"."notes" DISABLE TRIGGER "react"'
    assert disable in str(refused.value)
    unencrypted = run(notes_url, "SELECT id FROM notes WHERE mail_encrypted IS NULL ORDER BY id")
    assert unencrypted == [(number,) for number in range(10, 61, 10)]
    run(notes_url, disable)
    support.backfill(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 120


def test_plaintext_that_comes_back_fires_them(notes_url: str) -> None:
    walk.switch(notes_url, ENTRY)
    run(
        notes_url,
        "UPDATE notes n SET mail_encrypted = m.mail_encrypted FROM notes m WHERE n.id <= 3 AND m.id = n.id + 10",
    )
    assert run(notes_url, "SELECT count(*) FROM notes WHERE mail IS NULL") == [(3,)]
    trigger(notes_url, "AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED", LOGS, kind="CONSTRAINT TRIGGER")
    revert_to_plaintext(walk.target(notes_url, catalogue=Catalogue(tables=(ENTRY,))), ENTRY)
    assert run(notes_url, "SELECT id, path FROM app.log ORDER BY id") == [
        (i, "app, public") for i in (1, 2, 3)
    ]


KEPT = {
    "skipped": ("BEFORE UPDATE ON notes", "IF OLD.id % 10 = 0 THEN RETURN NULL; END IF; RETURN NEW;"),
    "as it was": ("BEFORE UPDATE ON notes", "IF OLD.id % 10 = 0 THEN RETURN OLD; END IF; RETURN NEW;"),
    "one column": (
        "BEFORE UPDATE ON notes",
        "IF OLD.id % 10 = 0 THEN NEW.text_encrypted := OLD.text_encrypted; END IF; RETURN NEW;",
    ),
    "another value": (
        "BEFORE UPDATE ON notes",
        "IF OLD.id % 10 = 0 THEN NEW.text_encrypted := left(NEW.text_encrypted, 40); END IF; RETURN NEW;",
    ),
    "afterwards": (
        "AFTER UPDATE ON notes",
        "IF NEW.id % 10 = 0 AND NEW.text_encrypted IS NOT NULL THEN "
        "UPDATE public.notes SET text_encrypted = NULL WHERE id = NEW.id; END IF; RETURN NULL;",
    ),
}


@pytest.mark.parametrize("how", KEPT)
def test_rows_that_are_kept_from_being_written(owner_url: str, how: str) -> None:
    support.add_columns(owner_url, ENTRY)
    trigger(owner_url, *KEPT[how])
    for _ in range(2):
        with pytest.raises(RowsQuarantined) as caught:
            support.backfill(owner_url, ENTRY, batch_size=25)
        said = str(caught.value)
        assert ": 6;" in said and "key (10)" in said and "m10" not in said
        stored = run(owner_url, "SELECT id FROM notes WHERE text_encrypted IS NULL")
        assert sorted(key for (key,) in stored) == [10, 20, 30, 40, 50, 60]
        rows = "SELECT rows_processed FROM alphapulse_encryption.ranges WHERE table_name = 'notes'"
        assert run(owner_url, rows)[0][0] == 54
    run(owner_url, "ALTER TABLE notes DISABLE TRIGGER react")
    assert support.backfill(owner_url, ENTRY).rows == 6
    assert support.assert_encrypted(owner_url, ENTRY) == 120


AS_IT_WAS = "CREATE TRIGGER react BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION react()"
COMES = {
    "made": f"DROP TRIGGER react ON notes; {AS_IT_WAS}",
    "enabled": "ALTER TABLE notes ENABLE TRIGGER react",
    "in every session": "ALTER TABLE notes ENABLE ALWAYS TRIGGER react",
    "a rule": "CREATE RULE kept AS ON UPDATE TO notes WHERE OLD.id = 7 DO INSTEAD NOTHING",
}


@pytest.mark.parametrize("how", COMES)
def test_what_comes_in_the_middle_of_a_range_is_noticed(notes_url: str, owner_url: str, how: str) -> None:
    # A superuser passes over all but the one.
    url = notes_url if how == "in every session" else owner_url
    support.add_columns(url, ENTRY)
    trigger(url, *KEPT["as it was"])
    run(url, "ALTER TABLE notes DISABLE TRIGGER react")

    def come(progress: Progress) -> None:
        if progress.rows == 25:
            run(url, COMES[how])

    with pytest.raises(RefusedError if how == "a rule" else RowsQuarantined) as caught:
        backfill_range(support.target(url), ENTRY, 0, pace=Pace(25), on_progress=come)
    named = "DISABLE RULE" if how == "a rule" else "DISABLE TRIGGER"
    assert f'ALTER TABLE "public"."notes" {named}' in str(caught.value)
    ((stored,),) = run(url, "SELECT count(*) FROM notes WHERE text_encrypted IS NOT NULL")
    assert stored == (25 if how == "a rule" else 60 - 4)
    assert run(url, "SELECT rows_processed FROM alphapulse_encryption.ranges") == [(stored,)]


def test_a_trigger_that_normalises_the_plaintext_costs_a_second_look(owner_url: str) -> None:
    support.add_columns(owner_url, ENTRY)
    trigger(owner_url, "BEFORE UPDATE ON notes", "NEW.mail := upper(NEW.mail); RETURN NEW;")
    assert support.backfill(owner_url, ENTRY).rows == 60
    assert support.assert_encrypted(owner_url, ENTRY) == 120
    assert run(owner_url, "SELECT mail FROM notes WHERE id = 1") == [("M1",)]


def test_a_rule_in_place_of_an_update_is_refused_by_name(owner_url: str) -> None:
    support.add_columns(owner_url, ENTRY)
    run(owner_url, "CREATE RULE kept AS ON UPDATE TO notes WHERE OLD.id = 7 DO INSTEAD NOTHING")
    with pytest.raises(RefusedError, match=r"rule kept .*DISABLE RULE"):
        support.backfill(owner_url, ENTRY)
    run(owner_url, "ALTER TABLE notes DISABLE RULE kept")
    support.backfill(owner_url, ENTRY)
    assert support.assert_encrypted(owner_url, ENTRY) == 120


def test_a_check_finds_what_it_names(notes_url: str) -> None:
    """Its function runs for every row that is written, whoever may pass over triggers."""
    run(notes_url, "INSERT INTO app.log VALUES (0, 'allowed')")
    run(
        notes_url,
        "CREATE FUNCTION app.allowed(text) RETURNS boolean LANGUAGE plpgsql AS "
        "$$BEGIN RETURN EXISTS (SELECT FROM log WHERE path = 'allowed'); END$$",
    )
    run(notes_url, "ALTER TABLE notes ADD CONSTRAINT fits CHECK (app.allowed(text)) NOT VALID")
    with Database(notes_url).session("validate") as connection:
        validate(connection, read_table(connection, ENTRY), "fits")
    assert run(notes_url, "SELECT convalidated FROM pg_constraint WHERE conname = 'fits'") == [(True,)]
    support.encrypt(notes_url, ENTRY)
    assert support.assert_encrypted(notes_url, ENTRY) == 120


PLACES = support.table("places", "at")


@pytest.fixture
def places_url(notes_url: str) -> str:
    """With a type of the application's own, whose cast to text names a table without its schema; one value is large."""
    for statement in (
        "CREATE TYPE app.place AS (street text, town text)",
        "CREATE TABLE app.words (word text)",
        "INSERT INTO app.words VALUES ('at')",
        "CREATE FUNCTION app.shown(place) RETURNS text LANGUAGE plpgsql STABLE AS "
        "$$BEGIN RETURN (SELECT word FROM words) || ' ' || $1.street || ', ' || $1.town; END$$",
        "CREATE CAST (app.place AS text) WITH FUNCTION app.shown(app.place)",
        "CREATE TABLE public.places (id int PRIMARY KEY, at app.place)",
        "INSERT INTO places SELECT i, ROW('s' || i, 't')::place FROM generate_series(1, 20) AS i",
        "ALTER TABLE places ALTER at SET STORAGE EXTERNAL",
        "INSERT INTO places VALUES (21, ROW(repeat('long', 50000), 't')::place)",
    ):
        run(notes_url, statement)
    return notes_url


def test_a_cast_finds_what_it_names(places_url: str) -> None:
    support.encrypt(places_url, PLACES)
    assert support.assert_encrypted(places_url, PLACES) == 21
    verified = support.verify(places_url, PLACES)
    assert verified.passed and verified.since is not None
    run(places_url, "UPDATE places SET at = ROW('new', 't')::place WHERE id IN (3, 21)")
    changed = verify_changed(support.target(places_url), PLACES, verified.since, seconds=60)
    assert {(one.problem, tuple(one.key)) for one in changed.offenders} == {
        ("pending", ("3",)),
        ("pending", ("21",)),
    }


def test_the_live_check_lets_triggers_find_what_they_name(notes_url: str) -> None:
    support.encrypt(notes_url, ENTRY)
    trigger(notes_url, "BEFORE UPDATE ON notes", LOGS)
    for column in live_check(support.target(notes_url), ENTRY):
        assert {look.verdict for look in column.looks} == {"yes"}


def test_a_function_of_another_schema_takes_the_place_of_none_of_ours(notes_url: str) -> None:
    """With the application's search path, too, and where that has pg_catalog behind."""
    for function in ("unnest(text[]) RETURNS SETOF text", "unnest(xid[]) RETURNS SETOF xid"):
        run(
            notes_url,
            f"CREATE FUNCTION app.{function} LANGUAGE plpgsql AS $$BEGIN RAISE 'taken'; END$$",
        )
    run(
        notes_url,
        "CREATE FUNCTION app.same(xid, xid) RETURNS boolean LANGUAGE plpgsql AS $$BEGIN RAISE 'taken'; END$$",
    )
    run(notes_url, "CREATE OPERATOR app.= (LEFTARG = xid, RIGHTARG = xid, FUNCTION = app.same)")
    for name in ("current_setting(text)", "set_config(text, text, boolean)", "pg_backend_pid()"):
        kind = "int" if name.startswith("pg") else "text"
        run(
            notes_url,
            f"CREATE FUNCTION app.{name} RETURNS {kind} LANGUAGE plpgsql AS $$BEGIN RAISE 'taken'; END$$",
        )
    search_path(notes_url, "app, pg_catalog, public")
    support.encrypt(notes_url, ENTRY)
    search_path(notes_url, "public")
    assert support.assert_encrypted(notes_url, ENTRY) == 120


def test_nor_does_one_that_fits_better_when_rows_are_read(notes_url: str) -> None:
    """Of types that ours take only after a conversion; one value is large, so that sizes are asked for."""
    run(notes_url, "ALTER TABLE notes ADD mail_encrypted varchar, ALTER text SET STORAGE EXTERNAL")
    run(notes_url, "UPDATE notes SET text = repeat('long', 50000) WHERE id = 7")
    for function in (
        *(f"pg_column_size({type_}) RETURNS int" for type_ in ("int", "text", "varchar")),
        "octet_length(varchar) RETURNS int",
        '"right"(varchar, int) RETURNS text',
    ):
        run(notes_url, f"CREATE FUNCTION app.{function} LANGUAGE plpgsql AS $$BEGIN RAISE 'taken'; END$$")
    support.encrypt(notes_url, ENTRY)
    verified = support.verify(notes_url, ENTRY)
    assert verified.passed and verified.since is not None
    run(notes_url, "UPDATE notes SET mail = 'new' WHERE id = 3")
    changed = verify_changed(support.target(notes_url), ENTRY, verified.since, seconds=60)
    assert [tuple(one.key) for one in changed.offenders] == [("3",)]
    keys = KeyRing({1: support.MASTER_KEY, 2: bytes(32)}, 2)
    cipher = get_format("AES-256-GCM", keys)
    target = support.target(notes_url, catalogue=Catalogue(tables=(ENTRY,)), keys=keys, cipher=cipher)
    begin_rotation(target)
    assert rotate_range(target, ENTRY, 0).values == 119
    # An envelope that another program has written is brought here.
    run(notes_url, "UPDATE notes SET mail = mail, mail_encrypted = mail_encrypted || ' ' WHERE id = 9")
    (counted,) = count_versions(target.database, (ENTRY,), cipher)
    assert counted.versions.keys() == {2}
