"""How close the backfill comes to the limit of the machine, and how far it is from row-at-a-time loops.

    python benchmarks/backfill.py [--rows 200000 1000000] [--rounds 3] [--check]

Everything is measured in one run, on a PostgreSQL server of the benchmark's own, each phase on an identical
fresh copy of a table like `trades` with five columns to encrypt, in a process of its own:

- floor: the server alone. UPDATE with constants as long as the ciphertexts, over the very batches of the
  engine, without guard and bookkeeping. No backfill can be faster.
- engine: `backfill_range` over all batch ranges, in one process, and in two on disjoint ranges.
- guide: the procedure of the guide. Per column, a batch of pending values, each encrypted with a Cipher object
  and json.dumps, each written by an UPDATE of its own, and a commit per batch.
- orm: SQLAlchemy with `sqlalchemy-utils`' StringEncryptedType, objects loaded and flushed in batches.

The table has the indexes of the sample's `trades`, which every UPDATE has to keep up, and has grown as a record of
trades does: positions and the exchange's order numbers come in the order of time. What floor and engine take on two
other tables is shown as well: where order numbers and positions are random ("scattered"), every row changes pages all
over two indexes, which costs the server the more, the larger they are; and where there is no index but the primary
key ("key alone"), what is left is encrypting above all.

Floor and engine take turns over several rounds; the table shows the median and the spread. Numbers, table and
plot go to `benchmarks/results/`. With --check the exit status is 1 if a requirement is not met.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Literal

from alphapulse_encryption.catalogue import Catalogue, Column, Table
from alphapulse_encryption.crypto.envelope import AES_256_GCM, get_format
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.migration.postgres.database import Actor, Database
from alphapulse_encryption.migration.rows.backfill import backfill_range
from alphapulse_encryption.migration.rows.engine import Pace, Progress
from alphapulse_encryption.migration.rows.sessions import Sessions
from alphapulse_encryption.migration.steps.columns import add_encrypted_columns
from alphapulse_encryption.migration.target import Target
from alphapulse_encryption.sample.postgres import EmbeddedPostgres

RESULTS = Path(__file__).parent / "results"

# Of a small production server; whatever concerns safety is PostgreSQL's default: fsync, full_page_writes and
# synchronous_commit are on.
SETTINGS = {
    "shared_buffers": "2GB",
    "max_wal_size": "8GB",
    "checkpoint_timeout": "15min",
    "maintenance_work_mem": "256MB",
}
SHOWN_SETTINGS = ("server_version", "fsync", "full_page_writes", "synchronous_commit", "wal_level", *SETTINGS)

# The requirements, which --check turns into an exit status.
MOST_TIMES_FLOOR = 1.6
LEAST_TIMES_GUIDE = 30
MOST_GROWTH = 0.15
MOST_BYTES = 200 * 10**6

SLOW_ROWS = 20_000
SLOW_BATCH = 500  # the guide's example
RANGES = 16
# What a phase is called on a table that differs from the one the requirements are about.
KEY_ALONE = ", key alone"
SCATTERED = ", scattered"

TABLE = Table(
    name="trades",
    columns=(
        Column(name="quantity", context="trade_execution"),
        Column(name="price", context="trade_execution"),
        Column(name="fee", context="trade_execution"),
        Column(name="order_id", context="trade_order"),
        Column(name="execution_details", context="trade_details"),
    ),
)
KEYS = KeyRing({1: bytes(range(32))}, 1)
ACTOR = Actor("benchmark")

# The sample's table with its checks and, built after the rows, its indexes.
CREATE_TABLE = """
CREATE TABLE trades (
    id bigint PRIMARY KEY, account_id bigint NOT NULL, position_id bigint, symbol varchar(32) NOT NULL,
    side varchar(8) NOT NULL CHECK (side IN ('buy', 'sell')),
    order_type varchar(16) NOT NULL CHECK (order_type IN ('market', 'limit', 'stop')), order_id text NOT NULL,
    quantity numeric(28, 10) NOT NULL, price numeric NOT NULL, fee numeric(28, 10),
    fee_currency varchar(8) NOT NULL, execution_details json, executed_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL) WITH (autovacuum_enabled = off)
