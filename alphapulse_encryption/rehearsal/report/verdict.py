"""What a rehearsal says about the day: ready, ready with warnings, or not ready, and why.

**Not ready**, if one of these holds:

- a stage failed, or one is missing: what was not rehearsed is not known to work;
- a finding is a blocker;
- rows were quarantined: their values stay in plaintext, and the drop is refused;
- the source was changed by the rehearsal;
- the application got a wrong answer, or a request failed in a stage where no fault was provoked;
- a fault was provoked and not survived.

**Ready, with warnings**, if a person has to decide about something:

- a finding is a warning, or a stage needed more than one attempt;
- requests failed while a fault was provoked;
- the 99th percentile of the latency during the backfill is more than three times that before it;
- it was rehearsed without traffic, or nobody looked whether the source was unchanged, or the clone may still be there;
- at its peak the database needs more than the guide's twice its size;
- something got worse since the rehearsals before.

**Ready** otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from alphapulse_encryption.rehearsal.measures import DAY, Finding, Rehearsal, Sizes, Stage, StageMeasure

MOST_TIMES_P99 = 3.0
# The guide's "ensure 2x current database size available".
MOST_TIMES_SIZE = 2.0
# Of what needs a decision, so many are named in the verdict.
_MOST_SUBJECTS = 6
# In production nobody removes the clone, and a rehearsal is only complete with all others.
REQUIRED = tuple(Stage)


class Level(StrEnum):
    """How ready."""

    READY = "Ready"
    WARNINGS = "Ready, with warnings"
    NOT_READY = "Not ready"


@dataclass(frozen=True)
class Reason:
    """One thing that the verdict stands on.

    Args:
        level: "blocker" makes it not ready, "warning" needs a decision.
        what: a sentence.
        advice: what to do; may be empty.
    """

    level: Literal["blocker", "warning"]
    what: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer.

    Args:
        level: how ready.
        reasons: blockers first.
    """

    level: Level
    reasons: tuple[Reason, ...]

    @property
    def blockers(self) -> tuple[Reason, ...]:
        return tuple(reason for reason in self.reasons if reason.level == "blocker")

    @property
    def warnings(self) -> tuple[Reason, ...]:
        return tuple(reason for reason in self.reasons if reason.level == "warning")

    @property
    def sentence(self) -> str:
        """The verdict with its weightiest reason, for one line."""
        if not self.reasons:
            return f"{self.level}: every stage came to its end and nothing was found."
        more = len(self.reasons) - 1
        others = f" (and {more} more)" if more else ""
        return f"{self.level}, because {self.reasons[0].what}{others}"


def judge(rehearsal: Rehearsal, worse: Sequence[str] = ()) -> Verdict:
    """Judge a rehearsal, also one that ended early.

    Args:
        rehearsal: what was measured.
        worse: what got worse since the rehearsals before, a sentence each.
    """
    reasons = [
        *_course(rehearsal),
        *_source(rehearsal),
        *_rows(rehearsal),
        *_faults(rehearsal),
        *_traffic(rehearsal),
        *_findings(rehearsal),
        *_space(rehearsal),
        *(Reason("warning", what) for what in worse),
    ]
    reasons.sort(key=lambda reason: reason.level != "blocker")
    if any(reason.level == "blocker" for reason in reasons):
        level = Level.NOT_READY
    else:
        level = Level.WARNINGS if reasons else Level.READY
    return Verdict(level, tuple(reasons))


def p99_ratio(rehearsal: Rehearsal) -> float | None:
    """The 99th percentile of the latency during the backfill over that of the baseline; None where one is missing."""
    before, during = (_p99(rehearsal.stage(stage)) for stage in (Stage.BASELINE, Stage.BACKFILL))
    return during / before if before and during is not None else None


def peak(rehearsal: Rehearsal) -> Sizes | None:
    """The sizes after the day's stage at whose end the database was largest; None where no sizes were taken.

    What a restore adds, before the next vacuum takes the old row versions away, is not of the day.
    """
    sizes = [
        measure.sizes for measure in rehearsal.stages if measure.sizes is not None and measure.stage in DAY
    ]
    return max(sizes, key=lambda found: found.database, default=None)


def all_findings(rehearsal: Rehearsal) -> list[tuple[Stage, Finding]]:
    """What was found, with its stage, in the order in which it was; that of the stage that failed last."""
    found = [(measure.stage, finding) for measure in rehearsal.stages for finding in measure.findings]
    if rehearsal.failed_stage is not None:
        found += [(rehearsal.failed_stage, finding) for finding in rehearsal.findings]
    return found


def _p99(measure: StageMeasure | None) -> float | None:
    if measure is None or measure.traffic is None or not measure.traffic.overall.requests:
        return None
    return measure.traffic.overall.p99


