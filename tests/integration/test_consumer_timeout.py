"""RabbitMQ loses patience with a consumer that holds a delivery for long: half an hour, unless it is told otherwise."""

import asyncio

import pytest

from schemas.routes import partition_queue
from tests.integration.conftest import Start, agreed
from tests.support.alarm import patience
from tests.support.bus import PATIENCE_S, connected
from tests.support.owner import QUEUE, Owner, fill
from worker.amqp import topology
from worker.flow.backlog import HOLD_S
from worker.local.broker import OwnedBroker

pytestmark = pytest.mark.timeout(120)


async def test_a_consumer_that_holds_a_delivery_for_too_long_is_cut_off(owned_broker: OwnedBroker) -> None:
    async with patience(owned_broker, 0.5), connected(owned_broker.url) as bus:
        await topology.declare(bus.connection, agreed(1))
        await fill(bus, 2)
        owner, standby = [await Owner.of(bus.connection, prefetch=5) for _ in range(2)]
        await owner.holds(2)
        await asyncio.wait_for(owner.lost.wait(), PATIENCE_S)
        assert await standby.holds(2) == ["0", "1"]


async def test_a_worker_that_is_cut_off_comes_back_and_says_nothing_twice(
    start: Start, owned_broker: OwnedBroker
) -> None:
    async with patience(owned_broker, 0.5), start(url=owned_broker.url) as station, connected(owned_broker.url) as bus:
        await bus.listen()
        station.avatar.gate.clear()
        first = await bus.say("c", "t", "one ", final=False)
        await station.said("one ")
        second = await bus.say("c", "t", "two")
        await station.reconnected()
        station.avatar.gate.set()
        await bus.all_ended([first, second])
        await station.said("one ", "two")
        assert station.publishing.count == 1
        await station.settled()
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


async def test_a_worker_holds_nothing_for_so_long(start: Start, owned_broker: OwnedBroker) -> None:
    """What waits is kept in the store. Another consumer shows when the broker loses its patience."""
    async with (
        patience(owned_broker, 2 * HOLD_S),
        start(url=owned_broker.url, partitions=2) as station,
        connected(owned_broker.url) as bus,
    ):
        await bus.listen()
        station.avatar.gate.clear()
        ids = [await bus.say("c", "t", "one ", final=False)]
        await station.said("one ")
        ids.append(await bus.say("c", "t", "two"))
        queue = await bus.channel.declare_queue(exclusive=True)
        await fill(bus, 1, queue.name)
        other = await Owner.of(bus.connection, prefetch=1, queue=queue.name)
        await other.holds(1)
        await asyncio.wait_for(other.lost.wait(), PATIENCE_S)
        station.avatar.gate.set()
        await bus.all_ended(ids)
        assert station.lives() == (1, 1)
        await station.said("one ", "two")
        await station.settled()
        await station.gone()
        assert [await bus.left_in(partition_queue(number)) for number in (0, 1)] == [0, 0]
