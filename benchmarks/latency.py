"""What the application notices of a backfill: its slowest requests before, during and after, in one run.

    python benchmarks/latency.py [--rows 50000] [--rate 50] [--rounds 3] [--rest-ratio 2] [--check]

A PostgreSQL server of the benchmark's own, with fsync on, holds the sample. Each round takes a fresh copy of it, lets
the rehearsal's traffic run for a while, then beside the engine while that encrypts all five tables with one worker,
then for a while after it. The engine rests as in rehearsals (--rest-ratio 0: not at all). Old and new instances of the
application are at work side by side (phases off and plaintext, and plain SQL), as they are while production is
encrypted. Latency counts from when a request was due.

With --check the exit status is 1 if p99 during the backfill is not below 3 times that before it, or if a request failed
or was answered wrongly.
"""

from __future__ import annotations

import argparse
import base64
import itertools
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import psycopg
from psycopg.sql import SQL, Identifier

from alphapulse_encryption.catalogue import load_catalogue
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.rehearsal.config import REST_RATIO
from alphapulse_encryption.rehearsal.measures import Traffic
from alphapulse_encryption.rehearsal.traffic.traffic import TrafficConfig, traffic
from alphapulse_encryption.sample.database import load_sample
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

# The requirement.
MOST_TIMES_BEFORE = 3.0

RANGES = 16
MASTER_KEY = bytes(range(32))
KEYS = KeyRing({1: MASTER_KEY}, 1)
ENVIRONMENT = {"ALPHAPULSE_ENCRYPTION_MASTER_KEY": base64.b64encode(MASTER_KEY).decode()}
ACTOR = Actor("benchmark")
CATALOGUE = load_catalogue()
PARTS = ("before", "during", "after")
TEMPLATE = "loaded"


class Part(NamedTuple):
    """One part of a round.

    Args:
        seconds: its length.
        traffic: what was measured meanwhile.
    """

    seconds: float
    traffic: Traffic


def encrypt(url: str, pace: Pace) -> None:
    """The backfill of everything, by one worker."""
    target = Target.of(Database(url), CATALOGUE, KEYS, ACTOR)
    with Sessions(target) as sessions:
        for table in CATALOGUE.tables:
            for number, following in itertools.zip_longest(range(RANGES), range(1, RANGES)):
                backfill_range(
                    target,
                    table,
                    number,
                    pace=pace,
                    sessions=sessions,
                    following=following,
                )


def watched(url: str, rate: float, seed: int, work: Callable[[], None]) -> Part:
    """The traffic beside some work."""
    config = TrafficConfig(rate=rate, seed=seed)
    with traffic(url, CATALOGUE, ("off", "plaintext"), config, ENVIRONMENT) as running:
        began = time.monotonic()
        work()
        seconds = time.monotonic() - began
    measured = running.measured
    if measured is None:
        raise SystemExit("Without traffic there is nothing to measure: --rate has to be more than 0.")
    return Part(seconds, measured)


def round_of(server: EmbeddedPostgres, number: int, options: argparse.Namespace) -> dict[str, Part]:
    """One round, on a fresh copy."""
    name = f"round_{number}"
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        statement = SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        connection.execute(statement.format(Identifier(name), Identifier(TEMPLATE)))
    url = server.url(name)
    pace = Pace(
        batch_size=options.batch_size, target_seconds=options.target_seconds, rest_ratio=options.rest_ratio
    )
    works: dict[str, Callable[[], None]] = {
        "before": lambda: time.sleep(options.seconds),
        "during": lambda: encrypt(url, pace),
        "after": lambda: time.sleep(options.seconds),
    }
    found = {part: watched(url, options.rate, number, work) for part, work in works.items()}
    with psycopg.connect(server.url("postgres"), autocommit=True) as connection:
        connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))
    return found


def show(number: int, parts: dict[str, Part]) -> None:
    """A line for each part of a round."""
    for name, part in parts.items():
        overall = part.traffic.overall
        print(
            f"{number:5d}  {name:<7} {part.seconds:6.1f} s {overall.requests:6d} requests   "
            f"p50 {overall.p50:7.1f}  p95 {overall.p95:7.1f}  p99 {overall.p99:7.1f}  "
            f"longest {overall.longest:7.1f} ms   {overall.errors} failed, {overall.wrong_answers} wrong"
            + "".join(f", {number} {kind}" for kind, number in part.traffic.error_kinds.items()),
            flush=True,
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show; the exit status says whether the requirement is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=50_000, help="of the sample")
    parser.add_argument("--rate", type=float, default=50, help="requests per second")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15, help="length of the parts before and after")
    parser.add_argument(
        "--rest-ratio", type=float, default=REST_RATIO, help="of the engine; as rehearsals do"
    )
    parser.add_argument("--target-seconds", type=float, default=None, help="of a batch")
    parser.add_argument("--batch-size", type=int, default=None, help="rows of a batch")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the requirement is not met")
    options = parser.parse_args(arguments)

    directory = Path(tempfile.mkdtemp(prefix="alphapulse-latency-"))
    try:
        with EmbeddedPostgres(directory / "postgres") as server:
            server.ensure_database(TEMPLATE)
            load_sample(server.url(TEMPLATE), rows=options.rows)
            for table in CATALOGUE.tables:
                add_encrypted_columns(
                    Target.of(Database(server.url(TEMPLATE)), CATALOGUE, KEYS, ACTOR),
                    table,
                    batch_ranges=RANGES,
                )
            with psycopg.connect(server.url(TEMPLATE), autocommit=True) as connection:
                connection.execute("VACUUM ANALYZE")
                connection.execute("CHECKPOINT")
            rounds = []
            for number in range(1, options.rounds + 1):
                rounds.append(round_of(server, number, options))
                show(number, rounds[-1])
    finally:
        shutil.rmtree(directory, ignore_errors=True)

    p99 = {part: statistics.median(one[part].traffic.overall.p99 for one in rounds) for part in PARTS}
    times = p99["during"] / p99["before"]
    failed = sum(
        p.traffic.overall.errors + p.traffic.overall.wrong_answers for o in rounds for p in o.values()
    )
    print(
        f"\nMedian p99: before {p99['before']:.1f} ms, during {p99['during']:.1f} ms, after {p99['after']:.1f} ms. "
        f"During the backfill it is {times:.2f} times that before it (less than {MOST_TIMES_BEFORE:g} is required); "
        f"{failed} requests failed or were answered wrongly."
    )
    return 1 if options.check and (times >= MOST_TIMES_BEFORE or failed) else 0


if __name__ == "__main__":
    sys.exit(main())
