"""What a process loads: the application little, the engine no Dagster, a wrong command nothing heavy."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from alphapulse_encryption_tests.forked import LOADED_ONCE


def loaded_by(statements: str, **variables: str) -> set[str]:
    """Names of the modules that a fresh process has after the statements."""
    script = f"{statements}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ALPHAPULSE_")}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def tops(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_the_application() -> None:
    for statement in ("import alphapulse_encryption", "import alphapulse_encryption.orm"):
        modules = loaded_by(statement)
        assert tops(modules).isdisjoint({"dagster", "psycopg", "psycopg2", "rich"})
        assert not {name for name in modules if name.startswith("alphapulse_encryption.migration")}
        assert tops(modules).isdisjoint({"boto3", "botocore", "hvac", "requests", "urllib3"})


def test_trying_the_alerts() -> None:
    modules = loaded_by("import alphapulse_encryption.__main__, alphapulse_encryption.defs.alerts.delivery")
    assert "requests" in modules
    assert tops(modules).isdisjoint({"dagster", "psycopg", "psycopg2"})


def test_only_the_chosen_key_source() -> None:
    for source, library, other in (("aws", "boto3", "hvac"), ("vault", "hvac", "boto3")):
        modules = loaded_by(
            "import alphapulse_encryption as a\n"
            "try:\n    a.get_cipher()\nexcept Exception as error:\n    assert error.exit_status == 2",
            ALPHAPULSE_ENCRYPTION_KEY_SOURCE=source,
            AWS_PROFILE="nobody",
            VAULT_ADDR="http://127.0.0.1:1",
            VAULT_AUTH_METHOD="magic",
        )
        assert library in modules
        assert other not in modules


def test_the_engine() -> None:
    modules = loaded_by(
        "import importlib, pkgutil, alphapulse_encryption.migration as engine\n"
        "for module in pkgutil.walk_packages(engine.__path__, f'{engine.__name__}.'):\n"
        "    importlib.import_module(module.name)"
    )
    assert "alphapulse_encryption.migration.steps.drop" in modules
    assert "alphapulse_encryption.migration.rows.backfill" in modules
    assert tops(modules).isdisjoint({"dagster", "psycopg2", "sqlalchemy", "rich"})
    assert "alphapulse_encryption.keysources" not in modules - loaded_by("import alphapulse_encryption")


# For a new user, matplotlib asks a program for the fonts, which takes no environment but a real one.
WATCHED = """
import importlib, os, sys
import matplotlib.font_manager
asked = set()
class Environment(type(os.environ)):
    def __getitem__(self, name):
        asked.add(name)
        return super().__getitem__(name)
os.environ.__class__ = Environment
for name in {names!r}:
    importlib.import_module(name)
assert os.environ.get("PATH") and "PATH" in asked
print(sorted(name for name in asked if name.startswith(("ALPHAPULSE_", "PG"))))
"""


def test_loading_looks_at_nothing_in_the_environment() -> None:
    """So that a fork of a process that has loaded all of it is as good as a process that loads it itself."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED.format(names=LOADED_ONCE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


COMMAND = """
from alphapulse_encryption.__main__ import main
try:
    status = main({arguments!r})
except SystemExit as end:
    status = end.code
assert status == 2, status
"""


@pytest.mark.parametrize(
    "arguments", [[], ["--frobnicate"], ["--migrate-data", "--batch-size", "0"], ["--verify", "--table", "x"]]
)
def test_wrong_usage_loads_no_dagster(arguments: list[str]) -> None:
    assert "dagster" not in loaded_by(COMMAND.format(arguments=arguments))


@pytest.mark.parametrize("key", ["", "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="])
def test_wrong_configuration_loads_no_dagster(key: str) -> None:
    modules = loaded_by(
        COMMAND.format(arguments=["--verify"]),
        ALPHAPULSE_ENCRYPTION_MASTER_KEY=key,
        ALPHAPULSE_DATABASE_URL="postgresql://nobody@127.0.0.1:1/nothing",
    )
    assert "dagster" not in modules
