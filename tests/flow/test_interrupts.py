"""Interrupts through the flow: an express copy acts at once, wherever the conversation is, and only with its owner."""

import asyncio
from dataclasses import replace

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.conversation import express, interrupt, wire
from tests.support.fakes import until
from worker.core.model import Entry
from worker.ports import Grant


def stop_(flow: Flow, turn_id: str | None = None) -> Entry:
    """An interrupt as it was published just now."""
    return interrupt(turn_id, born=flow.clock())


async def spoke(flow: Flow, text: str = "a") -> None:
    """The conversation has spoken, and nobody serves it any more."""
    flow.speak(text)
    await flow.all_settled()
    await until(lambda: not flow.lanes.is_served("c1"), "idle")


async def done(flow: Flow, count: int = 1) -> None:
    """So many interrupts were told of."""
    await until(lambda: len(flow.told("interrupt.done")) == count, f"{flow.outbox.told} told")


async def test_it_is_called_at_once_beside_a_say_in_flight_and_again_when_that_returns(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    waiting, stop = flow.speak("b"), stop_(flow)
    flow.lanes.hear(express(stop))
    await done(flow)
    assert flow.api.verbs() == ["create", "say", "interrupt"]
    flow.deliver(stop)
    gate.set()
    await flow.all_settled()
    await until(lambda: flow.api.verbs() == ["create", "say", "interrupt", "interrupt"])
    assert [wire(event)["commandIds"] for event in flow.told("speech.discarded")] == [[waiting.message_id]]
    assert len({event.id("s") for event in flow.told("interrupt.done")}) == 1


async def test_the_ordered_copy_alone_is_called_at_once_too(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    flow.deliver(stop_(flow))
    await done(flow)
    assert flow.api.verbs() == ["create", "say", "interrupt"]
    gate.set()
    await flow.all_settled()


async def test_a_lane_that_waits_for_its_turn_among_many_hears_it_at_once(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    waiting = flow.speak("b")
    async with flow.lanes._turn:
        gate.set()
        await until(lambda: len(flow.told("speech.accepted")) == 1)
        flow.deliver(stop_(flow))
        await done(flow)
        assert flow.api.verbs() == ["create", "say", "interrupt"]
    await flow.all_settled()
    assert [wire(event)["commandIds"] for event in flow.told("speech.discarded")] == [[waiting.message_id]]


async def test_nothing_new_is_said_before_the_api_has_answered(flow: Flow) -> None:
    await spoke(flow)
    gate = flow.api.gates["interrupt"] = asyncio.Event()
    flow.deliver(stop_(flow))
    await until(lambda: flow.api.verbs()[-1] == "interrupt")
    flow.speak("b", turn_id="t2", final=True)
    await flow.quiet()
    assert flow.api.said == ["a"]
    gate.set()
    await flow.all_settled()
    assert flow.api.said == ["a", "b"]


async def test_what_was_about_to_be_said_is_not(flow: Flow) -> None:
    await spoke(flow)
    gate = flow.ledger.gates["intend"] = asyncio.Event()
    flow.speak("b")
    await until(lambda: flow.ledger.asked["intend"] > 2)
    flow.lanes.hear(express(stop := stop_(flow)))
    await until(lambda: flow.api.verbs()[-1] == "interrupt")
    gate.set()
    flow.deliver(stop)
    await flow.all_settled()
    assert flow.api.said == ["a"]
    assert [wire(event)["reason"] for event in flow.told("speech.discarded")] == ["interrupted"]


async def test_a_client_that_raises_mutes_nobody(flow: Flow) -> None:
    await spoke(flow)
    flow.api.results["interrupt"] = [RuntimeError("a bug")]
    flow.deliver(stop_(flow))
    await flow.all_settled()
    assert [wire(event)["apiStatus"] for event in flow.told("interrupt.done")] == [0]
    flow.clock.now += 3
    flow.speak("b", turn_id="t2", final=True)
    await flow.all_settled()
    assert flow.api.said == ["a", "b"]


class TestNobodyServesTheConversation:
    async def test_whoever_owns_its_partition_acts(self, flow: Flow) -> None:
        await spoke(flow)
        flow.lanes.tenure_of = {flow.tenure.partition: flow.tenure}.get
        stop = stop_(flow)
        flow.lanes.hear(express(stop))
        await done(flow)
        assert flow.api.verbs() == ["create", "say", "interrupt"]
        flow.speak("b")
        flow.deliver(stop)
        flow.speak("c", turn_id="t2", final=True)
        await flow.all_settled()
        assert flow.api.said == ["a", "c"]
        assert len({event.id("s") for event in flow.told("interrupt.done")}) == 1

    @pytest.mark.parametrize("spoken", [True, False], ids=["of another", "unknown"])
    async def test_everybody_else_lets_it_pass(self, flow: Flow, spoken: bool) -> None:
        if spoken:
            await spoke(flow)
        stop = stop_(flow)
        flow.lanes.hear(express(stop))
        await flow.quiet()
        assert not flow.lanes.is_served("c1")
        assert "interrupt" not in flow.api.verbs()
        flow.speak("b", turn_id="t2", final=True)
        flow.deliver(stop)
        await flow.all_settled()
        await done(flow)

    async def test_a_ledger_out_of_reach_leaves_it_to_the_ordered_copy(
        self, flow: Flow, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(conversation_id: str) -> int | None:
            raise OSError("out of reach")

        await spoke(flow)
        with monkeypatch.context() as patch:
            patch.setattr(flow.ledger, "partition_of", broken)
            flow.lanes.hear(express(stop_(flow)))
            await flow.quiet()
        assert not flow.lanes.is_served("c1")
        flow.deliver(stop_(flow))
        await flow.all_settled()
        assert flow.api.verbs()[-1] == "interrupt"


class TestTheTenureEnds:
    async def test_the_fence_of_an_express_copy_stands_under_the_next_one(self, flow: Flow) -> None:
        gate = flow.api.gates["say a"] = asyncio.Event()
        flow.speak("a")
        await until(lambda: flow.api.said == ["a"])
        stop = stop_(flow)
        flow.lanes.hear(express(stop))
        await done(flow)
        flow.redeliver()
        overtaken = flow.speak("b", turn_id="t2")
        flow.deliver(stop)
        flow.speak("c", turn_id="t3", final=True)
        gate.set()
        await flow.all_settled()
        assert flow.api.said == ["a", "c"]
        discarded = {one for event in flow.told("speech.discarded") for one in wire(event)["commandIds"]}
        assert overtaken.message_id in discarded

    async def test_abandoned_while_the_api_is_being_told_nothing_lingers(self, flow: Flow) -> None:
        await spoke(flow)
        flow.api.gates["interrupt"] = asyncio.Event()
        flow.deliver(stop_(flow))
        await until(lambda: flow.api.verbs()[-1] == "interrupt")
        async with asyncio.timeout(2):
            await flow.lanes.abandon()
        assert flow.told("interrupt.done") == []
        await until(lambda: not any(flow.api.interrupting.values()), "the call is cut")

    async def test_a_copy_is_not_acknowledged_when_what_was_to_tell_of_the_other_is_refused(
        self, flow: Flow, fleet: Fleet
    ) -> None:
        await spoke(flow)
        flow.lanes.tenure_of = {flow.tenure.partition: flow.tenure}.get
        answered = flow.api.gates["interrupt"] = asyncio.Event()
        recalled = flow.ledger.gates["recall"] = asyncio.Event()
        recorded = flow.ledger.gates["record"] = asyncio.Event()
        before = flow.ledger.asked["record"]
        flow.lanes.hear(express(stop_(flow, "t1")))  # as long as it is called, the lane stays
        await until(lambda: flow.ledger.asked["recall"] == 2)
        beside = fleet.join("w2")
        memory = await beside.ledger.recall("c1")
        memory.turn("t9", flow.clock())
        changes = memory.take_changes()
        assert changes is not None
        assert await beside.ledger.record("c1", changes, outcome=False) is Grant.GRANTED
        recalled.set()
        await until(lambda: flow.ledger.asked["record"] == before + 1)
        flow.lanes.hear(express(stop := stop_(flow, "t2")))
        await until(lambda: flow.ledger.asked["record"] == before + 2, "the first copy has ended")
        flow.deliver(stop)
        await flow.quiet()
        recorded.set()
        await until(lambda: flow.tenure.refusals, "refused")
        await flow.quiet()
        assert flow.deliveries[-1].settled == 0
        assert flow.told("interrupt.done") == []
        flow.redeliver()
        answered.set()
        await flow.all_settled()
        assert len({event.id("s") for event in flow.told("interrupt.done")}) == 1

    async def test_stopping_waits_for_the_answer(self, flow: Flow) -> None:
        await spoke(flow)
        gate = flow.api.gates["interrupt"] = asyncio.Event()
        flow.deliver(stop_(flow))
        await until(lambda: flow.api.verbs()[-1] == "interrupt")
        stopping = asyncio.create_task(flow.lanes.stop())
        await flow.quiet()
        assert not stopping.done()
        gate.set()
        await stopping
        assert len(flow.told("interrupt.done")) == 1


async def test_an_express_copy_that_comes_late_does_nothing(flow: Flow) -> None:
    await spoke(flow)
    stop = flow.deliver(stop_(flow))
    flow.speak("b", turn_id="t2")
    await flow.all_settled()
    flow.lanes.hear(express(replace(stop)))
    await flow.quiet()
    flow.speak("c", turn_id="t2", final=True)
    await flow.all_settled()
    assert flow.api.said == ["a", "b", "c"]
    assert flow.api.verbs().count("interrupt") == 1
