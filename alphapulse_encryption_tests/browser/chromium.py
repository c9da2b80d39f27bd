"""A headless Chromium, and whether there is one.

``python -m alphapulse_encryption_tests.browser.chromium`` ends with 0 where there is, else with 1.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DRIVER = "chromedriver"

_ARGUMENTS = (
    "--headless=new",
    # In containers there is neither a sandbox for root nor a large /dev/shm. Only our own pages are opened.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--force-device-scale-factor=1",
    "--lang=en-US",
)
# What pages keep in a browser; what a tab keeps ends with it.
_KEPT_OF_A_VISIT = "cookies,local_storage,indexeddb,cache_storage,service_workers"


@dataclass(frozen=True)
class Programs:
    """Paths of a browser and of the driver made for it."""

    browser: str
    driver: str


def find_programs() -> Programs | None:
    """The first browser on the PATH that runs and has the version of the driver there; None without one."""
    driver = shutil.which(DRIVER)
    version = _major_version(driver) if driver else None
    if driver is None or version is None:
        return None
    for name in BROWSERS:
        browser = shutil.which(name)
        # A driver refuses other versions. Ubuntu's chromium-browser is only a note that it is elsewhere.
        if browser and _major_version(browser) == version:
            return Programs(browser, driver)
    return None


def _major_version(program: str) -> str | None:
    try:
        done = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    found = re.search(r"\b(\d+)(?:\.\d+){2,}", done.stdout) if done.returncode == 0 else None
    return found[1] if found else None


@contextlib.contextmanager
def open_browser(programs: Programs, width: int, height: int, *more: str) -> Iterator[webdriver.Chrome]:
    """A browser of its own, with an empty profile, closed afterwards.

    Args:
        programs: what :func:`find_programs` found.
        width: of the page, in pixels.
        height: of the page, in pixels.
        more: arguments of the browser.
    """
    with tempfile.TemporaryDirectory(prefix="alphapulse-browser-", ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = programs.browser
        for argument in (*_ARGUMENTS, *more, f"--user-data-dir={profile}"):
            options.add_argument(argument)
        # Dagster shows times in the browser's time zone.
        service = Service(programs.driver, env={**os.environ, "TZ": "UTC"})
        with _no_proxy():
            driver = webdriver.Chrome(options=options, service=service)
        try:
            set_size(driver, width, height)
            yield driver
        finally:
            driver.quit()


def set_size(driver: webdriver.Chrome, width: int, height: int) -> None:
    """Give the page a size in pixels: that of a headless window includes a title bar that nobody sees."""
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
    )


def begin_anew(driver: webdriver.Chrome, address: str, width: int, height: int) -> None:
    """Make the browser one that has never been at an address, except that it need not load its files again.

    Args:
        driver: the browser; it has one new tab afterwards.
        address: scheme, host and port.
        width: of the page, in pixels.
        height: of the page, in pixels.
    """
    before = driver.window_handles
    driver.switch_to.new_window("tab")
    (new,) = set(driver.window_handles) - set(before)
    for handle in before:
        driver.switch_to.window(handle)
        driver.close()
    driver.switch_to.window(new)
    driver.execute_cdp_cmd(
        "Storage.clearDataForOrigin", {"origin": address, "storageTypes": _KEPT_OF_A_VISIT}
    )
    set_size(driver, width, height)


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    # Selenium asks the environment how to reach the driver, which is on this machine, and nothing else.
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        if before is None:
            del os.environ["no_proxy"]
        else:
            os.environ["no_proxy"] = before


if __name__ == "__main__":
    sys.exit(find_programs() is None)
