"""``dg scaffold defs`` in a copy of the project: what it makes is loaded beside what we declare, and nothing twice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from alphapulse_encryption.defs.resources.instance import prepare_dagster_home
from alphapulse_encryption.sample.postgres import EmbeddedPostgres
from alphapulse_encryption_tests.defs.test_definitions import GRAPH
from alphapulse_encryption_tests.place import Place, place

CHECKOUT = Path(__file__).parents[2]
DEFS = "alphapulse_encryption/defs"
DEFINED = """import dagster as dg


@dg.definitions
def broken() -> dg.Definitions:
"""
LOADED = """
import json, sys
from alphapulse_encryption.definitions import defs
defs().get_repository_def()
files = [(name, module.__file__) for name, module in sys.modules.items() if getattr(module, "__file__", None)]
print(json.dumps([[name, file] for name, file in files if "/alphapulse_encryption/" in file]))
"""


class Project:
    """A copy of the project.

    Args:
        root: where it is.
        place: whose environment its commands have.
    """

    def __init__(self, root: Path, place: Place) -> None:
        self.root, self._place = root, place
        self.home = root.parent / "home"
        self.home.mkdir()
        shutil.copytree(
            CHECKOUT / "alphapulse_encryption",
            root / "alphapulse_encryption",
            ignore=shutil.ignore_patterns("__pycache__"),
        )
        for name in ("pyproject.toml", "README.md", "dagster.yaml", "workspace.yaml"):
            shutil.copyfile(CHECKOUT / name, root / name)
        with place.in_environment():
            self._instance = prepare_dagster_home()

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command of this Python's in the project, as ``make dg`` has it."""
        scripts = Path(sys.executable).parent
        environment = self._place.environment(
            HOME=str(self.home),
            DAGSTER_HOME=str(self._instance),
            PYTHONPATH=str(self.root),
            PYTHONDONTWRITEBYTECODE="1",
        )
        environment["PATH"] = f"{scripts}:{environment['PATH']}"
        program, *arguments = command
        return subprocess.run(
            [str(scripts / program), *arguments],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def succeeds(self, *command: str) -> str:
        done = self.run(*command)
        assert done.returncode == 0, (done.stdout, done.stderr)
        return done.stdout

    def files(self) -> set[str]:
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()}


@pytest.fixture
def project(
    tmp_path: Path, postgres: EmbeddedPostgres, database_url: str, server_dir: Path
) -> Iterator[Project]:
    with place(postgres, database_url, server_dir.parent, "") as found:
        yield Project(tmp_path / "project", found)


@pytest.mark.long
def test_what_is_scaffolded_is_loaded(project: Project) -> None:
    before = project.files()
    project.succeeds("dg", "scaffold", "defs", "dagster.asset", "my_asset.py")
    project.succeeds("dg", "scaffold", "defs", "dagster.asset", "assets/mine.py")
    project.succeeds("dg", "scaffold", "defs", "dagster.job", "nightly.py")
    project.succeeds("dg", "check", "defs")
    listed = json.loads(project.succeeds("dg", "list", "defs", "--json"))
    assert Counter(asset["asset_key"] for asset in listed["assets"]) == Counter([*GRAPH, "my_asset", "mine"])
    assert {"nightly", "rotate_keys"} < {job["name"] for job in listed["jobs"]}
    assert project.files() - before == {f"{DEFS}/my_asset.py", f"{DEFS}/assets/mine.py", f"{DEFS}/nightly.py"}
    assert before <= project.files()
    assert list(project.home.iterdir()) == []

    modules = json.loads(project.succeeds("python", "-c", LOADED))
    assert all(Path(file).is_relative_to(project.root) for _, file in modules)
    assert {"alphapulse_encryption.defs.my_asset", "alphapulse_encryption.defs.assets.mine"} <= {
        name for name, _ in modules
    }
    assert set(Counter(file for _, file in modules).values()) == {1}


@pytest.mark.long
def test_what_cannot_be_loaded_is_named_and_not_quoted(project: Project) -> None:
    broken = project.root / DEFS / "assets" / "mine.py"
    for text, where in (
        ("password = (\n", f"{broken}:1"),
        ("\n1 / 0  # password\n", f"{broken}:2 in <module>"),
        (f"{DEFINED}    raise KeyError('password')\n", f"{broken}:6 in broken"),
    ):
        broken.write_text(text, encoding="utf-8")
        done = project.run("dg", "check", "defs")
        assert done.returncode == 1
        told = done.stdout + done.stderr
        assert "The definitions cannot be loaded." in told
        assert f"- {where}" in told
        assert "password" not in told
