"""What a rehearsal says about the day: ready, ready with warnings, or not ready, and why.

A blocker makes it not ready: what was not rehearsed is not known to work, and nothing may be lost, or wrong, where no
fault was provoked. A warning is for a person to decide about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Literal

from alphapulse_encryption.defs.resources.reporting import counted
from alphapulse_encryption.rehearsal.measures import Rehearsal, Stage

MOST_TIMES_P99 = 3.0
# The guide's "ensure 2x current database size available".
MOST_TIMES_SIZE = 2.0
# Of what needs a decision, so many are named in the verdict.
_MOST_SUBJECTS = 6


class Level(StrEnum):
    READY = "Ready"
    WARNINGS = "Ready, with warnings"
    NOT_READY = "Not ready"


@dataclass(frozen=True)
class Reason:
    """One thing that the verdict stands on: a blocker makes it not ready, a warning needs a decision."""

    level: Literal["blocker", "warning"]
    what: str
    advice: str = ""


@dataclass(frozen=True)
class Verdict:
    """The answer; its blockers come first."""

    reasons: tuple[Reason, ...]

    @property
    def level(self) -> Level:
        return Level.NOT_READY if self.blockers else Level.WARNINGS if self.reasons else Level.READY

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
    """Judge a rehearsal, also one that ended early, and what got worse since those before, a sentence each."""
    reasons = [
        *_course(rehearsal),
        *_data(rehearsal),
        *_traffic(rehearsal),
        *_findings(rehearsal),
        *_space(rehearsal),
        *(_warning(what) for what in worse),
    ]
    return Verdict(tuple(sorted(reasons, key=lambda reason: reason.level != "blocker")))


_blocker, _warning = partial(Reason, "blocker"), partial(Reason, "warning")


def _course(rehearsal: Rehearsal) -> Iterator[Reason]:
    failed = rehearsal.failed_stage
    if failed is not None:
        why = (rehearsal.failure or "no message was left").rstrip(".")
        yield _blocker(f"the stage {failed} failed: {why}", "Remove the cause and rehearse again.")
    missing = [stage for stage in Stage if stage is not failed and rehearsal.stage(stage) is None]
    # A clone that is left takes room, which says nothing about the day.
    if Stage.REMOVAL in missing:
        missing.remove(Stage.REMOVAL)
        yield _warning(
            "it is not known that the clone was removed",
            "The sensor rehearsal_leftovers and the next rehearsal remove it.",
        )
    if missing:
        yield _blocker(f"these stages were not rehearsed: {', '.join(missing)}")
    for measure in rehearsal.stages:
        if measure.attempts > 1:
            yield _warning(f"the stage {measure.stage} needed {measure.attempts} attempts")
        for fault in measure.faults:
            if not fault.survived:
                yield _blocker(f"the stage {measure.stage} did not survive a fault ({fault.kind})")


def _data(rehearsal: Rehearsal) -> Iterator[Reason]:
    if rehearsal.source_unchanged is None:
        yield _warning("the source's tables were not compared before and after")
    elif not rehearsal.source_unchanged:
        yield _blocker(
            "the source's tables are not what they were before the rehearsal",
            "A rehearsal only reads there: find out who else wrote, and rehearse while nobody does.",
        )
    for table in rehearsal.before.tables:
        works = [measure.tables[table] for measure in rehearsal.stages if table in measure.tables]
        # Later stages see the same rows again.
        if rows := max((work.quarantined for work in works), default=0):
            yield _blocker(
                f"{counted(rows, 'row')} of {table} could not be encrypted",
                "alphapulse_encryption.quarantine names them by key and reason: correct them, then rehearse again.",
            )


def _traffic(rehearsal: Rehearsal) -> Iterator[Reason]:
    failed: dict[Stage, int] = {}
    seen = [(measure, measure.traffic.overall) for measure in rehearsal.stages if measure.traffic is not None]
    for measure, overall in seen:
        if overall.wrong_answers:
            wrong = counted(overall.wrong_answers, "request")
            yield _blocker(f"the application got {wrong} answered wrongly in {measure.stage}")
        if overall.errors and measure.faults:
            yield _warning(
                f"{counted(overall.errors, 'request')} failed in {measure.stage}, where faults were provoked",
                "The application has to try those again.",
            )
        elif overall.errors:
            failed[measure.stage] = overall.errors
    if failed:
        yield _blocker(
            f"{counted(sum(failed.values()), 'request')} of the application failed in {', '.join(failed)}",
            "See the kinds of errors below, under The application meanwhile.",
        )
    if not any(overall.requests for _, overall in seen):
        yield _warning(
            "it was rehearsed without traffic, so nothing is known about the application's latency"
        )
    ratio = rehearsal.p99_ratio
    if ratio is not None and ratio > MOST_TIMES_P99:
        yield _warning(
            f"the latency's 99th percentile during the backfill was {ratio:.1f} times that before it",
            "Slow the backfill down: see --settings.",
        )


def _findings(rehearsal: Rehearsal) -> Iterator[Reason]:
    found = [finding for _, finding in rehearsal.all_findings]
    for finding in found:
        if finding.level == "blocker":
            yield _blocker(f"{finding.subject}: {finding.what}".removesuffix("."), finding.advice)
    warned = [finding.subject for finding in found if finding.level == "warning"]
    if warned:
        subjects = list(dict.fromkeys(warned))
        more = len(subjects) - _MOST_SUBJECTS
        named = ", ".join(subjects[:_MOST_SUBJECTS]) + (f" and {more} more" if more > 0 else "")
        needs = "finding needs" if len(warned) == 1 else "findings need"
        yield _warning(f"{len(warned)} {needs} a decision: {named}", 'See "What would block or surprise".')


def _space(rehearsal: Rehearsal) -> Iterator[Reason]:
    grown = rehearsal.growth
    if grown is not None and grown > MOST_TIMES_SIZE:
        yield _warning(
            f"the database grew to {grown:.1f} times its size",
            "Have more disk free than the guide's twice the database: see the predicted peak.",
        )


def in_a_line(rehearsal: Rehearsal) -> str:
    """How it ended."""
    seconds = (rehearsal.ended - rehearsal.started).total_seconds()
    if rehearsal.failed_stage is not None:
        return f"The rehearsal failed in {rehearsal.failed_stage}, because: {rehearsal.failure}"
    return f"The rehearsal went all the way there and back in {seconds:.0f} s. {judge(rehearsal).sentence}"
