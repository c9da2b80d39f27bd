"""Envelopes: round trips, and everything a reader refuses."""

import base64
import json
import threading
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from alphapulse_encryption.crypto.envelope import AesGcmEnvelope, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError, DecryptionError
from alphapulse_encryption_tests.crypto import independent

KEY = bytes(range(32))
RING = KeyRing({1: KEY, 2: KEY}, 1)
ENVELOPE = AesGcmEnvelope(RING)
CONTEXT = "user_pii"
SECRET = "secret-value"

AWKWARD = ["", "0012345", "1e5", "true", "null", "NaN", "-0", "a\tb\nc", "\\x00", "'\"\\", "😀 東京", "\x00"]


def altered(envelope: str, **members: object) -> str:
    """The envelope with members replaced."""
    return json.dumps(json.loads(envelope) | members)


def without(envelope: str, member: str) -> str:
    members = json.loads(envelope)
    del members[member]
    return json.dumps(members)


def payload_of(envelope: str) -> bytes:
    return base64.b64decode(json.loads(envelope)["ciphertext"], validate=True)


@given(st.text())
def test_round_trip(value: str) -> None:
    envelope = ENVELOPE.encrypt(value, CONTEXT)
    assert ENVELOPE.decrypt(envelope, CONTEXT) == value
    key = RING.derive(CONTEXT, 1)
    assert independent.open_envelope(key, envelope) == value
    assert independent.seal(key, payload_of(envelope)[:12], value, CONTEXT, 1) == envelope


@given(st.lists(st.none() | st.text()))
def test_round_trip_of_many(values: list[str | None]) -> None:
    envelopes = ENVELOPE.encrypt_many(values, CONTEXT)
    assert [envelope is None for envelope in envelopes] == [value is None for value in values]
    assert ENVELOPE.decrypt_many(envelopes, CONTEXT) == values


def test_key_derivation_matches_the_independent_one() -> None:
    envelopes = ENVELOPE.encrypt_many(AWKWARD, "größe: 1")
    key = independent.derive(KEY, "größe: 1", 1)
    assert [independent.open_envelope(key, envelope or "") for envelope in envelopes] == AWKWARD


def test_a_long_document_round_trips() -> None:
    document = json.dumps({str(number): "ß" * 10 for number in range(10_000)}, ensure_ascii=False)
    assert ENVELOPE.decrypt(ENVELOPE.encrypt(document, CONTEXT), CONTEXT) == document


def test_ivs_are_never_repeated() -> None:
    envelopes = ENVELOPE.encrypt_many([SECRET] * 5000, CONTEXT)
    envelopes += [ENVELOPE.encrypt(SECRET, CONTEXT) for _ in range(1000)]
    assert len({payload_of(envelope or "")[:12] for envelope in envelopes}) == 6000


def test_writes_use_the_current_version_and_reads_any() -> None:
    second = AesGcmEnvelope(KeyRing({1: KEY, 2: KEY[::-1]}, 2))
    old, new = ENVELOPE.encrypt("old", CONTEXT), second.encrypt("new", CONTEXT)
    assert json.loads(new)["key_version"] == 2
    mixed = [old, new, None, new, old, old]
    assert second.decrypt_many(mixed, CONTEXT) == ["old", "new", None, "new", "old", "old"]


def test_other_spellings_of_the_json_are_read() -> None:
    envelope = ENVELOPE.encrypt(SECRET, CONTEXT)
    members = json.loads(envelope)
    spellings = [
        json.dumps(members, separators=(",", ":")),
        json.dumps(members, indent=2),
        json.dumps(dict(reversed(members.items()))),
        altered(envelope, search_token="x", other={"nested": [1]}),
        envelope.replace("user_pii", "\\u0075ser_pii"),
    ]
    assert ENVELOPE.decrypt_many(spellings, CONTEXT) == [SECRET] * len(spellings)


