"""A backup's second place: an S3 bucket, encrypted there once more, and held against what was sent.

Of an object in several parts S3 keeps the SHA-256 of the parts' SHA-256 (Amazon S3 User Guide, "Checking object
integrity for data uploads"), which is computed here as well. From a server that keeps none, the object is read back.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alphapulse_encryption.errors import ConfigurationError, MigrationError, RefusedError
from alphapulse_encryption.migration.bookkeeping.audit import audit
from alphapulse_encryption.migration.bookkeeping.backups import Backup, record_upload
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.secrecy import unlogged

ENCRYPTIONS = ("AES256", "aws:kms", "aws:kms:dsse")

_MIB = 1024 * 1024
# S3's least is 5 MiB, and 10,000 parts its most (User Guide, "Amazon S3 multipart upload limits").
PART_BYTES = 64 * _MIB
_MOST_PARTS = 10_000
_CHUNK = 8 * _MIB


@dataclass(frozen=True)
class Bucket:
    """Where backups go.

    Args:
        prefix: what the objects' keys begin with.
        encryption: the server-side encryption.
        kms_key: identifier of the KMS key; None for the account's own. Not with ``AES256``.

    Raises:
        ConfigurationError: the encryption is none of ``ENCRYPTIONS``, or has no key to be given.
    """

    name: str
    prefix: str = ""
    encryption: str = "AES256"
    kms_key: str | None = None

    def __post_init__(self) -> None:
        if self.encryption not in ENCRYPTIONS:
            raise ConfigurationError(
                f"ALPHAPULSE_BACKUP_S3_ENCRYPTION has to be one of {', '.join(ENCRYPTIONS)}."
            )
        if self.kms_key is not None and self.encryption == "AES256":
            raise ConfigurationError(
                "ALPHAPULSE_BACKUP_S3_KMS_KEY goes with ALPHAPULSE_BACKUP_S3_ENCRYPTION=aws:kms or aws:kms:dsse."
            )

    def key(self, backup: Backup) -> str:
        """The object's key: the prefix, and the name of the file."""
        prefix = self.prefix.strip("/")
        return f"{prefix}/{Path(backup.location).name}" if prefix else Path(backup.location).name


@dataclass(frozen=True)
class Upload:
    """What :func:`upload_backup` did: where the object is, and what encryption the server says."""

    location: str
    encryption: str
    seconds: float


def open_client() -> Any:
    """A client, of boto3's own configuration (``AWS_REGION``, ``AWS_ENDPOINT_URL``, a profile, a role).

    Raises:
        ConfigurationError: boto3 is not installed, or there are no credentials or no such profile.
    """
    try:
        import boto3
        import botocore.exceptions
    except ImportError:
        raise ConfigurationError(
            "Uploading backups to S3 needs boto3, which is not installed: pip install 'alphapulse-encryption[s3]'."
        ) from None
    try:
        session = boto3.session.Session()
        if session.get_credentials() is None:
            raise ConfigurationError(
                "There are no AWS credentials to upload backups with: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use an instance's role."
            )
        return session.client("s3")
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        raise ConfigurationError(
            f"The configuration for AWS is not valid ({type(error).__name__}): check AWS_REGION, AWS_PROFILE and "
            "AWS_ENDPOINT_URL."
        ) from None


