"""Master keys in AWS Secrets Manager: boto3 against moto's server."""

from __future__ import annotations

import base64
import json
import logging
import shlex
import sys
from collections.abc import Callable

import pytest

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources import MasterKeyNotFound, load_key_ring
from alphapulse_encryption.keysources.aws import ATTEMPTS
from alphapulse_encryption_tests.keysources.conftest import client, enforce
from alphapulse_encryption_tests.keysources.servers import Front, answer, aws_error

NAME = "alphapulse/encryption/master_key"
KEY, SECOND = bytes(range(32)), bytes(range(40, 72))
TEXT = base64.urlsafe_b64encode(KEY).decode()


def text(key: bytes) -> str:
    return base64.urlsafe_b64encode(key).decode()


def same(keys: KeyRing, **expected: bytes) -> None:
    """The ring holds just these keys (by version: v1=…)."""
    wanted = {int(name[1:]): key for name, key in expected.items()}
    ring = KeyRing(wanted, min(wanted))
    assert keys.versions == ring.versions
    for version in ring.versions:
        assert keys.derive("user_pii", version) == ring.derive("user_pii", version)


def refused() -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_key_ring()
    message = str(caught.value)
    assert TEXT not in message
    assert "a text of the server's" not in message
    assert caught.value.exit_status == 2
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


@pytest.mark.parametrize(
    "stored",
    [
        TEXT,
        f"{TEXT}\n",
        base64.b64encode(KEY).decode(),
        json.dumps(TEXT),
        json.dumps({"value": TEXT}),
        json.dumps({"value": TEXT, "rotated": "2026"}),
        json.dumps({"master_key": TEXT}, indent=2),
    ],
)
def test_a_key_as_plain_text_or_json(aws: Front, stored: str) -> None:
    client().create_secret(Name=NAME, SecretString=stored)
    same(load_key_ring(), v1=KEY)


def test_the_guide_s_command(aws: Front) -> None:
    command = f'aws secretsmanager create-secret --name {NAME} --secret-string "{TEXT}"'
    _, service, operation, *options = shlex.split(command)
    values = dict(zip(options[::2], options[1::2], strict=True))
    getattr(client(service), operation.replace("-", "_"))(
        Name=values["--name"], SecretString=values["--secret-string"]
    )
    keys = load_key_ring()
    same(keys, v1=KEY)
    assert keys.origin(1) == f"the secret {NAME} in AWS Secrets Manager"


def test_versions(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    client().create_secret(Name=f"{NAME}_v2", SecretString=text(SECOND))
    same(load_key_ring(), v1=KEY, v2=SECOND)
    monkeypatch.setenv("ALPHAPULSE_ENCRYPTION_KEY_VERSION", "3")
    keys = load_key_ring()
    same(keys, v1=KEY, v2=SECOND, v3=KEY)
    assert keys.origin(2) == f"the secret {NAME}_v2 in AWS Secrets Manager"
    assert keys.origin(3) == f"the secret {NAME} in AWS Secrets Manager"


def test_reading_changes_nothing(aws: Front) -> None:
    with pytest.raises(MasterKeyNotFound):
        load_key_ring()
    assert client().list_secrets()["SecretList"] == []


def test_missing(aws: Front) -> None:
    message = refused()
    assert message.startswith(f"There is no secret {NAME} in AWS Secrets Manager (the common master key)")
    assert "AWS_REGION" in message
    assert f"aws secretsmanager create-secret --name {NAME}" in message
    # One request for each name that is looked for: what is not there is not asked for again.
    assert len(aws.requests) == 3


def test_another_region(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    assert "There is no secret" in refused()


def test_not_allowed(authorized: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    iam = client("iam")
    for user, action in (("reader", "secretsmanager:GetSecretValue"), ("other", "s3:GetObject")):
        iam.create_user(UserName=user)
        policy = {
            "Version": "2012-10-17",
            "Statement": {"Effect": "Allow", "Action": action, "Resource": "*"},
        }
        iam.put_user_policy(UserName=user, PolicyName="only", PolicyDocument=json.dumps(policy))
    keys = {user: iam.create_access_key(UserName=user)["AccessKey"] for user in ("reader", "other")}
    enforce(authorized)

    def become(user: str) -> None:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[user]["AccessKeyId"])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[user]["SecretAccessKey"])

    become("other")
    authorized.requests.clear()
    message = refused()
    assert (
        f"Reading the secret {NAME} in AWS Secrets Manager (the common master key) is not allowed" in message
    )
    assert "secretsmanager:GetSecretValue" in message
    assert f"{NAME}*" in message
    assert len(authorized.requests) == 1
    become("reader")
    same(load_key_ring(), v1=KEY)


def test_a_version_that_may_not_be_read_is_not_replaced_by_the_common_key(aws: Front) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    aws.requests.clear()
    fine = client().get_secret_value(SecretId=NAME)
    aws.trouble = [
        answer(200, {"Name": NAME, "SecretString": fine["SecretString"]}),
        aws_error(400, "AccessDeniedException"),
    ]
    message = refused()
    assert (
        f"Reading the secret {NAME}_v1 in AWS Secrets Manager (the master key of version 1) is not" in message
    )


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("DecryptionFailure", "kms:Decrypt"),
        ("UnrecognizedClientException", "AWS_ACCESS_KEY_ID"),
        ("ExpiredTokenException", "AWS_SESSION_TOKEN"),
        ("InvalidRequestException", "marked for deletion"),
        ("SomethingNew", "could not be read (SomethingNew)"),
    ],
)
def test_what_is_not_tried_again(aws: Front, code: str, says: str) -> None:
    aws.always = aws_error(400, code)
    assert says in refused()
    assert len(aws.requests) == 1


