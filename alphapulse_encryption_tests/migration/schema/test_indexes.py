"""Indexes on the search columns: built beside the application, unique where the plaintext was."""

from __future__ import annotations

import psycopg
import pytest

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.errors import ConfigurationError, DatabaseFailure, RefusedError
from alphapulse_encryption.migration.gates.preflight import check
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.indexes import (
    IndexResult,
    build_search_indexes,
    pending_index,
    reindex,
)
from alphapulse_encryption.migration.steps.switch import revert_to_plaintext, switch_to_ciphertext
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.migration.support import ACTOR, run

ENTRY = support.table(
    "notes", support.searchable("mail", "idx_mail"), support.searchable("name", "idx_name"), "secret"
)
INDEXES = (
    "SELECT c.relname, x.indisunique, x.indisvalid AND x.indisready, pg_get_indexdef(x.indexrelid) "
    "FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid WHERE x.indrelid = 'notes'::regclass"
)
PENDING = "notes_encryption_pending"


@pytest.fixture
def notes_url(database_url: str) -> str:
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, tenant int NOT NULL DEFAULT 1, mail text UNIQUE, name text, "
        "secret int)",
    )
    run(
        database_url,
        "INSERT INTO notes SELECT i, 1, 'm' || i, 'n' || i % 7, i FROM generate_series(1, 60) AS i",
    )
    support.encrypt(database_url, ENTRY)
    return database_url


def build(url: str, entry: Table = ENTRY) -> IndexResult:
    return build_search_indexes(Database(url), entry, ACTOR)


def indexes(url: str) -> dict[str, tuple[bool, bool, str]]:
    return {name: (unique, valid, text) for name, unique, valid, text in run(url, INDEXES)}


def test_what_is_built(notes_url: str) -> None:
    result = build(notes_url)
    found = indexes(notes_url)
    assert found["idx_mail"][:2] == (True, True)
    assert found["idx_mail"][2].endswith("USING btree (mail_search)")
    assert found["idx_name"][:2] == (False, True)
    assert found["idx_name"][2].endswith("USING btree (name_search)")
    assert found[PENDING][:2] == (False, True)
    assert pending_index(ENTRY) == PENDING
    assert set(result.created) == {"idx_mail", "idx_name", PENDING}
    assert (result.existing, result.rebuilt, result.analysed) == ((), (), True)
    sizes = support.value(
        notes_url,
        "SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relname = ANY(%s)",
        list(result.created),
    )
    assert result.bytes == sizes
    assert run(notes_url, "SELECT 1 FROM pg_stats WHERE tablename = 'notes' AND attname = 'mail_search'")


def test_a_value_is_found_by_its_token(notes_url: str) -> None:
    build(notes_url)
    with support.application(notes_url) as connection:
        connection.execute("SET enable_seqscan TO off")
        token = support.token("m37", "test_search")
        assert support.ask(connection, "SELECT id FROM notes WHERE mail_search = %s", token) == [(37,)]
        plan = support.ask(connection, f"EXPLAIN SELECT id FROM notes WHERE mail_search = '{token}'")
        assert any("idx_mail" in line for (line,) in plan)


def test_pending_index_holds_what_is_pending_only(notes_url: str) -> None:
    build(notes_url)
    run(notes_url, "VACUUM notes")
    with Database(notes_url).session("look") as connection:

        def entries() -> int:
            found = support.ask(
                connection,
                "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) SELECT id FROM public.notes "
                "WHERE (mail IS NOT NULL AND (mail_encrypted IS NULL OR mail_search IS NULL)) "
                "OR (name IS NOT NULL AND (name_encrypted IS NULL OR name_search IS NULL)) "
                "OR (secret IS NOT NULL AND secret_encrypted IS NULL)",
            )
            line = next(text for (text,) in found if PENDING in text)
            return int(float(line.split("rows=")[1].split(" ")[0]))

        connection.execute("SET enable_seqscan TO off")
        assert entries() == 0
        run(notes_url, "UPDATE notes SET secret = -1 WHERE id IN (5, 6)")
        assert entries() == 2


