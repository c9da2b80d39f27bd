"""Master keys and derived keys."""

import base64
import copy
import hashlib
import os
import pickle
import signal
import subprocess
import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alphapulse_encryption.crypto import keys as module
from alphapulse_encryption.crypto.keys import KeyRing, parse_master_key
from alphapulse_encryption.errors import ConfigurationError

KEY = bytes(range(224, 256))
OTHER = bytes(range(32))


@given(st.binary(min_size=32, max_size=32))
def test_either_alphabet_with_and_without_padding(key: bytes) -> None:
    for text in (base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()):
        assert parse_master_key(text, name="K") == key
        assert parse_master_key(text.rstrip("="), name="K") == key
        assert parse_master_key(f" {text}\n", name="K") == key


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("not base64!", "is not base64"),
        ("ключ" * 11, "is not base64"),
        (base64.b64encode(KEY).decode() + "=", "is not base64"),
        (base64.b64encode(KEY[:31]).decode(), "holds 31 bytes"),
        (base64.b64encode(KEY + b"x").decode(), "holds 33 bytes"),
        (KEY.hex(), "holds 48 bytes"),
        ("A" * 41, "is not base64"),
        ("A" * 42 + "B", "is not base64"),
        ("+" + "A" * 40 + "-A=", "is not base64"),
        ("A" * 20 + "\n" + "A" * 23 + "=", "is not base64"),
    ],
)
def test_malformed_master_keys(text: str, problem: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_master_key(text, name="THE_VARIABLE")
    message = str(caught.value)
    assert message.startswith(f"THE_VARIABLE {problem}")
    assert "openssl rand -base64 32" in message
    assert not text.strip() or text.strip() not in message
    assert caught.value.__context__ is None


def test_derived_key_is_pbkdf2_as_the_design_says() -> None:
    keys = KeyRing({1: KEY, 2: OTHER}, 1)
    assert keys.derive("user_pii", 2) == hashlib.pbkdf2_hmac("sha256", OTHER, b"user_pii:v2", 100_000, 32)
    assert keys.derive("größe", 1) == hashlib.pbkdf2_hmac("sha256", KEY, "größe:v1".encode(), 100_000, 32)


def test_derived_keys_are_cached_and_the_same_in_all_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = KeyRing({1: os.urandom(32)}, 1)
    found: list[bytes] = []
    times = 0
    derive = hashlib.pbkdf2_hmac

    def counted(*arguments: Any) -> bytes:
        nonlocal times
        times += 1
        return derive(*arguments)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", counted)
    threads = [threading.Thread(target=lambda: found.append(keys.derive("c", 1))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == {keys.derive("c", 1)}
    assert keys.derive("c", 1) is keys.derive("c", 1)
    assert times == 1


def test_a_process_forked_during_a_derivation_derives_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = KeyRing({1: os.urandom(32)}, 1)
    derive = hashlib.pbkdf2_hmac
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments: Any) -> bytes:
        begun.set()
        go_on.wait()
        return derive(*arguments)

    monkeypatch.setattr(hashlib, "pbkdf2_hmac", held)
    thread = threading.Thread(target=lambda: keys.derive("c", 1))
    thread.start()
    begun.wait()
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", derive)
    child = os.fork()
    if child == 0:
        # Where it waited for a lock that nobody gives back, the alarm would end it.
        signal.alarm(60)
        os._exit(0 if len(keys.derive("c", 1)) == 32 else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    go_on.set()
    thread.join()
    assert status == 0


def test_another_key_ring_of_the_same_key_need_not_derive_again(monkeypatch: pytest.MonkeyPatch) -> None:
    master_key = os.urandom(32)
    first, second = (KeyRing({1: master_key, 2: OTHER}, 1) for _ in range(2))
    assert first.derive("c", 1) is second.derive("c", 1)
    assert len({first.derive("c", 1), first.derive("c", 2), first.derive("d", 1)}) == 3
    # Nor does the process grow with the number of contexts that it has seen, nor keep a master key.
    monkeypatch.setattr(module, "_MOST_KNOWN", len(module._KNOWN) + 2)
    for number in range(3):
        first.derive(f"context {number}", 1)
    assert len(module._KNOWN) <= 2
    assert first.derive("c", 1) == hashlib.pbkdf2_hmac("sha256", master_key, b"c:v1", 100_000, 32)
    assert not any(master_key in name for name in module._KNOWN)


def test_versions() -> None:
    keys = KeyRing({3: KEY, 1: OTHER}, 3)
    assert keys.versions == (1, 3)
    assert keys.current_version == 3
    with pytest.raises(ConfigurationError, match="no master key of version 2, only of 1, 3"):
        keys.derive("c", 2)


@pytest.mark.parametrize(
    ("master_keys", "current", "problem"),
    [
        ({}, 1, "no master key of the current version 1"),
        ({1: KEY}, 2, "no master key of the current version 2"),
        ({0: KEY}, 0, "positive integers"),
        ({True: KEY}, 1, "positive integers"),
        ({1: KEY[:16]}, 1, "version 1 has 16 bytes, not 32"),
    ],
)
def test_refused_key_rings(master_keys: dict[int, bytes], current: int, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        KeyRing(master_keys, current)


@pytest.mark.parametrize("context", ["", "a\x00b", "\x00key-check-value", "a\nb", "\ud800"])
def test_refused_contexts(context: str) -> None:
    with pytest.raises(ConfigurationError, match="context"):
        KeyRing({1: KEY}, 1).derive(context, 1)


def test_check_value_identifies_the_master_key_of_a_version() -> None:
    value = KeyRing({1: KEY}, 1).check_value(1)
    assert len(base64.b64decode(value, validate=True)) == 32
    assert KeyRing({1: KEY, 2: OTHER}, 2).check_value(1) == value
    assert len({value, KeyRing({1: OTHER}, 1).check_value(1), KeyRing({2: KEY}, 2).check_value(2)}) == 3


def test_secrets_stay_inside() -> None:
    keys = KeyRing({1: KEY}, 1)
    keys.derive("c", 1)
    assert repr(keys) == str(keys) == f"{keys}" == "KeyRing(versions=(1,), current_version=1)"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(keys, protocol)
    for duplicate in (copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            duplicate(keys)
    with pytest.raises(TypeError):
        vars(keys)


def test_a_forked_process_derives_the_same_keys() -> None:
    keys = KeyRing({1: KEY}, 1)
    keys.derive("before", 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, keys.derive("before", 1) + keys.derive("after", 1))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100) == keys.derive("before", 1) + keys.derive("after", 1)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("byte", "url_safe"), [(0xFF, True), (0x00, False)])
def test_a_key_that_alphapulse_reads_otherwise(byte: int, url_safe: bool) -> None:
    """Told only where the two alphabets differ; what is told to type makes the same key of it."""
    key = bytes([byte]) * 32
    text = base64.urlsafe_b64encode(key).decode()
    keys = KeyRing({1: parse_master_key(text, name="it")}, 1)
    assert bool(keys.spelling(1)) is url_safe
    assert text not in keys.spelling(1)
    command = ["sh", "-c", "tr -- -_ +/"]
    standard = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    other = KeyRing({1: parse_master_key(standard, name="it")}, 1)
    assert (other.spelling(1), other.check_value(1)) == ("", keys.check_value(1))
    assert base64.b64decode(standard, validate=True) == key
