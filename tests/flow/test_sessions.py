"""Sessions of a fleet: created once, counted, taken over; and everything a `session.start` may meet."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.conversation import RULES, wire
from tests.support.fakes import until
from worker.core.model import CallKind, CallResult, ReplyTo, Session
from worker.core.work import Close, Open
from worker.ports import Slots

OPEN = Open("ann", "v1", None)
DOWN = CallResult(CallKind.NOT_TAKEN, 503)
GONE = CallResult(CallKind.GONE, 410)
NO_ROOM = CallResult(CallKind.NOT_TAKEN, 429, error="Too many concurrent sessions")
LOST_ANSWER = CallResult(CallKind.UNKNOWN)
REPLY = ReplyTo("answers", "corr", 30_000)


def answers(flow: Flow) -> list[dict[str, object]]:
    return [payload for what, (_, payload) in ((what, it) for what, it in flow.outbox.log if what == "answer")]


def start(flow: Flow, **fields: Any) -> None:
    flow.offer(type="session.start", reply_to=REPLY, **fields)


class TestStart:
    async def test_twice(self, flow: Flow) -> None:
        start(flow)
        start(flow)
        await flow.all_settled()
        assert flow.api.verbs() == ["create"]
        first, second = answers(flow)
        assert first == second == {"sessionId": "s1", "token": "token"}

    @pytest.mark.parametrize("first", ["start", "speak"])
    async def test_racing_with_speech(self, flow: Flow, first: str) -> None:
        if first == "start":
            start(flow)
        flow.speak("Hello.", final=True)
        if first == "speak":
            start(flow)
        await flow.all_settled()
        assert flow.api.verbs() == ["create", "say"]
        assert [answer["sessionId"] for answer in answers(flow)] == ["s1"]

    async def test_with_another_avatar(self, flow: Flow) -> None:
        start(flow)
        start(flow, avatarId="bob")
        await flow.all_settled()
        assert flow.api.verbs() == ["create", "end", "create"]
        assert [answer["sessionId"] for answer in answers(flow)] == ["s1", "s2"]
        assert flow.outbox.told == ["session.ready", "session.ended", "session.ready"]

    async def test_after_a_loss_met_while_a_turn_is_open(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", replace(RULES, shaping="off", auto_final_s=3600))
        flow.speak("Well,")
        await flow.all_settled()
        assert flow.lanes.is_served("c1")
        flow.clock.now += 11
        flow.api.results["keep_alive"] = [GONE]
        await flow.tick()
        start(flow)
        await flow.all_settled()
        assert [wire(event)["sessionId"] for event in flow.told("session.ready")] == ["s1", "s2"]

    async def test_after_a_loss(self, flow: Flow) -> None:
        start(flow, avatarId="bob", voiceId="v2")
        await flow.all_settled()
        flow.api.results["keep_alive"] = [GONE]
        flow.clock.now += 11
        await flow.tick()
        start(flow)
        await flow.all_settled()
        assert [answer["sessionId"] for answer in answers(flow)] == ["s1", "s2"]
        ready = [event.data for event in flow.told("session.ready")]
        assert [getattr(data, "avatar_id", None) for data in ready] == ["bob", "bob"]
        assert not await flow.store.ghosts()

    @pytest.mark.parametrize(
        ("outcome", "error"),
        [
            (CallResult(CallKind.REFUSED, 400, error="no such avatar"), "refused"),
            (CallResult(CallKind.DENIED, 401), "credentials"),
        ],
    )
    async def test_with_an_api_that_refuses(self, flow: Flow, outcome: CallResult, error: str) -> None:
        flow.api.results["create"] = [outcome]
        start(flow)
        await flow.all_settled()
        (answer,) = answers(flow)
        assert str(answer["error"]).startswith(error)
        assert not await flow.store.rows(), "no slot is kept for what was surely not created"

    async def test_without_anybody_listening(self, flow: Flow) -> None:
        flow.offer(type="session.start")
        await flow.all_settled()
        assert answers(flow) == []
        assert flow.outbox.told == ["session.ready"]


class TestCreateOnce:
    async def test_two_workers_create_one(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        gate = flow.api.gates["create"] = asyncio.Event()
        creating = asyncio.create_task(flow.call("c1", OPEN))
        await until(lambda: flow.api.calls)
        result, _ = await other.call("c1", OPEN)
        assert (result.kind, result.local, other.api.calls) == (CallKind.NOT_TAKEN, True, [])
        gate.set()
        _, session = await creating
        assert await other.call("c1", OPEN) == (CallResult(CallKind.OK, local=True), session)
        assert other.api.calls == []
        assert set(other.desk.leases) == {"c1"}

    async def test_a_claim_lasts_as_long_as_its_create(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        gate = flow.api.gates["create"] = asyncio.Event()
        creating = asyncio.create_task(flow.call("c1", OPEN))
        await until(lambda: flow.api.calls)
        for _ in range(19):
            flow.clock.now += 1
            await flow.tick()
            await other.tick()
        assert (await other.call("c1", OPEN))[0].kind is CallKind.NOT_TAKEN
        gate.set()
        assert (await creating)[0].kind is CallKind.OK
        assert await flow.store.ghosts() == 0

    async def test_one_that_is_cut_is_made_again_and_its_ghost_counts(self, fleet: Fleet) -> None:
        dead, other = (fleet.join(name, slots=Slots(2, ghost_s=60.0)) for name in ("dead", "w2"))
        dead.api.gates["create"] = asyncio.Event()
        creating = asyncio.create_task(dead.call("c1", OPEN))
        await until(lambda: dead.api.calls)
        creating.cancel()
        await asyncio.wait([creating])
        assert (await other.call("c1", OPEN))[0].kind is CallKind.NOT_TAKEN, "it may still be under way"
        other.clock.now += 7
        assert (await other.call("c1", OPEN))[0].kind is CallKind.OK
        assert (await other.call("c2", OPEN))[0].kind is CallKind.FULL
        other.clock.now += 54
        assert (await other.call("c2", OPEN))[0].kind is CallKind.OK

    async def test_an_answer_that_was_lost_leaves_a_ghost(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", slots=Slots(1))
        flow.api.results["create"] = [LOST_ANSWER]
        await flow.call("c1", OPEN)
        assert (await flow.call("c2", OPEN))[0].kind is CallKind.FULL
        flow.clock.now += 61
        assert (await flow.call("c2", OPEN))[0].kind is CallKind.OK

    async def test_without_the_store_nothing_is_created(self, flow: Flow) -> None:
        flow.store.way.broken = True
        result, _ = await flow.call("c1", OPEN)
        assert (result.kind, result.local, flow.api.calls) == (CallKind.NOT_TAKEN, True, [])


class TestSlots:
    async def test_never_more_than_there_may_be_and_all_get_one_in_their_turn(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", replace(RULES, session_wait_s=1000), Slots(2))
        talks = [f"c{n}" for n in range(5)]
        for name in talks:
            flow.offer(conversation_id=name, type="session.start")
            flow.offer(conversation_id=name, type="session.end")
        most = 0
        while not all(delivery.settled for delivery in flow.deliveries):
            most = max(most, len([row for row in (await flow.store.rows()).values() if row.state != "waiting"]))
            flow.clock.now += 0.1
            await flow.quiet()
        assert flow.outbox.told.count("session.ready") == 5
        assert flow.api.verbs().count("create") == 5
        assert most <= 2

    async def test_who_waits_too_long_is_told(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", slots=Slots(1))
        await flow.call("taken", OPEN)
        start(flow)
        while not flow.deliveries[0].settled:
            flow.clock.now += 0.5
            await flow.quiet()
        (answer,) = answers(flow)
        assert answer["error"] == "capacity: all 1 sessions are in use (AVATAR_MAX_SESSIONS)"
        assert flow.api.verbs() == ["create"]

    @pytest.mark.parametrize("limit", [0, 1])
    async def test_whoever_the_api_had_no_room_for_keeps_its_place(self, fleet: Fleet, limit: int) -> None:
        """It may have to wait for long before it may ask again."""
        flow, other = (fleet.join(name, slots=Slots(limit)) for name in ("w1", "w2"))
        flow.api.results["create"] = [replace(NO_ROOM, retry_after_s=6)]
        flow.offer(type="session.start")
        await until(lambda: flow.desk.in_line)
        for _ in range(8):
            flow.clock.now += 1
            await flow.tick()
            assert (await other.call("c2", OPEN))[0].kind is CallKind.FULL
        assert other.api.calls == []
        flow.clock.now += 1
        flow.offer(type="session.start")  # it wakes the lane, which sleeps by another clock
        await flow.all_settled()
        assert flow.outbox.told == ["session.ready"] * 2

    async def test_whoever_has_given_up_holds_nobody_up(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", slots=Slots(1))
        flow.api.results["create"] = [CallResult(CallKind.REFUSED, 400)]
        flow.offer(type="session.start")
        await flow.all_settled()
        await until(lambda: not flow.desk.in_line)
        assert (await flow.call("c2", OPEN))[0].kind is CallKind.OK

    async def test_a_lane_that_is_gone_stands_in_no_line(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", slots=Slots(1))
        await flow.call("taken", OPEN)
        await flow.call("c1", OPEN)
        await flow.tick()
        assert not flow.desk.in_line

    async def test_one_that_could_not_be_ended_counts_for_a_while(self, fleet: Fleet) -> None:
        flow = fleet.join("w1", slots=Slots(1))
        await flow.call("c1", OPEN)
        flow.api.results["end"] = [DOWN]
        await flow.call("c1", Close(last_attempt=True))
        assert (await flow.call("c2", OPEN))[0].kind is CallKind.FULL


class TestNoRoomAtTheApi:
    """It answers 429, and we have no limit of our own."""

    def two(self, fleet: Fleet) -> tuple[Flow, Flow]:
        """Workers with a partition each, whose starts wait for long."""
        flow, other = (fleet.join(name, replace(RULES, session_wait_s=1000)) for name in ("w1", "w2"))
        other.tenure.partition = 1
        return flow, other

    async def pass_time(self, seconds: float, *flows: Flow) -> None:
        """For all these workers; what sleeps in them does so by another clock, and is woken."""
        for _ in range(round(seconds / 0.5)):
            flows[0].clock.now += 0.5
            for flow in flows:
                await flow.tick()
                for runner in flow.lanes._runners.values():
                    runner._wake.set()
                await flow.quiet()

    async def start(self, flow: Flow, conversation_id: str) -> None:
        """One that has to wait."""
        flow.offer(conversation_id=conversation_id, type="session.start", reply_to=REPLY)
        await until(lambda: conversation_id in flow.desk.in_line)

    async def refused(self, flow: Flow, conversation_id: str, retry_after_s: float | None = None) -> None:
        """One that the API has no room for, and will have the next time."""
        flow.api.results["create"] = [replace(NO_ROOM, retry_after_s=retry_after_s)]
        await self.start(flow, conversation_id)

    async def test_who_comes_later_goes_later_whichever_worker_serves_it(self, fleet: Fleet) -> None:
        flow, other = self.two(fleet)
        await self.refused(flow, "c1")
        await self.start(other, "c2")
        await self.start(flow, "c3")
        first, second = (one.api.gates.setdefault("create", asyncio.Event()) for one in (flow, other))
        await self.pass_time(8, flow, other)
        assert (len(flow.api.calls), other.api.calls) == (2, []), "the first is trying"
        first.set()
        await self.pass_time(8, flow, other)
        assert len(other.api.calls) == 1, "the second is, and the third beside it"
        second.set()
        await self.pass_time(1, flow, other)
        assert flow.outbox.told == ["session.ready"] * 2
        assert other.outbox.told == ["session.ready"]

    async def test_one_whose_worker_was_killed_holds_nobody_up(self, fleet: Fleet) -> None:
        dead, other = (fleet.join(name) for name in ("dead", "w2"))
        await self.refused(dead, "c1")
        await dead.lanes.abandon()
        await self.start(other, "c2")
        await self.pass_time(1.5, other)
        assert other.api.calls == []
        await self.pass_time(1, other)
        assert other.outbox.told == ["session.ready"]

    async def test_who_is_held_back_by_another_s_pause_has_its_place_too(self, fleet: Fleet) -> None:
        flow, other = self.two(fleet)
        await self.refused(flow, "c1", retry_after_s=6)
        await self.start(flow, "c2")
        await self.start(other, "c3")
        await self.pass_time(5, flow, other)
        assert (len(flow.api.calls), other.api.calls) == (1, []), "the API is left alone"
        gate = flow.api.gates["create"] = asyncio.Event()
        await self.pass_time(5, flow, other)
        assert (len(flow.api.calls), other.api.calls) == (2, [])
        gate.set()
        await self.pass_time(3, flow, other)
        assert flow.outbox.told == ["session.ready"] * 2
        assert other.outbox.told == ["session.ready"]

    async def test_who_is_held_back_until_its_time_is_over_is_told_of_capacity(self, flow: Flow) -> None:
        await self.refused(flow, "c1", retry_after_s=60)
        await self.start(flow, "c2")
        await self.pass_time(10.5, flow)
        assert len(flow.api.calls) == 1
        failed = [wire(event) for event in flow.told("session.failed")]
        assert [(data["reason"], data["status"]) for data in failed] == [("capacity", 429)] * 2
        assert not flow.desk.in_line

    async def test_an_outage_is_not_told_of_as_capacity(self, flow: Flow) -> None:
        flow.api.results["create"] = [DOWN] * 100
        start(flow)
        await self.pass_time(20, flow)
        (answer,) = answers(flow)
        assert str(answer["error"]).startswith("unavailable")
        assert (await flow.call("c2", OPEN))[0].status == 503, "nobody has to wait for it"

    async def test_who_has_given_up_and_waits_for_more_text_holds_nobody_up(self, fleet: Fleet) -> None:
        flow, other = fleet.join("w1", replace(RULES, stall_first_s=1000)), fleet.join("w2")
        await self.refused(flow, "c1", retry_after_s=60)
        flow.speak("not all of it")
        await self.pass_time(10.5, flow)
        assert flow.outbox.told == ["session.failed"]
        assert flow.lanes.is_served("c1")
        assert (await other.call("c2", OPEN))[0].kind is CallKind.OK

    async def test_while_there_is_room_nobody_waits_for_anybody(self, flow: Flow) -> None:
        gate = flow.api.gates["create"] = asyncio.Event()
        for n in range(20):
            flow.offer(conversation_id=f"c{n}", type="session.start")
        await until(lambda: len(flow.api.calls) == 20)
        gate.set()
        await flow.all_settled()


class TestTakingOver:
    async def test_one_that_was_being_ended_is_ended_and_told(self, flow: Flow, fleet: Fleet) -> None:
        dead = fleet.join("dead")
        await dead.call("c1", OPEN)
        dead.clock.now += 301
        dead.api.gates["end"] = asyncio.Event()
        dead.keeper._mind_sessions()
        await until(lambda: "end" in dead.api.verbs())
        for task in dead.keeper._busy.values():
            task.cancel()
        await asyncio.wait(list(dead.keeper._busy.values()))
        dead.desk.leases.clear()
        for _ in range(10):
            flow.clock.now += 1
            await flow.tick()
        assert flow.api.verbs() == ["end"]
        assert flow.outbox.told == ["session.ended"]
        assert not await flow.store.rows()

    async def test_a_conversation_whose_session_is_being_ended_waits_for_that(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        await flow.store.change("c1", state="ending", reason="idle", owner="dead", lease_until=0.0)
        flow.desk.leases.clear()
        flow.speak("Hello.", final=True)
        while not flow.deliveries[0].settled:
            flow.clock.now += 0.5
            await flow.tick()
            await flow.quiet()
        assert flow.api.verbs() == ["create", "end", "create", "say"]

    async def test_an_old_store_is_cleared_of_what_nobody_needs(self, fleet: Fleet) -> None:
        old = fleet.join("old")
        await old.call("c1", OPEN)
        await old.store.release("old")
        old.desk.leases.clear()
        old.clock.now += 86_400
        now = fleet.join("now")
        await now.tick()
        assert now.api.verbs() == ["end"]
        assert not await now.store.rows()

    async def test_an_idle_end_and_a_word_meanwhile_never_meet(self, flow: Flow, fleet: Fleet) -> None:
        """Another worker has used the session since this one looked."""
        flow.speak("Hello.", final=True)
        await flow.all_settled()
        adopter = fleet.join("w2")
        await adopter.desk.recall("c1")
        lease = adopter.desk.leases["c1"]
        flow.clock.now += 299
        flow.speak("Still here.", turn_id="t2", final=True)
        await flow.all_settled()
        flow.clock.now += 2
        await adopter.desk.recall("c1")
        lease = adopter.desk.leases["c1"]
        object.__setattr__(lease.held, "last_used", flow.clock() - 301)
        await adopter.tick()
        assert "end" not in adopter.api.verbs()

    async def test_a_worker_that_stops_may_end_its_sessions(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        await flow.call("c2", OPEN)
        await flow.lanes.stop(flow.keeper.end_all)
        assert flow.api.verbs().count("end") == 2
        assert [getattr(event.data, "reason", None) for event in flow.told("session.ended")] == ["shutdown"] * 2
        assert not await flow.store.rows()


class TestRenewal:
    async def test_the_keeper_wakes_a_lane_for_it(self, flow: Flow) -> None:
        flow.lanes.tenure_of = lambda _: flow.tenure
        flow.speak("Hello.", final=True)
        await flow.all_settled()
        await until(lambda: not flow.lanes.is_served("c1"))
        flow.clock.now += 100
        lease = flow.desk.leases["c1"]
        now = flow.clock()
        await flow.desk.keep("c1", Session("s1", "token", "ann", "v1", renew_at=now, expires_at=now + 60))
        assert flow.desk.leases["c1"] is not lease
        await flow.tick()
        await until(lambda: flow.api.verbs().count("create") == 2)
        await until(lambda: not flow.lanes.is_served("c1"))
        assert flow.outbox.told[-2:] == ["session.ended", "session.ready"]
        assert flow.desk.leases["c1"].held.session.session_id == "s2"

    async def test_where_no_lane_can_be_it_is_ended_in_time(self, flow: Flow) -> None:
        now = flow.clock()
        await flow.desk.keep("c1", Session("s1", "token", "ann", "v1", renew_at=now + 50, expires_at=now + 60))
        for _ in range(60):
            flow.clock.now += 1
            await flow.tick()
        assert flow.api.verbs()[-1] == "end"
        assert flow.clock() > now + 50
        assert flow.outbox.told == ["session.ended"]


async def test_a_lost_session_is_made_good_while_speech_waits(flow: Flow) -> None:
    flow.api.results["say"] = [CallResult(CallKind.OK, 200), GONE]
    for turn, text in (("t1", "One."), ("t2", "Two."), ("t3", "Three.")):
        flow.speak(text, turn_id=turn, final=True)
    await flow.all_settled()
    assert flow.api.said == ["One.", "Two.", "Two.", "Three."]
    assert flow.flags() == [("One.", None), ("Two.", True), ("Three.", None)]
    assert (await flow.store.rows())["c1"].session_id == "s2"
    assert RULES.on_lost == "recreate"