def test_second_run_builds_nothing(notes_url: str) -> None:
    build(notes_url)
    before = run(notes_url, "SELECT oid, relfilenode FROM pg_class WHERE relkind = 'i' ORDER BY 1")
    log = support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log")
    result = build(notes_url)
    assert (result.created, result.analysed, result.changed) == ((), False, False)
    assert set(result.existing) == {"idx_mail", "idx_name", PENDING}
    assert run(notes_url, "SELECT oid, relfilenode FROM pg_class WHERE relkind = 'i' ORDER BY 1") == before
    assert support.value(notes_url, "SELECT count(*) FROM alphapulse_encryption.audit_log") == log


@pytest.mark.parametrize("name", ["idx_mail", "idx_name", PENDING])
def test_what_an_interrupted_build_left_is_built_again(notes_url: str, name: str) -> None:
    build(notes_url)
    run(
        notes_url,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = %s::regclass",
        name,
    )
    result = build(notes_url)
    assert (result.created, result.rebuilt) == ((name,), (name,))
    assert indexes(notes_url)[name][1]


@pytest.mark.parametrize("name", ["idx_mail", PENDING])
def test_a_build_that_is_cancelled_is_built_again(notes_url: str, name: str) -> None:
    """Really interrupted: cancelled while it waits for a transaction of the application."""
    build(notes_url)
    run(notes_url, f"DROP INDEX {name}")
    with support.application(notes_url, autocommit=False) as application:
        application.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: build(notes_url)) as building:
            support.until(
                lambda: support.engine_waits(notes_url, "CREATE%", behind=application),
                "it waits for the application",
            )
            run(
                notes_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'alphapulse_encryption'",
            )
            with pytest.raises(Exception, match="Could not build the search indexes of notes"):
                building.result()
        application.commit()
    assert not all(valid for _, valid, _ in indexes(notes_url).values())
    result = build(notes_url)
    assert result.rebuilt == (name,)
    assert all(valid for _, valid, _ in indexes(notes_url).values())
    assert {"idx_mail", "idx_name", PENDING} <= set(indexes(notes_url))


@pytest.mark.parametrize(
    "taken",
    [
        "CREATE INDEX idx_mail ON notes (secret)",
        "CREATE INDEX idx_mail ON notes (mail_search)",  # has to be unique
        "CREATE UNIQUE INDEX idx_mail ON notes (mail_search, id)",
        "CREATE UNIQUE INDEX idx_mail ON notes (mail_search) WHERE id > 5",
        "CREATE UNIQUE INDEX idx_mail ON notes (lower(mail_search))",
        "CREATE TABLE idx_mail (id int)",
        "CREATE VIEW idx_mail AS SELECT 1 AS x",
        "CREATE TABLE other (mail_search text); CREATE UNIQUE INDEX idx_mail ON other (mail_search)",
    ],
)
def test_a_name_that_is_taken(notes_url: str, taken: str) -> None:
    run(notes_url, taken)
    before = indexes(notes_url)
    with pytest.raises(
        ConfigurationError, match=r"public\.idx_mail exists and is not the index that notes needs"
    ):
        build(notes_url)
    assert indexes(notes_url) == before


def test_uniqueness_is_carried(notes_url: str) -> None:
    """The application as it will be: without the plaintext, the token keeps addresses apart."""
    build(notes_url)
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT notes_mail_key")
    write = "INSERT INTO notes (id, mail, mail_encrypted, mail_search) VALUES (%s, %s, %s, %s)"
    for key, mail in ((901, "m5"), (902, "m60")):
        sealed, token = support.seal(mail, "test_search"), support.token(mail, "test_search")
        with pytest.raises(psycopg.errors.UniqueViolation, match="idx_mail"):
            run(notes_url, write, key, mail, sealed, token)
    run(notes_url, write, 903, "m61", support.seal("m61", "test_search"), support.token("m61", "test_search"))
    # NULLs are no duplicates, and neither were they before.
    run(notes_url, "INSERT INTO notes (id) VALUES (904), (905)")
    # The plaintext that becomes pending is not kept from it either: it is told apart when it is encrypted.
    support.backfill_all(notes_url, ENTRY)
    support.assert_encrypted(notes_url, ENTRY)


