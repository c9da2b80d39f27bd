"""Writes the parts of the manual that follow from the code (``make docs-reference``)."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable, Iterator
from datetime import timedelta

from pydantic.fields import FieldInfo

from alphapulse_encryption import settings
from alphapulse_encryption.cli.commands.parser import build_parser
from alphapulse_encryption.migration.bookkeeping.limits import Limits
from alphapulse_encryption_tests.docs.pages import DOCS

_PLACE = "<!-- {name}: written by make docs-reference -->\n{text}<!-- end of {name} -->"


def options() -> str:
    """The options of the command line, group by group."""
    return "".join(_options(build_parser()))


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for group in parser._action_groups:
        actions = [
            action
            for action in group._group_actions
            if action.option_strings and not isinstance(action, argparse._HelpAction)
        ]
        if not actions:
            continue
        yield f"\n## {(group.title or '')[:1].upper()}{(group.title or '')[1:]}\n\n| option | meaning |\n|---|---|\n"
        for action in actions:
            value = f" {action.metavar or action.dest.upper()}" if action.nargs != 0 else ""
            names = ", ".join(f"`{name}{value}`" for name in action.option_strings)
            yield f"| {names} | {_cell(action.help or '')} |\n"
    yield "\n"


def limits() -> str:
    """The settings in the database."""
    rows = (
        f"| `{name}` | {_value(field.default)} | {_cell(field.description or '')} |\n"
        for name, field in Limits.model_fields.items()
    )
    return "\n| setting | default | meaning |\n|---|---|---|\n" + "".join(rows) + "\n"


def variables(group: type[settings.Variables]) -> str:
    """A group of environment variables."""
    rows = (
        f"| `{field.validation_alias}` | {_default(field)} | {_cell(field.description or '')} |\n"
        for field in group.model_fields.values()
    )
    return (
        f"\n### {group.__doc__}\n\n| variable | default | meaning |\n|---|---|---|\n" + "".join(rows) + "\n"
    )


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, timedelta):
        unit = str(field.validation_alias).rpartition("_")[2].lower()
        value = f"{value / timedelta(**{unit: 1}):g}"
    return f"`{value}`" if value else ""


def _value(value: object) -> str:
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("%%", "%").replace("|", "\\|")


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "options": ("command-line.md", options),
    **{
        group.__name__.removesuffix("Variables").lower(): ("settings.md", functools.partial(variables, group))
        for group in settings.Variables.__subclasses__()
    },
    "settings": ("settings.md", limits),
}


def brought_up_to_date(text: str, name: str, part: str) -> str:
    """A page with one of its parts written anew."""
    begin, end = _PLACE.format(name=name, text="\0").split("\0")
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    assert len(pattern.findall(text)) == 1, f"{name} has not its one place"
    return pattern.sub(lambda _: begin + part + end, text)


def main() -> None:
    """Write all of them."""
    for name, (page, make) in PARTS.items():
        path = DOCS / page
        path.write_text(brought_up_to_date(path.read_text(encoding="utf-8"), name, make()), encoding="utf-8")


if __name__ == "__main__":
    main()
