"""Lanes side by side: isolated, rebuilt when they fail, gone when they are idle, stopped in phases."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import structlog

from schemas.commands import FieldError, Malformed, RejectReason
from tests.flow.conftest import Fleet, Flow
from tests.support.conversation import RULES, wire
from tests.support.fakes import FakeDelivery, until
from worker.core.lane import Lane
from worker.core.model import Misfit, ReplyTo
from worker.core.work import Step


async def test_the_journey_of_a_turn(flow: Flow) -> None:
    flow.speak("Hello", final=True)
    await flow.all_settled()
    assert flow.api.verbs() == ["create", "say"]
    assert flow.outbox.told == ["session.ready", "turn.started", "speech.accepted", "turn.completed"]


async def test_what_arrives_while_a_call_is_in_flight_is_joined(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    flow.speak("b")
    flow.speak("c", final=True)
    gate.set()
    await flow.all_settled()
    assert flow.api.said == ["a", "bc"]


async def test_a_slow_conversation_holds_up_no_other(flow: Flow) -> None:
    gate = flow.api.gates["say slow"] = asyncio.Event()
    flow.speak("slow", conversation_id="c1")
    flow.speak("quick", conversation_id="c2")
    await until(lambda: flow.deliveries[1].settled)
    assert not flow.deliveries[0].settled
    gate.set()
    await flow.all_settled()


async def test_a_listener_cannot_stop_speech(flow: Flow) -> None:
    flow.outbox.gate = asyncio.Event()
    for number, text in enumerate("abc", 1):
        flow.speak(text)
        await flow.said(*"abc"[:number])
    assert not any(delivery.settled for delivery in flow.deliveries)
    flow.outbox.gate.set()
    await flow.all_settled()


async def test_a_lane_leaves_the_map_and_comes_back_with_its_memory(flow: Flow) -> None:
    first = flow.speak("a")
    await until(lambda: not flow.lanes.is_served("c1"))
    await flow.all_settled()
    flow.deliver(replace(first, redelivered=True))
    await flow.all_settled()
    assert flow.api.verbs() == ["create", "say"]
    events = flow.told("speech.accepted")
    assert len(events) == 2
    assert len({event.id("s") for event in events}) == 1


async def test_a_lane_does_not_log_in_the_name_of_whoever_began_it(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task inherits the context of the one that starts it, and lanes outlive the delivery they began with."""
    seen: list[dict[str, Any]] = []

    def noted(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def note(*arguments: Any) -> Any:
            seen.append(structlog.contextvars.get_contextvars())
            return await method(*arguments)

        return note

    monkeypatch.setattr(flow.api, "say", noted(flow.api.say))
    monkeypatch.setattr(flow.outbox, "tell", noted(flow.outbox.tell))
    with structlog.contextvars.bound_contextvars(delivery="the first"):
        flow.speak("a", final=True)
    await flow.all_settled()
    assert len(seen) > 1
    assert not any(seen)


async def test_a_lane_that_crashes_is_rebuilt_and_its_neighbours_never_notice(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashes = iter([RuntimeError("a bug"), RuntimeError("the same again")])
    healthy = Lane.next

    def next_(lane: Lane, *times: float) -> Step:
        if lane._book.conversation_id == "ill":
            for crash in crashes:
                raise crash
        return healthy(lane, *times)

    monkeypatch.setattr(Lane, "next", next_)
    flow.speak("a", conversation_id="ill")
    flow.speak("x", conversation_id="well")
    await until(lambda: flow.deliveries[1].settled)
    flow.speak("b", conversation_id="ill", final=True)
    await flow.all_settled()
    assert "".join(text for text in flow.api.said if text != "x") == "ab"
    await until(lambda: not flow.lanes._runners)


async def test_a_store_out_of_reach_is_waited_for(flow: Flow) -> None:
    flow.store.way.broken = True
    flow.speak("a")
    await flow.quiet()
    assert flow.api.calls == []
    flow.store.way.broken = False
    await flow.all_settled()
    assert flow.api.said == ["a"]


async def test_a_client_that_raises_counts_as_a_lost_answer(flow: Flow) -> None:
    flow.api.results["say"] = [RuntimeError("a bug")]
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    await flow.quiet()
    assert flow.outbox.told == ["session.ready"]
    assert flow.lanes.is_served("c1")
    flow.clock.now += 30  # more than any wait
    flow.speak("b", final=True)
    await flow.all_settled()
    assert flow.api.said == ["a", "a", "b"]
    assert flow.flags() == [("a", True), ("b", None)]


async def test_a_message_that_is_no_command_is_parked_told_answered_and_acknowledged(flow: Flow) -> None:
    delivery = FakeDelivery(flow.outbox, "bad")
    malformed = Malformed(RejectReason.NOT_JSON, (FieldError("$", "must be JSON"),), None)
    flow.lanes.reject(Misfit(malformed, "m1", delivery, "\\xff", "m1", reply_to=ReplyTo("q", None, 1)))
    await until(lambda: delivery.settled)
    assert flow.outbox.whats == ["park", "tell", "answer", "settle"]
    ((_, event),) = [one for one in flow.outbox.log if one[0] == "tell"]
    assert (event.subject, event.data.routing_key, event.data.command_ids) == ("$invalid", "\\xff", ("m1",))


async def test_what_a_lost_connection_brought_is_dropped_but_for_the_call_under_way(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    flow.speak("b")
    flow.lose()
    gate.set()
    await until(lambda: not flow.lanes.is_served("c1") and flow.flags() == [("a", None)])
    assert flow.api.said == ["a"]


async def test_what_it_brought_comes_again_and_what_had_ended_is_told_again(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    flow.speak("b")
    flow.redeliver()
    gate.set()
    await flow.all_settled()
    assert flow.api.said == ["a", "b"]
    assert flow.flags() == [("a", None), ("a", None), ("b", None)]
    assert len({event.id("s") for event in flow.told("speech.accepted")}) == 2


class TestLeftOpen:
    """A turn whose worker died before it closed, and of whose conversation nothing more is delivered."""

    RULES = replace(RULES, auto_final_s=30)

    @pytest.fixture
    async def heir(self, fleet: Fleet) -> Flow:
        """The next owner of the partition, once it is one."""
        dead, heir = fleet.join("w1", self.RULES), fleet.join("w2", self.RULES)
        dead.speak("a")
        await dead.all_settled()
        await dead.lanes.abandon()
        return heir

    async def look(self, heir: Flow) -> list[int]:
        """What is done once a second; returns whose owner was looked for."""
        knocked: list[int] = []

        async def knock(partition: int) -> None:
            knocked.append(partition)

        await heir.lanes._summon(knock)
        return knocked

    async def test_it_is_closed_in_its_time(self, heir: Flow) -> None:
        heir.lanes.tenure_of = {heir.tenure.partition: heir.tenure}.get
        heir.clock.now += 29
        await self.look(heir)
        await heir.quiet()
        assert heir.told("turn.completed") == []
        heir.clock.now += 2
        await self.look(heir)
        await until(lambda: heir.told("turn.completed"))
        (completed,) = heir.told("turn.completed")
        assert (wire(completed)["autoFinal"], wire(completed)["pieces"]) == (True, 1)
        assert heir.api.calls == []
        await until(lambda: not heir.lanes.is_served("c1"))
        await self.look(heir)
        assert not heir.lanes.is_served("c1"), "it is closed"

    @pytest.mark.usefixtures("heir")
    async def test_with_the_text_that_is_said_for_it(self, fleet: Fleet) -> None:
        third = fleet.join("w3", replace(self.RULES, final_text="Bye."))
        third.lanes.tenure_of = {third.tenure.partition: third.tenure}.get
        third.clock.now += 31
        await self.look(third)
        await third.said("Bye.")
        await until(lambda: third.told("turn.completed"))

    async def test_who_owns_it_is_asked_now_and_then(self, heir: Flow) -> None:
        heir.clock.now += 31
        assert await self.look(heir) == [heir.tenure.partition]
        heir.clock.now += 1
        assert await self.look(heir) == [], "whoever it is may be busy"
        heir.clock.now += 30
        assert await self.look(heir) == [heir.tenure.partition]
        assert not heir.lanes.is_served("c1")

    async def test_where_turns_stay_open_nobody_asks(self, fleet: Fleet, heir: Flow) -> None:
        other = fleet.join("w3", replace(RULES, auto_final_s=0))
        heir.clock.now += 1e6
        assert await self.look(other) == []


class TestStop:
    async def test_the_call_under_way_ends_is_told_and_acknowledged_and_nothing_new_begins(self, flow: Flow) -> None:
        gate = flow.api.gates["say a"] = asyncio.Event()
        flow.speak("a")
        await until(lambda: flow.api.said == ["a"])
        flow.speak("b")
        stopping = asyncio.create_task(flow.lanes.stop())
        await flow.quiet()
        flow.speak("c", conversation_id="c2")
        assert not stopping.done()
        gate.set()
        await stopping
        assert flow.api.said == ["a"]
        assert [delivery.settled for delivery in flow.deliveries] == [1, 0, 0]

    async def test_it_waits_for_the_events_too(self, flow: Flow) -> None:
        flow.outbox.gate = asyncio.Event()
        flow.speak("a")
        await until(lambda: flow.api.said == ["a"])
        stopping = asyncio.create_task(flow.lanes.stop())
        await flow.quiet()
        assert not stopping.done()
        flow.outbox.gate.set()
        await stopping
        assert flow.deliveries[0].settled == 1

    async def test_a_lane_that_waits_or_lingers_stops_at_once(self, flow: Flow, monkeypatch: Any) -> None:
        monkeypatch.setattr("worker.flow.runner.LINGER_S", 3600)
        flow.speak("a" * 500, conversation_id="c1")
        flow.offer(conversation_id="c1", type="session.end")  # waits for playback
        flow.speak("b", conversation_id="c2")
        await until(lambda: len(flow.api.said) == 2 and flow.deliveries[2].settled)
        async with asyncio.timeout(2):
            await flow.lanes.stop()
        assert not flow.lanes._runners

    async def test_a_lane_in_its_pause_after_a_crash_stops_at_once(self, flow: Flow, monkeypatch: Any) -> None:
        monkeypatch.setattr("worker.flow.runner.PAUSE_S", 3600)
        flow.store.way.broken = True
        flow.speak("a")
        await flow.quiet()
        async with asyncio.timeout(2):
            await flow.lanes.stop()

    async def test_abandoned_calls_are_cut_and_what_hangs_on_them_is_not_acknowledged(self, flow: Flow) -> None:
        flow.api.gates["say"] = asyncio.Event()
        flow.speak("a")
        await until(lambda: flow.api.said == ["a"])
        async with asyncio.timeout(2):
            await flow.lanes.abandon()
        assert flow.deliveries[0].settled == 0
        flow.speak("b")
        await flow.quiet()
        assert flow.api.said == ["a"]