def test_uniqueness_of_several_columns_is_carried(notes_url: str) -> None:
    run(notes_url, "UPDATE notes SET tenant = id")
    run(notes_url, "ALTER TABLE notes ADD CONSTRAINT one_name UNIQUE (tenant, name) INCLUDE (secret)")
    run(notes_url, "CREATE UNIQUE INDEX both_names ON notes (name, mail)")
    result = build(notes_url)
    assert {"one_name_search", "both_names_search"} <= set(result.created)
    found = indexes(notes_url)
    assert found["one_name_search"][0]
    assert found["one_name_search"][2].endswith("(tenant, name_search)")
    assert found["both_names_search"][2].endswith("(name_search, mail_search)")
    assert not found["idx_name"][0]
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT one_name")
    token = support.token("n1", "test_search")
    write = "INSERT INTO notes (id, tenant, name, name_encrypted, name_search) VALUES (%s, %s, 'n1', %s, %s)"
    with pytest.raises(psycopg.errors.UniqueViolation, match="one_name_search"):
        run(notes_url, write, 901, 1, support.seal("n1", "test_search"), token)
    run(notes_url, write, 901, 901, support.seal("n1", "test_search"), token)


CARRIED = {
    "(mail) WHERE tenant > 0": "(mail_search) WHERE (tenant > 0)",
    "(mail, coalesce(tenant, 0))": "(mail_search, COALESCE(tenant, 0))",
    "(mail, (tenant + 1)) WHERE note IN ('a', 'b')": "(mail_search, ((tenant + 1))) WHERE ((note)::text = ANY (",
    "(mail) INCLUDE (name) WHERE tenant IS NULL": "(mail_search) WHERE (tenant IS NULL)",
}


@pytest.mark.parametrize(("index", "carried"), CARRIED.items(), ids=list(CARRIED))
def test_uniqueness_of_some_rows_or_with_an_expression_is_carried(
    notes_url: str, index: str, carried: str
) -> None:
    """The condition and the expression are of other columns; the index for looking up holds all rows still."""
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT notes_mail_key, ADD note varchar(9)")
    run(notes_url, f"CREATE UNIQUE INDEX part ON notes {index}")
    build(notes_url)
    found = indexes(notes_url)
    assert found["part_search"][:2] == (True, True)
    assert f"USING btree {carried}" in found["part_search"][2]
    assert found["idx_mail"][0] is False
    assert support.verify(notes_url, ENTRY).passed
    assert not build(notes_url).changed
    # Another condition is another guarantee.
    run(notes_url, "DROP INDEX part")
    run(notes_url, "CREATE UNIQUE INDEX part ON notes (mail) WHERE id > 0")
    if len(index.partition(")")[0].split(",")) == 1:
        with pytest.raises(RefusedError, match="index part_search of notes is missing"):
            switch_to_ciphertext(support.target(notes_url), ENTRY)
        assert build(notes_url).rebuilt == ("part_search",)
        switch_to_ciphertext(support.target(notes_url), ENTRY)


def test_a_carried_index_does_not_take_the_name_of_the_one_for_looking_up(notes_url: str) -> None:
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT notes_mail_key")
    run(notes_url, "CREATE UNIQUE INDEX idx ON notes (mail) WHERE tenant > 0")
    entry = support.table("notes", support.searchable("mail", "idx_search"), "name", "secret")
    # The guard is that of the catalogue.
    support.add_columns(notes_url, entry)
    build(notes_url, entry)
    found = indexes(notes_url)
    assert (found["idx_search"][0], found["idx_search_unique"][0]) == (False, True)
    assert "WHERE" not in found["idx_search"][2]


