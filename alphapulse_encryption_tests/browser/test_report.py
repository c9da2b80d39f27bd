"""The report of a rehearsal as a person sees it: from a file, in a browser, by day and by night, on paper."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver

from alphapulse_encryption.rehearsal.measures import Stage
from alphapulse_encryption.rehearsal.report import report
from alphapulse_encryption_tests.browser.chromium import Programs, open_browser
from alphapulse_encryption_tests.rehearsal import made_up

pytestmark = [pytest.mark.browser, pytest.mark.xdist_group("report")]

WIDTH, HEIGHT = 1280, 720
PHONE = 390


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of a good rehearsal and of a failed one, and their history."""
    directory = tmp_path_factory.mktemp("rehearsals")
    history = [made_up.rehearsal(run_id=f"run-{n}", day=n, noise=0.1, seed=n) for n in range(2)]
    worse = made_up.surprising().model_copy(
        update={"run_id": "run-8", "started": made_up.BEGAN.replace(day=20)}
    )
    failed = made_up.failed(Stage.DROP, run_id="run-9", day=25)
    report.write(worse, history, directory / "run-8")
    report.write(failed, [*history, worse], directory / "run-9")
    report.write_history([*history, worse, failed], directory)
    return directory


@pytest.fixture(scope="module")
def browser(programs: Programs) -> Iterator[webdriver.Chrome]:
    with open_browser(programs, WIDTH, HEIGHT) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        yield driver


def show(browser: webdriver.Chrome, page: Path, *, width: int = WIDTH, **features: str) -> None:
    """Open a page from its file."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": width == PHONE},
    )
    media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(page.as_uri())


def complaints(browser: webdriver.Chrome) -> list[Any]:
    """What the browser's console says since it was asked."""
    return list(browser.get_log("browser"))  # type: ignore[no-untyped-call]


def ask(browser: webdriver.Chrome, script: str) -> Any:
    return browser.execute_script(f"return {script}")


@pytest.mark.parametrize("name", ["run-8/index.html", "run-9/index.html", "history.html"])
@pytest.mark.parametrize("width", [WIDTH, PHONE])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_needs_nothing_and_says_the_verdict_first(
    browser: webdriver.Chrome, pages: Path, name: str, width: int, scheme: str
) -> None:
    complaints(browser)
    show(browser, pages / name, width=width, prefers_color_scheme=scheme)
    # Neither an error nor a warning, among them those of the page's own policy; nothing but the file was asked for.
    assert complaints(browser) == []
    assert ask(browser, "performance.getEntriesByType('resource').length") == 0
    box = ask(browser, "JSON.stringify(document.querySelector('#verdict strong').getBoundingClientRect())")
    verdict = json.loads(box)
    assert verdict["top"] > 0
    assert verdict["bottom"] < HEIGHT * 0.75
    # What is too wide scrolls in its own box.
    assert ask(browser, "document.documentElement.scrollWidth") <= width
    paper, ink = (
        sum(int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(", "))
        for colour in (
            ask(browser, "getComputedStyle(document.body).backgroundColor"),
            ask(browser, "getComputedStyle(document.body).color"),
        )
    )
    assert (paper > 600 and ink < 150) if scheme == "light" else (paper < 150 and ink > 600)


def test_plots_are_there_and_can_be_read(browser: webdriver.Chrome, pages: Path) -> None:
    for scheme in ("light", "dark"):
        show(browser, pages / "run-8" / "index.html", prefers_color_scheme=scheme)
        plots = ask(
            browser,
            "[...document.querySelectorAll('svg.plot')].map(plot => ({"
            "box: plot.getBoundingClientRect().toJSON(), texts: [...plot.querySelectorAll('text')].map("
            "text => [text.textContent.trim(), getComputedStyle(text).fill, text.getBoundingClientRect().height])}))",
        )
        assert len(plots) == 5
        ink = ask(browser, "getComputedStyle(document.body).color")
        for plot in plots:
            assert plot["box"]["width"] > 800
            assert 100 < plot["box"]["height"] < 1200
            assert plot["texts"]
            assert {fill for _, fill, _ in plot["texts"]} == {ink}
            # Of the browser's letters, large enough.
            assert all(height >= 9 for text, _, height in plot["texts"] if text)
        words = {text for plot in plots for text, _, _ in plot["texts"]}
        assert {"backfill", "restore", "trades", "p99", "milliseconds (logarithmic)", "twice"} <= words


def test_links_lead_where_they_say(browser: webdriver.Chrome, pages: Path) -> None:
    show(browser, pages / "history.html")
    browser.find_element("css selector", "a[href='run-9/index.html']").click()
    assert "Not ready" in browser.find_element("id", "verdict").text
    browser.find_element("link text", "All rehearsals").click()
    assert browser.title == "Rehearsals"
    browser.find_element("css selector", "a[href='run-8/index.html']").click()
    browser.find_element("link text", "Commands").click()
    assert ask(browser, "document.querySelector('#commands').getBoundingClientRect().top") < HEIGHT


def test_it_prints(browser: webdriver.Chrome, pages: Path) -> None:
    show(browser, pages / "run-8" / "index.html", prefers_color_scheme="light")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": False, "paperWidth": 8.27})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert ask(browser, "getComputedStyle(document.querySelector('nav')).display") == "none"
    assert ask(browser, "getComputedStyle(document.querySelector('pre')).whiteSpace") == "pre-wrap"