"""
FILL_TABLE = """
INSERT INTO trades
SELECT i, i %% 997, {position}, (ARRAY['AAPL', 'BTC/USDT', 'EUR/USD'])[1 + i %% 3], (ARRAY['buy', 'sell'])[1 + i %% 2],
       'limit', {order}, (hash %% 100000000000)::numeric / 1000000,
       (hash %% 999999937)::numeric / 10000, (hash %% 9999991)::numeric / 1000000, 'USD',
       json_build_object('venue', 'XNAS', 'latency_us', hash %% 500000, 'maker', hash %% 2 = 1, 'fills',
           json_build_array(json_build_object('qty', (hash %% 1000000 / 1000.0)::text, 'seq', i))),
       t, t, t
  FROM generate_series(1, %s) AS i,
       LATERAL (SELECT hashint8extended(i, 7) & 9223372036854775807) AS h (hash),
       LATERAL (SELECT timestamptz '2024-01-01 00:00Z' + make_interval(secs => i)) AS m (t)
"""
IN_ORDER = {"position": "i / 6", "order": "'ord-' || lpad(i::text, 20, '0')"}
AT_RANDOM = {"position": "i %% 4999", "order": "'ord-' || left(md5('order ' || i), 20)"}
CREATE_INDEXES = """
CREATE INDEX ON trades (account_id, executed_at);
CREATE INDEX ON trades (position_id);
CREATE INDEX ON trades (order_id);
"""


# The workers: what is measured. Each is called in a process of its own, says when it is ready, and times itself.


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Args:
        url: the copy of the database.
        rows: rows of the table.
        ranges: the engine's batch ranges.
        batches: sizes of the floor's batches, in key order.
        constants: column and length of its constant, for the floor.
        batch_size: a fixed batch size for the engine.
    """

    url: str
    rows: int
    ranges: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    constants: tuple[tuple[str, int], ...] = ()
    batch_size: int | None = None


def floor(job: Job) -> list[int]:
    """The server alone: constants, over given batches."""
    with psycopg.connect(job.url, autocommit=True) as connection:
        update = SQL("UPDATE trades SET {} WHERE id > {} AND id <= {}").format(
            SQL(", ").join(
                SQL("{} = {}").format(Identifier(name), Literal("x" * length))
                for name, length in job.constants
            ),
            SQL("%s"),
            SQL("%s"),
        )
        last = 0
        for size in job.batches:
            if connection.execute(update, [last, last + size]).rowcount != size:
                raise SystemExit("The floor's batches do not fit the table.")
            last += size
        if last != job.rows:
            raise SystemExit("The floor's batches do not cover the table.")
    return list(job.batches)


def engine(job: Job) -> list[int]:
    """Our engine, over some of the batch ranges."""
    batches: list[int] = []
    cipher = get_format(AES_256_GCM, KEYS)
    pace = Pace(batch_size=job.batch_size)
    database = Database(job.url)
    target = Target(database, Catalogue(tables=(TABLE,)), cipher, KEYS, ACTOR)
    with Sessions(target) as sessions:
        for number, following in itertools.zip_longest(job.ranges, job.ranges[1:]):
            before = 0

            def note(progress: Progress) -> None:
                nonlocal before
                batches.append(progress.rows - before)
                before = progress.rows

            backfill_range(
                target,
                TABLE,
                number,
                pace=pace,
                on_progress=note,
                sessions=sessions,
                following=following,
            )
    return batches


def guide(job: Job) -> list[int]:
    """The guide's procedure, as AlphaPulse's application does it."""
    import base64

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    def encrypt(value: str, context: str) -> str:
        iv = os.urandom(12)
        encryptor = Cipher(algorithms.AES(KEYS.derive(context, 1)), modes.GCM(iv)).encryptor()
        ciphertext = encryptor.update(value.encode()) + encryptor.finalize()
        return json.dumps(
            {
                "ciphertext": base64.b64encode(iv + encryptor.tag + ciphertext).decode(),
                "key_version": 1,
                "context": context,
                "algorithm": AES_256_GCM,
            }
        )

    batches = []
    with psycopg.connect(job.url) as connection:
        for column in TABLE.columns:
            name, encrypted = Identifier(column.name), Identifier(column.encrypted)
            select = SQL(
                "SELECT id, {}::text FROM trades WHERE {} IS NOT NULL AND {} IS NULL LIMIT {}"
            ).format(name, name, encrypted, Literal(SLOW_BATCH))
            update = SQL("UPDATE trades SET {} = {} WHERE id = {}").format(encrypted, SQL("%s"), SQL("%s"))
            while rows := connection.execute(select).fetchall():
                for key, value in rows:
                    connection.execute(update, [encrypt(value, column.context), key])
                connection.commit()
                batches.append(len(rows))
    return batches


