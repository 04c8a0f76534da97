"""Hears the events of all conversations, as any listener may."""

import asyncio
from collections.abc import AsyncIterator

from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

from schemas import routes
from worker.errors import LinkLost


async def listen(connection: AbstractConnection) -> AsyncIterator[bytes]:
    """Each event from now on, as it was published; LinkLost when the connection goes.

    Raises:
        QueueMissing: there are no events on this broker.
    """
    channel = await connection.channel(publisher_confirms=False)
    heard: asyncio.Queue[AbstractIncomingMessage | None] = asyncio.Queue()
    # Also where only the channel goes, or the broker deletes the queue with its node.
    channel.close_callbacks.add(lambda *_: heard.put_nowait(None))
    queue = await channel.declare_queue(exclusive=True)
    await queue.bind(routes.EVENTS, routing_key="#")
    await queue.consume(heard.put, no_ack=True)
    return _all(heard)


async def _all(heard: "asyncio.Queue[AbstractIncomingMessage | None]") -> AsyncIterator[bytes]:
    while (message := await heard.get()) is not None:
        yield message.body
    raise LinkLost("the connection to the broker went away; try again")
