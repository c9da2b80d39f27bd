"""After drop and erasure no value is left in the database's data files; what looks for them here is not the engine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.gates.roles import _FILE_FUNCTIONS
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.definition import read_table
from alphapulse_encryption.migration.steps import residual_data
from alphapulse_encryption.migration.steps.erase import ErasureResult, erase_dropped
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests import conftest
from alphapulse_encryption_tests.migration import support, walk

USERS = walk.CATALOGUE.table("users")
HEAP = "public.users: heap"
TOAST = "public.users: TOAST"

# Each lies somewhere else: in the heap, in pg_statistic as the most common value, in TOAST.
IN_ROW = "canary-4f1d7c90a6@example.com"
COMMON = "canary-common-8d02b7"
LONG = "canary-long-51ac3e " + "".join(f"{n * 2654435761 % 2**32:08x}" for n in range(1_000))
CANARIES = {"row": IN_ROW.encode(), "common": COMMON.encode(), "long": LONG[:40].encode()}


@pytest.fixture(scope="module")
def _dropped_template(
    postgres: EmbeddedPostgres, _sample_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    for url in conftest.fresh_database(postgres, _sample_template):
        walk.query(url, "UPDATE users SET email = %s WHERE id = 200", IN_ROW)
        walk.query(url, "UPDATE users SET phone_number = %s WHERE id %% 3 = 0 AND id > 50", COMMON)
        walk.query(url, "UPDATE users SET two_factor_secret = %s WHERE id = 201", LONG)
        walk.switch(url, USERS)
        walk.query(url, "ANALYZE users")
        walk.backup(url, (USERS,), tmp_path_factory.mktemp("backups"), postgres.bin_dir())
        walk.approve(url, USERS)
        walk.drop(url, USERS)
        yield psycopg.conninfo.conninfo_to_dict(url)["dbname"]  # type: ignore[misc]


@pytest.fixture
def dropped_url(postgres: EmbeddedPostgres, _dropped_template: str) -> Iterator[str]:
    """A database whose users' plaintext was dropped, and not erased."""
    for url in conftest.fresh_database(postgres, _dropped_template):
        support.sign_here(url, walk.KEYS)
        yield url


def files_with(url: str, values: dict[str, bytes] = CANARIES) -> dict[str, set[str]]:
    """For every value the files of the database that hold it, read from the disk itself."""
    walk.query(url, "CHECKPOINT")
    directory, oid = walk.query(
        url,
        "SELECT current_setting('data_directory'), oid FROM pg_database WHERE datname = current_database()",
    )[0]
    found: dict[str, set[str]] = {name: set() for name in values}
    files = list((Path(directory) / "base" / str(oid)).iterdir())
    assert len(files) > 100
    for file in files:
        content = file.read_bytes()
        for name, value in values.items():
            if value in content:
                found[name].add(file.name)
    return found


def run_erasure(url: str, confirmation: str = "users") -> ErasureResult:
    return erase_dropped(walk.target(url), USERS, confirmation=confirmation)


def places(result: ErasureResult) -> dict[str, residual_data.Place]:
    assert len({place.name for place in result.places}) == len(result.places)
    return {place.name: place for place in result.places}


def file_of(url: str, relation: str) -> str:
    return str(walk.value(url, "SELECT pg_relation_filenode(%s::regclass)::text", relation))


