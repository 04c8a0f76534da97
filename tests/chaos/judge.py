"""The verdict: what was published, what was told of it, and what the simulator heard, held against each other."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tests.chaos import interruptions
from tests.chaos.evidence import ACCEPTED, Call, Evidence, Verdict, brief, cut_short
from tests.chaos.faults import Demand, Fault

STARTED = "avatar.turn.started"
OVER = ("avatar.turn.completed", "avatar.turn.failed", "avatar.turn.interrupted")


def judge(evidence: Evidence, demand: Demand) -> Verdict:
    """Everything at once."""
    verdict = Verdict()
    broken = verdict.broken
    broken["lost"] = list(_lost(evidence))
    broken["ended more than once"] = list(_ended_twice(evidence))
    broken["not as told"] = list(_not_as_told(evidence))
    broken["not told"] = list(_not_told(evidence))
    broken["out of order"] = list(_out_of_order(evidence))
    broken["overlapping calls"] = list(_overlaps(evidence))
    broken["unflagged repeats"] = list(_unflagged(evidence))
    broken["flags without a lost answer"] = list(_unexplained(evidence))
    broken |= interruptions.broken(evidence)
    broken["parked is not what failed"] = list(_parked_wrongly(evidence))
    broken["left in queues"] = [f"{queue}: {count}" for queue, count in evidence.left.items() if count]
    broken["left in the durable inbox"] = [f"{evidence.held} of {evidence.kept}"] if evidence.held else []
    broken["fewer faults than demanded"] = list(_too_few(evidence, demand))
    verdict.figures = _figures(evidence)
    return verdict


def _lost(evidence: Evidence) -> Iterator[str]:
    for command in evidence.commands:
        if not evidence.ends(command):
            yield f"{command.conversation} n{command.number} {command.message_id}: no event"


def _ended_twice(evidence: Evidence) -> Iterator[str]:
    for command in evidence.commands:
        ends = evidence.ends(command)
        if len(ends) > 1:
            yield f"{command.conversation} n{command.number}: {[brief(event) for event in ends]}"


def _not_as_told(evidence: Evidence) -> Iterator[str]:
    """What was told as accepted was heard, and what was not, was not to its end: unless nobody could know."""
    all_heard = [(name, call) for name, calls in evidence.heard.items() for call in calls]
    perhaps = {word for _, call in all_heard for word in call.words}
    answered = [(name, call) for name, call in all_heard if not call.unanswered]
    surely = {word for _, call in answered for word in call.words}
    # What an interrupt has silenced is not said again to find out how a call went whose worker has died.
    recorded = {
        word for name, call in answered if (name, call.text) not in evidence.open_at_death for word in call.words
    }
    for command in evidence.chunks:
        for event in evidence.ends(command):
            said = event["type"] == ACCEPTED
            if said and not perhaps.issuperset(command.words):
                yield f"{command.conversation} n{command.number}: accepted, but not heard"
            if not said and command.words[-1] in (recorded if cut_short(event) else surely):
                yield f"{command.conversation} n{command.number}: heard, but {brief(event)}"
    texts = {(name, call.text) for name, call in all_heard}
    for key, events in evidence.accepted.items():
        if key not in texts:
            yield f"no such text was heard: {brief(events[0])}"
        if len({event["id"] for event in events}) > 1:
            yield f"one text, several ids: {[brief(event) for event in events]}"


def _not_told(evidence: Evidence) -> Iterator[str]:
    """Each turn was heard of when it began and when it was over, and what was heard between."""
    told = {(one.event["type"], one.event["subject"], one.event["data"].get("turnId")) for one in evidence.arrivals}
    failed = {(name, turn) for kind, name, turn in told if kind == "avatar.turn.failed"}
    for name, calls in evidence.heard.items():
        for call in calls:
            lost = call.unanswered or (name, call.text) in evidence.open_at_death
            excused = lost and all(map(cut_short, evidence.ends_of(call)))
            if (name, call.text) not in evidence.accepted and (name, call.turn) not in failed and not excused:
                yield f"{name}: {call} has no event"
    for name, turn in sorted({(command.conversation, command.turn) for command in evidence.chunks}):
        # One that was interrupted while its first call was under way is not told to begin any more.
        cut = ("avatar.turn.interrupted", name, turn) in told
        if (STARTED, name, turn) not in told and (name, turn) not in failed and not cut:
            yield f"{name} {turn}: it began"
        if not any((kind, name, turn) in told for kind in OVER):
            yield f"{name} {turn}: it is over"


def _out_of_order(evidence: Evidence) -> Iterator[str]:
    """Each call goes on behind where the one before ended, or repeats it word for word."""
    place: dict[str, int] = {}
    for command in evidence.chunks:
        for word in command.words:
            place[word] = len(place)
    for name, calls in evidence.heard.items():
        before: Call | None = None
        for call in calls:
            places = [place.get(word, -1) for word in call.words]
            if before is not None and call.text == before.text:
                continue
            if places != sorted(places) or -1 in places or (before and places[0] <= place.get(before.words[-1], -1)):
                yield f"{name}: {call} after {before}"
            before = call


def _overlaps(evidence: Evidence) -> Iterator[str]:
    for name, calls in evidence.calls.items():
        latest: Call | None = None
        for call in calls:
            if latest is not None and latest.ended > call.begun:
                yield f"{name}: {call} began while {latest} ran"
            if latest is None or call.ended > latest.ended:
                latest = call


def _unflagged(evidence: Evidence) -> Iterator[str]:
    """A listener drops repeats of an event by its id, so the first to arrive has to say it."""
    for name, calls in evidence.heard.items():
        for text, times in Counter(call.text for call in calls).items():
            if times == 1:
                continue
            same = [call for call in calls if call.text == text]
            events = evidence.accepted.get((name, text), [])
            if not events and all(map(cut_short, evidence.ends_of(same[0]))):
                continue  # Said again, and interrupted meanwhile.
            if not events or not events[0]["data"].get("possibleDuplicate"):
                yield f"{name}: {[str(call) for call in same]}, told: {[brief(event) for event in events]}"


def _unexplained(evidence: Evidence) -> Iterator[str]:
    unanswered = {(name, call.text) for name, calls in evidence.calls.items() for call in calls if call.unanswered}
    for key, events in evidence.accepted.items():
        if _flagged(events) and key not in evidence.open_at_death and key not in unanswered:
            which = [str(call) for call in evidence.calls[key[0]] if call.text == key[1]]
            yield f"{[brief(event) for event in events]}: {which}"


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


def _too_few(evidence: Evidence, demand: Demand) -> Iterator[str]:
    if evidence.seconds < demand.seconds:
        yield f"seconds of faults: {evidence.seconds:.0f} of {demand.seconds:.0f}"
    counts = Counter(one.fault for one in evidence.happened)
    counts[Fault.KILL] = evidence.hits
    for fault, wanted in demand.counts.items():
        if counts[fault] < wanted:
            yield f"{fault}: {counts[fault]} of {wanted}"
    if _dropped(evidence) < demand.dropped:
        yield f"answers dropped after the text was taken: {_dropped(evidence):.2%} of {demand.dropped:.2%}"
    if evidence.kept < demand.kept:
        yield f"commands kept in the durable inbox: {evidence.kept} of {demand.kept}"
    timed = len(interruptions.timed(evidence))
    if timed < demand.timed:
        yield f"interrupts that the clock can judge: {timed} of {demand.timed}"


def _dropped(evidence: Evidence) -> float:
    calls = [call for all_ in evidence.heard.values() for call in all_]
    dropped = [call for call in calls if call.raw["fault"] == "drop after"]
    return len(dropped) / max(1, len(calls))


def _figures(evidence: Evidence) -> dict[str, object]:
    ids = Counter(arrival.event["id"] for arrival in evidence.arrivals)
    first = {arrival.event["id"]: arrival.event for arrival in reversed(evidence.arrivals)}
    words = Counter(
        f"{event['type'].removeprefix('avatar.')} {event['data'].get('reason', '')}".strip() for event in first.values()
    )
    calls = [call for all_ in evidence.calls.values() for call in all_]
    heard = evidence.heard.values()
    latencies = sorted(events[0]["data"]["latencyMs"] for events in evidence.accepted.values())
    return {
        "commands": len(evidence.commands),
        "ended as": dict(words),
        "say-text calls": len(calls),
        "faults of the API": dict(Counter(str(call.raw["fault"]) for call in calls if call.raw["fault"])),
        "answers dropped after the text was taken": f"{_dropped(evidence):.2%}",
        "latency p50, p99 in ms": (latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)])
        if latencies
        else None,
        "events heard again": sum(ids.values()) - len(ids),
        "faults": {str(fault): count for fault, count in Counter(one.fault for one in evidence.happened).items()},
        "kills with a say in flight": evidence.hits,
        "intents open at faults": len(evidence.open_at_death),
        "answers lost": sum(call.unanswered for call in calls),
        "flagged": sum(map(_flagged, evidence.accepted.values())),
        "repeats heard": sum(times - 1 for all_ in heard for times in Counter(call.text for call in all_).values()),
        **interruptions.figures(evidence),
        "kept in the durable inbox": evidence.kept,
    }
