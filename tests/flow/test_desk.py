"""The desk: one call at a time per conversation, and what is held is ours."""

import asyncio
import json

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.fakes import idle, until
from worker.core.model import CallKind, CallResult, Session
from worker.core.work import Attach, CallInterrupt, Close, InitClient, Open

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
