"""The other side of the broker: a producer that may publish anything, a listener, somebody who looks into queues."""

import asyncio
import json
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Self

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aiormq.abc import DeliveredMessage
from pamqp.commands import Basic

PATIENCE_S = 20.0

Document = dict[str, Any]


async def eventually(condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    """Return once the condition holds, for what nobody signals."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.01)


class Raw(str):
    """A short string whose bytes on the wire are these, whatever they are."""

    __slots__ = ("raw",)
    raw: bytes

    def __new__(cls, raw: bytes) -> Self:
        made = super().__new__(cls, raw.decode("latin-1"))
        made.raw = raw
        return made

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return self.raw if encoding == "utf-8" else super().encode(encoding, errors)


class Moment(datetime):
    """A time stamp of so many seconds since 1970, beyond what the calendar knows."""

    seconds: int

    @classmethod
    def of(cls, seconds: int) -> "Moment":
        made = cls(2000, 1, 1, tzinfo=UTC)
        made.seconds = seconds
        return made

    def timestamp(self) -> float:
        return self.seconds


def properties(**values: object) -> Basic.Properties:
    """Properties as they are, also where pamqp would refuse them."""
    made = Basic.Properties()
    for name, value in values.items():
        setattr(made, name, value)
    return made


class Bus:
    """One connection with a channel that confirms, and the events that have come since `listen`."""

    def __init__(self, connection: AbstractConnection, channel: AbstractChannel) -> None:
        self.connection = connection
        self.channel = channel
        self.events: list[Document] = []
        self.answers: list[AbstractIncomingMessage] = []
        self._terminal: defaultdict[str, set[str]] = defaultdict(set)
        self._arrived = asyncio.Condition()

    # Producer.

    async def publish(
        self,
        body: bytes | object,
        routing_key: str = "",
        *,
        exchange: str = "avatar.commands",
        properties: Basic.Properties | None = None,
        mandatory: bool = True,
    ) -> None:
        """Publish exactly these properties; returns when the broker has confirmed, and raises if it did not."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        channel = await self.channel.get_underlay_channel()
        await channel.basic_publish(
            raw, exchange=exchange, routing_key=routing_key, properties=properties, mandatory=mandatory
        )

    async def send(
        self, conversation_id: str, command: Document | bytes, *, exchange: str = "avatar.commands", **properties: Any
    ) -> str:
        """Publish as a well-behaved producer does; returns the message id."""
        message_id = properties.setdefault("message_id", uuid.uuid4().hex)
        headers = {"published-at-ms": round(time.time() * 1000), **properties.pop("headers", {})}
        full = Basic.Properties(delivery_mode=2, headers=headers, **properties)
        await self.publish(command, conversation_id, exchange=exchange, properties=full)
        return str(message_id)

    async def say(self, conversation_id: str, turn_id: str, text: str, *, final: bool = True, **properties: Any) -> str:
        command = {"turnId": turn_id, "text": text, "isFinal": final}
        return await self.send(conversation_id, command, **properties)

    async def interrupt(self, conversation_id: str, turn_id: str | None = None) -> str:
        command = {"type": "interrupt"} | ({"turnId": turn_id} if turn_id else {})
        return await self.send(conversation_id, command, exchange="avatar.interrupts")

    # Listener.

    async def listen(self) -> None:
        """Collect the events from now on."""
        await self.channel.declare_exchange("avatar.events", "topic", durable=True)
        queue = await self.channel.declare_queue(exclusive=True)
        await queue.bind("avatar.events", "#")
        await queue.consume(self._hear, no_ack=True)

    async def answer_queue(self) -> str:
        """A queue of ours for `reply_to`; what comes there is in `answers`."""
        queue = await self.channel.declare_queue(exclusive=True)
        await queue.consume(self._take_answer, no_ack=True)
        return queue.name

    async def until(self, condition: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
        """Return once the condition holds; it is looked at whenever something has arrived."""
        try:
            async with asyncio.timeout(within_s), self._arrived:
                await self._arrived.wait_for(condition)
        except TimeoutError:
            latest = "\n".join(
                f"{event['type']} {event['subject']} {event['data']}"[:200] for event in self.events[-20:]
            )
            raise AssertionError(f"not in {within_s} s; the latest events are\n{latest}") from None

    async def event(
        self, type_: str, subject: str | None = None, *, within_s: float = PATIENCE_S, **data: object
    ) -> Document:
        """The first event of that type (without `avatar.`), conversation and data, once it is there."""
        await self.until(lambda: bool(self.of(type_, subject, **data)), within_s)
        return self.of(type_, subject, **data)[0]

    async def ended(self, message_id: str, within_s: float = PATIENCE_S) -> Document:
        """The terminal event of a command, once it is there."""
        await self.until(lambda: message_id in self.terminal(), within_s)
        return next(event for event in self.events if message_id in event["data"].get("commandIds", ()))

    async def all_ended(self, message_ids: Iterable[str], within_s: float = PATIENCE_S) -> None:
        """Return when each of these commands has a terminal event; there must be exactly one."""
        wanted = set(message_ids)
        await self.until(lambda: len(self._terminal) >= len(wanted) and wanted <= self._terminal.keys(), within_s)
        several = {id_: ids for id_, ids in self.terminal().items() if len(ids) > 1}
        assert not several, f"more than one terminal event: {several}"

    def of(self, type_: str, subject: str | None = None, **data: object) -> list[Document]:
        """The events of that type (without `avatar.`), conversation and data."""
        return [
            event
            for event in self.events
            if event["type"] == f"avatar.{type_}"
            and subject in (None, event["subject"])
            and all(event["data"].get(name) == value for name, value in data.items())
        ]

    def terminal(self) -> dict[str, set[str]]:
        """For each command that has ended, the ids of the events that list it."""
        return dict(self._terminal)

    # Operator.

    async def depth(self, queue: str) -> int:
        """How many messages of it are ready."""
        async with self.connection.channel() as channel:
            found = await channel.declare_queue(queue, passive=True)
            return found.declaration_result.message_count or 0

    async def drained(self, *queues: str, within_s: float = PATIENCE_S) -> None:
        """Return once these queues have nothing ready."""
        async with asyncio.timeout(within_s):
            while any([await self.depth(queue) for queue in queues]):  # noqa: ASYNC110 - the broker has no such event
                await asyncio.sleep(0.05)

    async def left_in(self, queue: str) -> int:
        """How many messages of a partition nobody has acknowledged, once nobody consumes it any more.

        What a lost consumer held comes back some time later; but the next one gets it before whatever is newer.
        """
        marker = uuid.uuid4().hex
        await self.publish(b"", queue, exchange="", properties=properties(message_id=marker))
        arrived: asyncio.Queue[DeliveredMessage] = asyncio.Queue()
        async with self.connection.channel() as outer, asyncio.timeout(PATIENCE_S):
            channel = await outer.get_underlay_channel()
            await channel.basic_consume(queue, arrived.put)
            left = 0
            while (message := await arrived.get()).header.properties.message_id != marker:
                left += 1
            assert isinstance(message.delivery, Basic.Deliver)
            assert message.delivery.delivery_tag is not None
            await channel.basic_ack(message.delivery.delivery_tag)
        return left

    async def parked(self, count: int = 1) -> list[DeliveredMessage]:
        """Take so many copies out of `avatar.parked`, as they lie there."""
        async with self.connection.channel() as outer, asyncio.timeout(PATIENCE_S):
            channel = await outer.get_underlay_channel()
            taken: list[DeliveredMessage] = []
            while len(taken) < count:
                message = await channel.basic_get("avatar.parked", no_ack=True)
                if isinstance(message.delivery, Basic.GetOk):
                    taken.append(message)
                else:
                    await asyncio.sleep(0.02)
            return taken

    async def _hear(self, message: AbstractIncomingMessage) -> None:
        assert message.content_type == "application/cloudevents+json"
        event = json.loads(message.body)
        async with self._arrived:
            self.events.append(event)
            for message_id in event["data"].get("commandIds", ()):
                self._terminal[message_id].add(event["id"])
            self._arrived.notify_all()

    async def _take_answer(self, message: AbstractIncomingMessage) -> None:
        async with self._arrived:
            self.answers.append(message)
            self._arrived.notify_all()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Bus]:
    """A bus of one's own."""
    connection = await aio_pika.connect(url)
    async with connection, connection.channel(on_return_raises=True) as channel:
        yield Bus(connection, channel)
