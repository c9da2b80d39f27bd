"""The bounds of what an operator may ask for, which options, settings, variables and run configurations share."""

import argparse
from collections.abc import Callable

LARGEST_BATCH_SIZE = 100_000
LONGEST_BATCH_SECONDS = 60
HIGHEST_REST_RATIO = 100
MOST_WORKERS = 16
# Range names have a fixed width, and a grid of tables x ranges has to stay readable.
MOST_BATCH_RANGES = 999


def whole_number(least: int, most: int, what: str = "") -> Callable[[str], int]:
    """The type of an option that takes one; ``what`` it has to be, for people."""

    def read(text: str) -> int:
        # int() also takes other digits than ours, and refuses thousands of digits with words of its own.
        if text.isascii() and text.isdigit() and len(text) <= len(str(most)) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"must be {what or f'a whole number from {least} to {most}'}")

    return read
