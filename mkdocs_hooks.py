"""What MkDocs does for the manual beyond its configuration: the README is a page of it, and no page is left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

README = "readme.md"
REST = "More"

_LINK = re.compile(r"(?P<image>!?)\[(?P<text>(?:[^][]|\[[^][]*\])*)\]\((?P<target>[^()\s]+)\)")
_FENCE = re.compile(r"^ *(`{3,}).*?^ *\1 *$", re.MULTILINE | re.DOTALL)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Pages that the navigation does not name stand at its end."""
    docs = Path(config.docs_dir)
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    rest = [page for page in pages if page not in named(config.nav)]
    if rest and config.nav is not None:
        config.nav.append({REST: rest})
    return config


def named(nav: object) -> set[str]:
    """The pages that a part of the navigation names."""
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ()
    return {page for part in parts for page in named(part)}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README joins the pages."""
    text = (Path(config.config_file_path).parent / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, README, content=outside_fences(text, _from_readme)))
    return files


_ITEM = re.compile(r"^(?P<indent> *)(?P<marker>(?:[-*+]|\d+\.) +)\S")


def as_python_markdown_has_lists(text: str) -> str:
    """What belongs to a list's item is indented by as much as its text is, everywhere but here, where it is by four."""
    lines: list[str] = []
    # Of each item that is open: where its text begins, and whether it is of more than one block.
    items: list[list[int]] = []
    fence = ""
    for line in text.splitlines():
        stripped = line.lstrip(" ")
        indent = len(line) - len(stripped)
        if not stripped:
            lines.append(line)
            if items:
                items[-1][1] = 1
            continue
        after_blank = not lines or not lines[-1].strip()
        item = _ITEM.match(line) if not fence else None
        # A paragraph may go on without being indented; anything else ends the items that it is left of.
        ended = not fence and (
            after_blank or item is not None or stripped.startswith(("#", "|", "```", "<!--"))
        )
        while ended and items and indent < items[-1][0]:
            several = items.pop()[1]
            if items:
                items[-1][1] |= several
            if item is not None and several and not after_blank:
                lines.append("")
                after_blank = True
        depth = len(items)
        if item is not None:
            if not after_blank and lines and not _ITEM.match(lines[-1]) and not _within_item(lines[-1]):
                lines.append("")
            items.append([indent + len(item["marker"]), 0])
            lines.append(" " * 4 * depth + stripped)
            continue
        if stripped.startswith("```"):
            fence = "" if fence else "```"
        own = items[-1][0] if items else 0
        lines.append(" " * (4 * depth + max(indent - own, 0)) + stripped if items else line)
    return "\n".join(lines) + "\n"


def _within_item(line: str) -> bool:
    return line.startswith("    ")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to the README lead to its page; what lies in the repository only is named without a link."""
    markdown = as_python_markdown_has_lists(markdown)
    if page.file.src_uri == README:
        return markdown
    up = "../" * (len(PurePosixPath(page.file.src_uri).parts) - 1)

    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target.startswith(f"{up}../README.md"):
            return f"[{match['text']}]({up}{README}{target.removeprefix(f'{up}../README.md')})"
        return match["text"] if target.startswith(f"{up}../") else match[0]

    return outside_fences(markdown, lambda text: _LINK.sub(link, text))


def _from_readme(text: str) -> str:
    def link(match: re.Match[str]) -> str:
        target = match["target"]
        if target.startswith("docs/"):
            return f"{match['image']}[{match['text']}]({target.removeprefix('docs/')})"
        return match[0] if target.startswith(("#", "https://", "http://")) else match["text"]

    return _LINK.sub(link, text)


def outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Change a text, but not its fenced blocks."""
    parts, position = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[position : fence.start()]), fence[0]]
        position = fence.end()
    return "".join([*parts, change(text[position:])])