@given(st.text(max_size=20), st.data())
def test_a_changed_byte_is_refused(value: str, data: st.DataObject) -> None:
    envelope = ENVELOPE.encrypt(value, CONTEXT)
    payload = bytearray(payload_of(envelope))
    position = data.draw(st.integers(0, len(payload) - 1))
    payload[position] ^= data.draw(st.integers(1, 255))
    changed = altered(envelope, ciphertext=base64.b64encode(payload).decode())
    with pytest.raises(DecryptionError, match="was altered or made with another key"):
        ENVELOPE.decrypt(changed, CONTEXT)


@given(st.text(), st.integers(0, 50))
def test_a_shortened_payload_is_refused(value: str, kept: int) -> None:
    envelope = ENVELOPE.encrypt(value, CONTEXT)
    shortened = payload_of(envelope)[:-1][:kept]
    with pytest.raises(DecryptionError):
        ENVELOPE.decrypt(altered(envelope, ciphertext=base64.b64encode(shortened).decode()), CONTEXT)


@given(st.text(alphabet=st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=5))
def test_another_context_is_refused(context: str) -> None:
    envelope = ENVELOPE.encrypt(SECRET, CONTEXT)
    with pytest.raises(DecryptionError, match="context is not user_pii"):
        ENVELOPE.decrypt(altered(envelope, context=context), CONTEXT)


def test_a_relabelled_envelope_is_refused() -> None:
    envelope = ENVELOPE.encrypt(SECRET, CONTEXT)
    with pytest.raises(DecryptionError, match="context is not user_security"):
        ENVELOPE.decrypt(envelope, "user_security")
    with pytest.raises(DecryptionError, match="was altered or made with another key"):
        ENVELOPE.decrypt(altered(envelope, context="user_security"), "user_security")
    with pytest.raises(DecryptionError, match="was altered or made with another key"):
        ENVELOPE.decrypt(altered(envelope, key_version=2), CONTEXT)


def test_another_master_key_is_refused() -> None:
    other = AesGcmEnvelope(KeyRing({1: KEY[::-1]}, 1))
    with pytest.raises(DecryptionError, match="was altered or made with another key"):
        other.decrypt(ENVELOPE.encrypt(SECRET, CONTEXT), CONTEXT)


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ({"algorithm": "AES-256-CBC"}, "algorithm is not AES-256-GCM"),
        ({"algorithm": None}, "algorithm is not AES-256-GCM"),
        ({"context": None}, "context is not user_pii"),
        ({"context": ["user_pii"]}, "context is not user_pii"),
        ({"key_version": True}, "key_version is not an integer"),
        ({"key_version": 1.0}, "key_version is not an integer"),
        ({"key_version": "1"}, "key_version is not an integer"),
        ({"key_version": 3}, "key version is unknown: there are keys of 1, 2"),
        ({"key_version": 0}, "key version is unknown"),
        ({"key_version": -1}, "key version is unknown"),
        ({"key_version": 10**4000}, "key version is unknown"),
        ({"ciphertext": None}, "ciphertext is not a string"),
        ({"ciphertext": 12}, "ciphertext is not a string"),
        ({"ciphertext": ""}, "ciphertext is shorter than 28 bytes"),
        ({"ciphertext": base64.b64encode(bytes(27)).decode()}, "ciphertext is shorter than 28 bytes"),
        ({"ciphertext": "ß" * 40}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 41}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 38 + "="}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 39 + "=="}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 36 + "AAB="}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 36 + "AB=="}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 20 + "\n" + "A" * 20}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 39 + "_"}, "ciphertext is not base64"),
        ({"ciphertext": "A" * 40 + "===="}, "ciphertext is not base64"),
    ],
)
def test_refused_members(members: dict[str, Any], problem: str) -> None:
    envelope = altered(ENVELOPE.encrypt(SECRET, CONTEXT), **members)
    with pytest.raises(DecryptionError, match=problem) as caught:
        ENVELOPE.decrypt(envelope, CONTEXT)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("member", ["algorithm", "context", "key_version", "ciphertext"])
def test_a_missing_member_is_refused_by_name(member: str) -> None:
    with pytest.raises(DecryptionError, match=member.replace("_version", "_version is not an integer")):
        ENVELOPE.decrypt(without(ENVELOPE.encrypt(SECRET, CONTEXT), member), CONTEXT)


