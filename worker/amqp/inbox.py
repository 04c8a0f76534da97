"""Receives commands: one channel and one consumer a partition, deliveries handed on before the first await.

Consumes below aio_pika's messages, whose constructor raises on odd properties and would leave the command unanswered.
"""

import asyncio
import contextlib
import hashlib
import re
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol

import structlog
from aio_pika import abc
from aio_pika.abc import AbstractConnection
from aiormq.abc import DeliveredMessage

from schemas import routes
from schemas.commands import FieldError, Interrupt, Malformed, RejectReason, parse
from worker.amqp import notes, topology
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.lenient import printable, readable
from worker.amqp.link import LOSSES, named_losses
from worker.amqp.topology import Record
from worker.core.model import Entry, Marker, Misfit, ReplyTo
from worker.core.ownership import score
from worker.errors import LinkLost
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock

_log = structlog.stdlib.get_logger(__name__)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EARLIEST_S = 1_577_836_800.0
"""2020: an older time stamp is a mistake of units, and would let everything expire unspoken."""
_FUTURE_S = 86_400.0
_REPLY_EXPIRES_MS = 30_000
_RUN_CHARS = 64

REPLAY = "avatar-replay"
"""Header: how often the command was sent again on purpose (`parked replay`), from 1. Each time is a life of its own."""
REPLAY_RUN = "avatar-replay-run"
"""Header: the same for all that was sent again together."""


LEAVE_S = 2.0
"""How long an outranked worker waits for what is under way; what is not over then, the next owner waits for."""

RaiseEpoch = Callable[[int], Awaitable[int]]
Announce = Callable[[], Coroutine[Any, Any, None]]
"""Tells the other workers that this one has joined: not over the connection that consumes, see `link.is_blocked`."""


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

    def forget(self, tenure: "ChannelTenure") -> None:
        """What came under this tenure comes again."""

    async def leave(self, tenure: "ChannelTenure") -> None:
        """Begin nothing more under this tenure; return when what was under way has ended and is acknowledged."""


class ChannelTenure:
    """`ports.Tenure`: one channel's life as the consumer of a partition, `open` until it is given up or lost.

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


class Inbox:
    """Consumes all partitions over one connection. `ready` while it does."""

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
    ) -> None:
        self.ready = asyncio.Event()
        self._receiver = receiver
        self._raise_epoch = raise_epoch
        self._announce = announce
        self._wanted = wanted
        self._worker = worker
        self._clock = clock
        self._metrics = metrics or Metrics()
        self._tenures: dict[int, ChannelTenure] = {}
        self._rejoining: list[asyncio.Task[None]] = []
        self._leaving = asyncio.Event()

    async def session(self, connection: AbstractConnection) -> None:
        """Declare, consume, and return only by raising: LinkLost when any part of it is lost."""
        await topology.declare(connection, self._wanted)
        loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def lose(what: str) -> None:
            if not loss.done():
                loss.set_result(what)

        connection.close_callbacks.add(lambda _, error: lose(f"connection closed: {error}"))
        self._rejoining = []
        announcing: asyncio.Task[None] | None = None
        try:
            if not self._leaving.is_set():
                await self._join_all(connection, lose)
                announcing = asyncio.create_task(self._announce())
            _log.info(logs.BROKER_CONNECTED, partitions=self._wanted.partitions)
            self.ready.set()
            raise LinkLost(await loss)
        finally:
            self.ready.clear()
            beside = [*self._rejoining, *filter(None, [announcing])]
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            for tenure in self._tenures.values():
                tenure.end()
                self._receiver.forget(tenure)

    async def _join_all(self, connection: AbstractConnection, lose: Callable[[str], None]) -> None:
        partitions = range(self._wanted.partitions)
        # First, so as to hear of every worker that joins a partition later.
        await self._join_express(connection, lose)
        for partition in partitions:
            await self._join(connection, partition, lose)
        self._rejoining = [asyncio.create_task(self._rejoin(connection, partition, lose)) for partition in partitions]

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

    async def _rejoin(self, connection: AbstractConnection, partition: int, lose: Callable[[str], None]) -> None:
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
                        await self._join(connection, partition, lose)
            except LOSSES as error:
                lose(f"partition {partition} could not be joined again: {error}")
                return

    async def _join(self, connection: AbstractConnection, partition: int, lose: Callable[[str], None]) -> None:
        queue = routes.partition_queue(partition)
        outer = await connection.channel(publisher_confirms=False)
        await outer.set_qos(self._wanted.prefetch)
        channel = await outer.get_underlay_channel()
        tenure = self._tenures[partition] = ChannelTenure(partition, outer, self._raise_epoch, self._wanted.prefetch)

        def lose_channel(what: str) -> None:
            if tenure.open:
                lose(f"{what} of {queue}")

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

    async def _join_express(self, connection: AbstractConnection, lose: Callable[[str], None]) -> None:
        """A queue of this worker's own, where interrupts arrive beside the backlog; it goes with the connection."""
        outer = await connection.channel(publisher_confirms=False)
        queue = await outer.declare_queue(exclusive=True)
        await queue.bind(routes.INTERRUPTS)
        await queue.bind(topology.WORKERS)
        outer.close_callbacks.add(lambda _, error: lose(f"channel of express interrupts closed ({error})"))
        channel = await outer.get_underlay_channel()
        channel.on_consumer_cancel_callbacks.add(lambda _: lose("consumer of express interrupts cancelled"))
        tenure = ChannelTenure(-1, outer, self._raise_epoch, self._wanted.prefetch)

        async def receive(message: DeliveredMessage) -> None:
            delivery = AmqpDelivery(tenure, channel, message, self._clock())
            worker = notes.read_joined(delivery)
            if worker is not None:
                if topology.moves_partitions(connection):
                    self._make_way(worker)
                return
            # Whatever else may be published here is for its ordered copy to reject.
            received = read(delivery)
            if isinstance(received, Entry) and isinstance(received.command, Interrupt) and received.message_id:
                self._receiver.hear(replace(received, express=True))

        await channel.basic_consume(queue.name, receive, no_ack=True)

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


