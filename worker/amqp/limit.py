"""Tries out whether a policy limits deliveries, where the management API is not asked: AMQP shows no policies.

A clean close of a channel counts as a delivery of all it held, so a small limit gives up commands that nobody has
tried. It is tried on a queue of our own that is declared as the partitions are, and whose name begins with one of
theirs: hardly a pattern takes in the partitions and not this.
"""

import asyncio
import contextlib
import uuid
from dataclasses import dataclass, field

import structlog
from aio_pika import Message
from aio_pika.abc import AbstractConnection
from pamqp.common import FieldTable

from schemas import routes
from worker.amqp import link, topology
from worker.amqp.link import LOSSES, named_losses
from worker.core.finding import Finding
from worker.errors import LinkLost, TopologyError
from worker.ops import logs

_log = structlog.stdlib.get_logger(__name__)

DELIVERIES = 22
"""More than the 20 after which RabbitMQ 4 gives up where nobody has said anything; hardly a policy allows more."""
_TIMEOUT_S = 5.0
_CLOSE_S = 1.0
"""In a memory alarm the broker does not read that either."""
_EXPIRES_MS = 60_000
"""If the trial is cut short."""
_LOOKS = 20
_LOOK_S = 0.05
_ITEM = "delivery limit"


@dataclass(frozen=True, slots=True)
class Limit:
    """The trial, over a connection of its own: one that publishes is not read from in a memory alarm."""

    url: str = field(repr=False)
    heartbeat_s: int

    async def inspect(self) -> Finding:
        """Whether a message is handed out as often as it was declared to be."""
        try:
            limit = await self._found()
        except LOSSES as error:
            return Finding.unchecked(_ITEM, f"it could not be tried: {str(error) or type(error).__name__}")
        if limit is not None:
            return Finding.wrong(_ITEM, _told(limit))
        return Finding.ok(_ITEM, f"a message was handed out {DELIVERIES} times")

    async def demand_none(self) -> None:
        """Refuse a broker that gives up early. That it cannot be tried is only warned of.

        Raises:
            TopologyError: it does.
        """
        try:
            limit = await self._found()
        except LOSSES as error:
            _log.warning(logs.POLICIES_UNCHECKED, error=str(error) or type(error).__name__)
            return
        if limit is not None:
            raise TopologyError(_told(limit))

    async def _found(self) -> int | None:
        connection = await link.connect(self.url, name="avatar-worker", heartbeat_s=self.heartbeat_s)
        trial = asyncio.create_task(_limit(connection))
        try:
            await asyncio.wait({trial}, timeout=_TIMEOUT_S)
            if trial.done():
                with named_losses():
                    return trial.result()
            raise TimeoutError(f"the broker has not answered within {_TIMEOUT_S:g} s")
        finally:
            try:
                with contextlib.suppress(*LOSSES):
                    await asyncio.wait_for(connection.close(), _CLOSE_S)
            finally:
                # Not before: it would wait for answers on its way out.
                trial.cancel()
                await asyncio.gather(trial, return_exceptions=True)


async def _limit(connection: AbstractConnection) -> int | None:
    """After how many deliveries the broker gives a message up; None: not after `DELIVERIES`.

    Raises:
        LinkLost: the message went away, but for no such limit.
    """
    limits = {await _handed_out(connection)}
    if limits != {DELIVERIES}:
        # A broker that is busy with itself may be slow to hand it out again, but not twice at the same number.
        limits.add(await _handed_out(connection))
    if limits == {DELIVERIES}:
        return None
    if len(limits) > 1 or limits == {0}:
        raise LinkLost("a message on a queue of ours went away; is there a policy with a `message-ttl`?")
    return limits.pop()


async def _handed_out(connection: AbstractConnection) -> int:
    """How often a message is handed out, up to `DELIVERIES` times."""
    name = f"{routes.partition_queue(0)}.probe.{uuid.uuid4().hex}"
    arguments: FieldTable = {**topology.KEPT, "x-expires": _EXPIRES_MS}
    async with connection.channel() as channel:
        await channel.declare_queue(name, durable=True, arguments=arguments)
        await channel.default_exchange.publish(Message(b""), name)
        count = 0
        while count < DELIVERIES and await _is_handed_out(connection, name):
            count += 1
        await channel.queue_delete(name)
    return count


async def _is_handed_out(connection: AbstractConnection, name: str) -> bool:
    """Take the message, and close the channel on it."""
    async with connection.channel(publisher_confirms=False) as channel:
        queue = await channel.get_queue(name, ensure=False)
        for _ in range(_LOOKS):
            if await queue.get(fail=False) is not None:
                return True
            await asyncio.sleep(_LOOK_S)
    return False


def _told(limit: int) -> str:
    return (
        f"a policy of the broker gives a message up after {limit} deliveries, though avatar.* are declared with "
        f"{topology.DELIVERY_LIMIT}; each close of a channel counts as a delivery, so commands would be given up that "
        "nobody has tried: clear it (see `rabbitmqctl list_policies` and `rabbitmqctl list_operator_policies`, or set "
        "MANAGEMENT_URL to have it named)"
    )
