"""The master key of the sample database, so that the sample can be tried without setting anything up.

It is made by the demo, on purpose, and used for the embedded database only. A database of yours needs a key of
yours.
"""

import base64
import os
from pathlib import Path

from alphapulse_encryption import settings


def sample_key_file() -> Path:
    return settings.state_dir() / "sample_master_key"


def make_sample_key() -> None:
    """Make the sample's key where there is none yet; readable by its owner only."""
    path = sample_key_file()
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(base64.b64encode(os.urandom(32)))
    unfinished.replace(path)


def read_sample_key() -> str | None:
    """The key as the environment variable would hold it; None where it was never made."""
    return sample_key_file().read_text(encoding="ascii").strip() if sample_key_file().exists() else None
