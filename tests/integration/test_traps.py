"""What the design stands on, as the installed broker and libraries have it (DESIGN.md, section 4).

Traps that a room's own tests spring are not repeated here.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import DeliveryError, PublishError
from aiormq.exceptions import ChannelLockedResource

from schemas.routes import partition_queue
from tests.integration.conftest import agreed
from tests.support.alarm import alarm
from tests.support.bus import Bus, connected, properties
from tests.support.policies import policies
from worker.amqp import topology
from worker.local.broker import OwnedBroker

QUEUE = partition_queue(0)


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        await topology.declare(connection, agreed(1))
        yield connection


class Owner:
    """A consumer that acknowledges nothing by itself."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.held: list[AbstractIncomingMessage] = []
        self._arrived = asyncio.Condition()

    @classmethod
    async def of(cls, connection: AbstractConnection, prefetch: int) -> "Owner":
        owner = cls(await connection.channel())
        await owner.channel.set_qos(prefetch)
        queue = await owner.channel.get_queue(QUEUE)
        await queue.consume(owner._take)
        return owner

    async def holds(self, count: int) -> list[str]:
        """The texts it holds, once there are so many."""
        async with asyncio.timeout(20), self._arrived:
            await self._arrived.wait_for(lambda: len(self.held) >= count)
        return [message.body.decode() for message in self.held]

    async def _take(self, message: AbstractIncomingMessage) -> None:
        async with self._arrived:
            self.held.append(message)
            self._arrived.notify_all()


async def fill(bus: Bus, count: int) -> list[str]:
    bodies = [f"{number}" for number in range(count)]
    for body in bodies:
        await bus.publish(body.encode(), "c")
    return bodies


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


@asynccontextmanager
async def under_a_policy(broker: OwnedBroker, definition: dict[str, object], partitions: int = 1) -> AsyncIterator[Bus]:
    """All of ours, declared as ever, and such a policy on it."""
    async with connected(broker.url) as bus, policies(broker) as operator:
        await topology.declare(bus.connection, agreed(partitions))
        await operator.put("theirs", definition)
        yield bus


async def holding(bus: Bus, queue: str, count: int) -> None:
    """Return once so many messages are ready there."""
    async with asyncio.timeout(20):
        while await bus.depth(queue) < count:  # noqa: ASYNC110 - the broker has no such event
            await asyncio.sleep(0.05)


async def test_a_policy_lowers_the_delivery_limit_below_the_argument(owned_broker: OwnedBroker) -> None:
    """Nobody has tried this command, and the queue was declared with a limit of 1,000,000."""
    async with under_a_policy(owned_broker, {"delivery-limit": 2}) as bus:
        await fill(bus, 1)
        for _ in range(3):
            owner = await Owner.of(bus.connection, prefetch=10)
            assert await owner.holds(1) == ["0"]
            await owner.channel.close()
        await holding(bus, "avatar.dead", 1)
        assert await bus.depth(QUEUE) == 0


async def test_the_overflow_of_a_policy_goes_before_the_argument(owned_broker: OwnedBroker) -> None:
    """Commands that the producer knows to be taken are dropped."""
    async with under_a_policy(owned_broker, {"max-length": 5, "overflow": "drop-head"}) as bus:
        await fill(bus, 40)
        assert await bus.depth(QUEUE) == 5


async def test_a_policy_that_limits_the_length_alone_refuses_producers(owned_broker: OwnedBroker) -> None:
    async with under_a_policy(owned_broker, {"max-length": 5}) as bus:
        with pytest.raises(DeliveryError):
            await fill(bus, 40)
        assert await bus.depth(QUEUE) in range(5, 40)
        assert await bus.depth("avatar.dead") == 0


async def test_what_expires_by_a_policy_is_gone(owned_broker: OwnedBroker) -> None:
    """It comes to avatar.dead, and the policy is there as well."""
    async with under_a_policy(owned_broker, {"message-ttl": 1000}) as bus:
        await fill(bus, 3)
        await holding(bus, "avatar.dead", 1)
        await bus.drained(QUEUE, "avatar.dead")


async def test_arguments_that_go_before_a_policy(owned_broker: OwnedBroker) -> None:
    elsewhere: dict[str, object] = {"dead-letter-exchange": "theirs", "alternate-exchange": "theirs"}
    async with under_a_policy(owned_broker, elsewhere | {"delivery-limit": 0}) as bus:
        theirs = await bus.channel.declare_queue("theirs")
        await theirs.bind(await bus.channel.declare_exchange("theirs", "fanout"))
        await fill(bus, 1)
        owner = await Owner.of(bus.connection, prefetch=10)
        await owner.holds(1)
        await owner.channel.close()
        await holding(bus, "avatar.dead", 1)
        await (await bus.channel.get_queue(QUEUE)).unbind("avatar.commands", "#")
        await fill(bus, 1)
        assert await bus.depth("avatar.dead") == 2
        assert await bus.depth("theirs") == 0


async def test_the_dead_letters_of_a_policy_have_a_key_that_is_no_conversation(owned_broker: OwnedBroker) -> None:
    async with under_a_policy(owned_broker, {"delivery-limit": 0, "dead-letter-routing-key": "theirs"}) as bus:
        await fill(bus, 1)
        owner = await Owner.of(bus.connection, prefetch=10)
        await owner.holds(1)
        await owner.channel.close()
        await holding(bus, "avatar.dead", 1)
        dead = await (await bus.channel.get_queue("avatar.dead")).get()
        assert dead.routing_key == "theirs"


async def test_a_policy_of_the_sharding_plugin_takes_conversations_away(owned_broker: OwnedBroker) -> None:
    async with under_a_policy(owned_broker, {"shards-per-node": 2}, partitions=2) as bus:
        for number in range(40):
            await bus.publish(b"", f"conversation-{number}")
        assert await bus.depth(QUEUE) + await bus.depth(partition_queue(1)) < 40


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
