"""The ciphers of the application."""

import base64
import json
import os
import pickle
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from alphapulse_encryption.crypto.cipher import SearchableCipher
from alphapulse_encryption.crypto.envelope import AesGcmEnvelope
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import search_token
from alphapulse_encryption.errors import DecryptionError

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


def test_many_values_at_once() -> None:
    values = ["a", None, "", "東京"]
    envelopes = CIPHER.encrypt_many(values, "c")
    assert CIPHER.decrypt_many(envelopes, "c") == values
    assert [None if e is None else CIPHER.decrypt(e, "c") for e in envelopes] == values
    assert CIPHER.generate_search_token_many(values, "c") == [
        CIPHER.generate_search_token(value, "c") for value in values
    ]
    with pytest.raises(TypeError, match="an envelope is text, not bytes"):
        CIPHER.decrypt_many(["", b"x"], "c")  # type: ignore[list-item]


@pytest.mark.parametrize("value", ["", "user@example.com", "東京" * 20])
def test_any_change_of_a_single_byte_of_an_envelope_is_refused(value: str) -> None:
    """One by one and in batches; but for what a JSON reader does not see, which is none of these bytes."""
    envelope = CIPHER.encrypt(value, "c").encode()
    for position in range(len(envelope)):
        for change in (0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40):
            changed = bytearray(envelope)
            changed[position] ^= change
            text = changed.decode()
            for read in (
                lambda text: CIPHER.decrypt(text, "c"),
                lambda text: CIPHER.decrypt_many([text], "c"),
            ):
                with pytest.raises(DecryptionError):
                    read(text)


def test_a_broken_envelope_among_others_says_what_a_single_one_says() -> None:
    good = CIPHER.encrypt("secret", "c")
    broken = [
        good[:-1],
        good.replace('"ciphertext": "', '"ciphertext": "AAAA'),
        good.replace('"ciphertext": "', '"ciphertext": "!'),
        good.replace('", "key_version"', '=", "key_version"'),
        '{"ciphertext": "AAAA", "key_version": 1, "context": "c", "algorithm": "AES-256-GCM"}',
    ]
    for envelope in broken:
        with pytest.raises(DecryptionError) as single:
            CIPHER.decrypt(envelope, "c")
        with pytest.raises(DecryptionError) as among:
            CIPHER.decrypt_many([good, envelope, good], "c")
        assert str(among.value) == str(single.value)
        assert "secret" not in "".join(traceback.format_exception(among.value, chain=True))


def ivs(envelopes: list[str]) -> set[bytes]:
    return {base64.b64decode(json.loads(envelope)["ciphertext"])[:12] for envelope in envelopes}


def test_threads_share_one_cipher_and_never_an_iv() -> None:
    ring = KeyRing({1: bytes(range(32)), 2: bytes(32)}, 2)
    cipher = SearchableCipher(AesGcmEnvelope(ring), ring)
    start = threading.Barrier(8)
    made: list[str] = []

    def work(number: int) -> None:
        start.wait()
        for position in range(300):
            value, context = f"{number} {position}", f"context {position % 3}"
            envelope = cipher.encrypt(value, context)
            assert cipher.decrypt(envelope, context) == value
            made.append(envelope)
            made.extend(e for e in cipher.encrypt_many([value] * 3, context) if e is not None)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert len(made) == len(ivs(made)) == 8 * 300 * 4


def test_forked_processes_share_a_cipher_and_never_an_iv() -> None:
    CIPHER.encrypt("before the fork", "c")
    readers = []
    for _ in range(4):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            many = [e for e in CIPHER.encrypt_many(["x"] * 200, "c") if e is not None]
            with os.fdopen(writer, "w") as pipe:
                json.dump([CIPHER.encrypt("x", "c") for _ in range(200)] + many, pipe)
            os._exit(0)
        os.close(writer)
        readers.append((reader, child))
    made = [CIPHER.encrypt("x", "c") for _ in range(200)]
    for reader, child in readers:
        with os.fdopen(reader) as pipe:
            made += json.load(pipe)
        os.waitpid(child, 0)
    assert len(made) == len(ivs(made)) == 200 + 4 * 400
    assert set(CIPHER.decrypt_many(made, "c")) == {"x"}
