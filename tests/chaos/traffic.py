"""What goes in and comes out: producers that know what they published, a listener that misses nothing.

Every word says where it belongs, `c03-t2-n17-w0`: conversation, turn, chunk and place in the chunk. So the simulator's
transcript can be read without the worker's help.
"""

import asyncio
import json
import random
import time
import uuid
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage

from worker.amqp.link import LOSSES, connect, named_losses

_CONFIRM_S = 10.0
_PAUSE_S = 0.3


@dataclass(slots=True)
class Command:
    """A chunk, or an interrupt (which has no `words`), that the broker has confirmed; `number` within its conversation.

    Of an interrupt `turn` is the one it names, "" for all, and `silences` the turns of which nothing published later
    may be spoken. `attempts`: how often it was published before it was confirmed.
    """

    message_id: str
    conversation: str
    turn: str
    number: int
    words: tuple[str, ...] = ()
    silences: frozenset[str] = frozenset()
    attempts: int = 0
    published: float = 0.0
    confirmed: float = 0.0

    @property
    def interrupts(self) -> bool:
        """Whether it is no chunk."""
        return not self.words


@dataclass(slots=True)
class Arrival:
    """An event as it arrived, `at` monotonic seconds."""

    at: float
    event: dict[str, Any]


class _Peer:
    """A connection straight to the broker that comes back."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: AbstractConnection | None = None

    async def _connect(self) -> AbstractConnection:
        while True:
            try:
                self._connection = await connect(self._url, name="chaos", heartbeat_s=5)
            except LOSSES:
                await asyncio.sleep(_PAUSE_S)
            else:
                return self._connection

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            with suppress(*LOSSES), named_losses():
                async with asyncio.timeout(5):
                    await self._connection.close()


class _Talk:
    """One conversation, and what was published in it: `said`."""

    def __init__(self, name: str, dice: random.Random) -> None:
        self.name = name
        self.dice = dice
        self.turn = 0
        self.said: list[tuple[Command, bytes]] = []

    def chunk(self, *, final: bool, turn: str = "") -> tuple[Command, bytes]:
        """The next chunk of the turn."""
        turn = turn or f"t{self.turn}"
        size = self.dice.choices((1, 2, 5, 90), (50, 40, 9, 1))[0]
        words = tuple(f"{self.name}-{turn}-n{len(self.said)}-w{k}" for k in range(size))
        command = Command(uuid.uuid4().hex, self.name, turn, len(self.said), words)
        return self._note(command, {"turnId": turn, "text": " ".join(words) + " ", "isFinal": final})

    def interrupt(self, *, named: bool, silences: bool) -> tuple[Command, bytes]:
        """An interrupt of this turn, or of all."""
        turn = f"t{self.turn}"
        silent = frozenset({turn} if silences else ())
        command = Command(uuid.uuid4().hex, self.name, turn if named else "", len(self.said), silences=silent)
        return self._note(command, {"type": "interrupt"} | ({"turnId": turn} if named else {}))

    def _note(self, command: Command, body: dict[str, Any]) -> tuple[Command, bytes]:
        self.said.append((command, json.dumps(body).encode()))
        return self.said[-1]


class Producers(_Peer):
    """All conversations. What was not confirmed is published again under the same id; `stop` lets turns be closed."""

    def __init__(self, url: str, seed: int, *, conversations: int, rate: float) -> None:
        super().__init__(url)
        self.commands: list[Command] = []
        self.resent: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._names = [f"c{number:02}" for number in range(conversations)]
        self._pause_s = conversations / rate
        self._channel: AbstractChannel | None = None
        self._turn_to_connect = asyncio.Lock()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Publish until `stop`."""
        async with asyncio.TaskGroup() as group:
            for name in self._names:
                group.create_task(self._converse(name, random.Random(self._random.random())))

    def stop(self) -> None:
        """Let every conversation finish its turn at once."""
        self._stopping.set()

    async def _converse(self, name: str, dice: random.Random) -> None:
        talk = _Talk(name, dice)
        await self._rest(dice.uniform(0, self._pause_s))
        while not self._stopping.is_set():
            await self._take_turn(talk)
            await self._rest(dice.choice((0, 0, 0.2, 1, 3)))
        # Whatever happened before: at the end everybody is to be heard.
        for place in range(3):
            await self._publish(*talk.chunk(final=place == 2, turn="last"))

    async def _take_turn(self, talk: "_Talk") -> None:
        """A turn, perhaps interrupted; then come some late chunks of it, and the next turn at once."""
        dice = talk.dice
        talk.turn += 1
        length = dice.randint(3, 25)
        way = dice.choices(("", "named", "all", "unseen"), (70, 12, 12, 6))[0]
        last = dice.randrange(length) if way else length - 1
        final = False
        if way == "unseen":
            await self._publish(*talk.interrupt(named=True, silences=True))
        for place in range(last + 1):
            final = place == length - 1 or (place < last and self._stopping.is_set())
            await self._publish(*talk.chunk(final=final))
            if dice.random() < 0.02:
                self.resent["sent twice"] += 1
                await self._publish(*dice.choice(talk.said[-30:]))
            if final:
                break
            if place < last:
                await self._rest(dice.uniform(0.2, 1.8) * self._pause_s)
        if way in ("named", "all"):
            # A turn that was closed, and heard to its end, is nothing an interrupt of all can silence.
            await self._publish(*talk.interrupt(named=way == "named", silences=way == "named" or not final))
            for _ in range(dice.choice((0, 0, 1, 3)) if way == "named" or not final else 0):
                await self._publish(*talk.chunk(final=False))

    async def _rest(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _publish(self, command: Command, body: bytes) -> None:
        born_ms = time.time_ns() // 1_000_000
        again = bool(command.confirmed)
        command.published = command.published or time.monotonic()
        while True:
            channel = await self._open()
            command.attempts += not again
            message = aio_pika.Message(
                body,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                message_id=command.message_id,
                headers={"published-at-ms": born_ms},
            )
            try:
                with named_losses():
                    name = "avatar.interrupts" if command.interrupts else "avatar.commands"
                    exchange = await channel.get_exchange(name, ensure=False)
                    await exchange.publish(message, command.conversation, mandatory=True, timeout=_CONFIRM_S)
            except LOSSES:
                self.resent["unconfirmed"] += 1
                if self._channel is channel:
                    self._channel = None
                await asyncio.sleep(_PAUSE_S)
            else:
                break
        if not again:
            command.confirmed = time.monotonic()
            self.commands.append(command)

    async def _open(self) -> AbstractChannel:
        async with self._turn_to_connect:
            while self._channel is None or self._channel.is_closed:
                await self.close()
                try:
                    connection = await self._connect()
                    with named_losses():
                        self._channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
                except LOSSES:
                    await asyncio.sleep(_PAUSE_S)
            return self._channel


class Listener(_Peer):
    """Hears every event through a durable queue of its own, also over restarts of the broker."""

    QUEUE = "chaos.events"

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.arrivals: list[Arrival] = []
        self.ended: dict[str, dict[str, Arrival]] = {}
        """By command id and event id: the first arrival of each."""
        self.listening = asyncio.Event()
        self._recent: deque[tuple[float, str]] = deque(maxlen=400)

    async def run(self) -> None:
        """Listen until cancelled."""
        while True:
            connection = await self._connect()
            lost = asyncio.Event()
            connection.close_callbacks.add(lambda *_, lost=lost: lost.set())
            with suppress(*LOSSES), named_losses():
                channel = await connection.channel()
                channel.close_callbacks.add(lambda *_, lost=lost: lost.set())
                await channel.set_qos(500)
                await channel.declare_exchange("avatar.events", "topic", durable=True)
                queue = await channel.declare_queue(self.QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
                await queue.bind("avatar.events", "#")
                await queue.consume(self._hear)
                self.listening.set()
                await lost.wait()
            await self.close()
            await asyncio.sleep(_PAUSE_S)

    async def _hear(self, message: AbstractIncomingMessage) -> None:
        arrival = Arrival(time.monotonic(), json.loads(message.body))
        self.arrivals.append(arrival)
        self._recent.append((arrival.at, arrival.event["worker"]))
        for message_id in arrival.event["data"].get("commandIds", ()):
            self.ended.setdefault(message_id, {}).setdefault(arrival.event["id"], arrival)
        with suppress(*LOSSES), named_losses():
            await message.ack()

    def speakers(self, within_s: float = 0.5) -> list[str]:
        """The workers that told something lately, the busiest first."""
        since = time.monotonic() - within_s
        return [name for name, _ in Counter(name for at, name in self._recent if at >= since).most_common()]
