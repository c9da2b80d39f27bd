"""Uploads to a real HTTP server that speaks S3, and what is said when what lies there is not what was sent."""

from __future__ import annotations

import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import pytest

from alphapulse_encryption.errors import ConfigurationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.backups import Backup, latest_backup
from alphapulse_encryption.migration.gates import offsite
from alphapulse_encryption.migration.gates.approvals import approve_drop
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.steps.drop import drop_plaintext
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.migration import walk
from alphapulse_encryption_tests.migration.journey import After

BUCKET = "alphapulse-backups"
PART = 5 * 1024 * 1024  # the least that S3 takes
USERS = walk.CATALOGUE.table("users")


def aws(s3_url: str) -> dict[str, str]:
    """The environment of whoever uploads."""
    return {
        "AWS_ENDPOINT_URL": s3_url,
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "access",
        "AWS_SECRET_ACCESS_KEY": "canary-secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


@pytest.fixture
def client(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engine's client, configured as an operator does it."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in aws(s3_url).items():
        monkeypatch.setenv(name, value)
    eyes = boto3.client("s3")
    eyes.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    yield offsite.open_client()
    for found in eyes.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        eyes.delete_object(Bucket=BUCKET, Key=found["Key"])
    eyes.delete_bucket(Bucket=BUCKET)


def stored(key: str) -> bytes:
    """An object's bytes, read by a client of the test's own."""
    body: bytes = boto3.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()
    return body


def put(key: str, content: bytes, **extra: Any) -> None:
    boto3.client("s3").put_object(Bucket=BUCKET, Key=key, Body=content, **extra)


def recorded(url: str, file: Path, content: bytes) -> Backup:
    """A row of the bookkeeping with a file of that content."""
    file.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    ((number,),) = walk.query(
        url,
        "INSERT INTO alphapulse_encryption.backups (taken_at, location, bytes, sha256, recipient, listed_entries, "
        "verified_at, tables) VALUES (now(), %s, %s, %s, 'age1', 1, now(), '{users}') RETURNING id",
        *(str(file), len(content), digest),
    )
    return Backup(number, datetime.now(UTC), str(file), len(content), digest)


@pytest.fixture
def bookkeeping_url(database_url: str) -> str:
    from alphapulse_encryption.migration.bookkeeping.install import ensure_bookkeeping

    with Database(database_url).session("set up") as connection:
        ensure_bookkeeping(connection)
    return database_url


@pytest.mark.parametrize(
    ("size", "parts"), [(1_000, 1), (PART, 1), (PART + 1, 2), (2 * PART, 2), (2 * PART + 77, 3)]
)
def test_it_arrives_whole_in_one_part_or_many(
    bookkeeping_url: str, client: Any, tmp_path: Path, size: int, parts: int
) -> None:
    content = os.urandom(size)
    backup = recorded(bookkeeping_url, tmp_path / "db-20240101.dump.age", content)
    bucket = offsite.Bucket(BUCKET, "nightly/eu/")
    upload = offsite.upload_backup(
        *(Database(bookkeeping_url), backup, bucket, walk.ACTOR), client=client, part_bytes=PART
    )
    key = "nightly/eu/db-20240101.dump.age"
    assert upload.location == f"s3://{BUCKET}/{key}"
    assert upload.encryption == "AES256"
    assert stored(key) == content
    head = boto3.client("s3").head_object(Bucket=BUCKET, Key=key)
    assert head["ServerSideEncryption"] == "AES256"
    assert head["Metadata"] == {"sha256": backup.sha256}
    assert head["ETag"].strip('"').partition("-")[2] == (str(parts) if parts > 1 else "")
    rows = walk.query(
        bookkeeping_url,
        "SELECT uploaded_to, uploaded_at <= clock_timestamp() FROM alphapulse_encryption.backups",
    )
    assert rows == [(upload.location, True)]
    assert (
        walk.value(
            bookkeeping_url,
            "SELECT details ->> 'location' FROM alphapulse_encryption.audit_log WHERE action = 'upload_backup'",
        )
        == upload.location
    )


def test_a_key_of_kms_is_asked_for(bookkeeping_url: str, client: Any, tmp_path: Path) -> None:
    backup = recorded(bookkeeping_url, tmp_path / "x.dump.age", b"content")
    bucket = offsite.Bucket(BUCKET, encryption="aws:kms", kms_key="alias/backups")
    offsite.upload_backup(Database(bookkeeping_url), backup, bucket, walk.ACTOR, client=client)
    head = boto3.client("s3").head_object(Bucket=BUCKET, Key="x.dump.age")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "alias/backups")


def test_what_lies_there_altered_is_noticed(bookkeeping_url: str, client: Any, tmp_path: Path) -> None:
    content = os.urandom(10_000)
    backup = recorded(bookkeeping_url, tmp_path / "x.dump.age", content)
    bucket = offsite.Bucket(BUCKET)
    checksum = offsite._checksum(backup, PART)
    flipped = bytes([content[0] ^ 1]) + content[1:]
    encrypted = {"ServerSideEncryption": "AES256"}
    kept = {**encrypted, "ChecksumAlgorithm": "SHA256"}
    for extra in (kept, encrypted):  # by the server's checksum, and where it keeps none, by reading it back
        put("x.dump.age", content, **extra)
        assert offsite.check_upload(backup, bucket, client=client, checksum=checksum) == "AES256"
        put("x.dump.age", flipped, **extra)
        with pytest.raises(RefusedError, match="its checksum differs"):
            offsite.check_upload(backup, bucket, client=client, checksum=checksum)
        put("x.dump.age", content[:-1], **extra)
        with pytest.raises(RefusedError, match=r"9,999 bytes in place of 10,000"):
            offsite.check_upload(backup, bucket, client=client, checksum=checksum)
    put("x.dump.age", content, ServerSideEncryption="aws:kms")
    with pytest.raises(RefusedError, match="encryption is aws:kms in place of AES256"):
        offsite.check_upload(backup, bucket, client=client, checksum=checksum)


def test_a_file_altered_here_is_not_uploaded(bookkeeping_url: str, client: Any, tmp_path: Path) -> None:
    backup = recorded(bookkeeping_url, tmp_path / "x.dump.age", b"content")
    Path(backup.location).write_bytes(b"Content")
    with pytest.raises(RefusedError, match="altered"):
        offsite.upload_backup(
            *(Database(bookkeeping_url), backup, offsite.Bucket(BUCKET), walk.ACTOR), client=client
        )
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=BUCKET)
    assert walk.value(bookkeeping_url, "SELECT uploaded_to FROM alphapulse_encryption.backups") is None


