"""Looks at the broker without changing anything, as far as AMQP can see, and says what to do about what is wrong.

Bindings cannot be listed over AMQP: they are proven by probes. A worker would take a probe for a broken command, so
they are sent only while nobody consumes and the partition queues are empty, and under the topology's mutex, which keeps
workers from starting. Policies the management API shows; without it, a limit of deliveries is tried out. What cannot be
seen at all is in which order the hash exchange takes its queues; a worker notices by itself when a conversation has
changed its partition.
"""

import asyncio
import uuid
from collections import defaultdict
from functools import partial

from aio_pika import Message
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed, PublishError
from aiormq.exceptions import ChannelAccessRefused

from schemas import routes
from worker.amqp import topology
from worker.amqp.limit import Limit
from worker.amqp.management import Management, inspect_policies
from worker.amqp.topology import Record, Row
from worker.core.finding import Finding, State
from worker.errors import LinkLost, TopologyError

_PROBES_A_PARTITION = 16
"""Random keys: that a partition gets none of so many is a matter of one in a million."""
_PROBE_S = 10.0
_PROBE_EXPIRES_S = 60
"""If this process is killed amid it."""
_BODY = b'{"type":"topology.probe"}'
_DECLARE = "run `topology`, or start a worker"


async def inspect(
    connection: AbstractConnection, wanted: Record, management: Management | None = None, limit: Limit | None = None
) -> list[Finding]:
    """What is right, wrong and unknown about the broker, for workers with these settings."""
    findings = [_version(connection)]
    try:
        async with topology.locked(connection):
            if not await _row(connection, topology.RECORD):
                return [*findings, Finding.wrong("topology", f"nothing of it stands there yet: {_DECLARE}")]
            found, record = await _record(connection, wanted)
            findings += [found, *await _declarations(connection, record.partitions)]
            if any(finding.state is State.WRONG for finding in findings):
                findings.append(Finding.unchecked("bindings", "not before the rest is right"))
            else:
                findings += await _bindings(connection, record.partitions)
    except LinkLost as error:
        findings.append(Finding.unchecked("topology", f"{error}; try again"))
    except ChannelAccessRefused as error:
        findings.append(Finding.wrong("topology", str(error)))
    if management is None and limit is not None:
        findings.append(await limit.inspect())
    return [*findings, *await inspect_policies(management, wanted.partitions)]


async def permissions(connection: AbstractConnection) -> Finding:
    """Whether this user may do what a worker does, tried on queues of its own."""
    item, name = "permissions", f"avatar.doctor.{uuid.uuid4().hex}"
    try:
        async with connection.channel() as channel:
            queue = await channel.declare_queue(name, exclusive=True)
            await channel.declare_queue(exclusive=True)
            await channel.default_exchange.publish(Message(b""), name)
            await queue.get(no_ack=True)
            await queue.bind(routes.EVENTS, routing_key=name)
    except ChannelAccessRefused as error:
        mine = r"'^(avatar\.|amq\.)'"
        return Finding.wrong(item, f"{error}: rabbitmqctl set_permissions -p VHOST USER {mine} {mine} {mine}")
    except ChannelNotFoundEntity:
        pass  # no events exchange yet: all that could be tried has worked
    return Finding.ok(item, "configure, write and read")


def _version(connection: AbstractConnection) -> Finding:
    try:
        topology.demand_version(connection)
    except TopologyError as error:
        return Finding.wrong("version", str(error))
    return Finding.ok("version", f"RabbitMQ {topology.version(connection)}")


async def _record(connection: AbstractConnection, wanted: Record) -> tuple[Finding, Record]:
    """Whether a worker with these settings may run, and the record, as far as there is one."""
    item, record = "agreement", wanted
    async with connection.channel() as channel:  # closing it puts back what was taken
        found = await topology.records(channel, patient=True)
        if not found:
            return Finding.wrong(item, f"the queue {topology.RECORD} is empty: {_DECLARE}"), wanted
        try:
            record = topology.read(found[-1], wanted)
            topology.compare(record, wanted)
        except TopologyError as error:
            return Finding.wrong(item, str(error)), record
    text = (
        f"PARTITIONS={record.partitions}, PREFETCH={record.prefetch}, and the store is the one of this broker's workers"
    )
    return Finding.ok(item, text), record


async def _declarations(connection: AbstractConnection, partitions: int) -> list[Finding]:
    """Whether each exchange and queue is there as we would declare it, and no partition queue besides."""
    exchanges = topology.exchanges(partitions)
    queues = topology.queues(partitions)
    anew = f"stop all workers, let the queues run empty and run `topology repartition {partitions}`"
    wrong: list[Finding] = []
    for name, (kind, arguments) in exchanges.items():
        if said := await _differs(connection, "declare_exchange", name, type=kind, arguments=arguments):
            wrong.append(
                Finding.wrong(f"exchange {name}", said.format("stop all workers, delete it and run `topology`"))
            )
    for name, arguments in queues.items():
        if said := await _differs(connection, "declare_queue", name, arguments=arguments):
            kept = name in (routes.PARKED, routes.DEAD)
            wrong.append(Finding.wrong(f"queue {name}", said.format("delete it and run `topology`" if kept else anew)))
    for partition in range(partitions, routes.MAX_PARTITIONS):
        name = routes.partition_queue(partition)
        if await _row(connection, name):
            wrong.append(Finding.wrong(f"queue {name}", f"it is none of the {partitions} partitions: {anew}"))
    return wrong or [
        Finding.ok("declarations", f"{len(exchanges)} exchanges and {len(queues)} queues, as they should be")
    ]


