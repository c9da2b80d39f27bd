"""The README's pictures: ``python -m alphapulse_encryption_tests.browser.screenshots DIRECTORY``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from alphapulse_encryption_tests.browser.chromium import find_programs, open_browser
from alphapulse_encryption_tests.browser.demonstration import demonstration
from alphapulse_encryption_tests.browser.pages import Pages

WIDTH, HEIGHT = 1600, 1000
# The graph is wide and low.
GRAPH_HEIGHT = 640


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


def main() -> int:
    """Take the pictures on a fresh demo.

    Returns:
        The exit status: 2 where there is no browser.
    """
    parser = argparse.ArgumentParser(prog="make screenshots", description="Take the README's pictures.")
    parser.add_argument("directory", type=Path)
    directory: Path = parser.parse_args().directory
    programs = find_programs()
    if programs is None:
        print("There is no Chromium with its chromedriver: make browser.", file=sys.stderr)
        return 2
    directory.mkdir(parents=True, exist_ok=True)
    with demonstration() as demo:
        for height, pictures in ((GRAPH_HEIGHT, graph), (HEIGHT, rest)):
            with open_browser(programs, WIDTH, height) as driver:
                for name, png in pictures(Pages(driver, demo.address)):
                    path = directory / f"{name}.png"
                    path.write_bytes(png)
                    print(f"{path} ({len(png):,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
