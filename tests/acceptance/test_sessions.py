"""Avatar sessions: started, answered, attached, replaced, ended."""

import json
import signal
import time
from typing import Any

import pytest
from aio_pika import DeliveryMode
from aio_pika.abc import AbstractIncomingMessage

from tests.acceptance.conftest import Simulator, StartWorker
from tests.support.bus import Bus, Document


class Asker:
    """Somebody who starts sessions and waits for the answers."""

    def __init__(self, bus: Bus, queue: str) -> None:
        self._bus = bus
        self._queue = queue
        self._asked = 0

    async def start(self, conversation_id: str, *, expires_s: float = 30, **fields: Any) -> Document:
        """Start a session; returns the answer."""
        return await self.answer(await self.ask(conversation_id, **fields), expires_s)

    async def ask(self, conversation_id: str, headers: Document | None = None, **fields: object) -> str:
        """Start a session; returns the correlation id."""
        self._asked += 1
        correlation_id = f"request {self._asked}"
        properties: dict[str, Any] = {
            "reply_to": self._queue,
            "correlation_id": correlation_id,
            "headers": headers or {},
        }
        await self._bus.send(conversation_id, {"type": "session.start", **fields}, **properties)
        return correlation_id

    async def answer(self, correlation_id: str, expires_s: float = 30) -> Document:
        """The answer to that, once it is there."""

        def found() -> list[AbstractIncomingMessage]:
            return [one for one in self._bus.answers if one.correlation_id == correlation_id]

        await self._bus.until(lambda: bool(found()))
        (answer,) = found()
        assert answer.delivery_mode == DeliveryMode.NOT_PERSISTENT
        assert answer.expiration == expires_s
        document: dict[str, Any] = json.loads(answer.body)
        return document


@pytest.fixture
async def asker(bus: Bus) -> Asker:
    return Asker(bus, await bus.answer_queue())


