"""The verdict: what was published, what was told of it, and what the simulator heard, held against each other."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.faults import Demand, Fault, Happened
from tests.chaos.traffic import Arrival, Command

ACCEPTED = "avatar.speech.accepted"
STARTED = "avatar.turn.started"
OVER = ("avatar.turn.completed", "avatar.turn.failed", "avatar.turn.interrupted")
_ANSWER_LOST = (0, 500, 502, 504)


@dataclass(frozen=True, slots=True)
class Evidence:
    """All there is to judge by."""

    commands: Sequence[Command]
    arrivals: Sequence[Arrival]
    ended: Mapping[str, Mapping[str, Arrival]]
    transcript: dict[str, Any]
    happened: Sequence[Happened]
    parked: Sequence[str]
    left: Mapping[str, int]
    hits: int
    seconds: float
    """How long the faults went on."""


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
class _Call:
    """A say-text of the transcript. `words` tell where it belongs."""

    raw: dict[str, Any]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return str(self.raw["body"]["text"])

    @property
    def turn(self) -> str:
        return self.words[0].split(".")[1]

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


def judge(evidence: Evidence, demand: Demand) -> Verdict:
    """Everything at once."""
    verdict = Verdict()
    calls = _calls_by_conversation(evidence.transcript)
    heard = {name: [call for call in all_ if call.raw["effect"]] for name, all_ in calls.items()}
    accepted = _accepted(evidence.arrivals)
    broken = verdict.broken
    broken["lost"] = list(_lost(evidence))
    broken["ended more than once"] = list(_ended_twice(evidence))
    broken["not as told"] = list(_not_as_told(evidence, heard, accepted))
    broken["not told"] = list(_not_told(evidence, heard, accepted))
    broken["out of order"] = list(_out_of_order(evidence, heard))
    broken["overlapping calls"] = list(_overlaps(calls))
    broken["unflagged repeats"] = list(_unflagged(heard, accepted))
    broken["flags without a lost answer"] = list(_unexplained(evidence, calls, accepted))
    broken["parked is not what failed"] = list(_parked_wrongly(evidence))
    broken["left in queues"] = [f"{queue}: {count}" for queue, count in evidence.left.items() if count]
    broken["fewer faults than demanded"] = list(_too_few(evidence, demand, heard))
    verdict.figures = _figures(evidence, calls, heard, accepted)
    return verdict


def _calls_by_conversation(transcript: dict[str, Any]) -> dict[str, list[_Call]]:
    """All say-text, in order of arrival, whatever their session."""
    found: defaultdict[str, list[_Call]] = defaultdict(list)
    calls = [call for session in transcript["sessions"] for call in session["calls"]]
    for raw in sorted(calls, key=lambda call: int(call["number"])):
        if raw["route"] == "say-text" and isinstance(raw["body"], dict):
            words = tuple(raw["body"]["text"].split())
            found[_conversation_of(words[0])].append(_Call(raw, words))
    return found


def _conversation_of(word: str) -> str:
    return word.partition(".")[0]


def _accepted(arrivals: Iterable[Arrival]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The accepted events, in order of arrival, repeats included, by conversation and text."""
    found: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for arrival in arrivals:
        event = arrival.event
        if event["type"] == ACCEPTED:
            found[event["subject"], event["data"]["text"]].append(event)
    return found


def _lost(evidence: Evidence) -> Iterator[str]:
    for command in evidence.commands:
        if not evidence.ended.get(command.message_id):
            yield f"{command.conversation} n{command.number} {command.message_id}: no event"


def _ended_twice(evidence: Evidence) -> Iterator[str]:
    for command in evidence.commands:
        ends = evidence.ended.get(command.message_id, {})
        if len(ends) > 1:
            told = [_brief(arrival.event) for arrival in ends.values()]
            yield f"{command.conversation} n{command.number}: {told}"


