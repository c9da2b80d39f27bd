"""The same at the command line and in a rehearsal: what is typed, partitioned and reported has the names in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.hostile.names import HOSTILE, Named, database_of, rows, shape
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place
from alphapulse_encryption_tests.rehearsal.circle import KEY, clones, last, rehearse

# Short enough for a prefix and a suffix, with something of every kind.
MIXED = Named("'\"%s$$\\<b>\u202e💥\x1b\n;--")


@pytest.fixture
def hostile(postgres: EmbeddedPostgres, database_url: str, server_dir: Path) -> Iterator[Place]:
    catalogue = MIXED.catalogue.model_dump(mode="json", by_alias=True, exclude_none=True)
    with (
        database_of(MIXED, database_url),
        place(postgres, database_url, server_dir.parent, KEY, yaml.safe_dump(catalogue)) as found,
    ):
        yield found


@pytest.mark.long
def test_there_and_back(hostile: Place) -> None:
    key = MIXED.table.key
    before, held = shape(MIXED, hostile.url), rows(MIXED, hostile.url)
    hostile.run("--preflight")
    hostile.succeeds("--add-columns", "--migrate-data", "--verify", "--create-views")
    hostile.succeeds("--live-check", "--switch-to-encrypted", "--verify", "--table", key)
    for report in ("--status", "--plan", "--approvals", "--key-usage"):
        hostile.succeeds(report)
    hostile.succeeds("--set", "two_person_rule=names")
    hostile.succeeds("--backup")
    answers = ("--approver", HOSTILE["markup"], "--reason", HOSTILE["format"], "--confirmation", key)
    hostile.succeeds("--approve-drop", "--table", key, *answers)
    assert HOSTILE["markup"] in "\n".join(hostile.succeeds("--approvals"))
    hostile.succeeds("--drop-unencrypted", "--confirm", "--operator", HOSTILE["quotes"])
    hostile.run("--erase-dropped", "--table", key, "--confirmation", key)
    hostile.succeeds("--restore-plaintext")
    hostile.succeeds("--revert-to-plaintext")
    assert rows(MIXED, hostile.url) == held
    assert shape(MIXED, hostile.url) == before


@pytest.mark.long
def test_a_rehearsal(hostile: Place) -> None:
    url, table = hostile.url, MIXED.table
    # Of an enum type or a domain the traffic writes nothing, and the server would write the default.
    for column in table.columns[1:]:
        parts = (Identifier(table.schema_name, table.name), Identifier(column.name))
        support.run(url, SQL("ALTER TABLE {} ALTER {} DROP DEFAULT").format(*parts))
    hostile.extra = {"ALPHAPULSE_DATABASE_URL": None, "ALPHAPULSE_STAGING_DATABASE_URL": url}
    with hostile.instance() as instance:
        outcome = rehearse(hostile, instance, traffic={"rate": 5}, observe_seconds=1)
        assert (outcome.problems, outcome.succeeded) == ((), True)
        assert last(instance).source_unchanged
    page = (hostile.state / "rehearsals" / outcome.run_id / "index.html").read_text()
    # Markup in a name is shown, not followed.
    assert "\\<b>" not in page and "\\&lt;b&gt;" in page
    assert clones(hostile) == []


@pytest.mark.parametrize("kind", ["escape", "newline"])
@pytest.mark.parametrize("word", ["name", "schema"])
def test_a_table_whose_name_no_partition_can_have_is_refused_by_name(
    hostile: Place, kind: str, word: str
) -> None:
    catalogue = MIXED.catalogue.model_dump(mode="json", by_alias=True, exclude_none=True)
    catalogue["tables"][0][word] = f"people{HOSTILE[kind]}".replace("[", "")
    path = hostile.catalogue_file(yaml.safe_dump(catalogue))
    done = hostile.fails(2, "--preflight", ALPHAPULSE_ENCRYPTION_CATALOGUE=str(path))
    assert "must not contain control characters" in done.stderr + done.stdout


def test_what_is_not_catalogued_misleads_nobody(hostile: Place) -> None:
    """Other objects of the database may have any name, in reports too."""
    table = MIXED.table
    for text in HOSTILE.values():
        for statement in (
            "CREATE TABLE {} (email text, id int PRIMARY KEY)",
            "CREATE VIEW {} AS SELECT {mail} FROM {schema}.{people}",
            "CREATE FUNCTION {}() RETURNS text LANGUAGE sql AS $f$SELECT 'x'$f$",
            "CREATE TRIGGER {} AFTER UPDATE ON {schema}.{people} FOR EACH ROW EXECUTE FUNCTION "
            "{schema}.{trigger}()",
        ):
            name = Identifier(f"{statement.split()[1].lower()} {text}".encode()[:60].decode(errors="ignore"))
            support.run(
                hostile.url,
                SQL(statement).format(
                    name,
                    mail=Identifier(table.columns[0].name),
                    schema=Identifier(table.schema_name),
                    people=Identifier(table.name),
                    trigger=Identifier(MIXED("of_trigger")),
                ),
            )
    for report in ("--preflight", "--discover", "--status", "--plan"):
        done = hostile.run(report)
        assert done.returncode in (0, 1), (done.stdout, done.stderr)
        assert "Traceback" not in done.stdout + done.stderr
