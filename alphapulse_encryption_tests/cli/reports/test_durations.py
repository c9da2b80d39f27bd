"""Where the plan's durations come from."""

from __future__ import annotations

import pytest

from alphapulse_encryption.cli.reports.plan import by_rehearsal
from alphapulse_encryption.migration.insight.preview import Work, usual_durations
from alphapulse_encryption.rehearsal.measures import Sizes, Stage
from alphapulse_encryption.rehearsal.report.prediction import accuracy, predict
from alphapulse_encryption_tests.rehearsal import made_up

ROWS, TIMES = 50_000, 10


def work(sizes: Sizes) -> list[Work]:
    return [
        Work(key, size.rows, size.heap, size.indexes, indexes=2, values=3, tokens=1)
        for key, size in sizes.tables.items()
    ]


def test_a_rehearsal_predicts_them() -> None:
    rehearsed, larger = made_up.rehearsal(ROWS), made_up.sizes(ROWS * TIMES)
    works = work(larger)
    usual = usual_durations(works)
    found = by_rehearsal(rehearsed, [rehearsed], works, usual)
    predicted = predict([rehearsed], larger, accuracy([rehearsed]))
    for stage, step in ((Stage.BACKFILL, "data"), (Stage.VERIFY, "verification"), (Stage.INDEXES, "indexes")):
        wanted = predicted.stage(stage)
        assert wanted is not None
        spans = [span for (_, name), span in found.steps.items() if name == step]
        assert len(spans) == len(works)
        assert sum(span.likely for span in spans) == pytest.approx(wanted.seconds.likely, rel=0.05)
        assert all(span.low <= span.likely <= span.high for span in spans)
    assert "the rehearsal of" in found.source and "knew nothing" not in found.source
    assert found.steps != usual.steps


def test_what_it_did_not_know_is_as_usual() -> None:
    rehearsed = made_up.rehearsal(ROWS)
    another = Work("another", 1_000_000, 200 << 20, 50 << 20, indexes=2, values=3, tokens=1)
    works = [*work(made_up.sizes(ROWS)), another]
    usual = usual_durations(works)
    found = by_rehearsal(rehearsed, [rehearsed], works, usual)
    assert found.steps["another", "data"] == usual.steps["another", "data"]
    assert "it knew nothing of another" in found.source


def test_usual_durations_grow_with_the_work() -> None:
    small, large = (
        usual_durations([Work("t", rows, rows * 200, rows * 50, indexes=3, values=5, tokens=1)]).steps
        for rows in (1_000_000, 10_000_000)
    )
    assert large["t", "data"].likely == pytest.approx(10 * small["t", "data"].likely, rel=0.05)
    # 34,000 rows of such a table were encrypted in a second, see the README.
    assert small["t", "data"].low <= 1_000_000 / 34_000 <= small["t", "data"].high
    assert small["t", "columns"] == large["t", "columns"]
