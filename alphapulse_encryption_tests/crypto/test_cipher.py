"""The ciphers of the application."""

import pickle
from typing import Any

import pytest

from alphapulse_encryption.crypto.cipher import SearchableCipher
from alphapulse_encryption.crypto.envelope import AesGcmEnvelope
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token

RING = KeyRing({1: bytes(range(32))}, 1)
CIPHER = SearchableCipher(AesGcmEnvelope(RING), RING)


def test_round_trip_and_null() -> None:
    for value in ("user@example.com", "", "東京"):
        assert CIPHER.decrypt(CIPHER.encrypt(value, "c"), "c") == value
    assert CIPHER.encrypt(None, "c") is None
    assert CIPHER.decrypt(None, "c") is None
    assert CIPHER.generate_search_token(None, "c") is None
    assert CIPHER.generate_search_token("x", "c") == search_token(RING, "x", "c")


def test_a_lookup_asks_for_the_tokens_of_every_version() -> None:
    ring = KeyRing({1: bytes(32), 2: bytes(range(32)), 3: bytes(32)}, 2)
    cipher = SearchableCipher(AesGcmEnvelope(ring), ring)
    assert cipher.generate_search_tokens("x", "c") == [search_token(ring, "x", "c", v) for v in (2, 1, 3)]
    assert cipher.generate_search_tokens(None, "c") == []


@pytest.mark.parametrize("value", [1, 1.5, True, b"x", {"a": 1}])
def test_other_types_are_refused_by_name(value: Any) -> None:
    for use in (CIPHER.encrypt, CIPHER.generate_search_token, CIPHER.generate_search_tokens):
        with pytest.raises(TypeError, match=rf"not {type(value).__name__}: .*alphapulse_encryption\.orm"):
            use(value, "c")
    with pytest.raises(TypeError, match=f"an envelope is text, not {type(value).__name__}"):
        CIPHER.decrypt(value, "c")


def test_a_cipher_cannot_be_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(CIPHER)
