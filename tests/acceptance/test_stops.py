"""The worker ends and begins again, politely or not; so does the broker."""

import asyncio
import re
import signal
from itertools import permutations

import pytest

from tests.acceptance.conftest import Simulator, StartWorker
from tests.support.alarm import alarm
from tests.support.bus import Bus, connected
from tests.support.policies import policies
from tests.support.proxy import proxied
from worker.core.ownership import score
from worker.local.broker import OwnedBroker

QUEUE = "avatar.commands.v1.p00"


async def test_sigterm_lets_the_call_end_and_begins_nothing_new(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    worker = await start_worker()
    await simulator.change(latency_ms=0)  # accepted and hanging at once: only what hangs can be released
    await simulator.fault(kind="hang", route="say-text", when="after")
    first = await bus.say("c", "t", "In flight. ", final=False)
    await simulator.wait("say-text")
    second = await bus.say("c", "t", "Not begun.")
    worker.signal(signal.SIGTERM)
    await worker.child.logged("(worker_stopping)")
    assert await worker.status("readyz") == 503
    assert await worker.status("healthz") == 200
    await simulator.release()
    assert await worker.ended() == 0
    assert (await bus.ended(first))["type"] == "avatar.speech.accepted"
    assert await bus.left_in(QUEUE) == 1

    await start_worker()
    await bus.ended(second)
    assert await simulator.spoken() == {"t": "In flight. Not begun."}
    assert len(await simulator.sessions()) == 1


async def test_a_call_that_is_slow_to_end_holds_up_its_own_partition_alone(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    """A rolling restart: the others are spoken for by the next worker, and nothing is said twice."""
    names = [f"w{number}" for number in range(6)]
    first, second = next((a, b) for a, b in permutations(names, 2) if all(score(a, p) > score(b, p) for p in (0, 1)))
    worker = await start_worker(WORKER_NAME=first, PARTITIONS="2")
    await start_worker(WORKER_NAME=second, PARTITIONS="2")
    others = [f"c{number}" for number in range(10)]
    await bus.all_ended([await bus.say(one, one, "Before. ", final=False) for one in ("slow", *others)])
    await simulator.fault(kind="hang", route="say-text", when="after")
    slow = await bus.say("slow", "slow", "In flight.")
    await simulator.wait("say-text", len(others) + 2)
    worker.signal(signal.SIGTERM)
    await worker.child.logged("(worker_stopping)")
    after = {await bus.say(one, one, "After.") for one in others}
    await bus.until(lambda: bool(after & bus.terminal().keys()), within_s=5)
    await worker.child.logged("(partition_handed_over)")
    assert worker.child.process.returncode is None
    await simulator.release()
    assert await worker.ended() == 0
    await bus.all_ended([slow, *after])
    assert not bus.of("speech.accepted", possibleDuplicate=True)
    assert await simulator.spoken() == {"slow": "Before. In flight."} | dict.fromkeys(others, "Before. After.")


async def test_a_second_signal_stops_at_once(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    worker = await start_worker(AVATAR_TIMEOUT_S="60", DRAIN_TIMEOUT_S="60")
    await simulator.fault(kind="hang", route="say-text", when="before")
    await bus.say("c", "t", "Never answered.")
    await simulator.wait("say-text", stage="begun")
    worker.signal(signal.SIGTERM)
    await worker.child.logged("(worker_stopping)")
    worker.signal(signal.SIGTERM)
    assert await worker.ended(within_s=5) == 0
    assert "Traceback" not in worker.log
    assert await bus.left_in(QUEUE) == 1


async def test_draining_has_an_end(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    worker = await start_worker(AVATAR_TIMEOUT_S="60", DRAIN_TIMEOUT_S="1")
    await simulator.fault(kind="hang", route="say-text", when="before")
    await bus.say("c", "t", "Never answered.")
    await simulator.wait("say-text", stage="begun")
    worker.signal(signal.SIGINT)
    assert await worker.ended(within_s=8) == 0
    assert await bus.left_in(QUEUE) == 1


@pytest.mark.timeout(90)
async def test_sessions_outlive_a_worker_that_is_killed(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    first = await start_worker()
    await bus.ended(await bus.say("c", "t1", "Before."))
    await bus.ended(await bus.say("silent", "t3", "Only this."))
    # By the time this one has ended those before it are acknowledged.
    await bus.ended(await bus.send("last", {"type": "session.start"}))
    await first.killed()
    await start_worker()
    await bus.ended(await bus.say("c", "t2", "After."))
    await simulator.wait("keep-alive", 3)
    sessions = await simulator.sessions()
    assert [session["spoken"] for session in sessions] == [["Before.", "After."], ["Only this."], []]
    assert max(session["max_gap_s"] for session in sessions) < 20


@pytest.mark.timeout(120)
async def test_the_broker_is_away_for_20_s(
    start_worker: StartWorker, simulator: Simulator, owned_broker: OwnedBroker
) -> None:
    worker = await start_worker(AMQP_URL=owned_broker.url)
    async with connected(owned_broker.url) as bus:
        await bus.listen()
        await bus.ended(await bus.say("c", "t1", "Before."))
        await simulator.fault(kind="hang", route="say-text", when="after")
        await bus.say("c", "t2", "Said while it was away.")
        await simulator.wait("say-text", 2)
        waiting = await bus.say("c", "t2", "Said afterwards.")
    await asyncio.to_thread(owned_broker.stop)
    until = asyncio.get_running_loop().time() + 20
    await simulator.release()
    newcomer = await start_worker(AMQP_URL=owned_broker.url.replace("guest:guest", "guest:s3cret"), ready=False)
    lost = await newcomer.child.logged(r"(.*broker_lost.*)")
    assert re.search(r"127\.0\.0\.1:\d+", lost)
    assert "s3cret" not in newcomer.log
    assert [await newcomer.status("healthz"), await newcomer.status("readyz")] == [200, 503]
    assert [await worker.status("healthz"), await worker.status("readyz")] == [200, 503]
    await asyncio.sleep(until - asyncio.get_running_loop().time())
    await asyncio.to_thread(owned_broker.start)
    await worker.ready()
    async with connected(owned_broker.url) as bus:
        await bus.listen()
        await bus.ended(await bus.say("c", "t3", "After."))
        await bus.drained(QUEUE)
    spoken = await simulator.spoken()
    assert spoken == {"t1": "Before.", "t2": "Said while it was away.Said afterwards.", "t3": "After."}
    assert waiting
    (session,) = await simulator.sessions()
    assert session["duplicates"] == []
    assert session["max_gap_s"] < 20
    # The wrong password is told as such, and does not end the worker either: it may be mended on the broker.
    await newcomer.child.logged(r"(ACCESS_REFUSED)")
    assert newcomer.child.process.returncode is None


async def test_a_worker_that_does_not_fit_the_broker_exits_2(start_worker: StartWorker, bus: Bus) -> None:
    await start_worker()
    for settings, names in (
        ({"PARTITIONS": "2"}, ("PARTITIONS", "topology repartition 2")),
        ({"STORE_URL": "sqlite:///another.db"}, ("STORE_URL",)),
    ):
        refused = await start_worker(ready=False, **settings)
        assert await refused.ended() == 2
        assert all(name in refused.log.splitlines()[-1] for name in names)
        assert "Traceback" not in refused.log
    await bus.ended(await bus.say("c", "t", "Still served."))


async def test_a_worker_refuses_a_policy_that_could_lose_commands(
    start_worker: StartWorker, owned_broker: OwnedBroker
) -> None:
    """At its start, and when it connects again."""
    async with policies(owned_broker) as operator, proxied(owned_broker.url) as proxy:
        await operator.put("limit", {"delivery-limit": 3}, operator=True, to="queues")
        settings = {"AMQP_URL": proxy.url, "MANAGEMENT_URL": operator.api}
        refused = await start_worker(ready=False, **settings)
        assert await refused.ended() == 2
        assert f"rabbitmqctl clear_operator_policy -p {operator.vhost} limit" in refused.log.splitlines()[-1]
        assert "Traceback" not in refused.log
        await operator.clear("limit", operator=True)
        worker = await start_worker(**settings)
        assert "policies_unchecked" not in worker.log
        await operator.put("limit", {"delivery-limit": 3})
        proxy.cut()
        assert await worker.ended() == 2
        assert "clear_policy" in worker.log.splitlines()[-1]


async def test_a_worker_refuses_a_limit_of_deliveries_that_it_has_tried_out(
    start_worker: StartWorker, owned_broker: OwnedBroker
) -> None:
    async with policies(owned_broker) as operator:
        await operator.put("limit", {"delivery-limit": 3}, operator=True, to="queues")
        refused = await start_worker(ready=False, AMQP_URL=owned_broker.url)
        assert await refused.ended() == 2
        assert "rabbitmqctl list_operator_policies" in refused.log.splitlines()[-1]
        assert "Traceback" not in refused.log
        await operator.clear("limit", operator=True)
        assert "policies_unchecked" not in (await start_worker(AMQP_URL=owned_broker.url)).log


async def test_a_worker_starts_although_the_management_api_is_away(start_worker: StartWorker, bus: Bus) -> None:
    worker = await start_worker(MANAGEMENT_URL="http://u:s3cret@127.0.0.1:1/")
    await worker.child.logged(r"(MANAGEMENT_URL: no answer from http://127.0.0.1:1: .*policies_unchecked)")
    await bus.ended(await bus.say("c", "t", "Spoken all the same."))
    assert "s3cret" not in worker.log


@pytest.mark.timeout(120)
async def test_a_worker_begun_while_the_broker_is_short_of_memory_says_what_waits(
    start_worker: StartWorker, simulator: Simulator, owned_broker: OwnedBroker
) -> None:
    """On the connection that it consumes over it publishes nothing: the broker would stop to read from that."""
    async with connected(owned_broker.url) as bus:
        first = await start_worker(AMQP_URL=owned_broker.url)
        await bus.listen()
        await bus.ended(await bus.say("c", "t1", "Before."))
        await first.killed()
        waiting = await bus.say("c", "t2", "Waiting.")
        async with alarm(owned_broker):
            await start_worker(AMQP_URL=owned_broker.url, ready=False)
            await simulator.wait("say-text", 2)
        await bus.ended(waiting)
