"""The manual builds without a warning, holds every page, and asks nobody on the network for anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alphapulse_encryption_tests.docs.pages import DOCS, ROOT, pages


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """What ``make docs`` does."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", site],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("manual")
    done = build(ROOT / "mkdocs.yml", directory)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    return directory


class _Asked(HTMLParser):
    """What a browser asks for when it shows a page; links that a reader follows are not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and given.get("rel") in {"canonical", "prev", "next"}:
            return
        names = {
            "link": "href",
            "script": "src",
            "img": "src",
            "iframe": "src",
            "source": "src",
            "video": "src",
        }
        if tag in names and (address := given.get(names[tag])):
            self.addresses.append(address)


def test_every_page_is_there_and_in_the_navigation(site: Path) -> None:
    sources = {path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")} | {
        Path("readme.html")
    }
    built = {path.relative_to(site) for path in site.rglob("*.html")} - {Path("404.html")}
    assert built == sources
    front = (site / "index.html").read_text()
    linked = set(re.findall(r'href="([^"#:]+\.html)"', front))
    assert {path.as_posix() for path in sources} - linked <= {"index.html"}
    assert (site / "search" / "search_index.json").stat().st_size > 10_000


def test_pages_are_shown_as_they_are_written(site: Path) -> None:
    for of in pages():
        written = (
            len(re.findall(r"^ *(?:[-*+]|\d+\.) +\S", of.prose, re.MULTILINE)),
            len(re.findall(r"^ *\|(?:[ :]*-+[ :]*\|)+ *$", of.prose, re.MULTILINE)),
            len(of.blocks),
        )
        name = "readme.html" if of.path.name == "README.md" else f"{of.path.stem}.html"
        shown = re.search(r"<article.*</article", (site / name).read_text(), re.DOTALL)
        assert shown is not None
        blocks = re.findall(r'<div class="[^"]*highlight', shown[0])
        assert (shown[0].count("<li>"), shown[0].count("<table>"), len(blocks)) == written, of.name


def test_nothing_is_asked_of_the_network(site: Path) -> None:
    asked = _Asked()
    for path in site.rglob("*.html"):
        asked.feed(path.read_text())
    assert asked.addresses
    assert [address for address in asked.addresses if re.match(r"(?:\w+:)?//", address)] == []
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text()), style


def test_a_warning_ends_the_build(tmp_path: Path) -> None:
    for name in ("mkdocs.yml", "mkdocs_hooks.py"):
        shutil.copy(ROOT / name, tmp_path)
    docs = tmp_path / "docs"
    (docs / "stylesheets").mkdir(parents=True)
    shutil.copy(DOCS / "stylesheets" / "extra.css", docs / "stylesheets")
    config = (tmp_path / "mkdocs.yml").read_text().partition("\nnav:\n")[
        0
    ] + "\nnav:\n  - index.md\n  - readme.md\n"
    (tmp_path / "mkdocs.yml").write_text(config)
    (tmp_path / "README.md").write_text(
        "# Front\n\n[The manual](docs/index.md), [code](alphapulse_encryption/)\n"
    )
    (docs / "index.md").write_text("# Here\n\n[front](../README.md#front), [more](more.md#there)\n")
    (docs / "more.md").write_text("# There\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert 'href="readme.html#front"' in (tmp_path / "site" / "index.html").read_text()
    assert "More" in (tmp_path / "site" / "index.html").read_text()
    (docs / "index.md").write_text("# Here\n\n[front](../README.md#back)\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode != 0
    assert "#back" in done.stdout + done.stderr
