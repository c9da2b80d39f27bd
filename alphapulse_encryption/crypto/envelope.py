"""Envelopes: what an encrypted column holds.

One format so far, `AES-256-GCM`, which AlphaPulse's application reads and writes: the JSON text
`{"ciphertext": B64, "key_version": N, "context": C, "algorithm": "AES-256-GCM"}`, where B64 is the
standard base64 of IV (12 bytes, random) ‖ tag (16) ‖ ciphertext, without associated data.
"""

import json
import os
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.crypto.text import encode, encode_many
from alphapulse_encryption.crypto.usage import MessageCounter, UsageBook
from alphapulse_encryption.errors import ConfigurationError, DecryptionError

AES_256_GCM = "AES-256-GCM"

# NIST SP 800-38D: IVs of 96 bits (section 8.2), tags of 128 bits.
IV_BYTES = 12
TAG_BYTES = 16
_HEADER_BYTES = IV_BYTES + TAG_BYTES

_PREFIX = '{"ciphertext": "'
_PREFIX_LENGTH = len(_PREFIX)

# The last base64 digit before one or two `=` has unused bits, which are zero (RFC 4648 section 3.5).
_LAST_DIGITS = {1: frozenset("AEIMQUYcgkosw048"), 2: frozenset("AQgw")}


class EnvelopeFormat(Protocol):
    """Turns text into envelopes and back. None stays None in the `_many` methods."""

    def encrypt(self, value: str, context: str) -> str:
        """The envelope of a value, under the current key version.

        Raises:
            TypeError: the value is not a str.
            UnencodableTextError: it holds lone surrogates.
            KeyExhausted: its key has encrypted as many messages as it safely can.
        """

    def encrypt_many(self, values: Sequence[str | None], context: str) -> list[str | None]:
        """The envelopes of many values of one context; raises what `encrypt` raises."""

    def encrypt_many_utf8(self, values: Sequence[bytes | None], context: str) -> list[bytes | None]:
        """As `encrypt_many`, values and envelopes as the UTF-8 bytes that go over the wire.

        That the values are UTF-8 is for the caller to see to.
        """

    def decrypt(self, envelope: str, context: str) -> str:
        """The value in an envelope of that context, of any known key version.

        Raises:
            DecryptionError: its message says why, and holds neither value nor ciphertext.
        """

    def decrypt_many(self, envelopes: Sequence[str | None], context: str) -> list[str | None]:
        """The values in many envelopes of one context; raises what `decrypt` raises, at the first failure."""

    def key_version(self, envelope: str, context: str) -> int:
        """The key version that an envelope names, which need not be one there is a key of.

        Raises DecryptionError where it is malformed, or of another context or algorithm. Opens nothing.
        """

    def ending(self, context: str, version: int) -> str:
        """How the envelopes of a context and key version end that this format writes, and no others do.

        For looking at many in the database. Another program may spell the same envelope in another way: what ends
        differently has to be asked by `key_version`.
        """


def get_format(name: str, keys: KeyRing, usage: UsageBook | None = None) -> EnvelopeFormat:
    """The envelope format that a catalogue selects by that name, or a ConfigurationError that lists the known ones.

    Args:
        usage: where it counts what it encrypts; by default in a book of its own.
    """
    make = _FORMATS.get(name)
    if make is None:
        raise ConfigurationError(f"unknown envelope format {name!r}: known are {', '.join(_FORMATS)}")
    return make(keys, usage)


class _Sealer(NamedTuple):
    """What is the same for all values of one context and key version."""

    encrypt: Callable[[bytes, bytes, None], bytes]
    decrypt: Callable[[bytes, bytes, None], bytes]
    suffix: str
    counter: MessageCounter


