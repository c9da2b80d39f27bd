"""The restore drill: what was dumped is restored and compared with the original as it was at that moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.errors import RefusedError
from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping
from alphapulse_encryption.migration.bookkeeping.keys import ensure_key
from alphapulse_encryption.migration.gates import drill
from alphapulse_encryption.migration.gates.backup import BackupResult, take_backup
from alphapulse_encryption.migration.postgres import scratch
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.schema.views import create_views
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.journey import After
from alphapulse_encryption_tests.migration.postgres import installed
from alphapulse_encryption_tests.migration.postgres.installed import installed_server
from alphapulse_encryption_tests.planted import planted

TABLES = walk.CATALOGUE.tables
USERS = walk.CATALOGUE.table("users")


def backup_with_drill(url: str, directory: Path, bin_dir: Path, *, server: str | None = None) -> BackupResult:
    return take_backup(
        walk.target(url),
        (USERS,),
        directory=directory,
        bin_dirs=[bin_dir],
        drill_server=Database(server or url),
    )


def programs(postgres: EmbeddedPostgres, directory: Path, **scripts: str) -> Path:
    """pg_dump and pg_restore with something done around them: ``{real}`` is the program itself."""
    directory.mkdir()
    for name in ("pg_dump", "pg_restore"):
        real = postgres.bin_dir() / name
        script = scripts.get(name, 'exec {real} "$@"').format(real=real, bin=postgres.bin_dir())
        (directory / name).write_text(
            f'#!/bin/sh\ncase "$1" in --version|--list) exec {real} "$@";; esac\n{script}\n'
        )
        (directory / name).chmod(0o755)
    return directory


def scratch_databases(postgres: EmbeddedPostgres) -> list[str]:
    rows = walk.query(
        postgres.url("postgres"), "SELECT datname FROM pg_database WHERE datname LIKE 'encryption\\_drill%'"
    )
    return [name for (name,) in rows]


def counts(url: str) -> dict[str, int]:
    """Rows of every table, whoever it belongs to."""
    names = walk.query(
        url,
        "SELECT schemaname, tablename FROM pg_tables WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    )
    with psycopg.connect(url) as connection:
        found = {}
        for schema, name in names:
            counting = SQL("SELECT count(*) FROM {}").format(Identifier(schema, name))
            row = connection.execute(counting).fetchone()
            found[name] = int(row[0]) if row else 0
    return found


def test_what_is_restored_equals_the_moment_of_the_dump_while_writes_go_on(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with Database(sample_url).session("set up") as connection:
        ensure_bookkeeping(connection)
        ensure_key(connection, walk.KEYS)
    before = counts(sample_url)
    # Between the snapshot and the dump, another session commits an insert, an update and a deletion.
    writes = (
        "INSERT INTO users (username, email, password_hash) SELECT 'late', 'late@example.com', 'x';"
        "UPDATE trades SET fee = 1 WHERE id % 2 = 0; DELETE FROM positions WHERE id % 3 = 0"
    )
    writing = programs(
        *(postgres, tmp_path / "bin"),
        pg_dump=f'{{bin}}/psql -qX -v ON_ERROR_STOP=1 -c "{writes}" || exit 9\nexec {{real}} "$@"',
    )
    result = backup_with_drill(sample_url, tmp_path / "backups", writing)

    assert walk.value(sample_url, "SELECT count(*) FROM users WHERE username = 'late'") == 1
    assert result.drill is not None
    assert (result.drill.tables, result.drill.rows) == (len(before), sum(before.values()))
    recorded = walk.query(
        sample_url,
        "SELECT drilled_at >= taken_at, drill ->> 'tables', drill ->> 'rows' FROM alphapulse_encryption.backups",
    )
    assert recorded == [(True, str(result.drill.tables), str(result.drill.rows))]
    assert scratch_databases(postgres) == []


def test_a_table_that_is_being_migrated_restores_with_its_guard(
    after: After, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    url = after("switched")
    create_views(Database(url), USERS, walk.ACTOR)
    result = backup_with_drill(url, tmp_path, postgres.bin_dir())
    assert result.drill is not None and result.drill.rows > 0


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        ("UPDATE trades SET price = price + 0.00000001 WHERE id = 7", "table public.trades has other values"),
        ("DELETE FROM trades WHERE id = 7", r"table public.trades has [\d,]+ rows in place of [\d,]+"),
        ("DROP TABLE positions CASCADE", "table public.positions is missing"),
    ],
)
def test_a_restored_database_that_differs_is_refused(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, tamper: str, said: str
) -> None:
    damaging = programs(
        *(postgres, tmp_path / "bin"),
        pg_restore=f'{{real}} "$@" && exec {{bin}}/psql -qX -v ON_ERROR_STOP=1 -c "{tamper}"',
    )
    with pytest.raises(RefusedError, match=said):
        backup_with_drill(sample_url, tmp_path / "backups", damaging)
    assert list((tmp_path / "backups").iterdir()) == []
    assert walk.value(sample_url, "SELECT count(*) FROM alphapulse_encryption.backups") == 0
    assert scratch_databases(postgres) == []


def test_what_the_dump_left_out_is_noticed(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    partial = programs(*(postgres, tmp_path / "bin"), pg_dump='exec {real} --exclude-table-data=trades "$@"')
    with pytest.raises(RefusedError, match=r"public\.trades has 0 rows"):
        backup_with_drill(sample_url, tmp_path / "backups", partial)


def test_a_dump_that_cannot_be_restored_says_at_what(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    clashing = programs(
        *(postgres, tmp_path / "bin"),
        pg_restore='{bin}/psql -qX -c "CREATE TABLE public.users (canary text)"\nexec {real} "$@"',
    )
    with pytest.raises(RefusedError, match=r"at CREATE TABLE public\.users: it exists already"):
        backup_with_drill(sample_url, tmp_path / "backups", clashing)
    assert scratch_databases(postgres) == []
    assert list((tmp_path / "backups").iterdir()) == []


_KILLED = """
import sys
from pathlib import Path
from alphapulse_encryption_tests.migration.gates.test_drill import backup_with_drill
backup_with_drill(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_the_scratch_database_of_a_killed_drill_is_removed_by_the_next_one(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    fatal = programs(postgres, tmp_path / "bin", pg_restore="kill -9 $PPID\nexec cat > /dev/null")
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, sample_url, str(tmp_path / "backups"), str(fatal)], check=False
    )
    assert killed.returncode == -signal.SIGKILL
    (left,) = scratch_databases(postgres)

    # One that is under way is another's, and left alone.
    with drill.scratch_database(Database(sample_url), scratch.Like(SQL(""))) as under_way:
        kept = under_way.conninfo.partition("dbname=")[2].split()[0]
        assert scratch_databases(postgres) == [kept] != [left]
        backup_with_drill(sample_url, tmp_path / "backups", postgres.bin_dir())
        assert scratch_databases(postgres) == [kept]
    assert scratch_databases(postgres) == []
    # And so do their owners.
    assert walk.query(sample_url, "SELECT rolname FROM pg_roles WHERE rolname LIKE '%drill%'") == []
    assert [path.suffix for path in (tmp_path / "backups").iterdir()] == [".age"]


