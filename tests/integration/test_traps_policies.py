"""What policies do to queues of ours, whatever these were declared with: why `worker run` refuses some of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aio_pika.exceptions import DeliveryError

from schemas.routes import partition_queue
from tests.integration.conftest import agreed
from tests.support.bus import Bus, connected
from tests.support.owner import QUEUE, Owner, fill
from tests.support.policies import policies
from worker.amqp import topology
from worker.local.broker import OwnedBroker


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
        await bus.publish(b"", "c")
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