class AesGcmEnvelope:
    """The format `AES-256-GCM`. Safe to share between threads, and across a fork."""

    name = AES_256_GCM

    def __init__(self, keys: KeyRing, usage: UsageBook | None = None) -> None:
        self._keys = keys
        self._usage = usage if usage is not None else UsageBook()
        self._version = keys.current_version
        self._sealers: dict[tuple[str, int], _Sealer] = {}

    def encrypt(self, value: str, context: str) -> str:
        # One value goes the short way: lists for one cost as much as encrypting it.
        sealer = self._sealers.get((context, self._version)) or self._sealer(context, self._version)
        plaintext = encode(value)
        sealer.counter.count(1)
        iv = os.urandom(IV_BYTES)
        sealed = sealer.encrypt(iv, plaintext, None)
        payload = b2a_base64(iv + sealed[-TAG_BYTES:] + sealed[:-TAG_BYTES], newline=False)
        return f"{_PREFIX}{payload.decode('ascii')}{sealer.suffix}"

    def encrypt_many(self, values: Sequence[str | None], context: str) -> list[str | None]:
        envelopes = self.encrypt_many_utf8(encode_many(values), context)
        return [None if envelope is None else envelope.decode() for envelope in envelopes]

    def encrypt_many_utf8(self, values: Sequence[bytes | None], context: str) -> list[bytes | None]:
        return self._seal(values, context, self._version, os.urandom(IV_BYTES * len(values)))

    def decrypt(self, envelope: str, context: str) -> str:
        sealer = self._sealers.get((context, self._version)) or self._sealer(context, self._version)
        # Between the constant ends as we write them there is only base64 to check; else the JSON is parsed.
        if envelope.startswith(_PREFIX) and envelope.endswith(sealer.suffix):
            ciphertext = envelope[_PREFIX_LENGTH : -len(sealer.suffix)]
        else:
            ciphertext, version = self._parse(envelope, context)
            sealer = self._sealer(context, version)
        return _open(sealer.decrypt, ciphertext)

    def decrypt_many(self, envelopes: Sequence[str | None], context: str) -> list[str | None]:
        _, decrypt, suffix, _ = self._sealer(context, self._version)
        end = -len(suffix)
        values: list[str | None] = []
        append = values.append
        ciphertext = ""
        try:
            for envelope in envelopes:
                if envelope is None:
                    append(None)
                    continue
                if envelope.startswith(_PREFIX) and envelope.endswith(suffix):
                    ciphertext = envelope[_PREFIX_LENGTH:end]
                else:
                    # Parsed once for a run of envelopes of the same key version.
                    ciphertext, version = self._parse(envelope, context)
                    _, decrypt, suffix, _ = self._sealer(context, version)
                    end = -len(suffix)
                # As `_open` does it: to call it for each value would take a tenth of the time.
                payload = a2b_base64(ciphertext, strict_mode=True)
                padding = -len(payload) % 3
                if len(ciphertext) * 3 != (len(payload) + padding) * 4 or (
                    padding and ciphertext[-padding - 1] not in _LAST_DIGITS[padding]
                ):
                    raise ValueError
                iv = payload[:IV_BYTES]
                # By the same name: of a value of many megabytes there are few copies at a time.
                payload = payload[_HEADER_BYTES:] + payload[IV_BYTES:_HEADER_BYTES]
                append(decrypt(iv, payload, None).decode())
            return values
        except (ValueError, InvalidTag):
            pass
        # Says what is wrong with the one that failed; out here, so that no chained exception carries a plaintext.
        _open(decrypt, ciphertext)
        raise DecryptionError("the envelope does not open")

    def key_version(self, envelope: str, context: str) -> int:
        if envelope.startswith(_PREFIX):
            for (known, version), sealer in tuple(self._sealers.items()):
                if known == context and envelope.endswith(sealer.suffix):
                    return version
        return self._members(envelope, context)[1]

    def ending(self, context: str, version: int) -> str:
        return f'", "key_version": {version}, "context": {json.dumps(context)}, "algorithm": "{self.name}"}}'

    def _seal(
        self, values: Sequence[bytes | None], context: str, version: int, ivs: bytes
    ) -> list[bytes | None]:
        """Encrypt under the given IVs, 12 bytes for each value; never use an IV twice."""
        encrypt, _, suffix, counter = self._sealer(context, version)
        counter.count(len(values) - values.count(None))
        prefix, end = _PREFIX.encode(), suffix.encode()
        to_base64 = b2a_base64
        envelopes: list[bytes | None] = []
        append = envelopes.append
        position = 0
        for value in values:
            if value is None:
                append(None)
            else:
                iv = ivs[position : position + IV_BYTES]
                payload = encrypt(iv, value, None)
                # By the same name: of a value of many megabytes there are few copies at a time.
                payload = iv + payload[-TAG_BYTES:] + payload[:-TAG_BYTES]
                append(prefix + to_base64(payload, newline=False) + end)
            position += IV_BYTES
        return envelopes

    def _sealer(self, context: str, version: int) -> _Sealer:
        sealer = self._sealers.get((context, version))
        if sealer is None:
            aead = AESGCM(self._keys.derive(context, version))
            counter = self._usage.counter(context, version)
            sealer = _Sealer(aead.encrypt, aead.decrypt, self.ending(context, version), counter)
            self._sealers[context, version] = sealer
        return sealer

    def _parse(self, envelope: str, context: str) -> tuple[str, int]:
        """The base64 text and the known key version of an envelope of any spelling."""
        ciphertext, version = self._members(envelope, context)
        if version not in self._keys.versions:
            known = ", ".join(str(known) for known in self._keys.versions)
            raise DecryptionError(f"the envelope's key version is unknown: there are keys of {known}")
        return ciphertext, version

    def _members(self, envelope: str, context: str) -> tuple[str, int]:
        members = _parse_object(envelope)
        if members.get("algorithm") != self.name:
            raise DecryptionError(f"the envelope's algorithm is not {self.name}")
        if members.get("context") != context:
            raise DecryptionError(f"the envelope's context is not {context}")
        version = members.get("key_version")
        # True is an int, and equal to 1.
        if type(version) is not int:
            raise DecryptionError("malformed envelope: key_version is not an integer")
        ciphertext = members.get("ciphertext")
        if not isinstance(ciphertext, str):
            raise DecryptionError("malformed envelope: ciphertext is not a string")
        return ciphertext, version


