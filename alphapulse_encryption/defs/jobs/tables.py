"""Jobs that work on named tables, one after the other: those that change sides, destroy, undo, or look after them."""

import time

import dagster as dg
from pydantic import Field

from alphapulse_encryption import settings
from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.assets import by_table
from alphapulse_encryption.defs.jobs.single_op import TablesConfig, table_job
from alphapulse_encryption.defs.resources.effects import Effect, On
from alphapulse_encryption.defs.resources.environment import backup_bucket
from alphapulse_encryption.defs.resources.reporting import counted
from alphapulse_encryption.defs.resources.target import default_rule
from alphapulse_encryption.defs.resources.workers import told
from alphapulse_encryption.errors import ConfigurationError
from alphapulse_encryption.migration.gates.preflight import readable_size
from alphapulse_encryption.migration.rows import batch_ranges, repair
from alphapulse_encryption.migration.schema import indexes
from alphapulse_encryption.migration.schema.indexes import IndexChoice
from alphapulse_encryption.migration.steps import analyze, drop, restore, switch


class DropConfig(TablesConfig):
    """Which tables, and who drops their plaintext."""

    operator: str = Field(
        default="",
        description="Your name, for the audit log. Where the two-person rule holds, which it does outside the sample, "
        "it cannot be the name of who approved.",
        examples=["Grace Example"],
    )


class RestoreConfig(TablesConfig):
    """Which tables, and how far."""

    hold: bool = Field(
        default=False,
        description="Stop before the plaintext becomes right, so that every instance of the application can be "
        "brought to the phase dual; run again without it to end the restore.",
    )


class IndexesConfig(TablesConfig):
    """Which tables, and which of their indexes."""

    indexes: str = Field(
        description="`all`: every index of the tables, all of a table's at once, which needs room for a second copy of "
        "them; `encrypted`: those that have an encrypted or search column in them, one after the other. No default, "
        "on purpose.",
        examples=["encrypted"],
    )


def _switch(on: On[TablesConfig], table: Table) -> Effect:
    if switch.switch_to_ciphertext(on.target, table) is None:
        return Effect(lines=[f"{table.key}: was switched already"])
    return Effect("switched to ciphertext", [f"✓ Switched to the encrypted columns: {table.key}"])


def _revert(on: On[TablesConfig], table: Table) -> Effect:
    if switch.revert_to_plaintext(on.target, table, on_progress=told(on.context)) is None:
        return Effect(lines=[f"{table.key}: was on plaintext already"])
    return Effect("reverted to plaintext", [f"✓ Reverted to the plaintext columns: {table.key}"])


def _drop(on: On[DropConfig], table: Table) -> Effect:
    result = drop.drop_plaintext(
        on.target,
        table,
        backups=settings.backup_directory(),
        bucket=backup_bucket(),
        operator=on.config.operator,
        default_rule=default_rule(),
    )
    dropped = f"✓ Dropped the unencrypted columns: {table.key}"
    if result.what is None:
        if not result.changed:
            return Effect(lines=[f"{table.key}: was dropped already"])
        on.log(f"{table.key}: an interrupted drop was finished")
        return Effect("dropped", [dropped])
    columns = [column.name for column in result.what.columns]
    on.log(
        f"{table.key}: dropped {', '.join(columns)}; rows changed since the verification, which were "
        f"verified before: {result.changed_rows}"
    )
    on.context.log_event(
        dg.AssetMaterialization(
            asset_key=by_table.DROPPED,
            partition=table.key,
            metadata={
                "columns_dropped": columns,
                "approved_by": result.approver,
                "dropped_by": on.config.operator or "not said",
                "changed_rows_verified": result.changed_rows,
                "seconds": round(result.seconds, 3),
            },
        )
    )
    return Effect("dropped", [dropped])


def _restore(on: On[RestoreConfig], table: Table) -> Effect:
    result = restore.restore_plaintext(on.target, table, hold=on.config.hold, on_progress=told(on.context))
    if result is None:
        return Effect(lines=[f"{table.key}: nothing was dropped, nothing to restore"])
    on.log(f"{table.key}: restored {', '.join(result.columns)}, {result.filled.rows} rows")
    on.context.log_event(
        dg.AssetObservation(
            asset_key=by_table.DROPPED,
            partition=table.key,
            description="The plaintext is back: restored from the ciphertext.",
            metadata={"columns_restored": list(result.columns), "rows": result.filled.rows},
        )
    )
    if result.held:
        done = "✓ Brought the plaintext columns back, and held before they are right"
        return Effect("held before the plaintext is right", [f"{done}: {table.key}"])
    return Effect("restored", [f"✓ Restored the plaintext columns: {table.key}"])


