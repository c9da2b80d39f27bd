"""The guard: what becomes of a value, its ciphertext and its token, whatever one statement writes.

Every rule of "Which side is right" of the design, for both authorities.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.lifecycle import Authority, State
from alphapulse_encryption.migration.bookkeeping.tables import advance
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema import guard
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.names import guard_name
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, Row, run

ENTRY = support.table("notes", support.searchable("mail", "idx_notes_mail"), "secret")
BOTH = pytest.mark.parametrize("authority", ["plaintext", "ciphertext"])
# All of a row but its key: the searchable column with its two companions, the other one with its one.
ALL = "mail, mail_encrypted, mail_search, secret, secret_encrypted"


def set_authority(url: str, authority: Authority, entry: Table = ENTRY) -> None:
    """What the switch does about authority, and nothing else of it."""
    with Database(url).session("set the authority") as connection, connection.transaction():
        if authority == "ciphertext":
            advance(connection, support.KEYS, ACTOR, entry, State.SWITCHED)
        guard.ensure_guard(connection, read_table(connection, entry), ACTOR)


@pytest.fixture
def guarded_url(database_url: str) -> str:
    """Three rows in the state of a finished backfill; no NOT NULL, as after a switch."""
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, secret text, other int DEFAULT 0)")
    support.add_columns(database_url, ENTRY)
    for key in (1, 2, 3):
        run(
            database_url,
            f"INSERT INTO notes (id, {ALL}) VALUES (%s, 'old', 'E-old', 'T-old', 'old', 'S-old')",
            key,
        )
    return database_url


def row(url: str, key: int = 1) -> Row:
    return run(url, f"SELECT {ALL} FROM notes WHERE id = %s", key)[0]


OLD = ("old", "E-old", "T-old", "old", "S-old")


@contextlib.contextmanager
def tried(url: str) -> Iterator[support.Connection]:
    """A transaction of the application that is taken back, so that the next rule meets the same rows."""
    with support.application(url, autocommit=False) as connection:
        yield connection
        connection.rollback()


def rows(connection: support.Connection) -> dict[int, Row]:
    return {found[0]: found[1:] for found in support.ask(connection, f"SELECT id, {ALL} FROM notes")}


def test_rows_begin_as_assumed(guarded_url: str) -> None:
    assert row(guarded_url) == OLD


# Which of them are written by one UPDATE, and what is there afterwards, where it is not refused.
UPDATES_ALIKE = [
    # plaintext only: cleared
    ("mail = 'new'", ("new", None, None, "old", "S-old")),
    ("secret = 'new'", ("old", "E-old", "T-old", "new", None)),
    ("mail = 'new', secret = 'new'", ("new", None, None, "new", None)),
    ("mail = NULL", (None, None, None, "old", "S-old")),
    ("secret = NULL", ("old", "E-old", "T-old", None, None)),
    ("mail = ''", ("", None, None, "old", "S-old")),
    # the ciphertext is in the list, and stays what it was
    ("mail = 'new', mail_encrypted = 'E-old', mail_search = 'T-old'", ("new", None, None, "old", "S-old")),
    ("secret = 'new', secret_encrypted = secret_encrypted", ("old", "E-old", "T-old", "new", None)),
    # both: kept
    (
        "mail = 'new', mail_encrypted = 'E-new', mail_search = 'T-new'",
        ("new", "E-new", "T-new", "old", "S-old"),
    ),
    ("secret = 'new', secret_encrypted = 'S-new'", ("old", "E-old", "T-old", "new", "S-new")),
    (
        "mail = NULL, mail_encrypted = NULL, mail_search = NULL, secret = NULL, secret_encrypted = NULL",
        (None, None, None, None, None),
    ),
    # both, but the token is missing or the old one: nobody could find the value
    ("mail = 'new', mail_encrypted = 'E-new'", ("new", None, None, "old", "S-old")),
    ("mail = 'new', mail_encrypted = 'E-new', mail_search = NULL", ("new", None, None, "old", "S-old")),
    # a new token does not make an old ciphertext a new one
    ("mail = 'new', mail_search = 'T-new'", ("new", None, None, "old", "S-old")),
    ("mail = 'new', mail_encrypted = NULL, mail_search = 'T-new'", ("new", None, None, "old", "S-old")),
    ("mail = NULL, mail_encrypted = NULL", (None, None, None, "old", "S-old")),
    # one column's both sides, the other's plaintext alone
    ("secret = 'new', secret_encrypted = 'S-new', mail = 'new'", ("new", None, None, "new", "S-new")),
    # both, and the plaintext is the same: a fresh envelope of it
    ("secret = 'old', secret_encrypted = 'S-new'", ("old", "E-old", "T-old", "old", "S-new")),
    (
        "mail = 'old', mail_encrypted = 'E-new', mail_search = 'T-old', secret = secret, secret_encrypted = 'S-new'",
        ("old", "E-new", "T-old", "old", "S-new"),
    ),
    ("mail = mail, mail_encrypted = 'E-new'", ("old", "E-new", "T-old", "old", "S-old")),
    (
        "mail = mail, mail_encrypted = 'E-new', mail_search = 'T-new'",
        ("old", "E-new", "T-new", "old", "S-old"),
    ),
    ("mail = mail, mail_encrypted = 'E-new', mail_search = NULL", ("old", None, None, "old", "S-old")),
    ("mail = mail, mail_encrypted = NULL", ("old", None, None, "old", "S-old")),
    ("secret = secret, secret_encrypted = NULL", ("old", "E-old", "T-old", "old", None)),
    # … of one column, and the other's plaintext alone
    ("secret = secret, secret_encrypted = 'S-new', mail = 'new'", ("new", None, None, "old", "S-new")),
    # nothing is changed
    ("mail = 'old', secret = secret, mail_encrypted = 'E-old'", OLD),
    ("other = 7", OLD),
]


@BOTH
def test_update_whoever_is_right(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    for assignments, expected in UPDATES_ALIKE:
        with tried(guarded_url) as connection:
            connection.execute(f"UPDATE notes SET {assignments} WHERE id = 1".encode())
            assert rows(connection) == {1: expected, 2: OLD, 3: OLD}, assignments


# What is refused while the plaintext is right, and what comes of it once the ciphertext is.
UPDATES_UNLIKE = [
    ("secret_encrypted = 'S-new'", "secret", ("old", "E-old", "T-old", None, "S-new")),
    ("mail_encrypted = 'E-new', mail_search = 'T-new'", "mail", (None, "E-new", "T-new", "old", "S-old")),
    ("mail_encrypted = 'E-new'", "mail", (None, "E-new", "T-old", "old", "S-old")),
    ("mail_search = 'T-new'", "mail", ("old", "E-old", "T-new", "old", "S-old")),
    ("secret_encrypted = NULL", "secret", ("old", "E-old", "T-old", None, None)),
    # another column's plaintext is named
    ("mail = 'old', secret_encrypted = 'S-new'", "secret", ("old", "E-old", "T-old", None, "S-new")),
    (
        "secret = 'old', secret_encrypted = 'S-new', mail_encrypted = 'E-new'",
        "mail",
        (None, "E-new", "T-old", "old", "S-new"),
    ),
    ("mail = 'old', mail_search = 'T-new'", "mail", ("old", "E-old", "T-new", "old", "S-old")),
    ("secret = NULL, secret_encrypted = 'S-new'", "secret", ("old", "E-old", "T-old", None, "S-new")),
    (
        "mail = NULL, mail_encrypted = 'E-new', mail_search = 'T-new'",
        "mail",
        (None, "E-new", "T-new", "old", "S-old"),
    ),
    ("mail = 'new', secret_encrypted = 'S-new'", "secret", ("new", None, None, None, "S-new")),
]


def test_update_of_the_ciphertext_alone(guarded_url: str) -> None:
    for assignments, column, _ in UPDATES_UNLIKE:
        with (
            pytest.raises(psycopg.errors.CheckViolation) as caught,
            tried(guarded_url) as connection,
        ):
            connection.execute(f"UPDATE notes SET {assignments} WHERE id = 1".encode())
        assert f"notes.{column}_encrypted" in str(caught.value), assignments
        assert caught.value.diag.table_name == "notes"
        assert caught.value.diag.schema_name == "public"
        assert caught.value.diag.column_name == f"{column}_encrypted"
        assert not re.search("(E|S|T)-(old|new)|'old'|'new'", str(caught.value))

    set_authority(guarded_url, "ciphertext")
    for assignments, _, expected in UPDATES_UNLIKE:
        with tried(guarded_url) as connection:
            connection.execute(f"UPDATE notes SET {assignments} WHERE id = 1".encode())
            assert rows(connection) == {1: expected, 2: OLD, 3: OLD}, assignments


def test_no_value_is_lost_when_a_token_alone_meets_a_pending_value(guarded_url: str) -> None:
    set_authority(guarded_url, "ciphertext")
    run(guarded_url, "UPDATE notes SET mail = 'by the old application' WHERE id = 1")
    run(guarded_url, "UPDATE notes SET mail_search = 'T-new' WHERE id = 1")
    assert row(guarded_url)[:2] == ("by the old application", None)


# Columns given by an INSERT.
INSERTS_ALIKE = [
    ("mail, secret", "'new', 'new'", ("new", None, None, "new", None)),
    ("mail", "NULL", (None, None, None, None, None)),
    ("mail, mail_encrypted, mail_search", "'new', 'E-new', 'T-new'", ("new", "E-new", "T-new", None, None)),
    ("secret, secret_encrypted", "'new', 'S-new'", (None, None, None, "new", "S-new")),
    ("mail, mail_encrypted", "'new', 'E-new'", ("new", None, None, None, None)),
    ("mail, mail_search", "'new', 'T-new'", ("new", None, None, None, None)),
    ("secret, secret_encrypted", "'new', NULL", (None, None, None, "new", None)),
]
INSERTS_UNLIKE = [
    ("secret_encrypted", "'S-new'", "secret", (None, None, None, None, "S-new")),
    ("mail_encrypted, mail_search", "'E-new', 'T-new'", "mail", (None, "E-new", "T-new", None, None)),
    ("mail, mail_encrypted", "NULL, 'E-new'", "mail", (None, "E-new", None, None, None)),
    ("mail_search", "'T-new'", "mail", (None, None, "T-new", None, None)),
    ("mail, secret_encrypted", "'new', 'S-new'", "secret", ("new", None, None, None, "S-new")),
]


@BOTH
def test_insert_whoever_is_right(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    for names, values, expected in INSERTS_ALIKE:
        with tried(guarded_url) as connection:
            connection.execute(f"INSERT INTO notes (id, {names}) VALUES (9, {values})".encode())
            assert rows(connection)[9] == expected, (names, values)


def test_insert_of_the_ciphertext_alone(guarded_url: str) -> None:
    for names, values, column, _ in INSERTS_UNLIKE:
        with (
            pytest.raises(psycopg.errors.CheckViolation) as caught,
            tried(guarded_url) as connection,
        ):
            connection.execute(f"INSERT INTO notes (id, {names}) VALUES (9, {values})".encode())
        assert f"notes.{column}_encrypted" in str(caught.value), (names, values)
        assert "-new" not in str(caught.value)

    set_authority(guarded_url, "ciphertext")
    for names, values, _, expected in INSERTS_UNLIKE:
        with tried(guarded_url) as connection:
            connection.execute(f"INSERT INTO notes (id, {names}) VALUES (9, {values})".encode())
            assert rows(connection)[9] == expected, (names, values)


def test_inserted_default_beside_a_ciphertext(guarded_url: str) -> None:
    """Whoever wrote the default itself may be right: nothing is refused or lost, and verification tells them apart."""
    run(guarded_url, "TRUNCATE notes")
    run(guarded_url, "ALTER TABLE notes ALTER secret SET NOT NULL, ALTER secret SET DEFAULT '0'")
    dual, alone = support.seal("0", "test_context"), support.seal("17", "test_context")
    run(guarded_url, "INSERT INTO notes (id, secret, secret_encrypted) VALUES (1, '0', %s)", dual)
    run(guarded_url, "INSERT INTO notes (id, secret_encrypted) VALUES (2, %s)", alone)
    assert row(guarded_url, 1)[3:] == ("0", dual)
    assert row(guarded_url, 2)[3:] == ("0", alone)
    assert [str(o) for o in support.verify(guarded_url, ENTRY).offenders] == ["secret mismatched at key (2)"]


@BOTH
def test_many_rows_in_one_statement(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    run(guarded_url, "UPDATE notes SET mail = CASE WHEN id = 2 THEN mail ELSE 'new ' || id END")
    assert [row(guarded_url, key)[:3] for key in (1, 2, 3)] == [
        ("new 1", None, None),
        OLD[:3],
        ("new 3", None, None),
    ]


def fresh_for_some(condition: str) -> str:
    """Every row is written with both sides; those of the condition have a new plaintext, too."""
    return (
        f"UPDATE notes SET secret = CASE WHEN {condition} THEN 'new' ELSE secret END, "
        "secret_encrypted = 'S-' || id, mail = 'old'"
    )


@BOTH
def test_unchanged_plaintext_in_some_of_many_rows(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    run(guarded_url, fresh_for_some("id = 2"))
    assert [row(guarded_url, key) for key in (1, 2, 3)] == [
        ("old", "E-old", "T-old", "old", "S-1"),
        ("old", "E-old", "T-old", "new", "S-2"),
        ("old", "E-old", "T-old", "old", "S-3"),
    ]


def test_what_one_statement_names_does_not_excuse_the_next(guarded_url: str) -> None:
    with support.application(guarded_url, autocommit=False) as connection:
        connection.execute(fresh_for_some("false").encode())
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("UPDATE notes SET secret_encrypted = 'S-newer'")
    with support.application(guarded_url, autocommit=False) as connection:
        # Refused for the other column: that secret was named is forgotten with the savepoint.
        with pytest.raises(psycopg.errors.CheckViolation), connection.transaction():
            connection.execute(
                "UPDATE notes SET secret = secret, secret_encrypted = 'S-new', mail_encrypted = 'E'"
            )
        with pytest.raises(psycopg.errors.CheckViolation, match=r"notes\.secret_encrypted"):
            connection.execute("UPDATE notes SET secret_encrypted = 'S-newer'")


def test_a_null_is_not_named_into_a_ciphertext(guarded_url: str) -> None:
    """While the plaintext is right, a value whose plaintext stays NULL would be seen by no reader."""
    run(guarded_url, "UPDATE notes SET secret = NULL")
    named = "UPDATE notes SET secret = NULL, secret_encrypted = 'S-new' WHERE id = 1"
    with pytest.raises(psycopg.errors.CheckViolation):
        run(guarded_url, named)
    set_authority(guarded_url, "ciphertext")
    run(guarded_url, named)
    assert row(guarded_url)[3:] == (None, "S-new")


def test_null_over_null_keeps_the_ciphertext(guarded_url: str) -> None:
    """After the switch, an old instance that saves all it has read must not erase what it cannot see."""
    set_authority(guarded_url, "ciphertext")
    run(guarded_url, "UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 1")
    run(guarded_url, "UPDATE notes SET secret = NULL, mail = mail, other = 1 WHERE id = 1")
    assert row(guarded_url) == ("old", "E-old", "T-old", None, "S-new")
    # Erased it is by whoever names both sides, or the ciphertext.
    run(guarded_url, "UPDATE notes SET secret = NULL, secret_encrypted = NULL WHERE id = 1")
    assert row(guarded_url) == ("old", "E-old", "T-old", None, None)


def test_one_refused_row_undoes_the_statement(guarded_url: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        run(guarded_url, "UPDATE notes SET secret_encrypted = CASE id WHEN 3 THEN 'S-new' ELSE 'S-old' END")
    assert [row(guarded_url, key) for key in (1, 2, 3)] == [OLD] * 3


@BOTH
def test_on_conflict_do_update(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    upsert = (
        "INSERT INTO notes (id, mail) VALUES (1, 'new'), (9, 'new') "
        "ON CONFLICT (id) DO UPDATE SET mail = excluded.mail"
    )
    run(guarded_url, upsert)
    assert row(guarded_url) == ("new", None, None, "old", "S-old")
    assert row(guarded_url, 9) == ("new", None, None, None, None)
    run(
        guarded_url,
        "INSERT INTO notes (id, mail, mail_encrypted, mail_search) VALUES (2, 'new', 'E-new', 'T-new') "
        "ON CONFLICT (id) DO UPDATE SET mail = excluded.mail, mail_encrypted = excluded.mail_encrypted, "
        "mail_search = excluded.mail_search",
    )
    assert row(guarded_url, 2) == ("new", "E-new", "T-new", "old", "S-old")
    run(
        guarded_url, "INSERT INTO notes (id, mail) VALUES (3, 'new') ON CONFLICT (id) DO UPDATE SET other = 1"
    )
    assert row(guarded_url, 3) == OLD
    # All columns, as an ORM upserts them: the plaintext happens to be the same.
    run(
        guarded_url,
        "INSERT INTO notes (id, mail, mail_encrypted, mail_search, secret, secret_encrypted) "
        "VALUES (3, 'old', 'E-new', 'T-old', 'old', 'S-new'), (10, 'old', 'E-new', 'T-old', 'old', 'S-new') "
        "ON CONFLICT (id) DO UPDATE SET mail = excluded.mail, mail_encrypted = excluded.mail_encrypted, "
        "mail_search = excluded.mail_search, secret = excluded.secret, secret_encrypted = excluded.secret_encrypted",
    )
    assert row(guarded_url, 3) == row(guarded_url, 10) == ("old", "E-new", "T-old", "old", "S-new")


@BOTH
def test_copy(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    with support.application(guarded_url) as connection:
        with connection.cursor().copy("COPY notes (id, mail, mail_encrypted, secret) FROM STDIN") as copy:
            copy.write_row((10, "new", None, "new"))
            copy.write_row((11, "new", "E-new", None))  # without its token
        assert row(guarded_url, 10) == ("new", None, None, "new", None)
        assert row(guarded_url, 11) == ("new", None, None, None, None)

        def ciphertext_alone() -> None:
            with connection.cursor().copy("COPY notes (id, secret_encrypted) FROM STDIN") as copy:
                copy.write_row((12, "S-new"))

        if authority == "plaintext":
            with pytest.raises(psycopg.errors.CheckViolation, match=r"notes\.secret_encrypted"):
                ciphertext_alone()
        else:
            ciphertext_alone()
            assert row(guarded_url, 12) == (None, None, None, None, "S-new")


@BOTH
def test_merge(guarded_url: str, authority: Authority) -> None:
    set_authority(guarded_url, authority)
    run(
        guarded_url,
        "MERGE INTO notes n USING (VALUES (1, 'new'), (9, 'new')) AS v (id, mail) ON n.id = v.id "
        "WHEN MATCHED THEN UPDATE SET mail = v.mail WHEN NOT MATCHED THEN INSERT (id, mail) VALUES (v.id, v.mail)",
    )
    assert row(guarded_url)[:3] == row(guarded_url, 9)[:3] == ("new", None, None)
    run(
        guarded_url,
        "MERGE INTO notes n USING (VALUES (2, 'old'), (3, 'new')) AS v (id, secret) ON n.id = v.id "
        "WHEN MATCHED THEN UPDATE SET secret = v.secret, secret_encrypted = 'S-' || v.id",
    )
    assert [row(guarded_url, key)[3:] for key in (2, 3)] == [("old", "S-2"), ("new", "S-3")]


def trigger(url: str, name: str, body: str) -> None:
    """A trigger of the application that meddles with the row."""
    run(url, f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} RETURN NEW; END$$")
    run(
        url,
        f"CREATE TRIGGER {name} BEFORE INSERT OR UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION {name}()",
    )


@BOTH
@pytest.mark.parametrize("name", ["aaa_lower", "zz_lower"])
def test_plaintext_changed_by_a_trigger_before_ours(
    guarded_url: str, authority: Authority, name: str
) -> None:
    set_authority(guarded_url, authority)
    trigger(guarded_url, name, "NEW.secret := NEW.secret || '+';")
    run(guarded_url, "UPDATE notes SET other = 1 WHERE id = 1")
    assert row(guarded_url) == ("old", "E-old", "T-old", "old+", None)
    run(guarded_url, "UPDATE notes SET secret = 'new' WHERE id = 2")
    assert row(guarded_url, 2)[3:] == ("new+", None)


def test_pending_values_are_lower_case_when_a_trigger_says_so(guarded_url: str) -> None:
    """One that normalises what is written, firing after ours, meets a ciphertext that is cleared already."""
    trigger(guarded_url, "zzzz_lower", "NEW.mail := lower(NEW.mail);")
    run(guarded_url, "UPDATE notes SET mail = 'NEW' WHERE id = 1")
    assert row(guarded_url)[:3] == ("new", None, None)


TYPES = [
    ("numeric", "1.50", "1.5"),
    ("numeric", "-0.00", "0"),
    ("json", '{"a": 1}', '{"a":1}'),
    ("json", '{"a":1,"b":2}', '{"b":2,"a":1}'),
    ("float8", "-0", "0"),
    ("citext", "Case", "case"),
    ("interval", "24:00:00", "1 day"),
    ("point", "(1,2)", "(1,3)"),
    ("text[]", "{a,b}", "[0:1]={a,b}"),
]


@BOTH
def test_equal_values_that_look_different(database_url: str, authority: Authority) -> None:
    """Types without an equality operator as well: what counts is the text that is encrypted."""
    run(database_url, "CREATE EXTENSION citext")
    for number, (type_name, before, after) in enumerate(TYPES):
        name = f"notes_{number}"
        entry = support.table(name, "v")
        run(database_url, f"CREATE TABLE {name} (id int PRIMARY KEY, v {type_name}, other int)")
        support.add_columns(database_url, entry)
        set_authority(database_url, authority, entry)
        run(
            database_url,
            f"INSERT INTO {name} (id, v, v_encrypted) VALUES (1, %s::text::{type_name}, 'E')",
            before,
        )
        [(stored, envelope)] = run(database_url, f"SELECT v::text, v_encrypted FROM {name}")
        assert envelope == "E"
        # The same value once more, and its neighbour: nothing happens.
        run(database_url, f"UPDATE {name} SET v = %s::text::{type_name}, other = 1", before)
        assert run(database_url, f"SELECT v::text, v_encrypted, other FROM {name}") == [(stored, "E", 1)]
        run(database_url, f"UPDATE {name} SET v = %s::text::{type_name}", after)
        [(changed, envelope)] = run(database_url, f"SELECT v::text, v_encrypted FROM {name}")
        assert changed != stored
        assert envelope is None, type_name


def test_large_values_are_compared_as_they_are(guarded_url: str) -> None:
    """Compressed and out of line, the same text may be stored in different bytes."""
    text = "abc" * 100_000
    run(guarded_url, "UPDATE notes SET secret = %s, secret_encrypted = 'S-new' WHERE id = 1", text)
    run(guarded_url, "ALTER TABLE notes ALTER COLUMN secret SET STORAGE EXTERNAL")
    run(guarded_url, "UPDATE notes SET secret = %s WHERE id = 1", text)
    assert row(guarded_url)[4] == "S-new"
    run(guarded_url, "UPDATE notes SET secret = %s WHERE id = 1", text[:-1] + "x")
    assert row(guarded_url)[4] is None


def calls(url: str) -> int:
    return int(
        support.value(
            url,
            "SELECT coalesce(sum(calls), 0) FROM pg_stat_user_functions WHERE funcname = 'encryption_guard_notes'",
        )
    )


def test_function_is_not_called_where_nothing_sensitive_changes(guarded_url: str) -> None:
    support.with_settings(guarded_url, {"track_functions": "all"})
    run(guarded_url, "INSERT INTO notes (id, mail) VALUES (8, 'new')")
    run(guarded_url, "UPDATE notes SET other = other + 1")
    run(guarded_url, "UPDATE notes SET mail = mail, secret = secret || '', other = 3")
    run(guarded_url, "DELETE FROM notes WHERE id = 8")
    assert calls(guarded_url) == 0
    run(guarded_url, "UPDATE notes SET mail = 'new' WHERE id = 1")
    support.until(lambda: calls(guarded_url) == 1, "the call is counted")


def test_the_engine_itself_is_not_guarded(guarded_url: str) -> None:
    with support.application(guarded_url) as connection:
        with connection.transaction():
            connection.execute("SELECT set_config('alphapulse_encryption.writer', 'engine', true)")
            connection.execute("UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 1")
        assert row(guarded_url) == ("old", "E-old", "T-old", "old", "S-new")
        # The mark was the transaction's: the session's next one is the application's again.
        with pytest.raises(psycopg.errors.CheckViolation):
            connection.execute("UPDATE notes SET secret_encrypted = 'S-newer' WHERE id = 1")


def test_any_search_path_will_do(guarded_url: str) -> None:
    with support.application(guarded_url) as connection:
        connection.execute("CREATE SCHEMA trap")
        connection.execute("SET search_path TO trap, pg_catalog")
        connection.execute("UPDATE public.notes SET mail = 'new' WHERE id = 1")
    assert row(guarded_url)[:3] == ("new", None, None)


def test_an_ordinary_role_writes_without_any_right_on_the_engine(guarded_url: str) -> None:
    with support.application(guarded_url) as connection:
        connection.execute("CREATE ROLE guard_tester")
        try:
            connection.execute("GRANT SELECT, INSERT, UPDATE ON notes TO guard_tester")
            connection.execute("SET ROLE guard_tester")
            connection.execute("UPDATE notes SET mail = 'new' WHERE id = 1")
            connection.execute("INSERT INTO notes (id, mail) VALUES (7, 'new')")
            with pytest.raises(psycopg.errors.CheckViolation):
                connection.execute("UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 2")
        finally:
            connection.execute("RESET ROLE")
            connection.execute("REVOKE ALL ON notes FROM guard_tester")
            connection.execute("DROP ROLE guard_tester")
    assert row(guarded_url)[:3] == ("new", None, None)


def test_authority_changes_between_statements_only(guarded_url: str) -> None:
    """A writer under way keeps the change waiting, and is judged by the old authority to its end."""
    with support.application(guarded_url, autocommit=False) as writer:
        writer.execute("UPDATE notes SET secret = 'new' WHERE id = 1")
        with support.Background(lambda: set_authority(guarded_url, "ciphertext")) as switch:
            support.until(lambda: support.engine_waits(guarded_url), "the switch waits for the writer")
            with pytest.raises(psycopg.errors.CheckViolation), writer.transaction():
                writer.execute("UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 2")
            writer.commit()
            switch.result()
    run(guarded_url, "UPDATE notes SET secret_encrypted = 'S-new' WHERE id = 2")
    assert row(guarded_url, 2)[3:] == (None, "S-new")


@pytest.mark.parametrize(
    "damage",
    [
        "ALTER TABLE notes DISABLE TRIGGER zzz_encryption_guard_update",
        "ALTER TABLE notes DISABLE TRIGGER ALL",
        "DROP TRIGGER zzz_encryption_guard_insert ON notes",
        "DROP FUNCTION encryption_guard_notes CASCADE",
        "ALTER TABLE notes ENABLE REPLICA TRIGGER zzz_encryption_guard_update",
        "ALTER TABLE notes DISABLE TRIGGER zzz_encryption_guard_mention_0001",
        "DROP TRIGGER zzz_encryption_guard_mention_0000 ON notes",
    ],
)
def test_damaged_guard_is_seen_and_mended(guarded_url: str, damage: str) -> None:
    def in_place() -> bool:
        with Database(guarded_url).session("look at the guard") as connection:
            return not guard.guard_faults(connection, read_table(connection, ENTRY), "plaintext")

    assert in_place()
    run(guarded_url, damage)
    assert not in_place()
    assert support.add_columns(guarded_url, ENTRY).guards_created
    assert in_place()
    run(guarded_url, "UPDATE notes SET mail = 'new' WHERE id = 1")
    run(guarded_url, "INSERT INTO notes (id, mail, mail_encrypted) VALUES (7, 'new', 'E-new')")
    assert row(guarded_url)[:3] == row(guarded_url, 7)[:3] == ("new", None, None)


def test_guard_follows_the_catalogue(guarded_url: str) -> None:
    """A column that is catalogued later is guarded as well."""
    run(guarded_url, "ALTER TABLE notes ADD COLUMN more text DEFAULT 'old'")
    larger = support.table("notes", *ENTRY.columns, "more")
    result = support.add_columns(guarded_url, larger)
    assert result.added == ("more_encrypted",)
    assert result.guards_created
    run(guarded_url, "UPDATE notes SET more_encrypted = 'M', more = 'x' WHERE id = 1")
    run(guarded_url, "UPDATE notes SET more = 'y', mail = 'new' WHERE id = 1")
    assert run(guarded_url, f"SELECT more, more_encrypted, {ALL} FROM notes WHERE id = 1") == [
        ("y", None, "new", None, None, "old", "S-old")
    ]


def test_guard_follows_a_catalogue_that_shrinks(guarded_url: str) -> None:
    def triggers() -> int:
        return int(
            support.value(guarded_url, "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'notes'::regclass")
        )

    before = triggers()
    smaller = support.table("notes", "secret")
    assert support.add_columns(guarded_url, smaller).guards_created
    assert triggers() == before - 1
    assert not support.add_columns(guarded_url, smaller).guards_created
    run(
        guarded_url,
        "UPDATE notes SET secret = secret, secret_encrypted = 'S-new', mail_encrypted = 'E' WHERE id = 1",
    )
    assert row(guarded_url) == ("old", "E", "T-old", "old", "S-new")
    with pytest.raises(psycopg.errors.CheckViolation):
        run(guarded_url, "UPDATE notes SET mail = mail, secret_encrypted = 'S-newer' WHERE id = 1")


def test_keys_of_long_tables_get_a_guard_of_their_own(database_url: str) -> None:
    names = ["t" * 61 + "1", "t" * 61 + "2"]
    for name in names:
        run(database_url, f"CREATE TABLE {name} (id int PRIMARY KEY, v text)")
        support.encrypt(database_url, support.table(name, "v"))
    functions = {guard_name(support.table(name, "v")) for name in names}
    assert len(functions) == 2
    assert all(len(name) <= 63 for name in functions)
    for name in names:
        run(database_url, f"INSERT INTO {name} VALUES (1, 'new')")
        with pytest.raises(psycopg.errors.CheckViolation, match=name):
            run(database_url, f"UPDATE {name} SET v_encrypted = 'E'")


def test_plaintext_that_a_trigger_of_the_application_changes_during_the_backfill(database_url: str) -> None:
    """The ciphertext of the old text would otherwise stay beside the new one, and nobody would notice."""
    entry = support.table("people", "mail")
    run(
        database_url,
        """
        CREATE TABLE people (id int PRIMARY KEY, mail text);
        INSERT INTO people VALUES (1, 'OLD@EXAMPLE.ORG'), (2, 'new@example.org');
        CREATE FUNCTION lower_mail() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.mail := lower(NEW.mail); RETURN NEW; END $$;
        CREATE TRIGGER lower_mail BEFORE UPDATE ON people FOR EACH ROW EXECUTE FUNCTION lower_mail();
        ALTER TABLE people ENABLE ALWAYS TRIGGER lower_mail;
        """,
    )
    support.add_columns(database_url, entry)
    support.backfill_all(database_url, entry)
    support.backfill_all(database_url, entry)
    assert run(database_url, "SELECT mail FROM people ORDER BY id") == [
        ("old@example.org",),
        ("new@example.org",),
    ]
    assert support.assert_encrypted(database_url, entry) == 2


def test_a_composite_value_without_fields_is_a_value(database_url: str) -> None:
    """``IS NULL`` is true of ``(,)``, and ``IS NOT NULL`` false of ``(a,)``."""
    entry = support.table("places", support.searchable("at", "idx_places_at"))
    run(database_url, "CREATE TYPE address AS (street text, town text)")
    run(database_url, "CREATE TABLE places (id int PRIMARY KEY, at address)")
    support.add_columns(database_url, entry)
    for number, text in enumerate(("(,)", "(a,)", "(a,b)")):
        sides = [support.seal(text, "test_search"), support.token(text, "test_search")]
        run(database_url, "INSERT INTO places VALUES (%s, %s, %s, %s)", number, text, *sides)
        # A value alone is pending, and what was its ciphertext is not kept.
        run(database_url, "UPDATE places SET at = '(b,)' WHERE id = %s", number)
        assert run(database_url, "SELECT at_encrypted, at_search FROM places WHERE id = %s", number) == [
            (None, None)
        ]
        run(
            database_url,
            "UPDATE places SET at = %s, at_encrypted = %s, at_search = %s WHERE id = %s",
            text,
            *sides,
            number,
        )
        run(
            database_url,
            "INSERT INTO places (id, at, at_encrypted) VALUES (%s, %s, %s)",
            number + 10,
            text,
            sides[0],
        )
        assert run(database_url, "SELECT at_encrypted FROM places WHERE id = %s", number + 10) == [(None,)]
    support.backfill(database_url, entry)
    assert support.assert_encrypted(database_url, entry) == 6
