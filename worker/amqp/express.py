"""Hears the express copies of interrupts, and workers that join: over a connection of its own.

On the one that consumes partitions, an interrupt would wait behind thousands of commands the broker has sent ahead.
"""

import asyncio
from collections.abc import Callable
from dataclasses import replace

from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from schemas import routes
from schemas.commands import Interrupt
from worker.amqp import notes, topology
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.link import Loss
from worker.amqp.reading import read
from worker.amqp.tenure import ChannelTenure
from worker.core.model import Entry
from worker.ports import Clock


class Express:
    """A queue of this worker's own, which goes with the connection. `ready` while it is consumed.

    `hear` takes interrupts; `make_way` takes the name of a worker that has joined all partitions.
    """

    def __init__(self, hear: Callable[[Entry], None], make_way: Callable[[str], None], clock: Clock) -> None:
        self.declared = asyncio.Event()
        """What the queue is bound to is there."""
        self.ready = asyncio.Event()
        self._hear = hear
        self._make_way = make_way
        self._clock = clock

    async def session(self, connection: AbstractConnection) -> None:
        """Consume, and return only by raising: LinkLost when any part of it is lost."""
        loss = Loss(connection)
        await self.declared.wait()
        outer = await connection.channel(publisher_confirms=False)
        outer.close_callbacks.add(lambda _, error: loss.of(f"channel of express interrupts closed ({error})"))
        queue = await outer.declare_queue(exclusive=True)
        await queue.bind(routes.INTERRUPTS)
        await queue.bind(topology.WORKERS)
        channel = await outer.get_underlay_channel()
        channel.on_consumer_cancel_callbacks.add(lambda _: loss.of("consumer of express interrupts cancelled"))
        tenure = ChannelTenure.of_no_partition(outer)
        moves_partitions = topology.moves_partitions(connection)

        async def receive(message: DeliveredMessage) -> None:
            delivery = AmqpDelivery(tenure, channel, message, self._clock())
            worker = notes.read_joined(delivery)
            if worker is not None:
                if moves_partitions:
                    self._make_way(worker)
                return
            # Whatever else may be published here is for its ordered copy to reject.
            received = read(delivery)
            if isinstance(received, Entry) and isinstance(received.command, Interrupt) and received.message_id:
                self._hear(replace(received, express=True))

        await channel.basic_consume(queue.name, receive, no_ack=True)
        self.ready.set()
        try:
            await loss.wait()
        finally:
            self.ready.clear()
