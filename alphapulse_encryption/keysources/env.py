"""Master keys from environment variables."""

from collections.abc import Mapping

from alphapulse_encryption.crypto.keys import HOW_TO_MAKE_A_KEY, parse_master_key
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import MasterKeyNotFound

MASTER_KEY_VARIABLE = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
VERSION_INFIX = "_V"


class EnvironmentKeySource:
    """Reads `ALPHAPULSE_ENCRYPTION_MASTER_KEY` and, for versions with a key of their own, `…_V<n>`.

    Raises:
        ConfigurationError: a variable such as `…_V02`, which would never be read.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        prefix = MASTER_KEY_VARIABLE + VERSION_INFIX
        for variable in environ:
            suffix = variable.removeprefix(prefix)
            if suffix != variable and suffix[:1].isdecimal() and not _is_version(suffix):
                raise ConfigurationError(
                    f"{variable} names no key version: {prefix} takes a number without leading zeros"
                )
        self._environ = environ

    def place(self, version: int | None) -> str:
        """See `KeySource.place`."""
        return f"the environment variable {_variable(version)}"

    def master_key(self, version: int | None) -> bytes:
        """See `KeySource.master_key`.

        Empty, the common key counts as missing and that of a version as malformed.

        Raises:
            MasterKeyNotFound: the variable is not set.
            ConfigurationError: its value is not a master key.
        """
        variable = _variable(version)
        text = self._environ.get(variable)
        if text is None or (version is None and not text.strip()):
            raise MasterKeyNotFound(f"{variable} is not set: it must hold a master key; {HOW_TO_MAKE_A_KEY}")
        return parse_master_key(text, name=variable)


def _variable(version: int | None) -> str:
    return MASTER_KEY_VARIABLE if version is None else f"{MASTER_KEY_VARIABLE}{VERSION_INFIX}{version}"


def _is_version(text: str) -> bool:
    return text.isascii() and text.isdecimal() and not text.startswith("0")
