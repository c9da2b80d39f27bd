"""Text of others at a terminal: shown as what it is, and nothing that it does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphapulse_encryption.cli.console import Terminal
from alphapulse_encryption.cli.reports.terminal import grid
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.gates.findings import Finding
from alphapulse_encryption.visible import VisibleStream, visible, visible_json, visible_sql
from alphapulse_encryption_tests.migration.support import run

# Clears the screen, moves up, hides what follows, sets the title, turns a line around, and a C1 control sequence.
HOSTILE = "users\x1b[2J\x1b[1A\x1b[8m\x1b]0;t\x07\u202egnihton\u2066\x9b31m\r\x7f"


def shows_only(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


@given(st.text())
def test_nothing_is_left_that_does_something(text: str) -> None:
    shown = visible(text)
    assert shows_only(shown)
    assert visible(shown) == shown
    if shows_only(text):
        assert shown == text


@given(st.recursive(st.none() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_a_document_stays_the_same(document: object) -> None:
    for ensure_ascii in (True, False):
        shown = visible_json(json.dumps(document, indent=1, ensure_ascii=ensure_ascii))
        assert shows_only(shown)
        assert json.loads(shown) == document


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_a_script_says_the_same(database_of_scripts: psycopg.Connection[tuple[str, str]], text: str) -> None:
    quoted = text.replace('"', '""')
    literal = text.replace("'", "''")
    named = f'SELECT row_to_json(t) FROM (SELECT 1 AS "{quoted}") t'
    script = visible_sql(f"SELECT '{literal}' AS a, ({named}) #>> '{{}}'")
    assert shows_only(script)
    found = database_of_scripts.execute(script.encode()).fetchone()
    assert found is not None and found[0] == text
    # The server cuts a name after 63 bytes.
    name = text.encode()[:63].decode(errors="ignore")
    assert list(json.loads(found[1])) == [name]


@pytest.fixture(scope="module")
def database_of_scripts(postgres: object) -> object:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:  # type: ignore[attr-defined]
        yield connection


def test_a_table_of_a_report_and_a_plain_line() -> None:
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=True, width=200)
    shown = grid("table", ">rows")
    shown.add_row(HOSTILE, "1")
    terminal.print(shown)
    assert "\x1b[2J" not in out.getvalue() and "\x9b" not in out.getvalue() and "\u202e" not in out.getvalue()
    assert "users\\x1b[2J" in out.getvalue()
    plain = io.StringIO()
    print(HOSTILE, file=VisibleStream(plain))
    assert shows_only(plain.getvalue())


def test_errors_and_findings_are_visible_where_they_are_made() -> None:
    """They go into logs, events and alerts as well."""
    assert shows_only(str(RefusedError(f"The trigger {HOSTILE} is not ours.")))
    assert shows_only(str(Finding("warning", HOSTILE, "is not ours\n✓ all: verified")))
    assert "\n" not in str(Finding("warning", "users", "is not ours\n✓ all: verified"))


@pytest.mark.parametrize(
    "arguments", [["--preflight"], ["--preflight", "--json"], ["--roles-sql"], ["--plan"]]
)
def test_a_command_shows_names_of_others_as_they_are(
    database_url: str, tmp_path: Path, arguments: list[str]
) -> None:
    name = HOSTILE.replace('"', "")[:60]
    run(
        database_url, f'CREATE TABLE people (id int PRIMARY KEY, "mail" text); CREATE TABLE "{name}" (id int)'
    )
    run(
        database_url,
        f'CREATE FUNCTION "{name}"() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$; '
        f'CREATE TRIGGER "{name}" BEFORE UPDATE ON people FOR EACH ROW EXECUTE FUNCTION "{name}"(); '
        f'CREATE VIEW "v{name[:50]}" AS SELECT mail FROM people; CREATE INDEX "i{name[:50]}" ON people (lower(mail))',
    )
    (tmp_path / "catalogue.yaml").write_text(
        "tables:\n  - {name: people, columns: [{name: mail, context: pii}]}\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "alphapulse_encryption", *arguments],
        env=os.environ
        | {
            "ALPHAPULSE_DATABASE_URL": database_url,
            "ALPHAPULSE_ENCRYPTION_CATALOGUE": str(tmp_path / "catalogue.yaml"),
            "DAGSTER_HOME": str(tmp_path),
            "ALPHAPULSE_ENCRYPTION_MASTER_KEY": "A" * 43 + "=",
        },
        capture_output=True,
        check=False,
        timeout=300,
    )
    text = done.stdout.decode() + done.stderr.decode()
    assert done.returncode in (0, 1), text
    assert shows_only(text)
    if arguments[0] != "--roles-sql":
        assert "people" in text and "gnihton" in text
    if "--json" in arguments:
        json.loads(done.stdout)
