"""The commands for the day, in the order that guide and application need, for the tables that were rehearsed.

They hold neither addresses nor keys: both come from the environment.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from alphapulse_encryption.rehearsal.measures import Rehearsal, Stage

PROGRAM = "python -m alphapulse_encryption"


@dataclass(frozen=True)
class Step:
    """Something to do.

    Args:
        title: what.
        commands: to be run one after another; empty where the step is the application's.
        note: what to know of it, or to look for.
        stages: whose durations it takes.
        locks: whether the application has to wait for it.
    """

    title: str
    commands: tuple[str, ...] = ()
    note: str = ""
    stages: tuple[Stage, ...] = ()
    locks: bool = False


def tables_of(rehearsal: Rehearsal) -> tuple[str, ...]:
    """The tables that were rehearsed, by key."""
    return tuple(rehearsal.before.tables)


def the_day(rehearsal: Rehearsal) -> tuple[Step, ...]:
    """All the way to dropped and erased plaintext."""
    tables = tables_of(rehearsal)
    narrowed = _narrowed(tables)
    workers = f" --workers {rehearsal.circumstances.workers}" if rehearsal.circumstances.workers > 1 else ""
    return (
        Step(
            "Look, and take a backup",
            (
                f"{PROGRAM} --check-key",
                f"{PROGRAM} --preflight",
                f"{PROGRAM} --backup --restore-drill",
            ),
            "Nothing is changed yet. Go on only if none of them names a blocker.",
            (Stage.PREFLIGHT, Stage.BACKUP),
        ),
        Step(
            "Add the columns",
            (f"{PROGRAM} --add-columns{narrowed}",),
            "Beside the running application, every instance in the phase off.",
            (Stage.COLUMNS,),
        ),
        Step(
            "Encrypt and verify",
            (
                # Without it the backfill is quicker than predicted, and the application notices it more.
                f"{PROGRAM} --set rest_ratio={rehearsal.circumstances.rest_ratio:g}",
                f"{PROGRAM} --migrate-data{workers}{narrowed}",
                f"{PROGRAM} --verify{workers}{narrowed}",
            ),
            "Beside the running application. --pause holds it, --resume lets it go on. Was it killed? Run it again.",
            (Stage.BACKFILL, Stage.INDEXES, Stage.VERIFY),
        ),
        Step(
            "Create the views",
            (f"{PROGRAM} --create-views{narrowed}",),
            "Where something reads them.",
            (Stage.VIEWS,),
        ),
        Step("Deploy the application in the phase dual", note="Every instance, before the next step."),
        Step(
            "Make the ciphertext the right side",
            (f"{PROGRAM} --switch-to-encrypted{narrowed}", f"{PROGRAM} --verify{workers}{narrowed}"),
            f"The way back from here: every instance to dual, then {PROGRAM} --revert-to-plaintext{narrowed}.",
            (Stage.SWITCH, Stage.VERIFY),
        ),
        Step(
            "Deploy the application in the phase encrypted",
            note="Every instance. Then wait as long as you want to: nothing is lost until the next steps.",
        ),
        Step(
            "Approve and drop",
            (
                f"{PROGRAM} --backup --restore-drill",
                *(
                    f"{PROGRAM} --approve-drop{_given('table', table)} --approver NAME --reason TEXT"
                    f"{_given('confirmation', table)}"
                    for table in tables
                ),
                f"{PROGRAM} --drop-unencrypted --confirm --operator OTHER-NAME{narrowed}",
            ),
            "NAME approves, OTHER-NAME drops. Each table is locked for a moment. Any doubt, and nothing is dropped.",
            (Stage.BACKUP, Stage.APPROVAL, Stage.DROP),
            locks=True,
        ),
        Step(
            "Erase what was dropped",
            tuple(
                f"{PROGRAM} --erase-dropped{_given('table', table)}{_given('confirmation', table)}"
                for table in tables
            ),
            "In a maintenance window: nobody reads or writes a table while it is written anew. One table at a time.",
            (Stage.ERASURE,),
            locks=True,
        ),
    )


def the_way_back(rehearsal: Rehearsal) -> tuple[Step, ...]:
    """What brings the plaintext back, after the drop."""
    narrowed = _narrowed(tables_of(rehearsal))
    return (
        Step(
            "Rebuild the plaintext columns",
            (f"{PROGRAM} --restore-plaintext --hold{narrowed}",),
            "From the ciphertext, beside the running application; it stops before its end.",
            (Stage.RESTORE,),
        ),
        Step("Deploy the application in the phase dual", note="Every instance, before the next step."),
        Step(
            "End it, and verify",
            (f"{PROGRAM} --restore-plaintext{narrowed}", f"{PROGRAM} --verify{narrowed}"),
            "Plaintext is right again.",
            (Stage.VERIFY_AGAIN,),
        ),
    )


def _narrowed(tables: Sequence[str]) -> str:
    return "".join(_given("table", table) for table in tables)


def _given(option: str, name: str) -> str:
    # One that begins with a dash would be taken for an option.
    return f" --{option}{'=' if name.startswith('-') else ' '}{shlex.quote(name)}"
