"""One holder at a time, on the whole broker: an exclusive queue, which goes with its holder's connection.

An exclusive consumer would not do: not every RabbitMQ has one for quorum queues.
"""

from aio_pika.abc import AbstractChannel
from aiormq.exceptions import ChannelLockedResource


async def acquire(channel: AbstractChannel, name: str) -> bool:
    """Hold the mutex until the channel's connection ends. False: another connection does."""
    try:
        await channel.declare_queue(name, exclusive=True)
    except ChannelLockedResource:
        await channel.reopen()
        return False
    return True