def _brief(event: dict[str, Any]) -> str:
    data = event["data"]
    said = data.get("reason") or data.get("text", "")[:40]
    flag = " possibleDuplicate" if data.get("possibleDuplicate") else ""
    what = f"{event['type'].removeprefix('avatar.')}({said}{flag})"
    return f"{what} by {event['worker']} at {event['time']} id {event['id'][:8]}"


def _not_as_told(
    evidence: Evidence, heard: Mapping[str, list[_Call]], accepted: Mapping[tuple[str, str], list[dict[str, Any]]]
) -> Iterator[str]:
    """What was told as accepted was heard, and what was not, was not: unless nobody could know."""
    surely = {word for calls in heard.values() for call in calls if not call.unanswered for word in call.words}
    perhaps = {word for calls in heard.values() for call in calls for word in call.words}
    for command in evidence.commands:
        for arrival in evidence.ended.get(command.message_id, {}).values():
            said = arrival.event["type"] == ACCEPTED
            if said and not perhaps.issuperset(command.words):
                yield f"{command.conversation} n{command.number}: accepted, but not heard"
            if not said and surely.intersection(command.words):
                yield f"{command.conversation} n{command.number}: heard, but {_brief(arrival.event)}"
    texts = {(name, call.text) for name, calls in heard.items() for call in calls}
    for key, events in accepted.items():
        if key not in texts:
            yield f"no such text was heard: {_brief(events[0])}"
        if len({event["id"] for event in events}) > 1:
            yield f"one text, several ids: {[_brief(event) for event in events]}"


def _not_told(
    evidence: Evidence, heard: Mapping[str, list[_Call]], accepted: Mapping[tuple[str, str], list[dict[str, Any]]]
) -> Iterator[str]:
    """Each turn was heard of when it began and when it was over, and what was heard between."""
    told = {(one.event["type"], one.event["subject"], one.event["data"].get("turnId")) for one in evidence.arrivals}
    failed = {(name, turn) for kind, name, turn in told if kind == "avatar.turn.failed"}
    for name, calls in heard.items():
        for call in calls:
            if (name, call.text) not in accepted and (name, call.turn) not in failed:
                yield f"{name}: {call} has no event"
    for name, turn in sorted({(command.conversation, command.turn) for command in evidence.commands}):
        if (STARTED, name, turn) not in told and (name, turn) not in failed:
            yield f"{name} {turn}: it began"
        if not any((kind, name, turn) in told for kind in OVER):
            yield f"{name} {turn}: it is over"


def _out_of_order(evidence: Evidence, heard: Mapping[str, list[_Call]]) -> Iterator[str]:
    """Each call goes on where the one before ended, or repeats it word for word."""
    place: dict[str, int] = {}
    for command in evidence.commands:
        for word in command.words:
            place[word] = len(place)
    for name, calls in heard.items():
        before: _Call | None = None
        for call in calls:
            places = [place.get(word, -1) for word in call.words]
            if before is not None and call.text == before.text:
                continue
            if places != sorted(places) or -1 in places or (before and places[0] <= place.get(before.words[-1], -1)):
                yield f"{name}: {call} after {before}"
            before = call


def _overlaps(calls: Mapping[str, list[_Call]]) -> Iterator[str]:
    for name, all_ in calls.items():
        latest: _Call | None = None
        for call in all_:
            if latest is not None and (latest.raw["ended_s"] or float("inf")) > call.raw["begun_s"]:
                yield f"{name}: {call} began while {latest} ran"
            if latest is None or (call.raw["ended_s"] or float("inf")) > (latest.raw["ended_s"] or float("inf")):
                latest = call


def _unflagged(
    heard: Mapping[str, list[_Call]], accepted: Mapping[tuple[str, str], list[dict[str, Any]]]
) -> Iterator[str]:
    """A listener drops repeats of an event by its id, so the first to arrive has to say it."""
    for name, calls in heard.items():
        for text, times in Counter(call.text for call in calls).items():
            if times == 1:
                continue
            events = accepted.get((name, text), [])
            if not events or not events[0]["data"].get("possibleDuplicate"):
                which = [str(call) for call in calls if call.text == text]
                yield f"{name}: {which}, told: {[_brief(event) for event in events]}"


