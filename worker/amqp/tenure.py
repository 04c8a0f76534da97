"""One channel's ownership of a partition: `ports.Tenure`."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Never, Self

from aio_pika import abc

from worker.amqp.delivery import AmqpDelivery
from worker.amqp.link import LOSSES, named_losses
from worker.amqp.reading import understand
from worker.core.model import Entry, Misfit
from worker.errors import LinkLost

RaiseEpoch = Callable[[int], Awaitable[int]]

_NO_PARTITION = -1


class ChannelTenure:
    """One channel's life as the consumer of a partition, `open` until it is given up or lost.

    `active` from its first delivery on: the broker has more consumers than one, but gives to one of them.

    The epoch is raised once, after the first delivery and a round trip on the channel begun after it. A broker may hand
    a partition back to a consumer that had lost it, without a sign, and a stopped process may wake to deliveries long
    given to others: only an answer on this very channel shows that it is alive.
    """

    def __init__(self, partition: int, channel: abc.AbstractChannel, raise_epoch: RaiseEpoch, prefetch: int) -> None:
        self.open = True
        self.active = False
        self.outranked = False
        self.given_up = asyncio.Event()
        self._partition = partition
        self._channel = channel
        self._raise_epoch = raise_epoch
        self._prefetch = prefetch
        self._epoch: int | None = None
        self._asking = asyncio.Lock()

    @classmethod
    def of_no_partition(cls, channel: abc.AbstractChannel) -> Self:
        """For what comes from elsewhere. Nothing is said under it, so it has no epoch."""
        return cls(_NO_PARTITION, channel, _no_epoch, prefetch=0)

    @property
    def partition(self) -> int:
        """The partition's number."""
        return self._partition

    async def epoch(self) -> int:
        """The number of this ownership.

        Raises:
            LinkLost: the tenure has ended before it was known.
        """
        async with self._asking:
            if self._epoch is None:
                try:
                    with named_losses():
                        await self._channel.set_qos(self._prefetch)
                except LOSSES as error:
                    raise LinkLost(f"the channel of partition {self._partition} is lost: {error}") from None
                self._epoch = await self._raise_epoch(self._partition)
        if not self.open:
            raise LinkLost("the partition was given up")
        return self._epoch

    def hand_over(self) -> None:
        """Another worker is to own the partition: leave it in order, for the broker would wait for all that is held."""
        self.outranked = True
        self.given_up.set()

    def refused(self) -> None:
        """Another worker owns the partition: give it up."""
        self.given_up.set()

    def unpack(self, key: str, packed: str, remove: Callable[[], None]) -> Entry | Misfit:
        """See `ports.Tenure`."""
        received = understand(AmqpDelivery.unpack(packed, self, remove))
        # Without an id of its own it was given one when it came first, and its attempt is known by that.
        return replace(received, key=key) if received.message_id is None else received

    def end(self) -> None:
        """Nothing is acknowledged, or begun, under this tenure any more."""
        self.open = False

    async def close(self) -> None:
        """Close the channel: what it holds goes back to the head of the queue, in order."""
        await self._channel.close()


async def _no_epoch(partition: int) -> Never:
    raise AssertionError(partition)
