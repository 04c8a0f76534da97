"""Looks through `avatar.parked`, sends commands again and drops them.

What is looked at is held unacknowledged meanwhile, so only one at a time may look, behind a mutex. It goes back to the
head of the queue, in order, when the channel is closed, whatever happened. In order only if one consumer had it all:
to a quorum queue each `basic.get` is a consumer of its own, and the broker returns what many of them held in any order.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange, AbstractIncomingMessage, HeadersType
from aio_pika.exceptions import DeliveryError, PublishError

from schemas import routes
from schemas.commands import Malformed, RejectReason, SessionAttach, Speak, parse
from schemas.events import SpeechFailure
from worker.amqp import mutex
from worker.amqp.lenient import printable
from worker.amqp.link import LOSSES, named_losses
from worker.amqp.parked import REDACTED
from worker.amqp.reading import REPLAY, REPLAY_RUN
from worker.errors import ConfigurationError, LinkLost

CONFIRM_TIMEOUT_S = 30.0

_MOST = 65_535
"""How many commands can be looked at at once: the widest window there is."""
_SILENCE_S = 10.0
_MUTEX = "avatar.parked.mutex"
_MUTEX_PAUSE_S = 0.2
_MUTEX_TRIES = 50
_REDACTED_TOKEN = re.compile(rb'"token"\s*:\s*"' + re.escape(REDACTED.encode()) + rb'"', re.IGNORECASE)
_NOT_SENT_AGAIN = ("avatar-", "x-death", "x-first-death-", "x-last-death-", "x-delivery-count")
_FAILED = {f"{reason}" for reason in SpeechFailure}
_REJECTED = {f"{reason}" for reason in RejectReason}


@dataclass(frozen=True, slots=True)
class ParkedCommand:
    """One row of `parked list`. Times in epoch milliseconds; `stays_because`: why it cannot be replayed, if it cannot.

    `conversation_id` and `turn_id` are empty where none can be read; `replays` counts how often it was sent again.
    """

    parked_at_ms: int
    reason: str
    error: str
    routing_key: str
    message_id: str
    attempts: int
    conversation_id: str
    turn_id: str
    replays: int
    stays_because: str


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """A parked command with its message."""

    row: ParkedCommand
    message: AbstractIncomingMessage


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which parked commands are meant; what is None does not matter."""

    reason: str | None = None
    conversation_id: str | None = None
    older_than_s: float | None = None

    def matches(self, row: ParkedCommand, now: float) -> bool:
        """Whether the command is one of them; `now` in epoch seconds."""
        return (
            self.reason in (None, row.reason)
            and self.conversation_id in (None, row.conversation_id)
            and (self.older_than_s is None or now - row.parked_at_ms / 1000 > self.older_than_s)
        )


async def find(connection: AbstractConnection, wanted: Wanted, limit: int | None = None) -> list[ParkedCommand]:
    """The oldest parked commands that are wanted. They stay."""
    found: list[ParkedCommand] = []
    async with _opened(connection) as channel:
        async for copy in _look_through(channel):
            if len(found) == limit:
                break
            if wanted.matches(copy.row, time.time()):
                found.append(copy.row)
    return found


async def drop(connection: AbstractConnection, wanted: Wanted) -> AsyncIterator[ParkedCommand]:
    """Delete what is wanted; yields each as it is dropped."""
    async with _opened(connection) as channel:
        async for copy in _look_through(channel):
            if wanted.matches(copy.row, time.time()):
                await copy.message.ack()
                yield copy.row


async def plan(connection: AbstractConnection, wanted: Wanted) -> list[ParkedCommand]:
    """What `replay` would yield."""
    async with _opened(connection) as channel:
        return [copy.row for group in await _groups(channel, wanted) for copy in group]


async def replay(connection: AbstractConnection, wanted: Wanted) -> AsyncIterator[ParkedCommand]:
    """Send again what is wanted, whole turns in order; yields each when it lies in its queue and is parked no more.

    Those that stay are yielded too, in their place, untouched.

    Raises:
        LinkLost: the broker did not take one; it is parked still, as are those behind it.
    """
    async with _opened(connection) as channel, connection.channel(on_return_raises=True) as publishing:
        commands = await publishing.get_exchange(routes.COMMANDS)
        for group in await _groups(channel, wanted):
            run = uuid4().hex
            for copy in group:
                if not copy.row.stays_because:
                    await _publish(commands, copy, sent_again(copy, run=run, now=time.time()))
                    await copy.message.ack()
                yield copy.row


