"""Master keys from environment variables."""

import re
from collections.abc import Mapping

from alphapulse_encryption.crypto.keys import HOW_TO_MAKE_A_KEY, parse_master_key
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.keysources.base import KeySource, MasterKeyNotFound


class EnvironmentKeySource(KeySource):
    """Reads `ALPHAPULSE_ENCRYPTION_MASTER_KEY` and, for versions with a key of their own, `…_V<n>`.

    Empty, the common key counts as missing and that of a version as malformed.

    Raises:
        ConfigurationError: a variable such as `…_V02`, which would never be read.
    """

    common = "ALPHAPULSE_ENCRYPTION_MASTER_KEY"
    infix = "_V"
    where = "the environment variable {}"

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        prefix = self.common + self.infix
        for variable in environ:
            suffix = variable.removeprefix(prefix)
            if suffix != variable and suffix[:1].isdecimal() and not re.fullmatch("[1-9][0-9]*", suffix):
                raise ConfigurationError(
                    f"{variable} names no key version: {prefix} takes a number without leading zeros"
                )

    def _read(self, name: str, place: str) -> bytes:
        text = self._environ.get(name)
        if text is None or (name == self.common and not text.strip()):
            raise MasterKeyNotFound(f"{name} is not set: it must hold a master key; {HOW_TO_MAKE_A_KEY}")
        return parse_master_key(text, name=name)
