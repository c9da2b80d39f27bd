"""What the tests of alerts begin with: an environment without channels."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(("ALPHAPULSE_", "DAGSTER_")):
            monkeypatch.delenv(name)
    # A proxy of this machine's is none of loopback's.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
