"""What the avatars said, from who should know: the simulator's transcript, or with the real API the worker's events."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin

import aiohttp

from worker.local.demo.record import Record, Said


@dataclass(frozen=True, slots=True)
class Testimony:
    """`said` by conversation id, the calls of the Avatar API by name, and what the witness found wrong."""

    said: dict[str, Said]
    calls: dict[str, int]
    wrong: list[str] = field(default_factory=list)


def of_events(record: Record) -> Testimony:
    """What the worker says; calls that failed or were repeated, and keep-alives, are not in its events."""
    calls = {
        "create": record.events["session.ready"],
        "say-text": record.events["speech.accepted"],
        "interrupt": record.events["interrupt.done"],
        "end": record.events["session.ended"],
    }
    said = {id_: conversation.said for id_, conversation in record.conversations.items()}
    return Testimony(said, +Counter(calls))


async def of_simulator(api_url: str, record: Record) -> Testimony:
    """What arrived at the other end, call by call."""
    async with aiohttp.ClientSession() as http, http.get(urljoin(api_url, "/_control/transcript")) as answer:
        transcript = await answer.json()
    sessions = {session["id"]: session for session in transcript["sessions"]}
    nothing: dict[str, Any] = {"calls": []}
    said = {
        id_: [
            (call["body"]["turnId"], call["body"]["text"])
            for call in sessions.get(conversation.session_id, nothing)["calls"]
            if call["route"] == "say-text" and call["effect"]
        ]
        for id_, conversation in record.conversations.items()
    }
    calls = {route: tally["begun"] for route, tally in transcript["counters"]["routes"].items()}
    return Testimony(said, calls, list(_wrong_with(sessions, record)))


def _wrong_with(sessions: dict[str, Any], record: Record) -> Iterable[str]:
    names = {conversation.session_id: conversation.name for conversation in record.conversations.values()}
    for id_ in names.keys() - sessions.keys() - {""}:
        yield f"{names[id_]}: its session is not the simulator's; does another worker run on this broker?"
    for id_, session in sessions.items():
        name = names.get(id_)
        if name is None:
            yield f"session {id_} belongs to no conversation"
            continue
        if session["overlaps"]["say"]:
            yield f"{name}: two say-text ran at the same time"
        if session["ended_by"] != "request":
            yield f"{name}: the session was not ended"
