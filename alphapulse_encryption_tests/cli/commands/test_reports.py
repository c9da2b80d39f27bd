"""Plan, status and the other reports as commands: one document on standard output, nothing changed, no run made."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest

from alphapulse_encryption.__main__ import main
from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.migration.bookkeeping.install import LAYOUT
from alphapulse_encryption.migration.insight.plan import Plan
from alphapulse_encryption.migration.insight.status import Status
from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place

# Nobody listens there.
NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"


def document(theirs: Place, *arguments: str, **changes: str | None) -> Any:
    """What is on standard output, all of it, as JSON."""
    return json.loads("\n".join(theirs.succeeds(*arguments, **changes)))


def printed(
    theirs: Place, capsys: pytest.CaptureFixture[str], *arguments: str, **changes: str
) -> tuple[int, str]:
    """Status and standard output of the command in this process, which has its libraries loaded."""
    with theirs.in_environment(), pytest.MonkeyPatch.context() as environment:
        for name, text in changes.items():
            environment.setenv(name, text)
        status = main(arguments)
    said = capsys.readouterr()
    assert said.err == ""
    return status, said.out


def test_before_anything_exists(theirs: Place, capsys: pytest.CaptureFixture[str]) -> None:
    # Neither Dagster's storage nor its home: a read needs none, and makes none.
    without = {"DAGSTER_POSTGRES_URL": NOWHERE, "DAGSTER_HOME": str(theirs.state / "nowhere")}
    before = theirs.dump()
    theirs.environment()
    # Where commands keep their log files.
    (theirs.state / "logs").mkdir(exist_ok=True)
    files = sorted(theirs.state.iterdir())
    planned = document(theirs, "--plan", "--json", **without)
    plan = Plan.model_validate(planned)
    assert [table.table for table in plan.tables] == list(another.TABLES)
    assert plan.version == planned["version"] == 1 and planned["kind"] == "plan"
    assert len(plan.bookkeeping) == len(LAYOUT.versions) and not plan.blockers
    for table in plan.tables:
        assert len(table.ranges) == theirs.ranges and table.rows == another.ROWS[table.table]

    def read(*arguments: str) -> Any:
        status, text = printed(theirs, capsys, *arguments, **without)
        assert status == 0
        return json.loads(text)

    assert [table["table"] for table in read("--plan", "--json", "--table", "crm.Kunde")["tables"]] == [
        "crm.Kunde"
    ]
    found = Status.model_validate(document(theirs, "--status", "--json", **without))
    assert not found.begun and {table.stage for table in found.tables} == {"not begun"}
    assert read("--approvals", "--json")["approvals"] == []
    assert read("--key-usage", "--json")["usage"] == []
    assert read("--key-versions", "--json")["versions"] == []
    assert read("--settings", "--json")["settings"]["paused"] is False
    checked = read("--preflight", "--json")
    assert {finding["level"] for finding in checked["report"]["findings"]} == {"ok", "warning"}
    for one in ("--plan", "--status", "--discover"):
        assert read(one, "--json-schema")["properties"]["version"]["const"] == 1
    # All the settings by words, too, without making the bookkeeping.
    assert printed(theirs, capsys, "--settings", **without)[1].startswith("paused = False")
    lines = theirs.succeeds("--plan", **without)
    assert lines[0].startswith("Plan for 3 tables, 6 columns: about 200 rows")
    statements = [s.sql for table in plan.tables for step in table.steps for s in step.statements]
    text = "\n".join(lines)
    assert len(statements) > 50 and all(statement.strip() in text for statement in statements)
    words = [line for line in lines if not any(line in statement for statement in statements)]
    assert max(len(line) for line in words if '"' not in line and "CREATE" not in line) <= 120
    assert "nothing was begun" in printed(theirs, capsys, "--status", **without)[1]
    assert theirs.dump() == before
    assert theirs.run_count() == 0
    # Nor does it mind one that is down.
    assert theirs.succeeds("--plan", DAGSTER_POSTGRES_URL=NOWHERE) == lines
    assert sorted(theirs.state.iterdir()) == files


def test_blockers_end_it_with_one(theirs: Place) -> None:
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE crm.child () INHERITS (crm.order_lines)")
        connection.execute("ALTER TABLE sessions DROP CONSTRAINT sessions_pkey")
    ended = theirs.fails(1, "--plan", "--json", ALPHAPULSE_ENCRYPTION_MASTER_KEY=None)
    assert ended.stderr == ""
    plan = Plan.model_validate_json(ended.stdout)
    assert {finding.subject for finding in plan.blockers} == {
        "key",
        "sessions",
        "crm.order_lines",
        "catalogue",
    }
    # What can be planned is planned.
    assert [table.table for table in plan.tables] == ["crm.Kunde"]
    assert theirs.fails(1, "--preflight", "--json").stderr == ""


def test_errors_are_not_on_standard_output(theirs: Place) -> None:
    for arguments in (("--plan", "--json"), ("--status", "--json"), ("--approvals", "--json")):
        ended = theirs.fails(2, *arguments, ALPHAPULSE_DATABASE_URL=NOWHERE)
        assert ended.stdout == ""
        assert "cannot be reached" in ended.stderr and "role nobody" in ended.stderr
    unknown = theirs.fails(2, "--status", "--json", "--table", "nothing")
    assert unknown.stdout == "" and "unknown table" in unknown.stderr


def test_watching_ends_with_nothing_wrong(theirs: Place) -> None:
    watching = theirs.start("--status", "--watch")
    support.until(lambda: "tables verified" in watching.output or not watching.running, "a picture")
    watching.interrupt()
    ended = watching.ended()
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "0 of 3 tables verified" in ended.stdout


def test_a_catalogue_is_proposed(theirs: Place) -> None:
    without = {"DAGSTER_POSTGRES_URL": NOWHERE, "ALPHAPULSE_ENCRYPTION_MASTER_KEY": None}
    printed = "\n".join(theirs.succeeds("--discover", **without)) + "\n"
    file = theirs.state / "proposed.yaml"
    told = theirs.succeeds("--discover", "--output", str(file), **without)
    assert told[-1] == f"✓ Wrote {file}"
    assert file.read_text() == printed
    proposed = load_catalogue(file)
    assert set(proposed.keys) == {"sessions", "crm.order_lines", "crm.Kunde"}
    assert {column.name for column in proposed.table("crm.Kunde").columns} == {"E-Mail", "geburts Tag"}
    # What is there is left alone.
    file.write_text("mine")
    refused = theirs.fails(2, "--discover", "--output", str(file), **without)
    assert refused.stdout == "" and "is there already, and was left alone" in refused.stderr
    assert file.read_text() == "mine"
    found = document(
        theirs, "--discover", "--json", "--schema", "crm", "--output", str(file), "--force", **without
    )
    assert found["kind"] == "discovery" and found["version"] == 1 and found["schemas"] == ["crm"]
    assert set(load_catalogue(file).keys) == {"crm.order_lines", "crm.Kunde"}
    assert sorted(path.name for path in theirs.state.iterdir() if "proposed" in path.name) == [
        "proposed.yaml"
    ]
    # And goes on to be planned.
    plan = theirs.run("--plan", "--json", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(file))
    assert plan.returncode == 0 and len(json.loads(plan.stdout)["tables"]) == 2
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA empty")
    nothing = theirs.fails(1, "--discover", "--json", "--schema", "empty")
    assert json.loads(nothing.stdout)["catalogue"] is None
    assert "nothing that looks sensitive" in nothing.stderr
    unknown = theirs.fails(2, "--discover", "--schema", "nothing")
    assert (unknown.stdout, "There is no schema nothing" in unknown.stderr) == ("", True)


def test_what_is_saved_and_not_authenticated_is_shown_and_then_signed(
    theirs: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "crm.Kunde"
    assert printed(theirs, capsys, "--sign-saved", "show")[0] == 0
    theirs.succeeds("--add-columns", "--table", key)
    planted = json.dumps({"defaults": {"x": "evil('\u202e\x1b[2J')"}})
    support.run(
        theirs.url,
        "UPDATE alphapulse_encryption.tables SET authority = 'ciphertext', set_aside = %s WHERE table_name = %s",
        planted,
        key,
    )
    status, text = printed(theirs, capsys, "--sign-saved", "show")
    assert status == 1
    assert "evil('\\u202e\\u001b[2J')" in text and text.isascii()
    digest = text.split()[-1]
    assert len(digest) == 64
    support.run(
        theirs.url, "UPDATE alphapulse_encryption.tables SET set_aside = '{}' WHERE table_name = %s", key
    )
    with theirs.in_environment():
        assert main(["--sign-saved", digest]) == 1
    assert "not what was shown" in capsys.readouterr().err
    support.run(
        theirs.url,
        "UPDATE alphapulse_encryption.tables SET set_aside = %s WHERE table_name = %s",
        planted,
        key,
    )
    status, text = printed(theirs, capsys, "--sign-saved", digest)
    assert status == 0 and "Signed" in text
    assert "Nothing to do" in printed(theirs, capsys, "--sign-saved", "show")[1]
