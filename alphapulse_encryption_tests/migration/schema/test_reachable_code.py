"""What runs when a table is touched, and whose it is: each way to it found, and gone by the statement that is told."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.reachable_code import Foreign, foreign_code
from alphapulse_encryption_tests.migration import support

NOTES = Table(name="notes", columns=(Column(name="body", context="test_context"),))
_ROLES = """
DO $$ DECLARE name text; BEGIN
    FOREACH name IN ARRAY ARRAY['stranger', 'keeper', 'colleague'] LOOP
        IF to_regrole(name) IS NULL THEN EXECUTE format('CREATE ROLE %I LOGIN', name); END IF;
    END LOOP;
END $$;
GRANT keeper TO colleague;
CREATE SCHEMA app;
GRANT USAGE, CREATE ON SCHEMA app TO stranger, keeper, colleague;
"""
_TABLE = "CREATE TABLE notes (id int PRIMARY KEY, body text, other text); ALTER TABLE notes OWNER TO keeper;"
# Read when it runs, with a search path of its own, so that nothing but its owner is at issue.
_BODY = "SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN {}; END'"
_TRIGGER = "CREATE FUNCTION app.f() RETURNS trigger LANGUAGE plpgsql " + _BODY.format("NEW")
_OF_TEXT = "CREATE FUNCTION app.f(text) RETURNS {} IMMUTABLE LANGUAGE plpgsql " + _BODY
_TRUE = _OF_TEXT.format("bool", "true")
_SAME = _OF_TEXT.format("text", "$1")
_ORDER = "CREATE FUNCTION app.f(text, text) RETURNS int IMMUTABLE LANGUAGE plpgsql " + _BODY.format("0")

# By what the stranger owns: how the stranger makes it, what is done with it then by who may, and what is named.
WAYS: dict[str, tuple[str, str, str]] = {
    "a trigger": (
        _TRIGGER,
        "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.f()",
        "app.f()",
    ),
    "a trigger of a statement": (
        _TRIGGER,
        "CREATE TRIGGER t AFTER UPDATE ON notes EXECUTE FUNCTION app.f()",
        "app.f()",
    ),
    "the condition of a trigger": (
        _TRUE,
        "CREATE FUNCTION app.g() RETURNS trigger LANGUAGE plpgsql " + _BODY.format("NEW") + "; "
        "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW WHEN (app.f(NEW.body)) EXECUTE FUNCTION app.g()",
        "app.f(text)",
    ),
    "a check": (_TRUE, "ALTER TABLE notes ADD CHECK (app.f(body))", "app.f(text)"),
    "a default": (_SAME, "ALTER TABLE notes ALTER other SET DEFAULT app.f('x')", "app.f(text)"),
    "a generated column": (
        _SAME,
        "ALTER TABLE notes ADD made text GENERATED ALWAYS AS (app.f(body)) STORED",
        "app.f(text)",
    ),
    "an index": (_SAME, "CREATE INDEX ON notes (app.f(other))", "app.f(text)"),
    "an index's condition": (_TRUE, "CREATE INDEX ON notes (id) WHERE app.f(other)", "app.f(text)"),
    "an operator class": (
        _ORDER,
        "CREATE OPERATOR CLASS app.c FOR TYPE text USING btree AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, "
        "OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 app.f(text, text); CREATE INDEX ON notes (other app.c)",
        "app.f(text,text)",
    ),
    "statistics": (_SAME, "CREATE STATISTICS s ON app.f(other), id FROM notes", "app.f(text)"),
    "a policy": (_TRUE, "CREATE POLICY p ON notes USING (app.f(body))", "app.f(text)"),
    "a rule": (
        _TRUE,
        "CREATE RULE r AS ON UPDATE TO notes WHERE app.f(NEW.body) DO ALSO SELECT 1",
        "app.f(text)",
    ),
    "a trigger of what a rule writes to": (
        _TRIGGER,
        "CREATE TABLE log (id int); CREATE TRIGGER t BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION app.f(); "
        "CREATE RULE r AS ON UPDATE TO notes DO ALSO INSERT INTO log VALUES (NEW.id)",
        "app.f()",
    ),
    "what a function's own body calls": (
        _TRUE,
        "CREATE FUNCTION app.g(text) RETURNS bool IMMUTABLE LANGUAGE sql RETURN app.f($1); "
        "ALTER TABLE notes ADD CHECK (app.g(body))",
        "app.f(text)",
    ),
    "an event trigger": (
        "CREATE FUNCTION app.f() RETURNS event_trigger LANGUAGE plpgsql SET search_path = pg_catalog "
        "AS 'BEGIN NULL; END'",
        "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION app.f()",
        "app.f()",
    ),
    "a type": ("CREATE TYPE app.mood AS ENUM ('well')", "ALTER TABLE notes ADD mood app.mood", "app.mood"),
    "a type's array": (
        "CREATE TYPE app.mood AS ENUM ('well')",
        "ALTER TABLE notes ADD mood app.mood[]",
        "app.mood",
    ),
    "a type in a type": (
        "CREATE DOMAIN app.mood AS text",
        "CREATE TYPE app.pair AS (a app.mood, b int); ALTER TABLE notes ADD mood app.pair",
        "app.mood",
    ),
    "a domain": ("CREATE DOMAIN app.mood AS text", "ALTER TABLE notes ADD mood app.mood", "app.mood"),
    "a domain's check": (
        _TRUE,
        "CREATE DOMAIN app.mood AS text CHECK (app.f(VALUE)); ALTER TABLE notes ADD mood app.mood",
        "app.f(text)",
    ),
    "the check of a domain's domain": (
        _TRUE,
        "CREATE DOMAIN app.inner AS text CHECK (app.f(VALUE)); CREATE DOMAIN app.mood AS app.inner; "
        "ALTER TABLE notes ADD mood app.mood",
        "app.f(text)",
    ),
    "a cast to text": (
        "",
        "CREATE TYPE app.mood AS ENUM ('well'); CREATE FUNCTION app.f(app.mood) RETURNS text IMMUTABLE "
        "LANGUAGE plpgsql " + _BODY.format("NULL") + "; ALTER FUNCTION app.f(app.mood) OWNER TO stranger; "
        "CREATE CAST (app.mood AS text) WITH FUNCTION app.f(app.mood); ALTER TABLE notes ADD mood app.mood",
        "app.f(app.mood)",
    ),
    "a cast from text": (
        "",
        "CREATE TYPE app.mood AS ENUM ('well'); CREATE FUNCTION app.f(text) RETURNS app.mood IMMUTABLE "
        "LANGUAGE plpgsql " + _BODY.format("NULL") + "; ALTER FUNCTION app.f(text) OWNER TO stranger; "
        "CREATE CAST (text AS app.mood) WITH FUNCTION app.f(text); ALTER TABLE notes ADD mood app.mood",
        "app.f(text)",
    ),
    "a compatibility view": (
        _TRUE,
        "CREATE VIEW v_notes AS SELECT * FROM notes WHERE app.f(body)",
        "app.f(text)",
    ),
    "a view behind a compatibility view": (
        _TRUE,
        "CREATE VIEW behind AS SELECT * FROM notes WHERE app.f(body); CREATE VIEW v_notes_safe AS TABLE behind",
        "app.f(text)",
    ),
    "a guard by its name": (
        "CREATE FUNCTION app.encryption_guard_notes() RETURNS trigger LANGUAGE plpgsql "
        + _BODY.format("NEW"),
        "CREATE TRIGGER zzz BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.encryption_guard_notes()",
        "app.encryption_guard_notes()",
    ),
    "the privilege to make a trigger": ("", "GRANT TRIGGER ON notes TO stranger", "TRIGGER on public.notes"),
    "the privilege to make a trigger, of all": (
        "",
        "GRANT ALL ON notes TO PUBLIC",
        "TRIGGER on public.notes",
    ),
}
# A trusted function that names something without its schema, and who may make that.
_NAMING = (
    "CREATE FUNCTION app.f() RETURNS trigger LANGUAGE plpgsql {} AS 'BEGIN RETURN helper(NEW); END'; "
    "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.f()"
)
WAYS |= {
    "a schema of the session's path": (
        "",
        "CREATE SCHEMA ours; GRANT CREATE ON SCHEMA ours TO PUBLIC; "
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path TO ours', current_database()); END $$; "
        + _NAMING.format(""),
        "CREATE on the schema ours",
    ),
    "a schema of the function's own path": (
        "",
        _NAMING.format("SET search_path = app"),
        "CREATE on the schema app",
    ),
    "a schema that is the stranger's": (
        "",
        'CREATE SCHEMA "The irs" AUTHORIZATION stranger; ' + _NAMING.format('SET search_path = "The irs"'),
        'schema "The irs"',
    ),
    "a schema that is missing": (
        "",
        "DO $$ BEGIN EXECUTE format('GRANT CREATE ON DATABASE %I TO stranger', current_database()); END $$; "
        + _NAMING.format('SET search_path = "$user"'),
        "CREATE on the database",
    ),
}


def prepared(url: str) -> str:
    support.run(url, _ROLES)
    support.run(url, _TABLE)
    return url


def found(url: str, entry: Table = NOTES) -> tuple[Foreign, ...]:
    with Database(url).session("look") as connection:
        return foreign_code(connection, read_table(connection, entry, look=True).oid)


def plant(url: str, theirs: str, then: str) -> None:
    if theirs:
        support.run(url.replace("//postgres@", "//stranger@", 1), theirs)
    if then:
        support.run(url, then)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_is_told_and_refused_until_the_statement_is_typed(database_url: str, way: str) -> None:
    theirs, then, named = WAYS[way]
    url = prepared(database_url)
    assert found(url) == ()
    plant(url, theirs, then)
    told = found(url)
    (one,) = (one for one in told if named in one.what)
    assert one.owner == ("PUBLIC" if "PUBLIC" in then else "stranger")
    # Beside the owner's own, on whom all depends.
    assert len(told) == 1
    blockers = check(Database(url), (NOTES,), None).blockers
    assert any(one.what in b.message and one.owner in b.message and one.remedy in b.message for b in blockers)
    with Database(url).session("work") as connection, pytest.raises(RefusedError) as caught:
        read_table(connection, NOTES)
    assert one.what in caught.value.args[0] and one.remedy in caught.value.args[0]
    support.run(url, one.remedy)
    assert found(url) == ()


def test_partitions_and_their_owners(database_url: str) -> None:
    url = prepared(database_url)
    support.run(
        url,
        "CREATE TABLE parted (id int PRIMARY KEY, body text) PARTITION BY RANGE (id); "
        "CREATE TABLE below PARTITION OF parted FOR VALUES FROM (0) TO (9) PARTITION BY RANGE (id); "
        "CREATE TABLE parted_1 PARTITION OF below FOR VALUES FROM (1) TO (3); ALTER TABLE parted OWNER TO keeper; "
        "ALTER TABLE parted_1 OWNER TO stranger",
    )
    plant(
        url,
        "CREATE FUNCTION app.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
        "CREATE TRIGGER t BEFORE UPDATE ON parted_1 FOR EACH ROW EXECUTE FUNCTION app.f()",
        "",
    )
    entry = Table(name="parted", columns=NOTES.columns)
    told = {one.what: one.remedy for one in found(url, entry)}
    assert {"the table public.parted_1", "the function app.f()"} <= set(told)
    for _ in range(2):
        for one in found(url, entry):
            support.run(url, one.remedy)
    assert found(url, entry) == ()


@pytest.mark.parametrize("owner", ["keeper", "colleague", "postgres"])
def test_who_may_change_the_table_anyway_is_trusted(database_url: str, owner: str) -> None:
    url = prepared(database_url)
    plant(url, "", f"{_TRIGGER}; ALTER FUNCTION app.f() OWNER TO {owner}")
    support.run(url, "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.f()")
    support.run(url, "GRANT TRIGGER ON notes TO colleague")
    assert found(url) == ()


def test_an_extension_is_trusted_as_far_as_its_owner(database_url: str) -> None:
    url = prepared(database_url)
    support.run(url, "CREATE EXTENSION citext")
    support.run(url, "ALTER TABLE notes ADD name citext; CREATE INDEX ON notes (name)")
    assert found(url) == ()
    support.run(url, "ALTER FUNCTION citext_cmp(citext, citext) OWNER TO stranger")
    assert [one.what for one in found(url)] == ["the function public.citext_cmp(public.citext,public.citext)"]


def test_what_is_disabled_or_other_tables_own_is_not_reached(database_url: str) -> None:
    url = prepared(database_url)
    plant(
        url,
        _TRIGGER + "; CREATE TYPE app.evil AS ENUM ('a')",
        "CREATE TABLE others (id int PRIMARY KEY REFERENCES notes); "
        "CREATE TRIGGER t BEFORE UPDATE ON others FOR EACH ROW EXECUTE FUNCTION app.f(); "
        "CREATE TRIGGER t BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.f(); "
        "ALTER TABLE notes DISABLE TRIGGER t; CREATE VIEW others_view AS SELECT FROM notes, others",
    )
    assert found(url) == ()


def test_a_trigger_that_comes_while_a_range_is_worked_on_is_refused(database_url: str) -> None:
    """The owner lets it in between two batches; none of it has run when the step ends."""
    url = prepared(database_url)
    support.run(url, "INSERT INTO notes SELECT i, 'b' || i FROM generate_series(1, 400) i")
    support.add_columns(url, NOTES)
    support.run(url.replace("//postgres@", "//stranger@", 1), _TRIGGER)

    def plant_now(_: object) -> None:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(
                "CREATE OR REPLACE TRIGGER aaa BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION app.f()"
            )

    with pytest.raises(RefusedError, match=r"app\.f\(\)"):
        backfill_range(support.target(url), NOTES, 0, pace=Pace(100), on_progress=plant_now)
    assert 0 < support.value(url, "SELECT count(*) FROM notes WHERE body_encrypted IS NOT NULL") < 400
