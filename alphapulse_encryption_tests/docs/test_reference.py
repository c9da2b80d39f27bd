"""The reference names every option, setting and variable that there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alphapulse_encryption_tests.docs import reference
from alphapulse_encryption_tests.docs.pages import DOCS, ROOT, page

_VARIABLE = re.compile(r"\b(?:ALPHAPULSE|VAULT|DAGSTER)_[A-Z0-9_]*[A-Z0-9]")
# Words of the code that look like variables.
_OTHERS = {
    *("ALPHAPULSE_ENCRYPTION", "DAGSTER_CONFIG_YAML_FILENAME", "DAGSTER_DATABASE"),
    # Between a process that keeps keys and those that it starts.
    "ALPHAPULSE_ENCRYPTION_KEYS_KEPT_AT",
    # Dagster's own, between it and the runs that it starts.
    *("DAGSTER_CLI_API_GRPC_CONTAINER_CONTEXT", "DAGSTER_CONTAINER_CONTEXT", "DAGSTER_CURRENT_IMAGE"),
}


@pytest.mark.parametrize("name", reference.PARTS)
def test_what_is_generated_is_as_the_code_says(name: str) -> None:
    file, make = reference.PARTS[name]
    text = (DOCS / file).read_text(encoding="utf-8")
    assert text == reference.brought_up_to_date(text, name, make()), "run make docs-reference"


def test_every_variable_is_described() -> None:
    used = {
        variable
        for path in (ROOT / "alphapulse_encryption").rglob("*")
        if path.suffix in {".py", ".yaml"}
        for variable in _VARIABLE.findall(path.read_text(encoding="utf-8"))
    } - _OTHERS
    assert len(used) > 40
    cells = "\n".join(cell for cell, *_ in page("docs/settings.md").rows())
    described = set(_VARIABLE.findall(cells)) - {"ALPHAPULSE_ENCRYPTION_MASTER_KEY_V"}
    assert used - described == set(), "docs/settings.md does not describe these"
    assert described - used == set(), "docs/settings.md describes what nothing reads"


def test_every_command_of_make_is_described() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))
    everywhere = (ROOT / "README.md").read_text() + "".join(
        path.read_text() for path in Path(DOCS).rglob("*.md")
    )
    missing = {target for target in targets if not re.search(rf"`?make {target}\b", everywhere)}
    assert missing <= {"help", "setup", "browser", "pooler", "screenshots", "distclean", "bench-latency"}, (
        missing
    )
