"""The sensors: each looks for one kind of thing, and tells what is new to those channels that have not been told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import dagster as dg

from alphapulse_encryption import settings
from alphapulse_encryption.defs.alerts import failed_runs
from alphapulse_encryption.defs.alerts.delivery import VARIABLES, Channel, configured_channels, deliver
from alphapulse_encryption.defs.alerts.ledger import Ledger, add_mark
from alphapulse_encryption.defs.alerts.wording import outcome, written
from alphapulse_encryption.defs.resources.reporting import safely
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.errors import ConfigurationError, MigrationError
from alphapulse_encryption.migration.gates.findings import Alert
from alphapulse_encryption.migration.insight import overdue
from alphapulse_encryption.migration.insight.drift import look_for_drift
from alphapulse_encryption.migration.postgres.database import DatabaseUnreachable

# A server that is being restarted, or a table that is locked for a moment, is nobody's concern.
BLIND_FOR = timedelta(minutes=10)

Look = Callable[[TargetResource, Ledger], Sequence[Alert]]
Tick = Callable[[dg.SensorEvaluationContext, Sequence[Channel], TargetResource], dg.SensorResult]


def _pending(target: TargetResource, ledger: Ledger) -> Sequence[Alert]:
    limit = settings.Alerts().pending_after
    mark = overdue.current_mark(target.database)
    ledger.marks = add_mark(ledger.marks, mark, limit)
    (oldest, *_) = ledger.marks
    old_enough = oldest if mark.at - oldest.at >= limit else None
    return overdue.old_pending_rows(target.database, target.catalogue.tables, old_enough, limit)


def build_sensors() -> list[dg.SensorDefinition]:
    """All alerts; each is stopped until somebody starts it."""
    return [
        _build(
            "alert_failed_runs",
            30,
            "Tells of every run that fails from the moment it is started: job, tables, step, and the first line of "
            "what it said. Runs that somebody stopped are not failed.",
            failed_runs.tick,
        ),
        _alert(
            "alert_drift",
            "drift",
            300,
            lambda target, _: look_for_drift(target.database, target.catalogue),
            "Tells when plaintext is written without ciphertext to what was done, a guard trigger is missing or "
            "disabled, a column is gone or of another type, or a column that looks sensitive is not in the catalogue.",
        ),
        _alert(
            "alert_old_pending_rows",
            "pending rows",
            300,
            _pending,
            "Tells when rows wait for their ciphertext for longer than `ALPHAPULSE_ALERT_PENDING_HOURS`, were set "
            "aside for as long, or a backfill stands still. Begins to count when it is started.",
        ),
        _alert(
            "alert_keys",
            "keys",
            3600,
            lambda target, _: overdue.keys_due(target.database, settings.Alerts().rotate_after),
            "Tells when a key nears the number of values it may encrypt, and when the current key version is older "
            "than `ALPHAPULSE_ALERT_KEY_DAYS`.",
        ),
        _alert(
            "alert_approvals",
            "approvals",
            300,
            lambda target, _: overdue.approvals_waiting(target.database),
            "Tells of approvals of a drop that wait to be used, end soon, or have ended unused.",
        ),
    ]


def _build(name: str, seconds: int, description: str, tick: Tick) -> dg.SensorDefinition:
    @dg.sensor(
        name=name,
        minimum_interval_seconds=seconds,
        description=description,
    )
    def sensor(
        context: dg.SensorEvaluationContext, target: TargetResource
    ) -> dg.SensorResult | dg.SkipReason:
        with safely():
            channels = configured_channels()
            if not channels:
                return dg.SkipReason(f"Nobody is told: set {VARIABLES}.")
            return tick(context, channels, target)

    return sensor


def _alert(name: str, about: str, seconds: int, look: Look, description: str) -> dg.SensorDefinition:
    def tick(
        context: dg.SensorEvaluationContext, channels: Sequence[Channel], target: TargetResource
    ) -> dg.SensorResult:
        ledger = Ledger.load(context.cursor)
        blind = None
        findings: Sequence[Alert] = ()
        try:
            findings = look(target, ledger)
        except MigrationError as error:
            if isinstance(error, ConfigurationError) and not isinstance(error, DatabaseUnreachable):
                # A person is at it, and sees the tick.
                raise
            blind = Alert(
                f"look for {about}",
                f"Nobody can look for {about}: {error}",
                key=f"look:{name}",
                remedy="Correct that; until then nothing of this is told of.",
                waits=BLIND_FOR,
            )
        now = datetime.now(UTC)
        ledger.only(channel.name for channel in channels)
        ledger.looked(findings, now, blind=blind)
        said = settings.Alerts()
        ui = settings.Ui().url
        link = f"{ui}/automation" if ui else None
        news = {channel: ledger.news(channel.name, now, said.remind_after) for channel in channels}
        results = deliver([(c, written(new, said.label, about, link)) for c, new in news.items() if new])
        for channel, new in news.items():
            if new and results[channel.name] is None:
                ledger.delivered(channel.name, new, now)
        stands = f"could not look: {blind.message}" if blind else "all is well"
        if findings:
            stands = f"{len(findings)} found"
        return dg.SensorResult(skip_reason=outcome(results, stands), cursor=ledger.dump())

    told = "Once when it begins or changes, again after `ALPHAPULSE_ALERT_REMIND_HOURS`, and when it is over."
    return _build(name, seconds, f"{description} {told}", tick)
