"""The backup is a real one: it opens with age and pg_restore alone, and nothing of it was ever readable."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psycopg
import pyrage  # type: ignore[import-untyped,unused-ignore]
import pytest

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.backups import Backup, latest_backup
from alphapulse_encryption.migration.gates import backup
from alphapulse_encryption.migration.gates.backup import backup_identity, check_backup, take_backup
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk

TABLES = walk.CATALOGUE.tables


def opened(file: Path, identity: str) -> bytes:
    plain = io.BytesIO()
    with file.open("rb") as encrypted:
        pyrage.decrypt_io(encrypted, plain, [pyrage.x25519.Identity.from_str(identity)])
    return plain.getvalue()


def test_a_backup_opens_with_the_printed_identity_and_restores(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    result = walk.backup(sample_url, TABLES, tmp_path / "backups", postgres.bin_dir())

    file = Path(result.backup.location)
    assert list(file.parent.iterdir()) == [file]
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_size == result.backup.bytes
    assert file.read_bytes().startswith(b"age-encryption.org/v1\n")

    postgres.ensure_database("from_backup")
    url = postgres.url("from_backup")
    try:
        subprocess.run(
            [postgres.bin_dir() / "pg_restore", "--dbname", url, "--exit-on-error"],
            input=opened(file, backup_identity(walk.KEYS)),
            check=True,
        )
        for table in TABLES:
            columns = walk.columns_of(sample_url, table.name)
            assert walk.contents(url, table.name, columns) == walk.contents(sample_url, table.name, columns)
    finally:
        walk.query(postgres.url("postgres"), "DROP DATABASE from_backup")


def test_nothing_readable_is_in_the_file(sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    email = walk.value(sample_url, "SELECT email FROM users WHERE length(email) > 20 LIMIT 1")

    result = walk.backup(sample_url, TABLES, tmp_path, postgres.bin_dir())

    content = Path(result.backup.location).read_bytes()
    assert email.encode() not in content
    assert b"PGDMP" not in content


def test_it_is_recorded_with_what_can_be_checked_later(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    result = walk.backup(sample_url, TABLES, tmp_path, postgres.bin_dir())

    with Database(sample_url).session("read") as connection:
        found = latest_backup(connection, TABLES[0])
    assert found == result.backup
    check_backup(result.backup, tmp_path, walk.KEYS)
    rows = walk.query(
        sample_url, "SELECT tables, listed_entries, recipient FROM alphapulse_encryption.backups"
    )
    assert rows == [([table.key for table in TABLES], result.listed_entries, result.recipients[0])]
    assert (
        walk.value(sample_url, "SELECT count(*) FROM alphapulse_encryption.audit_log WHERE action = 'backup'")
        == 1
    )


def test_a_damaged_or_missing_file_is_noticed(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    taken = walk.backup(sample_url, TABLES, tmp_path, postgres.bin_dir()).backup
    file = Path(taken.location)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(RefusedError, match="altered"):
        check_backup(taken, tmp_path, walk.KEYS)
    file.unlink()
    with pytest.raises(RefusedError, match="cannot be read"):
        check_backup(taken, tmp_path, walk.KEYS)


@pytest.mark.parametrize("part", [0.0, 0.02, 0.5, 1.0])
def test_a_flipped_byte_is_detected_by_reading_back_and_by_the_stored_checksum(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, part: float
) -> None:
    taken = walk.backup(sample_url, TABLES, tmp_path, postgres.bin_dir()).backup
    file = Path(taken.location)
    pg_restore = str(postgres.bin_dir() / "pg_restore")
    identity = backup_identity(walk.KEYS)
    with file.open("rb") as whole:
        assert " TABLE DATA public users " in backup._list(pg_restore, whole, identity)
    content = bytearray(file.read_bytes())
    content[round(part * (len(content) - 1))] ^= 0x40
    file.write_bytes(content)
    with file.open("rb") as damaged, pytest.raises(RefusedError, match="cannot be read back"):
        backup._list(pg_restore, damaged, identity)
    with pytest.raises(RefusedError, match="altered"):
        check_backup(taken, tmp_path, walk.KEYS)


_written: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _written is not None and event == "open":
        path, _, flags = arguments
        # A number is a descriptor that is open already: a pipe to a child.
        if (
            isinstance(flags, int)
            and flags & (os.O_WRONLY | os.O_RDWR)
            and isinstance(path, str | bytes | Path)
        ):
            _written.append(os.fsdecode(path))


@pytest.fixture
def written() -> Iterator[list[str]]:
    """The files that this process opens for writing, by Python's own account (sys.addaudithook)."""
    global _written  # noqa: PLW0603
    if _watch not in _hooks:
        sys.addaudithook(_watch)
        _hooks.append(_watch)
    _written = []
    yield _written
    _written = None


