"""A database with one of everything that preflight knows: all of it is told at once, by its name, with what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from alphapulse_encryption.catalogue import Column, Table
from alphapulse_encryption.migration.gates.preflight import PreflightReport, check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption_tests.docs.messages import plain
from alphapulse_encryption_tests.docs.pages import page
from alphapulse_encryption_tests.docs.test_messages import phrases
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import KEYS, run


@dataclass(frozen=True)
class Thing:
    """What is made, and what has to be told of it.

    Args:
        words: the object's name and what to do, all of which are in one finding.
    """

    name: str
    statements: tuple[str, ...]
    level: str
    subject: str
    words: tuple[str, ...]


def searchable(table: str, *columns: str, index: str) -> Table:
    return support.table(table, support.searchable("mail", index), *columns)


PEOPLE = searchable("people", "phone", "amount", "doc", index="idx_people_mail")
# What keeps a table from being begun is on tables of their own, so that none hides another.
ALONE = (
    support.table("adopted", "body"),
    support.table("renamed", "body", "nobody"),
    support.table("absent", "body"),
    support.table("keyless", "body"),
    support.table("parent", "body"),
    support.table("part_1", "body"),
    support.table("generated", "body"),
    support.table("late", "body"),
    support.table("replaced", "body"),
    Table(name="hidden", columns=(Column(name="body", context="test_context"),), hide=("no_such_column",)),
)
TABLES = (PEOPLE, support.table("whole", "body"), support.table("empty", "body"), *ALONE)


def function(name: str, body: str) -> str:
    return f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {body} END$$"


THINGS = (
    # What the application's code does with our writes.
    Thing(
        "trigger",
        (
            function("touch", "NEW.touched := now(); RETURN NEW;"),
            "CREATE TRIGGER touched BEFORE UPDATE ON people FOR EACH ROW EXECUTE FUNCTION touch()",
        ),
        "warning",
        "people",
        ("the trigger touched", "function public.touch", 'DISABLE TRIGGER "touched"'),
    ),
    Thing(
        "trigger that fires always",
        (
            function("keep", "INSERT INTO audit VALUES (NEW.id, NEW.body); RETURN NEW;"),
            "CREATE TRIGGER kept AFTER UPDATE ON whole FOR EACH ROW EXECUTE FUNCTION keep()",
            "ALTER TABLE whole ENABLE ALWAYS TRIGGER kept",
        ),
        "warning",
        "whole",
        ("the trigger kept", "ENABLE ALWAYS", 'DISABLE TRIGGER "kept"'),
    ),
    Thing(
        "trigger that protects rows",
        (
            function("protect", "IF OLD.id > 5 THEN RETURN NULL; END IF; RETURN NEW;"),
            "CREATE TRIGGER protected BEFORE UPDATE ON empty FOR EACH ROW EXECUTE FUNCTION protect()",
        ),
        "warning",
        "empty",
        ("the trigger protected", "RETURN NULL", 'DISABLE TRIGGER "protected"'),
    ),
    Thing(
        "trigger behind the guard",
        (
            function("last", "NEW.body := 'x'; RETURN NEW;"),
            "CREATE TRIGGER zzzz BEFORE INSERT ON late FOR EACH ROW EXECUTE FUNCTION last()",
        ),
        "blocker",
        "late",
        ("the trigger zzzz", "Rename it"),
    ),
    Thing(
        "rule",
        (
            "CREATE RULE nothing AS ON UPDATE TO replaced DO INSTEAD NOTHING",
            "ALTER TABLE replaced ENABLE ALWAYS RULE nothing",
        ),
        "blocker",
        "replaced",
        ("the rule nothing", 'DISABLE RULE "nothing"'),
    ),
    Thing(
        "event trigger",
        (
            "CREATE FUNCTION noticed() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN NULL; END$$",
            "CREATE EVENT TRIGGER noticed ON ddl_command_end EXECUTE FUNCTION noticed()",
        ),
        "warning",
        "event triggers",
        ("the event trigger noticed", "ALTER FUNCTION"),
    ),
    # What needs the plaintext.
    Thing(
        "policy",
        ("CREATE POLICY own_rows ON people USING (mail = current_user)",),
        "warning",
        "people.mail",
        ("policy own_rows", "stops its drop"),
    ),
    Thing(
        "view",
        ("CREATE VIEW contacts AS SELECT mail FROM people",),
        "warning",
        "people.mail",
        ("view public.contacts", "stops its drop"),
    ),
    Thing(
        "materialized view",
        ("CREATE MATERIALIZED VIEW totals AS SELECT sum(amount) FROM people",),
        "warning",
        "people.amount",
        ("materialized view public.totals", "stops its drop"),
    ),
    Thing(
        "function of its own text",
        (
            "CREATE FUNCTION of_mail(text) RETURNS int LANGUAGE sql BEGIN ATOMIC "
            "SELECT id FROM people WHERE mail = $1; END",
        ),
        "warning",
        "people.mail",
        ("function public.of_mail(text)", "stops its drop"),
    ),
    Thing(
        "function that names it",
        (
            "CREATE FUNCTION by_phone(text) RETURNS int LANGUAGE sql AS 'SELECT id FROM people WHERE phone = $1'",
        ),
        "warning",
        "people",
        ("by_phone", "phone", "change it before"),
    ),
    Thing(
        "trigger with the column in its arguments",
        (
            "CREATE TRIGGER words BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION "
            "tsvector_update_trigger('tsv', 'pg_catalog.simple', 'phone')",
        ),
        "warning",
        "people.phone",
        ("trigger words on table public.people", "stops its drop"),
    ),
    Thing(
        "foreign key of another table",
        (
            "ALTER TABLE people ADD CONSTRAINT one_mail UNIQUE (mail)",
            "CREATE TABLE letters (mail text CONSTRAINT to_people REFERENCES people (mail))",
        ),
        "warning",
        "people.mail",
        ("constraint to_people on table public.letters", "stops its drop"),
    ),
    Thing(
        "generated column",
        ("ALTER TABLE people ADD COLUMN twice numeric GENERATED ALWAYS AS (amount * 2) STORED",),
        "warning",
        "people.amount",
        ("column twice of table public.people", "stops its drop"),
    ),
    Thing(
        "replica identity",
        (
            "CREATE TABLE identified (id int PRIMARY KEY, body text NOT NULL)",
            "CREATE UNIQUE INDEX by_body ON identified (body)",
            "ALTER TABLE identified REPLICA IDENTITY USING INDEX by_body",
        ),
        "warning",
        "identified.body",
        ("replica identity of by_body", "stops its drop"),
    ),
    Thing(
        "check that NULL violates",
        ("ALTER TABLE people ADD CONSTRAINT reachable CHECK (mail IS NOT NULL OR phone IS NOT NULL)",),
        "warning",
        "people",
        ("reachable", "switch_to_ciphertext will refuse"),
    ),
    Thing(
        "unique index with a condition on the column",
        ("CREATE UNIQUE INDEX one_live_mail ON people (mail) WHERE mail <> ''",),
        "warning",
        "people",
        ("one_live_mail", "switch_to_ciphertext will refuse"),
    ),
    Thing(
        "unique index on an expression",
        ("CREATE UNIQUE INDEX any_case ON people (lower(phone))",),
        "warning",
        "people",
        ("any_case", "switch_to_ciphertext will refuse"),
    ),
    Thing(
        "index",
        ("CREATE INDEX by_amount ON people (amount)",),
        "warning",
        "people.amount",
        ("index public.by_amount", "a restore puts it back"),
    ),
    Thing(
        "statistics",
        ("CREATE STATISTICS both_of ON phone, amount FROM people",),
        "warning",
        "people.phone",
        ("statistics object public.both_of", "a restore puts it back"),
    ),
    Thing(
        "privilege on a column",
        ("GRANT SELECT (phone) ON people TO pg_monitor",),
        "warning",
        "people.phone",
        ("pg_monitor has SELECT", "phone_encrypted"),
    ),
    Thing(
        "default",
        ("ALTER TABLE people ALTER phone SET DEFAULT 'none'",),
        "warning",
        "people",
        ("phone have a default",),
    ),
    Thing(
        "type that depends on a setting",
        ("CREATE TABLE priced (id int PRIMARY KEY, body money)",),
        "warning",
        "priced.body",
        ("money", "numeric"),
    ),
    Thing(
        "secret that would show",
        ("ALTER TABLE people ADD COLUMN password_hash text",),
        "warning",
        "people",
        ("password_hash", "hide"),
    ),
    # Who else gets the rows.
    Thing(
        "publication",
        ("CREATE PUBLICATION feed FOR TABLE people",),
        "warning",
        "people",
        ("published by feed", "ALTER TABLE"),
    ),
    Thing(
        "publication of columns",
        ("CREATE PUBLICATION few FOR TABLE whole (id, body)",),
        "warning",
        "whole",
        ("published by few", 'ALTER PUBLICATION "few"'),
    ),
    # What keeps a table from being begun.
    Thing(
        "envelopes already",
        (
            "INSERT INTO adopted SELECT i, '"
            + support.seal("x", "test_context")
            + "' FROM generate_series(1, 30) i",
        ),
        "blocker",
        "adopted",
        ("body", "envelopes"),
    ),
    Thing("missing column", (), "blocker", "renamed", ("nobody", "correct the catalogue")),
    Thing("missing table", (), "blocker", "absent", ("absent", "correct the catalogue")),
    Thing(
        "no primary key",
        ("CREATE TABLE keyless (body text)",),
        "blocker",
        "keyless",
        ("no primary key", "ADD COLUMN id"),
    ),
    Thing(
        "inheritance",
        ("CREATE TABLE child () INHERITS (parent)",),
        "blocker",
        "parent",
        ("child", "NO INHERIT"),
    ),
    Thing(
        "partition by itself",
        (
            "CREATE TABLE parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)",
            "CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (1) TO (9)",
        ),
        "blocker",
        "part_1",
        ("partition of public.parts", "catalogue"),
    ),
    Thing(
        "generated by itself",
        ("CREATE TABLE generated (id int PRIMARY KEY, body text GENERATED ALWAYS AS ('x') STORED)",),
        "blocker",
        "generated",
        ("body", "Take it out"),
    ),
    Thing("hidden that is not there", (), "blocker", "hidden", ("no_such_column", "hide")),
    Thing("backup", (), "warning", "backup", ("--backup",)),
    Thing("superuser", (), "warning", "privileges", ("--roles-sql",)),
)


@pytest.fixture
def everything(database_url: str) -> PreflightReport:
    run(
        database_url,
        "CREATE TABLE people (id int PRIMARY KEY, mail text, phone text, amount numeric, doc jsonb, tsv tsvector, "
        "touched timestamptz)",
    )
    run(database_url, "INSERT INTO people SELECT i, 'm' || i, NULL, i, '{}' FROM generate_series(1, 20) AS i")
    run(database_url, "CREATE TABLE audit (id int, body text)")
    for table in ("whole", "empty", "adopted", "renamed", "parent", "late", "replaced", "hidden"):
        run(database_url, f"CREATE TABLE {table} (id int PRIMARY KEY, body text)")
    for thing in THINGS:
        for statement in thing.statements:
            run(database_url, statement)
    try:
        more = (support.table("identified", "body"), support.table("priced", "body"))
        return check(Database(database_url), (*TABLES, *more), KEYS)
    finally:
        run(database_url, "DROP EVENT TRIGGER noticed")


def test_all_of_it_is_told_at_once_by_name_and_with_what_to_do(everything: PreflightReport) -> None:
    silent = [
        thing.name
        for thing in THINGS
        if not any(
            (finding.level, finding.subject) == (thing.level, thing.subject)
            and all(word in finding.message for word in thing.words)
            for finding in everything.findings
        )
    ]
    assert not silent, "\n".join(
        [
            f"{silent}",
            *(f"{f.level} {f.subject}: {f.message}" for f in everything.findings if f.level != "ok"),
        ]
    )


def test_the_manual_explains_each_of_them(everything: PreflightReport) -> None:
    known = [plain(phrase).split("…") for phrase in phrases(page("docs/messages.md"))]
    unexplained = [
        f"{finding.subject}: {finding.message}"
        for finding in everything.findings
        if finding.level != "ok"
        and not any(all(part in finding.message for part in parts) for parts in known)
    ]
    assert not unexplained, "\n".join(unexplained)