_FORMATS: dict[str, Callable[[KeyRing, UsageBook | None], EnvelopeFormat]] = {AES_256_GCM: AesGcmEnvelope}


def _parse_object(envelope: str) -> dict[str, Any]:
    try:
        members = json.loads(envelope, object_pairs_hook=_refuse_duplicates)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, dict):
        raise DecryptionError("malformed envelope: not a JSON object with distinct members")
    return members


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("duplicate member")
    return members


def _open(decrypt: Callable[[bytes, bytes, None], bytes], ciphertext: str) -> str:
    """The value in base64 of IV, tag and ciphertext; one payload has exactly one text."""
    try:
        payload = a2b_base64(ciphertext, strict_mode=True)
    except ValueError:
        payload = b""
    # Python's strict mode lets stray padding and stray bits pass.
    padding = -len(payload) % 3
    canonical = len(ciphertext) * 3 == (len(payload) + padding) * 4
    if not canonical or (padding and ciphertext[-padding - 1] not in _LAST_DIGITS[padding]):
        raise DecryptionError("malformed envelope: ciphertext is not base64")
    if len(payload) < _HEADER_BYTES:
        raise DecryptionError(f"malformed envelope: ciphertext is shorter than {_HEADER_BYTES} bytes")
    try:
        # `cryptography` takes the tag after the ciphertext.
        plaintext = decrypt(
            payload[:IV_BYTES], payload[_HEADER_BYTES:] + payload[IV_BYTES:_HEADER_BYTES], None
        )
    except InvalidTag:
        raise DecryptionError("the envelope does not open: it was altered or made with another key") from None
    try:
        return plaintext.decode()
    except UnicodeDecodeError:
        pass
    # Raised here and not above, so that no chained exception carries the plaintext.
    raise DecryptionError("the decrypted value is not UTF-8")
