"""Empties `avatar.dead`, where the broker puts what it could not route or deliver: one worker at a time.

The others look now and then whether somebody does.
"""

import asyncio
from collections.abc import Awaitable, Callable

from aio_pika.abc import AbstractChannel, AbstractConnection
from aiormq.abc import DeliveredMessage

from schemas import routes
from worker.amqp import mutex, notes, topology
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.lenient import printable
from worker.amqp.reading import understand
from worker.amqp.tenure import ChannelTenure
from worker.core.model import Entry, Misfit
from worker.errors import LinkLost
from worker.ports import Clock

Take = Callable[[Entry | Misfit, str], Awaitable[None]]

LOOK_S = 2.0
PREFETCH = 100

_MUTEX = "avatar.dead.mutex"


class DeadQueue:
    """Hands over what lies there, one after the other: what it is, and why it came there."""

    def __init__(self, take: Take, clock: Clock) -> None:
        self._take = take
        self._clock = clock
        self._stopping = False

    def stop(self) -> None:
        """Hand over nothing more; what was handed over may still be acknowledged."""
        self._stopping = True

    async def session(self, connection: AbstractConnection) -> None:
        """Wait for the turn of this worker, then empty the queue, and return only by raising: LinkLost."""
        outer = await connection.channel(publisher_confirms=False)
        while not await _is_ours(outer):  # noqa: ASYNC110 - the broker has no such event
            await asyncio.sleep(LOOK_S)
        await outer.set_qos(PREFETCH)
        channel = await outer.get_underlay_channel()
        tenure = ChannelTenure.of_no_partition(outer)
        arrived: asyncio.Queue[AmqpDelivery | LinkLost] = asyncio.Queue()

        def lose(what: str) -> None:
            tenure.end()
            arrived.put_nowait(LinkLost(what))

        connection.close_callbacks.add(lambda _, error: lose(f"connection closed: {error}"))
        outer.close_callbacks.add(lambda _, error: lose(f"channel of {routes.DEAD} closed: {error}"))
        channel.on_consumer_cancel_callbacks.add(lambda _: lose(f"consumer of {routes.DEAD} cancelled by the broker"))

        async def receive(message: DeliveredMessage) -> None:
            arrived.put_nowait(AmqpDelivery(tenure, channel, message, self._clock()))

        await channel.basic_consume(routes.DEAD, receive)
        while True:
            delivery = await arrived.get()
            if isinstance(delivery, LinkLost):
                raise delivery
            if tenure.open and not self._stopping:
                if notes.was_note(delivery):
                    await delivery.settle()
                else:
                    await self._take(understand(delivery), _why(delivery.message))


async def _is_ours(channel: AbstractChannel) -> bool:
    """Whether this worker is the one from now on."""
    try:
        queue = await channel.declare_queue(routes.DEAD, passive=True)
    except topology.QueueMissing:
        await channel.reopen()
        return False
    # Asking for a mutex that is held is an error in the broker's log, every time.
    return not queue.declaration_result.consumer_count and await mutex.acquire(channel, _MUTEX)


def _why(message: DeliveredMessage) -> str:
    """What the broker says of it; the headers are its own, but anybody may write them."""
    headers = message.header.properties.headers or {}
    reason, queue = (headers.get(f"x-first-death-{name}") for name in ("reason", "queue"))
    if isinstance(reason, str) and isinstance(queue, str):
        return printable(f"the broker gave it up: {reason} in {queue}")
    return "the broker had no queue for it"