async def _publish(commands: AbstractExchange, copy: Copy, message: Message) -> None:
    routing_key = str(copy.message.headers.get("avatar-routing-key", ""))
    try:
        with named_losses():
            await commands.publish(message, routing_key, mandatory=True, timeout=CONFIRM_TIMEOUT_S)
    except (DeliveryError, PublishError, *LOSSES) as error:
        text = f"the broker did not take {copy.row.message_id or 'a command without an id'}: {error!r}"
        raise LinkLost(text) from None


def by_turn(copies: Iterable[Copy], wanted: Wanted, now: float) -> list[list[Copy]]:
    """The copies by turn, in order, of each turn all or none; what belongs to no turn stands alone."""
    groups: dict[object, list[Copy]] = {}
    for copy in copies:
        row = copy.row
        key = (row.conversation_id, row.turn_id) if row.turn_id else copy
        groups.setdefault(key, []).append(copy)
    return [found for found in groups.values() if any(wanted.matches(copy.row, now) for copy in found)]


def sent_again(copy: Copy, *, run: str, now: float) -> Message:
    """The command as it is published again: under its id, with a new time and a life of its own.

    `run` is the same for all that is sent again with it: a turn that failed is spoken again from there on, once.
    """
    original = copy.message
    kept: HeadersType = {
        name: value for name, value in original.headers.items() if not name.startswith(_NOT_SENT_AGAIN)
    }
    headers = {**kept, "published-at-ms": round(now * 1000), REPLAY: copy.row.replays + 1, REPLAY_RUN: run}
    return Message(
        original.body,
        headers=headers,
        content_type=original.content_type,
        delivery_mode=DeliveryMode.PERSISTENT,
        correlation_id=original.correlation_id,
        reply_to=original.reply_to,
        message_id=original.message_id,
        timestamp=now,
    )


@asynccontextmanager
async def _opened(connection: AbstractConnection) -> AsyncIterator[AbstractChannel]:
    """A channel to look with; closing it puts back what it was handed and did not take."""
    async with connection.channel(publisher_confirms=False) as channel:
        for _ in range(_MUTEX_TRIES):
            if await mutex.acquire(channel, _MUTEX):
                break
            await asyncio.sleep(_MUTEX_PAUSE_S)
        else:
            raise ConfigurationError("somebody else is looking through avatar.parked just now; try again later")
        yield channel


async def _look_through(channel: AbstractChannel) -> AsyncIterator[Copy]:
    """All that lies there by now, oldest first, up to `_MOST`; what comes meanwhile is for the next time.

    Raises:
        LinkLost: the broker has ceased to hand over.
    """
    queue = await channel.declare_queue(routes.PARKED, passive=True)
    arrived: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    await channel.set_qos(_MOST)
    await queue.consume(arrived.put)
    for _ in range(min(queue.declaration_result.message_count or 0, _MOST)):
        try:
            message = await asyncio.wait_for(arrived.get(), _SILENCE_S)
        except TimeoutError:
            text = f"the broker handed over no more of {routes.PARKED} for {_SILENCE_S:.0f} s; try again"
            raise LinkLost(text) from None
        yield Copy(_row(message), message)


async def _groups(channel: AbstractChannel, wanted: Wanted) -> list[list[Copy]]:
    return by_turn([copy async for copy in _look_through(channel)], wanted, time.time())


def _row(message: AbstractIncomingMessage) -> ParkedCommand:
    headers = message.headers
    reason = str(headers.get("avatar-reason", ""))
    routing_key = str(headers.get("avatar-routing-key", ""))
    command = parse(message.body, routing_key)
    return ParkedCommand(
        parked_at_ms=_number(headers.get("avatar-parked-at-ms")),
        reason=reason,
        error=str(headers.get("avatar-error", "")),
        routing_key=printable(routing_key),
        message_id=printable(message.message_id or ""),
        attempts=_number(headers.get("avatar-attempts")),
        conversation_id=command.conversation_id or "",
        turn_id=command.turn_id if isinstance(command, Speak) else "",
        replays=_number(headers.get(REPLAY)),
        stays_because=_stays_because(reason, str(headers.get("avatar-ended", ""))) or _lacks(command, message.body),
    )


def _stays_because(reason: str, ended: str) -> str:
    """Only what failed or was rejected may be sent again: anything else has had its effect, or is nobody's."""
    if not ended:
        return "" if reason in _FAILED | _REJECTED else "no worker parked it"
    return "" if ended.endswith((".failed", ".rejected")) else f"it had ended before, as {ended}"


def _lacks(command: object, body: bytes) -> str:
    if isinstance(command, SessionAttach | Malformed) and _REDACTED_TOKEN.search(body):
        return "its token was taken out; attach the session again"
    return ""


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0
