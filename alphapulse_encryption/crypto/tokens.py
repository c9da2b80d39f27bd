"""Search tokens: equal for equal values of one context and key version, so that a column can be searched.

A token is the standard base64 of BLAKE2b-256 (RFC 7693), keyed with the derived key, over the
UTF-8 plaintext: 44 characters.
"""

import binascii
import hashlib
from collections.abc import Sequence
from typing import cast

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.text import encode_many

TOKEN_BYTES = 32


def search_token(keys: KeyRing, value: str, context: str, version: int | None = None) -> str:
    """The search token of a value; raises as `search_tokens_many`."""
    return cast(str, search_tokens_many(keys, [value], context, version)[0])


def search_tokens_of_every_version(keys: KeyRing, value: str, context: str) -> list[str]:
    """The tokens that a column may hold for a value, one of each readable key version: the current one first."""
    versions = sorted(keys.versions, key=lambda version: (version != keys.current_version, version))
    return [search_token(keys, value, context, version) for version in versions]


def search_tokens_many(
    keys: KeyRing, values: Sequence[str | None], context: str, version: int | None = None
) -> list[str | None]:
    """The search tokens of many values of one context; None stays None.

    Args:
        version: of the key; the current one where none is given.

    Raises:
        TypeError: a value is not a str.
        UnencodableTextError: a value holds lone surrogates.
        ConfigurationError: no key of that version.
    """
    tokens = search_tokens_many_utf8(keys, encode_many(values), context, version)
    return [None if token is None else token.decode("ascii") for token in tokens]


def search_tokens_many_utf8(
    keys: KeyRing, values: Sequence[bytes | None], context: str, version: int | None = None
) -> list[bytes | None]:
    """As `search_tokens_many`, values and tokens as the UTF-8 bytes that go over the wire."""
    version = keys.current_version if version is None else version
    keyed = hashlib.blake2b(digest_size=TOKEN_BYTES, key=keys.derive(context, version))
    to_base64 = binascii.b2a_base64
    tokens: list[bytes | None] = []
    for value in values:
        if value is None:
            tokens.append(None)
        else:
            digest = keyed.copy()
            digest.update(value)
            tokens.append(to_base64(digest.digest(), newline=False))
    return tokens
