"""A runner and the ledger: nothing is called without an intent, nothing told without a record, nothing said twice."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.conversation import NOT_TAKEN, RULES, entry, wire
from tests.support.fakes import FakeTenure, until
from tests.support.stores import busy
from worker.core.lane import Lane
from worker.core.memory import Ended, TurnState
from worker.core.verdict import Conclusion
from worker.core.work import INTENT_S
from worker.ports import Grant

QUICK = replace(RULES, ambiguous_wait_s=0.2)


async def meanwhile(flow: Flow, turn_id: str, state: TurnState) -> None:
    """Somebody else writes about the conversation."""
    memory = await flow.ledger.recall("c1")
    memory.turn(turn_id, flow.clock()).state = state
    changes = memory.take_changes()
    assert changes is not None
    assert await flow.ledger.record("c1", changes, outcome=False) is Grant.GRANTED


async def saying(flow: Flow, text: str) -> asyncio.Event:
    """A say that is under way until the event is set."""
    gate = flow.api.gates[f"say {text}"] = asyncio.Event()
    flow.speak(text)
    await until(lambda: text in flow.api.said)
    return gate


async def intending(flow: Flow, text: str) -> asyncio.Event:
    """A say whose intent is written, but takes until the event is set."""
    asked = flow.ledger.asked["intend"]
    gate = flow.ledger.gates["intend"] = asyncio.Event()
    flow.speak(text)
    await until(lambda: flow.ledger.asked["intend"] > asked)
    return gate


async def one_said(flow: Flow) -> None:
    """The conversation has a session, a lane that lingers, and "a" behind it."""
    flow.speak("a")
    await flow.all_settled()


@pytest.fixture(autouse=True)
def linger(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flow.runner.LINGER_S", 3600)


class TestAdmission:
    async def test_what_arrives_while_others_are_looked_up_is_looked_up_too(self, flow: Flow) -> None:
        first, second = flow.speak("a"), flow.speak("b")
        await flow.all_settled()
        flow.redeliver()
        said = list(flow.api.said)
        gate = flow.ledger.gates["known"] = asyncio.Event()
        flow.deliver(first)
        await until(lambda: flow.ledger.asked["known"] == 1)
        flow.deliver(second)
        gate.set()
        await flow.all_settled()
        assert flow.api.said == said
        assert flow.ledger.asked["known"] == 2

    async def test_a_tenure_that_ends_while_it_is_looked_up_brings_nothing(self, flow: Flow) -> None:
        first = flow.speak("a")
        await flow.all_settled()
        flow.redeliver()
        gate = flow.ledger.gates["known"] = asyncio.Event()
        flow.deliver(first)
        flow.speak("b")
        await until(lambda: flow.ledger.asked["known"] == 1)
        flow.redeliver()
        gate.set()
        await flow.all_settled()
        assert flow.api.said == ["a", "b"]

    async def test_what_the_lane_knows_by_itself_is_not_looked_up(self, flow: Flow) -> None:
        first = flow.speak("a")
        await flow.all_settled()
        flow.deliver(first)
        await flow.all_settled()
        assert flow.ledger.asked["known"] == 0

    async def test_a_tenure_that_ends_before_its_epoch_is_known_brings_nothing(self, flow: Flow) -> None:
        lost = flow.tenure
        lost.ended = True
        flow.speak("a")
        await flow.quiet()
        assert flow.api.calls == []
        flow.redeliver()
        await flow.all_settled()
        assert flow.api.said == ["a"]

    async def test_an_epoch_is_raised_before_anything_is_recalled(self, flow: Flow) -> None:
        order: list[str] = []

        class Noting(FakeTenure):
            async def epoch(self) -> int:
                order.append(f"epoch {flow.ledger.asked['recall']}")
                return await super().epoch()

        flow.tenure = Noting(flow.ledger)
        await one_said(flow)
        assert order == ["epoch 0"]


class TestRefused:
    async def test_nothing_is_said_and_the_tenure_is_given_up(self, flow: Flow) -> None:
        await one_said(flow)
        tenure = flow.tenure
        await flow.ledger.raise_epoch(0)
        flow.speak("b")
        await until(lambda: tenure.refusals)
        await flow.quiet()
        assert flow.api.said == ["a"]
        assert flow.deliveries[-1].settled == 0
        flow.redeliver()
        await flow.all_settled()
        assert flow.flags() == [("a", None), ("b", None)]

    async def test_what_waits_behind_it_is_forgotten_too(self, flow: Flow) -> None:
        await one_said(flow)
        await flow.ledger.raise_epoch(0)
        gate = await intending(flow, "b")
        flow.speak("c")
        gate.set()
        await flow.quiet()
        assert flow.api.said == ["a"]
        assert flow.tenure.refusals == 1

    async def test_it_leaves_no_attempt_behind(self, flow: Flow) -> None:
        await one_said(flow)
        await flow.ledger.raise_epoch(0)
        flow.speak("b")
        await until(lambda: flow.tenure.refusals)
        assert (await flow.ledger.recall("c1")).state.attempt is None


class TestOutdated:
    async def test_the_lane_is_built_anew_and_goes_on(self, flow: Flow) -> None:
        await one_said(flow)
        await meanwhile(flow, "t2", TurnState.INTERRUPTED)
        flow.speak("b")
        flow.speak("x", turn_id="t2")
        await flow.all_settled()
        assert flow.api.said == ["a", "b"]
        assert flow.flags() == [("a", None), ("b", None)]
        assert flow.tenure.refusals == 0

    async def test_it_is_not_said_before_what_the_other_wrote_is_read(self, flow: Flow) -> None:
        await one_said(flow)
        await meanwhile(flow, "t1", TurnState.INTERRUPTED)
        flow.speak("b")
        await flow.all_settled()
        assert flow.api.said == ["a"]
        assert flow.outbox.told[-1] == "speech.discarded"

    async def test_what_ended_with_the_intent_is_told_all_the_same_and_once(self, flow: Flow) -> None:
        await one_said(flow)
        await meanwhile(flow, "t2", TurnState.INTERRUPTED)
        flow.speak("", turn_id="t3", final=True)
        flow.speak("b")
        await flow.all_settled()
        assert flow.api.said == ["a", "b"]
        assert flow.outbox.told.count("speech.discarded") == 1

    async def test_what_another_has_said_is_not_said_again(self, flow: Flow) -> None:
        await one_said(flow)
        second = entry("m-b", turnId="t1", text="b")
        memory = await flow.ledger.recall("c1")
        (told,) = flow.told("speech.accepted")
        memory.end("m-b", Ended(second.fingerprint, replace(told, key="of another"), flow.clock()))
        changes = memory.take_changes()
        assert changes is not None
        await flow.ledger.record("c1", changes, outcome=False)
        flow.deliver(second)
        await flow.all_settled()
        assert flow.api.said == ["a"]
        assert [event.key for event in flow.told("speech.accepted")][1:] == ["of another"]


class TestRecords:
    async def test_what_could_not_be_recorded_is_not_told_and_the_tenure_given_up(self, flow: Flow) -> None:
        await one_said(flow)
        tenure = flow.tenure
        await meanwhile(flow, "t1", TurnState.INTERRUPTED)
        told = list(flow.outbox.told)
        async with busy(flow.database):
            flow.speak("", final=True)
            await until(lambda: flow.ledger.asked["record"] == 4)
            flow.speak("c", turn_id="t2")
            await until(lambda: flow.ledger.asked["intend"] == 3)
        await until(lambda: tenure.refusals)
        await flow.quiet()
        assert flow.outbox.told == told
        assert flow.api.said == ["a"], "nor does anything behind it overtake"
        flow.redeliver()
        await flow.all_settled()
        assert flow.api.said == ["a", "c"]
        assert [wire(event)["reason"] for event in flow.told("speech.discarded")] == ["interrupted"]

    async def test_nothing_is_told_before_it_is_recorded(self, flow: Flow) -> None:
        gate = flow.ledger.gates["record"] = asyncio.Event()
        flow.speak("a", final=True)
        await flow.said("a")
        await flow.quiet()
        assert "speech.accepted" not in flow.outbox.told
        gate.set()
        await flow.all_settled()
        assert flow.outbox.told[-1] == "turn.completed"

    async def test_the_next_say_does_not_wait_for_the_record_of_the_last(self, flow: Flow) -> None:
        gate = flow.ledger.gates["record"] = asyncio.Event()
        flow.speak("a")
        await flow.said("a")
        flow.speak("b")
        await flow.said("a", "b")
        gate.set()
        await flow.all_settled()

    async def test_a_say_takes_two_writes(self, flow: Flow) -> None:
        await one_said(flow)
        flow.ledger.asked.clear()
        flow.speak("b")
        await flow.all_settled()
        assert flow.ledger.asked == {"intend": 1, "record": 1}


class TestWhetherTheCallIsMade:
    async def test_not_when_the_intent_took_too_long(self, flow: Flow) -> None:
        await one_said(flow)
        gate = await intending(flow, "b")
        flow.clock.now += 1.1
        gate.set()
        await until(lambda: flow.ledger.asked["record"] > 2)
        assert flow.api.said == ["a"]
        flow.clock.now += 1
        await flow.all_settled()
        assert flow.flags() == [("a", None), ("b", None)], "it was not said, and is no repeat"

    async def test_not_when_the_tenure_has_ended_meanwhile(self, flow: Flow) -> None:
        await one_said(flow)
        gate = await intending(flow, "b")
        flow.redeliver()
        gate.set()
        await flow.all_settled()
        assert flow.flags() == [("a", None), ("b", None)]
        assert flow.api.said == ["a", "b"]

    async def test_an_api_that_is_down_is_held_off_for_all_lanes_and_nothing_is_given_up(self, flow: Flow) -> None:
        await one_said(flow)
        flow.api.results["create"] = [NOT_TAKEN] * 5
        for n in range(5):
            flow.speak("x", conversation_id=f"other{n}")
        await until(lambda: not flow.api.results["create"])
        await flow.quiet()
        flow.speak("b")
        await flow.quiet()
        assert flow.api.verbs().count("create") == 6
        assert flow.api.said == ["a"]
        flow.clock.now += 1
        await flow.all_settled()
        assert flow.outbox.told.count("speech.accepted") == 7


class TestDeath:
    async def test_what_another_worker_was_saying_is_said_again_after_the_wait_and_flagged(self, fleet: Fleet) -> None:
        dead, heir = fleet.join("w1", QUICK), fleet.join("w2", QUICK)
        await saying(dead, "a")
        dead.speak("b")
        await dead.lanes.abandon()
        for one in dead.lose():
            heir.deliver(one)
        await heir.quiet()
        assert heir.api.said == []
        heir.clock.now += INTENT_S + 0.2
        await heir.all_settled()
        assert heir.api.said == ["a", "b"]
        assert heir.flags() == [("a", True), ("b", None)]

    async def test_or_not_said_again(self, fleet: Fleet) -> None:
        skip = replace(QUICK, ambiguous="skip")
        dead, heir = fleet.join("w1", skip), fleet.join("w2", skip)
        await saying(dead, "a")
        await dead.lanes.abandon()
        for one in dead.lose():
            heir.deliver(one)
        await heir.all_settled()
        assert heir.api.said == []
        (failed,) = heir.told("speech.failed")
        assert wire(failed)["reason"] == "unknown_outcome"

    async def test_an_answer_that_comes_after_all_is_what_happened(self, fleet: Fleet) -> None:
        slow, heir = fleet.join("w1", QUICK), fleet.join("w2", QUICK)
        gate = await saying(slow, "a")
        for one in slow.lose():
            heir.deliver(one)
        await heir.quiet()
        gate.set()
        await until(lambda: slow.flags() == [("a", None)])
        heir.clock.now += INTENT_S + 0.2
        await heir.all_settled()
        assert heir.api.said == []
        assert heir.flags() == [("a", None)]
        assert {event.id("s") for event in slow.told("speech.accepted")} == {
            event.id("s") for event in heir.told("speech.accepted")
        }

    async def test_unless_another_has_decided_without_it(self, fleet: Fleet) -> None:
        slow, heir = fleet.join("w1", QUICK), fleet.join("w2", QUICK)
        gate = await saying(slow, "a")
        for one in slow.lose():
            heir.deliver(one)
        heir.offer(type="interrupt")
        await until(lambda: heir.told("speech.discarded"))
        gate.set()
        await until(lambda: not slow.desk.in_use("c1"))
        await slow.quiet()
        assert slow.flags() == []
        heir.clock.now += INTENT_S + 0.2
        await heir.all_settled()
        assert heir.api.verbs() == ["interrupt"]
        assert heir.flags() == []

    async def test_a_worker_that_lost_its_partition_cannot_speak(self, fleet: Fleet) -> None:
        asleep, heir = fleet.join("w1"), fleet.join("w2")
        await one_said(asleep)
        heir.speak("b")
        await heir.all_settled()
        asleep.speak("c")
        await until(lambda: asleep.tenure.refusals)
        await asleep.quiet()
        assert asleep.api.said == ["a"]


class TestCrash:
    async def test_a_bug_after_a_say_repeats_it_after_the_wait_and_flagged(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        flow = fleet.join("w1", QUICK)
        bugs = iter([RuntimeError("a bug")])
        healthy = Lane.done

        def done(lane: Lane, *args: Any, **kwargs: Any) -> tuple[Conclusion, ...]:
            if lane._speech.piece is not None and flow.api.said:
                for bug in bugs:
                    raise bug
            return healthy(lane, *args, **kwargs)

        monkeypatch.setattr(Lane, "done", done)
        flow.speak("a")
        await flow.said("a")
        flow.speak("b", final=True)
        await flow.quiet()
        assert flow.api.said == ["a"]
        flow.clock.now += INTENT_S + 0.2
        await flow.all_settled()
        assert flow.flags() == [("a", True), ("b", None)]

    async def test_what_had_ended_when_it_came_is_not_lost(self, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
        await one_said(flow)
        bugs = iter([RuntimeError("a bug")])
        healthy = Lane._plan_head

        def plan_head(lane: Lane, head: Any, now: float) -> Any:
            if head.message_id == "m-b":
                for bug in bugs:
                    raise bug
            return healthy(lane, head, now)

        monkeypatch.setattr(Lane, "_plan_head", plan_head)
        flow.speak("", turn_id="t2", final=True)
        flow.offer("m-b", turnId="t1", text="b")
        await flow.all_settled()
        assert flow.api.said == ["a", "b"]
        assert flow.outbox.told.count("speech.discarded") == 1

    async def test_a_ledger_out_of_reach_is_waited_for(self, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
        outage = iter([OSError("out of reach")] * 3)
        raise_epoch = flow.ledger.raise_epoch

        async def failing(partition: int) -> int:
            for error in outage:
                raise error
            return await raise_epoch(partition)

        monkeypatch.setattr(flow.ledger, "raise_epoch", failing)
        monkeypatch.setattr("worker.flow.runner.LONGEST_PAUSE_S", 0.01)
        flow.speak("a")
        flow.speak("b", final=True)
        await flow.all_settled()
        assert flow.api.said == ["ab"]


async def test_a_lane_that_begins_waits_for_what_the_one_before_has_to_write(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.flow.runner.LINGER_S", 0)
    first = flow.speak("a")
    await flow.said("a")
    async with busy(flow.database):
        await until(lambda: not flow.lanes.is_served("c1"))
        flow.deliver(replace(first, redelivered=True))
        await until(lambda: flow.lanes.is_served("c1"))
    await flow.all_settled()
    assert flow.api.said == ["a"]


async def test_a_lane_that_stops_while_its_intent_is_written_ends_what_it_began(flow: Flow) -> None:
    await one_said(flow)
    gate = await intending(flow, "b")
    flow.speak("c")
    stopping = asyncio.create_task(flow.lanes.stop())
    await flow.quiet()
    assert not stopping.done()
    gate.set()
    await stopping
    assert flow.api.said == ["a", "b"]
    assert [delivery.settled for delivery in flow.deliveries] == [1, 1, 0]