async def test_a_start_is_answered_and_idempotent(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker()
    first = await asker.start("c")
    assert first.keys() == {"sessionId", "token"}
    assert await asker.start("c") == first
    assert await asker.start("c", avatarId="test-avatar") == first

    viewer = await asker.start("c", handoff="viewer")
    assert viewer.keys() == {"sessionId", "whepUrl", "turn"}
    assert viewer["sessionId"] == first["sessionId"]
    assert await asker.start("c", handoff="viewer") == viewer

    await bus.ended(await bus.say("c", "t", "Said before."))
    other = await asker.start("c", avatarId="another", voiceId="v", voiceSpeed=1.5)
    assert other["sessionId"] != first["sessionId"]
    ended = await bus.event("session.ended", sessionId=first["sessionId"])
    assert (ended["data"]["reason"], ended["data"]["commandIds"]) == ("replaced", [])
    await bus.ended(await bus.say("c", "t2", "Said after."))

    old, new = await simulator.sessions()
    assert (old["spoken"], old["ended_by"]) == (["Said before."], "request")
    assert [call["route"] for call in old["calls"]].count("init-client") == 1
    assert (new["spoken"], new["ended_by"]) == (["Said after."], None)
    assert (new["avatar_id"], new["voice"]) == ("another", {"id": "v", "speed": 1.5})
    assert len(bus.of("session.ready")) == 6, "five starts that were answered at once, and one that was not"
    secrets = [first["token"], other["token"], json.dumps(viewer["turn"])]
    assert not [secret for secret in secrets if secret in json.dumps(bus.events)]


async def test_starts_that_race_with_speech_make_one_session(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker()
    spoken = [await bus.say("speaks-first", "t1", "Hello.")]
    asked = [await asker.ask("speaks-first") for _ in range(2)]
    asked += [await asker.ask("starts-first", headers={"reply-timeout-ms": 5_000})]
    spoken += [await bus.say("starts-first", "t2", "Hello.")]
    answers = [await asker.answer(one, expires_s=30 if one != asked[2] else 5) for one in asked]
    assert [(await bus.ended(one))["type"] for one in spoken] == ["avatar.speech.accepted"] * 2
    assert answers[0] == answers[1]
    assert {one["sessionId"] for one in answers} == {session["id"] for session in await simulator.sessions()}
    assert [session["spoken"] for session in await simulator.sessions()] == [["Hello."], ["Hello."]]


async def test_a_start_is_answered_in_time_although_the_api_wants_to_be_left_alone(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker(SESSION_WAIT_S="1")
    await simulator.fault(kind="status", status=429, route="create", times=None, retry_after="60")
    for name in ("told-so", "held-back"):
        begun = time.monotonic()
        answer = await asker.start(name)
        assert time.monotonic() - begun < 4
        assert "sessionId" not in answer
        await bus.event("session.failed", name, reason="capacity", status=429)


async def test_nobody_waits_for_the_answer(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker()
    ready = await bus.ended(await bus.send("c", {"type": "session.start"}, reply_to="gone", correlation_id="1"))
    assert ready["type"] == "avatar.session.ready"
    await bus.ended(await bus.say("c", "t", "All the same."))
    await bus.drained("avatar.commands.v1.p00")
    (session,) = await simulator.sessions()
    assert session["spoken"] == ["All the same."]


async def test_a_start_that_fails_is_answered(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    worker = await start_worker(SESSION_WAIT_S="0.5")
    await simulator.fault(kind="status", status=429, route="create", times=None, avatar="full")
    await simulator.fault(kind="status", status=503, route="create", times=None, avatar="down")
    await simulator.fault(kind="refuse", route="create", times=None, avatar="refused", error="No such avatar")
    reasons = {"full": ("capacity", 429), "down": ("unavailable", 503), "refused": ("refused", 200)}
    for avatar, (reason, status) in reasons.items():
        answer = await asker.start(avatar, avatarId=avatar)
        assert answer["status"] == status
        assert answer["error"].startswith(reason)
        await bus.event("session.failed", avatar, reason=reason, status=status)
    await simulator.change(ks=None)
    assert (await asker.start("denied"))["error"].startswith("credentials")
    denied = await bus.ended(await bus.say("denied", "t", "x"))
    assert (denied["type"], denied["data"]["reason"]) == ("avatar.speech.failed", "credentials")
    (copy,) = await bus.parked()
    assert (copy.header.properties.headers or {})["avatar-reason"] == "credentials"
    assert "test-ks" not in worker.log
    await simulator.change(ks="test-ks")
    assert "token" in await asker.start("denied")


async def test_an_answer_never_goes_to_one_of_our_queues(start_worker: StartWorker, bus: Bus) -> None:
    await start_worker()
    message_id = await bus.send("c", {"type": "session.start"}, reply_to="avatar.parked")
    assert (await bus.ended(message_id))["type"] == "avatar.session.ready"
    await bus.drained("avatar.commands.v1.p00")
    assert await bus.depth("avatar.parked") == 0


async def test_a_session_of_somebody_else_is_used_and_ended(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    worker = await start_worker(AVATAR_ID=None)
    session_id, token = await simulator.create()
    attach = {"type": "session.attach", "sessionId": session_id, "token": token}
    ready = await bus.ended(await bus.send("c", attach))
    assert (ready["type"], ready["data"]["sessionId"]) == ("avatar.session.ready", session_id)
    spoken = await bus.say("c", "t", "Said by an attached avatar.")
    ended = await bus.ended(await bus.send("c", {"type": "session.end"}))
    assert (ended["type"], ended["data"]["reason"]) == ("avatar.session.ended", "requested")
    assert (await bus.ended(spoken))["type"] == "avatar.speech.accepted"
    (session,) = await simulator.sessions()
    assert (session["spoken"], session["ended_by"]) == (["Said by an attached avatar."], "request")
    assert token not in worker.log + json.dumps(bus.events)

    after = await bus.ended(await bus.say("c", "t2", "Nobody is there."))
    assert (after["type"], after["data"]["reason"]) == ("avatar.speech.failed", "no_session")
    again = await bus.ended(await bus.send("c", {"type": "session.end"}))
    assert "sessionId" not in again["data"]


async def test_a_session_that_nobody_knows_is_lost(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker()
    await bus.send("c", {"type": "session.attach", "sessionId": "unknown", "token": "t0ken"})
    lost = await bus.ended(await bus.say("c", "t", "To whom?"))
    assert (lost["type"], lost["data"]["reason"]) == ("avatar.speech.failed", "session_lost")
    assert (await bus.event("session.ended", "c"))["data"]["reason"] == "lost"
    (copy,) = await bus.parked()
    assert json.loads(copy.body)["text"] == "To whom?"
    assert (await bus.ended(await bus.say("c", "t2", "Now the default avatar.")))["type"] == "avatar.speech.accepted"
    assert list((await simulator.spoken()).values()) == ["Now the default avatar."]


async def test_an_idle_session_ends(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SESSION_IDLE_S="1")
    await bus.ended(await bus.say("c", "t", "Hello."))
    ended = await bus.event("session.ended", "c")
    assert (ended["data"]["reason"], ended["data"]["commandIds"]) == ("idle", [])
    await bus.ended(await bus.say("c", "t2", "Hello again."))
    sessions = await simulator.sessions()
    assert [session["spoken"] for session in sessions] == [["Hello."], ["Hello again."]]
    assert sessions[0]["ended_by"] == "request"


async def test_an_end_waits_for_the_playback(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SESSION_END_WAIT_S="1.5")
    await bus.say("c", "t", "x" * 500)
    begun = time.monotonic()
    await bus.ended(await bus.send("c", {"type": "session.end"}))
    assert 1.4 < time.monotonic() - begun < 5


async def test_an_interrupt_ends_the_wait_for_the_playback(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker(SESSION_END_WAIT_S="60")
    await bus.ended(await bus.say("c", "t", "x" * 800))
    end = await bus.send("c", {"type": "session.end"})
    await bus.interrupt("c")
    assert (await bus.ended(end))["data"]["reason"] == "requested"
    (session,) = await simulator.sessions()
    assert [call["route"] for call in session["calls"]] == ["create", "say-text", "interrupt", "end"]


async def test_a_start_after_a_loss_has_the_new_hand_off(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker(KEEP_ALIVE_S="1")
    first = await asker.start("c", avatarId="ann")
    await simulator.post(f"sessions/{first['sessionId']}/end")
    assert (await bus.event("session.ended", "c"))["data"]["reason"] == "lost"
    second = await asker.start("c")
    assert second["sessionId"] != first["sessionId"]
    assert [session["avatar_id"] for session in await simulator.sessions()] == ["ann", "ann"]


async def test_a_lost_session_fails_the_turn_if_it_should(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker(SESSION_ON_LOST="fail")
    first = await asker.start("c", avatarId="ann")
    await simulator.post(f"sessions/{first['sessionId']}/end")
    failed = await bus.ended(await bus.say("c", "t", "To whom?"))
    assert (failed["type"], failed["data"]["reason"]) == ("avatar.speech.failed", "session_lost")
    assert len(await simulator.sessions()) == 1


@pytest.mark.timeout(90)
async def test_a_session_is_replaced_before_its_token_expires(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await simulator.change(token_life_s=30)
    await start_worker()
    first = await asker.start("c", avatarId="ann")
    ended = await bus.event("session.ended", "c", within_s=40)
    assert (ended["data"]["reason"], ended["data"]["sessionId"]) == ("replaced", first["sessionId"])
    await bus.until(lambda: len(bus.of("session.ready", "c")) == 2)
    second = await asker.start("c")
    assert second["sessionId"] == bus.of("session.ready", "c")[1]["data"]["sessionId"] != first["sessionId"]
    old, new = await simulator.sessions()
    assert (old["ended_by"], new["ended_by"], new["avatar_id"]) == ("request", None, "ann")


@pytest.mark.timeout(90)
async def test_what_a_dead_worker_leaves_is_kept_alive_and_ended_by_another(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    first = await start_worker(KEEP_ALIVE_S="2", SESSION_IDLE_S="12")
    await bus.ended(await bus.say("c", "t", "Hello."))
    await bus.drained("avatar.commands.v1.p00")
    await start_worker(KEEP_ALIVE_S="2", SESSION_IDLE_S="12")
    await first.killed()
    ended = await bus.event("session.ended", "c", within_s=40)
    assert ended["data"]["reason"] == "idle"
    (session,) = await simulator.sessions()
    assert session["ended_by"] == "request"
    assert session["max_gap_s"] < 10, "a lease, and the interval of keep-alives"


@pytest.mark.timeout(90)
async def test_a_creation_that_a_kill_has_cut_is_made_again_and_keeps_its_slot_for_a_while(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    settings = {"AVATAR_MAX_SESSIONS": "1", "SESSION_GHOST_S": "10", "SESSION_WAIT_S": "30"}
    first = await start_worker(**settings)
    await simulator.fault(kind="hang", route="create", when="after")
    asked = await asker.ask("c")
    await simulator.wait("create")
    await first.killed()
    await simulator.release()
    await start_worker(**settings)
    await bus.event("session.ready", "c", within_s=40)
    ghost, session = await simulator.sessions()
    assert session["created_epoch_s"] - ghost["created_epoch_s"] > 9
    assert (await asker.answer(asked))["sessionId"] == session["id"]


async def test_a_session_that_is_lost_is_recreated_and_asked_for_again(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker()
    first = await asker.start("c", avatarId="ann", voiceId="v")
    await simulator.post(f"sessions/{first['sessionId']}/forget")
    spoken = await bus.ended(await bus.say("c", "t", "Said to the second."))
    assert (spoken["type"], spoken["data"]["possibleDuplicate"]) == ("avatar.speech.accepted", True)
    assert (await bus.event("session.ended", "c"))["data"]["reason"] == "lost"
    second = await asker.start("c")
    assert second["sessionId"] != first["sessionId"]
    _, session = await simulator.sessions()
    assert (session["id"], session["avatar_id"], session["spoken"]) == (
        second["sessionId"],
        "ann",
        ["Said to the second."],
    )


async def test_a_start_beyond_the_fleet_s_limit_waits_for_a_free_session(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await start_worker(AVATAR_MAX_SESSIONS="1", SESSION_WAIT_S="2")
    await asker.start("c1")
    assert (await asker.start("c2"))["error"].startswith("capacity")
    await bus.send("c2", {"type": "session.start"})
    await bus.send("c1", {"type": "session.end"})
    await bus.event("session.ready", "c2")
    assert [session["ended_by"] for session in await simulator.sessions()] == ["request", None]


async def test_starts_that_the_api_has_no_room_for_wait_in_order_of_arrival(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await simulator.change(session_limit=1)
    await start_worker(SESSION_WAIT_S="6")
    await asker.start("c0", avatarId="c0")
    await bus.send("c1", {"type": "session.start", "avatarId": "c1"})
    await simulator.wait("create", 2, stage="finished")
    for name in ("c2", "c3"):
        await bus.send(name, {"type": "session.start", "avatarId": name})
    await simulator.wait("create", 4, stage="finished")
    tried = [call["body"]["visualConfig"]["avatarId"] for call in (await simulator.transcript())["strays"]]
    assert set(tried) == {"c1"}, "of those that wait, the first asks again"
    for ending, next_one in (("c0", "c1"), ("c1", "c2")):
        await bus.send(ending, {"type": "session.end"})
        await bus.event("session.ready", next_one)
    await bus.event("session.failed", "c3", reason="capacity", status=429)
    assert [session["avatar_id"] for session in await simulator.sessions()] == ["c0", "c1", "c2"]


async def test_a_worker_that_stops_ends_its_sessions_if_it_should(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    worker = await start_worker(SESSION_ON_STOP="end")
    await bus.ended(await bus.say("c", "t", "Hello."))
    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
    assert (await bus.event("session.ended", "c"))["data"]["reason"] == "shutdown"
    assert [session["ended_by"] for session in await simulator.sessions()] == ["request"]
