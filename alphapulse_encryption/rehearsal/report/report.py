"""The report of a rehearsal and the history of rehearsals: each one page that needs nothing but itself.

The pages' words are in the templates, and ``history`` tells Dagster the same. What comes from a database or from a
message is escaped where it is put into a page; measurements hold no values, keys or addresses to begin with.
"""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alphapulse_encryption.rehearsal.measures import Latency, Rehearsal, Stage, added
from alphapulse_encryption.rehearsal.report import plots, prediction, verdict, wording
from alphapulse_encryption.rehearsal.report.comparison import Comparison, compare
from alphapulse_encryption.rehearsal.report.prediction import Accuracy, Prediction, Trial
from alphapulse_encryption.rehearsal.report.verdict import Verdict, judge
from alphapulse_encryption.secrecy import private_directory

if TYPE_CHECKING:
    import jinja2

REPORT, HISTORY = "index.html", "history.html"
_SHOWN_IN_HISTORY = 30
# What is predicted where production's size is not known.
_EXAMPLE_TIMES = 10


@dataclass(frozen=True)
class Found:
    """What a rehearsal says: what the page, the history and Dagster's metadata are all shown from."""

    rehearsal: Rehearsal
    comparison: Comparison
    verdict: Verdict
    accuracy: Accuracy
    prediction: Prediction

    @classmethod
    def of(cls, rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> Found:
        """Of a rehearsal beside others, in any order; itself may be among them."""
        comparison = compare(rehearsal, history)
        like = [*comparison.earlier, rehearsal]
        accuracy = prediction.accuracy(like)
        sizes = rehearsal.production or prediction.times_as_large(rehearsal.before, _EXAMPLE_TIMES)
        return cls(
            rehearsal=rehearsal,
            comparison=comparison,
            verdict=judge(rehearsal, comparison.worse),
            accuracy=accuracy,
            prediction=prediction.predict(like, sizes, accuracy),
        )

    @property
    def predicted_for(self) -> str:
        known = self.rehearsal.production is not None
        return "production" if known else f"{_EXAMPLE_TIMES} times the rehearsed rows"

    @property
    def trial(self) -> Trial | None:
        """How good the prediction of this very rehearsal was; None where there was none."""
        return next((one for one in self.accuracy.trials if one.run_id == self.rehearsal.run_id), None)


def write(rehearsal: Rehearsal, history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the report of a rehearsal, also of one that failed."""
    return _keep(directory / REPORT, page(rehearsal, history))


def write_history(history: Sequence[Rehearsal], directory: Path) -> Path:
    """Write the page that shows rehearsals, in any order, side by side; it links the reports below the directory."""
    return _keep(directory / HISTORY, history_page(history, directory))


def page(rehearsal: Rehearsal, history: Sequence[Rehearsal]) -> str:
    found = Found.of(rehearsal, history)
    traffic = [measure.traffic for measure in rehearsal.stages if measure.traffic is not None]
    sizes = [rehearsal.before, *(one.sizes for one in rehearsal.stages if one.sizes is not None)]
    return render(
        "report.html",
        found=found,
        rehearsal=rehearsal,
        predicted=found.prediction,
        verdict=found.verdict,
        # Bytes of each table at its largest.
        table_growth={
            key: max(one.tables[key].bytes for one in sizes if key in one.tables)
            for key in rehearsal.before.tables
        },
        traffic=traffic,
        kinds=_kinds(rehearsal),
        error_kinds=added(one.error_kinds for one in traffic),
        lock_waits=added(one.lock_waits for one in traffic),
        left_out=list(dict.fromkeys(what for one in traffic for what in one.left_out)),
        quarantined=[
            (key, measure.stage, work.quarantined)
            for measure in rehearsal.stages
            for key, work in measure.tables.items()
            if work.quarantined
        ],
    )


def history_page(history: Sequence[Rehearsal], directory: Path | None = None) -> str:
    """The history as HTML; reports below the directory are linked."""
    unique = {one.run_id: one for one in history}
    in_order = sorted(unique.values(), key=lambda one: wording.in_utc(one.started))
    shown = in_order[-_SHOWN_IN_HISTORY:]
    accuracy = prediction.accuracy(in_order)
    compared = [(one, compare(one, in_order)) for one in shown]
    return render(
        "history.html",
        rows=[(one, judge(one, comparison.worse), comparison) for one, comparison in compared],
        links={one.run_id: _link(one, directory) for one in shown},
        trials={trial.run_id: trial for trial in accuracy.trials},
        left_out=len(in_order) - len(shown),
        accuracy=accuracy,
        trends=plots.trends(shown),
    )


def _kinds(rehearsal: Rehearsal) -> dict[tuple[str, str], dict[str, Latency]]:
    """Each kind of request and its way, before, during the backfill, and afterwards."""
    found: dict[tuple[str, str], dict[str, Latency]] = {}
    for stage in plots.OBSERVED:
        measure = rehearsal.stage(stage)
        if measure is None or measure.traffic is None:
            continue
        for latency in (measure.traffic.overall, *measure.traffic.by_kind):
            # One kind goes another way in each phase of the application.
            way = latency.way.split(",", 1)[0]
            found.setdefault((latency.kind, way), {}).setdefault(stage.value, latency)
    return found


def _link(rehearsal: Rehearsal, directory: Path | None) -> str:
    # A run's id is a UUID; anything else is no name of a directory of ours.
    if directory is None or not re.fullmatch(r"[A-Za-z0-9-]+", rehearsal.run_id):
        return ""
    link = f"{rehearsal.run_id}/{REPORT}"
    return link if (directory / link).is_file() else ""


def render(template: str, **told: Any) -> str:
    """A page, or the Markdown that Dagster shows."""
    return _environment().get_template(template).render(told)


@cache
def _environment() -> jinja2.Environment:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alphapulse_encryption.rehearsal.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = (
        *(wording.duration, wording.size, wording.number, wording.number_or_nothing, wording.milliseconds),
        *(wording.moment, wording.share, wording.span_of_time, wording.span_of_size),
    )
    environment.filters |= {figure.__name__: figure for figure in figures}
    # The plots are ours, and their labels are escaped where they are drawn.
    environment.filters |= {"drawing": Markup, "plain": _plain, "option": _option}
    environment.globals |= {
        "plots": plots,
        "Level": verdict.Level,
        "Stage": Stage,
        "EXAMPLE_TIMES": _EXAMPLE_TIMES,
        "MOST_TIMES_SIZE": verdict.MOST_TIMES_SIZE,
        "MOST_TIMES_P99": verdict.MOST_TIMES_P99,
    }
    return environment


def _option(name: str, option: str) -> str:
    """An option with a table's name, for the shell."""
    # One that begins with a dash would be taken for an option.
    return f"--{option}{'=' if name.startswith('-') else ' '}{shlex.quote(name)}"


def _plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", escape(" ".join(text.split()), quote=False))


def _keep(path: Path, text: str) -> Path:
    """Write a page so that nobody ever sees half of it."""
    private_directory(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".html")
    try:
        # Lone surrogates cannot be encoded.
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