def orm(job: Job) -> list[int]:
    """SQLAlchemy objects with encrypted types of `sqlalchemy-utils`."""
    from sqlalchemy import BigInteger, Text, create_engine, select
    from sqlalchemy.orm import DeclarativeBase, Session, mapped_column
    from sqlalchemy_utils import StringEncryptedType
    from sqlalchemy_utils.types.encrypted.encrypted_type import AesGcmEngine

    class Base(DeclarativeBase):
        pass

    members: dict[str, Any] = {
        "__tablename__": TABLE.name,
        "id": mapped_column(BigInteger, primary_key=True),
    }
    for column in TABLE.columns:
        members[column.name] = mapped_column(Text)
        members[column.encrypted] = mapped_column(
            StringEncryptedType(Text, "a key of the benchmark", AesGcmEngine)
        )
    trades: Any = type("Trade", (Base,), members)
    batches = []
    address = job.url.replace("postgresql:", "postgresql+psycopg:", 1)
    with Session(create_engine(address)) as session:
        last = 0
        while objects := session.scalars(
            select(trades).where(trades.id > last).order_by(trades.id).limit(SLOW_BATCH)
        ).all():
            last = objects[-1].id
            for trade in objects:
                for column in TABLE.columns:
                    value = getattr(trade, column.name)
                    setattr(trade, column.encrypted, None if value is None else str(value))
            session.commit()
            session.expunge_all()
            batches.append(len(objects))
    return batches


WORKERS: dict[str, Callable[[Job], list[int]]] = {f.__name__: f for f in (floor, engine, guide, orm)}


def work(name: str) -> None:
    """The main function of a worker's process: job and start signal on stdin, the outcome on stdout."""
    raw = json.loads(sys.stdin.readline())
    job = Job(
        url=raw["url"],
        rows=raw["rows"],
        ranges=tuple(raw["ranges"]),
        batches=tuple(raw["batches"]),
        constants=tuple((column, length) for column, length in raw["constants"]),
        batch_size=raw["batch_size"],
    )
    print("ready", flush=True)
    sys.stdin.readline()
    cpu, began = time.process_time(), time.monotonic()
    batches = WORKERS[name](job)
    ended = time.monotonic()
    # Kilobytes on Linux, bytes on macOS (getrusage(2)).
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    outcome = {"began": began, "ended": ended, "cpu": time.process_time() - cpu, "peak": peak}
    print(json.dumps({**outcome, "batches": batches}), flush=True)


# The measuring side.


@dataclass(frozen=True)
class Measure:
    """One phase, measured once.

    Args:
        phase: its name.
        rows: rows of the table.
        round: number of the round.
        seconds: from the first worker's start to the last one's end.
        batches: rows per batch, of all workers.
        wal_bytes: what was written to the write-ahead log.
        peak_bytes: the largest resident set of any worker.
        cpu_seconds: processor time of the workers, the server's not included.
    """

    phase: str
    rows: int
    round: int
    seconds: float
    batches: list[int] = field(repr=False)
    wal_bytes: int
    peak_bytes: int
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.rows / self.seconds


