"""A database with one of everything that preflight knows, and what has to be told of each.

Belongs here: what is made, in one list. What keeps a table from being begun is on a table of its own.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg

from alphapulse_encryption.catalogue import Catalogue, Column, Table
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.place import Place, place

KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="


@dataclass(frozen=True)
class Thing:
    """What is made, and what has to be told of it.

    Args:
        words: the object's name and what to do, all of which are in one finding.
        since: the server's version that knows it.
    """

    name: str
    statements: tuple[str, ...]
    level: str
    subject: str
    words: tuple[str, ...]
    since: int = 14


def searchable(table: str, *columns: str, index: str) -> Table:
    return support.table(table, support.searchable("mail", index), *columns)


PEOPLE = searchable("people", "phone", "amount", "doc", index="idx_people_mail")
TABLES = (
    PEOPLE,
    support.table(
        "rules", support.searchable("a", "idx_a"), support.searchable("b", "idx_b"), "c", "d", "e", "f"
    ),
    *(
        support.table(name, "body")
        for name in (
            *("whole", "empty", "identified", "priced", "tired", "strict", "made"),
            *(
                "adopted",
                "absent",
                "keyless",
                "keyed",
                "parent",
                "part_1",
                "generated",
                "late",
                "replaced",
                "typed",
            ),
            *("taken", "narrow", "shown", "remote", "summed", "counter", "foreign"),
        )
    ),
    support.table("renamed", "body", "nobody"),
    Table(name="Kunde", schema="crm", columns=(Column(name="E-Mail", context="test_context"),)),
    Table(name="hidden", columns=(Column(name="body", context="test_context"),), hide=("no_such_column",)),
)


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
        ("the trigger zzzz", "ALTER TRIGGER zzzz ON public.late RENAME TO a_zzzz"),
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
        ("policy own_rows", "stops its drop", "DROP POLICY own_rows on public.people"),
    ),
    Thing(
        "view",
        ("CREATE VIEW contacts AS SELECT mail FROM people",),
        "warning",
        "people.mail",
        ("view public.contacts", "stops its drop", "DROP VIEW public.contacts"),
    ),
    Thing(
        "materialized view",
        ("CREATE MATERIALIZED VIEW totals AS SELECT sum(amount) FROM people",),
        "warning",
        "people.amount",
        ("materialized view public.totals", "stops its drop", "DROP MATERIALIZED VIEW public.totals"),
    ),
    Thing(
        "function of its own text",
        (
            "CREATE FUNCTION of_mail(text) RETURNS int LANGUAGE sql BEGIN ATOMIC "
            "SELECT id FROM people WHERE mail = $1; END",
        ),
        "warning",
        "people.mail",
        ("function public.of_mail(text)", "stops its drop", "DROP FUNCTION public.of_mail(pg_catalog.text)"),
    ),
    Thing(
        "function that names it",
        (
            "CREATE FUNCTION by_phone(text) RETURNS int LANGUAGE sql AS 'SELECT id FROM people WHERE phone = $1'",
        ),
        "warning",
        "people",
        ("by_phone", "phone", "pg_get_functiondef('public.by_phone(text)'::regprocedure)"),
    ),
    Thing(
        "trigger with the column in its arguments",
        (
            "CREATE TRIGGER words BEFORE INSERT ON people FOR EACH ROW EXECUTE FUNCTION "
            "tsvector_update_trigger('tsv', 'pg_catalog.simple', 'phone')",
        ),
        "warning",
        "people.phone",
        ("trigger words on table public.people", "stops its drop", "DROP TRIGGER words on public.people"),
    ),
    Thing(
        "foreign key of another table",
        (
            "ALTER TABLE people ADD CONSTRAINT one_mail UNIQUE (mail)",
            "CREATE TABLE letters (mail text CONSTRAINT to_people REFERENCES people (mail))",
        ),
        "warning",
        "people.mail",
        (
            "constraint to_people on table public.letters",
            "ALTER TABLE public.letters DROP CONSTRAINT to_people",
        ),
    ),
    Thing(
        "generated column",
        ("ALTER TABLE people ADD COLUMN twice numeric GENERATED ALWAYS AS (amount * 2) STORED",),
        "warning",
        "people.amount",
        ("column twice of table public.people", "ALTER TABLE public.people DROP COLUMN twice"),
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
        ("replica identity of by_body", "ALTER TABLE public.identified REPLICA IDENTITY DEFAULT"),
    ),
    Thing(
        "check that NULL violates",
        ("ALTER TABLE people ADD CONSTRAINT reachable CHECK (mail IS NOT NULL OR phone IS NOT NULL)",),
        "warning",
        "people",
        ("constraint reachable", 'DROP CONSTRAINT "reachable"'),
    ),
    Thing(
        "unique index with a condition on the column",
        ("CREATE UNIQUE INDEX one_live_mail ON people (mail) WHERE mail <> ''",),
        "warning",
        "people",
        ("one_live_mail", "DROP INDEX public.one_live_mail"),
    ),
    Thing(
        "unique index on an expression",
        ("CREATE UNIQUE INDEX any_case ON people (lower(phone))",),
        "warning",
        "people",
        ("any_case", "DROP INDEX public.any_case"),
    ),
    Thing(
        "index",
        ("CREATE INDEX by_amount ON people (amount)",),
        "warning",
        "people.amount",
        ("index public.by_amount", "--restore-plaintext"),
    ),
    Thing(
        "statistics",
        ("CREATE STATISTICS both_of ON phone, amount FROM people",),
        "warning",
        "people.phone",
        ("statistics object public.both_of", "--restore-plaintext"),
    ),
    Thing(
        "privilege on a column",
        ("GRANT SELECT (phone) ON people TO pg_monitor",),
        "warning",
        "people.phone",
        ("pg_monitor has SELECT", 'GRANT SELECT ("phone_encrypted") ON "public"."people" TO pg_monitor'),
    ),
    Thing(
        "default",
        ("ALTER TABLE people ALTER phone SET DEFAULT 'none'",),
        "warning",
        "people",
        ("phone has a default", "--verify"),
    ),
    Thing(
        "type that depends on a setting",
        ("CREATE TABLE priced (id int PRIMARY KEY, body money)",),
        "warning",
        "priced.body",
        ("money", 'ALTER "body" TYPE numeric'),
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
        (
            "published by few",
            "ALTER PUBLICATION few DROP TABLE public.whole",
            "ALTER PUBLICATION few ADD TABLE public.whole (id, body, body_encrypted)",
        ),
        since=15,
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
        ("ALTER TABLE public.child NO INHERIT public.parent",),
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
    # What the application asks of its rows.
    Thing(
        "unique index with a condition on another column",
        ("CREATE UNIQUE INDEX one_live ON rules (a) WHERE live",),
        "warning",
        "rules.a",
        ("index public.one_live", "--restore-plaintext"),
    ),
    Thing(
        "deferrable unique constraint",
        ("ALTER TABLE rules ADD CONSTRAINT at_the_end UNIQUE (b) DEFERRABLE INITIALLY DEFERRED",),
        "warning",
        "rules",
        ("at_the_end", "ALTER TABLE public.rules DROP CONSTRAINT at_the_end"),
    ),
    Thing(
        "one NULL alone",
        ("ALTER TABLE rules ADD CONSTRAINT one_null UNIQUE NULLS NOT DISTINCT (b)",),
        "warning",
        "rules",
        ("one_null", "ALTER TABLE public.rules DROP CONSTRAINT one_null"),
        since=15,
    ),
    Thing(
        "unique over a column without tokens",
        ("CREATE UNIQUE INDEX two_of ON rules (a, c)",),
        "warning",
        "rules",
        ("two_of", "search_index", "DROP INDEX public.two_of"),
    ),
    Thing(
        "exclusion constraint",
        ("ALTER TABLE rules ADD CONSTRAINT never_twice EXCLUDE USING hash (d WITH =)",),
        "warning",
        "rules",
        ("never_twice", 'DROP CONSTRAINT "never_twice"'),
    ),
    Thing(
        "foreign key to another table",
        (
            "CREATE TABLE countries (code text PRIMARY KEY)",
            "ALTER TABLE rules ADD CONSTRAINT of_country FOREIGN KEY (e) REFERENCES countries",
        ),
        "warning",
        "rules.e",
        ("constraint of_country", "--restore-plaintext"),
    ),
    Thing(
        "which a NULL passes",
        (),
        "warning",
        "rules",
        ("foreign key of_country", "whose e is NULL", "public.countries"),
    ),
    Thing(
        "foreign key whose columns are NULL together",
        (
            "CREATE TABLE towns (id int, town text, PRIMARY KEY (id, town))",
            "INSERT INTO towns VALUES (1, 'a')",
            "INSERT INTO strict VALUES (1, 'a')",
            "ALTER TABLE strict ADD CONSTRAINT of_town FOREIGN KEY (id, body) REFERENCES towns MATCH FULL",
        ),
        "warning",
        "strict",
        ("foreign key of_town", "MATCH FULL", 'DROP CONSTRAINT "of_town"'),
    ),
    Thing(
        "index whose build was interrupted",
        (
            "CREATE INDEX half_built ON rules (live)",
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'half_built'::regclass",
        ),
        "warning",
        "rules",
        ("the index half_built", 'REINDEX INDEX CONCURRENTLY "public"."half_built"'),
    ),
    Thing(
        "what an interrupted rebuild left",
        (
            'CREATE INDEX "half_built_ccnew1" ON rules (live)',
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'half_built_ccnew1'::regclass",
        ),
        "warning",
        "rules",
        ("the index half_built_ccnew1", 'DROP INDEX CONCURRENTLY "public"."half_built_ccnew1"'),
    ),
    Thing(
        "index that includes it",
        ("CREATE UNIQUE INDEX with_f ON rules (id) INCLUDE (f)",),
        "warning",
        "rules.f",
        ("index public.with_f", "DROP INDEX public.with_f"),
    ),
    Thing(
        "generated column that needs it",
        ("ALTER TABLE strict ADD shout text NOT NULL GENERATED ALWAYS AS (upper(body)) STORED",),
        "warning",
        "strict",
        ("generated column shout", 'ALTER "shout" DROP NOT NULL'),
    ),
    Thing(
        "domain that forbids NULL",
        ("CREATE DOMAIN filled AS text NOT NULL", "CREATE TABLE made (id int PRIMARY KEY, body filled)"),
        "warning",
        "made",
        ("made.body", "ALTER DOMAIN public.filled DROP NOT NULL"),
    ),
    Thing(
        "trigger that reads it by name",
        (
            function("note", "NEW.live := NEW.c IS NULL; RETURN NEW;"),
            "CREATE TRIGGER noted BEFORE INSERT ON rules FOR EACH ROW EXECUTE FUNCTION note()",
        ),
        "warning",
        "rules.c",
        ("trigger noted on table public.rules", "DROP TRIGGER noted on public.rules"),
    ),
    Thing(
        "view that hides rows",
        ("CREATE VIEW of_the_living WITH (security_barrier) AS SELECT d FROM rules WHERE live",),
        "warning",
        "rules.d",
        ("view public.of_the_living", "DROP VIEW public.of_the_living"),
    ),
    Thing(
        "publication of some rows",
        ("CREATE PUBLICATION first FOR TABLE rules WHERE (c <> '')",),
        "warning",
        "rules",
        ("published by first", 'ALTER TABLE "public"."rules" ADD COLUMN'),
        since=15,
    ),
    Thing(
        "which rows, by the column",
        (),
        "warning",
        "rules.c",
        ("publication first", "ALTER PUBLICATION first DROP TABLE public.rules"),
        since=15,
    ),
    Thing(
        "slot that nobody reads",
        ("SELECT pg_create_physical_replication_slot('everything_unread', true)",),
        "warning",
        "replicas",
        ("everything_unread", "SELECT pg_drop_replication_slot('everything_unread')"),
    ),
    Thing(
        "autovacuum switched off",
        ("CREATE TABLE tired (id int PRIMARY KEY, body text) WITH (autovacuum_enabled = off)",),
        "warning",
        "tired",
        ("public.tired", "ALTER TABLE public.tired RESET (autovacuum_enabled)"),
    ),
    Thing(
        "never analysed",
        ("INSERT INTO tired SELECT i, repeat('x', 100) FROM generate_series(1, 1000) AS i",),
        "warning",
        "tired",
        ('ANALYZE "public"."tired"',),
    ),
    Thing(
        "names that need quotes",
        (
            "CREATE SCHEMA crm",
            'CREATE TABLE crm."Kunde" (id int PRIMARY KEY, "E-Mail" text)',
            'CREATE VIEW crm."Alle" AS SELECT * FROM crm."Kunde"',
        ),
        "warning",
        "crm.Kunde.E-Mail",
        ('DROP VIEW crm."Alle"',),
    ),
    Thing(
        "column of another type in the place",
        ("CREATE TABLE typed (id int PRIMARY KEY, body text, body_encrypted bytea)",),
        "blocker",
        "typed",
        ("typed.body_encrypted", 'RENAME "body_encrypted" TO "body_encrypted_before"'),
    ),
    Thing(
        "values in the place",
        (
            "CREATE TABLE taken (id int PRIMARY KEY, body text, body_encrypted text)",
            "INSERT INTO taken VALUES (1, 'a', 'theirs')",
        ),
        "blocker",
        "taken",
        ("taken.body_encrypted", "adopt: true", 'RENAME "body_encrypted" TO "body_encrypted_before"'),
    ),
    Thing(
        "NOT NULL in the place",
        ("CREATE TABLE narrow (id int PRIMARY KEY, body text, body_encrypted text NOT NULL)",),
        "blocker",
        "narrow",
        ("narrow.body_encrypted", 'ALTER "body_encrypted" DROP NOT NULL'),
    ),
    Thing(
        "part of the primary key",
        ("CREATE TABLE keyed (body text PRIMARY KEY)",),
        "blocker",
        "keyed",
        ("keyed.body", "out of the catalogue"),
    ),
    Thing(
        "view in a table's place",
        ("CREATE VIEW shown AS SELECT * FROM tired",),
        "blocker",
        "shown",
        ("public.shown", "view", "into the catalogue"),
    ),
    Thing(
        "materialized view in a table's place",
        ("CREATE MATERIALIZED VIEW summed AS SELECT * FROM tired",),
        "blocker",
        "summed",
        ("public.summed", "materialized view", "encrypt what it is made of"),
    ),
    Thing(
        "sequence in a table's place",
        ("CREATE SEQUENCE counter",),
        "blocker",
        "counter",
        ("public.counter", "no table", "put one in its place"),
    ),
    Thing(
        "foreign table",
        (
            "CREATE FOREIGN DATA WRAPPER elsewhere",
            "CREATE SERVER far FOREIGN DATA WRAPPER elsewhere",
            "CREATE FOREIGN TABLE remote (id int, body text) SERVER far",
        ),
        "blocker",
        "remote",
        ("public.remote", "foreign table", "where its rows are"),
    ),
    Thing("backup", (), "warning", "backup", ("--backup",)),
    Thing("superuser", (), "warning", "privileges", ("--roles-sql",)),
    Thing("no writer", (), "warning", "data path", ("ALPHAPULSE_WRITER_DATABASE_URL", "--roles-sql")),
    Thing(
        "code of another role",
        (
            "DO $$ BEGIN IF to_regrole('everything_stranger') IS NULL THEN CREATE ROLE everything_stranger LOGIN; "
            "END IF; END $$",
            "CREATE FUNCTION theirs(text) RETURNS bool IMMUTABLE LANGUAGE sql AS 'SELECT true'",
            "ALTER FUNCTION theirs(text) OWNER TO everything_stranger",
            'CREATE TABLE "foreign" (id int PRIMARY KEY, body text CHECK (theirs(body)))',
        ),
        "blocker",
        "foreign",
        ("theirs(text)", "everything_stranger", "ALTER FUNCTION public.theirs(text) OWNER TO postgres;"),
    ),
)


def known(server_version: int) -> list[Thing]:
    """What a server of that version knows."""
    return [thing for thing in THINGS if thing.since <= server_version // 10000]


@contextlib.contextmanager
def made(url: str) -> Iterator[Catalogue]:
    """All of it in a database; what is the server's, and would keep the database from being dropped, for so long."""
    with psycopg.connect(url, autocommit=True) as connection:

        def run(statement: str) -> None:
            connection.execute(statement.encode())

        # Given before PostgreSQL 15, it keeps every table from being looked into.
        run("REVOKE CREATE ON SCHEMA public FROM PUBLIC")

        run(
            "CREATE TABLE people (id int PRIMARY KEY, mail text, phone text, amount numeric, doc jsonb, tsv tsvector, "
            "touched timestamptz)"
        )
        run("INSERT INTO people SELECT i, 'm' || i, NULL, i, '{}' FROM generate_series(1, 20) AS i")
        run("CREATE TABLE audit (id int, body text)")
        run(
            "CREATE TABLE rules (id int PRIMARY KEY, live bool, a text, b text, c text, d text, e text, f text)"
        )
        for table in (
            "whole",
            "empty",
            "adopted",
            "renamed",
            "parent",
            "late",
            "replaced",
            "hidden",
            "strict",
        ):
            run(f"CREATE TABLE {table} (id int PRIMARY KEY, body text)")
        try:
            for thing in known(connection.info.server_version):
                for statement in thing.statements:
                    run(statement)
            yield Catalogue(tables=TABLES)
        finally:
            run("DROP EVENT TRIGGER IF EXISTS noticed")
            run(
                "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots "
                "WHERE slot_name = 'everything_unread'"
            )


@contextlib.contextmanager
def everything_at(postgres: EmbeddedPostgres, url: str, directory: Path) -> Iterator[Place]:
    """Where the command runs on that database; Dagster's storage is on the server that is given."""
    with made(url) as catalogue:
        text = json.dumps(catalogue.model_dump(by_alias=True, exclude_defaults=True, mode="json"))
        with place(postgres, url, directory, KEY, text) as found:
            yield found