async def _differs(connection: AbstractConnection, method: str, name: str, **properties: object) -> str:
    """What is wrong with a declaration, with a place for what to do; empty: nothing is."""
    try:
        async with connection.channel() as channel:
            declare = getattr(channel, method)
            await declare(name, passive=True)
            await declare(name, durable=True, **properties)
    except ChannelNotFoundEntity:
        return f"it is not there: {_DECLARE}"
    except ChannelPreconditionFailed as error:
        return str(error).replace("{", "{{").replace("}", "}}") + ": {}"
    return ""


async def _row(connection: AbstractConnection, name: str) -> Row | None:
    try:
        async with connection.channel() as channel:
            found = (await channel.declare_queue(name, passive=True)).declaration_result
    except ChannelNotFoundEntity:
        return None
    return Row(name, found.message_count or 0, found.consumer_count or 0)


async def _bindings(connection: AbstractConnection, partitions: int) -> list[Finding]:
    item = "bindings"
    rows = await topology.survey(connection, partitions)
    if any(row.consumers for row in rows):
        return [Finding.unchecked(item, "workers run: they would take the probes for commands")]
    if any(row.messages for row in rows if row.queue != routes.PARKED):
        return [Finding.unchecked(item, "commands wait, and no worker runs: the probes would be behind them")]
    async with connection.channel(on_return_raises=True) as channel:
        return await _Probes(channel, partitions).findings()


class _Probes:
    """Publishes where producers do, and looks in which partition queues that arrives.

    Each probe is known by its message id; whatever else comes is not acknowledged, and returns to its queue.
    """

    def __init__(self, channel: AbstractChannel, partitions: int) -> None:
        self._channel = channel
        self._partitions = partitions
        self._landed: defaultdict[str, list[int]] = defaultdict(list)
        self._sent: set[str] = set()
        self._arrived = asyncio.Event()

    async def findings(self) -> list[Finding]:
        """What the probes say of each way."""
        for partition in range(self._partitions):
            queue = await self._channel.get_queue(routes.partition_queue(partition), ensure=False)
            await queue.consume(partial(self._take, partition))
        keys = [f"probe-{uuid.uuid4().hex}" for _ in range(_PROBES_A_PARTITION * self._partitions)]
        commands = [await self._publish(routes.COMMANDS, key) for key in keys]
        interrupts = [await self._publish(routes.INTERRUPTS, key) for key in keys]
        # Behind all probes of its queue: once each has come back, nothing is on its way any more.
        markers = [await self._publish("", routes.partition_queue(partition)) for partition in range(self._partitions)]
        try:
            async with asyncio.timeout(_PROBE_S):
                while not all(map(self._landed.get, markers)):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            return [
                Finding.unchecked("bindings", f"a queue did not hand over its probes in {_PROBE_S:.0f} s; try again")
            ]
        return [self._commands(commands), self._interrupts(commands, interrupts), await self._dead()]

    def _commands(self, sent: list[str]) -> Finding:
        item = f"way {routes.COMMANDS}"
        if wrong := self._astray(sent):
            return Finding.wrong(item, wrong)
        reached = {partition for one in sent for partition in self._landed[one]}
        if missed := set(range(self._partitions)) - reached:
            text = f"no conversation has partition {', '.join(map(str, sorted(missed)))}: {self._anew}"
            return Finding.wrong(item, text)
        return Finding.ok(item, "each command reaches one partition, and every partition is used")

    def _interrupts(self, commands: list[str], interrupts: list[str]) -> Finding:
        item = f"way {routes.INTERRUPTS}"
        if wrong := self._astray(interrupts):
            return Finding.wrong(item, wrong)
        pairs = zip(commands, interrupts, strict=True)
        if any(self._landed[command] != self._landed[interrupt] for command, interrupt in pairs):
            return Finding.wrong(item, f"it has another partition than the speech it follows: {self._anew}")
        return Finding.ok(item, "the ordered copy reaches the partition of its conversation, once")

    async def _dead(self) -> Finding:
        """Gone at once, since nothing waits before it."""
        item = f"way {routes.DEAD}"
        try:
            await self._publish(routes.DEAD, "", expires_s=0.001)
        except PublishError:
            return Finding.wrong(item, f"what cannot be routed or delivered is lost: {_DECLARE}")
        return Finding.ok(item, "what cannot be routed or delivered is kept")

    def _astray(self, sent: list[str]) -> str:
        most = max(len(self._landed[one]) for one in sent)
        if most > 1:
            return f"it leads to {most} partitions at once, and everything would be said {most} times: {self._anew}"
        if not all(self._landed[one] for one in sent):
            return f"what is published there reaches no partition: {_DECLARE}"
        return ""

    @property
    def _anew(self) -> str:
        return f"run `topology repartition {self._partitions}`, which binds anew"

    async def _publish(self, exchange: str, key: str, expires_s: float = _PROBE_EXPIRES_S) -> str:
        message_id = uuid.uuid4().hex
        self._sent.add(message_id)
        message = Message(_BODY, message_id=message_id, expiration=expires_s)
        target = (
            await self._channel.get_exchange(exchange, ensure=False) if exchange else self._channel.default_exchange
        )
        await target.publish(message, key, mandatory=True)
        return message_id

    async def _take(self, partition: int, message: AbstractIncomingMessage) -> None:
        if message.message_id in self._sent:
            self._landed[message.message_id].append(partition)
            await message.ack()
            self._arrived.set()
