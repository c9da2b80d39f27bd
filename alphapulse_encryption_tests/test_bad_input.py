"""Wrong usage and configuration: one clear message, the right exit status, and nothing changed."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place, place

CANARY = "canary-5e1f"
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"


@pytest.fixture
def theirs(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(another.SCHEMA.encode())
    with place(postgres, database_url, server_dir.parent, another.MASTER_KEY_TEXT, another.CATALOGUE) as found:
        yield found


def refused(theirs: Place, status: int, *arguments: str, **changes: str | None) -> str:
    """The one message of a command that changed nothing."""
    before, runs = theirs.dump(), theirs.run_count()
    done = theirs.fails(status, *arguments, **changes)
    assert theirs.dump() == before
    assert theirs.run_count() == runs
    assert done.stdout == ""
    assert CANARY not in done.stderr
    return done.stderr


def message(theirs: Place, status: int, *arguments: str, **changes: str | None) -> str:
    """As :func:`refused`, the message being one line of ours."""
    said = refused(theirs, status, *arguments, **changes)
    assert said.startswith("python -m alphapulse_encryption: ")
    assert said.count("\n") == 1, said
    return said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "name at least one step"),
        (("--table", "sessions"), "name at least one step"),
        (("--confirm",), "name at least one step"),
        (("--add-columns", "--confirm"), "--confirm goes with --drop-unencrypted"),
        (("--drop-unencrypted",), "add --confirm"),
        (("--drop-unencrypted", "--verify"), "add --confirm"),
        (("--frobnicate",), "unrecognized arguments: --frobnicate"),
        (("--add-column",), "unrecognized arguments: --add-column"),
        (("--add-columns", "sessions"), "unrecognized arguments: sessions"),
        (("--verify", "--table"), "argument --table: expected one argument"),
        (("--verify", "--batch-size", "5"), "--batch-size goes with --migrate-data"),
        (("--approve-drop",), "takes one --table and --approver, --reason and --confirmation"),
        (("--verify", "--reason", "x"), "--reason: only with --approve-drop"),
        *(
            (("--migrate-data", f"--batch-size={size}"), "argument --batch-size: must be a whole number from 1 to")
            for size in ("0", "-1", "x", "1.5", "", "100001", "٣", "1_0", "9" * 5000)
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_usage(theirs: Place, arguments: tuple[str, ...], says: str) -> None:
    said = refused(theirs, 2, *arguments)
    assert said.startswith("usage: python -m alphapulse_encryption")
    # argparse's own form: the usage, then one line that says what is wrong.
    assert f"python -m alphapulse_encryption: error: {says}" in said.splitlines()[-1]
    assert said.count("error:") == 1


def test_unknown_table(theirs: Place) -> None:
    for name in ("nobody", "order_lines", "public.sessions", "crm.kunde", ""):
        said = message(theirs, 2, "--add-columns", "--table", "sessions", "--table", name)
        assert repr(name) in said
        assert "sessions, crm.order_lines, crm.Kunde" in said


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "is not set"),
        ("", "is not set"),
        (f"{CANARY}{CANARY}{CANARY}{CANARY}", "base64"),
        (f"{CANARY} !", "base64"),
        (base64.b64encode(bytes(31)).decode(), "32 bytes"),
        (base64.b64encode(bytes(33)).decode(), "32 bytes"),
    ],
    ids=["unset", "empty", "another alphabet", "no base64", "31 bytes", "33 bytes"],
)
def test_master_key(theirs: Place, value: str | None, says: str) -> None:
    said = message(theirs, 2, "--add-columns", **{VARIABLE: value})
    assert VARIABLE in said
    assert says in said
    assert "Fernet.generate_key()" in said
    assert not value or value not in said


def test_key_source_and_version(theirs: Place) -> None:
    said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_KEY_SOURCE=CANARY)
    assert "ALPHAPULSE_ENCRYPTION_KEY_SOURCE names an unknown key source" in said
    said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_KEY_VERSION="0")
    assert "ALPHAPULSE_ENCRYPTION_KEY_VERSION must be a whole number" in said


def test_another_key_than_the_database_was_begun_with(theirs: Place) -> None:
    theirs.succeeds("--add-columns", "--table", "crm.Kunde")
    other = base64.b64encode(bytes(32)).decode()
    for step in (("--add-columns",), ("--migrate-data",), ("--verify",), ("--drop-unencrypted", "--confirm")):
        said = message(theirs, 1, *step, **{VARIABLE: other})
        assert "is not the one this database was begun with" in said
        assert other not in said


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"postgresql://me:{CANARY}@127.0.0.1:1/db", "cannot be reached (connection refused)"),
        (f"postgresql:///db?host=/nowhere/{CANARY}&password={CANARY}", "no server at that socket"),
        (f"mysql://me:{CANARY}@host/db", "ALPHAPULSE_DATABASE_URL is not a PostgreSQL URL"),
        (f"host=db password={CANARY}", "ALPHAPULSE_DATABASE_URL is not a PostgreSQL URL"),
        (f"postgresql://me:{CANARY}@127.0.0.1:port/db", "the connection string is malformed"),
        (f"postgresql://me:{CANARY}@127.0.0.1/db?nonsense={CANARY}", "the connection string is malformed"),
    ],
    ids=["nobody listens", "no socket", "another scheme", "no URL", "bad port", "unknown parameter"],
)
def test_target_database(theirs: Place, url: str, says: str) -> None:
    said = message(theirs, 2, "--add-columns", ALPHAPULSE_DATABASE_URL=url)
    assert says in said
    assert "ALPHAPULSE_DATABASE_URL" in said


def test_database_that_does_not_exist(theirs: Place) -> None:
    said = message(theirs, 2, "--verify", ALPHAPULSE_DATABASE_URL=theirs.postgres.url(CANARY))
    assert "no such role or database" in said


@pytest.mark.parametrize(
    "url",
    [f"postgresql://me:{CANARY}@127.0.0.1:1/db", f"mysql://me:{CANARY}@127.0.0.1/db", f"postgresql://me:{CANARY}@h:p/db"],
    ids=["nobody listens", "another scheme", "bad port"],
)
def test_dagster_storage(theirs: Place, url: str) -> None:
    said = message(theirs, 2, "--add-columns", DAGSTER_POSTGRES_URL=url)
    assert "DAGSTER_POSTGRES_URL" in said


@pytest.mark.parametrize("ranges", ["0", "1000", "x", "1.5"])
def test_batch_ranges(theirs: Place, ranges: str) -> None:
    said = message(theirs, 2, "--add-columns", ALPHAPULSE_BATCH_RANGES=ranges)
    assert "ALPHAPULSE_BATCH_RANGES must be a whole number from 1 to 999" in said


def test_other_batch_ranges_than_were_planned(theirs: Place) -> None:
    theirs.succeeds("--add-columns", "--table", "sessions")
    for step in ("--add-columns", "--migrate-data", "--verify"):
        said = message(theirs, 2, step, ALPHAPULSE_BATCH_RANGES="3")
        assert "Set it to 2" in said


def entry(table: str, column: str, extra: str = "") -> str:
    return f"tables:\n  - {{name: {table}, columns: [{{name: {column}, context: c{extra}}}]}}\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (entry("nobody", "x"), "Table public.nobody is in the catalogue but not in the database"),
        (entry("Sessions", "token"), "Table public.Sessions is in the catalogue but not in the database"),
        (entry("sessions", "nothing"), "Table sessions has no column nothing"),
        (entry("sessions", "Token"), "Table sessions has no column Token"),
        (entry("keyless", "secret"), "Table keyless has no primary key"),
        (entry("sessions", "id"), "Column sessions.id is part of the primary key"),
        (entry("sessions", "token", ", searchable: true"), "tables[0].columns[0].searchable: unknown key"),
        (entry("sessions", "token") + "databse: x\n", "databse: unknown key"),
        ("tables: [", "not valid YAML"),
        (f"tables: &{CANARY} [*{CANARY}x", "not valid YAML"),
        ("", "must be a mapping"),
        ("format: ROT13\n" + entry("sessions", "token"), "ROT13"),
    ],
    ids=lambda value: value[:40].replace("\n", " ") if isinstance(value, str) else "",
)
def test_catalogue(theirs: Place, text: str, says: str) -> None:
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE keyless (secret text)")
    # A table that is in order stands before the one that is not: it is not begun either.
    path = theirs.catalogue_file(text)
    done = refused(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(path)) if CANARY in text else None
    said = done or message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(path))
    assert says in said


def test_nothing_is_begun_where_a_later_table_is_wrong(theirs: Place) -> None:
    text = another.CATALOGUE + "  - {name: nobody, columns: [{name: x, context: c}]}\n"
    path = theirs.catalogue_file(text)
    said = message(theirs, 2, "--add-columns", "--migrate-data", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(path))
    assert "public.nobody" in said


def test_missing_catalogue_file(theirs: Place) -> None:
    path = theirs.state / "no such.yaml"
    said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(path))
    assert f"catalogue {path}: cannot be read" in said
