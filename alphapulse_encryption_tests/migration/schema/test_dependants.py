"""What stands in the way of a drop: whatever PostgreSQL would refuse to part with, or could not be put back exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from psycopg import errors

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.schema.dependants import stops_of_the_drop
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import support, walk
from alphapulse_encryption_tests.migration.journey import After

USERS = walk.CATALOGUE.table("users")

# What to make, and how the refusal names it. None of them is in the other's way.
OBJECTS = {
    "CREATE VIEW theirs AS SELECT id, email FROM users": "view public.theirs",
    "CREATE VIEW by_join AS SELECT u.id FROM users u JOIN api_keys k ON k.name = u.last_name": "view public.by_join",
    "CREATE MATERIALIZED VIEW kept AS SELECT upper(last_name) FROM users": "materialized view public.kept",
    "CREATE RULE watched AS ON UPDATE TO users WHERE OLD.email > '' DO ALSO DELETE FROM api_keys": "rule watched",
    "ALTER TABLE api_keys ADD owner text CONSTRAINT by_mail REFERENCES users (email)": "constraint by_mail",
    "ALTER TABLE users ADD invited_by text CONSTRAINT invited REFERENCES users (email)": "constraint invited",
    "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
    "CREATE TRIGGER on_mail AFTER UPDATE OF email ON users EXECUTE FUNCTION f()": "trigger on_mail",
    "CREATE FUNCTION g() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'; "
    "CREATE TRIGGER on_name AFTER UPDATE ON users FOR EACH ROW WHEN (NEW.last_name = 'x') "
    "EXECUTE FUNCTION g()": "trigger on_name",
    # The database keeps no dependency of these: a column's name is among the arguments, or in the function's text.
    "ALTER TABLE users ADD words tsvector; CREATE TRIGGER words BEFORE UPDATE ON users FOR EACH ROW "
    "EXECUTE FUNCTION tsvector_update_trigger('words', 'pg_catalog.english', 'last_name')": "trigger words",
    "CREATE FUNCTION h() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN IF new . \"email\" > old.email THEN RETURN NULL; END IF; RETURN NEW; END'; "
    "CREATE TRIGGER by_text BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION h()": "trigger by_text",
    "CREATE POLICY own ON users USING (email = current_user)": "policy own",
    "CREATE POLICY checked ON users FOR INSERT WITH CHECK (last_name IS NOT NULL)": "policy checked",
    # Keys of other columns, which PostgreSQL would drop without a word.
    "CREATE UNIQUE INDEX covering ON users (id) INCLUDE (email)": "index public.covering",
    "ALTER TABLE users ADD CONSTRAINT with_mail UNIQUE (id) INCLUDE (last_name)": "constraint with_mail",
    "ALTER TABLE users DROP CONSTRAINT users_pkey CASCADE, ADD CONSTRAINT key PRIMARY KEY (id) INCLUDE (email)": (
        "constraint key"
    ),
    "CREATE PUBLICATION few FOR TABLE users (id, email)": "publication of table public.users in publication few",
    "CREATE PUBLICATION part FOR TABLE users WHERE (email > 'x')": "publication of table public.users in",
    "ALTER TABLE users ADD loud text GENERATED ALWAYS AS (upper(last_name)) STORED": "generated column loud",
    "ALTER TABLE users ADD quiet text GENERATED ALWAYS AS (lower(last_name)) VIRTUAL": "generated column quiet",
    "CREATE FUNCTION mails() RETURNS SETOF text BEGIN ATOMIC SELECT email FROM users; END": "function public.mails()",
    "ALTER TABLE users REPLICA IDENTITY USING INDEX users_email_key": "replica identity of users_email_key",
    "SET allow_system_table_mods = on; INSERT INTO pg_seclabel VALUES "
    "('users'::regclass, 'pg_class'::regclass, 3, 'selinux', 'secret')": "security label of email by selinux",
    "GRANT SELECT (email) ON users TO pg_monitor WITH GRANT OPTION; SET ROLE pg_monitor; "
    "GRANT SELECT (email) ON users TO pg_read_all_stats": "privilege SELECT (email) granted by pg_monitor",
}


@pytest.mark.parametrize(("statement", "name"), OBJECTS.items(), ids=list(OBJECTS.values()))
def test_it_is_named(sample_url: str, statement: str, name: str) -> None:
    with Database(sample_url).session("look") as connection:
        definition = read_table(connection, USERS)
        assert stops_of_the_drop(connection, definition) == ()
    support.run(sample_url, statement)
    with Database(sample_url).session("look") as connection:
        (found,) = stops_of_the_drop(connection, definition)
    assert found.startswith(name)


def test_what_only_looks_alike_is_not_named(sample_url: str) -> None:
    support.run(
        sample_url,
        "CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN RAISE NOTICE ''email''; NEW.email_encrypted := NEW.email_search; RETURN NEW; END'; "
        "CREATE TRIGGER alike BEFORE UPDATE ON users FOR EACH ROW EXECUTE FUNCTION f('last', 'name')",
    )
    with Database(sample_url).session("look") as connection:
        assert stops_of_the_drop(connection, read_table(connection, USERS)) == ()


def test_neither_approved_nor_dropped(after: After, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    url = after("switched")
    walk.backup(url, (USERS,), tmp_path, postgres.bin_dir())
    support.run(url, "ALTER TABLE users ADD invited_by text REFERENCES users (email)")
    with pytest.raises(RefusedError, match=r"users_invited_by_fkey on table public\.users"):
        walk.approve(url, USERS)
    support.run(url, "ALTER TABLE users DROP invited_by")
    walk.approve(url, USERS)
    support.run(url, "CREATE POLICY own ON users USING (email = current_user)")
    with pytest.raises(RefusedError, match="policy own on table"):
        walk.drop(url, USERS)
    # PostgreSQL is of the same opinion.
    with pytest.raises(errors.DependentObjectsStillExist):
        support.run(url, "ALTER TABLE users DROP email")