def test_deleted(aws: Front) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    client().delete_secret(SecretId=NAME)
    assert "may be marked for deletion" in refused()


@pytest.mark.parametrize(
    "trouble",
    [
        lambda: aws_error(400, "ThrottlingException"),
        lambda: aws_error(500, "InternalServiceError"),
        lambda: answer(503, {}),
    ],
)
def test_trouble_that_passes(aws: Front, trouble: Callable[[], object]) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    aws.requests.clear()
    aws.trouble = [trouble()]  # type: ignore[list-item]
    same(load_key_ring(), v1=KEY)
    assert len(aws.requests) == 3 + 1


def test_trouble_that_stays(aws: Front) -> None:
    aws.always = aws_error(400, "ThrottlingException")
    assert "refused each time (ThrottlingException): try again later" in refused()
    assert len(aws.requests) == ATTEMPTS


def test_attempts_of_the_environment(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    aws.always = answer(500, {})
    refused()
    assert len(aws.requests) == 1


def test_server_down(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    message = refused()
    assert message.startswith("AWS Secrets Manager does not answer")
    assert f"the secret {NAME}" in message
    assert "AWS_ENDPOINT_URL" in message


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        ("c2VjcmV0", "holds 6 bytes, a master key has 32"),
        ("canary !", "is not base64"),
        ('{"a": "canary", "b": "canary"}', "looks like JSON and holds no master key"),
        ('{"value": 7}', "looks like JSON and holds no master key"),
        ('{"value": "canary !"}', "is not base64"),
        ('{"value": ', "looks like JSON and holds no master key"),
        ("{" * 5000, "looks like JSON and holds no master key"),
    ],
)
def test_malformed(aws: Front, stored: str, says: str) -> None:
    client().create_secret(Name=NAME, SecretString=stored)
    message = refused()
    assert message.startswith(f"the secret {NAME} in AWS Secrets Manager (the common master key) ")
    assert says in message
    assert "canary" not in message


def test_binary(aws: Front) -> None:
    client().create_secret(Name=NAME, SecretBinary=KEY)
    assert "is stored as binary" in refused()


def test_no_region_and_no_credentials(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert refused().startswith("There are no AWS credentials")
    monkeypatch.delenv("AWS_REGION")
    assert refused().startswith("No AWS region is known")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert refused().startswith("The configuration for AWS is not valid (ProfileNotFound)")


def test_boto3_missing(aws: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    assert "pip install 'alphapulse-encryption[aws]'" in refused()


def test_the_key_is_not_logged(aws: Front, caplog: pytest.LogCaptureFixture) -> None:
    client().create_secret(Name=NAME, SecretString=TEXT)
    caplog.set_level(logging.DEBUG)
    client().get_secret_value(SecretId=NAME)
    assert TEXT in caplog.text, "boto3 by itself logs it"
    caplog.clear()
    load_key_ring()
    assert "secretsmanager" in caplog.text
    assert TEXT not in caplog.text
