"""The application's known answers, both ways, and the same against an independent reading of the design."""

import base64
import json

import pytest

from alphapulse_encryption.crypto.envelope import AesGcmEnvelope, get_format
from alphapulse_encryption.crypto.keys import KeyRing, parse_master_key
from alphapulse_encryption.crypto.tokens import search_token, search_tokens_many
from alphapulse_encryption_tests.crypto import independent
from alphapulse_encryption_tests.vectors import ENVELOPES, MASTER_KEY, TOKENS, EnvelopeVector, TokenVector

KEY = parse_master_key(MASTER_KEY, name="vectors")
RINGS = {version: KeyRing({1: KEY, 2: KEY}, version) for version in (1, 2)}


@pytest.mark.parametrize("vector", ENVELOPES)
@pytest.mark.parametrize("current", [1, 2])
def test_reads_the_application_s_envelopes(vector: EnvelopeVector, current: int) -> None:
    assert (
        get_format("AES-256-GCM", RINGS[current]).decrypt(vector.envelope, vector.context) == vector.plaintext
    )


@pytest.mark.parametrize("vector", ENVELOPES)
def test_writes_the_application_s_envelopes(vector: EnvelopeVector) -> None:
    iv = base64.b64decode(json.loads(vector.envelope)["ciphertext"])[:12]
    envelope = AesGcmEnvelope(RINGS[1])
    sealed = envelope._seal([vector.plaintext.encode()], vector.context, vector.key_version, iv)
    assert sealed == [vector.envelope.encode()]
    key = independent.derive(KEY, vector.context, vector.key_version)
    assert independent.seal(key, iv, vector.plaintext, vector.context, vector.key_version) == vector.envelope


@pytest.mark.parametrize("vector", TOKENS)
def test_makes_the_application_s_tokens(vector: TokenVector) -> None:
    ring = RINGS[vector.key_version]
    assert search_token(ring, vector.plaintext, vector.context) == vector.token
    assert search_token(RINGS[1], vector.plaintext, vector.context, vector.key_version) == vector.token
    assert search_tokens_many(ring, [vector.plaintext, None], vector.context) == [vector.token, None]
    key = independent.derive(KEY, vector.context, vector.key_version)
    assert independent.token(key, vector.plaintext) == vector.token
