"""The guide's validation scripts: "Verify Encryption Working" and "Performance Comparison"."""

import base64
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg
from pydantic import Field

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.jobs.single_op import AnyTablesConfig, in_turn, named_tables, op_job
from alphapulse_encryption.defs.resources.effects import REPORT, On
from alphapulse_encryption.defs.resources.reporting import as_table
from alphapulse_encryption.errors import RefusedError, TablesFailed
from alphapulse_encryption.migration.insight import query_benchmark
from alphapulse_encryption.migration.insight.live_check import ColumnCheck, live_check
from alphapulse_encryption.migration.insight.query_benchmark import QueryBenchmark, Timings
from alphapulse_encryption.secrecy import find_fonts, private_directory

_PERCENTILES = (50.0, 95.0, 99.0)
_COLOURS = {"plaintext": "#9a9a9a", "encrypted": "#4c72b0"}
_COLUMNS = 3
_INCHES = 3.2


class BenchmarkConfig(AnyTablesConfig):
    """Which tables, and how long."""

    repetitions: int = Field(
        default=query_benchmark.DEFAULT_REPETITIONS,
        ge=1,
        le=100_000,
        description="How often each question is asked, at most.",
    )


def _check(on: On[AnyTablesConfig]) -> dict[str, Any]:
    checks: list[ColumnCheck] = []

    def one(table: Table) -> None:
        found = live_check(on.target, table)
        lines = [_signed(column) for column in found]
        for line in lines:
            on.log(line)
        if any(column.failed for column in found):
            raise RefusedError("Encryption does not work as it has to:\n" + "\n".join(lines))
        checks.extend(found)

    failed = in_turn(on.context, named_tables(on.catalogue, on.config.tables or on.catalogue.keys), one)
    report = [_signed(found) for found in checks]
    if failed:
        raise TablesFailed("\n".join(report), failed)
    records = [
        {"column": f"{found.table}.{found.column}", **asdict(look)}
        for found in checks
        for look in found.looks
    ]
    nothing = {"column": "", "what": "no row to try", "verdict": "", "remark": ""}
    return {REPORT: report, "columns": as_table(records or [nothing])}


def _signed(found: ColumnCheck) -> str:
    sign = "✗" if found.failed else "✓" if found.tried else "-"
    return f"{sign} {found}"


def _benchmark(on: On[BenchmarkConfig]) -> dict[str, Any]:
    found: list[QueryBenchmark] = []

    def one(table: Table) -> None:
        measured = query_benchmark.benchmark_queries(on.target, table, repetitions=on.config.repetitions)
        for line in report_lines([measured]):
            on.log(line)
        found.append(measured)

    failed = in_turn(on.context, named_tables(on.catalogue, on.config.tables or on.catalogue.keys), one)
    report = report_lines(found)
    if failed:
        raise TablesFailed("\n".join(report), failed)
    records = [_record(t) for m in found for t in m.timings]
    nothing = {"table": "", "question": "nothing to measure"}
    metadata: dict[str, Any] = {"times": as_table(records or [nothing])}
    picture = plot(found)
    if picture:
        path = settings.state_dir() / "benchmarks" / f"queries-{on.context.run.run_id}.png"
        private_directory(path.parent)
        path.write_bytes(picture)
        report.append(f"Plot: {path}")
        metadata["plot_file"] = dg.MetadataValue.path(path)
        encoded = base64.b64encode(picture).decode()
        metadata["plot"] = dg.MetadataValue.md(f"![Times of queries](data:image/png;base64,{encoded})")
    return {REPORT: report, **metadata}


def _record(timings: Timings) -> dict[str, object]:
    return {
        "table": timings.table,
        "question": timings.question,
        "side": timings.side,
        "asked": len(timings.seconds),
        **{f"p{percent:g}_ms": round(timings.percentile(percent) * 1000, 3) for percent in _PERCENTILES},
    }


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


def plot(found: Sequence[QueryBenchmark]) -> bytes:
    """For each question, which share of the answers came within which time: a PNG; empty without questions."""
    # It takes longer to load than everything else that Dagster loads of this package.
    find_fonts()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = [(measured.table, pair) for measured in found for pair in measured.pairs()]
    if not pairs:
        return b""
    columns = min(_COLUMNS, len(pairs))
    rows = -(-len(pairs) // columns)
    # Without pyplot, which keeps figures and chooses a window system.
    figure = Figure(figsize=(_INCHES * columns, _INCHES * rows * 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (table, pair) in enumerate(pairs):
        axes = figure.add_subplot(rows, columns, number + 1)
        for side in pair:
            if side is not None:
                milliseconds = [second * 1000 for second in side.seconds]
                axes.ecdf(milliseconds, label=side.side, color=_COLOURS[side.side])
        axes.set_xscale("log")
        axes.set_title(f"{table}: {pair[0].question}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("ms", fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if number == 0:
            axes.legend(fontsize=7, frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png", dpi=100)
    return written.getvalue()


def build() -> list[dg.JobDefinition]:
    """The jobs ``live_check`` and ``benchmark_queries``."""
    return [
        op_job(
            "check",
            AnyTablesConfig,
            _check,
            "**Validation script.** For every column, gives a recent row its own value again under a fresh envelope, "
            "as an application writes it: looks at the raw column, decrypts it, finds it by its search token, and sees "
            "whether the guard acts. Each row is locked for some milliseconds, the transaction is always rolled back, "
            "and nothing remains.",
        ),
        op_job(
            "benchmark",
            BenchmarkConfig,
            _benchmark,
            "**Validation script.** How long an application waits for rows by key, for many rows, and for a row by a "
            "searchable value: from the encrypted columns, decryption and search tokens included, and from the "
            "plaintext columns while they are there. Percentiles, and a plot in the metadata of the step's output. "
            "Reads only.",
        ),
    ]
