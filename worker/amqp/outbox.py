"""Publishes events, parked copies and answers, over a connection of its own. `ports.Outbox`.

Whatever is published is published until the broker confirms it. What was not confirmed may have arrived: it is
published again under the same CloudEvents `id`, but under a fresh AMQP `message_id`, since aiormq tells two publishes
in flight apart by that.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

import structlog
from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import DeliveryError, PublishError

from schemas import routes
from schemas.events import CONTENT_TYPE, Event, encode
from worker.amqp import topology
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.link import LOSSES, Loss, named_losses
from worker.amqp.notes import joined, knock, marker
from worker.amqp.parked import parked_copy
from worker.core.model import ReplyTo
from worker.core.verdict import Parked
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock, Delivery

_log = structlog.stdlib.get_logger(__name__)

CONFIRM_TIMEOUT_S = 30.0
RETRY_S = 0.2
LONGEST_RETRY_S = 5.0


class Outbox:
    """Publishes as soon as there is a connection, and waits for one. `ready` while there is one."""

    def __init__(
        self, *, source: str, worker: str, event_retry_s: float, clock: Clock, metrics: Metrics | None = None
    ) -> None:
        self.ready = asyncio.Event()
        self._source = source
        self._worker = worker
        self._event_retry_s = event_retry_s
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._events: AbstractChannel | None = None
        self._parking: AbstractChannel | None = None
        # One copy at a time: they keep the command's message_id, which two copies of one command share.
        self._turn_to_park = asyncio.Lock()

    async def session(self, connection: AbstractConnection) -> None:
        """Open the channels, and return only by raising: LinkLost when one of them is lost."""
        loss = Loss(connection)
        events = await connection.channel()
        parking = await connection.channel(on_return_raises=True)
        for channel in (events, parking):
            channel.close_callbacks.add(lambda _, error: loss.of(f"publishing channel closed: {error}"))
        await topology.declare_outgoing(events)
        self._events, self._parking = events, parking
        self.ready.set()
        try:
            await loss.wait()
        finally:
            self.ready.clear()

    async def tell(self, event: Event) -> None:
        """Publish an event; not `mandatory`: that nobody listens is normal."""
        body = encode(event, source=self._source, worker=self._worker)
        refused_since: float | None = None
        pause_s = RETRY_S
        while True:
            channel = await self._channel(parking=False)
            message = Message(
                body,
                content_type=CONTENT_TYPE,
                delivery_mode=DeliveryMode.PERSISTENT,
                message_id=uuid.uuid4().hex,
            )
            try:
                exchange = await channel.get_exchange(routes.EVENTS, ensure=False)
                await _publish(exchange, message, event.routing_key, mandatory=False)
            except DeliveryError:
                now = self._clock()
                refused_since = refused_since or now
                if now - refused_since >= self._event_retry_s:
                    self._metrics.dropped.inc()
                    _log.error(
                        logs.EVENT_LET_GO,
                        event_type=event.type,
                        conversation_id=event.subject,
                        hint="a queue bound to avatar.events is full and refuses messages",
                    )
                    return
            except LOSSES:
                pass
            else:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_RETRY_S)

    async def park(self, delivery: Delivery, parked: Parked) -> None:
        """Keep a copy; `mandatory`: it must lie somewhere before the command is acknowledged."""
        assert isinstance(delivery, AmqpDelivery)
        message = parked_copy(delivery, parked, self._clock())
        pause_s = RETRY_S
        async with self._turn_to_park:
            while True:
                channel = await self._channel(parking=True)
                try:
                    await _publish(channel.default_exchange, message, routes.PARKED, mandatory=True)
                except PublishError:
                    _log.error(logs.PARKING_FAILED, hint=f"the queue {routes.PARKED} is gone; declaring it again")
                    with contextlib.suppress(*LOSSES), named_losses():
                        await topology.declare_outgoing(channel)
                except LOSSES:
                    pass
                else:
                    break
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_RETRY_S)
        _log.warning(logs.COMMAND_PARKED, reason=parked.reason, error=parked.error, attempts=parked.attempts)

    async def answer(self, reply_to: ReplyTo, payload: Mapping[str, Any]) -> None:
        """Answer once: an answer that comes late, or to nobody, is of no use."""
        message = Message(
            json.dumps(payload, ensure_ascii=False).encode(),
            content_type="application/json",
            delivery_mode=DeliveryMode.NOT_PERSISTENT,
            correlation_id=reply_to.correlation_id,
            expiration=reply_to.expires_ms / 1000,
            message_id=uuid.uuid4().hex,
        )
        channel = await self._channel(parking=False)
        try:
            await _publish(channel.default_exchange, message, reply_to.queue, mandatory=False)
        except LOSSES as error:
            _log.warning(logs.ANSWER_FAILED, error=type(error).__name__)

    async def mark(self, conversation_id: str, old: int, new: int) -> bool:
        """See `ports.Outbox`; until the broker has confirmed it."""
        pause_s = RETRY_S
        while True:
            message = marker(conversation_id, new)
            channel = await self._channel(parking=True)
            try:
                await _publish(channel.default_exchange, message, routes.partition_queue(old), mandatory=True)
            except PublishError:
                return False
            except LOSSES:
                pass
            else:
                return True
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_RETRY_S)

    async def announce(self) -> None:
        """Tell the other workers that this one consumes all partitions; until the broker has confirmed it."""
        pause_s = RETRY_S
        while True:
            channel = await self._channel(parking=False)
            with contextlib.suppress(*LOSSES):
                exchange = await channel.get_exchange(topology.WORKERS, ensure=False)
                await _publish(exchange, joined(self._worker), "", mandatory=False)
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_RETRY_S)

    async def knock(self, partition: int) -> None:
        """Send a message that is no command to the partition, for its owner to learn that it is its owner."""
        if not self.ready.is_set():
            return
        message = knock()
        channel = await self._channel(parking=False)
        with contextlib.suppress(*LOSSES):
            await _publish(channel.default_exchange, message, routes.partition_queue(partition), mandatory=False)

    async def _channel(self, *, parking: bool) -> AbstractChannel:
        await self.ready.wait()
        channel = self._parking if parking else self._events
        assert channel is not None
        return channel


async def _publish(exchange: AbstractExchange, message: Message, routing_key: str, *, mandatory: bool) -> None:
    with named_losses():
        await exchange.publish(message, routing_key, mandatory=mandatory, timeout=CONFIRM_TIMEOUT_S)
