"""All there is to judge a run by."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tests.chaos.faults import Happened
from tests.chaos.traffic import Arrival, Command

ACCEPTED = "avatar.speech.accepted"
_ANSWER_LOST = (0, 500, 502, 504)


@dataclass(frozen=True)
class Evidence:
    """What was published, told and heard; `kept` and `held`: commands that the durable inbox had, and still has."""

    commands: Sequence[Command]
    arrivals: Sequence[Arrival]
    ended: Mapping[str, Mapping[str, Arrival]]
    transcript: dict[str, Any]
    happened: Sequence[Happened]
    parked: Sequence[str]
    left: Mapping[str, int]
    kept: int
    held: int
    hits: int
    seconds: float
    """How long the faults went on."""

    @cached_property
    def calls(self) -> "dict[str, list[Call]]":
        """All say-text by conversation, in order of arrival, whatever their session."""
        found: defaultdict[str, list[Call]] = defaultdict(list)
        calls = [call for session in self.transcript["sessions"] for call in session["calls"]]
        for raw in sorted(calls, key=lambda call: int(call["number"])):
            if raw["route"] == "say-text" and isinstance(raw["body"], dict):
                words = tuple(raw["body"]["text"].split())
                found[words[0].partition("-")[0]].append(Call(raw, words))
        return found

    @cached_property
    def heard(self) -> "dict[str, list[Call]]":
        """Those that were taken."""
        return {name: [call for call in calls if call.raw["effect"]] for name, calls in self.calls.items()}

    @cached_property
    def accepted(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """The accepted events, in order of arrival, repeats included, by conversation and text."""
        found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for arrival in self.arrivals:
            event = arrival.event
            if event["type"] == ACCEPTED:
                found[event["subject"], event["data"]["text"]].append(event)
        return found

    @cached_property
    def open_at_death(self) -> set[tuple[str, str]]:
        """The pieces, by conversation, whose outcome nobody had recorded when a worker or its link died."""
        return set().union(*(one.intents for one in self.happened))

    @property
    def chunks(self) -> list[Command]:
        """What is no interrupt."""
        return [command for command in self.commands if not command.interrupts]

    def ends(self, command: Command) -> list[dict[str, Any]]:
        """The terminal events of a command, one if all is well."""
        return [arrival.event for arrival in self.ended.get(command.message_id, {}).values()]

    def ends_of(self, call: "Call") -> list[dict[str, Any]]:
        """The terminal events of the chunks that the call carries."""
        return [event for word in call.words for event in self.ends(self._chunks[word])]

    @cached_property
    def _chunks(self) -> dict[str, Command]:
        return {word: command for command in self.commands for word in command.words}


@dataclass(slots=True)
class Verdict:
    """`broken`: by invariant, what breaks it. `figures`: what was counted, for the person."""

    broken: dict[str, list[str]] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether nothing is broken."""
        return not any(self.broken.values())


@dataclass(slots=True)
class Call:
    """A say-text of the transcript. `words` tell where it belongs."""

    raw: dict[str, Any]
    words: tuple[str, ...]

    @property
    def begun(self) -> float:
        return float(self.raw["begun_s"])

    @property
    def ended(self) -> float:
        return float("inf") if self.raw["ended_s"] is None else float(self.raw["ended_s"])

    @property
    def text(self) -> str:
        return str(self.raw["body"]["text"])

    @property
    def turn(self) -> str:
        return self.words[0].split("-")[1]

    @property
    def unanswered(self) -> bool:
        """Its caller cannot know whether it was taken."""
        return self.raw["status"] in _ANSWER_LOST or self.raw["status"] is None

    def __str__(self) -> str:
        raw = self.raw
        return (
            f"call {raw['number']} [{self.words[0]} … {self.words[-1]}] {raw['begun_s']:.3f}-{raw['ended_s'] or 0:.3f}"
            f" status {raw['status']}{' fault ' + raw['fault'] if raw['fault'] else ''}"
        )


def brief(event: dict[str, Any]) -> str:
    """One event in a line."""
    data = event["data"]
    said = data.get("reason") or data.get("text", "")[:40]
    flag = " possibleDuplicate" if data.get("possibleDuplicate") else ""
    what = f"{event['type'].removeprefix('avatar.')}({said}{flag})"
    return f"{what} by {event['worker']} at {event['time']} id {event['id'][:8]}"


def cut_short(event: dict[str, Any]) -> bool:
    """Whether a chunk ended because of an interrupt."""
    return bool(event["data"].get("reason") == "interrupted")
