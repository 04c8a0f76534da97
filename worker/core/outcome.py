"""The outcome of an attempt over what somebody else has written about the conversation since (law 13).

It is a fact, and written whoever owns the conversation by then; but it changes what the end of its attempt changes, and
nothing besides: the interrupts another owner has seen, the turns it has silenced, the calls it is making all stand.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from worker.core.memory import Changes, State, Turn, TurnState, with_numbers

Value = TypeVar("Value")


def merged(changes: Changes, state: State, turns: Mapping[str, Turn]) -> Changes:
    """What is to be written where this state stands, and of the turns that the outcome changes these.

    Whoever made the changes has not seen what stands, and can do nothing more on top of the version this makes.
    """
    before, after = changes.before, changes.state
    ended = {turn_id: _ended(turn, turns.get(turn_id)) for turn_id, turn in changes.turns.items()}
    over = {turn_id for turn_id, turn in ended.items() if turn.state is not TurnState.OPEN}
    shapes = _changed(before.shapes, after.shapes, state.shapes)
    numbers = state.numbers
    for turn_id, ranges in after.numbers.items():
        if ranges != before.numbers.get(turn_id):
            numbers = with_numbers(numbers, turn_id, ranges)
    heard_last = after.heard_last
    if state.heard_last != before.heard_last:
        heard_last |= state.heard_last
    told = [event for event in before.untold if event not in after.untold]
    new = [event for event in after.untold if event not in before.untold and event not in state.untold]
    written = replace(
        state,
        attempt=after.attempt,
        # The same moment may stand for a call of another: at worst it is waited for in vain.
        busy_until=max(state.busy_until, after.busy_until),
        spoken=_changed(before.spoken, after.spoken, state.spoken),
        shapes={turn_id: shape for turn_id, shape in shapes.items() if turn_id not in over},
        playing_until=max(state.playing_until, after.playing_until),
        heard_last=heard_last,
        doubtful=state.doubtful - (before.doubtful - after.doubtful),
        numbers=numbers,
        untold=(*(event for event in state.untold if event not in told), *new),
    )
    return replace(changes, version=f"over {changes.version}", state=written, turns=ended)


def _ended(turn: Turn, stands: Turn | None) -> Turn:
    """An outcome counts what was said, and closes or fails an open turn; what another has made of it stays."""
    if stands is None:
        return turn
    ends = stands.state is TurnState.OPEN and turn.state in (TurnState.CLOSED, TurnState.FAILED)
    return Turn(
        turn.state if ends else stands.state,
        turn.pieces,
        turn.text_length,
        max(turn.touched, stands.touched),
        stands.replay,
    )


def _changed(before: Mapping[str, Value], after: Mapping[str, Value], stands: Mapping[str, Value]) -> dict[str, Value]:
    """What stands, with that changed which changed from before to after."""
    gone = before.keys() - after.keys()
    new = {key: value for key, value in after.items() if key not in before or before[key] != value}
    return {key: value for key, value in stands.items() if key not in gone} | new