def test_after_a_revert_old_tokens_refuse_nothing(notes_url: str) -> None:
    """Nobody keeps them in step any more, and the rows that a condition is of change."""
    run(notes_url, "ALTER TABLE notes DROP CONSTRAINT notes_mail_key")
    run(notes_url, "CREATE UNIQUE INDEX part ON notes (mail) WHERE tenant > 0")
    run(notes_url, "UPDATE notes SET tenant = -id; UPDATE notes SET mail = 'm1', name = 'n1' WHERE id = 2")
    run(notes_url, "CREATE UNIQUE INDEX pair ON notes (tenant, name)")
    support.backfill_all(notes_url, ENTRY)
    build(notes_url)
    before = {name: made for name, made in indexes(notes_url).items() if "search" not in made[2]}
    assert support.verify(notes_url, ENTRY).passed
    switch_to_ciphertext(support.target(notes_url), ENTRY)
    revert_to_plaintext(support.target(notes_url), ENTRY)
    run(notes_url, "UPDATE notes SET mail = 'another', name = 'another' WHERE id = 1")
    run(
        notes_url, "UPDATE notes SET tenant = 1 WHERE id IN (1, 2)"
    )  # both would be m1 and n1 by their tokens
    assert set(indexes(notes_url)) == {*before, "idx_mail", "idx_name"} - {PENDING}
    # And the next try makes them again.
    support.encrypt(notes_url, ENTRY)
    assert {"part_search", "pair_search"} <= set(build(notes_url).created)
    assert support.verify(notes_url, ENTRY).passed
    switch_to_ciphertext(support.target(notes_url), ENTRY)
    with pytest.raises(psycopg.errors.UniqueViolation, match="part_search"):
        run(
            notes_url,
            "INSERT INTO notes (id, tenant, mail_encrypted, mail_search) VALUES (901, 1, %s, %s)",
            support.seal("another", "test_search"),
            support.token("another", "test_search"),
        )


REFUSED = {
    "(secret)": "secret has none",
    "(mail, secret)": "secret has none",
    "(mail) WHERE mail <> ''": "its condition",
    "(id) WHERE name IS NOT NULL": "its condition",
    "(lower(mail))": "an expression over a plaintext column",
    "(id, lower(name)) WHERE tenant > 0": "an expression over a plaintext column",
    "(mail) NULLS NOT DISTINCT": "NULLS NOT DISTINCT",
    "(mail own)": "type or collation",
    "(mail, title own)": "another column",
    "ALTER TABLE notes ADD CONSTRAINT odd UNIQUE (mail) DEFERRABLE": "DEFERRABLE",
}


@pytest.mark.parametrize(("index", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_uniqueness_that_tokens_cannot_carry(notes_url: str, index: str, reason: str) -> None:
    """The preflight says why, and the switch; the indexes that can be built are."""
    run(
        notes_url,
        "CREATE OPERATOR CLASS own FOR TYPE text USING btree AS OPERATOR 1 <, OPERATOR 2 <=, OPERATOR 3 =, "
        "OPERATOR 4 >=, OPERATOR 5 >, FUNCTION 1 bttextcmp (text, text)",
    )
    run(notes_url, "ALTER TABLE notes ADD title text; UPDATE notes SET title = id")
    run(notes_url, index if "TABLE" in index else f"CREATE UNIQUE INDEX odd ON notes {index}")
    warnings = [f.message for f in check(Database(notes_url), [ENTRY], support.KEYS).warnings]
    assert any("unique index odd " in told and reason in told for told in warnings)
    build(notes_url)
    made = {"notes_pkey", "notes_mail_key", "odd", "idx_mail", "idx_name", PENDING}
    assert set(indexes(notes_url)) == made
    assert support.verify(notes_url, ENTRY).passed
    with pytest.raises(RefusedError, match=f"unique index odd .*{reason}"):
        switch_to_ciphertext(support.target(notes_url), ENTRY)
    assert support.value(notes_url, "SELECT authority FROM alphapulse_encryption.tables") == "plaintext"


def test_rows_that_share_a_token_are_refused(notes_url: str) -> None:
    with support.application(notes_url) as connection:
        connection.execute(support.BEHIND)
        connection.execute("UPDATE notes SET mail_search = 'same' WHERE id IN (3, 4)")
    with pytest.raises(RefusedError, match="1 groups of rows of notes share the same mail_search") as caught:
        build(notes_url)
    assert "same'" not in str(caught.value)
    assert "idx_mail" not in indexes(notes_url)


def test_rows_that_share_a_composite_value_and_a_token_are_refused(notes_url: str) -> None:
    """A composite value with a field that is NULL counts: ``IS NOT NULL`` is false of it."""
    run(notes_url, "CREATE TYPE place AS (street text, town text)")
    run(notes_url, "ALTER TABLE notes ADD at place; UPDATE notes SET at = ('a' || id, NULL)")
    run(notes_url, "CREATE UNIQUE INDEX odd ON notes (at, mail)")
    with support.application(notes_url) as connection:
        connection.execute(support.BEHIND)
        connection.execute("DROP INDEX odd; ALTER TABLE notes DROP CONSTRAINT notes_mail_key")
        connection.execute("UPDATE notes SET at = '(a,)', mail_search = 'same' WHERE id IN (3, 4)")
        connection.execute("CREATE UNIQUE INDEX odd ON notes (at, mail)")
    with pytest.raises(RefusedError, match="1 groups of rows of notes share the same"):
        build(notes_url)


def test_writers_are_not_blocked(notes_url: str) -> None:
    with support.application(notes_url, autocommit=False) as slow:
        slow.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: build(notes_url)) as building:
            support.until(
                lambda: support.engine_waits(notes_url, "CREATE%", behind=slow), "it waits for the slow one"
            )
            with support.application(notes_url) as quick:
                quick.execute("SET lock_timeout TO '5s'")
                quick.execute("UPDATE notes SET mail = 'new' WHERE id = 2")
                quick.execute("INSERT INTO notes (id, mail) VALUES (777, 'newer')")
            slow.commit()
            assert set(building.result().created) == {"idx_mail", "idx_name", PENDING}


def test_before_its_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, name text, secret int)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        build(database_url)


