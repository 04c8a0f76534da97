"""Somebody who consumes a partition, and settles nothing by itself."""

import asyncio

from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from schemas.routes import partition_queue
from tests.support.bus import PATIENCE_S, Bus

QUEUE = partition_queue(0)


class Owner:
    """A consumer that acknowledges nothing by itself. `lost` once the broker has closed its channel or cancelled it."""

    def __init__(self, channel: AbstractChannel) -> None:
        self.channel = channel
        self.held: list[AbstractIncomingMessage] = []
        self.lost = asyncio.Event()
        self._arrived = asyncio.Condition()

    @classmethod
    async def of(
        cls, connection: AbstractConnection, prefetch: int, *, priority: int = 0, queue: str = QUEUE
    ) -> "Owner":
        owner = cls(await connection.channel())
        await owner.channel.set_qos(prefetch)
        underlay = await owner.channel.get_underlay_channel()
        owner.channel.close_callbacks.add(lambda *_: owner.lost.set())
        underlay.on_consumer_cancel_callbacks.add(lambda _: owner.lost.set())
        consumed = await owner.channel.get_queue(queue, ensure=False)
        await consumed.consume(owner._take, arguments={"x-priority": priority})
        return owner

    async def holds(self, count: int, within_s: float = PATIENCE_S) -> list[str]:
        """The texts it holds, once there are so many."""
        async with asyncio.timeout(within_s), self._arrived:
            await self._arrived.wait_for(lambda: len(self.held) >= count)
        return self.texts

    @property
    def texts(self) -> list[str]:
        """The texts it has been handed so far."""
        return [message.body.decode() for message in self.held]

    async def _take(self, message: AbstractIncomingMessage) -> None:
        async with self._arrived:
            self.held.append(message)
            self._arrived.notify_all()


async def fill(bus: Bus, count: int, queue: str = QUEUE) -> list[str]:
    """Publish so many texts, straight to the queue."""
    bodies = [f"{number}" for number in range(count)]
    for body in bodies:
        await bus.publish(body.encode(), queue, exchange="")
    return bodies
