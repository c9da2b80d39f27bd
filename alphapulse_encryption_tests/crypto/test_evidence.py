"""MACs of evidence: known answers, computed once more by HMAC alone, and nothing else passes."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alphapulse_encryption.crypto.evidence import canonical, is_signed, sign
from alphapulse_encryption.crypto.keys import KeyRing, pae
from alphapulse_encryption.errors import ConfigurationError

MASTER = bytes(range(32))
KEYS = KeyRing({1: MASTER}, 1)
DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def hkdf(master: bytes, info: bytes) -> bytes:
    """RFC 5869 by its two formulas, for one block of SHA-256."""
    extracted = hmac.digest(b"alphapulse-encryption/v2", master, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def le64(number: int) -> bytes:
    return number.to_bytes(8, "little")


def independent(master: bytes, version: int, *parts: str, content: Any) -> str:
    """The MAC written down once more, from its description alone."""
    info = le64(2) + le64(11) + b"bookkeeping" + le64(4) + version.to_bytes(4, "big")
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    pieces = [part.encode() for part in (*parts, text)]
    message = le64(len(pieces)) + b"".join(le64(len(piece)) + piece for piece in pieces)
    return f"{version}:{hmac.new(hkdf(master, info), message, hashlib.sha256).hexdigest()}"


def test_known_answers() -> None:
    # PASETO's own examples of the encoding.
    assert pae() == b"\x00" * 8
    assert pae(b"") == b"\x01" + b"\x00" * 15
    assert pae(b"test") == b"\x01" + b"\x00" * 7 + b"\x04" + b"\x00" * 7 + b"test"
    assert (
        KEYS.expand("bookkeeping", 1).hex()
        == "997086f0901225f1d4bf103b1540341659e69a83817199761217db6901c0c490"
    )
    assert (
        sign(KEYS, "verification", "7/5", "users", {"rows": 3, "number": 1})
        == "1:62ed6fd39331786d5d987b342f37c410e611dc34ad97a7bed5c781b308bb2af5"
    )


def test_the_document_has_one_text() -> None:
    assert canonical({"b": [1, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,null]}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})


@given(st.binary(min_size=32, max_size=32), st.integers(1, 2**31 - 1), st.text(), st.text(), DOCUMENTS)
def test_it_is_what_is_written_down(
    master: bytes, version: int, kind: str, subject: str, content: Any
) -> None:
    assume(all(text.isprintable() for text in (kind, subject)))
    keys = KeyRing({version: master}, version)
    expected = independent(master, version, kind, "7/5", subject, content=content)
    assert sign(keys, kind, "7/5", subject, content) == expected
    assert is_signed(keys, expected, kind, "7/5", subject, content)


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
def test_no_two_lists_are_encoded_alike(one: list[bytes], other: list[bytes]) -> None:
    assert (pae(*one) == pae(*other)) == (one == other)


@given(st.integers(0, 65), st.sampled_from("0123456789abcdefx: "))
def test_another_text_is_no_mac(place: int, character: str) -> None:
    mac = sign(KEYS, "a", "b", "c", {})
    other = mac[:place] + character + mac[place + 1 :]
    assert is_signed(KEYS, other, "a", "b", "c", {}) == (other == mac)


@pytest.mark.parametrize("mac", [None, "", "1:", "1", ":" + "0" * 64, "01:" + "0" * 64, "-1:" + "0" * 64])
def test_what_is_none(mac: str | None) -> None:
    assert not is_signed(KEYS, mac, "a", "b", "c", {})


@pytest.mark.parametrize(
    "parts",
    [
        ("x", "b", "c", {}),
        ("a", "x", "c", {}),
        ("a", "b", "x", {}),
        ("a", "b", "c", {"x": 1}),
        ("ab", "", "c", {}),
    ],
)
def test_it_is_of_one_thing_alone(parts: tuple[str, str, str, Any]) -> None:
    assert not is_signed(KEYS, sign(KEYS, "a", "b", "c", {}), *parts)


def test_readable_versions_are_believed_and_others_are_not() -> None:
    old, other = KeyRing({1: MASTER}, 1), bytes(32)
    mac = sign(old, "a", "b", "c", {})
    assert is_signed(KeyRing({1: MASTER, 2: other}, 2), mac, "a", "b", "c", {})
    assert not is_signed(KeyRing({2: other}, 2), mac, "a", "b", "c", {})
    assert not is_signed(KeyRing({1: other}, 1), mac, "a", "b", "c", {})
    # The version is part of the key, so that no MAC of one is worth anything under another with the same master key.
    both = KeyRing({1: MASTER, 2: MASTER}, 2)
    assert not is_signed(both, "2" + mac[1:], "a", "b", "c", {})
    with pytest.raises(ConfigurationError, match="version 3"):
        both.expand("bookkeeping", 3)
