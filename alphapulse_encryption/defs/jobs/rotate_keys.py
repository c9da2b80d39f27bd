"""Key rotation as a whole: a version begins, everything is encrypted again and verified, older versions are retired."""

from collections import Counter
from typing import Any

import dagster as dg

from alphapulse_encryption.catalogue import Table
from alphapulse_encryption.defs.assets import by_range, verified_data
from alphapulse_encryption.defs.assets.groups import TARGET_POOL
from alphapulse_encryption.defs.jobs.single_op import NEVER_AGAIN, AnyTablesConfig, in_turn, named_tables
from alphapulse_encryption.defs.resources.effects import REPORT
from alphapulse_encryption.defs.resources.partitions import TablePart
from alphapulse_encryption.defs.resources.pools import in_table_pools
from alphapulse_encryption.defs.resources.reporting import actor, counted, safely
from alphapulse_encryption.defs.resources.schedules import cron
from alphapulse_encryption.defs.resources.target import TargetResource
from alphapulse_encryption.defs.resources.workers import PaceConfig, parts_of, work_through
from alphapulse_encryption.errors import MigrationError, RefusedError, TablesFailed
from alphapulse_encryption.migration.bookkeeping.keys import key_versions
from alphapulse_encryption.migration.bookkeeping.tables import table_state
from alphapulse_encryption.migration.rows.engine import RangeResult
from alphapulse_encryption.migration.rows.problems import Problem
from alphapulse_encryption.migration.rows.rotate import rotate_range
from alphapulse_encryption.migration.rows.verify import count_rows, verify_table
from alphapulse_encryption.migration.steps.versions import begin_rotation, retire_versions

JOB, BEGIN = "rotate_keys", "begin"
# What the values of a table lack that was never backfilled, or not to its end, a rotation cannot give them.
_OF_THE_BACKFILL: frozenset[Problem] = frozenset({"pending", "quarantined"})

Plan = dict[str, Any]


class RotationConfig(AnyTablesConfig, PaceConfig):
    """What to rotate, and how fast."""


@dg.op(
    name=BEGIN,
    pool=TARGET_POOL,
    description="Make the version of ALPHAPULSE_ENCRYPTION_KEY_VERSION the database's current one, if it is not.",
)
def begin(context: dg.OpExecutionContext, config: RotationConfig, target: TargetResource) -> Plan:
    with safely():
        chosen = named_tables(target.catalogue, config.tables or target.catalogue.keys)
        begun = begin_rotation(target.by(actor(context)))
        if begun.changed:
            context.log.info(f"Key version {begun.version} is current; before it was {begun.before}")
            for approval in begun.revoked:
                context.log.warning(
                    f"Approval {approval} of a drop is revoked: it was given before the rotation"
                )
        with target.database.session("look at the tables") as connection:
            known = key_versions(connection)
            tables = [t.key for t in chosen if known and table_state(connection, t) is not None]
        version = begun.version if begun.changed else 0
        report = [f"✓ Key version {version} is current"] if version else []
        context.add_output_metadata({"version_begun": version, "tables": tables, f"{REPORT}_{BEGIN}": report})
        told = {"tables": tables, "all": not config.tables, "changed": begun.changed, "failed": {}}
        return {**config.model_dump(), **told}


@dg.op(
    pool=TARGET_POOL,
    description="Encrypt again what is of older versions, table by table; each batch range is a partition of "
    "`rotated_data`, which can be run again by itself.",
)
def reencrypt(context: dg.OpExecutionContext, target: TargetResource, plan: Plan) -> Plan:
    with safely():
        rows: Counter[str] = Counter()

        def done(part: TablePart, result: RangeResult) -> None:
            rows[part.table] += result.rows
            told = by_range.describe(by_range.ROTATED, result)
            context.log_event(
                dg.AssetMaterialization(by_range.ROTATED, partition=part.partition, metadata=told)
            )

        config = PaceConfig(**{name: plan[name] for name in PaceConfig.model_fields})

        def one(table: Table) -> None:
            parts = parts_of(target, [table.key])
            with in_table_pools(context, [table.key]):
                work_through(context, config, target, by_range.ROTATED, parts, rotate_range, done)
            context.log.info(f"{table.key}: {counted(rows[table.key], 'row')} encrypted again")

        failed = in_turn(context, map(target.catalogue.table, plan["tables"]), one)
        report = [f"✓ Encrypted {table} again: {count:,} rows" for table, count in rows.items() if count]
        context.add_output_metadata({"rows_by_table": dict(rows), f"{REPORT}_reencrypt": report})
        return {**plan, "failed": failed, "changed": plan["changed"] or any(rows.values())}


