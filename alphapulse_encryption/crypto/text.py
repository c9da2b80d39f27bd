"""Plaintext as the bytes that are encrypted and hashed: strict UTF-8, and errors that quote nothing."""

from collections.abc import Sequence
from typing import NoReturn, TypeVar

# Text becomes text, and None stays None.
MaybeText = TypeVar("MaybeText", str, None, str | None)


class UnencodableTextError(ValueError):
    """The value holds lone surrogates, which UTF-8 cannot represent (RFC 3629 section 3)."""


def encode(value: str) -> bytes:
    """The UTF-8 form of a text; raises what `encode_many` raises."""
    try:
        return str.encode(value)
    except (UnicodeEncodeError, TypeError):
        pass
    # Raised here and not above, so that no chained exception carries the value.
    _explain_unencodable([value])


def encode_many(values: Sequence[str | None]) -> list[bytes | None]:
    """The UTF-8 form of texts; None stays None.

    Raises:
        TypeError: a value is not a str.
        UnencodableTextError: a value holds lone surrogates.
    """
    to_utf8 = str.encode
    try:
        return [None if value is None else to_utf8(value) for value in values]
    except (UnicodeEncodeError, TypeError):
        pass
    # Raised here and not above, so that no chained exception carries the value.
    _explain_unencodable(values)


def _explain_unencodable(values: Sequence[object]) -> NoReturn:
    for value in values:
        if value is not None and not isinstance(value, str):
            raise TypeError(
                f"only text can be encrypted, not {type(value).__name__}: "
                "pass its text form, or use the typed columns of alphapulse_encryption.orm"
            )
    raise UnencodableTextError("a value holds lone surrogates: it cannot be encoded in UTF-8")
