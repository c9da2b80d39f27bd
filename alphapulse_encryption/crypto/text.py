"""Plaintext as the bytes that are encrypted and hashed: strict UTF-8, and errors that quote nothing."""

from collections.abc import Sequence
from typing import NoReturn


class UnencodableTextError(ValueError):
    """The value holds lone surrogates, which UTF-8 cannot represent (RFC 3629 section 3)."""


def explain_unencodable(values: Sequence[object]) -> NoReturn:
    """Say why one of the values is not text that can be encoded in UTF-8.

    Called after the exception of `str.encode` has been dropped: that one carries the value.

    Raises:
        TypeError: one is not a str; its type is named.
        UnencodableTextError: all are.
    """
    for value in values:
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"only text can be encrypted, not {type(value).__name__}: "
                "pass its text form, or use the typed columns of alphapulse_encryption.orm"
            )
    raise UnencodableTextError("a value holds lone surrogates: it cannot be encoded in UTF-8")