def understand(delivery: AmqpDelivery) -> Entry | Misfit:
    """What a delivery is. Never raises: a message nobody thought of must not stay unanswered."""
    try:
        return read(delivery)
    except Exception:  # noqa: BLE001 - see above
        _log.exception(logs.DELIVERY_UNREADABLE)
        error = FieldError("$", "the message's properties cannot be read")
        malformed = Malformed(RejectReason.INVALID_FIELD, (error,), None)
        return Misfit(malformed, uuid.uuid4().hex, delivery, "")


def read(delivery: AmqpDelivery) -> Entry | Misfit:
    """What a delivery is: a command with its envelope, or a message that is none."""
    message = delivery.message
    properties = message.header.properties
    headers = properties.headers or {}
    routing_key = delivery.delivered.routing_key or ""
    command = parse(bytes(message.body), routing_key)
    message_id = readable(properties.message_id) if properties.message_id else None
    life = _life(headers.get(REPLAY))
    key = (f"{message_id}\nreplay {life}" if life else message_id) if message_id else uuid.uuid4().hex
    traceparent = headers.get("traceparent")
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent):
        traceparent = None
    reply_to = _reply_to(properties.reply_to, properties.correlation_id, headers.get("reply-timeout-ms"))
    if isinstance(command, Malformed):
        return Misfit(command, key, delivery, printable(routing_key)[:255], message_id, traceparent, reply_to)
    return Entry(
        command=command,
        key=key,
        born=_born(headers.get("published-at-ms"), properties.timestamp, delivery.received),
        delivery=delivery,
        message_id=message_id,
        fingerprint=hashlib.blake2b(bytes(message.body), digest_size=16).digest(),
        redelivered=bool(delivery.delivered.redelivered),
        traceparent=traceparent,
        reply_to=reply_to,
        replay=readable(str(headers.get(REPLAY_RUN, life)))[:_RUN_CHARS] if life else "",
    )


def _life(replay: object) -> int:
    """Which life of its id a command leads: 0 the first, one more each time it is sent again on purpose."""
    return replay if isinstance(replay, int) and not isinstance(replay, bool) and replay > 0 else 0


def _born(published_at_ms: object, timestamp: datetime | None, received: float) -> float:
    """Where a command's age counts from, in epoch seconds: what the producer says, if it can be true."""
    said: list[float] = []
    if isinstance(published_at_ms, int) and not isinstance(published_at_ms, bool):
        said.append(published_at_ms / 1000)
    if timestamp is not None:
        said.append(timestamp.timestamp())
    for seconds in said:
        if _EARLIEST_S <= seconds <= received + _FUTURE_S:
            return seconds
        _log.warning(logs.TIMESTAMP_IGNORED, hint="published-at-ms is epoch milliseconds, timestamp epoch seconds")
    return received


def _reply_to(queue: str | None, correlation_id: str | None, timeout_ms: object) -> ReplyTo | None:
    if not queue or queue.startswith("avatar.") or readable(queue) != queue:
        return None
    expires_ms = timeout_ms if isinstance(timeout_ms, int) and 0 < timeout_ms <= 3_600_000 else _REPLY_EXPIRES_MS
    if correlation_id is not None and readable(correlation_id) != correlation_id:
        correlation_id = None  # not UTF-8: it cannot be sent back as it was, and escaped it would match nothing
    return ReplyTo(queue, correlation_id, int(expires_ms))
