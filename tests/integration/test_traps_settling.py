"""What becomes of a partition by the way its deliveries are settled (DESIGN.md, section 4)."""

import asyncio
from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import ChannelPreconditionFailed, ConnectionChannelError
from pamqp.common import FieldTable

from tests.integration.conftest import agreed
from tests.support.bus import PATIENCE_S, Bus
from tests.support.owner import QUEUE, Owner, fill
from tests.support.proxy import proxied
from worker.amqp import topology

STUCK_S = 1.0
"""A partition that moves has moved after milliseconds."""


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        await topology.declare(connection, agreed(1))
        yield connection


async def after_a_requeue(bus: Bus, arguments: FieldTable) -> list[str]:
    """What a queue of four has left, in order, once its head was handed back."""
    await bus.channel.declare_queue("requeued", durable=True, arguments={"x-queue-type": "quorum", **arguments})
    await fill(bus, 4, "requeued")
    first = await Owner.of(bus.connection, prefetch=1, queue="requeued")
    await first.holds(1)
    await first.held[0].nack(requeue=True)
    await first.holds(2)
    await first.channel.close()
    second = await Owner.of(bus.connection, prefetch=10, queue="requeued")
    await bus.publish(b"last", "requeued", exchange="")
    async with asyncio.timeout(PATIENCE_S):
        for count in range(1, 10):
            if (await second.holds(count))[-1] == "last":
                break
    return second.texts[:-1]


async def test_a_requeue_goes_to_the_head_where_deliveries_are_limited(bus: Bus) -> None:
    assert await after_a_requeue(bus, {"x-delivery-limit": 1_000_000}) == ["0", "1", "2", "3"]


async def test_a_requeue_goes_to_the_tail_where_they_are_not(bus: Bus) -> None:
    """Why partitions have a limit. RabbitMQ 4 has one by itself."""
    unlimited: FieldTable = {"x-delivery-limit": -1} if topology.moves_partitions(bus.connection) else {}
    assert sorted(left := await after_a_requeue(bus, unlimited)) == ["0", "1", "2", "3"]
    assert left.index("0") > 1


async def test_no_limit_before_rabbitmq_4_is_written_as_minus_1(bus: Bus) -> None:
    """Why the limit is a million instead: there, -1 gives up what is returned once."""
    left = await after_a_requeue(bus, {"x-delivery-limit": -1})
    assert ("0" in left) is topology.moves_partitions(bus.connection)


@pytest.mark.parametrize("settled", ["acknowledged", "channel closed", "connection closed"])
async def test_a_partition_moves_when_its_owner_holds_nothing_any_more(
    amqp_url: str, bus: Bus, connection: AbstractConnection, settled: str
) -> None:
    """Why nothing is held for long: until then the partition is silent. Before RabbitMQ 4 it moves by closing only."""
    await fill(bus, 4)
    async with await aio_pika.connect(amqp_url) as other:
        owner = await Owner.of(other, prefetch=2)
        await owner.holds(2)
        outranking = await Owner.of(connection, prefetch=10, priority=5)
        moves = topology.moves_partitions(connection)
        await owner.held[0].ack()
        if moves:
            assert await bus.depth(QUEUE) == 2
        else:
            await owner.holds(3)
        match settled:
            case "acknowledged":
                for message in owner.held[1:]:
                    await message.ack()
            case "channel closed":
                await owner.channel.close()
            case _:
                await other.close()
        if settled != "acknowledged":
            assert await outranking.holds(3) == ["1", "2", "3"]
        elif moves:
            assert await outranking.holds(2) == ["2", "3"]
        else:
            assert await owner.holds(4) == ["0", "1", "2", "3"]
            assert outranking.held == []


@pytest.mark.parametrize("requeue", ["nack", "reject"])
async def test_a_partition_sticks_if_the_last_word_of_its_outranked_owner_is_a_requeue(
    bus: Bus, connection: AbstractConnection, requeue: str
) -> None:
    """Why nothing is ever handed back (tests/core/test_architecture.py): RabbitMQ 4.0 makes nobody the owner.

    Whoever subscribes then sets it free. Before RabbitMQ 4 no owner is outranked, and the order is lost instead.
    """
    await fill(bus, 4)
    owner = await Owner.of(connection, prefetch=2)
    await owner.holds(2)
    outranking = await Owner.of(connection, prefetch=10, priority=5)
    first, last = owner.held
    await first.ack()
    if requeue == "nack":
        await last.nack(requeue=True)
    else:
        await last.reject(requeue=True)
    if not topology.moves_partitions(connection):
        assert await owner.holds(4) == ["0", "1", "2", "1"]
        return
    if topology.version(connection).startswith("4.0."):
        with pytest.raises(TimeoutError):
            await outranking.holds(1, within_s=STUCK_S)
        assert await bus.depth(QUEUE) == 3
    await Owner.of(connection, prefetch=10)
    assert await outranking.holds(3) == ["1", "2", "3"]


async def test_owners_that_die_in_a_row_rotate_the_order_if_the_second_held_fewer(
    amqp_url: str, bus: Bus, connection: AbstractConnection
) -> None:
    """Why the whole fleet has one prefetch."""
    await fill(bus, 10)
    async with await aio_pika.connect(amqp_url) as one, await aio_pika.connect(amqp_url) as other:
        first = await Owner.of(one, prefetch=10, priority=2)
        second = await Owner.of(other, prefetch=3, priority=1)
        third = await Owner.of(connection, prefetch=10)
        await first.holds(10)
        await one.close()
        await second.holds(3)
        await other.close()
        assert await third.holds(10) == [*"3456789", *"012"]


@pytest.mark.parametrize("priority", [1.5, "5"])
async def test_a_priority_that_is_no_integer_is_refused(connection: AbstractConnection, priority: float | str) -> None:
    with pytest.raises(ChannelPreconditionFailed, match="x-priority"):
        await Owner.of(connection, prefetch=1, priority=priority)  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("priority", [0, 2**31 - 2])
async def test_any_integer_is_a_priority(bus: Bus, connection: AbstractConnection, priority: int) -> None:
    """All scores of `core.ownership`."""
    bodies = await fill(bus, 3)
    assert await (await Owner.of(connection, prefetch=3, priority=priority)).holds(3) == bodies


async def test_an_ack_on_a_channel_that_is_closed_kills_the_connection(
    amqp_url: str, bus: Bus, connection: AbstractConnection
) -> None:
    """Why acks are gated off before a channel is closed: aiormq sends them until it has heard that it is."""
    await fill(bus, 1)
    died: asyncio.Queue[BaseException | None] = asyncio.Queue()
    async with proxied(amqp_url) as proxy, await aio_pika.connect(proxy.url) as dying:
        dying.close_callbacks.add(lambda _, error: died.put_nowait(error))
        owner = await Owner.of(dying, prefetch=1)
        await owner.holds(1)
        proxy.answering.clear()
        closing = asyncio.ensure_future(owner.channel.close())
        heir = await Owner.of(connection, prefetch=1)
        await heir.holds(1)
        await owner.held[0].ack()
        proxy.answering.set()
        assert isinstance(await asyncio.wait_for(died.get(), PATIENCE_S), ConnectionChannelError)
        await asyncio.gather(closing, return_exceptions=True)
