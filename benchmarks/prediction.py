"""Whether a rehearsal on few rows predicts how long the migration of ten times as many takes.

    python benchmarks/prediction.py [--rows 50000] [--times 10] [--rounds 1] [--check]

Rehearses the migration of the sample with so many rows, on a PostgreSQL server of its own, predicts from that the
migration of so many times the rows, by nothing but its sizes, and then really goes through it: the same job with the
same functions, on another server of its own, so that neither finds what the other left in caches and in the
write-ahead log. Stage by stage it prints what was predicted, with the range, what it took, and the one by the other.

The small rehearsal is held once more after the large one, so that one sees what the machine's moods alone do: with the
same rows, one should take as long as the other. Each of the two predicts; what is judged is the mean of both.

With --check the exit status is 1 if what the day's stages take together is more than 30 % off.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from alphapulse_encryption.rehearsal.measures import DAY, Rehearsal, Stage
from alphapulse_encryption.rehearsal.report.prediction import predict

RESULTS = Path(__file__).parent / "results"
MOST_OFF = 0.3
# Everything below is noise.
LEAST_SECONDS = 1.0


def rehearse_here(rows: int, workers: int, to: Path) -> int:
    """The main function of a child: a rehearsal in the state directory that the environment names."""
    from alphapulse_encryption import settings
    from alphapulse_encryption.cli.launch import launcher
    from alphapulse_encryption.cli.rehearse import rehearse
    from alphapulse_encryption.rehearsal.report import history

    # Traffic takes its share of the machine, and more of it the longer a stage takes.
    if not rehearse({"workers": workers, "traffic": {"rate": 0}}, rows):
        return 1
    with launcher(settings.TargetVariables().batch_ranges) as found:
        (kept,) = history.read(found.instance)
    to.write_text(kept.model_dump_json())
    return 0


def rehearse(rows: int, workers: int) -> Rehearsal:
    """A rehearsal on a server of its own, which is removed afterwards."""
    print(f"\n{rows:,} rows", flush=True)
    with tempfile.TemporaryDirectory(
        prefix="alphapulse-prediction-", ignore_cleanup_errors=True
    ) as directory:
        # The server's own system user has to get through.
        Path(directory).chmod(0o711)
        kept = Path(directory) / "rehearsal.json"
        environment = {
            name: text
            for name, text in os.environ.items()
            if not name.startswith(("ALPHAPULSE_", "DAGSTER_"))
        } | {"ALPHAPULSE_STATE_DIR": str(Path(directory) / "state")}
        try:
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    "--one",
                    str(kept),
                    "--rows",
                    str(rows),
                    "--workers",
                    str(workers),
                ],
                env=environment,
                check=True,
            )
        except subprocess.CalledProcessError:
            raise SystemExit(f"The rehearsal on {rows:,} rows failed; see above.") from None
        finally:
            subprocess.run(
                [sys.executable, "-m", "alphapulse_encryption.sample.postgres", "stop"],
                env=environment,
                check=False,
                capture_output=True,
            )
        return Rehearsal.model_validate_json(kept.read_text())


@dataclass(frozen=True)
class Line:
    """A stage, or all of them: seconds rehearsed, predicted, and as it was."""

    what: str
    rehearsed: float
    low: float
    likely: float
    high: float
    real: float

    @property
    def ratio(self) -> float:
        return self.real / self.likely if self.likely else math.nan


def held_against(small: Rehearsal, large: Rehearsal) -> list[Line]:
    """What the small one predicts of the large one, beside what that took; all of the day's stages first."""
    predicted = predict([small], large.before)
    lines = []
    for found in predicted.stages:
        measures = [rehearsal.stage(found.stage) for rehearsal in (small, large)]
        seconds = [measure.own_seconds if measure is not None else math.nan for measure in measures]
        lines.append(Line(found.stage, seconds[0], *_figures(found.seconds), seconds[1]))
    day = [line for line in lines if Stage(line.what) in DAY]
    total = Line(
        "the day",
        sum(line.rehearsed for line in day),
        *_figures(predicted.seconds),
        sum(line.real for line in day),
    )
    return [total, *lines]


def _figures(span: object) -> tuple[float, float, float]:
    low, likely, high = asdict(span).values()  # type: ignore[call-overload]
    return low, likely, high


def show(title: str, lines: Sequence[Line], times: int) -> None:
    table = Table(title=title, title_justify="left")
    table.add_column("stage")
    for name in (
        "rehearsed, s",
        f"times {times}, s",
        "predicted, s",
        "range, s",
        "real, s",
        "real/predicted",
    ):
        table.add_column(name, justify="right")
    for line in lines:
        outside = not line.low <= line.real <= line.high and line.real > LEAST_SECONDS
        table.add_row(
            line.what,
            f"{line.rehearsed:.1f}",
            f"{line.rehearsed * times:.1f}",
            f"{line.likely:.1f}",
            f"{line.low:.1f} to {line.high:.1f}",
            f"{line.real:.1f}",
            f"{line.ratio:.2f}" + (" *" if outside else "  "),
            style="bold" if line is lines[0] else None,
        )
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000, help="rows of the rehearsal")
    parser.add_argument("--times", type=int, default=10, help="how many times as many are predicted")
    parser.add_argument("--rounds", type=int, default=1, help="how often a small and a large one take turns")
    parser.add_argument("--workers", type=int, default=1, help="batch ranges worked on at once")
    parser.add_argument("--check", action="store_true", help="exit status 1 if it is more than 30 %% off")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return rehearse_here(options.rows, options.workers, options.one)
    small, large = [rehearse(options.rows, options.workers)], []
    for _ in range(options.rounds):
        large.append(rehearse(options.rows * options.times, options.workers))
        small.append(rehearse(options.rows, options.workers))
    off, noise = [], []
    for number, actual in enumerate(large):
        for which, earlier in (("before", small[number]), ("after", small[number + 1])):
            lines = held_against(earlier, actual)
            show(f"\nround {number + 1}, from the rehearsal {which}", lines, options.times)
            off.append(math.log(lines[0].ratio))
            noise.append(lines[0].rehearsed)
    mean = math.exp(statistics.fmean(off))
    met = abs(mean - 1) <= MOST_OFF
    print(
        f"\n{options.rows * options.times:,} rows took {mean:.2f} times what {options.rows:,} rows predicted "
        f"({'met' if met else 'NOT MET'}: at most {MOST_OFF:.0%} off).\n"
        f"The rehearsals of {options.rows:,} rows took {min(noise):.1f} to {max(noise):.1f} s: "
        f"where these differ by much, the machine had other things to do.\n* outside its range"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ".gitignore").write_text("*\n")
    document = {"mean": mean, "rehearsals": [one.model_dump(mode="json") for one in (*small, *large)]}
    (RESULTS / "prediction.json").write_text(json.dumps(document) + "\n")
    print(f"Numbers: {RESULTS}/prediction.json")
    return 1 if options.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
