"""The ciphers an application works with, for one value and for many; None stays None."""

from collections.abc import Sequence

from alphapulse_encryption.crypto.envelope import EnvelopeFormat
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.text import MaybeText
from alphapulse_encryption.crypto.tokens import (
    search_token,
    search_tokens_many,
    search_tokens_of_every_version,
)


class FieldCipher:
    """Encrypts and decrypts values. Safe to share between threads, and across a fork."""

    def __init__(self, envelope: EnvelopeFormat) -> None:
        self._envelope = envelope

    def encrypt(self, value: MaybeText, context: str) -> MaybeText:
        """The envelope of a value, to be stored in its encrypted column.

        Raises:
            TypeError: the value is neither a str nor None.
            UnencodableTextError: it holds lone surrogates.
        """
        if value is None:
            return None
        return self._envelope.encrypt(value, context)

    def decrypt(self, envelope: MaybeText, context: str) -> MaybeText:
        """The value in an envelope.

        Raises:
            TypeError: the envelope is neither a str nor None.
            DecryptionError: it is not a readable envelope of that context.
        """
        if envelope is None:
            return None
        if not isinstance(envelope, str):
            raise _not_text(envelope)
        return self._envelope.decrypt(envelope, context)

    def encrypt_many(self, values: Sequence[str | None], context: str) -> list[str | None]:
        """The envelopes of many values of one context, faster than one by one; raises what `encrypt` raises."""
        return self._envelope.encrypt_many(values, context)

    def decrypt_many(self, envelopes: Sequence[str | None], context: str) -> list[str | None]:
        """The values in many envelopes of one context; raises what `decrypt` raises, at the first failure."""
        for envelope in envelopes:
            if envelope is not None and not isinstance(envelope, str):
                raise _not_text(envelope)
        return self._envelope.decrypt_many(envelopes, context)


def _not_text(envelope: object) -> TypeError:
    return TypeError(f"an envelope is text, not {type(envelope).__name__}")


class SearchableCipher(FieldCipher):
    """A field cipher that also makes the tokens by which encrypted values are found."""

    def __init__(self, envelope: EnvelopeFormat, keys: KeyRing) -> None:
        super().__init__(envelope)
        self._keys = keys

    def generate_search_token(self, value: MaybeText, context: str) -> MaybeText:
        """The token that the search column holds for a value, under the current key version; raises as `encrypt`."""
        if value is None:
            return None
        return search_token(self._keys, value, context)

    def generate_search_tokens(self, value: str | None, context: str) -> list[str]:
        """The tokens under which rows with a value may be found: of every readable key version, the current one first.

        While keys are rotated, and while instances of the application still write an older version, rows carry
        tokens of several versions: a lookup asks for all of them (``email_search = ANY(...)``). None has no token.
        """
        return [] if value is None else search_tokens_of_every_version(self._keys, value, context)

    def generate_search_token_many(self, values: Sequence[str | None], context: str) -> list[str | None]:
        """The tokens that the search column holds for many values; raises what `generate_search_token` raises."""
        return search_tokens_many(self._keys, values, context)