def test_nothing_is_left_in_the_data_files(dropped_url: str) -> None:
    # The drop alone erased nothing: the scan finds what is there to be found.
    before = files_with(dropped_url)
    assert file_of(dropped_url, "users") in before["row"]
    assert file_of(dropped_url, "pg_statistic") in before["common"]
    toast = walk.value(
        dropped_url, "SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = 'users'::regclass"
    )
    assert file_of(dropped_url, toast) in before["long"]
    rows = walk.contents(dropped_url, "users", walk.columns_of(dropped_url, "users"))

    result = run_erasure(dropped_url)

    assert files_with(dropped_url) == {name: set() for name in CANARIES}
    assert walk.contents(dropped_url, "users", walk.columns_of(dropped_url, "users")) == rows
    assert not result.statistics_left and result.checkpointed
    assert result.bytes_after < result.bytes_before
    assert result.remaining == ()
    found = places(result)
    for name in (HEAP, TOAST):
        assert found[name].finding == "not found"
        assert found[name].before, name
    assert found[residual_data.STATISTICS].finding == "not found"
    # What an erasure cannot reach is told as it is.
    assert found["write-ahead log (pg_wal)"].finding == "found"
    assert found["bookkeeping (schema alphapulse_encryption)"].finding == "not found"
    unseen = {name for name, place in found.items() if place.finding == "cannot be seen"}
    assert {"backups (1 of ours)", "disk blocks of deleted files, and snapshots of the disk"} <= unseen
    shown = repr(result) + str(walk.query(dropped_url, "SELECT details FROM alphapulse_encryption.audit_log"))
    assert not any(canary.decode() in shown for canary in CANARIES.values())
    assert (
        walk.value(
            dropped_url, "SELECT count(*) FROM alphapulse_encryption.audit_log WHERE action = 'erase_dropped'"
        )
        == 1
    )

    # What it says is so without it, and again changes nothing for the worse.
    assert run_erasure(dropped_url).remaining == ()


def test_the_engines_own_look_finds_what_was_dropped_by_either_way(dropped_url: str) -> None:
    with Database(dropped_url).session("look") as connection:
        connection.execute("CHECKPOINT")
        definition = read_table(connection, USERS, plaintext=False)
        files = residual_data.open_data_files(connection)
        assert isinstance(files, residual_data.LocalFiles)
        values = residual_data.KnownValues(tuple(CANARIES.values()), (IN_ROW, COMMON, LONG))
        assert b"canary" not in repr(values).encode()
        seen = []
        for way in (files, residual_data.ServerFiles(connection)):
            looked = residual_data.look_everywhere(connection, way, definition, [definition.oid], values)
            # The WAL goes on being written while it is read.
            seen.append(
                {place.name: (place.finding, place.values) for place in looked if "pg_wal" not in place.name}
            )
        assert seen[0] == seen[1]
        assert seen[0][HEAP] == ("found", 2)
        assert seen[0][TOAST] == ("found", 1)
        assert seen[0][residual_data.STATISTICS][0] == "found"
        before, _ = residual_data.look_into_table(connection, files, [definition.oid], values)
        assert (before[HEAP], before[TOAST]) == (2, 1)


def test_a_copy_elsewhere_is_named_and_a_value_of_another_column_is_no_remnant(dropped_url: str) -> None:
    # The engine looks for the longest values, of which this is one.
    walk.query(dropped_url, "CREATE TABLE contacts AS SELECT %s::text AS mail", LONG[:200])
    walk.query(dropped_url, "UPDATE users SET status = 'active', password_hash = %s WHERE id = 9", LONG[:200])
    walk.query(dropped_url, "ALTER TABLE contacts ALTER mail SET STORAGE EXTERNAL")
    result = run_erasure(dropped_url)
    found = places(result)
    assert found["public.contacts"].finding == "found"
    assert result.remaining == ()
    assert found[HEAP].finding == "not found"


def test_old_statistics_kept_for_a_long_transaction_are_reported(dropped_url: str) -> None:
    # A copied database has no dead rows that anybody could still see: so they are made anew.
    walk.query(
        dropped_url, "CREATE TABLE crowd AS SELECT %s::text AS mail FROM generate_series(1, 100)", COMMON
    )
    walk.query(dropped_url, "ANALYZE crowd")
    with psycopg.connect(dropped_url) as reader:
        reader.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        reader.execute("SELECT count(*) FROM pg_class")
        walk.query(dropped_url, "DROP TABLE crowd")
        run_erasure(dropped_url)
        kept = files_with(dropped_url, {"common": COMMON.encode()})["common"]
        assert kept == {file_of(dropped_url, "pg_statistic")}
        with Database(dropped_url).session("look") as connection:
            definition = read_table(connection, USERS, plaintext=False)
            values = residual_data.KnownValues((COMMON.encode(),), (COMMON,))
            files = residual_data.open_data_files(connection)
            looked = residual_data.look_everywhere(connection, files, definition, [definition.oid], values)
        (place,) = [place for place in looked if place.name == residual_data.STATISTICS]
        assert (place.finding, place.erasable) == ("found", True)
        assert "long transaction" in place.remark
    run_erasure(dropped_url)
    assert files_with(dropped_url, {"common": COMMON.encode()})["common"] == set()


