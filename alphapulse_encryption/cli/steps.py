"""The guide's steps as a person at a terminal sees them: launch the job, show its progress, print what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from alphapulse_encryption.catalogue import Catalogue, Table
from alphapulse_encryption.cli.launch import Launcher
from alphapulse_encryption.cli.outcomes import Outcome
from alphapulse_encryption.cli.progress import backfilled, index_builds, progress_bar, rotated, verified
from alphapulse_encryption.crypto.keys import KeyRing
from alphapulse_encryption.defs.jobs import benchmark_queries, erase_dropped, live_check, rotate_keys, stages
from alphapulse_encryption.defs.jobs.once import TABLES_CHANGED
from alphapulse_encryption.errors import MigrationError
from alphapulse_encryption.migration.gates.approvals import describe
from alphapulse_encryption.migration.postgres.database import Database
from alphapulse_encryption.migration.rows.verify import TableVerification, verify_table
from alphapulse_encryption.migration.schema.definition import read_table

SHOWN_OFFENDERS = 20
_SHOWN_OF_BACKUP = (
    *("file", "bytes", "sha256", "entries_listed", "tables_restored_and_equal", "rows_restored_and_equal"),
    *("uploaded_to", "seconds"),
)


@dataclass
class Steps:
    """The steps, for some tables of a catalogue. Each returns whether it succeeded.

    Args:
        launcher: launches the jobs.
        database: the target, for progress and for summaries.
        catalogue: what is sensitive.
        keys: the key ring.
        tables: keys of the tables to work on.
        backfill: configuration of the backfill; what is not in it follows the settings in the database.
        reindex: rebuild every index after the backfill.
        restore_drill: restore the backup for comparison.
        verification: configuration of the verification.
        rotation: configuration of the key rotation.
        operator: name of the person who drops, or takes an approval back.
        hold: stop a restore before the plaintext becomes right.
        show: prints a line.
    """

    launcher: Launcher
    database: Database
    catalogue: Catalogue
    keys: KeyRing
    tables: tuple[str, ...]
    backfill: Mapping[str, object] = field(default_factory=dict)
    reindex: bool = False
    restore_drill: bool = False
    verification: Mapping[str, object] = field(default_factory=dict)
    rotation: Mapping[str, object] = field(default_factory=dict)
    operator: str = ""
    hold: bool = False
    show: Callable[[str], None] = print
    changed: bool = field(default=False, init=False)
    seconds: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def _entries(self) -> tuple[Table, ...]:
        return tuple(self.catalogue.table(key) for key in self.tables)

    def preflight(self) -> bool:
        """Pre-migration checklist."""
        outcome = self._stage(stages.PREFLIGHT)
        for _, table in outcome.collected("findings"):
            for record in table.records:
                finding = record.data
                sign = {"ok": "✓", "warning": "!"}[str(finding["level"])]
                self.show(f"{sign} {finding['subject']}: {finding['finding']}")
        return self._ended(outcome)

    def backup(self) -> bool:
        """An encrypted, verified backup."""
        outcome = self._stage(stages.BACKUP, config={"restore_drill": True} if self.restore_drill else None)
        for name in _SHOWN_OF_BACKUP:
            for _, value in outcome.collected(name):
                self.show(f"  {name.replace('_', ' ')}: {value}")
        return self._ended(outcome)

    def add_columns(self) -> bool:
        """Step 2."""
        outcome = self._stage(stages.ADD_COLUMNS, heading="Adding encrypted columns to tables...")
        added = [(table, name) for table, names in outcome.collected("columns_added") for name in names]
        for table, name in added:
            self.show(f"✓ Added column {table}.{name}")
        if outcome.succeeded and not added:
            self.show("Nothing to do: every encrypted column is there.")
        elif outcome.succeeded and any(c.searchable for t in self._entries for c in t.columns):
            self.show("  Indexes for search are built after the data, with --migrate-data.")
        self.changed |= bool(added)
        return self._ended(outcome)

    def rotate_keys(self) -> bool:
        """Encrypt again what is of an older key version, verify, and retire versions of which nothing is left."""
        self.show("Rotating keys...")
        # Of all tables, where none is named: only then is it an error that an older version is left.
        tables = [] if set(self.tables) == set(self.catalogue.keys) else list(self.tables)
        config = {"tables": tables, **self.rotation}
        with progress_bar("encrypting again", self.database, rotated(self._entries)):
            outcome = self._timed(
                rotate_keys.JOB,
                lambda: self.launcher.job(rotate_keys.JOB, rotate_keys.BEGIN, config),
            )
        found = outcome.output
        begun = found.get(rotate_keys.BEGUN)
        if begun:
            self.show(f"✓ Key version {begun} is current")
        rows = {table: count for table, count in found.get(rotate_keys.ROWS, {}).items() if count}
        for table, count in rows.items():
            self.show(f"✓ Encrypted {table} again: {count:,} rows")
        if verified_tables := found.get(rotate_keys.VERIFIED):
            self.show(f"✓ Verified {', '.join(verified_tables)}")
        for version in found.get(rotate_keys.RETIRED, ()):
            self.show(f"✓ Key version {version} is retired: no value of it is left")
        for line in found.get(rotate_keys.REMAINING, ()):
            self.show(f"! {line}")
        if outcome.succeeded and not (begun or rows or found.get(rotate_keys.RETIRED)):
            self.show("Nothing to do: every value is of the current key version.")
        self.changed |= bool(begun or rows)
        return self._ended(outcome)

    def replan(self) -> bool:
        """Cut the tables anew into batch ranges."""
        return self._job("replan_ranges", "replan", "✓ Cut anew into batch ranges")

    def repair_mismatched(self) -> bool:
        """Clear what the last verification found wrong."""
        return self._job("repair_mismatched", "repair", "✓ Cleared, to be encrypted again by --migrate-data")

    def migrate_data(self) -> bool:
        """Step 3: the backfill, then the indexes."""
        self.show("Migrating data...")
        with progress_bar("encrypting", self.database, backfilled(self._entries)):
            outcome = self._stage(stages.MIGRATE_DATA, config=self.backfill)
        rows: dict[str, int] = {}
        seconds: dict[str, float] = {}
        for part, count in outcome.collected("rows_encrypted"):
            table = part.partition("|")[2]
            rows[table] = rows.get(table, 0) + count
        for part, duration in outcome.collected("seconds"):
            table = part.partition("|")[2]
            seconds[table] = seconds.get(table, 0.0) + duration
        for table, count in rows.items():
            if count:
                rate = count / seconds[table] if seconds[table] else 0
                self.show(
                    f"✓ Migrated {table}: {count:,} rows in {seconds[table]:.1f} s ({rate:,.0f} rows/s)"
                )
        if outcome.succeeded and not any(rows.values()):
            self.show("Nothing to do: every value is encrypted.")
        self.changed |= any(rows.values())
        if not self._ended(outcome):
            return False
        with index_builds(self.database, self._entries):
            indexes = self._stage(stages.BUILD_INDEXES, config={"reindex": True} if self.reindex else None)
        built = [(table, name) for table, names in indexes.collected("indexes_built") for name in names]
        for _, name in built:
            self.show(f"✓ Created index {name}")
        self.changed |= bool(built)
        return self._ended(indexes)

    def verify(self) -> bool:
        """Step 4."""
        with progress_bar("verifying", self.database, verified(self._entries)):
            looked = self._stage(stages.VERIFY_DATA, config=self.verification)
        verdict = self._stage(stages.VERIFY_TABLES)
        results = [self._verification(table) for table in self._entries]
        columns = [(table, column.name) for table in self._entries for column in table.columns]
        successful = sum(
            result.column_passed(column.name)
            for table, result in zip(self._entries, results, strict=True)
            if result is not None
            for column in table.columns
        )
        self.show("Migration verification results:")
        self.show(f"  Total tables: {len(self._entries)}")
        self.show(f"  Total columns: {len(columns)}")
        self.show(f"  Successful: {successful}")
        self.show(f"  Failed: {len(columns) - successful}")
        succeeded = looked.succeeded and successful == len(columns)
        if succeeded and not verdict.succeeded:
            # The asset's checks are of every table that was begun, not of those asked for.
            succeeded = all(result is not None and result.passed for result in results)
            others = self._unverified_others()
            if succeeded and others:
                self.show(f"  Not verified, and not asked for: {', '.join(others)}")
            elif succeeded:
                self._complain(verdict)
                return False
        if not succeeded:
            offenders = [f"{r.table}.{o}" for r in results if r is not None for o in r.offenders]
            reasons = [reason for r in results if r is not None for reason in r.reasons]
            for line in [*reasons, *offenders[:SHOWN_OFFENDERS]]:
                self.show(f"✗ {line}")
            if len(offenders) > SHOWN_OFFENDERS:
                self.show(f"  … and {len(offenders) - SHOWN_OFFENDERS} more, in encryption_verifications")
            if any(o.problem != "pending" for r in results if r is not None for o in r.offenders):
                self.show(
                    "  While plaintext is right, --repair-mismatched --migrate-data encrypts such values again."
                )
            if not reasons:
                self._complain(looked)
        return succeeded

    def _unverified_others(self) -> list[str]:
        others = [table for table in self.catalogue.tables if table.key not in self.tables]
        results = {table.key: self._verification(table) for table in others}
        return [key for key, result in results.items() if result is not None and not result.passed]

    def _verification(self, table: Table) -> TableVerification | None:
        try:
            with self.database.session(f"sum up the verification of {table.key}") as connection:
                return verify_table(connection, table, self.keys)
        except MigrationError:
            return None  # the run that just failed has said why

    def create_views(self) -> bool:
        """Step 6."""
        outcome = self._stage(stages.CREATE_VIEWS, heading="Creating compatibility views...")
        created = [name for _, names in outcome.collected("views_created") for name in names]
        for name in created:
            self.show(f"✓ Created view {name}")
        if outcome.succeeded and not created:
            self.show("Nothing to do: every view is there.")
        self.changed |= bool(created)
        return self._ended(outcome)

    def live_check(self) -> bool:
        """Validation script: write, read, look at the raw column."""
        return self._report("live_check", "check", live_check.REPORT)

    def benchmark_queries(self) -> bool:
        """Validation script: encrypted against plaintext."""
        return self._report("benchmark_queries", "benchmark", benchmark_queries.REPORT)

    def _report(self, name: str, op: str, report: str) -> bool:
        config = {"tables": list(self.tables)}
        outcome = self._timed(name, lambda: self.launcher.job(name, op, config))
        for line in outcome.output.get(report, ()):
            self.show(line)
        return self._ended(outcome)

    def switch_to_encrypted(self) -> bool:
        """Step 7."""
        return self._job("switch_to_ciphertext", "switch", "✓ Switched to the encrypted columns")

    def drop_unencrypted(self) -> bool:
        """Step 8, second half."""
        done = "✓ Dropped the unencrypted columns"
        return self._job("drop_unencrypted", "drop", done, {"operator": self.operator})

    def erase_dropped(self, confirmation: str) -> bool:
        """After step 8: rewrites the table, and says what remains where."""
        (table,) = self.tables
        self.show(f"Erasing what was dropped from {table}: nobody reads or writes it meanwhile...")
        answers = {"table": table, "confirmation": confirmation}
        outcome = self._timed("erase_dropped", lambda: self.launcher.job("erase_dropped", "erase", answers))
        if outcome.succeeded:
            first, *rest = outcome.output[erase_dropped.REPORT]
            self.show(f"✓ Erased what was dropped: {first}")
            for line in rest:
                self.show(f"  {line}")
            self.changed = True
        return self._ended(outcome)

    def revert_to_plaintext(self) -> bool:
        """Rollback before the drop."""
        return self._job("revert_to_plaintext", "revert", "✓ Reverted to the plaintext columns")

    def restore_plaintext(self) -> bool:
        """Rollback after the drop."""
        done = "✓ Restored the plaintext columns"
        if self.hold:
            done = "✓ Brought the plaintext columns back, and held before they are right"
        return self._job("restore_plaintext", "restore", done, {"hold": self.hold})

    def approve_drop(
        self, approver: str, reason: str, confirmation: str, valid_hours: float | None = None
    ) -> bool:
        """Step 8, first half: says what will be dropped, and records the approval."""
        table = self.catalogue.table(self.tables[0])
        with self.database.session(f"describe the drop of {table.key}") as connection:
            for line in describe(connection, read_table(connection, table, plaintext=False)).splitlines():
                self.show(line)
        answers: dict[str, object] = {"approver": approver, "reason": reason, "confirmation": confirmation}
        if valid_hours is not None:
            answers["valid_hours"] = valid_hours
        outcome = self._timed(
            "approve_drop",
            lambda: self.launcher.job("approve_drop", "approve", {"table": table.key, **answers}),
        )
        if outcome.succeeded:
            number, expires_at = outcome.output["approval"], outcome.output["expires_at"]
            self.show(
                f"  Approval {number} holds until {expires_at}; --revoke-approval {number} takes it back."
            )
            self.show(f"✓ Approved by {approver}: the plaintext of {table.key} may be dropped, once")
        return self._ended(outcome)

    def revoke_approval(self, number: int, reason: str) -> bool:
        """Take an approval back."""
        config = {"approval": number, "operator": self.operator, "reason": reason}
        outcome = self._timed(
            "revoke_approval", lambda: self.launcher.job("revoke_approval", "revoke", config)
        )
        if outcome.succeeded:
            self.show(f"✓ Revoked approval {number}")
        return self._ended(outcome)

    def analyze(self) -> bool:
        """Post-migration: statistics."""
        with index_builds(self.database, self._entries, what="analyzing"):
            return self._job("analyze_tables", "analyze", "✓ Analyzed")

    def rebuild_indexes(self, choice: str) -> bool:
        """Post-migration: indexes built anew."""
        with index_builds(self.database, self._entries, what="rebuilding indexes"):
            return self._job("reindex_tables", "rebuild", "✓ Rebuilt the indexes", {"indexes": choice})

    def _job(self, name: str, op: str, done: str, more: Mapping[str, object] | None = None) -> bool:
        # One run per table: a table that is refused does not hide what became of those before it.
        for table in self.tables:
            config = {"tables": [table], **(more or {})}
            outcome = self._timed(name, lambda: self.launcher.job(name, op, config))  # noqa: B023
            if not self._ended(outcome):
                return False
            changed = table in outcome.output.get(TABLES_CHANGED, ())
            self.show(f"{done}: {table}" if changed else f"Nothing to do: {table}")
            self.changed |= changed
        return True

    def _stage(
        self, stage: stages.Stage, *, heading: str | None = None, config: Mapping[str, object] | None = None
    ) -> Outcome:
        if heading is not None:
            self.show(heading)
        return self._timed(stage.asset, lambda: self.launcher.stage(stage, self.tables, config))

    def _timed(self, name: str, launch: Callable[[], Outcome]) -> Outcome:
        started = time.monotonic()
        outcome = launch()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
        if outcome.interrupted:
            # Dagster has turned the signal into a failed run; here it goes on to whoever called.
            raise KeyboardInterrupt
        return outcome

    def _ended(self, outcome: Outcome) -> bool:
        if not outcome.succeeded:
            self._complain(outcome)
        return outcome.succeeded

    def _complain(self, outcome: Outcome) -> None:
        for problem in outcome.problems:
            self.show(f"✗ {problem}")
