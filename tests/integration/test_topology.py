"""What stands on the broker, and what a worker does where something else stands there."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from pamqp.common import FieldTable

from schemas.routes import partition_queue
from tests.integration.conftest import Start, agreed
from tests.support.bus import Bus, connected
from worker.amqp import topology
from worker.amqp.topology import IN_MEMORY, Record
from worker.errors import TopologyError
from worker.local.broker import OwnedBroker, own_broker

QUORUM: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
PARTITION: FieldTable = {
    **QUORUM,
    "x-single-active-consumer": True,
    "x-dead-letter-exchange": "avatar.dead",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        yield connection


async def depths(bus: Bus, partitions: int) -> list[int]:
    return [await bus.depth(partition_queue(number)) for number in range(partitions)]


async def refusal(url: str, wanted: Record) -> str:
    async with await aio_pika.connect(url) as connection:
        with pytest.raises(TopologyError) as refused:
            await topology.declare(connection, wanted)
        return str(refused.value)


@pytest.mark.parametrize("partitions", [1, 4])
async def test_it_is_what_the_contract_says(bus: Bus, connection: AbstractConnection, partitions: int) -> None:
    """The broker refuses to declare anything again that differs."""
    await topology.declare(connection, agreed(partitions))
    alternate: FieldTable = {"alternate-exchange": "avatar.dead"}
    async with connection.channel() as channel:
        await channel.declare_exchange("avatar.commands", "topic", durable=True, arguments=alternate)
        await channel.declare_exchange("avatar.interrupts", "fanout", durable=True)
        await channel.declare_exchange("avatar.events", "topic", durable=True)
        for number in range(partitions):
            await channel.declare_queue(f"avatar.commands.v1.p0{number}", durable=True, arguments=PARTITION)
        await channel.declare_queue("avatar.parked", durable=True, arguments=QUORUM)
        await channel.declare_queue("avatar.dead", durable=True, arguments=QUORUM)
    assert await topology._count_partitions(connection) == partitions


async def test_nothing_of_it_is_for_one_connection_only(amqp_url: str, bus: Bus) -> None:
    """Nor for many: each look at the record is a delivery, of which a policy may allow but few."""
    deliveries = []
    for _ in range(13):
        async with await aio_pika.connect(amqp_url) as connection:
            await topology.declare(connection, agreed(2))
        async with bus.connection.channel() as channel:
            (record,) = await topology.records(channel, patient=True)
            deliveries.append(int(str(record.headers.get("x-delivery-count", 0))))
            assert topology.read(record, agreed(1)) == agreed(2)
    assert max(deliveries) < 13, deliveries
    assert deliveries[-1] < max(deliveries), deliveries


async def test_every_command_lands_once_and_every_conversation_in_one_partition(
    bus: Bus, connection: AbstractConnection
) -> None:
    await topology.declare(connection, agreed(4))
    for number in range(100):
        await bus.say(f"conversation-{number}", "t", "x")
    first = await depths(bus, 4)
    assert sum(first) == 100
    assert all(first), "a partition is never used"
    for number in range(100):
        await bus.say(f"conversation-{number}", "t", "x")
    assert await depths(bus, 4) == [2 * depth for depth in first]


async def test_an_interrupt_lands_once_behind_the_speech_it_follows(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(4))
    express = await bus.channel.declare_queue(exclusive=True)
    await express.bind("avatar.interrupts")
    await bus.say("c", "t", "x")
    await bus.interrupt("c")
    assert sorted(await depths(bus, 4)) == [0, 0, 0, 2]
    assert await express.get(fail=False) is not None
    assert await express.get(fail=False) is None


@pytest.mark.parametrize("exchange", ["avatar.commands", "avatar.interrupts"])
async def test_what_cannot_be_routed_is_kept(bus: Bus, connection: AbstractConnection, exchange: str) -> None:
    await topology.declare(connection, agreed(1))
    queue = await bus.channel.get_queue("avatar.commands.v1.p00")
    await queue.unbind("avatar.commands", "#")
    await bus.send("c", {"type": "interrupt"}, exchange=exchange)
    assert await bus.depth("avatar.dead") == 1


async def test_workers_that_declare_at_once_agree(amqp_url: str, bus: Bus) -> None:
    async with AsyncExitStack() as stack:
        connections = [await stack.enter_async_context(await aio_pika.connect(amqp_url)) for _ in range(8)]
        await asyncio.gather(*(topology.declare(connection, agreed(8)) for connection in connections))
    assert await bus.depth("avatar.topology") == 1
    for number in range(50):
        await bus.say(f"conversation-{number}", "t", "x")
    assert sum(await depths(bus, 8)) == 50


async def test_of_workers_that_disagree_one_is_right(amqp_url: str, bus: Bus) -> None:
    async def declare(partitions: int) -> int | None:
        async with await aio_pika.connect(amqp_url) as connection:
            try:
                await topology.declare(connection, agreed(partitions))
            except TopologyError:
                return None
        return partitions

    right = {number for number in await asyncio.gather(*map(declare, range(1, 7))) if number}
    assert len(right) == 1
    async with await aio_pika.connect(amqp_url) as connection:
        assert await topology._count_partitions(connection) in right


async def test_another_number_of_partitions_is_refused_with_the_remedy(
    amqp_url: str, connection: AbstractConnection
) -> None:
    await topology.declare(connection, agreed(2))
    text = await refusal(amqp_url, agreed(3))
    assert "PARTITIONS=2" in text
    assert "topology repartition 3" in text
    await topology.declare(connection, agreed(2))


async def test_another_store_is_refused(amqp_url: str, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1))
    assert "STORE_URL" in await refusal(amqp_url, agreed(1, "another store"))
    assert "STORE_URL" in await refusal(amqp_url, agreed(1, IN_MEMORY))
    await topology.declare(connection, agreed(1))


async def test_a_store_in_memory_may_be_followed_by_any(amqp_url: str, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1, IN_MEMORY))
    await topology.declare(connection, agreed(1, IN_MEMORY))
    await topology.declare(connection, agreed(1))
    assert "STORE_URL" in await refusal(amqp_url, agreed(1, "another store"))


async def test_something_else_under_our_name_is_refused(amqp_url: str, bus: Bus) -> None:
    await bus.channel.declare_queue("avatar.parked", durable=True)
    text = await refusal(amqp_url, agreed(1))
    assert "avatar.parked" in text
    assert "delete" in text


@pytest.mark.parametrize("record", [b"{", b"[]", b'{"shape":"round"}', b"7"])
async def test_a_record_of_somebody_else_is_refused(
    amqp_url: str, bus: Bus, connection: AbstractConnection, record: bytes
) -> None:
    await topology.declare(connection, agreed(1))
    await (await bus.channel.get_queue("avatar.topology")).purge()
    await bus.publish(record, "avatar.topology", exchange="")
    assert "avatar.topology" in await refusal(amqp_url, agreed(1))


async def test_what_a_worker_left_half_done_is_finished(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(4))
    await bus.channel.queue_delete("avatar.commands.v1.p03")
    await bus.channel.exchange_delete("avatar.interrupts")
    await topology.declare(connection, agreed(4))
    for number in range(50):
        await bus.interrupt(f"conversation-{number}")
    assert sum(await depths(bus, 4)) == 50


async def test_it_waits_for_a_worker_that_is_declaring(amqp_url: str, connection: AbstractConnection) -> None:
    async with await aio_pika.connect(amqp_url) as other:
        channel = await other.channel()
        await channel.declare_queue("avatar.topology.mutex", exclusive=True)
        declaring = asyncio.create_task(topology.declare(connection, agreed(1)))
        await asyncio.wait({declaring}, timeout=0.5)
        assert not declaring.done()
    await asyncio.wait_for(declaring, 10)


async def test_the_record_outlives_the_broker(owned_broker: OwnedBroker) -> None:
    async with await aio_pika.connect(owned_broker.url) as connection:
        await topology.declare(connection, agreed(2))
    owned_broker.restart()
    text = await refusal(owned_broker.url, agreed(3))
    assert "PARTITIONS=2" in text
    async with await aio_pika.connect(owned_broker.url) as connection:
        await topology.declare(connection, agreed(2))


@pytest.mark.timeout(180)
async def test_a_missing_plugin_is_named() -> None:
    with own_broker(plugins=()) as broker:
        text = await refusal(broker.url, agreed(2))
        assert "rabbitmq-plugins enable rabbitmq_sharding" in text
        assert "PARTITIONS=1" in text
        async with await aio_pika.connect(broker.url) as connection:
            await topology.declare(connection, agreed(1))


async def test_a_worker_that_is_refused_stops_by_itself(start: Start, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1, "another store"))
    with pytest.raises(TopologyError, match="STORE_URL"):
        async with start():
            pass


async def test_no_partition_more_than_two_digits_can_name(amqp_url: str) -> None:
    async with connected(amqp_url) as bus:
        await topology.declare(bus.connection, agreed(100))
        await topology.declare(bus.connection, agreed(100))
        assert "PARTITIONS=100" in await refusal(amqp_url, agreed(99))
