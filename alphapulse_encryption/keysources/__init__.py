"""Where master keys come from: one module for each kind of source, one interface.

Belongs here: fetching keys and saying clearly what is missing. Does not belong here: deriving
and using them (`crypto`).
"""

import os
from collections.abc import Callable, Mapping

from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import KeySource, MasterKeyNotFound
from alphapulse_encryption.keysources.env import EnvironmentKeySource

__all__ = ["KeySource", "MasterKeyNotFound", "load_key_ring"]

KEY_SOURCE_VARIABLE = "ALPHAPULSE_ENCRYPTION_KEY_SOURCE"
KEY_VERSION_VARIABLE = "ALPHAPULSE_ENCRYPTION_KEY_VERSION"

# Every version costs a look-up at the source.
MAX_KEY_VERSION = 1000

_SOURCES: dict[str, Callable[[Mapping[str, str]], KeySource]] = {"env": EnvironmentKeySource}


def load_key_ring(environ: Mapping[str, str] | None = None) -> KeyRing:
    """The key ring that the environment describes.

    Readable are the versions 1 to the current one, each with its own master key where the source
    has one and with the common master key otherwise, and the next version if it has a key of its
    own: processes that still write the old version then read what others write with the new one.

    Args:
        environ: the variables; None for those of the process.

    Raises:
        ConfigurationError: unknown key source, malformed version, missing or malformed key. The
            message names the variable and never quotes a key.
    """
    environ = os.environ if environ is None else environ
    source = _key_source(environ)
    current = _key_version(environ)
    common = _find(source, None)
    own = {version: _find(source, version) for version in range(1, current + 2)}
    keys = {version: key for version, key in own.items() if key is not None}
    if common is not None:
        keys = {version: common for version in range(1, current + 1)} | keys
    if current not in keys:
        # Asked again for its message, which says where the key was expected.
        source.master_key(None)
    return KeyRing(keys, current)


def _find(source: KeySource, version: int | None) -> bytes | None:
    try:
        return source.master_key(version)
    except MasterKeyNotFound:
        return None


def _key_source(environ: Mapping[str, str]) -> KeySource:
    name = environ.get(KEY_SOURCE_VARIABLE) or EnvironmentKeySource.name
    make = _SOURCES.get(name)
    if make is None:
        raise ConfigurationError(
            f"{KEY_SOURCE_VARIABLE} names an unknown key source: supported are {', '.join(_SOURCES)}"
        )
    return make(environ)


def _key_version(environ: Mapping[str, str]) -> int:
    text = environ.get(KEY_VERSION_VARIABLE) or "1"
    # str.isdecimal alone accepts digits of other scripts.
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_KEY_VERSION))
    version = int(text) if digits else 0
    if not 1 <= version <= MAX_KEY_VERSION:
        raise ConfigurationError(f"{KEY_VERSION_VARIABLE} must be a whole number from 1 to {MAX_KEY_VERSION}")
    return version