def test_odd_names_in_another_schema(database_url: str) -> None:
    entry = support.table(
        'My "Table" %s', support.searchable("The Mail %", 'Idx "Mail" 100%'), schema="Other Schema"
    )
    run(database_url, 'CREATE SCHEMA "Other Schema"')
    run(
        database_url,
        'CREATE TABLE "Other Schema"."My ""Table"" %s" (id int PRIMARY KEY, "The Mail %" text UNIQUE)',
    )
    run(database_url, 'INSERT INTO "Other Schema"."My ""Table"" %s" VALUES (1, \'a\'), (2, \'b\')')
    support.encrypt(database_url, entry)
    result = build(database_url, entry)
    assert result.created == ('Idx "Mail" 100%', 'My "Table" %s_encryption_pending')
    found = run(
        database_url,
        "SELECT c.relname, n.nspname, x.indisunique FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid "
        "JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.relname = ANY(%s) ORDER BY 1",
        list(result.created),
    )
    assert found == [
        ('Idx "Mail" 100%', "Other Schema", True),
        ('My "Table" %s_encryption_pending', "Other Schema", False),
    ]
    assert not build(database_url, entry).changed


# All indexes anew.


def test_reindex(notes_url: str) -> None:
    build(notes_url)
    run(notes_url, "UPDATE notes SET tenant = tenant + i FROM generate_series(1, 5) AS i")
    nodes = "SELECT relname, relfilenode FROM pg_class WHERE relname = ANY(%s)"
    names = list(indexes(notes_url))
    before: dict[str, int] = dict(run(notes_url, nodes, names))
    result = reindex(Database(notes_url), ENTRY, ACTOR)
    after: dict[str, int] = dict(run(notes_url, nodes, names))
    assert (
        set(result.reindexed)
        >= set(names)
        == {"notes_pkey", "notes_mail_key", "idx_mail", "idx_name", PENDING}
    )
    assert all(before[name] != after[name] for name in names)
    assert all(valid for _, valid, _ in indexes(notes_url).values())
    assert result.leftovers == ()
    # Constraints, uniqueness and the pending index are what they were.
    with pytest.raises(psycopg.errors.UniqueViolation, match="notes_mail_key"):
        run(notes_url, "INSERT INTO notes (id, mail) VALUES (900, 'm1')")
    assert not build(notes_url).changed
    [(details,)] = run(
        notes_url, "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'reindex'"
    )
    assert set(details["indexes"]) == set(result.reindexed)
    sizes = support.value(
        notes_url,
        "SELECT sum(pg_relation_size(x.indexrelid)) FROM pg_index x JOIN pg_class c ON c.oid = 'notes'::regclass "
        "WHERE x.indrelid IN (c.oid, c.reltoastrelid)",
    )
    assert result.bytes_after == sizes


