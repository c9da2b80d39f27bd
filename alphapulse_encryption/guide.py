"""The guide: every step of it, declared once.

Belongs here: what a step is called, what it launches, who may run it, which options it takes, and where it stands in
the plan. The command line, the jobs, the plan and the roles derive from it. Does not belong here: how a step does its
work (``migration``), the state of a table that it needs (``lifecycle``), and what is no step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Role = Literal["planner", "migrator", "approver", "verifier", "backup"]
# Sets of privileges on the bookkeeping; ``migration.gates.roles`` says which.
Right = Literal["audit", "migration", "verification", "backup", "approval", "revocation"]


@dataclass(frozen=True)
class Stage:
    """A part of a step that one job does: it materializes an asset, or an op does the work.

    Args:
        job: its name.
        works: the name of the asset, or of the job's first op.
        over: what the asset's partitions are; for an op, how it is told of tables: a run for ``each``, ``all`` in one
            run, the only ``one``, or ``none``.
        config: options that go into the job's configuration, under their own names.
        plan: its name in the plan, and its title there; empty where the plan leaves it out.
        heading: printed before it begins; ``{table}`` is the first table.
        nothing: printed behind "Nothing to do: " where no table was changed.
        here: the command executes it itself, whatever executes other runs: the database vouches for the role.
    """

    job: str
    works: str
    over: Literal["database", "table", "range", "each", "all", "one", "none"] = "each"
    config: tuple[str, ...] = ()
    plan: tuple[str, str] = ("", "")
    heading: str = ""
    nothing: str = ""
    here: bool = False

    @property
    def is_asset(self) -> bool:
        return self.over in ("database", "table", "range")


@dataclass(frozen=True)
class Needs:
    """Which group role runs a step, and what that role has to be able to do.

    That is with the data of the catalogued tables, and in the bookkeeping, which it reads in any case; and whether it
    makes indexes, views or functions.
    """

    role: Role
    data: Literal["nothing", "read", "own"]
    rights: tuple[Right, ...] = ()
    creates: bool = False


@dataclass(frozen=True)
class Step:
    """A step: a flag of the command line, and what it launches.

    Args:
        name: of the flag, with underscores.
        takes: options that go into no job's configuration.
        before: the step that it runs ahead of where both are asked for, unlike in the list here.
        value: the member of the configuration that the flag's own value becomes; empty where it takes none.
        number: what number the value is, in words, where there are no choices.
    """

    name: str
    help: str
    needs: Needs
    stages: tuple[Stage, ...]
    takes: tuple[str, ...] = ()
    before: str = ""
    value: str = ""
    choices: tuple[str, ...] = ()
    number: str = ""

    @property
    def flag(self) -> str:
        """The option as it is typed."""
        return flag(self.name)

    @property
    def options(self) -> tuple[str, ...]:
        return (*(name for stage in self.stages for name in stage.config), *self.takes)

    @property
    def command(self) -> str:
        """What to type, where no more is needed; the mildest choice."""
        return " ".join((self.flag, *self.choices[-1:], *(["--confirm"] if "confirm" in self.takes else [])))


_MIGRATES = Needs("migrator", "own", ("migration",))
_CREATES = Needs("migrator", "own", ("migration",), creates=True)
_PACE = ("batch_size", "workers", "work_mem", "autovacuum_off")

# In the order of the help, and of the guide.
STEPS: tuple[Step, ...] = (
    Step(
        "preflight",
        "check what would block the migration; reads only",
        Needs("planner", "nothing"),
        (Stage("run_preflight", "preflight", "database"),),
    ),
    Step(
        "backup",
        "take an encrypted, verified backup",
        Needs("backup", "read", ("backup",)),
        (Stage("take_backup", "backup", "database", ("restore_drill",)),),
    ),
    Step(
        "add_columns",
        "step 2: add encrypted columns and guards",
        _CREATES,
        (
            Stage(
                "add_columns",
                "encrypted_columns",
                "table",
                plan=("columns", "Encrypted columns and guard"),
                heading="Adding encrypted columns to tables...",
                nothing="every encrypted column is there.",
            ),
        ),
    ),
    Step(
        "migrate_data",
        "step 3: encrypt what is pending, build indexes",
        _CREATES,
        (
            Stage(
                "migrate_data",
                "encrypted_data",
                "range",
                _PACE,
                plan=("data", "Backfill"),
                heading="Migrating data...",
                nothing="every value is encrypted.",
            ),
            Stage("build_indexes", "search_indexes", "table", ("reindex",), plan=("indexes", "Indexes")),
        ),
        takes=("runs",),
    ),
    Step(
        "verify",
        "step 4: decrypt and compare every value",
        Needs("verifier", "read", ("verification",)),
        (
            Stage(
                "verify_data",
                "verified_data",
                "range",
                ("workers",),
                plan=("verification", "Verification"),
            ),
            Stage("verify_tables", "verified_table", "table"),
        ),
        takes=("runs",),
    ),
    Step(
        "live_check",
        "validation: write, read and look at the raw columns of live rows; nothing remains",
        _MIGRATES,
        (Stage("live_check", "check", "all"),),
    ),
    Step(
        "benchmark_queries",
        "validation: time queries on the encrypted and the plaintext columns; reads only",
        Needs("verifier", "read"),
        (Stage("benchmark_queries", "benchmark", "all"),),
    ),
    Step(
        "create_views",
        "step 6: create the compatibility views",
        _CREATES,
        (
            Stage(
                "create_views",
                "compatibility_views",
                "table",
                plan=("views", "Compatibility views"),
                heading="Creating compatibility views...",
                nothing="every view is there.",
            ),
        ),
    ),
    Step(
        "switch_to_encrypted",
        "step 7: make the encrypted columns the right side",
        _CREATES,
        (Stage("switch_to_ciphertext", "switch", plan=("switch", "Switch to ciphertext")),),
    ),
    Step(
        "approve_drop",
        "step 8: approve the drop of one table (see below)",
        Needs("approver", "nothing", ("approval", "audit")),
        (
            Stage(
                "approve_drop",
                "approve",
                "one",
                ("approver", "reason", "confirmation", "valid_hours"),
                here=True,
            ),
        ),
    ),
    Step(
        "drop_unencrypted",
        "step 8: drop the plaintext columns; needs an approval",
        _MIGRATES,
        (Stage("drop_unencrypted", "drop", "each", ("operator",), plan=("drop", "Drop of the plaintext")),),
        takes=("confirm",),
    ),
    Step(
        "erase_dropped",
        "after step 8, in a maintenance window: rewrite one table, locked meanwhile, and say what remains",
        _MIGRATES,
        (
            Stage(
                "erase_dropped",
                "erase",
                "one",
                ("confirmation",),
                heading="Erasing what was dropped from {table}: nobody reads or writes it meanwhile...",
            ),
        ),
    ),
    Step(
        "revoke_approval",
        "take approval N back (see --approvals)",
        Needs("approver", "nothing", ("revocation", "audit")),
        (Stage("revoke_approval", "revoke", "none", ("operator", "reason"), here=True),),
        before="approve_drop",
        value="approval",
        number="the number of an approval, as --approvals shows it",
    ),
    Step(
        "replan",
        "before step 3: cut the tables anew into ALPHAPULSE_BATCH_RANGES",
        _MIGRATES,
        (Stage("replan_ranges", "replan"),),
        before="preflight",
    ),
    Step(
        "repair_mismatched",
        "before step 3: clear the ciphertext that the last --verify named as wrong, to be encrypted again",
        _MIGRATES,
        (Stage("repair_mismatched", "repair"),),
        before="migrate_data",
    ),
    Step(
        "revert_to_plaintext",
        "rollback before the drop: plaintext is right again",
        _CREATES,
        (Stage("revert_to_plaintext", "revert"),),
    ),
    Step(
        "restore_plaintext",
        "rollback after the drop: rebuild the plaintext columns",
        _CREATES,
        (Stage("restore_plaintext", "restore", "each", ("hold",)),),
    ),
    Step(
        "rebuild_indexes",
        "after the migration: build the tables' indexes anew, concurrently: all of them, or only those with an "
        "encrypted or search column in them",
        Needs("migrator", "own", ("audit",), creates=True),
        (Stage("reindex_tables", "rebuild"),),
        value="indexes",
        choices=("all", "encrypted"),
    ),
    Step(
        "analyze",
        "after the migration: take the planner's statistics anew",
        Needs("migrator", "own", ("audit",)),
        (Stage("analyze_tables", "analyze"),),
    ),
    Step(
        "rotate_keys",
        "after the migration: encrypt again, under ALPHAPULSE_ENCRYPTION_KEY_VERSION, what is of an older key "
        "version; verify it, and retire the versions of which nothing is left",
        _MIGRATES,
        (
            Stage(
                "rotate_keys",
                "begin",
                "all",
                _PACE,
                heading="Rotating keys...",
                nothing="every value is of the current key version.",
            ),
        ),
        before="replan",
    ),
)


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def step(name: str) -> Step:
    return next(one for one in STEPS if one.name == name)


def in_running_order() -> list[Step]:
    """The steps, in the order in which they run where several are asked for."""
    order = [one for one in STEPS if not one.before]
    for one in STEPS:
        if one.before:
            order.insert(order.index(step(one.before)), one)
    return order


def takers(option: str) -> tuple[str, ...]:
    """The steps that an option goes with."""
    return tuple(one.name for one in STEPS if option in one.options)


def stages() -> Iterator[Stage]:
    for one in STEPS:
        yield from one.stages


def stage(works: str) -> Stage:
    """The stage of an asset or an op."""
    return next(one for one in stages() if one.works == works)


def planned() -> dict[str, tuple[str, str]]:
    """What the plan tells of, in its order: by its name there, the title and the command."""
    return {part.plan[0]: (part.plan[1], one.command) for one in STEPS for part in one.stages if part.plan[0]}