# A hook cannot be taken off again.
_hooks: list[object] = []


def test_the_unencrypted_dump_goes_through_pipes_alone(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path, written: list[str]
) -> None:
    programs_dir, seen = tmp_path / "bin", tmp_path / "seen"
    programs_dir.mkdir()
    empty = tmp_path / "tmp"
    empty.mkdir()
    for name in ("pg_dump", "pg_restore"):
        (programs_dir / name).write_text(
            f'#!/bin/sh\necho "{name} $(readlink /proc/$$/fd/0) $(readlink /proc/$$/fd/1) $*" >> {seen}\n'
            f'export TMPDIR={empty}\nexec {postgres.bin_dir() / name} "$@"\n'
        )
        (programs_dir / name).chmod(0o755)
    written.clear()
    take_backup(
        walk.target(sample_url),
        TABLES,
        directory=tmp_path / "backups",
        bin_dirs=[programs_dir],
        drill_server=Database(sample_url),
    )
    (file,) = (tmp_path / "backups").iterdir()
    assert {path for path in written if not path.startswith("/dev/")} == {f"{file}.partial"}
    lines = [line.split(" ", 3) for line in seen.read_text().splitlines() if not line.endswith("--version")]
    assert [(name, stdin[:5], stdout[:5]) for name, stdin, stdout, _ in lines] == [
        ("pg_dump", "/dev/", "pipe:"),
        ("pg_restore", "pipe:", "pipe:"),
        ("pg_restore", "pipe:", "/dev/"),
    ]
    assert not any("--file" in arguments or " -f" in arguments for *_, arguments in lines)
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize("buffered", [0, 8192])
def test_a_full_disk_is_named(buffered: int) -> None:
    recipient = pyrage.x25519.Identity.generate().to_public()
    # Closing it fails once more, where something is left in its buffer.
    with (
        contextlib.suppress(OSError),
        open("/dev/full", "r+b", buffering=buffered) as full,
        pytest.raises(RefusedError, match="No space left on device"),
    ):
        backup._dump(["head", "-c", "3000000", "/dev/zero"], os.environ, [recipient], full)


