"""What becomes of what is published, and what is told of it (DESIGN.md, section 4)."""

import asyncio
from collections.abc import AsyncIterator
from typing import cast

import aio_pika
import aiormq
import pytest
from aio_pika.abc import AbstractConnection
from aio_pika.exceptions import DeliveryError, PublishError
from pamqp.commands import Basic

from tests.integration.conftest import agreed
from tests.support.alarm import alarm
from tests.support.bus import Bus, connected, eventually
from tests.support.owner import Owner, fill
from tests.support.proxy import proxied
from worker.amqp import topology
from worker.local.broker import OwnedBroker


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        await topology.declare(connection, agreed(1))
        yield connection


@pytest.mark.parametrize("ids", [("same", "same"), ("one", "other")], ids=" ".join)
async def test_two_publishes_under_one_message_id_swap_their_results(amqp_url: str, ids: tuple[str, str]) -> None:
    """Why each attempt has a fresh one: an event that got lost would count as confirmed."""
    async with proxied(amqp_url) as proxy, await aio_pika.connect(proxy.url) as connection:
        channel = await connection.channel(on_return_raises=True)
        queue = await channel.declare_queue(exclusive=True)
        underlay = cast(aiormq.Channel, await channel.get_underlay_channel())
        proxy.answering.clear()
        publishing = [
            asyncio.create_task(
                channel.default_exchange.publish(aio_pika.Message(b"", message_id=message_id), key, mandatory=True)
            )
            for message_id, key in zip(ids, ("no queue of that name", queue.name), strict=True)
        ]
        await eventually(lambda: len(underlay.confirmations) == 2)
        proxy.answering.set()
        lost, arrived = await asyncio.gather(*publishing, return_exceptions=True)
        if ids == ("same", "same"):
            lost, arrived = arrived, lost
        assert isinstance(lost, PublishError)
        assert isinstance(arrived, Basic.Ack)


async def test_a_channel_publishes_on_after_a_confirm_that_came_too_late(amqp_url: str) -> None:
    """aio-pika 9 did not."""
    async with proxied(amqp_url) as proxy, await aio_pika.connect(proxy.url) as connection:
        channel = await connection.channel(on_return_raises=True)
        queue = await channel.declare_queue(exclusive=True)
        proxy.answering.clear()
        with pytest.raises(TimeoutError):
            await channel.default_exchange.publish(aio_pika.Message(b"0"), queue.name, mandatory=True, timeout=0.2)
        proxy.answering.set()
        for number in (1, 2):
            message = aio_pika.Message(b"%d" % number)
            await channel.default_exchange.publish(message, queue.name, mandatory=True, timeout=10)
        assert [(await queue.get(no_ack=True)).body for _ in range(3)] == [b"0", b"1", b"2"]


async def test_a_routing_key_of_more_than_255_bytes_is_not_published(connection: AbstractConnection) -> None:
    """No conversation id makes one: tests/core/test_events.py."""
    async with connection.channel() as channel:
        await channel.default_exchange.publish(aio_pika.Message(b""), "k" * 255)
        with pytest.raises(ValueError, match="255"):
            await channel.default_exchange.publish(aio_pika.Message(b""), "k" * 256)


async def test_an_interrupt_that_reaches_no_partition_is_confirmed_all_the_same(
    bus: Bus, connection: AbstractConnection
) -> None:
    """Why the topology is looked at leg by leg (tests/integration/test_inspection.py)."""
    commands = await bus.channel.get_exchange("avatar.commands")
    await commands.unbind("avatar.interrupts")
    express = await bus.channel.declare_queue(exclusive=True)
    await express.bind("avatar.interrupts")
    await bus.interrupt("c")
    assert await express.get(fail=False) is not None


async def test_an_interrupt_that_was_refused_has_been_heard_all_the_same(
    bus: Bus, connection: AbstractConnection
) -> None:
    """Why it may come again and change nothing."""
    full = await bus.channel.declare_queue(
        exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"}
    )
    await full.bind("avatar.commands", "#")
    express = await bus.channel.declare_queue(exclusive=True)
    await express.bind("avatar.interrupts")
    with pytest.raises(DeliveryError):
        await bus.interrupt("c")
    assert await express.get(fail=False) is not None


async def publish_on(bus: Bus, queue: str) -> None:
    """Until a publish is not confirmed: the first in an alarm may slip through."""
    while True:
        await bus.channel.default_exchange.publish(aio_pika.Message(b""), queue, timeout=0.5)


@pytest.mark.timeout(120)
async def test_in_an_alarm_no_ack_of_whoever_has_published_gets_through(owned_broker: OwnedBroker) -> None:
    """Why commands and events have connections of their own."""
    async with connected(owned_broker.url) as both, connected(owned_broker.url) as consuming:
        queues = [(await one.channel.declare_queue(exclusive=True)).name for one in (both, consuming)]
        for one, queue in zip((both, consuming), queues, strict=True):
            await fill(one, 2, queue)
        publisher, consumer = [
            await Owner.of(one.connection, prefetch=1, queue=queue)
            for one, queue in zip((both, consuming), queues, strict=True)
        ]
        await publisher.holds(1)
        await consumer.holds(1)
        async with alarm(owned_broker):
            with pytest.raises(TimeoutError):
                await publish_on(both, queues[0])
            acking = asyncio.gather(publisher.held[0].ack(), consumer.held[0].ack())
            assert await consumer.holds(2) == ["0", "1"]
            assert publisher.texts == ["0"]
        await acking
        assert (await publisher.holds(2))[:2] == ["0", "1"]