def test_a_failure_names_the_code_and_no_secret(bookkeeping_url: str, client: Any, tmp_path: Path) -> None:
    backup = recorded(bookkeeping_url, tmp_path / "x.dump.age", os.urandom(PART + 1))
    with pytest.raises(RefusedError, match=r"no-such-bucket \(NoSuchBucket\).*is recorded") as caught:
        offsite.upload_backup(
            *(Database(bookkeeping_url), backup, offsite.Bucket("no-such-bucket"), walk.ACTOR),
            client=client,
            part_bytes=PART,
        )
    assert "canary" not in str(caught.value) and caught.value.__cause__ is None
    assert (
        walk.value(
            bookkeeping_url, "SELECT count(*) FROM alphapulse_encryption.backups WHERE uploaded_to IS NULL"
        )
        == 1
    )
    assert not boto3.client("s3").list_multipart_uploads(Bucket=BUCKET).get("Uploads")


def test_the_configuration_is_checked_before_anything_is_done(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="AES256, aws:kms, aws:kms:dsse"):
        offsite.Bucket(BUCKET, encryption="none")
    with pytest.raises(ConfigurationError, match="KMS_KEY goes with"):
        offsite.Bucket(BUCKET, kms_key="alias/backups")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigurationError, match="ProfileNotFound"):
        offsite.open_client()
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigurationError, match="no AWS credentials"):
        offsite.open_client()


def test_a_whole_backup_goes_the_whole_way(
    sample_url: str, postgres: EmbeddedPostgres, client: Any, tmp_path: Path
) -> None:
    taken = walk.backup(sample_url, (USERS,), tmp_path, postgres.bin_dir()).backup
    upload = offsite.upload_backup(
        Database(sample_url), taken, offsite.Bucket(BUCKET), walk.ACTOR, client=client
    )
    key = Path(taken.location).name
    assert hashlib.sha256(stored(key)).hexdigest() == taken.sha256
    assert upload.location.endswith(key)


@pytest.mark.parametrize("size", [1_000, PART + 77])
def test_an_object_stands_for_a_file_that_is_elsewhere(
    bookkeeping_url: str, client: Any, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    backup = recorded(bookkeeping_url, tmp_path / "db.dump.age", content)
    bucket = offsite.Bucket(BUCKET, "nightly")
    with pytest.raises(RefusedError, match="404"):
        offsite.check_object(backup, bucket, client=client)
    offsite.upload_backup(
        *(Database(bookkeeping_url), backup, bucket, walk.ACTOR), client=client, part_bytes=PART
    )
    Path(backup.location).unlink()
    offsite.check_object(backup, bucket, client=client)
    for other in (content[:-1] + bytes([content[-1] ^ 1]), content + b"\0", b""):
        put("nightly/db.dump.age", other)
        with pytest.raises(RefusedError, match="another object"):
            offsite.check_object(backup, bucket, client=client)
        put("nightly/db.dump.age", other, ChecksumAlgorithm="SHA256")
        with pytest.raises(RefusedError, match="another object"):
            offsite.check_object(backup, bucket, client=client)


def test_a_drop_is_approved_by_the_object_where_the_file_is_elsewhere(
    after: After, client: Any, tmp_path: Path
) -> None:
    url = after("approved")
    with Database(url).session("read") as connection:
        backup = latest_backup(connection, USERS)
    assert backup is not None
    bucket = offsite.Bucket(BUCKET)
    words: dict[str, Any] = {
        "approver": "Ada",
        "reason": "it serves",
        "confirmation": USERS.key,
        "backups": tmp_path,
    }
    offsite.upload_backup(*(Database(url), backup, bucket, walk.ACTOR), client=client)
    Path(backup.location).unlink()
    with pytest.raises(RefusedError, match="cannot be read"):
        approve_drop(walk.target(url), USERS, **words)
    approve_drop(walk.target(url), USERS, **words, bucket=bucket)
    put(Path(backup.location).name, b"something else")
    with pytest.raises(RefusedError, match="another object"):
        drop_plaintext(
            walk.target(url),
            USERS,
            backups=tmp_path,
            bucket=bucket,
            operator="Grace",
            default_rule="names",
        )
    assert "email" in walk.columns_of(url, "users")