def test_it_can_be_done_on_another_server(
    sample_url: str, postgres: EmbeddedPostgres, server_dir: Path, tmp_path: Path
) -> None:
    with EmbeddedPostgres(server_dir, settings={"fsync": "off"}) as other:
        elsewhere = other.url("postgres")
        seen = programs(
            *(postgres, tmp_path / "bin"),
            pg_restore=f'echo "$PGHOST" > {tmp_path}/host\nexec {{real}} "$@"',
        )
        result = backup_with_drill(sample_url, tmp_path / "backups", seen, server=elsewhere)
        assert result.drill is not None and result.drill.rows > 0
        assert (
            str(server_dir.resolve()) in (tmp_path / "host").read_text()
            or "/tmp" in (tmp_path / "host").read_text()
        )
        assert (tmp_path / "host").read_text().strip() != _host(postgres)
        assert scratch_databases(other) == []


@pytest.mark.skipif(not installed.BINS, reason=installed.NEEDED)
def test_over_tls_and_by_programs_that_are_newer_than_the_server(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with installed_server(postgres) as server:
        # Nearest to the server, of all that have TLS.
        walk.query(server.socket("postgres"), "CREATE ROLE ada SUPERUSER LOGIN PASSWORD 'canary'")
        walk.query(server.socket("postgres"), "CREATE DATABASE theirs")
        url = server.url("theirs", "ada", password="canary")
        load_sample(url, rows=1000)
        places = [postgres.bin_dir(), *installed.BINS]
        target = walk.target(url)
        for bin_dirs, address in ((places, url), ([postgres.bin_dir()], server.socket("theirs"))):
            with Database(address).session("set up") as connection:
                ensure_bookkeeping(connection)
                ensure_key(connection, walk.KEYS)
            target = walk.target(address)
            result = take_backup(
                target,
                (USERS,),
                directory=tmp_path / "backups",
                bin_dirs=bin_dirs,
                drill_server=Database(address),
            )
            assert result.drill is not None
            counted = counts(address)
            # The backup itself is recorded afterwards, and told in the audit log.
            assert 0 <= sum(counted.values()) - result.drill.rows <= 3
            assert walk.query(address, "SELECT datname FROM pg_database WHERE datname LIKE '%drill%'") == []


def _host(postgres: EmbeddedPostgres) -> str:
    return str(psycopg.conninfo.conninfo_to_dict(postgres.url("postgres"))["host"])


def test_without_the_right_to_create_a_database_nothing_is_begun(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    role = f"without_createdb_{os.getpid()}"
    walk.query(sample_url, f"CREATE ROLE {role} LOGIN")
    try:
        with pytest.raises(RefusedError, match="CREATEDB"):
            backup_with_drill(
                *(sample_url, tmp_path / "backups", postgres.bin_dir()),
                server=sample_url.replace("postgres@", f"{role}@", 1),
            )
    finally:
        walk.query(sample_url, f"DROP ROLE {role}")
    assert not (tmp_path / "backups").exists()


def test_the_checksum_sees_every_value_and_no_order(database_url: str) -> None:
    walk.query(
        database_url,
        """CREATE TABLE a (t text, n numeric, b bytea); CREATE TABLE b (LIKE a); CREATE TABLE c (LIKE a);
        CREATE TABLE "of t" (); INSERT INTO "of t" DEFAULT VALUES;
        INSERT INTO a VALUES ('x', 1.0, '\\x00'), (NULL, NULL, NULL), ('', 'NaN', '\\x00'), ('x', 1.0, '\\x00');
        INSERT INTO b SELECT * FROM a ORDER BY t NULLS FIRST;
        INSERT INTO c SELECT t, n + 0.00, b FROM a""",
    )
    with Database(database_url).session("read") as connection:
        assert drill.read_tables(connection) == tuple(("public", name) for name in ("a", "b", "c", "of t"))
        a, b, c, empty = (drill.read_contents(connection, table) for table in drill.read_tables(connection))
        assert a == b
        assert (a.rows, empty.rows) == (4, 1)
        assert c.rows == a.rows and c.checksum != a.checksum  # 1.0 and 1.00 are different texts
        connection.execute("UPDATE public.b SET t = NULL WHERE t = ''")
        assert drill.read_contents(connection, ("public", "b")) != a


def test_planted_code_gets_no_rights_by_a_drill(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    with planted(postgres, sample_url, "public.users", "email") as attack:
        # With that, nothing is begun on the target.
        walk.query(sample_url, "DROP EVENT TRIGGER planted_event")
        result = backup_with_drill(sample_url, tmp_path, postgres.bin_dir())
        assert attack.harm() == ([], [])
        assert result.drill is not None and result.drill.rows > 0
    assert scratch_databases(postgres) == []
    assert walk.query(sample_url, "SELECT rolname FROM pg_roles WHERE rolname LIKE '%drill%'") == []


def test_extensions_come_from_who_may_create_them_and_passwords_for_other_servers_stay(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.query(
        sample_url,
        """CREATE SCHEMA tools; CREATE EXTENSION hstore SCHEMA tools; CREATE EXTENSION dblink SCHEMA tools;
        CREATE EXTENSION postgres_fdw; CREATE SERVER other FOREIGN DATA WRAPPER postgres_fdw OPTIONS (dbname 'x');
        CREATE USER MAPPING FOR postgres SERVER other OPTIONS (user 'u', password 'secret');
        CREATE FOREIGN TABLE far (v int) SERVER other;
        CREATE TABLE with_hstore (v tools.hstore); INSERT INTO with_hstore VALUES ('a=>1');
        CREATE TABLE forced (v int); INSERT INTO forced VALUES (1); CREATE POLICY p ON forced USING (v > 1);
        ALTER TABLE forced ENABLE ROW LEVEL SECURITY; ALTER TABLE forced FORCE ROW LEVEL SECURITY""",
    )
    seen = programs(
        *(postgres, tmp_path / "bin"),
        pg_restore='{real} "$@" && exec {bin}/psql -qXAt -v ON_ERROR_STOP=1 -c "SELECT extname, rolsuper FROM '
        "pg_extension JOIN pg_roles r ON r.oid = extowner WHERE extname <> 'plpgsql' UNION ALL "
        "SELECT current_user, rolsuper FROM pg_roles WHERE rolname = current_user UNION ALL "
        "SELECT 'mappings', count(*) > 0 FROM pg_user_mappings ORDER BY 1\" -o " + str(tmp_path / "seen"),
    )
    result = backup_with_drill(sample_url, tmp_path / "backups", seen)
    assert result.drill is not None and result.drill.rows > 0
    found = dict(line.split("|") for line in (tmp_path / "seen").read_text().splitlines())
    (owner,) = [name for name in found if name.startswith("encryption_drill")]
    assert (found.pop(owner), found.pop("mappings")) == ("f", "f")
    assert {"hstore", "dblink", "postgres_fdw"} <= set(found) and set(found.values()) == {"t"}
