"""What every key source is, and what those have in common that keep secrets as text."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar

from alphapulse_encryption.crypto.keys import parse_master_key
from alphapulse_encryption.errors import ConfigurationError

# The member of a secret that holds the key, in Vault and in secrets stored as JSON.
FIELD = "value"


class MasterKeyNotFound(ConfigurationError):
    """The source holds no such key. It answers: sources that cannot be reached raise ConfigurationError."""


class KeySource(ABC):
    """A place where every master key is kept under a name of its own. It is read only: none is made or changed there.

    Attributes:
        common: the name of the common master key.
        infix: stands between that and a version, in the name of a version's own key.
        where: what messages call the place of a name.
    """

    common: ClassVar[str]
    infix: ClassVar[str] = "_v"
    where: ClassVar[str]

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def place(self, version: int | None) -> str:
        """Where the master key of a version is kept, in words for a message; None for the common one."""
        return self.where.format(self._name(version))

    def master_key(self, version: int | None) -> bytes:
        """The 32 bytes of a master key.

        Args:
            version: a key version that may have a key of its own; None for the common master key.

        Raises:
            MasterKeyNotFound: there is none; the message says where it was expected and how to make one.
            ConfigurationError: the key is malformed, or the source does not answer, or does not allow it.
        """
        key = "the common master key" if version is None else f"the master key of version {version}"
        return self._read(self._name(version), f"{self.place(version)} ({key})")

    def _name(self, version: int | None) -> str:
        return self.common if version is None else f"{self.common}{self.infix}{version}"

    @abstractmethod
    def _read(self, name: str, place: str) -> bytes:
        """The key of that name; `place` is what messages call its place and itself."""


def parse_secret(text: str, *, place: str) -> bytes:
    """The master key in a secret's text: plain, or as JSON.

    Args:
        text: the key in base64, that as a JSON string, or a JSON object which holds it as `value` or as its only
            member, as the AWS console stores it.
        place: where the text comes from, for the error message, which never quotes it.
    """
    text = text.strip()
    # No base64 text begins with either.
    if not text.startswith(("{", '"')):
        return parse_master_key(text, name=place)
    found: Any = None
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    if isinstance(found, dict):
        found = found.get(FIELD) if FIELD in found or len(found) != 1 else next(iter(found.values()))
    if not isinstance(found, str):
        raise ConfigurationError(
            f"{place} looks like JSON and holds no master key: store the key as plain text, or as "
            f'{{"{FIELD}": "…"}}'
        )
    return parse_master_key(found, name=place)
