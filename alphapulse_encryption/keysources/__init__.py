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


def _aws(environ: Mapping[str, str]) -> KeySource:
    from alphapulse_encryption.keysources.aws import SecretsManagerKeySource

    return SecretsManagerKeySource(environ)


def _vault(environ: Mapping[str, str]) -> KeySource:
    from alphapulse_encryption.keysources.vault import VaultKeySource

    return VaultKeySource(environ)


_SOURCES: dict[str, Callable[[Mapping[str, str]], KeySource]] = {
    "env": EnvironmentKeySource,
    "aws": _aws,
    "vault": _vault,
}


def load_key_ring(environ: Mapping[str, str] | None = None) -> KeyRing:
    """The key ring that the environment describes.

    Readable are the versions 1 to the current one, each with its own master key where the source
    has one and with the common master key otherwise, and the next version if it has a key of its
    own: processes that still write the old version then read what others write with the new one.

    Args:
        environ: the variables; None for those of the process.

    Raises:
        ConfigurationError: unknown key source, malformed version, missing or malformed key, or a source
            that does not answer or does not allow reading a key, also one of a version's own: another key is
            never taken in its place. The message names the source and never quotes a key.
    """
    environ = os.environ if environ is None else environ
    source = _key_source(environ)
    current = _key_version(environ)
    common = _find(source, None)
    own = {version: _find(source, version) for version in range(1, current + 2)}
    keys: dict[int, bytes] = {}
    origins: dict[int, str] = {}
    for version, found in own.items():
        if isinstance(found, bytes):
            keys[version], origins[version] = found, source.place(version)
        elif isinstance(common, bytes) and version <= current:
            keys[version], origins[version] = common, source.place(None)
    if current not in keys and isinstance(common, MasterKeyNotFound):
        raise common
    return KeyRing(keys, current, origins)


def _find(source: KeySource, version: int | None) -> bytes | MasterKeyNotFound:
    try:
        return source.master_key(version)
    except MasterKeyNotFound as missing:
        return missing


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