class Bench:
    """A server of its own, with a template database for each size of the table."""

    def __init__(self, server: EmbeddedPostgres) -> None:
        self._server = server
        self._control = psycopg.connect(server.url("postgres"), autocommit=True)
        self._templates: set[str] = set()

    def settings(self) -> dict[str, str]:
        """The settings that the numbers depend on."""
        rows = self._control.execute(
            "SELECT name, current_setting(name) FROM unnest(%s::text[]) AS name", [list(SHOWN_SETTINGS)]
        )
        return dict(rows.fetchall())

    @contextlib.contextmanager
    def fresh(self, rows: int, *, guarded: bool, variant: str = "") -> Iterator[str]:
        """A fresh copy of the table with its encrypted columns, the caches written out; removed afterwards.

        Args:
            rows: of the table.
            guarded: with guard and bookkeeping, or with nothing but the columns.
            variant: which table; see above.
        """
        template, name = self._template(rows, variant), "measured"
        self._control.execute(
            SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy").format(
                Identifier(name), Identifier(template)
            )
        )
        url = self._server.url(name)
        try:
            if guarded:
                add_encrypted_columns(
                    Target.of(Database(url), Catalogue(tables=(TABLE,)), KEYS, ACTOR),
                    TABLE,
                    batch_ranges=RANGES,
                )
            else:
                with psycopg.connect(url) as connection:
                    for column in TABLE.columns:
                        connection.execute(
                            SQL("ALTER TABLE trades ADD COLUMN {} text").format(Identifier(column.encrypted))
                        )
            self._control.execute("CHECKPOINT")
            os.sync()
            yield url
        finally:
            self._control.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))

    def measure(self, phase: str, worker: str, jobs: Sequence[Job], round_: int) -> Measure:
        """Run workers side by side, from a common start signal, until all have ended."""
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", worker],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in jobs
        ]
        for process, job in zip(processes, jobs, strict=True):
            assert process.stdin is not None and process.stdout is not None  # noqa: S101
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            process.stdout.readline()
        before = self._wal_position()
        for process in processes:
            assert process.stdin is not None  # noqa: S101
            process.stdin.write("go\n")
            process.stdin.flush()
        outcomes = []
        for process in processes:
            output, _ = process.communicate()
            if process.returncode:
                raise SystemExit(f"A worker of the phase {phase!r} failed: exit status {process.returncode}.")
            outcomes.append(json.loads(output))
        row = self._control.execute(
            "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s::pg_lsn)::bigint", [before]
        ).fetchone()
        return Measure(
            phase=phase,
            rows=jobs[0].rows,
            round=round_,
            seconds=max(o["ended"] for o in outcomes) - min(o["began"] for o in outcomes),
            batches=[size for o in outcomes for size in o["batches"]],
            wal_bytes=row[0] if row else 0,
            peak_bytes=max(o["peak"] for o in outcomes),
            cpu_seconds=sum(o["cpu"] for o in outcomes),
        )

    def floor(
        self,
        rows: int,
        round_: int,
        like: Measure,
        constants: tuple[tuple[str, int], ...],
        *,
        variant: str = "",
    ) -> Measure:
        """The server alone, over the batches of a run of the engine."""
        with self.fresh(rows, guarded=False, variant=variant) as url:
            job = Job(url, rows, batches=tuple(like.batches), constants=constants)
            return self.measure(f"floor{variant}", "floor", [job], round_)

    def engine(
        self,
        rows: int,
        round_: int,
        *,
        workers: int = 1,
        batch_size: int | None = None,
        variant: str = "",
    ) -> tuple[Measure, tuple[tuple[str, int], ...]]:
        """The engine; also the mean length of the ciphertexts that it left in each column."""
        with self.fresh(rows, guarded=True, variant=variant) as url:
            jobs = [
                Job(url, rows, ranges=tuple(range(n, RANGES, workers)), batch_size=batch_size)
                for n in range(workers)
            ]
            name = "engine" if workers == 1 else f"engine, {workers} workers"
            measure = self.measure(name + variant, "engine", jobs, round_)
            return measure, self._check(url, rows)

    def slow(self, worker: str, rows: int) -> Measure:
        """One of the row-at-a-time procedures."""
        with self.fresh(rows, guarded=False) as url:
            measure = self.measure(worker, worker, [Job(url, rows)], 1)
            self._check(url, rows)
            return measure

    def _check(self, url: str, rows: int) -> tuple[tuple[str, int], ...]:
        """The mean lengths of the ciphertexts, having seen that none is missing."""
        lengths = []
        with psycopg.connect(url) as connection:
            for column in TABLE.columns:
                row = connection.execute(
                    SQL("SELECT count({column}), round(avg(octet_length({column})))::int FROM trades").format(
                        column=Identifier(column.encrypted)
                    )
                ).fetchone()
                if row is None or row[0] != rows:
                    raise SystemExit(f"{column.encrypted} was not filled.")
                lengths.append((column.encrypted, row[1]))
        return tuple(lengths)

    def _template(self, rows: int, variant: str) -> str:
        name = f"template_{rows}{variant}"
        if name not in self._templates:
            self._server.ensure_database(name)
            with psycopg.connect(self._server.url(name), autocommit=True) as connection:
                connection.execute(CREATE_TABLE)
                filling = FILL_TABLE.format(**AT_RANDOM if variant == SCATTERED else IN_ORDER)
                connection.execute(filling.encode(), [rows])
                if variant != KEY_ALONE:
                    connection.execute(CREATE_INDEXES)
                connection.execute("VACUUM (ANALYZE, FREEZE) trades")
            self._templates.add(name)
        return name

    def _wal_position(self) -> str:
        row = self._control.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
        return str(row[0]) if row else "0/0"


