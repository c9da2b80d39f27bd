"""One walk through the demo, one UI and one browser for all tests; to each of them the browser is a new one."""

from collections.abc import Iterator

import pytest
from selenium import webdriver

from alphapulse_encryption_tests.browser.chromium import Programs, begin_anew, find_programs, open_browser
from alphapulse_encryption_tests.browser.demonstration import Demonstration, demonstration
from alphapulse_encryption_tests.browser.pages import Pages

ROWS = 2_000
# The last one goes on to the end, one before it has two ends.
RANGES = 5
WIDTH, HEIGHT = 1600, 1000
# So wide that the graph writes the names of all assets in full.
WIDTH_OF_GRAPHS = 3200


@pytest.fixture(scope="session")
def programs() -> Programs:
    """The browser and its driver."""
    found = find_programs()
    assert found is not None, "There is no Chromium with its chromedriver: make browser, or -m 'not browser'."
    return found


@pytest.fixture(scope="session")
def demo(programs: Programs) -> Iterator[Demonstration]:
    """The UI on the instance that the demo has just used."""
    with demonstration("--rows", str(ROWS), ranges=RANGES) as shown:
        yield shown


@pytest.fixture(scope="session")
def visitor(programs: Programs) -> Iterator[webdriver.Chrome]:
    """The browser for the UI."""
    with open_browser(programs, WIDTH, HEIGHT) as driver:
        yield driver


@pytest.fixture
def pages(visitor: webdriver.Chrome, demo: Demonstration) -> Pages:
    """The UI's pages as somebody finds them who has never been there."""
    begin_anew(visitor, demo.address, WIDTH, HEIGHT)
    return Pages(visitor, demo.address)


@pytest.fixture
def wide_pages(visitor: webdriver.Chrome, demo: Demonstration) -> Pages:
    """The same, in a window for the graph."""
    begin_anew(visitor, demo.address, WIDTH_OF_GRAPHS, HEIGHT)
    return Pages(visitor, demo.address)
