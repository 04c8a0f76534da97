"""What the design stands on, as the installed broker and libraries have it (DESIGN.md, section 4).

Traps that a room's own tests spring are not repeated here.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import PublishError
from aiormq.exceptions import ChannelLockedResource

from tests.integration.conftest import agreed
from tests.support.alarm import alarm
from tests.support.bus import Bus, connected, properties
from tests.support.owner import QUEUE, Owner, fill
from worker.amqp import topology
from worker.local.broker import OwnedBroker


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        await topology.declare(connection, agreed(1))
        yield connection


async def test_closing_a_channel_returns_what_it_held_to_the_head(bus: Bus, connection: AbstractConnection) -> None:
    bodies = await fill(bus, 10)
    first = await Owner.of(connection, prefetch=4)
    assert await first.holds(4) == bodies[:4]
    await first.channel.close()
    second = await Owner.of(connection, prefetch=20)
    assert await second.holds(10) == bodies


async def test_clean_closes_dead_letter_nothing(bus: Bus, connection: AbstractConnection) -> None:
    """Each close adds a delivery: a small limit would have given up on commands that nobody has tried."""
    bodies = await fill(bus, 5)
    for _ in range(26):
        owner = await Owner.of(connection, prefetch=10)
        assert await owner.holds(5) == bodies
        await owner.channel.close()
    assert await bus.depth("avatar.dead") == 0


async def test_owners_that_die_in_a_row_keep_the_order_with_one_prefetch(
    amqp_url: str, bus: Bus, connection: AbstractConnection
) -> None:
    """With another prefetch for the second, the third gets 3-9 before 0-2."""
    bodies = await fill(bus, 10)
    async with AsyncExitStack() as stack:
        dying = [await stack.enter_async_context(await aio_pika.connect(amqp_url)) for _ in range(2)]
        first, second = [await Owner.of(one, prefetch=10) for one in dying]
        third = await Owner.of(connection, prefetch=10)
        for owner, its_connection in zip((first, second), dying, strict=True):
            assert await owner.holds(10) == bodies
            await its_connection.close()
    assert await third.holds(10) == bodies


async def test_cancelling_lets_the_standby_start_while_work_still_runs(
    bus: Bus, connection: AbstractConnection
) -> None:
    """Why a worker that leaves a partition closes its channel instead."""
    await fill(bus, 10)
    first, second = await Owner.of(connection, prefetch=5), await Owner.of(connection, prefetch=5)
    await first.holds(5)
    queue = await first.channel.get_queue(QUEUE, ensure=False)
    (tag,) = (message.consumer_tag for message in first.held[:1])
    assert tag is not None
    await queue.cancel(tag)
    assert await second.holds(5) == ["5", "6", "7", "8", "9"]


async def test_a_priority_overtakes_from_rabbitmq_4_on(bus: Bus, connection: AbstractConnection) -> None:
    """Why producers set none."""
    bodies = await fill(bus, 5)
    await bus.publish(b"urgent", "c", properties=properties(priority=9))
    held = await (await Owner.of(connection, prefetch=10)).holds(6)
    if topology.moves_partitions(connection):
        assert held.index("urgent") < 5
        held.remove("urgent")
    else:
        assert held.pop() == "urgent"
    assert held == bodies


async def test_what_no_queue_takes_is_confirmed_unless_the_channel_raises(connection: AbstractConnection) -> None:
    message = aio_pika.Message(b"lost")
    async with connection.channel() as channel:
        await channel.default_exchange.publish(message, "no queue of that name", mandatory=True)
    async with connection.channel(on_return_raises=True) as channel:
        with pytest.raises(PublishError):
            await channel.default_exchange.publish(message, "no queue of that name", mandatory=True)


async def test_a_partition_cannot_be_looked_into(bus: Bus, connection: AbstractConnection) -> None:
    """No message is ever fetched from a queue with a single active consumer; whoever probes it consumes."""
    await fill(bus, 1)
    async with connection.channel() as channel:
        queue = await channel.get_queue(QUEUE)
        with pytest.raises(ChannelLockedResource):
            await queue.get(fail=False)


@pytest.mark.timeout(120)
async def test_what_was_published_in_an_alarm_is_in_the_queue_though_nobody_confirmed(
    owned_broker: OwnedBroker,
) -> None:
    async with connected(owned_broker.url) as bus:
        await topology.declare(bus.connection, agreed(1))
        async with alarm(owned_broker), await aio_pika.connect(owned_broker.url) as connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange("avatar.commands", ensure=False)
            with pytest.raises(TimeoutError):
                await exchange.publish(aio_pika.Message(b"unconfirmed"), "c", timeout=1)
        async with asyncio.timeout(20):
            while await bus.depth(QUEUE) < 1:  # noqa: ASYNC110 - the broker has no such event
                await asyncio.sleep(0.05)
        assert await bus.depth(QUEUE) == 1
