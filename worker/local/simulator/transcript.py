"""What the simulator tells about what it remembers. Everything is worked out when asked for, not while calls come in.

Keys are snake_case; `body` is what was sent, as it was sent. `begun_s` and `ended_s` are `time.monotonic()`, the same
moments as `…_epoch_s` are seconds since 1970; an end is null while the call runs.
"""

from collections import defaultdict
from typing import Any

from worker.local.simulator.model import SAY_TEXT, Call, Session, World

View = dict[str, Any]


def whole(world: World) -> View:
    """All sessions in order of creation, `strays` (calls that found no session) and `counters`."""
    return {
        "sessions": [of_session(world, session) for session in world.sessions.values()],
        "strays": [_of_call(world, call) for call in world.calls if call.session is None],
        "counters": counters(world),
    }


def counters(world: World) -> View:
    """How many: calls per route by stage and by answered status (`0`: nobody got an answer), sessions, overlaps."""
    routes: defaultdict[str, View] = defaultdict(lambda: {"begun": 0, "accepted": 0, "finished": 0, "statuses": {}})
    for (route, stage), calls in world.tally.items():
        routes[route][stage] = calls
    for (route, status), calls in world.statuses.items():
        routes[route]["statuses"][str(status)] = calls
    sessions = world.sessions.values()
    return {
        "calls": len(world.calls),
        "routes": dict(routes),
        "sessions": {"created": len(sessions), "open": world.open_sessions()},
        "overlaps": {
            "say": sum(len(session.say_overlaps) for session in sessions),
            "any": sum(len(session.overlaps) for session in sessions),
        },
    }


def of_session(world: World, session: Session) -> View:
    """One session.

    `spoken`: the accepted texts in order; `turns`: the same, joined per `turnId`; `duplicates`: bodies accepted more
    than once, with the numbers of the calls (the reader has to know whether a text was meant twice); `overlaps`: pairs
    of numbers of calls that ran at the same time, `say` for two `say-text`, `any` for any two; `max_gap_s`: the longest
    time without an accepted call, up to now or to its end.
    """
    world.end_idle(session)
    said = [(call.number, body) for call in session.calls if _is_speech(call) and isinstance(body := call.body(), dict)]
    turns: defaultdict[str, str] = defaultdict(str)
    for _, body in said:
        turns[body["turnId"]] += body["text"]
    return {
        "id": session.id,
        "avatar_id": session.avatar_id,
        "voice": session.voice,
        "created_epoch_s": world.epoch(session.created),
        "ended_epoch_s": world.epoch(session.ended),
        "ended_by": session.ended_by,
        "forgotten": session.forgotten,
        "initialized": session.initialized,
        "max_gap_s": session.gap(),
        "spoken": [body["text"] for _, body in said],
        "turns": dict(turns),
        "duplicates": _duplicates(said),
        "overlaps": {"say": session.say_overlaps, "any": session.overlaps},
        "calls": [_of_call(world, call, order) for order, call in enumerate(session.calls, 1)],
    }


def _is_speech(call: Call) -> bool:
    return call.effect and call.route == SAY_TEXT


def _duplicates(said: list[tuple[int, View]]) -> list[View]:
    calls: defaultdict[tuple[str, str, bool], list[int]] = defaultdict(list)
    for number, body in said:
        calls[body["turnId"], body["text"], body["isFinal"]].append(number)
    return [{"turn": turn, "text": text, "calls": n} for (turn, text, _), n in calls.items() if len(n) > 1]


def _of_call(world: World, call: Call, order: int | None = None) -> View:
    """One call; `number` counts over all sessions, `order` within its own."""
    return {
        "number": call.number,
        "order": order,
        "route": call.route,
        "path": call.path,
        "body": call.body(),
        "begun_s": call.begun,
        "begun_epoch_s": world.epoch(call.begun),
        "ended_s": call.ended,
        "ended_epoch_s": world.epoch(call.ended),
        "status": call.status,
        "effect": call.effect,
        "fault": call.fault,
        "error": call.error,
    }