def test_it_waits_for_the_lock_in_short_tries(dropped_url: str) -> None:
    with psycopg.connect(dropped_url) as reader:
        reader.execute("SELECT count(*) FROM users")
        with support.Background(lambda: run_erasure(dropped_url)) as erasing:
            support.until(
                lambda: support.engine_waits(dropped_url, "VACUUM%", behind=reader),
                "the erasure wants its lock",
            )
            reader.rollback()
            assert erasing.result().remaining == ()


def test_it_is_refused_unless_the_plaintext_is_dropped_and_the_name_is_typed(
    dropped_url: str, sample_url: str
) -> None:
    before = file_of(dropped_url, "users")
    for wrong in ("", "user", "public.users", "USERS"):
        with pytest.raises(RefusedError, match="Type users exactly"):
            run_erasure(dropped_url, wrong)
    assert file_of(dropped_url, "users") == before
    with pytest.raises(RefusedError, match="no encrypted columns yet"):
        run_erasure(sample_url)
    walk.encrypt(sample_url, USERS)
    before = file_of(sample_url, "users")
    with pytest.raises(RefusedError, match="not dropped"):
        run_erasure(sample_url)
    assert file_of(sample_url, "users") == before


@contextlib.contextmanager
def owner(url: str) -> Iterator[str]:
    """The address for a role that owns the table, and may not rewrite the planner's statistics."""
    role = f"owner_{os.getpid()}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(role)))
        connection.execute(SQL("ALTER TABLE users OWNER TO {}").format(Identifier(role)))
        everything = SQL("GRANT ALL ON ALL TABLES IN SCHEMA public, alphapulse_encryption TO {}")
        connection.execute(everything.format(Identifier(role)))
        connection.execute(SQL("GRANT USAGE ON SCHEMA alphapulse_encryption TO {}").format(Identifier(role)))
    try:
        yield url.replace("postgres@", f"{role}@", 1)
    finally:
        walk.query(url, f"REASSIGN OWNED BY {role} TO postgres; DROP OWNED BY {role}; DROP ROLE {role}")


def test_a_role_that_may_not_look_says_so(dropped_url: str) -> None:
    statistics = file_of(dropped_url, "pg_statistic")
    with owner(dropped_url) as url:
        result = run_erasure(url)
        assert result.statistics_left and not result.checkpointed
        assert file_of(dropped_url, "pg_statistic") == statistics
        found = places(result)
        for name in (HEAP, residual_data.STATISTICS, "write-ahead log (pg_wal)"):
            assert found[name].finding == "cannot be seen"
        # The table itself was rewritten all the same.
        after = files_with(dropped_url)
        assert after["row"] == set()
        # A checkpoint of the server's own may have written a page without what is dead in it.
        assert after["common"] <= {statistics}


COMMAND = "VACUUM (FULL) pg_catalog.pg_statistic, pg_catalog.pg_statistic_ext_data"


def test_statistics_that_the_role_may_not_rewrite_are_told_as_such(dropped_url: str) -> None:
    with owner(dropped_url) as url:
        role = f"owner_{os.getpid()}"
        walk.query(dropped_url, f"GRANT pg_read_server_files, pg_read_all_settings, pg_checkpoint TO {role}")
        for function in _FILE_FUNCTIONS:
            walk.query(dropped_url, f"GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {role}")
        (left,) = run_erasure(url).remaining
        assert left.name == residual_data.STATISTICS
        assert COMMAND in left.remark and "long transaction" not in left.remark
        walk.query(dropped_url, COMMAND)
        assert run_erasure(url).remaining == ()
        assert files_with(dropped_url)["common"] == set()


