"""Dagster's pages as a person sees them: each function looks at one thing, or does one.

Words and positions are relied on; class names, which Dagster's build makes up, by their readable beginning only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import requests
from selenium.common.exceptions import (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.webdriver import WebDriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

T = TypeVar("T")

# Seconds. Nobody waits that long; a machine under load may.
TIMEOUT = 120
LOCATION = "alphapulse_encryption"
GREEN = "var(--color-accent-green)"

_STATUS = "query($run: ID!) { runOrError(runId: $run) { ... on Run { status } } }"
_ENDED = {"SUCCESS", "FAILURE", "CANCELED"}
_BLINK, _MOMENT = 0.1, 0.25  # seconds

_DIALOG = "//*[@role='dialog']"
_PASSING = (
    ElementClickInterceptedException,
    ElementNotInteractableException,
    NoSuchElementException,
    StaleElementReferenceException,
)

_GRAPH = """
return [...document.querySelectorAll('foreignObject')].map(node => {
    const asset = node.querySelector('[class*=AssetNode_] [class*=Name]');
    const name = asset ?? node.querySelector('[data-tooltip]');
    const place = node.getBoundingClientRect();
    return {
        name: name?.textContent.trim() ?? '',
        kind: node.classList.contains('group') ? 'group' : asset ? 'asset' : 'frame',
        left: place.left, top: place.top, right: place.right, bottom: place.bottom,
    };
})
"""

# What has been fetched, and how much is on the page.
_LOADED = """
return [performance.getEntriesByType('resource').length, document.querySelectorAll('*').length]
"""
_LOOKS_BEFORE_A_PICTURE = 15

_DIMENSION = """
const column = document.evaluate(
    `//input[starts-with(@placeholder, 'Filter by ${arguments[0]}')]`
        + "/ancestor::div[.//*[contains(@class, 'VirtualizedTable_row')]][1]",
    document, null, XPathResult.FIRST_ORDERED_NODE_TYPE).singleNodeValue;
return [...column?.querySelectorAll('[class*=VirtualizedTable_row]') ?? []].map(row => [
    row.querySelector('[title]').title,
    [...row.querySelectorAll('div')].at(-1).style.background,
])
"""

_CONFIG = "return document.querySelector('.CodeMirror')?.CodeMirror?.getValue()"

_METADATA = """
return [...document.querySelectorAll('[class*=AssetEventMetadata] tr')].map(row =>
    [...row.querySelectorAll('td')].slice(0, 2).map(cell => cell.textContent.trim()))
