"""The shape of the package: what is written once stays written once."""

import ast
from collections.abc import Iterator
from pathlib import Path

import alphapulse_encryption

PACKAGE = Path(alphapulse_encryption.__file__).parent
BUNDLE = {"database", "catalogue", "cipher", "keys", "actor"}


def parsed(path: Path) -> ast.Module:
    """CPython 3.11 counts the depth of all threads together (gh-106905): a thread that parses as well ends this one."""
    for _ in range(4):
        try:
            return ast.parse(path.read_text(encoding="utf-8"))
        except SystemError:
            continue
    return ast.parse(path.read_text(encoding="utf-8"))


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path.relative_to(PACKAGE).as_posix(), node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    arguments = function.args
    return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}


def test_what_a_target_holds_is_passed_as_a_target() -> None:
    found = [
        f"{path}: {function.name}"
        for path, function in functions()
        if len(parameters(function) & BUNDLE) >= 3 and (path, function.name) != ("migration/target.py", "of")
    ]
    assert not found


def test_the_engine_has_its_modules_in_rooms() -> None:
    assert {path.name for path in (PACKAGE / "migration").glob("*.py")} == {"__init__.py", "target.py"}


def test_every_package_says_what_belongs_there_and_what_does_not() -> None:
    for path in sorted(PACKAGE.rglob("__init__.py")):
        text = ast.get_docstring(parsed(path)) or ""
        first = text.partition("\n\n")[0]
        belongs, separator, rest = first.partition("; ")
        assert belongs and separator and rest.startswith(("not ", "no ", "none ", "nothing ")), path
        assert first.count(".") == 1 and first.endswith("."), path


def test_the_engine_tries_again_and_locks_by_one_home() -> None:
    """Copies of a retry, or of the hash of a lock's name, drifted apart: one kept trying what the other refused."""
    found = [
        f"{path.relative_to(PACKAGE)}: {word}"
        for path in sorted((PACKAGE / "migration").rglob("*.py"))
        if path.parent.name != "postgres"
        for word in ("Retrying(", "hashtextextended", "pg_advisory_", "pg_try_advisory_")
        if word in path.read_text(encoding="utf-8")
    ]
    assert not found