def _course(rehearsal: Rehearsal) -> list[Reason]:
    reasons = []
    ended = {measure.stage for measure in rehearsal.stages}
    if rehearsal.failed_stage is not None:
        reasons.append(
            Reason(
                "blocker",
                f"the stage {rehearsal.failed_stage} failed: {rehearsal.failure or 'no message was left'}".rstrip(
                    "."
                ),
                "Remove the cause and rehearse again.",
            )
        )
    missing = [stage for stage in REQUIRED if stage not in ended and stage is not rehearsal.failed_stage]
    # A clone that is left takes room, which says nothing about the day.
    if Stage.REMOVAL in missing:
        missing.remove(Stage.REMOVAL)
        reasons.append(
            Reason(
                "warning",
                "it is not known that the clone was removed",
                "The sensor rehearsal_leftovers and the next rehearsal remove it.",
            )
        )
    if missing:
        reasons.append(Reason("blocker", f"these stages were not rehearsed: {', '.join(missing)}"))
    for measure in rehearsal.stages:
        if measure.attempts > 1:
            reasons.append(Reason("warning", f"the stage {measure.stage} needed {measure.attempts} attempts"))
    return reasons


def _source(rehearsal: Rehearsal) -> list[Reason]:
    if rehearsal.source_unchanged is None:
        return [Reason("warning", "the source's tables were not compared before and after")]
    if not rehearsal.source_unchanged:
        return [
            Reason(
                "blocker",
                "the source's tables are not what they were before the rehearsal",
                "A rehearsal only reads there: find out who else wrote, and rehearse while nobody does.",
            )
        ]
    return []


def _rows(rehearsal: Rehearsal) -> list[Reason]:
    quarantined: dict[str, int] = {}
    for measure in rehearsal.stages:
        for table, work in measure.tables.items():
            # Later stages see the same rows again.
            quarantined[table] = max(quarantined.get(table, 0), work.quarantined)
    return [
        Reason(
            "blocker",
            f"{rows:,} {'row' if rows == 1 else 'rows'} of {table} could not be encrypted",
            "encryption_quarantine names them by key and reason: correct them, then rehearse again.",
        )
        for table, rows in quarantined.items()
        if rows
    ]


def _faults(rehearsal: Rehearsal) -> list[Reason]:
    return [
        Reason("blocker", f"the stage {measure.stage} did not survive a fault ({fault.kind})")
        for measure in rehearsal.stages
        for fault in measure.faults
        if not fault.survived
    ]


def _traffic(rehearsal: Rehearsal) -> list[Reason]:
    reasons: list[Reason] = []
    failed: dict[Stage, int] = {}
    seen = [(measure, measure.traffic) for measure in rehearsal.stages if measure.traffic is not None]
    for measure, traffic in seen:
        wrong, errors = traffic.overall.wrong_answers, traffic.overall.errors
        if wrong:
            reasons.append(
                Reason(
                    "blocker", f"the application got {_requests(wrong)} answered wrongly in {measure.stage}"
                )
            )
        if errors and measure.faults:
            reasons.append(
                Reason(
                    "warning",
                    f"{_requests(errors)} failed in {measure.stage}, where faults were provoked",
                    "The application has to try those again.",
                )
            )
        elif errors:
            failed[measure.stage] = errors
    if failed:
        what = f"{_requests(sum(failed.values()))} of the application failed in {', '.join(failed)}"
        reasons.append(
            Reason("blocker", what, "See the kinds of errors below, under The application meanwhile.")
        )
    if not any(traffic.overall.requests for _, traffic in seen):
        reasons.append(
            Reason(
                "warning",
                "it was rehearsed without traffic, so nothing is known about the application's latency",
            )
        )
    ratio = p99_ratio(rehearsal)
    if ratio is not None and ratio > MOST_TIMES_P99:
        reasons.append(
            Reason(
                "warning",
                f"the latency's 99th percentile during the backfill was {ratio:.1f} times that before it",
                "Slow the backfill down: see --settings.",
            )
        )
    return reasons


def _requests(count: int) -> str:
    return f"{count:,} {'request' if count == 1 else 'requests'}"


def _findings(rehearsal: Rehearsal) -> list[Reason]:
    reasons: list[Reason] = []
    warned: dict[str, None] = {}
    count = 0
    for finding in dict.fromkeys(finding for _, finding in all_findings(rehearsal)):
        if finding.level == "blocker":
            what = f"{finding.subject}: {finding.what}".removesuffix(".")
            reasons.append(Reason("blocker", what, finding.advice))
        elif finding.level == "warning":
            count += 1
            warned[finding.subject] = None
    if count:
        shown = [*warned][:_MOST_SUBJECTS]
        more = f" and {len(warned) - len(shown)} more" if len(warned) > len(shown) else ""
        needs = "finding needs" if count == 1 else "findings need"
        reasons.append(
            Reason(
                "warning",
                f"{count} {needs} a decision: {', '.join(shown)}{more}",
                'See "What would block or surprise".',
            )
        )
    return reasons


def _space(rehearsal: Rehearsal) -> list[Reason]:
    largest, before = peak(rehearsal), rehearsal.before.database
    if largest is None or not before or largest.database <= MOST_TIMES_SIZE * before:
        return []
    return [
        Reason(
            "warning",
            f"the database grew to {largest.database / before:.1f} times its size",
            "Have more disk free than the guide's twice the database: see the predicted peak.",
        )
    ]
