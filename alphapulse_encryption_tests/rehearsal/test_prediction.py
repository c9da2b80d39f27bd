"""The prediction against rehearsals whose truth is known."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest

from alphapulse_encryption.rehearsal.measures import (
    DAY,
    WAY_BACK,
    Fault,
    Rehearsal,
    Sizes,
    Stage,
    TableSize,
    TableWork,
)
from alphapulse_encryption.rehearsal.report.prediction import (
    Accuracy,
    Span,
    accuracy,
    held_against,
    predict,
    times_as_large,
)
from alphapulse_encryption_tests.rehearsal import made_up

SMALL, TIMES = 50_000, 10
GROWING = (
    Stage.BACKFILL,
    Stage.VERIFY,
    Stage.INDEXES,
    Stage.SWITCH,
    Stage.DROP,
    Stage.ERASURE,
    Stage.RESTORE,
)


def truth(stage: Stage, rows: int, **changes: float) -> float:
    return sum(
        made_up.true_seconds(stage, key, table.rows, **changes)
        for key, table in made_up.sizes(rows).tables.items()
    )


@pytest.mark.parametrize("stage", GROWING)
@pytest.mark.parametrize("times", [0.2, 1, 3, TIMES, 200])
def test_ten_times_the_rows_take_what_their_parts_say(stage: Stage, times: float) -> None:
    predicted = predict(made_up.rehearsal(SMALL), made_up.sizes(round(SMALL * times)))
    found = predicted.stage(stage)
    assert found is not None
    real = truth(stage, round(SMALL * times))
    assert found.seconds.low <= real <= found.seconds.high
    # The truth here has no growth per row, the likely figure some.
    assert real == pytest.approx(found.seconds.likely, rel=0.1 + 0.12 * abs(math.log(times)))
    assert sum(span.likely for span in found.tables.values()) == pytest.approx(found.seconds.likely, rel=0.05)


def test_what_is_fixed_is_told_from_what_grows() -> None:
    # Seven parts of ten are fixed here: as many times the seconds would be twice too long.
    rehearsed = made_up.rehearsal(SMALL)
    measured = rehearsed.stage(Stage.VERIFY)
    found = predict(rehearsed, made_up.sizes(SMALL * TIMES)).stage(Stage.VERIFY)
    assert measured is not None
    assert found is not None
    assert measured.seconds * TIMES > 2 * truth(Stage.VERIFY, SMALL * TIMES)
    assert found.seconds.likely == pytest.approx(truth(Stage.VERIFY, SMALL * TIMES), rel=0.1)


@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_the_range_holds_nine_times_out_of_ten(noise: float) -> None:
    held = wide = 0
    for seed in range(30):
        found = predict(made_up.rehearsal(SMALL, noise=noise, seed=seed), made_up.sizes(SMALL * TIMES))
        span = found.stage(Stage.BACKFILL)
        assert span is not None
        held += span.seconds.low <= truth(Stage.BACKFILL, SMALL * TIMES, growth=0.03) <= span.seconds.high
        wide += span.seconds.high > 4 * span.seconds.low
    assert held >= 27
    assert wide == 0


def test_more_noise_makes_the_range_wider_and_growth_with_it() -> None:
    quiet, noisy = (
        predict(made_up.rehearsal(SMALL, noise=noise), made_up.sizes(SMALL * TIMES)).stage(Stage.VERIFY)
        for noise in (0.0, 0.6)
    )
    assert quiet is not None
    assert noisy is not None
    assert noisy.seconds.high / noisy.seconds.low > quiet.seconds.high / quiet.seconds.low


def test_two_workers_take_half_as_long() -> None:
    alone = made_up.rehearsal(SMALL)
    backfill = alone.stage(Stage.BACKFILL)
    assert backfill is not None
    beside = made_up.with_stage(
        alone.model_copy(update={"circumstances": made_up.circumstances(workers=2)}),
        Stage.BACKFILL,
        seconds=backfill.seconds / 2,
        tables={
            key: work.model_copy(update={"seconds": work.seconds / 2})
            for key, work in backfill.tables.items()
        },
    )
    one, two = (
        predict(found, made_up.sizes(SMALL * TIMES)).stage(Stage.BACKFILL) for found in (alone, beside)
    )
    assert one is not None
    assert two is not None
    assert two.seconds.likely == pytest.approx(one.seconds.likely / 2, rel=0.1)


def test_what_faults_cost_is_not_predicted() -> None:
    calm = made_up.rehearsal(SMALL)
    backfill = calm.stage(Stage.BACKFILL)
    assert backfill is not None
    fault = Fault(
        kind="server restarted",
        at=backfill.started,
        seconds_away=1,
        seconds_lost=backfill.seconds,
        survived=True,
        what="",
    )
    hit = made_up.with_stage(
        calm,
        Stage.BACKFILL,
        seconds=2 * backfill.seconds,
        faults=(fault,),
        tables={
            key: work.model_copy(
                update={
                    "seconds": 2 * work.seconds,
                    "ranges": tuple((rows, 2 * seconds) for rows, seconds in work.ranges),
                }
            )
            for key, work in backfill.tables.items()
        },
    )
    expected, found = (
        predict(one, made_up.sizes(SMALL * TIMES)).stage(Stage.BACKFILL) for one in (calm, hit)
    )
    assert expected is not None
    assert found is not None
    assert found.seconds.likely == pytest.approx(expected.seconds.likely, rel=0.01)


def test_the_window_is_what_is_locked() -> None:
    whole = made_up.rehearsal(SMALL)
    predicted = predict(whole, made_up.sizes(SMALL * TIMES))
    assert [found.stage for found in predicted.stages if found.locks] == [Stage.DROP, Stage.ERASURE]
    assert predicted.seconds.likely == pytest.approx(
        sum(found.seconds.likely for found in predicted.stages if found.stage in DAY)
    )
    assert predicted.online.likely + predicted.locked.likely == pytest.approx(predicted.seconds.likely)
    assert predicted.way_back.likely == pytest.approx(
        sum(found.seconds.likely for found in predicted.stages if found.stage in WAY_BACK)
    )


def test_looking_for_remnants_is_outside_the_window() -> None:
    whole = made_up.rehearsal(SMALL)
    erasure = whole.stage(Stage.ERASURE)
    assert erasure is not None
    looked = made_up.with_stage(
        whole,
        Stage.ERASURE,
        seconds=erasure.seconds + 5 * len(erasure.tables),
        tables={
            key: work.model_copy(update={"seconds": work.seconds + 5, "locked_seconds": work.seconds})
            for key, work in erasure.tables.items()
        },
    )
    without, with_ = (predict(one, made_up.sizes(SMALL * TIMES)) for one in (whole, looked))
    assert with_.locked == without.locked
    assert with_.online.likely > without.online.likely + 20


def test_looking_grows_with_the_database_and_with_the_log_until_that_is_full() -> None:
    whole = made_up.rehearsal(SMALL)
    erasure = whole.stage(Stage.ERASURE)
    assert erasure is not None

    def looked(seconds: float, database: int, wal: int, most_wal: int) -> Rehearsal:
        return made_up.with_stage(
            whole,
            Stage.ERASURE,
            seconds=erasure.seconds + seconds * len(erasure.tables),
            tables={
                key: work.model_copy(
                    update={
                        "seconds": work.seconds + seconds,
                        "locked_seconds": work.seconds,
                        "looking": seconds,
                        "looked_database": database,
                        "looked_wal": wal,
                        "most_wal": most_wal,
                    }
                )
                for key, work in erasure.tables.items()
            },
        )

    def likely(rehearsal: Rehearsal) -> float:
        found = predict(rehearsal, made_up.sizes(SMALL * TIMES)).stage(Stage.ERASURE)
        assert found is not None
        return found.seconds.likely / len(erasure.tables)

    without = likely(looked(0.0, 0, 0, 0))
    # Ten seconds: of a database that becomes so many times as large,
    assert likely(looked(10.0, 1_000, 0, 0)) == pytest.approx(without + 10 * TIMES, rel=0.1)
    # or of a log that is full as it is, or half full.
    assert likely(looked(10.0, 0, 1_000, 1_000)) == pytest.approx(without + 10, rel=0.02)
    assert likely(looked(10.0, 0, 500, 1_000)) == pytest.approx(without + 20, rel=0.02)


def test_what_was_left_pending_is_not_the_whole_table() -> None:
    # After the indexes, the few rows that old instances wrote meanwhile are encrypted: one of each range.
    whole = made_up.rehearsal(SMALL)
    indexes = whole.stage(Stage.INDEXES)
    assert indexes is not None
    caught_up = made_up.with_stage(
        whole,
        Stage.INDEXES,
        seconds=indexes.seconds + 0.1 * len(indexes.tables),
        tables={
            key: work.model_copy(
                update={"seconds": work.seconds + 0.1, "rows": 2, "ranges": ((1, 0.05), (1, 0.05))}
            )
            for key, work in indexes.tables.items()
        },
    )
    with_, without = (
        predict(one, made_up.sizes(SMALL * TIMES)).stage(Stage.INDEXES) for one in (caught_up, whole)
    )
    assert with_ is not None
    assert without is not None
    assert without.seconds.likely < with_.seconds.likely < 3 * without.seconds.likely


def test_room() -> None:
    rehearsed = made_up.rehearsal(SMALL)
    wanted = made_up.sizes(SMALL * TIMES)
    predicted = predict(rehearsed, wanted)
    tables = sum(table.heap + table.indexes for table in wanted.tables.values())
    # The tables grow to 2.6 times, and the largest is written anew beside the old one.
    largest = max(table.heap + table.indexes for table in wanted.tables.values())
    expected = wanted.database + 1.6 * tables + 2.6 * largest
    assert predicted.largest.likely == pytest.approx(expected, rel=0.01)
    assert predicted.largest.low < expected < predicted.largest.high
    backfill = predicted.stage(Stage.BACKFILL)
    assert backfill is not None
    assert backfill.wal.likely == pytest.approx(SMALL * TIMES * 900, rel=0.01)


# Predictions that are held against what came.


def test_each_rehearsal_predicts_the_next() -> None:
    history = [
        made_up.rehearsal(rows, run_id=str(number), day=number, noise=0.05, seed=number)
        for number, rows in enumerate((50_000, 60_000, 300_000))
    ]
    found = accuracy(list(reversed(history)))
    assert [trial.run_id for trial in found.trials] == ["1", "2"]
    assert [trial.times for trial in found.trials] == pytest.approx([1.2, 5])
    assert all(trial.held and abs(trial.error) < 0.3 for trial in found.trials)
    assert "2 of 2 held" in found.sentence


def test_a_prediction_that_was_wrong_is_said_and_widens_the_next() -> None:
    history = [made_up.rehearsal(run_id=str(number), day=number, slower=4.0**number) for number in range(3)]
    found = accuracy(history)
    assert not any(trial.held for trial in found.trials)
    # Stages of a fixed length are in it as well.
    assert all(trial.error > 1 for trial in found.trials)
    assert found.spread > Accuracy().spread
    sizes = made_up.sizes(SMALL * TIMES)
    before, after = (predict(history[-1], sizes, known).seconds for known in (Accuracy(), found))
    assert after.likely == before.likely
    assert after.low < before.low
    assert after.high > before.high


def test_rehearsals_under_other_circumstances_predict_nothing() -> None:
    one = made_up.rehearsal(run_id="1")
    other = made_up.rehearsal(run_id="2", day=1, circumstances=made_up.circumstances(cores=64))
    assert accuracy([one, other]).trials == ()
    assert "yet" in accuracy([one, other]).sentence


def test_one_that_failed_is_held_against_in_what_it_did() -> None:
    trial = held_against(made_up.rehearsal(), made_up.failed(Stage.VERIFY, run_id="2"))
    assert trial is not None
    assert set(trial.stages) == {Stage.PREFLIGHT, Stage.COLUMNS, Stage.BACKFILL, Stage.INDEXES}


# Little to go by.


def only(**tables: tuple[int, float]) -> Rehearsal:
    """Nothing but a drop, of tables with so many rows in so many seconds."""
    sizes = Sizes(
        database=10_000_000,
        tables={
            key: TableSize(rows=rows, heap=rows * 100, indexes=rows * 20) for key, (rows, _) in tables.items()
        },
    )
    whole = made_up.rehearsal(before=sizes)
    drop = whole.stage(Stage.DROP)
    assert drop is not None
    works = {key: TableWork(seconds=seconds) for key, (_, seconds) in tables.items()}
    drop = drop.model_copy(
        update={"tables": works, "seconds": sum(work.seconds for work in works.values()), "sizes": sizes}
    )
    return whole.model_copy(update={"stages": (drop,)})


def test_one_table_leaves_open_what_is_fixed() -> None:
    rehearsed = only(users=(1000, 2.0))
    found = predict(rehearsed, times_as_large(rehearsed.before, 100))
    assert 2 < found.seconds.low < found.seconds.likely < found.seconds.high
    assert found.seconds.likely > 100
    assert found.unknown == tuple(stage for stage in (*DAY, *WAY_BACK) if stage is not Stage.DROP)


def test_tables_without_rows_are_as_slow_as_the_others() -> None:
    rehearsed = only(users=(1000, 2.0), empty=(0, 0.01))
    sizes = Sizes(
        database=10**9,
        tables={
            "users": TableSize(rows=1000, heap=100_000, indexes=20_000),
            "empty": TableSize(rows=100_000, heap=10_000_000, indexes=2_000_000),
            "strange": TableSize(rows=5, heap=8192, indexes=8192),
        },
    )
    found = predict(rehearsed, sizes)
    assert found.guessed == ("empty",)
    assert found.unrehearsed == ("strange",)
    drop = found.stage(Stage.DROP)
    assert drop is not None
    assert drop.tables["empty"].likely == pytest.approx(200, rel=0.05)


def test_empty_tables_alone() -> None:
    rehearsed = only(users=(0, 0.5))
    found = predict(rehearsed, rehearsed.before)
    assert found.seconds.likely < 1
    assert all(math.isfinite(figure) for figure in astuple(found.seconds))


def test_a_span_is_widened_around_what_is_likely() -> None:
    assert Span(1, 2, 4).widened(0) == Span(1, 2, 4)
    wider = Span(1, 2, 4).widened(0.5)
    assert wider.low < 1 < wider.likely == 2
    assert wider.high > 4
    assert Span().widened(3) == Span()


def test_seconds_that_no_clock_can_measure_are_no_reason_to_fail() -> None:
    whole = made_up.rehearsal(SMALL)
    backfill = whole.stage(Stage.BACKFILL)
    assert backfill is not None
    tables = {
        key: work.model_copy(
            update={"seconds": 1e-320, "ranges": tuple((rows, 1e-320) for rows, _ in work.ranges)}
        )
        for key, work in backfill.tables.items()
    }
    nothing = made_up.with_stage(whole, Stage.BACKFILL, seconds=1e-300, tables=tables)
    assert math.isfinite(predict(nothing, made_up.sizes(SMALL * TIMES)).seconds.high)
