"""Where master keys come from, one module for each kind of source; not how keys are derived or used."""

from collections.abc import Mapping

from alphapulse_encryption import secrecy
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import KeySource, MasterKeyNotFound
from alphapulse_encryption.keysources.env import EnvironmentKeySource

__all__ = ["KeySource", "MasterKeyNotFound", "load_key_ring"]

KEY_SOURCE_VARIABLE = "ALPHAPULSE_ENCRYPTION_KEY_SOURCE"
KEY_VERSION_VARIABLE = "ALPHAPULSE_ENCRYPTION_KEY_VERSION"
READABLE_VERSIONS_VARIABLE = "ALPHAPULSE_ENCRYPTION_READABLE_KEY_VERSIONS"

_SOURCES = ("env", "aws", "vault")
# Every version costs a look-up at the source.
MAX_KEY_VERSION = 1000


def load_key_ring(environ: Mapping[str, str] | None = None) -> KeyRing:
    """The key ring that the environment describes.

    Readable are the current version and those that `ALPHAPULSE_ENCRYPTION_READABLE_KEY_VERSIONS` lists, each with its
    own master key where the source has one and with the common master key otherwise. Where nothing is listed: the
    versions 1 to the current one, as far as there are keys, and the next version if it has a key of its own. Processes
    that still write the old version then read what others write with the new one.

    Args:
        environ: the variables; None for those of the process.

    Raises:
        ConfigurationError: unknown key source, malformed version, missing or malformed key, or a source
            that does not answer or does not allow reading a key, also one of a version's own: another key is
            never taken in its place. The message names the source and never quotes a key.
    """
    environ = secrecy.with_keys() if environ is None else environ
    source = _key_source(environ)
    current = _version(environ.get(KEY_VERSION_VARIABLE) or "1")
    if current is None:
        raise ConfigurationError(f"{KEY_VERSION_VARIABLE} must be a whole number from 1 to {MAX_KEY_VERSION}")
    common = _find(source, None)
    listed = _listed_versions(environ)
    wanted = {current, *listed} if listed else range(1, current + 2)
    own = {version: _find(source, version) for version in sorted(wanted)}
    keys: dict[int, bytes] = {}
    origins: dict[int, str] = {}
    for version, found in own.items():
        if isinstance(found, bytes):
            keys[version], origins[version] = found, source.place(version)
        elif isinstance(common, bytes) and (listed or version <= current):
            keys[version], origins[version] = common, source.place(None)
        elif version in listed:
            raise found
    if current not in keys and isinstance(common, MasterKeyNotFound):
        raise common
    return KeyRing(keys, current, origins)


def _find(source: KeySource, version: int | None) -> bytes | MasterKeyNotFound:
    try:
        return source.master_key(version)
    except MasterKeyNotFound as missing:
        return missing


def _key_source(environ: Mapping[str, str]) -> KeySource:
    match environ.get(KEY_SOURCE_VARIABLE) or "env":
        case "env":
            return EnvironmentKeySource(environ)
        case "aws":
            from alphapulse_encryption.keysources.aws import SecretsManagerKeySource

            return SecretsManagerKeySource(environ)
        case "vault":
            from alphapulse_encryption.keysources.vault import VaultKeySource

            return VaultKeySource(environ)
    raise ConfigurationError(
        f"{KEY_SOURCE_VARIABLE} names an unknown key source: supported are {', '.join(_SOURCES)}"
    )


def _listed_versions(environ: Mapping[str, str]) -> frozenset[int]:
    versions = {
        _version(text) for text in environ.get(READABLE_VERSIONS_VARIABLE, "").replace(",", " ").split()
    }
    if None in versions:
        raise ConfigurationError(
            f"{READABLE_VERSIONS_VARIABLE} must be whole numbers from 1 to {MAX_KEY_VERSION}, for example 1,2"
        )
    return frozenset(version for version in versions if version is not None)


def _version(text: str) -> int | None:
    # str.isdecimal alone accepts digits of other scripts.
    digits = text.isascii() and text.isdecimal() and len(text) <= len(str(MAX_KEY_VERSION))
    version = int(text) if digits else 0
    return version if 1 <= version <= MAX_KEY_VERSION else None
