"""Master keys and the keys derived from them, per context and version."""

import base64
import binascii
import hashlib
import os
import threading
import unicodedata
from collections.abc import Mapping
from typing import NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from alphapulse_encryption.errors import ConfigurationError

MASTER_KEY_BYTES = 32
DERIVED_KEY_BYTES = 32
PBKDF2_ITERATIONS = 100_000

_HKDF_SALT = b"alphapulse-encryption/v2"

# No catalogue can name it: contexts hold no control characters.
_CHECK_CONTEXT = "\x00key-check-value"

# What was derived in this process: each step of a run and each tick of a sensor makes a key ring of its own, and the
# derivations would be most of their work. By a hash, so that no master key is kept when its key ring is gone.
_KNOWN: dict[bytes, bytes] = {}
_MOST_KNOWN = 1_000
# The threads of a step meet on a new context at once: one derives, and the others wait for it.
_TURNS: dict[bytes, threading.Lock] = {}
# A fork would inherit a lock that another thread holds, for ever.
os.register_at_fork(after_in_child=_TURNS.clear)

HOW_TO_MAKE_A_KEY = "make one with: openssl rand -base64 32"


class UrlSafeKey(bytes):
    """A master key whose text was in the URL-safe alphabet, which AlphaPulse's application reads as another key."""


def parse_master_key(text: str, *, name: str) -> bytes:
    """The 32 bytes of a master key from its base64 text.

    Args:
        text: standard or URL-safe alphabet (RFC 4648 sections 4 and 5), padding optional,
            white space around it ignored. The error never quotes it.
        name: where the text comes from, for the error message.
    """
    text = text.strip()
    if not text:
        raise ConfigurationError(f"{name} is empty: it must hold a master key; {HOW_TO_MAKE_A_KEY}")
    key = _decode(text)
    if key is None:
        raise ConfigurationError(f"{name} is not base64: it must hold a master key; {HOW_TO_MAKE_A_KEY}")
    if len(key) != MASTER_KEY_BYTES:
        raise ConfigurationError(
            f"{name} holds {len(key)} bytes, a master key has {MASTER_KEY_BYTES}; {HOW_TO_MAKE_A_KEY}"
        )
    return key


def pae(*parts: bytes) -> bytes:
    """Several byte strings as one that no others have: PASETO's pre-authentication encoding."""
    lengths = (len(part).to_bytes(8, "little") for part in parts)
    return b"".join([len(parts).to_bytes(8, "little"), *map(bytes.__add__, lengths, parts)])


