"""The life of a table in the migration, declared once: its states, and which step leads from one to another.

Refusals, `--status`, the plan, the phases of the application and the diagram in the manual derive from it. How a state
is kept belongs to the bookkeeping; what a step does to a table belongs to the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Literal, NamedTuple

Authority = Literal["plaintext", "ciphertext"]
# What reports call it.
Stage = Literal["not begun", "columns", "reverted", "dropped", "restoring"]


class State(StrEnum):
    """Where a table stands. Whether it is *verified* is no state: evidence says so, against the rows as they are."""

    UNTOUCHED = "untouched"
    GUARDED = "guarded"
    SWITCHED = "switched"
    # The plaintext is the source of truth again; its NOT NULL is a check still.
    REVERTING = "reverting"
    REVERTED = "reverted"
    DROPPED = "dropped"
    # The plaintext columns are there again, and being filled.
    RESTORING = "restoring"
    # They are filled and the source of truth; their NOT NULL is a check still.
    RESTORED = "restored"

    @property
    def authority(self) -> Authority:
        """Which side is the source of truth."""
        return _MEANING[self].authority

    @property
    def stage(self) -> Stage:
        return _MEANING[self].stage

    @property
    def has_both_sides(self) -> bool:
        """Whether plaintext and encrypted columns are there, and complete."""
        return self.stage in ("columns", "reverted")

    @property
    def is_under_way(self) -> bool:
        """Whether a guard keeps the table's sides in step."""
        return self not in (State.UNTOUCHED, State.REVERTED)

    @property
    def words(self) -> str:
        """For a sentence whose subject is the table."""
        return _MEANING[self].words

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases in which instances of the application may use the table."""
        return _MEANING[self].phases

    @property
    def advice(self) -> str:
        """What an instance in another phase is to wait for."""
        return _MEANING[self].advice


class _Meaning(NamedTuple):
    authority: Authority
    stage: Stage
    words: str
    phases: tuple[str, ...]
    advice: str


_SWITCH_NEXT = "Run --switch-to-encrypted once every instance is in the phase dual"
_END_RESTORE = "Bring every instance to the phase dual, then end it with --restore-plaintext"

_MEANING: Mapping[State, _Meaning] = {
    State.UNTOUCHED: _Meaning(
        "plaintext", "not begun", "it has no encrypted columns yet", ("off",), "Run --add-columns first"
    ),
    State.GUARDED: _Meaning(
        "plaintext",
        "columns",
        "its plaintext is right, and ciphertext alone is refused",
        ("off", "plaintext", "dual"),
        _SWITCH_NEXT,
    ),
    State.SWITCHED: _Meaning(
        "ciphertext",
        "columns",
        "its ciphertext is right, and the plaintext of what is written encrypted is gone",
        ("dual", "encrypted"),
        "To go back, bring every instance to the phase dual and run --revert-to-plaintext",
    ),
    State.REVERTING: _Meaning(
        "plaintext",
        "columns",
        "its plaintext is right, and ciphertext alone is refused",
        ("off", "plaintext", "dual"),
        _SWITCH_NEXT,
    ),
    State.REVERTED: _Meaning(
        "plaintext",
        "reverted",
        "it was reverted to plaintext, and its ciphertext may be older than its plaintext",
        ("off", "plaintext"),
        "Begin again with --add-columns before anything reads ciphertext",
    ),
    State.DROPPED: _Meaning(
        "ciphertext",
        "dropped",
        "its plaintext columns were dropped",
        ("encrypted",),
        "To go back, run --restore-plaintext --hold",
    ),
    State.RESTORING: _Meaning(
        "ciphertext",
        "restoring",
        "its plaintext columns are being rebuilt and are not complete",
        ("dual", "encrypted"),
        _END_RESTORE,
    ),
    State.RESTORED: _Meaning(
        "plaintext",
        "restoring",
        "its plaintext columns are being rebuilt and are not complete",
        ("dual", "encrypted"),
        _END_RESTORE,
    ),
}


class Transition(NamedTuple):
    """A step that brings a table from one state to another.

    Args:
        step: as the command line has it.
        needs: what has to be so besides the state, in words.
    """

    step: str
    before: State
    after: State
    needs: str = ""


TRANSITIONS = (
    Transition("--add-columns", State.UNTOUCHED, State.GUARDED, "preflight without blockers"),
    Transition("--switch-to-encrypted", State.GUARDED, State.SWITCHED, "verified, nothing pending"),
    Transition("--drop-unencrypted", State.SWITCHED, State.DROPPED, "verified, backup, approval"),
    Transition("--revert-to-plaintext", State.SWITCHED, State.REVERTING, "every value decrypted"),
    Transition("--revert-to-plaintext", State.REVERTING, State.GUARDED),
    Transition("--revert-to-plaintext", State.GUARDED, State.REVERTED),
    Transition("--add-columns", State.REVERTED, State.GUARDED, "old ciphertext discarded"),
    Transition("--restore-plaintext", State.DROPPED, State.RESTORING, "definition saved at the drop"),
    Transition("--restore-plaintext", State.RESTORING, State.RESTORED, "every value decrypted"),
    Transition("--restore-plaintext", State.RESTORED, State.GUARDED),
)


def leads(before: State, after: State) -> bool:
    """Whether a step leads from one state to the other."""
    return any((t.before, t.after) == (before, after) for t in TRANSITIONS)


def decode(authority: str, stage: str, *, unguarded: bool, set_aside: bool) -> State:
    """The state of a table that the bookkeeping knows.

    Args:
        authority: as it is kept.
        stage: as it is kept: ``columns``, ``dropped`` or ``restoring``.
        unguarded: a revert has taken the guard away.
        set_aside: something of the plaintext columns is to be put back.
    """
    if stage == "dropped":
        return State.DROPPED
    if stage == "restoring":
        return State.RESTORING if authority == "ciphertext" else State.RESTORED
    if unguarded:
        return State.REVERTED
    if authority == "ciphertext":
        return State.SWITCHED
    return State.REVERTING if set_aside else State.GUARDED


def diagram() -> str:
    """The states and transitions as Mermaid's text (https://mermaid.js.org/syntax/stateDiagram.html)."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.UNTOUCHED}"]
    for t in TRANSITIONS:
        needs = f" [{t.needs}]" if t.needs else ""
        lines.append(f"    {t.before} --> {t.after}: {t.step}{needs}")
    return "\n".join(lines)
