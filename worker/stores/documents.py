"""What the ledger keeps as JSON: a conversation's state, and how its commands ended."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from schemas.events import EVENT_TYPES, Event
from worker.core.memory import Attempt, Ended, SentPart, State
from worker.core.shaping import shaper

_DATA_TYPES = {name: data for data, name in EVENT_TYPES.items()}


def ended_text(ended: Ended) -> str:
    """The events that told how a command ended."""
    return json.dumps([[_row(event) for event in events] for events in (ended.before, (ended.event,), ended.after)])


def _row(event: Event) -> list[Any]:
    data = event.data.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [event.type, event.conversation_id, event.key, event.traceparent, data]


def ended_of(row: Any) -> Ended:
    """How a command ended, from a row of `ledger.ENDED`."""
    before, (event,), after = (tuple(map(_event, rows)) for rows in json.loads(row.event))
    return Ended(row.fingerprint, event, row.touched, before, after)


def _event(row: Sequence[Any]) -> Event:
    event_type, conversation_id, key, traceparent, data = row
    return Event(conversation_id, _DATA_TYPES[event_type].model_validate(data), key, traceparent)


def state_text(state: State) -> str:
    """All of a conversation's state."""
    document = asdict(replace(state, untold=())) | {"untold": [_row(event) for event in state.untold]}
    return json.dumps(document, default=sorted)


def state_of(text: str) -> State:
    """The state that `state_text` wrote; what an older version did not know is empty."""
    document = json.loads(text)
    attempt = document.pop("attempt")
    if attempt is not None:
        parts = tuple(SentPart(**part) for part in attempt.pop("parts"))
        shapes = attempt.pop("shapes", None)
        attempt = Attempt(parts=parts, shapes=shapes and shaper.State(*shapes), **attempt)
    heard_last, doubtful = frozenset(document.pop("heard_last")), frozenset(document.pop("doubtful"))
    untold = tuple(map(_event, document.pop("untold")))
    numbers = document.get("numbers", {}).items()
    document["numbers"] = {turn: tuple((first, last) for first, last in ranges) for turn, ranges in numbers}
    document["shapes"] = {turn: shaper.State(*shape) for turn, shape in document.get("shapes", {}).items()}
    return State(attempt=attempt, heard_last=heard_last, doubtful=doubtful, untold=untold, **document)