def run(bench: Bench, sizes: Sequence[int], rounds: int, batch_size: int | None) -> list[Measure]:
    """All phases; floor and engine take turns, and in every second round change their order."""
    measures: list[Measure] = []

    def note(measure: Measure) -> None:
        measures.append(measure)
        print(
            f"  {measure.phase:20} {measure.rows:>9,} rows  round {measure.round}: {measure.seconds:7.2f} s, "
            f"{measure.rate:>9,.0f} rows/s",
            flush=True,
        )

    for rows in sizes:
        like, constants = bench.engine(rows, 0, batch_size=batch_size)  # warms the machine up; not counted
        for round_ in range(1, rounds + 1):
            if round_ % 2:
                note(bench.floor(rows, round_, like, constants))
            like, constants = bench.engine(rows, round_, batch_size=batch_size)
            note(like)
            if not round_ % 2:
                note(bench.floor(rows, round_, like, constants))
            note(bench.engine(rows, round_, workers=2, batch_size=batch_size)[0])
    for variant, rows in itertools.product((SCATTERED, KEY_ALONE), sizes):
        for round_ in range(1, rounds + 1):
            like, constants = bench.engine(rows, round_, batch_size=batch_size, variant=variant)
            note(like)
            note(bench.floor(rows, round_, like, constants, variant=variant))
    for worker in ("guide", "orm"):
        note(bench.slow(worker, SLOW_ROWS))
    return measures


# The report.


@dataclass(frozen=True)
class Summary:
    """A phase at one size of the table, over all rounds; the ratio compares medians of the same size."""

    phase: str
    rows: int
    rates: tuple[float, float, float]
    times_floor: float | None
    times_guide: float
    microseconds_per_row: float
    wal_bytes_per_row: float
    peak_bytes: int
    typical_batch: int


def summarize(measures: Sequence[Measure]) -> list[Summary]:
    """Median and spread of each phase."""
    groups: dict[tuple[str, int], list[Measure]] = {}
    for measure in measures:
        groups.setdefault((measure.phase, measure.rows), []).append(measure)
    middle = {group: statistics.median(m.seconds for m in found) for group, found in groups.items()}
    by_guide = middle["guide", SLOW_ROWS] / SLOW_ROWS
    summaries = []
    for (phase, rows), found in groups.items():
        rates = sorted(m.rate for m in found)
        against = middle.get(("floor" + _variant(phase), rows))
        summaries.append(
            Summary(
                phase=phase,
                rows=rows,
                rates=(rates[0], statistics.median(rates), rates[-1]),
                times_floor=middle[phase, rows] / against if against else None,
                times_guide=by_guide / (middle[phase, rows] / rows),
                microseconds_per_row=middle[phase, rows] / rows * 1e6,
                wal_bytes_per_row=statistics.median(m.wal_bytes for m in found) / rows,
                peak_bytes=max(m.peak_bytes for m in found),
                typical_batch=int(statistics.median(found[-1].batches)),
            )
        )
    return summaries


def _variant(phase: str) -> str:
    return next((variant for variant in (SCATTERED, KEY_ALONE) if phase.endswith(variant)), "")


def table(summaries: Sequence[Summary]) -> str:
    """The summaries as text."""
    lines = [
        f"{'phase':20} {'rows':>9} {'rows/s: min':>11} {'median':>9} {'max':>9} {'µs/row':>8} {'x floor':>8} "
        f"{'x guide':>8} {'WAL B/row':>9} {'peak MB':>8} {'batch':>6}"
    ]
    for s in summaries:
        low, middle, high = s.rates
        against = f"{s.times_floor:.2f}" if s.times_floor else ""
        lines.append(
            f"{s.phase:20} {s.rows:>9,} {low:>11,.0f} {middle:>9,.0f} {high:>9,.0f} "
            f"{s.microseconds_per_row:>8.2f} {against:>8} {s.times_guide:>8.1f} {s.wal_bytes_per_row:>9,.0f} "
            f"{s.peak_bytes / 1e6:>8.0f} {s.typical_batch:>6,}"
        )
    return "\n".join(lines)


