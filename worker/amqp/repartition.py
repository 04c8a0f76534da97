"""Changes the number of partitions, or binds the same number anew: while nobody works, and in steps to run again.

What the record says keeps the workers away in between. Nothing is taken apart before it is written down, nothing is
deleted before it is known that no command can come in any more.
"""

from dataclasses import dataclass, replace

from aio_pika.abc import AbstractChannel, AbstractConnection
from aio_pika.exceptions import ChannelNotFoundEntity

from schemas import routes
from worker.amqp import topology
from worker.amqp.topology import HASH, HASH_TYPE, Record, Row
from worker.errors import TopologyError


@dataclass(frozen=True, slots=True)
class Repartitioned:
    """What was changed: `before` is 0 where nothing stood on the broker yet."""

    before: int
    record: Record


async def repartition(connection: AbstractConnection, wanted: Record) -> Repartitioned:
    """Give the broker the partitions and the prefetch of `wanted`; the store stays whose it is.

    Interrupted at any point it leaves a broker that workers refuse, or a new one that they complete; run again it
    completes, too.

    Raises:
        TopologyError: a worker runs, a queue holds commands, or the broker lacks what it takes; nothing was changed,
            or what was is undone. The text says what to do.
    """
    topology.demand_version(connection)
    async with topology.locked(connection) as channel, connection.channel() as holding:
        queues = await _queues(connection)
        found = await topology.records(holding, patient=bool(queues))
        old = _written(topology.read(found[-1], wanted) if found else None, queues, wanted)
        await _demand_idle(channel, queues, old)
        record = replace(wanted, store_id=old.store_id)
        with topology.refusals():
            if record.partitions > 1:
                await channel.declare_exchange(HASH, HASH_TYPE, durable=True)
            if queues:
                await topology.write(holding, replace(record, was=_before(old)), found)
                await _unbind(channel, queues)
                # What slipped in since the first look cannot be followed by more.
                await _demand_idle(channel, await _queues(connection), replace(old, was=_before(old)))
            for partition in sorted(queues, reverse=True):
                await channel.queue_delete(routes.partition_queue(partition))
            # With no queue left this is the number, whoever builds the queues.
            await _finish(channel, record)
            await topology.build(channel, record.partitions)
        return Repartitioned(_before(old) if queues else 0, record)


async def _unbind(channel: AbstractChannel, queues: dict[int, Row]) -> None:
    """Let nothing in any more: what is published now goes to `avatar.dead`."""
    underlay = await channel.get_underlay_channel()
    await channel.exchange_delete(HASH)
    for row in queues.values():
        await underlay.queue_unbind(row.queue, routes.COMMANDS, "#")


async def _demand_idle(channel: AbstractChannel, queues: dict[int, Row], old: Record) -> None:
    consumed = [row for row in queues.values() if row.consumers]
    full = [row for row in queues.values() if row.messages]
    if not consumed and not full:
        return
    if old.was is not None:  # nothing is deleted yet: bind again what had been bound
        before = replace(old, partitions=old.was, was=None)
        await topology.build(channel, before.partitions)
        await _finish(channel, before)
    if consumed:
        raise TopologyError(
            f"a worker runs: {consumed[0].queue} has {consumed[0].consumers} consumers; stop all workers, "
            "and run this again"
        )
    held = ", ".join(f"{row.queue}: {row.messages}" for row in full[:4]) + (", …" if len(full) > 4 else "")
    raise TopologyError(
        f"commands wait in partition queues ({held}), and would be spoken out of order: let no producer publish, run "
        f"workers with PARTITIONS={_before(old)} until the queues are empty, stop them, and run this again"
    )


async def _finish(channel: AbstractChannel, record: Record) -> None:
    await topology.write(channel, record, await topology.records(channel, patient=False))


async def _queues(connection: AbstractConnection) -> dict[int, Row]:
    """The partition queues that there are, also beyond a gap."""
    found: dict[int, Row] = {}
    for partition in range(routes.MAX_PARTITIONS):
        channel = await connection.channel()
        name = routes.partition_queue(partition)
        try:
            result = (await channel.declare_queue(name, passive=True)).declaration_result
        except ChannelNotFoundEntity:
            continue
        found[partition] = Row(name, result.message_count or 0, result.consumer_count or 0)
        await channel.close()
    return found


def _written(found: Record | None, queues: dict[int, Row], wanted: Record) -> Record:
    """The record, as far as there is something it can be about."""
    if not queues:
        return wanted
    return found or replace(wanted, partitions=max(queues) + 1)


def _before(old: Record) -> int:
    """How many partitions there are, or were before a repartition was begun."""
    return old.partitions if old.was is None else old.was
