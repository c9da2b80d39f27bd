"""The guide's steps as a person at a terminal sees them: launch the job, show its progress, print what came of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

from alphapulse_encryption import guide
from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.cli.launch import Launcher
from alphapulse_encryption.cli.outcomes import Outcome
from alphapulse_encryption.cli.progress import Begin, backfilled, built, progress_bar, verified, worked_on
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.resources.effects import NEXT, NOTHING, REPORT, TABLES_CHANGED
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.gates.approvals import describe
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import TableVerification, verify_table
from alphapulse_encryption.migration.schema.definition import read_table

SHOWN_OFFENDERS = 20
_BARS: Mapping[str, tuple[str, Begin]] = {
    "encrypted_data": ("encrypting", backfilled),
    "verified_data": ("verifying", verified),
    "begin": ("encrypting again", worked_on),
    "encrypted_columns": ("clearing old ciphertext", worked_on),
    "repair": ("clearing", worked_on),
    "revert": ("decrypting", worked_on),
    "restore": ("decrypting", worked_on),
    "search_indexes": ("building indexes", built),
    "analyze": ("analyzing", built),
    "rebuild": ("rebuilding indexes", built),
}


_show = partial(print, flush=True)


@dataclass
class Steps:
    """The steps, for some tables of a catalogue.

    One table's fault is its own: the others go on, through later steps too. What is of no single table stops all.

    Attributes:
        tables: those that nothing is wrong with so far.
        failed: the others, with the step that each failed at and why.
    """

    launcher: Launcher
    database: Database
    catalogue: Catalogue
    keys: KeyRing
    tables: tuple[str, ...]
    changed: bool = field(default=False, init=False)
    failed: dict[str, tuple[guide.Step, str]] = field(default_factory=dict, init=False)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float), init=False)

    @property
    def _entries(self) -> tuple[Table, ...]:
        return tuple(self.catalogue.table(key) for key in self.tables)

    def run(self, name: str, **options: object) -> bool:
        """Run a step with the options that were given, of which it takes its own; whether it succeeded."""
        step = guide.step(name)
        if not self.tables:
            return False
        if name == "verify":
            return self._verify(step, options)
        if name == "approve_drop":
            table = self.catalogue.table(self.tables[0])
            with self.database.session(f"describe the drop of {table.key}") as connection:
                _show(describe(connection, read_table(connection, table, plaintext=False, look=True)))
        before = len(self.failed)
        for stage in step.stages:
            if not self._stage(step, stage, options):
                return False
        return len(self.failed) == before

    def _fail(self, step: guide.Step, reasons: Mapping[str, str]) -> bool:
        """Leave tables out from now on; whether there are others."""
        self.failed |= {table: (step, reason) for table, reason in reasons.items()}
        self.tables = tuple(table for table in self.tables if table not in reasons)
        return bool(self.tables)

    def sum_up(self) -> None:
        """What became of each table, where not all of several are done, and what to type next."""
        of_all = any(step.stages[0].over == "database" for step, _ in self.failed.values())
        if of_all or not self.failed or len(self.failed) + len(self.tables) < 2:
            return
        _show("Of each table:")
        for key in self.catalogue.keys:
            if key in self.tables:
                _show(f"  ✓ {key}: done")
            elif key in self.failed:
                step, reason = self.failed[key]
                told = reason.partition("\n")[0]
                _show(f"  ✗ {key}: {step.flag} failed: {told}")
                _show(f"    Next, once that is corrected: {step.command} --table {key}")

    def _stage(self, step: guide.Step, stage: guide.Stage, options: Mapping[str, object]) -> bool:
        if stage.heading:
            _show(stage.heading.format(table=self.tables[0]))
        config = {name: options[name] for name in (*stage.config, step.value) if name in options}
        told, after, changed = False, [], False
        with self._watched(stage):
            for outcome in self._launched(stage, config):
                for line in _report(stage, outcome):
                    told = True
                    _show(line)
                if not outcome.succeeded:
                    _complain(outcome)
                    failed = outcome.failed or dict.fromkeys(self.tables, "; ".join(outcome.problems[:1]))
                    if not self._fail(step, failed):
                        return False
                outcomes = outcome.collected("outcome")
                changed |= bool(outcome.output.get(TABLES_CHANGED)) or any(w != NOTHING for _, w in outcomes)
                after += [text for _, text in outcome.collected(NEXT)]
        self.changed |= changed
        if stage.nothing and not (changed or told):
            _show(f"Nothing to do: {stage.nothing}")
        for line in dict.fromkeys(after):
            _show(f"  {line}")
        return True

    def _launched(self, stage: guide.Stage, config: Mapping[str, object]) -> Iterator[Outcome]:
        if stage.is_asset:
            yield self._timed(stage, self.tables, config)
        elif stage.over == "none":
            yield self._timed(stage, (), config)
        elif stage.over == "one":
            yield self._timed(stage, (), {"table": self.tables[0], **config})
        elif stage.over == "all":
            # Of a whole rotation alone it is an error that an older version is left.
            everything = stage.works == "begin" and set(self.tables) == set(self.catalogue.keys)
            yield self._timed(stage, (), {"tables": [] if everything else list(self.tables), **config})
        else:
            # One run per table: a table that is refused does not hide what became of those before it.
            for table in self.tables:
                outcome = self._timed(stage, (), {"tables": [table], **config})
                reason = {} if outcome.succeeded else {table: "; ".join(outcome.problems[:1])}
                yield replace(outcome, failed=reason)

    def _timed(self, stage: guide.Stage, tables: Sequence[str], config: Mapping[str, object]) -> Outcome:
        started = time.monotonic()
        outcome = self.launcher.stage(stage, tables, config)
        self.seconds[stage.works if stage.is_asset else stage.job] += time.monotonic() - started
        if outcome.interrupted:
            # Dagster has turned the signal into a failed run; here it goes on to the caller.
            raise KeyboardInterrupt
        return outcome

    def _watched(self, stage: guide.Stage) -> AbstractContextManager[None]:
        if stage.works not in _BARS:
            return nullcontext()
        what, begin = _BARS[stage.works]
        return progress_bar(what, self.database, self._entries, begin)

    def _verify(self, step: guide.Step, options: Mapping[str, object]) -> bool:
        look, sum_up = step.stages
        with self._watched(look):
            looked = self._timed(look, self.tables, {n: options[n] for n in look.config if n in options})
        verdict = self._timed(sum_up, self.tables, {})
        results = [(table, self._verification(table)) for table in self._entries]
        passed = [
            result is not None and result.column_passed(column.name)
            for table, result in results
            for column in table.columns
        ]
        _show("Migration verification results:")
        _show(f"  Total tables: {len(results)}")
        _show(f"  Total columns: {len(passed)}")
        _show(f"  Successful: {passed.count(True)}")
        _show(f"  Failed: {passed.count(False)}")
        succeeded = looked.succeeded and all(passed)
        if succeeded and not verdict.succeeded:
            # The asset's checks are of every table that was begun, not of those asked for.
            succeeded = all(result is not None and result.passed for _, result in results)
            others = [table for table in self.catalogue.tables if table.key not in self.tables]
            found = [one for table in others if (one := self._verification(table)) is not None]
            unverified = [one.table for one in found if not one.passed]
            if succeeded and unverified:
                _show(f"  Not verified, and not asked for: {', '.join(unverified)}")
            elif succeeded:
                _complain(verdict)
                return False
        if not succeeded:
            _tell_unverified([result for _, result in results if result is not None], looked)
            told = "; ".join((looked.problems or verdict.problems)[:1])
            self._fail(
                step,
                {
                    table.key: looked.failed.get(table.key) or (result.reasons[0] if result else told)
                    for table, result in results
                    if table.key in looked.failed or result is None or not result.passed
                },
            )
        return succeeded

    def _verification(self, table: Table) -> TableVerification | None:
        try:
            with self.database.session(f"sum up the verification of {table.key}") as connection:
                return verify_table(connection, table, self.keys)
        except MigrationError:
            return None  # the run that just failed has said why


def _tell_unverified(results: Sequence[TableVerification], looked: Outcome) -> None:
    offenders = [f"{result.table}.{offender}" for result in results for offender in result.offenders]
    reasons = [reason for result in results for reason in result.reasons]
    for line in [*reasons, *offenders[:SHOWN_OFFENDERS]]:
        _show(f"✗ {line}")
    if len(offenders) > SHOWN_OFFENDERS:
        _show(f"  … and {len(offenders) - SHOWN_OFFENDERS} more, in alphapulse_encryption.verifications")
    for line in (line for result in results for line in result.advice):
        _show(f"  {line}")
    if not reasons:
        _complain(looked)


def _complain(outcome: Outcome) -> None:
    for problem in outcome.problems:
        _show(f"✗ {problem}")


def _report(stage: guide.Stage, outcome: Outcome) -> Iterator[str]:
    if stage.over == "range":
        yield from _rates(outcome)
    for name, lines in outcome.output.items():
        # Each op of a job has its own.
        if name.startswith(REPORT):
            yield from lines
    for _, lines in outcome.collected(REPORT):
        yield from lines


def _rates(outcome: Outcome) -> Iterator[str]:
    """What became of each table, over its batch ranges."""
    rows: defaultdict[str, int] = defaultdict(int)
    seconds: defaultdict[str, float] = defaultdict(float)
    for part, entries in outcome.partitions.items():
        table = part.partition("|")[2]
        rows[table] += entries.get("rows_encrypted", 0)
        seconds[table] += entries.get("seconds", 0.0)
    for table, count in rows.items():
        if count:
            rate = count / seconds[table] if seconds[table] else 0
            yield f"✓ Migrated {table}: {count:,} rows in {seconds[table]:.1f} s ({rate:,.0f} rows/s)"