def requirements(summaries: Sequence[Summary]) -> list[tuple[bool, str]]:
    """What is required, and whether it is met."""
    engine_runs = sorted((s for s in summaries if s.phase == "engine"), key=lambda s: s.rows)
    found = []
    for s in engine_runs:
        ratio = s.times_floor or 0.0
        found.append(
            (
                ratio <= MOST_TIMES_FLOOR,
                f"{s.rows:,} rows: {ratio:.2f} x the floor's time (at most {MOST_TIMES_FLOOR})",
            )
        )
        found.append(
            (
                s.times_guide >= LEAST_TIMES_GUIDE,
                f"{s.rows:,} rows: {s.times_guide:.0f} x as fast as the guide (at least {LEAST_TIMES_GUIDE})",
            )
        )
        found.append(
            (
                s.peak_bytes < MOST_BYTES,
                f"{s.rows:,} rows: {s.peak_bytes / 1e6:.0f} MB at most (less than {MOST_BYTES / 1e6:.0f})",
            )
        )
    if len(engine_runs) > 1:
        small, large = engine_runs[0], engine_runs[-1]
        growth = large.microseconds_per_row / small.microseconds_per_row - 1
        found.append(
            (
                growth <= MOST_GROWTH,
                f"time per row at {large.rows:,} rows against {small.rows:,}: {growth:+.1%} "
                f"(at most {MOST_GROWTH:+.0%})",
            )
        )
    return found


def plot(summaries: Sequence[Summary], path: Path) -> None:
    """Rows per second of every phase, with the spread over the rounds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    shown = sorted(summaries, key=lambda s: s.rates[1])
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(shown) + 1.2), layout="constrained")
    colours = {"floor": "#9a9a9a", "guide": "#c44e52", "orm": "#dd8452"}
    axes.barh(
        [f"{s.phase} ({s.rows:,})" for s in shown],
        [s.rates[1] for s in shown],
        xerr=[[s.rates[1] - s.rates[0] for s in shown], [s.rates[2] - s.rates[1] for s in shown]],
        color=[colours.get(s.phase.removesuffix(_variant(s.phase)), "#4c72b0") for s in shown],
        ecolor="black",
        capsize=3,
    )
    for position, s in enumerate(shown):
        against = (
            f"  {s.times_floor:.2f} x floor" if s.times_floor and not s.phase.startswith("floor") else ""
        )
        axes.text(s.rates[2] * 1.06, position, f"{s.rates[1]:,.0f}{against}", va="center", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlim(left=shown[0].rates[0] / 10, right=shown[-1].rates[2] * 8)
    axes.set_xlabel("rows per second, five columns each (median; bars: minimum and maximum)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def report(measures: Sequence[Measure], settings: dict[str, str]) -> bool:
    """Print and keep everything; whether the requirements are met."""
    summaries = summarize(measures)
    machine = f"{os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}"
    text = "\n".join(
        [
            machine,
            "PostgreSQL: " + ", ".join(f"{name} {value}" for name, value in settings.items()),
            "",
            table(summaries),
            "",
            *(f"{'met    ' if met else 'NOT MET'}  {what}" for met, what in requirements(summaries)),
        ]
    )
    print(f"\n{text}")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ".gitignore").write_text("*\n")
    (RESULTS / "backfill.txt").write_text(text + "\n")
    document = {
        "machine": machine,
        "settings": settings,
        "summaries": [asdict(s) for s in summaries],
        "requirements": [{"met": met, "what": what} for met, what in requirements(summaries)],
        "measures": [asdict(m) for m in measures],
    }
    (RESULTS / "backfill.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(summaries, RESULTS / "backfill.png")
    print(f"\nNumbers, table and plot: {RESULTS}/backfill.json, .txt, .png")
    return all(met for met, _ in requirements(summaries))


@contextlib.contextmanager
def own_server() -> Iterator[EmbeddedPostgres]:
    """A server in a directory of its own, removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="alphapulse-benchmark-"))
    try:
        with EmbeddedPostgres(directory / "postgres", settings=SETTINGS) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[200_000, 1_000_000], help="sizes of the table"
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often floor and engine take turns")
    parser.add_argument("--batch-size", type=int, help="a fixed batch size, instead of the adaptive one")
    parser.add_argument("--check", action="store_true", help="exit status 1 if a requirement is not met")
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return 0
    with own_server() as server:
        bench = Bench(server)
        measures = run(bench, options.rows, options.rounds, options.batch_size)
        met = report(measures, bench.settings())
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