def test_further_recipients_can_open_it_alone(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    other = pyrage.x25519.Identity.generate()
    result = take_backup(
        walk.target(sample_url),
        TABLES,
        directory=tmp_path,
        bin_dirs=[postgres.bin_dir()],
        recipients=[str(other.to_public())],
    )
    assert opened(Path(result.backup.location), str(other)).startswith(b"PGDMP")


def test_the_identity_follows_from_the_master_key_and_its_version() -> None:
    keys = KeyRing({1: bytes(32), 2: bytes(32)}, 2)
    identity = backup_identity(keys)
    assert identity.startswith("AGE-SECRET-KEY-1")
    assert identity == backup_identity(KeyRing({2: bytes(32)}, 2))
    assert identity != backup_identity(KeyRing({1: bytes(32)}, 1))


def test_a_dump_that_fails_leaves_nothing(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    walk.backup(sample_url, TABLES, tmp_path / "good", postgres.bin_dir())
    role = f"limited_{os.getpid()}"
    with psycopg.connect(sample_url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN")
        connection.execute(f"GRANT SELECT ON users TO {role}")
        connection.execute(f"GRANT USAGE ON SCHEMA alphapulse_encryption TO {role}")
        connection.execute(f"GRANT SELECT ON alphapulse_encryption.versions TO {role}")
        connection.execute(
            f"GRANT SELECT, INSERT ON alphapulse_encryption.key_checks, alphapulse_encryption.key_versions TO {role}"
        )
    limited = Database(sample_url.replace("postgres@", f"{role}@", 1))
    try:
        with pytest.raises(RefusedError, match="permission denied") as caught:
            take_backup(
                walk.target(limited), TABLES, directory=tmp_path / "bad", bin_dirs=[postgres.bin_dir()]
            )
        assert "@" not in str(caught.value)
        assert list((tmp_path / "bad").iterdir()) == []
        assert walk.value(sample_url, "SELECT count(*) FROM alphapulse_encryption.backups") == 1
    finally:
        walk.query(sample_url, f"DROP OWNED BY {role}; DROP ROLE {role}")


def test_what_a_killed_backup_left_is_removed_and_a_running_one_is_not(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    (tmp_path / "old-20200101T000000.000000Z.dump.age.partial").write_bytes(b"age-encryption.org/v1")
    running = tmp_path / "running-20200101T000000.000000Z.dump.age"
    with backup._new_file(running):
        walk.backup(sample_url, TABLES, tmp_path, postgres.bin_dir())
        names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.endswith(".partial")] == [f"{running.name}.partial"]
    assert len(names) == 2


def test_missing_or_old_programs_and_bad_recipients_are_configuration_errors(
    sample_url: str, postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    version = psycopg.connect(sample_url).info.server_version // 10_000
    with pytest.raises(ConfigurationError, match=f"nowhere.*postgresql-client-{version}"):
        walk.backup(sample_url, TABLES, tmp_path / "backups", tmp_path)
    for name in ("pg_dump", "pg_restore"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) 9.6.24'\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ConfigurationError, match=rf"{tmp_path} \(version 9\.6\.24\) is too old"):
        walk.backup(sample_url, TABLES, tmp_path / "backups", tmp_path)
    with pytest.raises(ConfigurationError, match="age1"):
        take_backup(
            walk.target(sample_url),
            TABLES,
            directory=tmp_path / "backups",
            bin_dirs=[postgres.bin_dir()],
            recipients=["AGE-SECRET-KEY-1NOTPUBLIC"],
        )
    assert not (tmp_path / "backups").exists()


def test_a_listing_without_a_table_is_refused() -> None:
    listing = (
        "; Archive\n4321; 0 16385 TABLE DATA public users owner\n9; 1259 16385 TABLE public trades owner\n"
    )
    assert backup._check_listing(listing, {"users": {("public", "users")}}) == 2
    with pytest.raises(RefusedError, match="trades"):
        backup._check_listing(listing, {"trades": {("public", "trades")}})


def dumped(file: Path, content: bytes = b"PGDMP and so on", keys: KeyRing = walk.KEYS) -> Backup:
    """A row for a small file such as a backup is."""
    identity = pyrage.x25519.Identity.from_str(backup_identity(keys))
    file.write_bytes(pyrage.encrypt(content, [identity.to_public()]))
    return row_of(file)


def row_of(file: Path) -> Backup:
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return Backup(1, datetime.now(UTC), str(file), len(content), digest)


def test_it_is_what_the_row_says(tmp_path: Path) -> None:
    row = dumped(tmp_path / "x.dump.age")
    check_backup(row, tmp_path, walk.KEYS)
    # Of a version that is readable only.
    check_backup(row, tmp_path, KeyRing({1: bytes(range(32)), 2: bytes(32)}, 2))
    for other in (replace(row, sha256="0" * 64), replace(row, bytes=row.bytes - 1), replace(row, bytes=0)):
        with pytest.raises(RefusedError, match="altered"):
            check_backup(other, tmp_path, walk.KEYS)


def test_what_is_no_backup_of_ours_is_refused(tmp_path: Path) -> None:
    """Each would pass for one by what somebody records of it."""
    directory, elsewhere = tmp_path / "backups", tmp_path / "elsewhere"
    for each in (directory, elsewhere):
        each.mkdir()
    outside = dumped(elsewhere / "x.dump.age")
    (directory / "link").symlink_to(outside.location)
    os.mkfifo(directory / "pipe")
    (directory / "folder").mkdir()
    (directory / "text").write_text("no backup")
    rows = {
        "not in the directory of the backups": [
            outside,
            replace(outside, location=str(directory / ".." / "elsewhere" / "x.dump.age")),
            Backup(1, datetime.now(UTC), "/dev/null", 0, hashlib.sha256().hexdigest()),
            Backup(1, datetime.now(UTC), "/dev/zero", 2**60, "0" * 64),
        ],
        "cannot be read": [replace(outside, location=str(directory / "nothing"))],
        "no regular file": [
            replace(outside, location=str(directory / "link")),
            replace(outside, location=str(directory / "pipe")),
            replace(outside, location=str(directory / "folder")),
        ],
        "no age file": [
            row_of(directory / "text"),
            dumped(directory / "other.dump.age", keys=KeyRing({1: bytes(32)}, 1)),
            dumped(directory / "no.dump.age", b"something else"),
            dumped(directory / "empty.dump.age", b""),
        ],
    }
    for reason, found in rows.items():
        for row in found:
            with pytest.raises(RefusedError, match=reason):
                check_backup(row, directory, walk.KEYS)
    # Devices, where somebody has them in the directory itself.
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(RefusedError, match="no regular file"):
            check_backup(replace(outside, location=device), Path("/dev"), walk.KEYS)


def test_a_directory_that_is_a_link_is_the_one_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    check_backup(dumped(tmp_path / "here" / "x.dump.age"), tmp_path / "here", walk.KEYS)
