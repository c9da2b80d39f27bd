"""One walk through the demo and one UI for all tests with a browser; a fresh browser for each of them."""

from collections.abc import Iterator

import pytest

from alphapulse_encryption_tests.browser.chromium import Programs, find_programs, open_browser
from alphapulse_encryption_tests.browser.demonstration import Demonstration, demonstration
from alphapulse_encryption_tests.browser.pages import Pages

ROWS = 2_000
# So wide that the graph writes the names of all assets in full.
WIDTH, HEIGHT = 3200, 1200


@pytest.fixture(scope="session")
def programs() -> Programs:
    """The browser and its driver."""
    found = find_programs()
    assert found is not None, "There is no Chromium with its chromedriver: make browser, or -m 'not browser'."
    return found


@pytest.fixture(scope="session")
def demo(programs: Programs) -> Iterator[Demonstration]:
    """The UI on the instance that the demo has just used."""
    with demonstration("--rows", str(ROWS)) as shown:
        yield shown


@pytest.fixture
def pages(programs: Programs, demo: Demonstration) -> Iterator[Pages]:
    """The UI's pages in a browser of the test's own."""
    with open_browser(programs, WIDTH, HEIGHT) as driver:
        yield Pages(driver, demo.address)
