"""Links of all pages: what they lead to inside of the repository is there; the others are well-formed."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest

from alphapulse_encryption_tests.docs.pages import ROOT, Page, pages, slugified


def broken(of: Page) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for target in of.links:
        url = urlsplit(target)
        if url.scheme or url.netloc:
            if url.scheme not in {"https", "http", "mailto"} or not (url.netloc or url.path):
                found.append(f"{target}: not an address")
            continue
        path = (of.path.parent / url.path).resolve() if url.path else of.path
        if url.path and not (path.is_relative_to(ROOT) and path.exists()):
            found.append(f"{target}: no such file")
        elif url.fragment and url.fragment not in _anchors(path if url.path else of):
            found.append(f"{target}: no such heading")
    return found


def _anchors(of: Page | Path) -> set[str]:
    if isinstance(of, Page):
        return of.anchors
    return Page(of, of.read_text(encoding="utf-8")).anchors if of.suffix == ".md" else set()


@pytest.mark.parametrize("of", pages(), ids=lambda of: of.name)
def test_links_lead_somewhere(of: Page) -> None:
    assert broken(of) == []


def test_broken_links_are_found() -> None:
    text = (
        "# One\n[a](two.md) [b](#one) [c](#two) [d](https://example.com) [e](https://) `[f](g.md)`\n"
        "```\n[h](i.md)\n```\n![j](images/k.png) [l](guide.md#step-4-verify) [m](guide.md#none) [n](../../x.md)\n"
    )
    assert broken(Page(ROOT / "docs" / "made_up.md", text)) == [
        "two.md: no such file",
        "#two: no such heading",
        "https://: not an address",
        "images/k.png: no such file",
        "guide.md#none: no such heading",
        "../../x.md: no such file",
    ]


def test_every_picture_is_shown() -> None:
    shown = {
        (of.path.parent / target).resolve()
        for of in pages()
        for target in of.links
        if not urlsplit(target).scheme
    }
    pictures = set((ROOT / "docs" / "images").iterdir())
    assert pictures <= shown, sorted(path.name for path in pictures - shown)


def test_anchors_are_those_of_code_forges() -> None:
    assert slugified("`v_<table>`: what, and why?") == "v_table-what-and-why"
    assert slugified("Step 1: prepare [keys](x.md) & environment") == "step-1-prepare-keys--environment"
    assert Page(ROOT / "README.md", "# A\n## A\n```\n# B\n```\n").anchors == {"a", "a-1"}