@pytest.mark.parametrize(
    "text",
    ["", SECRET, "null", "[]", '"x"', "{", "[" * 100_000, '{"a": 1, "a": 2}', '{"ciphertext": "', "\ud800"],
)
def test_refused_texts(text: str) -> None:
    with pytest.raises(DecryptionError, match="malformed envelope: not a JSON object"):
        ENVELOPE.decrypt(text, CONTEXT)


def test_a_member_given_twice_is_refused() -> None:
    envelope = ENVELOPE.encrypt(SECRET, CONTEXT)
    with pytest.raises(DecryptionError, match="distinct members"):
        ENVELOPE.decrypt(envelope.replace('"algorithm"', '"context": "user_pii", "algorithm"'), CONTEXT)


@given(st.text())
def test_any_text_between_the_usual_ends_is_read_or_refused(text: str) -> None:
    prefix, suffix = (
        '{"ciphertext": "',
        '", "key_version": 1, "context": "user_pii", "algorithm": "AES-256-GCM"}',
    )
    for envelope in (prefix + text + suffix, prefix + text + suffix[1:]):
        with pytest.raises(DecryptionError):
            ENVELOPE.decrypt(envelope, CONTEXT)


def test_a_value_that_is_not_utf8_is_refused_without_quoting_it() -> None:
    envelope, iv = ENVELOPE.encrypt("", CONTEXT), bytes(12)
    sealed = AESGCM(RING.derive(CONTEXT, 1)).encrypt(iv, b"\xc3\x28" + SECRET.encode(), None)
    payload = iv + sealed[-16:] + sealed[:-16]
    with pytest.raises(DecryptionError, match="not UTF-8") as caught:
        ENVELOPE.decrypt(altered(envelope, ciphertext=base64.b64encode(payload).decode()), CONTEXT)
    assert caught.value.__context__ is None


def test_lone_surrogates_are_refused_without_quoting_the_value() -> None:
    for values in (["fine", SECRET + "\ud800"], [None, "\udfff" + SECRET]):
        with pytest.raises(ValueError, match="lone surrogates") as caught:
            ENVELOPE.encrypt_many(values, CONTEXT)
        assert SECRET not in str(caught.value)
        assert caught.value.__context__ is None


@pytest.mark.parametrize("value", [1, 1.5, b"bytes", ["list"], object()])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=rf"not {type(value).__name__}: .*alphapulse_encryption\.orm"):
        ENVELOPE.encrypt(value, CONTEXT)


def test_threads_share_one_format() -> None:
    envelope = AesGcmEnvelope(KeyRing({1: KEY}, 1))
    results: list[bool] = []

    def work(number: int) -> None:
        values: list[str | None] = [f"{number}-{position}" for position in range(2000)]
        context = f"context{number % 2}"
        results.append(envelope.decrypt_many(envelope.encrypt_many(values, context), context) == values)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


def test_unknown_format() -> None:
    with pytest.raises(
        ConfigurationError, match="unknown envelope format 'AES-256-CBC': known are AES-256-GCM"
    ):
        get_format("AES-256-CBC", RING)


@given(st.text(), st.sampled_from(["user_pii", 'a "quoted" \\ one', "東京"]), st.sampled_from([1, 2]))
def test_the_key_version_is_told_without_opening(value: str, context: str, version: int) -> None:
    """By the ending of what this format writes, and by looking into what others have written."""
    envelope = AesGcmEnvelope(KeyRing(_TWO, version)).encrypt(value, context)
    reader = AesGcmEnvelope(KeyRing({3: bytes(32)}, 3))
    assert [envelope.endswith(reader.ending(context, v)) for v in (version, 3 - version)] == [True, False]
    respelt = json.dumps({"search_token": "x", **dict(reversed(json.loads(envelope).items()))}, indent=1)
    for spelling in (envelope, respelt):
        assert reader.key_version(spelling, context) == version
        with pytest.raises(DecryptionError, match="context is not"):
            reader.key_version(spelling, "another")
        with pytest.raises(DecryptionError, match="malformed"):
            reader.key_version(spelling[:-1], context)


_TWO = {1: bytes(32), 2: bytes(range(32))}
