"""``--benchmark-queries``: the guide's "Performance Comparison", with percentiles and a plot."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption import settings
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.once import NEVER_AGAIN, AnyTablesConfig, named_tables
from alphapulse_encryption.defs.jobs.query_plot import plot
from alphapulse_encryption.defs.resources.border import actor, safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.migration.insight.query_benchmark import (
    DEFAULT_REPETITIONS,
    QueryBenchmark,
    Timings,
)
from alphapulse_encryption.migration.insight.query_benchmark import benchmark_queries as benchmark

# In the metadata of the op's output: what to print, and where the plot is kept.
REPORT = "report"
PLOT_FILE = "plot_file"

_PERCENTILES = (50.0, 95.0, 99.0)


class BenchmarkConfig(AnyTablesConfig):
    """Which tables, and how long."""

    repetitions: int = Field(
        default=DEFAULT_REPETITIONS,
        ge=1,
        le=100_000,
        description="How often each question is asked, at most.",
    )


@dg.op(
    name="benchmark",
    pool=TARGET_POOL,
    description="Ask the same questions of the encrypted and the plaintext columns. Reads only.",
)
def benchmark_queries(
    context: dg.OpExecutionContext, config: BenchmarkConfig, target: TargetResource
) -> None:
    """Measure table by table."""
    with safely():
        found: list[QueryBenchmark] = []
        for table in named_tables(target.catalogue, config.tables or list(target.catalogue.keys)):
            measured = benchmark(target.by(actor(context)), table, repetitions=config.repetitions)
            for line in report_lines([measured]):
                context.log.info(line)
            found.append(measured)
        report = report_lines(found)
        metadata: dict[str, Any] = {
            "times": dg.MetadataValue.table([_record(t) for m in found for t in m.timings] or [_NOTHING])
        }
        picture = plot(found)
        if picture:
            path = _keep(picture, context.run.run_id)
            report.append(f"Plot: {path}")
            metadata[PLOT_FILE] = dg.MetadataValue.path(path)
            encoded = base64.b64encode(picture).decode()
            metadata["plot"] = dg.MetadataValue.md(f"![Times of queries](data:image/png;base64,{encoded})")
        context.add_output_metadata({REPORT: report, **metadata})


_NOTHING = dg.TableRecord({"table": "", "question": "nothing to measure"})


def _record(timings: Timings) -> dg.TableRecord:
    times = {f"p{percent:g}_ms": round(timings.percentile(percent) * 1000, 3) for percent in _PERCENTILES}
    return dg.TableRecord(
        {
            "table": timings.table,
            "question": timings.question,
            "side": timings.side,
            "asked": len(timings.seconds),
            **times,
        }
    )


def report_lines(found: Sequence[QueryBenchmark]) -> list[str]:
    """The results in words: percentiles in milliseconds, and how many times the plaintext's median."""
    lines = []
    for measured in found:
        for encrypted, plain in measured.pairs():
            lines.append(f"{measured.table}: {encrypted.question}")
            lines += [_line(side) for side in (encrypted, plain) if side is not None]
            if plain is not None:
                ratio = encrypted.percentile(50) / plain.percentile(50)
                lines.append(f"    {ratio:.2f} times the plaintext's median")
        lines += [f"{measured.table}: {remark}" for remark in measured.remarks]
    return lines


def _line(timings: Timings) -> str:
    times = ", ".join(f"p{p:g} {timings.percentile(p) * 1000:.2f} ms" for p in _PERCENTILES)
    return f"  {timings.side:<10}{times} ({len(timings.seconds)} times)"


def _keep(picture: bytes, run_id: str) -> Path:
    path = settings.state_dir() / "benchmarks" / f"queries-{run_id}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    return path


def build() -> dg.JobDefinition:
    """The job ``benchmark_queries``."""
    return dg.GraphDefinition(name="benchmark_queries", node_defs=[benchmark_queries]).to_job(
        tags=NEVER_AGAIN,
        config={"ops": {"benchmark": {"config": {"tables": [], "repetitions": DEFAULT_REPETITIONS}}}},
        executor_def=dg.in_process_executor,
        description="**Validation script.** How long an application waits for rows by key, for many rows, and for a "
        "row by a searchable value: from the encrypted columns, decryption and search tokens included, and from the "
        "plaintext columns while they are there. Percentiles, and a plot in the metadata of the step's output.",
    )
