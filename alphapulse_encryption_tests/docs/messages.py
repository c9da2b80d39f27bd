"""What the package may tell an operator, read from its source: refusals, errors, findings, reasons to wait."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# What stands for a part of a message that changes.
VARIES = "…"
ROOT_OF_ERRORS = "MigrationError"
# The base class and what is made of it.
FINDINGS = {"Finding", "Checked", "Alert"}

_PACKAGE = Path(__file__).parents[2] / "alphapulse_encryption"


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        text: with ``…`` for each part that changes.
        place: file and line.
        kind: the class that carries it.
    """

    text: str
    place: str
    kind: str


def parsed(package: Path = _PACKAGE) -> dict[str, ast.Module]:
    """The package's modules by their paths in it."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def with_module(modules: dict[str, ast.Module], name: str, source: str) -> dict[str, ast.Module]:
    """The modules, and one more."""
    return {**modules, name: ast.parse(source)}


def error_classes(modules: dict[str, ast.Module]) -> set[str]:
    """The names of all errors that operators see."""
    classes = [
        node for module in modules.values() for node in ast.walk(module) if isinstance(node, ast.ClassDef)
    ]
    found = {ROOT_OF_ERRORS}
    while True:
        more = {node.name for node in classes if {_name(base) for base in node.bases} & found} - found
        if not more:
            return found
        found |= more


def errors(modules: dict[str, ast.Module]) -> Iterator[Message]:
    """The messages of errors; of one whose text is made elsewhere, all that may be made there."""
    classes = error_classes(modules)
    for name, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and _name(node.func) in classes and node.args:
                for text in _texts(node.args[0], module, modules) or [""]:
                    yield Message(text, f"{name}:{node.lineno}", _name(node.func))


def findings(modules: dict[str, ast.Module], within: str, *, besides: str = "ok") -> Iterator[Message]:
    """What looks found, the last of a finding's arguments without a name; of preflight's, what is not in order."""
    for name, module in modules.items():
        if not name.startswith(within):
            continue
        for node in ast.walk(module):
            if not isinstance(node, ast.Call) or _name(node.func) not in FINDINGS or len(node.args) < 2:
                continue
            level, *_, what = node.args
            if isinstance(level, ast.Constant) and level.value == besides:
                continue
            for text in _texts(what, module, modules):
                yield Message(text, f"{name}:{node.lineno}", "Finding")


def carried_by(kind: str, modules: dict[str, ast.Module], place: int = 0) -> Iterator[Message]:
    """The texts that a class carries, at that place of its arguments."""
    for name, module in modules.items():
        for node in ast.walk(module):
            if isinstance(node, ast.Call) and _name(node.func) == kind and node.args:
                for text in _texts(node.args[place], module, modules):
                    yield Message(text, f"{name}:{node.lineno}", kind)


def reasons(modules: dict[str, ast.Module], name: str) -> Iterator[Message]:
    """Why a table is not verified, or cannot be switched: what a module collects as its reasons."""
    for node in ast.walk(modules[name]):
        values: list[ast.expr] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "reasons.append":
            values = [node.args[0]]
        elif isinstance(node, ast.Assign | ast.AugAssign) and isinstance(node.value, ast.ListComp):
            (target,) = node.targets if isinstance(node, ast.Assign) else [node.target]
            values = [node.value.elt] if ast.unparse(target) == "reasons" else []
        for value in values:
            for text in _texts(value, modules[name], modules):
                yield Message(text, f"{name}:{value.lineno}", "reason")


def returned(modules: dict[str, ast.Module], name: str) -> Iterator[Message]:
    """All texts that the functions of a module return."""
    for node in ast.walk(modules[name]):
        if isinstance(node, ast.Return) and node.value is not None and (text := _text(node.value)):
            yield Message(text, f"{name}:{node.lineno}", "text")


def yielded(modules: dict[str, ast.Module], name: str) -> Iterator[Message]:
    """All texts that the functions of a module yield."""
    for node in ast.walk(modules[name]):
        if isinstance(node, ast.Yield) and node.value is not None and (text := _text(node.value)):
            yield Message(text, f"{name}:{node.lineno}", "text")


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _texts(node: ast.expr, module: ast.Module, modules: dict[str, ast.Module]) -> list[str]:
    """All texts that an expression may be; none where that cannot be told."""
    if isinstance(node, ast.IfExp):
        return _texts(node.body, module, modules) + _texts(node.orelse, module, modules)
    if isinstance(node, ast.Name):
        return [
            text
            for found in _assignments(module)
            if node.id in {_name(target) for target in found.targets}
            for text in [_text(found.value)]
            if text
        ]
    if isinstance(node, ast.Call):
        return [
            text
            for other in modules.values()
            for function in _functions(other)
            if function.name == _name(node.func)
            for found in ast.walk(function)
            if isinstance(found, ast.Return) and found.value is not None
            for text in [_text(found.value)]
            if text
        ]
    text = _text(node)
    return [text] if text else []


@functools.cache
def _assignments(module: ast.Module) -> tuple[ast.Assign, ...]:
    return tuple(node for node in ast.walk(module) if isinstance(node, ast.Assign))


@functools.cache
def _functions(module: ast.Module) -> tuple[ast.FunctionDef, ...]:
    return tuple(node for node in ast.walk(module) if isinstance(node, ast.FunctionDef))


def _text(node: ast.expr) -> str:
    return plain(_joined(node))


def _joined(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_joined(part) if isinstance(part, ast.Constant) else VARIES for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(_joined(side) or VARIES for side in (node.left, node.right))
    return ""


def plain(text: str) -> str:
    """In one line, with one sign for whatever changes there."""
    text = re.sub(rf"{VARIES}(?:{VARIES})+", VARIES, " ".join(text.split()))
    # Nothing but parts that change tells nothing.
    return text if text.strip(f"{VARIES} .:,") else ""
