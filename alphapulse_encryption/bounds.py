"""The bounds of what an operator may ask for, which options, settings, variables and run configurations share."""

LARGEST_BATCH_SIZE = 100_000
LONGEST_BATCH_SECONDS = 60
HIGHEST_REST_RATIO = 100
MOST_WORKERS = 16
# Range names have a fixed width, and a grid of tables x ranges has to stay readable.
MOST_BATCH_RANGES = 999
