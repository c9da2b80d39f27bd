"""The application's ciphers, one of each per process, with the keys that the environment describes."""

from collections.abc import Sequence
from functools import cache
from typing import overload

from alphapulse_encryption.crypto.cipher import FieldCipher, SearchableCipher
from alphapulse_encryption.crypto.envelope import AES_256_GCM, get_format
from alphapulse_encryption.keysources import load_key_ring


def get_cipher() -> FieldCipher:
    """The cipher of this process. The first call loads the keys.

    Raises:
        ConfigurationError: a key is missing or malformed.
    """
    return _cipher()


def get_searchable_cipher() -> SearchableCipher:
    """The cipher of this process, with search tokens. The first call loads the keys.

    Raises:
        ConfigurationError: a key is missing or malformed.
    """
    return _cipher()


@overload
def encrypt_field(value: str, context: str) -> str: ...
@overload
def encrypt_field(value: None, context: str) -> None: ...
@overload
def encrypt_field(value: str | None, context: str) -> str | None: ...
def encrypt_field(value: str | None, context: str) -> str | None:
    """The envelope of a value; see `FieldCipher.encrypt`."""
    return _cipher().encrypt(value, context)


@overload
def decrypt_field(envelope: str, context: str) -> str: ...
@overload
def decrypt_field(envelope: None, context: str) -> None: ...
@overload
def decrypt_field(envelope: str | None, context: str) -> str | None: ...
def decrypt_field(envelope: str | None, context: str) -> str | None:
    """The value in an envelope; see `FieldCipher.decrypt`."""
    return _cipher().decrypt(envelope, context)


def encrypt_fields(values: Sequence[str | None], context: str) -> list[str | None]:
    """The envelopes of many values of one context; see `FieldCipher.encrypt_many`."""
    return _cipher().encrypt_many(values, context)


def decrypt_fields(envelopes: Sequence[str | None], context: str) -> list[str | None]:
    """The values in many envelopes of one context; see `FieldCipher.decrypt_many`."""
    return _cipher().decrypt_many(envelopes, context)


def reset_ciphers() -> None:
    """Forget the keys of this process: the next use loads them again, as after a key rotation.

    Ciphers that were handed out before keep the keys they have.
    """
    _cipher.cache_clear()


@cache
def _cipher() -> SearchableCipher:
    keys = load_key_ring()
    return SearchableCipher(get_format(AES_256_GCM, keys), keys)
