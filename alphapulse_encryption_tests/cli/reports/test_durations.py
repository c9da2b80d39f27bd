"""Where the plan's durations come from."""

from __future__ import annotations

import pytest

from alphapulse_encryption.cli.reports.plan import by_rehearsal
from alphapulse_encryption.migration.insight.plan import TablePlan, usual_durations
from alphapulse_encryption.rehearsal.measures import Sizes, Stage, TableSize
from alphapulse_encryption.rehearsal.report.prediction import accuracy, predict
from alphapulse_encryption_tests.migration import support
from alphapulse_encryption_tests.rehearsal import made_up

ROWS, TIMES = 50_000, 10


def planned(sizes: Sizes, **more: TableSize) -> list[TablePlan]:
    return [
        TablePlan(
            table=key,
            stage="not begun",
            authority="plaintext",
            rows=size.rows,
            table_bytes=size.heap,
            index_bytes=size.indexes,
            partitioned=False,
            key=("id",),
            columns=(),
            ranges=(),
            ranges_note="",
            steps=(),
            growth=None,
        )
        for key, size in {**sizes.tables, **more}.items()
    ]


def test_a_rehearsal_predicts_them() -> None:
    rehearsed, larger = made_up.rehearsal(ROWS), made_up.sizes(ROWS * TIMES)
    tables = planned(larger)
    found = by_rehearsal(rehearsed, [rehearsed], tables)
    predicted = predict([rehearsed], larger, accuracy([rehearsed]))
    for stage, step in ((Stage.BACKFILL, "data"), (Stage.VERIFY, "verification"), (Stage.INDEXES, "indexes")):
        wanted = predicted.stage(stage)
        assert wanted is not None
        spans = [span for (_, name), span in found.steps.items() if name == step]
        assert len(spans) == len(tables)
        assert sum(span.likely for span in spans) == pytest.approx(wanted.seconds.likely, rel=0.05)
        assert all(span.low <= span.likely <= span.high for span in spans)
    assert "the rehearsal of" in found.source and "knew nothing" not in found.source


def test_what_it_did_not_know_is_as_usual() -> None:
    rehearsed = made_up.rehearsal(ROWS)
    another = TableSize(rows=1_000_000, heap=200 << 20, indexes=50 << 20)
    tables = planned(made_up.sizes(ROWS), another=another)
    found = by_rehearsal(rehearsed, [rehearsed], tables)
    assert "another" not in {table for table, _ in found.steps}
    assert "it knew nothing of another" in found.source


def test_usual_durations_grow_with_the_work() -> None:
    entry = support.table("t", support.searchable("a", "idx_t_a"), "b", "c", "d", "e")
    small, large = (usual_durations(entry, rows, rows * 200, indexes=3) for rows in (1_000_000, 10_000_000))
    assert large["data"].likely == pytest.approx(10 * small["data"].likely, rel=0.05)
    # 34,000 rows of such a table were encrypted in a second, see the README.
    assert small["data"].low <= 1_000_000 / 34_000 <= small["data"].high
    assert small["columns"] == large["columns"]
