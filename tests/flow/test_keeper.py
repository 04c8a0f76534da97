"""The keeper: sessions stay alive, idle ones end, those of dead workers are adopted; on a clock the test puts on."""

import asyncio

import pytest
from structlog.testing import capture_logs

from tests.flow.conftest import Fleet, Flow
from tests.support.fakes import idle, until
from worker.core.model import CallKind, CallResult
from worker.core.work import CallInterrupt, Open

OPEN = Open("ann", "v1", None)
DOWN = CallResult(CallKind.NOT_TAKEN, 503)
GONE = CallResult(CallKind.GONE, 410)


def keep_alives(flow: Flow) -> int:
    return flow.api.verbs().count("keep_alive")


async def passing(flow: Flow, seconds: int) -> None:
    """Second after second goes by."""
    for _ in range(seconds):
        flow.clock.now += 1
        await flow.tick()


async def test_every_ten_seconds(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    await passing(flow, 8)
    assert keep_alives(flow) == 0
    await passing(flow, 2)
    assert keep_alives(flow) == 1
    await passing(flow, 50)
    assert keep_alives(flow) in (5, 6, 7)


async def test_put_off_by_any_success(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    for _ in range(10):
        await passing(flow, 8)
        await flow.call("c1", CallInterrupt())
    assert keep_alives(flow) == 0


async def test_not_put_off_by_a_failure(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    await passing(flow, 8)
    flow.api.results["interrupt"] = [DOWN]
    await flow.call("c1", CallInterrupt())
    await passing(flow, 2)
    assert keep_alives(flow) == 1


async def test_not_while_a_lane_is_calling(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    gate = flow.api.gates["interrupt"] = asyncio.Event()
    call = asyncio.create_task(flow.call("c1", CallInterrupt()))
    await until(lambda: "interrupt" in flow.api.verbs())
    await passing(flow, 15)
    assert keep_alives(flow) == 0
    gate.set()
    await call


async def test_a_call_waits_for_the_keep_alive_under_way(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    gate = flow.api.gates["keep_alive"] = asyncio.Event()
    flow.clock.now += 10
    ticking = asyncio.create_task(flow.tick())
    await until(lambda: keep_alives(flow) == 1)
    call = asyncio.create_task(flow.call("c1", CallInterrupt()))
    await idle()
    assert "interrupt" not in flow.api.verbs()
    gate.set()
    await asyncio.gather(ticking, call)
    assert flow.api.verbs() == ["create", "keep_alive", "interrupt"]


async def test_a_failed_one_is_tried_again_soon_or_when_the_api_says(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    flow.api.results["keep_alive"] = [DOWN, CallResult(CallKind.NOT_TAKEN, 429, retry_after_s=5)]
    await passing(flow, 11)
    assert keep_alives(flow) == 2
    await passing(flow, 4)
    assert keep_alives(flow) == 2
    await passing(flow, 1)
    assert keep_alives(flow) == 3
    assert flow.outbox.told == []


async def test_a_session_found_gone_is_told_as_lost_once(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    flow.api.results["keep_alive"] = [GONE]
    await passing(flow, 30)
    assert keep_alives(flow) == 1
    assert not await flow.store.rows()
    ((_, event),) = flow.outbox.log
    assert (event.type, event.data.reason, event.data.command_ids) == ("avatar.session.ended", "lost", ())


async def test_after_a_loss_a_lane_that_lingers_hands_over_no_dead_session(
    flow: Flow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.flow.runner.LINGER_S", 3600)
    flow.offer(type="session.start")
    await flow.all_settled()
    flow.api.results["keep_alive"] = [GONE]
    await passing(flow, 11)
    assert not flow.desk.leases
    assert flow.lanes.is_served("c1")
    flow.offer(type="session.start")
    await flow.all_settled()
    ready = [event.data for what, event in flow.outbox.log if what == "tell" and event.type.endswith("ready")]
    assert [data.session_id for data in ready] == ["s1", "s2"]


class TestIdle:
    async def test_a_session_nobody_uses_ends(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        await passing(flow, 299)
        assert "end" not in flow.api.verbs()
        await passing(flow, 1)
        assert flow.api.verbs()[-1] == "end"
        assert not await flow.store.rows()
        ((_, event),) = flow.outbox.log
        assert (event.data.reason, event.data.session_id) == ("idle", "s1")

    async def test_a_use_counts_a_keep_alive_does_not(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        await passing(flow, 200)
        await flow.call("c1", CallInterrupt())
        await passing(flow, 299)
        assert "end" not in flow.api.verbs()
        await passing(flow, 1)
        assert "end" in flow.api.verbs()

    async def test_not_while_the_conversation_is_served(self, flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.flow.runner.LINGER_S", 3600)
        flow.speak("a")
        await flow.all_settled()
        assert flow.lanes.is_served("c1")
        await passing(flow, 320)
        assert "end" not in flow.api.verbs()
        assert keep_alives(flow) > 25

    async def test_one_that_cannot_be_ended_is_given_up(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        flow.api.results["end"] = [DOWN] * 9
        await passing(flow, 310)
        assert flow.api.verbs().count("end") == 3
        assert flow.outbox.told == ["session.ended"]

    async def test_one_that_another_worker_took_is_not_ours_to_end(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        flow.clock.now += 400
        await flow.store.change("c1", owner="w2", lease_until=flow.clock() + 60)
        flow.keeper._mind_sessions()
        await asyncio.wait(list(flow.keeper._busy.values()))
        assert "end" not in flow.api.verbs()
        assert "c1" in await flow.store.rows()
        assert flow.outbox.told == []


class TestLeases:
    async def test_a_worker_that_lives_keeps_its_sessions(self, flow: Flow, fleet: Fleet) -> None:
        await flow.call("c1", OPEN)
        other = fleet.join("w2")
        for _ in range(60):
            flow.clock.now += 1
            await flow.tick()
            await other.tick()
        assert not other.desk.leases
        assert (await flow.store.rows())["c1"].owner == "w1"

    async def test_the_sessions_of_a_dead_worker_are_adopted_before_the_api_misses_it(
        self, flow: Flow, fleet: Fleet
    ) -> None:
        dead = fleet.join("dead")
        await dead.call("c1", OPEN)
        dead.api.calls.clear()
        last_success = flow.clock()
        while not dead.api.calls:  # it dies with a keep-alive just due
            await dead.keeper._mind_leases()
            flow.clock.now += 0.5
            dead.keeper._mind_sessions()
            await asyncio.sleep(0)
        while not keep_alives(flow):
            await flow.tick()
            flow.clock.now += 1
        assert flow.clock() - last_success < 20
        assert (await flow.store.rows())["c1"].owner == "w1"
        assert set(flow.desk.leases) == {"c1"}

    async def test_released_sessions_are_adopted_at_once(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        await other.call("c1", OPEN)
        await flow.store.release("w2")
        await flow.tick()
        assert keep_alives(flow) == 1

    async def test_an_adopted_session_keeps_its_idle_time(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        await other.call("c1", OPEN)
        flow.clock.now += 299
        await flow.tick()
        assert "end" not in flow.api.verbs()
        await passing(flow, 1)
        assert flow.api.verbs()[-1] == "end"

    async def test_what_another_took_over_is_let_go(self, flow: Flow, fleet: Fleet) -> None:
        await flow.call("c1", OPEN)
        other = fleet.join("w2")
        await other.desk.recall("c1")
        for _ in range(30):
            flow.clock.now += 1
            await flow.tick()
            await other.tick()
        assert (set(flow.desk.leases), set(other.desk.leases)) == (set(), {"c1"})
        assert keep_alives(flow) == 0

    async def test_after_an_outage_of_the_store_the_living_keep_what_they_have(self, flow: Flow, fleet: Fleet) -> None:
        other = fleet.join("w2")
        await flow.call("c1", OPEN)
        for one in (flow, other):
            one.store.way.broken = True
        for _ in range(20):
            await passing(flow, 1)
            await other.tick()
        other.store.way.broken = False
        for _ in range(6):  # this one has not noticed yet that it is back
            await passing(flow, 1)
            await other.tick()
        flow.store.way.broken = False
        await passing(flow, 1)
        for _ in range(20):
            await passing(flow, 1)
            await other.tick()
        assert (set(flow.desk.leases), set(other.desk.leases)) == ({"c1"}, set())
        assert not other.api.calls

    async def test_after_an_outage_of_the_store_the_sessions_of_the_dead_are_adopted(
        self, flow: Flow, fleet: Fleet
    ) -> None:
        dead = fleet.join("dead")
        await dead.call("c1", OPEN)
        flow.store.way.broken = True
        await passing(flow, 10)
        flow.store.way.broken = False
        await passing(flow, 13)
        assert set(flow.desk.leases) == {"c1"}

    async def test_sessions_are_kept_alive_while_the_store_is_out_of_reach(self, flow: Flow) -> None:
        await flow.call("c1", OPEN)
        flow.store.way.broken = True
        await passing(flow, 30)
        assert keep_alives(flow) >= 2
        flow.store.way.broken = False
        await passing(flow, 1)
        assert set(flow.desk.leases) == {"c1"}
        assert (await flow.store.rows())["c1"].lease_until > flow.clock()


async def test_an_end_that_the_store_cannot_note_is_told_and_tried_again(flow: Flow) -> None:
    await flow.call("c1", OPEN)
    flow.clock.now += 300
    flow.store.way.broken = True
    with capture_logs() as logged:
        await flow.tick()
    assert [one["event"] for one in logged] == ["store_failed"] * 2
    flow.store.way.broken = False
    await passing(flow, 1)
    assert flow.api.verbs() == ["create", "end"]


async def test_it_runs_until_cancelled_and_leaves_nothing_behind(flow: Flow, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flow.keeper.TICK_S", 0.001)
    await flow.call("c1", OPEN)
    flow.api.gates["keep_alive"] = asyncio.Event()
    running = asyncio.create_task(flow.keeper.run())
    flow.clock.now += 20
    await until(lambda: keep_alives(flow) == 1)
    running.cancel()
    await asyncio.wait([running])
    assert running.cancelled()
    assert not flow.desk.in_use("c1")
