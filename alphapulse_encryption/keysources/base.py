"""What every key source is."""

from typing import Protocol

from alphapulse_encryption.errors import ConfigurationError


class MasterKeyNotFound(ConfigurationError):
    """The source holds no such key. It answers: sources that cannot be reached raise ConfigurationError."""


class KeySource(Protocol):
    """A place where master keys are kept."""

    @property
    def name(self) -> str:
        """The name that selects it."""

    def master_key(self, version: int | None) -> bytes:
        """The 32 bytes of a master key.

        Args:
            version: a key version that may have a key of its own; None for the common master key.

        Raises:
            MasterKeyNotFound: there is none; the message says where it was expected and how to make one.
            ConfigurationError: the key is malformed, or the source does not answer.
        """
