"""``--rehearse``: a rehearsal as a person at a terminal sees it, on the instance that the UI shows."""

from __future__ import annotations

from collections.abc import Mapping

import dagster as dg

from alphapulse_encryption import settings
from alphapulse_encryption.cli.launch import launcher
from alphapulse_encryption.defs.resources.environment import uses_sample
from alphapulse_encryption.rehearsal.clone.clone import directory
from alphapulse_encryption.rehearsal.clone.source import STAGING_DATABASE, is_sample
from alphapulse_encryption.rehearsal.job import FIRST, JOB
from alphapulse_encryption.rehearsal.report import history
from alphapulse_encryption.rehearsal.report.report import HISTORY, REPORT
from alphapulse_encryption.rehearsal.report.verdict import Level, in_a_line, judge
from alphapulse_encryption.sample.database import DEFAULT_ROWS, load_sample, loaded_sample
from alphapulse_encryption.sample.key import make_sample_key
from alphapulse_encryption.sample.postgres import embedded, embedded_url

SHOWN_REASONS = 20


def rehearse(config: Mapping[str, object], rows: int | None) -> bool:
    """Rehearse; whether it went all the way, and nothing that it found makes the day not ready.

    Printed are each stage as it ends, the verdict and where the report is.

    Args:
        rows: of the sample's staging copy; None for the one that is there, or for the demo's size.

    Raises:
        MigrationError: it could not begin.
        KeyboardInterrupt: it was stopped, and its clone is removed.
    """
    if is_sample():
        _make_staging_copy(rows)
    with launcher(settings.TargetVariables().batch_ranges) as found:
        outcome = found.job(JOB, FIRST, config, on_event=_tell)
        if outcome.interrupted:
            raise KeyboardInterrupt
        last = next((kept for kept in history.read(found.instance) if kept.run_id == outcome.run_id), None)
    if last is None:
        for problem in outcome.problems:
            print(f"✗ {problem}")
        return False
    verdict = judge(last)
    ready = outcome.succeeded and verdict.level is not Level.NOT_READY
    print(f"{'✓' if ready else '✗'} {in_a_line(last)}")
    for reason in verdict.reasons[:SHOWN_REASONS]:
        print(f"  {'✗' if reason.level == 'blocker' else '!'} {reason.what}")
    if len(verdict.reasons) > SHOWN_REASONS:
        print(f"  … and {len(verdict.reasons) - SHOWN_REASONS} more, in the report")
    for what, page in (
        ("Report", directory(outcome.run_id) / REPORT),
        ("All rehearsals", directory(HISTORY)),
    ):
        if page.exists():
            print(f"  {what}: {page}")
    return ready


def _tell(event: dg.DagsterEvent) -> None:
    if event.event_type is dg.DagsterEventType.STEP_SUCCESS and event.step_key is not None:
        print(f"✓ {event.step_key:<13}{event.step_success_data.duration_ms / 1000:>8.1f} s", flush=True)


def _make_staging_copy(rows: int | None) -> None:
    """The sample's staging copy, and a key for the sample where there is none."""
    if uses_sample():
        make_sample_key()
    url = embedded_url(STAGING_DATABASE)
    there = loaded_sample(url)
    if there is not None and rows is not None and there != rows:
        # A copy of our own, which anybody may make again at any time.
        embedded().drop_database(STAGING_DATABASE)
        url, there = embedded_url(STAGING_DATABASE), None
    if there is None:
        counts = load_sample(url, rows=rows or DEFAULT_ROWS)
        print(f"Loaded the sample's staging copy: {counts.total:,} rows", flush=True)
    else:
        print(f"The sample's staging copy is there: {there:,} rows", flush=True)
