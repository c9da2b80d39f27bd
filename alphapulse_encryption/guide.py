"""The guide: every step of it, declared once.

Belongs here: what a step is called, what it launches, who may run it, which options it takes, and where it stands in
the plan and in a rehearsal. The command line, the jobs, the plan and the roles derive from it. Does not belong here:
how a step does its work (``migration``), the state of a table that it needs
(``lifecycle``), and what is no step (reports, keys, settings).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Role = Literal["planner", "migrator", "approver", "verifier", "backup"]
# Sets of privileges on the bookkeeping; ``migration.gates.roles`` says which.
Right = Literal["audit", "migration", "verification", "backup", "approval", "revocation"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a step that one job does.

    Args:
        job: its name.
        asset: what it materializes; empty where ``op`` does the work.
        op: the job's first op.
        over: what the asset's partitions are.
        tables: how the op is told of tables: a run for each, all in one run, the only one, or none.
        config: options that go into the job's configuration, under their own names.
        description: of an asset's job, for the UI.
        heading: printed before it begins; ``{table}`` is the first table.
        nothing: printed behind "Nothing to do: " where no table was changed.
        plan: its name in the plan; empty where the plan leaves it out.
        title: in the plan, for a person.
        rehearsed: the rehearsal's stage that does the same.
    """

    job: str
    asset: str = ""
    op: str = ""
    over: Literal["database", "table", "range"] = "database"
    tables: Literal["each", "all", "one", "none"] = "each"
    config: tuple[str, ...] = ()
    description: str = ""
    heading: str = ""
    nothing: str = ""
    plan: str = ""
    title: str = ""
    rehearsed: str = ""

    @property
    def works(self) -> str:
        """The name of what works in the run: the asset's op, or the op."""
        return self.asset or self.op


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step: a flag of the command line, and what it launches.

    Args:
        name: of the flag, with underscores.
        number: where it stands in the guide, in words.
        help: what it does.
        stages: what it launches, in this order.
        role: who runs it.
        data: what that role has to be able to do with the catalogued tables.
        rights: what it has to be able to write in the bookkeeping.
        creates: whether it makes indexes, views or functions.
        before: the step that it runs ahead of where both are asked for, unlike in the list here.
        value: the member of the configuration that the flag's own value becomes; empty where it takes none.
        choices: what the value may be; empty where it is a number.
        number_of: what number the value is, in words.
        takes: further options, which go into no configuration.
    """

    name: str
    number: str = ""
    help: str
    stages: tuple[Stage, ...]
    role: Role
    data: Literal["nothing", "read", "own"]
    rights: tuple[Right, ...] = ()
    creates: bool = False
    before: str = ""
    value: str = ""
    choices: tuple[str, ...] = ()
    number_of: str = ""
    takes: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return flag(self.name)

    @property
    def options(self) -> tuple[str, ...]:
        """The options that change what it does."""
        return (*(name for stage in self.stages for name in stage.config), *self.takes)

    @property
    def command(self) -> str:
        """What to type."""
        return f"{self.flag} --confirm" if "confirm" in self.takes else self.flag


_PACE = ("batch_size", "workers", "work_mem", "autovacuum_off")

# In the order of the help, and of the guide.
STEPS: tuple[Step, ...] = (
    Step(
        name="preflight",
        help="check what would block the migration; reads only",
        stages=(
            Stage(
                job="run_preflight",
                asset="preflight",
                description="Pre-migration checklist; reads only (--preflight).",
                rehearsed="preflight",
            ),
        ),
        role="planner",
        data="nothing",
    ),
    Step(
        name="backup",
        help="take an encrypted, verified backup",
        stages=(
            Stage(
                job="take_backup",
                asset="backup",
                config=("restore_drill",),
                description="An encrypted backup, read back (--backup).",
                rehearsed="backup",
            ),
        ),
        role="backup",
        data="read",
        rights=("backup",),
    ),
    Step(
        name="add_columns",
        number="step 2",
        help="add encrypted columns and guards",
        stages=(
            Stage(
                job="add_columns",
                asset="encrypted_columns",
                over="table",
                description="Step 2: encrypted columns beside the plaintext ones, and guards (--add-columns).",
                heading="Adding encrypted columns to tables...",
                nothing="every encrypted column is there.",
                plan="columns",
                title="Encrypted columns and guard",
                rehearsed="columns",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
    ),
    Step(
        name="migrate_data",
        number="step 3",
        help="encrypt what is pending, build indexes",
        stages=(
            Stage(
                job="migrate_data",
                asset="encrypted_data",
                over="range",
                config=_PACE,
                description="Step 3: encrypt what is pending (--migrate-data).",
                heading="Migrating data...",
                nothing="every value is encrypted.",
                plan="data",
                title="Backfill",
                rehearsed="backfill",
            ),
            Stage(
                job="build_indexes",
                asset="search_indexes",
                over="table",
                config=("reindex",),
                description="Step 3, after the data: search indexes and statistics (--migrate-data).",
                plan="indexes",
                title="Indexes",
                rehearsed="indexes",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
        takes=("runs",),
    ),
    Step(
        name="verify",
        number="step 4",
        help="decrypt and compare every value",
        stages=(
            Stage(
                job="verify_data",
                asset="verified_data",
                over="range",
                config=("workers",),
                description="Step 4: decrypt and compare every value (--verify).",
                plan="verification",
                title="Verification",
                rehearsed="verify",
            ),
            Stage(
                job="verify_tables",
                asset="verified_table",
                over="table",
                description="Step 4: the verdict per table (--verify).",
            ),
        ),
        role="verifier",
        data="read",
        rights=("verification",),
        takes=("runs",),
    ),
    Step(
        name="live_check",
        number="validation",
        help="write, read and look at the raw columns of live rows; nothing remains",
        stages=(Stage(job="live_check", op="check", tables="all"),),
        role="migrator",
        data="own",
        rights=("migration",),
    ),
    Step(
        name="benchmark_queries",
        number="validation",
        help="time queries on the encrypted and the plaintext columns; reads only",
        stages=(Stage(job="benchmark_queries", op="benchmark", tables="all"),),
        role="verifier",
        data="read",
    ),
    Step(
        name="create_views",
        number="step 6",
        help="create the compatibility views",
        stages=(
            Stage(
                job="create_views",
                asset="compatibility_views",
                over="table",
                description="Step 6: compatibility views (--create-views).",
                heading="Creating compatibility views...",
                nothing="every view is there.",
                plan="views",
                title="Compatibility views",
                rehearsed="views",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
    ),
    Step(
        name="switch_to_encrypted",
        number="step 7",
        help="make the encrypted columns the right side",
        stages=(
            Stage(
                job="switch_to_ciphertext",
                op="switch",
                plan="switch",
                title="Switch to ciphertext",
                rehearsed="switch",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
    ),
    Step(
        name="approve_drop",
        number="step 8",
        help="approve the drop of one table (see below)",
        stages=(
            Stage(
                job="approve_drop",
                op="approve",
                tables="one",
                config=("approver", "reason", "confirmation", "valid_hours"),
                rehearsed="approval",
            ),
        ),
        role="approver",
        data="nothing",
        rights=("approval", "audit"),
    ),
    Step(
        name="drop_unencrypted",
        number="step 8",
        help="drop the plaintext columns; needs an approval",
        stages=(
            Stage(
                job="drop_unencrypted",
                op="drop",
                config=("operator",),
                plan="drop",
                title="Drop of the plaintext",
                rehearsed="drop",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        takes=("confirm",),
    ),
    Step(
        name="erase_dropped",
        number="after step 8, in a maintenance window",
        help="rewrite one table, locked meanwhile, and say what remains",
        stages=(
            Stage(
                job="erase_dropped",
                op="erase",
                tables="one",
                config=("confirmation",),
                heading="Erasing what was dropped from {table}: nobody reads or writes it meanwhile...",
                rehearsed="erasure",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
    ),
    Step(
        name="revoke_approval",
        help="take approval N back (see --approvals)",
        stages=(Stage(job="revoke_approval", op="revoke", tables="none", config=("operator", "reason")),),
        role="approver",
        data="nothing",
        rights=("revocation", "audit"),
        before="approve_drop",
        value="approval",
        number_of="the number of an approval, as --approvals shows it",
    ),
    Step(
        name="replan",
        number="before step 3",
        help="cut the tables anew into ALPHAPULSE_BATCH_RANGES",
        stages=(Stage(job="replan_ranges", op="replan"),),
        role="migrator",
        data="own",
        rights=("migration",),
        before="preflight",
    ),
    Step(
        name="repair_mismatched",
        number="before step 3",
        help="clear the ciphertext that the last --verify named as wrong, to be encrypted again",
        stages=(Stage(job="repair_mismatched", op="repair"),),
        role="migrator",
        data="own",
        rights=("migration",),
        before="migrate_data",
    ),
    Step(
        name="revert_to_plaintext",
        number="rollback before the drop",
        help="plaintext is right again",
        stages=(Stage(job="revert_to_plaintext", op="revert"),),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
    ),
    Step(
        name="restore_plaintext",
        number="rollback after the drop",
        help="rebuild the plaintext columns",
        stages=(Stage(job="restore_plaintext", op="restore", config=("hold",), rehearsed="restore"),),
        role="migrator",
        data="own",
        rights=("migration",),
        creates=True,
    ),
    Step(
        name="rebuild_indexes",
        number="after the migration",
        help="build the tables' indexes anew, concurrently: all of them, or only those with an encrypted or search "
        "column in them",
        stages=(Stage(job="reindex_tables", op="rebuild"),),
        role="migrator",
        data="own",
        rights=("audit",),
        creates=True,
        value="indexes",
        choices=("all", "encrypted"),
    ),
    Step(
        name="analyze",
        number="after the migration",
        help="take the planner's statistics anew",
        stages=(Stage(job="analyze_tables", op="analyze"),),
        role="migrator",
        data="own",
        rights=("audit",),
    ),
    Step(
        name="rotate_keys",
        number="after the migration",
        help="encrypt again, under ALPHAPULSE_ENCRYPTION_KEY_VERSION, what is of an older key version; verify it, and "
        "retire the versions of which nothing is left",
        stages=(
            Stage(
                job="rotate_keys",
                op="begin",
                tables="all",
                config=_PACE,
                heading="Rotating keys...",
                nothing="every value is of the current key version.",
            ),
        ),
        role="migrator",
        data="own",
        rights=("migration",),
        before="replan",
    ),
)


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def step(name: str) -> Step:
    """The step of that name."""
    return next(one for one in STEPS if one.name == name)


def in_running_order() -> Iterator[Step]:
    """The steps, in the order in which they run where several are asked for."""
    for one in STEPS:
        if not one.before:
            yield from _with_earlier(one)


def _with_earlier(later: Step) -> Iterator[Step]:
    for one in STEPS:
        if one.before == later.name:
            yield from _with_earlier(one)
    yield later


def takers(option: str) -> tuple[Step, ...]:
    """The steps that an option goes with."""
    return tuple(one for one in STEPS if option in one.options)


def stages() -> Iterator[Stage]:
    """What the steps launch."""
    for one in STEPS:
        yield from one.stages


def stage(works: str) -> Stage:
    """The stage of an asset or an op."""
    return next(one for one in stages() if one.works == works)


def planned() -> dict[str, tuple[Step, Stage]]:
    """What the plan tells of, in its order, by its names there."""
    return {part.plan: (one, part) for one in STEPS for part in one.stages if part.plan}
