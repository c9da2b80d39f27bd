"""The wheel: what is in it, and that what is installed from it works, outside the checkout."""

from __future__ import annotations

import base64
import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

import pytest

from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.crypto import independent

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = "alphapulse_encryption"
KEY = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="only a checkout tells what belongs to it"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", directory],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (path,) = directory.glob("*.whl")
    return path


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_exactly_the_package(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", NAME],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        contained = set(archive.namelist())
        for name in listed:
            assert archive.read(name) == (ROOT / name).read_bytes(), name
    package = {name for name in contained if name.startswith(f"{NAME}/")}
    assert package == set(listed)
    assert {f"{NAME}/catalogue.yaml", f"{NAME}/py.typed", f"{NAME}/defs/resources/dagster.yaml"} <= package
    about = f"{NAME}-{PROJECT['version']}.dist-info/"
    assert contained - package == {
        about + name for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")
    }


def test_what_it_says_of_itself(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Name"] == "alphapulse-encryption"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == PROJECT["requires-python"] == ">=3.11"
    assert metadata["Summary"] == PROJECT["description"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    readme = metadata.get_payload(decode=True)
    assert isinstance(readme, bytes) and readme == (ROOT / "README.md").read_bytes()
    extras = PROJECT["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra", [])) == set(extras) >= {"s3", "aws", "vault", "application"}
    required = metadata.get_all("Requires-Dist", [])
    assert len(required) == len(PROJECT["dependencies"]) + sum(map(len, extras.values()))
    # What only the development needs is not among them.
    assert not [text for text in required if text.startswith(("pytest", "mypy", "ruff", "moto", "hatchling"))]


class Installed:
    """The wheel, installed into a fresh environment; a command runs in an empty directory, and knows no checkout."""

    def __init__(self, directory: Path, wheel: Path, state: Path) -> None:
        self.environment_dir = directory / "environment"
        venv.create(self.environment_dir, with_pip=False, symlinks=True)
        self.bin = self.environment_dir / "bin"
        self.place = directory / "empty"
        self.place.mkdir()
        self.variables = {
            "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(self.place),
            "LANG": "C.UTF-8",
            "ALPHAPULSE_STATE_DIR": str(state),
            "ALPHAPULSE_BATCH_RANGES": "2",
        }
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run(
            [*pip, "--python", self.environment_dir, "install", "--no-deps", "--no-index", wheel], check=True
        )
        # The dependencies are those of this environment; what a line of a .pth file names is only looked into, so that
        # the checkout, which is installed here as editable, is not found by way of it.
        (site,) = self.environment_dir.glob("lib/python*/site-packages")
        (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(self, *command: str, **variables: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.place,
            env={**self.variables, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), (done.stdout, done.stderr)
        return done.stdout

    def python(self, script: str, **variables: str) -> list[str]:
        return self.run("python", "-c", script, **variables).splitlines()


@pytest.fixture
def installed(tmp_path: Path, wheel: Path, server_dir: Path) -> Iterator[Installed]:
    state = server_dir.parent
    try:
        yield Installed(tmp_path, wheel, state)
    finally:
        # The embedded server of the state directory, should a command have left it running.
        EmbeddedPostgres(state / "postgres").stop()


RUNTIME = """
import sys
import alphapulse_encryption as package
print(package.__file__)
envelope = package.encrypt_field("größe", "user_pii")
print(envelope)
print(package.decrypt_field(envelope, "user_pii"))
print(package.get_searchable_cipher().generate_search_token("größe", "user_pii"))
from alphapulse_encryption.orm import EncryptedString
print(sorted({"dagster", "psycopg", "psycopg2", "sqlglot"} & set(sys.modules)))
"""
ENGINE = """
import os
from importlib.resources import files
from alphapulse_encryption.catalogue import load_catalogue
catalogue = load_catalogue()
print(len(catalogue.tables), sum(len(table.columns) for table in catalogue.tables))
root = files("alphapulse_encryption")
for name in ("defs/resources/dagster.yaml", "defs/resources/workspace.yaml", "rehearsal/report/templates/report.html",
             "sample/schema.sql", "py.typed"):
    assert root.joinpath(name).is_file(), name
from alphapulse_encryption.definitions import defs
print(len(defs().get_repository_def().get_all_jobs()) > 20)
"""
LOAD = """
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.key import make_sample_key
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded_url
make_sample_key()
load_sample(embedded_url(SAMPLE_DATABASE), 1000)
"""
LOOK = """
import psycopg
from alphapulse_encryption.sample.postgres import SAMPLE_DATABASE, embedded_url
from alphapulse_encryption.sample.key import read_sample_key
with psycopg.connect(embedded_url(SAMPLE_DATABASE)) as connection:
    print(read_sample_key())
    for row in connection.execute("SELECT permissions::text, permissions_encrypted FROM api_keys"):
        print("\\t".join(row))
"""


@pytest.mark.long
def test_installed_it_works(installed: Installed) -> None:
    script = str(installed.bin / "alphapulse-encryption")
    shown = installed.run(script, "--help")
    assert "--migrate-data" in shown
    assert installed.run("python", "-m", NAME, "--help") == shown
    assert installed.run(script, "--version") == f"alphapulse-encryption {PROJECT['version']}\n"

    where, envelope, plain, token, loaded = installed.python(RUNTIME, ALPHAPULSE_ENCRYPTION_MASTER_KEY=KEY)
    assert Path(where).is_relative_to(installed.environment_dir)
    key = independent.derive(bytes(range(32)), "user_pii", 1)
    assert independent.open_envelope(key, envelope) == plain == "größe"
    assert independent.token(key, "größe") == token
    assert loaded == "[]"
    assert installed.python(ENGINE) == ["5 23", "True"]

    migrate = f"{script} --add-columns --migrate-data --verify --table api_keys"
    steps = f"python -c '{LOAD}' && {migrate} && python -c '{LOOK}'"
    lines = installed.run("sh", "-c", steps).splitlines()
    assert "✓ Added column api_keys.permissions_encrypted" in lines
    end = lines.index("  Failed: 0")
    assert lines[end - 1] == "  Successful: 2"
    key = independent.derive(base64.urlsafe_b64decode(lines[end + 1]), "api_permissions", 1)
    rows = [line.split("\t") for line in lines[end + 2 :]]
    assert len(rows) > 10
    assert [independent.open_envelope(key, envelope) for _, envelope in rows] == [plain for plain, _ in rows]
    assert list(installed.place.iterdir()) == []


@pytest.mark.long
def test_pip_install_with_all_that_it_needs(server_dir: Path) -> None:
    """`pip install .` in a fresh environment, dependencies from the registry; and what a registry asks of a wheel."""
    # Its server runs as another user where the tests run as root; pytest's own directory is closed to that one.
    here = server_dir.parent
    checkout = here / "checkout"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=shutil.ignore_patterns(".*", "logs", "build", "dist", "__pycache__"),
        symlinks=True,
    )
    environment = here / "environment"
    venv.create(environment, with_pip=True, symlinks=True)
    python = environment / "bin" / "python"

    def run(*command: str | Path) -> str:
        done = subprocess.run(
            command, cwd=here / "empty", capture_output=True, text=True, check=False, env=variables
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    (here / "empty").mkdir()
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("ALPHAPULSE_", "DAGSTER_"))
    }
    variables = {**inherited, "ALPHAPULSE_STATE_DIR": str(here / "state")}
    run(python, "-m", "pip", "install", "--quiet", checkout)
    run(python, "-m", "pip", "check")
    script = environment / "bin" / "alphapulse-encryption"
    assert run(script, "--version") == f"alphapulse-encryption {PROJECT['version']}\n"
    variables["ALPHAPULSE_ENCRYPTION_MASTER_KEY"] = KEY
    where, _, plain, _, loaded = run(python, "-c", RUNTIME).splitlines()
    assert Path(where).is_relative_to(environment)
    assert (plain, loaded) == ("größe", "[]")
    assert run(python, "-c", ENGINE).splitlines() == ["5 23", "True"]
    del variables["ALPHAPULSE_ENCRYPTION_MASTER_KEY"]
    assert "✓" in run(python, "-m", f"{NAME}.cli.demo", "--rows", "1000")

    tools = here / "tools"
    venv.create(tools, with_pip=True, symlinks=True)
    run(tools / "bin" / "python", "-m", "pip", "install", "--quiet", "build", "twine")
    run(tools / "bin" / "python", "-m", "build", "--outdir", here / "dist", checkout)
    checked = run(
        tools / "bin" / "python", "-m", "twine", "check", "--strict", *sorted((here / "dist").iterdir())
    )
    assert checked.count("PASSED") == 2