def _replan(on: On[TablesConfig], table: Table) -> Effect:
    on.resource.refuse_another_key()
    count = batch_ranges.replan_ranges(on.database, table, on.actor, count=on.resource.batch_ranges)
    return Effect(f"cut into {count} batch ranges", [f"✓ Cut anew into batch ranges: {table.key}"])


def _repair(on: On[TablesConfig], table: Table) -> Effect:
    result = repair.repair_mismatched(on.target, table, on_progress=told(on.context))
    for column, count in result.by_column.items():
        on.log(f"{table.key}.{column}: {counted(count, 'value')} cleared")
    if result.changed_meanwhile:
        rows = counted(result.changed_meanwhile, "row")
        on.log(f"{table.key}: {rows} left alone, just being written")
    if not result.changed:
        return Effect(lines=[f"{table.key}: the last verification named nothing to clear"])
    return Effect("cleared", [f"✓ Cleared, to be encrypted again by --migrate-data: {table.key}"])


def _analyze(on: On[TablesConfig], table: Table) -> Effect:
    started = time.monotonic()
    rows = analyze.analyze(on.database, table, on.actor, on_progress=on.log)
    on.log(f"{table.key}: analyzed in {time.monotonic() - started:.1f} s, about {rows:,} rows")
    return Effect("analyzed", [f"✓ Analyzed: {table.key}"])


def _rebuild(on: On[IndexesConfig], table: Table) -> Effect:
    if on.config.indexes not in {"all", "encrypted"}:
        raise ConfigurationError("Say which indexes: `all`, or only those of `encrypted` columns.")
    choice: IndexChoice = "all" if on.config.indexes == "all" else "encrypted"
    result = indexes.reindex(on.database, table, on.actor, choice=choice, on_wait=on.log, progress=True)
    for name in result.leftovers:
        on.log(f"{table.key}: dropped {name}, which an interrupted rebuild had left")
    sizes = f"{readable_size(result.bytes_before)} → {readable_size(result.bytes_after)}"
    rebuilt = ", ".join(result.reindexed) or "no index"
    on.log(f"{table.key}: rebuilt {rebuilt} in {result.seconds:.1f} s, {sizes}")
    if not result.reindexed:
        return Effect(entries={"sizes": sizes})
    return Effect("rebuilt", [f"✓ Rebuilt the indexes: {table.key}"], {"sizes": sizes})


def build() -> list[dg.JobDefinition]:
    """The jobs, in the guide's order."""
    return [
        table_job(
            "switch",
            TablesConfig,
            _switch,
            "**Step 7.** Makes the encrypted columns of the named tables the source of truth. Needs verified tables. "
            "From then on the application may write the encrypted columns alone. Reversible until the drop, with "
            "`revert_to_plaintext`.",
        ),
        table_job(
            "revert",
            TablesConfig,
            _revert,
            "**Rollback before the drop.** Brings the plaintext columns up to date where the application wrote "
            "ciphertext alone, makes them the source of truth again, and removes guard triggers and views. The "
            "encrypted columns stay for a retry, which begins with `encrypted_columns`.",
        ),
        table_job(
            "drop",
            DropConfig,
            _drop,
            "**Step 8.** Drops the plaintext columns of the named tables. Needs an approval of each, given with "
            "`approve_drop`, unused, unexpired, and for exactly what is there now; by another person, where the "
            "two-person rule holds. `restore_plaintext` undoes it.",
        ),
        table_job(
            "restore",
            RestoreConfig,
            _restore,
            "**Rollback after the drop.** Decrypts the ciphertext into new plaintext columns, with the types, "
            "defaults, constraints, indexes and privileges that the drop saved. Online; can be stopped and run again. "
            "Then every value is verified. Where instances write ciphertext alone, run it with `hold` first, and "
            "without it when all are in the phase dual: at its end ciphertext alone is refused.",
        ),
        table_job(
            "replan",
            TablesConfig,
            _replan,
            "**Before step 3, where needed.** Cuts tables anew into `ALPHAPULSE_BATCH_RANGES` batch ranges, for "
            "example after they have grown. What is encrypted stays so; verification results are discarded. Refused "
            "while a range is being worked on.",
        ),
        table_job(
            "repair",
            TablesConfig,
            _repair,
            "**After step 4, where needed.** While plaintext is right: clears the ciphertext and tokens that the last "
            "verification found mismatched or undecryptable, and only those, so that `encrypted_data` encrypts them "
            "again. Their keys are in the audit log. What only the ciphertext held is lost: look at those rows first.",
        ),
        table_job(
            "analyze",
            TablesConfig,
            _analyze,
            "**After the migration.** Takes the planner's statistics of tables anew (`ANALYZE`), beside the "
            "application.",
        ),
        table_job(
            "rebuild",
            IndexesConfig,
            _rebuild,
            "**After the migration.** Builds indexes of tables anew (`REINDEX CONCURRENTLY`), beside the application; "
            "what an interrupted rebuild left is dropped first.",
        ),
    ]