def test_what_an_interrupted_reindex_left_is_dropped(notes_url: str) -> None:
    """Really interrupted: ended while it waits for a transaction of the application."""
    build(notes_url)
    whole = "SELECT relname FROM pg_class WHERE relname ~ '_cc(new|old)'"
    with support.application(notes_url, autocommit=False) as application:
        application.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: reindex(Database(notes_url), ENTRY, ACTOR)) as working:
            support.until(
                lambda: support.engine_waits(notes_url, "REINDEX%", behind=application),
                "it waits for the application",
            )
            run(
                notes_url,
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'alphapulse_encryption'",
            )
            with pytest.raises(DatabaseFailure, match="Could not reindex notes"):
                working.result()
        application.commit()
    left = {name for (name,) in run(notes_url, whole)}
    assert len(left) >= 5
    assert any(name.startswith("pg_toast") for name in left)
    result = reindex(Database(notes_url), ENTRY, ACTOR)
    assert set(result.leftovers) == left
    assert run(notes_url, whole) == []
    assert set(result.reindexed) >= {"notes_pkey", "notes_mail_key", "idx_mail", "idx_name", PENDING}


def test_an_index_that_only_looks_like_a_leftover_stays(notes_url: str) -> None:
    run(notes_url, "CREATE INDEX mine_ccnew ON notes (tenant)")
    result = reindex(Database(notes_url), ENTRY, ACTOR)
    assert result.leftovers == ()
    assert "mine_ccnew" in result.reindexed
    assert indexes(notes_url)["mine_ccnew"][1]


def test_reindex_that_is_cancelled_cleans_up_itself(notes_url: str) -> None:
    build(notes_url)
    with support.application(notes_url, autocommit=False) as application:
        application.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: reindex(Database(notes_url), ENTRY, ACTOR)) as working:
            support.until(
                lambda: support.engine_waits(notes_url, "REINDEX%", behind=application),
                "it waits for the application",
            )
            run(
                notes_url,
                "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE datname = current_database() "
                "AND application_name = 'alphapulse_encryption'",
            )
            support.until(
                lambda: support.engine_waits(notes_url, "DROP INDEX%", behind=application), "it cleans up"
            )
            application.commit()
            with pytest.raises(DatabaseFailure, match="57014"):
                working.result()
    assert run(notes_url, "SELECT relname FROM pg_class WHERE relname ~ '_cc(new|old)'") == []
    assert all(valid for _, valid, _ in indexes(notes_url).values())


def test_reindex_lets_writers_go_on(notes_url: str) -> None:
    with support.application(notes_url, autocommit=False) as slow:
        slow.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: reindex(Database(notes_url), ENTRY, ACTOR)) as working:
            support.until(
                lambda: support.engine_waits(notes_url, "REINDEX%", behind=slow), "it waits for the slow one"
            )
            with support.application(notes_url) as quick:
                quick.execute("SET lock_timeout TO '5s'")
                quick.execute("UPDATE notes SET mail = 'new' WHERE id = 2")
            slow.commit()
            assert working.result().reindexed


def test_reindex_of_every_partition(database_url: str) -> None:
    run(
        database_url,
        "CREATE TABLE notes (id int PRIMARY KEY, mail text, name text, secret int) PARTITION BY RANGE (id)",
    )
    run(database_url, "CREATE TABLE low PARTITION OF notes FOR VALUES FROM (0) TO (10)")
    run(database_url, "CREATE TABLE high PARTITION OF notes FOR VALUES FROM (10) TO (99)")
    support.add_columns(database_url, ENTRY)
    build(database_url)
    whole = (
        "SELECT c.relname, c.relfilenode FROM pg_index x JOIN pg_class c ON c.oid = x.indexrelid "
        "WHERE x.indrelid IN ('low'::regclass, 'high'::regclass)"
    )
    before: dict[str, int] = dict(run(database_url, whole))
    result = reindex(Database(database_url), ENTRY, ACTOR)
    after: dict[str, int] = dict(run(database_url, whole))
    assert set(before) == set(after) <= set(result.reindexed)
    assert all(before[name] != after[name] for name in before)
    assert not build(database_url).changed


