"""Master keys from AWS Secrets Manager, through boto3, which is loaded when a key is read."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import KeySource, MasterKeyNotFound, parse_secret
from alphapulse_encryption.secrecy import unlogged

SECRET = "alphapulse/encryption/master_key"  # noqa: S105 - its name

CONNECT_SECONDS = 5
READ_SECONDS = 10
# Four requests with 3.5 s between them on average, 7 s at most: boto3's standard retry mode, which repeats what was
# throttled, failed with 5xx or got no answer, and nothing else.
ATTEMPTS = 4

_CREDENTIALS_REFUSED = {
    *("ExpiredTokenException", "IncompleteSignature", "InvalidClientTokenId", "InvalidSignatureException"),
    *("MissingAuthenticationToken", "SignatureDoesNotMatch", "UnrecognizedClientException"),
}


class SecretsManagerKeySource(KeySource):
    """Reads the secret ``alphapulse/encryption/master_key`` and, for versions with a key of their own, ``…_v<n>``.

    Region, credentials and endpoint are found as boto3 finds them; ``AWS_REGION`` goes before boto3's own
    ``AWS_DEFAULT_REGION``.
    """

    common = SECRET
    where = "the secret {} in AWS Secrets Manager"

    def _read(self, name: str, place: str) -> bytes:
        client = self._client
        import botocore.exceptions as refused

        response: dict[str, Any] = {}
        try:
            # Responses, which hold the key, and requests with the session's token.
            with unlogged("botocore"):
                response = client.get_secret_value(SecretId=name)
        except refused.ClientError as error:
            raise _explained(error, name, place) from None
        except (refused.BotoCoreError, ValueError) as error:
            raise _not_reached(error, place) from None
        text = response.get("SecretString")
        if not isinstance(text, str):
            raise ConfigurationError(
                f"{place} is stored as binary: store the key as text, with --secret-string"
            )
        return parse_secret(text, place=place)

    @cached_property
    def _client(self) -> Any:
        try:
            import boto3
            import botocore.exceptions
            from botocore.config import Config
        except ImportError:
            raise ConfigurationError(
                "Keys in AWS Secrets Manager need boto3, which is not installed: "
                "pip install 'alphapulse-encryption[aws]'."
            ) from None
        # What the environment says of retries goes before ours.
        retries: dict[str, Any] = {}
        if not self._environ.get("AWS_RETRY_MODE"):
            retries["mode"] = "standard"
        if not self._environ.get("AWS_MAX_ATTEMPTS"):
            retries["total_max_attempts"] = ATTEMPTS
        try:
            return boto3.session.Session().client(
                "secretsmanager",
                region_name=self._environ.get("AWS_REGION") or None,
                config=Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries),
            )
        except botocore.exceptions.NoRegionError:
            raise ConfigurationError(
                "No AWS region is known to read the master key from: set AWS_REGION."
            ) from None
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise ConfigurationError(
                f"The configuration for AWS is not valid ({type(error).__name__}): check AWS_REGION, AWS_PROFILE and "
                "AWS_ENDPOINT_URL."
            ) from None


def _explained(error: Any, secret: str, place: str) -> ConfigurationError:
    """What a refusal of the service means; of its own text only the code is told."""
    code = str(error.response.get("Error", {}).get("Code", "unknown"))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if code == "ResourceNotFoundException":
        return MasterKeyNotFound(
            f"There is no {place.removeprefix('the ')} in this account and region: check AWS_REGION and "
            f"the account, or store the key with: aws secretsmanager create-secret --name "
            f"{secret} --secret-string …"
        )
    if code in _CREDENTIALS_REFUSED:
        return ConfigurationError(
            f"AWS does not accept the credentials with which {place} was to be read ({code}): check "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE or the role, and the clock."
        )
    if "AccessDenied" in code or status == 403:
        return ConfigurationError(
            f"Reading {place} is not allowed ({code}): allow this identity secretsmanager:GetSecretValue on "
            f"{SECRET}*, versions with a key of their own included, and kms:Decrypt on the secret's KMS key if it "
            "has one of its own."
        )
    if code == "DecryptionFailure":
        return ConfigurationError(
            f"{place} cannot be decrypted by AWS ({code}): check that its KMS key is enabled and that this "
            "identity is allowed kms:Decrypt on it."
        )
    if code == "InvalidRequestException":
        return ConfigurationError(
            f"{place} has no value that can be read ({code}): it may be marked for deletion; see "
            f"aws secretsmanager describe-secret --secret-id {secret}"
        )
    if "Throttl" in code or code in {"TooManyRequestsException", "RequestLimitExceeded"} or status >= 500:
        return ConfigurationError(
            f"AWS Secrets Manager was asked several times for {place} and refused each time ({code}): "
            "try again later."
        )
    return ConfigurationError(f"{place} could not be read ({code}).")


def _not_reached(error: Exception, place: str) -> ConfigurationError:
    reason = type(error).__name__
    if "Credential" in reason:
        return ConfigurationError(
            f"There are no AWS credentials to read {place} with ({reason}): set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or use an instance's role."
        )
    return ConfigurationError(
        f"AWS Secrets Manager does not answer when asked for {place}: {reason}. Check the network, AWS_REGION and "
        "AWS_ENDPOINT_URL."
    )
