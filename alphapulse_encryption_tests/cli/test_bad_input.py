"""Wrong usage and configuration: one clear message, the right exit status, and nothing changed."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator

import psycopg

from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.place import Place

CANARY = "canary-5e1f"
VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"


@contextlib.contextmanager
def nothing_changes(theirs: Place) -> Iterator[None]:
    """Neither the database nor the list of runs is another one afterwards."""
    before, runs = theirs.dump(), theirs.run_count()
    yield
    assert theirs.dump() == before
    assert theirs.run_count() == runs


def message(theirs: Place, status: int, *arguments: str, **changes: str | None) -> str:
    """The one line that a command says, on stderr."""
    done = theirs.fails(status, *arguments, **changes)
    assert done.stdout == ""
    assert done.stderr.startswith("python -m alphapulse_encryption: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert CANARY not in done.stderr
    return done.stderr


BAD_SIZES = ("0", "-1", "x", "1.5", "", "100001", "٣", "1_0", "9" * 5000)
USAGE: tuple[tuple[tuple[str, ...], str], ...] = (
    ((), "name at least one step"),
    (("--table", "sessions"), "name at least one step"),
    (("--confirm",), "name at least one step"),
    (("--add-columns", "--confirm"), "--confirm goes with --drop-unencrypted"),
    (("--drop-unencrypted",), "--drop-unencrypted removes the plaintext columns: add --confirm"),
    (("--drop-unencrypted", "--verify"), "--drop-unencrypted removes the plaintext columns: add --confirm"),
    (("--frobnicate",), "unrecognized arguments: --frobnicate"),
    (("--add-column",), "unrecognized arguments: --add-column"),
    (("--add-columns", "sessions"), "unrecognized arguments: sessions"),
    (("--verify", "--table"), "argument --table: expected one argument"),
    (("--verify", "--batch-size", "5"), "--batch-size goes with --migrate-data or --rotate-keys"),
    (("--approve-drop",), "--approve-drop takes one --table and --approver, --reason and --confirmation"),
    (("--verify", "--reason", "x"), "--reason goes with --approve-drop or --revoke-approval"),
    (("--verify", "--restore-drill"), "--restore-drill goes with --backup"),
    (("--verify", "--hold"), "--hold goes with --restore-plaintext"),
    (("--erase-dropped",), "--erase-dropped takes one --table and --confirmation"),
    (("--erase-dropped", "--table", "sessions"), "--erase-dropped takes one --table and --confirmation"),
    (
        ("--erase-dropped", "--confirmation", "sessions"),
        "--erase-dropped takes one --table and --confirmation",
    ),
    (
        ("--verify", "--confirmation", "sessions"),
        "--confirmation goes with --approve-drop or --erase-dropped",
    ),
    (("--add-columns", "--workers", "2"), "--workers goes with --migrate-data or --verify or --rotate-keys"),
    (("--verify", "--operator", "x"), "--operator goes with --drop-unencrypted or --revoke-approval"),
    (("--key-versions", "--rotate-keys"), "--key-versions: to be given without a step"),
    (
        ("--reinstate-key-version", "x"),
        "argument --reinstate-key-version: must be a key version",
    ),
    (("--rotate-keys", "--reindex"), "--reindex goes with --migrate-data"),
    (("--verify", "--valid-hours", "2"), "--valid-hours goes with --approve-drop"),
    (
        ("--approve-drop", "--valid-hours", "169"),
        "argument --valid-hours: must be a number of hours, at most 168",
    ),
    (
        ("--approve-drop", "--valid-hours", "nan"),
        "argument --valid-hours: must be a number of hours, at most 168",
    ),
    (("--revoke-approval", "-1"), "argument --revoke-approval: "),
    (("--revoke-approval", "0"), "argument --revoke-approval: must be the number of an approval"),
    (
        ("--revoke-approval", "1", "--confirmation", "x"),
        "--confirmation goes with --approve-drop or --erase-dropped",
    ),
    (("--approvals", "--verify"), "--approvals: to be given without a step"),
    *(
        (
            ("--migrate-data", f"--batch-size={size}"),
            "argument --batch-size: must be a whole number from 1 to",
        )
        for size in BAD_SIZES
    ),
)


def test_usage(theirs: Place) -> None:
    with nothing_changes(theirs):
        for arguments, says in USAGE:
            done = theirs.fails(2, *arguments)
            # argparse's own form: the usage, then one line that says what is wrong.
            assert done.stdout == ""
            assert done.stderr.startswith("usage: python -m alphapulse_encryption"), arguments
            last = done.stderr.splitlines()[-1]
            assert last.startswith(f"python -m alphapulse_encryption: error: {says}"), arguments
            assert done.stderr.count("error:") == 1


def test_unknown_table(theirs: Place) -> None:
    with nothing_changes(theirs):
        for name in ("nobody", "order_lines", "public.sessions", "crm.kunde", ""):
            said = message(theirs, 2, "--add-columns", "--table", "sessions", "--table", name)
            assert repr(name) in said
            assert "sessions, crm.order_lines, crm.Kunde" in said


BAD_KEYS = (
    (None, "is not set"),
    ("", "is not set"),
    (CANARY * 4, "holds 33 bytes, a master key has 32"),
    (f"{CANARY} !", "base64"),
    (base64.b64encode(bytes(31)).decode(), "holds 31 bytes, a master key has 32"),
)


def test_master_key(theirs: Place) -> None:
    with nothing_changes(theirs):
        for value, says in BAD_KEYS:
            said = message(theirs, 2, "--add-columns", **{VARIABLE: value})
            assert VARIABLE in said
            assert says in said
            assert "openssl rand -base64 32" in said
            assert not value or value not in said


def test_key_source_and_version(theirs: Place) -> None:
    with nothing_changes(theirs):
        said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_KEY_SOURCE=CANARY)
        assert "ALPHAPULSE_ENCRYPTION_KEY_SOURCE names an unknown key source" in said
        said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_KEY_VERSION="0")
        assert "ALPHAPULSE_ENCRYPTION_KEY_VERSION must be a whole number" in said


def test_what_does_not_suit_a_database_that_was_begun(theirs: Place) -> None:
    theirs.succeeds("--add-columns", "--table", "crm.Kunde")
    other = base64.b64encode(bytes(32)).decode()
    with nothing_changes(theirs):
        for step in ("--add-columns", "--migrate-data", "--verify"):
            said = message(theirs, 1, step, **{VARIABLE: other})
            assert "is not the one this database was begun with" in said
            assert other not in said
        # The first table has no ranges yet: it does not get them either.
        for step in ("--add-columns", "--verify"):
            said = message(theirs, 2, step, ALPHAPULSE_BATCH_RANGES="3")
            assert "Table crm.Kunde is cut into 2 batch ranges" in said
            assert "Set it to 2" in said


BAD_URLS = (
    (f"postgresql://me:{CANARY}@127.0.0.1:1/db", "cannot be reached (connection refused)"),
    (f"postgresql:///db?host=/nowhere/here&password={CANARY}", "no server at that socket"),
    (f"mysql://me:{CANARY}@host/db", "ALPHAPULSE_DATABASE_URL is not a PostgreSQL URL"),
    (f"host=db password={CANARY}", "ALPHAPULSE_DATABASE_URL is not a PostgreSQL URL"),
    (f"postgresql://me:{CANARY}@127.0.0.1:port/db", "the connection string is malformed"),
    (f"postgresql://me:{CANARY}@127.0.0.1/db?nonsense={CANARY}", "the connection string is malformed"),
)


def test_target_database(theirs: Place) -> None:
    with nothing_changes(theirs):
        for url, says in (*BAD_URLS, (theirs.postgres.url("nowhere"), "no such database")):
            said = message(theirs, 2, "--add-columns", ALPHAPULSE_DATABASE_URL=url)
            assert says in said
            assert "ALPHAPULSE_DATABASE_URL" in said


def test_backup(theirs: Place) -> None:
    bucket = {"ALPHAPULSE_BACKUP_S3_BUCKET": "somewhere", "AWS_EC2_METADATA_DISABLED": "true"}
    with nothing_changes(theirs):
        said = message(theirs, 2, "--backup", **bucket, ALPHAPULSE_BACKUP_S3_ENCRYPTION=CANARY)
        assert "ALPHAPULSE_BACKUP_S3_ENCRYPTION has to be one of AES256," in said
        said = message(theirs, 2, "--backup", **bucket, ALPHAPULSE_BACKUP_S3_KMS_KEY=CANARY)
        assert "ALPHAPULSE_BACKUP_S3_KMS_KEY goes with" in said
        said = message(theirs, 2, "--backup", **bucket, AWS_PROFILE=CANARY)
        assert "AWS_PROFILE" in said
        for url in (BAD_URLS[0][0], BAD_URLS[2][0]):
            said = message(theirs, 2, "--backup", "--restore-drill", ALPHAPULSE_RESTORE_DRILL_URL=url)
            assert "ALPHAPULSE_RESTORE_DRILL_URL" in said
    assert not (theirs.state / "backups").exists()


def test_dagster_storage(theirs: Place) -> None:
    with nothing_changes(theirs):
        for url in (
            f"postgresql://me:{CANARY}@127.0.0.1:1/db",
            f"mysql://me:{CANARY}@127.0.0.1/db",
            f"postgresql://me:{CANARY}@h:p/db",
        ):
            assert "DAGSTER_POSTGRES_URL" in message(theirs, 2, "--add-columns", DAGSTER_POSTGRES_URL=url)


def test_batch_ranges(theirs: Place) -> None:
    with nothing_changes(theirs):
        for ranges in ("0", "1000", "x", "1.5"):
            said = message(theirs, 2, "--add-columns", ALPHAPULSE_BATCH_RANGES=ranges)
            assert "ALPHAPULSE_BATCH_RANGES must be a whole number from 1 to 999" in said


def entry(table: str, column: str, extra: str = "") -> str:
    return f"tables:\n  - {{name: {table}, columns: [{{name: {column}, context: c{extra}}}]}}\n"


BAD_CATALOGUES = (
    (entry("nobody", "x"), "Table public.nobody is in the catalogue but not in the database"),
    (entry("Sessions", "token"), "Table public.Sessions is in the catalogue but not in the database"),
    (entry("sessions", "nothing"), "Table sessions has no column nothing"),
    (entry("sessions", "Token"), "Table sessions has no column Token"),
    (entry("keyless", "secret"), "Table keyless has no primary key"),
    (entry("sessions", "id"), "Column sessions.id is part of the primary key"),
    (entry("sessions", "token", ", searchable: true"), "tables[0].columns[0].searchable: unknown key"),
    (entry("sessions", "token") + "databse: x\n", "databse: unknown key"),
    ("tables: [", "not valid YAML"),
    ("", "must be a mapping"),
    ("format: ROT13\n" + entry("sessions", "token"), "ROT13"),
    # Tables that are in order stand before the one that is not: they are not begun either.
    (another.CATALOGUE + "  - {name: nobody, columns: [{name: x, context: c}]}\n", "Table public.nobody is"),
)


def test_catalogue(theirs: Place) -> None:
    with psycopg.connect(theirs.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE keyless (secret text)")
    with nothing_changes(theirs):
        for text, says in BAD_CATALOGUES:
            path = str(theirs.catalogue_file(text))
            said = message(theirs, 2, "--add-columns", "--migrate-data", ALPHAPULSE_ENCRYPTION_CATALOGUE=path)
            assert says in said
        path = str(theirs.state / "no such.yaml")
        said = message(theirs, 2, "--add-columns", ALPHAPULSE_ENCRYPTION_CATALOGUE=path)
        assert f"catalogue {path}: cannot be read" in said
