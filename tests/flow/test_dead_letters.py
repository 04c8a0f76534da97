"""What the broker gave up ends beside the lane of its conversation, and takes the rest of its turn with it."""

import asyncio
from dataclasses import replace

import pytest

from tests.flow.conftest import Flow
from tests.support.conversation import entry, speak, wire
from tests.support.fakes import FakeDelivery, FakeTenure, until
from worker.core.model import Entry
from worker.flow.dead_letters import DeadLetters


@pytest.fixture
def letters(flow: Flow) -> DeadLetters:
    return DeadLetters(ledger=flow.ledger, settler=flow.settler, clock=flow.clock)


async def lost(flow: Flow, letters: DeadLetters, message_id: str | None = "lost") -> Entry:
    """A chunk that came to the dead letters."""
    one = replace(speak("t1", "lost", message_id=message_id), delivery=FakeDelivery(flow.outbox, "lost", FakeTenure()))
    await letters.take(one, "no queue")
    await until(lambda: one.delivery.settled)  # type: ignore[attr-defined]  # see above
    return one


async def said_first(flow: Flow) -> None:
    flow.speak("a")
    await flow.all_settled()


class TestTheRestOfItsTurn:
    async def test_fails_with_it(self, flow: Flow, letters: DeadLetters) -> None:
        await said_first(flow)
        await lost(flow, letters)
        flow.speak("b", final=True)
        await flow.all_settled()
        assert flow.api.said == ["a"]
        assert [wire(event)["reason"] for event in flow.told("speech.failed")] == ["dead_lettered", "turn_failed"]
        assert [wire(event)["reason"] for event in flow.told("turn.failed")] == ["dead_lettered"]
        assert flow.told("turn.completed") == []

    async def test_fails_where_it_waits_already(self, flow: Flow, letters: DeadLetters) -> None:
        gate = flow.api.gates["say a"] = asyncio.Event()
        flow.speak("a")
        await flow.said("a")
        flow.speak("b", final=True)
        await lost(flow, letters)
        gate.set()
        await flow.all_settled()
        assert flow.api.said == ["a"], "what was being said is a fact"
        assert [wire(event)["commandIds"] for event in flow.told("speech.accepted")] == [[flow.entries[0].message_id]]
        assert [wire(event)["reason"] for event in flow.told("speech.failed")] == ["dead_lettered", "turn_failed"]
        assert len(flow.told("turn.failed")) == 1

    async def test_fails_without_an_id_too(self, flow: Flow, letters: DeadLetters) -> None:
        await lost(flow, letters, None)
        flow.speak("b", final=True)
        await flow.all_settled()
        assert flow.api.said == []
        assert [wire(event)["reason"] for event in flow.told("speech.failed")] == ["dead_lettered", "turn_failed"]

    async def test_other_turns_are_spoken(self, flow: Flow, letters: DeadLetters) -> None:
        await said_first(flow)
        await lost(flow, letters)
        flow.speak("c", turn_id="t2", final=True)
        await flow.all_settled()
        assert flow.api.said == ["a", "c"]


async def test_a_turn_fails_once(flow: Flow, letters: DeadLetters) -> None:
    for message_id in ("m1", "m2", "m1"):
        await lost(flow, letters, message_id)
    assert [wire(event)["commandIds"] for event in flow.told("speech.failed")] == [["m1"], ["m2"], ["m1"]]
    assert len({event.id("s") for event in flow.told("turn.failed")}) == 1


async def test_what_is_no_speech_fails_no_turn(flow: Flow, letters: DeadLetters) -> None:
    one = replace(entry(type="session.start"), delivery=FakeDelivery(flow.outbox, "lost", FakeTenure()))
    await letters.take(one, "no queue")
    await said_first(flow)
    assert flow.told("turn.failed") == []