def upload_backup(
    database: Database,
    backup: Backup,
    bucket: Bucket,
    actor: Actor,
    *,
    client: Any,
    part_bytes: int = PART_BYTES,
) -> Upload:
    """Send a recorded backup to the bucket, compare what arrived, and record where it is.

    Args:
        part_bytes: size of a part; larger where the file has too many of them.

    Raises:
        RefusedError: it could not be sent, or is not there as it was sent. The backup itself stays as it is.
    """
    from boto3.s3.transfer import TransferConfig

    started = time.monotonic()
    part_bytes = max(part_bytes, -(-backup.bytes // _MOST_PARTS))
    checksum = _checksum(backup, part_bytes)
    key = bucket.key(backup)
    extra = {
        "ChecksumAlgorithm": "SHA256",
        "ServerSideEncryption": bucket.encryption,
        "ContentType": "application/octet-stream",
        "Metadata": {"sha256": backup.sha256},
    }
    if bucket.kms_key is not None:
        extra["SSEKMSKeyId"] = bucket.kms_key
    # Uploads run in threads of boto3's; at DEBUG it logs requests with the session's token.
    with _told(bucket, backup), unlogged("botocore", threads_of_its_own=True):
        client.upload_file(
            backup.location,
            bucket.name,
            key,
            ExtraArgs=extra,
            Config=TransferConfig(multipart_threshold=part_bytes + 1, multipart_chunksize=part_bytes),
        )
    with unlogged("botocore"):
        encryption = check_upload(backup, bucket, client=client, checksum=checksum)
    location = f"s3://{bucket.name}/{key}"
    with database.session("record the upload") as connection, connection.transaction():
        record_upload(connection, backup, location)
        audit(connection, actor, "upload_backup", backup=backup.id, location=location)
    return Upload(location, encryption, time.monotonic() - started)


def check_upload(backup: Backup, bucket: Bucket, *, client: Any, checksum: str) -> str:
    """Hold the object in the bucket against the backup: its size, its checksum, its encryption, which is returned.

    Args:
        checksum: what S3 computes of its parts.

    Raises:
        RefusedError: it differs.
    """
    key = bucket.key(backup)
    with _told(bucket, backup):
        head = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED")
        problems = []
        if head["ContentLength"] != backup.bytes:
            problems.append(f"it has {head['ContentLength']:,} bytes in place of {backup.bytes:,}")
        encryption = head.get("ServerSideEncryption")
        if encryption != bucket.encryption:
            problems.append(f"its encryption is {encryption or 'none'} in place of {bucket.encryption}")
        # Of several parts it ends with their number: "…=-3".
        stored = head.get("ChecksumSHA256", "").partition("-")[0]
        intact = stored == checksum if stored else _read_back(backup, bucket, client)
        if not intact:
            problems.append("its checksum differs")
    if problems:
        raise RefusedError(
            f"The backup {backup.location} was sent to s3://{bucket.name}/{key}, and is not there as it was sent: "
            f"{'; '.join(problems)}. The file here stays, and is recorded; remove the object and upload again."
        )
    return str(encryption)


def check_object(backup: Backup, bucket: Bucket, *, client: Any) -> None:
    """Hold the object in the bucket against the record, where the file itself is not on this machine.

    Of an object in one part S3 has the checksum; one in several is read.

    Raises:
        RefusedError: it is not there, or differs.
    """
    key = bucket.key(backup)
    try:
        with unlogged("botocore"):
            head = client.head_object(Bucket=bucket.name, Key=key, ChecksumMode="ENABLED")
            whole = base64.b64encode(bytes.fromhex(backup.sha256)).decode()
            intact = head["ContentLength"] == backup.bytes and (
                head.get("ChecksumSHA256") == whole or _read_back(backup, bucket, client)
            )
    except Exception as error:
        raise RefusedError(
            f"The backup {backup.location} is not on this machine, and s3://{bucket.name}/{key} cannot be read "
            f"({_code(error)}). Take a new one (asset backup)."
        ) from None
    if not intact:
        raise RefusedError(
            f"The backup {backup.location} is not on this machine, and s3://{bucket.name}/{key} is another object: its "
            "size or checksum differs. Take a new one (asset backup)."
        )


def _read_back(backup: Backup, bucket: Bucket, client: Any) -> bool:
    digest = hashlib.sha256()
    for chunk in client.get_object(Bucket=bucket.name, Key=bucket.key(backup))["Body"].iter_chunks(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest() == backup.sha256


def _checksum(backup: Backup, part_bytes: int) -> str:
    """What S3 will say of the file in parts of that size, once the file is what was recorded."""
    whole, parts = hashlib.sha256(), []
    try:
        with Path(backup.location).open("rb") as file:
            while piece := file.read(min(_CHUNK, part_bytes)):
                part, left = hashlib.sha256(piece), part_bytes - len(piece)
                whole.update(piece)
                while left and (piece := file.read(min(_CHUNK, left))):
                    part.update(piece)
                    whole.update(piece)
                    left -= len(piece)
                parts.append(part.digest())
    except OSError as error:
        raise RefusedError(f"The backup {backup.location} cannot be read: {error.strerror}.") from None
    if whole.hexdigest() != backup.sha256:
        raise RefusedError(
            f"The backup {backup.location} was altered since it was taken: its checksum differs. It was not "
            "uploaded; take a new one (asset backup)."
        )
    digest = parts[0] if len(parts) == 1 else hashlib.sha256(b"".join(parts)).digest()
    return base64.b64encode(digest).decode()


@contextmanager
def _told(bucket: Bucket, backup: Backup) -> Iterator[None]:
    """Turn boto3's errors, whose texts may quote requests, into ours: of theirs only the code is told."""
    try:
        yield
    except MigrationError:
        raise
    except Exception as error:
        raise RefusedError(
            f"The backup {backup.location} could not be uploaded to the bucket {bucket.name} ({_code(error)}). The "
            "backup itself was taken and is recorded. Correct the bucket, the rights or the way to it, and take a "
            "backup again."
        ) from None


def _code(error: BaseException) -> str:
    """A code as S3 gives it, such as ``AccessDenied``; else the error's type."""
    from botocore.exceptions import ClientError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ClientError):
            return str(seen.response.get("Error", {}).get("Code", "ClientError"))
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__
