"""Text from outside shown as what it is: no character of it moves a cursor, hides a word or turns a line around."""

from __future__ import annotations

import re
import sys
from typing import Any, TextIO

# Names and reasons come from a database that others write to. At a terminal a control sequence (ECMA-48) in one can
# rewrite what stands above it, and a bidirectional control (Unicode Standard Annex 9) shows another order.


def visible(text: str) -> str:
    """The text with each character that shows nothing, or does something, written as its escape: ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def visible_json(document: str) -> str:
    """A JSON document that is the same, with such characters by their number (RFC 8259 section 7)."""
    return "".join(
        c if c.isprintable() or c == "\n" else "".join(f"\\u{unit:04x}" for unit in _units(c))
        for c in document
    )


def visible_sql(script: str) -> str:
    """A script that does the same, with such characters of names and literals by their number.

    The source is the PostgreSQL manual, section 4.1.2.2, "String Constants with Unicode Escapes".
    """
    return visible(_QUOTED.sub(_numbered, script))


_QUOTED = re.compile(r'"(?:[^"]|"")*"' + r"|(?<![A-Za-z0-9_&])'(?:[^']|'')*'")


def _numbered(quoted: re.Match[str]) -> str:
    text = quoted[0]
    if visible(text) == text:
        return text
    shown = (c if c.isprintable() or c in "\n\t" else f"\\+{ord(c):06x}" for c in text.replace("\\", "\\\\"))
    return f"U&{''.join(shown)}"


def _units(character: str) -> list[int]:
    data = character.encode("utf-16-be", "surrogatepass")
    return [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]


class VisibleStream:
    """Standard output or standard error of a program, for text from outside.

    ``rich`` writes its own control sequences to the stream behind it; the command line's ``Terminal`` sees to the
    text between them.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(visible(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def show_what_is_there() -> None:
    """Have this process write text from outside as what it is, to standard output and standard error."""
    sys.stdout, sys.stderr = VisibleStream(sys.stdout), VisibleStream(sys.stderr)
