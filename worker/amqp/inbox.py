"""Receives commands: one channel and one consumer a partition, deliveries handed on before the first await.

Consumes below aio_pika's messages, whose constructor raises on odd properties and would leave the command unanswered.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

import structlog
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from schemas import routes
from worker.amqp import notes, topology
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.express import Express
from worker.amqp.link import LOSSES, Loss, named_losses
from worker.amqp.reading import understand
from worker.amqp.tenure import ChannelTenure, RaiseEpoch
from worker.amqp.topology import Record
from worker.core.model import Entry, Marker, Misfit
from worker.core.ownership import score
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock

_log = structlog.stdlib.get_logger(__name__)

LEAVE_S = 2.0
"""How long an outranked worker waits for what is under way; what is not over then, the next owner waits for."""

Announce = Callable[[], Coroutine[Any, Any, None]]
"""Tells the other workers that this one has joined: not over the connection that consumes, see `link.is_blocked`."""

Demand = Callable[[], Coroutine[Any, Any, None]]
"""Raises TopologyError where the broker does what no declaration shows, see `management` and `limit`."""


async def _nothing() -> None:
    pass


class Receiver(Protocol):
    """Who is handed what arrives: plain calls, which must not wait."""

    def offer(self, entry: Entry) -> None:
        """A command."""

    def pass_through(self, marker: Marker) -> None:
        """A marker of a moved conversation."""

    def hear(self, entry: Entry) -> None:
        """The express copy of an interrupt."""

    def reject(self, misfit: Misfit) -> None:
        """A message that is none."""

    def forget(self, tenure: ChannelTenure) -> None:
        """What came under this tenure comes again."""

    async def leave(self, tenure: ChannelTenure) -> None:
        """Begin nothing more under this tenure; return when what was under way has ended and is acknowledged."""


class Inbox:
    """Consumes all partitions over one connection. `ready` while it does. `express` has another, and comes first."""

    def __init__(
        self,
        receiver: Receiver,
        raise_epoch: RaiseEpoch,
        announce: Announce,
        *,
        wanted: Record,
        worker: str,
        clock: Clock,
        metrics: Metrics | None = None,
        demand: Demand = _nothing,
    ) -> None:
        self.ready = asyncio.Event()
        self.express = Express(receiver.hear, self._make_way, clock)
        self._receiver = receiver
        self._raise_epoch = raise_epoch
        self._announce = announce
        self._wanted = wanted
        self._worker = worker
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._demand = demand
        self._tenures: dict[int, ChannelTenure] = {}
        self._rejoining: list[asyncio.Task[None]] = []
        self._leaving = asyncio.Event()

    async def session(self, connection: AbstractConnection) -> None:
        """Declare, consume, and return only by raising: LinkLost when any part of it is lost."""
        await topology.declare(connection, self._wanted)
        await self._demand()
        self.express.declared.set()
        loss = Loss(connection)
        self._rejoining = []
        announcing: asyncio.Task[None] | None = None
        try:
            if not self._leaving.is_set():
                await self._join_all(connection, loss)
                announcing = asyncio.create_task(self._announce())
            _log.info(logs.BROKER_CONNECTED, partitions=self._wanted.partitions)
            self.ready.set()
            await loss.wait()
        finally:
            self.ready.clear()
            beside = [*self._rejoining, *filter(None, [announcing])]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            for tenure in self._tenures.values():
                tenure.end()
                self._receiver.forget(tenure)

    async def _join_all(self, connection: AbstractConnection, loss: Loss) -> None:
        partitions = range(self._wanted.partitions)
        # First, so as to hear of every worker that joins a partition later.
        await self.express.ready.wait()
        for partition in partitions:
            await self._join(connection, partition, loss)
        self._rejoining = [asyncio.create_task(self._rejoin(connection, partition, loss)) for partition in partitions]

    async def leave(self) -> None:
        """Leave each partition as soon as nothing is under way there: others go on with it while the rest ends here."""
        self._leaving.set()
        for tenure in self._tenures.values():
            tenure.hand_over()
        if self._rejoining:
            await asyncio.wait(self._rejoining)

    def gate(self) -> None:
        """Acknowledge nothing any more: closing a channel that is still acknowledged on kills its connection."""
        for tenure in self._tenures.values():
            tenure.end()

    async def _rejoin(self, connection: AbstractConnection, partition: int, loss: Loss) -> None:
        """Whenever the partition has another owner, or is to have one, leave it and queue up for it again."""
        while not self._leaving.is_set():
            tenure = self._tenures[partition]
            await tenure.given_up.wait()
            self._metrics.left.labels("handed_over" if tenure.outranked else "lost").inc()
            if tenure.outranked:
                if tenure.active:
                    _log.info(logs.PARTITION_HANDED_OVER, partition=partition)
                with contextlib.suppress(TimeoutError):
                    # A worker that stops has its own time limit.
                    async with asyncio.timeout(None if self._leaving.is_set() else LEAVE_S):
                        await self._receiver.leave(tenure)
            else:
                _log.warning(logs.PARTITION_LOST, partition=partition)
            tenure.end()
            self._receiver.forget(tenure)
            try:
                with named_losses():
                    await tenure.close()
                    if not self._leaving.is_set():
                        await self._join(connection, partition, loss)
            except LOSSES as error:
                loss.of(f"partition {partition} could not be joined again: {error}")
                return

    async def _join(self, connection: AbstractConnection, partition: int, loss: Loss) -> None:
        queue = routes.partition_queue(partition)
        outer = await connection.channel(publisher_confirms=False)
        await outer.set_qos(self._wanted.prefetch)
        channel = await outer.get_underlay_channel()
        tenure = self._tenures[partition] = ChannelTenure(partition, outer, self._raise_epoch, self._wanted.prefetch)

        def lose_channel(what: str) -> None:
            if tenure.open:
                loss.of(f"{what} of {queue}")

        outer.close_callbacks.add(lambda _, error: lose_channel(f"channel closed ({error})"))
        channel.on_consumer_cancel_callbacks.add(lambda _: lose_channel("consumer cancelled by the broker"))

        async def receive(message: DeliveredMessage) -> None:
            if not tenure.open or tenure.outranked:
                return
            tenure.active = True
            delivery = AmqpDelivery(tenure, channel, message, self._clock())
            if notes.is_note(delivery):
                marker = notes.read_marker(delivery)
                if marker is None:
                    await delivery.settle()
                else:
                    self._receiver.pass_through(marker)
            else:
                self._receive(delivery)

        await channel.basic_consume(queue, receive, arguments={"x-priority": score(self._worker, partition)})

    def _make_way(self, worker: str) -> None:
        """Leave what a worker is to own that has joined."""
        for partition, tenure in self._tenures.items():
            if tenure.open and tenure.active and score(worker, partition) > score(self._worker, partition):
                tenure.hand_over()

    @property
    def owned(self) -> int:
        """How many partitions are this worker's just now, for all it knows."""
        return sum(tenure.open and tenure.active for tenure in self._tenures.values())

    def tenure_of(self, partition: int) -> ChannelTenure | None:
        """The tenure under which this worker owns the partition just now; None: it is another's, for all it knows."""
        tenure = self._tenures.get(partition)
        return tenure if tenure is not None and tenure.open and tenure.active else None

    def _receive(self, delivery: AmqpDelivery) -> None:
        received = understand(delivery)
        if isinstance(received, Entry):
            self._receiver.offer(received)
        else:
            self._receiver.reject(received)
