"""What makes a rehearsal's verdict, rule by rule; and what counts as worse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alphapulse_encryption.rehearsal.measures import Fault, Finding, Rehearsal, Sizes, Stage, StageMeasure
from alphapulse_encryption.rehearsal.report.comparison import compare
from alphapulse_encryption.rehearsal.report.verdict import Level, judge
from alphapulse_encryption_tests.rehearsal import made_up


def good(**changes: Any) -> Rehearsal:
    """One without anything to say about: it does not even grow too much."""
    whole = made_up.rehearsal(**changes)
    stages = tuple(
        measure.model_copy(update={"sizes": made_up.sizes(50_000, 1.3)}) for measure in whole.stages
    )
    return whole.model_copy(update={"stages": stages})


def measure(whole: Rehearsal, stage: Stage) -> StageMeasure:
    found = whole.stage(stage)
    assert found is not None
    return found


def overall(whole: Rehearsal, stage: Stage, **changes: Any) -> Rehearsal:
    traffic = measure(whole, stage).traffic
    assert traffic is not None
    changed = traffic.model_copy(update={"overall": traffic.overall.model_copy(update=changes)})
    return made_up.with_stage(whole, stage, traffic=changed)


def fault(*, survived: bool) -> Fault:
    return Fault(
        kind="worker killed",
        at=made_up.BEGAN,
        seconds_away=0.1,
        seconds_lost=0.5,
        survived=survived,
        what="killed",
    )


def finding(level: Any) -> Finding:
    return Finding(level=level, subject="trades", what="3 views depend on it")


def test_a_good_rehearsal_is_ready() -> None:
    verdict = judge(good())
    assert (verdict.level, verdict.reasons) == (Level.READY, ())
    assert verdict.sentence.startswith("Ready: ")


def quarantined(whole: Rehearsal) -> Rehearsal:
    tables = measure(whole, Stage.BACKFILL).tables
    return made_up.with_stage(
        whole,
        Stage.BACKFILL,
        tables=tables | {"users": tables["users"].model_copy(update={"quarantined": 1})},
    )


def without(whole: Rehearsal, stage: Stage) -> Rehearsal:
    return whole.model_copy(update={"stages": tuple(m for m in whole.stages if m.stage is not stage)})


NOT_READY: dict[str, tuple[Callable[[], Rehearsal], str]] = {
    "failed": (lambda: made_up.failed(Stage.DROP), "the stage drop failed: The disk is full"),
    "missing": (lambda: without(good(), Stage.RESTORE), "not rehearsed: restore"),
    "blocker": (
        lambda: made_up.with_stage(good(), Stage.PREFLIGHT, findings=(finding("blocker"),)),
        "trades: 3 views",
    ),
    "quarantined": (lambda: quarantined(good()), "1 row of users could not be encrypted"),
    "source changed": (lambda: good(source_unchanged=False), "the source's tables are not what they were"),
    "wrong answer": (
        lambda: overall(good(), Stage.SWITCH, wrong_answers=2),
        "2 requests answered wrongly in switch",
    ),
    "failed request": (
        lambda: overall(good(), Stage.VIEWS, errors=1),
        "1 request of the application failed in views",
    ),
    "not survived": (
        lambda: made_up.with_stage(good(), Stage.BACKFILL, faults=(fault(survived=False),)),
        "did not survive a fault (worker killed)",
    ),
}
WARNINGS: dict[str, tuple[Callable[[], Rehearsal], str]] = {
    "warning": (
        lambda: made_up.with_stage(good(), Stage.PREFLIGHT, findings=(finding("warning"),)),
        "1 finding needs a decision: trades",
    ),
    "attempts": (lambda: made_up.with_stage(good(), Stage.VERIFY, attempts=2), "needed 2 attempts"),
    "failed under faults": (
        lambda: made_up.with_stage(
            overall(good(), Stage.BACKFILL, errors=3), Stage.BACKFILL, faults=(fault(survived=True),)
        ),
        "3 requests failed in backfill, where faults",
    ),
    "slow": (lambda: overall(good(), Stage.BACKFILL, p99=21 * 3.1), "3.1 times that before it"),
    "no traffic": (
        lambda: good().model_copy(
            update={"stages": tuple(m.model_copy(update={"traffic": None}) for m in good().stages)}
        ),
        "without traffic",
    ),
    "not compared": (lambda: good(source_unchanged=None), "were not compared"),
    "clone": (lambda: without(good(), Stage.REMOVAL), "not known that the clone was removed"),
    "grown": (made_up.rehearsal, "grew to 2.1 times"),
}


@pytest.mark.parametrize("case", NOT_READY)
def test_what_makes_it_not_ready(case: str) -> None:
    make, words = NOT_READY[case]
    verdict = judge(make())
    assert verdict.level is Level.NOT_READY
    assert any(words in reason.what for reason in verdict.blockers), verdict.reasons
    assert verdict.reasons[0].level == "blocker"
    assert verdict.sentence.startswith("Not ready, because ")


@pytest.mark.parametrize("case", WARNINGS)
def test_what_is_a_warning_only(case: str) -> None:
    make, words = WARNINGS[case]
    verdict = judge(make())
    assert verdict.level is Level.WARNINGS
    (reason,) = verdict.reasons
    assert words in reason.what


def test_notes_and_survived_faults_change_nothing() -> None:
    whole = made_up.with_stage(good(), Stage.PREFLIGHT, findings=(finding("note"),))
    whole = made_up.with_stage(whole, Stage.BACKFILL, faults=(fault(survived=True),))
    assert judge(whole).level is Level.READY
    assert judge(whole, ["the backfill was slower"]).level is Level.WARNINGS


def test_the_ratio_needs_both_sides() -> None:
    assert good().p99_ratio == pytest.approx(2.2)
    assert without(good(), Stage.BASELINE).p99_ratio is None
    assert overall(good(), Stage.BACKFILL, requests=0).p99_ratio is None


# Worse than before.


def history(count: int = 3, **changes: Any) -> list[Rehearsal]:
    return [good(run_id=f"earlier-{n}", day=n, noise=0.1, seed=n, **changes) for n in range(count)]


def worse(now: Rehearsal, past: list[Rehearsal]) -> str:
    return "; ".join(compare(now, [*reversed(past), now]).worse)


def latest(**changes: Any) -> Rehearsal:
    return good(**({"run_id": "now", "day": 20, "noise": 0.1, "seed": 99} | changes))


@pytest.mark.parametrize("count", [1, 3])
def test_noise_is_not_worse(count: int) -> None:
    assert worse(latest(), history(count)) == ""
    assert worse(latest(slower=1.2), history(count)) == ""


@pytest.mark.parametrize("count", [1, 3])
def test_slower_per_row_is_worse(count: int) -> None:
    said = worse(latest(slower=1.8), history(count))
    assert "backfill was slower per row: 1." in said
    assert "verify was slower" in said
    # More rows take longer, which is no surprise.
    assert worse(latest(rows=80_000), history(count)) == ""


def test_what_scattered_before_may_scatter() -> None:
    wild = [good(run_id=f"{n}", day=n, slower=slower) for n, slower in enumerate((0.6, 1.0, 1.6, 1.2))]
    assert worse(latest(slower=1.7), wild) == ""
    assert "backfill" in worse(latest(slower=5), wild)


def test_latency_growth_findings_and_failures() -> None:
    assert "99th percentile during baseline was 50 ms: 2.4 times" in worse(latest(p99=50.0), history())
    assert worse(latest(p99=23.0), history()) == ""
    assert "the database grew to 2.11 times" in worse(made_up.rehearsal(run_id="now", day=20), history())
    new = made_up.with_stage(latest(), Stage.PREFLIGHT, findings=(finding("warning"), finding("note")))
    assert worse(new, history()) == "a new finding, trades: 3 views depend on it"
    known = made_up.with_stage(
        history()[-1],
        Stage.PREFLIGHT,
        findings=(Finding(level="warning", subject="trades", what="12 views depend on it"),),
    )
    assert worse(new, [*history()[:-1], known]) == ""
    failed = made_up.failed(Stage.DROP, run_id="now", day=20)
    assert "the stage drop failed" in worse(failed, history())
    again = made_up.failed(Stage.DROP, run_id="before", day=10)
    assert "failed" not in worse(failed, [*history(), again])


def test_only_like_is_compared() -> None:
    other = history(circumstances=made_up.circumstances(workers=4, version="0.0.9"))
    comparison = compare(latest(slower=9), other)
    assert comparison.worse == ()
    assert comparison.earlier == ()
    assert "workers: 1, before 4" in comparison.differences
    assert "version of this package: 0.1.0, before 0.0.9" in comparison.differences
    assert any("3 of 3 earlier rehearsals" in difference for difference in comparison.differences)

    upgraded = compare(latest(slower=9), history(circumstances=made_up.circumstances(server_version="17.6")))
    assert "PostgreSQL: 18.1, before 17.6" in upgraded.differences
    assert any("backfill was slower" in what for what in upgraded.worse)
    assert any(
        "rows: 80,000, before 50,000" in text for text in compare(latest(rows=80_000), history()).differences
    )


def test_later_rehearsals_and_itself_are_left_out() -> None:
    now = latest(slower=9)
    assert compare(now, [now, good(run_id="later", day=30)]).earlier == ()
    nothing = now.model_copy(update={"before": Sizes(database=0, tables={}), "stages": ()})
    assert compare(nothing, history()).worse == ()
