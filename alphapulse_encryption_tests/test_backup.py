"""A backup by the command line, and opened again by exactly what the README shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import boto3
from psycopg.conninfo import conninfo_to_dict

from alphapulse_encryption_tests import another
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.gates.test_offsite import aws
from alphapulse_encryption_tests.place import Place

README = Path(__file__).parent.parent / "README.md"

# Where the machine has no age of its own: the little of its command line that the README uses, on the library of rage,
# an implementation by other people of the same format.
_AGE = """\
#!{python}
import sys, pyrage
decrypt, identity, path, file = sys.argv[1:]
assert (decrypt, identity) == ("-d", "-i")
with open(path) as lines:
    identities = [pyrage.x25519.Identity.from_str(line.strip()) for line in lines if not line.startswith("#")]
try:
    with open(file, "rb") as encrypted:
        pyrage.decrypt_io(encrypted, sys.stdout.buffer, identities)
except pyrage.DecryptError:
    sys.exit(1)
"""


_TRIGGERS = """
SELECT pg_get_triggerdef(oid), tgenabled, obj_description(oid, 'pg_trigger') FROM pg_trigger
 WHERE NOT tgisinternal ORDER BY 1
"""


def tables(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Every row of every table, read by plain psycopg."""
    names = walk.query(
        url,
        "SELECT schemaname || '.' || tablename FROM pg_tables "
        "WHERE schemaname NOT IN ('pg_catalog', 'information_schema')",
    )
    return {name: walk.contents(url, name, columns(url, name)) for (name,) in names}


def columns(url: str, table: str) -> list[str]:
    rows = walk.query(
        url,
        "SELECT attname FROM pg_attribute WHERE attnum > 0 AND NOT attisdropped AND attrelid = "
        "(SELECT c.oid FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
        "WHERE n.nspname || '.' || c.relname = %s)",
        table,
    )
    return [name for (name,) in rows]


def test_what_the_readme_shows_opens_the_backup(theirs: Place, s3_url: str, tmp_path: Path) -> None:
    for name, value in aws(s3_url).items():
        theirs.extra[name] = value
    theirs.extra["ALPHAPULSE_BACKUP_S3_BUCKET"] = "of-the-readme"
    theirs.extra["ALPHAPULSE_BACKUP_S3_PREFIX"] = "alphapulse"
    with theirs.in_environment():
        s3 = boto3.client("s3")
        s3.create_bucket(
            Bucket="of-the-readme", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"}
        )
    theirs.succeeds("--add-columns", "--migrate-data")
    lines = theirs.succeeds("--backup", "--restore-drill")
    said = dict(line.strip().partition(": ")[::2] for line in lines)
    assert int(said["tables restored and equal"]) > 3
    assert int(said["rows restored and equal"]) > sum(another.ROWS.values())
    original, guards = tables(theirs.url), walk.query(theirs.url, _TRIGGERS)
    assert len(guards) > 2 * 3
    with theirs.instance() as instance:
        (run, *_) = instance.get_runs()
        assert run.run_config["ops"] == {"backup": {"config": {"restore_drill": True}}}
    with theirs.in_environment():
        s3.download_file(
            "of-the-readme", said["uploaded to"].removeprefix("s3://of-the-readme/"), tmp_path / "copy"
        )
    assert (tmp_path / "copy").read_bytes() == Path(said["file"]).read_bytes()

    shown = re.search(
        r"```\n(python -m alphapulse_encryption --backup-identity.*?)```", README.read_text(), re.S
    )
    assert shown is not None
    # What is opened is what came back from the bucket.
    (tmp_path / "copy").rename(tmp_path / "backup.dump.age")
    try:
        done = in_shell(theirs, tmp_path, shown[1])
        assert (done.returncode, done.stderr) == (0, "")
        restored = tables(theirs.postgres.url("scratch"))
        recorded = (
            original.pop("alphapulse_encryption.backups"),
            original.pop("alphapulse_encryption.audit_log"),
        )
        assert len(recorded[0]) == 1  # recorded after the dump, so not in it
        assert {name: restored[name] for name in original} == original
        assert walk.query(theirs.postgres.url("scratch"), _TRIGGERS) == guards
    finally:
        walk.query(theirs.postgres.url("postgres"), "DROP DATABASE IF EXISTS scratch")

    content = bytearray((tmp_path / "backup.dump.age").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "backup.dump.age").write_bytes(content)
    opening = "age -d -i identity.txt backup.dump.age > opened"
    assert opening.partition(" > ")[0] in shown[1]
    assert in_shell(theirs, tmp_path, opening).returncode != 0


def in_shell(theirs: Place, directory: Path, commands: str) -> subprocess.CompletedProcess[str]:
    """Run them as an operator does, on the test's server."""
    programs = directory / "bin"
    programs.mkdir(exist_ok=True)
    if shutil.which("age") is None:
        (programs / "age").write_text(_AGE.format(python=sys.executable))
        (programs / "age").chmod(0o755)
    server = conninfo_to_dict(theirs.postgres.url("postgres"))
    path = (str(programs), str(Path(sys.executable).parent), theirs.environment()["PATH"])
    return subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", commands],
        cwd=directory,
        env=theirs.environment(
            PATH=os.pathsep.join(path),
            PGHOST=str(server["host"]),
            PGPORT=str(server["port"]),
            PGUSER=str(server["user"]),
        ),
        capture_output=True,
        text=True,
        check=False,
    )
