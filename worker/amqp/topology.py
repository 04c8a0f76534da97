"""What stands on the broker (contract, section 1), declared the same by every worker, one worker at a time.

    avatar.interrupts ─fanout─▶ avatar.commands ─▶ avatar.commands.v1.p00, p01, …
                                   │   (several partitions: through a hash exchange)
                                   └─ alternate ─▶ avatar.dead

Which partition a conversation has depends on how many there are, so their number is the broker's, not a worker's: the
first worker writes it down, with the id of the store and the prefetch that all workers must share, as a message in the
queue `avatar.topology`; of several the last one counts. A worker with other settings stops and says so.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, replace

from aio_pika import DeliveryMode, Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, ChannelPreconditionFailed
from aiormq.exceptions import ChannelLockedResource
from pamqp.common import FieldTable

from schemas import routes
from worker.errors import LinkLost, TopologyError

QueueMissing = ChannelNotFoundEntity

IN_MEMORY = "memory"
"""The id of every store in memory: it need not be the same after a restart, since nothing is left of it."""

HASH = "avatar.commands.v1.hash"
HASH_TYPE = "x-modulus-hash"
RECORD = "avatar.topology"
WORKERS = "avatar.workers"
"""Fanout exchange over which workers tell each other that they have joined."""

MOVING = (4, 0)
"""The first RabbitMQ that gives a partition to whoever has the highest priority, also when it has an owner."""
OLDEST = (3, 10)
"""The oldest RabbitMQ that dead-letters at least once and lets a message expire in a quorum queue."""

DELIVERY_LIMIT = 1_000_000
"""A clean close of a channel adds a delivery to everything it held: a small limit dead-letters healthy commands."""

_MUTEX = "avatar.topology.mutex"
_MUTEX_PAUSE_S = 0.1
_MUTEX_TRIES = 300
_RECORD_PAUSE_S = 0.1
_RECORD_TRIES = 30
"""A record that a dying worker held comes back to its queue a moment after the mutex is free."""
_LOOKS = 10

KEPT: FieldTable = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
_PARTITION: FieldTable = {
    **KEPT,
    "x-single-active-consumer": True,
    "x-dead-letter-exchange": routes.DEAD,
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@dataclass(frozen=True, slots=True)
class Record:
    """What all workers of a broker must agree on.

    The prefetch is part of it since two owners that die in a row rotate the order when the second held fewer commands.
    """

    partitions: int
    store_id: str
    prefetch: int
    was: int | None = None
    """While a repartition is under way: how many partitions there were before."""


async def declare(connection: AbstractConnection, wanted: Record) -> None:
    """Declare what is missing, and check that the broker agrees with `wanted`.

    Raises:
        TopologyError: the broker is too old, has other partitions, another store or another prefetch, lacks the hash
            plugin, or has a queue or an exchange of ours that was declared otherwise.
    """
    demand_version(connection)
    async with locked(connection) as channel:
        compare(await _agree(connection, wanted), wanted)
        with refusals():
            await build(channel, wanted.partitions)


@contextlib.asynccontextmanager
async def locked(connection: AbstractConnection) -> AsyncIterator[AbstractChannel]:
    """A channel under which nobody else changes the topology, or reads the record."""
    async with connection.channel() as channel:
        await _lock(channel)
        yield channel
        await channel.queue_delete(_MUTEX)


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """Makes TopologyError of what the broker says where it has something else under our names, or lacks the plugin."""
    try:
        yield
    except ChannelPreconditionFailed as error:
        text = f"the broker has a queue or an exchange of ours with other properties; delete it or mend it: {error}"
        raise TopologyError(text) from None
    except AMQPError as error:
        if HASH_TYPE not in str(error):
            raise
        raise TopologyError(
            f"the broker lacks the exchange type {HASH_TYPE}, which PARTITIONS > 1 needs: "
            "run `rabbitmq-plugins enable rabbitmq_sharding` on every node of it, or set PARTITIONS=1"
        ) from None


@dataclass(frozen=True, slots=True)
class Row:
    """A queue as it stands."""

    queue: str
    messages: int
    consumers: int


async def survey(connection: AbstractConnection, partitions: int) -> list[Row]:
    """The queues, and how many messages are ready in each."""
    async with connection.channel() as channel:
        names = [*map(routes.partition_queue, range(partitions)), routes.PARKED, routes.DEAD]
        found = [(await channel.declare_queue(name, passive=True)).declaration_result for name in names]
    return [Row(row.queue or "", row.message_count or 0, row.consumer_count or 0) for row in found]


async def declare_outgoing(channel: AbstractChannel) -> None:
    """What events and parked copies are published to."""
    await channel.declare_exchange(routes.EVENTS, "topic", durable=True)
    await channel.declare_queue(routes.PARKED, durable=True, arguments=KEPT)


def exchanges(partitions: int) -> dict[str, tuple[str, FieldTable]]:
    """Type and arguments of each exchange."""
    several: dict[str, tuple[str, FieldTable]] = {HASH: (HASH_TYPE, {})} if partitions > 1 else {}
    return {
        routes.EVENTS: ("topic", {}),
        routes.DEAD: ("fanout", {}),
        routes.COMMANDS: ("topic", {"alternate-exchange": routes.DEAD}),
        routes.INTERRUPTS: ("fanout", {}),
        WORKERS: ("fanout", {}),
        **several,
    }


def queues(partitions: int) -> dict[str, FieldTable]:
    """The arguments of each queue."""
    return {
        routes.PARKED: KEPT,
        routes.DEAD: KEPT,
        **{routes.partition_queue(partition): _PARTITION for partition in range(partitions)},
    }


async def build(channel: AbstractChannel, partitions: int) -> None:
    """Declare and bind what is not there."""
    for name, (kind, arguments) in exchanges(partitions).items():
        await channel.declare_exchange(name, kind, durable=True, arguments=arguments)
    for name, arguments in queues(partitions).items():
        await channel.declare_queue(name, durable=True, arguments=arguments)
    underlay = await channel.get_underlay_channel()
    bind, bind_exchange = underlay.queue_bind, underlay.exchange_bind
    await bind(routes.DEAD, routes.DEAD, routes.DEAD)
    if partitions == 1:
        await bind(routes.partition_queue(0), routes.COMMANDS, "#")
    else:
        # In ascending order: the hash exchange numbers its queues as they were bound.
        for partition in range(partitions):
            await bind(routes.partition_queue(partition), HASH, f"{partition:02d}")
        # Last, so that nothing is hashed over half of the queues.
        await bind_exchange(HASH, routes.COMMANDS, "#")
    await bind_exchange(routes.COMMANDS, routes.INTERRUPTS)


async def _lock(channel: AbstractChannel) -> None:
    """Hold the exclusive queue that serves as a mutex; it goes with the connection, whatever happens."""
    for _ in range(_MUTEX_TRIES):
        try:
            await channel.declare_queue(_MUTEX, exclusive=True)
        except ChannelLockedResource:
            await channel.reopen()
            await asyncio.sleep(_MUTEX_PAUSE_S)
        else:
            return
    raise LinkLost(f"another worker has been declaring the topology for {_MUTEX_TRIES * _MUTEX_PAUSE_S:.0f} s")


async def _agree(connection: AbstractConnection, wanted: Record) -> Record:
    """The record on the broker; `wanted` becomes it where there are no partitions yet to be of another mind."""
    async with connection.channel() as channel:
        there = await _count_partitions(connection)
        found = await records(channel, patient=bool(there))
        record = replace(wanted, partitions=there or wanted.partitions)
        if there and found:
            record = read(found[-1], wanted)
        if not _stands(record, found):
            await write(channel, record, found)
        return record


def _stands(record: Record, found: list[AbstractIncomingMessage]) -> bool:
    """Whether there is nothing to write down: closing the channel puts back what was taken.

    In a memory alarm the broker stops reading from a connection that publishes: the worker could not consume on it.
    Now and then it is written anew all the same, since each look is a delivery, and a policy may limit their number.
    """
    if len(found) != 1 or json.loads(found[0].body) != asdict(record):
        return False
    looks = found[0].headers.get("x-delivery-count", 0)
    return isinstance(looks, int) and looks < _LOOKS


async def records(channel: AbstractChannel, *, patient: bool) -> list[AbstractIncomingMessage]:
    """The records, taken but not yet acknowledged, oldest first: mostly one. Only under the mutex.

    `patient`: there should be one.
    """
    queue = await channel.declare_queue(RECORD, durable=True, arguments=KEPT)
    found: list[AbstractIncomingMessage] = []
    tries = _RECORD_TRIES if patient else 0
    while True:
        message = await queue.get(fail=False)
        if message is not None:
            found.append(message)
        elif found or not tries:
            return found
        else:
            tries -= 1
            await asyncio.sleep(_RECORD_PAUSE_S)


async def write(channel: AbstractChannel, record: Record, instead_of: list[AbstractIncomingMessage]) -> None:
    """Write the record down. Written before the old one is taken: there is a record at any time."""
    message = Message(json.dumps(asdict(record)).encode(), delivery_mode=DeliveryMode.PERSISTENT)
    await channel.default_exchange.publish(message, RECORD)
    for one in instead_of:
        await one.ack()


def read(message: AbstractIncomingMessage, wanted: Record) -> Record:
    """The record in a message; what an older version did not write down is as `wanted` has it.

    Raises:
        TopologyError: it is none.
    """
    try:
        record = Record(**({"prefetch": wanted.prefetch} | json.loads(message.body)))
    except (ValueError, TypeError):
        text = f"the message in the queue {RECORD} is no record of this version; if it is nobody's, delete that queue"
        raise TopologyError(text) from None
    # A store in memory went with its worker: whoever comes next knows as much as it did.
    return replace(record, store_id=wanted.store_id) if record.store_id == IN_MEMORY else record


async def _count_partitions(connection: AbstractConnection) -> int:
    """How many partition queues there are already."""
    for partition in range(routes.MAX_PARTITIONS):
        channel = await connection.channel()
        try:
            await channel.declare_queue(routes.partition_queue(partition), passive=True)
        except ChannelNotFoundEntity:
            return partition
        await channel.close()
    return routes.MAX_PARTITIONS


def version(connection: AbstractConnection) -> str:
    """What the broker says it is, such as `3.10.8`."""
    transport = connection.transport
    assert transport is not None
    said = transport.connection.server_properties.get("version", b"")
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


def demand_version(connection: AbstractConnection) -> None:
    """Refuse a broker that could lose commands.

    Raises:
        TopologyError: it is too old.
    """
    if not _is_at_least(connection, OLDEST):
        oldest = ".".join(map(str, OLDEST))
        raise TopologyError(f"AMQP_URL: the broker is RabbitMQ {version(connection)}; {oldest} or later is needed")


def moves_partitions(connection: AbstractConnection) -> bool:
    """Whether the broker gives a partition to whoever outranks its owner."""
    return _is_at_least(connection, MOVING)


def _is_at_least(connection: AbstractConnection, oldest: tuple[int, int]) -> bool:
    """A broker that does not say what it is, is taken for a new one."""
    numbers = tuple(int(number) for number in version(connection).split(".")[:2] if number.isdecimal())
    return len(numbers) < len(oldest) or numbers >= oldest


def compare(record: Record, wanted: Record) -> None:
    """Demand that a worker with these settings may run.

    Raises:
        TopologyError: it may not; the text says what to set or to do.
    """
    if record.was is not None:
        raise TopologyError(
            f"a change from {record.was} to {record.partitions} partitions was begun and not finished: "
            f"run `topology repartition {record.partitions}` again"
        )
    if record.partitions != wanted.partitions:
        raise TopologyError(
            f"the broker has {record.partitions} partitions, PARTITIONS says {wanted.partitions}: "
            f"set PARTITIONS={record.partitions}; to change the number, stop all workers, let the queues run empty "
            f"and use `topology repartition {wanted.partitions}`"
        )
    if record.store_id != wanted.store_id:
        raise TopologyError(
            "the workers of this broker use another store than STORE_URL names; all must share one, since it knows the "
            "sessions: set STORE_URL to theirs. If that store is lost for good, delete the queue "
            f"{RECORD} while no worker runs: the next worker's store is then the one"
        )
    if record.prefetch != wanted.prefetch:
        raise TopologyError(
            f"the workers of this broker have PREFETCH={record.prefetch}, here it is {wanted.prefetch}; with different "
            f"ones the order could be lost: set PREFETCH={record.prefetch}; to change it, stop all workers, let the "
            f"queues run empty and use `topology repartition {record.partitions}` with the new PREFETCH"
        )
