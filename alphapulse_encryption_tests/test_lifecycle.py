"""The life of a table: every state can be reached and left, and whoever decodes one finds it."""

from pathlib import Path

import pytest

from alphapulse_encryption import lifecycle
from alphapulse_encryption.lifecycle import TRANSITIONS, State
from alphapulse_encryption.orm.phases import Phase

MANUAL = Path(__file__).parents[1] / "docs" / "architecture.md"


def reached(start: State) -> set[State]:
    found = {start}
    while more := {t.after for t in TRANSITIONS if t.before in found} - found:
        found |= more
    return found


@pytest.mark.parametrize("state", State)
def test_no_state_is_a_dead_end(state: State) -> None:
    assert reached(state) == (set(State) if state is State.UNTOUCHED else set(State) - {State.UNTOUCHED})


@pytest.mark.parametrize("state", [state for state in State if state is not State.UNTOUCHED])
def test_a_state_is_found_again_in_what_is_kept_of_it(state: State) -> None:
    found = lifecycle.decode(
        state.authority,
        "columns" if state.has_both_sides else state.stage,
        unguarded=state is State.REVERTED,
        set_aside=state in (State.SWITCHED, State.REVERTING, State.RESTORING, State.RESTORED),
    )
    assert found is state


@pytest.mark.parametrize("state", State)
def test_some_phase_is_right_in_every_state_and_so_is_one_before_it(state: State) -> None:
    phases = set(state.phases)
    assert phases and phases <= set(Phase)
    # An instance need never change its phase at the very moment in which a table changes its state.
    for transition in TRANSITIONS:
        if transition.before is state and transition.after is not State.REVERTED:
            assert phases & set(transition.after.phases), transition


def test_plaintext_is_destroyed_from_one_state_alone() -> None:
    assert {t.before for t in TRANSITIONS if t.after is State.DROPPED} == {State.SWITCHED}


def test_the_manual_shows_the_diagram() -> None:
    lines = ["stateDiagram-v2", f"    [*] --> {State.UNTOUCHED}"]
    for transition in TRANSITIONS:
        needs = f" [{transition.needs}]" if transition.needs else ""
        lines.append(f"    {transition.before} --> {transition.after}: {transition.step}{needs}")
    assert "\n".join(["```mermaid", *lines, "```"]) in MANUAL.read_text(encoding="utf-8")
