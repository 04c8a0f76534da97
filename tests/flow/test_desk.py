"""The desk: one call at a time per conversation, and what is held is ours."""

import asyncio
import json

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.fakes import idle, until
from worker.core.model import CallKind, CallResult, Session
from worker.core.work import Attach, CallInterrupt, Close, InitClient, Open
from worker.ports import Slots

GONE = CallResult(CallKind.GONE, 410)
DOWN = CallResult(CallKind.NOT_TAKEN, 503)
OPEN = Open("ann", "v1", None)
STALE = CallResult(CallKind.STALE)


async def test_one_call_at_a_time_per_conversation(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    await flow.call("c2", OPEN)
    gate = flow.api.gates["interrupt"] = asyncio.Event()
    calls = [asyncio.create_task(flow.call(name, CallInterrupt())) for name in ("c1", "c1", "c2")]
    await idle()
    assert flow.api.verbs().count("interrupt") == 2, "one for each conversation"
    assert flow.desk.in_use("c1")
    gate.set()
    await asyncio.gather(*calls)
    assert flow.api.verbs().count("interrupt") == 3
    assert flow.api.overlaps == 0
    assert not flow.desk.in_use("c1")


async def test_a_caller_that_is_cancelled_frees_the_line(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    gate = flow.api.gates["interrupt"] = asyncio.Event()
    calls = [asyncio.create_task(flow.call("c1", CallInterrupt())) for _ in range(3)]
    await idle()
    calls[0].cancel()
    calls[1].cancel()
    gate.set()
    await asyncio.wait(calls)
    assert not calls[2].cancelled()
    assert not flow.desk.in_use("c1")


async def test_what_is_not_wanted_any_more_when_the_line_is_free_is_not_called(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    gate = flow.api.gates["interrupt"] = asyncio.Event()
    wanted = True
    first = asyncio.create_task(flow.call("c1", CallInterrupt()))
    second = asyncio.create_task(flow.desk.carry_out("c1", CallInterrupt(), lambda: wanted))
    await idle()
    wanted = False
    gate.set()
    await first
    result, got = await second
    assert (result.kind, result.local, got) == (CallKind.NOT_TAKEN, True, None)
    assert flow.api.verbs().count("interrupt") == 1


async def test_a_session_that_was_created_is_stored(flow: Flow) -> None:
    result, session = await flow.call("c1", OPEN)
    assert result.kind is CallKind.OK
    assert isinstance(session, Session)
    row = (await flow.store.rows())["c1"]
    assert (row.session_id, row.token, row.owner) == (session.session_id, session.token, "w1")
    assert (row.state, row.last_used) == ("ready", flow.clock())


async def test_a_viewer_that_was_fetched_is_stored(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    await flow.call("c1", InitClient())
    assert json.loads((await flow.store.rows())["c1"].viewer) == {"whepUrl": "https://whep", "turn": {}}


async def test_attaching_calls_nobody_and_is_stored(flow: Flow) -> None:
    theirs = Session("theirs", "t", attached=True)
    result, got = await flow.call("c1", Attach(theirs))
    assert (result.kind, got, flow.api.calls) == (CallKind.OK, theirs, [])
    assert result.local, "it says nothing about the API"
    assert (await flow.store.rows())["c1"].session_id == "theirs"


@pytest.mark.parametrize(
    ("outcome", "last", "held"),
    [
        (CallResult(CallKind.OK, 200), False, False),
        (GONE, False, False),
        (CallResult(CallKind.REFUSED, 400), False, False),
        (DOWN, False, True),
        (DOWN, True, False),
        (CallResult(CallKind.UNKNOWN), False, True),
    ],
)
async def test_a_session_that_is_closed_is_let_go(flow: Flow, outcome: CallResult, last: bool, held: bool) -> None:
    await flow.call("c1", OPEN)
    flow.api.results["end"] = [outcome]
    assert (await flow.call("c1", Close(last)))[0] is outcome
    assert ("c1" in flow.desk.leases, "c1" in await flow.store.rows()) == (held, held)


async def test_a_session_that_is_gone_is_let_go(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    flow.api.results["interrupt"] = [GONE]
    await flow.call("c1", CallInterrupt())
    assert not flow.desk.leases
    assert not await flow.store.rows()
    assert (await flow.call("c1", CallInterrupt()))[0] == STALE
    assert flow.api.verbs().count("interrupt") == 1


async def test_a_restarted_worker_goes_on_with_the_same_session(fleet: Fleet) -> None:
    _, session = await fleet.join("w1").call("c1", OPEN)
    after = fleet.join("w2")
    assert await after.desk.recall("c1") == (session, None)
    assert (await after.store.rows())["c1"].owner == "w2"
    await after.call("c1", CallInterrupt())
    assert after.api.calls == [("interrupt", "s1", "")]


async def test_recalling_is_no_success_of_a_call(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    flow.desk.leases.clear()
    flow.clock.now += 9
    await flow.desk.recall("c1")
    lease = flow.desk.leases["c1"]
    assert flow.clock() - lease.last_success >= 9, "a keep-alive is due"
    assert lease.held.last_used == flow.clock(), "but it is not idle"


async def test_nothing_to_recall(flow: Flow) -> None:
    assert await flow.desk.recall("c1") == (None, None)


async def test_a_session_the_store_could_not_note_is_not_lost(flow: Flow) -> None:
    gate = flow.api.gates["create"] = asyncio.Event()
    opening = asyncio.create_task(flow.call("c1", OPEN))
    await until(lambda: flow.api.calls)
    flow.store.way.broken = True
    gate.set()
    _, session = await opening
    assert isinstance(session, Session)
    flow.store.way.broken = False
    assert await flow.desk.recall("c1") == (session, None)
    assert (await flow.store.rows())["c1"].session_id == session.session_id


async def test_a_session_another_worker_adopted_meanwhile_is_taken_back(flow: Flow) -> None:
    gate = flow.api.gates["say a"] = asyncio.Event()
    flow.speak("a")
    await until(lambda: flow.api.said == ["a"])
    flow.clock.now += 60
    await flow.store.change("c1", owner="w2", lease_until=flow.clock() + 60)
    await flow.keeper._mind_leases()
    assert not flow.desk.leases
    flow.speak("b", final=True)
    gate.set()
    await flow.all_settled()
    assert flow.api.verbs() == ["create", "say", "say"]
    assert (await flow.store.rows())["c1"].owner == "w1"


@pytest.mark.parametrize("attached", [False, True])
async def test_a_session_whose_token_ran_out_keeps_its_slot_for_a_while(fleet: Fleet, attached: bool) -> None:
    """Nobody can end it any more, and the API keeps it until its own time-out."""
    flow = fleet.join("w1", slots=Slots(1))
    now = flow.clock()
    await flow.desk.keep("c1", Session("s1", "token", "ann", attached=attached, expires_at=now + 50))
    flow.clock.now += 50
    flow.api.results["interrupt"] = [CallResult(CallKind.GONE, 401)]
    await flow.desk.interrupt("c1")
    assert (await flow.call("c2", OPEN))[0].kind is CallKind.FULL
    flow.clock.now += 61
    assert (await flow.call("c2", OPEN))[0].kind is CallKind.OK


class TestAdoptedUnnoticed:
    """Another worker has adopted the session, and this one goes on as if it held it."""

    @pytest.fixture
    async def other(self, flow: Flow, fleet: Fleet) -> Flow:
        await flow.call("c1", OPEN)
        other = fleet.join("w2")
        await other.desk.recall("c1")
        return other

    @pytest.mark.usefixtures("other")
    async def test_it_is_ended_all_the_same(self, flow: Flow) -> None:
        assert (await flow.call("c1", Close(last_attempt=False)))[0].kind is CallKind.OK
        assert flow.api.verbs() == ["create", "end"]
        assert not await flow.store.rows()

    @pytest.mark.usefixtures("other")
    async def test_an_interrupt_is_told_to_the_api(self, flow: Flow) -> None:
        flow.desk.leases.clear()
        assert (await flow.desk.interrupt("c1")).kind is CallKind.OK
        assert flow.api.verbs() == ["create", "interrupt"]

    @pytest.mark.usefixtures("other")
    async def test_an_interrupt_while_the_store_is_out_of_reach_is_not(self, flow: Flow) -> None:
        flow.desk.leases.clear()
        flow.store.way.broken = True
        assert await flow.desk.interrupt("c1") == STALE

    async def test_one_that_ends_is_not_ended_again(self, flow: Flow, other: Flow) -> None:
        await other.call("c1", Close(last_attempt=False))
        assert (await flow.call("c1", Close(last_attempt=False)))[0] == STALE
        assert "end" not in flow.api.verbs()


class TestTooLate:
    """A worker was out of touch for so long that the conversation has another session by now."""

    async def test_a_session_that_comes_then_is_ended_and_replaces_none(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        next(other.api._sessions)
        gate = flow.api.gates["create"] = asyncio.Event()
        creating = asyncio.create_task(flow.call("c1", OPEN))
        await until(lambda: flow.api.calls)
        flow.clock.now += 7
        _, theirs = await other.call("c1", OPEN)
        gate.set()
        result, session = await creating
        assert (result.kind, result.local, session) == (CallKind.NOT_TAKEN, True, None)
        assert flow.api.verbs() == ["create", "end"]
        assert not flow.desk.leases
        assert await other.desk.recall("c1") == (theirs, None)

    @pytest.mark.parametrize("by", ["keeper", "lane"])
    async def test_one_that_could_not_be_noted_then_is_ended(self, flow: Flow, fleet: Fleet, by: str) -> None:
        other = fleet.join("w2")
        next(other.api._sessions)
        gate = flow.api.gates["create"] = asyncio.Event()
        opening = asyncio.create_task(flow.call("c1", OPEN))
        await until(lambda: flow.api.calls)
        flow.store.way.broken = True
        gate.set()
        await opening
        flow.clock.now += 7
        _, theirs = await other.call("c1", OPEN)
        flow.store.way.broken = False
        if by == "keeper":
            await flow.tick()
            assert not flow.desk.leases
        assert await flow.desk.recall("c1") == (theirs, None)
        assert flow.api.verbs() == ["create", "end"]
