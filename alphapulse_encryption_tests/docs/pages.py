"""The pages of the manual, the README among them: their headings, links, tables and fenced blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# A block without a language is a shell's: code forges colour it the same.
SHELL = {"", "bash", "console", "sh", "shell"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w+-]*)[^`\n]*$")
_LINK = re.compile(
    r"!?\[(?:[^][]|\[[^][]*\])*\]\((?P<target><[^>]*>|[^()\s]+(?:\([^()\s]*\))?)(?: \"[^\"]*\")?\)"
)
_INLINE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
_DEFINITION = re.compile(r"^\[(?P<name>[^]]+)\]: +(?P<target>\S+) *$", re.MULTILINE)
_REFERENCE = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]\[(?P<name>[^]]+)\]")
_HEADING = re.compile(r"^(#{1,6}) +(.*?)(?: +#+)?$")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: its page, as the repository names it.
        line: of its first line of content.
        language: as written at the fence.
        text: without the fences and its indentation.
        heading: the one it stands under.
    """

    page: str
    line: int
    language: str
    text: str
    heading: str = ""

    @property
    def commands(self) -> list[str]:
        """Of a shell's block, its commands, comments and empty lines left out; of a transcript, what was typed."""
        return commands(self.text)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page.

    Args:
        path: its file.
        text: all of it.
    """

    path: Path
    text: str = field(repr=False)

    @property
    def name(self) -> str:
        """As the repository names it."""
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def _parts(self) -> tuple[list[tuple[int, str]], list[Block]]:
        """Lines outside of fenced blocks with their numbers, and the blocks."""
        prose: list[tuple[int, str]] = []
        blocks: list[Block] = []
        opened: re.Match[str] | None = None
        inside: list[str] = []
        heading = ""
        for number, line in enumerate(self.text.splitlines(), start=1):
            if opened is None:
                opened = _FENCE.match(line)
                if opened is None:
                    prose.append((number, line))
                    titled = _HEADING.match(line)
                    heading = titled[2] if titled else heading
                inside = []
            elif line.strip().startswith(opened["fence"]) and not line.strip().strip(opened["fence"][0]):
                text = "\n".join(one.removeprefix(opened["indent"]) for one in inside) + "\n"
                blocks.append(Block(self.name, number - len(inside), opened["language"], text, heading))
                opened = None
            else:
                inside.append(line)
        assert opened is None, f"{self.name}: a fenced block has no end"
        return prose, blocks

    @property
    def blocks(self) -> list[Block]:
        return self._parts[1]

    @property
    def prose(self) -> str:
        """What is in no fenced block."""
        return "\n".join(line for _, line in self._parts[0])

    @property
    def inline(self) -> list[str]:
        """What is in backquotes."""
        return [" ".join(match[2].split()) for match in _INLINE.finditer(self.prose)]

    @property
    def headings(self) -> list[str]:
        return [match[2] for _, line in self._parts[0] if (match := _HEADING.match(line))]

    @property
    def anchors(self) -> set[str]:
        """What links to this page may name, as code forges make it of the headings."""
        seen: dict[str, int] = {}
        anchors = set()
        for heading in self.headings:
            slug = slugified(heading)
            count = seen[slug] = seen.get(slug, -1) + 1
            anchors.add(slug if not count else f"{slug}-{count}")
        return anchors

    @property
    def links(self) -> list[str]:
        """The targets of links and images; of references without a definition, their names."""
        text = _INLINE.sub("`code`", self.prose)
        defined = {match["name"]: match["target"] for match in _DEFINITION.finditer(text)}
        referred = {match["name"] for match in _REFERENCE.finditer(text)}
        return [
            *(match["target"].strip("<>") for match in _LINK.finditer(text)),
            *defined.values(),
            *sorted(referred - set(defined)),
        ]

    def rows(self) -> Iterator[list[str]]:
        """The cells of its tables, row by row; heads and rules left out."""
        lines = [line for _, line in self._parts[0]]
        for number, line in enumerate(lines):
            if not line.lstrip().startswith("|") or set(line) <= set("|-: "):
                continue
            if (
                number + 1 < len(lines)
                and lines[number + 1].strip()
                and set(lines[number + 1].strip()) <= set("|-: ")
            ):
                continue
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def slugified(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", "")).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def commands(text: str) -> list[str]:
    """The commands of a shell's text: continued lines, open quotes and here-documents belong to their command."""
    lines = text.splitlines()
    if any(line.startswith("$ ") for line in lines):
        return [line.removeprefix("$ ").strip() for line in lines if line.startswith("$ ")]
    found: list[str] = []
    pending: list[str] = []
    until: str | None = None
    for line in lines:
        pending.append(line)
        text_so_far = "\n".join(pending)
        if until is not None:
            if line.strip() != until:
                continue
            until = None
        elif here := re.search(r"(?<!<)<<(?!<)-?\s*['\"]?(\w+)['\"]?", line):
            until = here[1]
            continue
        elif line.endswith("\\") or _has_open_quote(text_so_far):
            continue
        pending = []
        if text_so_far.strip() and not text_so_far.lstrip().startswith("#"):
            found.append(text_so_far.strip())
    assert not pending, f"a command has no end: {pending}"
    return found


def _has_open_quote(text: str) -> bool:
    quote = ""
    previous = " "
    for character in text:
        if quote:
            quote = "" if character == quote and not (quote == '"' and previous == "\\") else quote
        elif character == "#" and previous.isspace():
            # The rest of the line is a comment; quotes are closed by then, or the line would have been joined.
            return False
        elif character in "'\"" and previous != "\\":
            quote = character
        previous = character
    return bool(quote)


def pages() -> list[Page]:
    """All pages: the README, and the manual's."""
    return [
        Page(path, path.read_text(encoding="utf-8"))
        for path in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    ]


def page(name: str) -> Page:
    """The page of that name, as the repository names it."""
    return Page(ROOT / name, (ROOT / name).read_text(encoding="utf-8"))
