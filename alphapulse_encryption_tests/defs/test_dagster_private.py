"""What is private of Dagster's is used in one module only, so that a new release is held against one file."""

from __future__ import annotations

import re
from pathlib import Path

import alphapulse_encryption

PACKAGE = Path(alphapulse_encryption.__file__).parent
THE_MODULE = "defs/dagster_private.py"
# Names below dagster and its integrations that begin with an underscore, however they are reached.
PRIVATE = re.compile(
    r"\bdagster(?:_\w+)?(?:\.\w+)*\._\w+[\w.]*|\bfrom dagster\S* import .*?\b(_\w+)|\bdg\._\w+"
)

# Class paths in instance configurations that have no public name: Dagster resolves them by their module, and its
# reference of dagster.yaml shows such paths for all classes of its own.
CLASS_PATHS = {
    "defs/resources/dagster.yaml": {"dagster._core.storage.noop_compute_log_manager"},
    "defs/resources/dagster-celery.yaml": {"dagster._core.storage.noop_compute_log_manager"},
}


def found(text: str) -> set[str]:
    return {match.group(0) for match in PRIVATE.finditer(text)}


def test_one_module() -> None:
    places = {
        path.relative_to(PACKAGE).as_posix(): names
        for path in PACKAGE.rglob("*")
        if path.suffix in {".py", ".yaml", ".yml", ".toml", ".sql", ".html"}
        if (names := found(path.read_text(encoding="utf-8")))
    }
    assert places.pop(THE_MODULE)
    assert places == CLASS_PATHS


def test_what_counts() -> None:
    assert found("from dagster._core.launcher import X") == {"dagster._core.launcher"}
    assert found("from dagster import _check as check") == {"from dagster import _check"}
    assert found('"-m", "dagster._daemon"') == {"dagster._daemon"}
    assert found("import dagster_graphql._client") == {"dagster_graphql._client"}
    assert found("dg._core.utils.make_new_run_id()") == {"dg._core"}
    assert found("import dagster as dg; dg.DagsterRun; alphapulse_encryption.definitions._x") == set()
