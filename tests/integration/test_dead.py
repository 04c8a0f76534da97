"""What the broker could not route or deliver is parked and told of, once, by one worker."""

import asyncio

import pytest
from aiormq.abc import DeliveredMessage

from schemas import routes
from tests.integration.conftest import Start
from tests.support.bus import PATIENCE_S, Bus, Document
from worker.amqp import dead


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dead, "LOOK_S", 0.05)


def headers_of(copy: DeliveredMessage) -> Document:
    return copy.header.properties.headers or {}


async def lost(bus: Bus, conversation_id: str, command: Document | bytes, **props: object) -> str:
    """A command that comes to where the alternate exchange of `avatar.commands` leads."""
    return await bus.send(conversation_id, command, exchange="avatar.dead", **props)


async def consumers(bus: Bus, count: int) -> None:
    """Return once the dead letters have so many consumers."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found = await bus.channel.declare_queue(routes.DEAD, passive=True)
            if found.declaration_result.consumer_count == count:
                return
            await asyncio.sleep(0.05)


async def test_speech_that_finds_no_queue_fails_in_order(start: Start, bus: Bus) -> None:
    async with start(dead=True) as station:
        await bus.channel.queue_delete(routes.partition_queue(0))
        ids = [await bus.say("c", "t", f"{number}", final=False) for number in range(3)]
        await bus.all_ended(ids)
        for event in bus.of("speech.failed", "c"):
            assert (event["data"]["reason"], event["data"]["turnId"]) == ("dead_lettered", "t")
        copies = await bus.parked(3)
        assert [copy.header.properties.message_id for copy in copies] == ids
        for copy in copies:
            headers = headers_of(copy)
            assert (headers["avatar-reason"], headers["avatar-ended"]) == ("dead_lettered", "avatar.speech.failed")
            assert (headers["avatar-exchange"], headers["avatar-routing-key"]) == ("avatar.commands", "c")
            assert "no queue" in headers["avatar-error"]
        (turn,) = bus.of("turn.failed", "c")
        assert turn["data"] == {"conversationId": "c", "turnId": "t", "reason": "dead_lettered"}
        await station.settled()
        assert station.avatar.said == []
    await bus.drained(routes.DEAD)


async def test_the_rest_of_its_turn_is_not_spoken(start: Start, bus: Bus) -> None:
    async with start(dead=True) as station:
        await bus.ended(await bus.say("c", "t", "One. ", final=False))
        await bus.ended(await lost(bus, "c", {"turnId": "t", "text": "Two. ", "isFinal": False}))
        event = await bus.ended(await bus.say("c", "t", "Three."))
        assert event["data"]["reason"] == "turn_failed"
        await station.settled()
        assert "Three" not in "".join(piece.text for piece in station.avatar.said)


async def test_what_expired_in_its_queue_says_so(start: Start, bus: Bus) -> None:
    async with start():
        pass
    message_id = await bus.say("c", "t", "x", expiration="1")
    async with asyncio.timeout(PATIENCE_S):
        while await bus.depth(routes.DEAD) == 0:  # noqa: ASYNC110 - the broker has no such event
            await asyncio.sleep(0.05)
    async with start(dead=True):
        assert (await bus.ended(message_id))["data"]["reason"] == "dead_lettered"
        (copy,) = await bus.parked()
        headers = headers_of(copy)
        assert "expired in avatar.commands.v1.p00" in headers["avatar-error"]
        assert (headers["avatar-exchange"], headers["avatar-routing-key"]) == ("avatar.commands", "c")


@pytest.mark.parametrize(
    ("command", "type_", "reason"),
    [
        ({"turnId": "t", "text": "x"}, "speech.failed", "dead_lettered"),
        ({"type": "session.start"}, "session.failed", "unavailable"),
        ({"type": "session.attach", "sessionId": "s", "token": "s3cret"}, "session.failed", "unavailable"),
        ({"type": "session.end"}, "command.rejected", "invalid_field"),
        ({"type": "interrupt"}, "command.rejected", "invalid_field"),
        ({"type": "dance"}, "command.rejected", "unknown_type"),
        (b"{", "command.rejected", "not_json"),
    ],
    ids=str,
)
async def test_each_kind_has_its_end(
    start: Start, bus: Bus, command: Document | bytes, type_: str, reason: str
) -> None:
    async with start(dead=True) as station:
        queue = await bus.answer_queue()
        message_id = await lost(bus, "c", command, reply_to=queue)
        event = await bus.ended(message_id)
        assert (event["type"], event["data"]["reason"], event["subject"]) == (f"avatar.{type_}", reason, "c")
        (copy,) = await bus.parked()
        assert headers_of(copy)["avatar-reason"] == "dead_lettered"
        assert b"s3cret" not in copy.body
        await station.settled()
        assert bool(bus.answers) == (type_ != "speech.failed")


async def test_what_has_ended_does_not_end_again(start: Start, bus: Bus) -> None:
    async with start(dead=True) as station:
        spoken = {"turnId": "t", "text": "x"}
        message_id = await bus.send("c", spoken)
        told = (await bus.ended(message_id))["id"]
        await lost(bus, "c", spoken, message_id=message_id)
        (copy,) = await bus.parked()
        assert headers_of(copy)["avatar-ended"] == "avatar.speech.accepted"
        await bus.until(lambda: len(bus.of("speech.accepted")) == 2)
        await lost(bus, "c", spoken | {"text": "y"}, message_id=message_id)
        await bus.event("command.rejected", reason="message_id_reused")
        await station.settled()
        assert {event["id"] for event in bus.of("speech.accepted")} == {told}
        assert bus.of("speech.failed") == []


async def test_a_command_that_comes_again_has_ended(start: Start, bus: Bus) -> None:
    async with start(dead=True) as station:
        message_id = await lost(bus, "c", {"turnId": "t", "text": "x"})
        await bus.ended(message_id)
        await bus.send("c", {"turnId": "t", "text": "x"}, message_id=message_id)
        await bus.until(lambda: len(bus.of("speech.failed")) == 2)
        await station.settled()
        assert len(bus.terminal()[message_id]) == 1
        assert station.avatar.said == []


async def test_one_worker_at_a_time(start: Start, bus: Bus) -> None:
    async with start(name="w1", dead=True) as first, start(name="w2", dead=True) as second:
        await consumers(bus, 1)
        await bus.ended(await lost(bus, "c", {"turnId": "t", "text": "x"}))
        await consumers(bus, 1)
        holder = first if bus.events[-1]["worker"] == "w1" else second
        await holder.gone()
        event = await bus.ended(await lost(bus, "c", {"turnId": "t", "text": "y"}))
        assert event["worker"] == ("w2" if holder is first else "w1")
