"""What every key source is, and what those have in common that keep secrets as text."""

import json
from typing import Any, Protocol

from alphapulse_encryption.crypto.keys import parse_master_key
from alphapulse_encryption.errors import ConfigurationError

# The member of a secret that holds the key, in Vault and in secrets stored as JSON.
FIELD = "value"


class MasterKeyNotFound(ConfigurationError):
    """The source holds no such key. It answers: sources that cannot be reached raise ConfigurationError."""


class KeySource(Protocol):
    """A place where master keys are kept. It is read only: none is ever made or changed there."""

    @property
    def name(self) -> str:
        """The name that selects it."""

    def place(self, version: int | None) -> str:
        """Where the master key of a version is kept, in words for a message; None for the common one."""

    def master_key(self, version: int | None) -> bytes:
        """The 32 bytes of a master key.

        Args:
            version: a key version that may have a key of its own; None for the common master key.

        Raises:
            MasterKeyNotFound: there is none; the message says where it was expected and how to make one.
            ConfigurationError: the key is malformed, or the source does not answer, or does not allow it.
        """


def with_version(name: str, version: int | None) -> str:
    """The name of the secret that holds the key of a version: ``name_v2``; the plain name for the common key."""
    return name if version is None else f"{name}_v{version}"


def which_key(version: int | None) -> str:
    """``the master key of version 2``, for messages."""
    return "the common master key" if version is None else f"the master key of version {version}"


def parse_secret(text: str, *, place: str) -> bytes:
    """The master key in a secret's text: plain, or as JSON.

    Args:
        text: the key in base64, that as a JSON string, or a JSON object which holds it as `value` or as its only
            member, as the AWS console stores it.
        place: where the text comes from, for the error message.

    Raises:
        ConfigurationError: there is no master key in it. The text is never quoted.
    """
    text = text.strip()
    # No base64 text begins with either.
    if not text.startswith(("{", '"')):
        return parse_master_key(text, name=place)
    found = _json(text)
    if isinstance(found, dict):
        found = found.get(FIELD) if FIELD in found or len(found) != 1 else next(iter(found.values()))
    if not isinstance(found, str):
        raise ConfigurationError(
            f"{place} looks like JSON and holds no master key: store the key as plain text, or as "
            f'{{"{FIELD}": "…"}}'
        )
    return parse_master_key(found, name=place)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