def _decode(text: str) -> bytes | None:
    digits = text.rstrip("=")
    altchars = b"-_" if "-" in digits or "_" in digits else b"+/"
    try:
        padded = (digits + "=" * (-len(digits) % 4)).encode("ascii")
        key = base64.b64decode(padded.translate(bytes.maketrans(altchars, b"+/")), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    # Encoding back refuses a mix of both alphabets, wrong padding and stray bits in the last digit.
    canonical = base64.b64encode(key, altchars)
    if text.encode() not in {canonical, canonical.rstrip(b"=")}:
        return None
    return UrlSafeKey(key) if altchars == b"-_" else key


class KeyRing:
    """The master keys of all readable versions, and the keys derived from them.

    Derived keys are kept for as long as the process lives, for other key rings too. Any number of threads may use
    one, and of those that meet on a new context one derives its key. A process that is forked meanwhile derives anew.

    A key ring cannot be pickled or copied, and shows no secret in its repr.

    Args:
        master_keys: 32 bytes for each readable version.
        current_version: the version that writes use.
        origins: where the master key of a version comes from, in words for messages.
    """

    __slots__ = ("_current_version", "_derived", "_master_keys", "_origins", "_url_safe")

    def __init__(
        self, master_keys: Mapping[int, bytes], current_version: int, origins: Mapping[int, str] | None = None
    ) -> None:
        for version, key in master_keys.items():
            if type(version) is not int or version < 1:
                raise ConfigurationError("key versions must be positive integers")
            if len(key) != MASTER_KEY_BYTES:
                raise ConfigurationError(
                    f"the master key of version {version} has {len(key)} bytes, not {MASTER_KEY_BYTES}"
                )
        if current_version not in master_keys:
            raise ConfigurationError(f"there is no master key of the current version {current_version}")
        self._master_keys = {version: bytes(key) for version, key in sorted(master_keys.items())}
        self._url_safe = {version for version, key in master_keys.items() if isinstance(key, UrlSafeKey)}
        self._current_version = current_version
        self._origins = dict(origins or {})
        self._derived: dict[tuple[str, int], bytes] = {}

    @property
    def current_version(self) -> int:
        return self._current_version

    @property
    def versions(self) -> tuple[int, ...]:
        """The versions that can be read, ascending."""
        return tuple(self._master_keys)

    def origin(self, version: int) -> str:
        """Where the master key of a version comes from, in words for a message."""
        return self._origins.get(version, "the key source")

    def spelling(self, version: int) -> str:
        """What is wrong with how a version's master key is spelt, and what to do; empty where nothing is."""
        if version not in self._url_safe:
            return ""
        return (
            f"the master key of version {version}, from {self.origin(version)}, is in base64's URL-safe alphabet: "
            "AlphaPulse's own application drops its - and _, and reads another key or none. Store the same key in the "
            "standard alphabet, as tr -- -_ +/ makes it of that text"
        )

    def derive(self, context: str, version: int) -> bytes:
        """The 32-byte key of a context and version.

        PBKDF2-HMAC-SHA256 (RFC 8018), 100,000 iterations, salt `{context}:v{version}`. The first
        call for a context and version takes about 12 ms, later ones none.

        Raises:
            ConfigurationError: no master key of that version, or a context that no catalogue may hold.
        """
        derived = self._derived.get((context, version))
        if derived is None:
            if not context or any(unicodedata.category(character) in {"Cc", "Cs"} for character in context):
                raise ConfigurationError(
                    "an encryption context must not be empty, nor hold control characters or lone surrogates"
                )
            derived = self._derived[context, version] = self._pbkdf2(context, version)
        return derived

    def expand(self, purpose: str, version: int) -> bytes:
        """The 32-byte key of a purpose that is no encryption: HKDF-SHA256 (RFC 5869) of the version's master key.

        Raises:
            ConfigurationError: no master key of that version.
        """
        info = pae(purpose.encode(), version.to_bytes(4, "big"))
        kdf = HKDF(algorithm=SHA256(), length=DERIVED_KEY_BYTES, salt=_HKDF_SALT, info=info)
        return kdf.derive(self._master_key(version))

    def check_value(self, version: int) -> str:
        """Identifies the master key of a version without revealing it (base64 of 32 bytes).

        It is SHA-256 of a key derived, at the full cost of PBKDF2, under a context that no
        catalogue can name: equal for equal master keys and versions, and no help in finding
        the master key or any key that encrypts data.
        """
        digest = hashlib.sha256(self._pbkdf2(_CHECK_CONTEXT, version)).digest()
        return base64.b64encode(digest).decode("ascii")

    def _pbkdf2(self, context: str, version: int) -> bytes:
        return _derive(self._master_key(version), f"{context}:v{version}".encode())

    def _master_key(self, version: int) -> bytes:
        master_key = self._master_keys.get(version)
        if master_key is None:
            known = ", ".join(str(known) for known in self.versions)
            raise ConfigurationError(f"there is no master key of version {version}, only of {known}")
        return master_key

    def __repr__(self) -> str:
        return f"KeyRing(versions={self.versions}, current_version={self.current_version})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a KeyRing holds secrets and cannot be pickled or copied")


def _derive(master_key: bytes, salt: bytes) -> bytes:
    # The master key has a fixed length: no other pair has the same bytes.
    name = hashlib.sha256(master_key + salt).digest()
    derived = _KNOWN.get(name)
    if derived is not None:
        return derived
    with _TURNS.setdefault(name, threading.Lock()):
        derived = _KNOWN.get(name)
        if derived is None:
            derived = hashlib.pbkdf2_hmac("sha256", master_key, salt, PBKDF2_ITERATIONS, DERIVED_KEY_BYTES)
            if len(_KNOWN) >= _MOST_KNOWN:
                _KNOWN.clear()
            _KNOWN[name] = derived
    _TURNS.pop(name, None)
    return derived
