"""How long a table takes, what it writes and what bounds it, from a thousand rows to ten billion.

    python benchmarks/sizing.py [--results benchmarks/results/backfill.json]

The model is the machine-repairman's (a closed network with one queue, solved exactly by mean value analysis: Reiser and
Lavenberg, "Mean-Value Analysis of Closed Multichain Queuing Networks", J. ACM 27(2), 1980). Each worker goes round and
round: a row takes some time on the worker's own processor (reading off the wire, encrypting, sending), and then some
time of the server, for which workers queue. Its two parameters are measured, not fitted: the processor time of a worker
per row, and the time per row of the server alone (the benchmark's floor). What the model says about one and two workers
is held against what was measured, and the difference is printed.

What it says beyond two workers, and beyond a million rows, is a calculation. Where a limit is somebody's else to know
(write-ahead log per second, a replica's speed), it is a parameter, and the table names the one that binds.
`docs/sizing.md` shows the output; a test compares them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

DAY = 86_400.0
MIB = 1 << 20
MOST_MESSAGES = 2**32


@dataclass(frozen=True)
class Constants:
    """What was measured, per row of a table like `trades`: five columns to encrypt, four indexes.

    Args:
        server_us: of the server alone, in microseconds: the floor of `make bench`, 200,000 rows.
        worker_us: processor time of a worker, in microseconds.
        verified_us: time of a verification by one worker, in microseconds.
        wal_bytes: write-ahead log, full-page images included.
        growth_bytes: what table, TOAST and indexes grow by, without a vacuum meanwhile: the old row versions are there
            still. (Before: 400 bytes a row, indexes included.)
        index_growth: how much longer the server takes for a row of a table five times as large, as a share: what the
            floor of 1,000,000 rows (48,000 a second) took longer than that of 200,000 (54,000).
        same_key: columns that share a context, and with it a derived key.
        points: measured rates, by number of workers.
    """

    server_us: float = 1e6 / 54_000
    worker_us: float = 11.3
    verified_us: float = 32.0
    wal_bytes: int = 2_113
    growth_bytes: int = 1_480
    index_growth: float = 0.125
    same_key: int = 3
    points: tuple[tuple[int, int], ...] = ((1, 35_000), (2, 52_000))


@dataclass(frozen=True)
class Limits:
    """What the target may be burdened with.

    Args:
        lanes: how many sessions the server works for at once without one slowing another: half its processors.
        wal_mib: write-ahead log it may write for us, in MiB a second (setting `max_wal_mib_per_second`).
        replica_mib: what its slowest replica replays, in MiB a second, the application's own share taken off.
    """

    lanes: int = 1
    wal_mib: float = math.inf
    replica_mib: float = math.inf


@dataclass(frozen=True)
class Size:
    """A table to be sized, and what is recommended for it.

    Args:
        rows: of the table, over all primaries.
        workers: over all primaries.
        machines: that they run on.
        limits: of each primary.
        how: in words.
        primaries: among which the rows are divided.
    """

    rows: int
    workers: int
    machines: int
    limits: Limits
    how: str
    primaries: int = 1

    def of_one_primary(self) -> Size:
        """What each primary has to do."""
        return replace(
            self, rows=self.rows // self.primaries, workers=self.workers // self.primaries, primaries=1
        )


def rate(constants: Constants, workers: int, lanes: int = 1, rows: int = 200_000) -> float:
    """Rows a second of so many workers, by mean value analysis.

    Args:
        constants: what was measured.
        workers: backfill workers, each with a processor of its own.
        lanes: see :class:`Limits`; the queue's time is divided by it, but no row takes less than its own time
            (Seidmann's approximation of a queue with several servers).
        rows: of the table.
    """
    demand = constants.server_us * slowdown(constants, rows)
    queued, fixed = demand / lanes, demand * (lanes - 1) / lanes
    length = found = 0.0
    for number in range(1, workers + 1):
        waiting = queued * (1 + length)
        found = number / (constants.worker_us + fixed + waiting)
        length = found * waiting
    return found * 1e6


def slowdown(constants: Constants, rows: int) -> float:
    """How much longer the server takes for a row of a large table, against one of 200,000 rows."""
    return 1.0 + constants.index_growth * max(0.0, math.log(rows / 200_000, 5))


def bound(constants: Constants, size: Size) -> tuple[float, str]:
    """Rows a second, and what bounds them."""
    limits = size.limits
    by_workers = rate(constants, size.workers, limits.lanes, size.rows)
    ceiling = limits.lanes * 1e6 / (constants.server_us * slowdown(constants, size.rows))
    candidates = [
        (by_workers, "workers" if by_workers < 0.9 * ceiling else "the server"),
        (limits.wal_mib * MIB / constants.wal_bytes, "WAL"),
        (limits.replica_mib * MIB / constants.wal_bytes, "replica"),
    ]
    return min(candidates)


SERVER = Limits(lanes=4, wal_mib=200, replica_mib=80)
SIZES = (
    Size(1_000_000, 1, 1, Limits(), "the command alone"),
    Size(10_000_000, 2, 1, Limits(), "`--workers 2`"),
    Size(100_000_000, 4, 1, SERVER, "`--workers 4`, on a machine of their own"),
    Size(1_000_000_000, 8, 2, SERVER, "two machines; 256 batch ranges"),
    Size(10_000_000_000, 8, 2, SERVER, "two machines; 999 batch ranges, the table in partitions"),
    Size(10_000_000_000, 32, 8, SERVER, "four primaries, a quarter each", primaries=4),
)


def table(constants: Constants) -> list[str]:
    """The table of sizes, as Markdown."""
    lines = [
        "| rows | workers, machines | rows/s | bounded by | backfill | verification | WAL | more disk | keys | how |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        part = size.of_one_primary()
        found, reason = bound(constants, part)
        verified = part.workers * 1e6 / constants.verified_us
        cells = (
            *(f"{size.rows:,}", f"{size.workers}, {size.machines}", f"{found * size.primaries:,.0f}", reason),
            *(span(part.rows / found), span(part.rows / verified)),
            *(volume(size.rows * each) for each in (constants.wal_bytes, constants.growth_bytes)),
            f"{size.primaries * keys(constants, part.rows)}",
            size.how,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def keys(constants: Constants, rows: int) -> int:
    """Key versions that so many rows of one database take: none may encrypt more than 2^32 values of a context."""
    return math.ceil(rows * constants.same_key / MOST_MESSAGES)


def fit(constants: Constants) -> list[str]:
    """What the model says about what was measured."""
    lines = ["| workers | measured, rows/s | the model, rows/s | difference |", "|---|---|---|---|"]
    for workers, measured in constants.points:
        said = rate(constants, workers)
        lines.append(f"| {workers} | {measured:,} | {said:,.0f} | {said / measured - 1:+.0%} |")
    return lines


def scaling(constants: Constants) -> list[str]:
    """Rates by workers and lanes."""
    lanes = (1, 2, 4, 8)
    lines = [
        "| workers | " + " | ".join(f"{n} lane{'s' if n > 1 else ''}" for n in lanes) + " |",
        "|---|" + "---|" * len(lanes),
    ]
    for workers in (1, 2, 4, 8, 16):
        cells = (f"{rate(constants, workers, n):,.0f}" for n in lanes)
        lines.append(f"| {workers} | " + " | ".join(cells) + " |")
    ceilings = (f"{n * 1e6 / constants.server_us:,.0f}" for n in lanes)
    return [*lines, "| the server's ceiling | " + " | ".join(ceilings) + " |"]


def wal_limits(constants: Constants) -> list[str]:
    """What a bound on the write-ahead log, or a replica, leaves."""
    lines = ["| MiB of WAL a second | rows/s | a billion rows |", "|---|---|---|"]
    for mib in (10, 25, 50, 100, 200):
        found = mib * MIB / constants.wal_bytes
        lines.append(f"| {mib} | {found:,.0f} | {span(1e9 / found)} |")
    return lines


def span(seconds: float) -> str:
    """A duration, to two figures or so."""
    for unit, length in (("days", DAY), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def volume(count: float) -> str:
    """Bytes, in units of 1,000."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def read_constants(path: Path) -> Constants:
    """The constants of another machine, from what `make bench` has left there."""
    results = json.loads(path.read_text(encoding="utf-8"))
    rows = min(s["rows"] for s in results["summaries"] if s["phase"] == "engine")
    by_phase = {s["phase"]: s for s in results["summaries"] if s["rows"] == rows}
    spent = [m for m in results["measures"] if m["phase"] == "engine" and m["rows"] == rows]
    one, two, floor = (by_phase[name] for name in ("engine", "engine, 2 workers", "floor"))
    return replace(
        Constants(),
        server_us=floor["microseconds_per_row"],
        worker_us=sorted(1e6 * m["cpu_seconds"] / m["rows"] for m in spent)[len(spent) // 2],
        wal_bytes=round(one["wal_bytes_per_row"]),
        points=(
            (1, round(1e6 / one["microseconds_per_row"])),
            (2, round(1e6 / two["microseconds_per_row"])),
        ),
    )


def report(constants: Constants) -> str:
    """Everything, as it stands in the manual."""
    parts = [
        ("How well the model fits", fit(constants)),
        ("Workers", scaling(constants)),
        ("WAL and replicas", wal_limits(constants)),
        ("By size", table(constants)),
    ]
    return "\n\n".join(f"{title}\n\n" + "\n".join(lines) for title, lines in parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description="Size a migration.")
    parser.add_argument(
        "--results", type=Path, help="constants of this machine, as `make bench` has left them"
    )
    options = parser.parse_args(arguments)
    print(report(read_constants(options.results) if options.results else Constants()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