def test_reindex_of_encrypted_columns_only(notes_url: str) -> None:
    """In keys, INCLUDE, expressions and conditions; one after the other, with progress told of."""
    build(notes_url)
    run(notes_url, "CREATE INDEX by_expression ON notes (length(secret_encrypted))")
    run(notes_url, "CREATE INDEX by_condition ON notes (tenant) WHERE mail_search IS NOT NULL")
    run(notes_url, "CREATE INDEX included ON notes (tenant) INCLUDE (name_search)")
    run(notes_url, "CREATE INDEX plain ON notes (tenant) WHERE name <> 'x'")
    nodes = "SELECT relname, relfilenode FROM pg_class WHERE relname = ANY(%s)"
    before: dict[str, int] = dict(run(notes_url, nodes, list(indexes(notes_url))))
    told: list[str] = []
    with support.application(notes_url, autocommit=False) as application:
        application.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(
            lambda: reindex(
                Database(notes_url), ENTRY, ACTOR, choice="encrypted", on_wait=told.append, progress=True
            )
        ) as working:
            support.until(lambda: any("waits for session" in line for line in told), "it says so")
            application.commit()
            result = working.result()
    assert set(result.reindexed) == {
        "idx_mail",
        "idx_name",
        PENDING,
        "by_expression",
        "by_condition",
        "included",
    }
    after: dict[str, int] = dict(run(notes_url, nodes, list(before)))
    assert {name for name, node in before.items() if after[name] != node} == set(result.reindexed)


def test_what_an_interrupted_reindex_did_stays_and_is_told(notes_url: str) -> None:
    """Of several indexes one after the other, ended in the second."""
    build(notes_url)
    run(notes_url, "CREATE FUNCTION pause(text) RETURNS text IMMUTABLE LANGUAGE sql AS 'SELECT $1'")
    run(notes_url, "CREATE INDEX idx_mail_2 ON notes (pause(mail_search))")
    run(
        notes_url,
        "CREATE OR REPLACE FUNCTION pause(text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
        "'BEGIN RAISE EXCEPTION ''no''; END'",
    )
    with pytest.raises(DatabaseFailure, match="Could not reindex notes"):
        reindex(Database(notes_url), ENTRY, ACTOR, choice="encrypted")
    [(details,)] = run(
        notes_url, "SELECT details FROM alphapulse_encryption.audit_log WHERE action = 'reindex'"
    )
    assert details["indexes"] == ["idx_mail"]
    assert [name for name in details["leftovers"] if name.startswith("idx_mail_2_cc")]
    assert run(notes_url, "SELECT relname FROM pg_class WHERE relname ~ '_cc(new|old)'") == []
    assert all(valid for _, valid, _ in indexes(notes_url).values())


def test_reindex_before_its_time(database_url: str) -> None:
    run(database_url, "CREATE TABLE notes (id int PRIMARY KEY, mail text, name text, secret int)")
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        reindex(Database(database_url), ENTRY, ACTOR)


def test_what_a_deadlock_left_is_built_again_at_once(notes_url: str) -> None:
    """The server ends a build to dissolve a deadlock; the next try finds the invalid index."""
    with support.application(notes_url, autocommit=False) as other:
        other.execute("SET deadlock_timeout TO '10min'")  # so that it is the engine that notices
        other.execute("UPDATE notes SET tenant = 2 WHERE id = 1")
        with support.Background(lambda: build(notes_url)) as building:
            support.until(
                lambda: support.engine_waits(notes_url, "CREATE%", behind=other), "it waits for the other"
            )
            # … which now waits for the lock that the build keeps, and gets it when the server has ended the build.
            other.execute("LOCK TABLE notes IN SHARE UPDATE EXCLUSIVE MODE")
            other.rollback()
            result = building.result()
    assert set(result.created) == {"idx_mail", "idx_name", PENDING}
    assert all(valid for _, valid, _ in indexes(notes_url).values())


def test_a_revert_leaves_no_index_invalid(notes_url: str) -> None:
    """A build was killed, and the next step is the way back."""
    build(notes_url)
    run(notes_url, "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'idx_name'::regclass")
    revert_to_plaintext(support.target(notes_url), ENTRY)
    found = indexes(notes_url)
    assert all(valid for _, valid, _ in found.values())
    assert "idx_mail" in found
