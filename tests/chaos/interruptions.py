"""The verdict on interrupts: what they had to silence is silent, what they had to spare is spoken, and that soon."""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tests.chaos.evidence import ACCEPTED, Call, Evidence, brief, cut_short
from tests.chaos.faults import Fault
from tests.chaos.traffic import Command

DONE = "avatar.interrupt.done"
SAY_AFTER_CALL_S = 0.05
SAY_AFTER_PUBLISH_S = 1.0
SETTLED_S = 5.0
"""How long after a fault its victim is left alone by the clock."""


@dataclass(frozen=True, slots=True)
class Timed:
    """An interrupt whose owner lived all the while, from when it was confirmed until it was told as `done`."""

    command: Command
    done: float
    called: float | None
    """When the API was told of it."""


def broken(evidence: Evidence) -> dict[str, list[str]]:
    """By invariant, what breaks it."""
    return {
        "not ended as an interrupt": list(_misnamed(evidence)),
        "spoken though interrupted": list(_spoken(evidence)),
        "silenced though not interrupted": list(_muted(evidence)),
        "spoken on after an interrupt": list(_late(evidence)),
    }


def figures(evidence: Evidence) -> dict[str, object]:
    """For the person."""
    told = timed(evidence)
    waits = sorted((one.called - one.command.published) * 1000 for one in told if one.called is not None)
    return {
        "interrupts": dict(Counter("named" if one.turn else "of all" for one in evidence.commands if one.interrupts)),
        "interrupts the clock judged": len(told),
        "interrupt: publish to API call p50, p99 in ms": (
            (round(waits[len(waits) // 2]), round(waits[int(len(waits) * 0.99)])) if waits else None
        ),
    }


def timed(evidence: Evidence) -> list[Timed]:
    """Those the clock can judge: confirmed at once, and nothing happened to their owner or the broker meanwhile."""
    told_by = _owners(evidence)
    told = _api_calls(evidence)
    found = []
    for command in evidence.commands:
        if not command.interrupts or command.attempts != 1:
            continue
        done = next((one for one in evidence.ended.get(command.message_id, {}).values()), None)
        if done is None:
            continue
        worker = done.event["worker"]
        owners = told_by[command.conversation]
        before = bisect_left(owners, (command.published, ""))
        lived = before > 0 and {name for at, name in owners[before - 1 :] if at <= done.at} == {worker}
        if lived and not _disturbed(evidence, worker, command.published, done.at):
            calls = [at for at in told[command.conversation] if command.published <= at <= done.at]
            found.append(Timed(command, done.at, max(calls, default=None)))
    return found


def _owners(evidence: Evidence) -> dict[str, list[tuple[float, str]]]:
    found: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
    for one in evidence.arrivals:
        found[one.event["subject"]].append((one.at, one.event["worker"]))
    return found


def _disturbed(evidence: Evidence, worker: str, begun: float, ended: float) -> bool:
    return any(
        (fault.fault in (Fault.RESTART, Fault.STORE) or fault.victim.startswith(worker))
        and fault.begun <= ended
        and fault.ended + SETTLED_S >= begun
        for fault in evidence.happened
    )


def _api_calls(evidence: Evidence) -> dict[str, list[float]]:
    """When the API's interrupt was called, by conversation."""
    whose = {
        one.event["data"]["sessionId"]: one.event["subject"]
        for one in evidence.arrivals
        if one.event["type"] == "avatar.session.ready"
    }
    found: defaultdict[str, list[float]] = defaultdict(list)
    for session in evidence.transcript["sessions"]:
        said = [call["body"]["text"] for call in session["calls"] if call["route"] == "say-text" and call["body"]]
        name = said[0].partition("-")[0] if said else whose.get(session["id"], "")
        found[name] += [call["begun_s"] for call in session["calls"] if call["route"] == "interrupt"]
    return found


def _doomed(interrupt: Command, chunk: Command) -> bool:
    """Whether no say of that chunk may begin once the interrupt has acted."""
    if chunk.turn in interrupt.silences:
        return True
    return chunk.number < interrupt.number and interrupt.turn in ("", chunk.turn)


@cache
def _chunk_of(word: str) -> tuple[str, str, int]:
    conversation, turn, number, _ = word.split("-")
    return conversation, turn, int(number[1:])


def _by_conversation(evidence: Evidence) -> Mapping[str, list[Command]]:
    found: defaultdict[str, list[Command]] = defaultdict(list)
    for command in evidence.commands:
        if command.interrupts:
            found[command.conversation].append(command)
    return found


def _misnamed(evidence: Evidence) -> Iterator[str]:
    for command in evidence.commands:
        for event in evidence.ends(command):
            if (event["type"] == DONE) != command.interrupts:
                yield f"{command.conversation} n{command.number}: {brief(event)}"


def _spoken(evidence: Evidence) -> Iterator[str]:
    """What was published after an interrupt that silences its turn."""
    interrupts = _by_conversation(evidence)
    heard = {word for calls in evidence.heard.values() for call in calls for word in call.words}
    for chunk in evidence.chunks:
        if any(one.number < chunk.number and chunk.turn in one.silences for one in interrupts[chunk.conversation]):
            told = [brief(event) for event in evidence.ends(chunk) if event["type"] == ACCEPTED]
            if told or heard.intersection(chunk.words):
                yield f"{chunk.conversation} {chunk.turn} n{chunk.number}: {told or 'heard'}"


def _muted(evidence: Evidence) -> Iterator[str]:
    """What no interrupt is about: nothing is muted for good, nor by the way."""
    interrupts = _by_conversation(evidence)
    for chunk in evidence.chunks:
        if not any(_doomed(one, chunk) for one in interrupts[chunk.conversation]):
            for event in filter(cut_short, evidence.ends(chunk)):
                yield f"{chunk.conversation} {chunk.turn} n{chunk.number}: {brief(event)}"


def _late(evidence: Evidence) -> Iterator[str]:
    for one in timed(evidence):
        last = one.command.confirmed + SAY_AFTER_PUBLISH_S
        if one.called is not None:
            last = min(last, one.called + SAY_AFTER_CALL_S)
        for call in evidence.calls.get(one.command.conversation, ()):
            if call.begun > last and _is_doomed(one.command, call):
                age = (call.begun - one.command.published) * 1000
                yield f"{one.command.conversation}: {call} began {age:.0f} ms after {_named(one)} was published"


def _is_doomed(interrupt: Command, call: Call) -> bool:
    conversation, turn, number = _chunk_of(call.words[-1])
    return _doomed(interrupt, Command("", conversation, turn, number, call.words))


def _named(one: Timed) -> str:
    called: Any = "the API not told"
    if one.called is not None:
        called = f"the API told after {(one.called - one.command.published) * 1000:.0f} ms"
    return f"the interrupt n{one.command.number} of {one.command.turn or 'all'} ({called})"
