"""The README's pictures: ``python -m alphapulse_encryption_tests.browser.screenshots DIRECTORY``."""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Iterator
from pathlib import Path

from alphapulse_encryption_tests.browser import launchpad
from alphapulse_encryption_tests.browser.chromium import Programs, find_programs, open_browser
from alphapulse_encryption_tests.browser.demonstration import demonstration
from alphapulse_encryption_tests.browser.pages import Pages

WIDTH, HEIGHT = 1600, 1000
# The graph is wide and low.
GRAPH_HEIGHT = 640
REPORT_HEIGHT = 1300


def graph(pages: Pages) -> Iterator[tuple[str, bytes]]:
    """The picture of the graph, with its name."""
    pages.open_graph()
    pages.expand_groups()
    pages.make_room()
    yield "graph", pages.picture()


def rest(pages: Pages) -> Iterator[tuple[str, bytes]]:
    """The other pictures, by name."""
    pages.open_check("verified_table", "every_value_matches")
    yield "checks", pages.picture()
    pages.open_partitions("encrypted_data")
    pages.select_partition("03", "users")
    yield "partitions", pages.picture()
    pages.begin_to_materialize()
    yield "partition-run", pages.picture()
    pages.wait_for_end(pages.launch())
    pages.open_runs()
    yield "runs", pages.picture()


def drop_and_restore(pages: Pages) -> Iterator[tuple[str, bytes]]:
    """The pictures of docs/drop-and-restore.md, in its order."""
    table = "users"
    yield from _step(pages, "switch", "switch_to_ciphertext", launchpad.tables("switch", table))
    pages.open_partitions("verified_data")
    pages.select_table(table)
    pages.begin_to_materialize()
    pages.choose_all("batch_range")
    yield "drop-verify", pages.picture()
    pages.wait_for_end(pages.materialize("backup"))
    pages.open_asset("backup")
    yield "drop-backup", pages.picture()
    pages.open_job("approve_drop")
    yield "drop-approve-job", pages.picture()
    yield from _step(pages, "approve", "approve_drop", launchpad.approval(table, table), ended=True)
    yield from _step(pages, "drop", "drop_unencrypted", launchpad.drop(table, "Grace Example"))
    pages.open_partitions("plaintext_dropped")
    pages.select_table(table)
    yield "drop-dropped", pages.picture()
    yield from _step(pages, "erase", "erase_dropped", launchpad.erasure(table), ended=True)
    yield from _step(pages, "restore", "restore_plaintext", launchpad.tables("restore", table), ended=True)


def _step(
    pages: Pages, name: str, job: str, config: str, *, ended: bool = False
) -> Iterator[tuple[str, bytes]]:
    """A job's launchpad, filled in; then the job is run, and ``ended`` shows its end as well."""
    pages.open_launchpad(job)
    pages.type_config(config)
    yield f"drop-{name}", pages.picture()
    end = pages.wait_for_end(pages.launch_run())
    if end != "Success":
        raise RuntimeError(f"{job} ended as {end}.")
    if ended:
        yield f"drop-{name}-run", pages.picture()


# With its name and the height of its pages.
SERIES = ((graph, "graph", GRAPH_HEIGHT), (rest, "rest", HEIGHT), (drop_and_restore, "drop", HEIGHT))


def rehearsal(programs: Programs, page: Path) -> bytes:
    """The picture of a rehearsal's report: its beginning, with the verdict and the prediction."""
    with open_browser(programs, WIDTH, REPORT_HEIGHT) as driver:
        driver.get(page.resolve().as_uri())
        return base64.b64decode(driver.get_screenshot_as_base64())


def main() -> int:
    """Take the pictures on a fresh demo; or that of a report.

    Returns:
        The exit status: 2 where there is no browser.
    """
    parser = argparse.ArgumentParser(prog="make screenshots", description="Take the README's pictures.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", choices=[series for _, series, _ in SERIES], help="one series of pictures")
    parser.add_argument(
        "--rehearsal",
        type=Path,
        metavar="PAGE",
        help="nothing but the picture of this report (make rehearsal)",
    )
    options = parser.parse_args()
    directory: Path = options.directory
    programs = find_programs()
    if programs is None:
        print("There is no Chromium with its chromedriver: make browser.", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    if options.rehearsal is not None:
        picture = directory / "rehearsal.png"
        picture.write_bytes(rehearsal(programs, options.rehearsal))
        print(picture)
        return 0
    with demonstration() as demo:
        for pictures, series, height in SERIES:
            if options.only not in (None, series):
                continue
            with open_browser(programs, WIDTH, height) as driver:
                for name, png in pictures(Pages(driver, demo.address)):
                    path = directory / f"{name}.png"
                    path.write_bytes(png)
                    print(f"{path} ({len(png):,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