@pytest.mark.long
def test_statistics_that_somebody_holds_are_told_as_such(dropped_url: str) -> None:
    with psycopg.connect(dropped_url) as holder:
        holder.execute("LOCK TABLE pg_catalog.pg_statistic IN ACCESS SHARE MODE")
        left = run_erasure(dropped_url).statistics_left
    assert "pg_statistic" in left and "lock" in left and COMMAND not in left


@pytest.mark.parametrize(
    ("type_", "values"),
    [
        (
            "numeric",
            *(
                [
                    "123456789012.34",
                    "-98765432.10987654",
                    "0.000123456789",
                    "100020003.0004",
                    "12345678901234567890",
                ],
            ),
        ),
        ("numeric(28,10)", ["123456.7890123456", "-1.2345678901", "999999999999999999.9999999999"]),
        ("text", ["a value of some length", "漢字かな交じり文", "blanks at the end   "]),
        ("character(40)", ["padded by the server"]),
        ("character varying(64)", ["+49 170 0000000"]),
        (
            "jsonb",
            ['{"street": "Hauptstraße 17", "more": ["nested strings", {"a": "deeper still"}], "n": 1}'],
        ),
        ("json", ['{"as":   "written"}']),
        ("uuid", ["0f8fad5b-d9cb-469f-a165-70867728950e"]),
        ("bytea", ["\\xdeadbeef00112233"]),
    ],
)
def test_values_are_looked_for_as_they_lie_on_the_disk(
    database_url: str, type_: str, values: list[str]
) -> None:
    walk.query(database_url, f"CREATE TABLE t (v {type_})")
    forms = []
    with psycopg.connect(database_url) as connection:
        for value in values:
            connection.execute(SQL("INSERT INTO t VALUES ({}::{})").format(Literal(value), SQL(type_)))
            row = connection.execute("SELECT v::text FROM t ORDER BY ctid DESC LIMIT 1").fetchone()
            assert row is not None
            form = residual_data.disk_form(row[0], type_, "utf-8")
            assert form, value
            forms += form
    walk.query(database_url, "CHECKPOINT")
    path = walk.value(
        database_url, "SELECT current_setting('data_directory') || '/' || pg_relation_filepath('t')"
    )
    content = Path(path).read_bytes()
    for pattern, _ in forms:
        assert pattern in content


@pytest.mark.parametrize(
    ("type_", "text"),
    [("numeric", "1.5"), ("numeric", "NaN"), ("boolean", "true"), ("date", "2024-01-01"), ("text", "short")],
)
def test_what_cannot_be_told_from_chance_is_not_looked_for(type_: str, text: str) -> None:
    assert residual_data.disk_form(text, type_, "utf-8") == []


def test_a_value_across_two_chunks_is_found() -> None:
    chunks = iter([b"...can", b"a", b"ry...", b"other"])
    found, size = residual_data.look_through([b"canary", b"no", b"other"], chunks)
    assert (found, size) == ({0, 2}, 17)


def of_two_bytes(least: int, most: int) -> st.SearchStrategy[bytes]:
    return st.lists(st.sampled_from([b"a", b"b"]), min_size=least, max_size=most).map(b"".join)


@given(st.lists(of_two_bytes(1, 5), max_size=6), st.lists(of_two_bytes(0, 9), max_size=6))
def test_many_patterns_at_once_are_found_like_each_by_itself(
    patterns: list[bytes], chunks: list[bytes]
) -> None:
    whole = b"".join(chunks)
    found, size = residual_data.look_through(patterns, iter(chunks))
    assert found == {n for n, pattern in enumerate(patterns) if pattern in whole}
    assert size == len(whole)


def test_a_pattern_within_another_is_found() -> None:
    assert residual_data.look_through([b"abcd", b"bc", b"cdef"], [b"xabcdef"]) == ({0, 1, 2}, 7)


def test_another_servers_directory_is_not_taken_for_this_one(tmp_path: Path) -> None:
    assert not residual_data._is_of(tmp_path, 1)
    (tmp_path / "global").mkdir()
    (tmp_path / "base").mkdir()
    (tmp_path / "global" / "pg_control").write_bytes((2).to_bytes(8, "little"))
    assert residual_data._is_of(tmp_path, 2)
    assert not residual_data._is_of(tmp_path, 1)