def _unexplained(
    evidence: Evidence, calls: Mapping[str, list[_Call]], accepted: Mapping[tuple[str, str], list[dict[str, Any]]]
) -> Iterator[str]:
    open_at_death = set().union(*(one.intents for one in evidence.happened))
    unanswered = {(name, call.text) for name, all_ in calls.items() for call in all_ if call.unanswered}
    for key, events in accepted.items():
        if _flagged(events) and key not in open_at_death and key not in unanswered:
            which = [str(call) for call in calls[key[0]] if call.text == key[1]]
            yield f"{[_brief(event) for event in events]}: {which}"


def _flagged(events: Sequence[dict[str, Any]]) -> bool:
    return any(event["data"].get("possibleDuplicate") for event in events)


def _parked_wrongly(evidence: Evidence) -> Iterator[str]:
    failed = {
        message_id
        for message_id, ends in evidence.ended.items()
        if any(arrival.event["data"].get("parked") for arrival in ends.values())
    }
    parked = set(evidence.parked)
    yield from (f"{message_id} failed, but is not parked" for message_id in failed - parked)
    yield from (f"{message_id} is parked, but did not fail" for message_id in parked - failed)


def _too_few(evidence: Evidence, demand: Demand, heard: Mapping[str, list[_Call]]) -> Iterator[str]:
    if evidence.seconds < demand.seconds:
        yield f"seconds of faults: {evidence.seconds:.0f} of {demand.seconds:.0f}"
    counts = Counter(one.fault for one in evidence.happened)
    counts[Fault.KILL] = evidence.hits
    for fault, wanted in demand.counts.items():
        if counts[fault] < wanted:
            yield f"{fault}: {counts[fault]} of {wanted}"
    if _dropped(heard) < demand.dropped:
        yield f"answers dropped after the text was taken: {_dropped(heard):.2%} of {demand.dropped:.2%}"


def _dropped(heard: Mapping[str, list[_Call]]) -> float:
    calls = [call for all_ in heard.values() for call in all_]
    dropped = [call for call in calls if call.raw["fault"] == "drop after"]
    return len(dropped) / max(1, len(calls))


def _figures(
    evidence: Evidence,
    calls: Mapping[str, list[_Call]],
    heard: Mapping[str, list[_Call]],
    accepted: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> dict[str, object]:
    ids = Counter(arrival.event["id"] for arrival in evidence.arrivals)
    first = {arrival.event["id"]: arrival.event for arrival in reversed(evidence.arrivals)}
    words = Counter(
        f"{event['type'].removeprefix('avatar.')} {event['data'].get('reason', '')}".strip() for event in first.values()
    )
    repeated = sum(times - 1 for all_ in heard.values() for times in Counter(call.text for call in all_).values())
    latencies = sorted(events[0]["data"]["latencyMs"] for events in accepted.values())
    faults = Counter(str(call.raw["fault"]) for all_ in calls.values() for call in all_ if call.raw["fault"])
    return {
        "commands": len(evidence.commands),
        "ended as": dict(words),
        "say-text calls": sum(map(len, calls.values())),
        "faults of the API": dict(faults),
        "answers dropped after the text was taken": f"{_dropped(heard):.2%}",
        "latency p50, p99 in ms": (latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)])
        if latencies
        else None,
        "events heard again": sum(ids.values()) - len(ids),
        "faults": {str(fault): count for fault, count in Counter(one.fault for one in evidence.happened).items()},
        "kills with a say in flight": evidence.hits,
        "intents open at faults": sum(len(one.intents) for one in evidence.happened),
        "answers lost": sum(call.unanswered for all_ in calls.values() for call in all_),
        "flagged": sum(map(_flagged, accepted.values())),
        "repeats heard": repeated,
    }