"""


@dataclass(frozen=True)
class Box:
    """Where something is on the page, in pixels from its left upper corner."""

    left: float
    top: float
    right: float
    bottom: float

    def holds(self, other: Box) -> bool:
        """Whether the other one lies inside."""
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )


@dataclass(frozen=True)
class Partition:
    """What the page shows of the partition that is selected.

    Args:
        state: such as ``Materialized``.
        run: id of the run of the latest materialization.
        metadata: of the latest materialization.
    """

    state: str
    run: str
    metadata: Mapping[str, str]


class Pages:
    """Dagster's UI in a browser.

    Args:
        driver: the browser.
        address: of the UI, without a slash at its end.
    """

    def __init__(self, driver: WebDriver, address: str) -> None:
        self._driver = driver
        self._address = address
        self._asking = requests.Session()
        # Whatever proxy the environment names is for elsewhere.
        self._asking.trust_env = False

    def picture(self) -> bytes:
        """What is to be seen once everything is there, as PNG."""
        self._still(lambda: self._driver.execute_script(_LOADED), looks=_LOOKS_BEFORE_A_PICTURE)
        return self._driver.get_screenshot_as_png()

    # The graph

    def open_graph(self) -> None:
        """Open the graph of all assets, as a newcomer finds it."""
        self._open("/asset-groups")
        self._wait(lambda _: self.groups())
        self._still(self.groups)

    def expand_groups(self) -> None:
        """Show the assets of every group."""
        self._click("(//button[not(normalize-space())][.//*[@aria-label='settings']])[last()]")
        self._click("//*[starts-with(normalize-space(text()), 'Expand all groups')]")
        self._wait(lambda _: self.assets())
        self._still(self.assets)

    def make_room(self) -> None:
        """Fold the panels beside the graph, and fit the graph into what is free then."""
        self._click(self._button("Hide navigation"))
        self._click("(//button[.//*[@aria-label='panel_show_right']])[last()]")
        self._still(self.assets)
        free = self._driver.find_element(By.CSS_SELECTOR, "[class*=AssetGraphExplorer_svgContainer]")
        frame = self._box(free.find_element(By.XPATH, "./ancestor::div[contains(@class, 'SplitPanel')][1]"))
        lowest = max(box.bottom for box in self.groups().values())
        chain = ActionChains(self._driver)
        middle, below = int((frame.left + frame.right) / 2), int((lowest + frame.bottom) / 2)
        chain.w3c_actions.pointer_action.move_to_location(middle, below)  # type: ignore[no-untyped-call]
        chain.double_click().perform()
        self._still(self.assets)

    def groups(self) -> dict[str, Box]:
        """The groups in the graph, by their names."""
        return self._graph("group")

    def assets(self) -> dict[str, Box]:
        """The assets in the graph, by the names that are shown; a long one may have an ellipsis in it."""
        return self._graph("asset")

    # Materializing

    def materialize_all_count(self) -> int:
        """How many assets the graph's button would materialize."""
        button = self._find(self._button("Materialize all"))
        found = re.search(r"\((\d+)\)", button.text)
        assert found is not None, button.text
        return int(found[1])

    def materialize_all_assets(self) -> list[str]:
        """The assets that the dialog of "Materialize all" would run, in its order. Nothing is launched."""
        self._click(self._button("Materialize all"))
        self._click(f"{_DIALOG}{self._button('Preview')}")
        links = f"{_DIALOG}[contains(., 'Backfill preview')]//a[contains(@href, '/assets/')]"
        self._find(links)
        return [link.text for link in self._driver.find_elements(By.XPATH, links)]

    def can_materialize(self, asset: str) -> bool:
        """Whether the button on the asset's page can be pressed."""
        self._open(f"/assets/{asset}")
        # Until its definition is here, the button cannot be pressed for any asset.
        self._find("//*[normalize-space(text())='Code location']")
        return self._still(lambda: self._find(self._button("Materialize")).is_enabled())

    # Partitions

    def open_partitions(self, asset: str) -> None:
        """Open an asset's partitions."""
        self._open(f"/assets/{asset}?view=partitions")
        self._find("//label[starts-with(normalize-space(), 'Materialized')]")
        self._still(self.partition_counts)

    def partition_counts(self) -> dict[str, int]:
        """How many partitions are in which state."""
        labels = self._wait(lambda driver: driver.find_elements(By.XPATH, "//label[contains(., '(')]"))
        found = [re.fullmatch(r"(\w+) \((\d+)\)", label.text.strip()) for label in labels]
        return {match[1]: int(match[2]) for match in found if match}

    def dimension(self, name: str) -> dict[str, str]:
        """One side of the grid: its values in order, with the colour of the dot behind each."""
        return dict(self._wait(lambda driver: driver.execute_script(_DIMENSION, name)))

    def select_partition(self, batch_range: str, table: str) -> Partition:
        """Select a partition in the grid by clicking, and read what is shown of it."""
        for value in (batch_range, table):
            self._click(f"//*[contains(@class, 'VirtualizedTable_row')][.//*[@title='{value}']]")
        return self._still(lambda: self._partition(f"{batch_range}|{table}"))

    def _partition(self, key: str) -> Partition:
        title = f"//*[@data-tooltip='{key}']"
        self._find(title)
        link = self._find("//a[contains(@href, '/runs/') and contains(@href, 'focusedTime')]")
        return Partition(
            state=self._find(f"{title}//*[contains(@class, 'BaseTag')][1]").text,
            run=_run_id(link.get_attribute("href")),
            metadata=self._wait(lambda driver: dict(driver.execute_script(_METADATA))),
        )

    def begin_to_materialize(self) -> dict[str, str]:
        """Open the dialog for the selected partition.

        Returns:
            What it is about to run: the values chosen by dimension, and under ``selection`` how many
            partitions these are.
        """
        self._click(self._button("Materialize"))
        chosen = {
            name: self._find(
                f"{_DIALOG}//*[normalize-space(text())='{name}']/ancestor::div[.//button][1]"
                "//*[contains(@class, 'TagSelector_tagsContainer')]"
            ).text.strip()
            for name in ("batch_range", "table")
        }
        count = "[contains(text(), 'partition') and translate(substring(text(), 1, 1), '0123456789', '')='']"
        return {**chosen, "selection": self._find(f"{_DIALOG}//span{count}").text}

    def choose_all(self, dimension: str) -> None:
        """Choose every value of a dimension in the dialog."""
        title = f"{_DIALOG}//*[normalize-space(text())='{dimension}']"
        self._click(f"{title}/following::button[normalize-space()='All'][1]")
        self._find(f"{_DIALOG}{self._button('Launch backfill')}")

    def launch(self) -> str:
        """Launch what the dialog says, as one run.

        Returns:
            The run's id.
        """
        self._click(f"{_DIALOG}{self._button('Launch 1 run')}")
        link = self._find("//a[normalize-space()='View' and contains(@href, '/runs/')]")
        return _run_id(link.get_attribute("href"))

    def select_table(self, table: str) -> None:
        """Select all partitions of a table in the grid, or its one partition."""
        self._click(f"//*[contains(@class, 'VirtualizedTable_row')][.//*[@title='{table}']]")

    def materialize(self, asset: str) -> str:
        """Materialize an asset without partitions from its page.

        Returns:
            The run's id.
        """
        self._open(f"/assets/{asset}")
        self._click(self._button("Materialize"))
        link = self._find("//a[normalize-space()='View' and contains(@href, '/runs/')]")
        return _run_id(link.get_attribute("href"))

    def open_asset(self, asset: str) -> None:
        """Open an asset's overview."""
        self._open(f"/assets/{asset}")
        self._find("//*[normalize-space(text())='Code location']")

    # The launchpad

    def open_launchpad(self, job: str) -> str:
        """Open a job's launchpad, by way of the job.

        Returns:
            The configuration that it begins with.
        """
        self.open_job(job)
        return self.go_on_to_launchpad()

    def go_on_to_launchpad(self) -> str:
        """From a job to its launchpad.

        Returns:
            The configuration that it begins with.
        """
        self._click("//a[normalize-space()='Launchpad']")
        return self._wait(self._config)

    def open_job(self, job: str) -> str:
        """Open a job.

        Returns:
            What is said of it.
        """
        self._open(f"/locations/{LOCATION}/jobs/{job}")
        title = "//*[normalize-space(text())='Description']"
        return self._find(
            f"{title}/following::*[contains(@class, 'Markdown') or self::p][1]/ancestor::div[1]"
        ).text

    def type_config(self, text: str) -> None:
        """Put other text in place of the launchpad's, as one pastes it."""
        self._click("//*[contains(@class, 'CodeMirror-lines')]")
        ActionChains(self._driver).key_down(Keys.CONTROL).send_keys("a").key_up(Keys.CONTROL).perform()
        self._driver.execute_cdp_cmd("Input.insertText", {"text": text})
        self._wait(lambda driver: self._config(driver) == text)

    def launch_run(self) -> str:
        """Launch what the launchpad says.

        Returns:
            The run's id.
        """
        self._click(self._button("Launch Run"))
        return _run_id(
            self._wait(lambda driver: driver.current_url if "/runs/" in driver.current_url else None)
        )

    @staticmethod
    def _config(driver: WebDriver) -> str:
        return str(driver.execute_script(_CONFIG) or "")

    # Runs, jobs, checks

    def wait_for_end(self, run: str) -> str:
        """Wait until a run has ended, and open its page.

        Returns:
            How it ended, such as ``Success``.
        """
        # The page of a run that goes on is drawn all the time.
        self._driver.get("about:blank")
        self._wait(lambda _: self._status(run) in _ENDED, _MOMENT)
        self._open(f"/runs/{run}")
        ends = ("Success", "Failure", "Canceled")
        named = " or ".join(f"normalize-space(text())='{end}'" for end in ends)

        def ended(driver: WebDriver) -> str | None:
            # The page hears of a run's end in two ways, and for a moment goes back to the slower one's "Started".
            found = self._still(
                lambda: [
                    e.text
                    for e in driver.find_elements(By.XPATH, f"//*[contains(@class, 'BaseTag')]//*[{named}]")
                ]
            )
            return next((text for text in found if text in ends), None)

        outcome = self._wait(ended)
        assert outcome is not None
        return outcome

    def _status(self, run: str) -> str:
        answer = self._asking.post(
            f"{self._address}/graphql", json={"query": _STATUS, "variables": {"run": run}}, timeout=TIMEOUT
        )
        answer.raise_for_status()
        return str(answer.json()["data"]["runOrError"]["status"])

    def open_runs(self) -> None:
        """Open the list of runs."""
        self._open("/runs")
        self._find("//a[contains(@href, '/runs/')]")

    def jobs(self) -> list[str]:
        """The jobs on their page."""
        self._open("/jobs")
        links = "//a[contains(@href, '/jobs/')]"
        self._find(links)
        return self._still(
            lambda: [link.text for link in self._driver.find_elements(By.XPATH, links) if link.text]
        )

    def open_check(self, asset: str, check: str) -> str:
        """Open a check of an asset.

        Returns:
            The result of its latest evaluation, such as ``Passed``.
        """
        self._open(f"/assets/{asset}?view=checks&checkDetail={quote(check)}")
        label = "//*[normalize-space(text())='Evaluation result']"
        return self._find(f"{label}/following::*[contains(@class, 'BaseTag')][1]").text

    # Underneath

    def _open(self, path: str) -> None:
        self._driver.get(self._address + path)

    def _button(self, words: str) -> str:
        return f"//button[contains(normalize-space(), '{words}')]"

    def _wait(self, look: Callable[[WebDriver], T], pause: float = _BLINK) -> T:
        wait = WebDriverWait(self._driver, TIMEOUT, poll_frequency=pause, ignored_exceptions=_PASSING)
        # Typed for what is found, which is never false: an empty list or a missing element is waited for.
        found: Any = wait.until(look)
        return found  # type: ignore[no-any-return]

    def _still(self, look: Callable[[], T], looks: int = 2) -> T:
        """Wait until some looks in a row see the same: pages move while they are laid out."""
        seen: list[T] = []

        def same(_: WebDriver) -> bool:
            seen.append(look())
            return len(seen) >= looks and all(one == seen[-1] for one in seen[-looks:])

        self._wait(same)
        return seen[-1]

    def _find(self, xpath: str) -> WebElement:
        def visible(driver: WebDriver) -> WebElement | None:
            return next((e for e in driver.find_elements(By.XPATH, xpath) if e.is_displayed()), None)

        found = self._wait(visible)
        assert found is not None
        return found

    def _click(self, xpath: str) -> None:
        def clicked(driver: WebDriver) -> bool:
            element = driver.find_element(By.XPATH, xpath)
            if not element.is_enabled():
                return False
            element.click()
            return True

        self._wait(clicked)

    def _graph(self, kind: str) -> dict[str, Box]:
        nodes: list[dict[str, Any]] = self._driver.execute_script(_GRAPH)
        return {
            node["name"]: Box(node["left"], node["top"], node["right"], node["bottom"])
            for node in nodes
            if node["kind"] == kind
        }

    @staticmethod
    def _box(element: WebElement) -> Box:
        place = element.rect
        return Box(place["x"], place["y"], place["x"] + place["width"], place["y"] + place["height"])


def _run_id(address: str | None) -> str:
    return urlsplit(address or "").path.rpartition("/")[2]