@dg.op(
    pool=TARGET_POOL,
    description="Decrypt and compare every value of the tables, unless nothing was of an older version.",
)
def verify(context: dg.OpExecutionContext, target: TargetResource, plan: Plan) -> Plan:
    with safely():
        with target.database.session("look at the key versions") as connection:
            to_retire = any(version.state == "readable" for version in key_versions(connection))
        if not (plan["changed"] or to_retire):
            context.log.info("Nothing was of an older key version")
            context.add_output_metadata({"tables_verified": []})
            return plan
        verified: list[str] = []

        def one(table: Table) -> None:
            wrong: list[str] = []
            for part, outcome in verified_data.verified_parts(
                actor(context), plan["workers"], target, parts_of(target, [table.key])
            ):
                if isinstance(outcome, MigrationError):
                    wrong.append(f"{part.partition}: {outcome.args[0]}")
                    continue
                told = verified_data.describe(outcome)
                context.log_event(
                    dg.AssetMaterialization(verified_data.NAME, partition=part.partition, metadata=told)
                )
                faults = (o for o in outcome.offenders if o.problem not in _OF_THE_BACKFILL)
                wrong += [f"{table.key}.{fault}" for fault in faults]
            count_rows(target.by(actor(context)), table)
            if wrong:
                with target.database.session("sum up the verification") as connection:
                    wrong += verify_table(connection, table, target.key_ring).advice
                raise RefusedError(
                    "Not verified after the rotation:\n" + "\n".join(f"- {line}" for line in wrong)
                )
            verified.append(table.key)

        encrypted = [target.catalogue.table(key) for key in plan["tables"] if key not in plan["failed"]]
        failed = plan["failed"] | in_turn(context, encrypted, one)
        report = [f"✓ Verified {', '.join(verified)}"] if verified else []
        context.add_output_metadata({"tables_verified": verified, f"{REPORT}_verify": report})
        return {**plan, "failed": failed}


@dg.op(
    pool=TARGET_POOL,
    description="Retire every older version of which no value is left in any table; say where the others are.",
)
def retire(context: dg.OpExecutionContext, target: TargetResource, plan: Plan) -> None:
    with safely():
        if plan["failed"]:
            raise TablesFailed("No key version is retired before that is corrected.", plan["failed"])
        found = retire_versions(target.by(actor(context)))
        report = [f"✓ Key version {version} is retired: no value of it is left" for version in found.retired]
        for line in report:
            context.log.info(line)
        for version in found.reinstated:
            context.log.warning(f"Key version {version} was retired, and values of it turned up again")
        for line in found.describe().values():
            context.log.warning(line)
        left = {count.table: str(count) for count in found.counts}
        for table, text in left.items():
            context.log.info(f"{table}: {text}")
        if found.remaining and plan["all"]:
            raise TablesFailed(
                "Run it again once no instance of the application writes that version any more, and once nothing "
                "is pending.",
                found.describe(),
            )
        report += [f"! {line}" for line in found.describe().values()]
        context.add_output_metadata(
            {"versions_retired": list(found.retired), f"{REPORT}_retire": report, **left}
        )


@dg.graph(name=JOB)
def _rotation() -> None:
    retire(verify(reencrypt(begin())))


def build() -> dg.JobDefinition:
    """The job ``rotate_keys``."""
    return _rotation.to_job(
        tags=NEVER_AGAIN,
        executor_def=dg.in_process_executor,
        description="**After the migration: key rotation.** Every instance of the application has to be able to read "
        "the new version, and ALPHAPULSE_ENCRYPTION_KEY_VERSION has to name it: see README, Rotating keys. Encrypts "
        "all values again under it, online, verifies them, and retires the versions of which nothing is left. Can be "
        "stopped and run again; does nothing where nothing is of an older version.",
    )


def build_schedule() -> dg.ScheduleDefinition:
    """The schedule ``key_rotation``, stopped until somebody starts it."""
    return dg.ScheduleDefinition(
        name="key_rotation",
        job_name=JOB,
        cron_schedule=cron("rotation"),
        description="Runs `rotate_keys` (ALPHAPULSE_ROTATION_SCHEDULE says when). A rotation begins only where "
        "ALPHAPULSE_ENCRYPTION_KEY_VERSION names a new version; otherwise what old instances wrote since is caught "
        "up, or nothing happens.",
    )
