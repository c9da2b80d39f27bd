"""Search tokens."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.tokens import (
    search_token,
    search_tokens_many,
    search_tokens_of_every_version,
)
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption_tests.crypto import independent

KEY = bytes(range(32))
RING = KeyRing({1: KEY, 2: KEY}, 2)


@given(st.lists(st.none() | st.text()))
def test_tokens_match_the_independent_ones(values: list[str | None]) -> None:
    key = RING.derive("user_pii", 2)
    expected = [None if value is None else independent.token(key, value) for value in values]
    assert search_tokens_many(RING, values, "user_pii") == expected


def test_tokens_differ_by_context_and_version() -> None:
    tokens = {search_token(RING, "x", context, version) for context in ("a", "b") for version in (1, 2)}
    assert len(tokens) == 4
    assert search_token(RING, "x", "a") == search_token(RING, "x", "a", 2)
    assert {len(token) for token in tokens} == {44}


# Each example derives the keys of a ring of its own.
@settings(max_examples=20)
@given(st.text(), st.sets(st.integers(1, 5), min_size=1), st.data())
def test_there_is_one_token_of_each_version_the_current_one_first(
    value: str, versions: set[int], data: st.DataObject
) -> None:
    current = data.draw(st.sampled_from(sorted(versions)))
    masters = {
        version: (bytes([version]) if version % 2 else b"same").ljust(32, b"k") for version in versions
    }
    tokens = search_tokens_of_every_version(KeyRing(masters, current), value, "user_pii")
    order = [current, *sorted(versions - {current})]
    expected = [independent.token(_derived(masters[version], version), value) for version in order]
    assert tokens == expected
    assert len(set(tokens)) == len(versions)


@cache
def _derived(master_key: bytes, version: int) -> bytes:
    return independent.derive(master_key, "user_pii", version)


def test_refusals() -> None:
    with pytest.raises(ConfigurationError, match="no master key of version 3"):
        search_token(RING, "x", "a", 3)
    with pytest.raises(TypeError, match="not int"):
        search_tokens_many(RING, ["x", 5], "a")  # type: ignore[list-item]
    with pytest.raises(ValueError, match="lone surrogates") as caught:
        search_token(RING, "secret\ud800", "a")
    assert "secret" not in str(caught.value)
    assert caught.value.__context__ is None
